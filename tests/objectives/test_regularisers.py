"""Contrast, the Fokker-Planck equation and noisy data: each at its exact optimum."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quadrature import Rows, mixture_nodes

from ddjax import Prediction, random
from ddjax.fixtures import GaussianMixture
from ddjax.objectives import (
    ambient,
    contrastive_flow_matching,
    densities,
    fokker_planck_residual,
    gaussian,
    weightings,
    with_fokker_planck,
    with_noise_level,
)
from ddjax.processes import Gaussian
from ddjax.schedules import VE, CondOT, VPCosine, VPLinear

PROCESS, LAW = Gaussian(CondOT(), data_std=0.5), GaussianMixture(dims=1, components=2, scale=0.5)


@pytest.mark.slow
def test_contrastive_optimum_is_the_velocity_away_from_the_mean(x64, monkeypatch):
    """v = (E[u | x_t] - strength E[u]) / (1 - strength): flat there, over every ordered pair of examples."""
    x, wx = mixture_nodes(LAW, 8)
    z, wz = np.polynomial.hermite_e.hermegauss(12)
    n = len(x) * len(z)
    states, chances = np.repeat(x, len(z)), np.outer(wx, wz / wz.sum()).ravel()
    noises = np.tile(z, len(x))
    # A cycle in which every pair of neighbours occurs once (de Bruijn): roll then pairs all with all.
    order = np.concatenate([[i, *itertools.chain(*((i, j) for j in range(i + 1, n)))] for i in range(n)]).astype(int)
    assert len(order) == n * n
    weights = jnp.asarray(chances[order] * chances[np.roll(order, 1)])
    x0, noise = jnp.asarray(states[order])[:, None], jnp.asarray(noises[order])[:, None]
    strength, mean = 0.2, float(wx @ x)
    monkeypatch.setattr(random, "normal", lambda *_: noise)
    density = densities.Density(lambda u: jnp.full(u.shape, 0.4), None)
    objective = contrastive_flow_matching(PROCESS, strength=strength, density=density)

    def network(params, xt, t, cond, **_):
        exact = LAW.denoise(PROCESS, "velocity")(xt, t).value
        best = (exact + strength * mean) / (1 - strength)  # E[u] = -E[x0]
        return best + params[0] * jnp.tanh(xt) + params[1] * xt + params[2]

    def loss(params):
        return objective(jax.random.key(0), network, params, x0, None, weights, train=False)[0]

    value, gradient = jax.value_and_grad(loss)(jnp.zeros(3))
    np.testing.assert_allclose(gradient, 0.0, atol=1e-5)
    moved = loss(jnp.asarray([0.0, 0.0, 0.3])) - value
    np.testing.assert_allclose(moved, (1 - strength) * 0.09, atol=1e-5)
    # Written again: the first row's negative is the last row.
    t, xt = 0.4, 0.6 * x0 + 0.4 * noise
    v, u = network(jnp.zeros(3), xt, jnp.full(len(xt), t), None), noise - x0
    by_hand = (weights[:, None] * ((v - u) ** 2 - strength * (v - jnp.roll(u, 1, axis=0)) ** 2)).sum()
    np.testing.assert_allclose(value, by_hand, rtol=1e-9)


def test_contrast_of_nothing_is_flow_matching():
    x0 = jax.random.normal(jax.random.key(0), (8, 2))
    apply = lambda params, xt, t, cond, **_: xt * t[:, None]
    for process in (PROCESS, Gaussian(VPCosine())):
        ours, plain = (
            make(jax.random.key(1), apply, {}, x0)[0]
            for make in (contrastive_flow_matching(process, strength=0.0), gaussian(process, "velocity"))
        )
        np.testing.assert_allclose(ours, plain, rtol=1e-6)
    for strength in (1.0, -0.1):
        with pytest.raises(ValueError, match=r"strength lies in \[0, 1\)"):
            contrastive_flow_matching(PROCESS, strength=strength)
    with pytest.raises(ValueError, match="two examples in a batch"):
        contrastive_flow_matching(PROCESS)(jax.random.key(1), apply, {}, x0[:1])


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [VPLinear(), CondOT(), VE(0.1, 5.0)], ids=repr)
def test_the_exact_score_has_no_residual(x64, schedule):
    """A mixture in two dimensions, whatever is predicted; the probes' mean is the exact divergence's residual."""
    law, process = GaussianMixture(dims=2, components=3), Gaussian(schedule)
    t = jnp.asarray([0.15, 0.4, 0.8])
    xt = jnp.asarray([[0.3, -0.5], [1.0, 0.2], [-0.7, 0.9]])

    @jax.jit
    def all_of_it(xt, t):
        exact = [fokker_planck_residual(law.denoise(process, k), process, xt, t) for k in ("score", "velocity")]
        moved = lambda x, t, cond=None: Prediction(
            law.denoise(process, "score")(x, t).value + jnp.sin(x) * x[:, ::-1] ** 2 * t[:, None], "score"
        )
        wrong = fokker_planck_residual(moved, process, xt, t)
        probes = [jnp.broadcast_to(jnp.asarray(v, float), xt.shape) for v in itertools.product((-1, 1), repeat=2)]
        return exact, wrong, sum(fokker_planck_residual(moved, process, xt, t, probe=v) for v in probes) / 4

    exact, wrong, probed = all_of_it(xt, t)
    scale = np.abs(wrong).max()
    for residual in exact:
        np.testing.assert_allclose(residual, 0.0, atol=1e-9 * scale)
    np.testing.assert_allclose(probed, wrong, atol=1e-9 * scale)


def test_the_residual_of_a_scaled_gaussian_score(x64):
    """s = -c x / m^2 for N(0, m^2): c (1 - c) g^2 x / m^4, by hand. And the penalty with it."""
    process, d, c = Gaussian(VPCosine()), 0.7, 1.5
    t, x = jnp.asarray([0.2, 0.6]), jnp.asarray([[0.4], [-1.1]])

    def m2(t):
        return (process.schedule.alpha(t) ** 2 * d**2 + process.schedule.sigma(t) ** 2)[:, None]

    denoise = lambda xt, t, cond=None: Prediction(-c * xt / m2(t), "score")
    g2 = process.sde(t)[1][:, None]
    by_hand = c * (1 - c) * g2 * x / m2(t) ** 2
    for probe in (None, -jnp.ones_like(x)):
        np.testing.assert_allclose(fokker_planck_residual(denoise, process, x, t, probe=probe), by_hand, rtol=1e-9)

    apply = lambda params, xt, t, cond, **_: -params * xt / m2(t)
    x0 = jnp.asarray([[0.5], [0.2], [-0.3], [0.1]])
    plain = gaussian(process, "score", error="noise")
    run = lambda p: with_fokker_planck(plain, process, "score", weight=0.3)(jax.random.key(0), apply, p, x0)
    loss, metrics = run(jnp.asarray(1.5))
    assert metrics["fokker_planck"] > 1e-3
    first = jax.random.split(jax.random.key(0), 4)[0]
    np.testing.assert_allclose(loss, plain(first, apply, 1.5, x0)[0] + 0.3 * metrics["fokker_planck"], rtol=1e-12)
    np.testing.assert_allclose(run(jnp.asarray(1.0))[1]["fokker_planck"], 0.0, atol=1e-12)
    # c^2 (1 - c)^2 in the parameter, and nothing else.
    ratio = run(jnp.asarray(2.0))[1]["fokker_planck"] / metrics["fokker_planck"]
    np.testing.assert_allclose(ratio, (2.0 * 1.0) ** 2 / (1.5 * 0.5) ** 2, rtol=1e-6)
    assert np.isfinite(jax.grad(lambda p: run(p)[0])(jnp.asarray(1.5)))
    with pytest.raises(ValueError, match="not one per site"):
        with_fokker_planck(plain, process, "score", weight=0.3)(jax.random.key(0), apply, 1.0, x0, None, x0)
    with pytest.raises(ValueError, match="must not be negative"):
        with_fokker_planck(plain, process, "score", weight=-1.0)


@pytest.mark.slow
def test_noisy_data_teach_the_clean_denoiser(x64, monkeypatch):
    """Flat at the clean law's exact denoiser, though only noisy data are seen; a shift costs (1 - r)^2 of itself."""
    level = 0.8
    noisy = Rows.window(LAW, nodes=6, order=16, noise_order=20)
    # Data y = x0 + level e: a third node set. Their law is again a mixture, so its own nodes are exact.
    log_w, means, covariances = (np.asarray(v) for v in LAW.parameters())

    class Wider:
        parameters = staticmethod(lambda: (log_w, means, covariances + level**2))

    rows = Rows.window(Wider, nodes=6, order=16, noise_order=20)
    snr = np.asarray(rows.log_snr)
    high, low = (2 * np.log((1 - t) / t) for t in PROCESS.t_range)
    u, p = jnp.asarray((high - snr) / (high - low)), 1 / (high - low)
    density = densities.uniform_log_snr(PROCESS)
    objective = ambient(PROCESS, "x0", weighting=weightings.snr(), density=density)
    seen = []

    def network(params, xt, t, cond, **_):
        seen.append(cond)
        return LAW.denoise(PROCESS, "x0")(xt, t).value + params[0] + params[1] * jnp.tanh(xt)

    def loss(params, rows=rows, sigma=level):
        cond = with_noise_level(jnp.full(rows.x0.shape[0], sigma), "labels")
        return rows.loss(monkeypatch, objective, network, params, u, p, cond=cond)

    value, gradient = jax.value_and_grad(loss)(jnp.zeros(2))
    assert seen[-1] == "labels"
    np.testing.assert_allclose(gradient, 0.0, atol=2e-6)
    share = level**2 * np.exp(snr)
    gap = np.where(share < 1, np.exp(snr) * (1 - share) ** 2, 0.0) * 0.3**2
    moved = loss(jnp.asarray([0.3, 0.0])) - value
    np.testing.assert_allclose(moved, np.asarray(rows.inner * rows.outer) @ gap * p, rtol=1e-5)
    # Clean data: the plain x0 error.
    plain = gaussian(PROCESS, "x0", weighting=weightings.snr(), density=density)
    params = jnp.asarray([0.3, 0.1])
    np.testing.assert_allclose(
        loss(params, noisy, 0.0), noisy.loss(monkeypatch, plain, network, params, u, p), rtol=1e-9
    )


@pytest.mark.slow
def test_noisy_data_in_float32():
    x0, sigma = jnp.ones((6, 2)), jnp.asarray([0.0, 0.1, 1.0, 10.0, 1e6, 0.0])
    apply = lambda params, xt, t, cond, **_: params * xt
    for process in (PROCESS, Gaussian(VPLinear()), Gaussian(VE())):
        run = lambda p, w: ambient(process, "x0")(jax.random.key(0), apply, p, x0, with_noise_level(sigma), w)[0]  # noqa: B023
        value, gradient = jax.value_and_grad(run)(jnp.asarray(0.5), None)
        assert np.isfinite(value)
        assert np.isfinite(gradient)
        assert run(jnp.asarray(0.5), jnp.asarray([0.0, 0, 0, 0, 1, 0])) == 0.0  # never seen at so little noise
    with pytest.raises(ValueError, match="with_noise_level"):
        ambient(PROCESS, "x0")(jax.random.key(0), apply, jnp.asarray(0.5), x0, sigma)
