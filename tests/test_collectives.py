"""Collectives counted in programs written by hand, and in compiled ones whose traffic is known."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from ddjax.collectives import by_axes, collectives
from ddjax.training.mesh import make_mesh

MESH = (("data", 2), ("tensor", 4))
TEXT = """HloModule step, entry_computation_layout={(f32[8])->f32[8]}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%inner (p: (s32[], f32[8,4], /*index=2*/f32[2])) -> (s32[], f32[8,4]) {
  %rs.1 = bf16[2,4]{1,0} reduce-scatter(%y), channel_id=2, replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
}

%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %ag = f32[8,16]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={1}
  %w = (s32[], f32[8,4]{1,0}) while(%t), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"2"}}
}

%below (p: (s32[], f32[8])) -> pred[] {
  %three = s32[]{:T(128)} constant(3)
  %turn = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%turn, %three), direction=LT, metadata={op_name="lt"}
}

%third (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %named = f32[8]{0} all-gather(%x), replica_groups=mesh['a'=2,'b'=4,'c'=1] {'b'}, dimensions={0}
  %part = f32[8]{0} all-gather(%x), replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}, dimensions={0}
  %half = f32[8]{0} all-gather(%x), replica_groups=mesh['a'=8] {'a':(4)2}, dimensions={0}
}

%all-reduce-scatter.1 (p: f32[8]) -> f32[2] {
  %sum = bf16[64]{0} all-reduce(%p), replica_groups=[2,4]<=[8], to_apply=%add
}

%never (p: f32[]) -> f32[] {
  %lost = f32[8]{0} all-reduce(%x), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %w2 = (s32[], f32[8,4]{1,0}) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %ar = (f32[100]{0}, f32[28]{0}) all-reduce(%g, %h), replica_groups=[1,8]<=[8], to_apply=%add
  %ats = f32[4,2]{1,0} all-to-all(%q), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  %cp = u32[8]{0} collective-permute(%r), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %ags = (f32[3]{0}, f32[12]{0}) all-gather-start(%s), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %agd = f32[12]{0} all-gather-done(%ags)
  %w3 = (s32[], f32[8]{0}) while(%t), condition=%below, body=%third
  %fused = f32[8]{0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %alone = f32[8]{0} all-reduce(%x), replica_groups=[8,1]<=[8], to_apply=%add
}
"""


def test_a_program_by_hand():
    found = {c.name: c for c in collectives(TEXT, MESH)}
    assert found.keys() == {"rs.1", "ag", "ar", "ats", "cp", "ags", "named", "part", "half", "sum"}
    assert found["sum"].kind == "reduce-scatter"
    #        over, group, bytes of the whole, runs, sent
    for name, over, size, whole, count, sent in [
        ("ag", ("tensor",), 4, 8 * 16 * 4, 5, 5 * 512 * 3 / 4),
        ("rs.1", ("data",), 2, 2 * (2 * 4 * 2), 10, 10 * 32 / 2),
        ("ar", ("data", "tensor"), 8, 128 * 4, 1, 2 * 512 * 7 / 8),
        ("ats", ("data",), 2, 8 * 4, 1, 32 / 2),
        ("cp", ("tensor",), 2, 8 * 4, 1, 32),
        ("ags", ("tensor",), 4, 12 * 4, 1, 48 * 3 / 4),
        ("named", ("tensor",), 4, 32, 3, 3 * 32 * 3 / 4),
        ("part", ("data",), 2, 32, 3, 3 * 32 / 2),  # numbered the other way round: 0 and 4, 1 and 5, ...
        ("half", ("tensor",), 2, 32, 3, 3 * 32 / 2),  # 0 and 1, 2 and 3: half of the axis
        ("sum", ("tensor",), 4, 128, 1, 128 * 3 / 4),
    ]:
        c = found[name]
        assert (c.over, c.size, c.bytes, c.count, c.sent) == (over, size, whole, count, sent), name
    assert by_axes(list(found.values()))["all-gather", ("tensor",)] == (12, 1920 + 36 + 72 + 48)
    with pytest.raises(ValueError, match="cannot read the groups"):
        collectives("ENTRY %main (x: f32[8]) -> f32[8] {\n  %a = f32[8] all-reduce(%x), replica_groups=new\n}\n", MESH)
    with pytest.raises(ValueError, match="no ENTRY"):
        collectives("not HLO", MESH)


@pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 (fake) devices")
def test_a_compiled_loop():
    """Three turns of a sum over `tensor` of (16, 4) numbers on each device, and one over `data` behind them."""
    mesh = make_mesh(dict(MESH))

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=P(("data", "tensor")), out_specs=P(("data", "tensor")), check_vma=False
    )
    def program(x):
        turn = lambda x, _: (jnp.sin(jax.lax.psum(x, "tensor")), None)
        return jax.lax.all_gather(jax.lax.scan(turn, x, None, length=3)[0], "data").sum(0)

    text = program.lower(jnp.zeros((128, 4))).compile().as_text()
    assert by_axes(collectives(text, MESH)) == {
        ("all-reduce", ("tensor",)): (3, 3 * 2 * (16 * 4 * 4) * 3 / 4),
        ("all-gather", ("data",)): (1, (2 * 16 * 4 * 4) / 2),
    }
