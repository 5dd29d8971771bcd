"""When each site moves: its own time, in [0, 1], as a function of the common one, for `processes.Staggered`.

A clock is piecewise linear and never runs back, 0 at t = 0 and 1 at t = 1 for every site. It gives the own times and
their slope; everything else of a staggered process follows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ddjax.frozen import Frozen
from ddjax.types import State, Time, left_broadcast


class Clock(Protocol):
    """What `Staggered` asks of a clock."""

    def local(self, t: Time, x: State) -> Float[Array, batch * sites]:
        """Each site's own time."""

    def slope(self, t: Time, x: State) -> Float[Array, batch * sites]:
        """Its derivative; 0 where a site rests."""

    def reached(self, own: float) -> float:
        """The first time at which the own time of some site is `own`."""


@dataclasses.dataclass(frozen=True)
class Windows:
    """A site moves in its window only: t_i = clip((t - start_i) / (stop_i - start_i), 0, 1).

    start, stop: shaped like one example (or broadcasting to it), 0 <= start < stop <= 1. A site is clean until its
        start and pure noise after its stop.
    Windows that follow one another make an autoregressive model, overlapping ones a rolling one (Ruhe et al. 2024;
    Chen et al. 2024, "Diffusion forcing"), equal ones the process itself.
    Raises ValueError for windows that are empty or leave [0, 1].
    """

    start: Frozen
    stop: Frozen

    def __post_init__(self):
        start, stop = (np.asarray(v, np.float64) for v in (self.start, self.stop))
        if not ((start >= 0).all() and (stop <= 1).all() and (start < stop).all()):
            raise ValueError(f"each site needs 0 <= start < stop <= 1, got start {start}, stop {stop}")
        object.__setattr__(self, "start", Frozen(start))
        object.__setattr__(self, "stop", Frozen(stop))

    def _ends(self, t: Time, x: State) -> tuple[Array, Array, Array]:
        t = left_broadcast(jnp.asarray(t), x)
        return t, *(jnp.asarray(v.values, t.dtype) for v in (self.start, self.stop))

    def local(self, t, x):
        """Each site's own time, `(batch, *sites)`."""
        t, start, stop = self._ends(t, x)
        # Before any rounding of the quotient: the ends are exact.
        own = jnp.where(t >= stop, 1.0, jnp.where(t <= start, 0.0, (t - start) / (stop - start)))
        return jnp.broadcast_to(own, x.shape).astype(t.dtype)

    def slope(self, t, x):
        """1 / (stop - start) inside the window."""
        t, start, stop = self._ends(t, x)
        return jnp.broadcast_to(jnp.where((t > start) & (t < stop), 1.0 / (stop - start), 0.0), x.shape)

    def reached(self, own):
        """In the first window to come so far."""
        return float(np.min(self.start.values + own * (self.stop.values - self.start.values)))


@dataclasses.dataclass(frozen=True)
class Sweeps:
    """One site moves at a time, in turn, over and over: Glauber dynamics (Varma et al. 2024, GGM).

    Of `rounds * L` equal steps of the clock, step r L + p takes the site whose turn is p from r / rounds to
    (r + 1) / rounds.

    turn: shaped like one example, when each of its L sites moves within a sweep, a permutation of 0 ... L - 1
        (`cyclic` and `shuffled` make one).
    rounds: how many sweeps there are; 1 is an autoregressive model.
    At the times of its grid, `times`, own times are exact. Between them one site is on its way; in float32 a bound over
    continuous time loses the 1e-7 of the clock about each knot, so give one of many thousand steps `times=`.
    Raises ValueError unless turn is a permutation and rounds at least 1.
    """

    turn: Frozen
    rounds: int = 1

    def __post_init__(self):
        turn = np.asarray(self.turn, np.float64)
        if not np.array_equal(np.sort(turn, axis=None), np.arange(turn.size)):
            raise ValueError(f"turn must give each site its place in a sweep, a permutation of 0 ... L - 1, got {turn}")
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1 sweep over the sites, got {self.rounds}")
        object.__setattr__(self, "turn", Frozen(turn))

    @classmethod
    def cyclic(cls, shape: Sequence[int], rounds: int = 1) -> Sweeps:
        """The sites of an example of this shape in their own order: the first is noised first, and made last."""
        return cls(np.arange(math.prod(shape)).reshape(shape), rounds)

    @classmethod
    def shuffled(cls, shape: Sequence[int], rounds: int = 1, seed: int = 0) -> Sweeps:
        """Sites in one random order, the same in every sweep."""
        return cls(np.random.default_rng(seed).permutation(math.prod(shape)).reshape(shape), rounds)

    @property
    def steps(self) -> int:
        """How many times a site moves, `rounds * L`."""
        return self.rounds * self.turn.values.size

    @property
    def times(self) -> Float[Array, " steps+1"]:
        """The grid on which each step moves one site, decreasing."""
        return jnp.asarray(np.arange(self.steps, -1, -1) / self.steps, float)

    def _moves(self, t: Time, x: State) -> tuple[Int[Array, batch * sites], Float[Array, batch * sites]]:
        """How many whole moves each site has made by t, and how far it is on its next."""
        shape = self.turn.values.shape
        if x.shape[1:] != shape:
            raise ValueError(f"these sweeps are over examples of shape {shape}, got a state of shape {x.shape}")
        t = left_broadcast(jnp.asarray(t), x)
        # Looked up, not divided: compiled, k / n may round otherwise than the grid's.
        knots = jnp.asarray(np.arange(self.steps + 1) / self.steps, t.dtype)
        step = jnp.clip(jnp.searchsorted(knots, t, side="right") - 1, 0, self.steps - 1)
        part = (t - knots[step]) / (knots[step + 1] - knots[step])
        sweep, place = jnp.divmod(step, self.turn.values.size)
        turn = jnp.asarray(self.turn.values, int)
        return sweep + (turn < place), jnp.where(turn == place, part, 0.0)

    def local(self, t, x):
        """Each site's own time, `(batch, *sites)`."""
        done, part = self._moves(t, x)
        levels = jnp.asarray(np.arange(self.rounds + 1) / self.rounds, part.dtype)
        here, onward = levels[done], levels[jnp.minimum(done + 1, self.rounds)]
        return here + part * (onward - here)

    def slope(self, t, x):
        """L for the site that moves."""
        _, part = self._moves(t, x)
        return jnp.where((part > 0) & (part < 1), float(self.turn.values.size), 0.0).astype(part.dtype)

    def reached(self, own):
        """By the site whose turn is first."""
        sweep = max(math.ceil(own * self.rounds) - 1, 0)
        return (sweep + (own * self.rounds - sweep) / self.turn.values.size) / self.rounds
