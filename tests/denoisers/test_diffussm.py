"""Diagonal state spaces against their recurrence, and DiffuSSM against its published definition."""

import jax
import numpy as np
import numpy_hierarchies
import pytest
from flax import nnx
from numpy_networks import looking, put_cross

from ddjax.denoisers import DiffuSSM, functional_init, layers, sizes, taps
from ddjax.denoisers.layers.diagonal_ssm import diagonal_kernel

SMALL = {"shape": (4, 6, 2), "width": 8, "depth": 2, "ratio": 4, "state": 6, "num_classes": 3}
T = np.array([0.0, 0.0625, 0.015625], np.float32)  # angles whose rounding does not count
WORDS = np.random.default_rng(4).normal(size=(3, 4, 5)).astype(np.float32)
VALID = np.array([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]], bool)  # of the second example there is none


def inputs():
    rng = np.random.default_rng(1)
    return rng.normal(size=(3, 4, 6, 2)).astype(np.float32), T, np.array([0, 3, 2], np.int32)


def published(params):
    """Our weights, a matrix for each place of a site."""
    w = {"pos_embed": params["position"]}

    def linear(name, p):
        w[f"{name}.weight"], w[f"{name}.bias"] = p["kernel"].T, p["bias"]

    def ssm(name, p):
        w[f"{name}.log_dt"], w[f"{name}.log_A_real"], w[f"{name}.A_imag"] = (
            p["log_step"],
            p["log_decay"],
            p["frequency"],
        )
        w[f"{name}.C"], w[f"{name}.D"] = p["read"][..., 0] + 1j * p["read"][..., 1], p["direct"]

    linear("x_embedder", params["embed"])
    linear("t_embedder.mlp.0", params["condition"]["time_in"])
    linear("t_embedder.mlp.2", params["condition"]["time_out"])
    w["y_embedder.embedding_table.weight"] = params["condition"]["labels"]
    for i, p in params["stack"]["blocks"].items():
        own, name = p["hourglass"], f"blocks.{i}"
        linear(f"{name}.adaLN_modulation.1", p["modulation"])
        for theirs, ours in (("W0", "inner"), ("W1", "gate"), ("W2", "mixed"), ("W3", "outer")):
            linear(f"{name}.{theirs}", own[ours])
        ratio = len(own["down"])
        kernels, biases = np.split(own["up"]["kernel"], ratio, axis=1), np.split(own["up"]["bias"], ratio)
        downs = np.split(own["down_bias"], ratio)
        for k in range(ratio):
            linear(f"{name}.up.{k}", {"kernel": kernels[k], "bias": biases[k]})
            linear(f"{name}.down.{k}", {"kernel": own["down"][k], "bias": downs[k]})
        if "cross" in p:
            put_cross(w, f"{name}.", p["cross"], 2)
        ssm(f"{name}.ssm", own["onward"])
        ssm(f"{name}.ssm_b", own["backward"])
    linear("final_layer.adaLN_modulation.1", params["final"]["modulation"])
    linear("final_layer.linear", params["final"]["out"])
    return w


def test_the_convolution_is_the_recurrence(x64, jit):
    """In float64, over an odd number of sites; the kernel alone is what an impulse at the first site leaves."""
    graphdef, state = nnx.split(jax.eval_shape(lambda: layers.DiagonalSSM(3, state=4, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    step, frequency = rng.uniform(0.1, 1.0, 3), rng.normal(size=(3, 2))
    decay, read, direct = -rng.uniform(0.1, 2.0, (3, 2)), rng.normal(size=(3, 2, 2)), rng.normal(size=3)
    params = {"log_step": np.log(step), "log_decay": np.log(-decay), "frequency": frequency, "read": read}
    params["direct"] = direct
    assert params.keys() == nnx.to_pure_dict(state).keys()
    layer = jit(lambda params, x: nnx.merge(graphdef, params)(x))
    x = rng.normal(size=(2, 13, 3))
    numbers = (step, decay + 1j * frequency, read[..., 0] + 1j * read[..., 1])
    want = numpy_hierarchies.recurrence(x, *numbers, direct)
    np.testing.assert_allclose(layer(params, x), want, atol=1e-12)
    impulse = np.zeros((1, 13, 3))
    impulse[:, 0] = 1
    want = numpy_hierarchies.recurrence(impulse, *numbers, 0 * direct)[0]
    np.testing.assert_allclose(jit(lambda *v: diagonal_kernel(*v, 13))(*numbers), want, atol=1e-12)


def test_it_starts_as_s4d_lin():
    layer = layers.DiagonalSSM(16, state=8, rngs=nnx.Rngs(0))
    steps = np.exp(layer.log_step[...])
    assert (steps > 0.99e-3).all()
    assert (steps < 0.101).all()
    np.testing.assert_allclose(np.exp(layer.log_decay[...]), 0.5, rtol=1e-6)
    np.testing.assert_allclose(layer.frequency[...][3], np.pi * np.arange(4), rtol=1e-6)
    with pytest.raises(ValueError, match="state=3"):
        layers.DiagonalSSM(16, state=3, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("ratio", "words"), [(4, True), *(pytest.param(*how, marks=pytest.mark.slow) for how in ((1, True), (4, False)))]
)
def test_it_is_the_published_network(ratio, words, build):
    """And looks at words behind each block."""
    more = {"context_width": 5, "heads": 2} if words else {}
    run, params = build(lambda rngs: DiffuSSM(**{**SMALL, "ratio": ratio}, **more, rngs=rngs))
    xt, t, labels = inputs()
    x = xt.transpose(0, 3, 1, 2).astype(np.float64)
    look = looking(WORDS, VALID, params["nothing"], 2) if words else None
    want = numpy_hierarchies.diffussm(published(params), x, 1000.0 * t, labels, ratio=ratio, look=look)
    want, cond = want.transpose(0, 2, 3, 1), {"sequence": WORDS, "valid": VALID, "cond": labels} if words else labels
    np.testing.assert_allclose(run(params, xt, t, cond), want, rtol=0, atol=2e-5 * np.abs(want).max())


@pytest.mark.slow
def test_the_published_size():
    """673 million parameters (Yan et al. 2024, section 4): within a per cent, theirs of the state is not said."""
    options = {**sizes.DIFFUSSM["XL"], "shape": (32, 32, 4), "num_classes": 1000, "out_channels": 8, "scan": True}
    init, _ = functional_init(lambda rngs: DiffuSSM(**options, rngs=rngs))
    number = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(jax.eval_shape(init, jax.random.key(0)))) / 1e6
    np.testing.assert_allclose(number, 673, rtol=0.01)


@pytest.mark.slow
def test_taps(noise):
    init, apply = functional_init(lambda rngs: DiffuSSM(**SMALL, rngs=rngs))
    params = noise(jax.eval_shape(init, jax.random.key(0)))
    with taps.record() as seen:
        apply(params, *inputs())
    assert seen["block/1/state"].shape == (3, 24, 16)
    assert seen["block/1"].shape == (3, 6, 8)
    assert seen["sites"].max() == 5


@pytest.mark.parametrize(
    ("change", "message"), [({"ratio": 5}, "ratio=5: expected a divisor"), ({"ratio": 3}, "ratio=3")]
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        functional_init(lambda rngs: DiffuSSM(**{**SMALL, **change}, rngs=rngs))
