"""Densities of noise levels: how often each is trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ddjax.processes import Gaussian
from ddjax.types import Time


@dataclasses.dataclass(frozen=True)
class Density:
    """Times as an inverse distribution function, which keeps low-discrepancy uniforms so, and their density.

    times: uniforms on [0, 1) -> times, increasing. Beyond `process.t_range` they are moved to its ends.
    pdf: log-SNR -> density of the log-SNR there, the ends left out of account.

    Under a schedule with a log-SNR for each site, log-SNRs are those of its `common` schedule.
    """

    times: Callable[[Array], Time]
    pdf: Callable[[Array], Array]

    def __call__(self, u: Array) -> Time:
        """The times."""
        return self.times(u)


def uniform_time(process: Gaussian) -> Density:
    """Uniform in t over `process.t_range`'s span of the clock."""
    low, high = process.t_range
    return _on_the_clock(process, lambda u: low + (high - low) * u, lambda t: jnp.full_like(t, 1.0 / (high - low)))


def uniform_log_snr(process: Gaussian) -> Density:
    """Uniform in log-SNR over `process.t_range`."""
    t_range = process.t_range

    def pdf(log_snr):
        high, low = _ends(process, log_snr)
        return jnp.full_like(log_snr, 1.0) / (high - low)

    return Density(lambda u: process.time_at(u, t_range)[0], pdf)


def log_normal_sigma(process: Gaussian, mean: float = -1.2, std: float = 1.2) -> Density:
    """log(sigma / alpha) ~ N(mean, std^2) (EDM's P_mean, P_std; Karras et al. 2022, table 1; EDM2: -0.4, 1)."""
    _check_scale(std)
    return _in_log_snr(
        process,
        lambda u: -2.0 * (mean + std * _normal_quantile(u)),
        lambda log_snr: jax.scipy.stats.norm.pdf(log_snr, -2.0 * mean, 2.0 * std),
    )


def logit_normal(process: Gaussian, mean: float = 0.0, std: float = 1.0) -> Density:
    """logit(t) ~ N(mean, std^2) (Stable Diffusion 3; Esser et al. 2024, section 3.1).

    Under `CondOT`, where logit(t) = log(sigma / alpha), it is `log_normal_sigma(mean, std)`.
    """
    _check_scale(std)
    return _on_the_clock(
        process,
        lambda u: jax.nn.sigmoid(mean + std * _normal_quantile(u)),
        lambda t: jax.scipy.stats.norm.pdf(jnp.log(t) - jnp.log1p(-t), mean, std) / (t * (1.0 - t)),
    )


def sech(process: Gaussian, shift: float = 0.0) -> Density:
    """Density 1 / cosh((lambda - shift) / 2) over `process.t_range`: that of the cosine schedule, whatever the process.

    lambda = shift - 2 log tan(angle), the angle uniform (Kingma & Gao 2023, "cosine"; the shift is
    that of Hoogeboom et al. 2023: 2 log(base / resolution)).
    """

    def angles(of):  # at the ends of the range
        return jnp.arctan(jnp.exp(-0.5 * (_ends(process, of) - shift)))

    def log_snr(u):
        start, stop = angles(u)
        return shift - 2.0 * jnp.log(jnp.tan(start + u * (stop - start)))

    def pdf(log_snr):
        start, stop = angles(log_snr)
        return 0.25 / ((stop - start) * jnp.cosh(0.5 * (log_snr - shift)))

    return _in_log_snr(process, log_snr, pdf)


def laplace(process: Gaussian, mean: float = 0.0, scale: float = 0.5) -> Density:
    """Density exp(-|lambda - mean| / scale) / (2 scale) (Hang et al. 2024, "Improved noise schedule")."""
    _check_scale(scale)

    def log_snr(u):
        centred = jnp.clip(u, 1e-6, 1.0 - 1e-6) - 0.5
        return mean + scale * jnp.sign(centred) * jnp.log1p(-2.0 * jnp.abs(centred))

    return _in_log_snr(process, log_snr, lambda value: jnp.exp(-jnp.abs(value - mean) / scale) / (2.0 * scale))


def binned(process: Gaussian, probabilities: Array) -> Density:
    """Given probabilities for equal parts of the log-SNRs of `process.t_range`, the cleanest first; uniform in each."""
    bins = probabilities.shape[0]
    cumulated = jnp.cumsum(probabilities)
    before = cumulated - probabilities

    def log_snr(u):
        high, low = _ends(process, u)
        i = jnp.minimum(jnp.searchsorted(cumulated, u, side="right"), bins - 1)
        place = (i + jnp.clip((u - before[i]) / probabilities[i], 0.0, 1.0)) / bins
        return high + place * (low - high)

    def pdf(value):
        high, low = _ends(process, value)
        place = jnp.floor((value - high) / (low - high) * bins).astype(jnp.int32)
        return probabilities[jnp.clip(place, 0, bins - 1)] * bins / (high - low)

    return _in_log_snr(process, log_snr, pdf)


def _ends(process: Gaussian, of: Array) -> Array:
    """The log-SNRs at the ends of the range, the greater first."""
    return process.schedule.common.log_snr(jnp.asarray(process.t_range, of.dtype))


def _in_log_snr(process: Gaussian, log_snr: Callable[[Array], Array], pdf: Callable[[Array], Array]) -> Density:
    t_range = process.t_range
    return Density(lambda u: jnp.clip(process.schedule.common.time(log_snr(u)), *t_range), pdf)


def _on_the_clock(process: Gaussian, times: Callable[[Array], Time], pdf: Callable[[Time], Array]) -> Density:
    """From a density of t: |d lambda / dt| times that of the log-SNR."""

    def of_log_snr(log_snr):
        t = process.schedule.common.time(log_snr)
        return -pdf(t) / process.schedule.common.log_snr_prime(t)

    t_range = process.t_range
    return Density(lambda u: jnp.clip(times(u), *t_range), of_log_snr)


def _normal_quantile(u: Array) -> Array:
    # Away from 0 and 1, whose quantiles are infinite.
    return jax.scipy.special.ndtri(jnp.clip(u, 1e-6, 1.0 - 1e-6))


def _check_scale(scale: float) -> None:
    if not scale > 0:
        raise ValueError(f"the width of a density must be positive, got {scale}")


__all__ = [
    "Density",
    "binned",
    "laplace",
    "log_normal_sigma",
    "logit_normal",
    "sech",
    "uniform_log_snr",
    "uniform_time",
]
