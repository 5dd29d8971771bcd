"""A side network beside every network: at first nothing, then the published sum, by hand; and adapters on each.

All weights are random, those that start at zero too. What a side network of DiTs and U-Nets does besides is in
`test_control`, what adapters do inside a layer in `tests/test_lora`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_all_networks import GRAPH, NETWORKS, TABLE, TOKENS, classes, close, every, inputs, network

from ddjax import auxiliary, lora
from ddjax.denoisers import (
    EDM2,
    DiCo,
    DiffiT,
    DiffuSSM,
    DiT,
    GraphTransformer,
    InfDiT,
    LowRankGaussian,
    MixedTable,
    MultiResolution,
    NeuralProcess,
    StateSpace,
    TabularMLP,
    TextTransformer,
    UNet,
    UNetEncoder,
    UViT,
    functional_init,
    taps,
)
from ddjax.denoisers.control import attach

CHANNELS = 3
RNG = np.random.default_rng(11)
PARTED = {f"symbols_{end}": {"nodes": 6, "edges": 6 - (end == "out")} for end in ("in", "out")}
# Beside those of `NETWORKS`, and in the place of the rows of numbers that some of them take there.
MORE = {
    "mixed-table": (MixedTable, {"parts": TABLE, "width": 16, "hidden": (32, 32)}),
    "graph-sizes": (GraphTransformer, {"nodes": 4, "sizes": True, **PARTED, **GRAPH}),
    "graph-typed": (GraphTransformer, {"nodes": 4, "typed": True, **TOKENS, **GRAPH}),
    "multi-resolution-pooled": (
        MultiResolution,
        {**NETWORKS["multi-resolution"][1], "patches": (2, 1), "pools": (2, 1), "output_heads": True},
    ),
}
REFUSED = ("low-rank", "classifier")
# Rows of `NETWORKS` that are to a side what another row is.
LIKE = ("dit-linear", "dit-rotary", "dit-published", "dit-selected", "diffit-latent", "dit-experts", "edm2")
LIKE += ("dico-attention", "dico-fused", "text-mdlm", "text-udlm", "text-grouped", "text-experts")
LIKE += ("multi-resolution", "unet-conv", "unet-md4", "unet-scan", "edm2-scan")
SIDES = [name for name in NETWORKS | MORE if name not in REFUSED + LIKE]
KIND = {name: kind for name, (kind, *_) in (NETWORKS | MORE).items()}

# What of the side is added to what of the trunk, where they are not the same.
FIVE = {"block/1": "block/3/skip", "block/0": "block/4/skip", "block/2": "block/2"}
JOINED = {
    "uvit": FIVE,
    "state-space": FIVE,
    "state-space-words": {"block/0": "block/2/skip", "block/1": "block/1"},
    "uvit-generated": {"block/0": "block/2/skip", "block/1": "block/1"},
    "uvit-words": {"block/1": "block/3/skip", "block/2": "block/2"},  # the first one's connection leads nowhere
    "dico": {"block/2": "skip/0", "block/1": "skip/1", "block/4": "block/4"},
    "ascan": {"block/2": "skip/0", "block/1": "skip/1", "block/0": "skip/2", "block/3": "block/3"},
    "cat": {"block/0": "skip/0", "block/1": "block/1"},
}
TWO = {"block/0": "block/2/skip", "block/1": "block/1", "block/3": "block/5/skip", "block/4": "block/4"}
BY_KIND = {
    MultiResolution: TWO,
    InfDiT: ("first", "block/0"),
    TabularMLP: ("layer/0", "layer/1"),
    MixedTable: ("layer/0", "layer/1"),
    GraphTransformer: [f"block/{i}/{part}" for i in range(2) for part in ("nodes", "edges", "whole")],
    NeuralProcess: [f"block/{i}/attention" for i in range(3)],
    UNet: [*(f"skip/{n}" for n in range(4)), "middle/1"],
    EDM2: [*(f"skip/{n}" for n in range(4)), "middle/1"],
    DiffiT: ("skip/0", "encoder/2"),  # there are no blocks in the middle
}
ONE_BLOCK = ("block/0",)  # of two
OWN = {
    "text": ONE_BLOCK,
    "dit-generated": ONE_BLOCK,
    "unet-transformer": [*(f"skip/{n}" for n in range(4)), "middle/0"],
}
COUNTED = (DiT, TextTransformer, DiffuSSM, InfDiT, GraphTransformer, NeuralProcess, TabularMLP, MixedTable)
CONVOLVED = (UNet, EDM2, DiffiT, DiCo)


def points(name):
    """Tap of the side: tap of the trunk."""
    found = OWN.get(name) or JOINED.get(name) or BY_KIND.get(KIND[name], ("block/0", "block/1"))
    return found if isinstance(found, dict) else {point: point for point in found}


def options(name):
    entry = {"entry": "hint"} if KIND[name] is InfDiT else {}  # it is shown an image itself
    if KIND[name] not in COUNTED:
        return {"channels": CHANNELS, **entry}
    counted = {GraphTransformer: 2, NeuralProcess: 3}.get(KIND[name], len(points(name)))
    return {"channels": CHANNELS, "blocks": counted, **entry}


def made(name):
    """How the network is made, parameters of normal weights, and the network."""
    if name in MORE:
        kind, config = MORE[name]
        own = {"num_classes": 3}
    else:
        kind, config, _ = NETWORKS[name]
        own = classes(name)
    make = lambda rngs: kind(**config, **own, rngs=rngs)
    init, apply = functional_init(make)
    return make, _noise(jax.eval_shape(init, jax.random.key(0))), apply


def _noise(tree, seed=7):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(x.dtype), tree)


def values(*shape):
    return np.random.default_rng(5).normal(size=(*shape, CHANNELS)).astype(np.float32)


def told(name):
    """State, time, and the conditions without and with an image."""
    batch, rng = 4, np.random.default_rng(1)
    t, labels = rng.uniform(size=batch).astype(np.float32), rng.integers(0, 4, batch, np.int32)
    tokens = lambda *shape: rng.integers(0, 3, (batch, *shape), np.int32)
    if name == "mixed-table":
        xt = {"numbers": rng.normal(size=(batch, 4)).astype(np.float32), "a": tokens(4), "b": tokens(2)}
        return xt, t, labels, {"image": {part: values(*x.shape) for part, x in xt.items()}, "cond": labels}
    if name == "graph-sizes":
        xt, cond = {"nodes": tokens(4), "edges": tokens(6)}, {"size": 2 + labels % 3, "cond": labels}
        return xt, t, cond, {"image": {part: values(*x.shape) for part, x in xt.items()}, **cond}
    if name in MORE:
        xt = tokens(10) if name == "graph-typed" else rng.normal(size=(batch, 8, 8, 2)).astype(np.float32)
        return xt, t, labels, {"image": values(*xt.shape[: 3 if xt.ndim == 4 else 2]), "cond": labels}
    xt, t, cond = inputs(name)
    image = values(*xt.shape[: 3 if xt.ndim == 4 else 2])
    if KIND[name] is InfDiT:
        cond = {"image": rng.normal(size=(batch, 4, 4, 2)).astype(np.float32), "cond": cond}
        return xt, t, cond, {"hint": image, **cond}
    return xt, t, cond, {"image": image, **(cond if isinstance(cond, dict) else {"cond": cond})}


def linear(p, x):
    return x @ p["kernel"] + p["bias"]


def patched(image, p):
    """Patches row by row, each flattened."""
    side = image.shape[1] // p
    cut = [image[:, i * p : i * p + p, j * p : j * p + p] for i in range(side) for j in range(side)]
    return np.stack([x.reshape(len(image), -1) for x in cut], axis=1)


def convolved(x, p):
    """A 3 x 3 convolution, offset by offset."""
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return sum(x[:, i : i + 8, j : j + 8] @ p["kernel"][i, j] for i in range(3) for j in range(3)) + p["bias"]


def symmetric(pairs, nodes):
    matrix, found = np.zeros((len(pairs), nodes, nodes, CHANNELS), np.float32), 0
    for i in range(nodes):
        for j in range(i + 1, nodes):
            matrix[:, i, j] = matrix[:, j, i] = pairs[:, found]
            found += 1
    return matrix


def hints(name, image, layers):
    """What is added at which tap, by hand."""
    kind, p = KIND[name], [layers[str(i)] for i in range(len(layers))]
    if kind in CONVOLVED:
        x = convolved(image, p[0]["convs"]["0"])
        return {"embed": convolved(x * jax.nn.sigmoid(x), p[0]["out"])}
    if kind is MultiResolution:
        if name.endswith("pooled"):
            low = patched(image.reshape(4, 4, 2, 4, 2, CHANNELS).mean((2, 4)), 2)
        else:
            low = patched(image, 4 if "tokens" in name else 2)
        return {"embed/0": linear(p[0], low), "embed/1": linear(p[1], image)}
    if kind is GraphTransformer:
        if name == "graph":
            return {"embed/edges": linear(p[0], symmetric(image, 5))}
        nodes, pairs = (image[:, :4], image[:, 4:]) if name == "graph-typed" else (image["nodes"], image["edges"])
        return {"embed/nodes": linear(p[0], nodes), "embed/edges": linear(p[1], symmetric(pairs, 4))}
    if kind is MixedTable:
        image = np.concatenate([image[part].reshape(4, -1) for part in ("numbers", "a", "b")], axis=1)
    elif kind is TabularMLP:
        image = image.reshape(4, -1)
    elif kind is DiffuSSM:
        image = image.reshape(4, 32, 2 * CHANNELS)
    elif kind is InfDiT:  # blocks of 2 x 2 patches, one after the other
        rows = [4 * (2 * i + k) + 2 * j + m for i in range(2) for j in range(2) for k in range(2) for m in range(2)]
        image = patched(image, 2)[:, rows]
    elif kind in (DiT, UViT, StateSpace):
        image = patched(image, 2)
    hint = linear(p[0], image)
    return {"embed": hint[:, :, None] if kind is NeuralProcess else hint}


def by_hand(name, apply, params, side):
    """The copy as a whole network, whose end is not heard: Zhang et al. 2023; Chen et al. 2024 without connections."""
    xt, t, cond, shown = told(name)
    copy = _over(params, side["side"])
    hinted = hints(name, shown["hint" if "hint" in shown else "image"], side["hint"])
    # Tokens that say time and label are the first.
    put = {at: lambda h, hint=hint: h.at[:, h.shape[1] - hint.shape[1] :].add(hint) for at, hint in hinted.items()}
    with taps.override(put), taps.record(*points(name)) as seen:
        apply(copy, xt, t, cond, train=True)
    assert len(side["out"]) == len(points(name))
    made = [linear(side["out"][str(i)], seen[at]) for i, at in enumerate(points(name))]
    add = {to: lambda h, x=x: h + x for to, x in zip(points(name).values(), made, strict=True)}
    with taps.override(add):
        return apply(params, xt, t, cond, train=True)


def _over(params, own):
    """A tree in which what another has stands in its place."""
    if not isinstance(own, dict):
        return own
    return {k: _over(v, own[k]) if k in own else v for k, v in params.items()}


def each(test):
    return pytest.mark.slow(pytest.mark.parametrize("name", SIDES)(test))


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@each
def test_a_new_one_is_the_trunk_bit_for_bit(name):
    make, params, apply = made(name)
    controlled, side = attach(make, params, **options(name), key=jax.random.key(1))
    xt, t, cond, shown = told(name)
    plain = apply(params, xt, t, cond)
    equal(controlled(side, xt, t, shown), plain)
    equal(controlled(side, xt, t, cond), plain)
    equal(side["side"], _like(params, side["side"]))
    assert sum(x.size for x in jax.tree.leaves(side["side"])) < sum(x.size for x in jax.tree.leaves(params))


def _like(params, own):
    return {k: _like(params[k], v) if isinstance(v, dict) else params[k] for k, v in own.items()}


@each
def test_it_is_the_published_sum_and_all_of_it_learns(name, jit):
    make, params, apply = made(name)
    controlled, side = attach(make, params, **options(name), key=jax.random.key(1))
    side = _noise(side, seed=3)
    xt, t, _, shown = told(name)
    entry = "hint" if "hint" in shown else "image"

    def loss(side, image):
        with auxiliary.collect() as found:
            out = controlled(side, xt, t, {**shown, entry: image}, train=True)
        own = sum(x.mean() for x in found.found().losses.values())
        return sum(((x - 0.1) ** 2).mean() for x in jax.tree.leaves(out)) + own, out

    learn = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    run = jit(lambda side: (learn(side, shown[entry]), by_hand(name, apply, params, side)))
    ((_, out), (grads, of_image)), expected = run(side)
    jax.tree.map(close, out, expected)
    assert jax.tree.structure(grads) == jax.tree.structure(side)
    assert set(grads) == {"side", "hint", "out"}  # and nothing of the trunk
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(g).all(), path
        fixed = path[-1].key in ("frequencies", "phases")  # random waves of the time, which never learn
        assert (np.abs(g).max() > 0) != fixed, path
    for g in jax.tree.leaves(of_image):
        assert np.abs(g).reshape(4, -1).max(axis=1).min() > 0


@pytest.mark.slow
def test_a_blocks_pass_with_clean_ones_is_a_loop_over_them(jit):
    """A text in blocks: the image is shown at clean sites as at noisy ones."""
    small = {"length": 6, "symbols_in": 4, "symbols_out": 3, "width": 8, "depth": 3, "heads": 2, "block": 2}
    make = lambda rngs: TextTransformer(**small, time=False, rngs=rngs)
    init, _ = functional_init(make)
    params = _noise(jax.eval_shape(init, jax.random.key(0)))
    controlled, side = attach(make, params, blocks=2, channels=CHANNELS, key=jax.random.key(1))
    side, run = _noise(side, seed=3), jit(controlled)
    xt, x0 = (np.random.default_rng(2).integers(0, n, (4, 6), np.int32) for n in (4, 3))
    image = values(4, 6)
    whole = run(side, xt, None, {"image": image, "cond": {"clean": x0}})
    for start in (0, 2, 4):
        state = np.concatenate([x0[:, :start], xt[:, start:]], axis=1)
        close(whole[:, start : start + 2], run(side, state, None, {"image": image})[:, start : start + 2])


@pytest.mark.slow
def test_a_route_leads_past_both(noise):
    """In training the side's blocks see the sites that the trunk's do, and the route ends where the copy does."""
    small = {"shape": (4, 4, 1), "patch": 1, "width": 8, "depth": 3, "heads": 2}
    make = lambda rngs: DiT(**small, route=(1, 3, 0.5), rngs=rngs)
    init, apply = functional_init(make)
    params = noise(jax.eval_shape(init, jax.random.key(0)))
    controlled, side = attach(make, params, blocks=2, channels=CHANNELS, key=jax.random.key(1))
    side, x, image = noise(side, seed=3), values(2, 4, 4)[..., :1], values(2, 4, 4)
    train = {"rng": jax.random.key(5), "train": True}
    hint = linear(side["hint"]["0"], patched(image, 1))
    with taps.override({"embed": lambda h: h + hint}), taps.record("block/0", "block/1") as seen:
        apply(_over(params, side["side"]), x, 0.5, **train)
    assert seen["block/1"].shape == (2, 8, 8)
    add = [linear(side["out"][str(i)], seen[f"block/{i}"]) for i in range(2)]
    with taps.override({f"block/{i}": lambda h, i=i: h + add[i] for i in range(2)}):
        expected = apply(params, x, 0.5, **train)
    close(controlled(side, x, 0.5, {"image": image}, **train), expected)


ONES = {"width": 8, "depth": 3, "heads": 2}
TINY = {
    "uvit": (UViT, {"shape": (4, 4, 1), **ONES}),
    "tabular": (TabularMLP, {"columns": 3, "width": 8, "hidden": (8,)}),
    "inf-dit": (InfDiT, {"shape": (4, 4, 1), **ONES, "scale": 2, "patch": 1, "low_patch": 1, "block": 2}),
    "graph": (GraphTransformer, {"nodes": 3, **TOKENS, **GRAPH}),
    "graph-parts": (GraphTransformer, {"nodes": 3, **PARTED, **GRAPH}),
    "mixed-table": (MixedTable, {"parts": {"a": (2, None, 2)}, "width": 8, "hidden": (8,)}),
    "neural-process": (NeuralProcess, ONES),
    "low-rank": (LowRankGaussian, {"shape": (4,), "rank": 1, "schedule": None}),
    "classifier": (UNetEncoder, {"shape": (4, 4, 1), "width": 64, "multipliers": (1,), "blocks": 1, "classes": 2}),
}


def tiny(name, **more):
    kind, config = TINY[name]
    return lambda rngs: kind(**config, **more, rngs=rngs)


@pytest.mark.parametrize(
    ("name", "built", "asked", "message"),
    [
        ("low-rank", {}, {}, "LowRankGaussian has no side network; those that have are UNet, EDM2"),
        ("classifier", {}, {}, "UNetEncoder has no side network"),
        ("uvit", {"scan": True}, {}, "scan=False"),
        ("uvit", {}, {"blocks": 1}, "blocks=1: of a U-shaped network all on the way down are copied"),
        ("uvit", {}, {"stem": (4,)}, r"stem=\(4,\): only networks of images with convolutions"),
        ("tabular", {}, {}, "blocks=None: expected from 1 to the trunk's 1"),
        ("inf-dit", {}, {"blocks": 4, "entry": "hint"}, "blocks=4: expected from 1 to the trunk's 3"),
        ("inf-dit", {}, {"blocks": 1}, "name another entry=... for the side's"),
        ("graph", {}, {"blocks": 3}, "blocks=3: expected from 1 to the trunk's 2"),
    ],
)
def test_what_cannot_have_one_says_why(name, built, asked, message):
    with pytest.raises(ValueError, match=message):
        attach(tiny(name, **built), {}, channels=1, **asked, key=jax.random.key(0))


@pytest.mark.slow
def test_the_networks_that_a_refusal_names_are_those_that_have_one():
    with pytest.raises(ValueError, match="no side network") as refusal:
        attach(tiny("low-rank"), {}, channels=1, key=jax.random.key(0))
    named = str(refusal.value).split("those that have are ")[1].replace(" and ", ", ").split(", ")
    assert sorted(named) == sorted({KIND[name].__name__ for name in SIDES} - {"Mixed", "SizedGraph"})


@pytest.mark.slow
def test_an_image_of_another_shape_is_refused():
    batch, x = 2, np.zeros((2, 3), np.float32)
    tokens, pairs = np.zeros((batch, 3), np.int32), np.zeros((batch, 3, 1))
    parts, points = {"nodes": tokens, "edges": tokens}, {"points": np.zeros((batch, 3, 2))}
    wrong, state = np.zeros((batch, 3, 2)), np.zeros((batch, 4, 4, 1), np.float32)
    for name, blocks, xt, cond, image, message in (
        ("uvit", None, state, {}, wrong, r"has shape \(2, 3, 2\); expected \(2, 4, 4, 1\)"),
        ("tabular", 1, x, {}, wrong, r"has shape \(2, 3, 2\); expected \(2, 3, 1\)"),
        ("graph", 1, tokens, {}, wrong, r"has shape \(2, 3, 2\); expected \(2, 3, 1\)"),
        ("graph-parts", 1, parts, {}, wrong, r"of the parts nodes, edges"),
        ("graph-parts", 1, parts, {}, {"nodes": pairs, "edges": wrong}, r"expected \(2, 3, 1\)"),
        ("mixed-table", 1, {"a": x[:, :2]}, {}, {"b": wrong}, r'expected cond\["image"\] of the parts a, got b'),
        ("mixed-table", 1, {"a": x[:, :2]}, {}, {"a": wrong}, r"has shape \(2, 3, 2\); expected \(2, 2, 1\)"),
        ("neural-process", 1, x, points, wrong, r"has shape \(2, 3, 2\); expected \(2, 3, 1\)"),
    ):
        init, _ = functional_init(tiny(name))
        params = _noise(jax.eval_shape(init, jax.random.key(0)))
        controlled, side = attach(tiny(name), params, blocks=blocks, channels=1, key=jax.random.key(1))
        with pytest.raises(ValueError, match=message):
            controlled(side, xt, np.full(batch, 0.5, np.float32), {"image": image, **cond})


@every
def test_adapters_on_every_kernel(name, jit):
    """At first nothing; then what the network makes of W + alpha / rank down @ up, which `merge` writes down."""
    params, apply = network(name)
    rule = "factor" if name == "low-rank" else "kernel$"
    adapted, new = lora.wrap(apply, params, [rule], rank=1, alpha=2.0, key=jax.random.key(1))
    matrices = [path for path, _ in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == rule.rstrip("$")]
    assert len(jax.tree.leaves(new)) == 2 * len(matrices) > 0
    args, learned = inputs(name), _noise(new, seed=5)
    learned = jax.tree.map(lambda x: 0.5 * x, learned)

    def by_hand(p, ab):
        if not isinstance(p, dict):
            return p + 2 * ab["down"] * ab["up"]  # columns times rows
        return {k: by_hand(v, ab[k]) if k in ab else v for k, v in p.items()}

    run, of = jit(apply), jit(lambda new: adapted(new, *args))
    plain, out = run(params, *args), of(learned)
    equal(lora.merge(params, new, 2.0), params)
    close(of(new), plain, 1e-5)
    merged = lora.merge(params, learned, 2.0)
    close(run(merged, *args), out, 1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, by_hand(params, learned))
    assert np.abs(out - plain).max() > 1e-2 * np.abs(plain).max()
