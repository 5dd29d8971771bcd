"""Schedules that are learned with the network: `parameters` (arrays) and `with_parameters`.

JAX arrays, traced or not, are held as they are, so that a loss can be differentiated by them; NumPy's become constants,
and the schedule then compares by value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ddjax.frozen import Frozen
from ddjax.schedules.base import ByLogSNR, Times, array, held, require
from ddjax.schedules.log_snr import LogSNRLinear


@dataclasses.dataclass(frozen=True)
class Monotone(ByLogSNR):
    """VDM's monotone network (Kingma et al. 2021, appendix H): any decreasing log-SNR, its two ends learned as well.

    log_snr = ends[0] - (ends[0] - ends[1]) (f(t) - f(0)) / (f(1) - f(0)),
    f(t) = |slope| t + mean over j of |c_j| tanh((|a_j| (2t - 1) + b_j) / 2)

    ends: the log-SNR at t = 0 and at t = 1. slope, hidden = (a, b, c): the shape between them. `initial` makes a
        straight line with small ripples.
    clock: the ends of the straight line of log-SNR on which networks are told the time: what they are told is then a
        function of the noise level, and the bound does not depend on the shape.
    """

    ends: Frozen | Array | Sequence[float]
    slope: Frozen | Array | float
    hidden: Frozen | Array | Sequence[Sequence[float]]
    clock: tuple[float, float] = (13.3, -5.0)
    scaling: str = "vp"

    variance_parameters = ("slope", "hidden")  # on which the bound does not depend

    def __post_init__(self):
        super().__post_init__()
        for name, shape in (("ends", (2,)), ("slope", ()), ("hidden", (3, None))):
            value = held(getattr(self, name))
            found = np.shape(value)
            fits = len(found) == len(shape) and all(b in (a, None) for a, b in zip(found, shape, strict=True))
            require(fits, self, f"{name} must have shape {shape}, got {found}")
            object.__setattr__(self, name, value)
        if isinstance(self.ends, Frozen):
            require(self.ends.values[0] > self.ends.values[1], self, "the log-SNR must fall from ends[0] to ends[1]")

    @classmethod
    def initial(
        cls,
        width: int = 64,
        seed: int = 0,
        log_snr_max: float = 13.3,
        log_snr_min: float = -5.0,
        scaling: str = "vp",
    ) -> Monotone:
        """Where learning starts: nearly a straight line between these ends, with `width` hidden units."""
        a, b, c = np.random.default_rng(seed).normal(size=(3, width))
        ends = (log_snr_max, log_snr_min)
        return cls(ends, 1.0, np.stack([4.0 * a, 2.0 * b, 0.1 * c]), clock=ends, scaling=scaling)

    @property
    def parameters(self) -> dict[str, Array]:
        """What learning changes: `{"ends", "slope", "hidden"}`."""
        return {name: jnp.array(array(getattr(self, name), 0.0)) for name in ("ends", "slope", "hidden")}

    def with_parameters(self, parameters: dict[str, Array]) -> Monotone:
        """The schedule with these."""
        return dataclasses.replace(self, **parameters)

    def _shape(self, t: Times) -> tuple[Times, Times, Array]:
        """f(t) - f(0), f'(t), and f(1) - f(0)."""
        a, b, c = array(self.hidden, t)
        a, c, slope = jnp.abs(a), jnp.abs(c) / b.shape[0], jnp.abs(array(self.slope, t))
        z = jnp.tanh(0.5 * (a * (2.0 * t[..., None] - 1.0) + b))
        start, stop = jnp.tanh(0.5 * (b - a)), jnp.tanh(0.5 * (b + a))
        rise = slope * t + ((z - start) * c).sum(-1)
        return rise, slope + (a * c * (1.0 - z**2)).sum(-1), slope + ((stop - start) * c).sum()

    def log_snr(self, t):
        """From ends[0] down to ends[1]."""
        rise, _, whole = self._shape(jnp.asarray(t))
        first, last = array(self.ends, t)
        return first + (last - first) * (rise / whole)

    def log_snr_prime(self, t):
        """The closed form of the derivative."""
        _, slope, whole = self._shape(jnp.asarray(t))
        first, last = array(self.ends, t)
        return (last - first) * slope / whole

    def time(self, log_snr):
        """By bisection; 0 or 1 beyond the ends. Its derivatives are those of the inverse function."""
        log_snr = jnp.asarray(log_snr)
        dtype = jnp.result_type(log_snr, float)

        def halve(_, interval):
            low, high = interval
            middle = 0.5 * (low + high)
            early = self.log_snr(middle) > log_snr
            return jnp.where(early, middle, low), jnp.where(early, high, middle)

        low, high = jnp.zeros(log_snr.shape, dtype), jnp.ones(log_snr.shape, dtype)
        low, high = jax.lax.fori_loop(0, jnp.finfo(dtype).nmant + 2, halve, (low, high))
        t = 0.5 * (low + high)  # by comparisons alone, which have no derivatives
        step = (self.log_snr(t) - log_snr) / self.log_snr_prime(t)  # Newton's, which carries them
        return jnp.clip(t - step, 0.0, 1.0)

    def network_time(self, t):
        """The noise level's place on a straight line of log-SNR between the ends of `clock`."""
        return (self.clock[0] - self.log_snr(jnp.asarray(t))) / (self.clock[0] - self.clock[1])


@dataclasses.dataclass(frozen=True)
class PerSite(ByLogSNR):
    """A log-SNR for each site, all with the same ends (Sahoo et al. 2024, MuLAN, section 3.3, without their context).

    log_snr_i = log_snr_max - (log_snr_max - log_snr_min) f_i(t) / f_i(1),  f_i' = (a_i t^2 + b_i t + c_i)^2 + 1e-3

    coefficients: (a, b, c), shape `(3, *sites)`; `initial` makes straight lines. Times have the state's axes or
        broadcast against its sites, as a time `(batch, 1, ...)` does; then results are `(batch, *sites)`. Networks are
        told the clock itself.
    There is no one time for a log-SNR: what needs that (grids and ranges in log-SNR) takes `common`, which is linear.
    """

    coefficients: Frozen | Array | Any
    log_snr_max: float = 13.3
    log_snr_min: float = -5.0
    scaling: str = "vp"

    def __post_init__(self):
        super().__post_init__()
        value = held(self.coefficients)
        require(len(np.shape(value)) > 1 and np.shape(value)[0] == 3, self, "coefficients must be (3, *sites)")
        object.__setattr__(self, "coefficients", value)
        _ = self.common  # checks the ends

    @classmethod
    def initial(
        cls, shape: Sequence[int], log_snr_max: float = 13.3, log_snr_min: float = -5.0, scaling: str = "vp"
    ) -> PerSite:
        """Where learning starts: a straight line at each site of states of this shape."""
        coefficients = np.zeros((3, *shape))
        coefficients[2] = 1.0
        return cls(coefficients, log_snr_max, log_snr_min, scaling)

    @property
    def common(self) -> LogSNRLinear:
        """The straight line between the ends."""
        return LogSNRLinear(self.log_snr_max, self.log_snr_min, self.scaling)

    @property
    def parameters(self) -> Array:
        """What learning changes: the coefficients."""
        return jnp.array(array(self.coefficients, 0.0))

    def with_parameters(self, parameters: Array) -> PerSite:
        """The schedule with these."""
        return dataclasses.replace(self, coefficients=parameters)

    def _integral(self, t: Times) -> Array:
        a, b, c = array(self.coefficients, t)
        powers = (c**2 + 1e-3, b * c, (b**2 + 2.0 * a * c) / 3.0, 0.5 * a * b, 0.2 * a**2)
        total = jnp.zeros(())
        for power in reversed(powers):
            total = (total + power) * t
        return total

    def log_snr(self, t):
        """From log_snr_max down to log_snr_min, at each site."""
        t = jnp.asarray(t)
        return self.log_snr_max - (self.log_snr_max - self.log_snr_min) * (
            self._integral(t) / self._integral(jnp.ones((), t.dtype))
        )

    def log_snr_prime(self, t):
        """-(log_snr_max - log_snr_min) f'(t) / f(1)."""
        t = jnp.asarray(t)
        a, b, c = array(self.coefficients, t)
        slope = ((a * t + b) * t + c) ** 2 + 1e-3
        return -(self.log_snr_max - self.log_snr_min) * slope / self._integral(jnp.ones((), t.dtype))

    def time(self, log_snr):
        """Raises NotImplementedError: no one time has this log-SNR at all sites."""
        raise NotImplementedError("PerSite has a time for each site: ask `common`, the straight line between its ends")


__all__ = ["Monotone", "PerSite"]
