"""Documents in files of text and of JSON lines, one after the other, read no sooner than they are wanted."""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from ddjax.data import text
from ddjax.data.images import find

JSON_LINES = tuple(end + pack for end in (".jsonl", ".ndjson") for pack in ("", ".xz", ".gz"))
EXTENSIONS = (*text.EXTENSIONS, *JSON_LINES)
SORTS = ("file", "line", "paragraph")

Document = tuple[str, Callable[[], bytes]]  # where it is from, for messages; and what reads it


def listed(path: Path) -> list[Path]:
    """The files of text at a path, by relative path. Raises FileNotFoundError, ValueError where there are none."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if not (files := find(path, EXTENSIONS)):
        raise ValueError(f"{path}: no text in this folder; supported: {', '.join(EXTENSIONS)}")
    return files


def documents(files: list[Path], sort: str = "file", field: str = "text") -> Iterator[Document]:
    """All documents of these files.

    sort: what a document of a file of text is: all of it ("file"), a "line", or a "paragraph" (lines between blank
        ones). In JSON lines it is always a line.
    field: which entry of a line of JSON is its text.
    Raises ValueError for a file that cannot be unpacked, and for lines without that entry; names file and line.
    """
    if sort not in SORTS:
        raise ValueError(f"a document is one of {', '.join(SORTS)}, not {sort!r}")
    for path in files:
        if path.name.lower().endswith(JSON_LINES):
            yield from _json_lines(path, field)
        elif sort == "file":
            yield str(path), lambda path=path: text.read(path)
        else:
            yield from _parts(path, sort)


def _lines(path: Path) -> Iterator[bytes]:
    opened = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix.lower(), open)
    try:
        with opened(path, "rb") as file:
            yield from file
    except (lzma.LZMAError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: cannot be unpacked ({error}): is it complete?") from error


def _json_lines(path: Path, field: str) -> Iterator[Document]:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, lambda line=line, where=where: _entry(line, field, where)


def _entry(line: bytes, field: str, where: str) -> bytes:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    if not isinstance(found, dict) or not isinstance(found.get(field), str):
        has = ", ".join(found) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{where}: no text under {field!r}, it has {has}: give --field")
    return found[field].encode()


def _parts(path: Path, sort: str) -> Iterator[Document]:
    paragraph: list[bytes] = []
    for line in _lines(path):
        if sort == "line":
            if line.strip():
                yield str(path), lambda line=line: line.rstrip(b"\r\n")
        elif line.strip():
            paragraph.append(line)
        elif paragraph:
            yield str(path), lambda whole=b"".join(paragraph): whole
            paragraph = []
    if paragraph:
        yield str(path), lambda whole=b"".join(paragraph): whole
