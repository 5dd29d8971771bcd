"""Thresholding: keeping the predicted x0 in the range of the data, which strong guidance leaves.

Functions from denoisers to denoisers, at the level of x0, for any solver.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from ddjax.predictions import Prediction, evaluations
from ddjax.pytrees import as_pytree
from ddjax.types import Denoise, left_broadcast


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Thresholded:
    """See `static` and `dynamic`."""

    denoise: Denoise
    process: Any = dataclasses.field(metadata={"static": True})
    low: float = dataclasses.field(metadata={"static": True})
    high: float = dataclasses.field(metadata={"static": True})
    quantile: float | None = dataclasses.field(default=None, metadata={"static": True})
    largest: float = dataclasses.field(default=math.inf, metadata={"static": True})

    @property
    def evaluations(self) -> int:
        """As many as the denoiser needs."""
        return evaluations(self.denoise)

    def __call__(self, xt, t, cond=None):
        """The prediction's x0, within the range."""
        said = self.denoise(xt, t, cond)
        x0 = self.process.convert(said, "x0", xt, t).value
        if self.quantile is None:
            inside = jnp.clip(x0, self.low, self.high)
        else:
            size = jnp.quantile(jnp.abs(x0).reshape(x0.shape[0], -1), self.quantile, axis=1)
            size = left_broadcast(jnp.clip(size, self.high, self.largest), x0)
            inside = jnp.clip(x0, -size, size) * (self.high / size)
        if said.value.ndim == xt.ndim:  # what is said beside it, a learned variance, stays
            inside = jnp.concatenate([inside, said.value[..., xt.shape[-1] :]], -1)
        return Prediction(inside, "x0")


def static(denoise: Denoise, process: Any, *, low: float = -1.0, high: float = 1.0) -> Denoise:
    """The predicted x0 clipped to [low, high]. Infinite limits are off, and return `denoise` itself."""
    _check(process)
    if not low < high:
        raise ValueError(f"static thresholding needs low < high, got {(low, high)}")
    if math.isinf(low) and math.isinf(high):
        return denoise
    return Thresholded(as_pytree(denoise), process, float(low), float(high))


def dynamic(
    denoise: Denoise, process: Any, *, quantile: float = 0.995, limit: float = 1.0, largest: float = math.inf
) -> Denoise:
    """The predicted x0 clipped to [-s, s] and shrunk to [-limit, limit] (Saharia et al. 2022, Imagen, section 2.3).

    s is the quantile of |x0| over the sites of each example by itself, at least `limit` and at most `largest`. An
    infinite limit is off, and returns `denoise` itself.
    """
    _check(process)
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile lies in (0, 1], got {quantile}")
    if not 0 < limit <= largest:
        raise ValueError(f"dynamic thresholding needs 0 < limit <= largest, got {(limit, largest)}")
    if math.isinf(limit):
        return denoise
    return Thresholded(as_pytree(denoise), process, -float(limit), float(limit), float(quantile), float(largest))


def _check(process: Any) -> None:
    if getattr(process, "state", None) != "gaussian" or "x0" not in process.kinds:
        raise ValueError(f"thresholding is for Gaussian states with an x0 to predict, got {type(process).__name__}")
