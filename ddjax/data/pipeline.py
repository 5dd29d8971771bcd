"""From a data set to batches: exact epochs, exact resume, the same data however many processes read.

Indices are shuffled and batched to the *global* batch first; then each process takes its contiguous rows
and loads only those. So step i sees the same examples in the same order on 1 process or 64, and where a
run stands is one integer. (Batching indices before loading is also several times faster than Grain's
item-by-item path.)
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ddjax.data.dataset import Dataset, Source


class Batches(Iterator[dict[str, np.ndarray]]):
    """An iterator of batches that knows where it stands; made by `batches`.

    Where it stands is how many batches it has handed out, whoever loads them and however many they load ahead.
    """

    def __init__(self, start: Callable[[int], Iterator[dict[str, np.ndarray]]], identity: dict[str, Any]):
        """start: makes the iterator that begins with this batch."""
        self._start, self._identity = start, identity
        self._next, self._iterator = 0, None

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._iterator is None:  # no sooner: worker processes take seconds to start
            self._iterator = self._start(self._next)
        batch = next(self._iterator)
        self._next += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """Where the iterator stands: a flat dict that JSON can hold.

        `next_index` is the number of global batches handed out (prefetched ones do not count). The state
        does not depend on the process or on how many there are.
        """
        return {"next_index": self._next, **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was taken, exactly, from any position.

        Raises:
            ValueError: `state` is of another seed, batch size or data set.
        """
        for key in ("next_index", *self._identity):
            if key not in state:
                raise ValueError(f"not a state of a data iterator: no {key!r} among {sorted(state)}")
        for key, value in self._identity.items():
            if state[key] != value:
                raise ValueError(
                    f"the state is of a data iterator with {key}={state[key]!r}, "
                    f"this one has {key}={value!r}: resume with the same"
                )
        self._next, self._iterator = int(state["next_index"]), None


def batches(
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    shuffle: bool = True,
    repeat: bool = True,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 0,
    workers: int = 0,
) -> Batches:
    """Training batches: this process's rows of every global batch.

    Args:
        dataset: what to read.
        batch_size: rows of the global batch, a multiple of `process_count`.
        seed: of the shuffle, non-negative. Every epoch is another permutation of all the items.
        shuffle: whether to shuffle; otherwise items come in order.
        repeat: go on for ever, batches straddling the ends of epochs so that no item is ever dropped;
            otherwise stop after one epoch, *without* a last short batch (`epoch` sees every item).
        process_index: this process; it owns rows `[index * b, (index + 1) * b)`, b = batch_size / count.
        process_count: how many processes share the batch.
        prefetch: batches loaded ahead, each by a thread of its own; 0 loads in the caller's thread.
        workers: processes that load, each of them `prefetch` batches ahead (at least one); 0 loads in this one. They
            are started afresh ("spawn"), so that a program's main module must be importable without running it.

    A mixture (`data.mixed`) goes through each of its sources by its own permutations, epoch after epoch, and takes
    items from them by their weights, in a fixed pattern.

    Returns:
        An iterator of dicts of arrays, "x0" `(batch_size / process_count, *shape)` and, for labelled data,
        "cond"; with `get_state()` and `set_state(state)`.

    Raises:
        ValueError: sizes that do not fit; the message says which.
    """
    grain = _grain()
    size, rows = len(dataset), _rows(batch_size, process_index, process_count)
    seed = operator.index(seed)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2**32), got {seed}")
    if prefetch < 0:
        raise ValueError(f"prefetch must be 0 or more, got {prefetch}")
    if size == 0:
        raise ValueError(f"{dataset.name}: split {dataset.split!r} is empty")
    if not repeat and size < batch_size:
        raise ValueError(f"{dataset.name}: {size} items are fewer than one batch of {batch_size}")
    if workers < 0:
        raise ValueError(f"workers must be 0 or more, got {workers}")
    indices = _order(grain, dataset, seed, shuffle, repeat)
    loaded = indices.batch(batch_size, drop_remainder=True).map(_Load(dataset.source, rows))
    # Not the name: it may be a path, and data may have moved.
    identity = {
        "seed": seed,
        "batch_size": batch_size,
        "shuffle": shuffle,
        "repeat": repeat,
        "split": dataset.split,
        "size": size,
    }
    if dataset.mixture is not None:
        identity["mixture"] = [[count, weight] for count, weight in dataset.mixture]
    if dataset.fingerprint:
        identity["data"] = dataset.fingerprint
    return Batches(lambda first: _iterate(grain, loaded[first:] if first else loaded, prefetch, workers), identity)


@dataclasses.dataclass(frozen=True)
class _Load:
    """The items at this process's rows of a batch of indices; goes to worker processes."""

    source: Source
    rows: slice

    def __call__(self, index: np.ndarray) -> dict[str, Any]:
        return self.source[index[self.rows]]


def _order(grain: Any, dataset: Dataset, seed: int, shuffle: bool, repeat: bool) -> Any:
    """The items' numbers in the order of training."""
    parts, start = dataset.mixture or ((len(dataset), 1.0),), 0
    streams = []
    for k, (count, _) in enumerate(parts):
        # Each source has a seed of its own: two of one size would be shuffled alike.
        own = seed if k == 0 else int(np.random.SeedSequence((seed, k)).generate_state(1)[0])
        stream = grain.MapDataset.range(start, start + count).seed(own)
        if shuffle:
            stream = stream.shuffle()
        if repeat:  # after the shuffle: repeat-then-shuffle would draw some items twice before others once
            stream = stream.repeat()
        streams.append(stream)
        start += count
    return streams[0] if len(streams) == 1 else grain.MapDataset.mix(streams, [weight for _, weight in parts])


def epoch(
    dataset: Dataset,
    batch_size: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """One pass in order for evaluation, every item once and all batches of one shape.

    The last batch is filled up with copies of the last item whose "weights" are 0; all others are 1, or what the data
    say. A weighted mean over the pass is thus exact.

    Args:
        dataset: what to read.
        batch_size: rows of the global batch, a multiple of `process_count`.
        process_index: this process.
        process_count: how many processes share the batch.
        prefetch: batches loaded ahead; 0 loads in the caller's thread.

    Returns:
        An iterator of dicts as `batches` gives, with "weights" float32 `(rows,)` besides (packed data: `(rows,
        length)`).
    """
    grain = _grain()
    size, rows = len(dataset), _rows(batch_size, process_index, process_count)

    def load(index: np.ndarray) -> dict[str, np.ndarray]:
        index = index[rows]
        items, weights = dataset[np.minimum(index, size - 1)], (index < size).astype(np.float32)
        if (own := items.get("weights")) is not None:
            parts = own.items() if isinstance(own, dict) else [("", own)]
            weighed = {name: w * weights.reshape(-1, *(1,) * (w.ndim - 1)) for name, w in parts}
            weights = weighed if isinstance(own, dict) else weighed[""]
        return {**items, "weights": weights}

    padded = -(-size // batch_size) * batch_size
    loaded = grain.MapDataset.range(padded).batch(batch_size).map(load)
    return iter(_iterate(grain, loaded, prefetch))


def _rows(batch_size: int, process_index: int, process_count: int) -> slice:
    """The rows of the global batch that are this process's."""
    if batch_size < 1 or process_count < 1 or batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} must be a positive multiple of process_count {process_count}")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} must be in [0, process_count {process_count})")
    per_process = batch_size // process_count
    return slice(process_index * per_process, (process_index + 1) * per_process)


def _iterate(grain: Any, loaded: Any, prefetch: int, workers: int = 0) -> Any:
    # Grain's own default, 16 threads and 500 items, would hold 500 whole batches.
    options = grain.ReadOptions(num_threads=prefetch, prefetch_buffer_size=prefetch)
    found = loaded.to_iter_dataset(options)
    if workers:
        from absl import flags

        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # Grain reads a flag of its own before it starts them
        found = found.mp_prefetch(grain.MultiprocessingOptions(workers, per_worker_buffer_size=max(prefetch, 1)))
    return iter(found)


def _grain() -> Any:
    import grain  # here: it takes seconds to import, and only the pipeline needs it

    return grain
