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
from ddjax.data.shards import ShardError
from ddjax.data.sources import check_tokens, encode
from ddjax.data.text import windows
from ddjax.data.vocabulary import Characters, resolve

PARQUET = (".parquet",)
EXTENSIONS = (*PARQUET, ".arrow", ".feather")


class Groups:
    """The rows of files by group (Parquet row group, Arrow record batch), the last few kept decoded.

    Files are opened when they are first read, and again in a worker process. Parquet may lie behind fsspec URLs.

    Attributes:
        starts: `(groups + 1,)`, the first row of each group, over all files, and the number of rows.
        schema: the files' Arrow schema.
    """

    def __init__(self, urls: Sequence[str], kept: int = 8):
        require("pyarrow", "tabular", "reading Parquet and Arrow files")
        require("pyarrow.parquet", "tabular", "reading Parquet files")
        self._urls, self._kept = tuple(urls), kept
        self.__setstate__({})
        sizes, self._places, self.schema = [], [], None
        for k, url in enumerate(self._urls):
            file = self._file(k)
            if isinstance(file, _parquet().ParquetFile):
                own = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
                schema = file.schema_arrow
            else:
                own = [file.get_batch(i).num_rows for i in range(file.num_record_batches)]  # mapped: nothing is read
                schema = file.schema
            if self.schema is not None and not schema.equals(self.schema):
                raise ValueError(f"{url}: its columns are not those of {self._urls[0]}: {schema.names}")
            self.schema, sizes = schema, sizes + own
            self._places += [(k, i) for i in range(len(own))]
        self.starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_files", "_cache", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._files, self._cache = {}, OrderedDict()
        self._lock = threading.RLock()  # neither the cache nor a Parquet reader is for several threads

    def _file(self, k: int) -> Any:
        arrow, url = require("pyarrow", "tabular", ""), self._urls[k]
        if k not in self._files:
            try:
                if url.lower().endswith(PARQUET):
                    self._files[k] = _parquet().ParquetFile(_opened(url))
                else:
                    self._files[k] = arrow.ipc.open_file(arrow.memory_map(url))
            except (arrow.ArrowException, OSError) as error:
                raise _unreadable(url, error) from error
        return self._files[k]

    def column(self, group: int, name: str) -> Any:
        """One column of one group, an Arrow array. Raises ShardError where it cannot be read."""
        arrow = require("pyarrow", "tabular", "")
        k, own = self._places[group]
        with self._lock:
            file = self._file(k)
            try:
                if isinstance(file, _parquet().ParquetFile):
                    return file.read_row_group(own, columns=[name]).column(name).combine_chunks()
                return file.get_batch(own).column(name)
            except (arrow.ArrowException, OSError) as error:
                raise _unreadable(self._urls[k], error) from error

    def arrays(self, group: int, columns: tuple[str, ...], label: str | None, length: int):
        """One group decoded: values `(rows, length)` and labels `(rows,)` or None."""
        with self._lock:
            if group in self._cache:
                self._cache.move_to_end(group)
                return self._cache[group]
            where = f"{self._urls[self._places[group][0]]}, rows from {self.starts[group]}"
            if len(columns) == 1:
                values = _lists(self.column(group, columns[0]), length, where)
            else:
                values = np.stack([_flat(self.column(group, name), where) for name in columns], axis=1)
            labels = None if label is None else _flat(self.column(group, label), where)
            self._cache[group] = values, labels
            if len(self._cache) > self._kept:
                self._cache.popitem(last=False)
            return values, labels


def _parquet() -> Any:
    return require("pyarrow.parquet", "tabular", "reading Parquet files")


def _opened(url: str) -> Any:
    """What Parquet reads from: a path, or an open remote file."""
    if "://" not in url:
        return url
    import fsspec

    return fsspec.open(url, "rb").open()


def _unreadable(url: str, error: Exception) -> Exception:
    text = (str(error).splitlines() or [type(error).__name__])[0]
    return ShardError(f"{url}: not a readable .{url.rpartition('.')[2]} file ({text}): is it there, and complete?")


def files(url: str) -> list[str]:
    """The files that a path or an fsspec URL names: one file, those that a pattern fits, those in a folder."""
    if "://" not in url and Path(url).is_file():
        return [url]
    import fsspec

    fs, root = fsspec.core.url_to_fs(url)
    if any(sign in root for sign in "*?["):
        found = fs.glob(root)
    elif fs.isdir(root):
        found = [path for path in fs.find(root) if path.lower().endswith(PARQUET)]
    else:
        found = [root] if fs.exists(root) else []
    if not found:
        raise FileNotFoundError(f"{url}: no such Parquet files")
    return sorted(found if "://" not in url else map(fs.unstrip_protocol, found))


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
    path: Path | str,
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
    """Parquet files or an Arrow (IPC, Feather 2) file, read a row group at a time.

    A column of lists is one state a row, all of one length; several columns of numbers are one state a
    row, a column a site. Rows are divided by a fixed permutation; the last eight groups read are kept, so
    a shuffled pass over a file of many large groups reads them again and again: write small ones. A
    column of text is joined, a row a line, cut by position of its rows, and made into windows in memory.

    Args:
        path: the file; of Parquet also a folder of files, a pattern such as `data/*.parquet`, or an fsspec URL of any
            of these. Rows count over all files, sorted by name.
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
    groups, name = Groups(files(str(path))), str(path)
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
