import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax import training
from ddjax.training import CheckpointError, Checkpoints, abstract_state, load_ema
from ddjax.training.manifest import problem
from ddjax.training.mesh import make_mesh

from . import toy

OPTIMIZER = training.adamw(1e-2, 100)


def make(step=0, dtype=jnp.float32, **changes):
    state = toy.state(OPTIMIZER, dtype, seed=step)
    moments = jax.tree.map(lambda a: a + jnp.asarray(step, a.dtype), state.opt_state)
    return state._replace(step=jnp.int32(step), opt_state=moments, **changes)


def write(directory, *steps, **options):
    with Checkpoints(directory, keep=10, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, make(step), data={"next_index": np.int64(step)}, config={"width": 4})


def read(directory, abstract=None):
    with Checkpoints(directory, keep=10) as checkpoints:
        found = checkpoints.restore(abstract_state(make()) if abstract is None else abstract)
        return found, checkpoints.problems


def biggest(directory, step):
    """The file of a step that holds the most of the state's data."""
    return max((directory / str(step) / "state").rglob("d/*"), key=lambda p: p.stat().st_size)


def truncate(directory, step):
    os.truncate(biggest(directory, step), 12)
    return "has 12 bytes, expected"


def delete(directory, step):
    biggest(directory, step).unlink()
    return "is missing"


def flip(directory, step):
    path = biggest(directory, step)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return "sha256 differs"


def unvouch(directory, step):
    (directory / "manifests" / f"{step}.json").unlink()
    return "no manifest"


def spoil_manifest(directory, step):
    (directory / "manifests" / f"{step}.json").write_text('{"state/')
    return "unreadable"


DAMAGE = [truncate, delete, flip, unvouch, spoil_manifest]


@pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 (fake) devices")
def test_small_arrays_are_not_cut_up_over_devices(tmp_path, monkeypatch):
    """One of the eight that hold it hands it over, and all have it again; a large one comes in parts."""
    everywhere = jax.sharding.NamedSharding(make_mesh(), jax.sharding.PartitionSpec())
    values = {"small": np.arange(64.0, dtype=np.float32).reshape(8, 8), "large": np.ones((2**18,), np.float32)}
    state = jax.device_put({**values, "key": jax.random.key(3)}, everywhere)
    cut, slices = [], jax.lax.slice_in_dim
    monkeypatch.setattr(
        jax.lax, "slice_in_dim", lambda x, *args, **more: cut.append(x.shape) or slices(x, *args, **more)
    )
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        found, _ = checkpoints.restore(abstract_state(state))
    assert set(cut) == {values["large"].shape}
    for name, value in values.items():
        np.testing.assert_array_equal(found[name], value)
        assert found[name].sharding == everywhere
    assert (jax.random.key_data(found["key"]) == jax.random.key_data(jax.random.key(3))).all()


def test_round_trip_is_bitwise(tmp_path):
    assert read(tmp_path)[0] is None
    write(tmp_path, 3)
    (state, extras), problems = read(tmp_path)
    assert problems == []
    toy.assert_same(state, make(3))
    assert jax.random.key_impl(state.key) == jax.random.key_impl(make(3).key)
    assert jax.dtypes.issubdtype(state.key.dtype, jax.dtypes.prng_key)
    assert (extras["step"], extras["data"], extras["config"]) == (3, {"next_index": 3}, {"width": 4})
    assert extras["versions"]["jax"] == jax.__version__


@pytest.mark.slow
def test_a_restored_state_trains_on_as_the_saved_one(tmp_path):
    step = jax.jit(training.make_train_step(toy.objective, toy.apply, OPTIMIZER))
    write(tmp_path, 3)
    toy.assert_same(step(read(tmp_path)[0][0], toy.batch())[0], step(make(3), toy.batch())[0])


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_reported_and_the_older_step_used(tmp_path, damage):
    write(tmp_path, 1, 2, 3)
    words = damage(tmp_path, 3)
    with pytest.warns(UserWarning, match=f"checkpoint 3 is damaged: .*{words}.*; using 2"):
        (state, extras), problems = read(tmp_path)
    assert len(problems) == 1
    toy.assert_same(state, make(2))
    assert extras["step"] == 2
    # The step's number is free again: a later save there is neither refused nor ignored.
    write(tmp_path, 3)
    toy.assert_same(read(tmp_path)[0][0], make(3))


def test_all_damaged_is_an_error_that_lists_each_and_keeps_the_files(tmp_path):
    write(tmp_path, 1, 2)
    truncate(tmp_path, 1)
    unvouch(tmp_path, 2)
    with pytest.raises(
        CheckpointError, match=r"(?s)checkpoint 2 is damaged.*no manifest.*checkpoint 1 is damaged.*12 bytes"
    ):
        read(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {"1", "2"}
    training.write_manifest(tmp_path, 2)  # what the message proposes
    toy.assert_same(read(tmp_path)[0][0], make(2))


def test_steps_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, make(step))
        assert checkpoints.all_steps() == [3, 4]
    assert {p.name for p in (tmp_path / "manifests").iterdir()} == {"3.json", "4.json"}


def test_best_is_kept_besides_the_latest_and_is_never_nan(tmp_path):
    with Checkpoints(tmp_path, keep=1, best="min") as checkpoints:
        assert checkpoints.best_step() is None
        for step, score in {1: 3.0, 2: 1.0, 3: float("nan"), 4: 2.0, 5: None}.items():
            checkpoints.save(step, make(step))
            if score is not None:
                checkpoints.score(step, score)  # while the save is under way
        assert checkpoints.all_steps() == [2, 5]
        assert checkpoints.best_step() == 2
        assert checkpoints.would_be_best(0.9)
        assert not any(map(checkpoints.would_be_best, (1.0, 2.0, float("nan"), float("-inf"))))
    toy.assert_same(load_ema(tmp_path, "best")[0], make(2).ema)
    with Checkpoints(tmp_path, keep=1, best="min") as checkpoints:
        assert checkpoints.best_step() == 2
        checkpoints.save(6, make(6))
        checkpoints.score(6, 0.5)
        checkpoints.save(7, make(7))
        assert checkpoints.all_steps() == [6, 7]
        assert checkpoints.best_step() == 6
    truncate(tmp_path, 6)  # the best, which a restore does not look at
    with pytest.raises(CheckpointError, match="checkpoint 6 is damaged"):
        load_ema(tmp_path, "best")
    with Checkpoints(tmp_path, keep=1) as checkpoints:  # nobody asks for the best any more
        checkpoints.save(8, make(8))
        assert checkpoints.all_steps() == [8]
    with pytest.raises(CheckpointError, match=r"none is the best; it has \[8\]"):
        load_ema(tmp_path, "best")


def test_best_may_be_the_highest_and_lost_scores_are_no_error(tmp_path):
    with Checkpoints(tmp_path, keep=1, best="max") as checkpoints:
        for step, score in {1: 3.0, 2: 3.0, 3: 1.0}.items():
            assert checkpoints.would_be_best(score) == (step == 1)
            checkpoints.save(step, make(step))
            checkpoints.score(step, score)
        assert checkpoints.all_steps() == [2, 3]  # the later of equals
    truncate(tmp_path, 3)
    with Checkpoints(tmp_path, keep=1, best="max") as checkpoints:
        with pytest.warns(UserWarning, match="using 2"):
            checkpoints.restore(abstract_state(make()))
        checkpoints.save(3, make(3))  # another step 3, which was not scored
        assert checkpoints.best_step() == 2
    (tmp_path / "scores.json").write_text('{"best": "m')
    with Checkpoints(tmp_path, keep=1, best="max") as checkpoints:
        assert checkpoints.best_step() is None
        checkpoints.save(4, make(4))
        assert checkpoints.all_steps() == [4]
    with pytest.raises(ValueError, match="best must be"):
        Checkpoints(tmp_path, best="loss")


def test_saving_at_a_stored_step_is_an_error(tmp_path):
    write(tmp_path, 1, 5)
    for step in (5, 3):
        with pytest.raises(CheckpointError, match=f"cannot save checkpoint {step}.*already holds step 5"):
            write(tmp_path, step)
    with pytest.raises(CheckpointError, match="must be JSON"), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(6, make(6), config={"f": print})


def test_another_network_is_named(tmp_path):
    write(tmp_path, 1)
    other = make()
    other = other._replace(params={**other.params, "dense": {"kernel": jnp.zeros((8, 4))}, "head": jnp.zeros(2)})
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path, abstract_state(other))
    text = str(caught.value)
    assert "params/dense/kernel: (4, 4) float32 in the checkpoint, (8, 4) float32 here" in text
    assert "params/dense/bias: (4,) float32 in the checkpoint, absent here" in text
    assert "params/head: absent in the checkpoint" in text
    assert "another directory" in text
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), make().params)
    with pytest.raises(CheckpointError, match="bfloat16 here"):
        read(tmp_path, abstract_state(make()._replace(params=half)))


def test_load_ema(tmp_path):
    write(tmp_path, 1, 2)
    ema, extras = load_ema(tmp_path)
    toy.assert_same(ema, make(2).ema)
    assert extras["config"] == {"width": 4}
    assert type(ema) is dict
    shifted = jax.tree.map(lambda a: a + 1, make(3).params)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, make(3, params=shifted))
    toy.assert_same(load_ema(tmp_path, which="params")[0], shifted)
    toy.assert_same(load_ema(tmp_path, step=2)[0], make(2).ema)
    flip(tmp_path, 3)
    with pytest.warns(UserWarning, match="checkpoint 3 is damaged"):
        assert load_ema(tmp_path)[1]["step"] == 2
    with pytest.raises(CheckpointError, match="checkpoint 3 is damaged"):
        load_ema(tmp_path, step=3)
    with pytest.raises(CheckpointError, match=r"no checkpoint 9; it has \[2, 3\]"):
        load_ema(tmp_path, step=9)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        load_ema(tmp_path / "elsewhere")


@pytest.mark.slow
def test_a_save_is_not_touched_by_the_steps_that_follow_it(tmp_path):
    # The state is donated and overwritten while the save still writes: what is stored must be the copy.
    optimizer = training.adamw(1e-2, 100)
    start = lambda key: {"w": jax.random.normal(key, (512, 512))}
    apply = lambda params, xt, t, cond: xt @ params["w"][: toy.SITES, : toy.SITES]
    step = jax.jit(training.make_train_step(toy.objective, apply, optimizer), donate_argnums=0)
    state = training.init_state(start, optimizer, jax.random.key(0))
    state, _ = step(state, toy.batch())
    before = [a.copy() for a in toy.leaves(state)]
    abstract = abstract_state(state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        for _ in range(10):
            state, _ = step(state, toy.batch())
    (found, _), _ = read(tmp_path, abstract)
    for a, b in zip(toy.leaves(found), before, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 (fake) devices")
def test_restoring_onto_another_mesh(tmp_path):
    import functools

    init = functools.partial(training.init_state, toy.init, OPTIMIZER)

    def place(axes):
        return training.init_sharded(init, training.make_mesh(axes), (), jax.random.key(4), fsdp_min_size=1)

    state, _ = place({"data": 2, "fsdp": 4})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
    for axes in ({"fsdp": 2, "data": 4}, {"data": 8}):
        other, _ = place(axes)
        (found, _), _ = read(tmp_path, abstract_state(other))
        toy.assert_same(found, state)
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a.sharding == b.sharding, found, other)))
    toy.assert_same(read(tmp_path)[0][0], state)  # one device
    toy.assert_same(load_ema(tmp_path)[0], state.ema)


def test_leftovers_of_a_killed_save_are_swept(tmp_path):
    write(tmp_path, 1)
    left = tmp_path / "2.orbax-checkpoint-tmp"
    left.mkdir()
    (tmp_path / "manifests" / "2.json").write_text("{}")
    write(tmp_path, 2)
    assert not left.exists()
    toy.assert_same(read(tmp_path)[0][0], make(2))


def test_a_failed_save_leaves_the_last_good_one(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make(1))
        checkpoints.wait()

        def full(*args):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("ddjax.training.manifest.write_atomically", full)
            checkpoints.save(2, make(2))
            with pytest.raises(
                CheckpointError, match=r"at step 2: no space left on .*; the last good checkpoint is step 1"
            ):
                checkpoints.wait()
        assert checkpoints.all_steps() == [1]
        assert not (tmp_path / "2").exists()
        checkpoints.save(3, make(3))  # room again
        assert checkpoints.all_steps() == [1, 3]
        toy.assert_same(checkpoints.restore(abstract_state(make()))[0], make(3))


# A write that fails leaves Orbax calling into an event loop it has closed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk(tmp_path):
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)], capture_output=True
    ).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        big = lambda step: make(step)._replace(ema={"w": jax.random.normal(jax.random.key(step), (300_000,))})
        checkpoints = Checkpoints(tmp_path, keep=3)
        checkpoints.save(1, big(1))
        checkpoints.wait()
        message = r"at step 2: no space left on .*; the last good checkpoint is step 1"
        with pytest.raises(CheckpointError, match=message):  # noqa: PT012
            checkpoints.save(2, big(2))
            checkpoints.wait()
        checkpoints.close()
        (state, _), problems = read(tmp_path, abstract_state(big(1)))
        toy.assert_same(state, big(1))
        assert problems == []
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_the_bodys_error_wins_over_the_closes(tmp_path, monkeypatch):
    def train():
        with Checkpoints(tmp_path) as checkpoints:
            monkeypatch.setattr("ddjax.training.manifest.write_atomically", lambda *args: 1 / 0)
            checkpoints.save(1, make(1))
            raise KeyError("from training")

    with pytest.warns(UserWarning, match="could not save checkpoint at step 1"), pytest.raises(KeyError):
        train()


def test_orbax_does_not_chatter(tmp_path, caplog):
    from absl import logging as absl_logging

    level = absl_logging.get_absl_logger().level
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings():
        warnings.simplefilter("error")
        absl_logging.set_verbosity(absl_logging.INFO)
        try:
            write(tmp_path, 1)
            read(tmp_path)
            load_ema(tmp_path)
        finally:
            absl_logging.get_absl_logger().setLevel(level)
    assert not [r for r in caplog.records if "orbax" in r.pathname]


def run_python(code, *arguments, **options):
    here = os.path.dirname(__file__)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(here), os.path.dirname(os.path.dirname(here))])}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, **options)


@pytest.mark.slow
def test_importing_training_does_not_import_orbax():
    child = run_python("import sys, ddjax.training; print(any(m.startswith('orbax') for m in sys.modules))")
    assert child.communicate(timeout=60)[0].strip() == "False"


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.05, 0.15])
def test_kill_during_a_save_leaves_a_good_state(tmp_path, delay):
    child = run_python(
        """
        import sys
        from training.test_checkpoint import Checkpoints, make
        checkpoints = Checkpoints(sys.argv[1])
        checkpoints.save(1, make(1))
        checkpoints.wait()
        print("saved", flush=True)
        for step in range(2, 1000):
            checkpoints.save(step, make(step))
        """,
        tmp_path,
    )
    assert child.stdout.readline().strip() == "saved"
    time.sleep(delay)
    child.send_signal(signal.SIGKILL)
    assert child.wait(timeout=60) == -signal.SIGKILL
    visible = [int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()]
    assert problem(tmp_path, max(visible)) is None  # only the removal of an old step may be half done
    (state, extras), problems = read(tmp_path)
    assert problems == []  # a visible step was always vouched for
    toy.assert_same(state, make(extras["step"]))


def test_safetensors(tmp_path):
    params = {
        "block": {"w": jnp.arange(6.0).reshape(2, 3).T, "s": jnp.float32(2)},
        "b": jnp.ones(3, jnp.bfloat16),
    }
    path = tmp_path / "model.safetensors"
    training.export_safetensors(path, params, {"config": json.dumps({"a": 1})})
    loaded, metadata = training.load_safetensors(path)
    toy.assert_same(loaded, params)
    assert json.loads(metadata["config"]) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    with pytest.raises(ValueError, match="no '/'"):
        training.export_safetensors(path, {"a/b": jnp.ones(1)})
