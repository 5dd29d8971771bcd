"""Truncated discretised logistic outputs against their definition in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax.denoisers import TruncatedLogistic, truncated_logistic_logits


def definition(loc, log_scale, count):
    """Differences of the distribution function, normalised (Austin et al. 2021, A.8)."""
    centres, half = np.linspace(-1.0, 1.0, count), 1.0 / (count - 1)
    f = lambda x: 1.0 / (1.0 + np.exp(-(x - loc) * np.exp(2.0 - log_scale)))
    p = f(centres + half) - f(centres - half)
    return p / p.sum()


@pytest.mark.slow
def test_it_is_the_definition_and_sums_to_one():
    for loc, log_scale, count in ((0.2, 0.5, 7), (-0.9, -0.5, 256), (1.0, 2.0, 2)):
        ours = truncated_logistic_logits(jnp.float32(loc), jnp.float32(log_scale), count)
        np.testing.assert_allclose(np.exp(ours), definition(loc, log_scale, count), rtol=2e-4, atol=1e-9)
        np.testing.assert_allclose(np.exp(ours).sum(), 1.0, rtol=1e-5)
        with jax.enable_x64(True):
            exact = truncated_logistic_logits(jnp.float64(loc), jnp.float64(log_scale), count)
            np.testing.assert_allclose(np.exp(exact), definition(loc, log_scale, count), rtol=1e-9, atol=1e-14)


@pytest.mark.slow
def test_far_bins_keep_their_digits_and_slopes_in_float32():
    """Where a difference of sigmoids is 0 in float32, and in float64: log p(k) falls by sharpness times the bin."""
    count = 256
    ours = np.asarray(truncated_logistic_logits(jnp.float32(-0.9), jnp.float32(-2.0), count), np.float64)
    np.testing.assert_allclose(ours[200] - ours[201], np.exp(4.0) * 2.0 / 255.0, rtol=1e-4)
    assert ours[255] < -90.0

    def worst(pars):
        return truncated_logistic_logits(pars[0], pars[1], count)[255]

    for loc, log_scale in ((-1.0, -5.0), (0.3, -1e3), (0.3, 1e3), (1.0, -60.0)):
        value, slope = jax.value_and_grad(worst)(jnp.asarray([loc, log_scale], jnp.float32))
        assert np.isfinite(value)
        assert np.isfinite(slope).all()
    np.testing.assert_allclose(
        truncated_logistic_logits(jnp.float32(0.3), jnp.float32(1e3), count), -np.log(256.0), rtol=1e-5
    )


def test_a_network_of_two_numbers_becomes_one_of_logits():
    network = lambda params, xt, t, cond, **options: params * jnp.ones((*xt.shape, 2), jnp.float16)
    head = TruncatedLogistic(network, 5)
    xt = jnp.asarray([[0, 2], [4, 5]])  # 5 is a mask
    logits = head(jnp.float16(0.0), xt, jnp.zeros(2), train=True)
    assert logits.shape == (2, 2, 5)
    assert logits.dtype == jnp.float32
    for i, loc in enumerate((np.tanh(-1.0), 0.0, np.tanh(1.0), 0.0)):
        np.testing.assert_allclose(np.exp(logits.reshape(4, 5)[i]), definition(loc, 0.0, 5), rtol=1e-4)
    assert hash(head) == hash(TruncatedLogistic(network, 5))
    with pytest.raises(ValueError, match="outputs"):
        TruncatedLogistic(lambda params, xt, t, cond: xt, 5)(None, xt, None)
    with pytest.raises(ValueError, match="num_symbols"):
        truncated_logistic_logits(jnp.zeros(2), jnp.zeros(2), 1)
