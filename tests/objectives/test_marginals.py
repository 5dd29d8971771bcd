"""Marginals of any subset of sites, on a law of three sites: every order, place and example, by enumeration."""

import functools
import importlib
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddjax import objectives, random
from ddjax.denoisers.outputs import FirstHeads
from ddjax.fixtures import Categorical
from ddjax.fixtures.categorical import all_states
from ddjax.likelihood import chain_rule, marginals
from ddjax.predictions import bind
from ddjax.processes import Masked, Uniform
from ddjax.sampling import Observed, sample
from ddjax.schedules import Cosine
from ddjax.solvers import Ancestral
from ddjax.types import Rows

LAW, PROCESS, WEIGHT = Categorical(3, 2, concentration=2.0), Masked(2, Cosine()), 0.7
STATES = all_states(3, 3)  # 2 is the mask
P = np.exp(np.asarray(LAW.log_p, np.float64)) / np.exp(np.asarray(LAW.log_p, np.float64)).sum()
ENTROPY = -(P * np.log(P)).sum()
# Every example, order (the places of the sites) and number of masks.
EVERY = list(itertools.product(range(8), itertools.permutations(range(3)), (1, 2, 3)))
X0 = np.array([all_states(3, 2)[i] for i, _, _ in EVERY])
ORDER, MASKS = np.array([order for _, order, _ in EVERY]), np.array([k for _, _, k in EVERY])
CHANCE = np.array([P[i] for i, _, _ in EVERY]) / 18.0


def network(params, xt, t, cond, *, rng=None, train=False):
    """A table of what is said in each state."""
    return params[xt @ jnp.asarray([9, 3, 1])]


def index(x):
    return int(np.asarray(x) @ [9, 3, 1])


def log_marginal(state, p=P):
    """Log of the total probability of the examples that agree with what is shown."""
    agrees = ((state == all_states(3, 2)) | (state == 2)).all(-1)
    return math.log(p[agrees].sum())


def exact(p=P):
    """The table of the law's conditionals and marginals; log p(x_S) is all at the first of the sites shown."""
    table = np.zeros((27, 3, 3))
    for state in STATES:
        for i in np.flatnonzero(state == 2):
            for symbol in range(2):
                then = state.copy()
                then[i] = symbol
                table[index(state), i, symbol] = log_marginal(then, p) - log_marginal(state, p)
        if (state < 2).any():
            table[index(state), np.flatnonzero(state < 2)[0], 2] = log_marginal(state, p)
    return table


def random_table(seed=0):
    return np.random.default_rng(seed).normal(size=(27, 3, 3))


def log_softmax(z):
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def by_hand(table, known=()):
    """The two parts of the loss, and the gradient of the whole by the table, with the sites of `known` always shown."""
    slope, parts, learned = np.zeros_like(table), np.zeros(2), 3 - len(known)
    for x, order, k, chance in zip(X0, ORDER, MASKS, CHANCE, strict=True):
        masked = [i for i in range(3) if order[i] < k and i not in known]
        d = int(np.flatnonzero(order == k - 1)[0])
        before, after = x.copy(), x.copy()
        before[masked] = 2
        after[[i for i in masked if i != d]] = 2
        said = log_softmax(table[index(before), :, :2])
        for i in masked:
            scale = 3 / k * chance / learned
            parts[0] -= scale * said[i, x[i]]
            slope[index(before), i, :2] += scale * (np.exp(said[i]) - np.eye(2)[x[i]])
        if d in known:
            continue
        f = [table[index(s), s < 2, 2].sum() for s in (before, after)]
        error, chance = f[0] + said[d, x[d]] - f[1], 3 * chance / learned
        parts[1] += chance * error**2
        slope[index(before), before < 2, 2] += WEIGHT * chance * 2 * error
        slope[index(after), after < 2, 2] -= WEIGHT * chance * 2 * error
    return parts, slope


@functools.partial(jax.jit, static_argnums=0)
def value_and_slope(objective, params, weights):
    """The objective's expectation, by all draws in the place of its own, its metrics and its gradient."""

    def loss(params):
        return objective(jax.random.key(0), network, params, jnp.asarray(X0), None, weights)

    module = importlib.import_module("ddjax.objectives.marginals")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "masks_in_order", lambda u, keys, x0: (jnp.asarray(MASKS), jnp.asarray(ORDER)))
        return jax.value_and_grad(loss, has_aux=True)(params)


LIKELIHOOD = objectives.marginals(PROCESS, weight=WEIGHT)


def test_the_exact_marginals_cost_the_entropy(x64):
    """The conditionals' part is the entropy, the other 0, and nothing moves; a wrong output costs and moves."""
    (loss, metrics), slope = value_and_slope(LIKELIHOOD, exact(), CHANCE)
    assert abs(loss - ENTROPY / 3) < 1e-14
    assert metrics["consistency"] < 1e-28
    assert np.abs(slope).max() < 1e-14
    for wrong in (random_table(), exact() + np.eye(3)[2] * random_table()):
        (loss, metrics), slope = value_and_slope(LIKELIHOOD, wrong, CHANCE)
        (conditionals, consistency), by = by_hand(wrong)
        np.testing.assert_allclose(metrics["conditionals"], conditionals, rtol=1e-13)
        np.testing.assert_allclose(metrics["consistency"], consistency, rtol=1e-13)
        np.testing.assert_allclose(loss, conditionals + WEIGHT * consistency, rtol=1e-13)
        np.testing.assert_allclose(slope, by, atol=1e-14)
        assert loss > ENTROPY / 3 + 0.1
        assert np.abs(slope[..., 2]).max() > 1e-2


@pytest.mark.slow
def test_known_sites_are_shown_and_cost_nothing(x64):
    weights = CHANCE[:, None] * (np.arange(3) != 1)
    (_, metrics), slope = value_and_slope(LIKELIHOOD, random_table(), weights)
    (conditionals, consistency), by = by_hand(random_table(), known=(1,))
    np.testing.assert_allclose(metrics["conditionals"], conditionals, rtol=1e-13)
    np.testing.assert_allclose(metrics["consistency"], consistency, rtol=1e-13)
    np.testing.assert_allclose(slope, by, atol=1e-14)


def denoiser(table, apply=network):
    return bind(apply, jnp.asarray(table), PROCESS, "posterior")


def test_any_subset_in_one_pass_and_by_conditionals(x64):
    """All 27 states, whatever stands at the hidden sites; nothing shown has probability 1 whoever says it."""
    shown, x = STATES < 2, np.where(STATES < 2, STATES, np.arange(27)[:, None] % 2)
    expected = [log_marginal(state) for state in STATES]
    said = marginals(denoiser(exact()), PROCESS, jnp.asarray(x), jnp.asarray(shown))
    np.testing.assert_allclose(said, expected, atol=1e-14)
    assert marginals(denoiser(random_table()), PROCESS, jnp.asarray(x), jnp.asarray(shown))[-1] == 0.0
    conditionals = denoiser(exact(), FirstHeads(network, 1))
    chained = chain_rule(jax.random.key(0), conditionals, PROCESS, jnp.asarray(x), jnp.asarray(shown))
    np.testing.assert_allclose(chained, expected, atol=1e-14)
    fewer = jnp.asarray(shown & (np.arange(3) > 0))  # two sites at most, and as many calls
    chained = chain_rule(jax.random.key(0), conditionals, PROCESS, jnp.asarray(x), fewer)
    expected = [log_marginal(state) for state in np.where(fewer, x, 2)]
    np.testing.assert_allclose(chained, expected, atol=1e-14)
    # Conditionals of no law: as many answers as orders, each as likely as the next.
    table, x = random_table(1), np.array([1, 0, 1])
    answers = []
    for order in itertools.permutations(range(3)):
        state, total = np.full(3, 2), 0.0
        for i in order:
            total += log_softmax(table[index(state), :, :2])[i, x[i]]
            state[i] = x[i]
        answers.append(total)
    wrong, many = denoiser(table, FirstHeads(network, 1)), jnp.broadcast_to(jnp.asarray(x), (600, 3))
    drawn = np.asarray(chain_rule(jax.random.key(1), wrong, PROCESS, many, jnp.ones((600, 3), bool)))
    gaps = np.abs(drawn[:, None] - np.array(answers))
    assert gaps.min(-1).max() < 1e-13
    counts = np.bincount(gaps.argmin(-1), minlength=6)
    assert ((counts - 100) ** 2 / 100).sum() < 20.5  # chi-squared of 5 degrees, p = 0.001


@functools.partial(jax.jit, static_argnums=(0, 3))
def fitted(objective, params, chances, steps):
    """Adam, on a loss without noise."""
    rule = optax.adam(optax.cosine_decay_schedule(0.1, steps))

    def step(_, carry):
        params, state = carry
        updates, state = rule.update(value_and_slope(objective, params, chances)[1], state)
        return optax.apply_updates(params, updates), state

    return jax.lax.fori_loop(0, steps, step, (params, rule.init(params)))[0]


def test_a_table_learns_all_marginals(x64):
    learned = fitted(LIKELIHOOD, jnp.asarray(random_table()), CHANCE, 2000)
    shown = jnp.asarray(STATES < 2)
    said = marginals(denoiser(learned), PROCESS, jnp.minimum(jnp.asarray(STATES), 1), shown)
    gap = np.abs(said - np.array([log_marginal(state) for state in STATES])).max()
    assert gap < 1e-3, gap


# -- a density known up to its constant ------------------------------------------------------------------------

LOG_Z = 1.7


def log_f(x0, cond):
    return jnp.log(jnp.asarray(P, float))[x0 @ jnp.asarray([4, 2, 1])] + LOG_Z


ENERGY = objectives.energy_marginals(PROCESS, log_density=log_f, weight=WEIGHT)
EVENLY = np.full(144, 1.0 / 144.0)


def at(table, log_z):
    return {"network": jnp.asarray(table), "objective": objectives.energy_parameters(log_z)}


def energy_by_hand(table, log_z):
    slope, parts, of_z = np.zeros_like(table), np.zeros(2), 0.0
    for x, order, k in zip(X0, ORDER, MASKS, strict=True):
        before, after = np.where(order < k, 2, x), np.where(order < k - 1, 2, x)
        d = int(np.flatnonzero(order == k - 1)[0])
        said = log_softmax(table[index(before), d, :2])
        f = [table[index(s), s < 2, 2].sum() for s in (before, after, x)]
        error = f[0] + said[x[d]] - f[1]
        gap = f[2] + log_z - (math.log(P[x @ [4, 2, 1]]) + LOG_Z)
        parts += [gap**2 / 6 / 144, error**2 / 144]
        of_z += gap / 3 / 144
        slope[index(x), :, 2] += gap / 3 / 144  # of log p(x) times what eq. 9 weighs it with
        slope[index(before), before < 2, 2] += WEIGHT * 2 * error / 144
        slope[index(after), after < 2, 2] -= WEIGHT * 2 * error / 144
        slope[index(before), d, :2] += WEIGHT * 2 * error / 144 * (np.eye(2)[x[d]] - np.exp(said))
    return parts, slope, of_z


def test_a_density_up_to_its_constant(x64):
    """0 at the law and its constant, and only there; elsewhere both outputs move, as by hand."""
    (loss, metrics), slope = value_and_slope(ENERGY, at(exact(), LOG_Z), EVENLY)
    assert loss < 1e-28
    assert np.abs(slope["network"]).max() < 1e-14
    assert metrics["log_z"] == LOG_Z
    for table, log_z in ((random_table(), 0.3), (exact(), 0.0)):
        (loss, metrics), slope = value_and_slope(ENERGY, at(table, log_z), EVENLY)
        (energy, consistency), by, of_z = energy_by_hand(table, log_z)
        np.testing.assert_allclose(metrics["energy"], energy, rtol=1e-13)
        np.testing.assert_allclose(metrics["consistency"], consistency, rtol=1e-13, atol=1e-28)
        np.testing.assert_allclose(loss, energy + WEIGHT * consistency, rtol=1e-13)
        np.testing.assert_allclose(slope["network"], by, atol=1e-14)
        np.testing.assert_allclose(slope["objective"]["log_z"], of_z, rtol=1e-13)
        assert loss > 0.1


def test_a_table_learns_a_density_its_constant_and_its_marginals(x64):
    learned = fitted(ENERGY, at(random_table(), 0.0), EVENLY, 4000)
    assert abs(learned["objective"]["log_z"] - LOG_Z) < 1e-3
    table, law = np.asarray(learned["network"]), exact()
    said = [table[index(state), state < 2, 2].sum() for state in STATES]
    np.testing.assert_allclose(said, [log_marginal(state) for state in STATES], atol=1e-3)
    masked = STATES == 2
    rows = STATES @ [9, 3, 1]
    np.testing.assert_allclose(log_softmax(table[rows][masked][:, :2]), law[rows][masked][:, :2], atol=1e-3)


@pytest.mark.slow
def test_a_density_is_learned_from_the_models_own_draws():
    """Persistent chains, by block Gibbs: a random part of each state is drawn anew by the conditionals."""
    rule, apply = optax.adam(optax.cosine_decay_schedule(0.1, 1500)), FirstHeads(network, 1)
    params = jax.tree.map(lambda a: a.astype(jnp.float32), at(0.1 * random_table(), 0.0))
    state, x0 = rule.init(params), jnp.zeros((64, 3), jnp.int32)

    @jax.jit
    def step(params, state, key, x0):
        (_, metrics), slope = jax.value_and_grad(lambda params: ENERGY(key, network, params, x0), has_aux=True)(params)
        updates, state = rule.update(slope, state)
        return optax.apply_updates(params, updates), state, metrics

    times = np.linspace(1.0, 0.0, 9)
    for i in range(1500):
        gibbs, cut, train = jax.random.split(jax.random.fold_in(jax.random.key(0), i), 3)
        kept = Observed(jax.random.bernoulli(cut, 0.3, x0.shape), x0)
        denoise = bind(apply, params["network"], PROCESS, "posterior")
        x0 = sample(gibbs, denoise, PROCESS, shape=x0.shape, solver=Ancestral(PROCESS), times=times, observed=kept).x0
        params, state, metrics = step(params, state, train, x0)
    assert metrics["loss"] < 1e-5
    assert abs(params["objective"]["log_z"] - LOG_Z) < 1e-2
    table = np.asarray(params["network"])
    said = [table[index(state), state < 2, 2].sum() for state in STATES]
    np.testing.assert_allclose(said, [log_marginal(state) for state in STATES], atol=1e-2)


# -- the objective's own draws -----------------------------------------------------------------------------------


def test_the_draws_are_of_all_orders_and_places():
    """The mean over draws is the sum over all of them."""
    table = jnp.asarray(random_table(), jnp.float32)

    @jax.jit
    def draw(i):
        key = jax.random.fold_in(jax.random.key(0), i)
        x0 = LAW.sample(random.example_keys(jax.random.fold_in(key, 0), 120))
        metrics = LIKELIHOOD(key, network, table, x0)[1]
        return jnp.stack([metrics["conditionals"], metrics["consistency"]])

    draws = np.asarray(jax.lax.map(draw, jnp.arange(200)))
    error = draws.std(0) / math.sqrt(200)
    assert (error < 0.01 * draws.mean(0)).all()
    assert (np.abs(draws.mean(0) - by_hand(random_table())[0]) < 4 * error).all()


@pytest.mark.slow
def test_microbatches_add_up_and_extremes_are_finite():
    x0 = LAW.sample(random.example_keys(jax.random.key(1), 10))

    @jax.jit
    @jax.value_and_grad
    def run(params, x, rows):
        both = LIKELIHOOD(jax.random.key(7), network, params["network"], x, rows=Rows(rows, 10))[0]
        return both + ENERGY(jax.random.key(8), network, params, x, rows=Rows(rows, 10))[0]

    params = jax.tree.map(lambda a: a.astype(jnp.float32), at(random_table(), 0.0))
    whole, gradient = run(params, x0, jnp.arange(10))
    twice = [np.tile(np.arange(i, i + 5), 2) for i in (0, 5)]  # compiled once: the same mean
    halves = [run(params, x0[rows], jnp.asarray(rows)) for rows in twice]
    np.testing.assert_allclose(np.mean([value for value, _ in halves]), whole, rtol=1e-5)
    sums = np.mean([slope["network"] for _, slope in halves], axis=0)
    np.testing.assert_allclose(sums, gradient["network"], rtol=1e-4, atol=1e-6)
    for scale in (0.0, 1e4, -1e4):
        value, slope = run(jax.tree.map(lambda a, scale=scale: scale * jnp.sign(a), params), x0, jnp.arange(10))
        assert np.isfinite(value)
        assert np.isfinite(np.asarray(slope["network"])).all()


def test_one_example_of_one_site():
    """Nothing shown, then all: -log p(x) + weight (log p(x) - log p_S(x))^2."""
    table = jnp.asarray([[[0.3, -0.2, 0.5]], [[0.1, 0.2, -1.3]], [[0.7, -0.4, 9.0]]])
    single = lambda params, xt, *rest, **options: params[xt[:, 0]]
    loss = jax.jit(lambda key: LIKELIHOOD(key, single, table, jnp.asarray([[1]]))[0])(jax.random.key(0))
    log_p = log_softmax(np.array([0.7, -0.4]))[1]
    np.testing.assert_allclose(loss, -log_p + WEIGHT * (log_p + 1.3) ** 2, rtol=1e-5)
    for shown, answer in ((True, -1.3), (False, 0.0)):
        said = marginals(denoiser(table, single), PROCESS, jnp.asarray([[1]]), jnp.asarray([[shown]]))
        np.testing.assert_allclose(said, [answer], rtol=1e-6)


@pytest.mark.slow
def test_refusals():
    x0, key = jnp.zeros((2, 3), int), jax.random.key(0)
    for make in (objectives.marginals, functools.partial(objectives.energy_marginals, log_density=log_f)):
        with pytest.raises(ValueError, match="of the masked process, got Uniform"):
            make(Uniform(2))
        with pytest.raises(ValueError, match="must be 'posterior' or 'cavity', got 'ratio'"):
            make(PROCESS, "ratio")
        with pytest.raises(ValueError, match="weight must be positive, got 0"):
            make(PROCESS, weight=0.0)
    with pytest.raises(ValueError, match=r"one output more for each site, \(2, 3, 3\), got \(2, 3, 2\)"):
        LIKELIHOOD(key, network, jnp.asarray(random_table()[..., :2]), x0)
    with pytest.raises(ValueError, match="denoise without blocks"):
        LIKELIHOOD(key, network, jnp.asarray(random_table()), x0, {"clean": x0, "cond": None})
    with pytest.raises(ValueError, match=r"one weight for each of them, got \(2, 3\)"):
        ENERGY(key, network, at(random_table(), 0.0), x0, None, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"shown has shape \(3,\); give one entry per site, \(2, 3\)"):
        marginals(denoiser(exact()), PROCESS, x0, jnp.ones(3, bool))
    with pytest.raises(ValueError, match="of the masked process, got Uniform"):
        chain_rule(key, denoiser(exact()), Uniform(2), x0, jnp.ones((2, 3), bool))
