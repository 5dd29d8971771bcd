"""Objectives for interpolants: which ends go together, what is asked of the network, at which times.

A coupling draws x_1 for given x_0, and says what the network is shown beside x_t:

    independent(std)        x_1 is Gaussian noise
    paired()                x_1 comes with the data, `cond = {"x1": ..., "cond": ...}`: another image, or noise that
                            `data.Transported` has paired with x_0 by optimal transport
    paired(show=True)       and the network sees it: a bridge from a given end
    any function (keys, x0, cond) -> (x1, cond), such as a degradation of x_0
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ddjax import random
from ddjax.objectives.base import Objective, noised
from ddjax.predictions import check_kind
from ddjax.processes import Interpolant
from ddjax.types import Keys, Rows, State, Time, left_broadcast

Coupling = Callable[[Keys, State, Any], tuple[State, Any]]  # (keys, x0, cond) -> (x1, what the network sees)


def independent(std: float = 1.0) -> Coupling:
    """x_1 ~ N(0, std^2), whatever x_0 is. Give the process `source_std=std`."""
    return lambda keys, x0, cond: (std * random.normal(keys, x0.shape[1:], x0.dtype), cond)


def paired(show: bool = False) -> Coupling:
    """x_1 is `cond["x1"]`.

    show: whether the network is given the whole of `cond` (sample with `processes.interpolant.knowing_x1`), or
        `cond["cond"]` alone.
    """

    def coupling(keys, x0, cond):
        if not isinstance(cond, dict) or "x1" not in cond:
            raise ValueError('the coupling `paired` finds x1 in the batch: give cond={"x1": ..., "cond": ...}')
        if cond["x1"].shape != x0.shape:
            raise ValueError(f'cond["x1"] has shape {cond["x1"].shape}; the two ends must have one, x0 has {x0.shape}')
        return cond["x1"], cond if show else cond.get("cond")

    return coupling


def interpolant(
    process: Interpolant,
    kind: str,
    coupling: Coupling,
    *,
    error: str | None = None,
    weighting: Callable[[Array], Array] | None = None,
    density: Callable[[Array], Time] | None = None,
) -> Objective:
    """A weighted squared error; that of a pair is the sum of its two.

    (Albergo et al. 2023, "Stochastic interpolants", theorems 7 and 8: the optimum is the posterior mean given x_t and
    what else the network sees.)

    kind: what the network states, alone or as a pair. error: the kind in which it is compared (default: `kind`; a
    statement alone cannot be converted where there is noise). weighting: a function of t (default 1). density: times,
    as an inverse distribution function (default: uniform over `process.t_range`).
    Raises ValueError for kinds that the process does not have.
    """
    error = kind if error is None else error
    check_kind(kind, process.kinds, process)
    check_kind(error, process.kinds, process)
    low, high = process.t_range

    def objective(key, apply, params, x0, cond=None, weights=None, rows=None, train=True):
        rows = Rows.of(x0, rows)
        key, coupling_key = jax.random.split(key)
        x1, shown = coupling(random.example_keys(coupling_key, rows.index), x0, cond)

        def draw(u, keys, x0):
            t = low + (high - low) * u if density is None else density(u)
            z, law = random.normal(keys, x0.shape[1:], x0.dtype), process.marginal(x0, t, x1)
            xt, target = law.mean + law.std * z, process.statement(error, (x0, x1, z), t)
            scale = jnp.ones_like(t) if weighting is None else weighting(t)

            def errors(prediction):
                squared = (target - process.convert(prediction, error, xt, t).value) ** 2
                return left_broadcast(scale, x0) * (squared.sum(-1) if squared.ndim > x0.ndim else squared)

            return xt, t, errors

        return noised(process, kind, draw)(key, apply, params, x0, shown, weights, rows, train)

    return objective
