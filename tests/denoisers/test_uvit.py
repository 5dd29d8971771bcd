"""U-ViT against its published definition."""

import jax
import numpy as np
import numpy_networks
import pytest

from ddjax.denoisers import UViT, functional_init, stack_blocks, taps, unstack_blocks

SMALL = {"shape": (4, 6, 2), "patch": 2, "width": 12, "depth": 5, "heads": 3, "num_classes": 3}
T = np.array([0.0, 0.0625, 0.015625], np.float32)  # angles whose rounding does not count


def inputs():
    rng = np.random.default_rng(1)
    return rng.normal(size=(3, 4, 6, 2)).astype(np.float32), T, np.array([0, 3, 2], np.int32)


def published(params, heads, patch, channels):
    """Our weights by the authors' names, in their layout."""
    w, width = {}, params["embed"]["kernel"].shape[1]

    def linear(name, p):
        w[f"{name}.weight"] = p["kernel"].T
        if "bias" in p:
            w[f"{name}.bias"] = p["bias"]

    def norm(name, p):
        w[f"{name}.weight"], w[f"{name}.bias"] = p["scale"], p["bias"]

    def block(name, p):
        norm(f"{name}.norm1", p["norm_a"])
        norm(f"{name}.norm2", p["norm_m"])
        qkv = p["attention"]["qkv"]["kernel"].reshape(width, heads, 3, -1).swapaxes(1, 2).reshape(width, -1)
        linear(f"{name}.attn.qkv", {"kernel": qkv})
        linear(f"{name}.attn.proj", p["attention"]["out"])
        linear(f"{name}.mlp.fc1", p["mlp"]["up"])
        linear(f"{name}.mlp.fc2", p["mlp"]["down"])
        if "skip" in p:
            linear(f"{name}.skip_linear", p["skip"])

    kernel = params["embed"]["kernel"].reshape(patch, patch, channels, width)
    w["patch_embed.proj.weight"], w["patch_embed.proj.bias"] = kernel.transpose(3, 2, 0, 1), params["embed"]["bias"]
    w["pos_embed"] = params["position"][None]
    if "labels" in params["condition"]:
        w["label_emb.weight"] = params["condition"]["labels"]
    if "context" in params["condition"]:
        linear("context_embed", params["condition"]["context"])
    if "time_in" in params["condition"]:
        linear("time_embed.0", params["condition"]["time_in"])
        linear("time_embed.2", params["condition"]["time_out"])
    for theirs, ours in (("in_blocks", "down"), ("out_blocks", "up")):
        for i, p in params["stack"][ours]["blocks"].items():
            block(f"{theirs}.{i}", p)
    block("mid_block", params["stack"]["middle"])
    norm("norm", params["norm"])
    linear("decoder_pred", params["out"])
    if "conv" in params:
        w["final_layer.weight"], w["final_layer.bias"] = (
            params["conv"]["kernel"].transpose(3, 2, 0, 1),
            params["conv"]["bias"],
        )
    return w


def close(a, b, tolerance=2e-5):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"time_mlp": True, "conv": False, "num_classes": 0}, marks=pytest.mark.slow)]
)
def test_it_is_the_published_network(options, build):
    options = {**SMALL, **options}
    run, params = build(lambda rngs: UViT(**options, rngs=rngs))
    xt, t, labels = inputs()
    labels = labels if options["num_classes"] else None
    want = numpy_networks.uvit(
        published(params, 3, 2, 2), xt.transpose(0, 3, 1, 2).astype(np.float64), 1000.0 * t, labels, patch=2, heads=3
    )
    close(run(params, xt, t, labels), want.transpose(0, 2, 3, 1))


@pytest.mark.slow
def test_words_are_tokens(build):
    """Their network of texts; an entry that there is not is the learned vector, and so are all of no sequence."""
    options = {**SMALL, "context": (3, 5), "num_classes": 0}
    run, params = build(lambda rngs: UViT(**options, rngs=rngs))
    xt, t, _ = inputs()
    words = np.random.default_rng(2).normal(size=(3, 3, 5)).astype(np.float32)

    def want(words):
        x = xt.transpose(0, 3, 1, 2).astype(np.float64)
        y = numpy_networks.uvit(published(params, 3, 2, 2), x, 1000.0 * t, None, patch=2, heads=3, context=words)
        return y.transpose(0, 2, 3, 1)

    close(run(params, xt, t, {"sequence": words}), want(words))
    valid = np.array([[1, 1, 1], [0, 1, 0], [0, 0, 0]], bool)
    nothing = params["condition"]["nothing"]
    some = np.where(valid[..., None], words, nothing)
    close(run(params, xt, t, {"sequence": words, "valid": valid}), want(some))
    close(run(params, xt, t, None), want(np.broadcast_to(nothing, words.shape)))


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_an_encoder_may_be_stronger_than_its_decoder(scan, build):
    options = {**SMALL, "depth": (3, 2)}
    _, params = build(lambda rngs: UViT(**options, rngs=rngs))
    run, shapes = build(lambda rngs: UViT(**options, scan=scan, rngs=rngs))
    given = stack_blocks(params) if scan else params
    assert jax.tree.structure(given) == jax.tree.structure(shapes)
    xt, t, labels = inputs()
    x = xt.transpose(0, 3, 1, 2).astype(np.float64)
    want = numpy_networks.uvit(published(params, 3, 2, 2), x, 1000.0 * t, labels, patch=2, heads=3)
    close(run(given, xt, t, labels), want.transpose(0, 2, 3, 1))


@pytest.mark.slow
def test_no_label_is_the_null_label(build):
    run, params = build(lambda rngs: UViT(**SMALL, rngs=rngs))
    xt, t, _ = inputs()
    np.testing.assert_array_equal(run(params, xt, t, None), run(params, xt, t, np.full(3, 3, np.int32)))


@pytest.mark.slow
def test_blocks_go_between_scanned_and_not(noise):
    plain, scanned = (functional_init(lambda rngs, s=s: UViT(**SMALL, scan=s, rngs=rngs)) for s in (False, True))
    params = noise(jax.eval_shape(plain.init, jax.random.key(0)))
    stacked = stack_blocks(params)
    assert jax.tree.structure(stacked) == jax.tree.structure(jax.eval_shape(scanned.init, jax.random.key(0)))
    jax.tree.map(np.testing.assert_array_equal, unstack_blocks(stacked), params)
    close(jax.jit(scanned.apply)(stacked, *inputs()), jax.jit(plain.apply)(params, *inputs()))


@pytest.mark.slow
def test_taps_name_every_block_and_long_connection(noise):
    init, apply = functional_init(lambda rngs: UViT(**SMALL, rngs=rngs))
    params = noise(jax.eval_shape(init, jax.random.key(0)))
    with taps.record() as seen:
        whole = apply(params, *inputs())
    assert {f"block/{i}" for i in range(5)} <= seen.keys()
    np.testing.assert_array_equal(seen["block/3/skip"], seen["block/1"])
    np.testing.assert_array_equal(seen["block/4/skip"], seen["block/0"])
    with taps.override({"block/3/skip": lambda x: 0 * x}):
        assert np.abs(apply(params, *inputs()) - whole).max() > 1e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 4}, "depth=4: expected an odd number"),
        ({"depth": 1}, "at least 3 blocks"),
        ({"width": 9}, "sines and cosines"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"num_classes": -1}, "num_classes=-1"),
        ({"depth": (1, 2)}, "as many blocks behind the middle one as before"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        functional_init(lambda rngs: UViT(**{**SMALL, **change}, rngs=rngs))
