"""Paths on the simplex of K marginals, from a vertex (t = 0, data) to another (t = 1), for `processes.Barycentric`."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ddjax.frozen import Frozen
from ddjax.schedules.base import array, held

Points = Float[Array, "*time marginals"]


@dataclasses.dataclass(frozen=True)
class SimplexPath(abc.ABC):
    """Weights that are not negative and add up to 1, and their derivatives in t.

    marginals: how many. first, last: the vertices at t = 0 and at t = 1.
    """

    marginals: int = 2
    first: int = 0
    last: int = 1

    def __post_init__(self):
        inside = all(0 <= vertex < self.marginals for vertex in (self.first, self.last))
        if not inside or self.first == self.last:
            raise ValueError(
                f"a path joins two of the vertices 0 ... {self.marginals - 1}, got {self.first} and {self.last}"
            )

    def _ends(self, t: Array) -> Points:
        """The straight line between the two vertices."""
        corners = jnp.eye(self.marginals, dtype=t.dtype)
        return (1.0 - t)[..., None] * corners[self.first] + t[..., None] * corners[self.last]

    @abc.abstractmethod
    def point(self, t: Array) -> Points:
        """The weights alpha(t)."""

    @abc.abstractmethod
    def slope(self, t: Array) -> Points:
        """D alpha / dt."""


@dataclasses.dataclass(frozen=True)
class Edge(SimplexPath):
    """Straight from vertex to vertex: the two marginals' own interpolant."""

    def point(self, t):
        """1 - t and t, and 0 for all others."""
        return self._ends(t)

    def slope(self, t):
        """-1 and 1."""
        return jnp.broadcast_to(
            self._ends(jnp.ones_like(t)) - self._ends(jnp.zeros_like(t)), (*t.shape, self.marginals)
        )


@dataclasses.dataclass(frozen=True)
class Sines(SimplexPath):
    """Squares of sine series added to the edge, divided by the sum (after Albergo et al. 2023, "Multimarginal").

    alpha_k ∝ edge_k(t) + (sum over n of coefficients[k, n] sin(pi (n + 1) t))^2

    coefficients: (marginals, modes), learned; `Sines.initial` begins near the edge (on it, they would have no slope).
    """

    coefficients: Frozen | Array | Any = ()

    def __post_init__(self):
        super().__post_init__()
        value = held(self.coefficients)
        if np.ndim(value) != 2 or np.shape(value)[0] != self.marginals:
            raise ValueError(f"coefficients must be (marginals, modes), ({self.marginals}, ...), got {np.shape(value)}")
        object.__setattr__(self, "coefficients", value)

    @classmethod
    def initial(cls, marginals: int, modes: int = 3, first: int = 0, last: int = 1, scale: float = 0.1) -> Sines:
        """Where learning starts: all first coefficients `scale`, the others 0."""
        coefficients = np.zeros((marginals, modes))
        coefficients[:, 0] = scale
        return cls(marginals, first, last, coefficients)

    @property
    def parameters(self) -> Float[Array, "marginals modes"]:
        """What learning changes: the coefficients."""
        return jnp.array(array(self.coefficients, 0.0))

    def with_parameters(self, parameters: Float[Array, "marginals modes"]) -> Sines:
        """The path with these."""
        return dataclasses.replace(self, coefficients=parameters)

    def _raw(self, t: Array) -> tuple[Points, Points]:
        """The weights before they are divided by their sum, and their slopes."""
        coefficients = array(self.coefficients, t)
        rates = math.pi * jnp.arange(1, coefficients.shape[1] + 1, dtype=coefficients.dtype)
        series = jnp.sin(rates * t[..., None]) @ coefficients.T
        slopes = (rates * jnp.cos(rates * t[..., None])) @ coefficients.T
        straight = self._ends(jnp.ones_like(t)) - self._ends(jnp.zeros_like(t))
        return self._ends(t) + series**2, straight + 2.0 * series * slopes

    def point(self, t):
        """On the simplex, whatever the coefficients."""
        raw, _ = self._raw(t)
        return raw / raw.sum(-1, keepdims=True)

    def slope(self, t):
        """The quotient's derivative; adds up to 0."""
        raw, slopes = self._raw(t)
        total = raw.sum(-1, keepdims=True)
        return (slopes - raw / total * slopes.sum(-1, keepdims=True)) / total


__all__ = ["Edge", "SimplexPath", "Sines"]
