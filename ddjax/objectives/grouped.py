"""The training of networks that write in groups of any sites (Zhang et al. 2025, LPD): see `ddjax.groups`."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ddjax import random
from ddjax.groups import check_groups, free_sites, in_random_groups, nats_in_groups
from ddjax.objectives.base import Objective, Reduction
from ddjax.predictions import bind
from ddjax.processes import Masked
from ddjax.sites import Sites
from ddjax.types import Rows


def grouped(process: Masked, kind: str = "posterior", *, numbers: Sequence[int] | None = None) -> Objective:
    """The cross-entropy of every site given all groups before its own, in one teacher-forced pass, nats per site.

    (Zhang et al. 2025, "Locality-aware parallel decoding for efficient autoregressive image generation", section 3.2.)
    Sites in random order are cut into the groups that so many steps of `solvers.Grouped` would write: the expected
    loss is `likelihood.grouped`'s, a bound on -log p(x_0). The network is one like `TextTransformer` or `DiT`, without
    time.

    numbers: of steps, of which one is drawn for each example. None: from 1 to the number of the network's sites n, the
        whole part of (n + 1)^u for a uniform u.
    Raises ValueError for another process than `Masked`, and no or bad numbers of steps.
    """
    numbers = None if numbers is None else tuple(numbers)
    check_groups(process, 1 if numbers is None else min(numbers, default=0))

    def objective(key, apply, params, x0, cond=None, weights=None, rows=None, train=True):
        rows, reduce = Rows.of(x0, rows), Reduction.of(weights, x0)
        step_key, order_key, network_key = jax.random.split(key, 3)
        rng = random.example_keys(network_key, rows.index) if train else None
        denoise = bind(apply, params, process, kind, rng=rng, train=train)
        xt = reduce.shown(process, jnp.full_like(x0, process.mask))
        sites = Sites.of(denoise, xt, jnp.ones(x0.shape[:1]), cond)
        steps = _steps(random.stratified(step_key, rows), numbers, sites.count)
        keys = random.example_keys(order_key, rows.index)
        groups = in_random_groups(process, keys, free_sites(process, sites, xt), steps)
        loss = reduce(nats_in_groups(process, denoise, x0, xt, groups, cond))
        return loss, {"loss": loss}

    return objective


def _steps(u: Array, numbers: tuple[int, ...] | None, count: int) -> Int[Array, " batch"]:
    """One of the numbers for each uniform on [0, 1)."""
    if numbers is None:
        return jnp.clip(jnp.floor((count + 1.0) ** u), 1, count).astype(jnp.int32)
    return jnp.asarray(numbers)[jnp.floor(u * len(numbers)).astype(jnp.int32)]
