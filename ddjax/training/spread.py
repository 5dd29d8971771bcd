"""Batches over all devices of all processes, and results back: evaluating and sampling while training."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ddjax.training.mesh import BATCH_AXES, batch_sharding
from ddjax.types import PyTree


@dataclasses.dataclass(frozen=True)
class Spread:
    """Lays examples that every process holds over a mesh; without one, leaves all where it is."""

    mesh: Mesh | None = None

    @property
    def ways(self) -> int:
        """A batch must be a multiple of this."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape.get(name, 1) for name in BATCH_AXES)

    def rows(self, tree: PyTree) -> PyTree:
        """Arrays `(batch, ...)`, the same on every process -> laid over the mesh, each process placing its own."""
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, tree)
        sharding = batch_sharding(self.mesh)

        def place(array):
            array = np.asarray(jnp.asarray(array))  # in the dtype that JAX gives it
            return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

        return jax.tree.map(place, tree)

    def whole(self, tree: PyTree) -> PyTree:
        """Arrays laid over the mesh -> each whole, on one device of every process. All processes must ask."""
        if self.mesh is None:
            return tree
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        return jax.tree.map(lambda a: a.addressable_data(0), jax.jit(_same, out_shardings=everywhere)(tree))


def _same(tree: PyTree) -> PyTree:
    return tree
