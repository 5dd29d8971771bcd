"""Learned variances: the paper's two ends, exact reverse steps where there are any, and KLs by their definition."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ddjax import Prediction
from ddjax.processes import Gaussian, LearnedVariance
from ddjax.schedules import EDM, CondOT, VPCosine, VPLinear

# NumPy: float64 under x64.
XT, X0, V = np.asarray([[0.3, -1.2]]), np.asarray([[0.5, 0.1]]), np.asarray([[0.4, -0.7]])
S, T = np.asarray([0.3]), np.asarray([0.7])


def two_heads(x0, v):
    return Prediction(jnp.concatenate([x0, v], axis=-1), "x0")


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [VPCosine(), VPLinear()], ids=repr)
def test_v_interpolates_the_papers_log_variances(x64, schedule):
    """beta_t = 1 - alpha_t^2 / alpha_s^2 and beta_t sigma_s^2 / sigma_t^2 (Nichol & Dhariwal 2021, eq. 9, 15)."""
    process = LearnedVariance(schedule)
    beta = 1 - float(schedule.alpha(T)[0]) ** 2 / float(schedule.alpha(S)[0]) ** 2
    posterior = beta * float(schedule.sigma(S)[0]) ** 2 / float(schedule.sigma(T)[0]) ** 2
    f = (np.asarray(V) + 1) / 2
    reverse = process.reverse(two_heads(X0, V), XT, S, T)
    np.testing.assert_allclose(2 * jnp.log(reverse.std), f * math.log(beta) + (1 - f) * math.log(posterior), rtol=1e-9)
    plain = Gaussian(schedule).reverse(Prediction(X0, "x0"), XT, S, T)
    np.testing.assert_allclose(reverse.mean, plain.mean, rtol=1e-12)
    for prediction in (Prediction(X0, "x0"), two_heads(X0, -jnp.ones_like(V))):
        np.testing.assert_allclose(process.reverse(prediction, XT, S, T).std, plain.std, rtol=1e-12)
    widest = LearnedVariance(schedule, unsaid=1.0)  # Ho et al. 2020, section 3.2: the other of their two choices
    np.testing.assert_allclose(widest.reverse(Prediction(X0, "x0"), XT, S, T).std, math.sqrt(beta), rtol=1e-9)
    np.testing.assert_allclose(widest.reverse(two_heads(X0, V), XT, S, T).std, reverse.std, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [VPCosine(), CondOT(), EDM(10.0)], ids=repr)
def test_the_upper_variance_is_exact_for_a_gaussian_of_the_datas_width(x64, schedule):
    """Data N(0, d^2), exact denoiser, v = 1: p(x_s | x_t) by conditioning the joint normal, and the whole chain."""
    process, d = LearnedVariance(schedule, data_std=0.6), 0.6
    (a_s, b_s), (a_t, b_t) = ([float(c(t)[0]) for c in (schedule.alpha, schedule.sigma)] for t in (S, T))
    var_s, var_t, both = a_s**2 * d**2 + b_s**2, a_t**2 * d**2 + b_t**2, a_t / a_s * (a_s**2 * d**2 + b_s**2)
    x0 = a_t * d**2 / var_t * XT
    reverse = process.reverse(two_heads(x0, jnp.ones_like(XT)), XT, S, T)
    np.testing.assert_allclose(reverse.mean, both / var_t * XT, rtol=1e-9)
    np.testing.assert_allclose(reverse.std, math.sqrt(var_s - both**2 / var_t), rtol=1e-9)
    # E sum of the steps' KLs = information about x0 lost, whatever the grid; DDPM's variance costs more.
    grid = np.asarray([0.9, 0.6, 0.35, 0.1])
    for v, loss in ((1.0, None), (-1.0, 0.02)):
        total = 0.0
        for t, s in itertools.pairwise(grid):
            total += _expected_kl(process, d, v, s, t)
        snr = np.exp(np.asarray(schedule.log_snr(jnp.asarray([0.1, 0.9]))))
        lost = 0.5 * math.log((1 + snr[0] * d**2) / (1 + snr[1] * d**2))
        if loss is None:
            np.testing.assert_allclose(total, lost, rtol=1e-9)
        else:
            assert total > lost + loss


def _expected_kl(process, d, v, s, t):
    """By Gauss-Hermite: the KL is quadratic in x0 and x_t."""
    z, w = np.polynomial.hermite_e.hermegauss(6)
    x0, noise = (jnp.asarray(g.ravel())[:, None] for g in np.meshgrid(d * z, z, indexing="ij"))
    weights = np.outer(w, w).ravel() / w.sum() ** 2
    s, t = (jnp.full((len(weights),), time) for time in (s, t))
    alpha, sigma = process.schedule.alpha(t)[:, None], process.schedule.sigma(t)[:, None]
    xt = alpha * x0 + sigma * noise
    guess = alpha * d**2 / (alpha**2 * d**2 + sigma**2) * xt
    return float(weights @ process.step_kl(x0, two_heads(guess, jnp.full_like(guess, v)), xt, s, t)[:, 0])


def test_step_kl_is_the_kl_of_its_two_normals(x64):
    """By numerical integration of q log(q / p) at each site."""
    process, guess = LearnedVariance(VPLinear(), 0.7), two_heads(X0 + 0.3, V)
    q, p = process.bridge(X0, XT, S, T), process.reverse(guess, XT, S, T)
    kl = np.asarray(process.step_kl(X0, guess, XT, S, T))[0]
    for i in range(2):
        ours, theirs = (scipy.stats.norm(float(n.mean[0, i]), float(n.std[0, i])) for n in (q, p))
        x = np.linspace(ours.mean() - 12 * ours.std(), ours.mean() + 12 * ours.std(), 20001)
        integral = np.trapezoid(ours.pdf(x) * (ours.logpdf(x) - theirs.logpdf(x)), x)
        np.testing.assert_allclose(kl[i], integral, rtol=1e-9)


def test_everything_else_needs_the_first_half_alone(x64):
    process, plain = LearnedVariance(CondOT()), Gaussian(CondOT())
    for kind in plain.kinds:
        halves = Prediction(jnp.concatenate([X0, V], axis=-1), kind)
        for other in plain.kinds:
            ours = process.convert(halves, other, XT, T)
            np.testing.assert_allclose(ours.value, plain.convert(Prediction(X0, kind), other, XT, T).value, rtol=1e-12)
            assert ours.value.shape == XT.shape
    np.testing.assert_allclose(
        process.path_kl(X0, two_heads(X0 + 1, V), XT, T), plain.path_kl(X0, Prediction(X0 + 1, "x0"), XT, T)
    )
    assert process != plain
    assert hash(process) == hash(LearnedVariance(CondOT()))


@pytest.mark.slow
def test_ends_and_gradients_in_float32():
    process = LearnedVariance(VPLinear())
    xt, v = jnp.asarray([[0.3], [0.3]], jnp.float32), jnp.asarray([[0.5], [-0.5]], jnp.float32)
    s, t = jnp.asarray([0.0, 0.3], jnp.float32), jnp.asarray([0.2, 1.0], jnp.float32)

    def spread(v):
        return process.reverse(two_heads(xt, v), xt, s, t).std.sum()

    last = process.reverse(two_heads(xt, v), xt, s, t)
    assert last.std[0, 0] == 0  # no noise at s = 0: the step ends at x0_hat
    np.testing.assert_allclose(last.mean[0], xt[0], rtol=1e-6)
    assert np.isfinite(jax.grad(spread)(v)).all()
    near = process.step_kl(xt, two_heads(xt, v), xt, jnp.float32(0.5), jnp.float32(0.501))
    wide = LearnedVariance(VPLinear())
    with jax.enable_x64(True):
        exact = wide.step_kl(*(jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), x) for x in (xt, two_heads(xt, v))),
                             jnp.asarray(xt, jnp.float64), jnp.float64(0.5), jnp.float64(0.501))  # fmt: skip
    np.testing.assert_allclose(near, exact, rtol=0.3, atol=1e-9)
    with pytest.raises(ValueError, match="or twice as long on its last axis; got"):
        process.split(Prediction(jnp.zeros((2, 3)), "x0"), xt)
