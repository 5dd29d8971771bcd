"""Which steps are bad: a loss or a gradient that is no number, or a loss far above the recent ones."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

WINDOW = 100  # good steps that the running moments reach back to, and that must have been seen before one is a spike


class Losses(NamedTuple):
    """What is remembered of the losses of good steps, and of bad ones."""

    mean: Float[Array, ""]
    variance: Float[Array, ""]
    good: Int[Array, ""]  # how many there were
    bad: Int[Array, ""]  # how many were the last, in a row

    @classmethod
    def none(cls) -> Losses:
        """Before the first step."""
        return cls(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32), jnp.int32(0), jnp.int32(0))

    def spike(self, loss: Float[Array, ""], deviations: float) -> Bool[Array, ""]:
        """Whether a loss lies more than so many standard deviations above the mean. Never of the first `WINDOW`."""
        far = loss - self.mean > deviations * jnp.sqrt(self.variance)
        return far & (self.good >= WINDOW)

    def after(self, loss: Float[Array, ""], bad: Bool[Array, ""]) -> Losses:
        """With one more loss, which counts for the moments where it is good.

        The moments of all losses until there are `WINDOW`; then each new one weighs 1 / WINDOW (West 1979's recurrence,
        which subtracts no squares).
        """
        good = self.good + ~bad
        weight = 1.0 / jnp.clip(good, 1, WINDOW).astype(jnp.float32)
        change = jnp.where(bad, 0.0, loss.astype(jnp.float32) - self.mean)
        mean = self.mean + weight * change
        variance = jnp.where(bad, self.variance, (1.0 - weight) * (self.variance + weight * change**2))
        return Losses(mean, variance, good, jnp.where(bad, self.bad + 1, 0))
