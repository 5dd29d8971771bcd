"""Traces of chosen steps, by JAX's profiler."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax

FOLDER = "profile"


class Profile:
    """Traces steps of this process into WORKDIR/profile, neighbours into one trace. Use as a context manager.

    Look at them with TensorBoard's profile plugin (xprof), or the .trace.json.gz at https://ui.perfetto.dev.

    steps: their numbers, from 1.
    """

    def __init__(self, workdir: Path, steps: Collection[int]):
        self._folder, self._steps, self._on = workdir / FOLDER, frozenset(steps), False

    def __enter__(self) -> Profile:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def before(self, step: int, running: Any) -> None:
        """About to make this step. running: arrays of what was asked for before, which does not belong to it."""
        if step in self._steps and not self._on:
            jax.block_until_ready(running)
            jax.profiler.start_trace(self._folder)
            self._on = True

    def after(self, step: int, made: Any) -> None:
        """Asked for this step. made: its arrays."""
        if self._on and step + 1 not in self._steps:
            jax.block_until_ready(made)
            self._stop()

    def _stop(self) -> None:
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
