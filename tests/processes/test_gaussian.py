"""Gaussian corruption against linear algebra on the joint Gaussian, and every parameterisation against every other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax import random
from ddjax.predictions import GAUSSIAN_KINDS, Prediction
from ddjax.processes import Gaussian
from ddjax.schedules import EDM, VE, CondOT, Linear, VPCosine, VPLinear

SCHEDULES = [VPLinear(), VPCosine(), VPCosine(0.0), VE(), EDM(), CondOT()]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)


def state(batch=5, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, 2, 3)))


@every_schedule
def test_bridge_is_conditioning_of_the_joint_gaussian(x64, schedule):
    """x_s = a_s x0 + sd_s n1, x_t = (a_t / a_s) x_s + fresh noise: condition x_s on x_t by its covariance matrix."""
    process, x0, xt = Gaussian(schedule), state(seed=0), state(seed=1)
    for s, t in ((0.2, 0.7), (0.5, 0.51), (0.9, 0.99)):
        a_s, a_t, v_s, v_t = (
            float(f(jnp.asarray(w))) ** n for f, n in ((schedule.alpha, 1), (schedule.sigma, 2)) for w in (s, t)
        )
        step = a_t / a_s
        covariance = np.array([[v_s, step * v_s], [step * v_s, v_t]])  # of (x_s, x_t) given x0
        gain = covariance[0, 1] / covariance[1, 1]
        mean = a_s * x0 + gain * (xt - a_t * x0)
        variance = covariance[0, 0] - gain * covariance[0, 1]
        bridge = process.bridge(x0, xt, jnp.full(5, s), jnp.full(5, t))
        np.testing.assert_allclose(bridge.mean, mean, atol=1e-10, rtol=1e-10)
        np.testing.assert_allclose(bridge.std**2, np.full(x0.shape, variance), rtol=1e-9)


@every_schedule
def test_marginal_moments_and_density(schedule):
    process, x0 = Gaussian(schedule), jnp.full((40_000, 1), 0.7)
    marginal = process.marginal(x0, jnp.full(40_000, 0.4))
    alpha, sigma = (float(f(jnp.asarray(0.4))) for f in (schedule.alpha, schedule.sigma))
    x = np.asarray(marginal.sample(random.example_keys(jax.random.key(0), 40_000)))
    assert abs(x.mean() - 0.7 * alpha) < 4 * sigma / 200
    assert abs(x.std() / sigma - 1) < 4 / np.sqrt(2 * 40_000)
    grid = jnp.linspace(-8, 8, 40_000)[:, None] * sigma + 0.7 * alpha
    mass = np.exp(np.asarray(marginal.log_prob(grid))).sum() * 16 * sigma / 40_000
    np.testing.assert_allclose(mass, 1.0, atol=1e-3)


@functools.partial(jax.jit, static_argnums=0)
def convert_to_all(process, prediction, xt, t):
    return {end: process.convert(prediction, end, xt, t) for end in GAUSSIAN_KINDS}


@pytest.mark.slow
@every_schedule
def test_all_conversions_agree_with_the_definitions(x64, schedule):
    """From (x0, noise) by the definitions of continuous.md 1.2, into each kind and back: 36 pairs."""
    data_std = 0.3
    process, x0, noise = Gaussian(schedule, data_std), state(seed=0), state(seed=1)
    t = jnp.asarray([0.02, 0.3, 0.6, 0.9, 0.999])
    wide = t[:, None, None]
    alpha, sigma = schedule.alpha(wide), schedule.sigma(wide)
    d_alpha, d_sigma = (jax.vmap(jax.grad(f))(t)[:, None, None] for f in (schedule.alpha, schedule.sigma))
    s = sigma / alpha
    c_skip, c_out = data_std**2 / (s**2 + data_std**2), s * data_std / jnp.sqrt(s**2 + data_std**2)
    xt = alpha * x0 + sigma * noise
    true = {
        "x0": x0,
        "noise": noise,
        "score": -noise / sigma,
        "velocity": d_alpha * x0 + d_sigma * noise,
        "v": alpha * noise - sigma * x0,
        "edm": (x0 - c_skip * xt / alpha) / c_out,
    }
    assert set(true) == set(GAUSSIAN_KINDS)
    for start in GAUSSIAN_KINDS:
        for end, converted in convert_to_all(process, Prediction(true[start], start), xt, t).items():
            assert converted.kind == end
            np.testing.assert_allclose(converted.value, true[end], rtol=1e-9, atol=1e-9 * np.abs(true[end]).max())


def test_edm_preconditioning_is_karras_table_1(x64):
    process, x0 = Gaussian(EDM(), data_std=0.5), state()
    sigma = jnp.asarray([0.002, 0.1, 1.0, 10.0, 80.0])
    t, s = sigma / 80.0, sigma[:, None, None]
    xt, out = x0 * s, state(seed=2)
    x_in, c_noise = process.network_inputs(xt, t, "edm")
    np.testing.assert_allclose(x_in, xt / jnp.sqrt(s**2 + 0.25), rtol=1e-12)
    np.testing.assert_allclose(c_noise, jnp.log(sigma) / 4, rtol=1e-12)
    denoised = process.convert(Prediction(out, "edm"), "x0", xt, t).value
    expected = 0.25 / (s**2 + 0.25) * xt + s * 0.5 / jnp.sqrt(s**2 + 0.25) * out
    np.testing.assert_allclose(denoised, expected, rtol=1e-12)
    # Unit-variance input and target for data of that width.
    np.testing.assert_allclose(process.network_inputs(xt, t, "x0")[0], xt)


def test_edm_target_has_unit_variance():
    process, n = Gaussian(VPCosine(), data_std=0.5), 20_000
    x0 = 0.5 * random.normal(random.example_keys(jax.random.key(0), n), (1,))
    for t in (0.1, 0.5, 0.95):
        times = jnp.full(n, t)
        xt = process.marginal(x0, times).sample(random.example_keys(jax.random.key(1), n))
        target = process.convert(Prediction(x0, "x0"), "edm", xt, times).value
        for value in (target, process.network_inputs(xt, times, "edm")[0]):
            assert abs(float(value.std()) - 1.0) < 0.03


@every_schedule
@pytest.mark.parametrize("t", [0.0, 1.0])
@pytest.mark.parametrize("start", GAUSSIAN_KINDS)
def test_the_ends_are_finite_in_float32(schedule, t, start):
    process = Gaussian(schedule, 0.5)
    x0, noise = state().astype(jnp.float32), state(seed=1).astype(jnp.float32)
    times = jnp.full(5, t)
    xt = process.marginal(x0, times).mean + process.marginal(x0, times).std * noise
    converted = convert_to_all(process, Prediction(x0, start), xt, times)
    for end in GAUSSIAN_KINDS:
        value = np.asarray(converted[end].value)
        if isinstance(schedule, VPLinear) and t == 0 and end == "velocity" and start in ("noise", "v", "edm"):
            assert not np.isnan(value).any()  # sigma' is infinite: so is the velocity of a known noise
        else:
            assert np.isfinite(value).all(), (start, end)
    sigma, alpha = float(schedule.sigma(times[0])), float(schedule.alpha(times[0]))
    if sigma == 0 and start != "x0":
        np.testing.assert_allclose(converted["x0"].value, xt, rtol=1e-6)
    if alpha == 0 and start == "x0":
        np.testing.assert_allclose(converted["noise"].value, xt, rtol=1e-6)
    if alpha == 0 and start == "velocity":  # u = alpha' x0 + sigma' x_t is then a statement about x0
        u = process.convert(Prediction(x0, "x0"), "velocity", xt, times)
        np.testing.assert_allclose(process.convert(u, "x0", xt, times).value, x0, rtol=1e-4, atol=1e-5)


@every_schedule
def test_steps_from_and_to_the_ends_are_finite(schedule):
    process, xt, x0 = Gaussian(schedule), state().astype(jnp.float32), state(seed=1).astype(jnp.float32)
    one, zero, half = jnp.ones(5), jnp.zeros(5), jnp.full(5, 0.5)
    for s, t in ((half, one), (zero, half), (zero, one)):
        bridge = process.bridge(x0, xt, s, t)
        assert np.isfinite(np.asarray(bridge.mean)).all()
        assert np.isfinite(np.asarray(bridge.std)).all()
    if float(schedule.sigma(jnp.asarray(0.0))) == 0:
        np.testing.assert_allclose(process.bridge(x0, xt, zero, half).mean, x0, rtol=1e-6)
        np.testing.assert_allclose(process.bridge(x0, xt, zero, half).std, 0.0)


@every_schedule
def test_sde_has_the_marginals(x64, schedule):
    """dm/dt = f m and dV/dt = 2 f V + g^2 for m = alpha x0, V = sigma^2."""
    for t in (0.05, 0.4, 0.95):
        f, g2 = Gaussian(schedule).sde(jnp.asarray(t))
        alpha, variance = schedule.alpha(t), schedule.sigma(t) ** 2
        np.testing.assert_allclose(f * alpha, jax.grad(schedule.alpha)(t), rtol=1e-9, atol=1e-12)
        slope = jax.grad(lambda t: schedule.sigma(t) ** 2)(t)
        np.testing.assert_allclose(2 * f * variance + g2, slope, rtol=1e-9)
        np.testing.assert_allclose(g2, -variance * schedule.log_snr_prime(t), rtol=1e-9)


@every_schedule
def test_prior_kl_is_the_closed_form(x64, schedule):
    process, x0 = Gaussian(schedule, 0.4), jnp.asarray([[0.3, -1.2]])
    for t in (0.5, 1.0):
        alpha, sigma = (float(f(jnp.asarray(t))) for f in (schedule.alpha, schedule.sigma))
        std = float(process.prior((1, 2), t).std[0, 0])
        np.testing.assert_allclose(std**2, sigma**2 + (0.4 * alpha) ** 2, rtol=1e-12)
        z, w = np.polynomial.hermite_e.hermegauss(40)
        x = alpha * np.asarray(x0)[..., None] + sigma * z
        log_ratio = -0.5 * z**2 - np.log(sigma) + 0.5 * (x / std) ** 2 + np.log(std)
        expected = (log_ratio * w).sum(-1) / w.sum()
        np.testing.assert_allclose(process.prior_kl(x0, jnp.asarray([t])), expected, rtol=1e-9, atol=1e-12)


@every_schedule
def test_path_kl_is_the_limit_of_the_step_kl(x64, schedule):
    """(1 / dt) KL(bridge at x0 || bridge at the prediction): equal variances, so a squared difference of means."""
    process, x0, guess, xt = Gaussian(schedule), state(seed=0), state(seed=1), state(seed=2)
    t = jnp.full(5, 0.4)

    def rate(dt):
        true = process.bridge(x0, xt, t - dt, t)
        model = process.reverse(Prediction(guess, "x0"), xt, t - dt, t)
        return 0.5 * ((true.mean - model.mean) / true.std) ** 2 / dt

    limit = 2 * rate(5e-6) - rate(1e-5)
    np.testing.assert_allclose(process.path_kl(x0, Prediction(guess, "x0"), xt, t), limit, rtol=1e-5)


@every_schedule
def test_times_integrate_over_log_snr(x64, schedule):
    process, t_range = Gaussian(schedule), (0.2, 0.9)
    nodes, weights = np.polynomial.legendre.leggauss(80)
    t, dt = process.time_at(jnp.asarray(0.5 * nodes + 0.5), t_range)
    np.testing.assert_allclose(0.5 * weights @ (np.exp(t) * dt), np.exp(0.9) - np.exp(0.2), rtol=1e-6)
    low, high = process.t_range
    assert 0 <= low < high <= 1


def test_t_range_can_be_asked_for_while_tracing():
    assert jax.jit(lambda x: x + Gaussian(CondOT()).t_range[1])(0.0) < 1


def test_errors():
    with pytest.raises(ValueError, match="Gaussian schedule"):
        Gaussian(Linear())
    with pytest.raises(ValueError, match="data_std"):
        Gaussian(data_std=0.0)
    process = Gaussian()
    for start, end in (("posterior", "x0"), ("x0", "posterior"), ("epsilon", "x0")):
        with pytest.raises(ValueError, match="does not understand"):
            process.convert(Prediction(state(), start), end, state(), jnp.full(5, 0.5))
    assert Gaussian(VE(), 0.5) == Gaussian(VE(), 0.5) != Gaussian(VE(), 0.6)
