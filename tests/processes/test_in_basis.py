"""One schedule for each frequency, against matrices and against the theory of Gaussian data."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian_law import GaussianLaw, affine, expected_bound

import ddjax
from ddjax import random
from ddjax.likelihood import binned, nelbo
from ddjax.predictions import GAUSSIAN_KINDS, Prediction
from ddjax.processes import DCT, Gaussian, InBasis, Masked, Orthogonal
from ddjax.schedules import EDM, VE, Heat, ShortestPath, VPCosine, VPLinear, squared_frequencies
from ddjax.solvers import Ancestral, Heun

SITES = 4
POWER = np.array([7.0, 1.0, 0.2, 0.03])
HEAT = Heat(squared_frequencies((SITES,), (1,)), blur=1.5)
SCHEDULES = [ShortestPath(POWER), HEAT]
both = pytest.mark.parametrize("schedule", SCHEDULES, ids=["ShortestPath", "Heat"])


def cosines(n):
    """The orthonormal cosines of type 2, a column each, from their definition."""
    k, i = np.arange(n), np.arange(n)[:, None] + 0.5
    return np.cos(np.pi * k * i / n) * np.sqrt(np.where(k == 0, 1.0, 2.0) / n)


U = cosines(SITES)


def moments(schedule, t):
    """A and V of x_t = A x_0 + N(0, V)."""
    alpha, sigma = (np.broadcast_to(f(jnp.asarray(t)), (SITES,)) for f in (schedule.alpha, schedule.sigma))
    return U @ np.diag(alpha) @ U.T, U @ np.diag(sigma**2) @ U.T


def covariance(std):
    """Of a state of shape (sites,) whose coordinates have these deviations, whatever the example."""
    return U @ np.diag(np.asarray(std)[0] ** 2) @ U.T


def states(seed, batch=3):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, SITES)))


@pytest.mark.slow
def test_bases_are_what_they_say(x64):
    x, (rows, columns) = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4, 2))), (cosines(3), cosines(4))
    y = DCT((1, 2)).forward(x)
    np.testing.assert_allclose(y, np.einsum("ik,jl,bijc->bklc", rows, columns, x), atol=1e-12)
    np.testing.assert_allclose(DCT((1, 2)).inverse(y), x, atol=1e-12)
    basis, x = Orthogonal(U), states(0)
    np.testing.assert_allclose(basis.forward(x), DCT((1,)).forward(x), atol=1e-12)
    np.testing.assert_allclose(basis.inverse(basis.forward(x)), x, atol=1e-12)
    np.testing.assert_allclose(squared_frequencies((3, 4, 2), (1, 2))[2, 3], (np.pi * 2 / 3) ** 2 + (np.pi * 0.75) ** 2)


@both
def test_marginal_bridge_and_reverse_are_matrices(x64, schedule):
    process, (x0, xt, guess) = InBasis(Gaussian(schedule), DCT((1,))), (np.asarray(states(i)) for i in range(3))

    @jax.jit
    def ours(s, t):
        at = jnp.full(3, s), jnp.full(3, t)
        marginal, bridge = process.marginal(x0, at[1]), process.bridge(x0, xt, *at)
        known, guessed = (process.reverse(Prediction(x, "x0"), xt, s, t) for x in (x0, guess))
        laws = [(law.mean, law.law.std) for law in (marginal, bridge, known, guessed)]
        return laws, marginal.log_prob(xt), process.step_kl(x0, Prediction(guess, "x0"), xt, *at)

    for s, t in ((0.2, 0.7), (0.55, 0.56)):
        (a_s, v_s), (a_t, v_t) = moments(schedule, s), moments(schedule, t)
        (marginal, *laws, (guessed, _)), log_prob, step_kl = ours(jnp.asarray(s), jnp.asarray(t))
        np.testing.assert_allclose(marginal[0], x0 @ a_t.T, atol=1e-12)
        np.testing.assert_allclose(covariance(marginal[1]), v_t, atol=1e-12)
        density = -0.5 * np.einsum("bi,ij,bj->b", xt - x0 @ a_t.T, np.linalg.inv(v_t), xt - x0 @ a_t.T)
        density -= 0.5 * np.linalg.slogdet(2 * np.pi * v_t)[1]
        np.testing.assert_allclose(log_prob.sum(-1), density, rtol=1e-10)
        step = a_t @ np.linalg.inv(a_s)
        gain = np.linalg.solve(v_t, step @ v_s).T
        mean, rest = x0 @ a_s.T + (xt - x0 @ a_t.T) @ gain.T, v_s - gain @ step @ v_s
        for found, std in laws:
            np.testing.assert_allclose(found, mean, atol=1e-10)
            np.testing.assert_allclose(covariance(std), rest, atol=1e-10)
        # A step of the chain costs the KL of two normals of equal covariance.
        off = (mean - guessed) @ U
        kl = 0.5 * (off**2 / np.diag(U.T @ rest @ U)).sum(-1)
        np.testing.assert_allclose(step_kl.sum(-1), kl, rtol=1e-8)


def test_prior_draws_and_times_are_those_of_the_coordinates(x64):
    """With the same keys: what the basis makes of the same normals."""
    process, t = InBasis(Gaussian(SCHEDULES[0], data_std=0.7), DCT((1,))), jnp.asarray(0.6)
    keys, x0 = lambda: random.example_keys(jax.random.key(0), 3), states(0)
    z = np.asarray(random.normal(keys(), (SITES,), jnp.float64))
    a, v = moments(SCHEDULES[0], 0.6)
    prior = process.prior((3, SITES), 0.6)
    np.testing.assert_allclose(covariance(prior.law.std), v + 0.49 * a @ a.T, atol=1e-12)
    np.testing.assert_allclose(
        prior.sample(keys()), z * np.sqrt(np.diag(U.T @ (v + 0.49 * a @ a.T) @ U)) @ U.T, atol=1e-12
    )
    shown = x0 @ a.T + z * np.sqrt(np.diag(U.T @ v @ U)) @ U.T
    np.testing.assert_allclose(process.observe(keys(), x0, jnp.full(3, t)), shown, atol=1e-12)
    np.testing.assert_allclose(process.time_at(jnp.asarray([0.0, 1.0]), (0.2, 0.8))[0], [0.2, 0.8], atol=1e-12)


@pytest.mark.slow
def test_draws_have_the_covariance():
    process, batch = InBasis(Gaussian(SCHEDULES[0]), DCT((1,))), 20_000
    law = process.marginal(jnp.ones((batch, SITES)), jnp.full(batch, 0.6))
    x = np.asarray(law.sample(random.example_keys(jax.random.key(0), batch)))
    np.testing.assert_allclose(np.cov(x.T), moments(SCHEDULES[0], 0.6)[1], atol=0.02)
    prior = process.prior((batch, SITES)).sample(random.example_keys(jax.random.key(1), batch))
    np.testing.assert_allclose(np.cov(np.asarray(prior).T), np.eye(SITES), atol=0.04)


@pytest.mark.slow
@both
def test_nelbo_is_the_theory_on_gaussian_data(x64, schedule):
    """Full covariance, not diagonal in the basis; a shifted denoiser pays for the shift in units of information."""
    law, process = GaussianLaw.random(SITES), InBasis(Gaussian(schedule, data_std=0.8), DCT((1,)))
    at, (low, high) = functools.partial(moments, schedule), (0.08, 0.97)
    (a, v), noisy = at(high), lambda d, z: d.basis.inverse(d.law.mean + d.law.std * z)
    exact = law.bound(at, low, high, v + 0.64 * a @ a.T)
    ours = expected_bound(process, law, at, noisy, SITES, (low, high))
    np.testing.assert_allclose(ours, exact, atol=1e-8)
    assert law.entropy < exact.sum()
    shift = np.array([0.3, -0.1, 0.2, 0.4])
    shifted = expected_bound(process, law, at, noisy, SITES, (low, high), shift=shift)
    information = [a.T @ np.linalg.solve(v, a) for a, v in (at(low), at(high))]
    gap = 0.5 * shift @ (information[0] - information[1]) @ shift
    np.testing.assert_allclose(shifted[1] - ours[1], gap, rtol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [VPCosine(), VE()], ids=repr)
def test_equal_schedules_are_the_process_itself(x64, schedule):
    plain = Gaussian(schedule, 0.7)
    turned, x0, xt, guess = InBasis(plain, DCT((1,))), states(0), states(1), Prediction(states(2), "noise")
    s, t = jnp.full(3, 0.3), jnp.full(3, 0.6)
    for name, arguments in {
        "path_kl": (x0, guess, xt, t),
        "step_kl": (x0, guess, xt, s, t),
        "reconstruction": (x0, guess, xt, t),
        "prior_kl": (x0, t),
    }.items():
        ours, theirs = (getattr(p, name)(*arguments).sum(-1) for p in (turned, plain))
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)
    for law, other in ((turned.bridge(x0, xt, s, t), plain.bridge(x0, xt, s, t)),):
        np.testing.assert_allclose(law.mean, other.mean, atol=1e-10)
        np.testing.assert_allclose(law.log_prob(x0).sum(-1), other.log_prob(x0).sum(-1), rtol=1e-9)
    np.testing.assert_allclose(
        turned.network_inputs(xt, t, "edm")[0], plain.network_inputs(xt, t, "edm")[0], atol=1e-12
    )
    assert turned.t_range == plain.t_range


@pytest.mark.slow
@both
def test_conversions_are_their_definitions(x64, schedule):
    process, x0, noise = InBasis(Gaussian(schedule, 0.6), DCT((1,))), states(0), states(1)
    t = jnp.full(3, 0.45)
    y0, e = x0 @ U, noise @ U
    alpha, sigma = schedule.alpha(t[:1]), schedule.sigma(t[:1])
    slopes = (jax.jacfwd(f)(jnp.asarray(0.45)) for f in (schedule.alpha, schedule.sigma))
    d_alpha, d_sigma = (np.broadcast_to(v, (SITES,)) for v in slopes)
    norm = np.sqrt(sigma**2 + 0.36 * alpha**2)
    true = {
        "x0": y0,
        "noise": e,
        "score": -e / sigma,
        "velocity": d_alpha * y0 + d_sigma * e,
        "v": alpha * e - sigma * y0,
        "edm": (sigma * y0 / 0.6 - 0.6 * alpha * e) / norm,
    }
    xt = (alpha * y0 + sigma * e) @ U.T
    for start in GAUSSIAN_KINDS:
        for end in GAUSSIAN_KINDS:
            value = process.convert(Prediction(jnp.asarray(true[start] @ U.T), start), end, xt, t).value
            np.testing.assert_allclose(value, true[end] @ U.T, atol=1e-9)
    np.testing.assert_allclose(process.network_inputs(xt, t, "edm")[0], (xt @ U / norm) @ U.T, atol=1e-10)


@pytest.mark.slow
@both
def test_schedules_are_consistent(x64, schedule):
    for t in (0.03, 0.4, 0.95):
        t = jnp.asarray(t)
        for f, slope in ((schedule.alpha, schedule.alpha_prime), (schedule.sigma, schedule.sigma_prime)):
            np.testing.assert_allclose(slope(t), jax.jacfwd(f)(t), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(schedule.log_snr(t), 2 * np.log(schedule.alpha(t) / schedule.sigma(t)), rtol=1e-9)
        np.testing.assert_allclose(schedule.log_snr_prime(t), jax.jacfwd(schedule.log_snr)(t), rtol=1e-9)
        assert (np.asarray(schedule.log_snr_prime(t)) < 0).all()
        for f in (schedule.alpha, schedule.sigma, schedule.alpha_prime, schedule.sigma_prime, schedule.log_snr):
            assert f(t).shape == (SITES,)


def test_heat_is_a_gaussian_blur(x64):
    """A kernel of standard deviation b leaves exp(-(frequency b)^2 / 2) of a wave; b grows to `blur` like sin^2."""
    heat = Heat(squared_frequencies((SITES,), (1,)), VPCosine(), blur=1.5, floor=0.2)
    assert heat.common == VPCosine()
    for t in (0.0, 0.3, 1.0):
        b, x = 1.5 * np.sin(0.5 * np.pi * t) ** 2, np.linspace(-40.0, 40.0, 8001)
        kernel = np.exp(-0.5 * (x / b) ** 2) / (b * np.sqrt(2 * np.pi)) if b else np.where(x == 0, 100.0, 0.0)
        left = [np.trapezoid(kernel * np.cos(np.pi * k / SITES * x), x) for k in range(SITES)]
        ours = heat.alpha(jnp.asarray(t)), heat.sigma(jnp.asarray(t))
        plain = np.asarray(VPCosine().alpha(jnp.asarray(t)))
        np.testing.assert_allclose(ours[0], plain * (0.2 + 0.8 * np.array(left)), rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(ours[1], np.full(SITES, VPCosine().sigma(jnp.asarray(t))), rtol=1e-12)


@pytest.mark.slow
def test_the_shortest_path_is_the_geodesic_of_variances(x64):
    """S^(1-g) at every g: constant speed |log S| in the Fisher metric, and as short as any path between its ends."""
    schedule, t = ShortestPath(POWER), jnp.linspace(0.0, 1.0, 2001)[:, None]
    g = np.sin(0.5 * np.pi * np.asarray(t)) ** 2
    alpha, sigma = np.asarray(schedule.alpha(t)), np.asarray(schedule.sigma(t))
    np.testing.assert_allclose(alpha**2 * POWER + sigma**2, POWER ** (1 - g), rtol=1e-12)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, rtol=1e-12)
    np.testing.assert_allclose(
        schedule.time(schedule.log_snr(t[1:-1])), np.broadcast_to(t[1:-1], (1999, SITES)), atol=1e-9
    )

    def length(schedule):
        """Of the curve of log variances, whose Euclidean length over sqrt(2) is Fisher's."""
        path = np.log(np.asarray(schedule.alpha(t)) ** 2 * POWER + np.asarray(schedule.sigma(t)) ** 2)
        return np.sqrt((np.diff(path, axis=0) ** 2).sum(-1)).sum()

    np.testing.assert_allclose(length(schedule), np.linalg.norm(np.log(POWER)), rtol=1e-9)
    assert length(VPCosine(0.0)) > 1.05 * length(schedule)
    assert float(schedule.alpha(jnp.asarray(1.0)).max()) == 0.0
    for name in ("alpha", "sigma"):  # coordinates of variance 1
        np.testing.assert_allclose(
            getattr(schedule.common, name)(t), getattr(ShortestPath([1.0]), name)(t), rtol=1e-12, atol=1e-15
        )
    # Near 1 it is its own limit.
    near, at = (ShortestPath([p]).alpha(t) for p in (1.0 + 1e-9, 1.0))
    np.testing.assert_allclose(near, at, atol=1e-8)


@pytest.mark.slow
@both
def test_both_ends_are_finite_in_float32(schedule):
    process = InBasis(Gaussian(schedule), DCT((1,)))
    x0, xt = states(0).astype(jnp.float32), states(1).astype(jnp.float32)

    def loss(value, t):
        return sum(process.convert(Prediction(value, "x0"), end, xt, t).value.sum() for end in GAUSSIAN_KINDS)

    for t in (0.0, 1.0):
        value, gradient = jax.jit(jax.value_and_grad(loss))(x0, jnp.full(3, t))
        assert np.isfinite(float(value))
        assert np.isfinite(np.asarray(gradient)).all()
    if schedule is SCHEDULES[0]:  # rounding must not lead out of the sine's range
        many = ShortestPath(np.geomspace(1e-4, 1e4, 4001))
        ends = jax.jit(many.time)(jnp.asarray([[60.0], [-60.0]], jnp.float32))
        np.testing.assert_allclose(ends, np.broadcast_to([[0.0], [1.0]], ends.shape), atol=0.02)
    bound = nelbo(jax.random.key(0), lambda xt, t, cond: Prediction(xt, "x0"), process, x0)
    assert np.isfinite(np.asarray(bound.total)).all()


@pytest.mark.slow
@both
@pytest.mark.parametrize("solver", [Heun, Ancestral], ids=lambda s: s.__name__)
def test_samplers_reach_the_law(x64, schedule, solver):
    """Steps are affine for Gaussian data, so that the law of what they make is known exactly."""
    law, process = GaussianLaw.random(SITES), InBasis(Gaussian(schedule), DCT((1,)))
    at, errors = functools.partial(moments, schedule), []
    for steps in (20, 40):
        times = np.linspace(0.95, 0.05, steps + 1)
        denoise, make = law.denoise(at, times), solver(process)

        @jax.jit
        def step(x, t, s, denoise=denoise, make=make):
            if solver is Ancestral:
                return process.reverse(denoise(x, jnp.full(len(x), t)), x, s, t).mean
            keys = random.example_keys(jax.random.key(0), len(x))
            return make.step(keys, (), x, t, s, denoise)[0]

        def noisy_law(t):
            a, v = at(t)
            return a @ law.mean, a @ law.covariance @ a.T + v

        mean, c = noisy_law(times[0])
        for t, s in itertools.pairwise(times):
            matrix, offset = affine(lambda x, t=t, s=s: step(x, jnp.asarray(t), jnp.asarray(s)), SITES)
            reverse = process.reverse(Prediction(states(0), "x0"), states(0), jnp.asarray(s), jnp.asarray(t))
            fresh = covariance(reverse.law.std)
            mean, c = matrix @ mean + offset, matrix @ c @ matrix.T + (fresh if solver is Ancestral else 0.0)
        errors.append(np.abs(c - noisy_law(times[-1])[1]).max() + np.abs(mean - noisy_law(times[-1])[0]).max())
    order = np.log2(errors[0] / errors[1])
    assert errors[1] < (0.02 if solver is Heun else 0.2)
    assert abs(order - (2 if solver is Heun else 1)) < 0.35, errors


@pytest.mark.slow
def test_sample_runs_and_ends_at_the_data():
    process, point = InBasis(Gaussian(SCHEDULES[0]), DCT((1,))), jnp.asarray([1.0, -2.0, 0.5, 3.0])
    denoise = lambda xt, t, cond: Prediction(jnp.broadcast_to(point, xt.shape), "x0")
    for solver in (Heun(process), Ancestral(process)):
        out = ddjax.sample(
            jax.random.key(0), denoise, process, shape=(2, 4), solver=solver, times=jnp.linspace(1.0, 0.0, 9)
        )
        np.testing.assert_allclose(out.x0, np.tile(point, (2, 1)), atol=1e-5)


@pytest.mark.slow
def test_errors():
    with pytest.raises(ValueError, match="Gaussian process"):
        InBasis(Masked(3), DCT((1,)))
    for axes in ((), (0, 1), (1, 1)):
        with pytest.raises(ValueError, match="different axes"):
            DCT(axes)
    for matrix, what in ((np.ones((2, 3)), "square"), (2 * np.eye(2), "orthogonal matrix")):
        with pytest.raises(ValueError, match=what):
            Orthogonal(matrix)
    for bad in (lambda: ShortestPath([1.0, 0.0]), lambda: Heat([-1.0]), lambda: Heat([1.0], floor=0.0)):
        with pytest.raises(ValueError):
            bad()
    with pytest.raises(NotImplementedError, match="common"):
        HEAT.time(jnp.zeros(()))
    process, x0 = InBasis(Gaussian(EDM()), DCT((1,))), states(0)
    denoise = lambda xt, t, cond: Prediction(xt, "x0")
    for options in ({"known": x0 > 0}, {"reconstruction": binned([0.0, 1.0])}):
        with pytest.raises(ValueError, match="InBasis mixes sites"):
            nelbo(jax.random.key(0), denoise, process, x0, **options)
    objective = ddjax.objectives.elbo(process, "x0")
    with pytest.raises(ValueError, match="InBasis mixes sites"):
        objective(jax.random.key(0), lambda p, x, t, c, **_: x, {}, x0, weights=jnp.ones_like(x0))
    assert InBasis(Gaussian(VPLinear()), DCT((1,))) == InBasis(Gaussian(VPLinear()), DCT([1]))
