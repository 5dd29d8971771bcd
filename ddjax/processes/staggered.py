"""A clock for each site: any process, run by every site in its own time (`processes.clocks`).

Autoregressive, rolling and one-site-at-a-time models are this with one clock or another. All share one bound and one
reverse process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from ddjax.processes.clocks import Clock, Sweeps, Windows
from ddjax.processes.uniform import Uniform
from ddjax.schedules import LogLinear, Survival
from ddjax.types import Distribution, Keys, State


@dataclasses.dataclass(frozen=True)
class Moved:
    """`law` where a site moves; elsewhere it stays as it is."""

    moves: Bool[Array, batch * sites]
    xt: State
    law: Distribution

    def sample(self, keys: Keys) -> State:
        """One draw, one key per example."""
        return jnp.where(self.moves, self.law.sample(keys), self.xt)

    def noise(self, x: State) -> State:
        """The law's where a site moves (continuous states); 0 where it stays."""
        return jnp.where(self.moves, self.law.noise(x), 0.0)

    def drawn(self, noise: State | float = 0.0, fresh: State | float = 0.0) -> State:
        """The state with this noise."""
        return jnp.where(self.moves, self.law.drawn(noise, fresh), self.xt)

    def log_prob(self, x: State) -> Float[Array, batch * sites]:
        """Log-probability of each site, nats (-1e30 for an impossible one)."""
        return jnp.where(self.moves, self.law.log_prob(x), jnp.where(x == self.xt, 0.0, -1e30))


@dataclasses.dataclass(frozen=True)
class Staggered:
    """`process` with a clock for each site: `Staggered(Masked(3), Windows(start=[0.0, 0.5], stop=[0.5, 1.0]))`.

    clock: `Windows`, `Sweeps`, or anything with the methods of `clocks.Clock`.
    own_time: tell the network each site's own time, `(batch, *sites)`, in the place of the common one.
    """

    process: Any
    clock: Clock
    own_time: bool = False

    @property
    def state(self):
        """The process's."""
        return self.process.state

    @property
    def kinds(self):
        """The process's."""
        return self.process.kinds

    @property
    def num_symbols(self):
        """The process's."""
        return self.process.num_symbols

    @property
    def num_states(self):
        """The process's."""
        return self.process.num_states

    def marginal(self, x0, t):
        """q(x_t | x_0), each site at its own time."""
        return self.process.marginal(x0, self.clock.local(t, x0))

    def _steps(self, xt: Array, s: Array, t: Array) -> tuple[Array, Array, Array]:
        """Which sites move between t and s, and their own times; for the others, times at which nothing is 0 / 0."""
        s, t = self.clock.local(s, xt), self.clock.local(t, xt)
        moves = s < t
        return moves, jnp.where(moves, s, 0.25), jnp.where(moves, t, 0.75)

    def bridge(self, x0, xt, s, t):
        """q(x_s | x_t, x_0)."""
        moves, s, t = self._steps(xt, s, t)
        return Moved(moves, xt, self.process.bridge(x0, xt, s, t))

    def reverse(self, prediction, xt, s, t):
        """The model's p(x_s | x_t)."""
        moves, s, t = self._steps(xt, s, t)
        return Moved(moves, xt, self.process.reverse(prediction, xt, s, t))

    def heat_bath(self, prediction, xt, s, t):
        """The law of each x_s^i given the other sites of x_t (`CategoricalProcess.heat_bath`)."""
        moves, s, t = self._steps(xt, s, t)
        return Moved(moves, xt, self.process.heat_bath(prediction, xt, s, t))

    def prior(self, shape, t=1.0):
        """What sampling starts from: each site as noisy as its own time says."""
        example = jnp.zeros((1, *shape[1:]))
        return self.process.prior(shape, self.clock.local(jnp.asarray(t, float), example)[0])

    def prior_kl(self, x0, t):
        """KL(q(x_t | x_0) || prior at t), nats per site."""
        return self.process.prior_kl(x0, self.clock.local(t, x0))

    def path_kl(self, x0, prediction, xt, t):
        """The process's integrand in each site's own time, over dt; nothing where a site rests."""
        slope = self.clock.slope(t, xt)
        own = jnp.where(slope > 0, self.clock.local(t, xt), 0.5)  # a time at which the integrand is finite
        return jnp.where(slope > 0, slope * self.process.path_kl(x0, prediction, xt, own), 0.0)

    def step_kl(self, x0, prediction, xt, s, t):
        """KL(q(x_s | x_t, x_0) || p(x_s | x_t)) of one step of a chain, nats per site."""
        moves, s, t = self._steps(xt, s, t)
        return jnp.where(moves, self.process.step_kl(x0, prediction, xt, s, t), 0.0)

    def reconstruction(self, x0, prediction, xt, t):
        """-log p(x_0^i | x_t), nats per site."""
        return self.process.reconstruction(x0, prediction, xt, self.clock.local(t, xt))

    @property
    def t_range(self):
        """From where the first site to leave the data has lost as little as the process's own range begins with."""
        low, _ = self.process.t_range
        return self.clock.reached(low), 1.0

    def time_at(self, u, t_range):
        """Times uniform in t, and dt/du."""
        low, high = t_range
        u = jnp.clip(jnp.asarray(u), jnp.finfo(jnp.asarray(u).dtype).epsneg, 1.0)
        return low + u * (high - low), jnp.full_like(u, high - low)

    def observe(self, keys, x0, t):
        """What an observed site shows at time t."""
        return self.process.observe(keys, x0, self.clock.local(t, x0))

    def network_inputs(self, xt, t, kind):
        """The process's input for the state; the common time, or each site's own."""
        own = self.clock.local(t, xt)
        return self.process.network_inputs(xt, own, kind)[0], own if self.own_time else jnp.asarray(t)

    def network_outputs(self, output, xt, t, kind):
        """The prediction's value in a network's output, each site at its own time."""
        return self.process.network_outputs(output, xt, self.clock.local(t, xt), kind)

    def convert(self, prediction, kind, xt, t):
        """The same statement as another kind."""
        return self.process.convert(prediction, kind, xt, self.clock.local(t, xt))


def common(process: Any) -> Any:
    """The process of one common clock: what a `Staggered` one runs at each site, any other itself."""
    return process.process if isinstance(process, Staggered) else process


def glauber(num_symbols: int, shape: Sequence[int], schedule: Survival = LogLinear(0.1), rounds: int = 1) -> Staggered:
    """GGM's process: uniform noise on one site at a time, in `rounds` cyclic sweeps over examples of this shape.

    Its objective, `objectives.glauber`, needs a schedule that ends above 0; the bound does not.
    """
    return Staggered(Uniform(num_symbols, schedule), Sweeps.cyclic(shape, rounds))


def in_blocks(process: Any, length: int, block: int) -> Staggered:
    """Sequences of `length` sites, one block of `block` of them (the last may be shorter) after the other.

    The generative process of Arriola et al. 2025 (BD3-LM), for a network that is told each site's own time. Such a
    network sees no block after the one it denoises: sites that are given (in-painting) count from their own block on.
    """
    if length < 1 or block < 1:
        raise ValueError(f"blocks need at least one site, got length={length} and block={block}")
    blocks = -(-length // block)
    turn = np.arange(length) // block
    return Staggered(process, Windows(start=1 - (turn + 1) / blocks, stop=1 - turn / blocks), own_time=True)
