"""Three independent factors: equal products have equal losses; the settings in print are what print says."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddjax
from ddjax import random
from ddjax.objectives import elbo, gaussian, log_normal_sigma, min_snr, uniform_log_snr, uniform_time, unit
from ddjax.processes import Gaussian
from ddjax.schedules import EDM, CondOT, VPCosine, VPLinear

# One example of one site; the network's answer depends on the noise level and the state.
X0 = 0.7
PROCESS = Gaussian(CondOT(), data_std=0.5)


def apply(params, xt, t, cond, *, rng=None, train=False):
    return jnp.tanh(xt) + jnp.cos(3 * t)[:, None]


def expected_loss(process, kind, error, weighting, density, nodes=40):
    """E over u by Gauss-Legendre and over the noise by Gauss-Hermite, using the objective's own parts and no draws."""
    z, wz = np.polynomial.hermite_e.hermegauss(20)
    x, wx = np.polynomial.legendre.leggauss(nodes)
    u = jnp.asarray(np.repeat(0.5 * x + 0.5, 20))
    t = density(u)
    noise = jnp.asarray(np.tile(z, nodes))[:, None]
    x0 = jnp.full_like(noise, X0)
    xt = process.schedule.alpha(t)[:, None] * x0 + process.schedule.sigma(t)[:, None] * noise
    prediction = ddjax.bind(apply, {}, process, kind)(xt, t)
    target = process.convert(ddjax.Prediction(x0, "x0"), error, xt, t).value
    squared = (target - process.convert(prediction, error, xt, t).value)[:, 0] ** 2
    weights = np.outer(0.5 * wx, wz / wz.sum()).ravel()
    return float(weights @ (weighting(process.schedule.log_snr(t)) * squared))


def log_snr_range(process):
    low, high = process.t_range
    return float(process.schedule.log_snr(jnp.asarray(low))), float(process.schedule.log_snr(jnp.asarray(high)))


# (error, weighting) pairs with equal products; factors by continuous.md 1.3. D is the width of the data.
D2 = PROCESS.data_std**2
SAME = [
    ("noise", lambda snr: jnp.ones_like(snr)),
    ("x0", jnp.exp),
    ("score", lambda snr: jax.nn.sigmoid(-0.5 * snr) ** 2),  # sigma^2 under CondOT
    ("velocity", lambda snr: jax.nn.sigmoid(0.5 * snr) ** 2),  # (1 - t)^2
    ("edm", lambda snr: D2 / (jnp.exp(-snr) + D2)),
]


@pytest.mark.parametrize(("error", "weighting"), SAME[1:], ids=[name for name, _ in SAME[1:]])
def test_equal_products_have_equal_losses_across_error_spaces(x64, error, weighting):
    for kind, density in (("x0", uniform_time(PROCESS)), ("velocity", uniform_log_snr(PROCESS))):
        ours = expected_loss(PROCESS, kind, error, weighting, density)
        np.testing.assert_allclose(ours, expected_loss(PROCESS, kind, *SAME[0], density), rtol=1e-9)


def test_equal_products_have_equal_losses_across_densities(x64):
    """Uniform in t equals uniform in log-SNR weighted by (dt / d lambda) / (ratio of the lengths)."""
    (high, low), (start, end) = log_snr_range(PROCESS), PROCESS.t_range
    # -d lambda / dt = 2 / (t (1 - t)); with lambda = 2 log((1 - t) / t).
    slope = lambda snr: 2 / (jax.nn.sigmoid(0.5 * snr) * jax.nn.sigmoid(-0.5 * snr))
    weight = lambda snr: (high - low) / ((end - start) * slope(snr))
    by_time = expected_loss(PROCESS, "velocity", "velocity", unit, uniform_time(PROCESS), 400)
    by_snr = expected_loss(PROCESS, "velocity", "velocity", weight, uniform_log_snr(PROCESS), 400)
    np.testing.assert_allclose(by_snr, by_time, rtol=1e-6)


@pytest.mark.parametrize(
    "process", [PROCESS, Gaussian(VPLinear()), Gaussian(VPCosine()), Gaussian(EDM(), 0.5)], ids=repr
)
def test_the_bound_is_the_unit_weighted_noise_error(x64, process):
    """ELBO diffusion = (lambda_high - lambda_low) / 2 times the noise error under uniform_log_snr."""
    high, low = log_snr_range(process)
    expected = 0.5 * (high - low) * expected_loss(process, "x0", "noise", unit, uniform_log_snr(process))
    z, wz = np.polynomial.hermite_e.hermegauss(20)
    x, wx = np.polynomial.legendre.leggauss(40)
    t, dt = process.time_at(jnp.asarray(np.repeat(0.5 * x + 0.5, 20)), process.t_range)
    x0 = jnp.full((800, 1), X0)
    xt = (
        process.schedule.alpha(t)[:, None] * x0
        + process.schedule.sigma(t)[:, None] * jnp.asarray(np.tile(z, 40))[:, None]
    )
    prediction = ddjax.bind(apply, {}, process, "x0")(xt, t)
    path = process.path_kl(x0, prediction, xt, t)[:, 0] * dt
    np.testing.assert_allclose(np.outer(0.5 * wx, wz / wz.sum()).ravel() @ path, expected, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("error", ["x0", "noise", "velocity"])
def test_draws_have_the_expected_loss(x64, error):
    """The objective as called, against the quadrature."""
    objective = gaussian(PROCESS, "velocity", error=error, weighting=min_snr(5.0))
    exact = expected_loss(PROCESS, "velocity", error, min_snr(5.0), uniform_time(PROCESS), 200)
    run = jax.jit(lambda key: objective(key, apply, {}, jnp.full((4000, 1), X0))[0])
    draws = np.asarray(jax.lax.map(run, jax.random.split(jax.random.key(0), 20)))
    assert abs(draws.mean() - exact) < 4 * draws.std() / math.sqrt(20)


def test_edm_is_karras(x64):
    """unit weight in F-space is lambda(sigma) |D - x0|^2, lambda = (sigma^2 + d^2) / (sigma d)^2; sigma log-normal."""
    process = Gaussian(EDM(), data_std=0.5)
    density = log_normal_sigma(process)
    u = jnp.asarray([0.1, 0.5, 0.8])
    sigma = 80.0 * density(u)
    np.testing.assert_allclose(jnp.log(sigma), -1.2 + 1.2 * jax.scipy.special.ndtri(u), rtol=1e-9)
    x0, noise = jnp.full((3, 1), X0), jnp.asarray([[0.3], [-1.0], [2.0]])
    s = sigma[:, None]
    xt = x0 + s * noise
    c_skip, c_out = 0.25 / (s**2 + 0.25), s * 0.5 / jnp.sqrt(s**2 + 0.25)
    network = apply({}, xt / jnp.sqrt(s**2 + 0.25), jnp.log(sigma) / 4, None)
    karras = (s**2 + 0.25) / (s * 0.5) ** 2 * (c_skip * xt + c_out * network - x0) ** 2
    prediction = ddjax.bind(apply, {}, process, "edm")(xt, sigma / 80.0)
    target = process.convert(ddjax.Prediction(x0, "x0"), "edm", xt, sigma / 80.0).value
    np.testing.assert_allclose((target - prediction.value) ** 2, karras, rtol=1e-9)


@pytest.mark.slow
def test_edm_loss_at_initialisation():
    """A network that answers 0 pays exactly the variance of the target: 1 for data of that width."""
    process = Gaussian(EDM(), data_std=0.5)
    objective = gaussian(process, "edm", density=log_normal_sigma(process))
    zero = lambda params, xt, t, cond, **_: jnp.zeros_like(xt)
    x0 = 0.5 * jax.random.normal(jax.random.key(0), (20_000, 4))
    assert abs(float(objective(jax.random.key(1), zero, {}, x0)[0]) - 1.0) < 0.02


@pytest.mark.slow
def test_weightings_and_densities(x64):
    snr = jnp.log(jnp.asarray([0.1, 5.0, 50.0]))
    np.testing.assert_allclose(unit(snr), 1.0)
    np.testing.assert_allclose(min_snr(5.0)(snr), [1.0, 1.0, 0.1])
    u = jnp.linspace(0.0, 1.0, 101)[:-1]
    for process in (PROCESS, Gaussian(VPLinear()), Gaussian(VPCosine()), Gaussian(EDM())):
        for density in (uniform_time(process), uniform_log_snr(process), log_normal_sigma(process)):
            t = np.asarray(jax.jit(density)(u))
            assert ((t >= 0) & (t <= 1)).all()
            assert len(np.unique(t)) > 50
            assert np.isfinite(np.asarray(process.schedule.log_snr(jnp.asarray(t)))).all()
        np.testing.assert_allclose(np.diff(uniform_time(process)(u)), np.diff(uniform_time(process)(u))[0], rtol=1e-6)
        steps = np.diff(np.asarray(process.schedule.log_snr(uniform_log_snr(process)(u)))[1:])
        np.testing.assert_allclose(steps, steps[0], rtol=1e-3)


@pytest.mark.parametrize(
    ("schedule", "kind"),
    [
        (VPLinear(), "noise"),
        (VPLinear(), "velocity"),
        (VPCosine(), "v"),
        (VPCosine(), "x0"),
        (EDM(), "edm"),
        (CondOT(), "velocity"),
        (CondOT(), "score"),
    ],
    ids=repr,
)
def test_default_losses_and_gradients_are_finite(schedule, kind):
    process = Gaussian(schedule, 0.5)
    linear = lambda params, xt, t, cond, **_: params * xt
    for make in (gaussian, elbo, functools.partial(gaussian, density=uniform_log_snr(process))):
        loss = jax.jit(lambda p, o=make(process, kind): o(jax.random.key(0), linear, p, jnp.full((64, 2), 0.3))[0])
        value, gradient = jax.value_and_grad(loss)(jnp.asarray(0.5))
        assert np.isfinite(value)
        assert np.isfinite(gradient)


def test_errors():
    with pytest.raises(ValueError, match="posterior"):
        gaussian(PROCESS, "x0", error="posterior")


def test_times_may_be_spread_in_three_ways():
    """An error that is linear in t: of stratified times the mean hardly varies, of antithetic ones not at all."""
    x0 = jnp.full((16, 1), X0)
    network = lambda params, xt, t, cond, **_: X0 + jnp.sqrt(t)[:, None]
    losses = {}
    for spread in (random.independent, random.stratified, random.antithetic):
        objective = gaussian(PROCESS, "x0", density=lambda u: u, uniforms=spread)
        draw = jax.jit(lambda key, o=objective: o(key, network, {}, x0)[0])
        losses[spread.__name__] = np.asarray(jax.vmap(draw)(jax.random.split(jax.random.key(0), 300)))
    # The variance of a uniform is 1 / 12; of 16 strata that share their place within a part, (1 / 16)^2 / 12.
    np.testing.assert_allclose(losses["independent"].std(), (1 / 12 / 16) ** 0.5, rtol=0.2)
    np.testing.assert_allclose(losses["stratified"].std(), 1 / 16 / 12**0.5, rtol=0.2)
    np.testing.assert_allclose(losses["antithetic"], 0.5, atol=1e-6)
    for values in losses.values():
        assert abs(values.mean() - 0.5) < 4 * (values.std() / 300**0.5 + 1e-7)
