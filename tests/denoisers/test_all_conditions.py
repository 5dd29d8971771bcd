"""The transformer with everything that it can be told: gradients, options that change nothing, rows, devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax.denoisers import DiT, functional_init, stack_blocks
from ddjax.training.mesh import make_mesh, state_shardings

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(2)
CONFIG = {
    "shape": (4, 4, 2), "patch": 2, "width": 16, "depth": 2, "heads": 2, "num_classes": 3, "latent": 2, "vector": 5,
    "context_width": 6, "image_channels": 1,
}  # fmt: skip
X, T = RNG.normal(size=(4, 4, 4, 2)).astype(np.float32), np.float32([0.1, 0.4, 0.7, 0.9])
VALID = np.array([[1, 1, 0], [0, 0, 1], [0, 0, 0], [1, 1, 1]], bool)
FLOATS = {"z": (4, 2), "vector": (4, 5), "sequence": (4, 3, 6), "image": (4, 4, 4, 1)}
COND = {name: RNG.normal(size=shape).astype(np.float32) for name, shape in FLOATS.items()}
COND |= {"valid": VALID, "cond": np.int32([2, 0, 3, 1])}


@functools.cache
def network(**more):
    init, apply = functional_init(lambda rngs: DiT(**CONFIG, **more, rngs=rngs))
    rng = np.random.default_rng(7)
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(x.dtype), shapes), apply


@functools.cache
def value_and_grad():
    params, apply = network()
    return jax.jit(jax.value_and_grad(loss(apply), has_aux=True))(params)


def loss(apply, x=X, t=T, cond=COND):
    def value(params):
        out = apply(params, x, t, cond)
        return ((out - 1) ** 2).mean(), out

    return value


def close(a, b, tolerance=2e-5):
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


def test_gradients_reach_every_parameter():
    for path, g in jax.tree_util.tree_leaves_with_path(value_and_grad()[1]):
        assert np.isfinite(g).all(), path
        assert np.abs(g).max() > 1e-6, path


@pytest.mark.parametrize("more", [{"scan": True}, {"remat": True}, {"scan": True, "remat": "dots"}], ids=str)
def test_options_that_change_nothing(more):
    params, apply = network(**more)
    plain = network()[0]
    params = stack_blocks(plain) if "scan" in more else plain
    (_, out), grads = jax.jit(jax.value_and_grad(loss(apply), has_aux=True))(params)
    (_, expected), same = value_and_grad()
    close(out, expected)
    jax.tree.map(lambda a, b: close(a, b, 1e-4), grads, stack_blocks(same) if "scan" in more else same)


def test_rows_vmap_and_bfloat16():
    params, apply = network()
    expected = np.asarray(value_and_grad()[0][1])
    for i in (0, 2):
        row = jax.tree.map(lambda c, i=i: c[i : i + 1], (X, T, COND))
        close(jax.jit(apply)(params, *row)[0], expected[i])
    halves = jax.tree.map(lambda c: c.reshape(2, 2, *c.shape[1:]), (X, T, COND))
    close(np.concatenate(jax.jit(jax.vmap(apply, in_axes=(None, 0, 0, 0)))(params, *halves)), expected)
    _, half = network(dtype=jnp.bfloat16)
    out = jax.jit(half)(params, X, T, COND)
    assert out.dtype == jnp.float32
    assert 1e-4 < np.abs(out - expected).max() / np.abs(expected).max() < 0.15


@pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 (fake) devices")
def test_eight_devices_are_one_network():
    params, apply = network()
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    shardings = state_shardings({"params": params}, mesh, fsdp_min_size=64)["params"]
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        spec = functools.reduce(lambda tree, key: tree[key.key], path, shardings).spec
        assert x.size < 2**9 or any(spec), path
    with jax.set_mesh(mesh):
        out = jax.jit(apply)(jax.device_put(params, shardings), X, T, COND)
        close(np.asarray(out), value_and_grad()[0][1])
