"""Constant arrays that compare by value, so that what holds them can be a static argument of `jax.jit`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike


class Frozen:
    """A read-only float64 NumPy array, hashed once and compared by content. `np.asarray(frozen)` gives it back."""

    def __init__(self, values: ArrayLike):
        self.values = np.array(values, np.float64)
        self.values.setflags(write=False)
        self._hash = hash((self.values.shape, self.values.tobytes()))

    def __array__(self, dtype=None, copy=None):
        """The values."""
        return np.array(self.values, dtype, copy=copy) if copy else self.values.astype(dtype or np.float64, copy=False)

    def __eq__(self, other):
        return isinstance(other, Frozen) and self._hash == other._hash and np.array_equal(self.values, other.values)

    def __hash__(self):
        return self._hash

    def __repr__(self):
        return f"Frozen(shape={self.values.shape})" if self.values.size > 8 else f"Frozen({self.values.tolist()})"


@dataclasses.dataclass(frozen=True)
class FrozenTree:
    """A pytree of `Frozen` arrays, compared by content."""

    leaves: tuple[Frozen, ...]
    structure: Any

    @classmethod
    def of(cls, tree: Any) -> FrozenTree:
        """The tree's concrete arrays, as constants."""
        leaves, structure = jax.tree.flatten(tree)
        return cls(tuple(Frozen(leaf) for leaf in leaves), structure)

    @property
    def tree(self) -> Any:
        """The tree with NumPy arrays."""
        return jax.tree.unflatten(self.structure, [leaf.values for leaf in self.leaves])

    @classmethod
    def held(cls, tree: Any) -> Any:
        """A tree of parameters as a process holds it: constants, or, where any is traced, the tree as it is."""
        if isinstance(tree, cls) or any(isinstance(v, jax.core.Tracer) for v in jax.tree.leaves(tree)):
            return tree
        return cls.of(tree)

    @classmethod
    def arrays(cls, held: Any) -> Any:
        """The arrays of what is `held`, in the default precision."""
        return jax.tree.map(lambda v: jnp.asarray(v, float), held.tree) if isinstance(held, cls) else held
