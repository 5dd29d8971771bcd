"""Survival schedules, for categorical states."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp

from ddjax.schedules.base import Survival, require


@dataclasses.dataclass(frozen=True)
class Polynomial(Survival):
    """alpha = 1 - t**power (MD4, Shi et al. 2024, section 4)."""

    power: float = 1.0

    def __post_init__(self):
        require(self.power > 0, self, "power must be positive")

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
        require(0 <= self.eps < 1, self, "eps must lie in [0, 1)")

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
class Geometric(Survival):
    """-log alpha geometric from `first` to `last` (SEDD, Lou et al. 2024, section 5: "geometric" noise).

    A symbol is lost with probability 1 - exp(-first) at t = 0, and survives to t = 1 with probability exp(-last).
    """

    first: float = 1e-4
    last: float = 20.0

    def __post_init__(self):
        require(0 < self.first < self.last, self, "needs 0 < first < last")

    def _total(self, t):
        return self.first * jnp.exp(math.log(self.last / self.first) * t)

    def alpha(self, t):
        """exp(-first (last / first)**t)."""
        return jnp.exp(-self._total(t))

    def sigma(self, t):
        """1 - alpha, without cancellation."""
        return -jnp.expm1(-self._total(t))

    def sigma_prime(self, t):
        """log(last / first) n exp(-n), n the total noise."""
        return math.log(self.last / self.first) * self._total(t) * self.alpha(t)

    def time_of_sigma(self, sigma):
        """log(-log(1 - sigma) / first) / log(last / first)."""
        return jnp.log(-jnp.log1p(-sigma) / self.first) / math.log(self.last / self.first)


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
