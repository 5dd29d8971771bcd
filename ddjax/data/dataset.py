"""What a data set is: one split, read at random, and what its states look like."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Source(Protocol):
    """Random access to the items of one split, a batch of rows at a time.

    `source[index]` takes an integer array `(rows,)` with values in `[0, len(source))` and returns a dict of
    arrays: "x0" `(rows, *shape)`, int32 tokens or float32 values, for labelled data "cond" `(rows,)`, int32, and
    for packed documents "segments" and "weights" `(rows, length)` (`ddjax.data.packing`). A source may be read by
    several threads at once.
    """

    def __len__(self) -> int:
        """How many items there are."""

    def __getitem__(self, index: np.ndarray) -> dict[str, np.ndarray]:
        """The items at these rows, in this order."""


class Vocabulary(Protocol):
    """How text becomes tokens and back."""

    @property
    def num_symbols(self) -> int:
        """How many tokens there are."""

    def decode(self, ids: np.ndarray) -> str:
        """The text of a row of token ids."""


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """One split of a data set and how its states look.

    Attributes:
        name: what was loaded, for messages and file names.
        split: "train", "valid" or "test".
        source: random access to the items.
        shape: the shape of one x0, e.g. `(8, 8, 1)` or `(256,)`.
        num_symbols: how many values a site takes, for tokens; None for continuous data.
        num_classes: how many labels "cond" takes; 0 for unlabelled data.
        levels: for continuous data made of discrete values, the increasing float32 array of the values a
            site can take (every x0 is one of them exactly); a binned decoder turns them back into a
            likelihood. None otherwise.
        interval: for continuous data, where their least and greatest lie; what is shown black and white.
        vocabulary: for text, what turns tokens back into text. None otherwise.
        counts: for tokens, how often each symbol occurs, once somebody has counted (`count_symbols`).
        mixture: for several sources joined (`data.mixed`), how many items each has, in order, and its weight: how often
            its items come in training. None: one source.
        fingerprint: of prepared data, what tells them from others; a run goes on with the same only. "" for others.
        conditions: what comes in the condition beside labels, and its shapes (`data.conditioned`).
        latents: of data that are latents of images, what decodes them (`data.encoded`). None: they are no latents.
        columns: of the rows of a table, what their entries stand for (`data.columns.Columns`). None otherwise.
        sizes: of graphs of several sizes, how many of each number of nodes there are in the training split; items have
            a "size". None otherwise.

    Data of several parts, for `processes.Product`, have dicts for "x0", shape, num_symbols (None for a part of numbers)
    and counts, with an entry for each part.
    """

    name: str
    split: str
    source: Source = dataclasses.field(repr=False)
    shape: tuple[int, ...] | dict[str, tuple[int, ...]]
    num_symbols: int | dict[str, int | None] | None = None
    num_classes: int = 0
    levels: np.ndarray | None = dataclasses.field(default=None, repr=False)
    interval: tuple[float, float] = (-1.0, 1.0)
    vocabulary: Vocabulary | None = dataclasses.field(default=None, repr=False)
    counts: np.ndarray | dict[str, np.ndarray] | None = dataclasses.field(default=None, repr=False)
    mixture: tuple[tuple[int, float], ...] | None = None
    fingerprint: str = ""
    conditions: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    latents: Any = None
    columns: Any = dataclasses.field(default=None, repr=False)
    sizes: np.ndarray | None = dataclasses.field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index) -> dict[str, np.ndarray]:
        """The items at an array of rows (or a slice of them) as a dict of arrays."""
        if isinstance(index, slice):
            index = np.arange(*index.indices(len(self)))
        return self.source[np.asarray(index)]

    def first(self, count: int) -> np.ndarray:
        """The numbers of the first items, or of all; of a mixture, the first of each set by its weight."""
        rows, start = [], 0
        for size, weight in self.mixture or ((len(self), 1.0),):
            rows.append(start + np.arange(min(size, max(1, round(count * weight)))))
            start += size
        return np.concatenate(rows)

    @property
    def is_image(self) -> bool:
        """Whether one x0 is an image `(height, width, 1 or 3)`, or the latents of one."""
        if self.parts:
            return False
        shape = self.shape if self.latents is None else self.latents.image_shape
        return self.vocabulary is None and len(shape) == 3 and shape[-1] in (1, 3)

    @property
    def parts(self) -> bool:
        """Whether states are dicts of several parts."""
        return isinstance(self.shape, Mapping)

    def to_images(self, x0) -> np.ndarray:
        """States as images to look at.

        Args:
            x0: `(n, *shape)`, tokens or values in `interval`, or latents, which are decoded. What lies outside (a mask
                token, an overshoot) is clipped to the nearest shade.

        Returns:
            uint8 `(n, height, width, channels)`.

        Raises:
            ValueError: these data are not images, or `x0` has another shape.
        """
        if not self.is_image:
            raise ValueError(f"{self.name}: states of shape {self.shape} are not images")
        x0 = self._batch(x0)
        if self.latents is not None:
            x0 = self.latents.decode(x0)
        if self.num_symbols is None:
            low, high = self.interval
            shade = (x0.astype(np.float64) - low) * (255 / (high - low))
        else:
            shade = x0.astype(np.float64) * 255 / max(self.num_symbols - 1, 1)
        return np.rint(np.clip(shade, 0, 255)).astype(np.uint8)

    def token(self, token: int | str) -> int:
        """The number of a token that is given by its text. Raises ValueError where that is not one token."""
        if not isinstance(token, str):
            return token
        if self.vocabulary is None:
            raise ValueError(f"{self.name} is not text: give the number of a token, not {token!r}")
        ids = self.vocabulary.encode(self.vocabulary.prepare(token.encode(), self.name), self.name)
        if len(ids) != 1:
            raise ValueError(f"{token!r} must be one token of {self.name}, and is {len(ids)}")
        return int(ids[0])

    def to_text(self, x0, stop: int | str | None = None) -> list[str]:
        """States as text, one string a row; a token outside the vocabulary (a mask) shows as a block.

        Args:
            x0: int tokens `(n, length)`, of any length (`ddjax.sample_long`).
            stop: a token, or its text, before the first of which each row ends; None: all of it.

        Raises:
            ValueError: these data are not text, or `x0` has another shape.
        """
        if self.vocabulary is None:
            raise ValueError(f"{self.name}: states of shape {self.shape} are not text")
        rows = np.asarray(x0)
        if rows.ndim != 2:
            raise ValueError(f"{self.name}: expected states (n, length), got {rows.shape}")
        if stop is not None:
            token = self.token(stop)
            rows = [row[: np.argmax(row == token)] if (row == token).any() else row for row in rows]
        return [self.vocabulary.decode(row) for row in rows]

    def _batch(self, x0) -> np.ndarray:
        x0 = np.asarray(x0)
        if x0.shape[1:] != self.shape:
            raise ValueError(f"{self.name}: expected states (n, *{self.shape}), got {x0.shape}")
        return x0


def count_symbols(dataset: Dataset) -> Dataset:
    """The data set with its `counts`, int64 `(num_symbols,)`; all its items are read, once.

    Raises:
        ValueError: the data are not tokens.
    """
    if dataset.counts is not None:
        return dataset
    if dataset.num_symbols is None:
        raise ValueError(f"{dataset.name}: continuous values have no symbols to count")
    symbols = dataset.num_symbols if dataset.parts else {"": dataset.num_symbols}
    counts = {name: np.zeros(number, np.int64) for name, number in symbols.items() if number is not None}
    for start in range(0, len(dataset), 4096):
        items = dataset[slice(start, start + 4096)]
        x0, weights = (items.get(key) if dataset.parts else {"": items.get(key)} for key in ("x0", "weights"))
        for name, found in counts.items():
            own = None if weights is None else weights[name]
            tokens = x0[name] if own is None else x0[name][own > 0]  # padding is no symbol
            found += np.bincount(tokens.ravel(), minlength=len(found))
    return dataclasses.replace(dataset, counts=counts if dataset.parts else counts[""])


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Imports an optional package, or says how to install it.

    Raises:
        ImportError: it is not installed; the message gives the command.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        package = {"PIL": "pillow"}.get(package, package)
        raise ImportError(f"{purpose} needs {package}: pip install 'ddjax[{extra}]'") from error
