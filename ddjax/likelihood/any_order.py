"""The masked bound by numbers of masks instead of times: less noise, and no schedule."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Key

from ddjax import random
from ddjax.likelihood.bound import mean_and_error
from ddjax.processes import Masked
from ddjax.pytrees import as_pytree
from ddjax.types import Bound, Rows, State, left_broadcast, per_example, sites, time_dtype


def any_order(
    key: Key[Array, ""],
    denoise: Any,
    process: Masked,
    x0: State,
    cond: Any = None,
    *,
    num_draws: int = 16,
    known: Bool[Array, batch * sites] | None = None,
    rows: Rows | None = None,
) -> Bound:
    """An unbiased estimate of the masked bound over all of [0, 1] for each example, nats per example.

    k of the L sites are masked, k stratified over 1 ... L, and cost L / k times the cross-entropy (see
    `objectives.any_order`): the expected code length of an autoregressive model over random orders (Uria et al. 2014;
    Ou et al. 2024; LLaDA's estimator, Nie et al. 2025, eq. 6). The same expectation as `nelbo`, with less variance:
    compare the two `diffusion_error`. A network that is told the time is told where k / L sites are expected masked.

    num_draws: calls of the network per example. known: sites that are given (see `nelbo`); k then counts the others.
    Raises ValueError for a process other than `Masked`, fewer than one draw, or `known` of another shape than x0.
    """
    if not isinstance(process, Masked):
        raise ValueError(f"any_order is the masked process's bound, got {type(process).__name__}; use nelbo")
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1, got {num_draws}")
    if known is not None and known.shape != x0.shape:
        raise ValueError(f"known has shape {known.shape}; give one entry per site, {x0.shape}")
    rows = Rows.of(x0, rows)
    diffusion, error = _estimate(key, as_pytree(denoise), x0, cond, rows.index, known, process, num_draws)
    nothing = jnp.zeros_like(diffusion)
    return Bound(nothing, diffusion, nothing, error, t_range=(0.0, 1.0), dims=sites(x0))


@functools.partial(jax.jit, static_argnames=("process", "num_draws"))
def _estimate(key, denoise, x0, cond, rows, known, process, num_draws):
    batch, count, dtype = x0.shape[0], sites(x0), time_dtype(x0)
    order_keys, count_keys = random.split(random.example_keys(key, rows))
    known = jnp.zeros(x0.shape, bool) if known is None else known
    unknown = count - known.reshape(batch, -1).sum(-1)

    def one_draw(j):
        u = random.stratum(count_keys, j, num_draws, dtype)
        k = jnp.clip(jnp.floor(u * unknown).astype(jnp.int32) + 1, 1, jnp.maximum(unknown, 1))
        shuffled = jax.vmap(lambda key: jax.random.permutation(key, count))(random.fold_in(order_keys, j))
        # Ranks among the unknown sites, the known ones last.
        rank = jnp.argsort(jnp.argsort(shuffled + count * known.reshape(batch, -1), axis=-1), axis=-1)
        masked = (rank.reshape(x0.shape) < left_broadcast(k, x0)) & ~known
        xt = jnp.where(masked, process.mask, x0)
        t = process.schedule.time_of_sigma(k / jnp.maximum(unknown, 1))
        nats = process.masked_nats(x0, denoise(xt, t, cond), xt, t)
        return unknown / k * per_example(jnp.where(masked, nats, 0.0))

    return mean_and_error(one_draw, num_draws, batch, dtype)
