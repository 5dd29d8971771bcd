"""The skeleton of every objective: draw a time and a noisy state, ask the network, reduce an error per site."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ddjax import random
from ddjax.predictions import Prediction, bind
from ddjax.types import Apply, Keys, Params, Rows, State, Time, per_example, sites

# (x0, prediction, xt, t) -> error per site
SiteLoss = Callable[[State, Prediction, State, Time], Array]
# (uniforms on [0, 1), keys, x0) -> (xt, t, weight of each example)
Corrupt = Callable[[Array, Keys, State], tuple[State, Time, Array]]


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


def noised(process: Any, kind: str, corrupt: Corrupt, site_loss: SiteLoss) -> Objective:
    """An objective that noises each example once, at times spread evenly over the global batch.

    corrupt: draws the noisy states; `at_times` makes one from a density of times.
    site_loss: the error at each site.
    """

    def objective(key, apply, params, x0, cond=None, weights=None, rows=None, train=True):
        rows = Rows.all(x0.shape[0]) if rows is None else rows
        time_key, noise_key, network_key = jax.random.split(key, 3)
        u = random.stratified(time_key, rows)
        xt, t, scale = corrupt(u, random.example_keys(noise_key, rows.index), x0)
        rng = random.example_keys(network_key, rows.index) if train else None
        denoise = bind(apply, params, process, kind, rng=rng, train=train)
        error = per_example(site_loss(x0, denoise(xt, t, cond), xt, t)) * scale / sites(x0)
        loss = weighted_mean(error, weights)
        return loss, {"loss": loss}

    return objective


def at_times(process: Any, time_at: Callable[[Array], tuple[Time, Array]]) -> Corrupt:
    """Corrupt by the process's marginal at times `time_at(u)`.

    time_at: maps uniforms on [0, 1) to times and to the weights of those times (an inverse distribution function, so
        that low-discrepancy uniforms give low-discrepancy times).
    """

    def corrupt(u, keys, x0):
        t, scale = time_at(u)
        return process.marginal(x0, t).sample(keys), t, scale

    return corrupt


def weighted_mean(values: Float[Array, " batch"], weights: Float[Array, " batch"] | None) -> Float[Array, ""]:
    """Mean over examples, weighted where weights are given (0 leaves an example out)."""
    if weights is None:
        return values.mean()
    return jnp.sum(values * weights) / jnp.maximum(weights.sum(), 1e-12)
