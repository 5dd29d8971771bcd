"""RePaint's resampling: what is drawn beside known sites is drawn again and again, until the two fit."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ddjax import random
from ddjax.processes.gaussian import Gaussian, gaussian_of
from ddjax.solvers.base import Info, Solver, batched, first_carry, told
from ddjax.solvers.renoised import diffuse


@dataclasses.dataclass(frozen=True)
class Resampled:
    """Each step `rounds` times: to s, the known sites put in, and by the forward kernel back to t (but the last time).

    (Lugmayr et al. 2022, "RePaint", algorithm 1 with jumps of one step; Dutordoir et al. 2023, "Neural diffusion
    processes", algorithm 1, whose functions are so conditioned on their values at known points.) With
    `sample(observed=)` alone the rest is drawn without regard to what the known sites will be one step later; the more
    rounds the less that counts: in the limit, of steps and of rounds, samples are of the conditional law. (The error of
    the solver's own steps adds up over rounds: many need small steps.)

    solver: of a `processes.Gaussian`, e.g. `Ancestral`; a multistep solver's memory is that of its last round.
    rounds: 1 is the solver itself. Each costs the solver's evaluations.
    observed: `sample` says it (`told`), through solvers made of this one too; without known sites rounds change nothing
        but the draws.

    Raises ValueError for another process, and fewer rounds than one.
    """

    solver: Solver
    rounds: int = 5
    observed: Any = None

    def __post_init__(self):
        process = gaussian_of(getattr(self.solver, "process", None))
        if process is None or "score" not in process.kinds:
            raise ValueError(f"Resampled goes forward by the kernel of processes.Gaussian, got {self.solver!r}")
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds}: expected 1 or more")

    @property
    def process(self) -> Gaussian:
        """The solver's."""
        return gaussian_of(self.solver.process)

    def told(self, observed: Any) -> Resampled:
        """The same, knowing what is observed."""
        return dataclasses.replace(self, solver=told(self.solver, observed), observed=observed)

    def init(self, xt, cond=None):
        """The solver's."""
        return self.solver.init(xt, cond)

    def begin(self, xt, cond, denoise, known=None):
        """The solver's."""
        return first_carry(self.solver, xt, cond, denoise, known)

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        """The solver's steps, one for each round."""
        process, known = self.process, self.observed

        def show(shown_keys, xs):
            if known is None:
                return xs
            return jnp.where(known.mask, process.observe(shown_keys, known.value, batched(s, xs)), xs)

        def back(i, x):
            step_keys, shown_keys, noise_keys = random.split(random.fold_in(keys, i), 3)
            xs = show(shown_keys, self.solver.step(step_keys, carry, x, t, s, denoise, cond)[0])
            z = random.normal(noise_keys, x.shape[1:], x.dtype)
            return diffuse(process, xs.astype(x.dtype), s, t, z).astype(x.dtype)

        if self.rounds > 1:  # `Parts` asks for the state as it is
            xt = jax.lax.fori_loop(0, self.rounds - 1, back, xt)
        last = random.fold_in(keys, self.rounds - 1)
        xs, carry, info = self.solver.step(last, carry, xt, t, s, denoise, cond)
        # `sample` shows known sites after its own steps; this may be one of a solver around it.
        return show(random.fold_in(keys, self.rounds), xs), carry, Info(self.rounds * info.nfe)
