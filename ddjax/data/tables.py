"""Data sets from Parquet and Arrow files: columns of tokens, of values, or of text."""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddjax.data import splits
from ddjax.data.dataset import Dataset, require
from ddjax.data.sources import check_tokens, encode
from ddjax.data.text import windows
from ddjax.data.vocabulary import Characters, resolve

PARQUET = (".parquet",)
EXTENSIONS = (*PARQUET, ".arrow", ".feather")


class Groups:
    """A file's rows by group (Parquet row group, Arrow record batch), the last few kept decoded.

    Attributes:
        starts: `(groups + 1,)`, the first row of each group and the number of rows.
        schema: the file's Arrow schema.
    """

    def __init__(self, path: Path, kept: int = 8):
        arrow = require("pyarrow", "tabular", "reading Parquet and Arrow files")
        self._path, self._kept, self._cache = path, kept, OrderedDict()
        self._lock = threading.Lock()  # neither the cache nor a Parquet reader is for several threads
        try:
            if path.suffix.lower() in PARQUET:
                self._file = require("pyarrow.parquet", "tabular", "reading Parquet files").ParquetFile(path)
                meta = self._file.metadata
                sizes = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]
                self.schema = self._file.schema_arrow
            else:
                self._file = arrow.ipc.open_file(arrow.memory_map(str(path)))
                batches = range(self._file.num_record_batches)
                sizes = [self._file.get_batch(i).num_rows for i in batches]  # memory-mapped: no reading
                self.schema = self._file.schema
        except (arrow.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not a readable {path.suffix} file ({error}): is it complete?") from error
        self.starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

    def column(self, group: int, name: str) -> Any:
        """One column of one group, an Arrow array."""
        if isinstance(self._file, require("pyarrow.parquet", "tabular", "").ParquetFile):
            return self._file.read_row_group(group, columns=[name]).column(name).combine_chunks()
        return self._file.get_batch(group).column(name)

    def arrays(self, group: int, columns: tuple[str, ...], label: str | None, length: int):
        """One group decoded: values `(rows, length)` and labels `(rows,)` or None."""
        with self._lock:
            if group in self._cache:
                self._cache.move_to_end(group)
                return self._cache[group]
            where = f"{self._path}, rows from {self.starts[group]}"
            if len(columns) == 1:
                values = _lists(self.column(group, columns[0]), length, where)
            else:
                values = np.stack([_flat(self.column(group, name), where) for name in columns], axis=1)
            labels = None if label is None else _flat(self.column(group, label), where)
            self._cache[group] = values, labels
            if len(self._cache) > self._kept:
                self._cache.popitem(last=False)
            return values, labels


@dataclasses.dataclass(frozen=True, eq=False)
class TableSource:
    """Rows of a table, read a group at a time.

    Attributes:
        groups: the file.
        rows: which of its rows belong to this split.
        columns: one column of lists, or several of numbers.
        label: the column of labels, or None.
        num_classes: what labels are checked against.
        length: sites a row.
        num_symbols: what tokens are checked against; None for continuous values.
        name: for messages.
    """

    groups: Groups
    rows: np.ndarray
    columns: tuple[str, ...]
    label: str | None
    num_classes: int
    length: int
    num_symbols: int | None
    name: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: np.ndarray) -> dict[str, np.ndarray]:
        rows = self.rows[index]
        x0 = np.empty((len(rows), self.length), np.float32 if self.num_symbols is None else np.int64)
        cond = np.empty(len(rows), np.int32)
        group_of = np.searchsorted(self.groups.starts, rows, side="right") - 1
        for group in np.unique(group_of).tolist():  # each group once, whatever the order of the rows
            here = np.flatnonzero(group_of == group)
            inside = rows[here] - self.groups.starts[group]
            values, labels = self.groups.arrays(group, self.columns, self.label, self.length)
            x0[here] = values[inside]
            if labels is not None:
                cond[here] = labels[inside]
        if self.num_symbols is not None:
            check_tokens(x0, self.num_symbols, self.name, rows)
        if self.label is not None:
            check_tokens(cond, self.num_classes, f"{self.name}, label {self.label!r}", rows)
        batch = {"x0": encode(x0, self.num_symbols, None)}
        return batch if self.label is None else {**batch, "cond": cond}


def table(
    path: Path,
    split: str,
    *,
    columns: str | Sequence[str],
    tokens: bool | None = None,
    num_symbols: int | None = None,
    label: str | None = None,
    num_classes: int | None = None,
    length: int | None = None,
    stride: int | None = None,
    vocabulary="bytes",
    fractions: tuple[float, float, float] = splits.FRACTIONS,
) -> Dataset:
    """A Parquet file or an Arrow (IPC, Feather 2) file, read a row group at a time.

    A column of lists is one state a row, all of one length; several columns of numbers are one state a
    row, a column a site. Rows are divided by a fixed permutation; the last eight groups read are kept, so
    a shuffled pass over a file of many large groups reads them again and again: write small ones. A
    column of text is joined, a row a line, cut by position of its rows, and made into windows in memory.

    Args:
        path: the file.
        split: "train", "valid" or "test".
        columns: one column of lists or text, or several columns of numbers.
        tokens: integers are tokens, floats are continuous; insisting on the other is an error.
        num_symbols: how many symbols; needed for integers.
        label: a column of integer labels, or None.
        num_classes: how many labels; needed with `label`.
        length: text: tokens a window, 256 unless given; lists: what every row must have.
        stride: text: tokens between windows of the training split.
        vocabulary: text: see `text.text`.
        fractions: (train, valid, test).

    Raises:
        ValueError: columns that are not there or do not fit; the message lists those there are.
    """
    groups, name = Groups(path), str(path)
    columns = (columns,) if isinstance(columns, str) else tuple(columns)
    if not columns:
        raise ValueError(f"{name}: columns is empty; the file has {', '.join(groups.schema.names)}")
    for column in (*columns, *((label,) if label else ())):
        if column not in groups.schema.names:
            raise ValueError(f"{name}: no column {column!r}, only {', '.join(groups.schema.names)}")
    types = require("pyarrow", "tabular", "reading tables").types
    kinds = [groups.schema.field(column).type for column in columns]
    if len(kinds) == 1 and (types.is_string(kinds[0]) or types.is_large_string(kinds[0])):
        if tokens is False:
            raise ValueError(f"{name}: column {columns[0]!r} is text: it has no continuous form")
        return _text(groups, columns[0], split, name, length or 256, stride, resolve(vocabulary), fractions)
    many = len(kinds) == 1 and hasattr(kinds[0], "value_type")
    values = [kind.value_type for kind in kinds] if many else kinds
    whole = all(types.is_integer(value) for value in values)
    if not whole and not all(types.is_integer(value) or types.is_floating(value) for value in values):
        raise ValueError(f"{name}: columns {', '.join(columns)} are {kinds}: expected text, or (lists of) numbers")
    if tokens is not None and tokens != whole:
        raise ValueError(f"{name}: the columns hold {values[0]}: leave out tokens={tokens}")
    if whole and num_symbols is None:
        raise ValueError(f"{name}: the option num_symbols must be given for columns of integers")
    if label is not None and num_classes is None:
        raise ValueError(f"{name}: the option num_classes must be given with label={label!r}")
    rows = splits.items(int(groups.starts[-1]), split, fractions, name)
    if not many:
        length = len(columns)
    elif length is None:
        length = len(groups.column(0, columns[0])[0])
    num_symbols = num_symbols if whole else None
    num_classes = num_classes or 0 if label else 0
    source = TableSource(groups, rows, columns, label, num_classes, length, num_symbols, name)
    return Dataset(
        name=name,
        split=split,
        source=source,
        shape=(length,),
        num_symbols=num_symbols,
        num_classes=num_classes,
    )


def _text(groups: Groups, column: str, split: str, name: str, length: int, stride, vocabulary, fractions):
    total = int(groups.starts[-1])

    def piece(part: str) -> Any:
        start, stop = splits.bounds(total, part, fractions, name)
        lines = []
        for group in range(len(groups.starts) - 1):
            first = int(groups.starts[group])
            low, high = max(start - first, 0), min(stop, int(groups.starts[group + 1])) - first
            if low < high:
                lines += [line or "" for line in groups.column(group, column)[low:high].to_pylist()]
        return vocabulary.prepare("".join(line + "\n" for line in lines).encode(), name)

    wanted = piece(split)
    if isinstance(vocabulary, Characters):
        vocabulary = vocabulary.learn(wanted if split == "train" or vocabulary.alphabet else piece("train"))
    return windows(vocabulary.encode(wanted, f"{name} {split}"), name, split, length, stride, vocabulary)


def _flat(column, where: str) -> np.ndarray:
    if column.null_count:
        raise ValueError(f"{where}: {column.null_count} values are missing: fill or drop them first")
    return column.to_numpy(zero_copy_only=False)


def _lists(column, length: int, where: str) -> np.ndarray:
    """A column of lists, or of numbers, as `(rows, length)`."""
    if not hasattr(column.type, "value_type"):
        return _flat(column, where)[:, None]
    sizes = column.value_lengths().to_numpy(zero_copy_only=False)
    if column.null_count or (sizes != length).any():
        row = int(np.argmax(sizes != length))  # a missing list has length NaN
        raise ValueError(f"{where}: row {row} of them has {sizes[row]} values, expected {length} in every row")
    return _flat(column.flatten(), where).reshape(len(column), length)
