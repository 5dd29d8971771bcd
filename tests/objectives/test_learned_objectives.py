"""What trains beside the network: its gradients by quadrature, its optimum in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quadrature import Rows

import ddjax
from ddjax.fixtures import GaussianMixture
from ddjax.objectives import (
    adaptive,
    adaptive_parameters,
    ddpm_hybrid,
    densities,
    gaussian,
    learned_uncertainty,
    learned_weights,
    uncertainty_parameters,
    weightings,
)
from ddjax.processes import Gaussian, LearnedVariance
from ddjax.schedules import CondOT, LogSNRLinear, PerSite, VPCosine, VPLinear

PROCESS, LAW = Gaussian(CondOT(), data_std=0.5), GaussianMixture(dims=1, components=2, scale=0.5)
ENDS = tuple(2 * np.log((1 - t) / t) for t in PROCESS.t_range)  # of log-SNR, the greater first


def apply(params, xt, t, cond, *, rng=None, train=False):
    """A velocity with one parameter."""
    return params * jnp.tanh(2 * xt) + jnp.cos(3 * t)[:, None]


def errors(rows, weight):
    """weight |noise error|^2 of `apply` at 0.3, by the formulas of CondOT."""
    t = jax.nn.sigmoid(-0.5 * rows.log_snr)[:, None]
    xt = (1 - t) * rows.x0 + t * rows.noise
    return np.asarray(weight * (((rows.noise - rows.x0 - apply(0.3, xt, t[:, 0], None)) * (1 - t)) ** 2)[:, 0])


@pytest.mark.slow
def test_uncertainty_is_the_logarithm_of_the_expected_error(x64, monkeypatch):
    """Loss, and the gradients of both, are those of E[error exp(-u) + u]; at u = log E[error] it is 1 + E[u], flat."""
    rows = Rows.window(LAW, nodes=12, order=4, noise_order=6)
    snr = np.asarray(rows.log_snr)
    u, p = jnp.asarray((ENDS[0] - snr) / (ENDS[0] - ENDS[1])), 1 / (ENDS[0] - ENDS[1])
    density = densities.uniform_log_snr(PROCESS)
    options = {"error": "noise", "weighting": weightings.min_snr(5.0), "density": density}
    objective = learned_uncertainty(PROCESS, "velocity", **options)
    nodes, weights = snr.reshape(12, -1)[:, 0], np.asarray(rows.outer).reshape(12, -1)[:, 0] * p
    error = errors(rows, np.minimum(1, 5 * np.exp(-snr)))
    mean = (error * np.asarray(rows.inner)).reshape(12, -1).sum(1)  # E[error] at each node
    features = jax.jacobian(learned_weights.uncertainty)(
        uncertainty_parameters(), jnp.asarray(nodes)
    )  # u is linear in them
    columns = np.concatenate([features["weights"], features["bias"][:, None]], axis=1)
    best = np.linalg.lstsq(columns, np.log(mean), rcond=None)[0]
    begun = {"weights": jnp.zeros(128), "bias": jnp.asarray(0.4)}
    ended = {"weights": jnp.asarray(best[:-1]), "bias": jnp.asarray(best[-1])}

    def loss(params):
        return rows.loss(monkeypatch, objective, apply, params, u, p)

    for own, log_error in ((begun, np.full(12, 0.4)), (ended, np.log(mean))):
        params = {"network": jnp.asarray(0.3), "objective": own}
        value, gradient = jax.value_and_grad(loss)(params)
        np.testing.assert_allclose(value, weights @ (mean * np.exp(-log_error) + log_error), rtol=1e-8)
        slope = (weights * (1 - mean * np.exp(-log_error))) @ columns
        np.testing.assert_allclose(gradient["objective"]["weights"], slope[:-1], atol=1e-8)
        np.testing.assert_allclose(gradient["objective"]["bias"], slope[-1], atol=1e-8)
        factor = jnp.asarray(np.minimum(1, 5 * np.exp(-nodes)) * np.exp(-log_error))
        levelled = gaussian(
            PROCESS, "velocity", **options | {"weighting": lambda s, v=factor: jnp.interp(s, jnp.asarray(nodes), v)}
        )
        plain = jax.grad(lambda n, o=levelled: rows.loss(monkeypatch, o, apply, n, u, p))(params["network"])
        np.testing.assert_allclose(gradient["network"], plain, rtol=1e-8)
    np.testing.assert_allclose(value, weights.sum() + weights @ np.log(mean), rtol=1e-8)
    assert np.abs(slope).max() < 1e-8
    # It begins as the plain loss.
    params = {"network": jnp.asarray(0.3), "objective": uncertainty_parameters()}
    start = rows.loss(monkeypatch, gaussian(PROCESS, "velocity", **options), apply, params["network"], u, p)
    np.testing.assert_allclose(loss(params), start, rtol=1e-12)


@pytest.mark.slow
def test_the_adaptive_density_descends_the_second_moment(x64, monkeypatch):
    """Value and network's gradient are the integral's whatever the density; the logits follow d/dp of E[f^2] / p."""
    bins, floor = 4, 0.01
    edges = np.linspace(*ENDS, bins + 1)
    g, w = np.polynomial.legendre.leggauss(6)
    width = edges[0] - edges[1]
    snr = np.concatenate([low + width * (g + 1) / 2 for low in edges[1:]])
    rows = Rows(LAW, snr, np.tile(0.5 * width * w, bins), order=4, noise_order=6)
    which = np.floor((ENDS[0] - np.asarray(rows.log_snr)) / width).astype(int)
    objective = adaptive(PROCESS, "velocity", weighting=weightings.sigmoid(2.0), floor=floor)
    f = errors(rows, 0.5 / (1 + np.exp(np.asarray(rows.log_snr) - 2)))
    measure = np.asarray(rows.inner * rows.outer)
    moments = np.bincount(which, weights=measure * f**2)  # the integral of E[f^2] over each bin

    def probabilities(logits):
        return (1 - floor) * jax.nn.softmax(logits) + floor / bins

    def second_moment(logits):
        return (jnp.asarray(moments) / (probabilities(logits) / width)).sum()

    best = np.sqrt(moments) / np.sqrt(moments).sum()
    best = (best - floor / bins) / (1 - floor)
    assert (best > 0).all()
    whole, slopes = [], []
    for logits in (jnp.zeros(bins), jnp.asarray([0.5, -0.3, 1.0, 0.1]), jnp.log(jnp.asarray(best))):
        p = np.asarray(probabilities(logits))
        place = (ENDS[0] - np.asarray(rows.log_snr)) / width - which
        u = jnp.asarray((np.cumsum(p) - p)[which] + p[which] * place)

        def loss(params, u=u, p=p):
            return rows.loss(monkeypatch, objective, apply, params, u, jnp.asarray(p[which] / width))

        value, gradient = jax.value_and_grad(loss)({"network": jnp.asarray(0.3), "objective": {"logits": logits}})
        np.testing.assert_allclose(value, measure @ f, rtol=1e-9)
        np.testing.assert_allclose(
            gradient["objective"]["logits"], jax.grad(second_moment)(logits), rtol=1e-7, atol=1e-9
        )
        whole.append(gradient["network"])
        slopes.append(np.abs(gradient["objective"]["logits"]).max())
    np.testing.assert_allclose(whole, whole[0], rtol=1e-9)
    assert slopes[2] < 1e-8 < 0.01 < slopes[0]
    np.testing.assert_allclose(
        second_moment(jnp.log(jnp.asarray(best))), np.sqrt(moments).sum() ** 2 * width, rtol=1e-9
    )
    assert second_moment(jnp.log(jnp.asarray(best))) < second_moment(jnp.zeros(bins))


@pytest.mark.slow
def test_the_hybrid_teaches_the_mean_by_the_simple_loss_and_the_variance_by_the_bound(x64):
    """Gradients of the two halves of the output, each against its own loss written again."""
    process, times = LearnedVariance(VPCosine(), 0.8), (0.9, 0.5, 0.2)
    x0 = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2)))
    network = lambda params, xt, t, cond, **_: jnp.concatenate([params[0] * xt, jnp.tanh(params[1] * xt)], axis=-1)
    run = lambda params, weight: ddpm_hybrid(process, times=times, vlb_weight=weight)(
        jax.random.key(3), network, params, x0
    )[0]
    seen = {}

    def spy(params, xt, t, cond, **_):
        seen.update(xt=xt, t=t)
        return network(params, xt, t, cond)

    ddpm_hybrid(process, times=times)(jax.random.key(3), spy, jnp.asarray([0.7, 0.4]), x0)
    xt, t = seen["xt"], seen["t"]
    s = jnp.where(t == 0.9, 0.5, 0.2)

    def simple(params):
        noise = (xt - process.schedule.alpha(t)[:, None] * x0) / process.schedule.sigma(t)[:, None]
        return ((noise - params[0] * xt) ** 2).mean()

    def bound(params):
        said = ddjax.Prediction(network(params, xt, t, None), "noise")
        return 2 * process.step_kl(x0, said, xt, s, t).mean()

    at = jnp.asarray([0.7, 0.4])
    np.testing.assert_allclose(run(at, 0.05), simple(at) + 0.05 * bound(at), rtol=1e-9)
    ours, of_mean, of_variance = (jax.grad(f)(at) for f in (lambda p: run(p, 0.05), simple, bound))
    np.testing.assert_allclose(ours, [of_mean[0], 0.05 * of_variance[1]], rtol=1e-9)
    assert abs(of_variance[0]) > 0.1  # which the mean does not see


def test_the_uncertaintys_waves(x64):
    """EDM2's: sqrt(2) cos(2 pi (f c + phase)), c = log(sigma) / 4, over the root of their number."""
    sigma = np.asarray([0.01, 0.3, 1.0, 20.0])
    waves = jax.jacobian(learned_weights.uncertainty)(uncertainty_parameters(), jnp.asarray(-2 * np.log(sigma)))
    angle = 0.25 * np.log(sigma)[:, None] * learned_weights._FREQUENCIES + learned_weights._PHASES
    np.testing.assert_allclose(waves["weights"], np.sqrt(2 / 128) * np.cos(angle), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(waves["bias"], 1.0)


@pytest.mark.slow
def test_sites_share_the_density_and_their_schedules_its_log_snr(x64):
    """Straight lines at every site are one straight line; the logits follow the square of the mean over sites."""
    x0 = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2)))
    lines = Gaussian(PerSite.initial((2,))), Gaussian(LogSNRLinear())
    for make, own in ((learned_uncertainty, uncertainty_parameters()), (adaptive, adaptive_parameters(8))):
        params = {"network": jnp.asarray(0.3), "objective": jax.tree.map(lambda v: v + 0.1, own)}
        found = [
            jax.value_and_grad(lambda p, q=q, m=make: m(q, "velocity")(jax.random.key(1), apply, p, x0)[0])(params)
            for q in lines
        ]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), *found)
    params = {"network": jnp.asarray(0.3), "objective": adaptive_parameters(8)}
    loss = lambda p: adaptive(PROCESS, "velocity", floor=0.04)(jax.random.key(1), apply, p, x0[:1])[0]
    value, gradient = jax.value_and_grad(loss)(params)
    # - value^2 d log p, p = 0.96 softmax + 0.04 / 8, at the bin that was drawn
    np.testing.assert_allclose(gradient["objective"]["logits"].min(), -(value**2) * 0.96 * (1 - 1 / 8), rtol=1e-6)


@pytest.mark.slow
def test_all_start_and_move_in_float32():
    x0 = jax.random.normal(jax.random.key(0), (64, 1))
    for make, own in ((learned_uncertainty, uncertainty_parameters()), (adaptive, adaptive_parameters(8))):
        params = {"network": jnp.asarray(0.3), "objective": own}
        for rows in (64, 1):
            run = jax.jit(
                jax.value_and_grad(lambda p, x, m=make: m(PROCESS, "velocity")(jax.random.key(1), apply, p, x)[0])
            )
            value, gradient = run(params, x0[:rows])
            assert np.isfinite(value)
            assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))


def test_errors():
    for wrong, message in (
        (lambda: adaptive(PROCESS, "velocity", floor=0.0), "share of uniform draws"),
        (lambda: learned_uncertainty(PROCESS, "velocity", error="posterior"), "posterior"),
        (lambda: ddpm_hybrid(PROCESS, times=(0.9, 0.1)), "learns the variance of a LearnedVariance"),
        (lambda: ddpm_hybrid(LearnedVariance(VPLinear()), times=(1.0, 0.0)), "must end where there is noise"),
        (lambda: ddpm_hybrid(LearnedVariance(), times=(0.1, 1.0)), "times must decrease"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
