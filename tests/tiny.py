"""A training that takes seconds, trained once a session, and what its tests ask of a run's folder."""

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from ddjax.config import typed
from ddjax.training.checkpoint import load_ema
from ddjax.training.loop import train
from ddjax.training.report import TIMES

ROOT = Path(__file__).parents[1]
BASE = {
    "denoiser": {"options": {"width": 8, "depth": 1, "heads": 2, "patch": 4}},
    "optimizer": {"schedule": "constant", "warmup": 0, "learning_rate": 0.01},
    # No batch is placed ahead: tests act when a certain one is.
    "train": {
        **{"steps": 10, "batch_size": 8, "device_prefetch": 0},
        **{"log_every": 4, "checkpoint_every": 3, "eval_every": 5, "sample_every": 5},
    },
    "sample": {"num": 4, "steps": 3},
    "eval": {"max_examples": 12, "num_times": 2, "batch_size": 8},
}


def values(**sections):
    """The tiny config as nested dicts, with changes by section."""
    names = {*BASE, *sections}
    return {name: {**BASE.get(name, {}), **sections.get(name, {})} for name in names}


def config(**sections):
    return typed(values(**sections))


def write(path, **sections):
    """The tiny config as a file."""
    path.write_text(f"def get_config():\n    return {values(**sections)!r}\n")
    return path


@functools.cache
def trained():
    """The folder of an uninterrupted run; not to be written to."""
    folder = Path(tempfile.mkdtemp(prefix="ddjax-tiny-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    train(config(), folder / "run", show=False)
    return folder / "run"


def copy(folder):
    return shutil.copytree(trained(), folder)


def metrics(workdir):
    """What metrics.jsonl says, but for times."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def state(workdir):
    """Every array of the newest checkpoint by name, and where the data stood."""
    import jax

    arrays = {}
    for which in ("params", "ema", "opt_state"):
        tree, extras = load_ema(workdir / "checkpoints", which=which)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            arrays[which + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return arrays, (extras["step"], extras["data"])


def assert_same_run(a, b):
    """Bit for bit: parameters, average, optimizer, the data's place, all metrics, and the samples."""
    (x, at), (y, there) = state(a), state(b)
    assert at == there
    assert x.keys() == y.keys()
    assert any(name.startswith("opt_state") for name in x)
    for name in x:
        assert x[name].tobytes() == y[name].tobytes(), name
    assert metrics(a) == metrics(b)
    pictures = [{p.name: p.read_bytes() for p in (w / "samples").glob("*")} for w in (a, b)]
    assert pictures[0] == pictures[1]


def truncate(workdir, step):
    """Cut the largest file of a checkpoint short."""
    path = max((workdir / "checkpoints" / str(step) / "state").rglob("d/*"), key=lambda p: p.stat().st_size)
    os.truncate(path, 10)


def environment():
    """Of a child process: one CPU device, this library, the tests' compilation cache."""
    import jax

    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in f]
    env = os.environ | {"XLA_FLAGS": " ".join(flags)}
    cache = str(jax.config.jax_compilation_cache_dir)
    return env | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": cache}


def ddjax(*arguments, **options):
    """`ddjax ...` in a child process."""
    command = [sys.executable, "-m", "ddjax", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment()}
    return subprocess.Popen(command, **pipes | options)


def short_run(workdir):
    """A model of the digits' values, of three steps of training."""
    from ddjax.training.loop import train

    c = config(
        process={"name": "gaussian", "schedule": "vp_cosine"},
        data={"tokens": False},
        denoiser={"kind": "v", "options": BASE["denoiser"]["options"]},
        objective={"name": "gaussian"},
        sample={"solver": "ddim", "steps": 3, "num": 4},
        train=BASE["train"] | {"steps": 3, "eval_every": 0, "sample_every": 0},
    )
    train(c, workdir, show=False)
