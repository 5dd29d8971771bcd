"""EDM2's kernels, normalised after each update by config, on one device and on eight."""

import functools

import jax
import numpy as np
import pytest

from ddjax import data
from ddjax.config import ConfigError, typed
from ddjax.experiment import build
from ddjax.training import mesh as meshes
from ddjax.training.setup import initial_state, train_step

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 (fake) devices"),
]

OPTIONS = {"width": 16, "multipliers": [1, 2], "blocks": 1, "attend_at": [4], "head_width": 8}


def experiment(project, objective="gaussian", **more):
    items = data.from_arrays(np.random.default_rng(0).uniform(-1, 1, (64, 8, 8, 1)).astype(np.float32))
    return build(
        typed(
            {
                "data": {"tokens": False},
                "process": {"name": "gaussian", "schedule": "vp_cosine"},
                "denoiser": {"name": "edm2", "kind": "edm", "options": OPTIONS | more},
                "objective": {"name": objective},
                "optimizer": {"learning_rate": 1e-2, "warmup": 0, "project": project},
                "train": {"steps": 8, "batch_size": 8},
                "sample": {"solver": "heun", "steps": 3},
            }
        ),
        items,
    ), items


def train(built, items, axes, devices):
    mesh = meshes.make_mesh(axes, jax.devices()[:devices])
    start = functools.partial(initial_state, built)
    state, shardings = meshes.init_sharded(start, mesh, (), jax.random.key(0), fsdp_min_size=256)
    step, batches, losses = meshes.compile_step(train_step(built), shardings, mesh), built.batches(items), []
    for _ in range(4):
        state, metrics = step(state, meshes.shard_batch(next(batches), mesh))
        losses.append(float(metrics["loss"]))
    return state, losses


def norms(params):
    """Root mean squares of the weights of each output of each kernel."""
    kernels = [
        np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == "kernel"
    ]
    return np.concatenate([np.sqrt((k**2).mean(tuple(range(k.ndim - 1)))).reshape(-1) for k in kernels])


def test_kernels_stay_normalised_on_a_mesh_too():
    built, items = experiment("edm2")
    (one, losses), (state, spread) = train(built, items, None, 1), train(built, items, {"data": 2, "fsdp": 4}, 8)
    np.testing.assert_allclose(spread, losses, atol=2e-4)
    for found in (one, state):
        np.testing.assert_allclose(norms(found.params), 1, atol=2e-4)
    kernel = state.params["encoder"]["0"]["conv_in"]["kernel"]
    assert kernel.addressable_shards[0].data.size < kernel.size
    free, _ = train(*experiment(""), None, 1)
    assert np.abs(norms(free.params) - 1).max() > 5e-3


def test_each_layer_of_scanned_blocks_has_kernels_of_its_own():
    built, items = experiment("edm2", blocks=3, multipliers=[1], attend_at=[], scan=True)
    state, _ = train(built, items, None, 1)
    kernel = np.asarray(state.params["encoder"]["0-2"]["conv_in"]["kernel"])
    np.testing.assert_allclose(np.sqrt((kernel**2).mean((1, 2, 3))), 1, atol=2e-4)


def test_it_is_of_the_network_alone():
    """What trains beside the network has kernels of its own."""
    built, items = experiment("edm2", "learned_uncertainty")
    state, _ = train(built, items, None, 1)
    np.testing.assert_allclose(norms(state.params["network"]), 1, atol=2e-4)
    with pytest.raises(ConfigError, match=r"config\.optimizer\.project='edm3' is unknown; it is one of edm2"):
        experiment("edm3")[0].optimizer()


def test_the_networks_own_uncertainty_is_learned_and_stays():
    built, items = experiment("edm2", "own_uncertainty", uncertainty=16)
    (state, losses), (_, others) = (train(built, items, *m) for m in ((None, 1), ({"data": 2, "fsdp": 4}, 8)))
    np.testing.assert_allclose(others, losses, atol=2e-4)
    np.testing.assert_allclose(norms(state.params), 1, atol=2e-4)
    begun, now = (p["uncertainty"] for p in (initial_state(built, jax.random.key(0)).params, state.params))
    assert np.abs(now["linear"]["kernel"] - begun["linear"]["kernel"]).max() > 1e-2
    np.testing.assert_array_equal(now["phases"], begun["phases"])
    assert "uncertainty" in built.trained(state.ema)[1]
    with pytest.raises(ConfigError, match="uncertainty"):
        experiment("edm2", "own_uncertainty")
