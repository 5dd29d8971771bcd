"""Undirected graphs of several sizes as states of two parts, nodes and edges."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from ddjax.data import splits
from ddjax.data.dataset import Dataset

KEYS = {"n_nodes", "edge_off", "edges"}  # by which an archive of graphs is known


@dataclasses.dataclass(frozen=True, eq=False)
class GraphSource:
    """Graphs, made into states when they are asked for.

    nodes: the largest number. sizes `(n,)`; ends: the edges of each, `(edges, 2)`. node_types: of each, or None: nodes
    have no types. edge_types: of each, from 1.
    """

    nodes: int
    sizes: np.ndarray
    ends: tuple[np.ndarray, ...]
    edge_types: tuple[np.ndarray, ...]
    node_types: tuple[np.ndarray, ...] | None = None

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: np.ndarray) -> dict[str, Any]:
        """States, weights (0 where there are no nodes) and sizes."""
        index = np.asarray(index)
        matrix = np.zeros((len(index), self.nodes, self.nodes), np.int32)
        for k, graph in enumerate(index.tolist()):
            i, j = np.sort(self.ends[graph], axis=1).T
            matrix[k, i, j] = self.edge_types[graph]
        first, second = np.triu_indices(self.nodes, 1)
        size = self.sizes[index].astype(np.int32)
        there = np.arange(self.nodes) < size[:, None]
        x0 = {"edges": matrix[:, first, second]}
        weights = {"edges": (there[:, first] & there[:, second]).astype(np.float32)}
        if self.node_types is not None:
            x0["nodes"], weights["nodes"] = np.zeros((len(index), self.nodes), np.int32), there.astype(np.float32)
            for k, graph in enumerate(index.tolist()):
                x0["nodes"][k, : size[k]] = self.node_types[graph]
        return {"x0": x0, "weights": weights, "size": size}


def from_graphs(
    arrays: Mapping[str, np.ndarray],
    split: str,
    *,
    fractions: tuple[float, float, float] | None = None,
    name: str = "graphs",
) -> Dataset:
    """Graphs as arrays joined end to end.

    Args:
        arrays: `n_nodes` `(n,)`; `edges` `(m, 2)`, the two nodes of each edge of all graphs, those of graph i from
            `edge_off[i]` to `edge_off[i + 1]`; perhaps `edge_types` `(m,)`, from 1; `node_types`, of all nodes of all
            graphs, from 0; and `split` `(n,)`: 0 train, 1 valid, 2 test.
        split: "train", "valid" or "test".
        fractions: (train, valid, test), for graphs without their own division.
        name: for messages.

    Returns:
        Data of the parts "edges" (0: none) and, where they have types, "nodes", each as long as the largest graph's;
        items come with weights, 0 where there is no node, and with a "size".

    Raises:
        ValueError: arrays that do not go together.
    """
    sizes, ends, offsets = (np.asarray(arrays[key]) for key in ("n_nodes", "edges", "edge_off"))
    count = len(sizes)
    kinds = np.asarray(arrays.get("edge_types", np.ones(len(ends), np.int32)))
    types = None if "node_types" not in arrays else np.asarray(arrays["node_types"])
    if len(offsets) != count + 1 or offsets[-1] != len(ends) or len(kinds) != len(ends) or kinds.min(initial=1) < 1:
        raise ValueError(
            f"{name}: {count} graphs, {len(ends)} edges and {len(kinds)} types of them, from 1, need edge_off of "
            f"{count + 1} numbers up to {len(ends)}, got {len(offsets)} up to {offsets[-1]}"
        )
    owner = np.repeat(np.arange(count), np.diff(offsets))
    if len(ends) and ((ends >= sizes[owner][:, None]).any() or (ends[:, 0] == ends[:, 1]).any()):
        raise ValueError(f"{name}: an edge joins a node to itself, or to one that its graph does not have")
    if types is not None and len(types) != sizes.sum():
        raise ValueError(f"{name}: {len(types)} node_types for {sizes.sum()} nodes")
    rows = _rows(arrays, count, split, fractions, name)

    def each(joined: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, ...]:
        parts = np.split(joined, starts)
        return tuple(parts[row] for row in rows)

    source = GraphSource(
        nodes=int(sizes.max()),
        sizes=sizes[rows],
        ends=each(ends, offsets[1:-1]),
        edge_types=each(kinds, offsets[1:-1]),
        node_types=None if types is None else each(types, np.cumsum(sizes)[:-1]),
    )
    symbols = {} if types is None else {"nodes": int(types.max()) + 1}
    train = sizes[_rows(arrays, count, "train", fractions, name)]
    return Dataset(
        name=name,
        split=split,
        source=source,
        shape=({} if types is None else {"nodes": (source.nodes,)})
        | {"edges": (source.nodes * (source.nodes - 1) // 2,)},
        num_symbols=symbols | {"edges": int(kinds.max(initial=1)) + 1},
        sizes=np.bincount(train, minlength=source.nodes + 1),
    )


def _rows(arrays: Mapping[str, np.ndarray], count: int, split: str, fractions: Any, name: str) -> np.ndarray:
    if "split" not in arrays:
        return splits.items(count, split, fractions or splits.FRACTIONS, name)
    if fractions is not None:
        raise ValueError(f"{name} has its own splits: leave out fractions")
    splits.check_split(split)
    rows = np.flatnonzero(np.asarray(arrays["split"]) == splits.SPLITS.index(split))
    if not len(rows):
        raise ValueError(f"{name} has no graphs in its split {split!r}")
    return rows
