"""Weights of particles, in logarithms: carried from step to step, and reset only by a resampling that accounts for it.

A law p(x) w(x) / Z known by draws x_n ~ p has the estimates sum_n W_n f(x_n), W = softmax(log w), of its means, and
mean_n w_n of Z, which is unbiased. Resampling puts W_n N copies of x_n in the place of one, on average, and gives each
the weight mean_n w_n: Z's estimate stays what it was. (Doucet & Johansen 2011, "A tutorial on particle filtering and
smoothing", sections 3.3 to 3.5.)

Everything is batched: each example has its own `particles`, on axis 1, and its own key.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ddjax import random
from ddjax.types import Keys

LogWeights = Float[Array, "batch particles"]


def log_mean(log_weights: LogWeights) -> Float[Array, " batch"]:
    """Log of the mean weight, the estimate of log Z."""
    return jax.nn.logsumexp(log_weights, axis=-1) - math.log(log_weights.shape[-1])


def effective_sample_size(log_weights: LogWeights) -> Float[Array, " batch"]:
    """1 / sum W^2: all particles for equal weights, 1 where one has them all (Kong 1992)."""
    return 1.0 / jnp.sum(jax.nn.softmax(log_weights, axis=-1) ** 2, axis=-1)


def systematic(keys: Keys, log_weights: LogWeights) -> Int[Array, "batch particles"]:
    """Whose copy each new particle is: ancestor n has N W_n copies on average, and never one more or less than that.

    One uniform for each example, at N evenly spaced heights of the distribution function (Carpenter, Clifford &
    Fearnhead 1999). A particle of weight 0 has no copies.
    """
    num = log_weights.shape[-1]
    # Divided by their last: the distribution function ends at 1 whatever rounding has done.
    heights = jnp.cumsum(jax.nn.softmax(log_weights, axis=-1), axis=-1)
    heights = heights / heights[..., -1:]
    u = (random.uniform(keys, dtype=heights.dtype)[:, None] + jnp.arange(num)) / num
    u = jnp.minimum(u, 1.0 - jnp.finfo(heights.dtype).epsneg)  # rounding must not reach 1
    return jax.vmap(lambda h, v: jnp.searchsorted(h, v, side="right"))(heights, u).astype(jnp.int32)


def resample(keys: Keys, particles: Any, log_weights: LogWeights, *, threshold: float = 0.5) -> tuple[Any, LogWeights]:
    """Resample the examples whose effective sample size is below `threshold` of their particles; keep the others.

    particles: arrays `(batch, particles, ...)`, a pytree of them. Those that are kept keep their weights, for the steps
    to come multiply them. Weights of all -inf are an error of the caller's: nothing is then alive.
    threshold: in [0, 1]; 0 never resamples, 1 always does (but where all weights are equal, which it would not change).
    Raises ValueError for another threshold, or particles of another shape than the weights.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold is a share of the particles, in [0, 1], got {threshold}")
    for leaf in jax.tree.leaves(particles):
        if leaf.shape[:2] != log_weights.shape:
            raise ValueError(f"particles have shape {leaf.shape}; their first two axes must be {log_weights.shape}")
    batch, num = log_weights.shape
    few = effective_sample_size(log_weights) < threshold * num
    ancestors = jnp.where(few[:, None], systematic(keys, log_weights), jnp.arange(num, dtype=jnp.int32))
    chosen = jax.tree.map(lambda x: x[jnp.arange(batch)[:, None], ancestors], particles)
    return chosen, jnp.where(few[:, None], log_mean(log_weights)[:, None], log_weights)


__all__ = ["effective_sample_size", "log_mean", "resample", "systematic"]
