"""Every weighting, density and error space: the same product is the same loss; the bound is the bound."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from quadrature import HIGH, LOW, Rows

from ddjax import Prediction, schedules
from ddjax.fixtures import GaussianMixture
from ddjax.objectives import densities, gaussian, weightings
from ddjax.processes import DCT, Gaussian, InBasis
from ddjax.schedules import EDM, VE, CondOT, PerSite, ShortestPath, VPCosine, VPLinear

PROCESS = Gaussian(CondOT(), data_std=0.5)
D2 = 0.25
LAW = GaussianMixture(dims=1, components=2, scale=0.5)
ERRORS = {  # |noise error|^2 / |this error|^2 under CondOT, t = 1 / (1 + exp(lambda / 2))
    "noise": lambda snr: np.ones_like(snr),
    "x0": np.exp,
    "score": lambda snr: (1 + np.exp(0.5 * snr)) ** -2,
    "velocity": lambda snr: (1 + np.exp(-0.5 * snr)) ** -2,
    "v": lambda snr: (np.exp(snr) / (1 + np.exp(snr)) ** 2) * (1 + np.exp(0.5 * snr)) ** 2,
    "edm": lambda snr: D2 / (np.exp(-snr) + D2),
}
WEIGHTINGS = {  # (made, of which error, what it is worth for the noise's)
    "unit": (weightings.unit, "noise", np.ones_like),
    "snr": (weightings.snr(), "x0", np.ones_like),
    "truncated_snr": (weightings.truncated_snr(), "x0", lambda snr: np.maximum(1, np.exp(-snr))),
    "min_snr": (weightings.min_snr(5.0), "noise", lambda snr: np.minimum(1, 5 * np.exp(-snr))),
    "soft_min_snr": (weightings.soft_min_snr(4.0), "noise", lambda snr: 1 / (1 + np.exp(snr) / 4)),
    "p2": (weightings.p2(0.5, 1.0), "noise", lambda snr: 1 / np.sqrt(1 + np.exp(snr))),
    "edm": (weightings.edm(PROCESS), "x0", lambda snr: 1 + np.exp(-snr) / D2),
    # g^2 / 2 over sigma^2: -lambda' / 2 = 1 / (t (1 - t)).
    "likelihood": (weightings.likelihood(PROCESS), "score", lambda snr: 2 + 2 * np.cosh(0.5 * snr)),
    "sigmoid": (weightings.sigmoid(2.0), "noise", lambda snr: 1 / (1 + np.exp(snr - 2))),
    "flow_matching": (weightings.flow_matching(), "noise", lambda snr: np.exp(-0.5 * snr)),
}


def _uniform_clock():
    low, high = PROCESS.t_range
    t = lambda snr: 1 / (1 + np.exp(0.5 * snr))
    return lambda snr: (t(snr) - low) / (high - low), lambda snr: np.cosh(0.25 * snr) ** -2 / 8 / (high - low)


def _uniform_snr():
    low, high = (2 * math.log((1 - t) / t) for t in reversed(PROCESS.t_range))
    return lambda snr: (high - snr) / (high - low), lambda snr: np.full_like(snr, 1 / (high - low))


def _truncated_sech(shift):
    low, high = (2 * math.log((1 - t) / t) for t in reversed(PROCESS.t_range))
    law = scipy.stats.hypsecant(loc=shift, scale=2.0)
    inside = law.cdf(high) - law.cdf(low)
    return lambda snr: (law.cdf(high) - law.cdf(snr)) / inside, lambda snr: law.pdf(snr) / inside


def _law(law):
    """Times increase as log-SNRs decrease."""
    return law.sf, law.pdf


DENSITIES = {  # (made, distribution function of t at a log-SNR, density of the log-SNR)
    "uniform_time": (densities.uniform_time, *_uniform_clock()),
    "uniform_log_snr": (densities.uniform_log_snr, *_uniform_snr()),
    "log_normal_sigma": (densities.log_normal_sigma, *_law(scipy.stats.norm(2.4, 2.4))),
    "logit_normal": (lambda p: densities.logit_normal(p, 0.3, 0.8), *_law(scipy.stats.norm(-0.6, 1.6))),
    "sech": (lambda p: densities.sech(p, 1.0), *_truncated_sech(1.0)),
    "laplace": (lambda p: densities.laplace(p, 0.5, 0.7), *_law(scipy.stats.laplace(0.5, 0.7))),
}


def apply(params, xt, t, cond, *, rng=None, train=False):
    """A wrong velocity: the mixture's, moved."""
    return LAW.denoise(PROCESS, "velocity")(xt, t).value + 0.3 * jnp.tanh(2 * xt) + 0.2 * jnp.cos(3 * t)[:, None]


def noise_error(rows):
    """E|noise error|^2 of `apply` at each row: |noise - x0 - v|^2 (1 - t)^2."""
    t = jax.nn.sigmoid(-0.5 * rows.log_snr)[:, None]
    xt = (1 - t) * rows.x0 + t * rows.noise
    return (((rows.noise - rows.x0 - apply({}, xt, t[:, 0], None)) * (1 - t))[:, 0]) ** 2


@pytest.mark.slow
@pytest.mark.parametrize("density", DENSITIES)
def test_every_combination_with_equal_products_has_the_same_loss(x64, monkeypatch, density):
    """10 weightings x 6 densities x 6 error spaces, against one integral over log-SNR that knows none of them."""
    rows = Rows.window(LAW, nodes=12, order=4, noise_order=6)
    mse, snr = np.asarray(noise_error(rows)), np.asarray(rows.log_snr)
    nodes = np.asarray(rows.inner * rows.outer)
    worths = np.stack([worth(snr) for *_, worth in WEIGHTINGS.values()])
    make, cdf, pdf = DENSITIES[density]
    u, p, made = jnp.asarray(cdf(snr)), jnp.asarray(pdf(snr)), make(PROCESS)
    expected = {"density": (worths * pdf(snr) * mse) @ nodes, "log_snr": 0.5 * (worths * mse) @ nodes}
    for error, factor in ERRORS.items():

        def moved(s, e=factor):
            """A block of the rows for each weighting, moved from its own error space to this one."""
            every = zip(s.reshape(len(WEIGHTINGS), -1), WEIGHTINGS.values(), strict=True)
            return jnp.concatenate([w(s) * e(s) / ERRORS[space](s) for s, (w, space, _) in every])

        for measure in ("density", "log_snr") if error in ("noise", "velocity") else ("density",):
            objective = gaussian(PROCESS, "velocity", error=error, weighting=moved, density=made, measure=measure)
            ours = rows.loss(monkeypatch, objective, apply, {}, u, p, blocks=len(WEIGHTINGS))
            np.testing.assert_allclose(ours, expected[measure], rtol=1e-8, err_msg=f"{density} {error}")


def test_the_bound_is_unit_weight_over_log_snr(x64, monkeypatch):
    """With any density it is the integral of `path_kl`; with the exact denoiser, information lost (I-MMSE)."""
    rows = Rows.window(LAW, nodes=32, order=24, noise_order=32)
    t = jax.nn.sigmoid(-0.5 * rows.log_snr)
    xt = (1 - t)[:, None] * rows.x0 + t[:, None] * rows.noise
    exact = lambda params, xt, t, cond, **_: LAW.denoise(PROCESS, "velocity")(xt, t).value
    for network in (apply, exact):
        kl = PROCESS.path_kl(rows.x0, _prediction(network, xt, t), xt, t)[:, 0]
        speed = -1 / np.asarray(PROCESS.schedule.log_snr_prime(t))  # dt / d lambda
        integral = float(rows.inner * rows.outer @ (kl * speed))
        for name in ("sech", "log_normal_sigma"):
            make, cdf, pdf = DENSITIES[name]
            snr = np.asarray(rows.log_snr)
            objective = gaussian(PROCESS, "velocity", error="noise", density=make(PROCESS), measure="log_snr")
            ours = rows.loss(monkeypatch, objective, network, {}, jnp.asarray(cdf(snr)), jnp.asarray(pdf(snr)))
            np.testing.assert_allclose(ours, integral, rtol=1e-10)
    np.testing.assert_allclose(integral, _information(HIGH) - _information(LOW), rtol=1e-6)
    # Song's: g^2 / 2 of the score error, the mean over the clock times its length.
    make, cdf, pdf = DENSITIES["uniform_time"]
    likelihood = gaussian(PROCESS, "velocity", error="score", weighting=weightings.likelihood(PROCESS))
    ours = rows.loss(monkeypatch, likelihood, exact, {}, jnp.asarray(cdf(snr)), jnp.asarray(pdf(snr)))
    np.testing.assert_allclose(ours * np.diff(PROCESS.t_range), integral, rtol=1e-9)


def _prediction(network, xt, t):
    return Prediction(network(None, xt, t, None), "velocity")


def _information(log_snr):
    """I(x0; sqrt(snr) x0 + noise), nats: entropies by the trapezoidal rule."""
    log_w, means, covariances = (np.asarray(v) for v in LAW.parameters())
    x = np.linspace(-60, 60, 40001)
    std = np.sqrt(np.exp(log_snr) * covariances[:, 0, 0] + 1)
    density = sum(
        w * scipy.stats.norm(math.exp(0.5 * log_snr) * m, s).pdf(x)
        for w, m, s in zip(np.exp(log_w), means[:, 0], std, strict=True)
    )
    entropy = -np.trapezoid(density * np.log(np.maximum(density, 1e-300)), x)
    return entropy - 0.5 * math.log(2 * math.pi * math.e)


@pytest.mark.slow
def test_a_network_not_told_the_time_learns_the_average(x64, monkeypatch):
    """The loss is flat at E[velocity | x_t] over the times that x_t may have (Sun et al. 2025)."""
    times = jnp.asarray([0.2, 0.5, 0.7])
    snr = np.asarray(PROCESS.schedule.log_snr(times))
    rows = Rows(LAW, snr, np.asarray([0.5, 0.2, 0.3]), order=24, noise_order=32)

    def average(xt):
        t = jnp.broadcast_to(times, (xt.shape[0], 3))
        at = jnp.broadcast_to(xt[:, None], (xt.shape[0], 3, 1)).reshape(-1, 1)
        log_p = LAW.log_prob(at, 1 - t.ravel(), t.ravel()).reshape(-1, 3) + jnp.log(jnp.asarray([0.5, 0.2, 0.3]))
        velocity = LAW.denoise(PROCESS, "velocity")(at, t.ravel()).value.reshape(-1, 3)
        return (jax.nn.softmax(log_p) * velocity).sum(-1, keepdims=True)

    blind = lambda params, xt, t, cond, **_: average(xt) + params[0] * jnp.tanh(xt) + params[1]
    density = densities.Density(lambda u: PROCESS.schedule.time(rows.log_snr), None)
    objective = gaussian(PROCESS, "velocity", density=density)
    loss = lambda params: rows.loss(monkeypatch, objective, blind, params, rows.log_snr, 1.0)
    value, gradient = jax.value_and_grad(loss)(jnp.zeros(2))
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)
    assert loss(jnp.asarray([0.1, 0.0])) > value


def test_the_settings_in_print_are_the_weightings_in_print(x64):
    """Kingma & Gao 2023: weighting x density of each published loss, as a weight of the noise error."""
    snr = np.linspace(-4, 4, 9)
    np.testing.assert_allclose(weightings.p2(2.0, 0.3)(jnp.asarray(snr)), (0.3 + np.exp(snr)) ** -2.0, rtol=1e-12)
    cosine, straight = Gaussian(VPCosine(s=0.0)), PROCESS
    clock = lambda process: np.asarray(densities.uniform_time(process).pdf(jnp.asarray(snr))) * np.diff(process.t_range)
    sech = 1 / np.cosh(0.5 * snr)
    of_v = 1 + np.exp(-snr)  # |v error|^2 / |noise error|^2, variance preserving
    p2, minimum = (np.asarray(w(jnp.asarray(snr))) for w in (weightings.p2(1.0), weightings.min_snr(5.0)))
    table = {
        "iDDPM": (clock(cosine), sech / (2 * np.pi)),
        "v": (clock(cosine) * of_v, np.exp(-0.5 * snr) / np.pi),
        "P2": (clock(cosine) * p2, sech / (1 + np.exp(snr)) / (2 * np.pi)),
        "min-SNR": (clock(cosine) * minimum, sech * np.minimum(1, 5 * np.exp(-snr)) / (2 * np.pi)),
        "FM-OT": (clock(straight) / ERRORS["velocity"](snr), 0.5 * np.exp(-0.5 * snr)),
        "InDI": (clock(straight) / ERRORS["x0"](snr), np.exp(-snr) / np.cosh(0.25 * snr) ** 2 / 8),
    }
    for name, (ours, printed) in table.items():
        np.testing.assert_allclose(ours, printed, rtol=1e-9, err_msg=name)
    edm = Gaussian(EDM(), data_std=0.5)
    density = np.asarray(densities.log_normal_sigma(edm).pdf(jnp.asarray(snr)))
    ours = density * np.asarray(weightings.edm(edm)(jnp.asarray(snr))) * np.exp(-snr)
    np.testing.assert_allclose(ours, scipy.stats.norm.pdf(snr, 2.4, 2.4) * (np.exp(-snr) + D2) / D2, rtol=1e-9)
    # k-diffusion's F-space soft-min-snr, and SiD2's x0 weight.
    sigma2 = np.exp(-snr)
    ours = np.asarray(weightings.soft_min_snr(1 / D2)(jnp.asarray(snr))) / (1 + sigma2 / D2)
    np.testing.assert_allclose(ours, D2 * sigma2 / (sigma2 + D2) ** 2, rtol=1e-9)
    ours = np.asarray(weightings.sigmoid(-3.0)(jnp.asarray(snr))) * np.exp(snr)
    np.testing.assert_allclose(ours, np.exp(-3.0) / (1 + np.exp(-(snr + 3.0))), rtol=1e-9)


PER_SITE = PerSite(np.random.default_rng(0).normal(size=(3, 2)))
PROCESSES = [Gaussian(s) for s in (CondOT(), VPLinear(), VPCosine(), VE(), EDM(), PER_SITE)]
PROCESSES += [InBasis(Gaussian(ShortestPath([3.0, 0.2])), DCT((1,)))]


@pytest.mark.slow
@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p.schedule).__name__)
def test_the_density_is_that_of_the_times(x64, process):
    """pdf(lambda(u)) |d lambda / du| = 1 wherever times are not moved to the ends; lambda is the common log-SNR."""
    schedule = process.schedule.common
    u = jnp.linspace(0.02, 0.98, 25)
    for name, (make, *_) in DENSITIES.items():
        density = make(process)
        log_snr = lambda u, d=density: schedule.log_snr(d(u))
        at, slope = jax.jvp(log_snr, (u,), (jnp.ones_like(u),))
        inside = np.asarray(slope) < -1e-12
        assert inside.sum() > 15, name
        np.testing.assert_allclose((density.pdf(at) * -slope)[inside], 1.0, rtol=1e-7, err_msg=name)


@pytest.mark.slow
def test_densities_are_the_named_laws(x64):
    snr = np.linspace(-3, 3, 13)
    for name, (make, cdf, pdf) in DENSITIES.items():
        density = make(PROCESS)
        np.testing.assert_allclose(schedules.CondOT().log_snr(density(jnp.asarray(cdf(snr)))), snr, atol=1e-7)
        np.testing.assert_allclose(density.pdf(jnp.asarray(snr)), pdf(snr), rtol=1e-9, err_msg=name)
    # Esser et al. 2024, eq. 19 with (m, s) = (0.3, 0.8), at t = 1/4.
    of_t = math.exp(-((math.log(1 / 3) - 0.3) ** 2) / (2 * 0.64)) / (0.8 * math.sqrt(2 * math.pi)) / (0.25 * 0.75)
    t = jnp.asarray([0.25])
    ours = DENSITIES["logit_normal"][0](PROCESS).pdf(PROCESS.schedule.log_snr(t)) * -PROCESS.schedule.log_snr_prime(t)
    np.testing.assert_allclose(ours, of_t, rtol=1e-9)


@pytest.mark.slow
def test_binned_density(x64):
    p = jnp.asarray([0.1, 0.4, 0.3, 0.2])
    density = densities.binned(PROCESS, p)
    high, low = (float(PROCESS.schedule.log_snr(jnp.asarray(t))) for t in PROCESS.t_range)
    edges = np.linspace(high, low, 5)
    u = jnp.linspace(0, 1, 100_001)[:-1]
    ours = np.asarray(PROCESS.schedule.log_snr(density(u)))
    shares = [np.mean((ours <= a) & (ours > b)) for a, b in itertools.pairwise(edges)]
    np.testing.assert_allclose(shares, p, atol=1e-4)
    assert (np.diff(ours) < 0).all()
    middles = 0.5 * (edges[1:] + edges[:-1])
    np.testing.assert_allclose(density.pdf(jnp.asarray(middles)), p * 4 / (high - low), rtol=1e-12)
    np.testing.assert_allclose(
        density.pdf(jnp.asarray([high + 0.1, low - 0.1])), p[jnp.asarray([0, 3])] * 4 / (high - low)
    )
    np.testing.assert_allclose(density(jnp.cumsum(p) - 0.5 * p), PROCESS.schedule.time(jnp.asarray(middles)), rtol=1e-9)
    np.testing.assert_allclose(density(jnp.cumsum(p)[:-1]), PROCESS.schedule.time(jnp.asarray(edges[1:-1])), rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [CondOT(), VPLinear(), VPCosine(), VE(), EDM()], ids=repr)
def test_all_densities_and_weights_are_finite_in_float32(schedule):
    """At both ends of u: times inside the range, finite weights, under measure="log_snr" too."""
    process = Gaussian(schedule, 0.5)
    low, high = process.t_range
    u = jnp.asarray([0.0, 1e-7, 0.5, 1 - 6e-8], jnp.float32)
    makers = [densities.uniform_time, densities.uniform_log_snr, densities.log_normal_sigma]
    makers.append(lambda process: densities.logit_normal(process, std=4.0))  # beyond the range
    for make in (*makers, densities.logit_normal, densities.sech, densities.laplace):
        density = make(process)
        t = density(u)
        assert t.dtype == jnp.float32
        assert ((t >= np.float32(low)) & (t <= np.float32(high))).all()
        log_snr = process.schedule.log_snr(t)
        assert np.isfinite(1 / np.asarray(density.pdf(log_snr))).all()
        for name, (weighting, *_) in WEIGHTINGS.items():
            made = getattr(weightings, name)(process) if name in ("edm", "likelihood") else weighting
            values = made(log_snr)
            assert values.dtype == jnp.float32
            assert (np.isfinite(values) & (np.asarray(values) > 0)).all()


def test_errors():
    for wrong, message in (
        (lambda: gaussian(PROCESS, "x0", measure="time"), "measure is 'density' or 'log_snr'"),
        (lambda: gaussian(PROCESS, "x0", density=lambda u: u, measure="log_snr"), "knows its pdf"),
        (lambda: weightings.soft_min_snr(0.0), "gamma must be positive"),
        (lambda: weightings.p2(k=-1.0), "k must be positive"),
        (lambda: weightings.p2(k=0.0), "k must be positive"),
        (lambda: weightings.likelihood(Gaussian(PER_SITE)), "one weight for all sites"),
        (lambda: densities.laplace(PROCESS, scale=0.0), "width of a density"),
        (lambda: densities.log_normal_sigma(PROCESS, std=-1.0), "width of a density"),
        (lambda: densities.logit_normal(PROCESS, std=0.0), "width of a density"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
