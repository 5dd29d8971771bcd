"""The reverse process as one compiled program."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from ddjax import random
from ddjax.grids import check_grids
from ddjax.predictions import evaluations
from ddjax.pytrees import as_pytree
from ddjax.solvers.base import Solver, batched, check_own_times, first_carry, told
from ddjax.taps import record
from ddjax.types import Denoise, Sample, State, left_broadcast


class Observed(NamedTuple):
    """Sites that are known: in-painting, prompts, padding. Of a product's states both are dicts, as these are."""

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
    shape: Sequence[int] | Mapping[str, Sequence[int]],
    solver: Solver,
    times: Array,
    cond: Any = None,
    init: State | None = None,
    observed: Observed | None = None,
    trajectory: bool = False,
    taps: Sequence[str] = (),
    rows: Int[Array, " batch"] | None = None,
    python_loop: bool = False,
) -> Sample:
    """Draw samples: from the prior at `times[0]`, one solver step between neighbouring times.

    shape: `(batch, *sites)`; of a `processes.Product` that of each part, by name.
    times: a grid of n + 1 decreasing times (`ddjax.grids`); the sample is the state at the
        last. Or a grid for each example, `(batch, n + 1)`, whose times may also stay equal: an example rests between
        two equal times; its state and what its solver carries stay as they are, at no evaluation. Fewer steps for some
        examples are grids that end in their last time again and again. (What solvers are told of a number of steps,
        `lower_order_final`, is that of all.)
    cond: a pytree with a leading batch axis. init: start from this state, at `times[0]`, instead of the prior.
    observed: sites held at known values (exact for `Masked`; for other processes each step shows a freshly noised
        copy, as in RePaint, Lugmayr et al. 2022; with its resampling by `solvers.Resampled`).
    trajectory: also return every state, `(steps + 1, batch, *sites)`.
    taps: also return what the network had at these points (`ddjax.taps`) in every step, `{name: (steps, batch,
        ...)}`: of a step that evaluates the network more than once its last time, and of guidance, which evaluates
        several conditions in one batch, that batch. Not for solvers that call the network inside a loop or branch of
        their own, nor with grids for each example.
    rows: row numbers that seed the examples, default 0 ... batch - 1; drawing rows 0-63 and then 64-127 gives the
        same samples as drawing 128 at once.
    python_loop: for debugging: a plain Python loop calls the steps one by one, so that a debugger can stop between
        them. Each is compiled, the same program as in the loop that is compiled: samples are the same bit for bit.
        Inside `with jax.disable_jit():` nothing is compiled, with or without `python_loop`: values are there to be
        printed and branched on in the network and in the solver. Operations are then rounded one by one, where a
        compiler fuses several: the last bits differ.

    The same key and row give the same sample whatever the batch. Compiled once for each shape, solver and number of
    steps.
    Raises ValueError for shapes that do not fit.
    """
    times, rows, shape = checked(solver, shape, times, cond, init, observed, rows)
    arguments = (key, as_pytree(denoise), times, cond, init, observed, rows)
    taps = tuple(taps)
    if taps and (python_loop or times.ndim == 2):
        raise ValueError("taps are of the compiled loop, one step for all: leave out python_loop, and give one grid")
    if python_loop:
        static = {"process": process, "shape": shape, "solver": solver}
        states = [_begin(*arguments, **static)]
        for i in range(times.shape[-1] - 1):
            state = _advance(states[-1], i, i + 1, *arguments, **static)
            states = [*states, state] if trajectory else [state]
        x0, _, nfe = states[-1]
        path = jax.tree.map(lambda *x: jnp.stack(x), *(state[0] for state in states)) if trajectory else None
        return Sample(x0, nfe, path)
    return _sample(*arguments, process, shape, solver, trajectory, taps)


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
    times, rows, shape = checked(solver, shape, times, cond, init, observed, rows)
    if every < 1:
        raise ValueError(f"every={every}: expected at least one step between what is shown")
    arguments = (key, as_pytree(denoise), times, cond, init, observed, rows)
    static = {"process": process, "shape": shape, "solver": solver}

    def parts() -> Iterator[Partial]:
        state, steps = _begin(*arguments, **static), times.shape[-1] - 1
        for i in range(0, steps, every):
            done = min(i + every, steps)
            state = _advance(state, i, done, *arguments, **static)
            shown = solver.shown(state[1]) if hasattr(solver, "shown") else None
            if shown is not None and observed is not None:
                shown = jax.tree.map(_put, observed.mask, observed.value, shown)
            yield Partial(done, state[0], state[2], shown)

    return parts()


def checked(solver, shape, times, cond, init, observed, rows):
    """Grid, rows and shape. Raises ValueError for shapes that do not fit, and for a grid that the solver is not for."""
    shape, parts = hashable(shape)
    batches = {one[:1] for one in parts.values()}
    if len(batches) != 1:
        raise ValueError(f"shape={dict(parts)} has batches of several sizes: the first axis of all parts is the batch")
    (batch,) = batches.pop()
    times = check_grids(times, batch)
    check_own_times(solver, times)
    for name, value in (
        ("init", init),
        ("observed.mask", observed and observed.mask),
        ("observed.value", observed and observed.value),
    ):
        found = None if value is None else jax.tree.map(jnp.shape, value)
        if found is not None and hashable(found)[0] != shape:
            raise ValueError(f"{name} has shape {found}, but shape={shape} was asked for")
    for leaf in jax.tree.leaves(cond):
        if jnp.shape(leaf)[:1] != (batch,):
            raise ValueError(f"cond has a leaf of shape {jnp.shape(leaf)}; its first axis must be the batch, {batch}")
    rows = np.arange(batch) if rows is None else jnp.asarray(rows)  # of NumPy: no program for a constant
    if rows.shape != (batch,):
        raise ValueError(f"rows has shape {rows.shape}; give one row number for each of the {batch} examples")
    return times, rows, shape


def hashable(shape: Any) -> tuple[tuple, dict[str, tuple[int, ...]]]:
    """A shape as `jax.jit` can hold it, pairs of a name and a shape for one of parts, and the shapes of all parts."""
    parts = {name: tuple(map(int, one)) for name, one in (shape if isinstance(shape, Mapping) else {"": shape}).items()}
    return tuple(sorted(parts.items())) if isinstance(shape, Mapping) else parts[""], parts


def _put(mask: Array, value: Array, x: Array) -> Array:
    """The value where it is known."""
    return jnp.where(mask, value, x).astype(x.dtype)


class Loop(NamedTuple):
    """The reverse process step by step. Its state: xt, what the solver carries, evaluations."""

    begin: Callable[[], Any]  # the first state
    step: Callable[[Any, Array], Any]  # (state, number of the step: one for all examples, or `(batch,)`) -> state

    @classmethod
    def of(cls, key, denoise, times, cond, init, observed, rows, process, shape, solver) -> Loop:
        """Arguments as in `sample`."""
        if observed is not None and not hasattr(process, "observe"):
            raise ValueError(f"{type(process).__name__} cannot show sites that are known: leave out observed")
        batch, own = rows.shape[0], times.ndim == 2  # a grid of its own for each example
        solver = solver if observed is None else told(solver, observed)
        prior_keys, step_keys, observed_keys = random.split(random.example_keys(key, rows), 3)

        def at(i):
            """The i-th time of the grid."""
            if own:
                return times[:, i] if jnp.ndim(i) == 0 else jnp.take_along_axis(times, i[:, None], axis=1)[:, 0]
            return times[i]

        def show(x, i):
            """Put the known sites in."""
            if observed is None:
                return x
            t = at(i)
            known = process.observe(random.fold_in(observed_keys, i), observed.value, batched(t, x))
            last = t == at(times.shape[-1] - 1)

            def put(mask, value, known, x):
                # The sample shows the values themselves.
                return _put(mask, jnp.where(left_broadcast(last, x), value, known), x)

            return jax.tree.map(put, observed.mask, observed.value, known, x)

        def begin():
            nested = isinstance(shape[0], tuple)  # a shape for each part
            if init is not None:
                xt = jax.tree.map(jnp.asarray, init)
            elif own:

                def one(key, t):
                    alone = [(name, (1, *part[1:])) for name, part in shape] if nested else (1, *shape[1:])
                    return jax.tree.map(lambda x: x[0], process.prior(alone, t).sample(key[None]))

                xt = jax.vmap(one)(prior_keys, times[:, 0])
            else:
                xt = process.prior(shape, times[0]).sample(prior_keys)
            first = show(xt, 0)
            carry = first_carry(solver, first, cond, denoise, observed and observed.mask)
            return first, carry, jnp.zeros((batch,), jnp.int32)

        def step(state, i):
            # One number for all where there is one: a schedule on vectors of other lengths may round differently.
            t, s = at(i), at(i + 1)

            def move(state):
                x, carry, nfe = state
                keys = random.fold_in(step_keys, i)
                moved, carry, info = solver.step(keys, carry, x, t, s, denoise, cond)
                moved = jax.tree.map(lambda new, old: new.astype(old.dtype), moved, x)
                return show(moved, i + 1), carry, nfe + info.nfe * evaluations(denoise)

            return _but_for(t == s, move, state) if own else move(state)

        return cls(begin, step)


def _but_for(rest: Bool[Array, " batch"], move: Callable[[Any], Any], state: Any) -> Any:
    """The moved state, but for examples that rest; not moved at all where all of them do."""

    def some(state):
        def pick(new, old):
            return jnp.where(left_broadcast(rest, new), old, new)

        return jax.tree.map(pick, move(state), state)

    return jax.lax.cond(jnp.all(rest), lambda state: state, some, state)


@functools.partial(jax.jit, static_argnames=("process", "shape", "solver", "trajectory", "taps"))
def _sample(key, denoise, times, cond, init, observed, rows, process, shape, solver, trajectory, taps):
    loop = Loop.of(key, denoise, times, cond, init, observed, rows, process, shape, solver)

    def step(state, _):
        i, state = state
        with record(*taps) if taps else contextlib.nullcontext() as seen:
            state = loop.step(state, i)
        return (i + 1, state), (state[0] if trajectory else None, seen)

    first = loop.begin()
    # Counted on the way: a list of the steps would be memory that grows with them.
    (_, (x0, _, nfe)), (states, seen) = jax.lax.scan(step, (jnp.int32(0), first), length=times.shape[-1] - 1)
    path = jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), first[0], states) if trajectory else None
    return Sample(x0, nfe, path, seen)


@functools.partial(jax.jit, static_argnames=("process", "shape", "solver"))
def _begin(*arguments, process, shape, solver):
    return Loop.of(*arguments, process, shape, solver).begin()


@functools.partial(jax.jit, static_argnames=("process", "shape", "solver"))
def _advance(state, first, last, *arguments, process, shape, solver):
    """The steps from `first` to before `last`."""
    step = Loop.of(*arguments, process, shape, solver).step
    return jax.lax.fori_loop(first, last, lambda i, state: step(state, i), state)
