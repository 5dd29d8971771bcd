"""Networks of stages with AsCAN's and EfficientViT's blocks, against their published definitions."""

import functools

import jax
import numpy as np
import numpy_stages
import pytest
from flax import nnx
from numpy_networks import Weights, put_cross, softmax

from ddjax.denoisers import DiCo, functional_init, layers, stack_blocks, taps
from ddjax.training.mesh import make_mesh, state_shardings

T = np.array([0.0, 0.0625, 0.015625], np.float32)  # angles whose rounding does not count
VALID = np.array([[1, 0, 1], [1, 1, 1], [0, 1, 0]], bool)
BASE = {"shape": (8, 8, 2), "width": 4, "num_classes": 3, "mlp_ratio": 2, "head_width": 4}
NETWORKS = {
    # On the way up what is on the way down, in reverse.
    "ascan": {**BASE, "stages": ("ff", "fa", "faa", "a", "aaf", "af", "ff"), "context_width": 5},
    "cat": {**BASE, "stages": ("e", "ee", "e", "ee", "e"), "conditioning": "weights"},
    "cat-selected": {**BASE, "stages": ("e", "e", "e"), "conditioning": "weights", "kernels": 3},
    "cat-both": {**BASE, "stages": ("e", "fe", "e"), "conditioning": "modulation+weights"},
    "cat-modulated": {**BASE, "stages": ("e", "e", "e")},
}
WORDS = {**NETWORKS["ascan"], "stages": ("f", "aa", "f")}


def inputs(name):
    rng = np.random.default_rng(1)
    x, labels = rng.normal(size=(3, 8, 8, 2)).astype(np.float32), np.array([0, 3, 2], np.int32)
    if "context_width" not in NETWORKS[name]:
        return x, T, labels
    words = rng.normal(size=(3, 3, NETWORKS[name]["context_width"])).astype(np.float32)
    return x, T, {"sequence": words, "valid": VALID, "cond": labels}


def close(a, b, tolerance=2e-5):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


def made(p, c):
    """What a `layers.Generator` makes of one condition."""
    if "choose" in p:
        c = softmax(c @ p["choose"]["kernel"] + p["choose"]["bias"])
    return c @ np.asarray(p["weights"]["kernel"], np.float64)


def layer(w, name, p, image=True):
    """A linear layer or a convolution, in PyTorch's layout."""
    kernel = np.asarray(p["kernel"], np.float64)
    if kernel.ndim == 2:
        w[f"{name}.weight"] = kernel.T[..., None, None] if image else kernel.T
    else:
        w[f"{name}.weight"] = kernel.transpose(3, 2, 0, 1)
    if "bias" in p:
        w[f"{name}.bias"] = p["bias"]


def attention_layer(w, name, p, projection=None):
    layer(w, f"{name}qkv.conv", p["qkv"])
    for i in p["around"]:
        layer(w, f"{name}aggreg.{i}.0", p["around"][i])
        head = p["mix"].shape[-1]
        kernel = (
            p["mix"][int(i)].reshape(-1, head, head).transpose(1, 0, 2).reshape(1, 1, head, -1)
        )  # groups side by side
        layer(w, f"{name}aggreg.{i}.1", {"kernel": kernel})
    kernel = p["out"]["kernel"]
    layer(w, f"{name}proj.conv", {"kernel": kernel if projection is None else kernel + projection})


def bottleneck(w, name, p, c=None):
    layer(w, f"{name}inverted_conv.conv", p["up"])
    kernel, depthwise = p["depthwise"]["kernel"], p["depthwise"]
    if "generator" in depthwise:
        kernel = (kernel + made(depthwise["generator"], c).reshape(kernel.shape)).reshape(3, 3, 1, -1)
    layer(w, f"{name}depth_conv.conv", {"kernel": kernel, "bias": depthwise["bias"]})
    layer(w, f"{name}point_conv.conv", p["down"])


def ordered(kernel, heads, parts):
    """Columns by (head, part, feature) as by (part, head, feature)."""
    kernel = kernel.reshape(len(kernel), heads, parts, -1)
    return {"kernel": kernel.transpose(0, 2, 1, 3).reshape(len(kernel), -1)}


def block(w, name, letter, p, heads, c, projection):
    if "modulation" in p:
        layer(w, f"{name}adaLN_modulation.1", p["modulation"], image=False)
    if letter == "f":
        for theirs, ours in {"se.conv_reduce": "squeeze", "se.conv_expand": "excite"}.items():
            layer(w, name + theirs, p[ours], image=False)
        layer(w, f"{name}conv_exp", p["expand"])
        layer(w, f"{name}conv_pwl", p["outer"])
    elif letter == "e":
        attention_layer(w, f"{name}context_module.main.", p["attention"], projection)
        bottleneck(w, f"{name}local_module.main.", p["mlp"], c)
    else:
        linear = functools.partial(layer, image=False)
        linear(w, f"{name}attn.qkv", ordered(p["attention"]["qkv"]["kernel"], heads, 3))
        linear(w, f"{name}attn.proj", p["attention"]["out"])
        put_cross(w, name, p["cross"], heads)
        linear(w, f"{name}mlp.fc1", p["mlp"]["up"])
        linear(w, f"{name}mlp.fc2", p["mlp"]["down"])


def published(params, options, c):
    """Our weights in PyTorch's layout; c: vectors of the condition of one example, which makes weights of its own."""
    w, stages = {}, options["stages"]
    for i, level in enumerate(numpy_stages.levels_of(stages)):
        heads, projection = options["width"] * 2**level // options["head_width"], None
        if "projections" in params:
            size = options["width"] * 2**level
            projection = made(params["projections"][str(level)], c[level]).reshape(2 * size, size)
        for j, letter in enumerate(stages[i]):
            p = params["stack"][str(i)]["blocks"][str(j)]
            block(w, f"stages.{i}.{j}.", letter, p, heads, c[level], projection)
    embed = params["embed"]
    if "generator" in embed:
        kernel = embed["linear"]["kernel"] + made(embed["generator"], c[0]).reshape(embed["linear"]["kernel"].shape)
        embed = {"kernel": kernel.reshape(3, 3, -1, kernel.shape[-1]), "bias": embed["linear"]["bias"]}
    layer(w, "embed", embed)
    for name in ("down", "up", "reduce"):
        for i, p in params[name].items():
            layer(w, f"{name}.{i}", p)
    layer(w, "out", params["out"])
    if "modulation" in params:
        layer(w, "final", params["modulation"], image=False)
    return w | conditions(params)


def conditions(params):
    w = {}
    for i, p in params["conditions"].items():
        layer(w, f"conditions.{i}.mlp.0", p["time_in"], image=False)
        layer(w, f"conditions.{i}.mlp.2", p["time_out"], image=False)
        w[f"conditions.{i}.labels"] = p["labels"]
    return w


@pytest.mark.parametrize("shape", [(3, 5), (2, 1)])
def test_attention_at_two_scales_is_the_published_one(shape, noise):
    """Also where a head has more features than there are pixels: theirs is then the sum over pairs."""
    graphdef, state = nnx.split(layers.MultiScaleAttention(8, 2, rngs=nnx.Rngs(0)))
    params = noise(nnx.to_pure_dict(state))
    x = np.random.default_rng(1).normal(size=(2, *shape, 8)).astype(np.float32)
    projection = np.random.default_rng(2).normal(size=(2, 16, 8)).astype(np.float32)
    own = nnx.merge(graphdef, params)
    for made in (None, projection):
        out = own(x, projection=made)
        for i in range(2):
            w = Weights()
            attention_layer(w, "", params, projection=None if made is None else made[i])
            close(out[i], numpy_stages.last(numpy_stages.lite_mla(w, numpy_stages.first(x[i : i + 1]), 2))[0])


def test_the_inverted_bottleneck_is_the_published_one(noise):
    graphdef, state = nnx.split(layers.MBConv(4, 12, rngs=nnx.Rngs(0)))
    params, w = noise(nnx.to_pure_dict(state), scale=1.0), Weights()
    x = np.random.default_rng(1).normal(size=(2, 3, 5, 4)).astype(np.float32)
    bottleneck(w, "", params)
    close(nnx.merge(graphdef, params)(x), numpy_stages.last(numpy_stages.mbconv(w, numpy_stages.first(x))))


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_each_example_has_the_published_network_with_its_own_weights(name, build):
    options = NETWORKS[name]
    run, params = build(lambda rngs: DiCo(**options, rngs=rngs))
    xt, t, cond = inputs(name)
    labels = cond["cond"] if isinstance(cond, dict) else cond
    out = np.asarray(run(params, xt, t, cond))
    for i in range(3):
        row, steps = slice(i, i + 1), 1000.0 * t[i : i + 1]
        c = list(numpy_stages.conditions(Weights(conditions(params)), steps, labels[row]))
        w = published(params, options, [v[0] for v in c])
        told = {} if labels is cond else {"words": cond["sequence"][row].astype(np.float64), "valid": VALID[row]}
        x = numpy_stages.first(xt[row].astype(np.float64))
        want = numpy_stages.hierarchy(
            w, x, steps, labels[row], options["stages"], head_width=options["head_width"], **told
        )
        np.testing.assert_allclose(out[i], numpy_stages.last(want)[0], rtol=0, atol=2e-5 * np.abs(out).max())


@pytest.mark.slow
def test_words_that_are_not_there_say_nothing(build):
    """A network of words without words sees the learned one, whatever stands in the entries that are not valid."""
    run, params = build(lambda rngs: DiCo(**WORDS, rngs=rngs))
    xt, t, cond = inputs("ascan")
    none = run(params, xt, t, cond["cond"])
    close(run(params, xt, t, {**cond, "valid": np.zeros_like(VALID)}), none)
    nothing = np.broadcast_to(params["nothing"], (3, 1, 5))
    close(run(params, xt, t, {"sequence": nothing, "cond": cond["cond"]}), none)
    changed = np.where(VALID[..., None], cond["sequence"], 7.0)
    with_words = run(params, xt, t, cond)
    close(run(params, xt, t, {**cond, "sequence": changed}), with_words)
    assert np.abs(with_words - none).max() > 1e-2 * np.abs(none).max()


@pytest.mark.slow
def test_words_are_told_alike_with_remat_and_scan(jit, noise):
    init, apply = functional_init(lambda rngs: DiCo(**WORDS, rngs=rngs))
    params = noise(jax.eval_shape(init, jax.random.key(0)))
    value = lambda apply: jit(jax.value_and_grad(lambda p: (apply(p, *inputs("ascan")) ** 2).sum()))
    expected, grads = value(apply)(params)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        # Every example has words.
        assert (np.abs(g).max() > 0) == ("nothing" not in jax.tree_util.keystr(path)), path
    for more in ({"remat": True}, {"scan": True}):
        _, other = functional_init(lambda rngs, more=more: DiCo(**WORDS, **more, rngs=rngs))
        own, same = (stack_blocks(tree) if "scan" in more else tree for tree in (params, grads))
        found, found_grads = value(other)(own)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        jax.tree.map(lambda a, b: close(a, b, 1e-4), found_grads, same)


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 (fake) devices")
def test_words_are_told_alike_on_eight_devices(noise):
    init, apply = functional_init(lambda rngs: DiCo(**WORDS, rngs=rngs))
    params, args = noise(jax.eval_shape(init, jax.random.key(0))), inputs("ascan")
    args = jax.tree.map(lambda x: np.concatenate([x, x[:1]]), args)  # rows that the devices divide
    expected = jax.jit(apply)(params, *args)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    shardings = state_shardings({"params": params}, mesh, fsdp_min_size=64)["params"]
    with jax.set_mesh(mesh):
        close(np.asarray(jax.jit(apply)(jax.device_put(params, shardings), *args)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ascan", "cat"])
def test_taps_of_the_new_blocks(name, noise):
    """Of 16 pixels 2 heads of 4 features, or 4 at two scales."""
    options, tapped = {
        "ascan": (WORDS, {"block/1/keys": (3, 16, 2, 4), "block/1/cross": (3, 16, 8)}),
        "cat": (NETWORKS["cat-modulated"], {"block/1/keys": (3, 16, 4, 4), "block/1/mix": (3, 4, 4, 8)}),
    }[name]
    init, apply = functional_init(lambda rngs: DiCo(**options, rngs=rngs))
    params = noise(jax.eval_shape(init, jax.random.key(0)))
    with taps.record(*tapped) as seen:
        whole = apply(params, *inputs(name))
    assert {point: value.shape for point, value in seen.items()} == tapped
    with taps.override({list(tapped)[1]: lambda v: 0 * v}):
        assert np.abs(apply(params, *inputs(name)) - whole).max() > 1e-3 * np.abs(whole).max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": ("e", "e")}, "an odd number"),
        ({"stages": ("ee",)}, "an odd number"),
        ({"shape": (4, 8, 2), "stages": (1, 1, 1, 1, 1, 1, 1)}, "divide by 8"),
        ({"context_width": 5}, 'stages need an "a"'),
        ({"conditioning": "weights", "stages": (1, "a", 1)}, 'stages need an "e"'),
        ({"conditioning": "attention"}, "'attention'"),
        ({"kernels": 4}, "kernels=4 are mixed"),
        ({"kernels": 1, "conditioning": "weights"}, "2 or more to choose from"),
        ({"head_width": 3}, "head_width=3 does not divide"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        functional_init(lambda rngs: DiCo(**{**BASE, "stages": ("e", "e", "e"), **change}, rngs=rngs))
