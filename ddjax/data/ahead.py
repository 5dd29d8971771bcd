"""Batches made ready ahead of the step that takes them, on the device already, without losing where the data stand."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any


class Ahead(Iterator[Any]):
    """`place(batch)` of every batch, made by a thread while earlier ones are in use.

    State and order are those of `batches`, for what has been handed out; an error comes where its batch would have.

    batches: an iterator with `get_state` and `set_state`, used by nobody else. place: such as a copy to the devices.
    depth: how many to have ready; 0 makes each when it is asked for. Raises ValueError for a negative depth.
    """

    def __init__(self, batches: Any, place: Callable[[Any], Any], depth: int = 1):
        if depth < 0:
            raise ValueError(f"depth must be 0 or more, got {depth}")
        self._batches, self._place, self._depth = batches, place, depth
        self._state = batches.get_state()
        self._ready: collections.deque[Future] = collections.deque()
        # One thread: batches come in order, and nothing is asked of the iterator by two at once.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches") if depth else None

    def _make(self) -> tuple[Any, dict[str, Any]]:
        return self._place(next(self._batches)), self._batches.get_state()

    def __next__(self) -> Any:
        if self._pool is None:
            placed, self._state = self._make()
            return placed
        while len(self._ready) <= self._depth:
            self._ready.append(self._pool.submit(self._make))
        placed, self._state = self._ready.popleft().result()
        return placed

    def get_state(self) -> dict[str, Any]:
        """Where the data stand: that of `batches` once what was handed out is all that was made."""
        return self._state

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken."""
        self._drop()
        self._batches.set_state(state)
        self._state = self._batches.get_state()

    def close(self) -> None:
        """Make nothing more."""
        self._drop()
        if self._pool is not None:
            self._pool.shutdown()

    def _drop(self) -> None:
        while self._ready:
            if not (future := self._ready.popleft()).cancel():
                future.exception()  # wait: the iterator is not to be touched by two
