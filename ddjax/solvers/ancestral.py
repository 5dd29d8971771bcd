"""Ancestral sampling: draw from the process's own reverse step."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from ddjax.solvers.base import Info, batched
from ddjax.solvers.noise import Noise
from ddjax.types import batch_size


@dataclasses.dataclass(frozen=True)
class Ancestral:
    """x_s ~ p(x_s | x_t), the bridge averaged over (or, for Gaussian states, taken at) the predicted x0.

    Masked: a coin for each mask, then its symbol (Shi et al. 2024, algorithm 2). Uniform: D3PM's step on the cavity
    (Austin et al. 2021, eq. 4; Schiff et al. 2024). Gaussian: DDPM (Ho et al. 2020, algorithm 2), equal to
    `DDIM(eta=1)`.

    noise: where the normals of a reverse step come from that is made of them (`solvers.noise`); None: drawn by it.
    Raises ValueError, when a sampler is compiled, for a source of normals and a step that is not made of them.
    """

    process: Any
    noise: Noise | None = None

    def init(self, xt, cond=None):
        """What the noise carries; nothing without."""
        return () if self.noise is None else self.noise.init(xt)

    def law(self, prediction, xt, s, t):
        """The process's reverse step."""
        return self.process.reverse(prediction, xt, s, t)

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        """One draw."""
        law, info = self.law(denoise(xt, batched(t, xt), cond), xt, s, t), jnp.ones(batch_size(xt), jnp.int32)
        if self.noise is None:
            return law.sample(keys), carry, Info(info)
        if not hasattr(law, "drawn"):
            raise ValueError(
                f"a reverse step of {type(self.process).__name__} is not made of normals alone: leave out noise"
            )
        z, carry = self.noise.draw(carry, keys, xt, t, s)
        return law.drawn(fresh=z), carry, Info(info)
