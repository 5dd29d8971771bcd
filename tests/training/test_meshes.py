"""Our networks on every mesh of eight devices: the losses and samples of one device, and every axis at work."""

import functools

import jax
import numpy as np
import pytest

from ddjax import data
from ddjax.collectives import collectives
from ddjax.config import typed
from ddjax.experiment import build
from ddjax.predictions import bind
from ddjax.sampling import sample
from ddjax.training import mesh as meshes
from ddjax.training.setup import initial_state, train_step

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 (fake) devices")

SIZES = {"width": 64, "depth": 2, "heads": 8, "scan": True}
NETWORKS = {
    "dit": {"name": "dit", "options": {**SIZES, "patch": 2, "remat": "dots"}},
    "text": {"name": "text", "options": {**SIZES, "mlp": "gated", "mlp_width": 128}},
    "experts": {
        "name": "text",
        "options": {**SIZES, "mlp": "experts", "mlp_width": 64, "experts": {"experts": 8, "top_k": 2, "shared": 1}},
    },
    "pooled": {"name": "dit", "options": {**SIZES, "patch": 2, "mlp": "pooled", "experts": {"experts": 8}}},
}
MESHES = {
    "dit": [
        {"data": 8}, {"fsdp": 8}, {"tensor": 8}, {"sequence": 8}, {"data": 2, "fsdp": 4}, {"fsdp": 2, "tensor": 4},
        {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 2, "tensor": 2, "sequence": 2}, {"tensor": 2, "sequence": 4},
    ],
    "text": [{"sequence": 8}, {"tensor": 8}, {"data": 2, "fsdp": 2, "sequence": 2}, {"fsdp": 4, "tensor": 2}],
    "experts": [
        {"expert": 8}, {"data": 2, "expert": 4}, {"fsdp": 2, "expert": 4}, {"tensor": 2, "expert": 4},
        {"fsdp": 2, "tensor": 2, "expert": 2}, {"sequence": 2, "expert": 4}, {"fsdp": 8},
    ],
    "pooled": [{"data": 8}, {"fsdp": 2, "expert": 4}],  # one pool, whatever the devices
}  # fmt: skip


def experiment(network):
    """An experiment on tokens of 8 x 8 pixels, or sequences of 32."""
    rng = np.random.default_rng(0)
    shape = (8, 8, 1) if network in ("dit", "pooled") else (32,)
    symbols = rng.integers(0, 15, (64, *(1 for _ in shape)))  # one in the whole of an item: soon learned
    items = data.from_arrays(np.broadcast_to(symbols, (64, *shape)).astype(np.int32), num_symbols=15)
    options = {"optimizer": {"learning_rate": 3e-3, "warmup": 2}, "train": {"steps": 20, "batch_size": 16}}
    return build(
        typed({"denoiser": NETWORKS[network], "objective": {"name": "cross_entropy"}, **options}), items
    ), items


@functools.cache
def train(network, axes, accumulate=1):
    """Losses of 20 steps, samples from the average (on that mesh), the state, and the compiled step's text."""
    built, items = experiment(network)
    axes = dict(axes)
    mesh = meshes.make_mesh(axes, jax.devices()[: np.prod(list(axes.values()))])
    start = functools.partial(initial_state, built)
    state, shardings = meshes.init_sharded(start, mesh, (), jax.random.key(0), fsdp_min_size=256)
    meshes.check_axes(shardings, mesh)
    initial = jax.tree.map(np.array, state.params)
    step, losses = meshes.compile_step(train_step(built), shardings, mesh), []
    batches = built.batches(items)
    first = meshes.shard_batch(next(batches), mesh)
    text = step.lower(state, first).compile().as_text()
    for n in range(20):
        batch = first if n == 0 else meshes.shard_batch(next(batches), mesh)
        state, metrics = step(state, batch)
        losses.append(metrics["loss"])
    with jax.set_mesh(mesh):
        denoise = bind(built.apply, state.ema, built.process, built.kind)
        settings = {"solver": built.solver(), "times": built.times(8), "shape": (8, *built.state_shape)}
        drawn = sample(jax.random.key(1), denoise, built.process, **settings).x0
    moved = max(
        np.abs(a - b).max() for a, b in zip(jax.tree.leaves(initial), jax.tree.leaves(state.params), strict=True)
    )
    assert moved > 0.01  # it learns, so the equality is of something
    return np.array(losses), np.asarray(drawn), state, text


CASES = [(network, tuple(axes.items())) for network, cases in MESHES.items() for axes in cases]
NAMES = [f"{network}-" + "-".join(f"{name}{size}" for name, size in axes) for network, axes in CASES]


@pytest.mark.slow
@pytest.mark.parametrize(("network", "axes"), CASES, ids=NAMES)
def test_any_mesh_gives_the_losses_and_samples_of_one_device(network, axes):
    losses, drawn, *_ = train(network, (("data", 1),))
    here, drawn_here, state, text = train(network, axes)
    np.testing.assert_allclose(here, losses, atol=1e-5, rtol=0)
    np.testing.assert_array_equal(drawn_here, drawn)
    check_cuts(network, dict(axes), state)
    check_collectives(network, dict(axes), text)


def check_cuts(network, axes, state):
    """Arrays lie in pieces of the expected size on each device, those of the average and the moments too."""
    n = {name: axes.get(name, 1) for name in ("fsdp", "tensor", "expert")}
    block, mu = lambda tree: tree["stack"]["blocks"], state.opt_state[1][0].mu
    for tree in (state.params, state.ema, mu):
        whole = 2 * 64 * 3 * 64  # two layers, width 64
        assert piece(block(tree)["attention"]["qkv"]["kernel"]) * n["fsdp"] * n["tensor"] == whole
        assert piece(block(tree)["attention"]["out"]["kernel"]) * n["fsdp"] * n["tensor"] == whole // 3
        if network == "experts":
            experts = 2 * 8 * 64 * 64
            assert piece(block(tree)["mlp"]["down"]) * n["fsdp"] * n["tensor"] * n["expert"] == experts


def piece(array):
    return array.addressable_shards[0].data.size


def check_collectives(network, axes, text):
    """The compiled step has the traffic that each axis brings, and over the devices of that axis."""
    found = {(c.kind, c.over) for c in collectives(text, tuple(axes.items()))}
    over = lambda name: {kind for kind, names in found if name in names}
    for name, size in axes.items():
        assert size == 1 or over(name), (name, found)
    if axes.get("fsdp", 1) > 1:
        assert "all-gather" in over("fsdp"), found  # of parameters
    if axes.get("sequence", 1) > 1:
        assert "all-gather" in over("sequence"), found  # of keys and values
    if axes.get("expert", 1) > 1 and network == "experts":
        assert "all-to-all" in over("expert"), found  # of sites on their way into the experts
    for name in ("data", "tensor"):
        if axes.get(name, 1) > 1:
            assert {"all-reduce", "reduce-scatter"} & over(name), found
