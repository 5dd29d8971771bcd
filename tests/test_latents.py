"""The law of k-subsets against enumeration."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax import random
from ddjax.latents import Encoder, Polynomials, Subsets


def subsets(bits, ones):
    return np.asarray(
        [[float(i in chosen) for i in range(bits)] for chosen in itertools.combinations(range(bits), ones)]
    )


@pytest.mark.parametrize(("bits", "ones"), [(5, 2), pytest.param(4, 1, marks=pytest.mark.slow)])
def test_everything_is_enumeration(x64, bits, ones):
    logits = 2.0 * np.random.default_rng(0).normal(size=(2, bits))
    every = subsets(bits, ones)
    scores = logits @ every.T
    q = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    weights = np.random.default_rng(1).normal(size=bits)

    @jax.jit
    def ours(logits):
        law = Subsets(logits, ones)
        log_q = jnp.stack([law.log_prob(jnp.broadcast_to(jnp.asarray(z), logits.shape)) for z in every], -1)
        through = lambda logits: (Subsets(logits, ones).straight_through(jnp.asarray(every[:2])) @ weights).sum()
        return law.log_normaliser(), law.marginals(), law.kl_from_uniform(), log_q, jax.value_and_grad(through)(logits)

    log_normaliser, marginals, kl, log_q, (value, slopes) = ours(jnp.asarray(logits))
    np.testing.assert_allclose(log_normaliser, np.log(np.exp(scores).sum(-1)), rtol=1e-12)
    np.testing.assert_allclose(marginals, q @ every, rtol=1e-12)
    np.testing.assert_allclose(kl, (q * np.log(q * len(every))).sum(-1), rtol=1e-11)
    np.testing.assert_allclose(log_q, np.log(q), rtol=1e-11)
    # A draw that goes straight through is itself, with the slope of the mean where z enters linearly.
    np.testing.assert_allclose(value, (every[:2] @ weights).sum(), rtol=1e-12)
    centred = every - (q @ every)[:, None]
    np.testing.assert_allclose(slopes, np.einsum("bz,bzi,bzj,j->bi", q, centred, centred, weights), atol=1e-12)


def test_draws_follow_the_law():
    logits = jnp.asarray([1.0, -2.0, 0.5, 0.0], jnp.float32)
    every, n = subsets(4, 2), 20_000
    z = jax.jit(lambda keys: Subsets(jnp.broadcast_to(logits, (n, 4)), 2).sample(keys))(
        random.example_keys(jax.random.key(0), n)
    )
    q = np.exp(every @ np.asarray(logits))
    counts = (np.asarray(z)[:, None] == every).all(-1).sum(0)
    assert counts.sum() == n
    expected = n * q / q.sum()
    assert ((counts - expected) ** 2 / expected).sum() < 25.0  # chi-square of 5 degrees: 1e-4


@pytest.mark.slow
def test_many_bits_are_finite_in_float32():
    """MuLAN's 50 bits with 15 ones; extreme logits and their gradients."""
    rng = np.random.default_rng(0)
    logits = np.stack([np.zeros(50), 3.0 * rng.normal(size=50), 30.0 * rng.permutation(50)]).astype(np.float32)

    @jax.jit
    def run(logits):
        law = Subsets(logits, 15)
        both = lambda logits: Subsets(logits, 15).kl_from_uniform().sum() + Subsets(logits, 15).marginals()[:, 0].sum()
        return law.kl_from_uniform(), jax.grad(both)(logits), law.sample(random.example_keys(jax.random.key(0), 3))

    kl, slopes, z = run(jnp.asarray(logits))
    assert np.isfinite(slopes).all()
    np.testing.assert_allclose(kl[0], 0.0, atol=1e-4)
    np.testing.assert_allclose(kl[2], math.log(math.comb(50, 15)), rtol=1e-3)  # certain of one z
    assert (z.sum(-1) == 15).all()
    np.testing.assert_array_equal(np.sort(np.argsort(logits[2])[-15:]), np.flatnonzero(z[2]))


@pytest.mark.slow
def test_networks_begin_uniform_and_nearly_straight():
    encoder, polynomials = Encoder(6, 8), Polynomials((2, 3), 8)
    x0 = jnp.ones((4, 2, 3))
    assert (encoder(encoder.initial(jax.random.key(0), (2, 3)), x0) == 0).all()
    coefficients = polynomials(polynomials.initial(jax.random.key(0), 6), jnp.eye(6)[:4])
    assert coefficients.shape == (3, 4, 2, 3)
    np.testing.assert_allclose(
        coefficients, np.asarray([0.0, 0.0, 1.0])[:, None, None, None] + 0 * coefficients, atol=0.5
    )
    with pytest.raises(ValueError, match="0 < ones < bits"):
        Subsets(jnp.zeros((2, 3)), 3)
    with pytest.raises(ValueError, match="width"):
        Encoder(3, 0).initial(jax.random.key(0), (2,))
