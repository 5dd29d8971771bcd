"""Solvers that are made of others, or of orders, by name: what `ddjax.names` says of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ddjax import solvers
from ddjax.naming import make


def _solver(name: str, process: Any, **options: Any) -> Any:
    """One of `names.SOLVERS`."""
    from ddjax.names import SOLVERS  # here: names imports this

    return make(SOLVERS, name, "config.sample.solver_options.solver", process, **options)


def reuse(process: Any, sites: int, every: int = 2, solver: str = "ancestral", **options: Any) -> solvers.Reuse:
    """`Reuse` of another solver by name; the options are that one's own."""
    return solvers.Reuse(_solver(solver, process, **options), sites, every)


ORDERS = {
    "random": solvers.RandomOrder,
    "left_to_right": solvers.LeftToRight,
    "confidence": solvers.Confidence,
    "local": solvers.Local,
    "planner": solvers.Planner,
}


def _order(name: str, **options: Any) -> Any:
    return make(ORDERS, name, "config.sample.solver_options.order", **options)


def unmask(process: Any, order: str = "random", count: str = "expected", **options: Any) -> solvers.Unmask:
    """`Unmask` in one of `ORDERS`; the options are its own."""
    return solvers.Unmask(process, _order(order, **options), count)


def grouped(process: Any, order: str = "local", keep: bool = True, **options: Any) -> solvers.Grouped:
    """`Grouped` in one of `ORDERS`; the options are its own."""
    return solvers.Grouped(process, _order(order, **options), keep)


def momentum(
    process: Any,
    solver: str = "dpm_solver_pp",
    beta: float = 0.8,
    form: str = "x0",
    nesterov: bool = False,
    predictor: bool = True,
    rescaled: bool = False,
    **options: Any,
) -> solvers.Momentum:
    """`Momentum` around another solver by name; the options are that one's own."""
    return solvers.Momentum(_solver(solver, process, **options), beta, form, nesterov, predictor, rescaled)


def nested(
    process: Any,
    solver: str = "ancestral",
    inner_steps: int | Sequence[int] = 4,
    inner_grid: str | None = None,
    outer: str | None = None,
    **options: Any,
) -> solvers.Nested:
    """`Nested` around another solver by name; the options are that one's own.

    inner_grid: of `names.GRIDS`, one that is told no more than the schedule. outer: by name too, with its defaults.
    """
    from ddjax import names  # here: names imports this

    inner, times = _solver(solver, process, **options), None
    if inner_grid is not None:
        times = names.grid(process, inner_grid, "config.sample.solver_options.inner_grid", steps=256)
        times = np.asarray(times, np.float64)
    outer = None if outer is None else _solver(outer, process)
    return solvers.Nested(inner, inner_steps if isinstance(inner_steps, int) else tuple(inner_steps), times, outer)
