"""Decoders for Gaussian states whose sites take a few known values: the probability of a level given x_low.

With one of them the bound is on a probability, so bits per dimension need no offset.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddjax.likelihood.bound import Reconstruction
from ddjax.predictions import check_sitewise
from ddjax.processes.categorical import cross_entropy
from ddjax.processes.gaussian import gaussian_of
from ddjax.types import left_broadcast


def binned(levels: Sequence[float] | Float[Array, " levels"]) -> Reconstruction:
    """p(v | x_low) ∝ q(x_low | v), N(x_low; alpha v, sigma^2) (Kingma et al. 2021, "VDM", eq. 30).

    levels: the values, in the units of x0 (for 8-bit images in [-1, 1]: `linspace(-1, 1, 256)`). The network is not
    asked: all that the decoder knows, x_low shows. Raises ValueError for fewer than two levels.
    """
    return _Binned(_checked(levels, "binned"))


def discretised(levels: Sequence[float] | Float[Array, " levels"], std: float | None = None) -> Reconstruction:
    """The mass that N(x0_hat, std^2) has on each level's bin (Ho et al. 2020, "DDPM", eq. 13).

    Bins end midway between levels; the outermost are open. levels: as for `binned`, increasing. std: in their units;
    default sigma / alpha at the low end, which is the width that x_low leaves (DDPM's own choice, sqrt(beta_1), is
    that times alpha). Raises ValueError for fewer than two levels, levels that do not increase, or a std not positive.
    """
    values = _checked(levels, "discretised")
    if any(a >= b for a, b in itertools.pairwise(values)):
        raise ValueError(f"discretised needs increasing levels, got {values}")
    if std is not None and not std > 0:
        raise ValueError(f"std must be positive, got {std}")
    return _Discretised(values, std)


def _checked(levels, name: str) -> tuple[float, ...]:
    values = tuple(float(v) for v in levels)
    if len(values) < 2:
        raise ValueError(f"{name} needs at least two levels, got {values}")
    return values


def _nearest(x0: Array, levels: Array) -> Array:
    return jnp.argmin(jnp.abs(x0[..., None] - levels), axis=-1)


@dataclasses.dataclass(frozen=True)
class _Binned:
    """See `binned`; compares by value so that jit caches on it."""

    levels: tuple[float, ...]

    def __call__(self, process, x0, prediction, x_low, low):
        """-log p(level of x0 | x_low), nats per site."""
        check_sitewise(process, "a binned decoder")
        process = getattr(process, "base", process)  # a learned transform does next to nothing there
        levels = jnp.asarray(self.levels, x0.dtype)

        def log_q(level):
            return process.marginal(jnp.full_like(x0, level), low).log_prob(x_low)

        return cross_entropy(jax.vmap(log_q, out_axes=-1)(levels), _nearest(x0, levels))


@dataclasses.dataclass(frozen=True)
class _Discretised:
    """See `discretised`."""

    levels: tuple[float, ...]
    std: float | None

    def __call__(self, process, x0, prediction, x_low, low):
        """-log p(level of x0 | x0_hat), nats per site."""
        t = left_broadcast(low, x0)
        schedule = (gaussian_of(process) or process).schedule
        std = schedule.sigma(t) / schedule.alpha(t) if self.std is None else self.std
        levels = jnp.asarray(self.levels, x0.dtype)
        which, middles = _nearest(x0, levels), 0.5 * (levels[1:] + levels[:-1])
        mean = process.convert(prediction, "x0", x_low, low).value
        last = len(self.levels) - 1
        lower = (middles[jnp.maximum(which - 1, 0)] - mean) / std
        upper = (middles[jnp.minimum(which, last - 1)] - mean) / std
        # Both ends of a closed bin in the left tail, where the distribution function keeps its digits.
        flip = lower + upper > 0
        a, b = jnp.where(flip, -upper, lower), jnp.where(flip, -lower, upper)
        log_a, log_b = jax.scipy.special.log_ndtr(a), jax.scipy.special.log_ndtr(b)
        # Where the bin is open, its two ends are one: no logarithm of 0 then, nor a gradient of it.
        closed = log_b + jnp.log(-jnp.expm1(jnp.where((which == 0) | (which == last), -1.0, log_a - log_b)))
        below, above = jax.scipy.special.log_ndtr(upper), jax.scipy.special.log_ndtr(-lower)
        return -jnp.where(which == 0, below, jnp.where(which == last, above, closed))
