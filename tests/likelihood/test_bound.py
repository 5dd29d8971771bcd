"""The bound is the entropy where the denoiser is exact, and dearer by the right KL where it is not."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddjax
from ddjax import random
from ddjax.fixtures import Categorical, GaussianMixture, exact_nelbo
from ddjax.likelihood import binned, nelbo
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian, Masked, Uniform
from ddjax.schedules import EDM, VE, CondOT, Cosine, VPCosine, VPLinear

both = pytest.mark.parametrize("kind", [Masked, Uniform])


def whole_range(process, sigma=1e-6):
    """From almost no symbol lost: beyond it lies the total correlation of what two lost sites do."""
    return float(process.schedule.time_of_sigma(jnp.asarray(sigma, float))), 1.0


@both
def test_the_range_moves_nats_between_terms_alone(x64, kind):
    """One site, so that the decoder is exact at any low end."""
    law, process = Categorical(1, 4), kind(4, Cosine())
    ends = (1e-4, 0.05, 0.6)
    bounds = [exact_nelbo(law, law.denoise(process), process, t_range=(low, 1.0), order=32) for low in ends]
    for bound in bounds:
        np.testing.assert_allclose(float(bound.total[0]), law.entropy, atol=1e-6)
    assert bounds[0].reconstruction[0] < 0.01 < 0.05 < bounds[1].reconstruction[0] < bounds[2].reconstruction[0]


def test_a_mislabelled_denoiser_is_dearer(x64):
    """Under uniform noise a posterior read as a cavity is not the optimum."""
    law, process = Categorical(2, 4), Uniform(4)
    denoise = lambda xt, t, cond: Prediction(law.denoise(process, "posterior")(xt, t).value, "cavity")
    bound = exact_nelbo(law, denoise, process, t_range=whole_range(process), order=24)
    assert float(bound.total[0]) > law.entropy + 0.1


def wrong(process):
    """A denoiser that is nobody's, smooth in t."""
    table = jnp.asarray(np.random.default_rng(3).normal(size=(process.num_states, process.num_symbols)))
    return lambda xt, t, cond: Prediction(table[xt] * (1 + t)[:, None, None], "cavity")


@pytest.mark.slow
@both
def test_monte_carlo_agrees_with_the_exact_bound(kind):
    """The estimator that users call, against quadrature, with the wrong denoiser; each term by itself."""
    law, process = Categorical(2, 3), kind(3)
    denoise, batch = wrong(process), 20_000
    x0 = law.sample(random.example_keys(jax.random.key(1), batch))
    estimate = nelbo(jax.random.key(0), denoise, process, x0, num_times=4)
    exact = exact_nelbo(law, denoise, process)
    for name in ("prior", "diffusion", "reconstruction", "total"):
        draws, truth = np.asarray(getattr(estimate, name)), float(getattr(exact, name)[0])
        assert abs(draws.mean() - truth) < 4 * draws.std() / math.sqrt(batch) + 1e-6, name
    assert estimate.t_range == exact.t_range == process.t_range
    np.testing.assert_allclose(estimate.bits_per_dim, np.asarray(estimate.total) / (2 * math.log(2)), rtol=1e-6)


@pytest.mark.slow
def test_rows_and_repeats_are_reproducible():
    law, process = Categorical(2, 3), Masked(3)
    x0 = law.sample(random.example_keys(jax.random.key(1), 6))
    denoise = wrong(process)
    whole = nelbo(jax.random.key(0), denoise, process, x0)
    half = nelbo(jax.random.key(0), denoise, process, x0[4:], rows=ddjax.Rows(jnp.arange(4, 6), 6))
    np.testing.assert_array_equal(whole.total[4:], half.total)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [VPLinear(), VPCosine(), VE(), EDM(), CondOT()], ids=repr)
def test_gaussian_bound_is_minus_log_density(x64, schedule):
    """Exact denoiser of a mixture: NELBO + log p = 0 up to the two ends' widths."""
    law = GaussianMixture(dims=2, components=3)
    process, batch = Gaussian(schedule), 4000
    x0 = law.sample(random.example_keys(jax.random.key(0), batch))
    t_range = tuple(np.clip([float(schedule.time(jnp.asarray(v))) for v in (16.0, -14.0)], 0.0, 1.0))
    bound = nelbo(jax.random.key(1), law.denoise(process, "x0"), process, x0, num_times=32, t_range=t_range)
    gap = np.asarray(bound.total + law.log_prob(x0))
    # VPCosine and VE end early: what is left at t = 0 (VPCosine, VE) and t = 1 (VE, EDM, VPLinear).
    ends = {VPCosine: 0.02, VE: 0.02}.get(type(schedule), 2e-3)
    assert -4 * gap.std() / math.sqrt(batch) < gap.mean() < 4 * gap.std() / math.sqrt(batch) + ends


@dataclasses.dataclass(frozen=True)
class Normal:
    """The exact denoiser of N(0, std^2)."""

    process: Gaussian
    std: float

    def __call__(self, xt, t, cond):
        alpha, sigma = self.process.schedule.alpha(t)[:, None], self.process.schedule.sigma(t)[:, None]
        return Prediction(alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2) * xt, "x0")


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [VPLinear(), EDM(), CondOT()], ids=repr)
def test_gaussian_bound_of_a_gaussian_is_closed_form(x64, schedule):
    """x0 ~ N(0, d^2): the diffusion term is 1/2 int mmse(snr) dsnr with mmse = d^2 / (1 + d^2 snr)."""
    d = 0.7
    process = Gaussian(schedule, data_std=d)
    low, high = (float(schedule.time(jnp.asarray(v))) for v in (8.0, -6.0))
    x0 = d * random.normal(random.example_keys(jax.random.key(0), 20_000), (1,), float)
    bound = nelbo(jax.random.key(1), Normal(process, d), process, x0, num_times=8, t_range=(low, high))
    expected = 0.5 * math.log((1 + d**2 * math.exp(8.0)) / (1 + d**2 * math.exp(-6.0)))
    draws = np.asarray(bound.diffusion)
    assert abs(draws.mean() - expected) < 4 * draws.std() / math.sqrt(len(draws))
    # The prior has data_std's width, so it is the exact marginal: I(x0; x_high).
    np.testing.assert_allclose(bound.prior.mean(), 0.5 * math.log(1 + d**2 * math.exp(-6.0)), rtol=0.05)


LEVELS = (-1.0, 0.1, 0.7)


@dataclasses.dataclass(frozen=True)
class Discrete:
    """The exact denoiser of a law on LEVELS."""

    process: Gaussian
    p: tuple[float, ...]

    def __call__(self, xt, t, cond):
        levels = jnp.asarray(LEVELS)
        alpha, sigma = (v(t)[:, None, None] for v in (self.process.schedule.alpha, self.process.schedule.sigma))
        logits = jnp.log(jnp.asarray(self.p)) - 0.5 * ((xt[..., None] - alpha * levels) / sigma) ** 2
        return Prediction(jax.nn.softmax(logits) @ levels, "x0")


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [VPLinear(), CondOT(), EDM()], ids=repr)
def test_binned_bound_is_a_probability(x64, schedule):
    """With the exact denoiser NELBO(v) = -log p(v); with another, the levels' probabilities sum to less than 1."""
    p, batch = (0.2, 0.5, 0.3), 4000
    process = Gaussian(schedule, data_std=0.6)
    low, high = (float(np.clip(schedule.time(jnp.asarray(v)), 0, 1)) for v in (8.0, -14.0))
    totals = {}
    for name, denoise in (("exact", Discrete(process, p)), ("wrong", Discrete(process, (0.6, 0.2, 0.2)))):
        for n, v in enumerate(LEVELS):
            x0 = jnp.full((batch, 1), v)
            bound = nelbo(
                jax.random.key(n),
                denoise,
                process,
                x0,
                num_times=32,
                t_range=(low, high),
                reconstruction=binned(LEVELS),
            )
            draws = np.asarray(bound.total)
            totals[name, n] = draws.mean()
            if name == "exact":
                assert abs(draws.mean() + math.log(p[n])) < 4 * draws.std() / math.sqrt(batch) + 2e-3
    assert sum(math.exp(-totals["wrong", n]) for n in range(3)) < 1.01
    assert sum(p[n] * totals["wrong", n] for n in range(3)) > 0.1 - sum(q * math.log(q) for q in p)


def test_binned_compares_by_value_and_sees_the_nearest_level():
    assert binned(LEVELS) == binned(list(LEVELS))
    assert hash(binned(LEVELS)) == hash(binned(LEVELS))
    assert binned(LEVELS) != binned((0.0, 1.0))
    process = Gaussian(CondOT())
    x0 = jnp.asarray([[0.1, 0.7000001]])
    nats = binned(LEVELS)(process, x0, None, x0, jnp.asarray([0.05]))
    np.testing.assert_allclose(nats, 0.0, atol=1e-3)


def test_errors():
    law, process = Categorical(1, 3), Masked(3)
    x0 = jnp.zeros((2, 1), int)
    for bad in ({"num_times": 0}, {"t_range": (0.5, 0.5)}, {"t_range": (0.6, 0.5)}, {"t_range": (-0.1, 1.0)}):
        with pytest.raises(ValueError):
            nelbo(jax.random.key(0), law.denoise(process), process, x0, **bad)
    with pytest.raises(ValueError, match="two levels"):
        binned([0.0])
    gaussian = Gaussian(CondOT())
    with pytest.raises(ValueError, match="infinite"):  # once a silent NaN
        nelbo(jax.random.key(0), Normal(gaussian, 1.0), gaussian, jnp.zeros((2, 1)), t_range=(0.0, 0.9))
