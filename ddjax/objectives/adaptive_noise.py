"""The bound of a process whose schedule depends on the data through a latent (MuLAN)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ddjax import random
from ddjax.grids import range_of
from ddjax.objectives.base import Objective, Reduction
from ddjax.objectives.leave_one_out import leave_one_out
from ddjax.objectives.whole_elbo import whole_elbo
from ddjax.predictions import check_kind
from ddjax.processes import AdaptiveGaussian
from ddjax.types import Rows

TERMS = ("diffusion", "prior", "reconstruction", "latent")


def adaptive_noise(
    process: AdaptiveGaussian,
    kind: str,
    *,
    draws: int = 1,
    t_range: tuple[float, float] | None = None,
    reconstruction: Callable[..., Any] | None = None,
) -> Objective:
    """KL(q(z | x0) || p(z)) and the whole bound given z ~ q(z | x0), nats per site (Sahoo et al. 2024, section 3).

    params is `{"network": ..., "process": process.parameters}`. The network is given
    `cond = {"z": ..., "cond": the batch's cond}`. Metrics: the bound's four terms.

    draws: of z, for each example. With one, the encoder's gradient goes straight through the draw, as the paper's does:
        it is biased. With more, at that many evaluations of the network, it is unbiased: each draw's bound is compared
        with the mean of the others' at the same times and noises (`leave_one_out`).
    t_range, reconstruction: as in `whole_elbo`.
    Where weights are given per site, the divergence counts as much as the heaviest site of its example.
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    check_kind(kind, process.kinds, process)
    ends = range_of(process, t_range)

    def objective(key, apply, params, x0, cond=None, weights=None, rows=None, train=True):
        rows, reduce = Rows.of(x0, rows), Reduction.of(weights, x0)
        learned = process.with_parameters(params["process"])
        law = learned.posterior(x0)
        latent_key, bound_key = jax.random.split(key)
        latent_keys = random.example_keys(latent_key, rows.index)
        known = reduce.sites

        def bound(z):
            """The three terms of each example, nats."""

            def one(x0, cond, z, known, index):
                whole = whole_elbo(learned.given(z[None]), kind, t_range=ends, reconstruction=reconstruction)
                shown = {"z": z[None], "cond": jax.tree.map(lambda v: v[None], cond)}
                weight = None if known is None else known[None]
                row = Rows(index[None], rows.total)  # its own draws, as in the batch
                _, terms = whole(bound_key, apply, params["network"], x0[None], shown, weight, row, train)
                total = x0.size if known is None else known.sum()
                return {name: total * terms[name] for name in TERMS[:3]}

            return jax.vmap(one)(x0, cond, z, known, rows.index)

        zs = jnp.stack([law.sample(random.fold_in(latent_keys, draw)) for draw in range(draws)])
        if draws == 1:
            terms, to_encoder = bound(law.straight_through(zs[0])), jnp.zeros(x0.shape[0], x0.dtype)
        else:
            every = jax.vmap(bound)(zs)
            terms = jax.tree.map(lambda values: values.mean(0), every)
            to_encoder = leave_one_out(sum(every.values()), jax.vmap(law.log_prob)(zs))
        terms["latent"] = law.kl_from_uniform()
        if known is not None:
            terms["latent"] *= known.reshape(known.shape[0], -1).max(-1)

        metrics = {name: reduce.mean(value) for name, value in terms.items()}
        loss = sum(metrics.values())
        return loss + reduce.mean(to_encoder), {"loss": loss, **metrics}

    return objective


__all__ = ["adaptive_noise"]
