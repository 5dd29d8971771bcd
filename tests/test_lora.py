"""Adapters: the formula by hand, inside any network, and nothing else learns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ddjax import lora
from ddjax.denoisers import DiT, TextTransformer, UNet, UNetDesign, functional, functional_init, stack_blocks, taps
from ddjax.denoisers.layers import Linear
from ddjax.objectives import elbo
from ddjax.processes import Masked
from ddjax.training import init_state, make_train_step, optimizer

RNG = np.random.default_rng(1)
SMALL = {"length": 6, "symbols_in": 4, "symbols_out": 3, "width": 8, "depth": 2, "heads": 2}
XT, T = RNG.integers(0, 4, (3, 6), np.int32), np.float32([0.1, 0.5, 0.9])
RULES = (r"attention/(qkv|out)/kernel$", "mlp/up/kernel")


def noise(tree, seed=7):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(x.dtype), tree)


def text(dtype=jnp.float64, **options):
    init, apply = functional_init(lambda rngs: TextTransformer(**SMALL, dtype=dtype, **options, rngs=rngs))
    params = noise(jax.eval_shape(init, jax.random.key(0)))
    return apply, jax.tree.map(lambda x: x.astype(dtype), params)


class Lone(nnx.Module):
    """A linear layer as a network."""

    def __init__(self, rngs):
        self.layer = Linear(5, 7, dtype=jnp.float64, rngs=rngs)

    def __call__(self, xt, t, cond=None, *, rng=None, train=False):
        return self.layer(xt)


def test_a_layer_by_the_papers_formula(x64):
    """h = W x + (alpha / r) B A x (Hu et al. 2022, equation 3)."""
    apply, params = functional(Lone(nnx.Rngs(0)))
    params = jax.tree.map(lambda x: x.astype(jnp.float64), noise(params))
    adapted, new = lora.wrap(apply, params, ["kernel"], rank=2, alpha=5.0, key=jax.random.key(1))
    assert jax.tree.map(jnp.shape, new) == {"layer": {"kernel": {"down": (5, 2), "up": (2, 7)}}}
    x, p = RNG.normal(size=(3, 5)), params["layer"]
    np.testing.assert_array_equal(adapted(new, x, None), apply(params, x, None))
    a, b = (RNG.normal(size=size) for size in ((5, 2), (2, 7)))
    out = adapted({"layer": {"kernel": {"down": a, "up": b}}}, x, None)
    np.testing.assert_allclose(out, x @ p["kernel"] + p["bias"] + 5 / 2 * (x @ a) @ b, atol=1e-12)
    down = lora.wrap(
        apply, {"layer": {**p, "kernel": jnp.zeros((400, 300))}}, ["kernel"], rank=8, key=jax.random.key(1)
    )
    assert abs(np.var(down[1]["layer"]["kernel"]["down"]) * 400 - 1) < 0.15


@pytest.mark.slow
def test_a_network_beside_and_merged(x64):
    """What the branch adds inside a running network; then the same from merged weights, and with scanned blocks."""
    apply, params = text()
    adapted, new = lora.wrap(apply, params, RULES, rank=3, alpha=2.0, key=jax.random.key(1))
    assert len(jax.tree.leaves(new)) == 2 * 2 * 3
    np.testing.assert_array_equal(adapted(new, XT, T), apply(params, XT, T))
    new = noise(new, seed=5)
    out = adapted(new, XT, T)
    merged = lora.merge(params, new, 2.0)
    np.testing.assert_allclose(apply(merged, XT, T), out, atol=1e-12)
    # By hand, as a branch beside one layer: the projection of attention, whose input is weights times values.
    one = {"stack": {"blocks": {"0": {"attention": {"out": new["stack"]["blocks"]["0"]["attention"]["out"]}}}}}
    ab = one["stack"]["blocks"]["0"]["attention"]["out"]["kernel"]
    with taps.record("block/0/values", "block/0/attention/weights") as seen:
        apply(params, XT, T)
    x = np.einsum("bhqk,bkhd->bqhd", seen["block/0/attention/weights"], seen["block/0/values"]).reshape(3, 6, 8)
    with taps.override({"block/0/attention": lambda y: y + 2 / 3 * (x @ ab["down"]) @ ab["up"]}):
        by_hand = apply(params, XT, T)
    np.testing.assert_allclose(adapted(one, XT, T), by_hand, atol=1e-12)
    assert np.abs(by_hand - apply(params, XT, T)).max() > 1e-2

    scanned, _ = text(scan=True)
    again, of_stack = lora.wrap(scanned, stack_blocks(params), RULES, rank=3, alpha=2.0, key=jax.random.key(1))
    stacked = stack_blocks(new)
    assert jax.tree.map(jnp.shape, of_stack) == jax.tree.map(jnp.shape, stacked)
    np.testing.assert_allclose(again(stacked, XT, T), out, atol=1e-10)


@pytest.mark.slow
def test_only_adapters_learn():
    apply, params = text(jnp.float32)
    before = jax.tree.map(np.array, params)
    adapted, new = lora.wrap(apply, params, RULES, rank=2, key=jax.random.key(1))
    descent = optimizer("adamw", 1e-2, 10)
    step = jax.jit(make_train_step(elbo(Masked(3), "posterior"), adapted, descent))
    state = init_state(lambda key: new, descent, jax.random.key(2))
    assert jax.tree.structure(state.params) == jax.tree.structure(new)
    for _ in range(2):  # at first only what starts at zero has a gradient
        state, metrics = step(state, {"x0": XT % 3})
    assert np.isfinite(metrics["loss"])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), params, before)
    for path, (old, now) in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda a, b: (a, b), new, state.params), is_leaf=lambda x: isinstance(x, tuple)
    ):
        assert np.abs(np.asarray(now) - old).max() > 1e-4, path


@pytest.mark.slow
def test_experts_have_one_each():
    options = {"mlp": "experts", "experts": {"experts": 4, "top_k": 2}}
    init, apply = functional_init(
        lambda rngs: DiT(shape=(4, 4, 1), width=8, depth=1, heads=2, patch=2, **options, rngs=rngs)
    )
    params = init(jax.random.key(0))
    _, new = lora.wrap(apply, params, ["mlp/up$"], rank=2, key=jax.random.key(1))
    assert new["stack"]["blocks"]["0"]["mlp"]["up"]["down"].shape == (4, 8, 2)
    merged = lora.merge(params, noise(new), 1.0)["stack"]["blocks"]["0"]["mlp"]["up"]
    old, ab = params["stack"]["blocks"]["0"]["mlp"]["up"], noise(new)["stack"]["blocks"]["0"]["mlp"]["up"]
    for e in range(4):
        np.testing.assert_allclose(merged[e], old[e] + 0.5 * ab["down"][e] @ ab["up"][e], atol=1e-5)


@pytest.mark.slow
def test_a_u_nets_convolutions_and_attention(x64):
    """A convolution has an adapter for each pixel of its kernel: what they add, by hand; and all of them learn."""
    options = {"shape": (4, 4, 2), "width": 8, "multipliers": (1, 2), "blocks": 1, "attend_at": (2,)}
    design, wide = UNetDesign(groups=4), jnp.float64
    init, apply = functional_init(lambda rngs: UNet(**options, design=design, dtype=wide, rngs=rngs))
    params = jax.tree.map(lambda x: x.astype(wide), noise(jax.eval_shape(init, jax.random.key(0))))
    x = RNG.normal(size=(3, 4, 4, 2))
    rules = (r"conv_(in|out)/kernel$", r"attention/(qkv|out)/kernel$", r"^final/out/kernel$")
    adapted, new = lora.wrap(apply, params, rules, rank=2, alpha=3.0, key=jax.random.key(1))
    assert new["encoder"]["0"]["conv_in"]["kernel"]["down"].shape == (3, 3, 8, 2)
    assert set(new["middle"]["0"]["attention"]) == {"qkv", "out"}
    np.testing.assert_array_equal(adapted(new, x, T), apply(params, x, T))
    new = noise(new, seed=5)
    one = new["final"]["out"]["kernel"]
    with taps.record("final") as seen:
        plain = apply(params, x, T)
    padded = np.pad(seen["final"], ((0, 0), (1, 1), (1, 1), (0, 0)))
    branch = sum(
        padded[:, i : i + 4, j : j + 4] @ one["down"][i, j] @ one["up"][i, j] for i in range(3) for j in range(3)
    )
    out = adapted({"final": {"out": {"kernel": one}}}, x, T)
    np.testing.assert_allclose(out, plain + 3 / 2 * branch, atol=1e-10)
    assert np.abs(branch).max() > 1e-2
    # Attention's last layer, whose input is weights times values: they are found by queries of one's own.
    pair, p = new["middle"]["0"]["attention"]["out"]["kernel"], params["middle"]["0"]["attention"]
    with taps.record("middle/0", "middle/0/attention") as seen:
        apply(params, x, T)
    h = np.asarray((seen["middle/0"] - seen["middle/0/attention"]).reshape(3, 4, 16))
    normed = h.reshape(3, 4, 4, 4) - h.reshape(3, 4, 4, 4).mean((1, 3), keepdims=True)
    normed = (normed / np.sqrt((normed**2).mean((1, 3), keepdims=True) + 1e-5)).reshape(h.shape)
    qkv = (normed * p["norm"]["scale"] + p["norm"]["bias"]) @ p["qkv"]["kernel"] + p["qkv"]["bias"]
    q, k, v = np.moveaxis(np.asarray(qkv).reshape(3, 4, 3, 16), 2, 0)
    scores = np.exp(q @ k.swapaxes(1, 2) / 4)
    mixed = (scores / scores.sum(-1, keepdims=True) @ v).reshape(3, 2, 2, 16)
    with taps.override({"middle/0/attention": lambda y: y + 3 / 2 * mixed @ pair["down"] @ pair["up"]}):
        by_hand = apply(params, x, T)
    out = adapted({"middle": {"0": {"attention": {"out": {"kernel": pair}}}}}, x, T)
    np.testing.assert_allclose(out, by_hand, atol=1e-10)
    assert np.abs(by_hand - plain).max() > 1e-3
    grads = jax.jit(jax.grad(lambda new: ((adapted(new, x, T) - 1) ** 2).mean()))(new)
    assert jax.tree.structure(grads) == jax.tree.structure(new)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert np.abs(g).max() > 1e-9, path
    np.testing.assert_allclose(apply(lora.merge(params, new, 3.0), x, T), adapted(new, x, T), atol=1e-10)


def test_errors():
    apply, params = text(jnp.float32)
    for rules, rank, message in (
        (["attention", "nowhere"], 2, r"the rules \['nowhere'\] choose no parameter"),
        ([], 2, "choose no parameter"),
        (["bias"], 2, "expected a matrix"),
        (["out/kernel"], 9, "1 <= rank=9 <= its sides"),
        (["out/kernel"], 0, "1 <= rank=0"),
    ):
        with pytest.raises(ValueError, match=message):
            lora.wrap(apply, params, rules, rank=rank, key=jax.random.key(1))
