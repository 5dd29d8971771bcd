"""Reverse steps that are mixtures over a continuous latent: the law of two points, in any number of steps."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import ddjax
from ddjax import random
from ddjax.denoisers import OverDraws
from ddjax.objectives import soft_mixture
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian, SoftMixture
from ddjax.schedules import VPCosine
from ddjax.solvers import FreshLatent

ATOMS, P = np.asarray([-1.0, 1.0]), np.asarray([0.3, 0.7])
GRID = (1.0, 0.6, 0.3)
SOFT = SoftMixture(VPCosine(), latent=1, draws=2)


def low_share(xt, t):
    """p(x0 = -1 | x_t), by Bayes."""
    alpha, sigma = VPCosine().alpha(t)[..., None], VPCosine().sigma(t)[..., None]
    logits = jnp.log(P) - 0.5 * ((xt[..., None] - alpha * ATOMS) / sigma) ** 2
    return jax.nn.softmax(logits)[..., 0]


def by_latent(params, xt, t, cond, **_):
    """A point for each latent: -1 for the lowest eta, in the share that it has."""
    return jnp.where(jax.scipy.stats.norm.cdf(cond["z"]) < low_share(xt, t[:, None]), ATOMS[0], ATOMS[1])


def posterior_mean(params, xt, t, cond, **_):
    return 1.0 - 2.0 * low_share(xt, t[:, None])


@pytest.mark.slow
def test_the_mixture_over_the_latent_is_the_true_step(x64):
    """Draws at the normal's quantiles: the density is that of the two bridges, by their shares, to half a draw."""
    draws, xt, xs = 2000, jnp.asarray([[0.4]]), jnp.asarray([[0.1]])
    s, t = jnp.asarray([0.5]), jnp.asarray([0.8])
    z = jnp.asarray(scipy.stats.norm.ppf((np.arange(draws) + 0.5) / draws))[None, :, None]
    given = SOFT.given(z)
    said = Prediction(OverDraws(by_latent)(None, xt, t, {"z": z, "cond": None}), "x0")
    step = given.reverse(said, xt, s, t)
    share = float(low_share(xt, t[:, None])[0, 0])
    bridges = [Gaussian(VPCosine()).bridge(jnp.full((1, 1), atom), xt, s, t) for atom in ATOMS]
    low, high = (scipy.stats.norm(float(b.mean[0, 0]), float(b.std[0, 0])).pdf(0.1) for b in bridges)
    ours = float(jnp.exp(step.log_prob(xs))[0, 0])
    assert 0.05 < share < 0.95
    assert abs(ours - (share * low + (1 - share) * high)) <= 0.5 / draws * abs(low - high) + 1e-12
    rounded = np.round(share * draws) / draws
    np.testing.assert_allclose(ours, rounded * low + (1 - rounded) * high, rtol=1e-10)


def expected_cost(draws, nodes=161):
    """The objective's expectation for `by_latent` by quadrature over x_t and x_s, and the binomial law of the draws."""
    z, h = np.linspace(-7.0, 7.0, nodes, retstep=True)
    w = h * scipy.stats.norm.pdf(z)
    total, schedule = 0.0, VPCosine()
    for t, s in itertools.pairwise(GRID):
        at, st, a_s, ss = (float(f(jnp.asarray(v))) for v in (t, s) for f in (schedule.alpha, schedule.sigma))
        ratio = at / a_s
        spread = np.sqrt(st**2 - ratio**2 * ss**2)  # of x_t given x_s
        std = ss * spread / st
        for atom, p in zip(ATOMS, P, strict=True):
            xt = at * atom + st * z
            means = [(ratio * ss**2 * xt + a_s * spread**2 * x0) / st**2 for x0 in ATOMS]
            true = (ratio * ss**2 * xt + a_s * spread**2 * atom) / st**2
            xs = true[:, None] + std * z
            q = scipy.stats.norm.pdf(xs, true[:, None], std)
            share = P[0] * scipy.stats.norm.pdf(xt, -at, st)
            share = share / (share + P[1] * scipy.stats.norm.pdf(xt, at, st))
            parts = [scipy.stats.norm.pdf(xs, m[:, None], std) for m in means]
            for k in range(draws + 1):
                chance = scipy.stats.binom.pmf(k, draws, share)
                mixed = (k * parts[0] + (draws - k) * parts[1]) / draws
                total += p * ((w * chance)[:, None] * w * np.log(q / mixed)).sum()
    return total


def costs(draws, apply=by_latent):
    process = SoftMixture(VPCosine(), latent=1, draws=draws)
    x0 = jnp.where(jnp.arange(100) < 30, -1.0, 1.0)[:, None]
    objective = soft_mixture(process, "x0", GRID)
    one = lambda key: objective(key, OverDraws(apply), {}, x0, train=False)[0]
    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(draws), 400))


def test_its_cost_falls_with_the_draws_and_one_draw_is_worse_than_none():
    """The estimate's mean is the quadrature's; a latent that only adds spread costs more than the posterior mean."""
    exact = {draws: expected_cost(draws) for draws in (1, 4)}
    for draws, value in exact.items():
        found = np.asarray(costs(draws), np.float64)
        assert abs(found.mean() - value) < 4 * found.std() / np.sqrt(len(found))
    assert exact[1] > exact[4] > expected_cost(16) > 0
    mean = np.asarray(costs(1, posterior_mean), np.float64)
    assert mean.mean() + 4 * mean.std() / np.sqrt(len(mean)) < exact[1]


@pytest.mark.slow
def test_two_steps_sample_the_points():
    """With a new latent at each step: samples are the points, in their shares, wherever the first step went."""
    n, times = 4000, jnp.asarray([1.0, 0.5, 0.02])
    denoise = ddjax.bind(OverDraws(by_latent), {}, SOFT, "x0")
    drawn = ddjax.sample(jax.random.key(1), denoise, SOFT, shape=(n, 1), solver=FreshLatent(SOFT), times=times)
    assert (np.abs(np.abs(drawn.x0) - 1.0) < 6 * 0.044).all()
    assert abs(float((drawn.x0 > 0).mean()) - 0.7) < 4.5 * np.sqrt(0.21 / n)
    assert (drawn.nfe == 2).all()


@pytest.mark.slow
def test_each_row_has_draws_of_its_own():
    seen = []

    def spy(params, xt, t, cond, **_):
        seen.append(np.asarray(cond["z"]))
        return xt

    objective = soft_mixture(SOFT, "x0", GRID)
    for rows in (jnp.arange(3), jnp.arange(1, 3)):
        objective(jax.random.key(0), spy, {}, jnp.zeros((len(rows), 1)), rows=ddjax.Rows(rows, 3))
    whole, part = seen
    assert len(np.unique(whole)) == whole.size == 6
    np.testing.assert_array_equal(part, whole[1:])


def test_errors_say_what_is_wrong():
    for wrong in ({"latent": 0}, {"draws": 0}):
        with pytest.raises(ValueError, match="latent and draws must be at least 1"):
            SoftMixture(VPCosine(), **wrong)
    with pytest.raises(ValueError, match=r"FreshLatent is for processes\.SoftMixture, got Gaussian"):
        FreshLatent(Gaussian(VPCosine()))
    with pytest.raises(ValueError, match=r"soft_mixture is for processes\.SoftMixture, got Gaussian"):
        soft_mixture(Gaussian(VPCosine()), "x0", GRID)
    with pytest.raises(ValueError, match="is told draws of a latent"):
        OverDraws(by_latent)({}, jnp.zeros((1, 1)), jnp.ones(1), {"z": jnp.zeros((1, 1)), "cond": None})
    z = SOFT.latents(3).sample(random.example_keys(jax.random.key(0), jnp.arange(3)))
    assert z.shape == (3, 2, 1)
    np.testing.assert_array_equal(SOFT.posterior(jnp.zeros((3, 5))).kl_from_uniform(), np.zeros(3))
