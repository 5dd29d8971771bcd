"""Lookup-free quantisation, against the enumeration of all codes."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from ddjax.autoencoders import LookupFree
from ddjax.denoisers.layers import TokenBits

RNG = np.random.default_rng(0)


def test_the_entropies_are_those_of_all_codes(x64):
    """Softmax of squared distances to all 2^4 codes, in NumPy."""
    z, temperature = RNG.normal(size=(3, 2, 5, 4)), 1.7
    codes = np.array(list(itertools.product([-1.0, 1.0], repeat=4)))
    distances = ((z.reshape(-1, 1, 4) - codes) ** 2).sum(axis=-1)
    law = scipy.special.softmax(-distances / temperature, axis=1)
    each = scipy.stats.entropy(law, axis=1).mean()
    used = law.mean(axis=0)
    quantiser = LookupFree(4, temperature=temperature)
    np.testing.assert_allclose(quantiser.entropies(jnp.asarray(z)), [each, scipy.stats.entropy(used)], rtol=1e-12)
    # In parts of two bits: the entropies of the marginals of the mean's law.
    pairs = [used.reshape(2, 2, 2, 2).sum(axis=axes).ravel() for axes in ((2, 3), (0, 1))]
    expected = sum(map(scipy.stats.entropy, pairs))
    halves = LookupFree(4, temperature=temperature, joint=2)
    np.testing.assert_allclose(halves.entropies(jnp.asarray(z)), [each, expected], rtol=1e-12)
    assert expected > scipy.stats.entropy(used) + 1e-3

    signs = np.where(z > 0, 1.0, -1.0)
    found = LookupFree(4, temperature=temperature, commitment=0.3, entropy=0.7)(jnp.asarray(z))
    loss = 0.3 * ((z - signs) ** 2).mean() + 0.7 * (each - scipy.stats.entropy(used))
    np.testing.assert_allclose(found.loss, loss, rtol=1e-12)
    np.testing.assert_array_equal(found.value, signs)


def test_gradients_pass_straight_through(x64):
    quantiser = LookupFree(6, groups=2, entropy=0.0)
    z, w = jnp.asarray(RNG.normal(size=(2, 3, 6))), jnp.asarray(RNG.normal(size=(2, 3, 6)))
    np.testing.assert_array_equal(jax.grad(lambda z: jnp.sum(w * quantiser(z).value))(z), w)
    slope = jax.grad(lambda z: quantiser(z).loss)(z)
    np.testing.assert_allclose(slope, 0.25 * 2 * (z - np.sign(z)) / z.size, rtol=1e-12)


def test_the_published_temperature_stays_finite():
    """4 z / 0.01 in float32: most codes have no probability at all. A number of exactly 0 is -1."""
    quantiser, z = LookupFree(8), jnp.asarray(RNG.normal(size=(64, 8)), jnp.float32)
    value, slope = jax.value_and_grad(lambda z: quantiser(z).loss)(z)
    assert np.isfinite(value)
    assert np.isfinite(slope).all()
    np.testing.assert_array_equal(quantiser(0.0 * z).value, -1.0)


def test_bits_are_tokens_and_tokens_are_bits():
    """NumPy's packed bits, and the bits that a network without embeddings is fed."""
    quantiser = LookupFree(6, groups=2)
    assert (quantiser.num_symbols, quantiser.channels) == (8, 6)
    tokens = np.stack(np.meshgrid(np.arange(8), np.arange(8)), axis=-1).astype(np.int32)  # all 64 codes
    values = quantiser.values(jnp.asarray(tokens))
    assert values.shape == (8, 8, 6)
    ones = np.asarray(values).reshape(8, 8, 2, 3) > 0
    np.testing.assert_array_equal(np.packbits(ones, axis=-1, bitorder="little")[..., 0], tokens)
    np.testing.assert_array_equal(quantiser.tokens(0.3 * values), tokens)
    np.testing.assert_array_equal(TokenBits(9, 3, channels=2)(tokens).reshape(values.shape), values)


def test_sizes_that_do_not_divide():
    for message, options in {
        "groups=4 does not divide bits=6": {"groups": 4},
        "joint=5 does not divide": {"joint": 5},
        "temperature must be positive": {"temperature": 0.0},
    }.items():
        with pytest.raises(ValueError, match=message):
            LookupFree(6, **options)
