"""Condition-aware networks: each example's network is the plain one with that example's weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ddjax.denoisers import DiT, UViT, functional_init, layers, taps
from ddjax.denoisers.layers.generated import with_weights

DIT = {"shape": (4, 6, 2), "patch": 2, "width": 8, "depth": 2, "heads": 2, "num_classes": 3, "cond_width": 6}
UVIT = {"shape": (4, 6, 2), "patch": 2, "width": 8, "depth": 3, "heads": 2, "num_classes": 3, "generated": True}
NETWORKS = {
    "dit": (DiT, {**DIT, "conditioning": "weights"}),
    "dit-modulated": (DiT, {**DIT, "conditioning": "modulation+weights"}),
    "uvit": (UViT, UVIT),
    "dit-selected": (DiT, {**DIT, "conditioning": "weights", "kernels": 3}),
    "uvit-selected": (UViT, {**UVIT, "kernels": 3}),
}


def inputs():
    rng = np.random.default_rng(1)
    return rng.normal(size=(3, 4, 6, 2)).astype(np.float32), np.float32([0.1, 0.9, 0.5]), np.int32([0, 3, 2])


def close(a, b, tolerance=2e-5):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


def test_a_linear_layer_for_each_example(x64):
    layer = layers.GeneratedLinear(3, 4, 5, dtype=jnp.float64, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    x, c, made = rng.normal(size=(2, 6, 7, 3)), rng.normal(size=(2, 5)), rng.normal(size=(5, 12))
    layer.generator.weights.kernel[...] = made
    layer.linear.bias[...] = rng.normal(size=4)
    made, kernel, bias = (
        np.asarray(v[...], np.float64) for v in (layer.generator.weights.kernel, layer.linear.kernel, layer.linear.bias)
    )
    want = [x[i] @ (kernel + (c[i] @ made).reshape(3, 4)) + bias for i in range(2)]
    np.testing.assert_allclose(layer(jnp.asarray(x), jnp.asarray(c)), want, rtol=1e-9)
    np.testing.assert_array_equal(with_weights(layer.linear, jnp.asarray(x), None), layer.linear(jnp.asarray(x)))


def test_a_mixture_of_base_kernels_for_each_example(x64):
    """Adaptive kernel selection: sum_i softmax(A c + b)_i K_i, K_i the layer's own weights and the i-th beside them."""
    layer = layers.GeneratedLinear(3, 4, 5, kernels=3, dtype=jnp.float64, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    x, c, beside = rng.normal(size=(2, 6, 7, 3)), rng.normal(size=(2, 5)), rng.normal(size=(3, 3, 4))
    choose = layer.generator.choose
    layer.generator.weights.kernel[...], choose.bias[...] = beside.reshape(3, 12), rng.normal(size=3)
    layer.linear.bias[...] = rng.normal(size=4)
    own, bias, a, b, beside = (
        np.asarray(v[...], np.float64)
        for v in (layer.linear.kernel, layer.linear.bias, choose.kernel, choose.bias, layer.generator.weights.kernel)
    )
    bases = own + beside.reshape(3, 3, 4)
    shares = np.exp(c @ a + b)
    shares = shares / shares.sum(-1, keepdims=True)
    want = [x[i] @ sum(shares[i, n] * bases[n] for n in range(3)) + bias for i in range(2)]
    np.testing.assert_allclose(layer(jnp.asarray(x), jnp.asarray(c)), want, rtol=1e-9)
    assert np.abs(shares - 1 / 3).max() > 0.1


@pytest.mark.parametrize("grid", [(5,), (3, 4), (2, 3, 2)])
def test_a_depthwise_convolution_for_each_example(x64, grid):
    """Site by site: the sum over its neighbours on the grid of their features times the kernel at their difference."""
    layer = layers.GeneratedDepthwise(2, grid, 3, dtype=jnp.float64, rngs=nnx.Rngs(0))
    rng, n = np.random.default_rng(0), int(np.prod(grid))
    x, c = rng.normal(size=(2, n, 2)), rng.normal(size=(2, 3))
    made = rng.normal(size=(3, 2 * 3 ** len(grid)))
    layer.generator.weights.kernel[...], layer.bias[...] = made, rng.normal(size=2)
    weights = (layer.generator.weights.kernel, layer.kernel, layer.bias)
    made, own, bias = (np.asarray(v[...], np.float64) for v in weights)
    places = list(np.ndindex(*grid))
    want = np.zeros(x.shape) + bias
    for b in range(2):
        kernel = (own + (c[b] @ made).reshape(own.shape)).reshape(*(3,) * len(grid), 2)
        for i, place in enumerate(places):
            for j, other in enumerate(places):
                difference = np.subtract(other, place) + 1
                if ((difference >= 0) & (difference < 3)).all():
                    want[b, i] += x[b, j] * kernel[tuple(difference)]
    np.testing.assert_allclose(layer(jnp.asarray(x), jnp.asarray(c)), want, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_each_example_has_a_network_of_its_own(name, noise, jit):
    """The same without a condition in the weights, for each example those weights put in."""
    kind, options = NETWORKS[name]
    init, apply = functional_init(lambda rngs: kind(**options, rngs=rngs))
    params = noise(jax.eval_shape(init, jax.random.key(0)))
    xt, t, labels = inputs()
    with taps.record("condition") as seen:
        whole = apply(params, xt, t, labels)
    c = np.asarray(seen["condition"])
    if kind is UViT:
        c = c.sum(axis=1)
        c = c / (1 + np.exp(-c))

    def fixed(tree, c, shared):
        """Without generators, what they make added to the weights beside them."""
        if not isinstance(tree, dict):
            return tree
        tree = {k: fixed(v, c, shared) for k, v in tree.items()}
        if "generator" in tree:
            made = made_of(tree["generator"], c)
            own = tree["linear"]["kernel"] if "linear" in tree else tree["kernel"]
            made = made.reshape(own.shape)
            if "linear" in tree:
                tree["linear"] = {**tree["linear"], "kernel": own + made}
            else:
                tree["kernel"] = own + made
            tree["generator"] = jax.tree.map(np.zeros_like, tree["generator"])
        if "attention" in tree:
            out = tree["attention"]["out"]
            tree["attention"] = {**tree["attention"], "out": {**out, "kernel": out["kernel"] + shared}}
        return tree

    run = jit(apply)
    for i in range(3):
        width = options["width"]
        shared = made_of(params["projection"], c[i]).reshape(width, width)
        own = fixed({k: v for k, v in params.items() if k != "projection"}, c[i], shared)
        own["projection"] = jax.tree.map(np.zeros_like, params["projection"])
        close(run(own, xt[i : i + 1], t[i : i + 1], labels[i : i + 1])[0], whole[i])


def made_of(generator, c):
    if "choose" in generator:
        c = np.exp(c @ generator["choose"]["kernel"] + generator["choose"]["bias"])
        c = c / c.sum()
    return c @ np.asarray(generator["weights"]["kernel"])


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_a_new_network_is_told_nothing_by_its_weights(name, noise, jit):
    """Generators start at zero, and learn: their gradients are not."""
    kind, options = NETWORKS[name]
    init, apply = functional_init(lambda rngs: kind(**options, rngs=rngs))
    started = init(jax.random.key(0))
    params = noise(started)
    zero = jax.tree_util.tree_map_with_path(
        lambda path, p, s: s if "weights" in jax.tree_util.keystr(path) else p, params, started
    )
    generators = lambda tree: {
        jax.tree_util.keystr(path): v
        for path, v in jax.tree_util.tree_leaves_with_path(tree)
        if "weights" in jax.tree_util.keystr(path)
    }
    assert all(np.abs(v).max() == 0 for v in generators(zero).values())
    grads = generators(jit(jax.grad(lambda p: (apply(p, *inputs()) ** 2).sum()))(zero))
    # The first layer, attention's, and a convolution for each block.
    assert len(grads) == 2 + options["depth"]
    assert all(np.abs(v).max() > 0 for v in grads.values())


@pytest.mark.parametrize(
    "change",
    [{"mlp": "gated"}, {"route": (0, 1, 0.5)}, {"downsample": 2}, {"relations": [[0] * 6]}, {"merge": (4, 2, 2)}],
    ids=str,
)
def test_what_cannot_be_is_refused(change):
    with pytest.raises(ValueError, match="conditioning='weights'"):
        functional_init(lambda rngs: DiT(**{**DIT, "conditioning": "weights", **change}, rngs=rngs))


def test_kernels_are_chosen_where_weights_are_made():
    for kind, options, message in (
        (DiT, {**DIT, "kernels": 3}, "conditioning='weights'"),
        (UViT, {**UVIT, "generated": False, "kernels": 3}, "generated=True"),
        (DiT, {**DIT, "conditioning": "weights", "kernels": 1}, "2 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            functional_init(lambda rngs, kind=kind, options=options: kind(**options, rngs=rngs))
