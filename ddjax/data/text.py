"""Data sets of text: files, folders of files, memory-mapped streams of tokens."""

from __future__ import annotations

import gzip
import lzma
import zlib
from pathlib import Path

import numpy as np

from ddjax.data import splits
from ddjax.data.dataset import Dataset
from ddjax.data.images import find
from ddjax.data.sources import WindowSource
from ddjax.data.vocabulary import Characters, resolve

_PLAIN = (".txt", ".text", ".md", ".rst", ".tex", ".py", ".html", ".smi")
EXTENSIONS = (*_PLAIN, *(end + pack for end in _PLAIN for pack in (".xz", ".gz")))


def text(
    path: Path,
    split: str,
    *,
    tokens: bool | None = None,
    length: int = 256,
    stride: int | None = None,
    vocabulary="bytes",
    valid_path: str | Path | None = None,
    test_path: str | Path | None = None,
    valid_fraction: float | None = None,
    fractions: tuple[float, float, float] | None = None,
) -> Dataset:
    """A text file (perhaps `.xz` or `.gz`) or a folder of them, in windows of `length` tokens.

    A folder's files are joined in the order of their relative paths. Splits, in this order: the files
    `valid_path` and `test_path` where given, `path` being all train; sub-folders `train` and `test` (and
    `valid`); otherwise by position, the first 90 % train, the next 5 % valid, the last 5 % test. Where
    there is no valid, `valid_fraction` takes it from the end of train. Cuts are made in the text, before it
    becomes tokens or windows: nothing is in two splits.

    Args:
        path: the file or folder.
        split: "train", "valid" or "test".
        tokens: text is tokens: False is an error.
        length: tokens a window.
        stride: tokens between windows of the training split; `length` (no overlap) unless given.
        vocabulary: "bytes"; "characters", the sorted set of the training text's; "text8", lower-case a to z
            and the space; the path of a Hugging Face tokenizer's `.json`; or such an object.
        valid_path: the validation text, a file or folder.
        test_path: the test text, a file or folder.
        valid_fraction: how much of train to hold out, for text that comes without a valid.
        fractions: (train, valid, test), for text without splits of its own.

    Raises:
        ValueError: text that is empty, not UTF-8, shorter than a window, or not in the vocabulary.
    """
    if tokens is False:
        raise ValueError(f"{path} is text: it has no continuous form, leave out tokens=False")
    vocabulary, name = resolve(vocabulary), str(path)
    own: dict[str, Path] = {}
    if valid_path is not None or test_path is not None:
        own = {"train": path, "valid": valid_path, "test": test_path}
        own = {part: Path(place) for part, place in own.items() if place is not None}
    elif (path / "train").is_dir():
        own = {part: path / part for part in splits.SPLITS if (path / part).is_dir()}
    if own and fractions is not None:
        raise ValueError(f"{name} has its own splits ({', '.join(own)}): leave out fractions")
    if not own and valid_fraction is not None:
        raise ValueError(f"{name} has no splits of its own: use fractions, not valid_fraction")

    def piece(part: str) -> bytes | str:
        if not own:
            whole = vocabulary.prepare(read(path), name)
            start, stop = splits.bounds(len(whole), part, fractions or splits.FRACTIONS, name)
            return whole[start:stop]
        source = splits.part(part, own, valid_fraction, name)
        whole = vocabulary.prepare(read(own[source]), str(own[source]))
        if valid_fraction is None or part == "test":
            return whole
        cut = len(whole) - round(len(whole) * valid_fraction)
        return whole[cut:] if part == "valid" else whole[:cut]

    wanted = piece(split)
    if isinstance(vocabulary, Characters):
        # What the training text teaches holds for every split.
        vocabulary = vocabulary.learn(wanted if split == "train" or vocabulary.alphabet else piece("train"))
    return windows(vocabulary.encode(wanted, f"{name} {split}"), name, split, length, stride, vocabulary)


def token_stream(
    path: Path,
    split: str,
    *,
    num_symbols: int,
    dtype: str = "uint16",
    tokens: bool | None = None,
    length: int = 256,
    stride: int | None = None,
    vocabulary=None,
    valid_path: str | Path | None = None,
    test_path: str | Path | None = None,
    valid_fraction: float | None = None,
    fractions: tuple[float, float, float] | None = None,
) -> Dataset:
    """A `.bin` file of little-endian token ids, memory-mapped, in windows of `length`.

    Divided as `text` is. Tokens are checked against `num_symbols` as they are read.

    Args:
        path: the file.
        split: "train", "valid" or "test".
        num_symbols: how many symbols there are.
        dtype: "uint8", "uint16" or "uint32".
        tokens: False is an error.
        length: tokens a window.
        stride: tokens between windows of the training split; `length` unless given.
        vocabulary: what turns tokens back into text, as in `text`; None for nothing.
        valid_path: the validation tokens.
        test_path: the test tokens.
        valid_fraction: how much of train to hold out, where other files are given but no valid.
        fractions: (train, valid, test).
    """
    if tokens is False:
        raise ValueError(f"{path} holds tokens: it has no continuous form, leave out tokens=False")
    if dtype not in ("uint8", "uint16", "uint32"):
        raise ValueError(f"dtype must be uint8, uint16 or uint32, got {dtype!r}")
    name, own = str(path), {"train": path, "valid": valid_path, "test": test_path}
    own = {part: Path(place) for part, place in own.items() if place is not None}
    if len(own) == 1:
        if valid_fraction is not None:
            raise ValueError(f"{name} has no splits of its own: use fractions, not valid_fraction")
        stream = _map(path, dtype)
        start, stop = splits.bounds(len(stream), split, fractions or splits.FRACTIONS, name)
        stream = stream[start:stop]
    else:
        if fractions is not None:
            raise ValueError(f"{name} has its own splits ({', '.join(own)}): leave out fractions")
        stream = _map(own[splits.part(split, own, valid_fraction, name)], dtype)
        if valid_fraction is not None and split != "test":
            cut = len(stream) - round(len(stream) * valid_fraction)
            stream = stream[cut:] if split == "valid" else stream[:cut]
    vocabulary = None if vocabulary is None else resolve(vocabulary)
    return windows(stream, name, split, length, stride, vocabulary, num_symbols)


def windows(
    stream: np.ndarray,
    name: str,
    split: str,
    length: int,
    stride: int | None = None,
    vocabulary=None,
    num_symbols: int | None = None,
) -> Dataset:
    """A data set of the windows of a stream of tokens; `stride` is for the training split alone."""
    num_symbols = num_symbols or vocabulary.num_symbols
    stride = stride if stride is not None and split == "train" else length
    source = WindowSource(stream, length, stride, num_symbols, f"{name} {split}")
    return Dataset(
        name=name, split=split, source=source, shape=(length,), num_symbols=num_symbols, vocabulary=vocabulary
    )


def read(path: Path) -> bytes:
    """A text file's content, or all of a folder's, joined; each file but the last ends its line.

    Raises:
        FileNotFoundError: there is nothing there.
        ValueError: an empty folder, or a packed file that cannot be unpacked.
    """
    if not path.is_dir():
        return _unpack(path)
    files = find(path, EXTENSIONS)
    if not files:
        raise ValueError(f"{path}: no text files in this folder; supported: {', '.join(_PLAIN)} (.xz, .gz)")
    parts = [_unpack(file) for file in files]
    return b"".join(part if part.endswith(b"\n") or part is parts[-1] else part + b"\n" for part in parts)


def _unpack(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    opened = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix.lower(), open)
    try:
        with opened(path, "rb") as file:
            return file.read()
    except (lzma.LZMAError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: cannot be unpacked ({error}): is it complete?") from error


def _map(path: Path, dtype: str) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    little = np.dtype(dtype).newbyteorder("<")
    size = path.stat().st_size
    if size == 0 or size % little.itemsize:
        raise ValueError(f"{path}: {size} bytes are not a whole number of {dtype} tokens: give the right dtype")
    return np.memmap(path, dtype=little, mode="r")
