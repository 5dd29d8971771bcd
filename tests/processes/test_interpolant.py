"""Interpolants between coupled Gaussian mixtures: velocities and scores by differentiation, steps by algebra."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddjax
from ddjax import grids, random
from ddjax.fixtures import CoupledMixture, GaussianMixture
from ddjax.paths import Noise, Residual, Straight, Trigonometric
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian, Interpolant
from ddjax.processes.interpolant import (
    STATEMENTS,
    Diffusion,
    accumulating,
    both,
    deterministic,
    knowing_x1,
    markov,
)
from ddjax.schedules import CondOT
from ddjax.solvers import DDIM, Ancestral, Heun

BRIDGE, BUMP, RAMP = Noise(0.7), Noise(1.3, 1.0, 1.0), Noise(0.5, 1.0, 0.0)
PATHS = [Straight(BRIDGE), Straight(BUMP), Trigonometric(BRIDGE), Residual(RAMP), Straight(RAMP), Straight()]
every_path = pytest.mark.parametrize("path", PATHS, ids=repr)


def joint(dims, components=3, seed=0):
    return CoupledMixture(GaussianMixture(2 * dims, components, seed, scale=0.5))


def state(batch=5, dims=2, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, dims)))


def log_density(law, path, x, t):
    """log p_t(x) of one state, from the law of alpha x0 + beta x1 + gamma z."""
    log_w, means, covariances = law.joint.parameters()
    d = law.dims
    a, b, g = path.alpha(t), path.beta(t), path.gamma(t)
    mean = a * means[:, :d] + b * means[:, d:]
    c00, c01, c11 = covariances[:, :d, :d], covariances[:, :d, d:], covariances[:, d:, d:]
    c = a**2 * c00 + a * b * (c01 + c01.transpose(0, 2, 1)) + b**2 * c11 + g**2 * jnp.eye(d)
    return jax.nn.logsumexp(log_w + jax.vmap(functools.partial(jax.scipy.stats.multivariate_normal.logpdf, x))(mean, c))


@pytest.mark.slow
@every_path
@pytest.mark.parametrize("dims", [1, 2])
def test_the_continuity_equation_and_the_score(x64, path, dims):
    """d/dt log p + div b + b . grad log p = 0, with derivatives of the density alone, also of time."""
    process, law = Interpolant(path), joint(dims)
    density = functools.partial(log_density, law, path)
    denoise = law.denoise(process, "velocity")

    @jax.jit
    @jax.vmap
    def terms(x, t):
        def velocity(x):
            return denoise(x[None], t[None]).value[0]

        score = jax.grad(density)(x, t)
        return jax.grad(density, 1)(x, t), jnp.trace(jax.jacfwd(velocity)(x)), velocity(x) @ score, score

    t, x = jnp.asarray([0.07, 0.31, 0.5, 0.83, 0.96]), state(dims=dims)
    slope, divergence, along, score = terms(x, t)
    np.testing.assert_allclose(slope + divergence + along, 0.0, atol=1e-9)
    if path.noise is not None:
        np.testing.assert_allclose(law.denoise(process, "score")(x, t).value, score, rtol=1e-9, atol=1e-9)


@every_path
def test_the_parts_of_a_state(x64, path):
    """Marginal and bridge given both ends: moments of alpha x0 + beta x1 + gamma (rho z + sqrt(1 - rho^2) z')."""
    process = Interpolant(path)
    x0, x1, xt = state(seed=0), state(seed=1), state(seed=2)
    s, t = jnp.asarray([0.1, 0.3, 0.5, 0.9, 0.0]), jnp.asarray([0.2, 0.9, 0.6, 0.97, 0.4])
    (a, b, g), (a_s, b_s, g_s) = (
        [np.asarray(f(v))[:, None] for f in (path.alpha, path.beta, path.gamma)] for v in (t, s)
    )
    law = process.marginal(x0, t, x1)
    np.testing.assert_allclose(law.mean, a * x0 + b * x1, rtol=1e-12)
    np.testing.assert_allclose(law.std, np.broadcast_to(g, xt.shape), rtol=1e-12)
    if path.noise is None:
        step = process.bridge(x0, xt, s, t, x1)
        np.testing.assert_allclose(step.mean, a_s * x0 + b_s * x1, rtol=1e-12)
        np.testing.assert_array_equal(step.std, 0.0)
        return
    # Given x1, x_t - beta x1 is a Gaussian diffusion from x0: x_t = (a / a_s) x_s + fresh noise.
    gain = a / a_s * g_s**2 / g**2
    step = process.bridge(x0, xt, s, t, x1)
    np.testing.assert_allclose(step.mean, a_s * x0 + b_s * x1 + gain * (xt - a * x0 - b * x1), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(step.std**2, np.broadcast_to(g_s**2 - gain**2 * g**2, xt.shape), rtol=1e-9, atol=1e-15)
    ode = dataclasses.replace(process, correlation=deterministic).bridge(x0, xt, s, t, x1)
    np.testing.assert_allclose(ode.mean, a_s * x0 + b_s * x1 + g_s / g * (xt - a * x0 - b * x1), rtol=1e-10)
    np.testing.assert_array_equal(ode.std, 0.0)
    if path.noise.end == 0:  # given both ends, gamma z is a random walk
        walk = dataclasses.replace(process, correlation=accumulating).bridge(x0, xt, s, t, x1)
        np.testing.assert_allclose(walk.mean, a_s * x0 + b_s * x1 + (g_s / g) ** 2 * (xt - a * x0 - b * x1), rtol=1e-10)
        np.testing.assert_allclose(walk.std**2, np.broadcast_to(g_s**2 * (1 - (g_s / g) ** 2), xt.shape), rtol=1e-9)


def test_i2sb_is_the_brownian_bridge(x64):
    """Pinned at x0 and seen at x_t, a Brownian motion of volatility a: mean x0 + s/t (x_t - x0), variance
    a^2 s (t - s) / t, whatever x1 is."""
    process = Interpolant(Straight(Noise(0.7)))
    x0, x1, xt = state(seed=0), state(seed=1), state(seed=2)
    for s, t in ((0.2, 0.7), (0.0, 0.5), (0.4, 0.999)):
        law = process.bridge(x0, xt, jnp.asarray(s), jnp.asarray(t), x1)
        np.testing.assert_allclose(law.mean, x0 + s / t * (xt - x0), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(law.std**2, 0.49 * s * (t - s) / t, rtol=1e-10)
    # From the end itself, where x_t = x1: the bridge between the two ends.
    law = process.bridge(x0, x1, jnp.asarray(0.3), jnp.asarray(1.0), x1)
    np.testing.assert_allclose(law.mean, 0.7 * x0 + 0.3 * x1, rtol=1e-12)
    np.testing.assert_allclose(law.std**2, 0.49 * 0.3 * 0.7, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS[:5], ids=repr)
def test_every_statement_follows_from_every_pair_that_determines_it(x64, path):
    process, parts = Interpolant(path), tuple(state(seed=i) for i in range(3))
    t = jnp.asarray([0.03, 0.3, 0.51, 0.9, 0.98])
    a, b, g, da, db, dg = (
        np.asarray(f(t))[:, None]
        for f in (
            path.alpha,
            path.beta,
            path.gamma,
            *(jax.vmap(jax.grad(f)) for f in (path.alpha, path.beta, path.gamma)),
        )
    )
    x0, x1, z = parts
    xt = a * x0 + b * x1 + g * z
    true = {
        "x0": x0, "x1": x1, "noise": z, "score": -z / g, "velocity": da * x0 + db * x1 + dg * z, "residual": x1 - x0,
    }  # fmt: skip
    assert set(true) == set(STATEMENTS)
    rows = {"x0": (1, 0, 0), "x1": (0, 1, 0), "noise": (0, 0, 1), "residual": (-1, 1, 0), "score": (0, 0, 1)}
    for pair in [
        "noise+x0",
        *(kind for kind in process.kinds if "+" in kind and kind.split("+") == sorted(kind.split("+"))),
    ]:
        names = pair.split("+")
        prediction = Prediction(jnp.stack([true[n] for n in names], -1), pair)
        dets = [
            np.linalg.det([(p.item(), q.item(), r.item()), *(
                (u.item(), v.item(), w.item()) if n == "velocity" else rows[n] for n in names)])
            for p, q, r, u, v, w in zip(a, b, g, da, db, dg, strict=True)
        ]  # fmt: skip
        if max(map(abs, dets)) < 1e-12:
            with pytest.raises(ValueError, match="does not tell"):
                process.convert(prediction, "score", xt, t)
            continue
        ok = np.abs(dets) > 1e-3
        for end, value in jax.jit(lambda p, q: {e: process.convert(q, e, p, t).value for e in STATEMENTS})(
            xt, prediction
        ).items():
            np.testing.assert_allclose(value[ok], true[end][ok], rtol=1e-9, atol=1e-9, err_msg=f"{pair} -> {end}")
    both_ways = process.convert(
        process.convert(Prediction(jnp.stack([x0, x1], -1), "x0+x1"), "noise+x0", xt, t), "x0+x1", xt, t
    )
    np.testing.assert_allclose(both_ways.value, jnp.stack([x0, x1], -1), rtol=1e-9)


def affine(step, dims):
    """The matrix, offset and standard deviations of a step that is affine in the state."""
    probe = jnp.concatenate([jnp.zeros((1, dims)), jnp.eye(dims)])
    law = step(probe)
    offset = law.mean[0]
    return (law.mean[1:] - offset).T, offset, law.std[0]


def constant(t):
    return 0.8 * jnp.ones_like(t)


def vanishing(t):
    return 2.0 * t * (1.0 - t)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "correlation", "dims"),
    [
        (Straight(BRIDGE), Diffusion(constant), 4),
        (Residual(RAMP), markov, 2),
        (Trigonometric(BUMP), Diffusion(vanishing), 2),
        (Straight(BRIDGE), deterministic, 4),
        (Straight(BRIDGE), markov, 1),
        (Trigonometric(BUMP), markov, 3),
        (Residual(RAMP), accumulating, 4),
    ],
)
def test_any_diffusion_transports_gaussians_at_first_order(x64, path, correlation, dims):
    """Steps with the exact denoiser are affine, so means and covariances propagate exactly: from x1 to x0."""
    process, law = Interpolant(path, correlation), joint(dims, components=1)
    _, means, covariances = law.joint.parameters()
    denoise = law.denoise(process, "x0+x1")

    @jax.jit
    def transported(times):
        def step(moments, pair):
            t, s = pair
            matrix, offset, std = affine(lambda x: process.reverse(denoise(x, t), x, s, t), dims)
            mean, cov = moments
            return (matrix @ mean + offset, matrix @ cov @ matrix.T + jnp.diag(std**2)), None

        start = means[0, dims:], covariances[0, dims:, dims:] + path.gamma(times[0]) ** 2 * jnp.eye(dims)
        return jax.lax.scan(step, start, (times[:-1], times[1:]))[0]

    errors = []
    for n in (100, 200, 400):
        # Fine near both ends, where gamma = sqrt(t (1 - t)) would cost a logarithm of the step.
        mean, cov = transported(jnp.sin(0.5 * np.pi * jnp.linspace(1.0, 0.0, n + 1)) ** 2)
        errors.append(max(np.abs(mean - means[0, :dims]).max(), np.abs(cov - covariances[0, :dims, :dims]).max()))
    slopes = np.log2(np.array(errors[:-1]) / errors[1:])
    assert errors[-1] < 0.04
    assert (slopes > 0.75).all(), (errors, slopes)
    assert (slopes < 1.1).all(), (errors, slopes)


@pytest.mark.slow
def test_heun_transports_at_second_order(x64):
    """The ODE on a mixture against a fine solution, from x1 itself to x0 itself."""
    process, law = Interpolant(Straight(BUMP)), joint(2)
    init = law.sample(random.example_keys(jax.random.key(3), 8))[1]

    def solve(n):
        times = grids.uniform(n)
        run = ddjax.sample(
            jax.random.key(0), law.denoise(process, "velocity+noise"), process,
            shape=(8, 2), solver=Heun(process), times=times, init=init,
        )  # fmt: skip
        return np.asarray(run.x0)

    fine = solve(1280)
    errors = [np.sqrt(np.mean((solve(n) - fine) ** 2)) for n in (40, 80, 160)]
    np.testing.assert_allclose(np.log2(np.array(errors[:-1]) / errors[1:]), 2.0, atol=0.35)


@pytest.mark.slow
def test_two_networks_sample_a_mixture():
    """A velocity and a score, each by its own, under any diffusion: moments of x0 from draws of x1."""
    process, law, n = Interpolant(Straight(BUMP), Diffusion(vanishing)), joint(2), 4000
    denoise = both(law.denoise(process, "velocity"), law.denoise(process, "score"))
    assert ddjax.predictions.evaluations(denoise) == 2
    x0, x1 = (np.asarray(v) for v in law.sample(random.example_keys(jax.random.key(0), n)))
    times = jnp.sin(0.5 * np.pi * jnp.linspace(1.0, 0.0, 121)) ** 2
    drawn = ddjax.sample(
        jax.random.key(2), denoise, process, shape=(n, 2), solver=Ancestral(process), times=times, init=jnp.asarray(x1)
    )
    assert (np.asarray(drawn.nfe) == 240).all()
    x = np.asarray(drawn.x0)
    np.testing.assert_array_less(np.abs(x.mean(0) - x0.mean(0)), 6 * x0.std(0) / np.sqrt(n))
    np.testing.assert_allclose(np.cov(x.T), np.cov(x0.T), atol=0.1)


def test_a_bridge_from_a_known_end(x64):
    """I2SB with a network that sees x1, and states x0: the exact law of x0 given x1."""
    process, n = Interpolant(Straight(BRIDGE)), 8000
    _, means, covariances = (np.asarray(v) for v in joint(1, components=1).joint.parameters())
    x1 = 0.4
    gain = covariances[0, 0, 1] / covariances[0, 1, 1]
    mean, variance = means[0, 0] + gain * (x1 - means[0, 1]), covariances[0, 0, 0] - gain * covariances[0, 0, 1]

    def posterior(xt, t, cond):
        a, b, g = (f(t)[:, None] for f in (process.schedule.alpha, process.schedule.beta, process.schedule.gamma))
        seen = xt - b * cond["x1"]
        return Prediction((mean * g**2 + a * variance * seen) / (g**2 + a**2 * variance + 1e-300), "x0")

    init = jnp.full((n, 1), x1)
    drawn = ddjax.sample(
        jax.random.key(0), knowing_x1(posterior), process, shape=(n, 1), solver=Ancestral(process),
        times=jnp.sin(0.5 * np.pi * jnp.linspace(1.0, 0.0, 81)) ** 2, init=init, cond={"x1": init},
    )  # fmt: skip
    x = np.asarray(drawn.x0)
    assert abs(x.mean() - mean) < 5 * np.sqrt(variance / n)
    assert abs(x.var() / variance - 1) < 5 * np.sqrt(2 / n) + 0.03


@pytest.mark.slow
def test_a_gaussian_end_without_noise_is_cond_ot(x64):
    """The same marginal, prior, conversions and steps as `Gaussian(CondOT())`, x1 being its noise."""
    process, gaussian = Interpolant(Straight(), source_std=1.0), Gaussian(CondOT())
    x0, xt, t, s = (
        state(seed=0),
        state(seed=1),
        jnp.asarray([0.2, 0.4, 0.5, 0.9, 1.0]),
        jnp.asarray([0.0, 0.3, 0.4, 0.5, 0.7]),
    )
    for a, b in ((process.marginal(x0, t), gaussian.marginal(x0, t)), (process.prior((5, 2)), gaussian.prior((5, 2)))):
        np.testing.assert_allclose(a.mean, b.mean, atol=1e-15)
        np.testing.assert_allclose(a.std, b.std, rtol=1e-15)
    theirs = {"x0": "x0", "x1": "noise", "velocity": "velocity"}
    value = state(seed=2)
    for start, end in itertools.product(theirs, theirs):
        ours = process.convert(Prediction(value, start), end, xt, t).value
        expected = gaussian.convert(Prediction(value, theirs[start]), theirs[end], xt, t).value
        np.testing.assert_allclose(ours, expected, rtol=1e-12, atol=1e-12, err_msg=f"{start} {end}")
    law = GaussianMixture(2, 3)
    denoise, keys = law.denoise(gaussian, "velocity"), random.example_keys(jax.random.key(0), 5)
    for solver, other in ((Ancestral, DDIM), (Heun, Heun)):
        ours = solver(process).step(keys, (), xt, t, s, denoise)[0]
        np.testing.assert_allclose(ours, other(gaussian).step(keys, (), xt, t, s, denoise)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@every_path
def test_the_ends_are_finite_in_float32(path):
    process = Interpolant(path)
    parts = tuple(state(seed=i).astype(jnp.float32) for i in range(3))
    for end in (0.0, 1.0):
        t = jnp.full(5, end)
        xt = process.marginal(parts[0], t, parts[1]).mean
        pairs = ("x0+x1", "velocity+noise", "noise+x0", "x1+velocity", "residual+score")
        for start in pairs if path.noise is not None else ("x0", "x1", "velocity"):
            value = jnp.stack(parts[:2], -1) if "+" in start else parts[0]  # anything finite may be predicted
            try:
                got = process.parts(Prediction(value, start), xt, t)
            except ValueError:
                continue
            assert all(np.isfinite(p).all() for p in got), (start, end)
            if start == "x0+x1":
                np.testing.assert_array_equal(got[0], parts[0])
                np.testing.assert_array_equal(got[1], parts[1])
    for s, t in ((0.0, 0.5), (0.5, 1.0), (0.0, 1.0)):
        for correlation in (markov, deterministic, Diffusion(vanishing)):
            some = dataclasses.replace(process, correlation=correlation)
            law = some.bridge(parts[0], parts[2], jnp.full(5, s), jnp.full(5, t), parts[1])
            assert np.isfinite(law.mean).all()
            assert np.isfinite(law.std).all()
            if s == 0:
                np.testing.assert_allclose(law.mean, parts[0], rtol=1e-6)
                np.testing.assert_array_equal(law.std, 0.0)


def test_a_doubled_last_axis_is_a_pair():
    process, x = Interpolant(Straight(BRIDGE)), jnp.zeros((2, 4, 4, 3))
    out = jnp.arange(2.0 * 4 * 4 * 6).reshape(2, 4, 4, 6)
    value = process.network_outputs(out, x, jnp.zeros(2), "velocity+noise")
    np.testing.assert_array_equal(value[..., 0], out[..., :3])
    np.testing.assert_array_equal(value[..., 1], out[..., 3:])


def test_errors():
    noisy, x, t = Interpolant(Straight(BRIDGE)), state(), jnp.full(5, 0.5)
    for message, call in (
        ("scale > 0", lambda: Noise(-1.0)),
        ("needs a path", lambda: Interpolant(CondOT())),
        ("source_std", lambda: Interpolant(source_std=0.0)),
        ("comes with the data", lambda: noisy.prior((5, 2))),
        ("comes with the data", lambda: noisy.marginal(x, t)),
        ("does not grow", lambda: Interpolant(Straight(BRIDGE), accumulating).bridge(x, x, t, t, x)),
        ("does not understand", lambda: noisy.convert(Prediction(x, "v"), "x0", x, t)),
        ("does not understand", lambda: Interpolant().convert(Prediction(x, "x0"), "score", x, t)),
        ("alone does not determine", lambda: noisy.convert(Prediction(x, "velocity"), "x0", x, t)),
        ("must have shape", lambda: noisy.convert(Prediction(x, "x0+x1"), "noise", x, t)),
        ("even number", lambda: CoupledMixture(GaussianMixture(3))),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert Interpolant(Straight(BRIDGE)) == noisy != Interpolant(Straight(BUMP))
    assert hash(noisy) == hash(Interpolant(Straight(BRIDGE)))
