"""Objectives for processes that are learned with the network: params is `{"network": ..., "process": ...}`.

A noisy state is a function of the process's parameters and of standard normals, so that the derivative of the loss goes
through the draws to both. (Where it cannot, for tokens, see `genmd4`.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ddjax import random
from ddjax.grids import range_of
from ddjax.objectives.base import Objective, Reduction
from ddjax.predictions import bind
from ddjax.types import Rows


def learned_process(process: Any, make: Callable[[Any], Objective]) -> Objective:
    """The objective `make` gives for a process, as a function also of that process's parameters.

    make: process -> objective, e.g. `lambda process: whole_elbo(process, "x0")`. The parameters take part in whatever
        the objective makes of the process; an objective that leaves out the bound's ends (`elbo`) leaves them out
        here, and parameters on which the ends depend are then not trained by a bound.
    Sample and evaluate with `process.with_parameters(jax.tree.map(np.asarray, params["process"]))`.
    Raises ValueError for a process without parameters.
    """
    if not hasattr(process, "with_parameters"):
        raise ValueError(f"learned_process needs a process with parameters, got {process!r}; give `make` it directly")
    make(process)  # what is wrong with its arguments is an error now

    def objective(key, apply, params, x0, cond=None, weights=None, rows=None, train=True):
        learned = process.with_parameters(params["process"])
        return make(learned)(key, apply, params["network"], x0, cond, weights, rows, train)

    return objective


def curvature(process: Any, kind: str = "x0", *, t_range: tuple[float, float] | None = None) -> Objective:
    """Mean square of the acceleration of the model's deterministic paths, per site: 0 where they are straight.

    The penalty of NFDM-OT (Bartosh et al. 2024). Along dx/dt = v(x, t), the velocity that follows from the
    prediction, the acceleration is dv/dt + (dv/dx) v, one forward-mode derivative of the network. States are drawn
    from the forward process, times uniformly on the clock.

    t_range: times; default `process.t_range`. Sites of weight 0 move like the others.
    """
    low, high = range_of(process, t_range)

    def objective(key, apply, params, x0, cond=None, weights=None, rows=None, train=True):
        rows = Rows.of(x0, rows)
        time_key, noise_key, network_key = jax.random.split(key, 3)
        t = low + (high - low) * random.stratified(time_key, rows, x0.dtype)
        xt = process.marginal(x0, t).sample(random.example_keys(noise_key, rows.index))
        rng = random.example_keys(network_key, rows.index) if train else None
        denoise = bind(apply, params, process, kind, rng=rng, train=train)

        def velocity(xt, t):
            return process.convert(denoise(xt, t, cond), "velocity", xt, t).value

        _, acceleration = jax.jvp(velocity, (xt, t), (velocity(xt, t), jnp.ones_like(t)))
        loss = Reduction.of(weights, x0)(acceleration**2)
        return loss, {"loss": loss}

    return objective


def weighted_sum(**parts: tuple[float, Objective]) -> Objective:
    """The sum of `name=(weight, objective)`, each with keys of its own. Metrics: "loss", and each part's by name."""

    def objective(key, *args, **options):
        keys = jax.random.split(key, len(parts))
        losses = {name: part(k, *args, **options)[0] for k, (name, (_, part)) in zip(keys, parts.items(), strict=True)}
        loss = sum(weight * losses[name] for name, (weight, _) in parts.items())
        return loss, {"loss": loss, **losses}

    return objective


__all__ = ["curvature", "learned_process", "weighted_sum"]
