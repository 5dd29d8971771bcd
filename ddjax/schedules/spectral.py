"""Schedules with one alpha and sigma for each coordinate, for `processes.InBasis` (or, per site, for `Gaussian`).

Constants have the shape of one example, `(*sites)`, or broadcast to it; times have the state's axes or broadcast
against its sites, as a time `(batch, 1, ...)` does. What asks for one log-SNR for all (grids, ranges, what networks
are told) takes `common`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpy.typing import ArrayLike

from ddjax.frozen import Frozen
from ddjax.schedules.base import Gaussian, Times, array, require
from ddjax.schedules.gaussian import Trigonometric, VPCosine


@dataclasses.dataclass(frozen=True)
class ShortestPath(Gaussian):
    """The shortest path, by the Fisher metric, from data to white noise (Das et al. 2023, SPD, section 3).

    With S the variance of a coordinate, the path of variances is S^(1-g), g from 0 to 1, so that

        alpha^2 = (S^(1-g) - 1) / (S - 1),    sigma^2 = 1 - alpha^2,    g = sin(pi t / 2)^2.

    power: S for each coordinate of the data, positive; 1 has the limit alpha^2 = 1 - g. (SPD's published fit for images
        is 1.59 / (0.0086 + |k|)^2 at frequency k.)
    Steps of equal length are equal steps of g, t = 2/pi arcsin(sqrt(g)); on this clock the slopes are finite.
    """

    power: Frozen | ArrayLike

    def __post_init__(self):
        values = np.asarray(self.power, np.float64)
        require(bool(((values > 0) & np.isfinite(values)).all()), self, "power must be positive at every coordinate")
        object.__setattr__(self, "power", Frozen(values))

    @property
    def common(self) -> Trigonometric:
        """That of coordinates of variance 1."""
        return Trigonometric()

    def _parts(self, t: Times) -> tuple[Array, Array, Array, Array]:
        """Log S, and g, sine and cosine of pi t / 2, the cosine exactly 0 at t = 1."""
        t = jnp.asarray(t)
        sine, cosine = jnp.sin(0.5 * math.pi * t), jnp.sin(0.5 * math.pi * (1.0 - t))
        return array(Frozen(np.log(self.power.values)), t), sine**2, sine, cosine

    def alpha(self, t):
        """Cosine times sqrt(phi(c (1 - g)) / phi(c)), c = log S, phi(z) = expm1(z) / z."""
        c, _, _, cosine = self._parts(t)
        return cosine * jnp.sqrt(_phi(c * cosine**2) / _phi(c))

    def sigma(self, t):
        """Sine times sqrt(phi(-c g) / phi(-c))."""
        c, g, sine, _ = self._parts(t)
        return sine * jnp.sqrt(_phi(-c * g) / _phi(-c))

    def alpha_prime(self, t):
        """D alpha / dt."""
        c, _, sine, cosine = self._parts(t)
        z = c * cosine**2
        return -0.5 * math.pi * sine * jnp.exp(z) / jnp.sqrt(_phi(z) * _phi(c))

    def sigma_prime(self, t):
        """D sigma / dt."""
        c, g, _, cosine = self._parts(t)
        return 0.5 * math.pi * cosine * jnp.exp(-c * g) / jnp.sqrt(_phi(-c * g) * _phi(-c))

    def time(self, log_snr):
        """When each coordinate has this log-SNR."""
        log_snr = jnp.asarray(log_snr)
        c = array(Frozen(np.log(self.power.values)), log_snr)
        lost = jax.nn.sigmoid(-log_snr)  # sigma^2 = expm1(-c g) / expm1(-c), solved for g
        z = -c * _phi(-c) * lost
        g = lost * _phi(-c) * jnp.where(z == 0, 1.0, jnp.log1p(z) / jnp.where(z == 0, 1.0, z))
        return 2.0 / math.pi * jnp.arcsin(jnp.sqrt(jnp.clip(g, 0.0, 1.0)))


@dataclasses.dataclass(frozen=True)
class Heat(Gaussian):
    """Blurring by the heat equation, and noise (Hoogeboom & Salimans 2023, "Blurring diffusion models", section 3).

        alpha_k = a ((1 - floor) exp(-rate_k blur^2 sin(pi t / 2)^4 / 2) + floor),    sigma the same for all

    rates: squared frequencies of the coordinates, `squared_frequencies(shape, axes)` for a `DCT`.
    schedule: a and sigma. blur: the greatest standard deviation of the blur, in sites. floor: what is left of every
        coordinate, so that alpha stays positive while a does.
    """

    rates: Frozen | ArrayLike
    schedule: Gaussian = VPCosine()  # noqa: RUF009 (frozen)
    blur: float = 20.0
    floor: float = 0.001

    def __post_init__(self):
        values = np.asarray(self.rates, np.float64)
        require(bool((values >= 0).all()), self, "rates must not be negative")
        require(self.blur >= 0, self, "blur must not be negative")
        require(0 < self.floor <= 1, self, "floor must lie in (0, 1]")
        object.__setattr__(self, "rates", Frozen(values))

    @property
    def common(self) -> Gaussian:
        """The schedule of what is not blurred."""
        return self.schedule

    def _left(self, t: Times) -> tuple[Array, Array]:
        """What blurring leaves of each coordinate, and its derivative."""
        t = jnp.asarray(t)
        rates, sine = array(self.rates, t), jnp.sin(0.5 * math.pi * t)
        kept = (1.0 - self.floor) * jnp.exp(-0.5 * rates * self.blur**2 * sine**4)
        slope = math.pi * self.blur**2 * sine**3 * jnp.sin(0.5 * math.pi * (1.0 - t))
        return kept + self.floor, -rates * slope * kept

    def alpha(self, t):
        """The schedule's, blurred."""
        return self.schedule.alpha(t) * self._left(t)[0]

    def sigma(self, t):
        """The schedule's."""
        return jnp.broadcast_to(self.schedule.sigma(t), jnp.broadcast_shapes(jnp.shape(t), self.rates.values.shape))

    def alpha_prime(self, t):
        """D alpha / dt."""
        left, slope = self._left(t)
        return self.schedule.alpha_prime(t) * left + self.schedule.alpha(t) * slope

    def sigma_prime(self, t):
        """D sigma / dt."""
        return jnp.broadcast_to(
            self.schedule.sigma_prime(t), jnp.broadcast_shapes(jnp.shape(t), self.rates.values.shape)
        )

    def log_snr(self, t):
        """The schedule's, less what blurring takes."""
        return self.schedule.log_snr(t) + 2.0 * jnp.log(self._left(t)[0])

    def log_snr_prime(self, t):
        """D log_snr / dt."""
        left, slope = self._left(t)
        return self.schedule.log_snr_prime(t) + 2.0 * slope / left

    def time(self, log_snr):
        """Raises NotImplementedError: no one time has this log-SNR at all coordinates."""
        raise NotImplementedError("Heat has a time for each coordinate: ask `common`, the schedule without blur")


def squared_frequencies(shape: Sequence[int], axes: Sequence[int]) -> np.ndarray:
    """The heat equation's rates on the coordinates of a `DCT`: the sum over `axes` of (pi k / size)^2.

    shape: of one example. axes: as the `DCT` has them, with the batch as axis 0.
    """
    total = np.zeros(tuple(shape))
    for axis in axes:
        size = shape[axis - 1]
        rates = (math.pi * np.arange(size) / size) ** 2
        total = total + rates.reshape([-1 if n == axis - 1 else 1 for n in range(len(shape))])
    return total


def _phi(z: Array) -> Array:
    """expm1(z) / z, and 1 at z = 0."""
    return jnp.where(z == 0, 1.0, jnp.expm1(z) / jnp.where(z == 0, 1.0, z))


__all__ = ["Heat", "ShortestPath", "squared_frequencies"]
