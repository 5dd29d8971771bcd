"""Diffusion forcing: every frame of a sequence at a noise level of its own (Chen et al. 2024)."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from ddjax import random
from ddjax.grids import range_of
from ddjax.objectives.base import Objective, at_times, noised
from ddjax.types import left_broadcast


def diffusion_forcing(
    process: Any, kind: str, *, t_range: tuple[float, float] | None = None, frame_axes: int = 1
) -> Objective:
    """The bound's integrand with independent times for the frames, each uniform in the process's coordinate.

    Of a frame it is the diffusion term of the bound on it given its neighbours, whose noise levels are drawn too: one
    network then serves every order of denoising. `Staggered(process, Windows(...), own_time=True)` samples with it and
    has its bound, autoregressive or rolling. Networks are told each site's own time, `(batch, *sites)`.

    kind: what the network predicts. t_range: times to integrate; default `process.t_range`.
    frame_axes: how many of the first axes of sites tell frames apart, 1 for `(batch, frames, ...)`; the sites of a
        frame share its time. A causal network makes this a model of sequences of any length.
    Raises ValueError where frame_axes is not at least 1.
    """
    if frame_axes < 1:
        raise ValueError(f"frame_axes must be at least 1 axis of sites, got {frame_axes}")
    ends = range_of(process, t_range)

    def draw(u, keys, x0):
        time_keys, noise_keys = random.split(keys)
        # Not `noised`'s low-discrepancy times: those of one example would depend on each other.
        u = random.uniform(time_keys, x0.shape[1 : 1 + frame_axes], u.dtype)

        def time_at(u):
            return tuple(jnp.broadcast_to(left_broadcast(v, x0), x0.shape) for v in process.time_at(u, ends))

        return at_times(process, time_at, process.path_kl)(u, noise_keys, x0)

    return noised(process, kind, draw)
