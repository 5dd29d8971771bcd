"""The probability-flow ODE carries the density: of the law itself, whatever the schedule and the kind of prediction."""

import dataclasses
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax import random
from ddjax.fixtures import GaussianMixture
from ddjax.likelihood import Adaptive, UniformNoise, binned, discretised, heun, ode, rk4
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian, Masked, SoftMixture
from ddjax.schedules import EDM, VE, CondOT, VPCosine, VPLinear
from ddjax.types import Rows

KEY, LAW, FLOW = jax.random.key(0), GaussianMixture(dims=2, components=3), Gaussian(CondOT())
FAR = (18.0, -24.0)  # log-SNRs between which nothing is lost to 1e-4


def draws(law, n=6):
    return law.sample(random.example_keys(jax.random.key(1), n))


def between(schedule, high, low):
    return tuple(float(np.clip(schedule.time(jnp.asarray(v, float)), 0.0, 1.0)) for v in (high, low))


def error(law, process, kind, x0, **options):
    """What the solver errs by: the density of the law at the low end, from that of the latent under the law."""
    found = ode(KEY, law.denoise(process, kind), process, x0, **options)
    low, high = (jnp.asarray(t) for t in found.t_range)
    schedule = process.schedule
    smoothed = law.log_prob(x0, 1.0, schedule.sigma(low) / schedule.alpha(low))
    latent = law.log_prob(found.latent, schedule.alpha(high), schedule.sigma(high))
    return np.asarray(latent + found.volume + found.data - smoothed)


@pytest.mark.parametrize(
    ("schedule", "kind", "law", "steps"),
    [
        (CondOT(), "velocity", LAW, 240),
        pytest.param(EDM(), "edm", GaussianMixture(dims=16, components=2), 160, marks=pytest.mark.slow),
        pytest.param(VPLinear(), "noise", GaussianMixture(dims=1, components=1), 160, marks=pytest.mark.slow),
        pytest.param(VPCosine(), "v", GaussianMixture(dims=5, components=4), 160, marks=pytest.mark.slow),
        pytest.param(VE(), "score", GaussianMixture(dims=3, components=2), 160, marks=pytest.mark.slow),
        pytest.param(VPLinear(), "x0", GaussianMixture(dims=16, components=1), 160, marks=pytest.mark.slow),
    ],
    ids=repr,
)
def test_it_is_the_density_of_the_law(x64, schedule, kind, law, steps):
    """Smoothed by the low end, exactly; from the law's own density of the latent where the prior is only near it."""
    process, x0 = Gaussian(schedule, data_std=0.8), draws(law)
    t_range = between(schedule, *FAR)
    np.testing.assert_allclose(error(law, process, kind, x0, t_range=t_range, num_steps=steps), 0.0, atol=2e-5)
    found = ode(KEY, law.denoise(process, kind), process, x0, t_range=t_range, num_steps=steps)
    np.testing.assert_array_equal(found.volume_error, 0.0)
    low, high = (float(schedule.log_snr(jnp.asarray(t))) for t in t_range)
    if low > 17 and high < -23:
        np.testing.assert_allclose(found.log_prob, law.log_prob(x0), atol=1e-4)
    else:  # the prior is centred and the law is not: what is left of its mean
        gap = np.abs(found.log_prob - law.log_prob(x0, 1.0, math.exp(-low / 2)))
        assert 1e-6 < gap.max() < 0.5


@pytest.mark.slow
def test_from_no_noise_at_all(x64):
    """A grid of one's own may begin at t = 0 and end at t = 1, where sigma and alpha are 0."""
    inner = np.asarray(FLOW.schedule.time(jnp.linspace(-20.0, 20.0, 200)))
    times = jnp.asarray([1.0, *inner, 0.0])
    x0 = draws(LAW)
    found = ode(KEY, LAW.denoise(FLOW, "x0"), FLOW, x0, times=times)
    assert found.t_range == (0.0, 1.0)
    np.testing.assert_allclose(found.log_prob, LAW.log_prob(x0), atol=1e-4)


@dataclasses.dataclass(frozen=True)
class Isotropic:
    """The exact denoiser of N(0, std^2)."""

    process: Gaussian
    std: float

    def __call__(self, xt, t, cond=None):
        alpha, sigma = self.process.schedule.alpha(t)[:, None], self.process.schedule.sigma(t)[:, None]
        return Prediction(alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2) * xt, "x0")


def test_gaussian_data_of_the_prior_s_width_takes_one_step(x64):
    process, x0 = Gaussian(VE(), data_std=0.7), jnp.asarray([[0.3, -1.1, 2.0]])
    found = ode(KEY, Isotropic(process, 0.7), process, x0, num_steps=1, integrator=heun)
    variance = 0.7**2 + float(process.schedule.sigma(jnp.asarray(found.t_range[0]))) ** 2
    exact = -0.5 * (np.asarray(x0) ** 2 / variance + np.log(2 * np.pi * variance)).sum()
    np.testing.assert_allclose(found.log_prob, exact, atol=1e-9)
    # Bits: the density times the width of a bin, for each of three sites.
    np.testing.assert_allclose(found.bits_per_dim(0.1), -(exact / 3 + math.log(0.1)) / math.log(2), rtol=1e-9)


@pytest.mark.slow
def test_hutchinson_is_unbiased_and_knows_its_error(x64):
    law = GaussianMixture(dims=4, components=2, seed=1)
    denoise, x0, probes = law.denoise(FLOW, "noise"), draws(law, 400), 12
    exact = ode(KEY, denoise, FLOW, x0, num_steps=24)
    found = ode(KEY, denoise, FLOW, x0, num_steps=24, divergence="hutchinson", num_probes=probes)
    np.testing.assert_allclose(found.latent, exact.latent, atol=1e-12)  # the path itself does not depend on probes
    off = np.asarray(found.volume - exact.volume)
    assert abs(off.mean()) < 3 * off.std() / math.sqrt(len(off))
    assert np.mean(np.abs(off) < 3 * np.asarray(found.volume_error)) > 0.97
    assert np.mean(np.asarray(found.volume_error) ** 2) == pytest.approx(np.mean(off**2), rel=0.2)
    assert off.std() > 0.05
    one = ode(KEY, denoise, FLOW, x0[:2], num_steps=2, divergence="hutchinson", num_probes=1)
    assert np.isinf(one.volume_error).all()


@pytest.mark.parametrize(("integrator", "ladder", "order"), [(rk4, (40, 80), 4), (heun, (60, 120), 2)])
def test_order_of_convergence_of_the_likelihood(x64, integrator, ladder, order):
    x0 = draws(LAW, 12)
    gaps = [np.sqrt(np.mean(error(LAW, FLOW, "x0", x0, num_steps=n, integrator=integrator) ** 2)) for n in ladder]
    assert gaps[1] > 1e-9
    assert math.log2(gaps[0] / gaps[1]) == pytest.approx(order, abs=0.4)


def as_image(denoise):
    """The same law, its two sites in another shape."""

    def image(xt, t, cond):
        flat = denoise(xt.reshape(-1, 2), t, cond)
        return Prediction(flat.value.reshape(xt.shape), flat.kind)

    return image


def test_any_shape_any_batch_and_conditions():
    """In float32: an image, part of a batch, one example, and a label for each."""
    x0, labels = draws(LAW), jnp.asarray([0, 1, 2, 3, 0, 1])
    options = {"num_steps": 32}
    denoise = LAW.denoise(FLOW, "velocity")
    flat = ode(KEY, denoise, FLOW, x0, labels, **options)
    image = ode(KEY, as_image(denoise), FLOW, x0.reshape(6, 2, 1, 1), labels, **options)
    assert image.latent.shape == (6, 2, 1, 1)
    np.testing.assert_allclose(image.log_prob, flat.log_prob, rtol=1e-5, atol=1e-4)
    part = ode(KEY, denoise, FLOW, x0[4:5], labels[4:5], rows=Rows(jnp.arange(4, 5), 6), **options)
    np.testing.assert_allclose(part.log_prob, flat.log_prob[4:5], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(flat.log_prob, LAW.log_prob(x0, cond=labels), rtol=3e-3, atol=0.02)


@pytest.mark.slow
def test_gradients_in_float32():
    """Those of the density: the score."""
    x0, denoise = draws(LAW), LAW.denoise(FLOW, "x0")
    gradient = jax.grad(lambda x: ode(KEY, denoise, FLOW, x, num_steps=24, integrator=heun).log_prob.sum())(x0)
    np.testing.assert_allclose(gradient, LAW.score(x0), rtol=0.1, atol=0.3)


NORMAL = GaussianMixture(dims=1, components=1, scale=0.6)
DELTA = 0.5


def standard(x):
    """NORMAL's cumulative coordinate."""
    _, means, covariances = NORMAL.parameters()
    return (x - means[0, 0]) / jnp.sqrt(covariances[0, 0, 0])


def bin_probability(x0):
    cdf = lambda x: 0.5 * (1 + np.vectorize(math.erf)(np.asarray(standard(x)) / math.sqrt(2)))
    return cdf(x0 + DELTA / 2) - cdf(x0 - DELTA / 2)


def exact_noise(keys, x0):
    """Variational dequantisation by the law itself within the bin: then the bound is tight, draw by draw."""
    _, means, covariances = NORMAL.parameters()
    low, high = (jax.scipy.special.ndtr(standard(x0 + side * DELTA / 2)) for side in (-1, 1))
    z = jax.scipy.special.ndtri(low + (high - low) * random.uniform(keys, x0.shape[1:], x0.dtype))
    log_p = -0.5 * z**2 - 0.5 * jnp.log(2 * jnp.pi * covariances[0, 0, 0])
    return means[0, 0] + jnp.sqrt(covariances[0, 0, 0]) * z, log_p - jnp.log(high - low)


@pytest.mark.slow
def test_dequantisation_bounds_the_probability_of_a_bin(x64):
    x0 = jnp.asarray([[-0.5], [0.0], [1.0]])
    options = {"t_range": between(FLOW.schedule, *FAR), "num_steps": 96}
    denoise = NORMAL.denoise(FLOW, "x0")
    tight = ode(KEY, denoise, FLOW, x0, dequantise=exact_noise, **options)
    np.testing.assert_allclose(tight.log_prob, np.log(bin_probability(x0))[:, 0], atol=1e-4)
    assert tight.discrete
    np.testing.assert_allclose(tight.bits_per_dim(), -np.log2(bin_probability(x0))[:, 0], atol=2e-4)
    with pytest.raises(ValueError, match="dequantised"):
        tight.bits_per_dim(0.5)
    many = jnp.repeat(x0, 2000, axis=0)
    found = np.asarray(ode(KEY, denoise, FLOW, many, dequantise=UniformNoise(DELTA), **options).log_prob).reshape(3, -1)
    nodes, weights = np.polynomial.legendre.leggauss(32)
    inside = np.asarray(x0) + DELTA / 2 * nodes
    _, _, covariances = NORMAL.parameters()
    density = np.exp(-0.5 * np.asarray(standard(inside)) ** 2) / np.sqrt(2 * np.pi * float(covariances[0, 0, 0]))
    mean = np.log(density) @ weights / 2 + math.log(DELTA)
    assert (np.abs(found.mean(1) - mean) < 4 * found.std(1) / math.sqrt(2000)).all()
    assert (mean < np.log(bin_probability(x0))[:, 0]).all()


LEVELS, WEIGHTS = (-1.0, 0.1, 0.7), (0.2, 0.5, 0.3)


@dataclasses.dataclass(frozen=True)
class Discrete:
    """The exact denoiser of a law on LEVELS."""

    process: Gaussian

    def __call__(self, xt, t, cond):
        levels = jnp.asarray(LEVELS)
        alpha, sigma = (v(t)[:, None, None] for v in (self.process.schedule.alpha, self.process.schedule.sigma))
        logits = jnp.log(jnp.asarray(WEIGHTS)) - 0.5 * ((xt[..., None] - alpha * levels) / sigma) ** 2
        return Prediction(jax.nn.softmax(logits) @ levels, "x0")


@pytest.mark.slow
@pytest.mark.parametrize("decoder", [binned(LEVELS), discretised(LEVELS)])
def test_with_a_decoder_it_is_the_probability_of_a_level(x64, decoder):
    """Draw by draw, where the low end's noise is far below the spacing of the levels."""
    x0 = jnp.tile(jnp.asarray(LEVELS)[:, None], (2, 1))
    t_range = between(FLOW.schedule, 6.5, FAR[1])
    found = ode(KEY, Discrete(FLOW), FLOW, x0, t_range=t_range, num_steps=256, reconstruction=decoder)
    np.testing.assert_allclose(found.log_prob, np.log(np.tile(WEIGHTS, 2)), atol=1e-4)
    assert found.discrete


@pytest.mark.slow
def test_adaptive_agrees(x64):
    pytest.importorskip("diffrax")
    x0, denoise = draws(LAW), LAW.denoise(FLOW, "x0")
    options = {"t_range": between(FLOW.schedule, *FAR)}
    found = ode(KEY, denoise, FLOW, x0, integrator=Adaptive(1e-8, 1e-8), **options)
    np.testing.assert_allclose(found.log_prob, LAW.log_prob(x0), atol=1e-4)
    loose = ode(KEY, denoise, FLOW, x0, integrator=Adaptive(1e-3, 1e-3), **options)
    np.testing.assert_allclose(loose.log_prob, LAW.log_prob(x0), atol=0.1)
    alone = ode(KEY, denoise, FLOW, x0[:1], integrator=Adaptive(1e-3, 1e-3), **options)
    np.testing.assert_allclose(alone.log_prob, loose.log_prob[:1], rtol=1e-9)
    with pytest.raises(Exception, match="maximum number of solver steps"):
        jax.block_until_ready(ode(KEY, denoise, FLOW, x0, integrator=Adaptive(1e-8, 1e-8, max_steps=2), **options))


@pytest.mark.slow
def test_errors(monkeypatch):
    x0, denoise = draws(LAW, 2), LAW.denoise(FLOW, "x0")
    for options, words in (
        ({"divergence": "trace"}, '"exact" or "hutchinson", got \'trace\''),
        ({"num_probes": 0}, "at least 1, got 0 and 64"),
        ({"num_steps": 0}, "at least 1, got 8 and 0"),
        ({"t_range": (0.5, 0.5)}, "0 <= low < high <= 1"),
        ({"t_range": (0.0, 0.5)}, "infinite at an end"),
        ({"t_range": (0.1, 0.5), "times": [0.5, 0.1]}, "not both"),
        ({"times": [0.1, 0.5]}, "must decrease"),
        ({"dequantise": UniformNoise(0.1), "reconstruction": binned(LEVELS)}, "not both"),
    ):
        with pytest.raises(ValueError, match=words):
            ode(KEY, denoise, FLOW, x0, **options)
    with pytest.raises(ValueError, match=r"Masked has no probability-flow ODE .*; use nelbo"):
        ode(KEY, denoise, Masked(3), x0)
    with pytest.raises(ValueError, match=r"SoftMixture has a new latent at each step.*use nelbo"):
        ode(KEY, denoise, SoftMixture(), x0)
    with pytest.raises(ValueError, match="real numbers, got int32"):
        ode(KEY, denoise, FLOW, x0.astype(jnp.int32))
    with pytest.raises(ValueError, match="width must be positive"):
        UniformNoise(0.0)
    with pytest.raises(ValueError, match="positive tolerances"):
        Adaptive(rtol=0.0)
    with pytest.raises(ValueError, match="width of a bin"):
        ode(KEY, denoise, FLOW, x0, num_steps=1, integrator=heun).bits_per_dim()
    monkeypatch.setitem(sys.modules, "diffrax", None)
    with pytest.raises(ImportError, match=r"pip install 'ddjax\[ode\]'"):
        ode(KEY, denoise, FLOW, x0, integrator=Adaptive())
