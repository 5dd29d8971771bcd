"""Event-driven samplers: the law of their output, of their times and of their calls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddjax
from ddjax import grids, random
from ddjax.fixtures import Categorical
from ddjax.fixtures.categorical import all_states
from ddjax.predictions import BoundDenoiser, Prediction, TwoHeads, bind, evaluations, planned
from ddjax.processes import Hybrid, Marginal, Masked, Uniform
from ddjax.schedules import Cosine, LogLinear, Polynomial
from ddjax.solvers import FirstHitting, Gillespie, PlannedSteps
from ddjax.solvers import events as module

LAW = Categorical(2, 3, seed=1)
P = np.exp(np.asarray(LAW.log_p, np.float64))
ONE = (1.0, 0.0)


def draw(solver, batch, times=ONE, seed=0, law=LAW, denoise=None, **options):
    denoise = law.denoise(solver.process) if denoise is None else denoise
    return ddjax.sample(
        jax.random.key(seed),
        denoise,
        solver.process,
        shape=(batch, law.sites),
        solver=solver,
        times=jnp.asarray(times),
        **options,
    )


def counts(x, law=LAW):
    powers = law.symbols ** np.arange(law.sites - 1, -1, -1)
    assert np.asarray(x).max() < law.symbols
    return np.bincount(np.asarray(x) @ powers, minlength=law.symbols**law.sites)


def chi_squared(observed, p):
    expected = observed.sum() * p
    seen = expected > 0
    assert observed[~seen].sum() == 0
    return float(((observed - expected)[seen] ** 2 / expected[seen]).sum())


LIMIT = 40.0  # 8 degrees of freedom: p = 3e-6
STRICT = 26.1  # p = 0.001

MASKED = [
    (FirstHitting(Masked(3)), ONE),
    (FirstHitting(Masked(3, Cosine())), (1.0, 0.7, 0.1, 0.0)),
    (Gillespie(Masked(3)), ONE),
    (FirstHitting(Masked(3, Polynomial(2.0))), ONE),
    (Gillespie(Masked(3, Cosine())), (1.0, 0.5, 0.0)),
]
fast = [MASKED[0], *(pytest.param(*m, marks=pytest.mark.slow) for m in MASKED[1:])]


@pytest.mark.parametrize(("solver", "times"), fast)
def test_masked_events_have_the_exact_law_on_any_grid(solver, times):
    out = draw(solver, 20_000, times)
    assert chi_squared(counts(out.x0), P) < LIMIT
    if isinstance(solver, FirstHitting):
        np.testing.assert_array_equal(out.nfe, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "times"), MASKED)
def test_masked_events_over_the_whole_table(solver, times):
    """200,000 samples and five seeds, each with p > 0.001."""
    assert max(chi_squared(counts(draw(solver, 200_000, times, seed).x0), P) for seed in range(5)) < STRICT


@functools.cache
def clocked(solver, times, batch=20_000, sites=6):
    """A network that says 0 before t = 0.5 is reached, and 1 after it."""

    def denoise(xt, t, cond):
        late = (t < 0.5)[:, None, None] == (jnp.arange(2) == 1)
        return Prediction(jnp.where(late, 0.0, -1e30) + jnp.zeros((*xt.shape, 1)), "cavity")

    law = Categorical(sites, 2)
    return draw(solver, batch, times, law=law, denoise=denoise, trajectory=True)


@pytest.mark.parametrize("kind", [FirstHitting, pytest.param(Gillespie, marks=pytest.mark.slow)])
def test_events_come_at_the_times_of_the_schedule(kind):
    """How many are written, and how many see the network after t = 0.5: binomial, by the schedule's own survival."""
    from scipy.stats import binom

    solver = kind(Masked(2, Cosine()))
    out = clocked(solver, (1.0, 0.3, 0.0))
    left = (np.asarray(out.trajectory[1]) == 2).sum(-1)
    late = np.asarray(out.x0).sum(-1)
    for number, p in ((left, np.sin(0.15 * np.pi)), (late, np.sin(0.25 * np.pi))):
        law = binom(6, p).pmf(np.arange(7))
        # With Gillespie the event that passes t = 0.5 was asked for before it.
        if kind is FirstHitting or number is left:
            assert chi_squared(np.bincount(number, minlength=7), law) < LIMIT
    if kind is FirstHitting:
        np.testing.assert_array_equal(out.nfe, 6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [FirstHitting, Gillespie])
def test_known_sites_are_neither_written_nor_counted(kind):
    """Each row has its own; the others have the conditional law."""
    batch, process = 20_000, Masked(3)
    mask = jnp.stack([jnp.arange(batch) % 2 == 0, jnp.zeros(batch, bool)], -1)
    out = draw(kind(process), batch, observed=ddjax.Observed(mask, jnp.ones((batch, 2), jnp.int32)))
    x, p = np.asarray(out.x0), P.reshape(3, 3)[1]
    assert (x[::2, 0] == 1).all()
    assert chi_squared(np.bincount(x[::2, 1], minlength=3), p / p.sum()) < 25
    if kind is FirstHitting:
        np.testing.assert_array_equal(out.nfe, 2 - np.asarray(mask).sum(-1))


def test_nothing_to_do_costs_nothing():
    process = Masked(3)
    x = jnp.asarray(all_states(2, 3))
    out = draw(FirstHitting(process), 9, (0.8, 0.4, 0.0), init=x)
    np.testing.assert_array_equal(out.x0, x)
    np.testing.assert_array_equal(out.nfe, 0)


def test_clocks_ring_by_the_integral_of_the_odds(x64):
    """Against quadrature of the hazard P = c sigma / (1 - sigma + c sigma) over log sigma; e is drawn again here."""
    log_c = jnp.asarray([[-40.0, -2.0, -1e-3, 0.0, 1e-6, 0.7, 4.0, 30.0, 1e30]] * 400)
    sigma, keys = 0.9, random.example_keys(jax.random.key(0), 400)
    rings = np.asarray(jax.jit(module._rings)(keys, log_c, jnp.full(400, sigma)))
    again = random.example_keys(jax.random.key(0), 400)
    e = np.asarray(jax.vmap(lambda k: jax.random.exponential(k, log_c.shape[1:]))(again))
    nodes, weights = np.polynomial.legendre.leggauss(60)
    for i, c in enumerate(np.exp(np.minimum(np.asarray(log_c[0]), 80.0))):

        def hazard(to, c=c):  # P / sigma' over sigma' itself
            half = 0.5 * (sigma - np.asarray(to)[..., None])
            v = sigma - half + half * nodes
            return (half * weights * c / (1 - v + c * v)).sum(-1)

        rang = rings[:, i] > 0
        if c < 1e3:
            np.testing.assert_allclose(hazard(rings[rang, i]), e[rang, i], rtol=1e-9)
            np.testing.assert_array_equal(rang, e[:, i] < hazard(0.0))
        else:  # a mask: at rate 1
            np.testing.assert_allclose(rings[:, i], sigma * np.exp(-e[:, i]), rtol=1e-9)


@functools.partial(jax.jit, static_argnums=0)
def consulted(process, xt, t):
    solver = Gillespie(process)
    log_odds, logits = module.consult(solver, None, LAW.denoise(process), xt, t, None, None)
    rates = process.flow_rate(t)[:, None, None] * jax.nn.sigmoid(log_odds)[..., None] * jax.nn.softmax(logits)
    exact = [LAW.denoise(process, kind)(xt, t).value for kind in ("planner", "velocity")]
    return log_odds, solver._log_c(log_odds, logits, xt, t), rates, *exact


@pytest.mark.parametrize("process", [Uniform(3, Cosine()), pytest.param(Masked(3, Cosine()), marks=pytest.mark.slow)])
def test_planner_times_denoiser_is_the_flow(x64, process):
    """The rates that Gillespie draws from are the velocity's, which carries the marginals back (proposition 3.1)."""
    xt = jnp.asarray(all_states(2, process.num_states))
    log_odds, _, rates, planner, velocity = consulted(process, xt, jnp.full(len(xt), 0.45))
    np.testing.assert_allclose(log_odds, planner, rtol=1e-12)
    moves = np.arange(3) != np.asarray(xt)[..., None]
    np.testing.assert_allclose(np.where(moves, rates, 0), np.where(moves, velocity[..., :3], 0), atol=1e-12)
    # The odds over sigma / alpha, which near t = 1 are had by another formula.
    for t in (0.45, 0.96):
        log_odds, c, *_ = (np.asarray(v) for v in consulted(process, xt, jnp.full(len(xt), t)))
        sigma = np.sin(0.5 * np.pi * t)
        assert (1 - sigma < 0.01) == (t > 0.9)
        used = np.abs(log_odds) < 1e20
        np.testing.assert_allclose(c[used], (log_odds - np.log(sigma / (1 - sigma)))[used], atol=1e-10)
        assert (np.sign(c[~used]) == np.sign(log_odds[~used])).all()


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [Cosine(), LogLinear(0.2)], ids=str)
def test_one_site_of_uniform_noise_is_exact_on_any_grid(schedule):
    law, process = Categorical(1, 3, seed=2), Uniform(3, schedule)
    p = np.exp(np.asarray(law.log_p))
    sigma = float(schedule.sigma(jnp.float32(1.0)))
    start = law.sample(random.example_keys(jax.random.key(9), 50_000))
    noise = jax.random.randint(jax.random.key(8), start.shape, 0, 3)
    init = jnp.where(jax.random.uniform(jax.random.key(7), start.shape) < sigma, noise, start)
    for times in (ONE, (1.0, 0.5, 0.2, 0.0)):
        x = draw(Gillespie(process), 50_000, times, law=law, init=init).x0
        assert chi_squared(np.bincount(np.asarray(x)[:, 0], minlength=3), p) < 25


@pytest.mark.slow
def test_planned_denoising_of_uniform_noise_is_exact_in_the_limit():
    """Of a fine grid, at first order: the error of one look is that of a drifting cavity."""
    process = Uniform(3)
    distance = [
        0.5 * np.abs(counts(draw(Gillespie(process), 20_000, grids.uniform(n)).x0) / 20_000 - P).sum() for n in (1, 8)
    ]
    assert distance[0] > 0.08
    assert distance[1] < 0.3 * distance[0]
    assert chi_squared(counts(draw(Gillespie(process), 20_000, grids.uniform(256)).x0), P) < STRICT


@pytest.mark.slow
def test_a_planner_of_its_own_and_one_that_is_implied_agree():
    process = Uniform(3, Cosine())
    exact = planned(LAW.denoise(process, "cavity"), LAW.denoise(process, "planner"))
    own, implied = (draw(Gillespie(process), 2000, (1.0, 0.5, 0.0), denoise=d) for d in (exact, None))
    assert np.mean(np.asarray(own.x0) != np.asarray(implied.x0)) < 0.002  # but for rounding
    np.testing.assert_array_equal(own.nfe[:50], 2 * implied.nfe[:50])


def look_up(params, xt, t, cond):
    return params[xt[:, 0] * 3 + xt[:, 1]] * (0.5 + t[:, None, None])


def heads(process, seed=0):
    params = jnp.asarray(np.random.default_rng(seed).normal(size=(9, 2, 4)), jnp.float32)
    return TwoHeads(bind(look_up, params, process, "cavity"))


def test_two_heads_are_one_network():
    process = Uniform(3)
    both, xt, t = heads(process), jnp.asarray(all_states(2, 3)), jnp.full(9, 0.3)
    what, where = both.both(xt, t)
    out = look_up(both.network.params, xt, t, None)
    np.testing.assert_array_equal(what.value, out[..., :3])
    np.testing.assert_array_equal(where.value, out[..., 3])
    assert (what.kind, where.kind) == ("cavity", "planner")
    np.testing.assert_array_equal(both(xt, t).value, what.value)
    apart = planned(both, both.planner)
    np.testing.assert_array_equal(apart.both(xt, t)[1].value, where.value)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((both, apart, both.planner)))
    assert evaluations(both) == evaluations(apart) == 1
    assert isinstance(both.network, BoundDenoiser)


UNIFORM = Uniform(3, Cosine())
PLANNED = [
    (PlannedSteps(UNIFORM), heads(UNIFORM)),
    (Gillespie(UNIFORM), heads(UNIFORM)),
    (FirstHitting(Masked(3)), None),
    (PlannedSteps(UNIFORM, Masked(3)), planned(LAW.denoise(Masked(3)), heads(UNIFORM).planner)),
    (Gillespie(UNIFORM, Masked(3)), planned(LAW.denoise(Masked(3)), heads(UNIFORM).planner)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "denoise"), PLANNED)
def test_rows_do_not_depend_on_each_other(solver, denoise):
    times = grids.uniform(3)
    whole = draw(solver, 7, times, denoise=denoise)
    for batch in (1, 2):
        part = draw(solver, batch, times, denoise=denoise)
        np.testing.assert_array_equal(part.x0, whole.x0[:batch])
        np.testing.assert_array_equal(part.nfe, whole.nfe[:batch])
    if isinstance(solver, PlannedSteps):
        np.testing.assert_array_equal(whole.nfe, 3 if solver.denoiser is None else 6)


@pytest.mark.slow
def test_planned_steps_choose_by_the_odds_and_keep_the_planners_time():
    """One step from a fixed state, against the softmax; then the time told is that of the planner's mean."""
    batch, process = 20_000, Uniform(3)
    log_odds = jnp.asarray([1.5, -0.5])

    def denoise(xt, t, cond):  # says which time it was told: 0 for 0.9, 1 for the planner's
        said = jnp.where((t > 0.8)[:, None], jnp.asarray([0.0, -1e30, -1e30]), jnp.asarray([-1e30, 0.0, -1e30]))
        return Prediction(said[:, None] + jnp.zeros((*xt.shape, 1)), "cavity")

    both = planned(denoise, lambda xt, t, cond: Prediction(jnp.broadcast_to(log_odds, xt.shape), "planner"))
    xt, keys = jnp.full((batch, 2), 2), random.example_keys(jax.random.key(0), batch)
    solver = PlannedSteps(process, temperature=2.0)
    step = jax.jit(lambda solver, *args: solver.step(*args, both), static_argnums=0)
    xs, (free, clock), info = step(solver, keys, solver.init(xt), xt, 0.9, 0.5)
    first = np.exp(0.75) / (np.exp(0.75) + np.exp(-0.25))
    assert (np.asarray(xs).sum(-1) == 2).all()
    assert abs((np.asarray(xs)[:, 0] == 0).mean() - first) < 4 * 0.5 / np.sqrt(batch)
    mean = (1 / (1 + np.exp(-1.5)) + 1 / (1 + np.exp(0.5))) / 2
    np.testing.assert_allclose(clock, mean, rtol=1e-6)
    np.testing.assert_array_equal(info.nfe, 2)
    # The last step: what is likelier corrupted than `fill` is drawn anew, known sites are not.
    carry = free & ~jnp.asarray([[False, True]] * batch), clock
    keys = random.example_keys(jax.random.key(1), batch)
    last = PlannedSteps(process, fill=0.3)
    xs, _, _ = step(last, keys, carry, xt, 0.5, 0.0)
    np.testing.assert_array_equal(xs, [[1, 2]] * batch)
    keys = random.example_keys(jax.random.key(1), batch)
    xs, _, _ = step(last, keys, (free, clock), xt, 0.5, 0.0)
    np.testing.assert_array_equal(xs, [[1, 1]] * batch)


@pytest.mark.slow
def test_known_sites_of_uniform_noise_are_held():
    """Between the grid's times they keep what they were shown, and a planner that finds all corrupted is not asked."""
    process, batch = Uniform(3), 500
    everything = planned(LAW.denoise(process), lambda xt, t, cond: Prediction(jnp.full(xt.shape, 30.0), "planner"))
    known = ddjax.Observed(jnp.ones((batch, 2), bool), jnp.ones((batch, 2), jnp.int32))
    out = draw(Gillespie(process), batch, denoise=everything, observed=known)
    assert (np.asarray(out.x0) == 1).all()
    np.testing.assert_array_equal(out.nfe, 0)


@pytest.mark.slow
def test_a_denoiser_of_masks_with_an_exact_planner_is_near_the_law():
    """DDPD-MaskD: independent coins are not the joint law of what is corrupted, so near, and not at it."""
    denoise = planned(LAW.denoise(Masked(3)), LAW.denoise(Uniform(3), "planner"))
    x = draw(Gillespie(Uniform(3), Masked(3)), 20_000, grids.uniform(32), denoise=denoise).x0
    assert 0.5 * np.abs(counts(x) / 20_000 - P).sum() < 0.1


def test_bad_arguments():
    exact = LAW.denoise(Uniform(3))
    for bad, match in (
        (lambda: FirstHitting(Uniform(3)), "use Gillespie"),
        (lambda: Gillespie(Hybrid(3)), "keeps its shape"),
        (lambda: PlannedSteps("uniform"), "keeps its shape"),
        (lambda: Gillespie(Uniform(3), Masked(4)), "Masked process of 3 symbols"),
        (lambda: PlannedSteps(Uniform(3), temperature=0.0), "temperature"),
        (lambda: draw(Gillespie(Uniform(3), Masked(3)), 2, denoise=exact), "planner network of its own"),
    ):
        with pytest.raises(ValueError, match=match):
            bad()
    Gillespie(Marginal(3, probabilities=(0.2, 0.3, 0.5)))
