"""Convolutional layers against their definitions, in NumPy loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ddjax.denoisers.layers import Conv, GroupNorm, SpatialAttention, downsample, upsample


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def randomised(module, seed=5):
    """The module with normal weights in float64, and these."""
    graphdef, state = nnx.split(module)
    rng = np.random.default_rng(seed)
    state = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), state)
    return nnx.merge(graphdef, state), jax.tree.map(np.asarray, nnx.to_pure_dict(state))


def padded(x, before, after):
    return np.pad(x, ((0, 0), (before, after), (before, after), (0, 0)))


@pytest.mark.parametrize(("size", "stride", "padding"), [(3, 1, None), (1, 1, None), (3, 2, (0, 1)), (3, 1, (2, 2))])
def test_convolution(x64, size, stride, padding):
    make = Conv(2, 3, size, stride=stride, padding=padding, dtype=jnp.float64, rngs=nnx.Rngs(0))
    conv, weights = randomised(make)
    x = draw(2, 6, 4, 2)
    wide = padded(x, *(padding or (size // 2, size // 2)))
    rows, columns = ((side - size) // stride + 1 for side in wide.shape[1:3])
    expected = np.zeros((2, rows, columns, 3)) + weights["bias"]
    for i in range(rows):
        for j in range(columns):
            window = wide[:, i * stride : i * stride + size, j * stride : j * stride + size]
            expected[:, i, j] += np.einsum("bklc,klco->bo", window, weights["kernel"])
    np.testing.assert_allclose(conv(x), expected, atol=1e-12)


@pytest.mark.parametrize(("groups", "least", "used"), [(4, 1, 4), (4, 6, 2)])
def test_group_norm(x64, groups, least, used):
    norm, weights = randomised(GroupNorm(12, groups=groups, least=least, epsilon=0.1))
    x = draw(2, 3, 5, 12) + 2
    expected = np.empty_like(x)
    for b in range(2):
        for own in np.split(np.arange(12), used):
            part = x[b][..., own]
            expected[b][..., own] = (part - part.mean()) / np.sqrt(part.var() + 0.1)
    np.testing.assert_allclose(norm(x), expected * weights["scale"] + weights["bias"], atol=1e-12)
    with pytest.raises(ValueError, match="5 groups"):
        GroupNorm(12, groups=5)


@pytest.mark.parametrize("weights", [(1, 1), (1, 3, 3, 1), (1, 2, 4, 4, 2, 1)])
def test_resampling(x64, weights):
    f, margin = np.array(weights) / sum(weights), (len(weights) - 1) // 2
    x = draw(2, 6, 4, 3)
    wide, down = padded(x, margin, margin), np.zeros((2, 3, 2, 3))
    up = np.zeros((2, 12 + 2 * margin, 8 + 2 * margin, 3))
    for k in range(len(f)):
        for l in range(len(f)):  # noqa: E741
            down += f[k] * f[l] * wide[:, k : k + 5 : 2, l : l + 3 : 2]
            up[:, k : k + 11 : 2, l : l + 7 : 2] += 4 * f[k] * f[l] * x
    np.testing.assert_allclose(downsample(jnp.asarray(x), weights), down, atol=1e-13)
    up = up[:, margin : up.shape[1] - margin, margin : up.shape[2] - margin]
    np.testing.assert_allclose(upsample(jnp.asarray(x), weights), up, atol=1e-13)
    if weights == (1, 1):
        np.testing.assert_allclose(up, x.repeat(2, axis=1).repeat(2, axis=2))
        np.testing.assert_allclose(down, x.reshape(2, 3, 2, 2, 2, 3).mean((2, 4)))


def test_attention(x64):
    make = SpatialAttention(6, 2, norm=lambda n: GroupNorm(n, groups=3), dtype=jnp.float64, rngs=nnx.Rngs(0))
    attention, weights = randomised(make)
    x = draw(2, 2, 3, 6)
    h = np.asarray(attention.norm(x)).reshape(2, 6, 6)
    qkv = (h @ weights["qkv"]["kernel"] + weights["qkv"]["bias"]).reshape(2, 6, 2, 3, 3)
    expected = np.zeros((2, 6, 6))
    for b in range(2):
        for head in range(2):
            q, k, v = (qkv[b, :, head, i] for i in range(3))
            scores = np.exp(q @ k.T / np.sqrt(3))
            expected[b, :, 3 * head : 3 * head + 3] = scores / scores.sum(1, keepdims=True) @ v
    expected = expected @ weights["out"]["kernel"] + weights["out"]["bias"]
    np.testing.assert_allclose(attention(x), expected.reshape(x.shape), atol=1e-12)


def test_half_precision_sums_in_float32():
    x = jnp.asarray(draw(2, 8, 8, 4) + 100, jnp.bfloat16)
    exact = GroupNorm(4, groups=2)(x.astype(jnp.float32))
    y = GroupNorm(4, groups=2)(x)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, exact, atol=1e-6)
    down = downsample(x)
    assert down.dtype == jnp.bfloat16
    np.testing.assert_array_equal(down, downsample(x.astype(jnp.float32)).astype(jnp.bfloat16))
