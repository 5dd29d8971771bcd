"""How data are divided into train, valid and test: by rule, always the same, disjoint and covering.

A source with its own division keeps it. One without is divided by `fractions` (train, valid, test): text by
position, collections of items by a fixed permutation. A source that comes as train and test only has no
validation split, and borrowing the test set for one would be dishonest: it is an error to ask for "valid"
unless `valid_fraction` carves one out of the training split (give it when loading "train" too, so that the
two stay disjoint).
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

SPLITS = ("train", "valid", "test")
FRACTIONS = (0.9, 0.05, 0.05)


def check_split(split: str) -> None:
    """Raises ValueError unless `split` is one of the three."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")


def bounds(count: int, split: str, fractions: tuple[float, float, float], name: str) -> tuple[int, int]:
    """Where a split starts and stops when `count` things are cut in order into train, valid, test.

    Raises:
        ValueError: the fractions are not three non-negative numbers summing to 1, or the split is empty.
    """
    check_split(split)
    fractions = tuple(fractions)
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"fractions must be (train, valid, test) summing to 1, got {fractions}")
    cuts = [0, round(count * fractions[0]), round(count * (fractions[0] + fractions[1])), count]
    position = SPLITS.index(split)
    start, stop = cuts[position], cuts[position + 1]
    if start == stop:
        raise ValueError(f"{name}: split {split!r} of {count} items is empty at fractions={fractions}")
    return start, stop


def permutation(count: int) -> np.ndarray:
    """A fixed permutation: the same on every machine and for every NumPy."""
    # RandomState's streams are frozen for good (NEP 19); Generator's may change between versions.
    return np.random.RandomState(0).permutation(count)


def items(count: int, split: str, fractions: tuple[float, float, float], name: str) -> np.ndarray:
    """The sorted rows of a split of `count` items, divided by a fixed permutation."""
    start, stop = bounds(count, split, fractions, name)
    return np.sort(permutation(count)[start:stop])


def part(split: str, available: Collection[str], valid_fraction: float | None, name: str) -> str:
    """Which of its own splits a source reads for `split`; "valid" may be carved out of "train".

    Returns:
        `split` itself, or "train" for a "valid" that `carve` then takes out of it.

    Raises:
        ValueError: there is no such split, or `valid_fraction` is not in (0, 1) or not wanted.
    """
    check_split(split)
    if valid_fraction is not None:
        if "valid" in available:
            raise ValueError(f"{name} has a validation split already: leave out valid_fraction")
        if not 0 < valid_fraction < 1:
            raise ValueError(f"valid_fraction must lie between 0 and 1, got {valid_fraction}")
    if split in available:
        return split
    if split == "valid" and valid_fraction is not None and "train" in available:
        return "train"
    advice = ""
    if split == "valid" and "train" in available:
        advice = "; valid_fraction=f carves one out of train (give it when loading train, too)"
    own = " and ".join(name for name in SPLITS if name in available)
    raise ValueError(f"{name} has no {split!r} split, only {own}{advice}")


def carve(
    count: int, split: str, valid_fraction: float | None, name: str, labels: np.ndarray | None = None
) -> np.ndarray | None:
    """The sorted rows, of a train split of `count` items, that are "train" or "valid"; None means all.

    Args:
        count: items in the source's own split.
        split: what is asked for; "test" is never carved.
        valid_fraction: how much of train is held out, class by class where there are labels.
        name: for messages.
        labels: int `(count,)` or None.
    """
    if valid_fraction is None or split == "test":
        return None
    held = np.zeros(count, bool)
    order = permutation(count)
    groups = [order] if labels is None else [order[labels[order] == k] for k in np.unique(labels)]
    for group in groups:
        held[group[: round(len(group) * valid_fraction)]] = True
    rows = np.flatnonzero(held if split == "valid" else ~held)
    if len(rows) == 0:
        raise ValueError(f"{name}: split {split!r} is empty at valid_fraction={valid_fraction}, {count} items")
    return rows
