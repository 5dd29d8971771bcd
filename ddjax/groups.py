"""Groups of sites that are written one after the other: log p(x_0 | groups) in one pass (Zhang et al. 2025, LPD).

A network is shown masks, which query the groups' sites, and beside them the clean state; a query sees its own group's
queries and the clean sites of the groups before it (`denoisers.views.View`). So

    log p(x_0 | groups) = sum_k sum_{i in group k} log p(x_0^i | groups before k)

exactly, whatever the groups are; with random ones its mean is a bound on log p(x_0). Groups are of the network's sites:
all tokens of a patch are written at once. Group 0 is known.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from ddjax import random
from ddjax.processes import Masked
from ddjax.processes.masked import left_over
from ddjax.processes.mixture import PerSite, Tokens
from ddjax.sites import Sites
from ddjax.types import Denoise, Keys


def check_groups(process: object, steps: int) -> None:
    """Raise ValueError where there are no masks to query sites with, or no steps."""
    if not isinstance(process, Masked):
        raise ValueError(f"groups are of masks: the process must be processes.Masked, got {type(process).__name__}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")


def free_sites(process: Masked, sites: Sites, xt: Tokens) -> Bool[Array, "batch count"]:
    """Which of the network's sites have a mask."""
    return (sites.gathered(xt) == process.mask).any(axis=-1)


def in_random_groups(
    process: Masked, keys: Keys, free: Bool[Array, "batch count"], steps: Int[Array, " batch"]
) -> Int[Array, "batch count"]:
    """For each site the step that writes it in random order, of so many steps over a uniform grid; 0 where known.

    As many sites a step as `solvers.Grouped` writes, which may be none. free: false where known. steps: from 1 on; more
    than there are sites count as so many.
    """
    most = free.shape[1]
    steps = jnp.minimum(steps, most)[:, None]
    ends = jnp.minimum(jnp.arange(1, most + 1) / steps, 1.0)  # behind the last step nothing changes
    number = free.sum(axis=1, keepdims=True)
    share = process.schedule.sigma(1.0 - ends) / process.schedule.sigma(jnp.ones(()))
    written = number - left_over(number * share)
    shuffled = random.uniform(keys, (most,)) + free  # known ones first
    rank = jnp.argsort(jnp.argsort(shuffled, axis=1), axis=1) - (most - number)
    step = 1 + jax.vmap(lambda written, rank: jnp.searchsorted(written, rank, side="right"))(written, rank)
    return jnp.where(free, step, 0).astype(jnp.int32)


def nats_in_groups(
    process: Masked, denoise: Denoise, x0: Tokens, xt: Tokens, groups: Int[Array, "batch count"], cond: object = None
) -> PerSite:
    """-log p(x_0^i | groups before its own), nats for each site of the state.

    xt: masks, and what is known.
    """
    t = jnp.ones(x0.shape[:1])
    return process.masked_nats(x0, denoise(xt, t, {"groups": groups, "clean": x0, "cond": cond}), xt, t)
