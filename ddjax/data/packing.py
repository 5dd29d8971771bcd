"""Documents packed into windows of one length, so that nothing of a short one is padding and nothing crosses.

A window holds whole documents, or pieces of those longer than it, one after the other; each is a segment. A network
that is told the segments (`cond = {"segments": ...}`, `denoisers.TextTransformer`) lets sites attend within their own
only and counts positions from its start: it says of each document what it says of it alone. What is left of a window is
padding: segment 0, weight 0.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ddjax.data.sources import check_tokens
from ddjax.data.splits import permutation
from ddjax.data.streams import Stream


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Which pieces of a stream lie in which window.

    starts, stops: `(pieces,)`, ranges of the stream, window by window. first: `(windows + 1,)`, the first piece of each
    window.
    """

    starts: np.ndarray
    stops: np.ndarray
    first: np.ndarray
    length: int
    align: int = 1

    def __len__(self) -> int:
        return len(self.first) - 1

    @property
    def filled(self) -> float:
        """The share of sites that are no padding."""
        return float((self.stops - self.starts).sum() / max(1, len(self) * self.length))


def best_fit(sizes: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Best-fit decreasing: from the longest on, each piece goes to the fullest window that it fits in, or a new one.

    (Ding et al. 2024, "Fewer truncations improve language modeling", section 3.) Pieces of one size go together, and
    all
    windows with as much room: beside a sort the cost is that of the sizes that occur.

    sizes: `(pieces,)`, from 1 to length.
    Returns `(order, first)`: the pieces window by window, and where in `order` each window begins, `(windows + 1,)`.
    """
    by_size = np.argsort(-sizes, kind="stable")
    window_of = np.empty(len(sizes), np.int64)
    room: dict[int, list[np.ndarray]] = {}  # windows by how much more they can take
    count = done = 0
    for size, left in zip(*(v[::-1].tolist() for v in np.unique(sizes, return_counts=True)), strict=True):
        fitting = iter(sorted(key for key in room if key >= size))
        while left:
            if (key := next(fitting, None)) is not None:
                windows = np.concatenate(room.pop(key))
            else:
                key, needed = length, -(-left // (length // size))
                windows, count = np.arange(count, count + needed), count + needed
            each = key // size  # pieces that such a window takes, one after the other: it stays the fullest
            full, rest = divmod(left, each)
            takers, takes = windows[: full + 1], np.full(min(full + 1, len(windows)), each)
            if full < len(windows):
                takes[full] = rest
            pieces = by_size[done : done + int(takes.sum())]
            window_of[pieces] = np.repeat(takers, takes)
            done, left = done + len(pieces), left - len(pieces)
            last = takers[len(takers) - 1 :] if full < len(windows) else takers[:0]  # it has taken the rest, or nothing
            for rooms, those in (
                (key - each * size, takers[: len(takers) - len(last)]),
                (key - rest * size, last),
                (key, windows[len(takers) :]),
            ):
                if rooms and len(those):
                    room.setdefault(rooms, []).append(those)
    order = np.argsort(window_of, kind="stable")
    return order, np.searchsorted(window_of[order], np.arange(count + 1))


def pack(offsets: np.ndarray, rows: np.ndarray, length: int, align: int = 1) -> Plan:
    """The plan of these documents of a stream, the same everywhere and always.

    Documents longer than a window are cut into pieces of its length, and a rest. Which of equally long pieces go
    together is drawn by a fixed permutation.

    offsets: `(documents + 1,)`, where each begins in the stream. rows: which documents. length: of a window. align:
        every piece begins at a multiple of it (the blocks of a network that goes block by block), with padding before
        it.
    Raises ValueError for lengths that do not fit, and where there is nothing to pack.
    """
    if length < 1 or align < 1 or length % align:
        raise ValueError(f"length={length} must be a positive multiple of align={align}")
    rows = np.asarray(rows)[permutation(len(rows))]
    sizes = offsets[rows + 1] - offsets[rows]
    cuts = -(-sizes // length)
    if not cuts.sum():
        raise ValueError("there are no tokens to pack")
    starts = np.repeat(offsets[rows], cuts)
    within = np.arange(len(starts)) - np.repeat(np.cumsum(cuts) - cuts, cuts)
    starts = starts + within * length
    stops = np.minimum(starts + length, np.repeat(offsets[rows + 1], cuts))
    order, first = best_fit(-(-(stops - starts) // align) * align, length)
    return Plan(starts[order], stops[order], first, length, align)


@dataclasses.dataclass(frozen=True, eq=False)
class PackedSource:
    """Packed windows: "x0" and "segments" int32, "weights" float32, each `(rows, length)`.

    Segments count from 1 in each window; padding is token 0, segment 0 and weight 0.
    """

    stream: Stream
    plan: Plan
    num_symbols: int
    name: str = "documents"

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: np.ndarray) -> dict[str, np.ndarray]:
        plan, index = self.plan, np.asarray(index)
        counts = plan.first[index + 1] - plan.first[index]
        row = np.repeat(np.arange(len(index)), counts)
        segment = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
        pieces = plan.first[index[row]] + segment
        starts, stops = plan.starts[pieces], plan.stops[pieces]
        sizes = stops - starts
        room = -(-sizes // plan.align) * plan.align
        before = np.cumsum(room) - room  # over all rows; of each row, from its first piece
        place = before - np.repeat(before[np.cumsum(counts) - counts], counts) + row * plan.length
        tokens = self.stream.ranges(starts, stops)
        at = np.repeat(place - (np.cumsum(sizes) - sizes), sizes) + np.arange(len(tokens))
        batch: dict[str, Any] = {}
        for name, values, dtype in (
            ("x0", tokens, np.int32),
            ("segments", np.repeat(segment + 1, sizes), np.int32),
            ("weights", 1.0, np.float32),
        ):
            flat = np.zeros(len(index) * plan.length, dtype)
            flat[at] = values
            batch[name] = flat.reshape(len(index), plan.length)
        check_tokens(batch["x0"], self.num_symbols, self.name, index)
        return batch
