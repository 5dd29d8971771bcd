"""Diffusion mixtures against the Ornstein-Uhlenbeck process itself: its covariances, Doob's transform, quadrature."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian_law import GaussianLaw, affine, expected_bound
from scipy import integrate, stats

import ddjax
from ddjax.likelihood import nelbo
from ddjax.predictions import GAUSSIAN_KINDS, Prediction, bind
from ddjax.processes import BridgeMixture, Gaussian
from ddjax.schedules import OUBridge, VPCosine
from ddjax.solvers import Ancestral, Heun
from ddjax.symmetric import on_pairs, pack, unpack

PULL, AT_DATA, AT_NOISE = 0.9, 0.6, 1.3
SCHEDULE = OUBridge(PULL, AT_DATA, AT_NOISE)
PROCESS = BridgeMixture(SCHEDULE, 0.8)
both = pytest.mark.parametrize("schedule", [SCHEDULE, OUBridge(0.0, 1.0, 0.7)], ids=["OU", "Brownian"])


def volatility2(schedule, u):
    """At the paper's clock u = 1 - t."""
    return (1 - u) * schedule.at_noise**2 + u * schedule.at_data**2


def covariance(schedule, times):
    """Of (x at the paper's times u) for the OU process started at 0, and its means from 1: by quadrature."""
    between = lambda a, b: integrate.quad(lambda u: volatility2(schedule, u), a, b)[0]
    decay = lambda a, b: np.exp(-schedule.pull * between(a, b))

    def variance(u):
        return integrate.quad(lambda r: volatility2(schedule, r) * decay(r, u) ** 2, 0, u, epsabs=1e-12)[0]

    c = np.array([[variance(min(a, b)) * decay(min(a, b), max(a, b)) for b in times] for a in times])
    return c, np.array([decay(0.0, u) for u in times])


def given_the_end(schedule, times):
    """Means (times, [x_1, x_0]) and covariance of the bridge at these u, by conditioning on the state at u = 1."""
    c, mean = covariance(schedule, [*times, 1.0])
    gain = c[:-1, -1] / c[-1, -1]
    return np.stack([mean[:-1] - gain * mean[-1], gain], -1), c[:-1, :-1] - np.outer(gain, c[-1, :-1])


def moments(t, dims=1):
    """A and V of q(x_t | x_0), with x_1 standard normal."""
    weights, c = given_the_end(SCHEDULE, [1.0 - t])
    return weights[0, 1] * np.eye(dims), (c[0, 0] + weights[0, 0] ** 2) * np.eye(dims)


@both
def test_marginal_and_bridge_are_conditioned_normals(x64, schedule):
    process = BridgeMixture(schedule)
    for s, t in ((0.2, 0.7), (0.05, 0.96)):
        weights, c = given_the_end(schedule, [1.0 - t, 1.0 - s])
        alpha, sigma = (np.asarray(f(jnp.asarray([t, s]))) for f in (schedule.alpha, schedule.sigma))
        np.testing.assert_allclose(alpha, weights[:, 1], rtol=1e-9)
        np.testing.assert_allclose(sigma**2, np.diag(c) + weights[:, 0] ** 2, rtol=1e-9)
        # The law of x_s given x_t, x_0 and x_1, by conditioning once more: x_1 must not matter.
        gain = c[1, 0] / c[0, 0]
        for x1 in (0.0, 1.7):
            mean = weights[1] @ [x1, 0.4] + gain * (-0.3 - weights[0] @ [x1, 0.4])
            law = process.bridge(*(jnp.asarray([[v]]) for v in (0.4, -0.3)), jnp.asarray([s]), jnp.asarray([t]))
            np.testing.assert_allclose(law.mean[0, 0], mean, rtol=1e-8)
            np.testing.assert_allclose(law.std[0, 0] ** 2, c[1, 1] - gain * c[0, 1], rtol=1e-8)


@both
def test_drift_is_doobs_transform_of_the_mixture(x64, schedule):
    """E over the end x_0 given x_t of OU drift + vol^2 grad log p(x_0 | x_t), three atoms."""
    process, atoms, masses = BridgeMixture(schedule), np.array([-1.0, 0.2, 1.5]), np.array([0.3, 0.5, 0.2])
    x = np.array([-1.1, 0.0, 0.8, 2.0])
    for t in (0.15, 0.9):
        (weights, c), left = given_the_end(schedule, [1.0 - t]), volatility2(schedule, 1.0 - t)
        width = np.sqrt(c[0, 0] + weights[0, 0] ** 2)
        posterior = masses * stats.norm.pdf(x[:, None], weights[0, 1] * atoms, width)
        posterior /= posterior.sum(-1, keepdims=True)
        between = integrate.quad(lambda u: volatility2(schedule, u), 1 - t, 1)[0]
        decay = np.exp(-schedule.pull * between)
        variance = integrate.quad(
            lambda r: (
                volatility2(schedule, r)
                * np.exp(-2 * schedule.pull * integrate.quad(lambda u: volatility2(schedule, u), r, 1)[0])
            ),
            1 - t,
            1,
        )[0]
        slope = decay * (atoms - decay * x[:, None]) / variance  # of log N(x_0; decay x, variance) in x
        truth = (posterior * (-schedule.pull * left * x[:, None] + left * slope)).sum(-1)
        said = Prediction(jnp.asarray(posterior @ atoms)[:, None], "x0")
        for kind in ("x0", "noise", "velocity"):
            xt, time = jnp.asarray(x)[:, None], jnp.full(4, t)
            ours = process.drift(process.convert(said, kind, xt, time), xt, time)[:, 0]
            np.testing.assert_allclose(ours, truth, rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(process.schedule.squared_volatility(jnp.asarray(t)), left, rtol=1e-12)


def test_the_sde_has_the_marginals(x64):
    """Mean and variance of dx = drift du + vol dW for one end, from N(0, 1), by an ODE solver."""
    x0 = 0.7

    @jax.jit
    def of_state(x, u):
        said = Prediction(jnp.full((1, 1), x0), "x0")
        return PROCESS.drift(said, jnp.reshape(x, (1, 1)), jnp.reshape(1.0 - u, (1,)))[0, 0]

    def slope(u, state):
        mean, variance = state
        offset = float(of_state(0.0, u))
        rate = float(of_state(1.0, u)) - offset
        return [rate * mean + offset, 2 * rate * variance + volatility2(SCHEDULE, u)]

    end = integrate.solve_ivp(slope, (0, 0.85), [0.0, 1.0], rtol=1e-9, atol=1e-10).y[:, -1]
    law = PROCESS.marginal(jnp.full((1, 1), x0), jnp.asarray([0.15]))
    np.testing.assert_allclose(end, [law.mean[0, 0], law.std[0, 0] ** 2], rtol=1e-6)


@both
def test_schedule_is_consistent(x64, schedule):
    t = jnp.asarray([0.001, 0.03, 0.4, 0.95, 0.999])
    each = lambda f: jax.vmap(jax.grad(f))(t)
    np.testing.assert_allclose(schedule.alpha_prime(t), each(schedule.alpha), rtol=1e-9)
    np.testing.assert_allclose(schedule.sigma_prime(t), each(schedule.sigma), rtol=1e-9)
    np.testing.assert_allclose(schedule.log_snr(t), 2 * np.log(schedule.alpha(t) / schedule.sigma(t)), rtol=1e-9)
    np.testing.assert_allclose(schedule.log_snr_prime(t), each(schedule.log_snr), rtol=1e-9)
    np.testing.assert_allclose(schedule.time(schedule.log_snr(t)), t, rtol=1e-9)
    assert float(schedule.alpha(jnp.asarray(1.0))) == 0.0
    np.testing.assert_allclose(schedule.sigma(jnp.asarray([0.0, 1.0])), [0.0, 1.0], atol=1e-12)


def test_steps_and_paths_cost_their_kl(x64):
    rng = np.random.default_rng(0)
    x0, xt, guess = (jnp.asarray(v) for v in rng.normal(size=(3, 4, 2)))
    s, t = jnp.full(4, 0.3), jnp.full(4, 0.7)
    said = Prediction(guess, "x0")
    q, p = PROCESS.bridge(x0, xt, s, t), PROCESS.reverse(said, xt, s, t)
    np.testing.assert_allclose(q.std, p.std, rtol=1e-12)
    kl = 0.5 * ((q.mean - p.mean) / q.std) ** 2
    np.testing.assert_allclose(PROCESS.step_kl(x0, said, xt, s, t), kl, rtol=1e-9)
    drifts = [PROCESS.drift(Prediction(v, "x0"), xt, t) for v in (x0, guess)]
    girsanov = 0.5 * (drifts[0] - drifts[1]) ** 2 / volatility2(SCHEDULE, 0.3)
    np.testing.assert_allclose(PROCESS.path_kl(x0, said, xt, t), girsanov, rtol=1e-9)
    assert (girsanov > Gaussian(SCHEDULE).path_kl(x0, said, xt, t)).all()
    h = 1e-5
    short = PROCESS.step_kl(x0, said, xt, t - h, t) / h
    np.testing.assert_allclose(short, PROCESS.path_kl(x0, said, xt, t), rtol=1e-4)


@pytest.mark.slow
def test_the_bound_is_valid_and_loose_by_what_is_not_markov(x64):
    """On Gaussian data: that of `Gaussian` is tight; this one adds the integral of the excess weight times Var."""
    law, low = GaussianLaw(np.zeros(1), np.array([[0.64]])), 0.02
    noisy = lambda d, z: d.mean + d.std * z
    loose, tight = (
        expected_bound(process, law, moments, noisy, 1, (low, 0.995)) for process in (PROCESS, Gaussian(SCHEDULE, 0.8))
    )
    a, v = moments(0.995)
    np.testing.assert_allclose(tight, law.bound(moments, low, 0.995, v + 0.64 * a @ a), atol=1e-8)
    np.testing.assert_allclose(loose[[0, 2]], tight[[0, 2]], atol=1e-12)

    def variance(t):
        a, v = moments(t)
        return 1.0 / (1.0 / 0.64 + a[0, 0] ** 2 / v[0, 0])

    def weight(t):  # (a / v)^2 vol^2 of the paper's objective
        left = integrate.quad(lambda u: volatility2(SCHEDULE, u), 1 - t, 1)[0]
        decay = np.exp(-PULL * left)
        return volatility2(SCHEDULE, 1 - t) * (decay * 2 * PULL / (1 - decay**2)) ** 2

    nodes, w = np.polynomial.legendre.leggauss(60)
    t = np.exp(0.5 * (np.log(0.995) - np.log(low)) * (nodes + 1) + np.log(low))
    w = w * 0.5 * (np.log(0.995) - np.log(low)) * t
    truth = 0.5 * sum(wi * weight(ti) * variance(ti) for wi, ti in zip(w, t, strict=True))
    np.testing.assert_allclose(loose[1], truth, rtol=1e-8)
    assert loose[1] - tight[1] > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("solver", [Heun, Ancestral], ids=lambda s: s.__name__)
def test_samplers_reach_the_law(x64, solver):
    law, errors = GaussianLaw(np.array([0.4]), np.array([[0.3]])), []
    for steps in (20, 40):
        times = np.linspace(1.0, 0.05, steps + 1)
        say, make = law.denoise(moments, times), solver(PROCESS)

        @jax.jit
        def step(x, t, s, say=say, make=make):
            if solver is Ancestral:
                return PROCESS.reverse(say(x, jnp.full(len(x), t)), x, s, t).mean
            return make.step(None, (), x, t, s, say)[0]

        mean, c = 0.0, 1.0
        for t, s in itertools.pairwise(times):
            matrix, offset = affine(functools.partial(step, t=jnp.asarray(t), s=jnp.asarray(s)), 1)
            fresh = PROCESS.bridge(*(jnp.zeros((1, 1)),) * 2, jnp.asarray([s]), jnp.asarray([t])).std[0, 0] ** 2
            mean = matrix[0, 0] * mean + offset[0]
            c = matrix[0, 0] ** 2 * c + (fresh if solver is Ancestral else 0.0)
        a, v = moments(0.05)
        errors.append(abs(mean - a[0, 0] * 0.4) + abs(c - a[0, 0] ** 2 * 0.3 - v[0, 0]))
    order = np.log2(errors[0] / errors[1])
    assert abs(order - (2 if solver is Heun else 1)) < 0.35, errors


@pytest.mark.slow
def test_undirected_graphs():
    """A network over matrices, asymmetric as it may be, generates symmetric ones without self-loops."""
    graph = jnp.asarray([[0, 1, 1, 0], [1, 0, 0, 1], [1, 0, 0, 0], [0, 1, 0, 0]], jnp.float32)
    tilt = jnp.arange(16.0).reshape(4, 4)

    def network(params, x, t, cond=None, **_):
        return 0.0 * x + graph + params * (tilt - tilt.T) + jnp.eye(4)

    process = BridgeMixture()
    denoise = bind(on_pairs(network), jnp.ones(()), process, "x0")
    out = ddjax.sample(
        jax.random.key(0), denoise, process, shape=(3, 6), solver=Ancestral(process), times=jnp.linspace(1.0, 0.0, 5)
    )
    np.testing.assert_allclose(unpack(out.x0), np.tile(graph, (3, 1, 1)), atol=1e-6)
    np.testing.assert_array_equal(pack(unpack(out.x0)), out.x0)


def test_both_ends_are_finite_in_float32():
    process, x0, xt = BridgeMixture(), jnp.asarray([[0.0, 1.0]]), jnp.asarray([[0.3, -1.2]])

    def loss(value, t):
        return sum(process.convert(Prediction(value, "x0"), end, xt, t).value.sum() for end in GAUSSIAN_KINDS)

    slope = jax.jit(jax.value_and_grad(loss))
    for t in (0.0, 1.0):
        value, gradient = slope(x0, jnp.asarray([t]))
        assert np.isfinite(float(value))
        assert np.isfinite(np.asarray(gradient)).all()
    bound = nelbo(jax.random.key(0), lambda xt, t, cond: Prediction(xt, "x0"), process, x0, num_times=2)
    assert np.isfinite(np.asarray(bound.total)).all()
    schedule = process.schedule
    assert np.isfinite(np.asarray(schedule.time(jnp.float32([-1e3, -30.0, 13.0, 30.0, 1e3])))).all()


def test_errors():
    with pytest.raises(ValueError, match=r"needs schedules\.OUBridge"):
        BridgeMixture(VPCosine())
    for bad in ({"pull": -1.0}, {"at_data": 0.0}, {"at_noise": -1.0}):
        with pytest.raises(ValueError, match="needs pull >= 0"):
            OUBridge(**bad)
    with pytest.raises(ValueError, match="no linear noising SDE"):
        PROCESS.sde(jnp.zeros(1))
