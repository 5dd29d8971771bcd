import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from ddjax.training import mesh as meshes
from ddjax.training.optimizers import adamw
from ddjax.training.state import init_state
from ddjax.training.step import make_train_step

from . import toy

pytestmark = pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 (fake) devices")

MESHES = {
    "data": {"data": 8},
    "fsdp": {"fsdp": 8},
    "both": {"data": 2, "fsdp": -1},
    "tensor": {"data": 4, "tensor": 2},
}
RULES = [("dense/kernel", P(None, "tensor"))]


def setup(axes, dtype, accumulate=1, devices=None):
    optimizer = adamw(1e-2, 20, warmup=2, clip=1.0)
    mesh = meshes.make_mesh(axes, devices)
    start = functools.partial(init_state, functools.partial(toy.init, dtype=dtype), optimizer)
    rules = RULES if "tensor" in axes else ()
    state, shardings = meshes.init_sharded(start, mesh, rules, jax.random.key(0), fsdp_min_size=1)
    step = make_train_step(toy.objective, toy.apply, optimizer, accumulate=accumulate)
    return mesh, state, meshes.compile_step(step, shardings, mesh)


def train(axes, dtype, accumulate=1, devices=None):
    mesh, state, step = setup(axes, dtype, accumulate, devices)
    for n in range(4):
        batch = toy.batch(16, dtype, seed=n, weighted=True, cond=True)
        state, metrics = step(state, meshes.shard_batch(batch, mesh))
    return state, metrics


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
def test_eight_devices_are_one(x64, axes):
    one = train({"data": 1}, np.float64, devices=jax.devices()[:1])
    toy.assert_same(train(axes, np.float64, accumulate=2), one, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("axes", [MESHES["data"], MESHES["both"]])
def test_eight_devices_are_one_in_float32(axes):
    one = train({"data": 1}, np.float32, devices=jax.devices()[:1])
    toy.assert_same(train(axes, np.float32), one, atol=1e-5)


@pytest.mark.slow
def test_state_is_born_and_stays_in_place():
    mesh, state, step = setup({"data": 2, "fsdp": 4}, np.float32)

    def kernel(s):
        return [
            s.params["dense"]["kernel"],
            s.ema["dense"]["kernel"],
            s.opt_state[1][0].mu["dense"]["kernel"],
        ]

    new, metrics = step(state, meshes.shard_batch(toy.batch(), mesh))
    for array in (*kernel(new), new.params["time"]):
        assert array.sharding.spec[0] == "fsdp"
        assert array.addressable_shards[0].data.shape[0] == 1
    assert new.key.sharding.is_fully_replicated
    assert new.step.sharding.is_fully_replicated
    assert metrics["loss"].sharding.is_fully_replicated
    assert all(a.is_deleted() for a in kernel(state))


@pytest.mark.slow
def test_accumulation_moves_no_rows_between_devices():
    mesh, state, step = setup({"data": 8}, np.float32, accumulate=2)
    text = step.lower(state, meshes.shard_batch(toy.batch(), mesh)).compile().as_text()
    assert "all-reduce" in text  # the gradient: the check sees collectives at all
    assert not re.findall(r"all-to-all|collective-permute|all-gather", text)


@pytest.mark.slow
def test_an_average_on_the_host_is_the_same_and_stays_there():
    mesh, state, step = setup({"data": 2, "fsdp": 4}, np.float32)
    places = jax.tree.map(lambda a: a.sharding, state)
    hosted = places._replace(ema=meshes.on_host(places.ema))
    there = jax.device_put(jax.tree.map(jnp.copy, state), hosted)
    compiled = meshes.compile_step(
        make_train_step(toy.objective, toy.apply, adamw(1e-2, 20, warmup=2, clip=1.0)), hosted, mesh
    )
    for n in range(2):
        batch = meshes.shard_batch(toy.batch(seed=n), mesh)
        before, (there, _) = there, compiled(there, batch)
        state, _ = step(state, batch)
        assert all(a.is_deleted() for a in jax.tree.leaves(before))
    toy.assert_same(jax.device_get(there.ema), jax.device_get(state.ema))
    toy.assert_same(there.params, state.params)
    assert {a.sharding.memory_kind for a in jax.tree.leaves(there.ema)} == {"pinned_host"}
    assert {a.sharding.memory_kind for a in jax.tree.leaves((there.params, there.opt_state))} == {"device"}


def test_our_networks_are_cut_as_the_layout_says():
    """Columns open a branch and rows close it; layers stay whole; what no rule fits falls to fsdp."""
    mesh = meshes.make_mesh({"fsdp": 2, "tensor": 2, "expert": 2})
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    block = {
        "attention": {"qkv": {"kernel": shape(6, 64, 192)}, "out": {"kernel": shape(6, 64, 64)}},
        "mlp": {"up": shape(6, 4, 64, 32), "down": shape(6, 4, 32, 64), "shared": {"up": {"kernel": shape(6, 64, 32)}}},
        "other": shape(64, 3, 5),
    }
    params = {"stack": {"blocks": block}, "tokens": {"table": shape(33, 64)}, "bias": shape(8)}
    state = {"params": params, "ema": params, "opt_state": ({"mu": params, "v_row": {"bias": shape(2, 99)}},)}
    got = meshes.state_shardings(state, mesh, fsdp_min_size=16)
    for tree in (got["params"], got["ema"], got["opt_state"][0]["mu"]):
        spec = jax.tree.map(lambda s: tuple(s.spec), tree)
        blocks = spec["stack"]["blocks"]
        assert blocks["attention"] == {
            "qkv": {"kernel": (None, "fsdp", "tensor")},
            "out": {"kernel": (None, "tensor", "fsdp")},
        }
        assert blocks["mlp"] == {
            "up": (None, "expert", "fsdp", "tensor"),
            "down": (None, "expert", "tensor", "fsdp"),
            "shared": {"up": {"kernel": (None, "fsdp", "tensor")}},
        }
        assert blocks["other"] == ()  # only its layers divide, and these stay whole
        assert spec["tokens"]["table"] == (None, ("tensor", "fsdp"))  # 33 rows: both over the features
        assert spec["bias"] == ()
    assert tuple(got["opt_state"][0]["v_row"]["bias"].spec) == ("fsdp",)  # not of its parameter's shape
    meshes.check_axes(got, mesh)
    for axes, message in [
        ({"tensor": 8}, "tensor=8 cuts nothing"),
        ({"model": 8}, "axis 'model'; its axes are of data"),
    ]:
        mesh = meshes.make_mesh(axes)
        with pytest.raises(ValueError, match=message):
            meshes.check_axes(meshes.state_shardings({"params": {"w": shape(3, 3)}}, mesh), mesh)


def test_rules_first_match_wins_and_small_arrays_are_whole():
    mesh = meshes.make_mesh({"fsdp": 4, "tensor": 2})
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    state = {
        "params": {"block": {"qkv": shape(64, 64), "out": shape(63, 64)}, "bias": shape(64)},
        "opt_state": ({"qkv": shape(64)},),
        "key": jax.eval_shape(lambda: jax.random.key(0)),
    }
    rules = [("qkv", P("fsdp", "tensor")), ("block", P("tensor"))]
    with pytest.raises(ValueError, match=r"does not fit params/block/out of shape \(63, 64\)"):
        meshes.state_shardings(state, mesh, rules, fsdp_min_size=128)
    got = meshes.state_shardings(state, mesh, rules[:1], fsdp_min_size=128)
    assert tuple(got["params"]["block"]["qkv"].spec) == ("fsdp", "tensor")
    assert tuple(got["params"]["block"]["out"].spec) == (None, "fsdp")  # 63 does not divide by 4
    assert tuple(got["params"]["bias"].spec) == ()
    assert tuple(got["opt_state"][0]["qkv"].spec) == ()  # a statistic of another shape passes the rule by
    assert tuple(got["key"].spec) == ()
    with pytest.raises(ValueError, match="'model'; the mesh has"):
        meshes.state_shardings(state, mesh, [("qkv", P("model"))])


def test_make_mesh():
    assert dict(meshes.make_mesh().shape) == {"data": 8}
    assert dict(meshes.make_mesh({"data": -1, "fsdp": 4}).shape) == {"data": 2, "fsdp": 4}
    assert dict(meshes.make_mesh({"data": 1}, jax.devices()[:1]).shape) == {"data": 1}
    assert set(meshes.make_mesh().axis_types) == {jax.sharding.AxisType.Auto}
    for axes, message in [
        ({"data": 3, "fsdp": -1}, "3 does not divide 8"),
        ({"data": 2, "fsdp": 2}, "takes 4 devices, there are 8"),
        ({"data": -1, "fsdp": -1}, "only one"),
        ({"data": 0}, "positive"),
    ]:
        with pytest.raises(ValueError, match=message):
            meshes.make_mesh(axes)


def test_batches():
    mesh = meshes.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    assert tuple(meshes.batch_sharding(mesh).spec) == (("data", "fsdp"),)
    assert tuple(meshes.batch_sharding(meshes.make_mesh({"data": 4, "expert": 2})).spec) == (("data", "expert"),)
    assert tuple(meshes.batch_sharding(meshes.make_mesh({"tensor": 8})).spec) == ()
    batch = {**toy.batch(8), "cond": None}
    placed = meshes.shard_batch(batch, mesh)
    assert placed["x0"].addressable_shards[0].data.shape == (2, toy.SITES)
    np.testing.assert_array_equal(placed["x0"], batch["x0"])
    with pytest.raises(ValueError, match=r"batch\['x0'\] of shape \(6, 4\)"):
        meshes.shard_batch(toy.batch(6), mesh)
