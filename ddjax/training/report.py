"""What a training tells: a progress bar or lines, metrics.jsonl, and TensorBoard or W&B where asked for."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ddjax.config import Config, to_dict
from ddjax.training.manifest import write_atomically

METRICS = "metrics.jsonl"


class Report:
    """Collects a run's metrics. Use as a context manager.

    Metrics are averaged over `train.log_every` steps and written as JSON lines `{"step": ..., "loss": ..., ...}`. A resumed run first
    drops the lines beyond its checkpoint, so the file reads as if it had never stopped.
    """

    def __init__(self, workdir: Path, config: Config, *, parameters: int, show: bool):
        self.path, self.config, self.parameters, self.show = workdir / METRICS, config, parameters, show
        self._window: list[dict[str, float]] = []
        self._since = time.perf_counter()
        self._console = Console(highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._writers: list[Any] = []

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
        if self.show:
            self._writers = _writers(self.path.parent, c)
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        for writer in self._writers:
            writer.close()

    def resumed(self, step: int, problems: list[str]) -> None:
        """Say where the run goes on, and what was damaged; forget metrics of steps that will be run again."""
        for line in problems:
            self._say(f"warning: {line}")
        self._say(f"resuming from step {step}")
        if self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            write_atomically(self.path, "".join(line for line in lines if _step_of(line) <= step).encode())
        self._since = time.perf_counter()

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Count one step; write the averages when a window is full."""
        self._window.append(metrics)
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
        every = self.config.train.log_every
        if not every or (step % every and step != self.config.train.steps):
            return
        count, seconds = len(self._window), time.perf_counter() - self._since
        means = {name: math.fsum(m[name] for m in self._window) / count for name in metrics}
        rate = count / max(seconds, 1e-9)
        values = {**means, "steps_per_second": rate, "examples_per_second": rate * self.config.train.batch_size}
        self._write(step, values)
        status = f"loss {means['loss']:.4f}  {rate:.2f} steps/s  {rate * self.config.train.batch_size:,.0f} examples/s"
        if self._bar is not None:
            self._bar.update(self._task, status=status)
        else:
            left = (self.config.train.steps - step) / rate
            self._say(f"step {step:>7,}  {status}  {left / 60:.1f} min left")
        self._window, self._since = [], time.perf_counter()

    def bound(self, step: int, values: dict[str, float]) -> None:
        """Report an evaluation of the bound."""
        self._write(step, {f"eval/{name}": value for name, value in values.items()})
        self._say(f"step {step:>7,}  {describe_bound(values, self.config.data.eval_split)}")
        self._since = time.perf_counter()  # an evaluation is not a slow step

    def stopped(self, step: int) -> None:
        """Say that a signal ended the run early."""
        self._say(f"stopped: saved step {step}; run the same command to go on")

    def finished(self, step: int) -> None:
        """Say that all is done."""
        self._say(f"finished {step} steps; try: ddjax sample --workdir {self.path.parent}")

    def _write(self, step: int, values: dict[str, float]) -> None:
        if not self.show:
            return
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
    for suffix, words in (("", "without label" if "bits_per_dim_labelled" in values else ""), ("_labelled", "with label")):
        if f"bits_per_dim{suffix}" in values:
            lines.append(
                f"{split} NELBO {values[f'bits_per_dim{suffix}']:.4f} ± {values[f'stderr{suffix}']:.4f} bits/dim {words} "
                f"(prior {values[f'prior{suffix}']:.4f} + diffusion {values[f'diffusion{suffix}']:.4f} "
                f"+ reconstruction {values[f'reconstruction{suffix}']:.4f})"
            )
    return "\n".join(lines)


def _step_of(line: str) -> float:
    """The step of a metrics line; a half-written last line counts as never reached."""
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return math.inf


class _TensorBoard:
    def __init__(self, workdir: Path):
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise ImportError("config.train.tensorboard needs tensorboardX: pip install 'ddjax[tensorboard]'") from error
        self._writer = SummaryWriter(str(workdir / "tensorboard"))

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, workdir: Path, config: Config):
        try:
            import wandb
        except ImportError as error:
            raise ImportError("config.train.wandb needs wandb: pip install 'ddjax[wandb]'") from error
        self._run = wandb.init(project=config.train.wandb, dir=str(workdir), config=to_dict(config), resume="allow")

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


def _writers(workdir: Path, config: Config) -> list[Any]:
    writers: list[Any] = []
    if config.train.tensorboard:
        writers.append(_TensorBoard(workdir))
    if config.train.wandb:
        writers.append(_WandB(workdir, config))
    return writers
