"""DiCo against its published definition."""

import jax
import numpy as np
import numpy_hierarchies
import numpy_networks
import pytest
from flax import nnx

from ddjax.denoisers import DiCo, functional_init, taps
from ddjax.denoisers.dico import shuffle, unshuffle
from ddjax.denoisers.dico_blocks import FusedBlock, Told

SMALL = {"shape": (8, 4, 2), "width": 4, "stages": (2, 1, 1, 1, 2), "num_classes": 3, "mlp_ratio": 2}
T = np.array([0.0, 0.0625, 0.015625], np.float32)  # angles whose rounding does not count


def inputs():
    rng = np.random.default_rng(1)
    return rng.normal(size=(3, 8, 4, 2)).astype(np.float32), T, np.array([0, 3, 2], np.int32)


def published(params):
    """Our weights by the authors' names, in their layout."""
    w = {}

    def layer(name, p, pixelwise=False):
        kernel = p["kernel"]
        kernel = kernel[None, None] if pixelwise else kernel
        w[f"{name}.weight"] = kernel.T if kernel.ndim == 2 else kernel.transpose(3, 2, 0, 1)
        if "bias" in p:
            w[f"{name}.bias"] = p["bias"]

    stages = ("encoder_level_1", "encoder_level_2", "latent", "decoder_level_2", "decoder_level_1")
    for stage, name in enumerate(stages):
        for i, p in params["stack"][str(stage)]["blocks"].items():
            layers = ("inner", "depthwise", "outer")
            for theirs, ours in zip(("conv1", "conv2", "conv3"), layers, strict=True):
                layer(f"{name}.{i}.{theirs}", p[ours], ours != "depthwise")
            layer(f"{name}.{i}.ca.1", p["channels"], True)
            layer(f"{name}.{i}.conv4", p["mlp"]["up"], True)
            layer(f"{name}.{i}.conv5", p["mlp"]["down"], True)
            layer(f"{name}.{i}.adaLN_modulation.1", p["modulation"])
    for i, p in params["conditions"].items():
        layer(f"t_embedder_{int(i) + 1}.mlp.0", p["time_in"])
        layer(f"t_embedder_{int(i) + 1}.mlp.2", p["time_out"])
        w[f"y_embedder.embedding_table_{i}.weight"] = p["labels"]
    layer("x_embedder.proj", params["embed"])
    for ours, names in (("down", ("down1_2", "down2_3")), ("up", ("up3_2", "up2_1"))):
        for i, name in enumerate(names):
            layer(f"{name}.body.0", params[ours][str(i)])
    for i, name in enumerate(("reduce_chan_level2", "reduce_chan_level1")):
        layer(name, params["reduce"][str(i)], True)
    layer("final_layer.out_proj", params["out"])
    layer("final_layer.adaLN_modulation.1", params["modulation"])
    return w


def test_it_is_the_published_network(build):
    run, params = build(lambda rngs: DiCo(**SMALL, rngs=rngs))
    xt, t, labels = inputs()
    x = xt.transpose(0, 3, 1, 2).astype(np.float64)
    want = numpy_networks.dico(published(params), x, 1000.0 * t, labels, SMALL["stages"]).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(run(params, xt, t, labels), want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_shuffling_is_torchs():
    x = np.random.default_rng(0).normal(size=(2, 4, 6, 8))
    first = lambda x: x.transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(first(np.asarray(unshuffle(x))), numpy_networks.unshuffle(first(x)))
    np.testing.assert_array_equal(first(np.asarray(shuffle(x))), numpy_networks.shuffle(first(x)))
    np.testing.assert_array_equal(shuffle(unshuffle(x)), x)


@pytest.mark.slow
def test_fused_blocks_are_the_published_ones(jit, noise):
    block = FusedBlock(8, mlp_ratio=2, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(block)
    params = noise(nnx.to_pure_dict(state))
    rng = np.random.default_rng(1)
    h, c = rng.normal(size=(2, 4, 6, 8)).astype(np.float32), rng.normal(size=(2, 8)).astype(np.float32)
    w = {}
    names = {"se.conv_reduce": "squeeze", "se.conv_expand": "excite", "adaLN_modulation.1": "modulation"}
    for theirs, ours in names.items():
        w[f"{theirs}.weight"], w[f"{theirs}.bias"] = params[ours]["kernel"].T, params[ours]["bias"]
    w["conv_exp.weight"], w["conv_exp.bias"] = (
        params["expand"]["kernel"].transpose(3, 2, 0, 1),
        params["expand"]["bias"],
    )
    w["conv_pwl.weight"], w["conv_pwl.bias"] = params["outer"]["kernel"].T[..., None, None], params["outer"]["bias"]
    x = h.transpose(0, 3, 1, 2).astype(np.float64)
    want = numpy_hierarchies.fused_block(numpy_networks.Weights(w), x, c.astype(np.float64)).transpose(0, 2, 3, 1)
    out, _ = jit(lambda p, h, c: nnx.merge(graphdef, p)(h, None, Told(c)))(params, h, c)
    np.testing.assert_allclose(out, want, rtol=0, atol=2e-5 * np.abs(want).max())


@pytest.mark.slow
def test_keys_and_values_are_tapped(noise):
    init, apply = functional_init(
        lambda rngs: DiCo(**{**SMALL, "stages": (1, 1, "ca", 1, "f"), "head_width": 8}, rngs=rngs)
    )
    params = noise(jax.eval_shape(init, jax.random.key(0)))
    with taps.record("block/3/keys", "block/3/values", "block/3/attention/weights") as seen:
        whole = apply(params, *inputs())
    assert seen["block/3/keys"].shape == (3, 2, 2, 8)
    assert seen["block/3/attention/weights"].shape == (3, 2, 2, 2)
    with taps.override({"block/3/values": lambda v: 0 * v}):
        assert np.abs(apply(params, *inputs()) - whole).max() > 1e-2


@pytest.mark.slow
def test_only_where_there_is_attention_does_a_pixel_reach_all_others(build):
    """Channel attention aside, convolutions of one block reach a few pixels."""
    xt, t, labels = inputs()
    for middle, everywhere in (("c", False), ("a", True)):
        stages = (1, 1, middle, 1, 1)
        run, params = build(
            lambda rngs, stages=stages: DiCo(
                **{**SMALL, "shape": (32, 4, 2), "stages": stages, "head_width": 4}, rngs=rngs
            )
        )
        for stage in params["stack"].values():
            for block in stage["blocks"].values():
                if "channels" in block:
                    block["channels"]["kernel"][...] = 0
        wide = lambda x: np.concatenate([x] * 4, axis=1)
        change = wide(xt)
        change[:, 0, 0] += 1.0
        moved = np.abs(run(params, change, t, labels) - run(params, wide(xt), t, labels)).max((0, 2, 3)) > 1e-6
        assert moved[0]
        assert moved[-1] == everywhere


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (6, 4, 2)}, "divide by 4"),
        ({"width": 3}, "an even width"),
        ({"stages": (1, 1)}, "an odd number of them"),
        ({"stages": (1, 1, "cx", 1, 1)}, "a letter for each block"),
        ({"stages": (1, 1, "ca", 1, 1), "scan": True}, "cannot be scanned"),
        ({"stages": ("a", 1, 1, 1, 1), "head_width": 3}, "head_width=3 does not divide"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        functional_init(lambda rngs: DiCo(**{**SMALL, **change}, rngs=rngs))
