"""Improved DDPM's hybrid objective: the simple loss teaches the mean, the bound teaches the variance."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ddjax.grids import check_grid, step_at
from ddjax.objectives.base import Objective, noised
from ddjax.predictions import GAUSSIAN_KINDS, Prediction, check_kind
from ddjax.processes import LearnedVariance


def ddpm_hybrid(
    process: LearnedVariance,
    kind: str = "noise",
    *,
    times: Float[Array, " steps+1"] | Sequence[float],
    error: str = "noise",
    vlb_weight: float = 1e-3,
) -> Objective:
    """The squared error plus vlb_weight times the sum of the steps' KLs, the latter blind to the mean.

    (Nichol & Dhariwal 2021, eq. 16 and section 3.1.) The network's output is twice as long on the last axis as the
    state: the prediction, then v (`processes.LearnedVariance`).

    times: a decreasing grid of the chain; it ends where there is noise, and what lies beyond (the decoder) has no
        learned variance. vlb_weight: of the sum over steps in nats (the released code's 0.001 is of bits).
    Raises ValueError for another process, a grid that is none, or one that ends without noise.
    """
    if not isinstance(process, LearnedVariance):
        raise ValueError(f"ddpm_hybrid learns the variance of a LearnedVariance process, got {process!r}")
    check_kind(error, GAUSSIAN_KINDS, process)
    grid = check_grid(times)
    if not float(process.schedule.sigma(grid[-1])) > 0:
        raise ValueError(
            f"ddpm_hybrid's chain must end where there is noise, {process.schedule!r} has none at "
            f"{np.asarray(grid[-1])}; end the grid at process.t_range[0]"
        )
    steps = grid.shape[0] - 1

    def draw(u, keys, x0):
        t, s = step_at(grid, u)
        xt = process.marginal(x0, t).sample(keys)
        target = process.convert(Prediction(x0, "x0"), error, xt, t).value

        def errors(prediction):
            simple = (target - process.convert(prediction, error, xt, t).value) ** 2
            channels, value = x0.shape[-1], prediction.value
            frozen = jnp.concatenate([jax.lax.stop_gradient(value[..., :channels]), value[..., channels:]], -1)
            kl = process.step_kl(x0, Prediction(frozen, prediction.kind), xt, s, t)
            return simple + vlb_weight * steps * kl

        return xt, t, errors

    return noised(process, kind, draw)
