"""DiffiT against its published definition, in latent and in image space."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_hierarchies
import pytest
from flax import nnx
from numpy_networks import looking, put_cross

from ddjax.denoisers import DiffiT, DiT, functional_init, layers, taps
from ddjax.denoisers.layers.attention import Layout, relative_bias

LATENT = {
    "shape": (4, 6, 2), "patch": 2, "width": 12, "depth": 2, "heads": 3, "num_classes": 3, "qkv_bias": True,
    "conditioning": "attention", "relative": True,
}  # fmt: skip
IMAGE = {"shape": (8, 8, 2), "width": 8, "multipliers": (1, 2), "blocks": 2, "heads": 2, "num_classes": 3}
T = np.array([0.0, 0.0625, 0.015625], np.float32)  # angles whose rounding does not count
WORDS = np.random.default_rng(4).normal(size=(3, 4, 5)).astype(np.float32)
VALID = np.array([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]], bool)  # of the second example there is none


def inputs(shape):
    rng = np.random.default_rng(1)
    return rng.normal(size=(3, *shape)).astype(np.float32), T, np.array([0, 3, 2], np.int32)


def put_linear(w, name, p):
    w[f"{name}.weight"] = p["kernel"].T
    if "bias" in p:
        w[f"{name}.bias"] = p["bias"]


def put_conv(w, name, p):
    w[f"{name}.weight"], w[f"{name}.bias"] = p["kernel"].transpose(3, 2, 0, 1), p["bias"]


def put_block(w, name, p, heads):
    """Theirs has two biases of q, k and v, of which only the sum counts."""
    own = p["attention"]
    width = len(own["qkv"]["kernel"])
    ordered = lambda v: v.reshape(*v.shape[:-1], heads, 3, -1).swapaxes(-2, -3).reshape(*v.shape[:-1], 3 * width)
    put_linear(w, f"{name}attn.qkv", {k: ordered(v) for k, v in own["qkv"].items()})
    put_linear(w, f"{name}attn.qkv_temb", {"kernel": ordered(own["told"]["kernel"])})
    put_linear(w, f"{name}attn.proj", own["out"])
    w[f"{name}attn.relative_position_bias_table"] = own["relative"]
    put_linear(w, f"{name}mlp.fc1", p["mlp"]["up"])
    put_linear(w, f"{name}mlp.fc2", p["mlp"]["down"])


def put_condition(w, p):
    put_linear(w, "t_embedder.mlp.0", p["time_in"])
    put_linear(w, "t_embedder.mlp.2", p["time_out"])
    w["y_embedder.embedding_table.weight"] = p["labels"]


def close(a, b, tolerance=2e-5):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


def test_latent_network_is_the_published_one(build):
    run, params = build(lambda rngs: DiT(**LATENT, rngs=rngs))
    w, (xt, t, labels) = {}, inputs((4, 6, 2))
    put_condition(w, params["condition"])
    kernel = params["embed"]["kernel"].reshape(2, 2, 2, 12)
    w["x_embedder.proj.weight"], w["x_embedder.proj.bias"] = kernel.transpose(3, 2, 0, 1), params["embed"]["bias"]
    w["pos_embed"] = params["position"]
    for i, p in params["stack"]["blocks"].items():
        put_block(w, f"blocks.{i}.", p, 3)
    put_linear(w, "final_layer.linear", params["final"]["out"])
    x = xt.transpose(0, 3, 1, 2).astype(np.float64)
    want = numpy_hierarchies.diffit(w, x, 1000.0 * t, labels, patch=2, heads=3)
    close(run(params, xt, t, labels), want.transpose(0, 2, 3, 1))


@pytest.mark.slow
@pytest.mark.parametrize(("window", "words"), [(4, False), (2, False), (4, True)])
def test_image_network_is_the_published_one(window, words, build):
    """Windows of half the image at first, then of all of it; and of less at both resolutions. Or looking at words."""
    run, params = build(lambda rngs: DiffiT(**IMAGE, window=window, context_width=5 * words, rngs=rngs))
    w, (xt, t, labels) = {}, inputs((8, 8, 2))
    put_condition(w, params["condition"])
    put_conv(w, "tokenizer", params["embed"])
    places = ["down.0.0", "down.0.1", "downsample.1", "down.1.0", "down.1.1"]
    places += ["up.1.0", "up.1.1", "upsample.0", "up.0.0", "up.0.1"]
    blocks = [params[part][str(i)] for part in ("encoder", "decoder") for i in range(len(params[part]))]
    for name, p in zip(places, blocks, strict=True):
        if "sample" in name:
            put_conv(w, name, p["conv"])
            continue
        put_block(w, f"{name}.", p, 2)
        w[f"{name}.norm.weight"], w[f"{name}.norm.bias"] = p["norm_in"]["scale"], p["norm_in"]["bias"]
        put_conv(w, f"{name}.conv", p["conv_in"])
        if "shortcut" in p:
            put_conv(w, f"{name}.shortcut", p["shortcut"])
        if words:
            put_cross(w, f"{name}.", p["cross"], 2)
    final = params["final"]
    w["head.0.weight"], w["head.0.bias"] = final["norm"]["scale"], final["norm"]["bias"]
    put_conv(w, "head.1", final["out"])
    x = xt.transpose(0, 3, 1, 2).astype(np.float64)
    look = looking(WORDS, VALID, params["nothing"], 2) if words else None
    sizes = {"levels": 2, "blocks": 2, "heads": 2, "window": window}
    want = numpy_hierarchies.diffit_image(w, x, 1000.0 * t, labels, **sizes, look=look)
    cond = {"sequence": WORDS, "valid": VALID, "cond": labels} if words else labels
    close(run(params, xt, t, cond), want.transpose(0, 2, 3, 1))


def test_a_bias_belongs_to_places_not_to_their_order():
    """Some of the sites in another order have the biases that they have among all."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(3 * 5 * 3, 2))
    whole = np.asarray(relative_bias(jnp.asarray(table), (2, 3, 2)))
    order = np.array([[3, 0, 11], [5, 7, 2]])
    some = relative_bias(jnp.asarray(table), (2, 3, 2), Layout(jnp.asarray(order), None))
    for i, sites in enumerate(order):
        np.testing.assert_array_equal(some[i], whole[:, sites][:, :, sites])
    seen = relative_bias(jnp.asarray(table), (2, 3, 2), Layout(jnp.arange(12), None, keys=np.array([4, 1])))
    np.testing.assert_array_equal(seen, whole[:, :, [4, 1]])
    assert whole[0, 0, 11] != whole[0, 11, 0]
    with pytest.raises(ValueError, match="neither a past nor neighbours"):
        relative_bias(jnp.asarray(table), (2, 3, 2), Layout(jnp.arange(12), None, past=(0, 0)))


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"route": (0, 1, 0.5)}, {"downsample": 2}, {"task_share": 0.5}], ids=str)
def test_it_goes_with_what_chooses_sites(more, build):
    """Biases follow the sites through routes and thinned keys."""
    options = {**LATENT, "shape": (8, 8, 2), **more}
    run, params = build(lambda rngs: DiT(**options, rngs=rngs))
    args = inputs((8, 8, 2))
    out = run(params, *args, rng=jax.random.key(0), train="route" in more)
    assert np.isfinite(out).all()
    for p in params["stack"]["blocks"].values():
        p["attention"]["relative"] = p["attention"]["relative"] + np.float32([0.5, 1.0, 2.0])
    # A constant for each head moves no softmax: any keys that a route or thinning leaves get the same.
    close(run(params, *args, rng=jax.random.key(0), train="route" in more), out)


def test_what_is_told_counts_as_another_token(x64):
    """Queries, keys and values of sites and time add up: with the same projection, that of their sum."""
    layer = layers.Attention(8, 2, told=8, dtype=jnp.float64, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    x, c = rng.normal(size=(2, 5, 8)), rng.normal(size=(2, 8))
    layer.told.kernel[...] = layer.qkv.kernel[...]
    both = layer(jnp.asarray(x), c=jnp.asarray(c))
    layer.told.kernel[...] = 0 * layer.told.kernel[...]
    np.testing.assert_allclose(both, layer(jnp.asarray(x + c[:, None]), c=jnp.asarray(c)), rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_windows_and_their_taps(noise):
    init, apply = functional_init(lambda rngs: DiffiT(**IMAGE, rngs=rngs))
    params = noise(jax.eval_shape(init, jax.random.key(0)))
    with taps.record() as seen:
        whole = apply(params, *inputs((8, 8, 2)))
    assert seen["encoder/0/keys"].shape == (3 * 4, 16, 2, 4)
    assert seen["encoder/3/keys"].shape == (3, 16, 2, 8)
    np.testing.assert_array_equal(seen["skip/0"], seen["encoder/1"])
    with taps.override({"skip/0": lambda h: 0 * h}):
        assert np.abs(apply(params, *inputs((8, 8, 2))) - whole).max() > 1e-2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda rngs: DiT(**{**LATENT, "conditioning": "tokens"}, rngs=rngs), "expected some of modulation, attention"),
        (lambda rngs: DiT(**{**LATENT, "attention": "linear", "qkv_bias": False}, rngs=rngs), "is told nothing"),
        (lambda rngs: DiT(**{**LATENT, "merge": (4, 2, 2)}, rngs=rngs), "merged sites have no place"),
        (lambda rngs: DiffiT(**IMAGE, window=3, rngs=rngs), "window=3 does not divide an image of 8 by 8"),
        (lambda rngs: DiffiT(**{**IMAGE, "shape": (6, 7, 2)}, rngs=rngs), "do not allow"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        functional_init(make)
