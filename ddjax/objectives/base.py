"""The skeleton of every objective: draw a time and a noisy state, ask the network, reduce an error per site."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ddjax import random
from ddjax.grids import step_at
from ddjax.predictions import Prediction, bind, check_sitewise
from ddjax.types import (
    Apply,
    Keys,
    Params,
    Rows,
    SoftTokens,
    State,
    Time,
    batch_size,
    left_broadcast,
    per_example,
    sites,
)

# prediction -> error at each site, weighted as the integral over times asks
SiteErrors = Callable[[Prediction], Array]
# (uniforms on [0, 1), keys, x0) -> (xt, t, errors)
Draw = Callable[[Array, Keys, State], tuple[State | SoftTokens, Time, SiteErrors]]

# (key, rows) -> one uniform on [0, 1) for each row, the same wherever the rows of a global batch are held
Uniforms = Callable[[Key[Array, ""], Rows], Float[Array, " batch"]]

TENTHS = 10  # in which losses are told by time


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
        """The weighted mean of nats per site, and what is worth logging: scalars, and `Reduction.by_time`.

        weights: one per example, or one per site: a site of weight 0 (padding, a prompt) is shown clean and costs
            nothing, and the mean is over the weights given.
        """


def noised(
    process: Any,
    kind: str,
    draw: Draw,
    *,
    times_each: Callable[[State], int] | None = None,
    uniforms: Uniforms | None = None,
    reduction: Callable[[Any, State], Any] | None = None,
) -> Objective:
    """An objective that noises each example once, at times spread evenly over the global batch.

    draw: the noisy states, their times, and what a prediction at them costs; `at_times` makes one from a density of
        times, `on_grid` one from a grid.
    times_each: how many times an example needs; `draw` is then given uniforms `(batch, times)`. Default: one.
    uniforms: how those of a global batch are spread, one for each example: `random.stratified` (default), `antithetic`
        or `independent`.
    reduction: (weights, x0) -> what makes one loss of the errors; default `Reduction.of`.
    """
    reduction = Reduction.of if reduction is None else reduction

    def objective(key, apply, params, x0, cond=None, weights=None, rows=None, train=True):
        rows, reduce = Rows.of(x0, rows), reduction(weights, x0)
        time_key, noise_key, network_key = jax.random.split(key, 3)
        spread = random.stratified if uniforms is None else uniforms
        u = spread(time_key, rows) if times_each is None else random.latin(time_key, rows, times_each(x0))
        xt, t, errors = draw(u, random.example_keys(noise_key, rows.index), x0)
        rng = random.example_keys(network_key, rows.index) if train else None
        denoise = bind(apply, params, process, kind, rng=rng, train=train)
        costs = errors(denoise(reduce.shown(process, xt), t, cond))
        loss = reduce(costs)
        timed = t.ndim == 1 or not hasattr(process, "points")  # points of a simplex are no times
        return loss, {"loss": loss, **(reduce.by_time(costs, t) if timed else {})}

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

        def errors(prediction):
            losses = site_loss(x0, prediction, xt, t)
            return jax.tree.map(lambda x, loss: left_broadcast(scale, x) * loss, x0, losses)

        return xt, t, errors

    return draw


def on_grid(process: Any, times: Float[Array, " steps+1"]) -> Draw:
    """Corrupt at the starts of the steps of a decreasing grid, one step drawn per example; errors are its `step_kl`."""
    steps = times.shape[0] - 1

    def draw(u, keys, x0):
        t, s = step_at(times, u)
        xt = process.marginal(x0, t).sample(keys)
        return xt, t, lambda prediction: jax.tree.map(lambda kl: steps * kl, process.step_kl(x0, prediction, xt, s, t))

    return draw


class Reduction(NamedTuple):
    """How errors at sites become one loss, by weights for examples, for sites, or none (`Objective`)."""

    x0: State
    examples: Float[Array, " batch"] | None = None
    sites: Float[Array, batch * sites] | None = None

    @classmethod
    def of(cls, weights: Array | None, x0: State) -> Reduction:
        """Raises ValueError for weights of another shape than the examples' or the sites'."""
        if weights is None or getattr(weights, "ndim", None) == 1:
            return cls(x0, examples=weights)
        given, shapes = (jax.tree.map(jnp.shape, tree) for tree in (weights, x0))
        if given != shapes:
            raise ValueError(
                f"weights have shape {given}; give one per example, ({batch_size(x0)},), or one per site, {shapes}"
            )
        return cls(x0, sites=weights)

    def shown(self, process: Any, xt: State | SoftTokens) -> State | SoftTokens:
        """The network's input: x_t, but the clean symbols at sites of weight 0; soft tokens become certain there.

        Raises ValueError where there are weights for sites and the process mixes them.
        """
        if self.sites is None:
            return xt
        check_sitewise(process, "a weight for each site")
        if isinstance(self.x0, Mapping):
            return {
                name: Reduction(x0, sites=self.sites[name]).shown(process[name], xt[name])
                for name, x0 in self.x0.items()
            }
        x0, known = self.x0, self.sites <= 0
        if isinstance(xt, SoftTokens):
            first = jnp.arange(xt.ids.shape[-1]) == 0
            known = known[..., None]
            return SoftTokens(jnp.where(known, x0[..., None], xt.ids), jnp.where(known, first, xt.weights))
        if xt.ndim > x0.ndim:
            return jnp.where(known[..., None], jax.nn.one_hot(x0, xt.shape[-1], dtype=xt.dtype), xt)
        return jnp.where(known, x0, xt)

    def totals(self, errors: Float[Array, batch * sites]) -> Float[Array, " batch"]:
        """Sums over the sites of each example, weighted where sites have weights: those of weight 0 cost nothing."""
        return per_example(errors if self.sites is None else jax.tree.map(_weighted, self.sites, errors))

    def mean(self, totals: Float[Array, " batch"]) -> Float[Array, ""]:
        """The weighted mean over sites."""
        if self.sites is None:
            return weighted_mean(totals / sites(self.x0), self.examples)
        return totals.sum() / jnp.maximum(per_example(self.sites).sum(), 1e-12)

    def __call__(self, errors: Float[Array, batch * sites]) -> Float[Array, ""]:
        """`mean` of `totals`."""
        return self.mean(self.totals(errors))

    def by_time(self, errors: Float[Array, batch * sites], t: Time) -> dict[str, Float[Array, "tenths 2"]]:
        """The metric "by_time": for each tenth of [0, 1] what the sites with times in it add to the mean, and their
        share of its weight. The quotient is their own mean. Both add up over microbatches, as a quotient would not.

        Nothing where times are neither one per example nor one per site.
        """
        if t.ndim != 1:
            shape = getattr(errors, "shape", ())
            if t.ndim != len(shape) or not all(a in (1, b) for a, b in zip(t.shape, shape, strict=True)):
                return {}
        if self.sites is None:
            weights = jax.tree.map(jnp.ones_like, errors)
        else:
            weights = jax.tree.map(lambda w: jnp.maximum(w, 0.0), self.sites)
        if self.examples is not None:
            weights = jax.tree.map(lambda w: w * left_broadcast(self.examples, w), weights)
        costs = jax.tree.map(_weighted, weights, errors)
        if t.ndim == 1:
            costs, weights = per_example(costs), per_example(weights)
        tenth = jnp.broadcast_to(jnp.clip(jnp.floor(t * TENTHS), 0, TENTHS - 1), costs.shape)

        def share(k):
            return jnp.stack([jnp.where(tenth == k, costs, 0.0).sum(), jnp.where(tenth == k, weights, 0.0).sum()])

        return {"by_time": jax.vmap(share)(jnp.arange(TENTHS)) / jnp.maximum(weights.sum(), 1e-12)}


def _weighted(weights: Array, errors: Array) -> Array:
    """The product, 0 where the weight is."""
    return jnp.where(weights > 0, weights * errors, 0.0)


def weighted_mean(values: Float[Array, " batch"], weights: Float[Array, " batch"] | None) -> Float[Array, ""]:
    """Mean over examples, weighted where weights are given (0 leaves an example out)."""
    if weights is None:
        return values.mean()
    return jnp.sum(values * weights) / jnp.maximum(weights.sum(), 1e-12)
