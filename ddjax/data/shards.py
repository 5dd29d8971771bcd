"""Folders of shards: a manifest that says what each file must be, on a local or a remote file system.

`ddjax data prepare` writes them (`ddjax.data.prepare`), `ddjax.data.load` reads them (`ddjax.data.prepared`). The
manifest is written last, whole or not at all: a folder without one is not ready.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
JOURNAL = "unfinished.json"  # the manifest of an unfinished folder
FORMAT = "ddjax shards 1"
CHECKS = ("sizes", "sha256")
MEND = "restore it from a copy, or run the same `ddjax data prepare` again, which writes what is missing"


class ShardError(ValueError):
    """A shard that is missing or damaged; the message names it and says what to do."""


@dataclasses.dataclass(frozen=True)
class Folder:
    """A folder, by its path or by an fsspec URL such as `gs://bucket/folder` or `memory://folder`.

    It holds nothing open, and goes to worker processes as its URL.
    """

    url: str

    @functools.cached_property
    def _place(self) -> tuple[Any, str]:
        import fsspec  # here: it comes with Grain, and plain files do not need it

        try:
            return fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:  # a protocol unknown, or one whose package is not installed
            raise ValueError(f"{self.url}: {error}") from error

    def __getstate__(self) -> dict[str, str]:
        return {"url": self.url}

    def __setstate__(self, state: dict[str, str]) -> None:
        self.__dict__.update(state)

    @functools.cached_property
    def local(self) -> Path | None:
        """The folder's path; None where it is not on this machine."""
        return None if "://" in self.url or "::" in self.url else Path(self.url).expanduser()

    def _at(self, name: str) -> str:
        return f"{self._place[1].rstrip('/')}/{name}"

    def size(self, name: str) -> int | None:
        """Bytes of a file, None where there is none."""
        try:
            return (self.local / name).stat().st_size if self.local else self._place[0].size(self._at(name))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def open(self, name: str) -> Any:
        """A file to read bytes from, at random."""
        return open(self.local / name, "rb") if self.local else self._place[0].open(self._at(name), "rb")

    def read(self, name: str) -> bytes:
        """All of a file."""
        with self.open(name) as file:
            return file.read()

    def ranges(self, names: list[str], starts: list[int], stops: list[int]) -> list[bytes]:
        """Parts of remote files, fetched together where the file system can."""
        return self._place[0].cat_ranges([self._at(name) for name in names], starts, stops, on_error="raise")

    def sha256(self, name: str) -> str:
        """The digest of a file's content."""
        with self.open(name) as file:
            if self.local:
                return hashlib.file_digest(file, "sha256").hexdigest()
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
            return digest.hexdigest()

    def folders(self) -> list[str]:
        """The names of the folders in it."""
        if self.local:
            return sorted(path.name for path in self.local.iterdir() if path.is_dir())
        fs, root = self._place
        return sorted(Path(entry["name"]).name for entry in fs.ls(root, detail=True) if entry["type"] == "directory")

    def __truediv__(self, name: str) -> Folder:
        return Folder(f"{self.url.rstrip('/')}/{name}")


@dataclasses.dataclass(frozen=True)
class Shard:
    """One shard: its files, `{name: (bytes, sha256)}`, the first of which holds the items; and what is in it.

    read: entries of the input that went into it, those among them that were empty included.
    """

    files: dict[str, tuple[int, str]]
    items: int
    tokens: int
    read: int

    @property
    def name(self) -> str:
        """The file that holds the items."""
        return next(iter(self.files))

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Shard:
        """From JSON."""
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in content["files"].items()}
        return cls(files, int(content["items"]), int(content["tokens"]), int(content["read"]))


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds.

    about: what the items are: "kind" ("documents" of tokens or "items" of one shape), "storage" ("bin", "array_record"
        or "parquet"), "dtype", "num_symbols", "num_classes", "shape", "vocabulary".
    command: the options that made it, and the names and sizes of the input.
    """

    about: dict[str, Any]
    command: dict[str, Any]
    shards: tuple[Shard, ...]

    @property
    def items(self) -> int:
        """How many items there are."""
        return sum(shard.items for shard in self.shards)

    @property
    def tokens(self) -> int:
        """How many tokens (or values) there are."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """What tells these data from others, wherever they lie."""
        content = [sorted(shard.files.items()) for shard in self.shards]
        return hashlib.sha256(json.dumps([self.about, content], sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> bytes:
        """For `from_json`."""
        content = {"format": FORMAT, "items": self.items, "tokens": self.tokens, **dataclasses.asdict(self)}
        return json.dumps(content, indent=1).encode()

    @classmethod
    def from_json(cls, content: bytes, name: str) -> Manifest:
        """Raises ValueError for what is no manifest."""
        try:
            values = json.loads(content)
            if values["format"] != FORMAT:
                raise ValueError(f"its format is {values['format']!r}, not {FORMAT!r}")
            shards = tuple(map(Shard.of, values["shards"]))
            return cls(dict(values["about"]), dict(values["command"]), shards)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{name} is no manifest of `ddjax data prepare` ({error}): prepare the data again"
            ) from error


def is_prepared(folder: Folder) -> bool:
    """Whether a folder has a manifest."""
    return folder.size(MANIFEST) is not None


def is_begun(folder: Folder) -> bool:
    """Whether `ddjax data prepare` has begun to write a folder, or has finished it."""
    return is_prepared(folder) or folder.size(JOURNAL) is not None


def read_manifest(folder: Folder) -> Manifest:
    """The folder's manifest. Raises ValueError, and FileNotFoundError where there is none."""
    if not is_prepared(folder):
        raise FileNotFoundError(
            f"{folder.url}: no {MANIFEST} in this folder: `ddjax data prepare` has not made it, or not finished"
        )
    return Manifest.from_json(folder.read(MANIFEST), f"{folder.url}/{MANIFEST}")


def problem(folder: Folder, name: str, size: int, digest: str | None = None) -> str | None:
    """What is wrong with a file, in words; None for nothing. Without a digest only its size is looked at."""
    if (found := folder.size(name)) is None:
        return "is missing"
    if found != size:
        return f"has {found} bytes and should have {size}"
    if digest is not None and folder.sha256(name) != digest:
        return "has the right size but another content (sha256 differs)"
    return None


def problems(folder: Folder, shard: Shard, check: str) -> list[str]:
    """What is wrong with a shard, a line for each of its files. check: "sizes" or "sha256"."""
    found = []
    for name, (size, digest) in shard.files.items():
        if wrong := problem(folder, name, size, digest if check == "sha256" else None):
            found.append(f"{name} {wrong}")
    return found


def check_shards(folder: Folder, manifest: Manifest, check: str = "sizes") -> None:
    """Raises ShardError naming the first shard that is not as the manifest says.

    check: "sizes" looks at the sizes of all files; "sha256" reads them all as well.
    """
    if check not in CHECKS:
        raise ValueError(f"check must be one of {', '.join(CHECKS)}, got {check!r}")
    for shard in manifest.shards:
        if wrong := problems(folder, shard, check):
            raise ShardError(f"{folder.url}: the shard {wrong[0]}: {MEND}")


def still_there(folder: Folder, shard: Shard) -> None:
    """Raises ShardError where a local shard has gone or changed its size since it was opened.

    Reading beyond the end of a file that is memory-mapped would end the process without a word.
    """
    if folder.local and (wrong := problem(folder, shard.name, shard.files[shard.name][0])):
        raise ShardError(f"{folder.url}: the shard {shard.name} {wrong}: {MEND}")


def unreadable(folder: Folder, shard: Shard, error: Exception) -> ShardError:
    """The error of a shard that has the right size and cannot be read."""
    still_there(folder, shard)
    text = (str(error).splitlines() or [type(error).__name__])[0]
    return ShardError(f"{folder.url}: the shard {shard.name} cannot be read ({text[:200]}): {MEND}")


def sync_folder(path: Path) -> None:
    """Make the names in a folder last through a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
