"""Uniform corruption: a lost symbol is replaced by a uniformly drawn one.

(Austin et al. 2021, D3PM; Schiff et al. 2024, UDLM.)
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from ddjax.categorical import uniform_symbols
from ddjax.processes.mixture import Mixture


@dataclasses.dataclass(frozen=True)
class Uniform(Mixture):
    """q(x_t | x) = alpha_t e_x + (1 - alpha_t) / K. A network trained on its bound predicts the cavity."""

    @property
    def num_states(self):
        """The symbols themselves."""
        return self.num_symbols

    @property
    def pi(self):
        """1 / K for every symbol, as one entry that broadcasts."""
        return jnp.full((1,), 1.0 / self.num_symbols)

    def sample_noise(self, keys, t, shape):
        """Symbols drawn uniformly."""
        return uniform_symbols(keys, tuple(shape), self.num_symbols)
