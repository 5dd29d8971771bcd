"""Survival that depends on the symbol: rare words may be lost first, common ones last.

    q(x_t = v | x_0 = v) = alpha_v(t),      sigma_v = 1 - alpha_v

Every function takes a time and a symbol that broadcast against each other: `alpha(t, x)` for a time and a symbol per
site, `alpha(t[..., None], jnp.arange(K))` for all K symbols. They follow the dtype of t.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ddjax.categorical import log_or_floor
from ddjax.frozen import Frozen
from ddjax.schedules import Linear, Polynomial, Survival

Times = Float[Array, "*#shape"]
Symbols = Int[Array, "*#shape"]
Values = Float[Array, "*shape"]

_STEEPEST = 0.95  # below 1, where a spindle's symbol would begin to be lost like t**3, beyond float32's reach


class PerSymbol(abc.ABC):
    """A survival schedule for each symbol; a subclass gives sigma and its derivative."""

    @property
    @abc.abstractmethod
    def num_symbols(self) -> int:
        """How many symbols it is for."""

    @property
    @abc.abstractmethod
    def first(self) -> Survival:
        """A schedule for all symbols that loses them, near t = 0, at the pace of those lost first.

        In its coordinate the reveal rates of all symbols are bounded on average: times are drawn in it.
        """

    @abc.abstractmethod
    def alpha(self, t: Times, v: Symbols) -> Values:
        """The probability that symbol v has survived to time t."""

    @abc.abstractmethod
    def sigma(self, t: Times, v: Symbols) -> Values:
        """The probability that symbol v is lost at time t."""

    @abc.abstractmethod
    def sigma_prime(self, t: Times, v: Symbols) -> Values:
        """D sigma_v / dt."""

    def log_sigma(self, t: Times, v: Symbols) -> Values:
        """Log sigma_v, finite at t = 0."""
        return log_or_floor(self.sigma(t, v))

    def rate(self, t: Times, v: Symbols) -> Values:
        """sigma_v' / sigma_v: the rate, backwards in time, at which a lost v comes back."""
        return self.sigma_prime(t, v) / self.sigma(t, v)

    def kept(self, s: Times, t: Times, v: Symbols) -> Values:
        """sigma_v(s) / sigma_v(t): the probability that a v lost at t was lost at s < t already."""
        return self.sigma(s, v) / self.sigma(t, v)

    def revealed(self, s: Times, t: Times, v: Symbols) -> Values:
        """1 - kept: the probability that a v lost at t was there at s < t."""
        return (self.sigma(t, v) - self.sigma(s, v)) / self.sigma(t, v)


def _entries(values: Frozen | Array, v: Symbols, t: Times) -> Values:
    values = values if isinstance(values, jax.Array) else np.asarray(values)
    return jnp.asarray(values, jnp.result_type(t))[v]


@dataclasses.dataclass(frozen=True)
class SymbolPolynomial(PerSymbol):
    """alpha_v = 1 - (1 - eps) t**powers[v] (Shi et al. 2024, section 6, GenMD4; eps is from their code).

    powers: one positive number per symbol. A JAX array, traced or not, is kept as it is, so that a loss can be
        differentiated by it; anything else is frozen, and the schedule then compares by value.
    eps: what survives to t = 1.
    """

    powers: Frozen | Array | Sequence[float]
    eps: float = 0.0

    def __post_init__(self):
        if not 0 <= self.eps < 1:
            raise ValueError(f"eps must lie in [0, 1), got {self.eps}")
        if not isinstance(self.powers, jax.Array):
            values = np.asarray(self.powers, np.float64)
            if values.ndim != 1 or not (values > 0).all() or not np.isfinite(values).all():
                raise ValueError(f"powers must be one positive number per symbol, got {self.powers!r}")
            object.__setattr__(self, "powers", Frozen(values))

    @property
    def num_symbols(self):
        """The number of powers."""
        return np.shape(self.powers)[0]

    @property
    def parameters(self) -> Float[Array, " symbols"]:
        """What learning changes: powers = softplus(parameters)."""
        powers = np.asarray(self.powers)
        return jnp.asarray(powers + np.log(-np.expm1(-powers)), float)

    def with_parameters(self, parameters: Float[Array, " symbols"]) -> SymbolPolynomial:
        """The schedule with these. NumPy's become constants, and the schedule compares by value."""
        if isinstance(parameters, jax.Array):
            return dataclasses.replace(self, powers=jax.nn.softplus(parameters))
        return dataclasses.replace(self, powers=np.logaddexp(0.0, np.asarray(parameters, np.float64)))

    @property
    def first(self):
        """The polynomial of the smallest power. Needs powers that are known."""
        return Polynomial(float(np.min(np.asarray(self.powers))))

    def alpha(self, t, v):
        """1 - (1 - eps) t**w, accurate as t -> 1."""
        return self.eps - (1.0 - self.eps) * jnp.expm1(_entries(self.powers, v, t) * log_or_floor(t))

    def sigma(self, t, v):
        """(1 - eps) t**w."""
        return (1.0 - self.eps) * t ** _entries(self.powers, v, t)

    def sigma_prime(self, t, v):
        """(1 - eps) w t**(w - 1)."""
        w = _entries(self.powers, v, t)
        return (1.0 - self.eps) * w * t ** (w - 1.0)

    # A steep power's sigma underflows in float32; its logarithm and its ratios need not.

    def log_sigma(self, t, v):
        """Log(1 - eps) + w log t."""
        return math.log1p(-self.eps) + _entries(self.powers, v, t) * log_or_floor(t)

    def rate(self, t, v):
        """The power over t."""
        return _entries(self.powers, v, t) / t

    def kept(self, s, t, v):
        """(s / t)**w."""
        return (s / t) ** _entries(self.powers, v, t)

    def revealed(self, s, t, v):
        """1 - (s / t)**w, accurate for s near t."""
        log_ratio = jnp.where(s > 0, jnp.log1p(-jnp.where(s > 0, (t - s) / t, 0.0)), -1e30)
        return -jnp.expm1(_entries(self.powers, v, t) * log_ratio)


@dataclasses.dataclass(frozen=True)
class Spindle(PerSymbol):
    """alpha_v = 1 - t - tilts[v] sin(pi t) (He et al. 2022, DiffusionBERT, section 3.2): a tilted v is lost earlier.

    tilts: one number per symbol, in (-1/pi, 1/pi), where alpha decreases; `from_frequencies` makes the paper's.
    """

    tilts: Frozen | Sequence[float]

    def __post_init__(self):
        values = np.asarray(self.tilts, np.float64)
        if values.ndim != 1 or not (np.abs(values) < 1 / math.pi).all():
            raise ValueError(
                f"tilts must be one number per symbol in (-1/pi, 1/pi), got {self.tilts!r}; from_frequencies clips them"
            )
        object.__setattr__(self, "tilts", Frozen(values))

    @classmethod
    def from_frequencies(cls, frequencies: Sequence[float], strength: float) -> Spindle:
        """The paper's tilts: strength (1 - mean information / information of v), information = -log frequency.

        frequencies: how often each symbol occurs in the data, counts or probabilities; a symbol that never does has
            infinite information.
        strength: the paper's lambda, not negative. 0 is the linear schedule.

        Where no tilt is clipped the expected information left at time t is 1 - t of that of the data. Tilts beyond
        0.95 / pi are clipped, which keeps survival decreasing (the most common symbols of a natural text are).
        The mean is that of the data, the paper's that of the sequence (docs/departures.md).
        """
        p = np.asarray(frequencies, np.float64)
        if p.ndim != 1 or not (p >= 0).all() or (p > 0).sum() < 2:
            raise ValueError(
                f"frequencies must be one number >= 0 per symbol, at least two of them positive, got {frequencies!r}"
            )
        if not 0 <= strength < math.inf:
            raise ValueError(f"strength must be finite and not negative, got {strength}")
        p = p / p.sum()
        information = -np.log(p, where=p > 0, out=np.full_like(p, -np.inf))
        mean = np.sum(p[p > 0] * information[p > 0])
        tilts = strength * (1.0 - mean / information)
        return cls(np.clip(tilts, -_STEEPEST / math.pi, _STEEPEST / math.pi))

    @property
    def num_symbols(self):
        """The number of tilts."""
        return np.shape(self.tilts)[0]

    @property
    def first(self):
        """The schedule without tilts."""
        return Linear()

    def alpha(self, t, v):
        """1 - t - tilt sin(pi t), accurate as t -> 1."""
        return (1.0 - t) - _entries(self.tilts, v, t) * jnp.sin(math.pi * (1.0 - t))

    def sigma(self, t, v):
        """The clock, tilted: t + tilt sin(pi t)."""
        return t + _entries(self.tilts, v, t) * jnp.sin(math.pi * t)

    def sigma_prime(self, t, v):
        """1 + pi tilt cos(pi t)."""
        return 1.0 + math.pi * _entries(self.tilts, v, t) * jnp.cos(math.pi * t)


__all__ = ["PerSymbol", "Spindle", "SymbolPolynomial"]
