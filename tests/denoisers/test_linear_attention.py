"""Linear attention against a loop over pairs of patches, and what a linear DiT inherits."""

import jax
import numpy as np
import pytest
from flax import nnx

from ddjax.denoisers import DiT, TextTransformer, functional_init, inherited, layers

SMALL = {"shape": (4, 6, 2), "patch": 2, "width": 12, "depth": 2, "num_classes": 3}


def test_it_is_the_sum_over_pairs(noise):
    """Every query weighs all values by f(q) . f(k); each feature of a head's values sees its neighbours beside."""
    graphdef, state = nnx.split(layers.LinearAttention(8, 2, (3, 4), rngs=nnx.Rngs(0)))
    layer = nnx.merge(graphdef, noise(nnx.to_pure_dict(state)))
    x = np.random.default_rng(1).normal(size=(2, 12, 8)).astype(np.float32)
    weights = lambda p: np.asarray(p[...], np.float64)
    q, k, v = (x @ weights(layer.qkv.kernel)).reshape(2, 12, 2, 3, 4).transpose(3, 0, 2, 1, 4)  # (batch, head, site, f)
    kernel, y = weights(layer.local.kernel), np.zeros((2, 12, 8))
    assert kernel.shape == (5, 5, 1, 4)  # of one head, for all
    f = lambda a: np.maximum(a, 0) + 1e-6
    for b in range(2):
        for n in range(12):
            for h in range(2):
                w = [f(q[b, h, n]) @ f(k[b, h, m]) / 12 for m in range(12)]
                y[b, n, 4 * h : 4 * h + 4] = sum(w[m] * v[b, h, m] for m in range(12)) / (sum(w) + 1e-6)
            for i in range(-2, 3):
                for j in range(-2, 3):
                    row, column = n // 4 + i, n % 4 + j
                    if 0 <= row < 3 and 0 <= column < 4:
                        y[b, n] += (kernel[i + 2, j + 2, 0] * v[b, :, 4 * row + column]).reshape(-1)
    want = (y + np.tile(weights(layer.local.bias), 2)) @ weights(layer.out.kernel) + weights(layer.out.bias)
    np.testing.assert_allclose(layer(x), want, rtol=0, atol=2e-5 * np.abs(want).max())


def shapes(**options):
    return functional_init(lambda rngs: DiT(**SMALL, **options, rngs=rngs))


def test_it_inherits_all_but_attention(noise):
    teacher, student = shapes(heads=4), shapes(heads=2, attention="linear")
    theirs, own = (
        noise(jax.eval_shape(net.init, jax.random.key(0)), seed=i) for i, net in enumerate((teacher, student))
    )
    new = inherited(own, theirs)
    for path, leaf in jax.tree_util.tree_leaves_with_path(new):
        names = [part.key for part in path]
        source = own if "attention" in names else theirs
        for name in names:
            source = source[name]
        np.testing.assert_array_equal(leaf, source)
    with pytest.raises(ValueError, match=r"the teacher has no stack/blocks/0/attention/local/bias"):
        inherited(own, theirs, but="^$")
    with pytest.raises(ValueError, match=r"the teacher has no embed/kernel \(8, 12\)"):
        inherited(own, {**theirs, "embed": {"kernel": np.zeros((3, 3)), "bias": theirs["embed"]["bias"]}})


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="for the patches of images"):
        functional_init(
            lambda rngs: TextTransformer(
                length=4, symbols_in=3, symbols_out=2, width=8, depth=1, heads=1, attention="linear", rngs=rngs
            )
        )
    with pytest.raises(ValueError, match="heads=5 does not divide"):
        shapes(heads=5, attention="linear")
    init, apply = shapes(heads=2, attention="linear", relations=[[0] * 6])
    xt = jax.ShapeDtypeStruct((1, 4, 6, 2), np.float32)
    with pytest.raises(ValueError, match="sees all patches"):
        jax.eval_shape(lambda p, xt: apply(p, xt, 0.5), jax.eval_shape(init, jax.random.key(0)), xt)
