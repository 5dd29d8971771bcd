"""Gaussian schedules in closed form: x_t = alpha x_0 + sigma noise."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from ddjax.schedules.base import Gaussian, require


@dataclasses.dataclass(frozen=True)
class VPLinear(Gaussian):
    """The variance-preserving SDE with beta(t) linear in t, or constant (Song et al. 2021, eq. 32; DDPM's limit).

    log alpha = -t^2 (beta_max - beta_min) / 4 - t beta_min / 2,   sigma^2 = 1 - alpha^2.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self):
        require(0 < self.beta_min <= self.beta_max, self, "needs 0 < beta_min <= beta_max")

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
        """The time at which -2 log alpha(t) = log(1 + exp(-log_snr))."""
        return self._time_of(0.5 * jax.nn.softplus(-jnp.asarray(log_snr)))

    def _time_of(self, c):
        """The positive root of the quadratic -log alpha(t) = c."""
        b, a = 0.5 * self.beta_min, 0.25 * (self.beta_max - self.beta_min)
        return 2.0 * c / (b + jnp.sqrt(b**2 + 4.0 * a * c))


@dataclasses.dataclass(frozen=True)
class SubVP(VPLinear):
    """The sub-VP SDE: the alpha of `VPLinear`, sigma = 1 - alpha^2, itself and not squared (Song et al. 2021, eq. 29).

    Its noise is less than the variance-preserving one at all times, and linear in t at t = 0.
    """

    def sigma(self, t):
        """1 - alpha^2, accurate as t -> 0."""
        return -jnp.expm1(2.0 * self._log_alpha(t))

    def sigma_prime(self, t):
        """Beta alpha^2."""
        return self._beta(t) * self.alpha(t) ** 2

    def log_snr(self, t):
        """2 log(alpha / (1 - alpha^2))."""
        return 2.0 * (self._log_alpha(t) - jnp.log(-jnp.expm1(2.0 * self._log_alpha(t))))

    def log_snr_prime(self, t):
        """-beta (1 + alpha^2) / sigma."""
        return -self._beta(t) * (1.0 + self.alpha(t) ** 2) / self.sigma(t)

    def time(self, log_snr):
        """From sigma / alpha = 1 / alpha - alpha = 2 sinh(-log alpha)."""
        return self._time_of(jnp.arcsinh(0.5 * jnp.exp(-0.5 * jnp.asarray(log_snr))))


@dataclasses.dataclass(frozen=True)
class VPCosine(Gaussian):
    """alpha = cos(angle), sigma = sin(angle), angle = pi/2 (t + s) / (1 + s) (Nichol & Dhariwal 2021, eq. 17).

    The paper divides alpha^2 by its value at 0 and clips beta; here sigma(0) is small but positive instead.
    """

    s: float = 0.008

    def __post_init__(self):
        require(self.s >= 0, self, "s must not be negative")

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
class Trigonometric(VPCosine):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2) (Albergo & Vanden-Eijnden 2023; the "cosine" of flow matching)."""

    s: float = dataclasses.field(default=0.0, init=False)


@dataclasses.dataclass(frozen=True)
class VE(Gaussian):
    """The variance-exploding SDE: alpha = 1, sigma geometric from sigma_min to sigma_max (Song et al. 2021)."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self):
        require(0 < self.sigma_min < self.sigma_max, self, "needs 0 < sigma_min < sigma_max")

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
        require(self.sigma_max > 0, self, "sigma_max must be positive")

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


@dataclasses.dataclass(frozen=True)
class PolynomialPath(Gaussian):
    """alpha = (1 - t)**power, sigma = 1 - alpha (Lipman et al. 2024, "Flow matching guide and code")."""

    power: float = 2.0

    def __post_init__(self):
        require(self.power >= 1, self, "power must be at least 1")

    def alpha(self, t):
        """(1 - t)**power."""
        return (1.0 - t) ** self.power

    def sigma(self, t):
        """1 - (1 - t)**power, accurate as t -> 0."""
        return -jnp.expm1(self.power * jnp.log1p(-t))

    def alpha_prime(self, t):
        """-power (1 - t)**(power - 1)."""
        return -self.power * (1.0 - t) ** (self.power - 1.0)

    def sigma_prime(self, t):
        """-alpha'."""
        return -self.alpha_prime(t)

    def log_snr_prime(self, t):
        """-2 power / ((1 - t) sigma)."""
        return -2.0 * self.power / ((1.0 - t) * self.sigma(t))

    def time(self, log_snr):
        """From alpha = 1 / (1 + exp(-log_snr / 2))."""
        return -jnp.expm1(-jax.nn.softplus(-0.5 * jnp.asarray(log_snr)) / self.power)


@dataclasses.dataclass(frozen=True)
class LinearVP(Gaussian):
    """alpha = 1 - t, sigma = sqrt(1 - alpha^2) (Lipman et al. 2024, "Flow matching guide and code": linear VP)."""

    def alpha(self, t):
        """1 - t."""
        return 1.0 - t

    def sigma(self, t):
        """sqrt(t (2 - t))."""
        return jnp.sqrt(t * (2.0 - t))

    def alpha_prime(self, t):
        """-1."""
        return jnp.full_like(t, -1.0)

    def sigma_prime(self, t):
        """Alpha / sigma; infinite at t = 0."""
        return (1.0 - t) / self.sigma(t)

    def log_snr_prime(self, t):
        """-2 / (alpha sigma^2)."""
        return -2.0 / ((1.0 - t) * t * (2.0 - t))

    def time(self, log_snr):
        """From alpha^2 = 1 / (1 + exp(-log_snr))."""
        return -jnp.expm1(-0.5 * jax.nn.softplus(-jnp.asarray(log_snr)))
