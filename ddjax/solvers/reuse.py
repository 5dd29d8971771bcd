"""Cheap steps of masked sampling that reuse the features of what is written (Liu et al. 2025, ReCAP)."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ddjax import random, taps
from ddjax.predictions import Prediction
from ddjax.processes import Masked
from ddjax.sites import Sites, put
from ddjax.solvers.base import Info, batched, first_carry
from ddjax.solvers.cached import Asked
from ddjax.solvers.key_values import keys_values, tapped
from ddjax.types import Denoise, Past, State


class Reused(NamedTuple):
    """What the last run at each site gave, the tokens it saw there, steps made, and what the solver itself carries."""

    prediction: Prediction
    past: Past
    seen: State
    steps: Int[Array, " batch"]  # one number for all
    inner: Any


@dataclasses.dataclass(frozen=True)
class Reuse:
    """`solver`, with a full pass of the network every `every` steps, and between them cheap ones at `sites` sites.

    A cheap pass takes the keys and values of the sites at which it does not run from the last pass there ("local
    function evaluations", section 4). It runs where a token was written since, and, as far as there is room, at masks,
    drawn at random; other masks keep the last prediction for them. Not the reverse process: what is written between two
    full passes reaches the features of the context only with the second. With every = 1, or as many `sites` as there
    are, it is `solver`. `Info.nfe` counts both kinds of pass as one call.

    solver: over `Masked`, asking the network about the state a step begins with. The network is one like
        `TextTransformer`, without blocks, or `DiT`, whose sites are patches: one is new where one of its tokens is.
    Raises ValueError for another process, numbers below 1, and as `KeyValues` does.
    """

    solver: Any
    sites: int
    every: int = 2

    def __post_init__(self):
        if not isinstance(self.process, Masked):
            raise ValueError(f"Reuse is for processes.Masked, got {type(self.process).__name__}")
        if self.sites < 1 or self.every < 1:
            raise ValueError(f"sites and every must be at least 1, got {self.sites} and {self.every}")

    @property
    def process(self) -> Any:
        """The solver's."""
        return self.solver.process

    def begin(self, xt: State, cond: Any, denoise: Denoise, known: Any = None) -> Reused:
        """Nothing known yet."""
        t = jnp.ones(xt.shape[:1], jnp.result_type(float))
        shapes = jax.eval_shape(lambda x: (denoise(x, t, cond), keys_values(denoise, x, t, cond)), xt)
        prediction, past = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), shapes)
        steps = jnp.zeros(xt.shape[:1], jnp.int32)
        return Reused(prediction, past, xt, steps, first_carry(self.solver, xt, cond, denoise, known))

    def init(self, xt, cond=None):
        """Not to be had without the denoiser."""
        raise ValueError("Reuse holds features, whose shape the denoiser tells: call begin")

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        """The solver's step, after a full or a cheap pass."""
        times = batched(t, xt)
        patches = Sites.of(denoise, xt, times, cond)  # the network's sites

        def full() -> tuple[Prediction, Past, State]:
            with taps.record() as seen:
                prediction = denoise(xt, times, cond)
            return prediction, tapped(seen, denoise, xt), xt

        def cheap() -> tuple[Prediction, Past, State]:
            # New tokens before masks before what is as it was.
            rank = jnp.where(xt != carry.seen, 2.0, jnp.where(xt == self.process.mask, 1.0, 0.0))
            first = patches.gathered(rank).max(axis=-1) + random.uniform(random.fold_in(keys, 1), (patches.count,))
            sites = jnp.argsort(-first, axis=1)[:, : self.sites]
            with taps.record() as seen:
                new = denoise(xt, times, {"past": carry.past, "sites": sites, "cond": cond})
            fresh = zip(tapped(seen, denoise, xt), carry.past, strict=True)
            past = tuple(put(a, sites, b, axis=2) for a, b in fresh)
            ran = patches.spread(put(jnp.ones(sites.shape, bool), sites, jnp.zeros(first.shape, bool)))
            value = jnp.where(ran[..., None], new.value, carry.prediction.value)
            return Prediction(value, new.kind), past, jnp.where(ran, xt, carry.seen)

        prediction, past, seen = jax.lax.cond(carry.steps[0] % self.every == 0, full, cheap)
        given = Asked(denoise, xt, cond, prediction)
        xs, inner, info = self.solver.step(keys, carry.inner, xt, t, s, given, cond)
        return xs, Reused(prediction, past, seen, carry.steps + 1, inner), Info(info.nfe)
