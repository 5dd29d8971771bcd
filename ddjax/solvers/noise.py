"""Where a solver's normals come from: drawn afresh, given, or the increments of one Brownian path.

A source has `init(x) -> state` and `draw(state, keys, x, t, s) -> (z, state)`: standard normals shaped like x, for the
step from t to s. Solvers carry the state.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ddjax import random
from ddjax.frozen import Frozen
from ddjax.processes.gaussian import divide, gaussian_of
from ddjax.types import Keys, State, Time


class Noise(Protocol):
    """A frozen dataclass, compared by value."""

    def init(self, x: State) -> Any:
        """What is carried from draw to draw."""

    def draw(self, state: Any, keys: Keys, x: State, t: Time, s: Time) -> tuple[State, Any]:
        """Standard normals for the step from t to s."""


@dataclasses.dataclass(frozen=True)
class Fresh:
    """New normals at each step, one key per example."""

    def init(self, x):
        """Nothing."""
        return ()

    def draw(self, state, keys, x, t, s):
        """Of the state's dtype."""
        return random.normal(keys, x.shape[1:], x.dtype), state


@dataclasses.dataclass(frozen=True)
class Given:
    """Given normals, `(draws, batch, *sites)`, in the order in which the solver asks: for exact comparisons.

    values: a NumPy array, or `Frozen`. The solvers here ask once a step, but `Restart` (once at each return) and
    `PredictorCorrector` (the corrector's source, once for each of its steps). Beyond the last, the last again.
    """

    values: Frozen

    def __post_init__(self):
        if not isinstance(self.values, Frozen):
            object.__setattr__(self, "values", Frozen(np.asarray(self.values)))

    def init(self, x):
        """How many were used, for each example."""
        return jnp.zeros(x.shape[:1], jnp.int32)

    def draw(self, state, keys, x, t, s):
        """The next ones."""
        return jnp.asarray(self.values.values, x.dtype)[state, jnp.arange(x.shape[0])], state + 1


class Path(NamedTuple):
    """Which path each example is on."""

    seeds: Array  # (batch, 2)
    drawn: Array  # (batch,), whether they are its own yet


@dataclasses.dataclass(frozen=True)
class Brownian:
    """The increments of one Brownian path per example, the same whatever the grid.

    The path is chosen by the keys of the first step, which are those of every grid, so that samples of one key with
    different numbers of steps approximate one solution. Its clock is (alpha / sigma)^(2 eta): with a solver's own eta,
    the noise of two steps is then exactly that of the one step from the first to the last time.

    It is found by bisecting [0, 1] `depth` times (Gaines & Lyons 1997), in which each half is a Brownian bridge; times
    closer than 2^-depth get a path of their own. As cheap as `depth` draws, for each end of a step.

    The path on the clock v in [0, infinity) is (1 + v) b(v / (1 + v)) of a bridge b on [0, 1].
    """

    process: Any
    eta: float = 1.0
    depth: int = 20

    def __post_init__(self):
        if not self.eta > 0 or self.depth < 1:
            raise ValueError(f"Brownian needs eta > 0 and depth >= 1, got {(self.eta, self.depth)}")
        object.__setattr__(self, "process", gaussian_of(self.process) or self.process)

    def init(self, x):
        """No path yet."""
        return Path(jnp.zeros((x.shape[0], 2), jnp.uint32), jnp.zeros(x.shape[:1], bool))

    def draw(self, state, keys, x, t, s):
        """The increment over the step, divided by its standard deviation; 0 into sigma = 0, where it has no weight."""
        fresh = jax.vmap(lambda key: jax.random.bits(key, (2,), jnp.uint32))(keys)
        seeds = jnp.where(state.drawn[:, None], state.seeds, fresh)
        times = (jnp.broadcast_to(jnp.asarray(v), x.shape[:1]) for v in (t, s))
        return jax.vmap(self._increment)(seeds, x, *times), Path(seeds, jnp.ones_like(state.drawn))

    def _increment(self, seed, x, t, s):
        before, after = self._odds(x, t), self._odds(x, s)
        left = [jax.nn.sigmoid(-v) for v in (before, after)]  # 1 - v / (1 + v)
        change = left[0] * self._bridge(seed, x, s) - left[1] * self._bridge(seed, x, t)
        return divide(change, jnp.sqrt(_gap(after, before) * left[0] * left[1]))

    def _odds(self, x, t):
        """The log of the clock, shaped to broadcast against one example."""
        value = self.eta * self.process.schedule.log_snr(t)
        return value.reshape(value.shape + (1,) * (x.ndim - value.ndim))

    def _bridge(self, seed, x, t):
        """The bridge b at the time t, by bisection."""
        key = jax.random.fold_in(jax.random.key(seed[0]), seed[1])

        def draw(key, label):
            return jax.random.normal(jax.random.fold_in(key, label), x.shape, x.dtype)

        nothing, infinite = jnp.zeros_like(x), jnp.asarray(jnp.inf, x.dtype)
        ends = [self._odds(x, v) for v in (jnp.zeros_like(t), jnp.ones_like(t))]
        at_one = _between(infinite, -infinite, ends[1], nothing, nothing, draw(key, 0))
        at_zero = _between(infinite, ends[1], ends[0], nothing, at_one, draw(key, 1))

        def halve(_, state):
            low, high, of_low, of_high, key = state
            middle = 0.5 * (low + high)
            odds = (self._odds(x, v) for v in (low, high, middle))
            value = _between(*odds, of_low, of_high, draw(key, 0)).astype(x.dtype)
            below = t < middle
            return (
                jnp.where(below, low, middle),
                jnp.where(below, middle, high),
                jnp.where(below, of_low, value),
                jnp.where(below, value, of_high),
                jax.random.fold_in(key, jnp.where(below, 1, 2)),
            )

        first = (jnp.zeros_like(t), jnp.ones_like(t), at_zero, at_one, jax.random.fold_in(key, 2))
        low, high, of_low, of_high, key = jax.lax.fori_loop(0, self.depth, halve, first)
        return _between(self._odds(x, low), self._odds(x, high), self._odds(x, t), of_low, of_high, draw(key, 3))


def _gap(a: Array, b: Array) -> Array:
    """sigmoid(a) - sigmoid(b) for a >= b, without cancellation."""
    return jnp.where(a == b, 0.0, -jax.nn.sigmoid(a) * jax.nn.sigmoid(-b) * jnp.expm1(jnp.where(a == b, 0.0, b - a)))


def _between(a: Array, b: Array, m: Array, of_a: Array, of_b: Array, z: Array) -> Array:
    """A Brownian path at sigmoid(m), given at sigmoid(a) >= sigmoid(m) >= sigmoid(b)."""
    whole, from_a, from_b = _gap(a, b), _gap(a, m), _gap(m, b)
    return of_b + divide(from_b, whole) * (of_a - of_b) + jnp.sqrt(divide(from_a * from_b, whole)) * z
