"""What every network of `ddjax.denoisers` must do, one row for each; what it need not is in `EXEMPT`, with the reason.

All weights are random.
"""

import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax import auxiliary
from ddjax.denoisers import (
    EDM2,
    UNET_DESIGNS,
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
    UNetDesign,
    UNetEncoder,
    UViT,
    functional_init,
    stack_blocks,
    taps,
)
from ddjax.schedules import VPCosine
from ddjax.training.mesh import make_mesh, state_shardings

PIXELS, TOKENS = {"shape": (8, 8, 2)}, {"symbols_in": 6, "symbols_out": 5}
LEVELS = {"width": 16, "multipliers": (1, 2), "blocks": 1, "attend_at": (4,)}
FEW = {"groups": 4}
GRAPH = {"width": 16, "edge_width": 8, "global_width": 8, "depth": 3, "heads": 2, "feed_forward": (16, 16, 16)}
DEEP = {"width": 16, "depth": 2, "heads": 2}
BRANCHES = {"widths": (16, 8), "depths": (3, 3), "heads": 2}
TOLD = {"conditioning": "attention", "relative": True, "qkv_bias": True}
BLOCKS = {"scale": 2, "patch": 2, "low_patch": 1, "block": 2}
LLADA = {"time": False, "modulated": False, "norm": "rms", "out_bias": False, "head_bias": False, "rotary": 5e5}
MD4_IMAGE = dataclasses.replace(UNET_DESIGNS["md4"], **FEW)
MD4_TOLD = dataclasses.replace(UNET_DESIGNS["md4_transformer"], **FEW)
WAIST = {"design": MD4_TOLD, "transformer": {"width": 16, "depth": 2, "heads": 2}}
MD4 = {"conditioner": "md4", "activation": "sigmoid", "cond_width": 8, "embed_width": 8, "out_bias": False}


ROUTED = {"experts": 4, "top_k": 2, "shared": 1, "capacity": 2.0}  # enough for all choices
WORDS, LATENT = {"context_width": 6}, {"heads": 2, "transformer_depth": 2}
SCAN = {"blocks": 3, "scan": True}
UNSEEN = ("frequencies", "phases", "uncertainty/linear/kernel")  # of what only an objective asks for


class Mixed(MixedTable):
    """Its parts made of one row of numbers, and its outputs one row."""

    def __call__(self, xt, t, cond=None, **options):
        tokens = (10 * jnp.abs(xt)).astype(jnp.int32)
        state = {"numbers": xt[:, :4], "a": tokens[:, 4:8] % 5, "b": tokens[:, 8:] % 3}
        return _flat(super().__call__(state, t, cond, **options))


class SizedGraph(GraphTransformer):
    """Graphs of 2 to 4 typed nodes, of one row of tokens."""

    def __call__(self, xt, t, cond=None, **options):
        state = {"nodes": xt[:, :4], "edges": xt[:, 4:]}
        return _flat(super().__call__(state, t, {"size": 2 + xt[:, 0] % 3, "cond": cond}, **options))


def _flat(parts):
    return jnp.concatenate([part.reshape(len(part), -1) for part in parts.values()], axis=-1)


TABLE = {"numbers": (4, None, 4), "a": (4, 5, 4), "b": (2, 3, 3)}
ALPHABETS = {f"symbols_{end}": {"nodes": 6, "edges": 6 - (end == "out")} for end in ("in", "out")}
# name: the network, its options, which of its parameters get no gradient by design.
NETWORKS = {
    "dit": (DiT, {**PIXELS, **TOKENS, "width": 16, "depth": 2, "heads": 2, "patch": 2}, ()),
    "text": (TextTransformer, {"length": 8, **TOKENS, "width": 16, "depth": 2, "heads": 2}, ()),
    "dit-published": (DiT, {**PIXELS, **DEEP, "patch": 2, "qkv_bias": True, "closed_times": True}, ()),
    "text-mdlm": (TextTransformer, {"length": 8, **TOKENS, **DEEP, "norm": "scaled", "out_bias": False}, ()),
    "text-llada": (TextTransformer, {"length": 8, **TOKENS, **DEEP, **LLADA}, ()),
    "dit-linear": (DiT, {**PIXELS, "width": 16, "depth": 2, "heads": 2, "patch": 2, "attention": "linear"}, ()),
    "dit-rotary": (DiT, {**PIXELS, **TOKENS, **DEEP, "patch": 2, "rotary": True}, ()),
    "inf-dit": (InfDiT, {**PIXELS, **DEEP, **BLOCKS}, ("low_embed/kernel",)),  # of an image that is not there
    "uvit": (UViT, {**PIXELS, "width": 16, "depth": 5, "heads": 2, "patch": 2, "time_mlp": True}, ()),
    "dico": (DiCo, {**PIXELS, "width": 8, "stages": (2, 1, 2, 1, 1)}, ()),
    "dico-attention": (DiCo, {**PIXELS, **TOKENS, "width": 8, "stages": (1, 1, "aa", 1, 1), "head_width": 16}, ()),
    "state-space": (StateSpace, {**PIXELS, **TOKENS, "width": 16, "depth": 5, "patch": 2, "state": 4}, ()),
    "multi-resolution": (MultiResolution, {**PIXELS, **BRANCHES}, ()),
    "multi-resolution-tokens": (MultiResolution, {**PIXELS, **TOKENS, **BRANCHES, "patches": (4, 1)}, ()),
    "diffit-latent": (DiT, {**PIXELS, **DEEP, **TOLD, "patch": 2}, ()),
    "diffit": (DiffiT, {**PIXELS, **TOKENS, "width": 16, "multipliers": (1, 2), "blocks": 1, "heads": 2}, ()),
    "dit-generated": (DiT, {**PIXELS, **TOKENS, **DEEP, "patch": 2, "conditioning": "weights"}, ()),
    "uvit-generated": (UViT, {**PIXELS, "width": 16, "depth": 3, "heads": 2, "patch": 2, "generated": True}, ()),
    "uvit-words": (UViT, {**PIXELS, "width": 16, "depth": (2, 1), "heads": 2, "patch": 2, "context": (4, 6)}, ()),
    "diffussm": (DiffuSSM, {**PIXELS, **TOKENS, "width": 16, "depth": 2, "ratio": 2, "state": 4}, ()),
    "dico-fused": (DiCo, {**PIXELS, "width": 8, "stages": ("f", "f", "a", "f", "f"), "head_width": 16}, ()),
    "ascan": (DiCo, {**PIXELS, **TOKENS, "width": 8, "stages": [*"ffaaaff"], "head_width": 8}, ()),
    "cat": (DiCo, {**PIXELS, "width": 16, "stages": [*"eee"], "head_width": 16, "conditioning": "weights"}, ()),
    "dit-selected": (DiT, {**PIXELS, **DEEP, "patch": 2, "conditioning": "weights", "kernels": 3}, ()),
    "tabular": (TabularMLP, {"columns": 10, "width": 16, "hidden": (32, 32)}, ()),
    "tabular-tokens": (TabularMLP, {"columns": 10, **TOKENS, "width": 16, "hidden": (32, 32)}, ()),
    "graph": (GraphTransformer, {"nodes": 5, **TOKENS, **GRAPH}, ()),
    "mixed-table": (Mixed, {"parts": TABLE, "width": 16, "hidden": (32, 32)}, ()),
    "graph-sizes": (SizedGraph, {"nodes": 4, "sizes": True, **ALPHABETS, **GRAPH}, ()),
    "neural-process": (NeuralProcess, {"width": 16, "depth": 3, "heads": 2}, ()),
    "unet": (UNet, {**PIXELS, **TOKENS, **LEVELS, "heads": 2, "design": UNetDesign(**FEW)}, ()),
    "unet-conv": (UNet, {**PIXELS, **LEVELS, "design": UNetDesign(resample="conv", scale_shift=False, **FEW)}, ()),
    "ncsn++": (UNet, {**PIXELS, **LEVELS, "design": "ncsn++"}, ("frequencies",)),
    "edm2": (EDM2, {**PIXELS, **LEVELS, "head_width": 8}, ("frequencies", "phases")),
    "edm2-uncertain": (EDM2, {**PIXELS, **LEVELS, "head_width": 8, "uncertainty": 8}, UNSEEN),
    "edm2-scan": (EDM2, {**PIXELS, **LEVELS, "head_width": 8, **SCAN}, ("frequencies", "phases")),
    "unet-scan": (UNet, {**PIXELS, **TOKENS, **LEVELS, **SCAN, "design": UNetDesign(**FEW)}, ()),
    "unet-transformer": (UNet, {**PIXELS, **TOKENS, **LEVELS, **WAIST}, ()),
    "text-md4": (TextTransformer, {"length": 8, **TOKENS, **DEEP, **MD4}, ()),
    "text-udlm": (TextTransformer, {"length": 8, **TOKENS, **DEEP, "conditioner": "udlm"}, ()),
    "text-grouped": (TextTransformer, {"length": 8, **TOKENS, **DEEP, "heads": 4, "kv_heads": 2}, ()),
    "unet-md4": (UNet, {**PIXELS, **TOKENS, "width": 16, "multipliers": (1,), "blocks": 1, "design": MD4_IMAGE}, ()),
    "dit-experts": (DiT, {**PIXELS, **TOKENS, **DEEP, "patch": 2, "mlp": "experts", "experts": ROUTED}, ()),
    "text-experts": (TextTransformer, {"length": 8, **TOKENS, **DEEP, "mlp": "experts", "experts": ROUTED}, ()),
    # In training its experts choose from the batch, of which an example then is not independent, by design; the tests
    # of single examples and of vmap are of the network as it samples.
    "dit-pooled": (DiT, {**PIXELS, **DEEP, "patch": 2, "mlp": "pooled", "experts": {"experts": 4}}, ()),
    "edm2-words": (EDM2, {**PIXELS, **LEVELS, **WORDS, "head_width": 8}, ("frequencies", "phases")),
    "diffit-words": (DiffiT, {**PIXELS, **WORDS, "width": 16, "multipliers": (1, 2), "blocks": 1, "heads": 2}, ()),
    "diffussm-words": (DiffuSSM, {**PIXELS, **DEEP, **WORDS, "ratio": 2, "state": 4}, ()),
    "state-space-words": (StateSpace, {**PIXELS, **DEEP, **WORDS, "depth": 3, "patch": 2, "state": 4}, ()),
    "multi-resolution-words": (MultiResolution, {**PIXELS, **BRANCHES, **WORDS}, ()),
    "inf-dit-words": (InfDiT, {**PIXELS, **DEEP, **BLOCKS, **WORDS}, ("low_embed/kernel",)),
    "unet-words": (UNet, {**PIXELS, **LEVELS, **WORDS, "heads": 2, "design": UNetDesign(**FEW)}, ()),
    "unet-latent": (UNet, {**PIXELS, **LEVELS, **WORDS, **LATENT, "design": UNetDesign(**FEW)}, ()),
    "low-rank": (LowRankGaussian, {"shape": (10,), "rank": 3, "schedule": VPCosine()}, ()),
    "classifier": (UNetEncoder, {**PIXELS, **LEVELS, "classes": 5, "head_width": 8, "design": UNetDesign(**FEW)}, ()),
}


def every(test):
    """A slow test of all networks."""
    return pytest.mark.slow(pytest.mark.parametrize("name", NETWORKS)(test))


UNEQUAL = "its layers have different widths, so that there is nothing to scan"
ROWS = "it keeps a row of numbers for each layer, which nobody needs to compute again"
CLOSED = "it is a closed form, without layers"
SCANNED = "it is scanned in all of these tests; the network without is another row, and is compared with it there"
ALONE = "of the image one pixel is left there, which sees itself whatever its query and key"
# What does not hold, by design, and why.
EXEMPT = {
    **{(name, "scan"): UNEQUAL for name in ("tabular", "tabular-tokens", "mixed-table")},
    **{(name, "remat"): ROWS for name in ("tabular", "tabular-tokens", "mixed-table")},
    **{("low-rank", option): CLOSED for option in ("scan", "remat")},
    **{(name, "scan"): SCANNED for name in ("edm2-scan", "unet-scan")},
    **{("classifier", f"skip/{n}"): "without a way up, what one would have joined is only told" for n in range(9)},
    ("neural-process", "block/2"): "its output is made of what blocks show, and behind the last there is no other",
    **{("ascan", f"block/3/{of}"): ALONE for of in ("queries", "keys")},
    ("low-rank", "zero"): "a new one is the exact denoiser of a normal law, which is not zero",
    ("low-rank", "bfloat16"): "it solves a linear system, which nothing does in half precision: float32 at least",
}
QUICK = ("text", "low-rank")  # of whose taps the fast set asks, too
TURNED = {"dit-pooled": 1}  # examples in which a logit so near its threshold falls on its other side when rounded
NO_MAPS = ("dit-linear", "cat")  # of linear attention, which never makes one
TOLD_ALONE = ("sites", "uncertainty")  # to listeners; the network does not go on with them


def most(test):
    """A test of all networks, of which a few are in the fast set."""
    rows = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in NETWORKS]
    return pytest.mark.parametrize("name", rows)(test)


def takes(name, option):
    return option in NETWORKS[name][0].__init__.__annotations__


def classes(name):
    return {"num_classes": 3} if takes(name, "num_classes") and NETWORKS[name][1].get("modulated", True) else {}


def exempt(name, what):
    """Skip what this network need not do."""
    if (name, what) in EXEMPT:
        pytest.skip(EXEMPT[name, what])


@functools.cache
def network(name, **more):
    """Parameters of normal weights, and the network."""
    kind, options, _ = NETWORKS[name]
    init, apply = functional_init(lambda rngs: kind(**{**options, **classes(name), **more}, rngs=rngs))
    rng = np.random.default_rng(7)
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(x.dtype), shapes), apply


def inputs(name, batch=4):
    options, rng = NETWORKS[name][1], np.random.default_rng(1)
    shape = (batch, *options.get("shape", (options.get("length", 10),)))  # of rows and graphs 10
    xt = rng.integers(0, 6, shape, np.int32) if "symbols_in" in options else rng.normal(size=shape).astype(np.float32)
    cond = rng.integers(0, 4, batch, np.int32) if classes(name) else {"points": rng.normal(size=(batch, 10, 2))}
    cond = None if "modulated" in options or "classes" in options else cond
    if "context_width" in options:  # and of the third there is no entry
        valid = np.array([[1, 0, 1], [1, 1, 1], [0, 0, 0], [0, 1, 1]], bool)[:batch]
        cond = {"sequence": rng.normal(size=(batch, 3, 6)).astype(np.float32), "valid": valid, "cond": cond}
    return xt, rng.uniform(size=batch).astype(np.float32), cond


@functools.cache
def output(name):
    """Of the plain network."""
    params, apply = network(name)
    return np.asarray(jax.jit(apply)(params, *inputs(name)))


def training_loss(name, apply):
    """Of the parameters: towards a random target, and what layers add of their own."""
    target = np.random.default_rng(3).normal(size=output(name).shape)

    def loss(params):
        with auxiliary.collect() as told:
            out = apply(params, *inputs(name), train=True)
        return ((out - target) ** 2).mean() + sum(own.mean() for own in told.found().losses.values())

    return loss


def close(a, b, tolerance=2e-5):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


def unscanned(name, **more):
    """Scanned blocks have no taps, and say so (tests/denoisers/test_taps.py, test_unet.py)."""
    return network(name, **more, **({"scan": False} if "scan" in NETWORKS[name][1] else {}))


@pytest.fixture
def on_demand(monkeypatch):
    """Names of the taps that are made only for who asks for them, in the order in which a network had them to give."""
    names, wanted = [], taps.wanted
    monkeypatch.setattr(taps, "wanted", lambda name: names.append(name) or wanted(name))
    return names


def points(name, apply, params, on_demand):
    """Shapes of all that the network has at its taps, and of the maps beside them that it makes on demand."""

    def run(params, *names):
        with taps.record(*names) as seen:
            apply(params, *inputs(name))
        return seen

    seen = jax.eval_shape(run, params)
    maps = sorted(set(on_demand))
    assert not set(maps) & set(seen)
    return seen, jax.eval_shape(lambda params: run(params, *maps), params) if maps else {}


@most
def test_taps_overridden_by_what_they_hold_change_no_bit(name, on_demand):
    params, apply = unscanned(name)
    seen, maps = points(name, apply, params, on_demand)
    attends = attending(seen)
    assert {at.removesuffix("/attention/weights") for at in maps} == (set() if name in NO_MAPS else attends)
    assert all(f"{at}/{part}" in seen for at in attends for part in ("queries", "keys"))

    def itself(at, held):
        def override(x):  # behind all overrides before it
            np.testing.assert_array_equal(x, held, err_msg=at)
            return held

        return override

    plain = apply(params, *inputs(name))
    with taps.record(*seen, *maps) as held:
        np.testing.assert_array_equal(apply(params, *inputs(name)), plain)
    with taps.override({at: itself(at, value) for at, value in held.items()}):
        np.testing.assert_array_equal(apply(params, *inputs(name)), plain)


@every
def test_what_is_at_a_tap_is_what_the_network_goes_on_with(name, on_demand):
    """The output has a gradient with respect to each: an override that nothing used would have none."""
    params, apply = unscanned(name)
    seen, maps = points(name, apply, params, on_demand)
    used = {at: x for at, x in (seen | maps).items() if at not in TOLD_ALONE and (name, at) not in EXEMPT}
    rng = np.random.default_rng(5)
    factor = rng.normal(size=output(name).shape)

    def value(shifts):
        with taps.override({at: lambda x, at=at: x + shifts[at] for at in used}):
            return (apply(params, *inputs(name)) * factor).sum()

    slopes = jax.jit(jax.grad(value))({at: jnp.zeros(x.shape, x.dtype) for at, x in used.items()})
    for at, slope in slopes.items():
        assert np.isfinite(slope).all(), at
        assert np.abs(slope).max() > 0, at


def turned(params, shapes):
    """Which of queries, keys and values each kernel makes, and the parameters with that part of it negated.

    Columns are ordered (head of keys, its queries and then its key and value, feature).
    """
    heads = {(shapes[f"{at}/queries"].shape, shapes[f"{at}/keys"].shape) for at in attending(shapes)}
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    for i, (path, x) in enumerate(leaves):
        *names, leaf = (key.key for key in path)
        if leaf != "kernel" or not {"qkv", "key_value", "query", "q", "k", "v"} & {*names[-2:]}:
            continue
        order = [{"q": "queries", "query": "queries", "k": "keys", "v": "values"}.get(names[-1])]
        size = x.shape[-1]
        if order == [None]:
            whole = "qkv" in names
            fits = {(q[-1], q[-2] // k[-2]) for q, k in heads if size == (whole * q[-2] + 2 * k[-2]) * q[-1]}
            ((size, queries),) = fits or {(q[-1], 1) for q, _ in heads}  # of several scales: more heads than columns
            order = [*["queries"] * queries * whole, "keys", "values"]
        columns = np.repeat(np.tile(order, x.shape[-1] // size // len(order)), size)
        for part in dict.fromkeys(order):
            other = x * np.where(columns == part, -1, 1).astype(np.float32)
            yield part, tree.unflatten(other if j == i else y for j, (_, y) in enumerate(leaves))


def attending(seen):
    """Where there is attention."""
    return {at.removesuffix("/values") for at in seen if at.endswith("/values")}


@every
def test_queries_keys_and_values_are_made_by_weights_of_their_own(name, jit):
    """A kernel with the other sign is first heard at the tap of that name, and at the other two not at all."""
    params, apply = unscanned(name)
    order = []

    def run(params):
        with taps.record() as seen:
            apply(params, *inputs(name))
        order[:] = seen  # as they come
        return seen

    shapes, run = jax.eval_shape(run, params), jit(run)
    parts, made = ("queries", "keys", "values"), set()
    for part, changed in turned(params, shapes):
        plain, other = run(params), run(changed)
        heard = [at for at in order if not np.array_equal(plain[at], other[at])]
        at = heard[0].removesuffix(f"/{part}")
        assert {f"{at}/{p}" for p in parts} & {*heard} == {f"{at}/{part}"}, (part, heard[:3])
        made.add(heard[0])
    assert made == {at for at in shapes if at.split("/")[-1] in parts}


@every
def test_a_map_is_written_down_only_for_who_asks(name, on_demand, monkeypatch):
    """Elsewhere the kernel that never does is called, also where everything else is recorded."""
    if not takes(name, "attention") or "attention" in NETWORKS[name][1]:
        pytest.skip("its attention, if any, has one implementation")
    fused, calls = jax.nn.dot_product_attention, []
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, **o: calls.append(1) or fused(*a, **o))
    params, apply = unscanned(name, attention="xla")
    _, maps = points(name, apply, params, on_demand)  # recorded without the maps, and then these
    assert len(calls) == len(maps)


@most
def test_unheard_taps_leave_the_program_as_it_is(name, monkeypatch):
    params, apply = unscanned(name)
    text = lambda: jax.jit(lambda params: apply(params, *inputs(name))).lower(params).as_text()
    plain, seen = text(), None
    with monkeypatch.context() as patch:
        patch.setattr(taps.Below, "__call__", lambda self, point, x: x)
        patch.setattr(taps.Below, "wanted", lambda self, point: False)
        for module in [m for m in sys.modules.values() if getattr(m, "tap", None) is taps.tap]:
            patch.setattr(module, "tap", lambda name, x: x)
        with taps.record() as seen:
            assert text() == plain
        assert not seen

    def heard(params):
        with taps.record() as seen:
            return apply(params, *inputs(name)), seen

    assert jax.jit(heard).lower(params).as_text() != plain


@every
def test_it_starts_at_zero_with_float32_outputs(name):
    exempt(name, "zero")
    kind, options, _ = NETWORKS[name]
    init, apply = functional_init(lambda rngs: kind(**options, **classes(name), dtype=jnp.bfloat16, rngs=rngs))
    params = jax.jit(init)(jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    out = jax.jit(apply)(params, *inputs(name))
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, 0)


@every
def test_gradients_reach_every_parameter(name):
    params, apply = network(name)
    grads = jax.jit(jax.grad(training_loss(name, apply)))(params)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        fixed = "/".join(part.key for part in path).endswith(NETWORKS[name][2] or "/")
        assert np.isfinite(g).all(), path
        assert (np.abs(g).max() == 0) == fixed, path


@every
def test_bfloat16_is_the_same_network(name):
    exempt(name, "bfloat16")
    params, apply = network(name, dtype=jnp.bfloat16)
    out, exact = jax.jit(apply)(params, *inputs(name)), output(name)
    off = np.abs(out - exact).reshape(len(exact), -1).max(axis=1) / np.abs(exact).max()
    assert 1e-4 < np.sort(off)[-1 - TURNED.get(name, 0)] < 0.15


@every
def test_an_example_does_not_depend_on_its_neighbours(name):
    params, apply = network(name)
    call, args = jax.jit(apply), inputs(name)
    for i in (0, 2):
        close(call(params, *jax.tree.map(lambda x, i=i: x[i : i + 1], args))[0], output(name)[i])
    assert np.abs(output(name)[0] - output(name)[2]).max() > 1e-2


@every
def test_vmap_is_a_loop(name):
    params, apply = network(name)
    args = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), inputs(name))
    out = jax.jit(jax.vmap(apply, in_axes=(None, 0, 0, 0)))(params, *args)
    close(np.concatenate(out), output(name))


@every
@pytest.mark.parametrize("option", ["remat", "scan"])
def test_options_that_change_nothing(name, option):
    exempt(name, option)
    options = NETWORKS[name][1]
    assert takes(name, option), f"{name} has no {option}, and no reason is given in EXEMPT"
    # A U-Net scans what is equal of the blocks of a resolution.
    more = {"blocks": 3} if option == "scan" and "blocks" in options else {}
    plain, apply = network(name, **more)
    like, other = network(name, **more, **{option: True})
    turned = lambda p: p if option != "scan" else stack_blocks(p, like) if more else stack_blocks(p)
    params = turned(plain)
    assert other != apply
    one, two = (jax.jit(jax.value_and_grad(training_loss(name, f)))(p) for f, p in ((apply, plain), (other, params)))
    np.testing.assert_allclose(one[0], two[0], rtol=1e-5)
    jax.tree.map(lambda a, b: close(a, b, 1e-4), two[1], turned(one[1]))


@every
@pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 (fake) devices")
def test_eight_devices_are_one_network(name):
    params, apply = network(name)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    shardings = state_shardings({"params": params}, mesh, fsdp_min_size=64)["params"]
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        spec = functools.reduce(lambda tree, key: tree[key.key], path, shardings).spec
        assert x.size < 2**10 or any(spec), path  # every large parameter is cut
    with jax.set_mesh(mesh):
        out = jax.jit(apply)(jax.device_put(params, shardings), *inputs(name))
        close(np.asarray(out), output(name))
