"""Where the axes of a network's arrays lie on a mesh of devices: the names, and the constraints inside networks.

A network says what the axes of an array are (batch, sites, heads); which mesh axes carry these is said here. Outside a
mesh nothing happens, not even at trace time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

AXES = ("data", "fsdp", "tensor", "sequence", "expert")
# Tokens travel between the devices of `expert` only on their way into the experts and back: elsewhere it carries rows.
BATCH_AXES = ("data", "fsdp", "expert")
CARRIERS = {
    "batch": BATCH_AXES,
    "sites": ("sequence",),
    "heads": ("tensor",),
    "hidden": ("tensor",),
    "experts": ("expert",),
    "rows of experts": ("data", "fsdp"),  # the batch where `expert` carries the experts
}
# Parameters whose first axis counts layers: of whole stacks, and of runs of equal blocks ("encoder/1-3").
SCANNED = re.compile(r"(^|/)(stack/(.+/)?blocks/\D|(encoder|middle|decoder)/\d+-\d+/)")


def path_name(path: Sequence[Any]) -> str:
    """A pytree path as `params/block_0/kernel`."""
    return "/".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)


def layer_axes(name: str) -> int:
    """How many axes of the parameter of this `path_name` count layers, before those of one layer: 1 of scanned ones."""
    return 1 if SCANNED.search(name) else 0


def _cutting() -> dict[str, int]:
    """The axes of the mesh under which we trace that cut arrays in parts, and in how many; empty for another mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    cutting = {
        name: size
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
        if size > 1 and kind == AxisType.Auto
    }
    return cutting if cutting.keys() & {*AXES} else {}


def as_rows(x: Array) -> Array:
    """`x` as a matrix, all its axes but the last in one; as it is under a mesh, which could not cut this axis as those.

    The gradient of a matrix that multiplies rows is one plain product; over several axes XLA's CPU compiler writes
    transposed copies of both its factors first, on one thread (a training step of DiT-S/2 takes half as long again).
    """
    return x if _cutting() else x.reshape(-1, x.shape[-1])


def constrain(x: Array, *axes: str | None) -> Array:
    """`x`, laid over the mesh under which it is traced (`jax.set_mesh`, `compile_step`), as the names of its axes say.

    axes: for each axis of x one of `CARRIERS`, or None for an axis that every device holds whole.
    A batch that its mesh axes do not divide is left to the compiler. Raises ValueError for other axes that do not
    divide: what was asked of the mesh would not be done.
    """
    cutting = _cutting()
    if not cutting:
        return x
    entries = []
    for size, axis in zip(x.shape, axes, strict=True):
        over = tuple(name for name in CARRIERS.get(axis, ()) if name in cutting)
        if size % (ways := math.prod(cutting[name] for name in over)) == 0:
            entries.append(over or None)
        elif axis in ("batch", "rows of experts"):
            entries.append(PartitionSpec.UNCONSTRAINED)
        else:
            raise ValueError(
                f"the mesh axis {over[0]}={ways} does not divide {size} {axis}: choose another size in "
                "config.train.mesh, or another network"
            )
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*entries))
