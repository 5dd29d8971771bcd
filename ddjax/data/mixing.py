"""Several data sets as one, whose items come in training by the weight of their set."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from ddjax.data.dataset import Dataset, Source
from ddjax.data.describe import describe


@dataclasses.dataclass(frozen=True, eq=False)
class JoinedSource:
    """The items of several sources, one source after the other."""

    sources: tuple[Source, ...]

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def __getitem__(self, index: np.ndarray) -> dict[str, np.ndarray]:
        index = np.asarray(index)
        starts = np.cumsum([0, *map(len, self.sources)])
        source_of = np.searchsorted(starts, index, side="right") - 1
        batch: dict[str, Any] = {}
        for k in np.unique(source_of).tolist():
            here = np.flatnonzero(source_of == k)
            for name, values in self.sources[k][index[here] - starts[k]].items():
                if name not in batch:
                    batch[name] = np.empty((len(index), *values.shape[1:]), values.dtype)
                batch[name][here] = values
        return batch


def mixed(parts: Sequence[Dataset], weights: Sequence[float]) -> Dataset:
    """The data sets as one; in training an item is of each with the proportion of its weight (`data.batches`).

    weights: positive, to any sum. A small set with a large weight is gone through more often than a large one.
    Raises ValueError for sets whose items are not alike: shape, symbols, labels, vocabulary, and what comes with them.
    """
    if not parts or len(parts) != len(weights):
        raise ValueError(f"each source of a mixture has a weight, got {len(parts)} sources and {len(weights)} weights")
    if not all(np.isfinite(weight) and weight > 0 for weight in weights):
        raise ValueError(f"weights must be positive, got {list(weights)}")
    for part in parts:
        if part.mixture is not None or len(part) == 0:
            raise ValueError(f"{part.name!r} is {'empty' if part.mixture is None else 'a mixture itself'}")
        about, first = ({k: v for k, v in describe(d).items() if k not in ("name", "counts")} for d in (part, parts[0]))
        about["items"], first["items"] = (sorted(data[:1]) for data in (part, parts[0]))
        if differ := [key for key in about if about[key] != first[key]]:
            shown = "; ".join(f"{key}: {str(first[key])[:60]} and {str(about[key])[:60]}" for key in differ)
            raise ValueError(f"{parts[0].name!r} and {part.name!r} cannot be mixed, their items differ in {shown}")
    total = float(sum(weights))
    prints = [part.fingerprint for part in parts]
    return dataclasses.replace(
        parts[0],
        name=" + ".join(part.name for part in parts),
        source=JoinedSource(tuple(part.source for part in parts)),
        counts=None,
        mixture=tuple((len(part), weight / total) for part, weight in zip(parts, weights, strict=True)),
        fingerprint=hashlib.sha256(repr(prints).encode()).hexdigest()[:16] if any(prints) else "",
    )
