"""Heun's rule with fewer evaluations: velocities kept from step to step, and a light network that refines them.

(Zhao et al. 2024, "FlowTurbo: Towards Real-time Flow-Based Image Generation with Velocity Refiner".)
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ddjax.predictions import Prediction, evaluations
from ddjax.pytrees import as_pytree
from ddjax.solvers.base import Info, batched
from ddjax.types import Apply, Denoise, Params, State, Time, left_broadcast

BLOCKS = ("H", "P", "R")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Refined:
    """See `refined`."""

    denoise: Denoise
    params: Params
    apply: Apply  # a pytree (`as_pytree`)

    @property
    def evaluations(self) -> int:
        """Those of the denoiser."""
        return evaluations(self.denoise)

    def __call__(self, xt: State, t: Time, cond: Any = None) -> Prediction:
        """What the denoiser predicts."""
        return self.denoise(xt, t, cond)

    def refine(self, velocity: State, xt: State, t: Time, cond: Any = None) -> State:
        """The velocity at (x_t, t), from one a little earlier on the way."""
        residual = self.apply(self.params, jnp.concatenate([xt, velocity], axis=-1), t, cond)
        return velocity + residual.astype(velocity.dtype)


def refined(denoise: Denoise, apply: Apply, params: Params) -> Refined:
    """A denoiser that comes with a velocity refiner, which the solver `FlowTurbo` asks.

    apply: `apply(params, (x_t, velocity), t, cond)`, the two on one last axis, gives the change of the velocity, shaped
        like x_t (`objectives.velocity_refiner`).
    """
    return Refined(as_pytree(denoise), params, as_pytree(apply))


class Carry(NamedTuple):
    """What is kept of the steps so far."""

    velocity: State  # the last one
    taken: Array  # steps, one number for all


@dataclasses.dataclass(frozen=True)
class FlowTurbo:
    """Steps of Heun's rule on dx/dt = velocity, in the schedule's clock, whose velocities come from where `blocks` say.

        v = velocity at (x_t, t),  w = velocity at (x_t + (s - t) v, s),  x_s = x_t + (s - t) (v + w) / 2

    "H": both from the network, Heun's own step.
    "P", the pseudo-corrector: v is the last step's w. One evaluation; two in the first step and after an "R". Of second
        order, on any grid: Euler's predictor and a trapezoidal corrector, without an evaluation after it, as in
        `Multistep(process, 1, "velocity", "clock", corrector=True)`; on equal steps the predicted states are those of
        Adams and Bashforth's second method.
    "R": both from the refiner that came with the denoiser (`refined`), asked to change the last velocity: v from the
        last step's (w of "H" and "P", v of "R"), and w from v. No evaluation, two of the refiner.

    A step into sigma = 0 ends in the x_0 that v predicts, and asks for no w.

    blocks: a letter for each step, "HPPRR", or one for all of them.
    Raises ValueError for other letters, and for processes without an ODE of their states.
    """

    process: Any
    blocks: str = "P"

    def __post_init__(self):
        if self.process.state != "gaussian" or not hasattr(self.process, "noiseless"):
            raise ValueError(f"{type(self.process).__name__} has no ODE for its states as they are: use Ancestral")
        if not self.blocks or set(self.blocks) - set(BLOCKS):
            raise ValueError(f"blocks are letters of {', '.join(BLOCKS)}, one or more, got {self.blocks!r}")
        if self.blocks[0] == "R":
            raise ValueError(f"the first step has no velocity to refine: begin with H or P, got {self.blocks!r}")

    @property
    def grid_steps(self) -> int | None:
        """The steps of the grid it is made for; None: any."""
        return len(self.blocks) if len(self.blocks) > 1 else None

    @property
    def refinements(self) -> int:
        """How often the refiner is asked in all, into sigma = 0; `Info.nfe` counts calls of the network alone."""
        return sum(2 if i + 1 < len(self.blocks) else 1 for i, block in enumerate(self.blocks) if block == "R")

    def init(self, xt, cond=None):
        """No velocity yet."""
        return Carry(jnp.zeros_like(xt), jnp.zeros(xt.shape[:1], jnp.int32))

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        """Two evaluations, one or none."""
        if "R" in self.blocks and not hasattr(denoise, "refine"):
            raise ValueError('blocks "R" ask the refiner that comes with the denoiser: give refined(denoise, ...)')
        dt, at = left_broadcast(s - t, xt), carry.taken[0]
        sigma = self.process.schedule.sigma(left_broadcast(s, xt))
        last = jnp.all(sigma.reshape(sigma.shape[0], -1) == 0, axis=1)  # at every site
        end = jnp.all(last)

        def network(x: State, u: Time) -> State:
            value = self.process.convert(denoise(x, batched(u, x), cond), "velocity", x, u).value
            return value.astype(xt.dtype)

        def heavy() -> tuple[State, State, Array]:
            asked = jnp.asarray([i == 0 or b == "H" or self.blocks[i - 1] == "R" for i, b in enumerate(self.blocks)])
            fresh = (at == 0) | (self.blocks == "H") if len(self.blocks) == 1 else asked[at]
            v = jax.lax.cond(fresh, lambda: network(xt, t), lambda: carry.velocity)
            w = jax.lax.cond(end, lambda: v, lambda: network((xt + dt * v).astype(xt.dtype), s))
            return v, w, fresh + (1 - end.astype(jnp.int32))

        def light() -> tuple[State, State, Array]:
            v = denoise.refine(carry.velocity, xt, batched(t, xt), cond)
            ahead = (xt + dt * v).astype(xt.dtype)
            w = jax.lax.cond(end, lambda: v, lambda: denoise.refine(v, ahead, batched(s, xt), cond))
            return v, w, jnp.int32(0)

        refines = jnp.asarray([block == "R" for block in self.blocks])[at]
        v, w, made = jax.lax.cond(refines, light, heavy) if "R" in self.blocks else heavy()
        clean = self.process.noiseless(self.process.convert(Prediction(v, "velocity"), "x0", xt, t).value, s)
        xs = jnp.where(left_broadcast(last, xt), clean, xt + 0.5 * dt * (v + w))
        kept = jnp.where(refines, v, w) if "R" in self.blocks else w
        return xs, Carry(kept.astype(xt.dtype), carry.taken + 1), Info(jnp.full(xt.shape[:1], made, jnp.int32))
