"""Orbax checkpoints as published weights: a directory of arrays, read by name and written; nothing in it is run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# Of a training's state, only these are weights: the parameters, and their average. Steps, keys and the optimizer's
# moments are left where they are.
WEIGHTS = ("ema_params", "params")
_MARKS = ("_METADATA", "manifest.ocdbt", "checkpoint")  # of Orbax, with and without OCDBT, and of its older form
_ITEMS = ("checkpoints", "train_state", "default", "state", "params")
_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


class _Leaf(NamedTuple):
    """What a checkpoint says of an array before it is read."""

    shape: tuple[int, ...]
    dtype: Any

    def get_shape(self) -> tuple[int, ...]:
        return self.shape

    def get_dtype(self) -> str:
        return _NAMES.get(np.dtype(self.dtype).name, str(self.dtype))


class Checkpoint:
    """The weights in an Orbax checkpoint by name, parts joined by "."; called as an open safetensors file is.

    A part ("params", "ema_params") is read whole when the first of its arrays is asked for.
    Raises ValueError for what Orbax cannot read.
    """

    def __init__(self, path: Path):
        from ddjax.training.backend import orbax

        self.path, self._ocp, self._read = path.absolute(), orbax(), {}
        try:
            with self._ocp.Checkpointer(self._ocp.PyTreeCheckpointHandler()) as checkpointer:
                tree = checkpointer.metadata(self.path).item_metadata.tree
        except Exception as error:  # Orbax raises of all kinds for what is no checkpoint of its own
            raise ValueError(f"{path} is not an Orbax checkpoint of arrays ({error})") from error
        parts = [name for name in WEIGHTS if tree.get(name)]
        self._tree = {name: tree[name] for name in parts} if parts else tree
        self._leaves = {name: _Leaf(tuple(leaf.shape), leaf.dtype) for name, leaf in _named(self._tree).items()}

    def keys(self) -> list[str]:
        """Names of all arrays."""
        return list(self._leaves)

    def get_slice(self, name: str) -> _Leaf:
        """Its shape and dtype."""
        return self._leaves[name]

    def get_tensor(self, name: str) -> np.ndarray:
        """The array."""
        part = name.split(".")[0]
        if part not in self._read:
            import jax

            item = {part: self._tree[part]}
            arguments = jax.tree.map(lambda _: self._ocp.RestoreArgs(restore_type=np.ndarray), item)
            request = self._ocp.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=True)
            with self._ocp.Checkpointer(self._ocp.PyTreeCheckpointHandler()) as checkpointer:
                self._read[part] = _named(checkpointer.restore(self.path, args=request))
        return self._read[part][name]


def find(path: Path) -> Path | None:
    """The checkpoint in a folder: itself, an item of it, or its newest step. None: there is none."""
    if any((path / mark).is_file() for mark in _MARKS):
        return path
    steps = sorted((p for p in path.iterdir() if p.is_dir() and p.name.isdigit()), key=lambda p: int(p.name))
    for inner in (*(path / name for name in _ITEMS if (path / name).is_dir()), *steps[::-1]):
        if (found := find(inner)) is not None:
            return found
    return None


def save(path: str | os.PathLike, tensors: Mapping[str, np.ndarray]) -> None:
    """Write arrays as an Orbax checkpoint, a directory that must not exist; names are cut at ".". Atomic."""
    from ddjax.training.backend import orbax

    path, ocp = Path(path).absolute(), orbax()
    if path.exists():
        raise ValueError(f"{path} exists: an Orbax checkpoint is a new directory")
    tree: dict[str, Any] = {}
    for name, value in tensors.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = np.asarray(value)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree))


def _named(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by name; entries of lists by their number."""
    if isinstance(tree, list | tuple) and not isinstance(tree, _Leaf):
        tree = dict(enumerate(tree))
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    return {
        path: leaf
        for name, child in tree.items()
        if child is not None
        for path, leaf in _named(child, f"{prefix}.{name}" if prefix else str(name)).items()
    }
