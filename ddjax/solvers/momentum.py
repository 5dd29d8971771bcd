"""Momentum around any solver of the ODE, for fewer artifacts at few steps."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool

from ddjax.processes.gaussian import divide
from ddjax.solvers.base import Solver, batched, everywhere, first_carry
from ddjax.solvers.forms import Form
from ddjax.solvers.gaussian import DDIM, Heun
from ddjax.solvers.multistep import Multistep
from ddjax.solvers.singlestep import SingleStep
from ddjax.types import State, left_broadcast


class Velocity(NamedTuple):
    """The mean of the predictions so far."""

    value: State
    known: Bool[Array, " batch"]  # whether there is one yet


class Correction(NamedTuple):
    """What a corrector with a velocity of its own needs of the last step."""

    velocity: Velocity
    still: State  # where the step leads along a prediction of 0,
    length: Array  # and how far along one of 1


class Carry(NamedTuple):
    """What the solver itself carries, the velocity of its steps, and what its corrector needs."""

    inner: Any
    velocity: Velocity
    correction: Correction | None = None


@dataclasses.dataclass(frozen=True)
class Momentum:
    """A solver whose steps are averaged with those before.

    (Wizadwongsa et al. 2023, "Diffusion Sampling with Momentum for Mitigating Divergence Artifacts", section 4.1.)

    A step x_s = (m_s / m_t) x_t + m_s (q_s - q_t) y of one of the forms of the ODE (`solvers.forms`) has a mean
    prediction y, whatever the solver made of it. Along the velocity v <- (1 - beta) v + beta y in its place it is
    Polyak's heavy ball (their HB; first order, and a larger region of stability); with `nesterov`, along (1 - beta) v +
    beta y (the NT of their code). The first velocity is the first y. A corrector makes each step but the last again,
    with another y: its velocity is one of its own.

    solver: deterministic, of one evaluation a step or more: `Multistep`, `SingleStep`, `DDIM`, `Heun`.
    beta: in (0, 1]; 1 is the solver itself. form: "noise", as their PLMS has it; "x0", their DPM-Solver++ and UniPC; of
        a solver with a corrector, its own.
    predictor: whether a step itself is averaged where a corrector makes it again. Their UniPC says so, but its code
        writes over the velocity: what they measured is `predictor=False`.
    rescaled: y / m_s is averaged, as in their UniPC; for velocities the same. m changes from step to step, so that even
        along a constant y the step is not what it was.
    A step from alpha = 0 is the solver's own, and not remembered; so is one into m = 0 where it is rescaled.
    Raises ValueError for other solvers: of noise a mean would make something else.
    """

    solver: Solver
    beta: float = 0.8
    form: str = "noise"
    nesterov: bool = False
    predictor: bool = True
    rescaled: bool = False

    def __post_init__(self):
        s = self.solver
        kept = isinstance(s, SingleStep | Heun) or (isinstance(s, DDIM) and s.eta == 0)
        if not kept and not (isinstance(s, Multistep) and not callable(s.eta) and s.eta == 0):
            raise ValueError(f"momentum is for deterministic steps, got {s!r}")
        if not 0.0 < self.beta <= 1.0:
            raise ValueError(f"beta lies in (0, 1], 1 being no momentum, got {self.beta}")
        Form(self.process, self.form, "clock")
        if self._corrects and (self.form != s.form or s.start is not None or s.compensation is not None):
            raise ValueError(
                f"momentum of a corrector needs the solver's own form, {s.form!r}, and neither a start nor "
                f"compensation: got form={self.form!r}, {s!r}"
            )
        if not self.predictor and not self._corrects:
            raise ValueError("predictor=False leaves momentum to a corrector, which this solver has not")

    @property
    def process(self) -> Any:
        """The solver's."""
        return self.solver.process

    @property
    def grid_steps(self) -> int | None:
        """The solver's."""
        return getattr(self.solver, "grid_steps", None)

    @property
    def _corrects(self) -> bool:
        return getattr(self.solver, "corrector", False)

    def init(self, xt, cond=None):
        """The solver's carry, and no velocity yet."""
        none = Velocity(jnp.zeros_like(xt), jnp.zeros(xt.shape[:1], bool))
        inner = self.solver.init(xt, cond)
        return Carry(inner, none, Correction(none, none.value, inner.share) if self._corrects else None)

    def begin(self, xt, cond, denoise, known=None):
        """As `init`."""
        return self.init(xt, cond)._replace(inner=first_carry(self.solver, xt, cond, denoise, known))

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        """The solver's evaluations."""
        form, inner, correction, start = Form(self.process, self.form, "clock"), carry.inner, None, xt
        if self._corrects:  # its one evaluation is made here: what it says of the last step goes first
            prediction, last = denoise(xt, batched(t, xt), cond), carry.correction
            found = inner.partial + inner.share * form.value(prediction, xt, t)
            regular = inner.corrects & (last.length != 0)
            found, velocity = self._along(last.velocity, last.still, last.length, found, regular)
            start = jnp.where(inner.corrects, found, xt)
            inner = inner._replace(partial=found, share=jnp.zeros_like(inner.share))

            def denoise(x, u, cond):
                return prediction

        xs, inner, info = self.solver.step(keys, inner, xt, t, s, denoise, cond)

        here, there = form.at(t, xt), form.at(s, xt)
        length = form.moments(here, there, 1)[0] * (there.scale if self.rescaled else 1.0)
        still = start if self.form == "velocity" else divide(there.scale, here.scale) * start
        if self._corrects:
            length_ = jnp.broadcast_to(length, inner.share.shape).astype(inner.share.dtype)
            correction = Correction(velocity, still.astype(xt.dtype), length_)
        if not self.predictor:
            return xs, Carry(inner, carry.velocity, correction), info
        regular = jnp.isfinite(here.level) & (length != 0) & (self.form == "velocity" or here.scale != 0)
        xs, velocity = self._along(carry.velocity, still, length, xs, regular)
        return xs, Carry(inner, velocity, correction), info

    def _along(
        self, velocity: Velocity, still: State, length: Array, made: State, regular: Array
    ) -> tuple[State, Velocity]:
        """The end of a step that the solver `made`, along the velocity in the place of its own mean prediction."""
        y = jnp.where(regular, (made - still) / jnp.where(regular, length, 1.0), 0.0)
        known = left_broadcast(velocity.known, made)
        v = jnp.where(known, (1.0 - self.beta) * velocity.value + self.beta * y, y)
        along = (1.0 - self.beta) * v + self.beta * y if self.nesterov else v
        moved = jnp.where(regular, still + length * along, made)
        kept = jnp.where(regular, v, velocity.value).astype(velocity.value.dtype)
        return moved.astype(made.dtype), Velocity(kept, velocity.known | everywhere(regular, made))
