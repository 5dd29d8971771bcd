"""DiMR against its published definition."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_hierarchies
import pytest
from numpy_networks import looking, put_cross

from ddjax.denoisers import MultiResolution, functional_init, layers, stack_blocks, taps

SMALL = {"shape": (4, 8, 2), "widths": (8, 4), "depths": (3, 5), "heads": 2, "kernel": 5, "num_classes": 3}
T = np.array([0.0, 0.7, 0.25], np.float32)
WORDS = np.random.default_rng(4).normal(size=(3, 4, 5)).astype(np.float32)
VALID = np.array([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]], bool)  # of the second example there is none
VECTOR = np.random.default_rng(5).normal(size=(3, 6)).astype(np.float32)


def inputs():
    rng = np.random.default_rng(1)
    return rng.normal(size=(3, 4, 8, 2)).astype(np.float32), T, np.array([0, 3, 2], np.int32)


def published(params, heads):
    """Our weights by the authors' names, in their layout."""
    w = {}

    def linear(name, p):
        w[f"{name}.weight"] = p["kernel"].T
        if "bias" in p:
            w[f"{name}.bias"] = p["bias"]

    def conv(name, p):
        w[f"{name}.weight"], w[f"{name}.bias"] = p["kernel"].transpose(3, 2, 0, 1), p["bias"]

    def vector(name, p):
        w[f"{name}.param0"], w[f"{name}.param1"] = p["noise"], p["data"]
        w[f"{name}.nodecay_weight"], w[f"{name}.nodecay_bias"] = p["slope"] - 1, p["offset"]

    def layer_norm(name, p):
        vector(f"{name}.weight", p["scale"])
        vector(f"{name}.bias", p["bias"])

    def block(name, p):
        if "attention" in p:
            kernel = p["attention"]["qkv"]["kernel"]
            width = len(kernel)
            kernel = kernel.reshape(width, heads, 3, -1).swapaxes(1, 2).reshape(width, -1)
            linear(f"{name}.block1.query_key_value", {"kernel": kernel})
            linear(f"{name}.block1.dense", p["attention"]["out"])
            vector(f"{name}.block1.norm.scale", p["norm_a"]["scale"])
            if "cross" in p:
                put_cross(w, f"{name}.", p["cross"], heads)
        else:
            conv(f"{name}.block1.1", p["conv"])
        vector(f"{name}.block2.norm.scale", p["norm_m"]["scale"])
        for theirs, ours in (("w0", "gate"), ("w1", "up"), ("w2", "down")):
            linear(f"{name}.block2.{theirs}", p["mlp"][ours])

    for i, p in params["branches"].items():
        name, stack = f"stages.{i}", params["stack"][i]
        conv(f"{name}.input_layer.1", p["embed"])
        w[f"{name}.input_layer.3.position_embeddings.weight"] = p["position"].reshape(-1, p["position"].shape[-1])
        if "labels" in p:
            w[f"{name}.class_embeds.weight"] = p["labels"]
        if "vector" in p:
            linear(f"{name}.vector", p["vector"])
        if "below" in p:
            layer_norm(f"{name}.upsample.0", p["below_norm"])
            linear(f"{name}.upsample.1.kernel", p["below"])
            layer_norm(f"{name}.upsample.2", p["beside_norm"])
        if "out" in p:
            layer_norm(f"{name}.output_layer.0", p["norm"])
            conv(f"{name}.output_layer.2", p["out"])
        down, up = stack["down"]["blocks"], stack["up"]["blocks"]
        blocks = [*(down[str(j)] for j in range(len(down))), stack["middle"], *(up[str(j)] for j in range(len(up)))]
        for j, own in enumerate(blocks):
            block(f"{name}.blocks.{j}", own)
            if "skip" in own:
                linear(f"{name}.skip_denses.{j - len(down) - 1}", own["skip"])
    return w


def random(init, noise):
    """Normal weights, scales of norms around 1, where they hide nothing behind them."""
    scale = lambda path: len(path) > 1 and path[-2].key == "scale" and path[-1].key in ("data", "noise")
    params = noise(jax.eval_shape(init, jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(lambda path, x: x + np.float32(scale(path)), params)


def close(a, b, tolerance=2e-5):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("told", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_it_is_the_published_network(told, jit, noise):
    """The image, and what the lower branch says of it. Told: it also looks at words, and a vector is a token."""
    more = {"context_width": 5, "vector": 6} if told else {}
    init, apply = functional_init(lambda rngs: MultiResolution(**SMALL, **more, output_heads=True, rngs=rngs))
    params = random(init, noise)

    def both(*args):
        with taps.record("output/0") as seen:
            y = apply(params, *args)
        return seen["output/0"], y

    xt, t, labels = inputs()
    x = xt.transpose(0, 3, 1, 2).astype(np.float64)
    also = {"look": looking(WORDS, VALID, params["nothing"], 2), "vector": VECTOR} if told else {}
    cond = {"sequence": WORDS, "valid": VALID, "vector": VECTOR, "cond": labels} if told else labels
    wanted = numpy_hierarchies.dimr(published(params, 2), x, t.astype(np.float64), labels, heads=2, **also)
    for out, want in zip(jit(both)(xt, t, cond), wanted, strict=True):
        close(out, want.transpose(0, 2, 3, 1))


@pytest.mark.slow
def test_a_branch_may_see_means_and_three_may_follow(jit, noise):
    """The lowest of three branches, on means of 2 x 2 pixels in patches of 2, is theirs of the means."""
    options = {**SMALL, "widths": (8, 4, 4), "depths": (3, 3, 3), "patches": (2, 2, 1), "pools": (2, 1, 1)}
    init, apply = functional_init(lambda rngs: MultiResolution(**options, output_heads=True, rngs=rngs))
    params = random(init, noise)
    xt, t, labels = inputs()

    def lowest(*args):
        with taps.record("output/0", "output/1") as seen:
            y = apply(params, *args)
        return seen["output/0"], seen["output/1"].shape, y

    out, middle, y = lowest(xt, t, labels)
    assert (middle, y.shape) == ((3, 2, 4, 2), (3, 4, 8, 2))
    means = xt.reshape(3, 2, 2, 4, 2, 2).mean((2, 4)).transpose(0, 3, 1, 2).astype(np.float64)
    weights = {k: v for k, v in published(params, 2).items() if k.startswith("stages.0.")}
    want = numpy_hierarchies.dimr(weights, means, t.astype(np.float64), labels, heads=2)[0]
    close(out, want.transpose(0, 2, 3, 1))


@pytest.mark.slow
def test_blocks_go_between_scanned_and_not(noise, jit):
    plain, scanned = (
        functional_init(lambda rngs, s=s: MultiResolution(**SMALL, scan=s, rngs=rngs)) for s in (False, True)
    )
    params = random(plain.init, noise)
    stacked = stack_blocks(params)
    assert jax.tree.structure(stacked) == jax.tree.structure(jax.eval_shape(scanned.init, jax.random.key(0)))
    close(jit(scanned.apply)(stacked, *inputs()), jit(plain.apply)(params, *inputs()))


@pytest.mark.slow
def test_taps_number_the_blocks_of_all_branches(noise):
    init, apply = functional_init(lambda rngs: MultiResolution(**SMALL, rngs=rngs))
    params = random(init, noise)
    with taps.record() as seen:
        whole = apply(params, *inputs())
    assert {f"block/{i}" for i in range(8)} <= seen.keys()
    np.testing.assert_array_equal(seen["block/2/skip"], seen["block/0"])
    np.testing.assert_array_equal(seen["block/7/skip"], seen["block/3"])
    assert seen["branch/0"].shape == (3, 2, 4, 8 * 4)
    assert "output/0" not in seen
    with taps.override({"block/1/values": lambda v: 0 * v}):
        assert np.abs(apply(params, *inputs()) - whole).max() > 1e-3


def test_norms_tend_to_their_ends(x64):
    """Far out, a vector is the one of noise or of data; in the middle of a straight slope their mean."""
    vector = layers.TimeVector(2, 1.0)
    vector.data[...], vector.noise[...], vector.slope[...] = jnp.float32([1, 2]), jnp.float32([3, 6]), jnp.full(2, 80.0)
    np.testing.assert_allclose(vector(jnp.asarray([0.0, 0.5, 1.0])), [[1, 2], [2, 4], [3, 6]], rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depths": (3, 4)}, "depth=4: expected an odd number"),
        ({"depths": (3, 3, 3)}, "expected one of each"),
        ({"patches": (2, 2)}, "down to 1"),
        ({"patches": (1, 1)}, "down to 1"),
        ({"shape": (3, 4, 2)}, "sides that divide by 2"),
        ({"symbols_in": 4, "symbols_out": 4, "output_heads": True}, "output_heads are for a continuous state"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        functional_init(lambda rngs: MultiResolution(**{**SMALL, **change}, rngs=rngs))
