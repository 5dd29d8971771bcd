"""The bound of networks that write in groups of sites: see `ddjax.groups`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Key

from ddjax import random
from ddjax.groups import check_groups, free_sites, in_random_groups, nats_in_groups
from ddjax.likelihood.bound import mean_and_error
from ddjax.processes import Masked
from ddjax.pytrees import as_pytree
from ddjax.sites import Sites
from ddjax.types import Bound, Rows, State, per_example, sites, time_dtype


def grouped(
    key: Key[Array, ""],
    denoise: Any,
    process: Masked,
    x0: State,
    cond: Any = None,
    *,
    steps: int,
    num_draws: int = 16,
    known: Bool[Array, batch * sites] | None = None,
    rows: Rows | None = None,
) -> Bound:
    """-log p(x0 | groups), nats per example, averaged over random groups: unbiased for a bound on -log p(x0).

    The law is that of `solvers.Grouped` with `RandomOrder` in `steps` steps of a uniform grid. Given the groups nothing
    is estimated: each draw is one pass of the network.

    known: sites that are given, and cost nothing. num_draws: of groups. `diffusion` holds all of it.
    Raises ValueError for another process than `Masked`, fewer than one step or draw, and `known` of a wrong shape.
    """
    check_groups(process, steps)
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1, got {num_draws}")
    if known is not None and known.shape != x0.shape:
        raise ValueError(f"known has shape {known.shape}; give one entry per site, {x0.shape}")
    index = Rows.of(x0, rows).index
    mean, error = _estimate(key, as_pytree(denoise), x0, cond, index, known, process, steps, num_draws)
    nothing = jnp.zeros_like(mean)
    return Bound(nothing, mean, nothing, error, t_range=(0.0, 1.0), dims=sites(x0))


@functools.partial(jax.jit, static_argnames=("process", "steps", "num_draws"))
def _estimate(key, denoise, x0, cond, rows, known, process, steps, num_draws):
    batch, keys = x0.shape[0], random.example_keys(key, rows)
    xt = jnp.full_like(x0, process.mask)
    xt = xt if known is None else jnp.where(known, x0, xt)
    places = Sites.of(denoise, xt, jnp.ones(batch), cond)
    free = free_sites(process, places, xt)

    def one_draw(j):
        groups = in_random_groups(process, random.fold_in(keys, j), free, jnp.full(batch, steps))
        nats = nats_in_groups(process, denoise, x0, xt, groups, cond)
        return per_example(jnp.where(xt == process.mask, nats, 0.0))

    return mean_and_error(one_draw, num_draws, batch, time_dtype(x0))
