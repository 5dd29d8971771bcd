"""Every attention's queries, keys, values and map: the map is the softmax, and with the values it makes the branch."""

import jax
import numpy as np
import numpy_networks
import pytest

from ddjax.denoisers import (
    EDM2,
    DiCo,
    DiT,
    GraphTransformer,
    InfDiT,
    NeuralProcess,
    TextTransformer,
    UNet,
    UNetDesign,
    UNetEncoder,
    functional_init,
    taps,
)

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(1)
PARTS = ("queries", "keys", "values", "attention/weights")
LEVELS = {"shape": (4, 4, 2), "width": 8, "multipliers": (1, 2), "blocks": 1, "attend_at": (2,)}
STAGES = {"shape": (4, 4, 2), "width": 8, "stages": (1, 1, "aa", 1, 1), "head_width": 8}
GROUPS, SYMBOLS = UNetDesign(groups=4), {"symbols_in": 4, "symbols_out": 3}
IMAGE = {"xt": RNG.normal(size=(2, 4, 4, 2)).astype(np.float32)}
WORDS = {
    "sequence": RNG.normal(size=(2, 3, 6)).astype(np.float32),
    "valid": np.array([[True, True, False], [True, True, True]]),
}
POINTS = {
    "xt": RNG.normal(size=(2, 5)).astype(np.float32),
    "cond": {"points": RNG.normal(size=(2, 5, 3)).astype(np.float32)},
}
UPSAMPLER = {"scale": 2, "patch": 2, "low_patch": 2, "block": 2, "width": 16, "depth": 3, "heads": 2}
LOW = {
    "xt": RNG.normal(size=(2, 12, 8, 3)).astype(np.float32),
    "cond": {"image": RNG.normal(size=(2, 6, 4, 3)).astype(np.float32)},
}
T = np.float32([0.2, 0.7])


def linear(p, x):
    return x @ np.asarray(p["kernel"], float) + np.asarray(p.get("bias", 0.0), float)


def magnitude(p, x):
    """EDM2's layer: the weights of each output over their root mean square and the root of their number."""
    kernel = np.asarray(p["kernel"], float)[0, 0]
    return x @ (kernel / (1e-4 + np.sqrt((kernel**2).mean(0))) / np.sqrt(len(kernel)))


@pytest.fixture
def recorded(jit, noise):
    """`recorded(make, names, xt=, cond=, overrides=)`: random parameters, what was at the taps, and the output."""

    def recorded(make, names, *, xt, cond=None, overrides=None):
        init, apply = functional_init(make)
        params = noise(jax.eval_shape(init, jax.random.key(0)))

        def run(params):
            with taps.override(overrides or {}), taps.record(*names) as seen:
                return apply(params, xt, T, cond), seen

        out, seen = jit(run)(params)
        return params, {name: np.asarray(x, float) for name, x in seen.items()}, out

    return recorded


def attended(seen, prefix, valid=None):
    """What the values add up to, `(batch, sites, width)`, having checked the map: all by the definition."""
    q, k, v, w = (seen[f"{prefix}/{part}"] for part in PARTS)
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    if valid is not None:
        scores = np.where(valid[:, None, None], scores, -np.inf)
    expected = numpy_networks.softmax(scores)
    assert w.shape == expected.shape
    np.testing.assert_allclose(w, expected, atol=1e-5)
    y = np.einsum("bhqk,bkhd->bqhd", expected, v)
    return y.reshape(*y.shape[:2], -1)


def close(a, b):
    np.testing.assert_allclose(a, np.asarray(b).reshape(a.shape), rtol=0, atol=1e-4 * np.abs(b).max())


# The network, its inputs, where it attends, and the last layer of the branch of such a name.
BRANCHES = {
    "unet": (
        lambda rngs: UNet(**LEVELS, heads=2, design=GROUPS, rngs=rngs), IMAGE,
        ("encoder/2", "middle/0", "decoder/1"), lambda p, y: linear(p["attention"]["out"], y), "attention",
    ),
    "edm2": (
        lambda rngs: EDM2(**LEVELS, head_width=4, rngs=rngs), IMAGE,
        ("encoder/2", "middle/0", "decoder/1"), lambda p, y: magnitude(p["attention"]["out"], y), "attention",
    ),
    "dico": (
        lambda rngs: DiCo(**STAGES, rngs=rngs), IMAGE,
        ("block/2",), lambda p, y: linear(p["attention"]["out"], y), "mix",
    ),
    "words": (
        lambda rngs: DiT(shape=(4, 4, 2), patch=2, width=8, depth=2, heads=2, context_width=6, rngs=rngs),
        {**IMAGE, "cond": WORDS}, ("block/1/cross",), lambda p, y: linear(p["out"], y), "",
    ),
    "words-unet": (
        lambda rngs: UNet(**LEVELS, heads=2, design=GROUPS, context_width=6, rngs=rngs), {**IMAGE, "cond": WORDS},
        ("encoder/2/cross", "middle/0/cross", "decoder/1/cross"), lambda p, y: linear(p["out"], y), "",
    ),
    "words-dico": (
        lambda rngs: DiCo(**STAGES, context_width=6, rngs=rngs),
        {**IMAGE, "cond": WORDS}, ("block/2/cross",), lambda p, y: linear(p["out"], y), "",
    ),
    "words-text": (
        lambda rngs: TextTransformer(length=5, **SYMBOLS, width=8, depth=2, heads=2, context_width=6, rngs=rngs),
        {"xt": RNG.integers(0, 4, (2, 5), np.int32), "cond": WORDS},
        ("block/1/cross",), lambda p, y: linear(p["out"], y), "",
    ),
    "inf-dit-nearby": (
        lambda rngs: InfDiT(shape=(12, 8, 3), **UPSAMPLER, rngs=rngs), LOW,
        ("first/nearby",), lambda p, y: linear(p["out"], y), "",
    ),
}  # fmt: skip


def part_of(params, prefix):
    """The parameters of a block, or of a part of one, by the name of its taps."""
    first, *rest = prefix.split("/")
    if first == "block":
        stacks, number = params["stack"], int(rest[0])
        if "blocks" not in stacks:  # one after the other, numbered through
            for stack in (stacks[i] for i in sorted(stacks, key=int)):
                if number < len(stack["blocks"]):
                    break
                number -= len(stack["blocks"])
        found, rest = (stacks if "blocks" in stacks else stack)["blocks"][str(number)], rest[1:]
    else:
        found = params[first]
    for name in rest:
        found = found[name]
    return found


@pytest.mark.parametrize("name", BRANCHES)
def test_the_map_is_the_softmax_and_with_the_values_the_branch(name, recorded):
    make, inputs, prefixes, last, branch = BRANCHES[name]
    ends = [f"{prefix}/{branch}".rstrip("/") for prefix in prefixes]
    names = [*ends, *(f"{prefix}/{part}" for prefix in prefixes for part in PARTS)]
    params, seen, _ = recorded(make, names, **inputs)
    for prefix, end in zip(prefixes, ends, strict=True):
        y = attended(seen, prefix, inputs["cond"]["valid"] if name.startswith("words") else None)
        close(seen[end], last(part_of(params, prefix), y))


def test_a_classifier_pools_by_attention(recorded):
    make = lambda rngs: UNetEncoder(**LEVELS, classes=3, head_width=8, design=GROUPS, rngs=rngs)
    params, seen, out = recorded(make, [f"pool/{part}" for part in PARTS], **IMAGE)
    assert seen["pool/attention/weights"].shape == (2, 2, 1, 5)
    close(out, linear(params["pool"]["out"], attended(seen, "pool")))


def test_neural_processes_attend_twice(recorded):
    both = ("points", "coordinates")
    names = [f"block/1/{which}/{part}" for which in both for part in PARTS]
    make = lambda rngs: NeuralProcess(width=8, depth=3, heads=2, rngs=rngs)
    params, seen, _ = recorded(make, [*names, "block/1/attention"], **POINTS)
    own = part_of(params, "block/1")["project"]
    # Rows of the one are coordinates, rows of the other points; each after each of an example.
    assert seen["block/1/points/attention/weights"].shape == (2 * 3, 2, 5, 5)
    assert seen["block/1/coordinates/attention/weights"].shape == (2 * 5, 2, 3, 3)
    along, across = (linear(own[which], attended(seen, f"block/1/{which}")) for which in both)
    y = along.reshape(2, 3, 5, 16).swapaxes(1, 2) + across.reshape(2, 5, 3, 16)
    close(seen["block/1/attention"], y / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3))))


def test_blocks_of_an_upsampler_attend_to_those_before(recorded):
    """Patch by patch: the map of a block's patches on the four blocks that it may see, zeros beyond the image."""
    names = [f"{layer}/{part}" for layer in ("first", "block/1") for part in (*PARTS, "attention")]
    make = lambda rngs: InfDiT(shape=(12, 8, 3), **UPSAMPLER, rngs=rngs)
    params, seen, _ = recorded(make, names, **LOW)
    directions, (rows, columns) = [(0, 0), (1, 1), (0, 1), (1, 0)], (3, 2)
    for layer in ("first", "block/1"):
        own = part_of(params, layer)["attention"]
        q, k, v, w = (seen[f"{layer}/{part}"] for part in PARTS)
        assert w.shape == (2 * rows * columns, 2, 4, 16)
        y = np.zeros((2, rows * columns * 4, 2, 8))
        for b, i, j, m in np.ndindex(2, rows, columns, 2):
            at = 4 * (i * columns + j)
            scores, values = np.full((4, 16), -np.inf), np.zeros((16, 8))
            for n, (down, right) in enumerate(directions):
                if i < down or j < right:
                    continue
                there = 4 * ((i - down) * columns + j - right)
                keys = k[b, there : there + 4, m] + np.asarray(own["direction"], float)[n, m]
                scores[:, 4 * n : 4 * n + 4] = q[b, at : at + 4, m] @ keys.T / np.sqrt(8)
                values[4 * n : 4 * n + 4] = v[b, there : there + 4, m]
            expected = numpy_networks.softmax(scores)
            np.testing.assert_allclose(w[b * rows * columns + at // 4, m], expected, atol=1e-5)
            y[b, at : at + 4, m] = expected @ values
        close(seen[f"{layer}/attention"], linear(own["out"], y.reshape(2, -1, 16)))


def test_a_graphs_features_each_have_a_map(recorded):
    small = {"nodes": 4, "width": 6, "edge_width": 5, "global_width": 4, "depth": 3, "heads": 2}
    numbers = {f"symbols_{end}": {"nodes": 5, "edges": 3} for end in ("in", "out")}
    make = lambda rngs: GraphTransformer(**small, **numbers, feed_forward=(7, 8, 9), sizes=True, rngs=rngs)
    sizes = np.array([4, 3])
    xt = {"nodes": RNG.integers(0, 5, (2, 4)), "edges": RNG.integers(0, 3, (2, 6))}
    inputs = {"xt": xt, "cond": {"size": sizes, "cond": None}}
    names = [*(f"block/1/{part}" for part in (*PARTS, "attention")), "block/0/edges", "block/0/whole"]
    params, seen, _ = recorded(make, names, **inputs)
    own = part_of(params, "block/1")
    q, k, v, w = (seen[f"block/1/{part}"] for part in PARTS)
    e, whole = seen["block/0/edges"], seen["block/0/whole"]
    assert w.shape == (2, 6, 4, 4)
    for b, n in enumerate(sizes):
        for i in range(n):
            factor, term = (linear(own[part], e[b, i, :n]) for part in ("e_mul", "e_add"))
            scores = q[b, i] * k[b, :n] / np.sqrt(3) * (factor + 1) + term
            expected = numpy_networks.softmax(scores.T)  # (features, nodes that there are)
            np.testing.assert_allclose(w[b, :, i, :n], expected, atol=1e-5)
            np.testing.assert_array_equal(w[b, :, i, n:], 0)
            mixed = (expected * v[b, :n].T).sum(-1)
            y = linear(own["y_x_add"], whole[b]) + (linear(own["y_x_mul"], whole[b]) + 1) * mixed
            close(seen["block/1/attention"][b, i], linear(own["x_out"], y))
    # An override of the map is what nodes are mixed by.
    alone = {"block/1/attention/weights": lambda w: np.broadcast_to(np.eye(4), w.shape)}
    seen = recorded(make, ["block/1/attention"], **inputs, overrides=alone)[1]
    y = linear(own["y_x_add"], whole)[:, None] + (linear(own["y_x_mul"], whole) + 1)[:, None] * v
    close(seen["block/1/attention"], linear(own["x_out"], y))
