"""Gaussian schedules given by their log-SNR, under any scaling (see `ByLogSNR`), and a schedule up to the data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ddjax.frozen import Frozen
from ddjax.schedules.base import ByLogSNR, Gaussian, Times, require


def _require_range(schedule: ByLogSNR) -> None:
    low, high = schedule.log_snr_min, schedule.log_snr_max
    require(-math.inf < low < high < math.inf, schedule, "needs finite log_snr_min < log_snr_max")


@dataclasses.dataclass(frozen=True)
class LogSNRLinear(ByLogSNR):
    """The log-SNR falls linearly (Kingma et al. 2021, VDM, where learning starts)."""

    log_snr_max: float = 13.3
    log_snr_min: float = -5.0
    scaling: str = "vp"

    def __post_init__(self):
        super().__post_init__()
        _require_range(self)

    def log_snr(self, t):
        """A straight line between the two ends."""
        return self.log_snr_max * (1.0 - t) + self.log_snr_min * t

    def log_snr_prime(self, t):
        """log_snr_min - log_snr_max."""
        return jnp.full_like(t, self.log_snr_min - self.log_snr_max)

    def time(self, log_snr):
        """Inverse of the straight line."""
        return (self.log_snr_max - jnp.asarray(log_snr)) / (self.log_snr_max - self.log_snr_min)


@dataclasses.dataclass(frozen=True)
class Laplace(ByLogSNR):
    """Uniform times have log-SNRs of a Laplace law (Hang et al. 2024, "Improved noise schedule...").

    The law's tails are cut off at log_snr_max and log_snr_min, where the paper's reach infinity.
    """

    mean: float = 0.0
    scale: float = 0.5
    log_snr_max: float = 15.0
    log_snr_min: float = -15.0
    scaling: str = "vp"

    def __post_init__(self):
        super().__post_init__()
        _require_range(self)
        require(self.log_snr_min < self.mean < self.log_snr_max, self, "mean must lie between the ends")
        require(self.scale > 0, self, "scale must be positive")

    @property
    def _cut(self) -> tuple[float, float, float]:
        """The law's mass above log_snr_max, below log_snr_min, and between."""
        above, below = (
            0.5 * math.exp(-abs(end - self.mean) / self.scale) for end in (self.log_snr_max, self.log_snr_min)
        )
        return above, below, 1.0 - above - below

    def _tails(self, t: Times) -> tuple[Times, Times]:
        """The law's mass above and below the log-SNR at t, each accurate where it is small."""
        above, below, between = self._cut
        return above + between * t, below + between * (1.0 - t)

    def log_snr(self, t):
        """The law's quantile, from the nearer tail."""
        above, below = self._tails(t)
        nearer = self.scale * jnp.log(2.0 * jnp.minimum(above, below))  # negative
        value = self.mean + jnp.where(above < below, -nearer, nearer)
        return jnp.clip(value, self.log_snr_min, self.log_snr_max)  # where a tail underflows

    def log_snr_prime(self, t):
        """Minus the mass between the ends over the law's density."""
        return -self.scale * self._cut[2] / jnp.minimum(*self._tails(t))

    def time(self, log_snr):
        """The law's mass above this log-SNR, less what is cut off."""
        above, _, between = self._cut
        z = (jnp.asarray(log_snr) - self.mean) / self.scale
        tail = 0.5 * jnp.exp(-jnp.abs(z))
        return (jnp.where(z > 0, tail, 1.0 - tail) - above) / between


@dataclasses.dataclass(frozen=True)
class Sigmoid(ByLogSNR):
    """alpha^2 falls like a sigmoid of time (Jabri et al. 2022; Chen 2023, "On the importance of noise scheduling").

    alpha^2 = (sigmoid(end / tau) - sigmoid(x)) / (sigmoid(end / tau) - sigmoid(start / tau)),
    x = (start + t (end - start)) / tau, under the "vp" scaling. The authors clip it at 1e-9; here it is scaled from [0,
    1] into [least, 1], so that the log-SNR stays finite at t = 1.
    """

    start: float = -3.0
    end: float = 3.0
    tau: float = 1.0
    least: float = 1e-9
    scaling: str = "vp"

    def __post_init__(self):
        super().__post_init__()
        require(self.start < self.end and self.tau > 0, self, "needs start < end and tau > 0")
        require(0 < self.least < 1, self, "least must lie in (0, 1)")

    @property
    def _ends(self) -> tuple[float, float, float]:
        """The sigmoid's arguments at both ends, and what alpha^2 falls by for each unit that the sigmoid rises."""
        low, high = self.start / self.tau, self.end / self.tau
        return low, high, (1.0 - self.least) / (_sigmoid(high) - _sigmoid(low))

    def _parts(self, t: Times) -> tuple[Times, Times]:
        """alpha^2 and 1 - alpha^2, without cancellation, by sigmoid(a) - sigmoid(b) = (1 - e^(b-a)) s(a) s(-b)."""
        low, high, scale = self._ends
        x = low + t * (high - low)
        lost = -jnp.expm1(-t * (high - low)) * jax.nn.sigmoid(x) * _sigmoid(-low)
        left = -jnp.expm1(-(1.0 - t) * (high - low)) * _sigmoid(high) * jax.nn.sigmoid(-x)
        return self.least + scale * left, scale * lost

    def log_snr(self, t):
        """log(alpha^2 / (1 - alpha^2)); infinite at t = 0."""
        left, lost = self._parts(t)
        return jnp.log(left) - jnp.log(lost)

    def log_snr_prime(self, t):
        """(alpha^2)' / (alpha^2 (1 - alpha^2))."""
        left, lost = self._parts(t)
        low, high, scale = self._ends
        x = low + t * (high - low)
        return -scale * (high - low) * jax.nn.sigmoid(x) * jax.nn.sigmoid(-x) / (left * lost)

    def time(self, log_snr):
        """By the logit of the sigmoid, from both of its sides."""
        low, high, scale = self._ends
        log_snr = jnp.asarray(log_snr)
        above = _sigmoid(low) + jax.nn.sigmoid(-log_snr) / scale
        below = _sigmoid(-high) + (jax.nn.sigmoid(log_snr) - self.least) / scale
        return (jnp.log(above) - jnp.log(below) - low) / (high - low)


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


@dataclasses.dataclass(frozen=True)
class Table(ByLogSNR):
    """A schedule through given log-SNRs at equally spaced times from 0 to 1, piecewise linear in log-SNR between them.

    log_snrs: decreasing and finite, at least two. At a point the slope is that of the piece after it.
    A chain of T steps has its step i = 1 ... T at t = (i - 1) / (T - 1).
    """

    log_snrs: Frozen | Sequence[float]
    scaling: str = "vp"

    def __post_init__(self):
        values = np.asarray(self.log_snrs, np.float64)
        if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all() or not (np.diff(values) < 0).all():
            raise ValueError(f"Table(log_snrs): needs at least two finite, decreasing log-SNRs, got {values}")
        object.__setattr__(self, "log_snrs", Frozen(values))
        super().__post_init__()

    @classmethod
    def from_betas(cls, betas: Sequence[float]) -> Table:
        """A chain's variances: alpha_i^2 = prod (1 - beta) up to i (Ho et al. 2020, eq. 4)."""
        betas = np.asarray(betas, np.float64)
        if betas.ndim != 1 or not ((betas > 0) & (betas < 1)).all():
            raise ValueError(f"Table.from_betas(betas): betas must lie in (0, 1), got {betas}")
        log_kept = np.cumsum(np.log1p(-betas))
        return cls(log_kept - np.log(-np.expm1(log_kept)))

    @classmethod
    def ddpm_linear(cls, steps: int = 1000) -> Table:
        """DDPM's betas, from 1e-4 to 0.02 at 1000 steps, as many times larger as steps are fewer (Ho et al. 2020).

        Raises ValueError below 21 steps, where a beta would pass 1.
        """
        return cls.from_betas(np.linspace(1e-4, 0.02, steps) * 1000.0 / steps)

    @classmethod
    def ddpm_cosine(cls, steps: int = 1000, s: float = 0.008, largest: float = 0.999) -> Table:
        """Improved DDPM's betas, of cos^2(pi/2 (t + s) / (1 + s)), none above `largest` (Nichol & Dhariwal 2021)."""
        kept = np.cos(0.5 * math.pi * (np.arange(steps + 1) / steps + s) / (1.0 + s)) ** 2
        return cls.from_betas(np.minimum(1.0 - kept[1:] / kept[:-1], largest))

    def _piece(self, i: Array, dtype) -> tuple[Array, Array]:
        """The log-SNR at the start of piece i and its fall along the piece."""
        values = np.asarray(self.log_snrs)
        return jnp.asarray(values[:-1], dtype)[i], jnp.asarray(-np.diff(values), dtype)[i]

    @property
    def _pieces(self) -> int:
        return np.shape(self.log_snrs)[0] - 1

    def _index(self, t: Times) -> Array:
        return jnp.clip(jnp.floor(t * self._pieces), 0, self._pieces - 1).astype(jnp.int32)

    def log_snr(self, t):
        """The straight line between the points on both sides."""
        t = jnp.asarray(t)
        i = self._index(t)
        start, fall = self._piece(i, t.dtype)
        return start - fall * (t * self._pieces - i)

    def log_snr_prime(self, t):
        """The slope of the piece."""
        t = jnp.asarray(t)
        return -self._pieces * self._piece(self._index(t), t.dtype)[1]

    def time(self, log_snr):
        """Inverse of the piece in which this log-SNR lies; of the first or last piece's line beyond the ends."""
        log_snr = jnp.asarray(log_snr)
        dtype = jnp.result_type(log_snr, float)
        falling = jnp.asarray(-np.asarray(self.log_snrs)[1:-1], dtype)
        i = jnp.searchsorted(falling, -log_snr.astype(dtype), side="right")
        start, fall = self._piece(i, dtype)
        return (i + (start - log_snr) / fall) / self._pieces


@dataclasses.dataclass(frozen=True)
class Shifted(ByLogSNR):
    """Another schedule with sigma / alpha multiplied by `factor` at all times: log-SNR - 2 log factor.

    factor: above 1, more noise. Pictures of r times the side need r times the noise for the same loss of what is large
        in them (Hoogeboom et al. 2023, "Simple diffusion", with "vp"); with "cond_ot", of `CondOT`, it is the shift of
        Stable Diffusion 3 (Esser et al. 2024, eq. 23), of which the factor is the square root of the ratio of pixels.
    scaling: that of the result, whatever the schedule's own: 1 and another scaling only rescale.
    """

    schedule: Gaussian
    factor: float = 1.0
    scaling: str = "vp"

    def __post_init__(self):
        super().__post_init__()
        require(isinstance(self.schedule, Gaussian), self, "needs a Gaussian schedule")
        require(0 < self.factor < math.inf, self, "factor must be positive")

    def log_snr(self, t):
        """That of the schedule, less 2 log factor."""
        return self.schedule.log_snr(t) - 2.0 * math.log(self.factor)

    def log_snr_prime(self, t):
        """That of the schedule."""
        return self.schedule.log_snr_prime(t)

    def time(self, log_snr):
        """The schedule's time at 2 log factor more."""
        return self.schedule.time(jnp.asarray(log_snr) + 2.0 * math.log(self.factor))


@dataclasses.dataclass(frozen=True)
class ToData(Gaussian):
    """Another schedule that has noise at t = 0 (`Table`, `VPCosine`, `VE`), with the data there: alpha = 1, sigma = 0.

    Grids that end at t = 0 then end in the data, as those of schedulers do whose last sigma is 0. Nothing changes from
    `least` on, a time so small that the schedule is there what it is at 0; below, sigma / alpha falls in proportion to
    t, and 1 - alpha to t^2 (of a variance-preserving schedule that stays so, to fourth order in sigma).
    """

    schedule: Gaussian

    least = 1e-20

    def __post_init__(self):
        require(isinstance(self.schedule, Gaussian), self, "needs a Gaussian schedule")

    @property
    def common(self):
        """That of the schedule, to the data."""
        return ToData(self.schedule.common)

    def _split(self, t: Times) -> tuple[Times, Times, Times]:
        """Whether t is below `least`, its share of `least` (1 from there on), and the time to ask the schedule at."""
        t = jnp.asarray(t)
        return t < self.least, jnp.minimum(t / self.least, 1.0), jnp.maximum(t, self.least)

    def alpha(self, t):
        """The schedule's; below, 1 - (1 - alpha) share^2."""
        below, share, at = self._split(t)
        alpha = self.schedule.alpha(at)
        return jnp.where(below, 1.0 - (1.0 - alpha) * share**2, alpha)

    def sigma(self, t):
        """The schedule's; below, alpha times the level."""
        below, share, at = self._split(t)
        sigma = self.schedule.sigma(at)
        return jnp.where(below, self.alpha(t) * share * sigma / self.schedule.alpha(at), sigma)

    def alpha_prime(self, t):
        """The schedule's; below, the parabola's."""
        below, share, at = self._split(t)
        slope = -2.0 * (1.0 - self.schedule.alpha(at)) * share / self.least
        return jnp.where(below, slope, self.schedule.alpha_prime(at))

    def sigma_prime(self, t):
        """The schedule's; below, (alpha share)' times the level at `least`."""
        below, _, at = self._split(t)
        slope = (3.0 * self.alpha(t) - 2.0) / self.least * self.schedule.sigma(at) / self.schedule.alpha(at)
        return jnp.where(below, slope, self.schedule.sigma_prime(at))

    def log_snr(self, t):
        """The schedule's; below, higher by -2 log share."""
        _, share, at = self._split(t)
        return self.schedule.log_snr(at) - 2.0 * jnp.log(share)

    def log_snr_prime(self, t):
        """The schedule's; below, -2 / t."""
        below, _, at = self._split(t)
        return jnp.where(below, -2.0 / jnp.where(below, t, 1.0), self.schedule.log_snr_prime(at))

    def time(self, log_snr):
        """The schedule's; of higher log-SNRs than it has, `least` times the share."""
        log_snr = jnp.asarray(log_snr)
        highest = self.schedule.log_snr(jnp.asarray(self.least, jnp.result_type(log_snr, float)))
        above = log_snr > highest
        found = jnp.maximum(self.schedule.time(jnp.where(above, highest, log_snr)), self.least)
        return jnp.where(above, self.least * jnp.exp(-0.5 * jnp.where(above, log_snr - highest, 0.0)), found)

    def network_time(self, t):
        """The schedule's."""
        return self.schedule.network_time(t)
