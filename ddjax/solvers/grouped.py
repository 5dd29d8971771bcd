"""Groups of sites, chosen before the network is asked and then written at once (Zhang et al. 2025, LPD)."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ddjax import random, taps
from ddjax.categorical import categorical_where
from ddjax.groups import check_groups, free_sites
from ddjax.predictions import Prediction
from ddjax.processes import Masked
from ddjax.processes.masked import left_over
from ddjax.sites import Sites, put
from ddjax.solvers.base import Info, batched
from ddjax.solvers.key_values import keys_values, tapped
from ddjax.solvers.orders import Choice, Local, Order
from ddjax.solvers.unmask import highest, revealing
from ddjax.types import Denoise, Past, State


class InGroups(NamedTuple):
    """What is carried from step to step."""

    groups: Int[Array, "batch sites"]  # of the network's sites: the step that wrote each; -1: none yet
    steps: Int[Array, " batch"]  # made so far
    left: Float[Array, " batch"]  # how many sites the schedule leaves
    past: Past | None  # keys and values of what is written


@dataclasses.dataclass(frozen=True)
class Grouped:
    """Each step chooses a group of masks, asks the network about it behind the groups before, and writes it.

    For networks trained with `objectives.grouped`: the law is then that of the groups, product over steps of the
    product over a group of p(x^i | groups before), which is the network's any-order law where groups are single sites.
    How many a step writes is what `Unmask`'s `"expected"` says, of the network's sites (patches). Sites that show
    symbols at first are group 0; any that something else writes count as of the step before.

    process: `Masked`.
    order: one of `solvers.orders` that needs nothing of the network: `Local`, as in the paper, `RandomOrder`,
        `LeftToRight`. It sees the network's sites.
    keep: the keys and values of what is written: a step then runs the network only at the sites that the last step
        wrote, now clean, and at those of its own group. The same up to the rounding of the network's sums. The network
        is compiled for 8, 16, 32, ... and all sites; the largest group of the batch says which one runs. False: it runs
        on all sites, and is compiled once.
    Raises ValueError for other processes and orders; with keep as `KeyValues` does.
    """

    process: Masked
    order: Order = Local()  # noqa: RUF009 (frozen)
    keep: bool = True

    def __post_init__(self):
        check_groups(self.process, 1)
        if getattr(self.order, "looks", False):
            raise ValueError(
                f"groups are chosen before the network is asked, and {type(self.order).__name__} looks at what it "
                "says: take Local, RandomOrder or LeftToRight"
            )

    def begin(self, xt: State, cond: Any, denoise: Denoise, known: Any = None) -> InGroups:
        """Nothing written yet."""
        t, batch = jnp.ones(xt.shape[:1], jnp.result_type(float)), xt.shape[0]
        sites = Sites.of(denoise, xt, t, cond)
        past = None
        if self.keep:
            shapes = jax.eval_shape(lambda x: keys_values(denoise, x, t, cond), xt)
            past = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), shapes)
        left = free_sites(self.process, sites, xt).sum(axis=1).astype(t.dtype)
        return InGroups(jnp.full((batch, sites.count), -1, jnp.int32), jnp.zeros(batch, jnp.int32), left, past)

    def init(self, xt, cond=None):
        """Not to be had without the denoiser."""
        raise ValueError("Grouped must know the network's sites, which the denoiser tells: call begin")

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        """One call."""
        symbol_keys, order_keys = random.split(keys)
        sites = Sites.of(denoise, xt, batched(t, xt), cond)
        free = free_sites(self.process, sites, xt)
        new = ~free & (carry.groups < 0)
        groups = jnp.where(new, carry.steps[:, None], carry.groups)
        left = carry.left * self._kept(jnp.asarray(t), jnp.asarray(s))
        number = jnp.maximum(free.sum(axis=1) - left_over(left), 0)

        on_grid = free.reshape(-1, *sites.grid)
        choice = Choice(on_grid.astype(jnp.int32), None, None, ~on_grid, on_grid, number, s, denoise, cond)
        group = highest(self.order(order_keys, choice), number, on_grid).reshape(free.shape)
        # Masks behind the group are of a later one: nothing of it sees them.
        turns = jnp.where(free, carry.steps[:, None] + jnp.where(group, 1, 2), groups)
        prediction, past = self._asked(denoise, xt, batched(t, xt), cond, turns, group | new, carry.past)

        write = sites.spread(group) & (xt == self.process.mask)
        _, logits = revealing(self.process, prediction, xt, s, t)
        xs = jnp.where(write, categorical_where(symbol_keys, logits, write), xt)
        return xs, InGroups(groups, carry.steps + 1, left, past), Info(jnp.ones(xt.shape[0], jnp.int32))

    def _kept(self, t: Array, s: Array) -> Array:
        """The share of masks that stay."""
        before, after = self.process.schedule.sigma(t), self.process.schedule.sigma(s)
        return jnp.where(before > 0, after / jnp.where(before > 0, before, 1.0), 0.0)

    def _asked(
        self, denoise: Denoise, xt: State, t: Array, cond: Any, turns: Array, run: Array, past: Past | None
    ) -> tuple[Prediction, Past | None]:
        """What the network says where it is to run, and the keys and values with those from there."""
        view = {"groups": turns, "cond": cond}
        if past is None:
            return denoise(xt, t, view), None
        count = run.shape[1]
        first = jnp.argsort(~run, axis=1, stable=True)  # where it runs; then what fills up, beyond all sites
        first = jnp.where(jnp.arange(count) < run.sum(axis=1, keepdims=True), first, count)

        def at(size: int):
            def branch() -> tuple[Prediction, Past]:
                here = first[:, :size]
                with taps.record() as seen:
                    said = denoise(xt, t, view | {"past": past, "sites": here})
                fresh = zip(tapped(seen, denoise, xt), past, strict=True)
                return said, tuple(put(a, here, b, axis=2) for a, b in fresh)

            return branch

        sizes = [*itertools.takewhile(lambda size: size < count, (8 * 2**i for i in itertools.count())), count]
        which = jnp.searchsorted(jnp.asarray(sizes), run.sum(axis=1).max())
        return jax.lax.switch(which, [at(size) for size in sizes])
