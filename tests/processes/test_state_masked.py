"""Masking whose pace depends on the symbol: brute force from alpha alone, limits of KLs, and `Masked` as a case."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax import random
from ddjax.fixtures import Categorical, exact_nelbo
from ddjax.fixtures.categorical import all_states
from ddjax.frozen import Frozen
from ddjax.predictions import Prediction
from ddjax.processes import Masked, StateMasked
from ddjax.schedules import Linear, LogLinear, Polynomial
from ddjax.symbol_schedules import Spindle, SymbolPolynomial

POWERS, TILTS = (0.6, 1.0, 2.5), (0.3, -0.28, 0.1)
POLYNOMIAL = StateMasked(3, SymbolPolynomial(POWERS))
SPINDLE = StateMasked(3, Spindle(TILTS))
LEAKY = StateMasked(3, SymbolPolynomial(POWERS, eps=0.05))
every = pytest.mark.parametrize("process", [POLYNOMIAL, SPINDLE, LEAKY], ids=["polynomial", "spindle", "leaky"])
both = pytest.mark.parametrize("process", [POLYNOMIAL, SPINDLE], ids=["polynomial", "spindle"])
LAW, MASK = Categorical(2, 3), 3
SYMBOLS, STATES = np.arange(3), jnp.arange(4)


def survival(process, t):
    """alpha of each symbol; written here again, on purpose."""
    if process is SPINDLE:
        return 1 - t - np.asarray(TILTS) * np.sin(np.pi * t)
    eps = 0.05 if process is LEAKY else 0.0
    return 1 - (1 - eps) * t ** np.asarray(POWERS)


def kernel(process, s, t, steps=50):
    """Q_{t|s} as the product of small steps, in each of which a symbol goes to the mask at its own rate."""
    q = np.eye(4)
    for a, b in itertools.pairwise(np.linspace(s, t, steps + 1)):
        stay = np.append(survival(process, b) / survival(process, a), 1.0)
        step = np.diag(stay)
        step[:, MASK] += 1 - stay
        q = q @ step
    return q


@functools.partial(jax.jit, static_argnums=(0, 1))
def probabilities(process, name, like, *arguments):
    """The probabilities of every state, `(batch, *sites, states)`, from log_prob alone."""
    distribution = getattr(process, name)(*arguments)
    log_p = jax.vmap(lambda y: distribution.log_prob(jnp.full_like(like, y)), out_axes=-1)
    return jnp.exp(log_p(STATES))


def pairs():
    """Every clean symbol and every state it can become, as two batches of one site."""
    return jnp.asarray([[0], [1], [2], [0], [1], [2]]), jnp.asarray([[0], [1], [2], [3], [3], [3]])


def random_logits(shape, seed=0, scale=2.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape))


predict = jax.jit(lambda process, kind, xt, t: LAW.denoise(process, kind)(xt, t), static_argnums=(0, 1))
path_kl = jax.jit(lambda process, *arguments: process.path_kl(*arguments), static_argnums=0)
step_kl = jax.jit(lambda process, *arguments: process.step_kl(*arguments), static_argnums=0)


# -- schedules ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@every
def test_schedules(x64, process):
    """Values against numpy, derivatives by autodiff, the two ends, ratios, and an order that never turns."""
    schedule, grid = process.schedule, np.linspace(0.0, 1.0, 41)
    t = jnp.asarray(grid)[:, None]
    alpha, sigma = schedule.alpha(t, SYMBOLS), schedule.sigma(t, SYMBOLS)
    np.testing.assert_allclose(alpha, [survival(process, v) for v in grid], atol=1e-14)
    np.testing.assert_allclose(alpha + sigma, 1.0, atol=1e-14)
    assert (np.diff(alpha, axis=0) < 0).all()
    np.testing.assert_allclose(alpha[0], 1.0)
    np.testing.assert_allclose(alpha[-1], 0.05 if process is LEAKY else 0.0, atol=1e-15)
    inner, v = t[1:-1], jnp.broadcast_to(SYMBOLS, (39, 3))
    slope = lambda f: jax.vmap(jax.vmap(jax.grad(f)))(jnp.broadcast_to(inner, v.shape), v)
    np.testing.assert_allclose(schedule.sigma_prime(inner, v), slope(schedule.sigma), rtol=1e-10)
    np.testing.assert_allclose(schedule.rate(inner, v), slope(lambda t, v: jnp.log(schedule.sigma(t, v))), rtol=1e-10)
    np.testing.assert_allclose(np.exp(schedule.log_sigma(inner, v)), schedule.sigma(inner, v), rtol=1e-12)
    for s in (0.0, 0.01, 0.4):
        kept = np.asarray(schedule.sigma(jnp.asarray(s), SYMBOLS) / schedule.sigma(jnp.asarray(0.5), SYMBOLS))
        np.testing.assert_allclose(schedule.kept(jnp.asarray(s), jnp.asarray(0.5), SYMBOLS), kept, rtol=1e-12)
        np.testing.assert_allclose(schedule.revealed(jnp.asarray(s), jnp.asarray(0.5), SYMBOLS), 1 - kept, rtol=1e-12)


def test_a_steep_power_in_float32():
    """t**40 underflows; what the reverse process needs of it does not, and near t the difference keeps its digits."""
    schedule, v = SymbolPolynomial((40.0, 1.0)), jnp.arange(2)
    s, t = jnp.float32(5e-4), jnp.float32(1e-3)
    assert schedule.sigma(t, v)[0] == 0
    np.testing.assert_allclose(schedule.kept(s, t, v), [2.0**-40, 0.5], rtol=1e-5)
    np.testing.assert_allclose(schedule.log_sigma(t, v), np.log(1e-3) * np.asarray([40.0, 1.0]), rtol=1e-6)
    s, t = np.float32(0.7) - np.geomspace(1e-6, 1e-3, 16, dtype=np.float32)[:, None], np.float32(0.7)
    exact = -np.expm1(np.asarray([40.0, 1.0]) * np.log1p((s.astype(float) - float(t)) / float(t)))
    np.testing.assert_allclose(schedule.revealed(jnp.asarray(s), jnp.asarray(t), v), exact, rtol=1e-5)
    gradient = jax.grad(lambda w: SymbolPolynomial(w).revealed(jnp.float32(0), t, v).sum())(jnp.ones(2))
    np.testing.assert_array_equal(gradient, 0.0)


def test_spindles_lose_information_at_a_constant_pace(x64):
    """He et al. 2022: sum_v p_v alpha_v information_v = (1 - t) entropy, and what is rare is lost first."""
    p = np.asarray([0.3, 0.25, 0.2, 0.15, 0.1])
    schedule = Spindle.from_frequencies(40 * p, strength=0.2)
    alpha, information = np.asarray(schedule.alpha(jnp.linspace(0, 1, 21)[:, None], jnp.arange(5))), -np.log(p)
    np.testing.assert_allclose(alpha @ (p * information), (1 - np.linspace(0, 1, 21)) * (p @ information), atol=1e-14)
    assert (np.diff(alpha[1:-1], axis=1) < 0).all()
    # One by hand: two symbols, entropy h, tilt = 0.1 (1 - h / -log p).
    h = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    expected = [0.1 * (1 - h / math.log(4.0)), 0.1 * (1 - h / math.log(4 / 3))]
    np.testing.assert_allclose(np.asarray(Spindle.from_frequencies([1, 3], 0.1).tilts), expected, rtol=1e-12)


def test_spindles_are_clipped_where_survival_would_rise(x64):
    schedule = Spindle.from_frequencies([1e6, 10, 0], strength=3.0)
    alpha = np.asarray(schedule.alpha(jnp.linspace(0, 1, 1001)[:, None], jnp.arange(3)))
    assert (np.diff(alpha, axis=0) < 0).all()
    np.testing.assert_allclose(np.asarray(schedule.tilts) * np.pi, [-0.95, 0.95, 0.95])
    np.testing.assert_allclose(np.asarray(Spindle.from_frequencies([1, 2], 0.0).tilts), 0.0)


# -- the process against brute force -----------------------------------------------------------------------------


@every
def test_marginal_is_the_product_of_small_steps(x64, process):
    x0 = jnp.asarray(SYMBOLS)[:, None]
    for t in (0.03, 0.4, 0.99):
        ours = probabilities(process, "marginal", x0, x0, jnp.full(3, t))[:, 0]
        np.testing.assert_allclose(ours, kernel(process, 0.0, t)[:3], atol=1e-10)


@both
def test_bridge_is_bayes_rule(x64, process):
    x0, xt = pairs()
    a, b = np.asarray(x0)[:, 0], np.asarray(xt)[:, 0]
    for s, t in ((0.2, 0.6), (0.0, 0.5), (0.97, 0.98)):
        q_s, q_ts = kernel(process, 0.0, s), kernel(process, s, t)
        expected = q_s[a] * q_ts[:, b].T / (q_s @ q_ts)[a, b][:, None]
        bridge = probabilities(process, "bridge", xt, x0, xt, jnp.full(6, s), jnp.full(6, t))
        np.testing.assert_allclose(bridge[:, 0], expected, atol=1e-10)


def exact_reverse(process, xt, s, t):
    """p(x_s^i | x_t) from the joint of x_0, x_s and x_t: products of kernels only."""
    p = np.exp(np.asarray(LAW.log_p)).reshape(3, 3)
    q_s, q_ts = kernel(process, 0.0, s)[:3], kernel(process, s, t)
    q_t, out = q_s @ q_ts, []
    for a, b in np.asarray(xt):
        first = np.einsum("ij,iy,y,j->y", p, q_s, q_ts[:, a], q_t[:, b])
        second = np.einsum("ij,i,jy,y->y", p, q_t[:, a], q_s, q_ts[:, b])
        out.append([first / first.sum(), second / second.sum()])
    return np.asarray(out)


@pytest.mark.slow
@both
def test_reverse_is_exact_whatever_is_predicted(x64, process):
    xt = jnp.asarray(all_states(2, 4))
    for s, t in ((0.37, 0.6), (0.0, 0.3)):
        expected = exact_reverse(process, xt, s, t)
        s, t = jnp.full(16, s), jnp.full(16, t)
        for kind in ("posterior", "cavity", "ratio"):
            reverse = probabilities(process, "reverse", xt, predict(process, kind, xt, t), xt, s, t)
            np.testing.assert_allclose(reverse, expected, atol=1e-10)


@pytest.mark.parametrize(("true", "label"), [("posterior", "cavity"), ("cavity", "posterior")])
def test_a_mislabelled_prediction_gives_a_wrong_step(x64, true, label):
    """Unlike under `Masked`: the mask itself says which symbols are likely."""
    xt, s, t = jnp.asarray(all_states(2, 4)), jnp.full(16, 0.37), jnp.full(16, 0.6)
    value, expected = predict(POLYNOMIAL, true, xt, t).value, exact_reverse(POLYNOMIAL, xt, 0.37, 0.6)
    for name, low, high in ((true, 0.0, 1e-10), (label, 0.01, 1.0)):
        reverse = probabilities(POLYNOMIAL, "reverse", xt, Prediction(value, name), xt, s, t)
        assert low <= 0.5 * np.abs(reverse - expected).sum(-1).max() <= high


@pytest.mark.slow
@both
def test_exact_predictions_convert_into_each_other(x64, process):
    xt, t = jnp.asarray(all_states(2, 4)), jnp.full(16, 0.45)
    masked = np.asarray(xt == MASK)  # a revealed site's cavity cannot be known, and nothing asks for it
    exact = {kind: predict(process, kind, xt, t) for kind in ("posterior", "cavity")}
    # The ratio from marginals: p_t(x_t with y at i) / p_t(x_t).
    q = kernel(process, 0.0, 0.45)[:3]
    p_t = np.einsum("ij,iy,jz->yz", np.exp(np.asarray(LAW.log_p)).reshape(3, 3), q, q)
    ratio = np.asarray([[p_t[:, b] / p_t[a, b], p_t[a, :] / p_t[a, b]] for a, b in np.asarray(xt)])
    exact["ratio"] = Prediction(jnp.log(jnp.asarray(ratio)), "ratio")
    np.testing.assert_allclose(np.exp(predict(process, "ratio", xt, t).value)[masked], ratio[masked], atol=1e-10)
    for start, end in itertools.permutations(exact, 2):
        converted = process.convert(exact[start], end, xt, t)
        assert converted.kind == end
        for prediction in (converted, process.convert(converted, start, xt, t)):
            ours, expected = (np.asarray(jax.nn.softmax(v.value)) for v in (prediction, exact[prediction.kind]))
            np.testing.assert_allclose(ours[masked], expected[masked], atol=1e-10)
    posterior = np.asarray(exact["posterior"].value - exact["cavity"].value)[masked]
    assert np.ptp(posterior, axis=-1).min() > 0.1  # they do differ


@every
def test_prior_kl_is_brute_force(x64, process):
    x0 = jnp.asarray(SYMBOLS)[:, None]
    for t in (0.5, 1.0):
        q = np.concatenate([np.diag(survival(process, t)), 1 - survival(process, t)[:, None]], axis=1)
        prior = q.mean(0)
        np.testing.assert_allclose(np.exp(process.prior((4, 1), t).log_prob(STATES[:, None]))[:, 0], prior, atol=1e-12)
        ratio = np.where(q > 1e-15, q, 1) / np.where(q > 1e-15, prior, 1)
        kl = np.sum(q * np.log(ratio), axis=1)
        np.testing.assert_allclose(process.prior_kl(x0, jnp.full(3, t))[:, 0], kl, atol=1e-12)
    assert (kl.min() > 0.01) == (process is LEAKY)  # what survives to t = 1 is not free


# -- the bound ---------------------------------------------------------------------------------------------------


@both
def test_step_and_path_kl_are_the_kls_of_their_definition(x64, process):
    """step_kl is KL(bridge || reverse) for long and short steps, path_kl its limit, for a denoiser that is wrong."""
    x0, xt = pairs()
    for kind in ("posterior", "cavity"):
        prediction = Prediction(random_logits((6, 1, 3)), kind)

        def brute(s, t, prediction=prediction):
            s, t = jnp.full(6, s), jnp.full(6, t)
            p = probabilities(process, "bridge", xt, x0, xt, s, t)
            q = probabilities(process, "reverse", xt, prediction, xt, s, t)
            return np.sum(p * np.log(np.where(p > 0, p, 1) / np.where(p > 0, q, 1)), -1)

        for s, t in ((0.0, 0.5), (0.1, 0.9), (0.6, 0.61), (1e-6, 0.9)):
            ours = step_kl(process, x0, prediction, xt, jnp.full(6, s), jnp.full(6, t))
            np.testing.assert_allclose(ours, brute(s, t), rtol=1e-9, atol=1e-12)
        for t in (0.2, 0.9):
            limit = 2 * brute(t - 5e-5, t) / 5e-5 - brute(t - 1e-4, t) / 1e-4
            ours = np.asarray(path_kl(process, x0, prediction, xt, jnp.full(6, t)))
            assert ours.max() > 0.1
            np.testing.assert_allclose(ours, limit, rtol=1e-5, atol=1e-7)


def test_path_kl_vanishes_for_a_clean_prediction(x64):
    x0, xt = pairs()
    prediction = Prediction(jnp.where(jax.nn.one_hot(x0, 3) > 0, 0.0, -1e30), "cavity")
    np.testing.assert_array_equal(path_kl(POLYNOMIAL, x0, prediction, xt, jnp.full(6, 0.3)), 0.0)


def nelbo(process, denoise, **options):
    """From 1e-6 of the symbols lost: beyond lies the total correlation of what two lost sites do."""
    low = float(process.schedule.first.time_of_sigma(jnp.asarray(1e-6)))
    return float(exact_nelbo(LAW, denoise, process, t_range=(low, 1.0), order=24, **options).total[0])


def test_a_mislabelled_denoiser_is_dearer(x64):
    denoise = lambda xt, t, cond: Prediction(LAW.denoise(POLYNOMIAL, "posterior")(xt, t).value, "cavity")
    assert nelbo(POLYNOMIAL, denoise) > LAW.entropy + 0.05


@pytest.mark.slow
def test_equal_symbols_are_masked(x64):
    """With one pace for all symbols every method is that of `Masked`, whatever is predicted."""
    x0, xt = jnp.asarray(all_states(2, 3))[:8], jnp.asarray(all_states(2, 4))[8:]
    xt = jnp.where(xt == MASK, xt, x0)  # a revealed site shows its own symbol
    s, t, u = jnp.linspace(0.0, 0.4, 8), jnp.linspace(0.5, 1.0, 8), jnp.linspace(0.0, 1.0, 8)
    cases = [
        (Masked(3, Polynomial(2.0)), StateMasked(3, SymbolPolynomial((2.0,) * 3))),
        (Masked(3, LogLinear(0.05)), StateMasked(3, SymbolPolynomial((1.0,) * 3, eps=0.05))),
    ]

    @functools.partial(jax.jit, static_argnums=0)
    def every_method(process, value):
        prediction = Prediction(value, "cavity")
        posterior = process.convert(prediction, "posterior", xt, t)
        lawful = lambda law: jax.vmap(lambda y: law.log_prob(jnp.full_like(xt, y)))(STATES)
        return [
            lawful(process.marginal(x0, t)),
            lawful(process.bridge(x0, xt, s, t)),
            lawful(process.reverse(prediction, xt, s, t)),
            lawful(process.reverse(posterior, xt, s, t)),
            lawful(process.prior((8, 2), 0.7)),
            process.prior_kl(x0, t),
            process.path_kl(x0, prediction, xt, t),
            process.path_kl(x0, posterior, xt, t),
            process.step_kl(x0, prediction, xt, s, t),
            process.reconstruction(x0, prediction, xt, t),
            posterior.value,
            process.convert(prediction, "ratio", xt, t - 0.1).value,
        ]

    for one, ours in cases:
        for a, b in zip(*(every_method(p, random_logits((8, 2, 3))) for p in (one, ours)), strict=True):
            np.testing.assert_allclose(np.maximum(a, -1e30), np.maximum(b, -1e30), rtol=1e-12, atol=1e-12)
        assert one.t_range == ours.t_range or one.schedule == LogLinear(0.05)  # there another constant, nothing more
        np.testing.assert_allclose(one.time_at(u, (0.1, 0.9)), ours.time_at(u, (0.1, 0.9)), rtol=1e-12)


# -- draws, shapes, float32 --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_draws_follow_the_law():
    """Chi-squared of sample against log_prob for the marginal, the prior, the bridge and the reverse step."""
    process, batch = StateMasked(4, SymbolPolynomial((0.5, 1.0, 2.0, 4.0))), 20_000
    keys, t = random.example_keys(jax.random.key(0), batch), jnp.full(batch, 0.7)
    x0, xt = jnp.full((batch, 1), 3), jnp.full((batch, 1), 4)
    logits = jnp.broadcast_to(jnp.asarray([0.0, 1.0, -1.0, 0.5]), (batch, 1, 4))

    @jax.jit
    def draws_and_probabilities(keys):
        laws = (
            process.marginal(x0, t),
            process.prior((batch, 1), 0.8),
            process.bridge(x0, xt, t - 0.2, t),
            process.reverse(Prediction(logits, "cavity"), xt, t - 0.3, t),
        )
        table = lambda law: jax.vmap(lambda y: law.log_prob(jnp.full((batch, 1), y))[0, 0])(jnp.arange(5))
        return [(law.sample(random.fold_in(keys, n)), jnp.exp(table(law))) for n, law in enumerate(laws)]

    for draws, p in draws_and_probabilities(keys):
        counts, expected = np.bincount(np.asarray(draws)[:, 0], minlength=5), batch * np.asarray(p)
        assert (counts[expected < 1e-9] == 0).all()
        seen = expected > 1e-9
        assert np.sum((counts - expected)[seen] ** 2 / expected[seen]) < 30  # p < 1e-5 at 4 degrees of freedom


def test_carry_over():
    """Revealed sites never change and have no other posterior, whatever the network says; at s = 0 no mask is left."""
    xt = jnp.asarray(np.random.default_rng(0).integers(0, 4, (500, 6)))
    t, value = jnp.full(500, 0.6), 5 * jax.random.normal(jax.random.key(1), (500, 6, 3))
    prediction = Prediction(value, "posterior")
    keys, shown = random.example_keys(jax.random.key(0), 500), np.asarray(xt != MASK)
    step = jax.jit(lambda keys, s: POLYNOMIAL.reverse(prediction, xt, s, t).sample(keys))
    for s in (0.3, 0.0):
        xs = np.asarray(step(jax.random.clone(keys), jnp.full(500, s)))
        np.testing.assert_array_equal(xs[shown], np.asarray(xt)[shown])
        assert (xs[~shown] == MASK).any() == (s > 0)
    posterior = np.asarray(jax.nn.softmax(POLYNOMIAL.convert(prediction, "posterior", xt, t).value))
    np.testing.assert_array_equal(posterior[shown], np.eye(4)[np.asarray(xt)[shown]][:, :3])
    np.testing.assert_allclose(posterior[~shown], np.asarray(jax.nn.softmax(value))[~shown], rtol=1e-5)
    np.testing.assert_array_equal(POLYNOMIAL.observe(keys, xt, t), xt)


def test_small_steps_keep_small_probabilities():
    """With 8192 steps a coin is 1e-4 and a rare symbol 5e-2 of it; each symbol comes back at its own pace."""
    batch, sites, t, dt = 16, 16384, 0.5, 2.0**-13
    p, powers = np.asarray([0.9, 0.05, 0.05]), np.asarray([1.0, 4.0, 0.5])
    process = StateMasked(3, SymbolPolynomial(powers))
    prediction = Prediction(jnp.broadcast_to(jnp.log(jnp.asarray(p, jnp.float32)), (batch, sites, 3)), "posterior")
    reverse = process.reverse(prediction, jnp.full((batch, sites), 3), jnp.full(batch, t - dt), jnp.full(batch, t))
    xs = np.asarray(reverse.sample(random.example_keys(jax.random.key(3), batch)))
    expected = batch * sites * p * (1 - (1 - dt / t) ** powers)
    counts = np.bincount(xs.ravel(), minlength=4)[:3]
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    "process", [StateMasked(3, SymbolPolynomial((0.4, 1.0, 30.0))), SPINDLE], ids=["polynomial", "spindle"]
)
def test_the_bound_is_finite_in_float32(process):
    """Values and gradients at both ends of time, for networks that are sure of the wrong symbol, as in float64."""
    x0, xt = jnp.asarray([[0], [1], [2], [2]]), jnp.asarray([[3], [3], [3], [2]])

    def cost(value, u, t_range):
        t, dt = process.time_at(u, t_range)
        prediction = Prediction(value, "cavity")
        ends = process.reconstruction(x0, prediction, xt, t) + process.step_kl(x0, prediction, xt, 0.5 * t, t)
        return (dt[:, None] * process.path_kl(x0, prediction, xt, t) + ends).sum()

    run = jax.jit(jax.value_and_grad(cost), static_argnums=2)
    for scale in (1.0, 50.0):
        value = random_logits((4, 1, 3), scale=scale).astype(jnp.float32)
        for u in (0.0, 0.5, 1.0):
            single, gradient = run(value, jnp.full(4, u, jnp.float32), process.t_range)
            assert single.dtype == jnp.float32
            assert np.isfinite(np.asarray(gradient)).all()
            if u == 0.5:
                with jax.enable_x64(True):
                    exact, _ = run(jnp.asarray(value, jnp.float64), jnp.full(4, u, jnp.float64), process.t_range)
                np.testing.assert_allclose(single, exact, rtol=1e-4)
            assert np.isfinite(single)
    clean = process.convert(Prediction(jnp.zeros((4, 1, 3)), "cavity"), "posterior", x0, jnp.zeros(4))
    np.testing.assert_array_equal(jax.nn.softmax(clean.value)[:, 0], np.eye(3)[[0, 1, 2, 2]])


def test_any_shape_of_state_and_times_per_site(x64):
    """An image is its flattened sites; a time per site is what each site alone would get."""
    x0 = jnp.asarray(np.random.default_rng(0).integers(0, 3, (2, 2, 2, 1)))
    xt = jnp.where(jnp.asarray(np.random.default_rng(1).integers(0, 2, (2, 2, 2, 1))) > 0, x0, MASK)
    value = random_logits((2, 2, 2, 1, 3))
    s, t = (jnp.linspace(a, a + 0.3, 8).reshape(2, 2, 2, 1) for a in (0.1, 0.5))

    @jax.jit
    def every_method(x0, xt, value, s, t):
        prediction = Prediction(value, "cavity")
        return [
            SPINDLE.marginal(x0, t).log_prob(xt),
            SPINDLE.bridge(x0, xt, s, t).log_prob(x0),
            SPINDLE.reverse(prediction, xt, s, t).log_prob(x0),
            SPINDLE.prior_kl(x0, t),
            SPINDLE.path_kl(x0, prediction, xt, t),
            SPINDLE.step_kl(x0, prediction, xt, s, t),
            SPINDLE.reconstruction(x0, prediction, xt, t),
        ]

    whole = every_method(x0, xt, value, s, t)
    alone = every_method(*(v.reshape(8, 1) for v in (x0, xt)), value.reshape(8, 1, 3), s.reshape(8), t.reshape(8))
    for a, b in zip(whole, alone, strict=True):
        assert a.shape == x0.shape
        np.testing.assert_allclose(a.reshape(8, 1), b, rtol=1e-12)


def test_values_and_errors():
    assert StateMasked(3, SymbolPolynomial(POWERS)) == StateMasked(3, SymbolPolynomial(np.asarray(POWERS)))
    assert hash(StateMasked(3, Spindle(TILTS))) == hash(SPINDLE)
    assert POLYNOMIAL != LEAKY
    assert SymbolPolynomial(POWERS).powers == Frozen(POWERS)
    with pytest.raises(ValueError, match="use Masked"):
        StateMasked(3, Linear())
    with pytest.raises(ValueError, match="for 3 symbols"):
        StateMasked(4, SymbolPolynomial(POWERS))
    for bad in ((1.0, 0.0), (1.0, math.inf), ((1.0,),)):
        with pytest.raises(ValueError, match="powers"):
            SymbolPolynomial(bad)
    with pytest.raises(ValueError, match="eps"):
        SymbolPolynomial(POWERS, eps=1.0)
    for bad in ((0.1, 0.4), (0.1, math.nan), ((0.1,),)):
        with pytest.raises(ValueError, match="tilts"):
            Spindle(bad)
    for bad in ((1.0, 0.0), (1.0, -1.0), ((1.0, 1.0),)):
        with pytest.raises(ValueError, match="frequencies"):
            Spindle.from_frequencies(bad, 0.1)
    with pytest.raises(ValueError, match="strength"):
        Spindle.from_frequencies((1, 1), -0.1)
    xt, t = jnp.zeros((2, 4), int), jnp.full(2, 0.5)
    with pytest.raises(ValueError, match="velocity"):
        POLYNOMIAL.convert(Prediction(jnp.zeros((2, 4, 3)), "cavity"), "velocity", xt, t)
    with pytest.raises(ValueError, match="must have shape"):
        POLYNOMIAL.reverse(Prediction(jnp.zeros((2, 4, 5)), "posterior"), xt, t - 0.1, t)
