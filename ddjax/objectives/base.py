"""The skeleton of every objective: draw a time and a noisy state, ask the network, reduce an error per site."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ddjax import random
from ddjax.predictions import Prediction, bind
from ddjax.types import Apply, Params, Rows, State, Time, per_example, sites

# (x0, prediction, xt, t) -> error per site
SiteLoss = Callable[[State, Prediction, State, Time], Array]


class Objective(Protocol):
    """What a train step differentiates."""

    def __call__(
        self,
        key: Key[Array, ""],
        apply: Apply,
        params: Params,
        x0: State,
        cond: Any = None,
        weights: Float[Array, " batch"] | None = None,
        rows: Rows | None = None,
        train: bool = True,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The weighted mean over examples of nats per site, and scalars worth logging."""


def noised(
    process: Any, kind: str, time_at: Callable[[Array], tuple[Time, Array]], site_loss: SiteLoss
) -> Objective:
    """An objective that noises each example once.

    time_at: maps uniforms on [0, 1) to times and to the weights of those times (an inverse distribution function, so that
        low-discrepancy uniforms give low-discrepancy times).
    site_loss: the error at each site.
    """

    def objective(key, apply, params, x0, cond=None, weights=None, rows=None, train=True):
        rows = Rows.all(x0.shape[0]) if rows is None else rows
        time_key, noise_key, network_key = jax.random.split(key, 3)
        t, time_weight = time_at(random.stratified(time_key, rows))
        xt = process.marginal(x0, t).sample(random.example_keys(noise_key, rows.index))
        rng = random.example_keys(network_key, rows.index) if train else None
        denoise = bind(apply, params, process, kind, rng=rng, train=train)
        error = per_example(site_loss(x0, denoise(xt, t, cond), xt, t)) * time_weight / sites(x0)
        loss = weighted_mean(error, weights)
        return loss, {"loss": loss}

    return objective


def weighted_mean(values: Float[Array, " batch"], weights: Float[Array, " batch"] | None) -> Float[Array, ""]:
    """Mean over examples, weighted where weights are given (0 leaves an example out)."""
    if weights is None:
        return values.mean()
    return jnp.sum(values * weights) / jnp.maximum(weights.sum(), 1e-12)
