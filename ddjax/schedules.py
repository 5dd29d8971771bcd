"""Schedules: how much of the data is left at time t.

A schedule is two functions of the clock t in [0, 1] (0 data, 1 noise), `alpha(t)` and `sigma(t)`, with closed-form
derivatives, and the log signal-to-noise ratio, which is the coordinate in which everything else is written.

    Gaussian:     x_t = alpha x_0 + sigma noise        log_snr = 2 log(alpha / sigma)
    categorical:  q(x_t | x_0) = alpha e_{x_0} + sigma pi, sigma = 1 - alpha      log_snr = log(alpha / sigma)

All functions follow the dtype of t and are defined at both ends (`log_snr` is infinite where alpha or sigma is 0).
"""

from __future__ import annotations

import abc
import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Times = Float[Array, "*time"]


def _require(condition: bool, schedule: object, message: str) -> None:
    if not condition:
        raise ValueError(f"{schedule!r}: {message}")


class Schedule(abc.ABC):
    """alpha, sigma, their derivatives, the log-SNR and its inverse."""

    @abc.abstractmethod
    def alpha(self, t: Times) -> Times:
        """Weight of the data, decreasing in t."""

    @abc.abstractmethod
    def sigma(self, t: Times) -> Times:
        """Weight of the noise, increasing in t."""

    @abc.abstractmethod
    def alpha_prime(self, t: Times) -> Times:
        """D alpha / dt."""

    @abc.abstractmethod
    def sigma_prime(self, t: Times) -> Times:
        """D sigma / dt."""

    @abc.abstractmethod
    def log_snr(self, t: Times) -> Times:
        """Log signal-to-noise ratio, decreasing in t."""

    @abc.abstractmethod
    def log_snr_prime(self, t: Times) -> Times:
        """D log_snr / dt, negative."""

    @abc.abstractmethod
    def time(self, log_snr: Times) -> Times:
        """The time at which the log-SNR takes this value; inverse of `log_snr`."""


class Survival(Schedule):
    """A schedule for categorical states: alpha is the probability that a symbol has survived to time t."""

    @abc.abstractmethod
    def time_of_sigma(self, sigma: Times) -> Times:
        """The time at which a fraction `sigma` of the symbols is lost."""

    def alpha_prime(self, t):
        """D alpha / dt."""
        return -self.sigma_prime(t)

    def log_snr(self, t):
        """Log odds of survival, log(alpha / (1 - alpha))."""
        return jnp.log(self.alpha(t)) - jnp.log(self.sigma(t))

    def log_snr_prime(self, t):
        """D log_snr / dt = -sigma' / (alpha sigma)."""
        return -self.sigma_prime(t) / (self.alpha(t) * self.sigma(t))

    def time(self, log_snr):
        """Inverse of `log_snr`."""
        return self.time_of_sigma(jax.nn.sigmoid(-jnp.asarray(log_snr)))


@dataclasses.dataclass(frozen=True)
class Polynomial(Survival):
    """alpha = 1 - t**power (MD4, Shi et al. 2024, section 4)."""

    power: float = 1.0

    def __post_init__(self):
        _require(self.power > 0, self, "power must be positive")

    def alpha(self, t):
        """1 - t**power, accurate as t -> 1."""
        # log(0) = -inf at t = 0 gives alpha = 1: -expm1(-inf) = 1.
        return -jnp.expm1(self.power * jnp.log(t))

    def sigma(self, t):
        """t**power."""
        return t**self.power

    def sigma_prime(self, t):
        """Power * t**(power - 1)."""
        return self.power * t ** (self.power - 1.0)

    def log_snr_prime(self, t):
        """-power / (t alpha), also where sigma = sigma' = 0."""
        return -self.power / (t * jnp.abs(self.alpha(t)))  # alpha(1) is -0

    def time_of_sigma(self, sigma):
        """sigma**(1 / power)."""
        return sigma ** (1.0 / self.power)


@dataclasses.dataclass(frozen=True)
class LogLinear(Survival):
    """alpha = 1 - (1 - eps) t, so that -log alpha = -log1p(-(1 - eps) t) (SEDD, MDLM: eps = 1e-3).

    With eps > 0 a symbol survives to t = 1 with probability eps; the prior and its KL account for it.
    """

    eps: float = 1e-3

    def __post_init__(self):
        _require(0 <= self.eps < 1, self, "eps must lie in [0, 1)")

    def alpha(self, t):
        """1 - (1 - eps) t, accurate as t -> 1."""
        return (1.0 - t) + self.eps * t

    def sigma(self, t):
        """(1 - eps) t."""
        return (1.0 - self.eps) * t

    def sigma_prime(self, t):
        """1 - eps."""
        return jnp.full_like(t, 1.0 - self.eps)

    def time_of_sigma(self, sigma):
        """Sigma / (1 - eps)."""
        return sigma / (1.0 - self.eps)


@dataclasses.dataclass(frozen=True)
class Linear(LogLinear):
    """alpha = 1 - t. The default: a fraction t of the symbols is lost at time t."""

    eps: float = dataclasses.field(default=0.0, init=False)


@dataclasses.dataclass(frozen=True)
class Cosine(Survival):
    """alpha = 1 - cos(pi/2 (1 - t)) (MD4's cosine schedule, which spends longer at few masks)."""

    def alpha(self, t):
        """1 - cos(pi/2 (1 - t)) = 2 sin^2(pi/4 (1 - t)), without cancellation."""
        return 2.0 * jnp.sin(0.25 * math.pi * (1.0 - t)) ** 2

    def sigma(self, t):
        """sin(pi t / 2)."""
        return jnp.sin(0.5 * math.pi * t)

    def sigma_prime(self, t):
        """pi/2 cos(pi t / 2)."""
        return 0.5 * math.pi * jnp.sin(0.5 * math.pi * (1.0 - t))

    def log_snr_prime(self, t):
        """-pi/2 cot(pi/4 (1 - t)) / sigma, also where alpha = sigma' = 0."""
        return -0.5 * math.pi / (jnp.tan(0.25 * math.pi * (1.0 - t)) * self.sigma(t))

    def time_of_sigma(self, sigma):
        """2/pi arcsin(sigma)."""
        return 2.0 / math.pi * jnp.arcsin(sigma)


class Gaussian(Schedule):
    """A schedule for Gaussian states. Subclasses give alpha, sigma, their derivatives and the inverse."""

    def log_snr(self, t):
        """2 log(alpha / sigma)."""
        return 2.0 * (jnp.log(self.alpha(t)) - jnp.log(self.sigma(t)))

    def log_snr_prime(self, t):
        """2 (alpha' / alpha - sigma' / sigma)."""
        return 2.0 * (self.alpha_prime(t) / self.alpha(t) - self.sigma_prime(t) / self.sigma(t))


@dataclasses.dataclass(frozen=True)
class VPLinear(Gaussian):
    """The variance-preserving SDE with beta(t) linear in t (Song et al. 2021, eq. 32; DDPM's limit).

    log alpha = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2,   sigma^2 = 1 - alpha^2.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self):
        _require(0 < self.beta_min < self.beta_max, self, "needs 0 < beta_min < beta_max")

    def _log_alpha(self, t):
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def _beta(self, t):
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def alpha(self, t):
        """exp(-1/2 of the integral of beta)."""
        return jnp.exp(self._log_alpha(t))

    def sigma(self, t):
        """sqrt(1 - alpha^2), accurate as t -> 0."""
        return jnp.sqrt(-jnp.expm1(2.0 * self._log_alpha(t)))

    def alpha_prime(self, t):
        """-beta alpha / 2."""
        return -0.5 * self._beta(t) * self.alpha(t)

    def sigma_prime(self, t):
        """Beta alpha^2 / (2 sigma); infinite at t = 0, where sigma grows like sqrt(t)."""
        return 0.5 * self._beta(t) * self.alpha(t) ** 2 / self.sigma(t)

    def log_snr(self, t):
        """log(alpha^2 / (1 - alpha^2))."""
        return 2.0 * self._log_alpha(t) - jnp.log(-jnp.expm1(2.0 * self._log_alpha(t)))

    def log_snr_prime(self, t):
        """-beta / sigma^2."""
        return self._beta(t) / jnp.expm1(2.0 * self._log_alpha(t))

    def time(self, log_snr):
        """The positive root of the quadratic -2 log alpha(t) = log(1 + exp(-log_snr))."""
        c = 0.5 * jax.nn.softplus(-jnp.asarray(log_snr))
        b, a = 0.5 * self.beta_min, 0.25 * (self.beta_max - self.beta_min)
        return 2.0 * c / (b + jnp.sqrt(b**2 + 4.0 * a * c))


@dataclasses.dataclass(frozen=True)
class VPCosine(Gaussian):
    """alpha = cos(angle), sigma = sin(angle), angle = pi/2 (t + s) / (1 + s) (Nichol & Dhariwal 2021, eq. 17).

    The paper divides alpha^2 by its value at 0 and clips beta; here sigma(0) is small but positive instead.
    """

    s: float = 0.008

    def __post_init__(self):
        _require(self.s >= 0, self, "s must not be negative")

    @property
    def _speed(self):
        return 0.5 * math.pi / (1.0 + self.s)

    def alpha(self, t):
        """cos(angle), exactly 0 at t = 1."""
        return jnp.sin(self._speed * (1.0 - t))

    def sigma(self, t):
        """sin(angle)."""
        return jnp.sin(self._speed * (t + self.s))

    def alpha_prime(self, t):
        """-sigma d angle / dt."""
        return -self._speed * self.sigma(t)

    def sigma_prime(self, t):
        """Alpha d angle / dt."""
        return self._speed * self.alpha(t)

    def log_snr_prime(self, t):
        """-2 (d angle / dt) / (alpha sigma)."""
        return -2.0 * self._speed / (self.alpha(t) * self.sigma(t))

    def time(self, log_snr):
        """From tan(angle) = exp(-log_snr / 2)."""
        return jnp.arctan(jnp.exp(-0.5 * jnp.asarray(log_snr))) / self._speed - self.s


@dataclasses.dataclass(frozen=True)
class VE(Gaussian):
    """The variance-exploding SDE: alpha = 1, sigma geometric from sigma_min to sigma_max (Song et al. 2021)."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self):
        _require(0 < self.sigma_min < self.sigma_max, self, "needs 0 < sigma_min < sigma_max")

    @property
    def _log_ratio(self):
        return math.log(self.sigma_max / self.sigma_min)

    def alpha(self, t):
        """1."""
        return jnp.ones_like(t)

    def sigma(self, t):
        """sigma_min (sigma_max / sigma_min)**t."""
        return self.sigma_min * jnp.exp(self._log_ratio * t)

    def alpha_prime(self, t):
        """0."""
        return jnp.zeros_like(t)

    def sigma_prime(self, t):
        """Sigma log(sigma_max / sigma_min)."""
        return self._log_ratio * self.sigma(t)

    def log_snr(self, t):
        """-2 log sigma, linear in t."""
        return -2.0 * (math.log(self.sigma_min) + self._log_ratio * t)

    def log_snr_prime(self, t):
        """-2 log(sigma_max / sigma_min)."""
        return jnp.full_like(t, -2.0 * self._log_ratio)

    def time(self, log_snr):
        """Inverse of the linear `log_snr`."""
        return (-0.5 * jnp.asarray(log_snr) - math.log(self.sigma_min)) / self._log_ratio


@dataclasses.dataclass(frozen=True)
class EDM(Gaussian):
    """alpha = 1, sigma = sigma_max t (Karras et al. 2022, table 1). The clock is sigma itself; t = 0 is data."""

    sigma_max: float = 80.0

    def __post_init__(self):
        _require(self.sigma_max > 0, self, "sigma_max must be positive")

    def alpha(self, t):
        """1."""
        return jnp.ones_like(t)

    def sigma(self, t):
        """sigma_max t."""
        return self.sigma_max * t

    def alpha_prime(self, t):
        """0."""
        return jnp.zeros_like(t)

    def sigma_prime(self, t):
        """sigma_max."""
        return jnp.full_like(t, self.sigma_max)

    def time(self, log_snr):
        """exp(-log_snr / 2) / sigma_max."""
        return jnp.exp(-0.5 * jnp.asarray(log_snr)) / self.sigma_max


@dataclasses.dataclass(frozen=True)
class CondOT(Gaussian):
    """alpha = 1 - t, sigma = t: straight paths (rectified flow, Liu et al. 2023; flow matching, Lipman et al. 2023)."""

    def alpha(self, t):
        """1 - t."""
        return 1.0 - t

    def sigma(self, t):
        """The clock itself, t."""
        return t

    def alpha_prime(self, t):
        """-1."""
        return jnp.full_like(t, -1.0)

    def sigma_prime(self, t):
        """1."""
        return jnp.ones_like(t)

    def log_snr_prime(self, t):
        """-2 / (t (1 - t))."""
        return -2.0 / (t * (1.0 - t))

    def time(self, log_snr):
        """1 / (1 + exp(log_snr / 2))."""
        return jax.nn.sigmoid(-0.5 * jnp.asarray(log_snr))
