"""The probability-flow ODE of reflected diffusion."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from ddjax.processes.reflected import Reflected, fold
from ddjax.solvers.base import Info, batched
from ddjax.types import left_broadcast


@dataclasses.dataclass(frozen=True)
class FoldedHeun:
    """The trapezoidal rule on dx/dsigma = noise, on the unfolded line; second order.

    The ODE never meets a wall, where its normal velocity is 0; a step of finite length may, and is folded back (Lou &
    Ermon 2023 dampen the field near the walls instead). Two evaluations a step; one into sigma = 0 makes no use of the
    second.
    """

    process: Reflected

    def __post_init__(self):
        if not isinstance(self.process, Reflected):
            raise ValueError(f"FoldedHeun is for processes.Reflected, got {type(self.process).__name__}: use Heun")

    def init(self, xt, cond=None):
        """Nothing to carry."""
        return ()

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        """One step."""
        sigma = self.process.schedule.sigma
        h = left_broadcast(sigma(s) - sigma(t), xt)
        noise = self.process.convert(denoise(xt, batched(t, xt), cond), "noise", xt, t).value
        euler, sign = fold(xt + h * noise)
        again = self.process.convert(denoise(euler, batched(s, xt), cond), "noise", euler, s).value
        # A field at a point that was folded over is, seen from the line, its mirror image.
        second = left_broadcast(sigma(s) > 0, xt)
        xs = fold(xt + jnp.where(second, 0.5 * h * (noise + sign * again), h * noise))[0]
        return xs, carry, Info(jnp.full(xt.shape[0], 2, jnp.int32))
