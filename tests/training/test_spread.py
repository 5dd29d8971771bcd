import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import ddjax
from ddjax.batching import chunks
from ddjax.experiment import build, load_data
from ddjax.training.mesh import make_mesh
from ddjax.training.spread import Spread

needs_eight = pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 (fake) devices")


@needs_eight
def test_rows_are_shared_out_and_come_back_whole():
    spread = Spread(make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))
    assert spread.ways == 4
    tree = {"x": np.arange(24.0).reshape(8, 3), "n": np.arange(8), "none": None}
    placed = spread.rows(tree)
    assert {shard.data.shape for shard in placed["x"].addressable_shards} == {(2, 3)}
    assert placed["n"].dtype == jnp.int32
    assert placed["none"] is None
    back = spread.whole(placed)
    np.testing.assert_array_equal(back["x"], tree["x"])
    assert len(back["x"].devices()) == 1


def test_without_a_mesh_nothing_moves():
    x = jnp.arange(3)
    assert Spread().whole({"x": x})["x"] is x
    assert Spread().rows(x) is x
    assert Spread().ways == 1


def test_chunks_are_multiples():
    assert [c.tolist() for c in chunks(5, 3, 2)] == [[0, 1, 2, 3], [4, 4, 4, 4]]
    assert [c.tolist() for c in chunks(3, 9, 4)] == [[0, 1, 2, 2]]


@needs_eight
@pytest.mark.slow
def test_a_run_over_a_mesh_says_what_one_device_says(monkeypatch):
    experiment = build(tiny.config(), load_data(tiny.config(), "train"))
    noise = lambda a: a + 0.3 * jax.random.normal(jax.random.key(1), a.shape)  # the last layer begins at 0
    run = ddjax.Run(experiment, jax.tree.map(noise, experiment.init(jax.random.key(0))), 0)
    mesh = make_mesh({"data": 2, "fsdp": 4})
    with monkeypatch.context() as patch:
        patch.setattr(ddjax.run, "state_shardings", lambda p, m: ddjax.training.state_shardings(p, m, (), 64))
        over = run.over(mesh)
    assert any(len({str(s.index) for s in leaf.addressable_shards}) == 4 for leaf in jax.tree.leaves(over.params))
    key, labels = jax.random.key(3), np.arange(11) % 10
    x0 = np.asarray(run.sample(key, 11, cond=labels, guidance=2.0))
    np.testing.assert_array_equal(over.sample(key, 11, cond=labels, guidance=2.0), x0)
    np.testing.assert_array_equal(over.sample(key, 11, cond=labels, guidance=2.0, batch_size=3), x0)
    shown = []
    over.sample(key, 11, cond=labels, guidance=2.0, callback=lambda part: shown.append(np.asarray(part.x)))
    np.testing.assert_array_equal(shown[-1], x0)
    path = over.sample(key, 11, cond=labels, guidance=2.0, trajectory=True)
    assert path.trajectory.shape == (4, 11, 8, 8, 1)
    np.testing.assert_array_equal(path.x0, x0)
    items = ddjax.data.load("digits", "test")[:13]
    one, many = (r.nelbo(key, items["x0"], cond=items["cond"], batch_size=5) for r in (run, over))
    assert one.t_range == many.t_range
    for name in ("prior", "diffusion", "reconstruction", "diffusion_error"):
        np.testing.assert_allclose(getattr(many, name), getattr(one, name), rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal(over.alone.sample(key, 2), run.sample(key, 2))
