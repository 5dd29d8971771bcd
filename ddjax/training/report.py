"""What a training tells: a progress bar or lines, metrics.jsonl, events.jsonl, and TensorBoard or W&B."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ddjax.config import Config, to_dict
from ddjax.data.dataset import require
from ddjax.training.manifest import write_atomically
from ddjax.training.memory import device_peak, host_peak

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
# What differs between two runs of the same numbers.
TIMES = (
    *("steps_per_second", "examples_per_second", "tokens_per_second", "step_seconds", "data_wait"),
    *("flops_per_second", "mfu", "device_bytes", "host_bytes"),
)


class Work(NamedTuple):
    """What a step is, to tell rates by; None for what is not known."""

    tokens: int | None = None  # of categorical states
    flops: int | None = None  # of the model
    peak: float | None = None  # FLOP/s of all devices


class Report:
    """Collects a run's metrics. Use as a context manager.

    Metrics are averaged over `train.log_every` steps and written as JSON lines `{"step": ..., "loss": ..., ...}` by
    process 0. A resumed run first drops the lines beyond its checkpoint and takes up the window that was open there,
    so the file reads as if it had never stopped (but for the times). What happened beside (events.jsonl) stays.

    Beside the metrics of the step, in seconds, bytes and FLOP: "steps_per_second", "examples_per_second",
    "tokens_per_second", "step_seconds", "data_wait" (the share of the time in which the loop waited for a batch),
    "flops_per_second" and "mfu" (of the model, in the peak of all devices), "device_bytes" and "host_bytes" (the most
    in use so far), "loss_by_time/0.3" (the mean of those with times from 0.3 to 0.4), "skipped_steps".

    show: whether to print, or draw a progress bar on a terminal; the files are written all the same.
    """

    def __init__(self, workdir: Path, config: Config, *, parameters: int, show: bool):
        self.path, self.config, self.parameters, self.show = workdir / METRICS, config, parameters, show
        self._window: list[dict[str, Any]] = []
        self._timed = 0  # steps of the window since `_since`
        self._waited = 0.0  # seconds of these for data
        self.work = Work()
        self._since = time.perf_counter()
        self._console = Console(highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._writers: list[Any] | None = None  # made at the first metrics, when the step is known

    def __enter__(self) -> Report:
        c = self.config
        self._say(
            f"{c.data.name}: {c.process.name} process, {c.denoiser.name} denoiser with {self.parameters:,} parameters, "
            f"{c.train.steps:,} steps of {c.train.batch_size} -> {self.path.parent}"
        )
        if self.show and self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[status]}"),
            )
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("training", total=c.train.steps, status="compiling")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        for writer in self._writers or ():
            writer.close()

    def start(self, step: int, window: list[dict[str, Any]]) -> None:
        """Go on from a step: forget the metrics of steps that will be run again.

        window: what `window()` was there.
        """
        if step:
            self._say(f"resuming from step {step}")
            if self._bar is not None:
                self._bar.update(self._task, completed=step)
        if self.path.exists() and jax.process_index() == 0:
            lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            write_atomically(self.path, "".join(line for line in lines if _step_of(line) <= step).encode())
        self._window = list(window)
        self._restart()

    def _restart(self) -> None:
        self._timed, self._waited, self._since = 0, 0.0, time.perf_counter()

    def window(self) -> list[dict[str, Any]]:
        """The metrics of the steps that are not yet averaged, for the checkpoint."""
        return list(self._window)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count: an evaluation is not a slow step."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - began

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time spent inside is spent waiting for data."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._waited += time.perf_counter() - began

    def has_bound(self, step: int) -> bool:
        """Whether an evaluation at this step has been written."""
        if not self.path.exists():
            return False
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        return any(_step_of(line) == step and '"eval/' in line for line in lines)

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """Count one step; write the averages when a window is full.

        metrics: numbers, and "by_time" (`Reduction.by_time`).
        """
        self._window.append(metrics)
        self._timed += 1
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
        every = self.config.train.log_every
        if every and (step % every == 0 or step == self.config.train.steps):
            self._end_window(step)

    def skipped(self, step: int, why: str) -> None:
        """Count one step that changed nothing; its metrics do not count."""
        self.event(step, f"{why}: skipped")
        self.step(step, {"skipped": 1.0})

    def event(self, step: int, what: str) -> None:
        """Say what happened, and write it down with the time."""
        if jax.process_index() == 0:
            with open(self.path.parent / EVENTS, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "time": time.time(), "event": what}) + "\n")
        self._say(f"step {step:>7,}  {what}")

    def _end_window(self, step: int) -> None:
        good = [metrics for metrics in self._window if "skipped" not in metrics]
        values = _means(good)
        if len(good) < len(self._window):
            values["skipped_steps"] = len(self._window) - len(good)
        seconds = max(time.perf_counter() - self._since, 1e-9)
        rate, wait = self._timed / seconds, min(self._waited / seconds, 1.0)
        examples = rate * self.config.train.batch_size
        speed = {"steps_per_second": rate, "examples_per_second": examples, "step_seconds": 1 / rate, "data_wait": wait}
        status = f"loss {values.get('loss', math.nan):.4f}  {rate:.2f} steps/s  {examples:,.0f} examples/s"
        if self.work.tokens is not None:
            speed["tokens_per_second"] = rate * self.work.tokens
        if self.work.flops is not None:
            speed["flops_per_second"] = rate * self.work.flops
            if self.work.peak is not None:
                speed["mfu"] = speed["flops_per_second"] / self.work.peak
                status += f"  {speed['mfu']:.1%} MFU"
        if wait > 0.02:
            status += f"  {wait:.0%} waiting for data"
        memory = {"device_bytes": device_peak(), "host_bytes": host_peak()}
        self._write(step, {**values, **speed, **{name: size for name, size in memory.items() if size is not None}})
        if self._bar is not None:
            self._bar.update(self._task, status=status)
        else:
            left = (self.config.train.steps - step) / rate
            self._say(f"step {step:>7,}  {status}  {left / 60:.1f} min left")
        self._window = []
        self._restart()

    def bound(self, step: int, values: dict[str, float]) -> None:
        """Report an evaluation of the bound."""
        self._write(step, {f"eval/{name}": value for name, value in values.items()})
        for line in describe_bound(values, self.config.data.eval_split).splitlines():
            self._say(f"step {step:>7,}  {line}")

    def stopped(self, step: int) -> None:
        """Say that a signal ended the run early."""
        done = f"saved step {step}" if step else "before the first step, there is nothing to save"
        self._say(f"stopped: {done}; run the same command to go on")

    def finished(self, step: int, *, already: bool = False) -> None:
        """Say that all is done."""
        words = f"finished already, at step {step}" if already else f"finished {step} steps"
        self._say(f"{words}; try: ddjax sample --workdir {self.path.parent}")

    def _write(self, step: int, values: dict[str, float]) -> None:
        if jax.process_index() != 0:
            return
        if self._writers is None:
            self._writers = _writers(self.path.parent, self.config, step)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for writer in self._writers:
            writer.write(step, values)

    def _say(self, text: str) -> None:
        if self.show:
            self._console.print(text, markup=False)


def describe_bound(values: dict[str, float], split: str) -> str:
    """One readable line (two for labelled data) about an evaluation."""
    lines = []
    for suffix, words in (
        ("", " without label" if "bits_per_dim_labelled" in values else ""),
        ("_labelled", " with label"),
    ):
        if f"bits_per_dim{suffix}" in values:
            name, terms = "NELBO", ("prior", "diffusion", "reconstruction")
            if f"volume{suffix}" in values:
                name, terms = "ODE", ("prior", "volume", "data")
                if values.get(f"drawn{suffix}"):
                    terms += ("drawn",)
            sums = " + ".join(f"{term} {values[f'{term}{suffix}']:.4f}" for term in terms)
            lines.append(
                f"{split} {name} {values[f'bits_per_dim{suffix}']:.4f} ± {values[f'stderr{suffix}']:.4f} "
                f"bits/dim{words} ({sums})"
            )
    return "\n".join(lines)


def _means(window: list[dict[str, Any]]) -> dict[str, float]:
    """The mean of each metric; of "by_time" the mean of what has such times, where anything has."""
    if not window:
        return {}
    means = {n: math.fsum(m[n] for m in window) / len(window) for n in window[0] if n != "by_time"}
    if "by_time" in window[0]:
        costs, shares = np.sum([m["by_time"] for m in window], axis=0).T
        starts = np.arange(len(shares)) / len(shares)
        means |= {
            f"loss_by_time/{start:.1f}": float(cost / share)
            for start, cost, share in zip(starts, costs, shares, strict=True)
            if share > 0
        }
    return means


def _step_of(line: str) -> float:
    """The step of a metrics line; a half-written last line counts as never reached."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf


def require_writers(config: Config) -> None:
    """Raise ImportError, saying how to install it, where a package that the config asks for is missing."""
    if config.train.tensorboard:
        require("tensorboardX", "tensorboard", "config.train.tensorboard")
    if config.train.wandb:
        require("wandb", "wandb", "config.train.wandb")


class _TensorBoard:
    def __init__(self, workdir: Path, step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=step)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, workdir: Path, config: Config):
        import wandb

        self._run = wandb.init(project=config.train.wandb, dir=str(workdir), config=to_dict(config), resume="allow")

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


def _writers(workdir: Path, config: Config, step: int) -> list[Any]:
    writers: list[Any] = []
    if config.train.tensorboard:
        writers.append(_TensorBoard(workdir, step))
    if config.train.wandb:
        writers.append(_WandB(workdir, config))
    return writers
