"""Streams of numbers in shards, read by ranges: memory-mapped files, ArrayRecord, Parquet.

A stream is all the items of a folder joined. `stream.ranges(starts, stops)` gives what lies in these ranges, one after
the other, in one array. A range may cross items and shards. Streams open files when they are first asked, may be read
by several threads, and go to worker processes without what they hold open.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any, Protocol

import numpy as np

from ddjax.data.dataset import require
from ddjax.data.shards import Folder, Manifest, Shard, ShardError, problem, still_there, unreadable

STORAGES = ("bin", "array_record", "parquet")
COLUMN = "x0"  # of Parquet shards
KEPT = 4096  # row groups of Parquet kept decoded: 256 MB of those that `prepare` writes


class Stream(Protocol):
    """See the module."""

    def __len__(self) -> int:
        """How many numbers there are."""

    def ranges(self, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """The numbers in these ranges, joined."""


def open_stream(folder: Folder, manifest: Manifest, offsets: np.ndarray) -> Stream:
    """The stream of a prepared folder.

    offsets: `(items + 1,)`, where each item begins in the stream, and where the last ends.
    Raises ValueError for ArrayRecord that is not on this machine.
    """
    storage, dtype = manifest.about["storage"], np.dtype(manifest.about["dtype"]).newbyteorder("<")
    if storage == "bin":
        return BinStream(folder, manifest.shards, dtype)
    if storage == "array_record" and folder.local is None:
        raise ValueError(
            f"{folder.url}: ArrayRecord is read from local (or mounted) folders only: copy it here, or prepare it "
            "with --storage parquet or bin"
        )
    made = {"array_record": ArrayRecordStream, "parquet": ParquetStream}
    if storage not in made:
        raise ValueError(f"{folder.url}: unknown storage {storage!r}, expected one of {', '.join(STORAGES)}")
    return made[storage](folder, manifest.shards, dtype, offsets)


class _Lazy:
    """What opens files lazily and drops them on the way to another process."""

    def __init__(self) -> None:
        self._open: OrderedDict = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_open", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _Lazy.__init__(self)


class BinStream(_Lazy):
    """Numbers of one type, little-endian, one after the other: memory-mapped, or fetched by ranges where remote."""

    def __init__(self, folder: Folder, shards: tuple[Shard, ...], dtype: np.dtype):
        super().__init__()
        self.folder, self.shards, self.dtype = folder, shards, dtype
        self.bounds = np.concatenate([[0], np.cumsum([shard.tokens for shard in shards], dtype=np.int64)])

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def ranges(self, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """See `Stream`."""
        first = np.searchsorted(self.bounds, starts, side="right") - 1
        parts = []  # (shard, from, to), in the order of the ranges
        for k, start, stop in zip(first.tolist(), np.asarray(starts).tolist(), np.asarray(stops).tolist(), strict=True):
            while start < stop:
                end = min(stop, int(self.bounds[k + 1]))
                if start < end:
                    parts.append((k, start - int(self.bounds[k]), end - int(self.bounds[k])))
                start, k = end, k + 1
        if not parts:
            return np.zeros(0, self.dtype)
        if self.folder.local is None:
            return self._fetched(parts)
        maps = {}
        for k in {k for k, _, _ in parts}:
            still_there(self.folder, self.shards[k])
            maps[k] = self._map(k)
        return np.concatenate([maps[k][start:stop] for k, start, stop in parts])

    def _map(self, k: int) -> np.ndarray:
        with self._lock:
            if k not in self._open:
                try:
                    mapped = np.memmap(self.folder.local / self.shards[k].name, dtype=self.dtype, mode="r")
                except (OSError, ValueError) as error:
                    raise unreadable(self.folder, self.shards[k], error) from error
                self._open[k] = mapped.view(np.ndarray)  # slices of a plain array are quicker
            return self._open[k]

    def _fetched(self, parts: list[tuple[int, int, int]]) -> np.ndarray:
        size = self.dtype.itemsize
        names = [self.shards[k].name for k, _, _ in parts]
        try:
            found = self.folder.ranges(names, [a * size for _, a, _ in parts], [b * size for _, _, b in parts])
        except OSError as error:  # it does not say of which
            touched = [self.shards[k] for k, _, _ in parts]
            bad = [s for s in touched if problem(self.folder, s.name, s.files[s.name][0])]
            raise unreadable(self.folder, (bad or touched)[0], error) from error
        for (k, start, stop), content in zip(parts, found, strict=True):
            if len(content) != (stop - start) * size:
                raise unreadable(self.folder, self.shards[k], EOFError(f"{len(content)} bytes where more should be"))
        return np.frombuffer(b"".join(found), self.dtype)


class _Items(_Lazy):
    """A stream kept item by item, each of which is read whole."""

    def __init__(self, folder: Folder, shards: tuple[Shard, ...], dtype: np.dtype, offsets: np.ndarray):
        super().__init__()
        self.folder, self.shards, self.dtype, self.offsets = folder, shards, dtype, offsets
        self.bounds = np.concatenate([[0], np.cumsum([shard.items for shard in shards], dtype=np.int64)])

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def ranges(self, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """See `Stream`."""
        starts, stops = np.asarray(starts, np.int64), np.asarray(stops, np.int64)
        first = np.searchsorted(self.offsets, starts, side="right") - 1
        counts = np.searchsorted(self.offsets, stops, side="left") - first  # items that a range touches
        item = np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
        begins = self.offsets[item]
        low, high = np.maximum(np.repeat(starts, counts) - begins, 0), np.repeat(stops, counts) - begins
        wanted, place = np.unique(item, return_inverse=True)  # each is read once
        shard_of, found = np.searchsorted(self.bounds, wanted, side="right") - 1, []
        for k in np.unique(shard_of).tolist():
            shard, rows = self.shards[k], wanted[shard_of == k]
            still_there(self.folder, shard)
            items = self._items(k, rows - self.bounds[k])
            if list(map(len, items)) != (self.offsets[rows + 1] - self.offsets[rows]).tolist():
                raise unreadable(self.folder, shard, ValueError("an item has another length than it should"))
            found += items
        if not found:
            return np.zeros(0, self.dtype)
        parts = zip(place.tolist(), low.tolist(), high.tolist(), strict=True)
        return np.concatenate([found[row][start:stop] for row, start, stop in parts])

    def _items(self, k: int, rows: np.ndarray) -> list[np.ndarray]:
        """The items of a shard at these of its rows."""
        raise NotImplementedError


class ArrayRecordStream(_Items):
    """A record for each item, its numbers as bytes. Checksums of the format find flipped bits."""

    def _items(self, k: int, rows: np.ndarray) -> list[np.ndarray]:
        try:
            records = self._reader(k).__getitems__(rows.tolist())
        except Exception as error:  # the reader raises whatever its C++ makes of a damaged file
            raise unreadable(self.folder, self.shards[k], error) from error
        return [np.frombuffer(record, self.dtype) for record in records]

    def _reader(self, k: int) -> Any:
        from grain.sources import ArrayRecordDataSource  # here: Grain takes seconds to import

        with self._lock:
            if k not in self._open:
                shard = self.shards[k]
                # With the number of records in brackets the file is not opened before it is read.
                self._open[k] = ArrayRecordDataSource([f"{self.folder.local / shard.name}[0:{shard.items}]"])
            return self._open[k]


class ParquetStream(_Items):
    """A row for each item, a list in the column `x0`; the last row groups read are kept, page checksums verified."""

    def _items(self, k: int, rows: np.ndarray) -> list[np.ndarray]:
        arrow = require("pyarrow", "tabular", "reading Parquet shards")
        require("pyarrow.parquet", "tabular", "reading Parquet shards")
        with self._lock:  # neither the cache nor a Parquet reader is for several threads
            try:
                file, starts = self._file(arrow, k)
                found: list[Any] = [None] * len(rows)
                group_of = np.searchsorted(starts, rows, side="right") - 1
                for group in np.unique(group_of).tolist():
                    values, offsets = self._group(file, k, group)
                    for place in np.flatnonzero(group_of == group).tolist():
                        row = int(rows[place] - starts[group])
                        found[place] = values[offsets[row] : offsets[row + 1]]
                return found
            except (arrow.ArrowException, OSError, EOFError) as error:
                raise unreadable(self.folder, self.shards[k], error) from error

    def _file(self, arrow: Any, k: int) -> tuple[Any, np.ndarray]:
        if k not in self._open:
            opened = self.folder.open(self.shards[k].name)
            file = arrow.parquet.ParquetFile(opened, page_checksum_verification=True)
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
            self._open[k] = file, np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        return self._open[k]

    def _group(self, file: Any, k: int, group: int) -> tuple[np.ndarray, np.ndarray]:
        if (key := (k, group)) not in self._open:
            column = file.read_row_group(group, columns=[COLUMN]).column(COLUMN).combine_chunks()
            values = column.flatten().to_numpy(zero_copy_only=False)
            self._open[key] = values, np.asarray(column.offsets) - column.offsets[0].as_py()
            if len(self._open) > KEPT + len(self.shards):  # files stay open
                del self._open[next(key for key in self._open if isinstance(key, tuple))]
        self._open.move_to_end(key)
        return self._open[key]


def side_file(folder: Folder, shards: tuple[Shard, ...], ending: str, dtype: str) -> np.ndarray:
    """The numbers that lie beside the shards, one for each item: lengths of documents, or labels.

    Raises ShardError where they are not one for each item.
    """
    parts = []
    for shard in shards:
        name = next(name for name in shard.files if name.endswith(ending))
        numbers = np.frombuffer(folder.read(name), np.dtype(dtype).newbyteorder("<"))
        if len(numbers) != shard.items:
            raise ShardError(f"{folder.url}: {name} has {len(numbers)} entries and should have {shard.items}")
        parts.append(numbers)
    return np.concatenate(parts)
