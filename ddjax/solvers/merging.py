"""Guided sampling with a network whose unimportant sites join others (Wu et al. 2024)."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ddjax import random, taps
from ddjax.sites import Sites
from ddjax.solvers.base import batched, first_carry
from ddjax.types import Denoise, State


class Weighed(NamedTuple):
    """How important each of the network's sites was in the last step, whether there was one, the solver's own carry."""

    importance: Float[Array, "batch patches"]
    known: Bool[Array, " batch"]
    inner: Any


@dataclasses.dataclass(frozen=True)
class Merging:
    """`solver`, telling a network built with `merge` how important its sites are: as far as guidance moved them.

    (Wu et al. 2024, "Importance-based token merging for diffusion models".) A site's importance is the norm of the
    difference between the predictions with the condition and without, in the step before; in the first step it is drawn
    at random. `denoise` is guided (`guidance.classifier_free`), over a `DiT(merge=...)`.
    """

    solver: Any

    @property
    def process(self) -> Any:
        """The solver's."""
        return self.solver.process

    def begin(self, xt: State, cond: Any, denoise: Denoise, known: Any = None) -> Weighed:
        """Nothing known yet."""
        patches = Sites.of(denoise, xt, jnp.ones(xt.shape[:1]), cond)
        inner = first_carry(self.solver, xt, cond, denoise, known)
        return Weighed(jnp.zeros((xt.shape[0], patches.count)), jnp.zeros(xt.shape[:1], bool), inner)

    def init(self, xt, cond=None):
        """Not to be had without the denoiser."""
        raise ValueError("Merging asks the denoiser what its sites are: call begin")

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        """The solver's step. Raises ValueError for a denoiser without guidance."""
        patches = Sites.of(denoise, xt, batched(t, xt), cond)
        drawn = random.uniform(random.fold_in(keys, 1), (patches.count,))
        importance = jnp.where(carry.known[:, None], carry.importance, drawn)
        with taps.record(taps.GUIDANCE) as seen:
            xs, inner, info = self.solver.step(
                keys, carry.inner, xt, t, s, denoise, {"importance": importance, "cond": cond}
            )
        change = seen[taps.GUIDANCE].reshape(*xt.shape, -1)  # of logits, all of a token
        own = patches.gathered(jnp.sum(change**2, axis=-1)).sum(axis=-1)
        return xs, Weighed(jnp.sqrt(own).astype(drawn.dtype), jnp.ones_like(carry.known), inner), info
