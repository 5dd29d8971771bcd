"""Networks that are told less about the time."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from ddjax.types import Apply


@dataclasses.dataclass(frozen=True)
class SharedEarlyTimes:
    """A network that is told one time for each of a few equal parts of [0, until) (E-TSDM).

    (Yang et al. 2024, "Lipschitz singularities in diffusion models".) Near t = 0 what a network should say
    may change infinitely fast with t; told the start of the part it is in, it cannot follow. Noising, conversions and
    samplers go by the true time.

    apply: the network. It must be told the clock, and not EDM's c_noise. until: theirs is the first 100 of 1000 steps.
    Hashable and compared by value, as `apply` is. Raises ValueError for until outside (0, 1] or no parts.
    """

    apply: Apply
    until: float = 0.1
    parts: int = 5

    def __post_init__(self):
        if not (0 < self.until <= 1 and self.parts >= 1):
            raise ValueError(f"needs 0 < until <= 1 and at least one part, got {self.until} and {self.parts}")

    def __call__(self, params: Any, xt: Any, t: Any, cond: Any = None, **options: Any) -> Any:
        """Run the network."""
        t = jnp.asarray(t)
        shared = jnp.floor(t / self.until * self.parts) * (self.until / self.parts)
        return self.apply(params, xt, jnp.where(t < self.until, shared, t), cond, **options)
