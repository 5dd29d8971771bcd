"""The change of a frozen velocity along its own ODE, learned by a light network (Zhao et al. 2024, FlowTurbo)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ddjax import random
from ddjax.objectives.base import Objective, Reduction
from ddjax.types import Denoise, Rows, State, Time, left_broadcast


def velocity_refiner(process: Any, denoise: Denoise, *, longest: float = 0.12) -> Objective:
    """The squared error of r(x_s, v_t, s) as v(x_s, s) - v_t, for Euler's x_s = x_t + (s - t) v_t.

    Its optimum is 0, whatever the data: x_s and s say what v(x_s, s) is. Train it as any objective; then
    `solvers.flow_turbo.refined(denoise, apply, params)`, and `FlowTurbo` with blocks "R".

    denoise: the frozen network, with its guidance if it will be sampled so. The refiner's `apply(params, inputs, s,
        cond)` gets x_s and v_t on one last axis, and gives the change, shaped like x_s.
    longest: t - s is uniform from 0 to this (theirs: 0.12, one for the whole batch); t over `process.t_range`.
    Metrics: `loss`, and `unrefined`, the loss of no change.
    Raises ValueError for a process without velocities, and for `longest` outside (0, 1].
    """
    if "velocity" not in process.kinds or process.state != "gaussian":
        raise ValueError(f"{type(process).__name__} has no velocities to refine")
    if not 0 < longest <= 1:
        raise ValueError(f"longest is a length of time in (0, 1], got {longest}")
    low, high = process.t_range

    def velocity(x: State, t: Time, cond: Any) -> State:
        return process.convert(denoise(x, t, cond), "velocity", x, t).value

    def objective(key, apply, params, x0, cond=None, weights=None, rows=None, train=True):
        rows, reduce = Rows.of(x0, rows), Reduction.of(weights, x0)
        time_key, length_key, noise_key, network_key = jax.random.split(key, 4)
        t = low + (high - low) * random.stratified(time_key, rows)
        s = jnp.maximum(t - longest * random.independent(length_key, rows), low)
        xt = process.marginal(x0, t).sample(random.example_keys(noise_key, rows.index))
        xt = reduce.shown(process, xt)
        v = velocity(xt, t, cond)
        xs = xt + left_broadcast(s - t, xt) * v
        target = jax.lax.stop_gradient(velocity(xs, s, cond) - v)
        options = {"train": True, "rng": random.example_keys(network_key, rows.index)} if train else {}
        found = apply(params, jax.lax.stop_gradient(jnp.concatenate([xs, v], axis=-1)), s, cond, **options)
        loss = reduce((found.astype(target.dtype) - target) ** 2)
        return loss, {"loss": loss, "unrefined": reduce(target**2)}

    return objective
