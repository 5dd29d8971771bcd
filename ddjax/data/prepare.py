"""Texts and images into folders of shards (`ddjax data prepare`), and whether a folder is whole (`ddjax data verify`).

Shards are made in order, each written under a temporary name, synced and renamed; a journal says which are done. The
same command on an unfinished folder keeps what is whole and makes the rest; on a finished one it mends what is
missing or damaged. What is made depends on the input and the options alone.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddjax.data import documents
from ddjax.data.dataset import Dataset, require
from ddjax.data.describe import describe_vocabulary, described_vocabulary
from ddjax.data.images import find
from ddjax.data.shards import (
    JOURNAL,
    MANIFEST,
    Folder,
    Manifest,
    Shard,
    is_prepared,
    problems,
    read_manifest,
    sync_folder,
)
from ddjax.data.streams import COLUMN, STORAGES
from ddjax.data.vocabulary import Characters, Subwords, resolve

SHARD_BYTES = 64 << 20
_TEMPORARY = ".tmp"
_TOGETHER = 256  # documents encoded, or items read, together
_GROUP_BYTES = 1 << 16  # of a row group of Parquet: one is read to get at any of its items


def prepare_text(
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    vocabulary: str = "bytes",
    document: str = "file",
    field: str = "text",
    end: str | None = None,
    storage: str = "bin",
    shard_bytes: int = SHARD_BYTES,
    say: Callable[[str], None] = lambda line: None,
) -> Manifest:
    """Write documents of tokens.

    inputs: files of text or JSON lines (`documents.EXTENSIONS`), and folders of them. out: the folder to write.
    vocabulary: "bytes", "characters" (those that occur, found in a pass before), "text8", a tokenizer's `.json`, or a
        prepared folder, whose vocabulary it is.
    document, field: `documents.documents`. end: a token, by its text, that is put behind every document.
    storage: "bin", "array_record" or "parquet". shard_bytes: a shard is closed with the item that reaches it.
    say: told of every shard.
    Raises ValueError for input that cannot be used, and where `out` was made by other options or of other input.
    """
    paths = [Path(path).expanduser() for path in inputs]
    files = [file for path in paths for file in documents.listed(path)]

    def entries() -> Iterator[documents.Document]:
        return documents.documents(files, document, field)

    command = {
        **{"vocabulary": str(vocabulary), "document": document, "field": field, "end": end},
        **{"storage": storage, "shard_bytes": shard_bytes, **_listing(paths, files)},
    }

    def begin() -> dict[str, Any]:
        known = _vocabulary(vocabulary)
        if isinstance(known, Characters) and known.alphabet is None:
            seen: set[str] = set()
            for name, read in entries():
                seen.update(known.prepare(read(), name))
            known = known.learn("".join(seen))
        last = None if end is None else _token(known, end)
        dtype = "uint8" if known.num_symbols <= 1 << 8 else "uint16" if known.num_symbols <= 1 << 16 else "uint32"
        about = {"kind": "documents", "storage": storage, "dtype": dtype, "num_symbols": known.num_symbols}
        return {**about, "num_classes": 0, "shape": None, "vocabulary": describe_vocabulary(known), "end": last}

    return _prepare(Path(out), command, begin, lambda about: _Encoded(entries(), about), shard_bytes, say)


def prepare_items(
    data: Dataset,
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    options: dict[str, Any] | None = None,
    storage: str = "array_record",
    shard_bytes: int = SHARD_BYTES,
    say: Callable[[str], None] = lambda line: None,
) -> Manifest:
    """Write the items of a data set, in order, with their labels: images decoded, cropped and resized once for all.

    data: such as `ddjax.data.load(folder, "train", tokens=True, size=64, fractions=(1, 0, 0))`. inputs: where they are
        from, and options: how they were loaded, which tells one command from another. The rest as in `prepare_text`.
    """
    paths = [Path(path).expanduser() for path in inputs if Path(path).expanduser().exists()]
    files = [file for path in paths for file in ([path] if path.is_file() else find(path, ("",)))]
    command = {**(options or {}), "split": data.split, "storage": storage, "shard_bytes": shard_bytes}

    def begin() -> dict[str, Any]:
        symbols = data.num_symbols
        dtype = (
            "float32"
            if symbols is None
            else "uint8"
            if symbols <= 1 << 8
            else "uint16"
            if symbols <= 1 << 16
            else "int32"
        )
        about = {"kind": "items", "storage": storage, "dtype": dtype, "num_symbols": symbols, "vocabulary": None}
        return {**about, "num_classes": data.num_classes, "shape": list(data.shape)}

    command |= _listing(paths, files)
    return _prepare(Path(out), command, begin, lambda about: _Items(data, about), shard_bytes, say)


def verify(url: str | Path) -> list[str]:
    """What is wrong with a prepared folder, or those named train, valid and test in it; sizes and sha256 of all files.

    Raises FileNotFoundError where nothing is prepared, ValueError for an unreadable manifest.
    """
    root = Folder(str(url))
    folders = (
        [root]
        if is_prepared(root)
        else [root / name for name in ("train", "valid", "test") if is_prepared(root / name)]
    )
    found = []
    for folder in folders or [root]:
        manifest = read_manifest(folder)
        for shard in manifest.shards:
            found += [f"{folder.url}/{line}" for line in problems(folder, shard, "sha256")]
    return found


class _Encoded:
    """Documents as tokens; those without any are passed over."""

    def __init__(self, entries: Iterator[documents.Document], about: dict[str, Any]):
        self._entries, self._ready = entries, collections.deque()
        self._vocabulary, self._dtype = described_vocabulary(about["vocabulary"]), np.dtype(about["dtype"])
        self._end = [] if about["end"] is None else [about["end"]]

    def skip(self, count: int) -> None:
        """Pass over so many, unread."""
        while count and self._ready:
            self._ready.popleft()
            count -= 1
        next(itertools.islice(self._entries, count, count), None)

    def __iter__(self) -> Iterator[tuple[np.ndarray, int | None]]:
        while True:
            if not self._ready:
                self._ready.extend(self._encode(list(itertools.islice(self._entries, _TOGETHER))))
            if not self._ready:
                return
            yield self._ready.popleft(), None

    def _encode(self, entries: list[documents.Document]) -> list[np.ndarray]:
        pieces = [(self._vocabulary.prepare(read(), name), name) for name, read in entries]
        if isinstance(self._vocabulary, Subwords):
            found = self._vocabulary.encode_many([piece for piece, _ in pieces], "documents")
        else:
            found = [self._vocabulary.encode(piece, name) for piece, name in pieces]
        return [np.append(ids, self._end).astype(self._dtype) if len(ids) else ids for ids in found]


class _Items:
    """Items of a data set, with their labels."""

    def __init__(self, data: Dataset, about: dict[str, Any]):
        self._data, self._dtype, self._next = data, np.dtype(about["dtype"]), 0

    def skip(self, count: int) -> None:
        """Pass over so many, unread."""
        self._next += count

    def __iter__(self) -> Iterator[tuple[np.ndarray, int | None]]:
        while self._next < len(self._data):
            batch = self._data[slice(self._next, min(self._next + _TOGETHER, len(self._data)))]
            labels = batch.get("cond", [None] * len(batch["x0"]))
            for x0, label in zip(batch["x0"].astype(self._dtype), labels, strict=True):
                self._next += 1
                yield x0.reshape(-1), None if label is None else int(label)


def _prepare(
    out: Path,
    command: dict[str, Any],
    begin: Callable[[], dict[str, Any]],
    entries_of: Callable[[dict[str, Any]], _Encoded | _Items],
    shard_bytes: int,
    say: Callable[[str], None],
) -> Manifest:
    if command["storage"] not in STORAGES:
        raise ValueError(f"storage must be one of {', '.join(STORAGES)}, got {command['storage']!r}")
    if shard_bytes < 1:
        raise ValueError(f"a shard must have at least one byte, got {shard_bytes}")
    if ":/" in str(out):  # a Path has lost a slash
        raise ValueError(f"{out}: shards are written to a local folder: prepare them there and copy it")
    with _alone(out):
        for left in out.glob(f"*{_TEMPORARY}"):  # of a command that was killed
            left.unlink()
        folder, finished = Folder(str(out)), (out / MANIFEST).exists()
        old = _found(out, command)
        about = begin() if old is None else old.about
        known, shards, kept = ([] if old is None else list(old.shards)), [], 0
        if not finished:
            _write(out / JOURNAL, Manifest(about, command, tuple(known)).to_json())
        entries = entries_of(about)
        for k in itertools.count():
            if k < len(known) and not problems(folder, known[k], "sha256"):
                entries.skip(known[k].read)
                shards.append(known[k])
                kept += 1
                continue
            if finished and k == len(known):
                break
            if (shard := _write_shard(out, k, about, entries, shard_bytes)) is None:
                break
            if k < len(known) and shard.files != known[k].files:
                raise ValueError(
                    f"{out}: the shard {shard.name} is not what it was when it was first made: the input (or a package "
                    "that reads or writes it) has changed; prepare into another folder"
                )
            shards.append(shard)
            if not finished:
                _write(out / JOURNAL, Manifest(about, command, (*shards, *known[k + 1 :])).to_json())
            say(f"{shard.name}: {shard.items:,} {about['kind']}, {shard.tokens:,} numbers")
        manifest = Manifest(about, command, tuple(shards))
        if not shards:
            raise ValueError(f"{out}: the input is empty, there is nothing to prepare")
        if not finished:
            _write(out / MANIFEST, manifest.to_json())
            (out / JOURNAL).unlink()
        say(
            f"{out}: {manifest.items:,} {about['kind']}, {manifest.tokens:,} numbers in {len(shards)} shards"
            + (f", {kept} of which were there" if kept else "")
        )
        return manifest


def _found(out: Path, command: dict[str, Any]) -> Manifest | None:
    """The manifest or journal that is there. Raises ValueError for another command's, and for a folder of others."""
    for name in (MANIFEST, JOURNAL):
        if (out / name).exists():
            old = Manifest.from_json((out / name).read_bytes(), str(out / name))
            keys = sorted(key for key in old.command | command if old.command.get(key) != command.get(key))
            if keys:
                lines = "; ".join(f"{key}: {old.command.get(key)!r} -> {command.get(key)!r}" for key in keys)
                raise ValueError(
                    f"{out} was prepared by other options or from other input ({lines}): use another folder"
                )
            return old
    if strangers := [path.name for path in out.iterdir() if path.name != LOCK]:
        raise ValueError(f"{out} is not empty and was not prepared ({strangers[0]} is in it): give a new folder")
    return None


def _write_shard(out: Path, k: int, about: dict[str, Any], entries: Any, shard_bytes: int) -> Shard | None:
    """Make the next shard of what is left; None where nothing is."""
    items: list[np.ndarray] = []
    labels: list[int] = []
    size = read = 0
    for item, label in entries:
        read += 1
        if len(item):
            items.append(item)
            labels += [] if label is None else [label]
            size += item.nbytes
        if size >= shard_bytes:
            break
    if not items:
        return None
    name = f"{k:05}.{about['storage']}"
    writers = {"bin": _bin, "array_record": _array_record, "parquet": _parquet}
    files = {name: _renamed(out / name, lambda path: writers[about["storage"]](path, items, labels))}
    side = {".lengths": (list(map(len, items)), "<u4")} if about["kind"] == "documents" else {}
    side |= {".labels": (labels, "<i4")} if labels else {}
    for ending, (numbers, dtype) in side.items():
        path, content = out / f"{k:05}{ending}", np.asarray(numbers, dtype).tobytes()
        files[path.name] = _renamed(path, lambda path, content=content: path.write_bytes(content))
    sync_folder(out)
    return Shard(files, len(items), sum(map(len, items)), read)


def _bin(path: Path, items: list[np.ndarray], labels: list[int]) -> None:
    with open(path, "wb") as file:
        for item in items:
            file.write(item.astype(item.dtype.newbyteorder("<"), copy=False).tobytes())


def _array_record(path: Path, items: list[np.ndarray], labels: list[int]) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter  # it comes with Grain

    writer = ArrayRecordWriter(str(path), "group_size:1,zstd")  # a group is read to get at any of its records
    for item in items:
        writer.write(item.astype(item.dtype.newbyteorder("<"), copy=False).tobytes())
    writer.close()


def _parquet(path: Path, items: list[np.ndarray], labels: list[int]) -> None:
    arrow = require("pyarrow", "tabular", "writing Parquet shards")
    parquet = require("pyarrow.parquet", "tabular", "writing Parquet shards")
    offsets = np.concatenate([[0], np.cumsum([len(item) for item in items])])
    columns = {COLUMN: arrow.LargeListArray.from_arrays(arrow.array(offsets), arrow.array(np.concatenate(items)))}
    columns |= {"label": arrow.array(labels, arrow.int32())} if labels else {}
    mean = max(1, sum(item.nbytes for item in items) // len(items))
    options = {"compression": "zstd", "use_dictionary": False, "write_page_checksum": True, "write_statistics": False}
    parquet.write_table(arrow.table(columns), path, row_group_size=max(1, _GROUP_BYTES // mean), **options)


def _renamed(path: Path, write: Callable[[Path], Any]) -> tuple[int, str]:
    """Write a file under a temporary name, sync it, hash it, rename it: size and sha256."""
    partial = path.with_name(f"{path.name}.{os.getpid()}{_TEMPORARY}")
    try:
        write(partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = partial.stat().st_size
        os.replace(partial, path)
        return size, digest
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed write does not say of what
        raise
    finally:
        partial.unlink(missing_ok=True)


def _write(path: Path, content: bytes) -> None:
    _renamed(path, lambda partial: partial.write_bytes(content))
    sync_folder(path.parent)


LOCK = ".lock"


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """The folder, made if absent, for this process only; the system lets go of it when the process ends, however."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{out}: another `ddjax data prepare` is writing to this folder") from None
        yield


def _listing(paths: list[Path], files: list[Path]) -> dict[str, Any]:
    """How many files and bytes the input has, and a digest of their names and sizes; not where it lies."""
    entries = []
    for path in paths:
        own = [file for file in files if file == path or path in file.parents] if path.is_dir() else [path]
        entries += [
            (file.relative_to(path).as_posix() if file != path else path.name, file.stat().st_size) for file in own
        ]
    digest = hashlib.sha256(repr(entries).encode()).hexdigest()[:16]
    return {"files": len(entries), "bytes": sum(size for _, size in entries), "listing": digest}


def _vocabulary(name: str) -> Any:
    if is_prepared(folder := Folder(str(name))):
        found = described_vocabulary(read_manifest(folder).about["vocabulary"])
        if found is None:
            raise ValueError(f"{name} has no vocabulary: it holds no text")
        return found
    return resolve(name)


def _token(vocabulary: Any, text: str) -> int:
    ids = vocabulary.encode(vocabulary.prepare(text.encode(), "--end"), "--end")
    if len(ids) != 1:
        raise ValueError(f"--end {text!r} must be one token of the vocabulary, and is {len(ids)}")
    return int(ids[0])


__all__ = ["prepare_items", "prepare_text", "verify"]
