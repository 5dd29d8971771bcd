"""The path of least kinetic energy for given data (Shaul et al. 2023, "On kinetic optimal probability paths").

Let M = E|x_0|^2 / N and e(lambda) the least mean squared error per site of predicting x_0 at log-SNR lambda. The mean
kinetic energy of the marginal velocity, per site, is

    integral over t of   alpha'^2 M + sigma'^2 - alpha^2 lambda'^2 e / 4

(the energy of alpha' x_0 + sigma' noise, less its variance given x_t). With alpha sqrt(M) = rho cos(theta) and sigma =
rho sin(theta) it is that of rho'^2 + rho^2 g theta'^2, g = 1 - e / (M sin^2 theta): plane polar coordinates with
the angle d phi = sqrt(g) d theta. So the best path is a straight line there, from (sqrt(M), 0) to (1, Phi), at constant
speed, and its energy is the square of its length, M + 1 - 2 sqrt(M) cos(Phi). Where nothing can be known but by the
data being far apart (e = 0) theta = phi and the path is CondOT's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ddjax.frozen import Frozen
from ddjax.schedules.base import Gaussian, Times

_FLATTEST = 1e-4  # the least sqrt(g): Gaussian data have g = 0, where every theta(t) is as good


@dataclasses.dataclass(frozen=True)
class KineticOptimal(Gaussian):
    """The path of least kinetic energy for data known by their separation; see the module's text.

    Its sigma need not grow all the way: the log-SNR alone is sure to fall.

    separation: sqrt(g) at the middles of equal parts of [0, pi/2], taken as constant within a part. In [0, 1]: 1 for
        data far apart at that noise level, 0 for Gaussian data. `from_errors` makes it.
    second_moment: M, the mean square of a site of the data.
    """

    separation: Frozen | Sequence[float]
    second_moment: float = 1.0

    def __post_init__(self):
        values = np.asarray(self.separation, np.float64)
        if values.ndim != 1 or not len(values) or not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"KineticOptimal(separation): needs numbers in [0, 1], one per part, got {values}")
        if not self.second_moment > 0:
            raise ValueError(f"KineticOptimal(second_moment): must be positive, got {self.second_moment}")
        object.__setattr__(self, "separation", Frozen(np.maximum(values, _FLATTEST)))

    @classmethod
    def from_errors(
        cls, log_snrs: Sequence[float], errors: Sequence[float], second_moment: float, parts: int = 256
    ) -> KineticOptimal:
        """From the mean squared errors, per site, of a good denoiser's x_0 at these log-SNRs.

        log_snrs: in any order. Between them e / M sin^2 theta is interpolated in theta, beyond them it is kept.
        errors: above the linear denoiser's (g < 0) they are taken as that.
        """
        log_snrs, errors = np.asarray(log_snrs, np.float64), np.asarray(errors, np.float64)
        if log_snrs.ndim != 1 or log_snrs.shape != errors.shape or not len(errors) or (errors < 0).any():
            raise ValueError(
                f"KineticOptimal.from_errors: needs an error >= 0 for each log-SNR, got shapes {log_snrs.shape} and "
                f"{errors.shape}, least error {errors.min(initial=0.0)}"
            )
        theta = np.arctan(np.exp(-0.5 * log_snrs) / math.sqrt(second_moment))
        order = np.argsort(theta)
        middles = (np.arange(parts) + 0.5) * 0.5 * math.pi / parts
        left = np.interp(middles, theta[order], (errors / (second_moment * np.sin(theta) ** 2))[order])
        return cls(np.sqrt(np.clip(1.0 - left, 0.0, 1.0)), second_moment)

    @property
    def _parts(self) -> tuple[np.ndarray, np.ndarray, float]:
        """Slopes d phi / d theta, phi at the parts' ends, and a part's width."""
        slopes = np.asarray(self.separation)
        width = 0.5 * math.pi / len(slopes)
        return slopes, np.concatenate([[0.0], np.cumsum(slopes * width)]), width

    @property
    def angle(self) -> float:
        """Phi, in [0, pi/2]."""
        return float(self._parts[1][-1])

    @property
    def energy(self) -> float:
        """The path's kinetic energy per site, M + 1 - 2 sqrt(M) cos(Phi)."""
        return self.second_moment + 1.0 - 2.0 * math.sqrt(self.second_moment) * math.cos(self.angle)

    def _polar(self, t: Times) -> tuple[Array, ...]:
        """Rho, rho', sin(theta), cos(theta), theta'."""
        slopes, knots, width = self._parts
        size, total = math.sqrt(self.second_moment), self.angle
        x, y = (1.0 - t) * size + t * math.cos(total), t * math.sin(total)
        rho = jnp.sqrt(x**2 + y**2)
        rho_prime = (x * (math.cos(total) - size) + y * math.sin(total)) / rho
        # Both angles from their own end, so that neither is a difference where it is small.
        phi = jnp.arctan2(y, x)
        phi_left = jnp.arctan2((1.0 - t) * size * math.sin(total), x * math.cos(total) + y * math.sin(total))
        dtype = rho.dtype
        i = jnp.searchsorted(jnp.asarray(knots[1:-1], dtype), phi, side="right")
        starts = width * np.arange(len(slopes))
        table = np.stack([slopes, starts, knots[:-1], starts[::-1], total - knots[1:]])
        slope, start, phi_start, left, phi_left_end = jnp.asarray(table, dtype)[:, i]
        theta = start + (phi - phi_start) / slope
        theta_left = left + (phi_left - phi_left_end) / slope
        theta_prime = size * math.sin(total) / (rho**2 * slope)
        return rho, rho_prime, jnp.sin(theta), jnp.sin(theta_left), theta_prime

    def alpha(self, t):
        """Rho cos(theta) / sqrt(M)."""
        rho, _, _, cos, _ = self._polar(t)
        return rho * cos / math.sqrt(self.second_moment)

    def sigma(self, t):
        """Rho sin(theta)."""
        rho, _, sin, _, _ = self._polar(t)
        return rho * sin

    def alpha_prime(self, t):
        """(rho' cos(theta) - rho sin(theta) theta') / sqrt(M)."""
        rho, rho_prime, sin, cos, theta_prime = self._polar(t)
        return (rho_prime * cos - rho * sin * theta_prime) / math.sqrt(self.second_moment)

    def sigma_prime(self, t):
        """D (rho sin(theta)) / dt."""
        rho, rho_prime, sin, cos, theta_prime = self._polar(t)
        return rho_prime * sin + rho * cos * theta_prime

    def log_snr_prime(self, t):
        """-2 theta' / (sin(theta) cos(theta))."""
        _, _, sin, cos, theta_prime = self._polar(t)
        return -2.0 * theta_prime / (sin * jnp.abs(cos))

    def time(self, log_snr):
        """Where the straight line has the angle phi of tan(theta) = exp(-log_snr / 2) / sqrt(M)."""
        slopes, knots, width = self._parts
        size, total = math.sqrt(self.second_moment), self.angle
        theta = jnp.arctan(jnp.exp(-0.5 * jnp.asarray(log_snr)) / size)
        i = jnp.clip(jnp.floor(theta / width), 0, len(slopes) - 1).astype(jnp.int32)
        slope, start = jnp.asarray(np.stack([slopes, knots[:-1]]), theta.dtype)[:, i]
        phi = start + slope * (theta - width * i)
        ahead, behind = jnp.sin(total - phi), size * jnp.sin(phi)
        return behind / (ahead + behind)
