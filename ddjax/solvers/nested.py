"""Anytime sampling: at every step a whole sample, by a short chain inside the long one."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from ddjax import random
from ddjax.frozen import Frozen
from ddjax.grids import check_grid
from ddjax.predictions import Prediction
from ddjax.processes.gaussian import gaussian_of
from ddjax.solvers.base import Info, Solver, first_carry
from ddjax.types import Keys, State, Time

INNER = 2**30  # the inner chain's stream of an outer step's keys


class Progress(NamedTuple):
    """What is carried from one outer step to the next."""

    x0: State  # what the last inner chain drew
    taken: Array  # outer steps so far
    known: Bool[Array, batch * sites] | None
    outer: Any = ()  # what the outer solver carries


@dataclasses.dataclass(frozen=True)
class Nested:
    """A step draws x_0 by a whole chain of `solver` from x_t to data, then x_s from the bridge q(x_s | x_t, x_0).

    (Elata et al. 2023, "Nested Diffusion Processes for Anytime Image Generation", algorithm 2.) A sample exists
    whenever it is stopped: the last x_0, which `sampling.stream` shows. Where the inner chain draws from p(x_0 | x_t),
    the outer states have the process's law for any number of outer steps, also where sites depend on each other. An
    inner step of one deterministic evaluation, or of `Ancestral`, is `Ancestral` for Gaussian states.

    solver: of any process with a bridge; each chain begins without a memory. Chains end at t = 0.
    steps: of each inner chain; or one number for each outer step, which splits a budget of evaluations as one likes.
    grid: one down to 0; inner times are at equal shares of what is left of the way along it. None: of the clock.
    outer: takes the outer step in the bridge's place, as if the network had predicted x_0 ("DDIM(process)": the
        authors' for latent diffusion). For Gaussian states.
    Raises ValueError for a process without such a bridge, a solver that is made for its own times, and numbers below 1.
    """

    solver: Solver
    steps: int | tuple[int, ...] = 4
    grid: Frozen | None = None
    outer: Solver | None = None

    def __post_init__(self):
        bridge = getattr(self.process, "bridge", None)
        if bridge is None or list(inspect.signature(bridge).parameters) != ["x0", "xt", "s", "t"]:
            raise ValueError(f"Nested draws from q(x_s | x_t, x_0), which {type(self.process).__name__} does not have")
        if getattr(self.solver, "times", None) is not None:
            raise ValueError(f"inner chains begin where the outer one is, {type(self.solver).__name__} at its own time")
        if not isinstance(self.steps, int):
            object.__setattr__(self, "steps", tuple(self.steps))
        if min(np.atleast_1d(self.steps), default=0) < 1:
            raise ValueError(f"an inner chain has at least one step, got {self.steps}")
        if self.grid is not None:
            values = np.asarray(check_grid(np.asarray(self.grid, np.float64)))
            if values[-1] != 0:
                raise ValueError(f"the inner grid must run down to 0, got {values[0]} to {values[-1]}")
            object.__setattr__(self, "grid", Frozen(values))
        if self.outer is not None and self.process.state != "gaussian":
            raise ValueError("an outer solver is for Gaussian states: leave it out, the bridge draws tokens")

    @property
    def process(self) -> Any:
        """The solver's."""
        return gaussian_of(self.solver.process) or self.solver.process

    @property
    def grid_steps(self) -> int | None:
        """The steps of the grid it is made for; None: any."""
        return None if isinstance(self.steps, int) else len(self.steps)

    def init(self, xt, cond=None):
        """No sample yet."""
        return self.begin(xt, cond, None)

    def begin(self, xt, cond, denoise, known=None):
        """As `init`, and which sites the inner chains are told to be known."""
        outer = () if self.outer is None else first_carry(self.outer, xt, cond, denoise, known)
        return Progress(jnp.zeros_like(self._clean(xt)), jnp.zeros(xt.shape[:1], jnp.int32), known, outer)

    def shown(self, carry: Progress) -> State:
        """The sample, if it is stopped now."""
        return carry.x0

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        """The inner chain's evaluations."""
        t, s = jnp.asarray(t), jnp.asarray(s)
        last, nfe = self._chain(random.fold_in(keys, INNER), carry, xt, t, denoise, cond)
        x0, outer = self._clean(last), carry.outer
        if self.outer is None:
            xs = self.process.bridge(x0, xt, s, t).sample(keys)
        else:

            def told(x, at, cond=None):
                return Prediction(x0, "x0")

            xs, outer, _ = self.outer.step(keys, outer, xt, t, s, told, cond)
        return xs, Progress(x0, carry.taken + 1, carry.known, outer), Info(nfe)

    def _clean(self, state: State) -> State:
        """The data in a state."""
        return self.process.clean(state) if hasattr(self.process, "clean") else state

    def _chain(self, keys: Keys, carry: Progress, xt: State, t: Time, denoise: Any, cond: Any) -> tuple[State, Array]:
        """The state at t = 0, and evaluations."""
        count = self.steps if isinstance(self.steps, int) else jnp.asarray(self.steps)[carry.taken[0]]

        def step(j, state):
            x, inner, nfe = state
            ends = self._time(t, j, count), self._time(t, j + 1, count)
            moved, inner, info = self.solver.step(random.fold_in(keys, j), inner, x, *ends, denoise, cond)
            return moved.astype(x.dtype), inner, nfe + info.nfe

        first = first_carry(self.solver, xt, cond, denoise, carry.known)
        x, _, nfe = jax.lax.fori_loop(0, count, step, (xt, first, jnp.zeros(xt.shape[:1], jnp.int32)))
        return x, nfe

    def _time(self, t: Time, j: Array, count: Array) -> Time:
        """The time after j of the inner steps from t: t itself and 0 at the ends."""
        share = j / jnp.asarray(count, t.dtype)
        if self.grid is None:
            inside = t * (1.0 - share)
        else:
            times = jnp.asarray(self.grid.values[::-1].copy(), t.dtype)
            places = jnp.linspace(1.0, 0.0, len(times), dtype=t.dtype)
            start = jnp.interp(t, times, places)
            inside = jnp.interp(start + share * (1.0 - start), places[::-1], times[::-1])
        return jnp.where(j == 0, t, jnp.where(j >= count, jnp.zeros_like(t), inside))
