"""Normals that are correlated within small groups of entries: their law, and the triangular roots it is made of."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array

from ddjax import random
from ddjax.processes.gaussian import X
from ddjax.types import Keys


@dataclasses.dataclass(frozen=True)
class Correlated:
    """Normal parts about `centre`, `(batch, *lead, n, group)`, of covariance root root', root `(..., n, n)`."""

    centre: Array
    root: Array

    @property
    def mean(self) -> X:
        """Of the states."""
        return joined(self.centre)

    def sample(self, keys: Keys) -> X:
        """One draw, one key per example."""
        shape = jnp.broadcast_shapes(self.centre.shape, (*self.root.shape[:-1], 1))
        z = random.normal(keys, shape[1:], self.centre.dtype)
        return joined(self.centre + self.root @ z)

    @property
    def _unit(self) -> Array:
        """The root, with a column of the identity for a part without variance."""
        eye = jnp.eye(self.root.shape[-1], dtype=self.root.dtype)
        return jnp.where((jnp.diagonal(self.root, axis1=-2, axis2=-1) == 0)[..., None, :], eye, self.root)

    def noise(self, x: X) -> X:
        """The normals whose draw is x; of parts without variance, what x has beyond their mean."""
        return joined(solve(self._unit, x.reshape(self.centre.shape) - self.centre))

    def drawn(self, noise: X | float = 0.0, fresh: X | float = 0.0) -> X:
        """The state with this `noise`, and fresh normals where there is something to draw."""
        z, new = (jnp.broadcast_to(v, self.mean.shape).reshape(self.centre.shape) for v in (noise, fresh))
        return joined(self.centre + self._unit @ z + self.root @ new)

    def log_prob(self, x: X) -> X:
        """Log-density of each entry given those of the parts before it, nats."""
        z = solve(self.root, x.reshape(self.centre.shape) - self.centre)
        width = jnp.diagonal(self.root, axis1=-2, axis2=-1)[..., None]
        return joined(-0.5 * z**2 - jnp.log(width) - 0.5 * math.log(2.0 * math.pi))


def transposed(matrix: Array) -> Array:
    """Rows and columns of the last two axes exchanged."""
    return jnp.swapaxes(matrix, -2, -1)


def joined(parts: Array) -> X:
    """`(..., parts, group)` as `(..., parts * group)`."""
    return parts.reshape(*parts.shape[:-2], -1)


def root_of(c: Array) -> Array:
    """The lower triangular root of a covariance; a part without any variance left has a column of 0."""
    size = c.shape[-1]
    root = jnp.zeros_like(c)
    for j in range(size):
        left = c[..., j] - jnp.einsum("...ik,...k->...i", root[..., :j], root[..., j, :j])
        pivot = left[..., j, None]
        column = jnp.where(pivot > 0, left / jnp.sqrt(jnp.where(pivot > 0, pivot, 1.0)), 0.0)
        root = root.at[..., j].set(jnp.where(jnp.arange(size) < j, 0.0, column))
    return root


def solve(root: Array, y: Array) -> Array:
    """root^-1 y for a lower triangular root, 0 at parts without variance."""
    rows = []
    for i in range(root.shape[-1]):
        rest = y[..., i, :] - sum(root[..., i, j, None] * row for j, row in enumerate(rows))
        rows.append(_over(rest, root[..., i, i, None]))
    return jnp.stack(jnp.broadcast_arrays(*rows), axis=-2)


def solve_transposed(root: Array, y: Array) -> Array:
    """root'^-1 y."""
    size = root.shape[-1]
    rows: dict[int, Array] = {}
    for i in reversed(range(size)):
        rest = y[..., i, :] - sum(root[..., j, i, None] * row for j, row in rows.items())
        rows[i] = _over(rest, root[..., i, i, None])
    return jnp.stack(jnp.broadcast_arrays(*(rows[i] for i in range(size))), axis=-2)


def _over(a: Array, b: Array) -> Array:
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), 0.0)
