"""The chain of a denoising auto-encoder: corrupt, draw what was there from the denoiser, and so on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from ddjax import random
from ddjax.grids import check_grid
from ddjax.solvers.ancestral import Ancestral
from ddjax.solvers.base import Info, Solver, first_carry
from ddjax.types import Keys, State, time_dtype


class Chained(NamedTuple):
    """What the solver carries, and which sites are known (None: none is)."""

    inner: Any
    known: Bool[Array, batch * sites] | None


@dataclasses.dataclass(frozen=True)
class DenoisingChain:
    """The steps of another solver, and `rounds` rounds where they reach the data: corrupt, and draw from the denoiser.

    (Bengio et al. 2013, "Generalized denoising auto-encoders as generative models", theorem 1.) A round takes x_0 to
    x_t ~ q(x_t | x_0) and back to x_0 ~ p(x_0 | x_t). Where the way back draws from the data's own posterior, the
    data's law stays as it is, for any process and any t, and other laws approach it as the second eigenvalue's powers:
    the chain is reversible. With a grid of one step it is the paper's sampler,

        ddjax.sample(..., solver=DenoisingChain(process, (0.5, 0.0), rounds=100), times=grids.uniform(1))

    and on a longer grid a corrector of any sampler's results.

    back: decreasing times, from that to which a round corrupts down to 0: the steps of the way back. One step draws all
        sites from their own laws given x_t: with several sites that is the posterior only where they are independent
        given x_t, or as t -> 0; otherwise the law is off, by less the more steps. A Gaussian process ends in E[x_0 |
        x_t] after one step, which is no draw.
    make: process -> solver, of the steps and of the way back; a function that compares by value.

    `Gibbs` is the chain whose corruption hides one site. `Restart` goes up and down at any level of Gaussian processes.
    Known sites are shown at every time as `ddjax.sample` shows them. Evaluations: those of the solver, on both ways.
    Raises ValueError for times that do not decrease to 0, and fewer rounds than one.
    """

    process: Any
    back: tuple[float, ...] = (0.5, 0.0)
    rounds: int = 1
    make: Callable[[Any], Solver] = Ancestral

    def __post_init__(self):
        times = tuple(float(t) for t in self.back)
        check_grid(times)
        object.__setattr__(self, "back", times)
        if times[-1] != 0:
            raise ValueError(f"a round ends at the data, t = 0: back={times} ends at {times[-1]}")
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}; for none use the solver by itself")

    def init(self, xt, cond=None):
        """The solver's carry."""
        return Chained(self.make(self.process).init(xt, cond), None)

    def begin(self, xt, cond, denoise, known=None):
        """The solver's carry, and the sites that stay as they are."""
        return Chained(first_carry(self.make(self.process), xt, cond, denoise, known), known)

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        """The solver's step; the rounds where s = 0."""
        step_keys, keys = random.split(keys)
        xs, inner, info = self.make(self.process).step(step_keys, carry.inner, xt, t, s, denoise, cond)
        xs = xs.astype(xt.dtype)

        def rounds() -> tuple[State, Array]:
            def one(i, state):
                x, nfe = state
                x, made = self.round(random.fold_in(keys, i), x, denoise, cond, carry.known)
                return x, nfe + made

            return jax.lax.fori_loop(0, self.rounds, one, (xs, info.nfe))

        xs, nfe = jax.lax.cond(jnp.all(jnp.asarray(s) == 0), rounds, lambda: (xs, info.nfe))
        return xs, carry._replace(inner=inner), Info(nfe)

    def round(self, keys: Keys, x: State, denoise, cond=None, known=None) -> tuple[State, Array]:
        """One round from clean x: the next clean state, and the evaluations of each example."""
        times, solver = jnp.asarray(self.back, time_dtype(x)), self.make(self.process)
        up_keys, step_keys, known_keys = random.split(keys, 3)

        def show(y, i):
            if known is None:
                return y
            seen = self.process.observe(random.fold_in(known_keys, i), x, jnp.full(x.shape[:1], times[i]))
            return jnp.where(known, jnp.where(i == len(self.back) - 1, x, seen), y).astype(x.dtype)

        def down(i, state):
            y, inner, nfe = state
            own = random.fold_in(step_keys, i)
            moved, inner, info = solver.step(own, inner, y, times[i], times[i + 1], denoise, cond)
            return show(moved.astype(x.dtype), i + 1), inner, nfe + info.nfe

        corrupted = self.process.marginal(x, jnp.full(x.shape[:1], times[0])).sample(up_keys).astype(x.dtype)
        y = show(corrupted, 0)
        first = (y, first_carry(solver, y, cond, denoise, known), jnp.zeros(x.shape[:1], jnp.int32))
        x0, _, nfe = jax.lax.fori_loop(0, len(self.back) - 1, down, first)
        return x0, nfe
