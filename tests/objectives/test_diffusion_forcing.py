"""Independent times for frames: the expected loss by quadrature; and rolling windows, whose bound is the theory."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian_law import GaussianLaw, expected_bound

from ddjax.objectives import diffusion_forcing
from ddjax.processes import Gaussian, Masked, Staggered, Windows
from ddjax.schedules import VPCosine

LAW = GaussianLaw(np.array([0.3, -0.5]), np.array([[1.0, 0.85], [0.85, 0.9]]))
PROCESS = Gaussian(VPCosine(), 0.9)


def exact(params, xt, t, cond, **_):
    """E[x_0 | x_t] of two frames of one site, each at its own time, `(batch, 2, 1)`."""
    alpha, sigma = PROCESS.schedule.alpha(t)[..., 0], PROCESS.schedule.sigma(t)[..., 0]
    c, mean = jnp.asarray(LAW.covariance, xt.dtype), jnp.asarray(LAW.mean, xt.dtype)
    (a, b), (s, r) = alpha.T, sigma.T
    off = xt[..., 0] - alpha * mean
    v11, v12, v22 = a * a * c[0, 0] + s * s, a * b * c[0, 1], b * b * c[1, 1] + r * r
    det = v11 * v22 - v12**2
    w = jnp.stack([(v22 * off[:, 0] - v12 * off[:, 1]) / det, (v11 * off[:, 1] - v12 * off[:, 0]) / det], -1)
    return (mean + (alpha * w) @ c)[..., None]


def expected_loss():
    """By quadrature: half the SNR's slope times the posterior variance of each frame, a mean over both times."""
    x, w = np.polynomial.legendre.leggauss(40)
    t, slope = (np.asarray(v) for v in PROCESS.time_at(jnp.asarray(0.5 * x + 0.5), (0.05, 0.95)))
    angle = 0.5 * np.pi / 1.008
    alpha, sigma = np.cos(angle * (t + 0.008)), np.sin(angle * (t + 0.008))
    rate = angle * alpha / sigma**3  # -d SNR / dt / 2 of cot(angle)^2
    total = 0.0
    for i in range(40):
        for j in range(40):
            precision = np.linalg.inv(LAW.covariance) + np.diag([(alpha[k] / sigma[k]) ** 2 for k in (i, j)])
            left = np.diag(np.linalg.inv(precision))
            total += 0.25 * w[i] * w[j] * 0.5 * (rate[i] * slope[i] * left[0] + rate[j] * slope[j] * left[1])
    return total


@pytest.mark.slow
def test_expected_loss_is_the_integral_over_both_times(x64):
    objective = diffusion_forcing(PROCESS, "x0", t_range=(0.05, 0.95))

    @jax.jit
    def run(key):
        data_key, key = jax.random.split(key)
        x0 = LAW.mean + jax.random.normal(data_key, (5000, 2)) @ np.linalg.cholesky(LAW.covariance).T
        return objective(key, exact, {}, x0[..., None])[0]

    draws = np.asarray(jax.lax.map(run, jax.random.split(jax.random.key(0), 40)))
    error = draws.std() / np.sqrt(40)
    assert abs(draws.mean() - expected_loss()) < 4 * error
    assert error < 0.01 * draws.mean()


@pytest.mark.slow
def test_networks_are_told_each_sites_time_and_frames_share_theirs():
    seen = {}

    def apply(params, xt, t, cond, **_):
        seen["t"] = t
        return xt

    diffusion_forcing(PROCESS, "x0")(jax.random.key(0), apply, {}, jnp.zeros((500, 3, 2)))
    t = np.asarray(seen["t"])
    assert t.shape == (500, 3, 2)
    np.testing.assert_array_equal(t[..., 0], t[..., 1])
    # Independent, which low-discrepancy times of one example are not.
    assert (np.abs(np.corrcoef(t[..., 0].T)[np.triu_indices(3, 1)]) < 4 / np.sqrt(500)).all()


@pytest.mark.slow
def test_tokens_too():
    apply = lambda params, xt, t, cond, **_: params[xt]
    loss, gradient = jax.value_and_grad(
        lambda p: diffusion_forcing(Masked(3), "posterior")(jax.random.key(0), apply, p, jnp.zeros((8, 4), int))[0]
    )(jnp.zeros((4, 3)))
    assert np.isfinite(float(loss))
    assert np.isfinite(np.asarray(gradient)).all()


@pytest.mark.slow
def test_rolling_windows_have_the_bound_of_the_theory(x64):
    """Overlapping windows over two frames; a schedule with noise at t = 0, so that a clean frame has a density."""
    windows = Windows(start=[0.0, 0.25], stop=[0.75, 1.0])
    process = Staggered(PROCESS, windows)

    def moments(t):
        own = np.clip((t - windows.start.values) / 0.75, 0.0, 1.0)
        angle = 0.5 * np.pi * (own + 0.008) / 1.008
        return np.diag(np.cos(angle)), np.diag(np.sin(angle) ** 2)

    low, high = 0.02, 0.98
    a, v = moments(high)
    exact = LAW.bound(moments, low, high, v + 0.81 * a @ a)
    noisy = lambda law, z: law.mean + law.std * z
    # In pieces that end where the windows do.
    ends = [low, 0.25, 0.75, high]
    parts = [expected_bound(process, LAW, moments, noisy, 2, pair, order=24) for pair in itertools.pairwise(ends)]
    ours = np.array([parts[-1][0], sum(part[1] for part in parts), parts[0][2]])
    np.testing.assert_allclose(ours, exact, atol=1e-7)
    assert exact.sum() > LAW.entropy


def test_errors():
    with pytest.raises(ValueError, match="at least 1 axis"):
        diffusion_forcing(PROCESS, "x0", frame_axes=0)
