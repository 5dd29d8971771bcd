"""Where masks are written: the solvers' own steps, with every coin, rank and symbol that they could draw."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddjax
from ddjax import grids, random
from ddjax.categorical import log_or_floor
from ddjax.fixtures import Categorical
from ddjax.fixtures.categorical import all_states
from ddjax.predictions import Prediction, planned
from ddjax.processes import Masked, StateMasked, Uniform, in_blocks
from ddjax.schedules import Cosine
from ddjax.solvers import Confidence, LeftToRight, Local, PathPlanning, Planner, RandomOrder, Unmask
from ddjax.solvers import unmask as module
from ddjax.solvers.orders import Choice
from ddjax.symbol_schedules import SymbolPolynomial

LAW = Categorical(2, 3, seed=1)
with jax.enable_x64(True):
    P = np.exp(np.asarray(LAW.log_p)).reshape(3, 3)
MASK = 3
MASKED = Masked(3)
STATES = all_states(2, 4)


@dataclasses.dataclass(frozen=True)
class Ranks:
    """An order given from outside, both of the two orders of two sites in turn."""

    def __call__(self, keys, choice):
        return jnp.asarray([[0, 1], [1, 0]])[jnp.arange(len(choice.xt)) % 2]


@functools.partial(jax.jit, static_argnums=0)
def transitions(solver, t, s, spent=1.0):
    """The probability of every move: `solver.step` with its draws replaced by all there are, and their laws caught.

    spent: how far the expected number of masks had come down by t.
    """
    ways = list(itertools.product(all_states(2, 2), all_states(2, 3), range(2)))  # coins, symbols, order
    coins, symbols = (jnp.asarray(np.tile([w[i] for w in ways], (16, 1))) for i in range(2))
    xt = jnp.asarray(np.repeat(STATES, len(ways), 0))
    weight = jnp.full(xt.shape[0], 0.5)

    def bernoulli(keys, p):
        nonlocal weight
        weight *= jnp.where(coins == 1, p, 1.0 - p).prod(-1)
        return coins == 1

    def categorical_where(keys, logits, where):
        nonlocal weight
        weight *= jnp.take_along_axis(jax.nn.softmax(logits), symbols[..., None], -1).prod((-1, -2))
        return symbols

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "bernoulli", bernoulli)
        patch.setattr(module, "categorical_where", categorical_where)
        carry = solver.init(xt)
        carry = (jnp.ones(xt.shape, bool), carry[1] * 0 + spent) if isinstance(solver, PathPlanning) else carry
        keys = random.example_keys(jax.random.key(0), xt.shape[0])
        xs, _, _ = solver.step(keys, carry, xt, t, s, LAW.denoise(solver.process, "cavity"))
    if getattr(solver, "count", "") != "binomial":
        weight /= 4  # the coins were not tossed
    return jnp.zeros((16, 16)).at[xt @ jnp.array([4, 1]), xs @ jnp.array([4, 1])].add(weight)


def law_of_two_steps(solver, middle=0.5):
    """Of the output, over the clean configurations; half of the two masks are left in the middle."""
    first, second = (np.asarray(transitions(solver, *times)) for times in ((1.0, middle), (middle, 0.0)))
    out = (first[15] @ second).reshape(4, 4)
    assert out[MASK].sum() + out[:, MASK].sum() < 1e-12
    return out[:3, :3]


def test_a_binomial_number_in_random_order_is_the_reverse_process(x64):
    """Against the product of the sites' laws, by hand."""
    process = Masked(3, Cosine())
    t, s = 0.8, 0.3
    p = 1 - np.sin(np.pi * s / 2) / np.sin(np.pi * t / 2)
    expected = np.zeros((16, 16))
    for n, (a, b) in enumerate(STATES):
        joint = P.copy()
        joint = joint if a == MASK else joint * (np.arange(3) == a)[:, None]
        joint = joint if b == MASK else joint * (np.arange(3) == b)
        moves = []
        for x, posterior in ((a, joint.sum(1)), (b, joint.sum(0))):
            moves.append(np.append(p * posterior / joint.sum(), 1 - p) if x == MASK else np.eye(4)[x])
        expected[n] = np.outer(*moves).ravel()
    solver = Unmask(process, Ranks(), "binomial")
    np.testing.assert_allclose(transitions(solver, t, s), expected, atol=1e-12)


EXACT = [Confidence("entropy"), Confidence("margin"), Ranks(), LeftToRight()]


@pytest.mark.parametrize("order", EXACT, ids=str)
def test_an_order_by_the_laws_alone_is_exact_one_site_at_a_time(x64, order):
    np.testing.assert_allclose(law_of_two_steps(Unmask(MASKED, order)), P, atol=1e-12)


@pytest.mark.slow
def test_random_order_one_at_a_time_over_the_whole_table():
    """The sampler itself: 200,000 samples and five seeds, each with p > 0.001 (8 degrees of freedom)."""
    for seed in range(5):
        x = ddjax.sample(
            jax.random.key(seed),
            LAW.denoise(MASKED),
            MASKED,
            shape=(200_000, 2),
            solver=Unmask(MASKED, RandomOrder()),
            times=grids.uniform(2),
        ).x0
        found, expected = np.bincount(np.asarray(x) @ [3, 1], minlength=9), 200_000 * P.ravel()
        assert ((found - expected) ** 2 / expected).sum() < 26.1


def greedy(p):
    """The law of writing the likelier of two drawn symbols first, and the other given it; equal ones left first."""
    rows, columns = p.sum(1), p.sum(0)
    out = np.zeros_like(p)
    for a, b in itertools.product(range(len(p)), repeat=2):
        drawn = rows[a] * columns[b]
        if rows[a] >= columns[b]:
            out[a] += drawn * p[a] / rows[a]
        else:
            out[:, b] += drawn * p[:, b] / columns[b]
    return out


def test_confidence_in_the_drawn_symbol_is_biased_by_as_much_as_said(x64):
    law = law_of_two_steps(Unmask(MASKED, Confidence()))
    np.testing.assert_allclose(law, greedy(P), atol=1e-12)
    assert 0.15 < 0.5 * np.abs(law - P).sum() < 0.25  # docs/results.md


@pytest.mark.slow
@pytest.mark.parametrize("order", [Confidence(), RandomOrder()], ids=str)
def test_one_step_writes_everything_at_once(x64, order):
    out = np.asarray(transitions(Unmask(MASKED, order), 1.0, 0.0))[15].reshape(4, 4)[:3, :3]
    np.testing.assert_allclose(out, np.outer(P.sum(1), P.sum(0)), atol=1e-12)


@pytest.mark.parametrize("eta", [0.5, pytest.param(2.0, marks=pytest.mark.slow)])
def test_path_planning_masks_what_it_believes_least(x64, eta):
    """One symbol a is written, one is drawn (b), and one of the two is kept: by hand."""
    moves = np.asarray(transitions(PathPlanning(MASKED, eta), 0.75, 0.5, spent=0.75)).reshape(4, 4, 4, 4)
    for a in range(3):
        expected = np.zeros((4, 4))
        for b in range(3):
            drawn = P[a, b] / P[a].sum()
            keeps = eta * np.log(P.sum(1)[a]) >= np.log(drawn)
            expected[(a, MASK) if keeps else (MASK, b)] += drawn
        np.testing.assert_allclose(moves[a, MASK], expected, atol=1e-12)


def known(batch, sites, j):
    """The first j sites of each row known to be 1."""
    mask = jnp.broadcast_to(jnp.arange(sites) < j, (batch, sites))
    return ddjax.Observed(mask, jnp.ones((batch, sites), jnp.int32))


def longer(xt, t, cond=None):
    """A network of 5 symbols that depends on the whole row, and on nothing else."""
    code = (jnp.where(xt == 5, 7, xt) * jnp.arange(1, xt.shape[1] + 1)).sum(-1)
    return Prediction(jnp.sin(code[:, None, None] * jnp.arange(1.0, 6.0) + jnp.arange(xt.shape[1])[:, None]), "cavity")


@functools.cache
def draw(solver, batch, steps, observed=0, sites=11):
    times = grids.cosine(steps)
    return ddjax.sample(
        jax.random.key(2),
        planned(longer, lambda xt, t, cond: Prediction(jnp.cos(1.0 * xt), "planner")),
        solver.process,
        shape=(batch, sites),
        solver=solver,
        times=times,
        observed=known(batch, sites, observed) if observed else None,
        trajectory=True,
    )


LONG = Masked(5, Cosine())
BLOCKS = in_blocks(Masked(5), 11, 4)
SOLVERS = [
    Unmask(LONG, Confidence("probability", 2.0)),
    PathPlanning(LONG, 1.5),
    Unmask(LONG, Local()),
    Unmask(LONG, RandomOrder(), "binomial"),
    Unmask(LONG, Planner()),
    PathPlanning(LONG, 1.0, "trained"),
]


@pytest.mark.parametrize("solver", [SOLVERS[0], *(pytest.param(s, marks=pytest.mark.slow) for s in SOLVERS[1:])])
def test_rows_do_not_depend_on_each_other_and_known_sites_stay(solver):
    whole = draw(solver, 7, 4, observed=3)
    for batch in (1, 2):
        np.testing.assert_array_equal(draw(solver, batch, 4, observed=3).x0, whole.x0[:batch])
    path = np.asarray(whole.trajectory)
    assert (path[:, :, :3] == 1).all()
    assert path[-1].max() < 5
    calls = 2 if "Planner" in str(solver) or "trained" in str(solver) else 1
    np.testing.assert_array_equal(whole.nfe, 4 * calls)


@pytest.mark.parametrize("steps", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 5)), 40])
def test_the_number_left_is_the_expected_one_rounded(steps):
    """Of the sites that an example began with, whatever is known and whatever the number of steps."""
    path = np.asarray(draw(SOLVERS[0], 2, steps, observed=3).trajectory)
    sigma = np.sin(np.pi / 2 * np.asarray(grids.cosine(steps), np.float64))
    left = (path == 5).sum(-1)
    np.testing.assert_allclose(left, (8 * sigma)[:, None] * np.ones(2), atol=0.503)
    assert (left[-1] == 0).all()


@pytest.mark.slow
def test_greedy_path_planning_is_confidence():
    a, b = draw(PathPlanning(LONG, 0.0), 7, 5), draw(Unmask(LONG, Confidence()), 7, 5)
    np.testing.assert_array_equal(a.trajectory, b.trajectory)
    assert np.any(np.asarray(a.trajectory) != np.asarray(draw(PathPlanning(LONG, 3.0), 7, 5).trajectory))


@pytest.mark.slow
def test_blocks_are_written_one_after_the_other():
    solver = Unmask(BLOCKS, Confidence())
    out = ddjax.sample(
        jax.random.key(0),
        longer,
        BLOCKS,
        shape=(3, 11),
        solver=solver,
        times=grids.in_turn(grids.uniform(2), 3),
        trajectory=True,
    )
    left = (np.asarray(out.trajectory) == 5).sum(-1)
    np.testing.assert_array_equal(left, np.array([11, 9, 7, 5, 3, 1, 0])[:, None] * np.ones(3))


@pytest.mark.slow
def test_one_site_any_order():
    law = Categorical(1, 3)
    for order in (RandomOrder(), Confidence("margin"), Local(), LeftToRight()):
        x = ddjax.sample(
            jax.random.key(0),
            law.denoise(MASKED),
            MASKED,
            shape=(20_000, 1),
            solver=Unmask(MASKED, order),
            times=grids.uniform(2),
        ).x0
        counts, expected = np.bincount(np.asarray(x)[:, 0], minlength=3), 20_000 * np.exp(np.asarray(law.log_p))
        assert ((counts - expected) ** 2 / expected).sum() < 25


def group_by_hand(written, number, luck, proximity=1.0, repulsion=1):
    """The paper's two loops, on coordinates."""
    sites = list(np.ndindex(written.shape))
    luck = dict(zip(sites, luck, strict=True))
    away = lambda a, b: np.abs(np.subtract(a, b)).max()
    near = {
        a: sum(1 / np.linalg.norm(np.subtract(a, b)) for b in sites if written[b] and away(a, b) == 1) for a in sites
    }
    free = [a for a in sites if not written[a]]
    close = [a for a in free if near[a] >= proximity - 1e-9]
    group = []
    for a in sorted(close, key=lambda a: (-round(near[a], 3), -luck[a])):
        if len(group) < number and all(away(a, b) > repulsion for b in group):
            group.append(a)
    while len(group) < min(number, len(free)):
        distance = lambda a: round(min([np.linalg.norm(np.subtract(a, b)) for b in group], default=np.inf), 6)
        group.append(max((a for a in free if a not in group), key=lambda a: (distance(a), luck[a])))
    return set(group)


@pytest.mark.parametrize("shape", [(5, 6), pytest.param((17,), marks=pytest.mark.slow)])
def test_local_groups_are_the_papers(shape):
    rng, batch = np.random.default_rng(0), 12
    written = rng.uniform(size=(batch, *shape)) < np.linspace(0, 0.9, batch).reshape(-1, *[1] * len(shape))
    number = rng.integers(1, 9, batch)
    keys = random.example_keys(jax.random.key(1), batch)
    choice = Choice(jnp.asarray(written, int), None, None, *map(jnp.asarray, (written, ~written, number)), *[None] * 3)
    scores = np.asarray(jax.jit(Local())(random.example_keys(jax.random.key(1), batch), choice))
    luck = np.asarray(jax.vmap(lambda k: jax.random.permutation(k, written[0].size))(keys))
    for row in range(batch):
        ours = {tuple(int(i) for i in a) for a in np.argwhere(scores[row] > -np.inf)}
        assert ours == group_by_hand(written[row], number[row], luck[row])


@pytest.mark.slow
def test_noise_on_the_scores_anneals():
    """With much noise the order is random at t = 1 and greedy at 0: Gumbel noise of scale temperature times s."""
    batch = 20_000
    logits = jnp.broadcast_to(log_or_floor(jnp.asarray([[0.9, 0.1], [0.5, 0.5]])), (batch, 2, 2))
    xt = jnp.zeros((batch, 2), int)
    for s, expected in ((1.0, 0.9**0.5 / (0.9**0.5 + 0.5**0.5)), (0.0, 1.0)):
        choice = Choice(xt, xt, logits, xt > 0, xt == 0, jnp.ones(batch, int), s, None, None)
        scores = np.asarray(Confidence("probability", 2.0)(random.example_keys(jax.random.key(0), batch), choice))
        assert abs((scores[:, 0] > scores[:, 1]).mean() - expected) < 0.015


def suspicious(xt, t, cond):
    """A planner that finds every 1 corrupted, and other symbols the less the later their site."""
    return Prediction(jnp.where(xt == 1, 3.0, -3.0 - jnp.arange(3)) * t[:, None], "planner")


def test_a_planner_sees_what_was_drawn_and_is_believed():
    """By hand: three sites, two masks left after the step, at whose time the planner is asked."""
    process, keys = Masked(4), lambda: random.example_keys(jax.random.key(1), 1)
    chance = 1.0 * jnp.ones((1, 3))
    # The masks are drawn as 0, 2 and 1: log odds -2, -8/3 and 2.
    draws = jnp.where(jnp.asarray([0, 2, 1])[:, None] == jnp.arange(4), 0.0, -1e30)
    own = planned(lambda xt, t, cond: Prediction(draws[None], "cavity"), suspicious)
    xs = Unmask(process, Planner()).step(keys(), (chance, chance > 0), jnp.full((1, 3), 4), 1.0, 2 / 3, own)[0]
    np.testing.assert_array_equal(xs, [[4, 2, 4]])
    # Whatever is drawn has log p = -1.39: between the log of 1 - P(corrupted) of the symbols 1, -2.13, and 0, -0.13.
    even = planned(lambda xt, t, cond: Prediction(jnp.zeros((*xt.shape, 4)), "cavity"), suspicious)
    for shown, eta, kept in ((0, 1.0, True), (1, 1.0, False), (1, 0.5, True)):
        carry = (jnp.ones((1, 3), bool), chance)
        solver = PathPlanning(process, eta, "trained")
        xs = np.asarray(solver.step(keys(), carry, jnp.asarray([[shown, 4, 4]]), 1.0, 2 / 3, even)[0])
        assert (xs == 4).sum() == 2
        assert (xs[0, 0] == shown) == kept


def test_bad_arguments():
    for bad, match in (
        (lambda: Unmask(Uniform(3)), "for processes.Masked, got Uniform"),
        (lambda: Unmask(StateMasked(3, SymbolPolynomial((1.0, 1.0, 1.0)))), "got StateMasked"),
        (lambda: Unmask(MASKED, count="all"), "count must be"),
        (lambda: Confidence("surprise"), "score must be"),
        (lambda: Confidence(temperature=-1.0), "temperature"),
        (lambda: Local(repulsion=-1), "repulsion"),
        (lambda: PathPlanning(Uniform(3)), "got Uniform"),
        (lambda: PathPlanning(MASKED, -1.0), "eta"),
        (lambda: PathPlanning(MASKED, planner="bert"), "planner must be"),
        (lambda: ask(Unmask(MASKED, Planner()), LAW.denoise(MASKED)), "no planner"),
        (lambda: ask(PathPlanning(MASKED), LAW.denoise(MASKED, "ratio")), "posterior or a cavity"),
    ):
        with pytest.raises(ValueError, match=match):
            bad()


def ask(solver, denoise):
    xt = jnp.full((1, 2), MASK)
    jax.eval_shape(
        lambda keys: solver.step(keys, solver.init(xt), xt, 1.0, 0.5, denoise)[0],
        random.example_keys(jax.random.key(0), 1),
    )


@pytest.mark.slow
def test_what_another_has_written_is_not_counted_as_work_done():
    """`Stopping` pads half of what is left: the other half is still written in equal parts, not all at the end."""
    solver, xt = Unmask(Masked(3)), jnp.full((1, 16), 3)
    carry, left = solver.init(xt), []

    def even(xt, t, cond):
        return Prediction(jnp.zeros((*xt.shape, 3)), "cavity")

    for i, (t, s) in enumerate(((1.0, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0.0))):
        keys = random.example_keys(jax.random.key(i), 1)
        xt, carry, _ = solver.step(keys, carry, xt, t, s, even)
        if i == 0:  # of 12 masks 6
            xt = jnp.where((xt == 3) & (jnp.cumsum(xt == 3, axis=1) > 6), 0, xt)
        left.append(int((xt == 3).sum()))
    assert left == [6, 4, 2, 0]
