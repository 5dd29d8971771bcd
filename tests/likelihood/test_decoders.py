"""DDPM's discretised decoder: a probability over the levels, and the Gaussian's mass on each bin."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax.fixtures import GaussianMixture
from ddjax.likelihood import binned, discretised, nelbo
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian, Geometric, Reflected
from ddjax.schedules import EDM, CondOT

PROCESS, LEVELS = Gaussian(CondOT()), (-1.0, -0.2, 0.1, 0.7)


def nats(decoder, mean, levels=LEVELS, low=0.2):
    """For every pair of a mean (rows) and a level (columns)."""
    x0 = jnp.broadcast_to(jnp.asarray(levels), (len(mean), len(levels)))
    prediction = Prediction(jnp.broadcast_to(jnp.asarray(mean)[:, None], x0.shape), "x0")
    return decoder(PROCESS, x0, prediction, jnp.zeros_like(x0), jnp.full(len(mean), low))


@pytest.mark.slow
@pytest.mark.parametrize("std", [None, 0.3])
def test_it_is_the_integral_of_the_density_over_the_bin(x64, std):
    """By quadrature; its width is sigma / alpha of x_low unless said otherwise."""
    mean, width = np.asarray([-2.0, -0.3, 0.05, 0.9]), 0.2 / 0.8 if std is None else std
    ours = np.exp(-np.asarray(nats(discretised(LEVELS, std), mean)))
    nodes, weights = np.polynomial.legendre.leggauss(60)
    edges = [-8.0, -0.6, -0.05, 0.4, 8.0]
    for j in range(4):
        total = np.zeros(4)
        for piece in np.linspace(edges[j], edges[j + 1], 41)[:-1]:
            half = (edges[j + 1] - edges[j]) / 80
            z = (piece + half + half * nodes[:, None] - mean) / width
            total += half * weights @ np.exp(-0.5 * z**2) / (width * math.sqrt(2 * math.pi))
        np.testing.assert_allclose(ours[:, j], total, rtol=1e-9)
    np.testing.assert_allclose(ours.sum(1), 1.0, rtol=1e-12)


@pytest.mark.slow
def test_far_bins_in_float32():
    """256 levels, from a mean far beyond them: finite, with the right slope, in both tails."""
    levels = np.linspace(-1, 1, 256)
    decoder = discretised(levels, 0.01)
    mean = jnp.asarray([-1.5, -1.0, 0.2, 1.0, 1.5])
    found = nats(decoder, mean, levels)
    slope = jax.grad(lambda mean: nats(decoder, mean, levels).sum())(mean)
    with jax.enable_x64(True):
        mean = jnp.asarray(np.asarray(mean), float)
        truth, steep = nats(decoder, mean, levels), jax.grad(lambda mean: nats(decoder, mean, levels).sum())(mean)
    np.testing.assert_allclose(found, truth, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(slope, steep, rtol=1e-3)
    assert np.asarray(truth).max() > 1e4
    np.testing.assert_allclose(found[0], found[-1][::-1], rtol=1e-3, atol=1e-5)


def test_values_and_errors():
    assert discretised(LEVELS) == discretised(list(LEVELS))
    assert discretised(LEVELS) != discretised(LEVELS, 0.1)
    law, x0 = GaussianMixture(1, 1), jnp.asarray([[0.1], [0.7]])
    bound = nelbo(jax.random.key(0), law.denoise(PROCESS), PROCESS, x0, reconstruction=discretised(LEVELS))
    assert (np.asarray(bound.reconstruction) >= 0).all()
    for levels, std, words in (
        ([0.0], None, "two levels"),
        ([0.0, 1.0, 0.5], None, "increasing levels"),
        ([0.0, 1.0], 0.0, "std must be positive"),
    ):
        with pytest.raises(ValueError, match=words):
            discretised(levels, std)


def test_levels_are_told_by_the_law_of_what_they_become(x64):
    """In the box by images, of logarithms by their normal; the states' own units leave no trace in a probability."""
    levels, x, sigma = np.asarray([0.1, 0.5, 0.9]), np.asarray([[0.02, 0.55, 0.97]]), 0.8
    t, decoder, x0 = jnp.asarray([sigma]), binned(levels), jnp.asarray(levels)[None]

    def chances(log_q):
        q = np.exp(log_q)  # of each site (rows) under each level
        return -np.log(np.diag(q) / q.sum(1))

    images = 2.0 * np.arange(-20, 21) + np.stack([levels, -levels])[..., None]  # (2, levels, images)
    folded = np.log(np.exp(-0.5 * ((x[0][:, None, None, None] - images) / sigma) ** 2).sum((1, 3)))
    ours = decoder(Reflected(EDM(1.0)), x0, None, jnp.asarray(x), t)
    np.testing.assert_allclose(ours[0], chances(folded), rtol=1e-10)
    growth = 0.2
    shift = np.log(x[0])[:, None] - np.log(levels) - (growth - 0.5) * sigma**2
    ours = decoder(Geometric(Gaussian(EDM(1.0)), growth), x0, None, jnp.asarray(x), t)
    np.testing.assert_allclose(ours[0], chances(-0.5 * (shift / sigma) ** 2), rtol=1e-10)
