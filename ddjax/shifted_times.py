"""Telling the network another time: the one at which the state's variance is what the schedule says.

(Li et al. 2024, "Alleviating Exposure Bias in Diffusion Models through Sampling with Shifted Time Steps".) A function
from denoisers to denoisers, for any solver.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ddjax.predictions import Prediction, evaluations
from ddjax.processes.gaussian import divide, gaussian_of
from ddjax.pytrees import as_pytree
from ddjax.types import Denoise, left_broadcast, sites


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TimeShifted:
    """See `time_shifted`."""

    denoise: Denoise
    process: Any = dataclasses.field(metadata={"static": True})  # Gaussian
    window: float = dataclasses.field(metadata={"static": True})
    cutoff: float = dataclasses.field(metadata={"static": True})
    spread: float = dataclasses.field(metadata={"static": True})
    candidates: int = dataclasses.field(metadata={"static": True})

    @property
    def evaluations(self) -> int:
        """As many as the denoiser needs."""
        return evaluations(self.denoise)

    def told(self, xt, t):
        """The time that the network is told, for each example."""
        if t.ndim != 1 or sites(xt) < 2:
            raise ValueError(
                "the variance over an example's sites needs two of them, and one time for all: got shapes "
                f"{xt.shape} and {t.shape}"
            )
        variance = jnp.var(xt.reshape(xt.shape[0], -1), axis=1, ddof=1)
        offsets = jnp.linspace(-0.5, 0.5, self.candidates, dtype=t.dtype) * self.window
        times = jnp.clip(t[:, None] + offsets, 0.0, 1.0)
        schedule = self.process.schedule
        expected = schedule.alpha(times) ** 2 * self.spread + schedule.sigma(times) ** 2
        best = jnp.argmin(jnp.abs(expected - variance[:, None]), axis=1)
        found = jnp.take_along_axis(times, best[:, None], axis=1)[:, 0]
        return jnp.where((t > self.cutoff) & (schedule.alpha(t) > 0), found, t)

    def __call__(self, xt, t, cond=None):
        """The noise that is predicted at the other time, said of this one."""
        told = self.told(xt, t)
        prediction = self.denoise(xt, told, cond)
        x0, noise = (self.process.convert(prediction, kind, xt, told).value for kind in ("x0", "noise"))
        alpha, sigma = (f(left_broadcast(t, xt)) for f in (self.process.schedule.alpha, self.process.schedule.sigma))
        return Prediction(jnp.where(left_broadcast(told == t, xt), x0, divide(xt - sigma * noise, alpha)), "x0")


def time_shifted(
    denoise: Denoise,
    process: Any,
    *,
    window: float = 0.04,
    cutoff: float = 0.3,
    spread: float = 0.0,
    candidates: int = 41,
) -> Denoise:
    """The network is told the time in [t - window / 2, t + window / 2] that fits the state best.

    The best of `candidates` (odd, so that t is one) is that where alpha^2 spread + sigma^2 is nearest to the variance
    over the sites of the example, by itself. spread: the variance of the data over the sites of one example; the
    paper's 0 is for noise that outweighs it. cutoff: at and below this time, t itself. window: 0 is off, and returns
    `denoise`. process: Gaussian, or an interpolant from Gaussian noise; ValueError for others.
    """
    found = gaussian_of(process)
    if found is None:
        raise ValueError(f"time_shifted is for processes.Gaussian, got {type(process).__name__}")
    if window < 0 or spread < 0 or candidates < 1 or candidates % 2 == 0:
        raise ValueError(
            "time_shifted needs window, spread >= 0 and an odd number of candidates, got "
            f"{(window, spread, candidates)}"
        )
    if window == 0:
        return denoise
    return TimeShifted(as_pytree(denoise), found, float(window), float(cutoff), float(spread), int(candidates))
