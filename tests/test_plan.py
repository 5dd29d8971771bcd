"""Plans against arithmetic done by hand."""

import math

import jax
import pytest

from ddjax import chips, plan
from ddjax.collectives import Collective, by_axes
from ddjax.config import typed

WIDTH, DEPTH, SITES, SYMBOLS = 128, 4, 64, 63
BLOCK = {"qkv": 3 * WIDTH**2, "out": WIDTH**2, "mlp": 2 * 4 * WIDTH**2, "modulation": 6 * WIDTH**2}
EDGES = {"table": (SYMBOLS + 1) * WIDTH, "final": WIDTH * SYMBOLS, "final modulation": 2 * WIDTH**2}
EDGES["times"] = (256 + WIDTH) * WIDTH


def config(mesh, batch=16, **options):
    network = {"width": WIDTH, "depth": DEPTH, "heads": 4, "mlp": "gelu", "scan": True, "remat": "full", **options}
    train = {"mesh": mesh, "batch_size": batch}
    return typed({"denoiser": {"name": "text", "options": network}, "train": train})


def made(mesh, devices, compiler="none", batch=16, **settings):
    data = plan.described((SITES,), SYMBOLS, 0)
    return plan.plan(config(mesh, batch), data, devices, compiler=compiler, **settings)


def test_bytes_of_each_array_by_hand():
    p = made({"data": 2, "fsdp": 4, "tensor": 2}, 16)
    rows = {row.path: row for row in p.rows}
    qkv = rows["stack/blocks/attention/qkv/kernel"]
    assert (qkv.shape, qkv.spec, qkv.bytes) == ((4, 128, 384), "-, fsdp, tensor", 4 * DEPTH * BLOCK["qkv"] // 8)
    down = rows["stack/blocks/mlp/down/kernel"]
    assert (down.spec, down.bytes) == ("-, tensor, fsdp", 4 * DEPTH * 4 * WIDTH**2 // 8)
    assert rows["tokens/table"].spec == "-, tensor"  # 8,192 numbers: not worth gathering over fsdp
    assert rows["final/out/bias"].spec == "whole"
    up = rows["stack/blocks/mlp/up/bias"]
    assert (up.spec, up.bytes) == ("-, tensor", 4 * DEPTH * 4 * WIDTH // 2)
    assert p.state["params"] == sum(row.bytes for row in p.rows)
    assert p.state["ema"] == p.state["params"]
    assert p.state["optimizer"] == 2 * p.state["params"] + 4 + 4  # AdamW's two moments and two counts
    assert p.parameters == sum(math.prod(row.shape) for row in p.rows)
    sites = 16 * SITES
    dense = DEPTH * (sites * (12 * WIDTH**2) + 16 * BLOCK["modulation"] + 2 * sites * SITES * WIDTH)
    edges = sites * EDGES["final"] + 16 * (EDGES["final modulation"] + EDGES["times"])
    assert p.flops == pytest.approx(3 * 2 * (dense + edges), rel=0.01)  # the first layers need no gradient of inputs
    assert "least times" not in plan.format_plan(p)


def test_states_of_several_parts():
    """Numbers and symbols: the batch's parts, and the arithmetic of a table's network by hand."""
    network = {"name": "mixed_table", "kind": "noise+posterior", "options": {"width": 32, "hidden": [64]}}
    process = {"name": "product", "schedule": "vp_cosine", "options": {"symbols": "uniform"}}
    values = {"denoiser": network, "process": process, "objective": {"name": "tabddpm"}, "train": {"batch_size": 16}}
    data = plan.described({"numbers": (3,), "colour": (1,)}, {"numbers": None, "colour": 5}, 2)
    p = plan.plan(typed(values), data, 1, compiler="none")
    assert p.parameters == sum(math.prod(row.shape) for row in p.rows)
    assert p.state["ema"] == p.state["params"] == 4 * p.parameters
    time, numbers, hidden, out = 32 * 32, 3 * 32, 32 * 64, 64 * (3 + 5)  # symbols are looked up
    forward, inputs = 2 * time + numbers + hidden + out, time + hidden + out  # numbers and the clock need no gradient
    assert p.flops == 2 * 16 * (2 * forward + inputs)


def test_attention_is_planned_as_accelerators_compute_it():
    """On a CPU, where plans are made, the default is another program."""
    for given, planned in ((None, "xla"), ("cudnn", "xla"), ("linear", "linear")):
        assert plan._plannable(config({}, attention=given)).denoiser.options["attention"] == planned
    graph = typed({"denoiser": {"name": "graph", "options": {"width": 8}}})
    assert plan._plannable(graph) is graph  # has no such option


@pytest.mark.slow
def test_what_is_read_of_a_config_stays():
    """Networks without attention, or with one of their own, can be planned too."""
    linear = {"name": "dit", "kind": "noise", "options": {"width": 16, "depth": 1, "heads": 1, "patch": 4}}
    values = {
        "process": {"name": "gaussian", "schedule": "vp_cosine"}, "objective": {"name": "gaussian"},
        "sample": {"solver": "ddim"}, "train": {"batch_size": 4, "eval_every": 0},
    }  # fmt: skip
    rows = {}
    for attention in (None, "linear"):
        options = linear["options"] | ({} if attention is None else {"attention": attention})
        config = typed({**values, "denoiser": {**linear, "options": options}})
        made = plan.plan(config, plan.described((8, 8, 1), None, 0), 1, compiler="none")
        rows[attention] = {row.path for row in made.rows}
    assert rows["linear"] > rows[None]


def test_times_by_hand():
    """16 devices in nodes of 8: sums over `fsdp` stay inside, those over `data` go between."""
    sums = [
        Collective("all-gather", ("fsdp",), 8, 80e6, 10, "a"),  # 70 MB ten times
        Collective("all-reduce", ("data",), 2, 50e6, 1, "b"),  # 50 MB
    ]
    state = {"params": 10e6, "optimizer": 20e6, "ema": 10e6, "ema on the host": 0, "held": 0}
    p = plan.Plan({"data": 2, "fsdp": 8}, "h200", 1, 1, (), state, "", 1, 1, tuple(sums), int(16e12))
    assert [plan.spans(c, p.mesh) for c in sums] == [8, 9]
    assert p.seconds() == pytest.approx(
        {
            "arithmetic": 1e12 / 989.4e12,
            "memory": (2 * 40e6 + 2 * 10e6) / 4.8e12,
            "links": 700e6 / 450e9,
            "network": 50e6 / 50e9,
        }
    )
    assert p.total == 40e6 + 1


def test_slices_of_tpus():
    names = {("v5p", 256): "v5p:4x8x8", ("v5p", 64): "v5p:4x4x4", ("v5e", 32): "v5e:4x8", ("v4", 8): "v4:2x2x2"}
    assert {key: chips.slice_shape(*key) for key in names} == names
    for key in (("v5p", 48), ("v6e", 512)):
        with pytest.raises(ValueError, match="are no slice"):
            chips.slice_shape(*key)
    with pytest.raises(ValueError, match="unknown chip 'b200'"):
        chips.chip("b200")


def test_what_cannot_be_planned_is_refused():
    for mesh, message in [
        ({"data": 3}, "takes 3 devices, there are 8"),
        ({"model": 8}, "the mesh has an axis 'model'"),
        ({"expert": 8}, "expert=8 cuts nothing"),
        ({"data": -1, "fsdp": 3}, "3 does not divide 8"),
    ]:
        with pytest.raises(ValueError, match=message):
            made(mesh, 8)
    with pytest.raises(ValueError, match="must be a multiple of 8"):
        made({"data": 8}, 8, batch=12)
    with pytest.raises(ValueError, match="unknown compiler 'gpu'"):
        made({"data": 8}, 8, "gpu")
    if jax.device_count() < 64:
        with pytest.raises(ValueError, match="needs as many CPU devices"):
            made({"data": 64}, 64, "cpu", batch=64)


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 (fake) devices")
def test_memory_falls_and_traffic_is_as_fsdp_predicts():
    """In float32 on a CPU, which sums gradients whole.

    The matrices of blocks are gathered forward and backward; the conditioning's forward only, for its few numbers (no
    sites) travel instead in the backward pass.
    """
    cut = DEPTH * sum(BLOCK.values()) + EDGES["times"] + EDGES["final modulation"]
    whole, totals = made({"data": 8}, 8).state, []
    for ways in (1, 2, 4, 8):
        p = made({"data": 8 // ways, "fsdp": ways}, 8, "cpu")
        for name in ("params", "optimizer", "ema"):
            small = whole[name] - 4 * cut * (2 if name == "optimizer" else 1)  # what is not worth cutting
            assert p.state[name] == pytest.approx(small + (whole[name] - small) / ways, rel=0.01)
        batch = 4 * 16 * SITES // 8
        assert p.arguments == pytest.approx(sum(p.state.values()) + batch, rel=0.001)
        totals.append(p.total)
        traffic = {}
        for (kind, _), (_, sent) in by_axes(p.collectives).items():
            traffic[kind] = traffic.get(kind, 0) + sent
        if ways == 8:
            gathered = cut + DEPTH * (BLOCK["qkv"] + BLOCK["out"] + BLOCK["mlp"])
            assert traffic["all-gather"] == pytest.approx(4 * gathered * 7 / 8, rel=0.1)
        assert traffic["all-reduce"] == pytest.approx(2 * 4 * p.parameters * 7 / 8, rel=0.1)
    assert totals == sorted(totals, reverse=True)
