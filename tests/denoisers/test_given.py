"""Conditions: labels, vectors, sequences and images, each with something that says nothing."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ddjax import taps
from ddjax.denoisers import (
    EDM2,
    UNET_DESIGNS,
    DiT,
    GraphTransformer,
    TabularMLP,
    TextTransformer,
    functional_init,
    nulls,
)
from ddjax.denoisers.edm2 import MPBlock
from ddjax.denoisers.given import Given
from ddjax.denoisers.layers import Conditioner, CrossAttention
from ddjax.denoisers.layers.convolution import GroupNorm, ResBlock
from ddjax.denoisers.layers.noise import NoiseConditioner
from ddjax.denoisers.layers.told import ConditionTokens
from ddjax.denoisers.u_shaped import Stage
from ddjax.denoisers.views import View
from ddjax.guidance import classifier_free
from ddjax.predictions import Prediction

RNG = np.random.default_rng(2)
SMALL = {"shape": (4, 4, 1), "patch": 2, "width": 16, "depth": 2, "heads": 2, "num_classes": 3}
MORE = {"vector": 5, "context_width": 6, "image_channels": 2}
X, T, LABELS = RNG.normal(size=(3, 4, 4, 1)).astype(np.float32), np.float32([0.1, 0.5, 0.9]), np.int32([2, 0, 3])
VECTOR, SEQUENCE = (RNG.normal(size=size).astype(np.float32) for size in ((3, 5), (3, 4, 6)))
IMAGE = RNG.normal(size=(3, 4, 4, 2)).astype(np.float32)
VALID = np.array([[1, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]], bool)
ALL_BUT_IMAGE = {"vector": VECTOR, "sequence": SEQUENCE, "valid": VALID, "cond": LABELS}
GRAPH = {"symbols_in": 2, "symbols_out": 2, "width": 4, "edge_width": 4, "global_width": 4, "depth": 2, "heads": 1}
GRAPH |= {"hidden": (4, 4, 4), "feed_forward": (4, 4, 4), "features": False}
ALL = {"vector": VECTOR, "sequence": SEQUENCE, "valid": VALID, "image": IMAGE, "cond": LABELS}


def maker(**config):
    return lambda rngs: DiT(**{**SMALL, **config}, rngs=rngs)


def randomised(layer, noise):
    graphdef, state = nnx.split(layer)
    return nnx.merge(graphdef, noise(state)), noise(nnx.to_pure_dict(state))


@pytest.fixture(scope="module")
def net(build):
    return build(maker(**MORE))


def largest(a, b=0.0):
    return np.abs(np.asarray(a) - np.asarray(b)).max()


def test_cross_attention_by_definition(x64, noise):
    layer, p = randomised(CrossAttention(8, 6, 2, dtype=jnp.float64, rngs=nnx.Rngs(0)), noise)
    h, sequence, valid = RNG.normal(size=(2, 5, 8)), SEQUENCE[:2].astype(float), VALID[:2]
    normed = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)
    q = (normed @ p["query"]["kernel"]).reshape(2, 5, 2, 4)
    k, v = np.moveaxis((sequence @ p["key_value"]["kernel"]).reshape(2, 4, 2, 2, 4), 3, 0)
    scores = np.exp(np.einsum("bqhd,bkhd->bhqk", q, k) / 2) * valid[:, None, None]
    y = np.einsum("bhqk,bkhd->bqhd", scores / scores.sum(-1, keepdims=True), v).reshape(2, 5, 8)
    out = layer(jnp.asarray(h), (jnp.asarray(sequence), jnp.asarray(valid)))
    np.testing.assert_allclose(out, y @ p["out"]["kernel"] + p["out"]["bias"], atol=1e-10)


def test_the_vector_of_all_conditions_by_definition(x64, noise):
    layer, p = randomised(Conditioner(8, num_classes=3, time=False, latent=2, vector=5, rngs=nnx.Rngs(0)), noise)
    z = RNG.normal(size=(3, 2))
    total = p["labels"][LABELS] + sum(
        v @ p[name]["kernel"] + p[name]["bias"] for name, v in (("latent", z), ("vector", VECTOR))
    )
    given = {"z": z, "vector": VECTOR.astype(float), "cond": LABELS}
    np.testing.assert_allclose(layer(3, None, given), total / (1 + np.exp(-total)), rtol=1e-5)
    np.testing.assert_array_equal(
        layer(3, None, {"z": z, "cond": LABELS}), layer(3, None, {**given, "vector": 0 * given["vector"]})
    )


def tapped(network, noise, *inputs, cond=None):
    """What the network of random weights makes of its condition, and these."""
    network, p = randomised(network, noise)
    with taps.record("condition") as seen:
        network(*inputs, cond)
    return np.asarray(seen["condition"], np.float64), p


def test_a_vector_in_the_conditioning_vector_of_u_nets_by_definition(x64, noise):
    design = dataclasses.replace(UNET_DESIGNS["adm"], cond_silu=False)
    options = {"num_classes": 3, "time": True, "time_scale": 1000.0}
    layer, p = randomised(NoiseConditioner(8, design, vector=5, **options, rngs=nnx.Rngs(0)), noise)
    alone = layer(3, T, LABELS)
    given = {"vector": VECTOR.astype(float), "cond": LABELS}
    np.testing.assert_allclose(layer(3, T, given) - alone, VECTOR @ p["vector"]["kernel"], atol=1e-5)
    by_site = layer(3, np.tile(T[:, None], (1, 2)), given, sites=2)
    np.testing.assert_allclose(by_site, np.tile(layer(3, T, given)[:, None], (1, 2, 1)), atol=1e-5)


@pytest.mark.slow
def test_a_vector_in_edm2_by_definition(noise):
    """Karras et al. 2024, equations 47, 75, 81 and 88, in NumPy."""
    options = {"shape": (2, 2, 1), "width": 4, "multipliers": (1,), "blocks": 1, "vector": 5}
    options |= {"label_balance": 0.3, "head_width": 4}
    c, p = tapped(EDM2(**options, rngs=nnx.Rngs(0)), noise, X[:, :2, :2], T, cond={"vector": VECTOR})

    def layer(x, kernel):
        k = np.asarray(kernel, np.float64)
        return x @ (k / (1e-4 + np.sqrt((k**2).mean(0))) / len(k) ** 0.5)

    waves = 2**0.5 * np.cos(T[:, None] * np.asarray(p["frequencies"]) + np.asarray(p["phases"]))
    total = 0.7 * layer(waves, p["time_in"]["kernel"]) + 0.3 * layer(VECTOR, p["vector"]["kernel"])
    total = total / np.hypot(0.7, 0.3)
    np.testing.assert_allclose(c, total / (1 + np.exp(-total)) / 0.596, atol=1e-5)


@pytest.mark.slow
def test_a_vector_in_rows_and_graphs_by_definition(noise):
    """TabDDPM's target of a regression: silu of a linear layer, added; in DiGress' features of the whole, linear."""
    for make, inputs, ending in (
        (lambda n: TabularMLP(columns=2, width=4, hidden=(4,), vector=n, rngs=nnx.Rngs(0)), X[:, 0, :2, 0], nnx.silu),
        (lambda n: GraphTransformer(nodes=2, vector=n, **GRAPH, rngs=nnx.Rngs(0)), LABELS[:, None] % 2, lambda v: v),
    ):
        told, p = tapped(make(5), noise, inputs, T, cond={"vector": VECTOR})
        nothing, _ = tapped(make(5), noise, inputs, T)
        linear = lambda v, p=p["vector"]: v @ p["kernel"] + p.get("bias", 0.0)
        np.testing.assert_allclose(told - nothing, ending(linear(VECTOR)) - ending(linear(0 * VECTOR)), atol=1e-5)


@pytest.mark.slow
def test_a_vector_is_a_token(noise):
    layer, p = randomised(
        ConditionTokens(8, num_classes=3, time=True, vector=5, context=(4, 6), rngs=nnx.Rngs(0)), noise
    )
    tokens = layer(3, T, ALL_BUT_IMAGE)
    assert tokens.shape == (3, 7, 8)
    np.testing.assert_allclose(tokens[:, 2], VECTOR @ p["vector_in"]["kernel"] + p["vector_in"]["bias"], atol=1e-5)
    np.testing.assert_allclose(tokens[:, 0], p["labels"][LABELS], atol=1e-6)
    summed = tokens[:, :3].sum(1) + tokens[:, 3:].mean(1)
    np.testing.assert_allclose(layer.vector(tokens), summed / (1 + np.exp(-summed)), atol=1e-5)


@pytest.mark.slow
def test_a_residual_block_looks_at_the_sequence_behind_its_pixels(noise):
    make = lambda width: ResBlock(
        8, 8, cond_width=4, heads=2, gain=0.5**0.5, norm=partial(GroupNorm, groups=4), context_width=width,
        rngs=nnx.Rngs(0),
    )  # fmt: skip
    block, p = randomised(make(6), noise)
    before = nnx.merge(nnx.split(make(0))[0], {name: value for name, value in p.items() if name != "cross"})
    cross = nnx.merge(nnx.split(CrossAttention(8, 6, 2, rngs=nnx.Rngs(0)))[0], p["cross"])
    x, c = (RNG.normal(size=size).astype(np.float32) for size in ((2, 2, 3, 8), (2, 4)))
    context = SEQUENCE[:2], VALID[:2]
    h = before(x, c)
    expected = 0.5**0.5 * (h + cross(h.reshape(2, 6, 8), context).reshape(h.shape))
    np.testing.assert_allclose(block(x, c, context=context), expected, atol=1e-5)


def test_edm2_looks_at_a_sequence_under_its_own_rules(x64, noise):
    """Karras et al. 2024, figure 21 and equations 47, 66 and 88, in NumPy; of no entry, one of unit magnitude."""
    stage = Stage(8, 8, attends=True)
    options = {"cond_width": 4, "heads": 2, "dropout": 0.0, "balance": 0.3, "clip": 1e9, "attention": None}
    make = lambda width: MPBlock(stage, **options, dtype=jnp.float64, context_width=width, rngs=nnx.Rngs(0))
    block, p = randomised(make(6), noise)
    before = nnx.merge(nnx.split(make(0))[0], {name: value for name, value in p.items() if name != "cross"})
    x, c = RNG.normal(size=(2, 2, 3, 8)), RNG.normal(size=(2, 4))
    sequence, valid = SEQUENCE[:2].astype(float), VALID[:2]

    def unit(v, axis=-1):
        return v / (1e-4 + np.sqrt((v**2).mean(axis, keepdims=True)))

    def layer(name, v):
        kernel = np.asarray(p["cross"][name]["kernel"], np.float64)
        return v @ unit(kernel, 0) / len(kernel) ** 0.5

    h = np.asarray(before(jnp.asarray(x), jnp.asarray(c)))
    q = unit(layer("query", h).reshape(2, 6, 2, 4))
    k, v = (unit(y) for y in np.moveaxis(layer("key_value", sequence).reshape(2, 4, 2, 2, 4), 3, 0))
    scores = np.exp(np.einsum("bqhd,bkhd->bhqk", q, k) / 2) * valid[:, None, None]
    y = np.einsum("bhqk,bkhd->bqhd", scores / scores.sum(-1, keepdims=True), v)
    want = (0.7 * h + 0.3 * layer("out", y.reshape(h.shape))) / np.hypot(0.7, 0.3)
    context = jnp.asarray(sequence), jnp.asarray(valid)
    with taps.record("b/cross", "b/cross/attention/weights") as seen:
        found = block(jnp.asarray(x), jnp.asarray(c), context=context, name="b")
    shares = scores / scores.sum(-1, keepdims=True)
    for mine, wanted in ((found, want), (seen["b/cross"], layer("out", y.reshape(h.shape)))):
        np.testing.assert_allclose(mine, wanted, atol=1e-6)  # kernels are normalised in float32
    np.testing.assert_allclose(seen["b/cross/attention/weights"], shares, atol=1e-6)


@pytest.mark.slow
def test_edm2_without_an_entry_attends_to_one_of_unit_magnitude(build):
    options = {"width": 8, "multipliers": (1,), "blocks": 1, "head_width": 4, "context_width": 6}
    run, params = build(lambda rngs: EDM2(shape=(4, 4, 1), **options, rngs=rngs))
    kernel = np.asarray(params["nothing"]["kernel"], np.float64)[:, 0]
    own = np.tile(kernel / (1e-4 + np.sqrt((kernel**2).mean())), (3, 1, 1)).astype(np.float32)
    none = run(params, X, T, None)
    np.testing.assert_allclose(run(params, X, T, {"sequence": own}), none, atol=1e-5)
    assert largest(run(params, X, T, {"sequence": SEQUENCE}), none) > 1e-3


@pytest.mark.slow
def test_a_new_network_ignores_the_sequence(build, net):
    """Its output layers are zero; with everything else random, the network is the one without, bit for bit."""
    run, params = net
    plain, _ = build(maker(vector=5, image_channels=2))
    params = jax.tree.map(lambda x: x, params)
    for block in params["stack"]["blocks"].values():
        block["cross"]["out"] = jax.tree.map(jnp.zeros_like, block["cross"]["out"])
    rest = {name: value for name, value in ALL.items() if name not in ("sequence", "valid")}
    out = run(params, X, T, ALL)
    del params["nothing"]
    for block in params["stack"]["blocks"].values():
        del block["cross"]
    np.testing.assert_array_equal(out, plain(params, X, T, rest))
    init, _ = functional_init(maker(**MORE))
    np.testing.assert_array_equal(init(jax.random.key(0))["stack"]["blocks"]["0"]["cross"]["out"]["kernel"], 0)


def test_only_valid_entries_count_and_without_any_a_learned_one(net):
    run, params = net
    out = run(params, X, T, ALL)
    np.testing.assert_array_equal(out, run(params, X, T, {**ALL, "sequence": np.where(VALID[..., None], SEQUENCE, 7)}))
    moved = run(params, X, T, {**ALL, "sequence": SEQUENCE + VALID[..., None]})
    assert largest(moved[0], out[0]) > 1e-3
    assert largest(moved[1], out[1]) > 1e-3
    # The last example has none: as one valid entry, the network's own, or no sequence at all.
    own = np.broadcast_to(params["nothing"], (3, 1, 6))
    for cond in ({**ALL, "sequence": own, "valid": np.ones((3, 1), bool)}, {**ALL, "sequence": None, "valid": None}):
        np.testing.assert_allclose(run(params, X, T, cond)[2], out[2], atol=1e-5)
    assert largest(run(params, X, T, {**ALL, "valid": VALID | True})[2], out[2]) > 1e-3


def test_an_image_is_further_channels(build):
    """The network of as many channels of state, whose rows of the first layer stand in another order."""
    run, params = build(maker(image_channels=2))
    whole, _ = build(maker(shape=(4, 4, 3), out_channels=1))
    rows = np.concatenate([np.arange(4)[:, None], 4 + np.arange(8).reshape(4, 2)], axis=1).reshape(-1)
    other = {**params, "embed": {**params["embed"], "kernel": params["embed"]["kernel"][rows]}}
    out = run(params, X, T, {"image": IMAGE, "cond": LABELS})
    np.testing.assert_allclose(whole(other, np.concatenate([X, IMAGE], -1), T, LABELS), out, atol=1e-5)
    zeros = run(params, X, T, {"image": 0 * IMAGE, "cond": LABELS})
    np.testing.assert_array_equal(run(params, X, T, LABELS), zeros)
    assert largest(out, zeros) > 1e-2


@pytest.mark.slow
def test_an_image_beside_tokens_and_their_clean_copy(build):
    run, params = build(maker(image_channels=1, symbols_in=5, symbols_out=4, time=False))
    xt, x0 = (RNG.integers(0, 4, (3, 4, 4, 1), np.int32) for _ in range(2))
    image, groups = IMAGE[..., :1], np.tile(np.int32([0, 1, 1, 0]), (3, 1))
    at_once = run(params, xt, None, {"clean": x0, "groups": groups, "image": image, "cond": LABELS})
    place = np.kron(np.array([[0, 1], [1, 0]]), np.ones((2, 2), int))[..., None]
    state = np.where(place == 1, xt, x0)  # the second group, behind the first one clean
    single = run(params, state, None, {"groups": groups, "cond": {"image": image, "cond": LABELS}})
    np.testing.assert_allclose(at_once[:, place[..., 0] == 1], single[:, place[..., 0] == 1], atol=1e-4)
    assert largest(run(params, xt, None, {"clean": x0, "groups": groups, "cond": LABELS}), at_once) > 1e-2


def test_entries_stand_side_by_side_or_in_each_other():
    nested = {"image": IMAGE, "cond": {"z": VECTOR, "vector": VECTOR, "cond": {"sequence": SEQUENCE, "cond": LABELS}}}
    flat = {"image": IMAGE, "z": VECTOR, "vector": VECTOR, "sequence": SEQUENCE, "cond": LABELS}
    for cond in (nested, flat, {"groups": 1, "cond": nested}, {**flat, "groups": 1}):
        view = View.of(cond)
        assert view.groups == (1 if "groups" in cond else None)
        given = Given.of(view.cond)
        assert all(getattr(given, name) is value for name, value in flat.items())
        assert given.valid is None
    assert Given.of(LABELS).cond is LABELS
    assert Given.of(None) == Given()


@pytest.mark.slow
def test_guidance_away_from_all_conditions_or_some(net):
    run, params = net
    denoise = lambda x, t, cond: Prediction(run(params, x, t, cond), "x0")
    null = nulls(ALL, 3)
    assert null == {"cond": 3, "vector": 0.0, "valid": False, "image": 0.0}
    with_all = run(params, X, T, ALL)
    for names in (null.keys(), {"valid"}, {"cond", "image"}):
        guided = classifier_free(denoise, null={name: null[name] for name in names}, scale=2.5)(X, T, ALL).value
        shown = {name: value for name, value in ALL.items() if name not in names}
        if "valid" in names:
            del shown["sequence"]
        without = run(params, X, T, shown or None)
        np.testing.assert_allclose(guided, without + 2.5 * (with_all - without), atol=1e-3)


@pytest.mark.parametrize(
    ("config", "cond", "message"),
    [
        ({}, {"sequence": SEQUENCE, "cond": LABELS}, r'cond\["sequence"\] was given .* build it with context_width='),
        ({}, {"image": IMAGE}, "build it with image_channels="),
        ({}, {"z": VECTOR}, "build it with latent="),
        (MORE, {"vector": VECTOR, "text": 1}, "cond has entries text; beside cond, "),
        (MORE, {"vector": VECTOR[:, 1:]}, r'cond\["vector"\] has shape \(3, 4\); expected \(3, 5\)'),
        (MORE, {"sequence": SEQUENCE[:, 0]}, r"expected \(3, entries, 6\)"),
        (MORE, {"sequence": SEQUENCE, "valid": VALID[:, 1:]}, r"expected bool \(3, 4\)"),
        (MORE, {"sequence": SEQUENCE, "valid": VALID * 1.0}, "float64; expected bool"),
        (MORE, {"valid": VALID}, r'give cond\["sequence"\] too'),
        (MORE, {"image": IMAGE[:, 1:]}, r"the image in cond has shape \(3, 3, 4, 2\); expected \(3, 4, 4, 2\)"),
    ],
)
def test_errors(config, cond, message):
    init, apply = functional_init(maker(**config))
    params = jax.eval_shape(init, jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda p: apply(p, X, T, cond), params)


def test_other_errors():
    with pytest.raises(ValueError, match=r'give cond\["valid"\]'):
        nulls({"sequence": SEQUENCE}, 3)
    make = lambda rngs: TextTransformer(length=4, symbols_in=3, symbols_out=3, width=8, depth=1, heads=2, rngs=rngs)
    init, apply = functional_init(make)
    params = jax.eval_shape(init, jax.random.key(0))
    with pytest.raises(ValueError, match=r'cond\["sequence"\] was given but the network takes none'):
        jax.eval_shape(lambda p: apply(p, np.zeros((3, 4), np.int32), T, {"sequence": SEQUENCE}), params)
