"""Learned forward processes against their definition: a flow, a score, and linear algebra on joint Gaussians."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddjax
from ddjax import random
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian, LearnedGaussian, Normal
from ddjax.schedules import VE, CondOT, VPLinear
from ddjax.solvers import Heun
from ddjax.transforms import NoiseShare, Residual, SiteNetwork

NETWORK = SiteNetwork(4, 2)


def parameters(seed=0, outputs=2, size=1.5):
    rng = np.random.default_rng(seed)
    return {
        "inputs": rng.normal(size=(2, 4)),
        "bias": rng.normal(size=4),
        "outputs": size * rng.normal(size=(4, outputs)),
    }


WARPED = LearnedGaussian(Residual(NETWORK), parameters(), VPLinear(), data_std=0.7)


def warp(x0, t, p=None):
    """F and k of `WARPED`, written here again."""
    p = parameters() if p is None else p
    hidden = np.tanh(np.stack([x0, np.broadcast_to(t, x0.shape)], -1) @ p["inputs"] + p["bias"]) @ p["outputs"] / 2.0
    return x0 + t * hidden[..., 0], t * (1 - t) * hidden[..., 1]


def flow(noise, t, x0):
    """x_t as a function of the noise, by `WARPED`'s definition."""
    clean, log_scale = warp(x0, t)
    return float(VPLinear().alpha(t)) * clean + float(VPLinear().sigma(t)) * np.exp(log_scale) * noise


def reverse_drift(x, t, x0, h=1e-5):
    """Velocity of the flow at fixed noise and score, by differences; their reverse drift; the schedule's g^2."""

    def noise(x):
        return (x - flow(np.zeros_like(x0), t, x0)) / (flow(np.ones_like(x0), t, x0) - flow(np.zeros_like(x0), t, x0))

    velocity = (flow(noise(x), t + h, x0) - flow(noise(x), t - h, x0)) / (2 * h)
    score = -(noise(x + h) ** 2 - noise(x - h) ** 2) / (4 * h)
    g2 = float(Gaussian(VPLinear()).sde(jnp.asarray(t))[1])
    return velocity, score, velocity - 0.5 * g2 * score, g2


def states(batch=6, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, 3))


@functools.partial(jax.jit, static_argnums=0)
def everything(process, x0, guess, xt, s, t):
    prediction = Prediction(guess, "x0")
    law, bridge, step = process.marginal(x0, t), process.bridge(x0, xt, s, t), process.reverse(prediction, xt, s, t)
    return {
        "marginal": (law.mean, law.std),
        "bridge": (bridge.mean, bridge.std),
        "reverse": (step.mean, step.std),
        "prior_kl": process.prior_kl(x0, t),
        "path_kl": process.path_kl(x0, prediction, xt, t),
        "reconstruction": process.reconstruction(x0, prediction, xt, s),
        **{kind: process.convert(prediction, kind, xt, t).value for kind in ("noise", "score", "velocity")},
    }


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [VPLinear(), CondOT(), VE()], ids=repr)
def test_the_identity_is_gaussian(x64, schedule):
    """Without a transform, and with one whose outputs are 0 (the bridge's quadrature included)."""
    x0, guess, xt = (jnp.asarray(states(seed=i)) for i in range(3))
    t = jnp.asarray([0.02, 0.1, 0.3, 0.6, 0.9, 0.99])
    expected = everything(Gaussian(schedule, 0.7), x0, guess, xt, 0.6 * t, t)
    silent = LearnedGaussian(Residual(NETWORK), parameters(size=0.0), schedule, 0.7)
    for process in (LearnedGaussian(schedule=schedule, data_std=0.7), silent):
        found = everything(process, x0, guess, xt, 0.6 * t, t)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12), found, expected)
        assert process.t_range == Gaussian(schedule, 0.7).t_range
        np.testing.assert_array_equal(process.prior((2, 3)).std, Gaussian(schedule, 0.7).prior((2, 3)).std)


@pytest.mark.parametrize("t", [0.05, 0.4, 0.85])
def test_rates_are_those_of_the_flow(x64, t):
    """path_kl = |difference of reverse drifts|^2 / (2 g^2), drifts by differences of F and of log q."""
    x0, guess, noise = (states(seed=i) for i in range(3))
    xt = flow(noise, t, x0)
    velocity, score, drift, g2 = reverse_drift(xt, t, guess)
    true = reverse_drift(xt, t, x0)[2]
    found = everything(WARPED, *(jnp.asarray(v) for v in (x0, guess, xt)), jnp.asarray(0.5 * t), jnp.asarray(t))
    np.testing.assert_allclose(found["velocity"], velocity, rtol=1e-6)
    np.testing.assert_allclose(found["score"], score, rtol=1e-6)
    np.testing.assert_allclose(found["path_kl"], (true - drift) ** 2 / (2 * g2), rtol=1e-4, atol=1e-6)
    mean, std = (flow(np.zeros_like(x0), t, x0), flow(np.ones_like(x0), t, x0) - flow(np.zeros_like(x0), t, x0))
    np.testing.assert_allclose(found["marginal"][0], mean, rtol=1e-10)
    np.testing.assert_allclose(found["marginal"][1], std, rtol=1e-10)
    prior = float(VPLinear().sigma(t)) ** 2 + float(VPLinear().alpha(t)) ** 2 * 0.49
    expected = 0.5 * ((std**2 + mean**2) / prior - 1 - np.log(std**2 / prior))
    np.testing.assert_allclose(found["prior_kl"], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.slow
def test_short_bridges_follow_the_reverse_sde_and_compose(x64):
    """Mean and variance of a short step are the drift and g^2; two steps are one."""
    x0, noise = states(seed=0), states(seed=2)
    t, h = 0.4, 1e-5
    xt = flow(noise, t, x0)
    _, _, drift, g2 = reverse_drift(xt, t, x0)

    @jax.jit
    def moments(xt, s, t):
        law = WARPED.bridge(jnp.asarray(x0), xt, s, t)
        return law.mean, law.std

    def bridge(*args):
        return Normal(*moments(*args))

    xt = jnp.asarray(xt)
    model = WARPED.encoded(jnp.asarray(x0), xt, jnp.asarray(t))
    for short in (bridge(xt, t - h, t), WARPED.reverse(Prediction(model, "encoded"), xt, t - h, t)):
        np.testing.assert_allclose((xt - short.mean) / h, drift, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(short.std**2 / h, np.full(x0.shape, g2), rtol=1e-3)
    whole, half = bridge(xt, 0.1, 0.7), bridge(xt, 0.35, 0.7)
    rest, up = bridge(half.mean, 0.1, 0.35), bridge(half.mean + 1.0, 0.1, 0.35)
    np.testing.assert_allclose(rest.mean, whole.mean, rtol=1e-9)
    np.testing.assert_allclose(rest.std**2 + (up.mean - rest.mean) ** 2 * half.std**2, whole.std**2, rtol=1e-9)


def test_path_kl_is_the_limit_of_the_step_kl(x64):
    """Also where the widths of bridge and model differ."""
    x0, guess, xt = (jnp.asarray(states(seed=i)) for i in range(3))
    prediction, t, h = Prediction(guess, "x0"), jnp.asarray(0.5), 1e-5

    @jax.jit
    def rates():
        widths = WARPED.bridge(x0, xt, t - 0.2, t).std / WARPED.bridge(guess, xt, t - 0.2, t).std
        return WARPED.step_kl(x0, prediction, xt, t - h, t) / h, WARPED.path_kl(x0, prediction, xt, t), widths

    step, path, widths = rates()
    assert float(jnp.abs(widths - 1).max()) > 0.01
    np.testing.assert_allclose(step, path, rtol=2e-3, atol=1e-4)


@pytest.mark.slow
def test_diffenc_formula(x64):
    """The loss of the authors' code, in v and with its counter-term sigma^2 x0_hat, for x_phi = x + sigma^2 (y - x).

    With y - x = h: 1/2 gamma' alpha^2 |v - v_hat + sigma (x_hat - x_phi + y + dy/dgamma)|^2.
    """
    schedule, network = VPLinear(), SiteNetwork(4, 1)
    process = LearnedGaussian(Residual(network, NoiseShare(schedule)), parameters(outputs=1), schedule)
    x0, v_hat, noise = (jnp.asarray(states(seed=i)) for i in range(3))
    t = jnp.asarray(0.3)
    alpha, sigma, times = schedule.alpha(t), schedule.sigma(t), jnp.full(6, t)
    y, y_prime = jax.jvp(lambda t: x0 + network(process.parameters, x0, t), (times,), (jnp.ones(6),))
    gamma_prime = -schedule.log_snr_prime(t)
    encoded = x0 + sigma**2 * (y - x0)
    xt = alpha * encoded + sigma * noise
    x_hat = alpha * xt - sigma * v_hat
    extra = sigma * (x_hat - encoded + y + y_prime / gamma_prime)
    expected = 0.5 * gamma_prime * alpha**2 * (alpha * noise - sigma * encoded - v_hat + extra) ** 2
    found = process.path_kl(x0, Prediction((1 + sigma**2) * x_hat, "encoded"), xt, t)
    np.testing.assert_allclose(process.marginal(x0, t).mean, alpha * encoded, rtol=1e-12)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


# -- a Gaussian law under an affine transform: everything is linear algebra ------------------------------------------

MEAN, STD, LOW, HIGH = 0.5, 0.6, 0.02, 0.9


def affine(parameters, x0, t):
    """F = (1 + a t) x0 + b t, k = c t (1 - t)."""
    a, b, c = parameters
    t = t[:, None]
    return (1 + a * t) * x0 + b * t, jnp.broadcast_to(c * t * (1 - t), x0.shape)


AFFINE = LearnedGaussian(affine, np.asarray([0.8, -0.4, 0.5]), VPLinear(), data_std=0.6)


def posterior_mean(process, xt, t):
    """E[x0 | x_t] of N(MEAN, STD^2)."""
    at = process.marginal(jnp.zeros_like(xt), t)
    gain = process.marginal(jnp.ones_like(xt), t).mean - at.mean
    weight = gain * STD**2 / (gain**2 * STD**2 + at.std**2)
    return Prediction(MEAN + weight * (xt - at.mean - gain * MEAN), "x0")


def by_quadrature(process, denoise, x0, weights, noise, noise_weights, t_range, times=48, decode=None):
    """The bound, averaged over values of x0 and of the noise; exact where errors are polynomials in both.

    decode: the decoder; default the process's own.
    """
    x0, noise = (jnp.asarray(v.ravel()[:, None]) for v in np.meshgrid(x0, noise, indexing="ij"))
    mass = jnp.asarray(np.outer(weights, noise_weights).ravel())
    nodes, node_weights = np.polynomial.legendre.leggauss(times)

    def state(t):
        law = process.marginal(x0, t)
        return law.mean + law.std * noise

    def at(u):
        t, scale = process.time_at(u, t_range)
        xt, t = state(t), jnp.full(x0.shape[:1], t)
        return scale * mass @ process.path_kl(x0, denoise(xt, t), xt, t)[:, 0]

    low, high = (jnp.full(x0.shape[:1], end) for end in t_range)
    path = jnp.asarray(node_weights) / 2 @ jax.lax.map(at, jnp.asarray((1 + nodes) / 2))
    x_low = state(low)
    decode = type(process).reconstruction if decode is None else decode
    ends = process.prior_kl(x0, high) + decode(process, x0, denoise(x_low, low), x_low, low)
    return path + mass @ ends[:, 0]


def normal(order=16):
    """Nodes and weights of a standard normal."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(order)
    return nodes, weights / weights.sum()


def gaussian_law(order=16):
    nodes, weights = normal(order)
    return MEAN + STD * nodes, weights


def by_joint_gaussians(parameters, steps):
    """E[NELBO] of the chain: H + KL between the joint laws of (x0, x_1 ... x_n), data and model, as matrices."""
    a, b, c = parameters
    schedule = VPLinear()
    with np.errstate(divide="ignore"):
        snr = np.linspace(
            float(schedule.log_snr(jnp.asarray(LOW))), float(schedule.log_snr(jnp.asarray(HIGH))), steps + 1
        )
    t = np.asarray(schedule.time(jnp.asarray(snr)))
    alpha, sigma = (np.asarray(f(jnp.asarray(t))) for f in (schedule.alpha, schedule.sigma))
    gain, shift, std = alpha * (1 + a * t), alpha * b * t, sigma * np.exp(c * t * (1 - t))
    nodes, weights = np.polynomial.legendre.leggauss(8)
    inner = snr[:-1, None] + (snr[1:] - snr[:-1])[:, None] * (1 + nodes) / 2
    s = np.asarray(schedule.time(jnp.asarray(inner)))
    decay = np.concatenate([[0.0], np.cumsum(0.25 * (snr[:-1] - snr[1:]) * (np.exp(-2 * c * s * (1 - s)) @ weights))])
    # Data: x_i = gain x0 + shift + std z_i, z an Ornstein-Uhlenbeck process.
    mean = np.concatenate([[MEAN], gain * MEAN + shift])
    spread = np.concatenate([[1.0], gain])
    covariance = STD**2 * np.outer(spread, spread)
    covariance[1:, 1:] += np.outer(std, std) * np.exp(-np.abs(decay[:, None] - decay[None]))
    # Model, from the top: a prior, then the bridge at the posterior mean, then the decoder.
    n = steps + 2
    maps, offsets, noises = np.zeros((n, n)), np.zeros(n), np.zeros(n)
    noises[-1] = sigma[-1] ** 2 + alpha[-1] ** 2 * 0.6**2
    for i in range(steps, 0, -1):  # x_{i-1} (row i) from x_i (row i + 1)
        weight = gain[i] * STD**2 / (gain[i] ** 2 * STD**2 + std[i] ** 2)
        constant = MEAN - weight * (gain[i] * MEAN + shift[i])  # x0_hat = constant + weight x_i
        rho = np.exp(decay[i - 1] - decay[i])
        ratio = std[i - 1] / std[i] * rho
        maps[i, i + 1] = gain[i - 1] * weight + ratio * (1 - gain[i] * weight)
        offsets[i] = shift[i - 1] + gain[i - 1] * constant - ratio * (shift[i] + gain[i] * constant)
        noises[i] = std[i - 1] ** 2 * (1 - rho**2)
    maps[0, 1], noises[0] = 1 / alpha[0], (sigma[0] / alpha[0]) ** 2
    precision = (np.eye(n) - maps).T @ np.diag(1 / noises) @ (np.eye(n) - maps)
    model_mean = np.linalg.solve(np.eye(n) - maps, offsets)
    off = mean - model_mean
    log_det = np.log(noises).sum() - np.linalg.slogdet(covariance)[1]
    kl = 0.5 * (np.trace(precision @ covariance) + off @ precision @ off - n + log_det)
    return kl + 0.5 * math.log(2 * math.pi * math.e * STD**2)


@functools.partial(jax.jit, static_argnames="t_range")
def affine_bound(parameters, t_range=(LOW, HIGH)):
    process = AFFINE.with_parameters(parameters)
    return by_quadrature(process, functools.partial(posterior_mean, process), *gaussian_law(), *normal(), t_range)


def test_the_bound_of_a_gaussian_is_theory(x64):
    """NELBO + log p under a moving affine transform is the KL of joint Gaussians, not 0; it is 0 for the identity."""
    entropy = 0.5 * math.log(2 * math.pi * math.e * STD**2)
    for values in ((0.8, -0.4, 0.5), (-0.5, 0.3, -0.4)):
        bounds = np.asarray([by_joint_gaussians(values, n) for n in (60, 120, 240, 480)])
        for order in (1, 2, 3):  # Richardson's extrapolation
            bounds = bounds[1:] + (bounds[1:] - bounds[:-1]) / (2**order - 1)
        found = float(affine_bound(jnp.asarray(values)))
        np.testing.assert_allclose(found, bounds[0], atol=1e-6)
        assert found - entropy > 1e-3
    # Whole clock and a prior of the right mean and width: nothing is lost.
    ends = (float(VPLinear().time(jnp.asarray(16.0))), 1.0 - 1e-9)
    np.testing.assert_allclose(float(affine_bound(jnp.zeros(3), ends)), entropy, atol=2e-4)


@pytest.mark.slow
def test_a_shift_saves_what_theory_says(x64):
    """F = x0 + b t leaves the integrand alone; where b t = -MEAN the prior saves alpha^2 MEAN^2 / (2 std^2)."""
    alpha, sigma = (float(f(jnp.asarray(HIGH))) for f in (VPLinear().alpha, VPLinear().sigma))
    saved = alpha**2 * MEAN**2 / (2 * (sigma**2 + 0.36 * alpha**2))
    still, centred = (float(affine_bound(jnp.asarray([0.0, b, 0.0]))) for b in (0.0, -MEAN / HIGH))
    # The decoder knows of no shift: sites at LOW are off by b LOW.
    misled = (MEAN / HIGH * LOW) ** 2 * math.exp(float(VPLinear().log_snr(jnp.asarray(LOW)))) / 2
    np.testing.assert_allclose(still - centred, saved - misled, rtol=1e-9)
    slope = jax.jit(jax.grad(affine_bound))(jnp.asarray([0.0, -MEAN / HIGH * 0.5, 0.0]))
    assert saved > 1e-5
    assert np.isfinite(np.asarray(slope)).all()


# -- an enumerable law under nonlinear transforms ------------------------------------------------------------------

WIDE = tuple(float(VPLinear().time(jnp.float32(v))) for v in (9.0, -9.5))
LEVELS, CHANCES = np.asarray([-1.0, 0.1, 0.7]), np.asarray([0.2, 0.5, 0.3])


@jax.jit
def enumerated_bound(parameters):
    """E[NELBO] with the exact posterior mean, by sums over levels and a fine grid of noise."""
    process = WARPED.with_parameters(parameters)
    grid = np.linspace(-8.5, 8.5, 181)
    density = np.exp(-0.5 * grid**2)

    def denoise(xt, t):
        laws = [process.marginal(jnp.full_like(xt, level), t) for level in LEVELS]
        joint = jnp.stack([law.log_prob(xt) for law in laws], -1) + jnp.log(CHANCES)
        return Prediction(jax.nn.softmax(joint) @ jnp.asarray(LEVELS), "x0")

    return by_quadrature(
        process, denoise, LEVELS, CHANCES, grid, density / density.sum(), WIDE, 40, ddjax.likelihood.binned(LEVELS)
    )


def test_no_transform_is_below_the_entropy(x64):
    entropy = -float(CHANCES @ np.log(CHANCES))
    still = float(enumerated_bound(parameters(size=0.0)))
    np.testing.assert_allclose(still, entropy, atol=2e-4)  # the prior at the end of the range pays the rest
    gaps = [
        float(enumerated_bound(parameters(seed, size=size))) - entropy for seed, size in ((0, 1.5), (1, 1.0), (2, 3.0))
    ]
    assert min(gaps) > 1e-3, gaps


# -- use ---------------------------------------------------------------------------------------------------------


def test_heun_follows_the_flow_of_a_gaussian(x64):
    """The deterministic sampler's map from one Gaussian to the other is affine."""
    law = [AFFINE.marginal(jnp.asarray([[v]]), jnp.asarray(0.95)) for v in (0.0, 1.0)]
    gain = float(law[1].mean[0, 0] - law[0].mean[0, 0])
    mean, std = float(law[0].mean[0, 0]) + gain * MEAN, math.hypot(gain * STD, float(law[0].std[0, 0]))
    init = jnp.asarray([[mean], [mean + std], [mean - 2 * std]])
    end = ddjax.sample(
        jax.random.key(0),
        lambda xt, t, cond=None: posterior_mean(AFFINE, xt, t),
        AFFINE,
        shape=(3, 1),
        solver=Heun(AFFINE),
        times=jnp.linspace(0.95, 0.05, 201),
        init=init,
    ).x0
    law = [AFFINE.marginal(jnp.asarray([[v]]), jnp.asarray(0.05)) for v in (0.0, 1.0)]
    gain = float(law[1].mean[0, 0] - law[0].mean[0, 0])
    mean, std = float(law[0].mean[0, 0]) + gain * MEAN, math.hypot(gain * STD, float(law[0].std[0, 0]))
    np.testing.assert_allclose(end[:, 0], [mean, mean + std, mean - 2 * std], atol=2e-4)


@pytest.mark.slow
def test_float32_is_finite_and_close(x64):
    """Values and gradients over the range and at its ends, one site; against float64."""

    @functools.partial(jax.jit, static_argnames="process")
    def slopes(values, x0, noise, process):
        def loss(values):
            learned = process.with_parameters(values)
            u = jnp.asarray([0.0, 0.3, 0.6, 1.0], x0.dtype)  # both ends of the range too
            t, scale = learned.time_at(u, learned.t_range)
            law = learned.marginal(x0, t)
            xt = law.mean + law.std * noise
            path = learned.path_kl(x0, Prediction(0.9 * x0, "x0"), xt, t)
            return (scale * path[:, 0]).sum() + learned.prior_kl(x0, t).sum()

        return jax.value_and_grad(loss)(values)

    x0, noise = jnp.full((4, 1), 0.4), jnp.full((4, 1), -1.3)
    exact = slopes(WARPED.parameters, x0, noise, WARPED)
    single = slopes(*jax.tree.map(lambda v: v.astype(jnp.float32), (WARPED.parameters, x0, noise)), WARPED)
    assert all(v.dtype == jnp.float32 for v in jax.tree.leaves(single))
    scale = max(float(jnp.abs(v).max()) for v in jax.tree.leaves(exact[1]))
    np.testing.assert_allclose(single[0], exact[0], rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * scale), single[1], exact[1])


@pytest.mark.slow
def test_processes_compare_by_value_and_nelbo_takes_them():
    again = LearnedGaussian(Residual(SiteNetwork(4, 2)), parameters(), VPLinear(), data_std=0.7)
    assert again == WARPED
    assert hash(again) == hash(WARPED)
    assert WARPED.with_parameters(parameters(1)) != WARPED
    assert WARPED.with_parameters(WARPED.parameters).parameters.keys() == parameters().keys()
    x0, plain = jnp.asarray([[0.3]]), LearnedGaussian(Residual(SiteNetwork(4)), parameters(outputs=1))
    bound = ddjax.likelihood.nelbo(jax.random.key(0), lambda xt, t, cond: Prediction(xt, "x0"), plain, x0, num_times=2)
    assert np.isfinite(np.asarray(bound.total)).all()
    keys = random.example_keys(jax.random.key(0), 1)
    assert WARPED.observe(keys, x0, jnp.asarray(0.5)).shape == x0.shape


def test_errors_say_what_to_do():
    x = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="one time per example"):
        WARPED.marginal(x, jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match="predict 'x0'"):
        WARPED.convert(Prediction(x, "encoded"), "velocity", x, jnp.asarray(0.5))
    with pytest.raises(ValueError, match="does not understand"):
        WARPED.path_kl(x, Prediction(x, "noise"), x, jnp.asarray(0.5))
    with pytest.raises(ValueError, match="must be a function"):
        LearnedGaussian(transform=3)
    with pytest.raises(ValueError, match="outputs 1 or 2"):
        SiteNetwork(4, 3)
