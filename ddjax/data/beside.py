"""What comes with the items of a data set beside their labels: other ends of a path, and how far to trust the label.

An item holds it under a name of its own, "x1", "ends" or "coherence"; an objective finds it in the condition,
`cond = {name: ..., "cond": the labels}` (`in_condition`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ddjax.data.dataset import Dataset, Source

PLAIN = {"x0", "cond", "weights"}
STATES = ("x0", "x1", "ends")  # what is mapped onto another interval with x0


@dataclasses.dataclass(frozen=True, eq=False)
class _Changed:
    """Another source, its items changed by (items, rows) -> items."""

    source: Source
    change: Callable[[dict[str, Any], np.ndarray], dict[str, Any]]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: np.ndarray) -> dict[str, Any]:
        return self.change(self.source[index], np.asarray(index))


def in_condition(data: Dataset, name: str) -> Dataset:
    """The data with what their items have under `name` in the condition, `cond = {name: ..., "cond": its own}`.

    Raises ValueError where they have nothing of that name.
    """
    if name not in (found := data[:1]):
        raise ValueError(
            f"the items of {data.name!r} have {', '.join(found)}, and {name!r} is needed: for an .npz, name the array "
            f"of it with config.data.options.beside=[{name!r}]"
        )

    def change(items, rows):
        items = dict(items)
        return {"cond": {name: items.pop(name), "cond": items.pop("cond", None)}, **items}

    return dataclasses.replace(data, source=_Changed(data.source, change))


def mislabelled(data: Dataset, seed: int = 0) -> Dataset:
    """Labelled data whose labels are to be trusted as far as each item's "coherence" says, uniform on [0, 1).

    With probability 1 - coherence the label is drawn anew, uniformly: where classes are as frequent as each other,
    p(x | label, coherence) = coherence p(x | label) + (1 - coherence) p(x). An item's draws go by its row, the same in
    every epoch. Raises ValueError for data without labels.
    """
    if not data.num_classes:
        raise ValueError(f"{data.name!r} has no labels to be wrong about")

    def change(items, rows):
        draws = np.array([np.random.default_rng((seed, int(row))).random(3) for row in rows])
        drawn = np.floor(data.num_classes * draws[:, 2])
        cond = np.where(draws[:, 1] < draws[:, 0], items["cond"], drawn).astype(np.int32)
        return {**items, "cond": cond, "coherence": draws[:, 0].astype(np.float32)}

    return dataclasses.replace(data, source=_Changed(data.source, change))


@dataclasses.dataclass(frozen=True, eq=False)
class _ByClass:
    """See `by_class`."""

    source: Source
    rows: tuple[np.ndarray, ...]  # of each class
    name: str
    rounds: int
    seed: int

    def __len__(self) -> int:
        return self.rounds * len(self.rows[0])

    def __getitem__(self, index: np.ndarray) -> dict[str, Any]:
        first, *others = self.rows
        draws = np.array([np.random.default_rng((self.seed, int(row))).random(len(others)) for row in index])
        picked = [rows[np.int64(draws[:, k] * len(rows))] for k, rows in enumerate(others)]
        states = [self.source[rows]["x0"] for rows in picked]
        x0 = self.source[first[np.asarray(index) % len(first)]]["x0"]
        return {"x0": x0, self.name: states[0] if self.name == "x1" else np.stack(states, -1)}


def by_class(data: Dataset, classes: Sequence[int], name: str = "ends", rounds: int = 64, seed: int = 0) -> Dataset:
    """The first of the classes, each item with one of every other, drawn independently: an interpolant's marginals.

    Items come `rounds` times in an epoch, with other companions each time; these go by the row. Labels are left out.

    name: what the others come under: "ends", `(rows, *shape, classes - 1)`, or, for two, "x1", `(rows, *shape)`.
    Raises ValueError for tokens, fewer than two classes, or one without items.
    """
    if data.num_symbols is not None:
        raise ValueError(f"marginals are of continuous values, but the data {data.name!r} are tokens")
    if len(classes) < 2 or len(set(classes)) < len(classes) or (name == "x1" and len(classes) != 2):
        raise ValueError(f"needs two or more different classes, and just two for x1, got {list(classes)}")
    labels = [data[slice(start, start + 4096)].get("cond") for start in range(0, len(data), 4096)]
    if not labels or labels[0] is None:
        raise ValueError(f"{data.name!r} has no labels to tell marginals by")
    rows = tuple(np.flatnonzero(np.concatenate(labels) == k) for k in classes)
    if empty := [k for k, found in zip(classes, rows, strict=True) if not len(found)]:
        raise ValueError(f"{data.name!r} has no items of class {empty[0]}")
    return dataclasses.replace(
        data, source=_ByClass(data.source, rows, name, rounds, seed), num_classes=0, mixture=None
    )


__all__ = ["PLAIN", "STATES", "by_class", "in_condition", "mislabelled"]
