"""Weightings: what an error costs at each noise level, as functions of the log-SNR lambda.

A weighting belongs to an error space. Squared errors in two spaces differ by a factor of the noise level alone:

    |noise error|^2 = exp(lambda) |x0 error|^2 = sigma^2 |score error|^2 = |edm error|^2 d^2 / (exp(-lambda) + d^2)
                    = alpha^2 |v error|^2 (variance preserving) = (1 - t)^2 |velocity error|^2 (CondOT)

Weightings made for a density of times (DDPM's, EDM's) multiply the error at the times drawn. Those made for the
integral over log-SNR (Kingma & Gao 2023, "VDM++") are used with `gaussian(..., measure="log_snr")`, which
divides by the density: 1/2 of the integral of w(lambda) |noise error|^2, with w = 1 the bound in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

Weighting = Callable[[Array], Array]  # log-SNR -> weight


def unit(log_snr: Array) -> Array:
    """1 at every noise level: in the noise, DDPM's simple loss (Ho et al. 2020, eq. 14), or the bound over log-SNR."""
    return jnp.ones_like(log_snr)


def snr() -> Weighting:
    """SNR, of the x0 error: the simple loss again (Salimans & Ho 2022, section 4)."""
    return jnp.exp


def truncated_snr() -> Weighting:
    """max(SNR, 1), of the x0 error: the larger of x0's and the noise's (Salimans & Ho 2022, section 4)."""
    return lambda log_snr: jnp.exp(jnp.maximum(log_snr, 0.0))


def min_snr(gamma: float = 5.0) -> Weighting:
    """min(1, gamma / SNR), of the noise error (Hang et al. 2023, eq. 8)."""
    return lambda log_snr: jnp.minimum(1.0, gamma * jnp.exp(-log_snr))


def soft_min_snr(gamma: float = 4.0) -> Weighting:
    """1 / (1 + SNR / gamma), of the noise error: `min_snr` without its corner (Crowson et al. 2024, HDiT).

    1 / (sigma^2 + d^2) of the x0 error under EDM's process, for data of standard deviation d and gamma = 1 / d^2
    (k-diffusion's "soft-min-snr").
    """
    _positive(gamma=gamma)
    return lambda log_snr: gamma / (jnp.exp(log_snr) + gamma)


def p2(gamma: float = 1.0, k: float = 1.0) -> Weighting:
    """(k + SNR)^-gamma, of the noise error (Choi et al. 2022; gamma 0.5 or 1, k = 1)."""
    _positive(k=k)
    return lambda log_snr: (k + jnp.exp(log_snr)) ** -gamma


def edm(process: Any) -> Weighting:
    """(sigma^2 + d^2) / (sigma d)^2, of the x0 error: 1 for EDM's own F (Karras et al. 2022, table 1).

    sigma stands for the process's sigma / alpha, d for its `data_std`.
    """
    return lambda log_snr: jnp.exp(log_snr) + process.data_std**-2


def likelihood(process: Any) -> Weighting:
    """g(t)^2 / 2, of the score error, for times uniform on the clock: the bound (Song et al. 2021b, theorem 1).

    g is the process's diffusion coefficient. The mean over `uniform_time` times the length of `t_range` is the bound's
    diffusion term, nats per site. Raises ValueError where sites have log-SNRs, and so weights, of their own.
    """
    if process.schedule.common is not process.schedule:
        raise ValueError(f"likelihood() is one weight for all sites, but {process.schedule!r} has one each; use elbo")
    return lambda log_snr: 0.5 * process.sde(process.schedule.time(log_snr))[1]


def sigmoid(bias: float = 2.0) -> Weighting:
    """The logistic of bias - lambda, of the noise error over log-SNR (Kingma & Gao 2023; Hoogeboom et al. 2024, SiD2).

    Decreasing in lambda, so that the loss is the bound of data with Gaussian noise added. A greater
    bias reaches cleaner levels.
    """
    return lambda log_snr: jax.nn.sigmoid(bias - log_snr)


def flow_matching() -> Weighting:
    """exp(-lambda / 2), of the noise error over log-SNR: flow matching's loss under any process, with any density.

    That is the velocity error under `CondOT` with times uniform on the clock (Kingma & Gao 2023, "FM-OT").
    """
    return lambda log_snr: jnp.exp(-0.5 * log_snr)


def _positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")


__all__ = [
    "Weighting",
    "edm",
    "flow_matching",
    "likelihood",
    "min_snr",
    "p2",
    "sigmoid",
    "snr",
    "soft_min_snr",
    "truncated_snr",
    "unit",
]
