"""Ancestral sampling: draw from the process's own reverse step."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from ddjax.solvers.base import Info, batched


@dataclasses.dataclass(frozen=True)
class Ancestral:
    """x_s ~ p(x_s | x_t), the bridge averaged over (or, for Gaussian states, taken at) the predicted x0.

    Masked: a coin for each mask, then its symbol (Shi et al. 2024, algorithm 2). Uniform: D3PM's step on the cavity
    (Austin et al. 2021, eq. 4; Schiff et al. 2024). Gaussian: DDPM (Ho et al. 2020, algorithm 2), equal to
    `DDIM(eta=1)`.
    """

    process: Any

    def init(self, xt, cond=None):
        """Nothing to carry."""
        return ()

    def law(self, prediction, xt, s, t):
        """The process's reverse step."""
        return self.process.reverse(prediction, xt, s, t)

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        """One draw."""
        xs = self.law(denoise(xt, batched(t, xt), cond), xt, s, t).sample(keys)
        return xs, carry, Info(jnp.ones(xt.shape[0], jnp.int32))
