"""The skeleton of every objective: draw a time and a noisy state, ask the network, reduce an error per site."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ddjax import random
from ddjax.grids import step_at
from ddjax.predictions import Prediction, bind, check_sitewise
from ddjax.types import Apply, Keys, Params, Rows, SoftTokens, State, Time, left_broadcast, per_example, sites

# prediction -> error at each site, weighted as the integral over times asks
SiteErrors = Callable[[Prediction], Array]
# (uniforms on [0, 1), keys, x0) -> (xt, t, errors)
Draw = Callable[[Array, Keys, State], tuple[State | SoftTokens, Time, SiteErrors]]


class Objective(Protocol):
    """What a train step differentiates."""

    def __call__(
        self,
        key: Key[Array, ""],
        apply: Apply,
        params: Params,
        x0: State,
        cond: Any = None,
        weights: Float[Array, " batch"] | Float[Array, batch * sites] | None = None,
        rows: Rows | None = None,
        train: bool = True,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The weighted mean of nats per site, and scalars worth logging.

        weights: one per example, or one per site: a site of weight 0 (padding, a prompt) is shown clean and costs
            nothing, and the mean is over the weights given.
        """


def noised(process: Any, kind: str, draw: Draw, *, times_each: Callable[[State], int] | None = None) -> Objective:
    """An objective that noises each example once, at times spread evenly over the global batch.

    draw: the noisy states, their times, and what a prediction at them costs; `at_times` makes one from a density of
        times, `on_grid` one from a grid.
    times_each: how many times an example needs; `draw` is then given uniforms `(batch, times)`. Default: one.
    """

    def objective(key, apply, params, x0, cond=None, weights=None, rows=None, train=True):
        rows = Rows.all(x0.shape[0]) if rows is None else rows
        time_key, noise_key, network_key = jax.random.split(key, 3)
        u = random.stratified(time_key, rows) if times_each is None else random.latin(time_key, rows, times_each(x0))
        xt, t, errors = draw(u, random.example_keys(noise_key, rows.index), x0)
        known = site_weights(weights, x0)
        if known is not None:
            check_sitewise(process, "a weight for each site")
            xt = _shown_clean(known <= 0, xt, x0)
        rng = random.example_keys(network_key, rows.index) if train else None
        denoise = bind(apply, params, process, kind, rng=rng, train=train)
        error = errors(denoise(xt, t, cond))
        if known is not None:
            error = jnp.where(known > 0, known * error, 0.0)
            loss = error.sum() / jnp.maximum(known.sum(), 1e-12)
        else:
            loss = weighted_mean(per_example(error) / sites(x0), weights)
        return loss, {"loss": loss}

    return objective


def at_times(
    process: Any,
    time_at: Callable[[Array], tuple[Time, Array]],
    site_loss: Callable[[State, Prediction, State, Time], Array],
) -> Draw:
    """Corrupt by the process's marginal at times `time_at(u)`.

    time_at: maps uniforms on [0, 1) to times and to the weights of those times (an inverse distribution function, so
        that low-discrepancy uniforms give low-discrepancy times).
    site_loss: (x0, prediction, xt, t) -> the error at each site.
    """

    def draw(u, keys, x0):
        t, scale = time_at(u)
        xt = process.marginal(x0, t).sample(keys)
        return xt, t, lambda prediction: left_broadcast(scale, x0) * site_loss(x0, prediction, xt, t)

    return draw


def on_grid(process: Any, times: Float[Array, " steps+1"]) -> Draw:
    """Corrupt at the starts of the steps of a decreasing grid, one step drawn per example; errors are its `step_kl`."""
    steps = times.shape[0] - 1

    def draw(u, keys, x0):
        t, s = step_at(times, u)
        xt = process.marginal(x0, t).sample(keys)
        return xt, t, lambda prediction: steps * process.step_kl(x0, prediction, xt, s, t)

    return draw


def _shown_clean(where: Array, xt: State | SoftTokens, x0: State) -> State | SoftTokens:
    """The network's input with the clean symbols at some sites; soft tokens become certain there."""
    if isinstance(xt, SoftTokens):
        first = jnp.arange(xt.ids.shape[-1]) == 0
        where = where[..., None]
        return SoftTokens(jnp.where(where, x0[..., None], xt.ids), jnp.where(where, first, xt.weights))
    if xt.ndim > x0.ndim:
        return jnp.where(where[..., None], jax.nn.one_hot(x0, xt.shape[-1], dtype=xt.dtype), xt)
    return jnp.where(where, x0, xt)


def site_weights(weights: Array | None, x0: State) -> Array | None:
    """Weights given per site, `(batch, *sites)`; None where they are per example or absent."""
    if weights is None or weights.ndim == 1:
        return None
    if weights.shape != x0.shape:
        raise ValueError(
            f"weights have shape {weights.shape}; give one per example, {x0.shape[:1]}, or one per site, {x0.shape}"
        )
    return weights


def weighted_mean(values: Float[Array, " batch"], weights: Float[Array, " batch"] | None) -> Float[Array, ""]:
    """Mean over examples, weighted where weights are given (0 leaves an example out)."""
    if weights is None:
        return values.mean()
    return jnp.sum(values * weights) / jnp.maximum(weights.sum(), 1e-12)
