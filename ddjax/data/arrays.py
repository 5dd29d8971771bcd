"""Data sets from arrays: in memory, `.npz` and `.npy` files."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from lzma import LZMAError
from pathlib import Path

import numpy as np

from ddjax.data import graphs, splits
from ddjax.data.dataset import Dataset
from ddjax.data.images import jpeg_scans, resized
from ddjax.data.sources import ArraySource, check_tokens, levels

_X_KEYS = ("x0", "x", "X", "images", "data", "arr_0")
_Y_KEYS = ("y", "labels", "label", "cond")
_SCAN = 1 << 24  # elements looked at together, so that a memory-mapped file is never held whole


def from_arrays(
    x0: np.ndarray,
    cond: np.ndarray | None = None,
    *,
    split: str = "train",
    tokens: bool | None = None,
    num_symbols: int | None = None,
    num_classes: int | None = None,
    rows: np.ndarray | None = None,
    name: str = "arrays",
    beside: Mapping[str, np.ndarray] | None = None,
) -> Dataset:
    """A data set of the rows of an array.

    Args:
        x0: `(n, *shape)`. Integers are tokens; floats are continuous as they are (images should lie in
            [-1, 1]). `(n, height, width)` gets a channel axis.
        cond: integer labels `(n,)`, from 0, or None.
        split: what to call this.
        tokens: False turns integers into values in [-1, 1], `levels[x0]`; True insists on tokens.
        num_symbols: how many values an integer takes. Unless given: 256 for uint8 images, 2 for bools, else
            the largest value + 1.
        num_classes: how many labels; the largest + 1 unless given.
        rows: which rows belong to this split; None for all.
        name: for messages.
        beside: what else comes with the items, by name (`ddjax.data.beside`): arrays `(n, ...)`, floats as they are,
            integers as those of x0.

    Raises:
        ValueError: shapes or values that do not fit; the message says which.
    """
    x0 = x0 if isinstance(x0, np.memmap) else np.asarray(x0)
    if x0.ndim < 2 or len(x0) == 0 or 0 in x0.shape:
        raise ValueError(f"{name}: expected an array (items, *sites) with items in it, got shape {x0.shape}")
    kind = x0.dtype.kind
    if kind == "f" and tokens:
        raise ValueError(f"{name}: holds {x0.dtype}, which is continuous: leave out tokens=True")
    if kind not in "biuf":
        raise ValueError(f"{name}: expected integers or floats, got {x0.dtype}")
    image = x0.ndim == 3 or (x0.ndim == 4 and x0.shape[-1] in (1, 3))
    if x0.ndim == 3:
        x0 = x0[..., None]
    if kind == "b":
        x0 = x0.view(np.uint8)
        num_symbols = num_symbols or 2
    if kind == "f":
        if num_symbols is not None:
            raise ValueError(f"{name}: num_symbols={num_symbols} given, but the values are {x0.dtype}")
    elif num_symbols is None:
        num_symbols = 256 if image and x0.dtype == np.uint8 else _largest(x0) + 1
    if num_symbols is not None and not isinstance(x0, np.memmap):
        check_tokens(x0, num_symbols, name)
    if cond is not None:
        cond, num_classes = _labels(cond, len(x0), num_classes, name)
    beside = {key: _companion(values, key, x0, num_symbols, image, name) for key, values in (beside or {}).items()}
    if rows is not None and not isinstance(x0, np.memmap):
        beside = {key: values[rows] for key, values in beside.items()}
        x0, cond, rows = x0[rows], None if cond is None else cond[rows], None
    scale = levels(num_symbols) if tokens is False and num_symbols is not None else None
    return Dataset(
        name=name,
        split=split,
        source=ArraySource(x0, cond, rows, num_symbols, scale, name, beside),
        shape=tuple(x0.shape[1:]),
        num_symbols=num_symbols if scale is None else None,
        num_classes=num_classes or 0,
        levels=scale,
    )


def npy(
    path: Path,
    split: str,
    *,
    tokens: bool | None = None,
    num_symbols: int | None = None,
    labels_path: str | Path | None = None,
    fractions: tuple[float, float, float] = splits.FRACTIONS,
) -> Dataset:
    """A `.npy` array, memory-mapped: only the rows that are asked for are read.

    It is divided by a fixed permutation of its rows into `fractions`.

    Args:
        path: the file.
        split: "train", "valid" or "test".
        tokens: see `from_arrays`.
        num_symbols: see `from_arrays`; where it is not given, the file is read through once for the largest.
        labels_path: a `.npy` of integer labels `(n,)`, or None.
        fractions: (train, valid, test).
    """
    x0 = _read(path)
    if x0.ndim == 0:
        raise ValueError(f"{path}: expected an array (items, *sites), got shape ()")
    cond = None if labels_path is None else np.array(_read(Path(labels_path)))
    rows = splits.items(len(x0), split, fractions, str(path))
    return from_arrays(x0, cond, split=split, tokens=tokens, num_symbols=num_symbols, rows=rows, name=str(path))


def npz(
    path: Path,
    split: str,
    *,
    tokens: bool | None = None,
    num_symbols: int | None = None,
    x_key: str | None = None,
    y_key: str | None = None,
    size: int | None = None,
    valid_fraction: float | None = None,
    fractions: tuple[float, float, float] | None = None,
    beside: Sequence[str] = (),
) -> Dataset:
    """An `.npz` archive, read into memory.

    With keys `x_train`, `x_test` (and `x_valid`), labels `y_train` and so on, it has its own splits (see
    `splits` for "valid"). With one array (`x_key`, or one of x0, x, X, images, data, arr_0) and its labels
    (`y_key`, or one of y, labels, label, cond, if there) it is divided by a fixed permutation. Archives of
    JPEG scans (`header`, `train_scan`, `train_off`) are decoded as they are read. Archives of graphs (`n_nodes`,
    `edge_off`, `edges`) are states of several parts (`graphs.from_graphs`).

    Args:
        path: the file.
        split: "train", "valid" or "test".
        tokens: see `from_arrays`.
        num_symbols: see `from_arrays`.
        x_key: the array's name, for an archive without its own splits.
        y_key: the labels' name; "" for none.
        size: for arrays of 8-bit images: resize the shorter side to this and crop the centre square.
        valid_fraction: for archives with train and test only: how much of train to hold out.
        fractions: (train, valid, test), for archives without their own splits.
        beside: names of other arrays that come with the items (`ddjax.data.beside`): `x1`, or `x1_train` and so on.
    """
    archive = _read(path)
    if not hasattr(archive, "files"):
        raise ValueError(f"{path}: a single array, not an .npz archive: name it .npy")
    with archive:
        keys = archive.files
        if set(keys) >= graphs.KEYS and x_key is None:
            members = {key: _member(archive, key, path) for key in keys}
            return graphs.from_graphs(members, split, fractions=fractions, name=str(path))
        own = [name for name in splits.SPLITS if f"x_{name}" in keys] if x_key is None else []
        if {"header", "train_scan", "train_off"} <= set(keys) and x_key is None:
            if size is not None:
                raise ValueError(
                    f"{path}: size is for arrays of images, not for scans that are decoded as they are read"
                )
            return jpeg_scans(
                {key: _member(archive, key, path) for key in keys if not key.endswith("_src")},
                split,
                tokens=tokens,
                valid_fraction=valid_fraction,
                name=str(path),
            )
        if not own:
            if valid_fraction is not None:
                raise ValueError(f"{path} has no splits of its own: use fractions, not valid_fraction")
            x_key = _key(x_key, _X_KEYS, keys, path)
            y_key = _key(y_key, _Y_KEYS, keys, path, needed=False)
            x0 = _sized(_member(archive, x_key, path), size, path)
            cond = _member(archive, y_key, path) if y_key else None
            rows = splits.items(len(x0) if x0.ndim else 0, split, fractions or splits.FRACTIONS, str(path))
            others = {key: _sized(_member(archive, _key(key, (), keys, path), path), size, path) for key in beside}
            return from_arrays(
                x0, cond, split=split, tokens=tokens, num_symbols=num_symbols, rows=rows, name=str(path), beside=others
            )
        if fractions is not None:
            raise ValueError(f"{path} has its own splits ({', '.join(own)}): leave out fractions")
        part = splits.part(split, own, valid_fraction, str(path))
        x0, cond, classes = _sized(_member(archive, f"x_{part}", path), size, path), None, None
        if f"y_{part}" in keys and y_key != "":
            labels = {name: _member(archive, f"y_{name}", path) for name in own if f"y_{name}" in keys}
            cond, classes = labels[part].reshape(-1), max(int(y.max()) for y in labels.values()) + 1
        if num_symbols is None and x0.dtype.kind in "iu" and x0.ndim not in (3, 4):
            # Of the whole archive, so that all its splits agree.
            num_symbols = max(_largest(_member(archive, f"x_{name}", path)) for name in own) + 1
        others = {
            key: _sized(_member(archive, _key(f"{key}_{part}", (), keys, path), path), size, path) for key in beside
        }
    return from_arrays(
        x0,
        cond,
        split=split,
        tokens=tokens,
        num_symbols=num_symbols,
        num_classes=classes,
        rows=splits.carve(len(x0), split, valid_fraction, str(path), cond),
        name=str(path),
        beside=others,
    )


def _sized(x0: np.ndarray, size: int | None, path: Path) -> np.ndarray:
    if size is None or x0.ndim == 1:
        return x0
    if x0.dtype != np.uint8 or not (x0.ndim == 3 or (x0.ndim == 4 and x0.shape[-1] in (1, 3))):
        raise ValueError(
            f"{path}: size is for images (items, height, width[, 1 or 3]) of uint8, got {x0.shape} of {x0.dtype}"
        )
    return resized(x0, size)


def _read(path: Path):
    """An open archive or a memory-mapped array; nothing is ever unpickled."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return np.load(path, mmap_mode="r" if path.suffix == ".npy" else None, allow_pickle=False)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: not a readable {path.suffix} file ({_line(error)}): is it complete?") from error


def _member(archive, key: str, path: Path) -> np.ndarray:
    try:
        return archive[key]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, LZMAError) as error:
        raise ValueError(f"{path}: cannot read {key!r} ({_line(error)}): is the file complete?") from error


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _key(key: str | None, usual: tuple[str, ...], keys: list[str], path: Path, needed: bool = True) -> str:
    """The key to read: the one given, else the first of the usual ones that is there."""
    if key == "" and not needed:
        return ""
    if key is not None:
        if key not in keys:
            raise ValueError(f"{path}: no key {key!r}, only {', '.join(keys)}")
        return key
    for candidate in usual:
        if candidate in keys:
            return candidate
    if needed:
        raise ValueError(f"{path}: none of the keys {', '.join(usual)} or x_train, only {', '.join(keys)}: give x_key")
    return ""


def _companion(
    values: np.ndarray, key: str, x0: np.ndarray, num_symbols: int | None, image: bool, name: str
) -> np.ndarray:
    """What comes with the items, checked; images get a channel axis as x0 does."""
    values = np.asarray(values)
    if values.dtype.kind == "b" and num_symbols != 2:
        values = values.astype(np.float32)  # whether something is there, and no shade
    coded = values.dtype.kind in "biu"
    if len(values) != len(x0) or values.dtype.kind not in "biuf" or (coded and num_symbols is None):
        kinds = "floats" if num_symbols is None else "numbers"
        raise ValueError(f"{name}: {key} must be {kinds} of {len(x0)} items, got {values.dtype} of {values.shape}")
    if coded:
        check_tokens(values, num_symbols, f"{name}: {key}")
    return values[..., None] if image and values.shape == x0.shape[:-1] else values


def _labels(cond: np.ndarray, count: int, num_classes: int | None, name: str) -> tuple[np.ndarray, int]:
    cond = np.asarray(cond)
    if cond.shape != (count,) or cond.dtype.kind not in "biu":
        raise ValueError(f"{name}: expected {count} integer labels, got {cond.dtype} of shape {cond.shape}")
    num_classes = num_classes or int(cond.max()) + 1
    if cond.min() < 0 or cond.max() >= num_classes:
        raise ValueError(f"{name}: labels run from {cond.min()} to {cond.max()}, not within [0, {num_classes})")
    return cond.astype(np.int32), num_classes


def _largest(x0: np.ndarray) -> int:
    step = max(1, _SCAN // max(1, math.prod(x0.shape[1:])))
    return max(int(x0[i : i + step].max()) for i in range(0, len(x0), step))
