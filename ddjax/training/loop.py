"""The training loop, read from top to bottom.

Everything that decides the parameters is in the checkpoint: state, key, the data iterator's place. A run
that is killed and started again by the same command ends where the uninterrupted one would have, bit for bit on a CPU.
"""

from __future__ import annotations

import collections
import functools
import json
import math
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddjax import data as datasets
from ddjax.config import Config, ConfigError, differences, to_dict
from ddjax.data.dataset import Dataset
from ddjax.data.describe import describe
from ddjax.evaluation import label_accuracy
from ddjax.experiment import Experiment, build
from ddjax.run import CHECKPOINTS, DESCRIPTION, Run
from ddjax.training.checkpoint import Checkpoints
from ddjax.training.manifest import write_atomically
from ddjax.training.mesh import abstract_state, compile_step, init_sharded, make_mesh, shard_batch
from ddjax.training.report import Report
from ddjax.training.state import TrainState, init_state
from ddjax.training.step import make_train_step

IN_FLIGHT = 2  # steps dispatched ahead of the device: enough to keep it busy, few enough to bound memory


class NonFiniteLoss(RuntimeError):
    """The loss or the gradient stopped being a number."""


def train(config: Config, workdir: str | Path, *, show: bool = True) -> Run | None:
    """Train in `workdir`, continuing from its newest good checkpoint if it has one.

    Writes run.json (config and data description), metrics.jsonl, checkpoints/ and samples/. Stops cleanly, saving, on SIGINT and SIGTERM.
    Returns the trained `Run`, or None where it was asked to stop before the end.

    show: draw a progress bar (on a terminal) or print lines (elsewhere).
    Raises ConfigError where the workdir belongs to another config, NonFiniteLoss, `CheckpointError`, and what
    the data or the network find wrong.
    """
    workdir = Path(workdir)
    train_data = datasets.load(config.data.name, "train", tokens=config.data.tokens, **config.data.options)
    experiment = build(config, train_data)

    mesh = make_mesh(config.train.mesh)
    optimizer = experiment.optimizer()
    state, shardings = init_sharded(
        functools.partial(init_state, experiment.init, optimizer), mesh, (), jax.random.key(config.train.seed)
    )
    step_fn = compile_step(
        make_train_step(
            experiment.objective(), experiment.apply, optimizer, accumulate=config.train.accumulate, ema=experiment.ema()
        ),
        shardings,
        mesh,
    )
    batches = datasets.batches(
        train_data,
        batch_size=config.train.batch_size,
        seed=config.train.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        prefetch=config.train.prefetch,
    )
    claim(workdir, config, train_data)  # nothing is written before all of the config has been understood

    with (
        Checkpoints(workdir / CHECKPOINTS, keep=config.train.keep) as checkpoints,
        Report(workdir, config, parameters=_count(state.params), show=show and jax.process_index() == 0) as report,
        stop_signals() as stop,
    ):
        if (restored := checkpoints.restore(abstract_state(state, shardings))) is not None:
            state, extras = TrainState(*restored[0]), restored[1]
            batches.set_state(extras["data"])
            report.resumed(int(state.step), checkpoints.problems)
        step = saved = int(state.step)

        def save() -> None:
            nonlocal saved
            check_finite()  # never keep a state that is not a number
            if saved < step:
                checkpoints.save(step, state, data=batches.get_state(), config=to_dict(config))
                saved = step

        pending: collections.deque[tuple[int, dict]] = collections.deque()

        def check_finite(keep: int = 0) -> None:
            """Fetch all but the newest `keep` steps' metrics, and stop at the first that is not finite."""
            while len(pending) > keep:
                number, metrics = pending.popleft()
                values = {name: float(value) for name, value in jax.device_get(metrics).items()}
                if not values.pop("finite"):
                    last = f"the last good checkpoint is step {saved}" if saved else "there is no checkpoint yet"
                    raise NonFiniteLoss(
                        f"the loss or its gradient is not finite at step {number} (batch {number - 1} of the data order of "
                        f"seed {config.train.seed}; loss {values['loss']}, gradient norm {values['grad_norm']}); {last}. "
                        "Lower config.optimizer.learning_rate or clip harder, and run the same command again"
                    )
                report.step(number, values)

        while step < config.train.steps and not stop.is_set():
            batch = shard_batch(next(batches), mesh)
            state, metrics = step_fn(state, batch)
            step += 1
            pending.append((step, metrics))
            check_finite(keep=IN_FLIGHT)
            if _due(step, config.train.checkpoint_every):
                save()
            if _due(step, config.train.eval_every) and step < config.train.steps:
                check_finite()
                report.bound(step, evaluate(_run(experiment, state), config))
            if _due(step, config.train.sample_every) or (step == config.train.steps and config.train.sample_every):
                check_finite()
                draw(_run(experiment, state), workdir / "samples", f"step_{step:07d}")

        save()
        checkpoints.wait()
        if step < config.train.steps:
            report.stopped(step)
            return None
        run = _run(experiment, state)
        if config.train.eval_every:
            report.bound(step, evaluate(run, config))
        report.finished(step)
        return run


def claim(workdir: Path, config: Config, data: Dataset) -> None:
    """Make `workdir` this config's, or raise ConfigError if it is another's."""
    path = workdir / DESCRIPTION
    description = {"config": to_dict(config), "data": describe(data)}
    if path.exists():
        try:
            old = json.loads(path.read_text(encoding="utf-8"))["config"]
        except (json.JSONDecodeError, KeyError) as error:
            raise ConfigError(f"{path} is damaged ({error}); use another --workdir or repair it") from error
        if changed := differences(old, description["config"]):
            raise ConfigError(
                f"{workdir} belongs to a run with another config ({'; '.join(changed)}); use another --workdir, or the same config"
            )
    elif workdir.exists() and any(workdir.iterdir()):
        raise ConfigError(f"{workdir} is not empty and holds no run; give a new folder as --workdir")
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(description, indent=1).encode())


def evaluate(run: Run, config: Config) -> dict[str, float]:
    """The bound on the held-out split, averaged parameters: bits per dimension and its terms.

    For labelled data, without the label and (`*_labelled`) with it. `stderr` is the standard error over examples.
    """
    held_out = datasets.load(config.data.name, config.data.eval_split, tokens=config.data.tokens, **config.data.options)
    count = min(len(held_out), config.eval.max_examples or len(held_out))
    items = held_out[np.arange(count)]
    key = jax.random.key(config.eval.seed)  # the same noise at every evaluation: curves are smooth
    results = {}
    for suffix, cond in (("", None), ("_labelled", items.get("cond"))):
        if suffix and cond is None:
            continue
        bound = run.nelbo(key, items["x0"], cond=cond)
        bits = np.asarray(bound.bits_per_dim)
        results[f"bits_per_dim{suffix}"] = float(bits.mean())
        results[f"stderr{suffix}"] = float(bits.std(ddof=1) / math.sqrt(count)) if count > 1 else math.inf
        for name in ("prior", "diffusion", "reconstruction"):
            results[f"{name}{suffix}"] = float(np.mean(getattr(bound, name))) / (bound.dims * math.log(2))
    return results


def judge_labels(run: Run, config: Config, num: int, guidance: float) -> float:
    """The fraction of `num` class-conditional samples, classes in turn, that `evaluation.label_accuracy` gives their own label.

    Pixels are judged as level numbers (0 to 16 for the digits), which suits tokens and scaled values alike.
    Raises ValueError for data without labels or levels.
    """
    if not run.data.num_classes:
        raise ValueError(f"{run.data.name!r} has no labels to judge samples by")
    real = datasets.load(config.data.name, "train", tokens=config.data.tokens, **config.data.options)
    items = real[np.arange(len(real))]
    labels = np.arange(num) % run.data.num_classes
    x0 = run.sample(jax.random.key(config.sample.seed), num, cond=labels, guidance=guidance)
    return label_accuracy(_levels(run.data, items["x0"]), items["cond"], _levels(run.data, np.asarray(x0)), labels)


def _levels(data: Dataset, x0: np.ndarray) -> np.ndarray:
    """Tokens as they are; values as the number of the nearest level."""
    if data.num_symbols is not None:
        return x0
    if data.levels is None:
        raise ValueError(f"{data.name!r} is continuous without levels; its samples cannot be judged by pixel levels")
    middles = (data.levels[1:] + data.levels[:-1]) / 2
    return np.searchsorted(middles, x0)


def draw(run: Run, folder: Path, name: str, *, num: int | None = None, cond: Any = None) -> Path:
    """Draw samples into `folder`: a PNG grid of images, or a text file. Labels go round unless `cond` is given."""
    num = num or run.config.sample.num
    if cond is None and run.data.num_classes:
        cond = np.arange(num) % run.data.num_classes
    return write_samples(run.data, np.asarray(run.sample(jax.random.key(run.config.sample.seed), num, cond=cond)), folder / name)


def write_samples(data: Dataset, x0: np.ndarray, path: Path) -> Path:
    """Write states as a PNG grid (images), a text file (text) or an .npy array (anything else); by the data's kind.

    A path without a suffix gets the right one. Returns the path written.
    """
    suffix = ".png" if data.is_image else ".txt" if data.vocabulary is not None else ".npy"
    path = path if path.suffix else path.with_suffix(suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        images = data.to_images(x0)
        datasets.write_png(path, datasets.grid(images, scale=max(1, 64 // max(images.shape[1:3]))))
    elif path.suffix == ".txt":
        bar = "\n" + "-" * 80 + "\n"
        write_atomically(path, bar.join(data.to_text(x0)).encode())
    elif path.suffix == ".npy":
        with open(path, "wb") as file:
            np.save(file, x0, allow_pickle=False)
    else:
        raise ValueError(f"cannot write samples to {path}: use a name ending in {suffix} (or .npy)")
    return path


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; a second one interrupts as usual.

    Only with one process: with several, `jax.distributed` catches SIGTERM itself, and Orbax agrees on a step.
    """
    stop = threading.Event()
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number, frame):
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(experiment: Experiment, state: TrainState) -> Run:
    return Run(experiment, jax.tree.map(jnp.copy, state.ema), int(state.step))


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _count(params: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))

