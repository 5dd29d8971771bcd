"""What a trained model needs to know of its data, without the data: shapes, symbols, and how to show a state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ddjax.data.dataset import Dataset, require
from ddjax.data.vocabulary import Bytes, Characters, Subwords


class _NoItems:
    """The source of a description: there is nothing to read."""

    def __len__(self) -> int:
        return 0

    def __getitem__(self, index: np.ndarray) -> dict[str, np.ndarray]:
        raise LookupError("this data set is a description from a run's folder and has no items; use ddjax.data.load")


def describe(dataset: Dataset) -> dict[str, Any]:
    """A description that JSON can hold; a text's vocabulary goes along, so that samples can be read anywhere."""
    vocabulary: dict[str, Any] | None = None
    if isinstance(dataset.vocabulary, Bytes):
        vocabulary = {"bytes": True}
    elif isinstance(dataset.vocabulary, Characters):
        vocabulary = {"alphabet": dataset.vocabulary.alphabet, "text8": dataset.vocabulary.text8}
    elif isinstance(dataset.vocabulary, Subwords):
        vocabulary = {"tokenizer": dataset.vocabulary.tokenizer.to_str()}
    return {
        "name": dataset.name,
        "shape": list(dataset.shape),
        "num_symbols": dataset.num_symbols,
        "num_classes": dataset.num_classes,
        "levels": None if dataset.levels is None else [float(v) for v in dataset.levels],
        "interval": list(dataset.interval),
        "vocabulary": vocabulary,
        "counts": None if dataset.counts is None else dataset.counts.tolist(),
    }


def from_description(description: dict[str, Any]) -> Dataset:
    """The data set without items that `describe` described: `to_images`, `to_text`, shapes and symbols work."""
    text, levels = description["vocabulary"], description["levels"]
    vocabulary: Any = None
    if text is not None and "bytes" in text:
        vocabulary = Bytes()
    elif text is not None and "alphabet" in text:
        vocabulary = Characters(text["alphabet"], text["text8"])
    elif text is not None:
        tokenizers = require("tokenizers", "text", "this run's tokenizer")
        vocabulary = Subwords(Path("tokenizer.json"), tokenizers.Tokenizer.from_str(text["tokenizer"]))
    return Dataset(
        name=description["name"],
        split="none",
        source=_NoItems(),
        shape=tuple(description["shape"]),
        num_symbols=description["num_symbols"],
        num_classes=description["num_classes"],
        levels=None if levels is None else np.asarray(levels, np.float32),
        interval=tuple(description.get("interval", (-1.0, 1.0))),  # older runs do not say it
        vocabulary=vocabulary,
        counts=None if description["counts"] is None else np.asarray(description["counts"], np.int64),
    )
