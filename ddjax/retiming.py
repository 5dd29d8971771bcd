"""Using a network that was trained under one Gaussian schedule under another, without retraining.

At equal log-SNR two noisy states of the same law differ by a scale alone (Karras et al. 2022, section 2 and table 1;
Lipman et al. 2024, "Flow matching guide and code").
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ddjax.predictions import Prediction
from ddjax.predictions import evaluations as cost
from ddjax.processes import Gaussian
from ddjax.processes.from_source import FromSource
from ddjax.processes.gaussian import gaussian_of
from ddjax.pytrees import as_pytree
from ddjax.types import Denoise, State, Time, left_broadcast

_SCALE_FREE = ("x0", "noise", "edm")  # kinds whose value is the same at any scale of x_t


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Retimed:
    """See `retime`."""

    denoise: Denoise
    old: Gaussian = dataclasses.field(metadata={"static": True})
    new: Gaussian = dataclasses.field(metadata={"static": True})

    @property
    def evaluations(self) -> int:
        """No more than without."""
        return cost(self.denoise)

    def __call__(self, xt, t, cond=None):
        """Ask at the old process's time and scale."""
        t = jnp.asarray(t)
        told = jnp.clip(self.old.schedule.time(self.new.schedule.log_snr(t)), 0.0, 1.0)
        x_old = xt * (_size(self.old, xt, told) / _size(self.new, xt, t))
        prediction = self.denoise(x_old, told, cond)
        kind = prediction.kind if prediction.kind in _SCALE_FREE else "edm"
        if kind == "noise" and isinstance(self.new, FromSource):  # which reads it as the interpolant's z
            kind = "edm"
        return Prediction(self.old.convert(prediction, kind, x_old, told).value, kind)


def _size(process: Gaussian, x: State, t: Time) -> Array:
    """sqrt(sigma^2 + alpha^2 data_std^2): never 0, so that the ratio of two is right at both ends of time."""
    t = left_broadcast(t, x)
    return jnp.sqrt(process.schedule.sigma(t) ** 2 + (process.schedule.alpha(t) * process.data_std) ** 2)


def retime(denoise: Denoise, old: Any, new: Any) -> Denoise:
    """A denoiser for the process `new` from one for `old`: exact wherever both have the noise level.

    Samplers, bounds and guidance then take it with `new`, whatever the network predicts (the result is of kind "x0",
    "noise" or "edm"). Noise levels beyond those of `old` are shown to the network as its last one, at that one's width.
    old, new: Gaussian, or interpolants from Gaussian noise.
    Raises ValueError for other processes, other data_std, and schedules with a log-SNR for each site.
    """
    for process in (old, new):
        if gaussian_of(process) is None:
            raise ValueError(f"retime is for processes.Gaussian, got {type(process).__name__}")
    old, new = gaussian_of(old), gaussian_of(new)
    if old.data_std != new.data_std:
        raise ValueError(f"retime needs processes of one data_std, got {old.data_std} and {new.data_std}")
    for process in (old, new):
        if process.schedule.common is not process.schedule:
            raise ValueError(f"retime needs schedules with one log-SNR for all sites, got {process.schedule!r}")
    return Retimed(as_pytree(denoise), old, new)


__all__ = ["retime"]
