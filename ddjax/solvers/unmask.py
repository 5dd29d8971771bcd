"""Writing masks: how many follows from the schedule, which ones from an order (`solvers.orders`)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from ddjax import random
from ddjax.categorical import bernoulli, categorical_where
from ddjax.predictions import Prediction
from ddjax.processes import Masked
from ddjax.processes.categorical import PerSite, PerState, Tokens, gather
from ddjax.processes.masked import left_over
from ddjax.processes.staggered import Moved, common
from ddjax.solvers.base import Info, batched
from ddjax.solvers.orders import Choice, Order, RandomOrder, planner_of
from ddjax.types import Time, left_broadcast, per_example


@dataclasses.dataclass(frozen=True)
class Unmask:
    """A step writes as many masks as the schedule says, those with the highest scores of an order.

    process: `Masked`, or `Staggered` of it (blocks one after the other: the order chooses within the block).
    order: one of `solvers.orders`, or any function of (keys, `Choice`) that compares by value.
    count: `"expected"`: after the step as many masks are left as the forward process leaves on average of those that
        the example began with, rounded: every example is written at the end, whatever its length and the number of
        steps. `"binomial"`: a coin for each mask, as in the reverse process; with `RandomOrder` it is the reverse
        process, for which sites show heads does not depend on how many do.

    Sites that show a symbol are never written. Symbols are drawn from the network's laws, all from one call.
    Raises ValueError for other processes and counts.
    """

    process: Any
    order: Order = RandomOrder()  # noqa: RUF009 (frozen)
    count: str = "expected"

    def __post_init__(self):
        inner = common(self.process)
        if not isinstance(inner, Masked):
            raise ValueError(f"Unmask writes masks: it is for processes.Masked, got {type(inner).__name__}")
        if self.count not in ("expected", "binomial"):
            raise ValueError(f"count must be 'expected' or 'binomial', got {self.count!r}")

    def init(self, xt, cond=None):
        """For each mask, the chance that it would still be one; and the masks themselves."""
        masked = xt == self.process.num_symbols
        return masked.astype(float), masked

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        """One call, and one of a planner where the order asks it."""
        count_keys, symbol_keys, order_keys = random.split(keys, 3)
        p, logits = revealing(self.process, denoise(xt, batched(t, xt), cond), xt, s, t)
        masked = xt == self.process.num_symbols
        chance = _less_those_gone(*carry, masked, p > 0) * (1.0 - p)
        if self.count == "expected":
            number = jnp.maximum(per_example(masked) - rounded(chance), 0)
        else:
            number = per_example(masked & bernoulli(count_keys, p))
        drawn = jnp.where(masked, categorical_where(symbol_keys, logits, masked), xt)
        open_ = masked & (p > 0)
        scores = self.order(order_keys, Choice(xt, drawn, logits, ~masked, open_, number, s, denoise, cond))
        written = highest(scores, number, open_)
        xs = jnp.where(written, drawn, xt)
        return (
            xs,
            (chance, masked & ~written),
            Info(jnp.full(xt.shape[0], 1 + getattr(self.order, "calls", 0), jnp.int32)),
        )


@dataclasses.dataclass(frozen=True)
class PathPlanning:
    """P2: masks are written, and written sites masked again where they look wrong (Peng et al. 2025).

    After a step as many masks are left as `Unmask`'s `"expected"` says, at the sites of lowest score: for a mask, log p
    of the symbol drawn for it; for a written site, eta times log p of the symbol it shows. That p is the network's own
    (`planner="self"`: its output at written sites, which must have been trained to mean something there) or a
    planner's, P(not corrupted) with all masks filled with what was drawn (`planner="trained"`, `predictions.planned`).

    eta: 0 never masks again, and is greedy decoding (`Unmask` with `Confidence`); above 1 masks more readily than it
        writes. Sites that are written before the first step are never touched.
    Raises ValueError for other processes and planners, and a negative eta.
    """

    process: Masked
    eta: float = 1.0
    planner: str = "self"

    def __post_init__(self):
        if not isinstance(self.process, Masked):
            raise ValueError(f"PathPlanning is for processes.Masked, got {type(self.process).__name__}")
        if self.planner not in ("self", "trained"):
            raise ValueError(f"planner must be 'self' or 'trained', got {self.planner!r}")
        if self.eta < 0:
            raise ValueError(f"eta must not be negative, got {self.eta}")

    def init(self, xt, cond=None):
        """For each site, whether it began as a mask, and the chance that it would still be one."""
        free = xt == self.process.mask
        return free, free.astype(float)

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        """One call, and one of a trained planner."""
        free, expected = carry
        symbol_keys = random.split(keys, 3)[1]  # `Unmask`'s
        prediction = denoise(xt, batched(t, xt), cond)
        p, logits = revealing(self.process, prediction, xt, s, t)
        masked, expected = xt == self.process.mask, expected * (1.0 - p)
        drawn = jnp.where(masked, categorical_where(symbol_keys, logits, masked), xt)
        if self.eta == 0.0:
            kept = jnp.full(xt.shape, jnp.inf)
        elif self.planner == "trained":
            kept = self.eta * jax.nn.log_sigmoid(-planner_of(denoise)(drawn, batched(s, xt), cond).value)
        else:
            kept = self.eta * _own(prediction, xt)
        scores = jnp.where(masked, gather(jax.nn.log_softmax(logits), drawn), kept)
        keep = highest(scores, per_example(free) - rounded(expected), free)
        calls = 2 if self.planner == "trained" and self.eta else 1
        xs = jnp.where(keep | ~free, drawn, self.process.mask)
        return xs, (free, expected), Info(jnp.full(xt.shape[0], calls, jnp.int32))


def _less_those_gone(chance: PerSite, left: Array, masked: Array, moving: Array) -> PerSite:
    """The chances, where something else wrote masks since (`Stopping`): of those that move the same share less."""
    still, were = (per_example(sites & moving) for sites in (masked, left))
    share = jnp.where(were > 0, still / jnp.maximum(were, 1), 1.0)
    share = left_broadcast(share.astype(chance.dtype), chance)
    return jnp.where(moving, chance * share, jnp.where(left & ~masked, 0.0, chance))


def _own(prediction: Prediction, xt: Tokens) -> PerSite:
    """Log p of the symbols shown, as the network itself says it; 0 at masks."""
    if prediction.kind not in ("posterior", "cavity"):
        raise ValueError(
            f"planner='self' reads what the network says of written sites as log-probabilities: it must predict a "
            f"posterior or a cavity, not a {prediction.kind}"
        )
    log_p = jax.nn.log_softmax(prediction.value)
    return gather(log_p, jnp.minimum(xt, log_p.shape[-1] - 1))


def revealing(process: Any, prediction: Prediction, xt: Tokens, s: Time, t: Time) -> tuple[PerSite, PerState]:
    """The chance that the reverse process writes a mask between t and s, and the logits of what it writes."""
    law = process.reverse(prediction, xt, s, t)
    if isinstance(law, Moved):
        return jnp.where(law.moves, law.law.p, 0.0), law.law.logits
    return law.p, law.logits


def rounded(expected: PerSite) -> Int[Array, " batch"]:
    """The number of masks left, from each one's chance; halves go down, and so does what rounding made of them."""
    return left_over(per_example(expected))


def highest(
    scores: PerSite, number: Int[Array, " batch"], of: Bool[Array, batch * sites]
) -> Bool[Array, batch * sites]:
    """The `number` sites with the highest scores among some; of equal ones the first."""
    flat = jnp.where(of, scores, -jnp.inf).reshape(len(scores), -1)
    # Others last, also behind scores of -inf.
    order = jnp.lexsort((-flat, ~of.reshape(flat.shape)), axis=-1)
    ranks = jnp.argsort(order, axis=-1)
    return (ranks < number[:, None]).reshape(scores.shape) & of


__all__ = ["PathPlanning", "Unmask", "highest", "revealing", "rounded"]
