"""Which masks are written first, for `Unmask`: an order gives each site a score, and the highest are written."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ddjax.processes.categorical import PerSite, PerState, Tokens, gather
from ddjax.solvers.base import batched
from ddjax.types import Denoise, Keys, Time, left_broadcast


class Choice(NamedTuple):
    """What an order may look at."""

    xt: Tokens
    drawn: Tokens  # xt, a symbol drawn in the place of every mask
    logits: PerState  # what they were drawn from
    written: Bool[Array, batch * sites]  # sites that show a symbol
    open: Bool[Array, batch * sites]  # masks that this step may write
    number: Int[Array, " batch"]  # how many of them it will
    s: Time  # where the step leads, () or (batch,)
    denoise: Denoise
    cond: Any


# Frozen dataclasses; an attribute `calls` counts their network calls, and `looks` says whether they look at what the
# network says.
Order = Callable[[Keys, Choice], PerSite]


@dataclasses.dataclass(frozen=True)
class RandomOrder:
    """Any site, with the same chance: whatever says how many, the law of which is that of the reverse process."""

    def __call__(self, keys: Keys, choice: Choice) -> PerSite:
        """Random ranks: a permutation has no ties."""
        size = math.prod(choice.xt.shape[1:])
        ranks = jax.vmap(lambda k: jax.random.permutation(k, size))(keys)
        return ranks.reshape(choice.xt.shape)


@dataclasses.dataclass(frozen=True)
class LeftToRight:
    """The first site first; images row by row."""

    def __call__(self, keys: Keys, choice: Choice) -> PerSite:
        """Minus the site's number."""
        size = math.prod(choice.xt.shape[1:])
        return jnp.broadcast_to(-jnp.arange(size).reshape(choice.xt.shape[1:]), choice.xt.shape)


@dataclasses.dataclass(frozen=True)
class Confidence:
    """The sites that the network is surest of (Chang et al. 2022, MaskGIT; Nie et al. 2025, LLaDA).

    score: `"probability"`: log p of the symbol drawn; `"margin"`: between the two likeliest symbols (Kim et al. 2025);
        `"entropy"`: minus that of the law.
    temperature: of Gumbel noise added to the scores, times s: it anneals to none at the end, as MaskGIT's "choice
        temperature". 0 is greedy; equal scores go to the first site.

    This is not the reverse process. The symbol's own probability prefers likely symbols, even one site at a time (by
    how much: docs/results.md). Margin and entropy look at the laws alone: one site at a time, any such order is exact
    where the network is, and the only error is to write several sites at once.
    """

    score: str = "probability"
    temperature: float = 0.0

    looks = True

    def __post_init__(self):
        if self.score not in ("probability", "margin", "entropy"):
            raise ValueError(f"score must be 'probability', 'margin' or 'entropy', got {self.score!r}")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}")

    def __call__(self, keys: Keys, choice: Choice) -> PerSite:
        """Confidence in each site."""
        log_p = jax.nn.log_softmax(choice.logits)
        if self.score == "probability":
            score = gather(log_p, jnp.minimum(choice.drawn, log_p.shape[-1] - 1))
        elif self.score == "entropy":
            score = jnp.where(log_p > -1e20, jnp.exp(log_p) * log_p, 0.0).sum(-1)
        else:
            first, *second = jnp.moveaxis(jax.lax.top_k(jnp.exp(log_p), min(2, log_p.shape[-1]))[0], -1, 0)
            score = first - second[0] if second else first
        if self.temperature == 0.0:
            return score
        noise = jax.vmap(lambda k: jax.random.gumbel(k, score.shape[1:], score.dtype, mode="high"))(keys)
        return score + self.temperature * left_broadcast(jnp.asarray(choice.s), score) * noise


@dataclasses.dataclass(frozen=True)
class Planner:
    """The sites whose drawn symbols a planner believes (`predictions.planned`): minus its log odds of corruption.

    The planner sees all masks filled with what was drawn, at the time that the step leads to.
    """

    calls, looks = 1, True

    def __call__(self, keys: Keys, choice: Choice) -> PerSite:
        """Minus the planner's log odds. Raises ValueError for a denoiser without a planner."""
        return -planner_of(choice.denoise)(choice.drawn, batched(choice.s, choice.xt), choice.cond).value


def planner_of(denoise: Denoise) -> Denoise:
    """The planner that goes with a denoiser. Raises ValueError where there is none."""
    if not hasattr(denoise, "planner"):
        raise ValueError(
            "there is no planner: pair the denoiser with one (`predictions.planned`), or train with `ddpd`"
        )
    return denoise.planner


_UNIT = 10_000  # closeness is counted in whole numbers, so that equal ones are equal


@dataclasses.dataclass(frozen=True)
class Local:
    """Groups that lie close to what is written, and apart from each other (Zhang et al. 2025, section 3.3).

    A site's closeness is the sum of 1 / distance over the written sites around it (each coordinate differs by 1 at
    most). First come sites at least as close as `proximity`, the closest first, leaving out those within `repulsion` of
    one already in the group (in each coordinate); when there are no more, the site farthest from the group. Ties are
    broken at random. Sites lie on the grid that the state's axes are: sequences, images, volumes.
    """

    proximity: float = 1.0
    repulsion: int = 1

    def __post_init__(self):
        if self.repulsion < 0:
            raise ValueError(f"repulsion is a distance in sites and must not be negative, got {self.repulsion}")

    def __call__(self, keys: Keys, choice: Choice) -> PerSite:
        """Minus the rank in the group; the least score outside it."""
        near = self._closeness(choice.written)
        flat = (a.reshape(len(keys), -1) for a in (near, choice.open))
        group = jax.vmap(lambda k, near, free, number: self._group(k, near, free, number, choice.xt.shape[1:]))
        return group(keys, *flat, choice.number).reshape(choice.xt.shape)

    def _closeness(self, written: Array) -> Array:
        padded = jnp.pad(written, [(0, 0)] + [(1, 1)] * (written.ndim - 1)).astype(jnp.int32)
        total = jnp.zeros(written.shape, jnp.int32)
        for offset in itertools.product((-1, 0, 1), repeat=written.ndim - 1):
            if any(offset):
                window = tuple(slice(1 + o, 1 + o + n) for o, n in zip(offset, written.shape[1:], strict=True))
                total += round(_UNIT / math.hypot(*offset)) * padded[(slice(None), *window)]
        return total

    def _group(self, key: Array, near: Array, free: Array, number: Array, shape: tuple[int, ...]) -> Float[Array, " n"]:
        size = math.prod(shape)
        places = jnp.asarray(np.stack(np.unravel_index(np.arange(size), shape), -1), jnp.float32)
        luck = jax.random.permutation(key, size)
        close = near >= round(self.proximity * _UNIT)

        def add(state):
            j, scores, free, apart, distance = state
            good = free & close & (apart > self.repulsion)
            candidates = jnp.where(good.any(), good, free)
            value = jnp.where(candidates, jnp.where(good.any(), near.astype(jnp.float32), distance), -jnp.inf)
            site = jnp.argmax(jnp.where(candidates & (value == value.max()), luck, -1))
            to = jnp.abs(places - places[site])
            apart, distance = jnp.minimum(apart, to.max(-1)), jnp.minimum(distance, (to**2).sum(-1))
            return j + 1, scores.at[site].set(-j), free.at[site].set(False), apart, distance

        far = jnp.full(size, jnp.inf)
        start = (jnp.int32(0), jnp.full(size, -jnp.inf), free, far, far)
        return jax.lax.while_loop(lambda state: (state[0] < number) & state[2].any(), add, start)[1]


__all__ = ["Choice", "Confidence", "LeftToRight", "Local", "Order", "Planner", "RandomOrder", "planner_of"]
