"""Paths between two endpoints: x_t = alpha x_0 + beta x_1 + gamma z, with z a standard normal.

    t = 0: alpha = 1, beta = gamma = 0        t = 1: beta = 1, alpha = 0

(Albergo et al. 2023, "Stochastic interpolants", definition 1, whose clock runs the other way.) A path is a pair of
weights for the ends (`Straight`, `Trigonometric`, `Residual`) and a `Noise` in between. All functions follow the
dtype of t and are defined at both ends of time, where gamma' may be infinite.
"""

from __future__ import annotations

import abc
import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float

Times = Float[Array, "*time"]


@dataclasses.dataclass(frozen=True)
class Noise:
    """gamma = scale t**start (1 - t)**end.

    start = end = 1/2: a Brownian bridge, `scale` its volatility. start = end = 1: smooth, with a finite slope at both
    ends. start = 1, end = 0: grows to `scale` at t = 1, so that x_1 itself is seen through noise (RDDM; Albergo et al.
    2024, "Stochastic interpolants with data-dependent couplings").
    Raises ValueError unless scale and start are positive and end lies in [0, 1].
    """

    scale: float = 1.0
    start: float = 0.5
    end: float = 0.5

    def __post_init__(self):
        if not (self.scale > 0 and self.start > 0 and 0 <= self.end <= 1):
            raise ValueError(f"{self!r}: needs scale > 0, start > 0 and end in [0, 1]; for no noise give noise=None")

    def gamma(self, t: Times) -> Times:
        """The standard deviation of the noise."""
        return self.scale * t**self.start * (1.0 - t) ** self.end

    def gamma_prime(self, t: Times) -> Times:
        """D gamma / dt; infinite where a power below 1 meets its end."""
        slope = self.start * t ** (self.start - 1.0) * (1.0 - t) ** self.end
        if self.end > 0:
            slope = slope - self.end * t**self.start * (1.0 - t) ** (self.end - 1.0)
        return self.scale * slope

    def gamma_squared_prime(self, t: Times) -> Times:
        """D gamma^2 / dt; finite where a power is 1/2 or more."""
        slope = 2.0 * self.start * t ** (2.0 * self.start - 1.0) * (1.0 - t) ** (2.0 * self.end)
        if self.end > 0:
            slope = slope - 2.0 * self.end * t ** (2.0 * self.start) * (1.0 - t) ** (2.0 * self.end - 1.0)
        return self.scale**2 * slope


@dataclasses.dataclass(frozen=True)
class Path(abc.ABC):
    """The three weights and their derivatives. noise: None for a path without."""

    noise: Noise | None = None

    @abc.abstractmethod
    def alpha(self, t: Times) -> Times:
        """Weight of x_0, from 1 down to 0."""

    @abc.abstractmethod
    def beta(self, t: Times) -> Times:
        """Weight of x_1, from 0 up to 1."""

    @abc.abstractmethod
    def alpha_prime(self, t: Times) -> Times:
        """D alpha / dt."""

    @abc.abstractmethod
    def beta_prime(self, t: Times) -> Times:
        """D beta / dt."""

    @abc.abstractmethod
    def _alpha_rate(self, t: Times) -> Times:
        """The weight of x_0 over 1 - t, also at t = 1."""

    def gamma(self, t: Times) -> Times:
        """Weight of the noise."""
        return jnp.zeros_like(t) if self.noise is None else self.noise.gamma(t)

    def gamma_prime(self, t: Times) -> Times:
        """D gamma / dt."""
        return jnp.zeros_like(t) if self.noise is None else self.noise.gamma_prime(t)

    def gamma_squared_prime(self, t: Times) -> Times:
        """D gamma^2 / dt."""
        return jnp.zeros_like(t) if self.noise is None else self.noise.gamma_squared_prime(t)

    def sigma(self, t: Times) -> Times:
        """Weight of all that is not x_0, sqrt(beta^2 + gamma^2)."""
        return jnp.sqrt(self.beta(t) ** 2 + self.gamma(t) ** 2)

    def signal_to_noise(self, t: Times) -> Times:
        """The ratio alpha / gamma, decreasing in t, right where both are 0; infinite at t = 0 and without noise."""
        if self.noise is None:
            return jnp.full_like(t, jnp.inf)
        gamma_rate = self.noise.scale * t**self.noise.start  # gamma / (1 - t)**end
        return self._alpha_rate(t) * (1.0 - t) ** (1.0 - self.noise.end) / gamma_rate


@dataclasses.dataclass(frozen=True)
class Straight(Path):
    """alpha = 1 - t, beta = t (flow matching, rectified flow, alpha-(de)blending; with noise, a bridge)."""

    def alpha(self, t):
        """1 - t."""
        return 1.0 - t

    def beta(self, t):
        """The clock itself, t."""
        return t

    def alpha_prime(self, t):
        """-1."""
        return jnp.full_like(t, -1.0)

    def beta_prime(self, t):
        """1."""
        return jnp.ones_like(t)

    def _alpha_rate(self, t):
        return jnp.ones_like(t)


@dataclasses.dataclass(frozen=True)
class Trigonometric(Path):
    """alpha = cos(pi t / 2), beta = sin(pi t / 2): keeps the variance of independent ends that have the same."""

    def alpha(self, t):
        """cos(pi t / 2), exactly 0 at t = 1."""
        return jnp.sin(0.5 * math.pi * (1.0 - t))

    def beta(self, t):
        """sin(pi t / 2)."""
        return jnp.sin(0.5 * math.pi * t)

    def alpha_prime(self, t):
        """-pi/2 sin(pi t / 2)."""
        return -0.5 * math.pi * self.beta(t)

    def beta_prime(self, t):
        """pi/2 cos(pi t / 2)."""
        return 0.5 * math.pi * self.alpha(t)

    def _alpha_rate(self, t):
        return 0.5 * math.pi * jnp.sinc(0.5 * (1.0 - t))


@dataclasses.dataclass(frozen=True)
class Residual(Path):
    """RDDM: x_t = x_0 + a (x_1 - x_0) + gamma z with a = t (2 - t), at a speed that falls linearly.

    (Liu et al. 2024, "Residual denoising diffusion models", in the limit of many steps.) With `Noise(scale, 1, 0)` the
    speed of the noise's variance rises linearly, their other schedule; scale is 1 to generate, 0.1 to restore.
    """

    def alpha(self, t):
        """(1 - t)^2."""
        return (1.0 - t) ** 2

    def beta(self, t):
        """1 - (1 - t)^2 = t (2 - t)."""
        return t * (2.0 - t)

    def alpha_prime(self, t):
        """-2 (1 - t)."""
        return -2.0 * (1.0 - t)

    def beta_prime(self, t):
        """2 (1 - t)."""
        return 2.0 * (1.0 - t)

    def _alpha_rate(self, t):
        return 1.0 - t
