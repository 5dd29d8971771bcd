"""A small file by which a supervisor knows that a run is alive, and how far it is."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from ddjax.training.manifest import write_atomically

FILE = "heartbeat.json"


class Heartbeat:
    """Rewrites WORKDIR/heartbeat.json while steps are seen to end. Use as a context manager.

    {"time": seconds since 1970, "host": ..., "process": ..., "state": ..., "step": ..., "of": ...}, the state one of
    starting, training, evaluating, stopped, finished and failed (then with "error", its first line). A run that
    hangs, in a collective or on a dead file system, writes nothing: the file's age is the sign.

    every: seconds between two that say the same state; 0 writes nothing at all.
    """

    def __init__(self, workdir: Path, steps: int, every: float):
        self._path, self._steps, self._every = workdir / FILE, steps, every
        self._state, self._step, self._at = "starting", 0, float("-inf")

    def __enter__(self) -> Heartbeat:
        self._write()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            return
        self._state = "failed"
        with contextlib.suppress(OSError):  # of the two, the error that ended the run is the one to tell
            self._write(error=(str(error).splitlines() or [""])[0] or type(error).__name__)

    def beat(self, step: int, state: str = "training") -> None:
        """The run is in this state, at this step."""
        changed = state != self._state
        self._step, self._state = step, state
        if changed or time.monotonic() - self._at >= self._every:
            self._write()

    def _write(self, **more: str) -> None:
        if not self._every:
            return
        self._at = time.monotonic()
        about = {"time": time.time(), "host": socket.gethostname(), "process": os.getpid()}
        place = {"state": self._state, "step": self._step, "of": self._steps}
        write_atomically(self._path, json.dumps(about | place | more).encode())
