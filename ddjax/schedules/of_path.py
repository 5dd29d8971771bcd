"""The schedule of an interpolant whose other end is noise too."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from ddjax.paths import Path
from ddjax.schedules.base import Gaussian, require


@dataclasses.dataclass(frozen=True)
class OfPath(Gaussian):
    """What a path between x_0 and an independent x_1 ~ N(0, source_std^2) leaves of x_0, in all that noise.

        x_t = alpha x_0 + beta x_1 + gamma z,    sigma^2 = (beta source_std)^2 + gamma^2

    (Albergo et al. 2023, "Stochastic interpolants", section 3.3, one-sided interpolants.) The log-SNR falls from +inf
    to -inf; its inverse is found by bisection.

    Raises ValueError for a path along which it does not fall everywhere, as can be where gamma rises steeply and early.
    """

    path: Path
    source_std: float = 1.0

    def __post_init__(self):
        require(self.source_std > 0, self, "source_std must be positive")
        require(_falls(self), self, "alpha / sigma does not fall all along this path: its noise must not shrink faster")

    def alpha(self, t):
        """The path's."""
        return self.path.alpha(t)

    def sigma(self, t):
        """The width of beta x_1 + gamma z."""
        return jnp.hypot(self.source_std * self.path.beta(t), self.path.gamma(t))

    def alpha_prime(self, t):
        """The path's."""
        return self.path.alpha_prime(t)

    def sigma_prime(self, t):
        """Half the slope of sigma^2 over sigma; at sigma = 0, where both parts set out, the length of their slopes."""
        sigma, slope = self.sigma(t), self.path.beta_prime(t)
        half = self.source_std**2 * self.path.beta(t) * slope + 0.5 * self.path.gamma_squared_prime(t)
        first = jnp.hypot(self.source_std * slope, self.path.gamma_prime(t))
        return jnp.where(sigma == 0, first, half / jnp.where(sigma == 0, 1.0, sigma))

    def time(self, log_snr):
        """By bisection in log(t / (1 - t)). Its derivatives are those of the inverse function."""
        log_snr = jnp.asarray(log_snr)
        dtype = jnp.result_type(log_snr, float)
        info = jnp.finfo(dtype)

        def halve(_, interval):
            low, high = interval
            middle = 0.5 * (low + high)
            early = self.log_snr(jax.nn.sigmoid(middle)) > log_snr
            return jnp.where(early, middle, low), jnp.where(early, high, middle)

        # From the least t there is to where 1 - t is lost in rounding.
        ends = (jnp.full(log_snr.shape, np.log(v), dtype) for v in (float(info.tiny), 2.0 / float(info.eps)))
        low, high = jax.lax.fori_loop(0, info.nmant + 12, halve, tuple(ends))
        t = jax.nn.sigmoid(0.5 * (low + high))  # by comparisons alone, which have no derivatives
        inside = jnp.isfinite(log_snr) & (t > 0) & (t < 1)
        at = jnp.where(inside, t, 0.5)
        step = (self.log_snr(at) - jnp.where(inside, log_snr, 0.0)) / self.log_snr_prime(at)  # Newton's carries them
        found = jnp.where(inside, jnp.clip(at - step, 0.0, 1.0), t)
        return jnp.where(jnp.isinf(log_snr), jnp.where(log_snr > 0, 0.0, 1.0), found)


@functools.lru_cache(maxsize=256)
def _falls(schedule: OfPath) -> bool:
    """Whether alpha / sigma falls between all neighbours of a fine grid."""
    with jax.ensure_compile_time_eval():
        t = jnp.linspace(0.0, 1.0, 513)
        return bool((np.diff(np.asarray(schedule.alpha(t) / schedule.sigma(t))[1:]) < 0).all())
