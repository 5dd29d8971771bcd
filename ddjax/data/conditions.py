"""Conditions beside labels: named arrays of a data set that the network is told, and what stands for none of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ddjax.data.beside import _Changed
from ddjax.data.dataset import Dataset

# The entries of a condition (`denoisers.given.Given`), how a network is built that takes them, and of each what stands
# for none. A sequence is none where none of its entries is valid; without their points there are no values.
ENTRIES = {"vector": 1, "sequence": 2, "valid": 1, "image": None, "points": 2}  # and their axes; an image's: the data's
OPTIONS = {"vector": "vector", "sequence": "context_width", "image": "image_channels"}
NULLS = {"vector": 0.0, "valid": False, "image": 0.0}


def smaller(x0: Array, scale: int) -> Array:
    """Images `(batch, height, width, channels)` with `scale` times fewer rows and columns, the means of squares.

    Raises ValueError for sizes that the scale does not divide.
    """
    batch, *sides, channels = x0.shape
    if scale < 1 or len(sides) != 2 or any(side % scale for side in sides):
        raise ValueError(f"smaller={scale} does not divide the sides of images {x0.shape[1:]}")
    return x0.reshape(batch, sides[0] // scale, scale, sides[1] // scale, scale, channels).mean((2, 4))


MADE = {"smaller": smaller}  # of x0 and a number
Make = Callable[[np.ndarray, np.ndarray], np.ndarray]  # of x0 and the numbers of the items


def conditioned(data: Dataset, names: Mapping[str, str | Mapping[str, int] | Make]) -> Dataset:
    """The data with some of their arrays in the condition, `cond = {"vector": ..., "cond": the labels or None}`.

    names: from entries, "vector" `(n, numbers)`, "sequence" `(n, entries, width)`, "valid" `(n, entries)`, "image"
        `(n, *sides, channels)` and "points" `(n, sites, coordinates)` to the arrays (of an .npz named by `beside=`).
        Valid is what is greater than 0; a sequence without "valid" is all valid. The image has the data's sides, or all
        a whole number of times smaller (`denoisers.InfDiT`). Points are where a function has the values `(n, sites)`
        (`denoisers.NeuralProcess`). What a network is to undo is made of the data: `{"smaller": 4}`, of images of
        values `smaller(x0, 4)`, or any function of x0 and the items' numbers, by which noise would go.
    Raises ValueError for entries that there are not, arrays that the data have not, and shapes that do not fit.
    """
    if wrong := sorted(set(names) - set(ENTRIES)):
        raise ValueError(f"{wrong[0]!r} is no entry of a condition; it is one of {', '.join(ENTRIES)}")
    if "valid" in names and "sequence" not in names:
        raise ValueError("'valid' says which entries of a sequence there are: name its 'sequence' too")
    first = data[:1]
    taken = {name for name in names.values() if isinstance(name, str)}
    found = {entry: _found(data, entry, name, first) for entry, name in names.items()}
    shapes = {entry: np.shape(find(first, np.arange(1)))[1:] for entry, find in found.items()}
    if "sequence" in names:
        shapes.setdefault("valid", shapes["sequence"][:1])
    for entry, shape in shapes.items():
        if not _fits(data, entry, shape) or (entry == "valid" and shape != shapes["sequence"][:1]):
            raise ValueError(f"{names.get(entry, entry)!r} of {data.name!r} has shape {shape}: it is no {entry!r}")

    def change(items: dict[str, Any], rows: np.ndarray) -> dict[str, Any]:
        told = {entry: np.asarray(find(items, rows), np.float32) for entry, find in found.items()}
        told |= {"valid": told["valid"] > 0} if "valid" in told else {}
        if "sequence" in told and "valid" not in told:
            told["valid"] = np.ones(told["sequence"].shape[:2], bool)
        left = {name: value for name, value in items.items() if name not in taken}
        return {**left, "cond": {**told, "cond": items.get("cond")}}

    return dataclasses.replace(data, source=_Changed(data.source, change), conditions=shapes)


def _found(data: Dataset, entry: str, name: Any, first: Mapping[str, Any]) -> Callable:
    """From items and their numbers to what is told of them."""
    if callable(name):
        return lambda items, rows: name(items["x0"], rows)
    if isinstance(name, Mapping):
        if len(name) != 1 or not name.keys() <= MADE.keys():
            raise ValueError(f"{entry}={dict(name)}: expected one of {', '.join(MADE)}, and its number")
        if data.parts or data.num_symbols is not None:
            raise ValueError(f"{entry}={dict(name)} is made of values, and the data {data.name!r} are tokens")
        ((kind, number),) = name.items()
        return lambda items, rows: MADE[kind](items["x0"], number)
    if name not in first:
        raise ValueError(
            f"the items of {data.name!r} have {', '.join(first)}, and {name!r} is needed: for an .npz, name the "
            f"array of it with config.data.options.beside=[{name!r}]"
        )
    return lambda items, rows: items[name]


def _fits(data: Dataset, entry: str, shape: tuple[int, ...]) -> bool:
    """Whether an item's array can be this entry."""
    if entry == "points":
        return not data.parts and len(shape) == ENTRIES[entry] and shape[:1] == data.shape
    if entry != "image":
        return len(shape) == ENTRIES[entry]
    if data.parts or len(shape) != len(data.shape) or 0 in shape:
        return False
    times = {divmod(side, own) for side, own in zip(data.shape[:-1], shape[:-1], strict=True)}
    return len(times) == 1 and not times.pop()[1]


def nulls(data: Dataset) -> Any:
    """The condition that means "none": a label, a dict of nulls by entry, or None where data have no condition."""
    label = jnp.int32(data.num_classes) if data.num_classes else None
    if not data.conditions:
        return label
    entries = {entry: null for entry, null in NULLS.items() if entry in data.conditions}
    return (entries or None) if label is None else {**entries, "cond": label}


def labels(cond: Any) -> Any:
    """The labels in a condition."""
    return cond["cond"] if isinstance(cond, Mapping) else cond


def of(data: Dataset, cond: Any, n: int) -> Any:
    """The condition of n examples, as the network is told it.

    cond: labels `(n,)`, or one for all; for data with conditions also a dict of entries, each of n examples or one for
        all, "cond" the labels; what it leaves out says nothing. None: no condition.
    Raises ValueError for labels and entries that the data have not.
    """
    if cond is None:
        return None
    if not data.conditions:
        if isinstance(cond, Mapping):
            raise ValueError(f"{data.name!r} has labels alone: cond must be these, not a dict")
        return _labels(data, cond, n)
    given = dict(cond) if isinstance(cond, Mapping) else {"cond": cond}
    if unknown := sorted(given.keys() - {*data.conditions, "cond"}):
        raise ValueError(f"cond has {unknown[0]!r}; {data.name!r} has {', '.join((*data.conditions, 'cond'))}")
    made = {}
    for entry, shape in data.conditions.items():
        if entry == "points" and given.get(entry) is None:
            raise ValueError(f"cond['points'] is missing: where values of {data.name!r} are asked for, {(n, *shape)}")
        default = entry == "valid" and given.get("sequence") is not None
        value = np.asarray(default if given.get(entry) is None else given[entry], _dtype(entry))
        if value.shape not in ((), shape, (n, *shape)):
            raise ValueError(f"cond[{entry!r}] has shape {value.shape}; expected {(n, *shape)}, or {shape} for all")
        made[entry] = np.broadcast_to(value, (n, *shape))
    if data.num_classes:
        given.setdefault("cond", data.num_classes)
    own = given.get("cond")
    return {**made, "cond": None if own is None else _labels(data, own, n)}


def options(data: Dataset) -> dict[str, int]:
    """How the network is built that takes the data's conditions."""
    return {OPTIONS[entry]: shape[-1] for entry, shape in data.conditions.items() if entry in OPTIONS}


def _labels(data: Dataset, cond: Any, n: int) -> Array:
    if not data.num_classes:
        raise ValueError(f"{data.name!r} has no labels, so cond must be None")
    cond = np.broadcast_to(np.asarray(cond, np.int32), (n,))
    if len(wrong := cond[(cond < 0) | (cond > data.num_classes)]):
        raise ValueError(f"labels run from 0 to {data.num_classes - 1} ({data.num_classes} means none), got {wrong[0]}")
    return cond


def _dtype(entry: str) -> type:
    return bool if entry == "valid" else np.float32


__all__ = ["conditioned", "labels", "nulls", "of", "options", "smaller"]
