"""Weights of particles: copies in proportion, weights carried, an evidence that no resampling changes on average."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax import random
from ddjax.particles import effective_sample_size, log_mean, resample, systematic


def keys_of(num, seed=0):
    return random.example_keys(jax.random.key(seed), num)


@pytest.mark.slow
@pytest.mark.parametrize("num", [1, 2, 5])
def test_copies_are_in_proportion(x64, num):
    """Each draw is within one of N W, and the mean over draws is N W."""
    log_weights = np.random.default_rng(num).normal(0, 2, num)
    w = np.exp(log_weights) / np.exp(log_weights).sum()
    ancestors = systematic(keys_of(4000), jnp.broadcast_to(log_weights, (4000, num)))
    counts = (np.asarray(ancestors)[..., None] == np.arange(num)).sum(1)
    assert np.abs(counts - num * w).max() < 1
    # A count takes two values, so its standard error over draws is at most 1/2 / sqrt(4000).
    assert np.abs(counts.mean(0) - num * w).max() < 5 * 0.5 / np.sqrt(4000)
    assert ancestors.dtype == jnp.int32


def test_impossible_particles_have_no_copies():
    log_weights = jnp.asarray([[-jnp.inf, 0.0, -jnp.inf, -1.0, -jnp.inf]] * 200, jnp.float32)
    ancestors = np.asarray(systematic(keys_of(200), log_weights))
    assert set(ancestors.ravel().tolist()) == {1, 3}


def test_the_least_uniform_chooses_no_impossible_particle(monkeypatch):
    monkeypatch.setattr(random, "uniform", lambda keys, dtype: jnp.zeros(keys.shape, dtype))
    assert systematic(keys_of(1), jnp.asarray([[-jnp.inf, 0.0, 0.0, -jnp.inf]])).tolist() == [[1, 1, 2, 2]]


def test_effective_sample_size_and_evidence(x64):
    w = np.random.default_rng(0).gamma(1.0, size=(3, 7))
    np.testing.assert_allclose(effective_sample_size(jnp.log(w)), w.sum(1) ** 2 / (w**2).sum(1), rtol=1e-12)
    np.testing.assert_allclose(log_mean(jnp.log(w)), np.log(w.mean(1)), rtol=1e-12)
    np.testing.assert_allclose(effective_sample_size(jnp.log(jnp.asarray([[1.0, 1.0], [1.0, 0.0]]))), [2.0, 1.0])


@pytest.mark.slow
def test_weights_beyond_any_exponential():
    """Trap 14: exp(lambda r) overflows at 89 in float32; a cut at 1e10 would make these two equal."""
    log_weights = jnp.asarray([[2e6, 2e6 - 1.0, -2e6]], jnp.float32)
    w = np.array([1.0, np.exp(-1.0), 0.0]) / (1.0 + np.exp(-1.0))
    np.testing.assert_allclose(effective_sample_size(log_weights), 1 / (w**2).sum(), rtol=1e-6)
    np.testing.assert_allclose(log_mean(log_weights), 2e6 + np.log1p(np.exp(-1.0)) - np.log(3), rtol=1e-7)
    ancestors = np.asarray(systematic(keys_of(3000), jnp.broadcast_to(log_weights[0], (3000, 3))))
    assert abs((ancestors == 0).mean() - w[0]) < 0.02  # a draw, not the best one over and over
    assert not (ancestors == 2).any()


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_a_tilted_chain_has_its_law_and_evidence(x64, threshold):
    """Trap 14: weights dropped between resamplings would give another law. Three steps of a chain, by enumeration."""
    rng = np.random.default_rng(3)
    start, kernel = rng.dirichlet(np.ones(3)), rng.dirichlet(np.ones(3), size=(2, 3))
    tilt = rng.normal(0, 1.0, (3, 3))  # of each step and state
    z, law = 0.0, np.zeros(3)
    for a, b, c in itertools.product(range(3), repeat=3):
        p = start[a] * kernel[0, a, b] * kernel[1, b, c] * np.exp(tilt[0, a] + tilt[1, b] + tilt[2, c])
        z, law[c] = z + p, law[c] + p
    batch, num = 4000, 8

    @jax.jit
    def run(key):
        keys = random.split(random.example_keys(key, batch), 6)
        draw = jax.vmap(lambda k, logits: jax.random.categorical(k, logits, axis=-1))
        x = draw(keys[0], jnp.broadcast_to(jnp.log(start), (batch, num, 3)))
        log_weights, kept = jnp.zeros((batch, num)), []
        for step in range(3):
            if step:
                x = draw(keys[2 * step], jnp.log(kernel[step - 1])[x])
            log_weights = log_weights + jnp.asarray(tilt)[step][x]
            before = log_weights
            x, log_weights = resample(keys[2 * step + 1], x, log_weights, threshold=threshold)
            kept.append((before == log_weights).all(1).mean())
        return x, log_weights, jnp.stack(kept)

    x, log_weights, kept = map(np.asarray, run(jax.random.key(0)))
    assert (kept == 1.0).all() if threshold == 0 else (kept < 0.9).any() if threshold == 0.5 else (kept < 0.1).all()
    values = np.exp(log_weights)[..., None] * (x[..., None] == np.arange(3))  # unnormalised: unbiased for Z law
    mean, error = values.mean((0, 1)), values.mean(1).std(0) / np.sqrt(batch)
    assert (np.abs(mean - law) < 4.5 * error).all()
    assert (error < 0.05 * law).all()
    evidence = np.exp(log_weights).mean(1)
    assert abs(evidence.mean() - z) < 4.5 * evidence.std() / np.sqrt(batch)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"in \[0, 1\], got 1.5"):
        resample(keys_of(2), jnp.zeros((2, 3)), jnp.zeros((2, 3)), threshold=1.5)
    with pytest.raises(ValueError, match=r"first two axes must be \(2, 3\)"):
        resample(keys_of(2), jnp.zeros((2, 4, 5)), jnp.zeros((2, 3)))
