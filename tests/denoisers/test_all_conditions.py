"""Every network with all that it can be told; the transformer also: gradients, options, rows, devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ddjax.denoisers import (
    EDM2,
    UNET_DESIGNS,
    DiCo,
    DiffiT,
    DiffuSSM,
    DiT,
    GraphTransformer,
    InfDiT,
    MixedTable,
    MultiResolution,
    StateSpace,
    TabularMLP,
    TextTransformer,
    UNet,
    UNetDesign,
    UViT,
    functional_init,
    nulls,
    stack_blocks,
)
from ddjax.objectives import with_condition_dropout
from ddjax.training.mesh import make_mesh, state_shardings

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(2)
CONFIG = {
    "shape": (4, 4, 2), "patch": 2, "width": 16, "depth": 2, "heads": 2, "num_classes": 3, "latent": 2, "vector": 5,
    "context_width": 6, "image_channels": 1,
}  # fmt: skip
X, T = RNG.normal(size=(4, 4, 4, 2)).astype(np.float32), np.float32([0.1, 0.4, 0.7, 0.9])
VALID = np.array([[1, 1, 0], [0, 0, 1], [0, 0, 0], [1, 1, 1]], bool)
FLOATS = {"z": (4, 2), "vector": (4, 5), "sequence": (4, 3, 6), "image": (4, 4, 4, 1)}
COND = {name: RNG.normal(size=shape).astype(np.float32) for name, shape in FLOATS.items()}
COND |= {"valid": VALID, "cond": np.int32([2, 0, 3, 1])}


@functools.cache
def network(**more):
    init, apply = functional_init(lambda rngs: DiT(**CONFIG, **more, rngs=rngs))
    rng = np.random.default_rng(7)
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(x.dtype), shapes), apply


@functools.cache
def value_and_grad():
    params, apply = network()
    return jax.jit(jax.value_and_grad(loss(apply), has_aux=True))(params)


def loss(apply, x=X, t=T, cond=COND):
    def value(params):
        out = apply(params, x, t, cond)
        return ((out - 1) ** 2).mean(), out

    return value


def close(a, b, tolerance=2e-5):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


def test_gradients_reach_every_parameter():
    for path, g in jax.tree_util.tree_leaves_with_path(value_and_grad()[1]):
        assert np.isfinite(g).all(), path
        assert np.abs(g).max() > 1e-6, path


@pytest.mark.parametrize("more", [{"scan": True}, {"remat": True}, {"scan": True, "remat": "dots"}], ids=str)
def test_options_that_change_nothing(more):
    params, apply = network(**more)
    plain = network()[0]
    params = stack_blocks(plain) if "scan" in more else plain
    (_, out), grads = jax.jit(jax.value_and_grad(loss(apply), has_aux=True))(params)
    (_, expected), same = value_and_grad()
    close(out, expected)
    jax.tree.map(lambda a, b: close(a, b, 1e-4), grads, stack_blocks(same) if "scan" in more else same)


def test_rows_vmap_and_bfloat16():
    params, apply = network()
    expected = np.asarray(value_and_grad()[0][1])
    for i in (0, 2):
        row = jax.tree.map(lambda c, i=i: c[i : i + 1], (X, T, COND))
        close(jax.jit(apply)(params, *row)[0], expected[i])
    halves = jax.tree.map(lambda c: c.reshape(2, 2, *c.shape[1:]), (X, T, COND))
    close(np.concatenate(jax.jit(jax.vmap(apply, in_axes=(None, 0, 0, 0)))(params, *halves)), expected)
    _, half = network(dtype=jnp.bfloat16)
    out = jax.jit(half)(params, X, T, COND)
    assert out.dtype == jnp.float32
    assert 1e-4 < np.abs(out - expected).max() / np.abs(expected).max() < 0.15


# Each network with all the entries of a condition that it takes beside labels, by the options that let it.
IMAGES, TOKENS = {"shape": (4, 4, 2)}, {"symbols_in": 6, "symbols_out": 5}
BOTH, SEEN = {"vector": 5, "image_channels": 1}, {"context_width": 6}
SMALL = {"width": 16, "heads": 2}
U = {"width": 16, "multipliers": (1, 2), "blocks": 1, "attend_at": (2,)}
LATENT = {"heads": 2, "transformer_depth": 2}
UP = {**SMALL, "depth": 2, "scale": 1, "patch": 1, "low_patch": 1, "block": 2}
MD4 = dataclasses.replace(UNET_DESIGNS["md4_transformer"], groups=4)
WAIST = {**IMAGES, "width": 16, "multipliers": (1, 2), "blocks": 1, "design": MD4}
TEXT = {"length": 8, **TOKENS, **SMALL, "depth": 2, "vector": 5, **SEEN}
GRAPH = {"edge_width": 8, "global_width": 8, "depth": 2, "hidden": (8, 8, 8), "feed_forward": (8, 8, 8), "vector": 5}
ROWS = {"width": 16, "hidden": (16, 16), "vector": 5}
NETWORKS = {
    "dit": (DiT, CONFIG),
    "unet": (UNet, {**IMAGES, **U, **BOTH, **SEEN, "latent": 2, "heads": 2, "design": UNetDesign(groups=4)}),
    "unet-tokens": (UNet, {**IMAGES, **TOKENS, **U, **BOTH, "design": "ncsn++"}),
    "unet-transformer": (UNet, {**WAIST, **BOTH, **SEEN, "transformer": {**SMALL, "depth": 1}}),
    "unet-scan": (UNet, {**IMAGES, **U, **BOTH, **SEEN, "blocks": 3, "scan": True, "design": UNetDesign(groups=4)}),
    "unet-remat": (UNet, {**IMAGES, **U, **BOTH, **SEEN, "remat": True, "design": UNetDesign(groups=4)}),
    "unet-latent": (UNet, {**IMAGES, **U, **BOTH, **SEEN, **LATENT, "design": UNetDesign(groups=4)}),
    "edm2": (EDM2, {**IMAGES, **U, **BOTH, **SEEN, "head_width": 8}),
    "edm2-scan": (EDM2, {**IMAGES, **U, **BOTH, **SEEN, "head_width": 8, "blocks": 3, "scan": True}),
    "dico": (DiCo, {**IMAGES, "width": 8, "stages": ("c", "a", "c"), "head_width": 8, **BOTH, **SEEN}),
    "uvit": (UViT, {**IMAGES, **SMALL, "depth": 3, "patch": 2, **BOTH, "context": (3, 6)}),
    "state-space": (
        StateSpace,
        {**IMAGES, "width": 16, "depth": 3, "patch": 2, "state": 4, **BOTH, **SEEN, "heads": 2},
    ),
    "multi-resolution": (
        MultiResolution,
        {**IMAGES, "widths": (16, 8), "depths": (3, 3), "heads": 2, **BOTH, **SEEN},
    ),
    "diffit": (DiffiT, {**IMAGES, **SMALL, "multipliers": (1, 2), "blocks": 1, **BOTH, **SEEN}),
    "diffussm": (DiffuSSM, {**IMAGES, **TOKENS, **SMALL, "depth": 2, "state": 4, **BOTH, **SEEN}),
    "diffussm-scan": (DiffuSSM, {**IMAGES, **SMALL, "depth": 2, "state": 4, **BOTH, **SEEN, "scan": True}),
    "inf-dit": (InfDiT, {**IMAGES, **UP, **BOTH, **SEEN}),
    "inf-dit-in-turn": (InfDiT, {**IMAGES, **UP, **BOTH, **SEEN, "in_turn": True}),
    "text": (TextTransformer, TEXT),
    "text-block": (TextTransformer, {**TEXT, "block": 4, "conditioner": "md4"}),
    "text-plain": (TextTransformer, {**TEXT, "vector": 0, "modulated": False, "time": False}),
    "graph": (GraphTransformer, {"nodes": 4, **TOKENS, **GRAPH, **SMALL}),
    "graph-sizes": (GraphTransformer, {"nodes": 4, "sizes": True, **TOKENS, **GRAPH, **SMALL}),
    "tabular": (TabularMLP, {"columns": 6, **ROWS}),
    "mixed-table": (MixedTable, {"parts": {"numbers": (4, None, 4), "a": (2, 5, 4)}, **ROWS}),
}
every = pytest.mark.parametrize("name", NETWORKS)
COUNTS = {"z": "latent", "vector": "vector", "sequence": "context_width", "image": "image_channels"}


def entries(name):
    """The condition of a network."""
    options = NETWORKS[name][1]
    taken = [entry for entry, option in COUNTS.items() if options.get(option)]
    taken += ["sequence"] * ("context" in options)
    taken += ["valid"] * ("sequence" in taken) + ["cond"] * options.get("modulated", True)
    return {entry: COND[entry] for entry in taken}


@functools.cache
def told(name):
    """`run(cond)`, the network of random weights at one state, all outputs of an example in a row."""
    kind, options = NETWORKS[name]
    labels = {"num_classes": 3} if options.get("modulated", True) else {}
    init, apply = functional_init(lambda rngs: kind(**{**options, **labels}, rngs=rngs))
    rng, shapes = np.random.default_rng(7), jax.eval_shape(init, jax.random.key(0))
    params = jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(x.dtype), shapes)
    xt = rng.normal(size=(4, *options.get("shape", (options.get("length", 6),)))).astype(np.float32)
    xt = (np.abs(10 * xt) % 6).astype(np.int32) if "symbols_in" in options else xt
    xt = {"numbers": xt[:, :4], "a": (np.abs(10 * xt[:, 4:]) % 5).astype(np.int32)} if "parts" in options else xt

    def row(cond):
        if "sizes" in options:
            cond = {"size": np.int32([2, 3, 4, 4]), **(cond if isinstance(cond, dict) else {"cond": cond})}
        y = apply(params, xt, T, cond)
        return jnp.concatenate([part.reshape(4, -1) for part in jax.tree.leaves(y)], axis=-1)

    return jax.jit(row)


@every
def test_each_entry_is_heard_in_its_own_example(name):
    run, cond = told(name), entries(name)
    assert len(cond) > 1 or name == "text-plain"
    expected = run(cond)
    for entry, value in cond.items():
        other = {"valid": ~value if entry == "valid" else value, "cond": np.int32([1, 0, 3, 1])}.get(entry)
        other = np.concatenate([(value[:1] + 1) if other is None else other[:1], value[1:]])
        out = run({**cond, entry: other})
        assert np.abs(out[0] - expected[0]).max() > 1e-3 * np.abs(expected).max(), entry
        np.testing.assert_array_equal(out[1:], expected[1:])


@every
def test_none_is_null(name):
    """An entry of None, all left out, and the nulls are one thing; condition dropout by name puts them there."""
    run, cond = told(name), entries(name)
    null = nulls(cond, 3)
    assert null.keys() == cond.keys() - {"z", "sequence"}
    seen = lambda key, apply, params, x0, cond=None, *_: cond
    for entry in null:
        dropped = with_condition_dropout(seen, {entry: 1.0}, null)(jax.random.key(0), None, None, T, cond)
        assert {other for other in cond if np.any(dropped[other] != cond[other])} == {entry}
        gone = {entry, "sequence"} if entry == "valid" else {entry}
        without = {other: None if other in gone else value for other, value in cond.items()}
        out = run(dropped)
        close(out, run(without))
        assert np.abs(out - run(cond)).max() > 1e-3 * np.abs(out).max()
    nothing = {entry: np.full_like(value, null[entry]) for entry, value in cond.items() if entry in null}
    if "z" not in cond:  # a latent is no condition
        close(run({**cond, **nothing}), run(None))


@every
def test_entries_that_are_not_there_are_not_seen(name):
    run, cond = told(name), entries(name)
    if "valid" not in cond:
        return
    hidden = np.where(VALID[..., None], cond["sequence"], 7)
    np.testing.assert_array_equal(run({**cond, "sequence": hidden}), run(cond))
    alone = {**cond, "valid": VALID | True}
    assert np.abs(run({**alone, "sequence": hidden}) - run(alone))[:3].max() > 1e-3


@every
def test_what_does_not_fit_is_refused_by_name(name):
    run, cond = told(name), entries(name)
    for entry in cond.keys() - {"cond"}:
        with pytest.raises(ValueError, match="latent" if entry == "z" else rf'cond\["{entry}"\] has shape'):
            jax.eval_shape(run, {**cond, entry: cond[entry][..., :1].repeat(9, axis=-1)})
    for entry in FLOATS.keys() - cond.keys():
        with pytest.raises(ValueError, match=rf'cond\["{entry}"\] was given but the network takes none: build it with'):
            jax.eval_shape(run, {**cond, entry: COND[entry]})
    with pytest.raises(ValueError, match=r"cond has entries words"):
        jax.eval_shape(run, {**cond, "vector": None, "words": 1})


def test_a_sequence_needs_a_block_that_attends():
    design = UNetDesign(groups=4, middle_attention=False)
    with pytest.raises(ValueError, match="context_width=6: blocks that attend look at a sequence, and none attends"):
        UNet(**{**IMAGES, **U, **SEEN, "attend_at": ()}, design=design, rngs=nnx.Rngs(0))


@pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 (fake) devices")
def test_eight_devices_are_one_network():
    params, apply = network()
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    shardings = state_shardings({"params": params}, mesh, fsdp_min_size=64)["params"]
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        spec = functools.reduce(lambda tree, key: tree[key.key], path, shardings).spec
        assert x.size < 2**9 or any(spec), path
    with jax.set_mesh(mesh):
        out = jax.jit(apply)(jax.device_put(params, shardings), X, T, COND)
        close(np.asarray(out), value_and_grad()[0][1])
