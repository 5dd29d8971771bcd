"""What is left of both ends along a bridge of Ornstein-Uhlenbeck processes from noise to data (GruM)."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array

from ddjax.schedules.base import Gaussian, require


@dataclasses.dataclass(frozen=True)
class OUBridge(Gaussian):
    """The marginals of bridges from a standard normal x_1 to the data, pinned at both ends (Jo et al. 2024, "GruM").

    The bridges are those of dx = -pull vol^2 x dt + vol dW, on a clock that runs from t = 1 to t = 0. With v and w the
    integrals of vol^2 from 0 to t and from t to 1, V = v + w, and S(x) = sinh(pull x) / pull,

        x_t = S(w)/S(V) x_0 + S(v)/S(V) x_1 + gamma z,   gamma^2 = S(v) S(w) / S(V)      (their eq. 56)

    and with x_1 standard normal: alpha = S(w)/S(V), sigma^2 = (S(v)/S(V))^2 + gamma^2.

    pull: half their drift coefficient; 0 is the Brownian bridge. at_data, at_noise: the volatility at either end, vol^2
    linear in between (their sigma_1 and sigma_0; the values for adjacency matrices).
    Raises ValueError for a negative pull, or a volatility that is not positive.
    """

    pull: float = 0.5
    at_data: float = 0.2
    at_noise: float = 0.4

    def __post_init__(self):
        require(
            self.pull >= 0 and self.at_data > 0 and self.at_noise > 0,
            self,
            "needs pull >= 0 and positive volatilities at_data and at_noise",
        )

    def hyperbolic_sine(self, x: Array) -> Array:
        """S(x), x itself where nothing pulls."""
        return jnp.sinh(self.pull * x) / self.pull if self.pull else jnp.asarray(x)

    def hyperbolic_cosine(self, x: Array) -> Array:
        """dS/dx = cosh(pull x)."""
        return jnp.cosh(self.pull * x)

    def squared_volatility(self, t: Array) -> Array:
        """vol^2, which is dv/dt."""
        return self.at_data**2 + t * (self.at_noise**2 - self.at_data**2)

    def elapsed(self, t: Array) -> Array:
        """The integral v of vol^2 from 0 to t."""
        return t * (self.at_data**2 + 0.5 * t * (self.at_noise**2 - self.at_data**2))

    def remaining(self, t: Array) -> Array:
        """The integral w of vol^2 from t to 1, exactly 0 at t = 1."""
        return (1.0 - t) * (self.at_noise**2 + 0.5 * (1.0 - t) * (self.at_data**2 - self.at_noise**2))

    @property
    def _whole(self) -> tuple[float, float]:
        """S(V) and C(V)."""
        whole = 0.5 * (self.at_data**2 + self.at_noise**2)
        return math.sinh(self.pull * whole) / self.pull if self.pull else whole, math.cosh(self.pull * whole)

    def _ends(self, t: Array) -> tuple[Array, Array]:
        """S(v) and S(w)."""
        return self.hyperbolic_sine(self.elapsed(t)), self.hyperbolic_sine(self.remaining(t))

    def alpha(self, t):
        """S(w) / S(V)."""
        return self._ends(t)[1] / self._whole[0]

    def sigma(self, t):
        """The width of x_1 and of the bridge together."""
        v, w = self._ends(t)
        return jnp.sqrt(v * (v / self._whole[0] + w) / self._whole[0])

    def alpha_prime(self, t):
        """-cosh(pull w) vol^2 / S(V)."""
        return -self.hyperbolic_cosine(self.remaining(t)) * self.squared_volatility(t) / self._whole[0]

    def sigma_prime(self, t):
        """Half the slope of sigma^2 over sigma; infinite at t = 0, where sigma grows like sqrt(t)."""
        (v, w), whole = self._ends(t), self._whole[0]
        slope_v, slope_w = (self.hyperbolic_cosine(x(t)) for x in (self.elapsed, self.remaining))
        rate = slope_v * (2.0 * v / whole + w) - v * slope_w
        return 0.5 * self.squared_volatility(t) * rate / whole / self.sigma(t)

    def log_snr(self, t):
        """-log q - log(q + S(V)), q = S(v) / S(w)."""
        v, w = self._ends(t)
        return 2.0 * jnp.log(w) - jnp.log(v) - jnp.log(v + w * self._whole[0])

    def log_snr_prime(self, t):
        """2 (alpha' / alpha - sigma' / sigma), in terms that stay finite in between."""
        v, w = self._ends(t)
        slope_v, slope_w = (self.hyperbolic_cosine(x(t)) for x in (self.elapsed, self.remaining))
        whole = self._whole[0]
        rate = -2.0 * slope_w / w - slope_v / v - (slope_v - slope_w * whole) / (v + w * whole)
        return self.squared_volatility(t) * rate

    def time(self, log_snr):
        """From q, the root of q^2 + S(V) q = exp(-log_snr); tanh(pull v) / pull = q S(V) / (1 + q C(V))."""
        sine, cosine = self._whole
        snr = jnp.exp(jnp.asarray(log_snr))
        inverse_q = 0.5 * (snr * sine + jnp.sqrt(snr) * jnp.sqrt(snr * sine**2 + 4.0))
        tangent = sine / (inverse_q + cosine)
        v = jnp.arctanh(self.pull * tangent) / self.pull if self.pull else tangent
        first, change = self.at_data**2, self.at_noise**2 - self.at_data**2
        return 2.0 * v / (first + jnp.sqrt(first**2 + 2.0 * change * v))
