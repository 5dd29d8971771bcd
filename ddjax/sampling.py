"""The reverse process as one compiled program."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from ddjax import random
from ddjax.grids import check_grid
from ddjax.predictions import evaluations
from ddjax.pytrees import as_pytree
from ddjax.solvers.base import Solver, check_own_times, first_carry
from ddjax.types import Denoise, Sample, State


class Observed(NamedTuple):
    """Sites that are known: in-painting, prompts, padding."""

    mask: Bool[Array, batch * sites]  # true where known
    value: State  # (batch, *sites), clean


def padded(lengths: Int[Array, " batch"], length: int, padding: int) -> Observed:
    """Sequences of given lengths: all behind the first `lengths` of `length` sites is known to be `padding`."""
    mask = jnp.arange(length) >= jnp.asarray(lengths)[:, None]
    return Observed(mask, jnp.full(mask.shape, padding, jnp.int32))


def sample(
    key: Key[Array, ""],
    denoise: Denoise,
    process: Any,
    *,
    shape: Sequence[int],
    solver: Solver,
    times: Array,
    cond: Any = None,
    init: State | None = None,
    observed: Observed | None = None,
    trajectory: bool = False,
    rows: Int[Array, " batch"] | None = None,
) -> Sample:
    """Draw samples: from the prior at `times[0]`, one solver step between neighbouring times.

    shape: `(batch, *sites)`. times: a grid of n + 1 decreasing times (`ddjax.grids`); the sample is the state at the
        last.
    cond: a pytree with a leading batch axis. init: start from this state, at `times[0]`, instead of the prior.
    observed: sites held at known values (exact for `Masked`; for other processes each step shows a freshly noised
        copy, as in RePaint, Lugmayr et al. 2022, without its resampling).
    trajectory: also return every state, `(steps + 1, batch, *sites)`.
    rows: row numbers that seed the examples, default 0 ... batch - 1; drawing rows 0-63 and then 64-127 gives the
        same samples as drawing 128 at once.

    The same key and row give the same sample whatever the batch. Compiled once for each shape, solver and number of
    steps.
    Raises ValueError for shapes that do not fit.
    """
    times, rows, shape = _checked(solver, shape, times, cond, init, observed, rows)
    return _sample(key, as_pytree(denoise), times, cond, init, observed, rows, process, shape, solver, trajectory)


class Partial(NamedTuple):
    """What `stream` gives."""

    step: int  # how many steps were made
    x: State  # (batch, *sites), after them; at the last step the sample
    nfe: Int[Array, " batch"]  # so far
    x0: State | None = None  # the sample if it were stopped here, of solvers that have one (`solvers.Nested`)


def stream(
    key: Key[Array, ""],
    denoise: Denoise,
    process: Any,
    *,
    shape: Sequence[int],
    solver: Solver,
    times: Array,
    cond: Any = None,
    init: State | None = None,
    observed: Observed | None = None,
    rows: Int[Array, " batch"] | None = None,
    every: int = 1,
) -> Iterator[Partial]:
    """What `sample` draws, while it is drawn: the state after every `every` steps, and at the end.

    Arguments as in `sample`. The last is the sample that `sample` gives, bit for bit. Compiled once, whatever `every`.
    Raises ValueError as `sample` does, and for `every` below 1, when it is called.
    """
    times, rows, shape = _checked(solver, shape, times, cond, init, observed, rows)
    if every < 1:
        raise ValueError(f"every={every}: expected at least one step between what is shown")
    arguments = (key, as_pytree(denoise), times, cond, init, observed, rows)
    static = {"process": process, "shape": shape, "solver": solver}

    def parts() -> Iterator[Partial]:
        state, steps = _begin(*arguments, **static), len(times) - 1
        for i in range(0, steps, every):
            done = min(i + every, steps)
            state = _advance(state, i, done, *arguments, **static)
            shown = solver.shown(state[1]) if hasattr(solver, "shown") else None
            if shown is not None and observed is not None:
                shown = jnp.where(observed.mask, observed.value, shown).astype(shown.dtype)
            yield Partial(done, state[0], state[2], shown)

    return parts()


def _checked(solver, shape, times, cond, init, observed, rows):
    """Grid, rows and shape. Raises ValueError for shapes that do not fit, and for a grid that the solver is not for."""
    shape = tuple(int(n) for n in shape)
    times = check_grid(times)
    check_own_times(solver, times)
    for name, value in (
        ("init", init),
        ("observed.mask", observed and observed.mask),
        ("observed.value", observed and observed.value),
    ):
        if value is not None and jnp.shape(value) != shape:
            raise ValueError(f"{name} has shape {jnp.shape(value)}, but shape={shape} was asked for")
    for leaf in jax.tree.leaves(cond):
        if jnp.shape(leaf)[:1] != shape[:1]:
            raise ValueError(
                f"cond has a leaf of shape {jnp.shape(leaf)}; its first axis must be the batch, {shape[0]}"
            )
    rows = jnp.arange(shape[0]) if rows is None else jnp.asarray(rows)
    if rows.shape != shape[:1]:
        raise ValueError(f"rows has shape {rows.shape}; give one row number for each of the {shape[0]} examples")
    return times, rows, shape


class _Loop(NamedTuple):
    begin: Callable[[], Any]  # the first state: xt, what the solver carries, evaluations
    step: Callable[[Any, Array], Any]


def _loop(key, denoise, times, cond, init, observed, rows, process, shape, solver) -> _Loop:
    if observed is not None and not hasattr(process, "observe"):
        raise ValueError(f"{type(process).__name__} cannot show sites that are known: leave out observed")
    batch = shape[0]
    prior_keys, step_keys, observed_keys = random.split(random.example_keys(key, rows), 3)

    def show(x, i):
        """Put the known sites in."""
        if observed is None:
            return x
        known = process.observe(random.fold_in(observed_keys, i), observed.value, jnp.full((batch,), times[i]))
        known = jnp.where(i == times.shape[0] - 1, observed.value, known)  # the sample shows the values themselves
        return jnp.where(observed.mask, known, x).astype(x.dtype)

    def begin():
        xt = process.prior(shape, times[0]).sample(prior_keys) if init is None else jnp.asarray(init)
        first = show(xt, 0)
        return (
            first,
            first_carry(solver, first, cond, denoise, observed and observed.mask),
            jnp.zeros((batch,), jnp.int32),
        )

    def step(state, i):
        x, carry, nfe = state
        # Scalars: a schedule evaluated on vectors of different lengths may round differently.
        moved, carry, info = solver.step(random.fold_in(step_keys, i), carry, x, times[i], times[i + 1], denoise, cond)
        x = show(moved.astype(x.dtype), i + 1)
        return x, carry, nfe + info.nfe * evaluations(denoise)

    return _Loop(begin, step)


@functools.partial(jax.jit, static_argnames=("process", "shape", "solver", "trajectory"))
def _sample(key, denoise, times, cond, init, observed, rows, process, shape, solver, trajectory):
    loop = _loop(key, denoise, times, cond, init, observed, rows, process, shape, solver)

    def step(state, i):
        state = loop.step(state, i)
        return state, (state[0] if trajectory else None)

    first = loop.begin()
    (x0, _, nfe), states = jax.lax.scan(step, first, jnp.arange(times.shape[0] - 1))
    path = jnp.concatenate([first[0][None], states]) if trajectory else None
    return Sample(x0, nfe, path)


@functools.partial(jax.jit, static_argnames=("process", "shape", "solver"))
def _begin(*arguments, process, shape, solver):
    return _loop(*arguments, process, shape, solver).begin()


@functools.partial(jax.jit, static_argnames=("process", "shape", "solver"))
def _advance(state, first, last, *arguments, process, shape, solver):
    """The steps from `first` to before `last`."""
    step = _loop(*arguments, process, shape, solver).step
    return jax.lax.fori_loop(first, last, lambda i, state: step(state, i), state)
