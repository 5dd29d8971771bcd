"""Selective scans against the recurrence, and DiS against its published definition."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_networks
import pytest
from flax import nnx
from numpy_networks import looking, put_cross

from ddjax.denoisers import StateSpace, functional_init, layers

SMALL = {"shape": (4, 6, 2), "patch": 2, "width": 12, "depth": 5, "state": 3, "num_classes": 3}
T = np.array([0.0, 0.0625, 0.015625], np.float32)  # angles whose rounding does not count
WORDS = np.random.default_rng(4).normal(size=(3, 4, 5)).astype(np.float32)
VALID = np.array([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]], bool)  # of the second example there is none


def inputs():
    rng = np.random.default_rng(1)
    return rng.normal(size=(3, 4, 6, 2)).astype(np.float32), T, np.array([0, 3, 2], np.int32)


def published(params, patch, channels):
    """Our weights by the authors' names, in their layout."""
    w, width = {}, params["embed"]["kernel"].shape[1]

    def linear(name, p):
        w[f"{name}.weight"] = p["kernel"].T
        if "bias" in p:
            w[f"{name}.bias"] = p["bias"]

    def block(name, p):
        mixer = p["mixer"]
        w[f"{name}.norm.weight"] = p["norm"]["scale"]
        linear(f"{name}.mixer.in_proj", mixer["inner"])
        linear(f"{name}.mixer.out_proj", mixer["outer"])
        for ours, b, a_log in (("onward", "", "A_log"), ("backward", "_b", "A_b_log")):
            own = mixer[ours]
            w[f"{name}.mixer.conv1d{b}.weight"] = own["conv"].T[:, None]
            w[f"{name}.mixer.conv1d{b}.bias"] = own["conv_bias"]
            linear(f"{name}.mixer.x_proj{b}", own["select"])
            linear(f"{name}.mixer.dt_proj{b}", own["step"])
            w[f"{name}.mixer.{a_log}"], w[f"{name}.mixer.D{b}"] = own["log_decay"], own["direct"]
        if "skip" in p:
            linear(f"{name}.skip_linear", p["skip"])
        if "cross" in p:
            put_cross(w, f"{name}.", p["cross"], 2)

    kernel = params["embed"]["kernel"].reshape(patch, patch, channels, width)
    w["patch_embed.proj.weight"], w["patch_embed.proj.bias"] = kernel.transpose(3, 2, 0, 1), params["embed"]["bias"]
    w["pos_embed"] = params["position"][None]
    linear("time_embed.0", params["condition"]["time_in"])
    linear("time_embed.2", params["condition"]["time_out"])
    if "labels" in params["condition"]:
        w["label_emb.embedding_table.weight"] = params["condition"]["labels"]
        linear("final_layer.adaLN_modulation.1", params["modulation"])
    for theirs, ours in (("in_blocks", "down"), ("out_blocks", "up")):
        for i, p in params["stack"][ours]["blocks"].items():
            block(f"{theirs}.{i}", p)
    block("mid_block", params["stack"]["middle"])
    w["norm_f.weight"] = params["norm"]["scale"]
    linear("final_layer.linear", params["out"])
    return w


def test_the_scan_is_the_recurrence(x64):
    """In float64, over more sites than the rounds of the scan are tested by powers of two."""
    rng = np.random.default_rng(0)
    x, step = rng.normal(size=(2, 13, 3)), rng.uniform(0.1, 2.0, (2, 13, 3))
    decay, write, read = -rng.uniform(0.1, 2.0, (3, 4)), rng.normal(size=(2, 13, 4)), rng.normal(size=(2, 13, 4))
    h, want = np.zeros((2, 3, 4)), []
    for n in range(13):
        h = np.exp(step[:, n, :, None] * decay) * h + (step[:, n] * x[:, n])[..., None] * write[:, n, None]
        want.append((h * read[:, n, None]).sum(-1))
    np.testing.assert_allclose(layers.selective_scan(x, step, decay, write, read), np.stack(want, 1), atol=1e-12)


@pytest.mark.slow
def test_steps_begin_between_a_thousandth_and_a_tenth():
    mixer = layers.Mamba(16, rngs=nnx.Rngs(0))
    for direction in (mixer.onward, mixer.backward):
        steps = jax.nn.softplus(direction.step.bias[...])
        assert (steps > 0.99e-3).all()
        assert (steps < 0.101).all()
        np.testing.assert_allclose(jnp.exp(direction.log_decay[...])[5], np.arange(1, 17), rtol=1e-6)


@pytest.mark.parametrize(
    ("num_classes", "words"),
    [(3, True), *(pytest.param(*how, marks=pytest.mark.slow) for how in ((0, False), (3, False)))],
)
def test_it_is_the_published_network(num_classes, words, build):
    """And looks at words behind each mixer."""
    more = {"num_classes": num_classes} | ({"context_width": 5, "heads": 2} if words else {})
    run, params = build(lambda rngs: StateSpace(**{**SMALL, **more}, rngs=rngs))
    xt, t, labels = inputs()
    labels = labels if num_classes else None
    x = xt.transpose(0, 3, 1, 2).astype(np.float64)
    look = looking(WORDS, VALID, params["nothing"], 2) if words else None
    want = numpy_networks.dis(published(params, 2, 2), x, 1000.0 * t, labels, patch=2, look=look)
    want, cond = want.transpose(0, 2, 3, 1), {"sequence": WORDS, "valid": VALID, "cond": labels} if words else labels
    np.testing.assert_allclose(run(params, xt, t, cond), want, rtol=0, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize(
    ("change", "message"),
    [({"depth": 4}, "odd number"), ({"state": 0}, "state=0"), ({"dropout": 2.0}, "dropout=2.0")],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        functional_init(lambda rngs: StateSpace(**{**SMALL, **change}, rngs=rngs))
