"""Momentum around any solver of the ODE, for fewer artifacts at few steps."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp

from ddjax.processes.gaussian import divide
from ddjax.solvers.base import Solver, first_carry
from ddjax.solvers.forms import Form
from ddjax.solvers.gaussian import DDIM, Heun
from ddjax.solvers.multistep import Multistep
from ddjax.solvers.singlestep import SingleStep
from ddjax.types import State


class Carry(NamedTuple):
    """What the solver itself carries, the velocity, and whether there is one yet."""

    inner: Any
    velocity: State
    known: Any  # (batch,)


@dataclasses.dataclass(frozen=True)
class Momentum:
    """A solver whose steps are averaged with those before.

    (Wizadwongsa et al. 2023, "Diffusion Sampling with Momentum for Mitigating Divergence Artifacts", section 4.1.)

    A step x_s = (m_s / m_t) x_t + m_s (q_s - q_t) y of one of the forms of the ODE (`solvers.forms`) has a mean
    prediction y, whatever the solver made of it. Along the velocity v <- (1 - beta) v + beta y in its place it is
    Polyak's heavy ball (their HB; first order, and a larger region of stability); with `nesterov`, along (1 - beta) v +
    beta y (the NT of their code). The first velocity is the first y.

    solver: deterministic, of one evaluation a step or more: `Multistep` without a corrector, `SingleStep`, `DDIM`,
        `Heun`. beta: in (0, 1]; 1 is the solver itself. form: "noise", as their PLMS has it; "x0", their DPM-Solver++.
    A step from alpha = 0 is the solver's own, and not remembered.
    Raises ValueError for other solvers: of noise and of corrections a mean would make something else.
    """

    solver: Solver
    beta: float = 0.8
    form: str = "noise"
    nesterov: bool = False

    def __post_init__(self):
        s = self.solver
        kept = isinstance(s, SingleStep | Heun) or (isinstance(s, DDIM) and s.eta == 0)
        if not kept and not (isinstance(s, Multistep) and not s.corrector and not callable(s.eta) and s.eta == 0):
            raise ValueError(f"momentum is for deterministic steps without a corrector, got {s!r}")
        if not 0.0 < self.beta <= 1.0:
            raise ValueError(f"beta lies in (0, 1], 1 being no momentum, got {self.beta}")
        Form(self.process, self.form, "clock")

    @property
    def process(self) -> Any:
        """The solver's."""
        return self.solver.process

    @property
    def grid_steps(self) -> int | None:
        """The solver's."""
        return getattr(self.solver, "grid_steps", None)

    def init(self, xt, cond=None):
        """The solver's carry, and no velocity yet."""
        return Carry(self.solver.init(xt, cond), jnp.zeros_like(xt), jnp.zeros(xt.shape[:1], bool))

    def begin(self, xt, cond, denoise, known=None):
        """As `init`."""
        return self.init(xt, cond)._replace(inner=first_carry(self.solver, xt, cond, denoise, known))

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        """The solver's evaluations."""
        xs, inner, info = self.solver.step(keys, carry.inner, xt, t, s, denoise, cond)
        form = Form(self.process, self.form, "clock")
        here, there = form.at(t, xt), form.at(s, xt)
        length = form.moments(here, there, 1)[0]
        still = xt if self.form == "velocity" else divide(there.scale, here.scale) * xt
        regular = jnp.isfinite(here.level) & (length != 0) & (self.form == "velocity" or here.scale != 0)
        y = jnp.where(regular, (xs - still) / jnp.where(regular, length, 1.0), 0.0)
        known = carry.known.reshape(-1, *[1] * (xt.ndim - 1))
        v = jnp.where(known, (1.0 - self.beta) * carry.velocity + self.beta * y, y)
        along = (1.0 - self.beta) * v + self.beta * y if self.nesterov else v
        moved = jnp.where(regular, still + length * along, xs)
        kept = jnp.where(regular, v, carry.velocity).astype(xt.dtype)
        every = jnp.all(jnp.broadcast_to(regular, xt.shape).reshape(xt.shape[0], -1), axis=1)
        return moved.astype(xt.dtype), Carry(inner, kept, carry.known | every), info
