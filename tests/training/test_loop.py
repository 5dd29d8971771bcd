import json
import os
import random
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pytest
import tiny

import ddjax
from ddjax.config import ConfigError
from ddjax.training import CheckpointError, loop, setup
from ddjax.training.loop import BadStep, train


def at_batch(monkeypatch, number, act):
    """Call `act` before the `number`-th batch of every training; returns the batches seen."""
    seen, place = [], loop.shard_batch

    def shard_batch(batch, mesh):
        seen.append(batch)
        if len(seen) == number:
            act()
        return place(batch, mesh)

    monkeypatch.setattr(loop, "shard_batch", shard_batch)
    return seen


class Killed(BaseException):
    pass


def kill():
    raise Killed


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_the_same_command_ends_as_if_nothing_had_been(tmp_path, monkeypatch, capsys, number):
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        at_batch(patch, 6, lambda: os.kill(os.getpid(), number))  # step 6 is not a multiple of log_every
        assert train(tiny.config(), tmp_path / "run") is None
    assert "stopped: saved step 6; run the same command to go on" in capsys.readouterr().out
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    run = train(tiny.config(), tmp_path / "run")
    assert run.step == 10
    assert "resuming from step 6" in capsys.readouterr().out
    tiny.assert_same_run(tmp_path / "run", tiny.trained())


@pytest.mark.slow
def test_an_average_on_the_host_changes_nothing(tmp_path, monkeypatch):
    """Evaluated, drawn from, saved, and restored after a kill: the parameters, metrics and samples of the device's."""
    config = tiny.config(train={"ema_memory": "host"})
    with monkeypatch.context() as patch:
        at_batch(patch, 6, kill)
        with pytest.raises(Killed):
            train(config, tmp_path / "run", show=False)
    run = train(config, tmp_path / "run", show=False)
    assert {a.sharding.memory_kind for a in jax.tree.leaves(run.params)} == {"device"}
    tiny.assert_same_run(tmp_path / "run", tiny.trained())


@pytest.mark.slow
def test_a_kill_loses_nothing_but_time(tmp_path, monkeypatch):
    config = tiny.config(train={"keep_best": False})  # which would save step 5 too
    with monkeypatch.context() as patch:
        whole = at_batch(patch, 0, kill)
        train(config, tmp_path / "whole", show=False)
    for number in (2, 6):  # before the first checkpoint; between two, with metrics beyond the last
        with monkeypatch.context() as patch:
            before = at_batch(patch, number, kill)
            with pytest.raises(Killed):
                train(config, tmp_path / "run", show=False)
        resumed_at = 0 if number == 2 else 3
        np.testing.assert_array_equal(before[-1]["x0"], whole[number - 1]["x0"])
        if number == 2:
            (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 7.0}\n{"step": 2, "lo')
    with monkeypatch.context() as patch:
        after = at_batch(patch, 0, kill)
        train(config, tmp_path / "run", show=False)
    assert len(after) == 10 - resumed_at
    for a, b in zip(after, whole[resumed_at:], strict=True):
        np.testing.assert_array_equal(a["x0"], b["x0"])
        np.testing.assert_array_equal(a["cond"], b["cond"])
    tiny.assert_same_run(tmp_path / "run", tmp_path / "whole")
    tiny.assert_same_run(tmp_path / "run", tiny.trained())


@pytest.mark.slow
def test_a_truncated_checkpoint_is_reported_and_the_one_before_it_used(tmp_path):
    run = tiny.copy(tmp_path / "run")
    tiny.truncate(run, 10)
    with pytest.warns(UserWarning, match=r"checkpoint 10 is damaged: .*has 10 bytes, expected .*; using 9"):
        train(tiny.config(), run, show=False)
    tiny.assert_same_run(run, tiny.trained())


@pytest.mark.slow
def test_the_best_evaluated_step_is_kept_though_no_checkpoint_was_due(tmp_path, monkeypatch):
    bounds = iter([3.0, 2.0, 2.5, float("nan"), 2.25])
    evaluated = dict.fromkeys(("stderr", "prior", "diffusion", "reconstruction"), 0.0)
    monkeypatch.setattr(loop, "evaluate", lambda *a: {**evaluated, "bits_per_dim": next(bounds)})
    often = {"steps": 10, "eval_every": 2, "sample_every": 0, "checkpoint_every": 3, "keep": 1}
    train(tiny.config(train=often), tmp_path / "run", show=False)
    kept = [int(p.name) for p in (tmp_path / "run" / "checkpoints").glob("[0-9]*") if p.is_dir()]
    assert sorted(kept) == [4, 10]
    assert ddjax.load(tmp_path / "run", step="best").step == 4
    assert ddjax.load(tmp_path / "run").step == 10
    bounds = iter([3.0, 2.0, 2.5, 2.0, 2.25])
    train(tiny.config(train=often | {"keep_best": False}), tmp_path / "without", show=False)
    assert [p.name for p in (tmp_path / "without" / "checkpoints").glob("[0-9]*")] == ["10"]


def test_two_trainings_in_one_folder(tmp_path):
    tmp_path.joinpath("run").mkdir()
    with (
        loop.locked(tmp_path / "run"),
        pytest.raises(ConfigError, match=rf"another training \(process {os.getpid()} on .*\) is running in .*run"),
        loop.locked(tmp_path / "run"),
    ):
        raise AssertionError
    with loop.locked(tmp_path / "run"):
        pass  # it was let go


def test_what_was_cut_off_at_a_checkpoint_is_made_up_for(tmp_path, monkeypatch):
    sections = {"train": {"checkpoint_every": 5}}
    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", lambda *a: kill())  # step 5 is saved, its evaluation never written
        with pytest.raises(Killed):
            train(tiny.config(**sections), tmp_path / "run", show=False)
    train(tiny.config(**sections), tmp_path / "run", show=False)
    assert tiny.metrics(tmp_path / "run") == tiny.metrics(tiny.trained())
    assert (tmp_path / "run" / "samples" / "step_0000005.png").exists()


@pytest.mark.slow
def test_a_finished_run_is_not_trained_again(tmp_path, monkeypatch, capsys):
    run = tiny.copy(tmp_path / "run")
    seen = at_batch(monkeypatch, 1, kill)
    assert train(tiny.config(), run).step == 10
    assert "finished already, at step 10" in capsys.readouterr().out
    assert seen == []
    tiny.assert_same_run(run, tiny.trained())


@pytest.mark.slow
def test_a_run_goes_on_to_more_steps_and_other_changeable_keys(tmp_path):
    run = tiny.copy(tmp_path / "run")
    more = {"train": {"steps": 12, "log_every": 2, "mesh": {"data": -1, "tensor": 2}}}
    if jax.device_count() == 8:
        assert train(tiny.config(**more), run, show=False).step == 12
    assert [m["step"] for m in tiny.metrics(run) if "loss" in m] == [4, 8, 10, 12]
    with pytest.raises(ConfigError, match=r"another config \(train.batch_size: 8 -> 16\); use another --workdir"):
        train(tiny.config(train={"batch_size": 16}), run, show=False)
    (run / "run.json").write_text('{"config":')
    with pytest.raises(ConfigError, match=r"run.json is damaged"):
        train(tiny.config(), run, show=False)


def test_data_that_changed_under_a_run_are_refused(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("abcd" * 200)
    sections = {
        "data": {"name": str(text), "options": {"length": 8, "vocabulary": "characters"}},
        "denoiser": {"name": "text", "options": {"width": 8, "depth": 1, "heads": 2, "patch": 1}},
    }
    sections["denoiser"]["options"].pop("patch")
    claimed = tiny.config(**sections)
    loop.claim(tmp_path / "run", claimed, loop.load_data(claimed, "train"))
    described = tmp_path / "run" / loop.DESCRIPTION
    older = json.loads(described.read_text())
    assert older["data"].pop("counts") is None
    assert older["data"].pop("interval") == older["config"]["data"].pop("interval")
    assert (older["data"].pop("conditions"), older["data"].pop("latents")) == ({}, None)
    described.write_text(json.dumps(older))  # by a version that did not say so
    loop.claim(tmp_path / "run", claimed, loop.load_data(claimed, "train"))
    text.write_text("abce" * 200)
    with pytest.raises(ConfigError, match=r"have changed since the run .* began \(vocabulary\)"):
        loop.claim(tmp_path / "run", claimed, loop.load_data(claimed, "train"))


def test_a_claim_that_was_killed_does_not_block_the_folder(tmp_path):
    data = loop.load_data(tiny.config(), "train")
    (tmp_path / "run.json.123.tmp").write_text("{")
    loop.claim(tmp_path, tiny.config(), data)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        loop.claim(tmp_path / "other", tiny.config(), data)


@pytest.mark.slow
def test_a_number_that_is_none_stops_with_step_batch_and_last_good(tmp_path, monkeypatch):
    compiled = setup.compile_step

    def poisoned(*args):
        step_fn = compiled(*args)

        def step(state, batch):
            state, metrics = step_fn(state, batch)
            bad = int(state.step) >= 5
            spoil = lambda tree: jax.tree.map(lambda a: a * np.nan, tree)
            finite = metrics["finite"] & (not bad)
            return (state, {**spoil(metrics), "finite": finite}) if bad else (state, metrics)

        return step

    monkeypatch.setattr(setup, "compile_step", poisoned)
    with pytest.raises(BadStep) as caught:
        train(tiny.config(), tmp_path / "run", show=False)
    text = str(caught.value)
    assert "not finite at step 5 (batch 4 of the data order of seed 0; loss nan" in text
    assert "the last good checkpoint is step 3" in text
    run = ddjax.load(tmp_path / "run")
    assert run.step == 3
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(run.params))


@pytest.mark.slow
def test_a_huge_learning_rate_never_saves_what_is_not_a_number(tmp_path):
    gaussian = {"data": {"tokens": False}, "process": {"name": "gaussian", "schedule": "vp_cosine"}}
    options = {"denoiser": {**tiny.BASE["denoiser"], "kind": "v"}, "objective": {"name": "gaussian"}}
    wild = {"optimizer": {"learning_rate": 1e30, "clip": 0.0}, "train": {"checkpoint_every": 1, "eval_every": 0}}
    with pytest.raises(BadStep, match="not finite at step") as caught:
        train(tiny.config(**gaussian, **options, **wild), tmp_path / "run", show=False)
    if "there is no checkpoint yet" not in str(caught.value):
        assert all(np.isfinite(a).all() for a in jax.tree.leaves(ddjax.load(tmp_path / "run").params))


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 (fake) devices")
def test_the_mesh_does_not_change_the_losses(tmp_path):
    train(tiny.config(train={"mesh": {"data": -1, "tensor": 2}}), tmp_path / "run", show=False)
    losses = [[m["loss"] for m in tiny.metrics(w) if "loss" in m] for w in (tmp_path / "run", tiny.trained())]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 (fake) devices")
@pytest.mark.parametrize("sizes", [{"batch_size": 12}, {"batch_size": 8, "accumulate": 2}])
def test_a_batch_that_does_not_divide(tmp_path, sizes):
    with pytest.raises(ConfigError, match=r"config.train.batch_size=\d+ must be a multiple of \d+: 8 devices"):
        train(tiny.config(train=sizes), tmp_path / "run", show=False)
    assert not (tmp_path / "run").exists()


BAD = {
    "steps must be at least 1": {"train": {"steps": 0}},
    "keep must be at least 1": {"train": {"keep": 0}},
    "log_every must be positive": {"train": {"log_every": -1}},
    "no 'valid' split": {"data": {"eval_split": "valid"}},
    "patch=3 does not divide": {"denoiser": {"options": {"width": 8, "depth": 1, "heads": 2, "patch": 3}}},
    "config.denoiser.options={'width': '8'": {"denoiser": {"options": {"width": "8", "depth": 1, "heads": 2}}},
    "'tokens' is not an option": {"data": {"options": {"tokens": True}}},
    "no such file or folder": {"data": {"name": "/nowhere/x.npz"}},
    "the EMA's decay": {"train": {"ema": 1.5}},
    "takes 3 devices": {"train": {"mesh": {"data": 3}}},
}


@pytest.mark.parametrize("words", BAD)
def test_nothing_is_written_before_the_config_is_understood(tmp_path, words):
    with pytest.raises((ValueError, OSError), match=words):
        train(tiny.config(**BAD[words]), tmp_path / "run", show=False)
    assert not (tmp_path / "run").exists()


def test_evaluate_is_the_mean_of_the_bound(monkeypatch):
    run = ddjax.load(tiny.trained())
    items = ddjax.data.load("digits", "test")[:12]
    found = loop.evaluate(run, tiny.config())
    key = jax.random.key(0)
    for suffix, cond in (("", None), ("_labelled", items["cond"])):
        bound = ddjax.likelihood.nelbo(key, run.denoise, run.process, items["x0"], cond, num_times=2)
        bits = np.asarray(bound.prior + bound.diffusion + bound.reconstruction) / 64 / np.log(2)
        np.testing.assert_allclose(found[f"bits_per_dim{suffix}"], bits.mean(), rtol=1e-5)
        np.testing.assert_allclose(found[f"stderr{suffix}"], bits.std(ddof=1) / np.sqrt(12), rtol=1e-4)
    parts = found["prior"] + found["diffusion"] + found["reconstruction"]
    np.testing.assert_allclose(parts, found["bits_per_dim"], rtol=1e-5)
    again = loop.evaluate(run, tiny.config(eval={"batch_size": 12}))
    np.testing.assert_allclose([again[k] for k in found], [found[k] for k in found], rtol=1e-5, atol=1e-7)
    asked = []
    monkeypatch.setattr(loop.Run, "nelbo", lambda self, key, x0, **options: asked.append((len(x0), options)) or bound)
    loop.evaluate(run, tiny.config(eval={"num_times": 3, "max_examples": 4, "batch_size": 2}))
    # The config given decides, not the run's own.
    assert [(n, o["num_times"], o["batch_size"], o["cond"] is None) for n, o in asked] == [
        (4, 3, 2, True),
        (4, 3, 2, False),
    ]


def test_evaluate_on_data_of_another_kind_is_an_error(tmp_path):
    np.savez(tmp_path / "other.npz", x=np.zeros((40, 8, 8), np.int64), y=np.arange(40) % 10)
    config = tiny.config(data={"name": str(tmp_path / "other.npz")})
    with pytest.raises(ValueError, match="not what this run was trained on: they differ in num_symbols"):
        loop.evaluate(ddjax.load(tiny.trained()), config)


def tmpfs(folder, size):
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_named_with_the_last_good_checkpoint(tmp_path, monkeypatch):
    disk = tmpfs(tmp_path / "disk", "4m")
    try:

        def fill():
            end = time.monotonic() + 60
            while not (disk / "run" / "checkpoints" / "3").exists():  # it is written in the background
                assert time.monotonic() < end
                time.sleep(0.01)
            (disk / "other").write_bytes(b"x" * (shutil.disk_usage(disk).free - 4096))

        with monkeypatch.context() as patch:
            at_batch(patch, 5, fill)
            message = rf"step 6: no space left on {disk}.*; the last good checkpoint is step 3"
            with pytest.raises(CheckpointError, match=message):
                train(tiny.config(train={"log_every": 0, "eval_every": 0}), disk / "run", show=False)
        assert ddjax.load(disk / "run").step == 3
        (disk / "other").write_bytes(b"x" * (shutil.disk_usage(disk).free + (disk / "other").stat().st_size))
        with pytest.raises(OSError, match="No space left") as caught:
            train(tiny.config(), disk / "second", show=False)
        assert str(disk) in str(caught.value)  # run.json
        (disk / "other").unlink()
        train(tiny.config(train={"log_every": 0, "eval_every": 0}), disk / "run", show=False)
        assert ddjax.load(disk / "run").step == 10
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_disk_full_of_metrics(tmp_path, monkeypatch):
    def full(self, step, values):
        if step == 8:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop.Report, "_write", full)
    with pytest.raises(OSError, match=r"no space left on the disk of .*run, at step \d+; the last good .* step 6"):
        train(tiny.config(), tmp_path / "run", show=False)


# -- in processes of their own ---------------------------------------------------------------------------------


def start(folder, config, **options):
    return tiny.ddjax("train", "--config", config, "--workdir", folder, **options)


def wait_for_step(child, workdir, step):
    """Until metrics.jsonl has come to a step."""
    end = time.monotonic() + 120
    while time.monotonic() < end and child.poll() is None:
        path = workdir / "metrics.jsonl"
        if path.exists() and path.read_text().count('"loss"') >= step:
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} never came: {child.communicate()}")


LONG = {"train": {"steps": 60, "log_every": 1, "checkpoint_every": 3, "eval_every": 30, "sample_every": 0}}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    config = tiny.write(folder / "config.py", **LONG)
    child = start(folder / "whole", config)
    out, err = child.communicate(timeout=300)
    assert (child.returncode, err) == (0, ""), out + err
    return config, folder / "whole"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_kill_dash_nine_at_random_steps(tmp_path, uninterrupted, seed):
    config, whole = uninterrupted
    rng = random.Random(seed)
    for target in sorted(rng.sample(range(1, 56), 3)):
        child = start(tmp_path / "run", config)
        wait_for_step(child, tmp_path / "run", target)
        time.sleep(rng.random() * 0.05)
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=60)
        if child.returncode == 0:
            break  # it was quicker
    child = start(tmp_path / "run", config)
    out, err = child.communicate(timeout=300)
    assert child.returncode == 0, out + err
    assert "resuming from step" in out
    tiny.assert_same_run(tmp_path / "run", whole)
    steps = [line["step"] for line in tiny.metrics(tmp_path / "run") if "loss" in line]
    assert steps == list(range(1, 61))


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.02, 0.1])
def test_kill_during_a_checkpoint(tmp_path, uninterrupted, delay):
    config, whole = uninterrupted
    child = start(tmp_path / "run", config)
    end, folder = time.monotonic() + 120, tmp_path / "run" / "checkpoints"
    wait_for_step(child, tmp_path / "run", 6)
    while not any(folder.glob("*.orbax-checkpoint-tmp*")):
        assert time.monotonic() < end
        assert child.poll() is None
    time.sleep(delay)
    child.kill()
    child.communicate(timeout=60)
    child = start(tmp_path / "run", config)
    out, err = child.communicate(timeout=300)
    assert child.returncode == 0, out + err
    assert not any(folder.glob("*.orbax-checkpoint-tmp*"))
    tiny.assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_from_outside(tmp_path, uninterrupted, number):
    config, whole = uninterrupted
    child = start(tmp_path / "run", config)
    wait_for_step(child, tmp_path / "run", 20)
    child.send_signal(number)
    out, err = child.communicate(timeout=120)
    assert (child.returncode, err) == (0, ""), out + err
    assert "stopped: saved step" in out
    tiny.truncate(tmp_path / "run", max(int(p.name) for p in (tmp_path / "run/checkpoints").glob("[0-9]*")))
    child = start(tmp_path / "run", config)
    out, err = child.communicate(timeout=300)
    assert child.returncode == 0
    assert err.startswith("ddjax train: warning: checkpoint ")
    assert "is damaged" in err
    assert err.count("\n") == 1
    tiny.assert_same_run(tmp_path / "run", whole)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["train"]["steps"] == 60
