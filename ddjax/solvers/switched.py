"""One solver after another, and steps that need no network."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from ddjax.gaussian_law import GaussianLaw, check_process
from ddjax.processes import Gaussian
from ddjax.solvers.base import Info, Solver, first_carry
from ddjax.types import State

_SLACK = 1e-6  # of times, which grids have in float32


class Turn(NamedTuple):
    """Whose turn it is, what each carries, and which sites are known."""

    which: Int[Array, ""]
    carries: tuple[Any, ...]
    known: Bool[Array, batch * sites] | None


@dataclasses.dataclass(frozen=True)
class Switched:
    """Solvers one after another: the next one makes the steps that begin at its time, or behind it.

    solvers: of one kind of states; each begins, without a memory, where the one before left off. at: a decreasing
        time for every solver but the first. A step across such a time is still the former solver's: put the times on
        the grid.
    Raises ValueError for numbers that do not fit, and, when it steps, for a time for each example.
    """

    solvers: tuple[Solver, ...]
    at: tuple[float, ...]

    def __post_init__(self):
        object.__setattr__(self, "solvers", tuple(self.solvers))
        object.__setattr__(self, "at", tuple(float(t) for t in self.at))
        if len(self.solvers) != len(self.at) + 1:
            raise ValueError(f"{len(self.solvers)} solvers need a time for each but the first, got at={self.at}")
        if any(a <= b for a, b in zip(self.at, self.at[1:], strict=False)):
            raise ValueError(f"the times of Switched must decrease, got at={self.at}")
        for solver in self.solvers:
            if getattr(solver, "times", None) is not None:
                raise ValueError(f"{type(solver).__name__} makes all steps of its own grid: use another solver")

    @property
    def process(self) -> Any:
        """The first solver's."""
        return self.solvers[0].process

    def init(self, xt, cond=None):
        """The carries of all."""
        return Turn(jnp.zeros((), jnp.int32), tuple(solver.init(xt, cond) for solver in self.solvers), None)

    def begin(self, xt, cond, denoise, known=None):
        """As `init`."""
        carries = tuple(first_carry(solver, xt, cond, denoise, known) for solver in self.solvers)
        return Turn(jnp.zeros((), jnp.int32), carries, known)

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        """The step of the solver whose turn it is."""
        if jnp.ndim(t):
            raise ValueError(f"Switched takes one time for all examples, as sample gives it, got shape {jnp.shape(t)}")
        which = sum((t <= at + _SLACK).astype(jnp.int32) for at in self.at) if self.at else jnp.zeros((), jnp.int32)

        def turn(i: int, solver: Solver):
            def make():
                def anew() -> Any:
                    return first_carry(solver, xt, cond, denoise, carry.known)

                # The first solver began already, and no solver has a second turn.
                own = carry.carries[i] if i == 0 else jax.lax.cond(carry.which == i, lambda: carry.carries[i], anew)
                xs, own, info = solver.step(keys, own, xt, t, s, denoise, cond)
                carries = tuple(own if j == i else other for j, other in enumerate(carry.carries))
                return xs.astype(xt.dtype), carries, info.nfe.astype(jnp.int32)

            return make

        turns = [turn(i, solver) for i, solver in enumerate(self.solvers)]
        xs, carries, nfe = jax.lax.switch(which, turns)
        return xs, Turn(which, carries, carry.known), Info(nfe)


@dataclasses.dataclass(frozen=True)
class Teleport:
    """The probability-flow ODE of Gaussian data, in one step from any time to any other, without the network.

    (Wang & Vastola 2024, "analytical teleportation"; `GaussianLaw.flow`.) Exact for Gaussian data; for others an
    approximation that is good while noise prevails, to be followed by another solver (`Switched`). Labels choose the
    law where it has one for each; guidance, which is no law's, is not seen.
    """

    process: Gaussian
    law: GaussianLaw

    def __post_init__(self):
        object.__setattr__(self, "process", check_process("Teleport", self.process))

    def init(self, xt: State, cond=None):
        """Nothing to carry."""
        return ()

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        """No evaluation."""
        xs = self.law.flow(self.process, xt, jnp.asarray(t), jnp.asarray(s), cond)
        return xs, carry, Info(jnp.zeros(xt.shape[0], jnp.int32))
