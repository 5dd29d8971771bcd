"""What a schedule is, and schedules given by their log-SNR alone."""

from __future__ import annotations

import abc
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ddjax.frozen import Frozen

Times = Float[Array, "*time"]


def require(condition: bool, schedule: object, message: str) -> None:
    """Raise a ValueError that names the schedule."""
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

    @property
    def common(self) -> Schedule:
        """The schedule whose log-SNR speaks for all sites: itself, but for schedules with one for each site."""
        return self


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


class Gaussian(Schedule):
    """A schedule for Gaussian states. Subclasses give alpha, sigma, their derivatives and the inverse."""

    def log_snr(self, t):
        """2 log(alpha / sigma)."""
        return 2.0 * (jnp.log(self.alpha(t)) - jnp.log(self.sigma(t)))

    def log_snr_prime(self, t):
        """2 (alpha' / alpha - sigma' / sigma)."""
        return 2.0 * (self.alpha_prime(t) / self.alpha(t) - self.sigma_prime(t) / self.sigma(t))

    def network_time(self, t: Times) -> Times:
        """The time a network is told: the clock itself, but for learned schedules."""
        return t


def scaled(log_snr: Times, scaling: str) -> tuple[Times, Times, Times]:
    """Log alpha, log sigma and D log alpha / D log-SNR under one of `SCALINGS`."""
    if scaling == "vp":
        return -0.5 * jax.nn.softplus(-log_snr), -0.5 * jax.nn.softplus(log_snr), 0.5 * jax.nn.sigmoid(-log_snr)
    half = 0.5 * log_snr
    if scaling == "ve":
        return jnp.zeros_like(half), -half, jnp.zeros_like(half)
    return -jax.nn.softplus(-half), -jax.nn.softplus(half), 0.5 * jax.nn.sigmoid(-half)


SCALINGS = ("vp", "ve", "cond_ot")


class ByLogSNR(Gaussian):
    """Any schedule given by its log-SNR: subclasses give `log_snr`, `log_snr_prime`, `time` and a field `scaling`.

    The log-SNR says sigma / alpha; the scaling says the rest: "vp", alpha^2 + sigma^2 = 1; "ve", alpha = 1 (the
    log-SNR must then be finite at t = 1); "cond_ot", alpha + sigma = 1. All are one process, seen at other scales.
    """

    scaling: str

    def __post_init__(self):
        require(self.scaling in SCALINGS, self, f"scaling must be one of {', '.join(SCALINGS)}")

    def alpha(self, t):
        """Weight of the data, from the log-SNR."""
        return jnp.exp(scaled(self.log_snr(t), self.scaling)[0])

    def sigma(self, t):
        """Weight of the noise, from the log-SNR."""
        return jnp.exp(scaled(self.log_snr(t), self.scaling)[1])

    def alpha_prime(self, t):
        """Alpha (d log alpha / d log-SNR) (d log-SNR / dt)."""
        t = _inside(t)
        log_alpha, _, slope = scaled(self.log_snr(t), self.scaling)
        return jnp.exp(log_alpha) * slope * self.log_snr_prime(t)

    def sigma_prime(self, t):
        """Sigma (d log alpha / d log-SNR - 1/2) (d log-SNR / dt)."""
        t = _inside(t)
        _, log_sigma, slope = scaled(self.log_snr(t), self.scaling)
        return jnp.exp(log_sigma) * (slope - 0.5) * self.log_snr_prime(t)


def _inside(t: Times) -> Times:
    """The nearest time where no log-SNR is infinite: at the ends its slope times 0 would be NaN, and not the limit."""
    info = jnp.finfo(jnp.result_type(t))
    return jnp.clip(t, float(info.eps) ** 4, 1.0 - float(info.epsneg))


def held(values: Frozen | Array | Sequence[float]) -> Frozen | Array:
    """Numbers as a schedule holds them: JAX arrays, traced or not, as they are; anything else frozen."""
    return values if isinstance(values, jax.Array) else Frozen(np.asarray(values))


def array(values: Frozen | Array, t: Times) -> Array:
    """What is held, in the dtype of t."""
    return jnp.asarray(values if isinstance(values, jax.Array) else np.asarray(values), jnp.result_type(t, float))
