import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ddjax import random
from ddjax.denoisers import layers


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def naive_attention(q, k, v):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.empty_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            scores = q[b, :, h] @ k[b, :, h].T / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[b, :, h] = weights / weights.sum(-1, keepdims=True) @ v[b, :, h]
    return out


@pytest.mark.parametrize("implementation", [None, "xla"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2e-2)])
def test_attention_against_numpy(implementation, dtype, tolerance):
    q, k, v = (2 * normal(2, 5, 3, 8, seed=i).astype(dtype) for i in range(3))
    out = layers.dot_product_attention(q, k, v, implementation)
    assert out.dtype == dtype
    np.testing.assert_allclose(np.asarray(out, np.float64), naive_attention(q, k, v), atol=10 * tolerance / 3)


def test_attention_layer_against_numpy():
    layer = layers.Attention(12, 3, rngs=nnx.Rngs(0))
    x = normal(2, 5, 12)
    qkv = np.asarray(x @ layer.qkv.kernel[...]).reshape(2, 5, 3, 3, 4)  # head, then q/k/v
    y = naive_attention(*(qkv[:, :, :, i] for i in range(3))).reshape(2, 5, 12)
    expected = y @ np.asarray(layer.out.kernel[...]) + np.asarray(layer.out.bias[...])
    np.testing.assert_allclose(layer(x), expected, atol=1e-5)


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_scores_are_float32_in_bfloat16(implementation):
    # Scores 257 and 256, halved: bfloat16 cannot tell them apart.
    q = jnp.array([16.0, 1, 0, 0], jnp.bfloat16).reshape(1, 1, 1, 4)
    k = jnp.array([[16.0, 1, 0, 0], [16.0, 0, 0, 0]], jnp.bfloat16).reshape(1, 2, 1, 4)
    v = jnp.array([[1.0] * 4, [0.0] * 4], jnp.bfloat16).reshape(1, 2, 1, 4)
    out = layers.dot_product_attention(q, k, v, implementation).astype(jnp.float32)
    np.testing.assert_allclose(out, 1 / (1 + np.exp(-0.5)), atol=5e-3)


@pytest.mark.slow
def test_block_against_its_formula(noise):
    block = layers.Block(8, 2, mlp="gelu", mlp_width=12, cond_width=4, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(block)
    block = nnx.merge(graphdef, noise(nnx.to_pure_dict(state)))
    h, c = normal(3, 5, 8), normal(3, 4, seed=1)
    vectors = np.asarray(c @ block.modulation.kernel[...] + block.modulation.bias[...]).reshape(3, 6, 1, 8)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = vectors.swapaxes(0, 1)
    x = h + gate_a * block.attention(layers.layer_norm(h) * (1 + scale_a) + shift_a)
    expected = x + gate_m * block.mlp(layers.layer_norm(x) * (1 + scale_m) + shift_m)
    np.testing.assert_allclose(block(h, c), expected, rtol=1e-4, atol=1e-5)


def test_rope_scores_depend_on_differences_only():
    q, k = normal(2, 8)
    places = jnp.broadcast_to(q, (1, 40, 1, 8)), jnp.broadcast_to(k, (1, 40, 1, 8))
    scores = jnp.einsum("bqhd,bkhd->qk", layers.rope(places[0]), layers.rope(places[1]))
    for offset in (-7, 0, 3):
        diagonal = jnp.diagonal(scores, offset)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-4)
    assert abs(scores[0, 0] - scores[0, 3]) > 1e-2
    assert abs(scores[0, 3] - scores[3, 0]) > 1e-2  # the sign of the difference counts


def test_rope_against_complex_rotation():
    x = normal(1, 9, 2, 6)
    pairs = np.asarray(x[..., :3], np.float64) + 1j * np.asarray(x[..., 3:], np.float64)
    angles = np.arange(9)[:, None, None] * 1e4 ** (-np.arange(3) / 3)
    turned = pairs * np.exp(1j * angles)
    np.testing.assert_allclose(layers.rope(x), np.concatenate([turned.real, turned.imag], -1), atol=1e-6)


def test_rope_2d_scores_depend_on_both_differences_only():
    grid = 5, 6
    rows, columns = (x.reshape(-1) for x in np.indices(grid))
    q, k = (jnp.broadcast_to(x, (1, rows.size, 1, 8)) for x in normal(2, 8))
    scores = np.einsum("bqhd,bkhd->qk", *(layers.rope_2d(x, rows, columns) for x in (q, k)))
    down, right = (x[:, None] - x for x in (rows, columns))
    seen = {}
    for difference, score in zip(zip(down.flat, right.flat, strict=True), scores.flat, strict=True):
        seen.setdefault(difference, []).append(score)
    assert len(seen) == 9 * 11
    assert max(np.ptp(values) for values in seen.values()) < 1e-4
    first = np.array([values[0] for values in seen.values()])
    assert np.abs(first[:, None] - first + np.eye(len(first))).min() > 1e-5  # and no two differences are alike


def test_rope_2d_against_its_definition():
    x, (rows, columns) = normal(2, 5, 3, 8), np.random.default_rng(1).integers(20, size=(2, 2, 5))
    found, wanted = layers.rope_2d(x, rows, columns, 100.0), np.zeros(x.shape)
    for b, n, h in np.ndindex(*x.shape[:3]):
        for start, place in ((0, rows[b, n]), (4, columns[b, n])):
            for i in range(2):
                angle = place * 100.0 ** (-2 * i / 4)
                u, v = float(x[b, n, h, start + i]), float(x[b, n, h, start + i + 2])
                wanted[b, n, h, start + i] = u * np.cos(angle) - v * np.sin(angle)
                wanted[b, n, h, start + i + 2] = u * np.sin(angle) + v * np.cos(angle)
    np.testing.assert_allclose(found, wanted, atol=2e-6)
    with pytest.raises(ValueError, match="expected a multiple of 4, not 6"):
        layers.rope_2d(x[..., :6], rows, columns)


def test_time_embedding_separates_times():
    features = np.asarray(layers.time_embedding(jnp.linspace(0, 1, 1001)))
    assert features.shape == (1001, 256)
    gaps = 256 - 2 * features @ features.T  # squared distances
    assert (gaps + 10 * np.eye(1001)).min() > 0.25
    np.testing.assert_allclose((features**2).sum(-1), 128, rtol=1e-5)
    np.testing.assert_allclose(features[500, [0, 128]], [np.cos(500.0), np.sin(500.0)], atol=1e-4)


def test_positions_are_distinct():
    table = layers.sincos_2d(5, 7, 18)
    assert table.shape == (35, 18)
    gaps = np.linalg.norm(table[:, None] - table[None], axis=-1)
    assert (gaps + 10 * np.eye(35)).min() > 0.3


def test_layer_norm_and_modulation():
    x = 5 + 3 * normal(4, 6, 32)
    y = layers.layer_norm(x)
    np.testing.assert_allclose(y.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(y.var(-1), 1, rtol=1e-5)
    assert layers.layer_norm(x.astype(jnp.bfloat16)).dtype == jnp.float32
    shift, scale = normal(2, 4, 32, seed=1)
    np.testing.assert_allclose(layers.modulate(x, shift, scale)[2], y[2] * (1 + scale[2]) + shift[2], rtol=1e-6)


def test_gated_mlp_against_its_formula():
    layer = layers.GatedMLP(4, 6, rngs=nnx.Rngs(0))
    x = normal(3, 4)
    gate, up = x @ layer.gate.kernel[...], x @ layer.up.kernel[...]
    np.testing.assert_allclose(layer(x), (gate / (1 + jnp.exp(-gate)) * up) @ layer.down.kernel[...], rtol=1e-5)


def test_linear_sums_in_its_output_dtype():
    layer = layers.Linear(4096, 1, dtype=jnp.bfloat16, out_dtype=jnp.float32, rngs=nnx.Rngs(0))
    layer.kernel[...] = jnp.ones((4096, 1))
    x = jnp.full((1, 4096), 1.0078125)  # exact in bfloat16; 4128 is not
    assert layer(x)[0, 0] == 4128
    assert layer.kernel[...].dtype == jnp.float32


def test_dropout_keeps_the_mean_and_depends_on_each_examples_key_alone():
    x = jnp.ones((4, 50, 100))
    keys = lambda: random.example_keys(jax.random.key(0), 4)
    y = np.asarray(layers.dropout(x, 0.25, keys()))
    np.testing.assert_allclose(y.mean((1, 2)), 1, atol=4 * np.sqrt(1 / 3 / 5000))
    np.testing.assert_allclose((y == 0).mean(), 0.25, atol=0.02)
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    parts = [layers.dropout(x[rows], 0.25, keys()[rows]) for rows in (slice(0, 1), slice(1, 4))]
    np.testing.assert_array_equal(np.concatenate(parts), y)
    assert (y[0] != y[1]).any()
    assert layers.dropout(x, 0.25, None) is x


def test_labels_are_perturbed_in_training_by_noise_of_a_given_length():
    """Its square sums to label_noise^2 in the mean; each example's by its own key, and none without keys."""
    make = lambda **options: layers.Conditioner(16, num_classes=3, time=False, rngs=nnx.Rngs(0), **options)
    plain, noisy = make(), make(label_noise=2.0)
    labels, keys = jnp.arange(2000) % 3, lambda: random.example_keys(jax.random.key(0), 2000)
    np.testing.assert_array_equal(noisy(2000, None, labels), plain(2000, None, labels))
    # silu is not one to one: the noise is read where labels are far out, and silu is the identity
    noisy.labels[...] = jnp.full((4, 16), 100.0)
    seen = np.asarray(noisy(2000, None, labels, keys=keys())) - 100.0
    assert abs((seen**2).sum(-1).mean() - 4.0) < 5 * 4.0 * np.sqrt(2 / (16 * 2000))
    np.testing.assert_allclose(noisy(7, None, labels[5:12], keys=keys()[5:12]) - 100.0, seen[5:12], atol=1e-4)
    for wrong in ({"num_classes": 0, "label_noise": 1.0}, {"num_classes": 3, "label_noise": -1.0}):
        with pytest.raises(ValueError, match="label_noise"):
            layers.Conditioner(16, time=True, rngs=nnx.Rngs(0), **wrong)


def test_a_latent_joins_the_condition():
    told = layers.Conditioner(8, num_classes=3, time=False, latent=2, rngs=nnx.Rngs(0))
    labels, z = jnp.asarray([0, 2]), jnp.asarray([[1.0, 0.0], [0.5, 2.0]])
    kernel, table = np.asarray(told.latent.kernel[...]), np.asarray(told.labels[...])
    for cond, rows in ((labels, table[[0, 2]]), (None, table[[3, 3]])):
        expected = jax.nn.silu(rows + z @ kernel)
        np.testing.assert_allclose(told(2, None, {"z": z, "cond": cond}), expected, rtol=1e-5)
    for wrong in (labels, {"z": z[:, :1], "cond": labels}):
        with pytest.raises(ValueError, match="a latent"):
            told(2, None, wrong)
