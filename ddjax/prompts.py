"""Known parts of a text: a beginning, or what stands around gaps."""

from __future__ import annotations

import re

import numpy as np

from ddjax.data.dataset import Dataset
from ddjax.sampling import Observed

_GAP = re.compile(r"_{3,}(?:\{(\d+)\})?")


def prompt(data: Dataset, text: str, num: int) -> Observed:
    """Examples that begin with this text; the rest of the window is to be drawn.

    data: texts, whose vocabulary turns the prompt into tokens. Returns `(num, length)` each.
    Raises ValueError for data that are no text, for what their vocabulary lacks, and where nothing is left to draw.
    """
    if not text:
        raise ValueError("an empty prompt says nothing: leave it out")
    return _observed(data, [encode(data, text, "prompt")], num, "prompt")


def infill(data: Dataset, text: str, num: int) -> Observed:
    """Examples that show this text but for its gaps, which are to be drawn.

    A gap is `___`, three underscores or more: what is left of the window, shared evenly where there are several; or
    `___{12}`: 12 tokens. Where all gaps have a length, what is left of the window follows the text, and is drawn too.
    The text between gaps is turned into tokens piece by piece.

    Raises as `prompt` does, and for a text without a gap or one that does not fit the window.
    """
    cuts = list(_GAP.finditer(text))
    if not cuts:
        raise ValueError(f'no gap in {text!r}: write one as ___, or as ___{{12}} for 12 tokens ("To be, ___{{20}}")')
    starts, ends = [0, *(c.end() for c in cuts)], [*(c.start() for c in cuts), len(text)]
    pieces = [encode(data, text[a:b], "infill") for a, b in zip(starts, ends, strict=True)]
    sizes = [None if c[1] is None else int(c[1]) for c in cuts]
    rest = data.shape[0] - sum(map(len, pieces)) - sum(s or 0 for s in sizes)
    shared = sizes.count(None)
    if rest < shared:
        raise ValueError(
            f"infill: {sum(map(len, pieces))} tokens of text and its gaps do not fit the window of {data.shape[0]}"
        )
    for i, size in enumerate(sizes):
        if size is None:
            sizes[i] = rest // shared
            rest, shared = rest - sizes[i], shared - 1
    parts = [pieces[0]]
    for size, piece in zip(sizes, pieces[1:], strict=True):
        parts += [np.full(size, -1), piece]
    return _observed(data, parts, num, "infill")


def encode(data: Dataset, text: str, name: str) -> np.ndarray:
    """The tokens of a text. Raises ValueError for data that are no text, and for what their vocabulary lacks."""
    vocabulary = data.vocabulary
    if vocabulary is None or not hasattr(vocabulary, "encode"):
        raise ValueError(f"{name}: it is for text, and {data.name} is none (or its vocabulary does not encode)")
    if not text:
        return np.zeros(0, np.int64)
    tokens = vocabulary.encode(vocabulary.prepare(text.encode(), name), name).astype(np.int64)
    if (unknown := getattr(vocabulary, "unknown", None)) in tokens.tolist():
        raise ValueError(f"{name}: {text!r} has symbols that the vocabulary lacks (token {unknown} stands for them)")
    return tokens


def _observed(data: Dataset, parts: list[np.ndarray], num: int, name: str) -> Observed:
    tokens, length = np.concatenate(parts), data.shape[0]
    if len(tokens) > length:
        raise ValueError(f"{name}: {len(tokens)} tokens do not fit the window of {length}")
    tokens = np.concatenate([tokens, np.full(length - len(tokens), -1)])
    if (tokens >= 0).all():
        raise ValueError(f"{name}: it fills the window of {length} tokens, nothing is left to draw")
    tokens = np.broadcast_to(tokens, (num, length))
    return Observed(tokens >= 0, np.maximum(tokens, 0).astype(np.int32))
