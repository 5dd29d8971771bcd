"""Parameters as one safetensors file, for other programs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from ddjax.training.manifest import write_atomically
from ddjax.types import Params


def export_safetensors(path: str | os.PathLike, params: Params, metadata: Mapping[str, str] | None = None) -> None:
    """Write a nested dict of arrays, names joined by "/". Atomic: a reader sees the old file or the new one.

    metadata: strings by name, kept in the file's header.
    Raises ValueError if a name itself contains "/" or is not a string, because it could not be read back.
    """
    from safetensors.numpy import save

    flat = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [getattr(key, "key", None) for key in keys]
        if not names or not all(isinstance(name, str) and "/" not in name for name in names):
            raise ValueError(
                f"cannot export {jax.tree_util.keystr(keys)}: the parameters must be nested dicts with "
                "string keys that have no '/'"
            )
        flat["/".join(names)] = np.ascontiguousarray(jax.device_get(leaf)).reshape(leaf.shape)
    write_atomically(Path(path), save(flat, metadata=dict(metadata or {})))


def load_safetensors(path: str | os.PathLike) -> tuple[Params, dict[str, str]]:
    """Read what `export_safetensors` wrote: nested plain dict of numpy arrays, and the metadata."""
    from safetensors import safe_open

    params: Params = {}
    with safe_open(path, framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118
            *parents, last = name.split("/")
            node = params
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = file.get_tensor(name)
        return params, file.metadata() or {}
