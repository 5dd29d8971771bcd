"""What a trained model needs to know of its data, without the data: shapes, symbols, and how to show a state."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ddjax.data.columns import Columns
from ddjax.data.dataset import Dataset, require
from ddjax.data.encoded import Latents
from ddjax.data.vocabulary import Bytes, Characters, Subwords

# What an older description does not say was so.
_BEFORE = {"interval": [-1.0, 1.0], "conditions": {}, "latents": None}


def differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In what two descriptions are of other data, by key.

    The name may change, and the file of an autoencoder move; the scale of its latents is measured anew, and may differ
    by rounding.
    """
    before, now = ({**_BEFORE, **d} for d in (before, now))
    keys = (before.keys() | now.keys()) - {"name", "latents"}
    found = [key for key in keys if before.get(key) != now.get(key)]
    scales = [None if d["latents"] is None else d["latents"]["scale"] for d in (before, now)]
    same = scales[0] == scales[1] or (None not in scales and np.isclose(*scales, rtol=1e-3))
    return sorted(found + ([] if same else ["latents"]))


class _NoItems:
    """The source of a description: there is nothing to read."""

    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: np.ndarray) -> dict[str, np.ndarray]:
        raise LookupError("this data set is a description from a run's folder and has no items; use ddjax.data.load")


def describe(dataset: Dataset) -> dict[str, Any]:
    """A description that JSON can hold; a text's vocabulary goes along, so that samples can be read anywhere."""
    return {
        "name": dataset.name,
        "shape": _each(list, dataset.shape),
        "num_symbols": dataset.num_symbols,
        "num_classes": dataset.num_classes,
        "levels": None if dataset.levels is None else [float(v) for v in dataset.levels],
        "interval": list(dataset.interval),
        "vocabulary": describe_vocabulary(dataset.vocabulary),
        "counts": _each(lambda counts: counts.tolist(), dataset.counts),
        "conditions": {name: list(shape) for name, shape in dataset.conditions.items()},
        "latents": None if dataset.latents is None else dataclasses.asdict(dataset.latents),
        **({} if dataset.columns is None else {"columns": dataset.columns.describe()}),
        **({} if dataset.sizes is None else {"sizes": dataset.sizes.tolist()}),
    }


def _each(function: Callable[[Any], Any], value: Any) -> Any:
    """Of a value, or of each of several parts; None stays."""
    if isinstance(value, Mapping):
        return {name: function(part) for name, part in value.items()}
    return None if value is None else function(value)


def describe_vocabulary(vocabulary: Any) -> dict[str, Any] | None:
    """All of a vocabulary, as JSON can hold it; None for one that is not of `ddjax.data.vocabulary`."""
    if isinstance(vocabulary, Bytes):
        return {"bytes": True}
    if isinstance(vocabulary, Characters):
        return {"alphabet": vocabulary.alphabet, "text8": vocabulary.text8}
    if isinstance(vocabulary, Subwords):
        return {"tokenizer": vocabulary.tokenizer.to_str()}
    return None


def described_vocabulary(text: dict[str, Any] | None) -> Any:
    """The vocabulary that `describe_vocabulary` described."""
    if text is None:
        return None
    if "bytes" in text:
        return Bytes()
    if "alphabet" in text:
        return Characters(text["alphabet"], text["text8"])
    tokenizers = require("tokenizers", "text", "this tokenizer")
    return Subwords(Path("tokenizer.json"), tokenizers.Tokenizer.from_str(text["tokenizer"]))


def from_description(description: dict[str, Any]) -> Dataset:
    """The data set without items that `describe` described: `to_images`, `to_text`, shapes and symbols work."""
    levels = description["levels"]
    return Dataset(
        name=description["name"],
        split="none",
        source=_NoItems(),
        shape=_each(tuple, description["shape"]),
        num_symbols=description["num_symbols"],
        num_classes=description["num_classes"],
        levels=None if levels is None else np.asarray(levels, np.float32),
        interval=tuple(description.get("interval", (-1.0, 1.0))),  # older runs do not say it
        vocabulary=described_vocabulary(description["vocabulary"]),
        counts=_each(lambda counts: np.asarray(counts, np.int64), description["counts"]),
        conditions={name: tuple(shape) for name, shape in description.get("conditions", {}).items()},
        latents=Latents(**description["latents"]) if description.get("latents") else None,
        columns=Columns(**description["columns"]) if "columns" in description else None,
        sizes=np.asarray(description["sizes"], np.int64) if "sizes" in description else None,
    )
