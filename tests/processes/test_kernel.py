"""Structured kernels against matrix exponentials, Bayes' rule and enumeration; the mixtures they contain."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from ddjax import grids, random
from ddjax.fixtures import Categorical, exact_nelbo
from ddjax.fixtures.categorical import all_states
from ddjax.frozen import Frozen
from ddjax.likelihood import nelbo
from ddjax.objectives import elbo
from ddjax.predictions import Prediction
from ddjax.processes import Kernel, Masked, Uniform, generators
from ddjax.schedules import CondOT, Cosine, Linear, LogLinear, Polynomial

CYCLE = Frozen([[-0.5, 0.4, 0.1], [0.1, -0.6, 0.5], [0.7, 0.2, -0.9]])  # not reversible
PROCESSES = [
    Kernel(3, generators.birth_death(3), Cosine()),
    Kernel(3, generators.gaussian(3, 0.4, 0.3), Linear(), absorb=0.4),
    Kernel(3, CYCLE, LogLinear(1e-2)),
]
VARIANTS = [*PROCESSES[:2], pytest.param(PROCESSES[2], marks=pytest.mark.slow)]
every_process = pytest.mark.parametrize("process", VARIANTS, ids=["birth-death", "gaussian+mask", "irreversible"])


def kernel(process, s, t):
    """Q_{t|s} by SciPy's exponential of the whole rate matrix, the mask's row and column included."""
    n, k, a = process.num_states, process.num_symbols, process.absorb
    rate = np.zeros((n, n))
    rate[:k, :k] = (1 - a) * process.generator.values
    if a:
        rate[:k, :k] -= a * np.eye(k)
        rate[:k, k] = a
    alpha = np.asarray(process.schedule.alpha(jnp.asarray([s, t])))
    return scipy.linalg.expm(rate * (math.log(alpha[0] / alpha[1]) if alpha[1] > 0 else 400.0))


@functools.partial(jax.jit, static_argnums=(0, 1))
def probabilities(process, name, like, *arguments):
    """The probabilities of every state, `(batch, *sites, states)`, from log_prob alone."""
    distribution = getattr(process, name)(*arguments)
    log_p = jax.vmap(lambda y: distribution.log_prob(jnp.full_like(like, y)), out_axes=-1)
    return jnp.exp(log_p(jnp.arange(process.num_states)))


def pairs(process):
    """Every clean symbol against every state, as two batches of one site."""
    x0, y = np.meshgrid(range(process.num_symbols), range(process.num_states), indexing="ij")
    return jnp.asarray(x0.reshape(-1, 1)), jnp.asarray(y.reshape(-1, 1))


def random_logits(shape, seed=0, scale=2.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape))


def exact_laws(law, process, xt, s, t):
    """Posterior, cavity, ratio and p(x_s^i | x_t), each site's, by Bayes' rule over clean configurations in NumPy."""
    clean, k = np.asarray(law.configurations), process.num_symbols
    q_s, q_ts = kernel(process, 0, s)[:k], kernel(process, s, t)
    q_t = q_s @ q_ts
    likelihood = q_t[clean[None], xt[:, None]]  # (batch, clean, sites)
    weights = np.exp(np.asarray(law.log_p)) * np.prod(likelihood, -1)
    weights /= weights.sum(1, keepdims=True)
    joint = q_s[clean][None] * np.moveaxis(q_ts[:, xt], 0, -1)[:, None]  # (batch, clean, sites, x_s)
    total = joint.sum(-1, keepdims=True)
    reverse = np.einsum("bc,bciy->biy", weights, joint / np.where(total > 0, total, 1))
    of = clean[:, :, None] == np.arange(k)
    posterior = np.einsum("bc,cik->bik", weights, of)
    others = np.exp(np.asarray(law.log_p))[:, None] * np.prod(likelihood, -1, keepdims=True) / likelihood
    cavity = np.einsum("bci,cik->bik", others, of)
    marginal = cavity @ q_t  # proportional to that of site i at t, given the other sites
    ratio = marginal / np.take_along_axis(marginal, xt[..., None], -1)
    return {"posterior": posterior, "cavity": cavity, "ratio": ratio}, reverse


def wrong(process):
    """A denoiser that is nobody's, smooth in t."""
    table = random_logits((process.num_states, process.num_symbols), 3, 1.0)
    return lambda xt, t, cond: Prediction(table.astype(t.dtype)[xt] * (1 + t)[:, None, None], "cavity")


@pytest.mark.parametrize("process", PROCESSES, ids=["birth-death", "gaussian+mask", "irreversible"])
def test_matrices_are_exponentials_of_the_rate(x64, process):
    times = [(0.0, 1e-7), (0.0, 0.03), (0.0, 0.4), (0.1, 0.35), (0.35, 0.8), (0.3, 0.9999), (0.2, 1.0), (0.4, 0.4)]
    s, t = jnp.asarray(times).T
    ours = np.asarray(jax.jit(process.transition)(s, t))
    np.testing.assert_allclose(ours, [kernel(process, *ends) for ends in times], atol=1e-12)
    np.testing.assert_allclose(ours.sum(-1), 1.0, atol=1e-14)
    x0, _ = pairs(process)
    marginal = probabilities(process, "marginal", x0, x0, jnp.full(len(x0), 0.4))[:, 0]
    np.testing.assert_allclose(marginal, kernel(process, 0.0, 0.4)[np.asarray(x0)[:, 0]], atol=1e-12)


@every_process
def test_bridge_is_bayes_rule(x64, process):
    x0, xt = pairs(process)
    a, b = np.asarray(x0)[:, 0], np.asarray(xt)[:, 0]
    for s, t in ((0.2, 0.6), (0.0, 0.5), (0.97, 0.98), (0.5, 1.0)):
        q_s, q_ts = kernel(process, 0.0, s), kernel(process, s, t)
        q_t = (q_s @ q_ts)[a, b]
        possible = q_t > 1e-60
        expected = (q_s[a] * q_ts[:, b].T)[possible] / q_t[possible][:, None]
        bridge = probabilities(process, "bridge", xt, x0, xt, jnp.full(len(x0), s), jnp.full(len(x0), t))
        np.testing.assert_allclose(bridge[possible, 0], expected, atol=1e-10)


@pytest.mark.slow
@every_process
def test_reverse_is_exact_whatever_is_predicted(x64, process):
    law, xt = Categorical(2, 3), all_states(2, process.num_states)
    laws, expected = exact_laws(law, process, xt, 0.37, 0.6)
    predictions = {kind: Prediction(jnp.log(jnp.asarray(value)), kind) for kind, value in laws.items()}

    @jax.jit
    def every(xt, s, t):
        converted = [process.convert(predictions[a], b, xt, t).value for a in laws for b in laws]
        return converted, [jax.nn.softmax(process.reverse(v, xt, s, t).logits) for v in predictions.values()]

    converted, reverse = every(jnp.asarray(xt), jnp.full(len(xt), 0.37), jnp.full(len(xt), 0.6))
    for value, (_, kind) in zip(converted, itertools.product(laws, laws), strict=True):
        theirs = laws[kind] / laws[kind].sum(-1, keepdims=True)
        np.testing.assert_allclose(jax.nn.softmax(value), theirs, atol=1e-10)
    for ours in reverse:
        np.testing.assert_allclose(ours, expected, atol=1e-10)


@every_process
def test_rates_are_the_derivative_of_the_kernel(x64, process):
    y, t, h = jnp.arange(process.num_states)[:, None], 0.4, 1e-6
    rates = np.asarray(process.rates_into(y, jnp.full(len(y), t)))[:, 0].T
    step = (kernel(process, t, t + h) - np.eye(process.num_states)) / h
    others = ~np.eye(process.num_states, dtype=bool)
    np.testing.assert_allclose(rates[others], step[others], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@every_process
def test_prior_kl_is_brute_force(x64, process):
    x0 = jnp.arange(3)[:, None]
    for t in (0.5, 1.0):
        q = kernel(process, 0.0, t)[:3]
        prior = q.mean(0)
        ours = np.exp(process.prior((process.num_states, 1), t).log_prob(jnp.arange(process.num_states)[:, None]))
        np.testing.assert_allclose(ours[:, 0], prior, atol=1e-12)
        kl = np.sum(np.where(q > 1e-100, q * np.log(np.where(q > 1e-100, q, 1) / np.maximum(prior, 1e-300)), 0), 1)
        np.testing.assert_allclose(process.prior_kl(x0, jnp.full(3, t))[:, 0], kl, atol=1e-12)
    assert (kl.max() > 1e-9) == (process.generator is CYCLE)  # alpha_1 > 0 is not free


@pytest.mark.slow
@every_process
def test_path_kl_is_the_limit_of_the_step_kl(x64, process):
    """(1 / dt) KL(bridge || reverse) as dt -> 0, extrapolated, with a wrong cavity; both laws in NumPy."""
    x0, xt = pairs(process)
    a, b = np.asarray(x0)[:, 0], np.asarray(xt)[:, 0]
    prediction = Prediction(random_logits((len(x0), 1, 3)), "cavity")
    cavity = np.asarray(jax.nn.softmax(prediction.value))[:, 0]
    path_kl, step_kl = jax.jit(process.path_kl), jax.jit(process.step_kl)
    for t in (0.2, 0.9):
        possible = kernel(process, 0.0, t)[a, b] > 0

        def brute(dt, t=t, possible=possible):
            q_s, into = kernel(process, 0.0, t - dt), kernel(process, t - dt, t)[:, b].T
            p, q = q_s[a] * into, (cavity @ q_s[:3]) * into
            p, q = (v[possible] / v[possible].sum(1, keepdims=True) for v in (p, q))
            return np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / np.where(q > 0, q, 1)), 0), 1)

        ours = step_kl(x0, prediction, xt, jnp.full(len(x0), t - 0.1), jnp.full(len(x0), t))
        np.testing.assert_allclose(ours[possible, 0], brute(0.1), atol=1e-12)
        limit = 2 * brute(5e-5) / 5e-5 - brute(1e-4) / 1e-4
        ours = np.asarray(path_kl(x0, prediction, xt, jnp.full(len(x0), t)))[possible, 0]
        assert ours.max() > 1e-3
        np.testing.assert_allclose(ours, limit, rtol=1e-5, atol=1e-6)


IDENTITIES = [
    (Kernel(4, generators.uniform(4), Polynomial(2.0)), Uniform(4, Polynomial(2.0))),
    (Kernel(4, generators.birth_death(4), Cosine(), absorb=1.0), Masked(4, Cosine())),
]


@pytest.mark.slow
@pytest.mark.parametrize(("process", "mixture"), IDENTITIES, ids=["uniform", "masked"])
def test_uniform_and_masked_are_kernels(x64, process, mixture):
    assert process.num_states == mixture.num_states
    x0, xt = pairs(process)
    batch = len(x0)
    s, t = jnp.full(batch, 0.3), jnp.full(batch, 0.7)
    value = random_logits((batch, 1, 4))
    possible = np.asarray((xt == x0) | (xt == 4))[:, 0] if isinstance(mixture, Masked) else np.ones(batch, bool)

    def every(process):
        cavity = Prediction(value, "cavity")
        back = [
            process.convert(process.convert(cavity, kind, xt, t), "posterior", xt, t) for kind in ("cavity", "ratio")
        ]
        return {
            "marginal": process.marginal(x0, t).log_prob(xt),
            "prior": process.prior((batch, 1), 0.6).log_prob(xt),
            "prior_kl": process.prior_kl(x0, t),
            "bridge": jnp.exp(jax.vmap(process.bridge(x0, xt, s, t).log_prob)(jnp.stack([x0] * 3 + [xt] * 2))),
            "reverse": jnp.exp(jax.vmap(process.reverse(cavity, xt, s, t).log_prob)(jnp.stack([x0] * 3 + [xt] * 2))),
            "posterior": jnp.stack([jax.nn.softmax(v.value) for v in back]),
            "path_kl": process.path_kl(x0, cavity, xt, t),
            "step_kl": process.step_kl(x0, cavity, xt, s, t),
            "reconstruction": process.reconstruction(x0, cavity, xt, t),
            "times": jnp.stack(process.time_at(jnp.linspace(0.0, 1.0, batch), (0.1, 0.9)))[..., None],
        }

    ours, theirs = (jax.jit(every, static_argnums=0)(p) for p in (process, mixture))
    for name in ours:
        a, b = (np.moveaxis(np.asarray(v[name]), np.asarray(v[name]).shape.index(batch), 0) for v in (ours, theirs))
        np.testing.assert_allclose(a[possible], b[possible], rtol=1e-12, atol=1e-12, err_msg=name)
    np.testing.assert_allclose(process.t_range, mixture.t_range, rtol=1e-6)


def test_a_mislabelled_denoiser_is_dearer(x64):
    law, process = Categorical(2, 3), PROCESSES[0]
    mislabelled = lambda xt, t, cond: Prediction(law.denoise(process, "posterior")(xt, t).value, "cavity")
    assert float(exact_nelbo(law, mislabelled, process, order=8).total[0]) > law.entropy + 0.05


def test_a_chain_on_a_grid_converges_at_first_order(x64):
    """Two sites: all the gap is that sites move independently within a step, which halves with the step."""
    law, process = Categorical(2, 3), PROCESSES[0]
    denoise = law.denoise(process, "cavity")
    gaps = [float(exact_nelbo(law, denoise, process, times=grids.uniform(n)).total[0]) - law.entropy for n in (64, 256)]
    assert gaps[1] > 1e-4
    assert 3.5 < gaps[0] / gaps[1] < 4.2
    alone = Categorical(1, 3)
    bound = exact_nelbo(alone, alone.denoise(process, "cavity"), process, times=grids.uniform(3))
    np.testing.assert_allclose(float(bound.total[0]), alone.entropy, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("times", [None, 5])
def test_monte_carlo_and_objective_agree_with_the_exact_bound(times):
    law, process = Categorical(2, 3), PROCESSES[1]
    times = None if times is None else grids.uniform(times)
    with jax.enable_x64(True):
        exact = exact_nelbo(law, wrong(process), process, times=times, order=8)
    batch = 8000
    x0 = law.sample(random.example_keys(jax.random.key(1), batch))
    estimate = nelbo(jax.random.key(0), wrong(process), process, x0, num_times=4, times=times)
    for name in ("prior", "diffusion", "reconstruction"):
        draws, truth = np.asarray(getattr(estimate, name)), float(getattr(exact, name)[0])
        assert abs(draws.mean() - truth) < 4 * draws.std() / math.sqrt(batch) + 1e-5, name
    apply = lambda params, xt, t, cond, **_: wrong(process)(xt, t, cond).value * params
    objective = elbo(process, "cavity", times=times)
    loss, gradient = jax.jit(jax.value_and_grad(lambda p: objective(jax.random.key(2), apply, p, x0)[0]))(1.0)
    assert abs(float(loss) * 2 - float(exact.diffusion[0])) < 0.1 * float(exact.diffusion[0])
    assert np.isfinite(gradient)


# -- float32 ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_small_probabilities_are_exact_in_float32():
    """tauLDR's eigendecomposition has errors of 1e-7 here, and sets what is below 1e-8 to 0: ratios are then 0 / 0."""
    process = Kernel(40, generators.birth_death(40))
    ends = jnp.asarray([1e-6, 1e-4, 1e-3, 1e-2, 0.3, 0.99], jnp.float32)
    single = np.asarray(process.transition(jnp.zeros_like(ends), ends))
    with jax.enable_x64(True):
        exact = np.asarray(process.transition(jnp.zeros(6), jnp.asarray(ends, jnp.float64)))
    # float64 by an independent road: Poisson's sum, all terms positive, no powers.
    rate = process.generator.values
    c = -np.diag(rate).min()
    term, brute = np.eye(40), 0.0
    b = -math.log1p(-float(ends[3]))
    for n in range(400):
        brute = brute + term * math.exp(-c * b)
        term = term @ (np.eye(40) + rate / c) * (c * b / (n + 1))
    np.testing.assert_allclose(exact[3], brute, rtol=1e-10)
    seen = exact > 1e-30
    assert exact[0].min() < 1e-36 < exact[0][1, 6] < 1e-9
    np.testing.assert_allclose(single[seen], exact[seen], rtol=2e-5)


@functools.lru_cache
def large():
    process = Kernel(24, generators.gaussian(24, 0.05, 0.5), absorb=0.2)
    rng = np.random.default_rng(0)
    x0 = rng.integers(0, 24, (40, 1))
    times = np.repeat(np.float32([3e-4, 1e-2, 0.5, 1 - 2**-12, 1 - 2**-24]), 8)
    with jax.enable_x64(True):
        xt = process.marginal(x0, jnp.asarray(times, float)).sample(random.example_keys(jax.random.key(0), 40))
    xt = np.array(xt, np.int32)
    xt[:4] = np.abs(x0[:4] - 5)  # far from x0, where the chance of being is tiny and its ratios are not
    return process, x0, xt, times


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-3, 10.0])
def test_path_kl_in_float32(scale):
    """From the first losses to the last float before t = 1, for a timid network and one sure of the wrong symbol."""
    process, x0, xt, times = large()
    logits = random_logits((40, 1, 24), scale=scale).astype(jnp.float32)
    path_kl = jax.jit(lambda *a: process.path_kl(*a[:1], Prediction(a[1], "cavity"), *a[2:]))
    with jax.enable_x64(True):
        exact = path_kl(x0, jnp.asarray(logits, jnp.float64), xt, jnp.asarray(times, jnp.float64))
    single = path_kl(x0, logits, xt, jnp.asarray(times))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, exact, rtol=2e-3)


@pytest.mark.slow
def test_gradients_are_finite():
    process, x0, xt, times = large()

    @jax.jit
    def loss(z, kind_is_posterior):
        total = lambda kind: (
            process.path_kl(x0, Prediction(z, kind), xt, times)
            + process.step_kl(x0, Prediction(z, kind), xt, 0.5 * times, times)
        ).sum()
        return jnp.where(kind_is_posterior, total("posterior"), total("cavity"))

    for logits in (jnp.zeros((40, 1, 24)), jnp.zeros((40, 1, 24)).at[..., 3].set(200.0)):
        for flag in (True, False):
            value, gradient = jax.value_and_grad(loss)(logits, flag)
            assert np.isfinite(value)
            assert np.isfinite(np.asarray(gradient)).all()


@pytest.mark.slow
@every_process
def test_times_integrate_and_stay_inside(x64, process):
    nodes, weights = np.polynomial.legendre.leggauss(100)
    time_at = jax.jit(process.time_at, static_argnums=1)
    t, dt = time_at(jnp.asarray(0.5 * nodes + 0.5), (0.1, 0.9))
    np.testing.assert_allclose(0.5 * weights @ (np.exp(t) * dt), np.exp(0.9) - np.exp(0.1), rtol=1e-9)
    t, dt = time_at(jnp.asarray([0.0, 1.0], jnp.float32), process.t_range)
    cavity = Prediction(jnp.ones((2, 1, 3)), "cavity")
    kl = jax.jit(process.path_kl)(jnp.zeros((2, 1), int), cavity, jnp.ones((2, 1), int), t)
    assert np.isfinite(np.asarray(dt[:, None] * kl)).all()
    assert process.t_range[0] < float(t.min())
    assert float(t.max()) < 1.0


@pytest.mark.slow
def test_times_give_each_scale_its_share():
    """64 symbols forget over eleven octaves of B; uniform in lost symbols, nearly all times would be in the first."""
    process = Kernel(64, generators.birth_death(64))
    t, _ = process.time_at(jnp.linspace(0.01, 0.99, 99), process.t_range)
    octaves = np.log2(-np.log1p(-np.asarray(t)))
    counts, _ = np.histogram(octaves, np.arange(-11, 1, 2.0))
    assert counts.min() >= 8


@pytest.mark.slow
def test_draws_follow_the_law():
    process, batch = PROCESSES[1], 20_000
    keys = random.example_keys(jax.random.key(0), batch)
    x0, t = jnp.full((batch, 1), 2), jnp.full(batch, 0.5)
    logits = jnp.broadcast_to(jnp.asarray([0.0, 1.0, -1.0]), (batch, 1, 3))
    laws = (process.marginal(x0, t), process.reverse(Prediction(logits, "cavity"), x0, t - 0.3, t))
    q = [np.asarray(kernel(process, 0, 0.5))[2], np.asarray(kernel(process, 0, 0.2))[:3]]
    cavity = np.exp([0.0, 1.0, -1.0])
    q[1] = (cavity @ q[1]) * kernel(process, 0.2, 0.5)[:, 2]
    for n, law in enumerate(laws):
        counts = np.bincount(np.asarray(law.sample(random.fold_in(keys, n)))[:, 0], minlength=4)
        expected = batch * q[n] / q[n].sum()
        seen = expected > 1e-9
        assert (counts[~seen] == 0).all()
        assert np.sum((counts - expected)[seen] ** 2 / expected[seen]) < 30


def test_any_shape_of_state_and_times_per_site(x64):
    """An image is its flattened sites; a time per site is what each site alone would get; one time for all, too."""
    process = PROCESSES[1]
    rng = np.random.default_rng(0)
    x0, xt = jnp.asarray(rng.integers(0, 3, (2, 2, 2, 1))), jnp.asarray(rng.integers(0, 4, (2, 2, 2, 1)))
    value = random_logits((2, 2, 2, 1, 3))
    s, t = (jnp.asarray(np.linspace(*ends, 8)).reshape(2, 2, 2, 1) for ends in ((0.1, 0.4), (0.5, 0.9)))

    @jax.jit
    def every(x0, xt, value, s, t):
        prediction = Prediction(value, "posterior")
        return [
            process.marginal(x0, t).log_prob(xt),
            process.bridge(x0, xt, s, t).log_prob(x0),
            process.reverse(prediction, xt, s, t).log_prob(x0),
            process.prior_kl(x0, t),
            process.path_kl(x0, prediction, xt, t),
            process.reconstruction(x0, prediction, xt, t),
        ]

    flat = [x0.reshape(8, 1), xt.reshape(8, 1), value.reshape(8, 1, 3)]
    for times, alone in (
        ((s, t), (s.reshape(8), t.reshape(8))),
        ((s[:, 0, 0, 0], t[:, 0, 0, 0]), [jnp.repeat(v[:, 0, 0, 0], 4) for v in (s, t)]),
    ):
        for a, b in zip(every(x0, xt, value, *times), every(*flat, *alone), strict=True):
            assert a.shape == x0.shape
            np.testing.assert_allclose(a.reshape(8, 1), b, rtol=1e-11)


def test_errors():
    good = generators.birth_death(3)
    for message, make in (
        ("hashable", lambda: Kernel(3, good.values)),
        ("shape", lambda: Kernel(4, good)),
        ("survival schedule", lambda: Kernel(3, good, CondOT())),
        ("share of the rate", lambda: Kernel(3, good, absorb=1.5)),
        ("sum to 0", lambda: Kernel(3, Frozen(good.values + np.eye(3)))),
        ("not negative", lambda: Kernel(3, Frozen(-good.values))),
        ("not negative", lambda: Kernel(3, Frozen(good.values * np.nan))),
        ("every other", lambda: Kernel(2, Frozen([[-1.0, 1.0], [0.0, 0.0]]))),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    process, xt = Kernel(3, good), jnp.zeros((2, 4), int)
    with pytest.raises(ValueError, match="must have shape"):
        process.reverse(Prediction(jnp.zeros((2, 4, 4)), "posterior"), xt, jnp.full(2, 0.1), jnp.full(2, 0.2))
    with pytest.raises(ValueError, match="does not broadcast"):
        process.marginal(xt, jnp.zeros((2, 4, 1)))


def test_kernels_compare_by_value():
    a, b = (Kernel(3, generators.birth_death(3), Cosine()) for _ in range(2))
    assert a == b
    assert hash(a) == hash(b)
    assert a != Kernel(3, generators.uniform(3), Cosine())
    assert a.generator.values.flags.writeable is False
    np.testing.assert_array_equal(np.asarray(a.generator), a.generator.values)
