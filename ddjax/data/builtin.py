"""The two data sets that every installation has: scikit-learn's digits and Python's own source text."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

import numpy as np

from ddjax.data import splits
from ddjax.data.dataset import Dataset
from ddjax.data.sources import ArraySource, WindowSource, levels
from ddjax.data.vocabulary import Bytes

# Tests and vendored packages are not the library; _sysconfigdata and config-* hold this machine's paths.
# encodings and pydoc_data are generated: tables that are near-copies of each other would lie in two splits.
_LEFT_OUT = {
    *("site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"),
    *("encodings", "pydoc_data"),
}
_LEFT_OUT_PREFIXES = ("_sysconfigdata", "config-")


def digits(split: str, *, tokens: bool | None = None, valid_fraction: float | None = None) -> Dataset:
    """Scikit-learn's 1,797 handwritten digits, 8x8x1, 17 shades, 10 labels.

    1,500 train and 297 test, stratified by label: `train_test_split(np.arange(1797), test_size=297,
    stratify=y, random_state=0)`, each in increasing order. There is no validation split (see `splits`).

    Args:
        split: "train", "test", or "valid" with `valid_fraction`.
        tokens: False gives values `v / 8 - 1` in [-1, 1], else tokens 0 to 16.
        valid_fraction: how much of train to hold out as "valid", stratified.
    """
    own = splits.part(split, ("train", "test"), valid_fraction, "digits")
    from sklearn.datasets import load_digits  # here: it takes a second to import
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    train, test = train_test_split(np.arange(1797), test_size=297, stratify=bunch.target, random_state=0)
    rows = np.sort(train if own == "train" else test)
    carved = splits.carve(len(rows), split, valid_fraction, "digits", bunch.target[rows])
    rows = rows if carved is None else rows[carved]
    scale = levels(17) if tokens is False else None
    source = ArraySource(
        x0=bunch.images.astype(np.uint8)[rows, :, :, None],
        cond=bunch.target[rows].astype(np.int32),
        num_symbols=17,
        scale=scale,
        name="digits",
    )
    return Dataset(
        name="digits",
        split=split,
        source=source,
        shape=(8, 8, 1),
        num_symbols=17 if scale is None else None,
        num_classes=10,
        levels=scale,
    )


def stdlib(split: str, *, tokens: bool | None = None, length: int = 256, stride: int | None = None) -> Dataset:
    """The source text of the Python that is running, as bytes: 256 symbols, windows of `length`.

    Every `*.py` of the standard library but its tests, IDLE, generated tables (`encodings`, `pydoc_data`)
    and files that hold this machine's paths, in the order of their relative paths. A file belongs to one
    split by the sha256 of its relative path: 90 % train, 5 % valid, 5 % test. The split's files are
    joined, and windows do not overlap, so that an epoch sees every byte once (a rest shorter than a
    window is left out). The text differs between versions of Python.

    Args:
        split: "train", "valid" or "test".
        tokens: text is tokens: False is an error.
        length: bytes a window.
        stride: bytes between windows of the training split; `length` unless given.
    """
    splits.part(split, splits.SPLITS, None, "stdlib")
    if tokens is False:
        raise ValueError("stdlib is text: it has no continuous form, leave out tokens=False")
    root = Path(sysconfig.get_path("stdlib"))
    parts = [path.read_bytes() for path in stdlib_files(root) if stdlib_split(path, root) == split]
    if not parts:
        raise ValueError(f"{root}: no *.py files of split {split!r}: this Python has no library source")
    corpus = np.frombuffer(b"".join(parts), np.uint8)
    stride = stride if stride is not None and split == "train" else length
    source = WindowSource(corpus, length, stride, 256, f"stdlib {split}")
    return Dataset(name="stdlib", split=split, source=source, shape=(length,), num_symbols=256, vocabulary=Bytes())


def stdlib_files(root: Path) -> list[Path]:
    """The library's files under `root`, sorted by relative path."""
    found = []
    for path in root.rglob("*.py"):
        names = path.relative_to(root).parts
        if not any(name in _LEFT_OUT or name.startswith(_LEFT_OUT_PREFIXES) for name in names):
            found.append(path)
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def stdlib_split(path: Path, root: Path) -> str:
    """Which split a file belongs to, from its relative path alone."""
    digest = hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return "train" if share < 0.9 else "valid" if share < 0.95 else "test"
