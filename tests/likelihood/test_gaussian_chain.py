"""The bound of a Gaussian chain on a grid: on a Gaussian, -log p and exactly the KL of two joint Gaussians."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax import grids, random
from ddjax.fixtures import GaussianMixture
from ddjax.likelihood import nelbo
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian
from ddjax.schedules import VE, CondOT, VPCosine, VPLinear

MEAN, STD = 0.4, 0.7
every_schedule = pytest.mark.parametrize("schedule", [CondOT(), VPLinear(), VE(), VPCosine()], ids=repr)


def denoise(process):
    """The exact denoiser of N(MEAN, STD^2)."""

    def exact(xt, t, cond=None):
        alpha, sigma = process.schedule.alpha(t)[:, None], process.schedule.sigma(t)[:, None]
        gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
        return Prediction(MEAN + gain * (xt - alpha * MEAN), "x0")

    return exact


def expected_bound(process, x0, times):
    """Over the noise, exactly: the costs are quadratic in it, so three Gauss-Hermite nodes do."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    weights, z = weights / weights.sum(), jnp.asarray(nodes)[:, None]

    @jax.jit
    def shown(t, s):
        """Costs of the steps from t to s, and of the decoder at the last s."""
        z_, x = jnp.tile(z, (len(t), 1)), jnp.full((3 * len(t), 1), x0)
        t, s = jnp.repeat(t, 3), jnp.repeat(s, 3)
        xt, xs = (process.marginal(x, at).mean + process.marginal(x, at).std * z_ for at in (t, s))
        kl = process.step_kl(x, denoise(process)(xt, t), xt, s, t)
        ends = process.prior_kl(x, t)[0, 0], process.reconstruction(x, None, xs, s)[-3:, 0]
        return kl.reshape(-1, 3), *ends

    times = jnp.asarray(times)
    kl, prior, low = shown(times[:-1], times[1:])
    return float(prior + (kl @ weights).sum() + weights @ low)


def joint_gap(process, x0, times):
    """KL(q(x_high ... x_low | x0) || p(x_high ... x_low | x0)) and -log p(x0), from the covariances of the chain.

    p is built by hand as a linear Gaussian chain from the prior to x0; nothing of the bound is used.
    """
    schedule = process.schedule
    a, v = (np.asarray(f(jnp.asarray(times)), float) for f in (schedule.alpha, lambda t: schedule.sigma(t) ** 2))
    n = len(times)
    # q: a chain from x_low up, x_t = r x_s + noise, conditioned on x0.
    q_mean, q_cov = a * x0, np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            later, earlier = min(i, j), max(i, j)  # times decrease
            q_cov[i, j] = a[later] / a[earlier] * v[earlier]
    # p: m = F m_before + noise, of n states and x0 at the end.
    p_mean, p_cov = np.zeros(n + 1), np.zeros((n + 1, n + 1))
    p_cov[0, 0] = v[0] + (a[0] * process.data_std) ** 2
    for i in range(1, n + 1):
        if i < n:
            t, s = i - 1, i
            gain = a[t] * STD**2 / (a[t] ** 2 * STD**2 + v[t])
            step = v[t] - (a[t] / a[s]) ** 2 * v[s]  # variance of x_t given x_s
            on_xt, on_x0 = a[t] / a[s] * v[s] / v[t], a[s] * step / v[t]
            slope, shift, noise = on_xt + on_x0 * gain, on_x0 * (MEAN - gain * a[t] * MEAN), v[s] * step / v[t]
        else:
            slope, shift, noise = 1 / a[-1], 0.0, v[-1] / a[-1] ** 2
        p_mean[i] = slope * p_mean[i - 1] + shift
        p_cov[i, :i] = p_cov[:i, i] = slope * p_cov[i - 1, :i]
        p_cov[i, i] = slope**2 * p_cov[i - 1, i - 1] + noise
    evidence = p_cov[n, n]
    nll = 0.5 * ((x0 - p_mean[n]) ** 2 / evidence + math.log(2 * math.pi * evidence))
    mean = p_mean[:n] + p_cov[:n, n] / evidence * (x0 - p_mean[n])
    cov = p_cov[:n, :n] - np.outer(p_cov[:n, n], p_cov[:n, n]) / evidence
    inverse, off = np.linalg.inv(cov), mean - q_mean
    log_dets = np.linalg.slogdet(cov)[1] - np.linalg.slogdet(q_cov)[1]
    return 0.5 * (np.trace(inverse @ q_cov) + off @ inverse @ off - n + log_dets), nll


@every_schedule
@pytest.mark.parametrize("steps", [1, 4])
def test_the_gap_is_the_kl_of_the_joint_laws(x64, schedule, steps):
    process = Gaussian(schedule, data_std=0.9)
    times = np.linspace(0.9, 0.2, steps + 1)
    for x0 in (-1.0, 0.5):
        gap, nll = joint_gap(process, x0, times)
        assert gap > 1e-3
        np.testing.assert_allclose(expected_bound(process, x0, times), nll + gap, atol=1e-8)


@every_schedule
def test_long_chains_tend_to_the_path_at_first_order(x64, schedule):
    """Steps equal in log-SNR: the step's KL is the path's times its length, to first order."""
    process, high, low, x0 = Gaussian(schedule), 4.0, -3.0, 0.5
    truth = 0.0
    nodes, weights = np.polynomial.legendre.leggauss(60)
    for node, weight in zip(nodes, weights, strict=True):
        snr = math.exp(0.5 * (high + low) + 0.5 * (high - low) * node)
        # E|x0 - x0_hat|^2 for this x0: a squared bias and the noise's share.
        shrink = 1 / (1 + snr * STD**2)
        error = (shrink * (x0 - MEAN)) ** 2 + snr * STD**4 * shrink**2
        truth += 0.5 * (high - low) * weight * 0.5 * snr * error
    gaps = []
    for n in (64, 128):
        times = np.asarray(grids.uniform_log_snr(schedule, n, start=low, end=high))
        steps = expected_bound(process, x0, times)
        steps -= float(process.prior_kl(jnp.full((1, 1), x0), jnp.asarray([times[0]]))[0, 0])
        at = jnp.asarray([times[-1]])
        sigma, alpha = float(schedule.sigma(at)[0]), float(schedule.alpha(at)[0])
        steps -= 0.5 + 0.5 * math.log(2 * math.pi) + math.log(sigma / alpha)
        gaps.append(steps - truth)
    assert gaps[0] > gaps[1] > 1e-4
    assert gaps[0] / gaps[1] == pytest.approx(2.0, abs=0.1)


def kl(p, q):
    """Of two independent normals."""
    return jnp.log(q.std / p.std) + (p.std**2 + (p.mean - q.mean) ** 2) / (2 * q.std**2) - 0.5


@every_schedule
def test_step_kl_is_that_of_the_two_laws_whatever_is_predicted(x64, schedule):
    process, rng = Gaussian(schedule, data_std=0.8), np.random.default_rng(0)
    x0, xt, value = (jnp.asarray(rng.normal(size=(3, 2, 2))) for _ in range(3))
    s, t = jnp.asarray([0.1, 0.3, 0.6]), jnp.asarray([0.11, 0.9, 0.95])
    for kind in ("x0", "noise", "velocity"):

        @jax.jit
        def both(x0, xt, value, kind=kind):
            prediction = Prediction(value, kind)
            expected = kl(process.bridge(x0, xt, s, t), process.reverse(prediction, xt, s, t))
            return process.step_kl(x0, prediction, xt, s, t), expected

        np.testing.assert_allclose(*both(x0, xt, value), rtol=1e-7)


@pytest.mark.slow
def test_the_estimator_agrees_and_no_noise_at_the_end_is_refused():
    process, times, batch = Gaussian(VPCosine(), data_std=0.9), np.linspace(1.0, 0.2, 6), 20_000
    x0 = jnp.full((batch, 1), 0.5)
    bound = nelbo(jax.random.key(0), denoise(process), process, x0, times=jnp.asarray(times), num_times=2)
    draws = np.asarray(bound.total)
    with jax.enable_x64(True):
        expected = expected_bound(process, 0.5, times)
    assert abs(draws.mean() - expected) < 4 * draws.std() / math.sqrt(batch)
    flow, law = Gaussian(CondOT()), GaussianMixture()
    x0 = law.sample(random.example_keys(jax.random.key(0), 2))
    with pytest.raises(ValueError, match=r"times end at t=0, where CondOT\(\) has no noise"):
        nelbo(jax.random.key(0), law.denoise(flow), flow, x0, times=grids.uniform(4))
    bound = nelbo(jax.random.key(0), law.denoise(flow), flow, x0, times=grids.uniform(4, end=0.01))
    assert np.isfinite(bound.total).all()
