"""Many examples, some at a time, by one compiled program."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int


def seeds(rows: Sequence[int] | None, n: int) -> Int[np.ndarray, " n"]:
    """The numbers that seed n examples. Raises ValueError for others than n whole ones."""
    found = np.arange(n) if rows is None else np.asarray(rows)
    if found.shape != (n,) or found.dtype.kind not in "iu" or (found < 0).any():
        raise ValueError(f"rows are {n} whole numbers, 0 or more, one for each sample, got {rows}")
    return found


def chunks(n: int, size: int, ways: int = 1) -> Iterator[np.ndarray]:
    """Row numbers in chunks of one size, so that one program serves all; the last is filled with the last row.

    ways: the size is the next multiple of this.
    """
    if n < 1 or size < 1:
        raise ValueError(f"at least one example and a batch_size of one are needed, got {n} and {size}")
    size = -(-min(size, n) // ways) * ways
    for start in range(0, n, size):
        yield np.minimum(np.arange(start, start + size), n - 1)
