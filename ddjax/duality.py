"""The diffusion duality: uniform corruption of K symbols is what the argmax of a Gaussian diffusion does.

With w = a e_x + s eps in R^K, argmax(w) has the law alpha e_x + (1 - alpha) / K (Sahoo et al. 2025, "The Diffusion
Duality", eq. 10), where r = a / s = exp(lambda / 2) and

    alpha = T(r) = K / (K - 1) [ integral phi(z - r) Phi(z)^(K - 1) dz - 1 / K ]

In logarithms, the Gaussian log-SNR lambda and the survival's log odds y = log(alpha / (1 - alpha)) are two coordinates
of the same noise:

    y = lambda / 2 + exp(lambda) / 4 + e(lambda)

where e is bounded: it holds all that depends on K. e is integrated once for each K, in float64, and kept as polynomials
on panels of v = r / (r + 8), which has both ends of the noise in reach; y is right to 1e-12 there. The inverse is
Newton's.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy import special

from ddjax import schedules

_MIDDLE = 8.0  # v = 1/2 at r = 8
_PANELS = 96
_DEGREE = 12
_STEP = 0.03  # of the trapezoidal rule, whose error for these entire, rapidly falling integrands is below rounding


def survival_log_odds(log_snr: Float[Array, "*shape"], num_symbols: int) -> Float[Array, "*shape"]:
    """log(alpha / (1 - alpha)) of the argmax at a Gaussian log-SNR, both infinite at the ends."""
    return _odds_and_slope(jnp.asarray(log_snr), num_symbols)[0]


def survival_log_odds_prime(log_snr: Float[Array, "*shape"], num_symbols: int) -> Float[Array, "*shape"]:
    """D log odds / d log-SNR: 1/2 at -inf, and growing like exp(log_snr) / 4."""
    return _odds_and_slope(jnp.asarray(log_snr), num_symbols)[1]


@functools.partial(jax.jit, static_argnames="num_symbols")
def gaussian_log_snr(log_odds: Float[Array, "*shape"], num_symbols: int) -> Float[Array, "*shape"]:
    """The Gaussian log-SNR whose argmax survives with these log odds: inverse of `survival_log_odds`."""
    y = jnp.asarray(log_odds)
    odds, snr, low = _knots(num_symbols)
    inside = jnp.interp(y, jnp.asarray(odds, y.dtype), jnp.asarray(snr, y.dtype))
    above = jnp.log(4.0 * jnp.maximum(y, 1.0))
    guess = jnp.where(y < odds[0], 2.0 * (y - low), jnp.where(y > odds[-1], above, inside))
    finite = jnp.isfinite(y)
    x = jnp.where(finite, guess, 0.0)
    for _ in range(2):  # from a guess right to 1e-4, each step squares the error
        odds, slope = _odds_and_slope(x, num_symbols)
        x = x - (odds - jnp.where(finite, y, 0.0)) / slope
    return jnp.where(finite, x, y)


@functools.partial(jax.jit, static_argnames="num_symbols")
def _odds_and_slope(log_snr: Array, num_symbols: int) -> tuple[Array, Array]:
    remainder, slope = _remainder(log_snr, num_symbols)
    power = 0.25 * jnp.exp(log_snr)
    return 0.5 * log_snr + power + remainder, 0.5 + power + slope


def _remainder(log_snr: Array, num_symbols: int) -> tuple[Array, Array]:
    """e(lambda) and its derivative."""
    v = jax.nn.sigmoid(0.5 * log_snr - math.log(_MIDDLE))
    panel = jnp.clip(jnp.floor(_PANELS * v), 0, _PANELS - 1)
    x = 2.0 * (_PANELS * v - panel) - 1.0
    coefficients = jnp.asarray(_table(num_symbols), v.dtype)[jax.lax.stop_gradient(panel).astype(jnp.int32)]
    value, slope = coefficients[..., -1], jnp.zeros_like(v)
    for i in range(_DEGREE - 1, -1, -1):
        value, slope = coefficients[..., i] + x * value, value + x * slope
    return value, slope * _PANELS * v * (1.0 - v)  # dx/dlambda = 2 panels dv/dlambda


@functools.lru_cache(maxsize=64)
def _table(num_symbols: int) -> np.ndarray:
    """Polynomial coefficients of e on each panel, `(panels, degree + 1)`, lowest first, in x in [-1, 1]."""
    x = np.cos(math.pi * (np.arange(_DEGREE + 1) + 0.5) / (_DEGREE + 1))  # Chebyshev's points
    v = (np.arange(_PANELS)[:, None] + 0.5 * (x + 1.0)) / _PANELS
    values = _exact_remainder((_MIDDLE * v / (1.0 - v)).reshape(-1), num_symbols).reshape(v.shape)
    series = np.polynomial.chebyshev.chebfit(x, values.T, _DEGREE)
    # Row k is T_k in powers of x. One series at a time would not do: numpy drops a last coefficient that is exactly 0.
    powers = np.zeros((_DEGREE + 1, _DEGREE + 1))
    for k, unit in enumerate(np.eye(_DEGREE + 1)):
        powers[k, : k + 1] = np.polynomial.chebyshev.cheb2poly(unit[: k + 1])
    return series.T @ powers


@functools.lru_cache(maxsize=64)
def _knots(num_symbols: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Increasing log odds, their log-SNRs, and e(-inf): where Newton's method starts."""
    snr = np.linspace(-20.0, 14.0, 1024)
    r = np.exp(0.5 * snr)
    remainder = _exact_remainder(r, num_symbols)
    return 0.5 * snr + 0.25 * r**2 + remainder, snr, float(_exact_remainder(np.zeros(1), num_symbols)[0])


def _exact_remainder(r: np.ndarray, num_symbols: int) -> np.ndarray:
    """The remainder e = log(alpha / (r (1 - alpha))) - r**2 / 4 for r >= 0, in float64."""
    few, many = r <= 40.0, np.maximum(r, 40.0)
    # Far out each of the others competes alone: 1 - alpha = K Phi(-r / sqrt 2) = K erfcx(r / 2) exp(-r**2 / 4) / 2.
    far = -np.log(many) - np.log(0.5 * num_symbols * special.erfcx(0.5 * many))
    near = np.minimum(r, 40.0)
    log_lost = _log_lost(near, num_symbols)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_alpha = np.log1p(-np.exp(log_lost)) - np.log(near)
    # Where little survives alpha is the integral of its slope, which does not cancel.
    u, weights = np.polynomial.legendre.leggauss(20)
    points = np.minimum(near, 2.0)[:, None] * 0.5 * (u + 1.0)
    mean_slope = np.exp(_log_slope(points.reshape(-1), num_symbols)).reshape(points.shape) @ (0.5 * weights)
    log_alpha = np.where(near > 2.0, log_alpha, np.log(mean_slope))
    return np.where(few, log_alpha - log_lost - near**2 / 4.0, far)


def _log_lost(r: np.ndarray, num_symbols: int) -> np.ndarray:
    """log(1 - alpha) = log K / (K - 1) integral phi(z - r) (1 - Phi(z)^(K - 1)) dz."""
    z = np.arange(-12.0, 37.0, _STEP)
    beaten = np.log(-np.expm1((num_symbols - 1) * special.log_ndtr(z)))
    return _log_convolution(r, z, beaten) + math.log(num_symbols / (num_symbols - 1))


def _log_slope(r: np.ndarray, num_symbols: int) -> np.ndarray:
    """Log d alpha / dr = log K integral phi(z - r) phi(z) Phi(z)^(K - 2) dz."""
    z = np.arange(-12.0, 16.0, _STEP)
    best = -0.5 * z**2 - 0.5 * math.log(2.0 * math.pi) + (num_symbols - 2) * special.log_ndtr(z)
    return _log_convolution(r, z, best) + math.log(num_symbols)


def _log_convolution(r: np.ndarray, z: np.ndarray, log_f: np.ndarray) -> np.ndarray:
    """Log of the integral of phi(z - r) exp(log_f(z)) over z."""
    terms = log_f - 0.5 * (z - r[:, None]) ** 2
    top = terms.max(-1, keepdims=True)
    return top[:, 0] + np.log(np.exp(terms - top).sum(-1)) + math.log(_STEP) - 0.5 * math.log(2.0 * math.pi)


@dataclasses.dataclass(frozen=True)
class Duality(schedules.Survival):
    """The survival of the argmax of a Gaussian diffusion: `Uniform(K, Duality(gaussian, K))` is its discrete shadow.

    gaussian: a Gaussian schedule, of which only the log-SNR matters here. Sahoo et al. 2025 make the log-SNR linear in
        time: `VE`.
    num_symbols: K, at least 2.

    sigma falls like exp(-r**2 / 4) towards the data: below 1e-38 (r = 18) it is 0 in float32 where `log_snr` and its
    inverse `time` are still right.
    """

    gaussian: schedules.Gaussian
    num_symbols: int

    def __post_init__(self):
        if not isinstance(self.gaussian, schedules.Gaussian):
            raise ValueError(
                f"Duality needs a Gaussian schedule (VPLinear, VPCosine, VE, EDM, CondOT), got {self.gaussian!r}"
            )
        if self.num_symbols < 2:
            raise ValueError(f"num_symbols must be at least 2 for an argmax to change, got {self!r}")

    def alpha(self, t):
        """T(r), from its log odds."""
        return jax.nn.sigmoid(self.log_snr(t))

    def sigma(self, t):
        """1 - T(r), from its log odds."""
        return jax.nn.sigmoid(-self.log_snr(t))

    def sigma_prime(self, t):
        """-T'(r) dr/dt, where r = a / s; 0 where nothing is lost yet."""
        g, snr = self.gaussian, self.gaussian.log_snr(t)
        odds, slope = _odds_and_slope(snr, self.num_symbols)
        # T' = alpha sigma 2 y' / r, with alpha / r taken together: it is finite at r = 0.
        log_alpha_over_r = 0.25 * jnp.exp(snr) + _remainder(snr, self.num_symbols)[0] - jax.nn.softplus(odds)
        lost, slope = jax.nn.sigmoid(-odds), 2.0 * slope * jnp.exp(log_alpha_over_r)
        r_prime = (g.alpha_prime(t) * g.sigma(t) - g.alpha(t) * g.sigma_prime(t)) / g.sigma(t) ** 2
        return jnp.where(lost > 0, -lost * slope * r_prime, 0.0)

    def log_snr(self, t):
        """Log odds of survival."""
        return survival_log_odds(self.gaussian.log_snr(t), self.num_symbols)

    def log_snr_prime(self, t):
        """D log odds / d log-SNR times d log-SNR / dt."""
        snr = self.gaussian.log_snr(t)
        return survival_log_odds_prime(snr, self.num_symbols) * self.gaussian.log_snr_prime(t)

    def time(self, log_snr):
        """The Gaussian's time at the log-SNR of these log odds."""
        return self.gaussian.time(gaussian_log_snr(log_snr, self.num_symbols))

    def time_of_sigma(self, sigma):
        """The time at which a fraction `sigma` is lost."""
        sigma = jnp.asarray(sigma)
        return self.time(jnp.log1p(-sigma) - jnp.log(sigma))
