"""Trainings of two processes with four devices each, by `ddjax launch local`: the same numbers, and nothing lost."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

pytestmark = pytest.mark.slow

SECTIONS = {
    "train": {
        "steps": 40,
        "batch_size": 8,
        "log_every": 1,
        "checkpoint_every": 4,
        "eval_every": 20,
        "sample_every": 20,
    }
}


def start(processes, devices, *arguments):
    launcher = ["launch", "local", "--processes", processes, "--devices-per-process", devices, "--", *arguments]
    environment = tiny.environment() | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return tiny.ddjax(*launcher, env=environment)


def run(processes, devices, *arguments, status=0):
    child = start(processes, devices, *arguments)
    out, err = child.communicate(timeout=900)
    assert child.returncode == status, out + err
    return out, err


def train(folder, config):
    return "train", "--config", config, "--workdir", folder


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("cluster") / "config.py", **SECTIONS)


@pytest.fixture(scope="module")
def whole(config):
    """An uninterrupted training of two processes."""
    folder = config.parent / "whole"
    out, _ = run(2, 4, *train(folder, config))
    assert "[0] finished 40 steps" in out
    assert "[1]" not in out  # process 0 alone speaks
    return folder


def assert_same_numbers(a, b):
    """Losses, bounds and samples of two runs: the same to rounding; batches, exactly."""
    for x, y in zip(tiny.metrics(a), tiny.metrics(b), strict=True):
        assert x.keys() == y.keys()
        np.testing.assert_allclose([x[k] for k in x], [y[k] for k in x], rtol=2e-5, atol=1e-5)
    (_, at), (_, there) = tiny.state(a), tiny.state(b)
    assert at[1]["iterator"] == there[1]["iterator"]
    assert sorted(p.name for p in (a / "samples").iterdir()) == ["step_0000020.png", "step_0000040.png"]


def test_two_processes_are_one(whole, config, tmp_path):
    run(1, 8, *train(tmp_path / "one", config))
    assert_same_numbers(whole, tmp_path / "one")
    for name in ("step_0000020.png", "step_0000040.png"):
        assert (whole / "samples" / name).read_bytes() == (tmp_path / "one" / "samples" / name).read_bytes()


def children(launcher):
    path = pathlib.Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    return [int(pid) for pid in path.read_text().split()]


def wait_for_step(child, workdir, step):
    end = time.monotonic() + 600
    while child.poll() is None and time.monotonic() < end:
        path = workdir / "metrics.jsonl"
        if path.exists() and path.read_text().count('"loss"') >= step:
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} never came: {child.communicate()}")


@pytest.mark.parametrize("which", [0, 1])
def test_one_process_killed_ends_the_job_and_the_same_command_goes_on(whole, config, tmp_path, which):
    launcher = start(2, 4, *train(tmp_path / "run", config))
    wait_for_step(launcher, tmp_path / "run", 10 + 9 * which)
    os.kill(children(launcher)[which], signal.SIGKILL)
    began = time.monotonic()
    _, err = launcher.communicate(timeout=300)
    assert launcher.returncode == 137
    assert time.monotonic() - began < 120
    assert err.splitlines()[-1] == f"ddjax launch: process {which} of 2 was killed by SIGKILL"
    assert "Traceback" not in err
    out, _ = run(2, 4, *train(tmp_path / "run", config))
    assert "resuming from step" in out
    tiny.assert_same_run(tmp_path / "run", whole)  # bit for bit


def test_sigterm_saves_and_one_process_or_one_device_go_on(whole, config, tmp_path):
    launcher = start(2, 4, *train(tmp_path / "run", config), "--stopped-status", 75)
    wait_for_step(launcher, tmp_path / "run", 6)
    launcher.send_signal(signal.SIGTERM)
    began = time.monotonic()
    out, _ = launcher.communicate(timeout=300)
    assert "[0] stopped: saved step" in out
    assert launcher.returncode == 75
    assert time.monotonic() - began < 120
    stopped = max(int(p.name) for p in (tmp_path / "run" / "checkpoints").glob("[0-9]*") if p.is_dir())
    assert stopped < 40
    for devices in (8, 1):
        folder = tmp_path / f"on{devices}"
        subprocess.run(["cp", "-r", tmp_path / "run", folder], check=True)
        out, _ = run(1, devices, *train(folder, config))
        assert f"resuming from step {stopped}" in out
        assert_same_numbers(whole, folder)


def test_a_truncated_checkpoint_is_skipped_by_both(whole, config, tmp_path):
    subprocess.run(["cp", "-r", whole, tmp_path / "run"], check=True)
    tiny.truncate(tmp_path / "run", 40)
    out, err = run(2, 4, *train(tmp_path / "run", config))
    assert [line for line in err.splitlines() if "damaged" in line] == [
        line for line in err.splitlines() if line.startswith("[0] ddjax train: warning: checkpoint 40 is damaged")
    ]
    assert "resuming from step 36" in out
    tiny.assert_same_run(tmp_path / "run", whole)


def test_evaluating_sampling_and_exporting_by_both(whole, tmp_path):
    for name, processes, devices in (("one", 1, 1), ("two", 2, 4)):
        at = "--workdir", whole, "--out"
        out, _ = run(processes, devices, "eval", *at, tmp_path / f"{name}.json", "--config.eval.max_examples=20")
        assert out.count("test NELBO") == 2  # with and without label, by process 0 alone
        run(processes, devices, "sample", *at, tmp_path / f"{name}.npy", "--num", 7, "--step", "best")
        out, _ = run(processes, devices, "export", *at, tmp_path / f"{name}.safetensors")
        assert out.count("parameters of step 40") == 1
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one.keys() == two.keys()
    np.testing.assert_allclose([one[k] for k in one], [two[k] for k in one], rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal(*(np.load(tmp_path / f"{name}.npy") for name in ("one", "two")))
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, two[name])


def test_an_error_of_process_0_ends_both_with_one_line_each(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    _, err = run(2, 1, *train(tmp_path / "run", config), status=1)
    lines = [line for line in err.splitlines() if "ddjax train: " in line]
    assert any(line.startswith("[0]") and "is not empty and holds no run" in line for line in lines)
    assert any(line.startswith("[1]") and "process 0 stopped; it says why" in line for line in lines)
    assert "Traceback" not in err


def test_the_launchers_own_errors():
    child = subprocess.run(
        [sys.executable, "-m", "ddjax", "launch", "local", "--processes", "2"],
        capture_output=True,
        text=True,
        env=tiny.environment(),
    )
    assert child.returncode == 1
    assert "nothing to launch: give a command behind --" in child.stderr
