"""The negative evidence lower bound, one evaluator for every process.

    -log p(x_0) <= KL(q(x_high | x_0) || prior) + integral of path_kl over [low, high] + E[-log p(x_0 | x_low)]

The three terms are always added; the range of times is part of the answer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from ddjax import random
from ddjax.grids import chain_grid, range_of, step_at
from ddjax.predictions import Prediction, check_bound, check_sitewise
from ddjax.pytrees import as_pytree
from ddjax.types import Bound, Rows, State, Time, batch_size, per_example, sites, time_dtype

# (process, x0, prediction, x_low, low) -> nats per site. Compared by value: `binned` and partials of it are fine.
Reconstruction = Callable[[Any, State, Prediction, State, Time], Array]


def nelbo(
    key: Key[Array, ""],
    denoise: Any,
    process: Any,
    x0: State,
    cond: Any = None,
    *,
    num_times: int = 16,
    t_range: tuple[float, float] | None = None,
    times: Float[Array, " steps+1"] | None = None,
    reconstruction: Reconstruction | None = None,
    prior: Callable[[State], Float[Array, " batch"]] | None = None,
    known: Bool[Array, batch * sites] | None = None,
    rows: Rows | None = None,
) -> Bound:
    """An unbiased estimate of the bound for each example, nats per example.

    x0: `(batch, *sites)`. num_times: stratified times per example; the network is called `num_times + 1` times.
    t_range: times integrated by the diffusion term, default `process.t_range`; any range gives a valid bound.
    reconstruction: the decoder at the low end; default the process's own (for Gaussian states a density; give
        `binned(levels)` or `discretised(levels)` for the probability of discrete levels, which is what bits per
        dimension need).
    times: a decreasing grid (default: that of a process that lives on one), in place of continuous time: the bound of
        the chain with these steps, which is the one ancestral sampling on this grid has; `num_times` of its
        steps are drawn for each example.
    prior: what sampling starts from at the high end, in place of the process's own: its log-probability of a whole
        state (a log-density for Gaussian states), nats per example. With a model of x_high fitted to data, the range
        may end early (Franzese et al. 2022, "How much is enough?"); samples then start there (`sample(init=)`).
        Its divergence from q(x_high | x0) is estimated by one draw.
    known: sites that are given (padding, a prompt): they are shown clean and cost nothing; the bound is then on
        -log p(the others | the known).
    Where the process has a latent (`AdaptiveGaussian`), one is drawn from q(z | x0) for each example, and KL(q(z | x0)
    || p(z)) counts as prior.
    Raises ValueError for a process without a bound, and where num_times < 1, the range is empty, `known` has another
    shape than x0, or comes with a prior (which would have to be conditioned on it).
    """
    check_bound(process)
    if num_times < 1:
        raise ValueError(f"num_times must be at least 1, got {num_times}")
    given, shapes = (jax.tree.map(jnp.shape, tree) for tree in (known, x0))
    if known is not None and given != shapes:
        raise ValueError(f"known has shape {given}; give one entry per site, {shapes}")
    if known is not None:
        check_sitewise(process, "a bound given known sites")
        if hasattr(process, "latents"):
            raise ValueError(f"the latent of {type(process).__name__} is drawn from all sites: none can be known")
    if known is not None and prior is not None:
        raise ValueError("a prior of whole states cannot be conditioned on known sites: leave out one of the two")
    times = chain_grid(process, times, t_range)
    if times is not None:
        t_range = times[-1], times[0]
    low, high = range_of(process, t_range)
    parts = process.processes.values() if process.state == "product" else [process]
    clean = [
        p.schedule for p in parts if times is not None and p.state == "gaussian" and p.schedule.sigma(times[-1]) == 0
    ]
    if clean:
        raise ValueError(
            f"times end at t={low:g}, where {clean[0]!r} has no noise and the last step of a Gaussian chain "
            f"costs infinitely many nats; end them where there is some (process.t_range begins at "
            f"{process.t_range[0]:g}): the decoder does the rest"
        )
    rows = Rows.of(x0, rows)
    prior = None if prior is None else as_pytree(prior)
    terms = _terms(
        key, as_pytree(denoise), x0, cond, rows.index, times, known, prior,
        process, num_times, (low, high), reconstruction,
    )  # fmt: skip
    return Bound(*terms, t_range=(low, high), dims=sites(x0))


@functools.partial(jax.jit, static_argnames=("process", "num_times", "t_range", "reconstruction"))
def _terms(key, denoise, x0, cond, rows, times, known, prior, process, num_times, t_range, reconstruction):
    batch, dtype, divergence = batch_size(x0), time_dtype(x0), 0.0
    if hasattr(process, "latents"):  # one is drawn, and all else is given it
        key, latent_key = jax.random.split(key)
        law = process.posterior(x0)
        z, divergence = law.sample(random.example_keys(latent_key, rows)), law.kl_from_uniform()
        process, cond = process.given(z), {"z": z, "cond": cond}
    time_keys, noise_keys, low_keys, high_keys = random.split(random.example_keys(key, rows), 4)
    low, high = (jnp.full((batch,), end, dtype) for end in t_range)

    def show(xt):
        return xt if known is None else jax.tree.map(jnp.where, known, x0, xt)

    def total(terms):
        if known is not None:
            terms = jax.tree.map(lambda k, term: jnp.where(k, 0.0, term), known, terms)
        return per_example(terms)

    def one_time(j):
        u = random.stratum(time_keys, j, num_times, dtype)
        if times is None:
            t, weight = process.time_at(u, t_range)
        else:
            (t, s), weight = step_at(times, u), times.shape[0] - 1
        xt = show(process.marginal(x0, t).sample(random.fold_in(noise_keys, j)))
        prediction = denoise(xt, t, cond)
        kl = process.path_kl(x0, prediction, xt, t) if times is None else process.step_kl(x0, prediction, xt, s, t)
        return weight * total(kl)

    diffusion, error = mean_and_error(one_time, num_times, batch, dtype)
    x_low = show(process.marginal(x0, low).sample(low_keys))
    prediction = denoise(x_low, low, cond)
    if reconstruction is None:
        ends = process.reconstruction(x0, prediction, x_low, low)
    else:
        ends = reconstruction(process, x0, prediction, x_low, low)
    if prior is None:
        start = total(process.prior_kl(x0, high))
    else:
        marginal = process.marginal(x0, high)
        x_high = marginal.sample(high_keys)
        start = per_example(marginal.log_prob(x_high)) - prior(x_high)
    return start + divergence, diffusion, total(ends), error


def mean_and_error(
    draw: Callable[[Array], Array], num: int, shape: int | tuple[int, ...], dtype: Any
) -> tuple[Array, Array]:
    """Mean and standard error, entry by entry, of `draw(j)` of this shape, j < num, one after the other."""

    def step(state, j):
        mean, spread = state  # Welford's recurrence: no difference of large squares
        value = draw(j)
        change = (value - mean) / (j + 1)
        return (mean + change, spread + (value - mean) * (value - mean - change)), None

    (mean, spread), _ = jax.lax.scan(step, (jnp.zeros(shape, dtype),) * 2, jnp.arange(num))
    return mean, jnp.sqrt(spread / (num * (num - 1))) if num > 1 else jnp.full(shape, jnp.inf, dtype)
