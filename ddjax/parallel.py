"""Sampling in parallel over time: the steps of a window are made at once and corrected until they agree (ParaDiGMS).

A solver's step is a map x_{i+1} = phi_i(x_i), its noise known beforehand: that of `ddjax.sample` with the same key. Of
guessed states x_a ... x_{a+W}, Picard's iteration (Shih et al. 2023, eq. 6 and algorithm 1) makes

    x'_{i+1} = x_a + sum over j = a ... i of (phi_j(x_j) - x_j)  =  phi_i(x_i) + sum over j < i of r_j,
    r_j = phi_j(x_j) - x_{j+1},

with all of phi in one call of the network. The first form is the paper's; the second, the same sum in another order,
is exact where the guesses are: r is then 0, not a rounding error. So the state that follows a state that is exact is
exact, and after as many rounds as steps, all of them are. The window slides to the first state that still moves by more
than the tolerance allows; its end is where the guesses of new states begin.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from ddjax import schedules
from ddjax.processes.gaussian import gaussian_of
from ddjax.pytrees import as_pytree
from ddjax.sampling import Loop, Observed, checked, hashable
from ddjax.solvers.base import Solver, first_carry
from ddjax.types import Denoise, State, left_broadcast


class ParallelSample(NamedTuple):
    """What `sample_parallel` returns."""

    x0: State  # (batch, *sites)
    nfe: Int[Array, " batch"]  # network evaluations spent on each example, those of guesses too
    rounds: Int[Array, " batch"]  # calls of the network that each example had to wait for, one after the other
    trajectory: State | None = None  # (steps + 1, batch, *sites), only on request


def sample_parallel(
    key: Key[Array, ""],
    denoise: Denoise,
    process: Any,
    *,
    shape: Sequence[int] | Mapping[str, Sequence[int]],
    solver: Solver,
    times: Array,
    window: int,
    tolerance: float = 0.1,
    scale: Float[Array, " steps"] | Mapping[str, Float[Array, " steps"]] | None = None,
    cond: Any = None,
    init: State | None = None,
    observed: Observed | None = None,
    trajectory: bool = False,
    rows: Int[Array, " batch"] | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> ParallelSample:
    """Draw what `ddjax.sample` draws, in fewer calls of the network, each of a window of steps (see the module).

    window: how many steps are made at once: the network sees `batch * window` states. Each example has a window of its
        own, and does not depend on its neighbours.
    tolerance: how far states may still be from a fixed point when the window leaves them behind: where the mean over
        sites of their squared change is at most tolerance^2 times the variance of the noise of the step that leaves
        them. 0 gives the sample of `ddjax.sample` itself, bit for bit where arithmetic does not depend on the batch.
        Small numbers (the paper's is 0.1) are errors that hide in the noise that is still to come.
    scale: the standard deviations to measure by in the place of the noise's, `(steps,)`, or `(batch, steps)`; needed
        where the process has no Gaussian schedule. By default that of the ancestral step, sigma_s sqrt(1 -
        exp(lambda_t - lambda_s)), whatever noise the solver has: deterministic ones are measured by it too, as the
        authors' code does. Of a `processes.Product` that of each part, by name: every part is measured by its own, and
        the window moves on where all are near enough.
    solver: any that carries nothing from step to step (`DDIM`, `Ancestral`, `Heun`, `SingleStep`, ...).
    sharding: how the `batch * window` states are laid over devices, the windows of an example side by side:
        `NamedSharding(mesh, PartitionSpec("data"))` gives each device an equal part of them, with one example too.
    The others are as in `ddjax.sample`.

    Raises ValueError as `sample` does; for a solver that carries something, a process of tokens or with a part of
    tokens, a window below 1, a negative tolerance, a scale of another shape, and a batch of windows that does not
    divide over the devices.
    """
    name, parts = type(solver).__name__, process.state == "product"
    processes = process.processes if parts else process
    for part, one in (processes if parts else {"": process}).items():
        if one.state != "gaussian":
            whose = f"part {part!r}, {type(one).__name__}," if parts else type(one).__name__
            raise ValueError(f"{whose} has tokens, which cannot be guessed and corrected a little: use ddjax.sample")
    if window < 1:
        raise ValueError(f"window={window}: at least one step must be made at once")
    if not isinstance(tolerance, jax.core.Tracer) and not tolerance >= 0:
        raise ValueError(f"tolerance must not be negative, got {tolerance}")
    times, rows, shape = checked(solver, shape, times, cond, init, observed, rows)
    denoise, steps = as_pytree(denoise), times.shape[-1] - 1
    window = min(window, steps)
    known = None if observed is None else observed.mask
    shapes, like = dict(shape) if parts else shape, init
    if init is None:
        like = _each(lambda shape: jax.ShapeDtypeStruct(shape, jnp.result_type(float)), shapes)
    carry = jax.eval_shape(lambda x, cond: first_carry(solver, x, cond, denoise, known), like, cond)
    if jax.tree.leaves(carry):
        raise ValueError(
            f"{name} carries what it learned from step to step, so its steps cannot be made at once: use a solver "
            "without a memory (DDIM, Ancestral, Heun, SingleStep, EulerMaruyama), with noise that is drawn by key"
        )
    batch = rows.shape[0]
    if scale is None:
        scale = _each(lambda process, shape: _own_scale(process, times, len(shape) - 1), processes, shapes)
    scale = _each(jnp.asarray, scale)
    if jax.tree.structure(scale) != jax.tree.structure(like):
        wanted = ", ".join(shapes) if parts else "one array"
        raise ValueError(f"scale must be of the state's parts ({wanted}), got {jax.tree.map(jnp.shape, scale)}")
    for one in jax.tree.leaves(scale):
        if one.shape not in ((steps,), (batch, steps)):
            raise ValueError(f"scale has shape {one.shape}; give ({steps},) or ({batch}, {steps})")
    if sharding is not None:
        try:
            _each(lambda shape: sharding.shard_shape((batch * window, *shape[1:])), shapes)
        except ValueError as error:
            raise ValueError(
                f"{batch} examples times a window of {window} steps do not divide over the devices of {sharding}: "
                "choose another window"
            ) from error
    arguments = (key, denoise, times, cond, init, observed, rows, tolerance, scale)
    return _parallel(*arguments, process, shape, solver, window, sharding, trajectory)


def _each(function: Callable[..., Any], *values: Any) -> Any:
    """Of a value, or of those of each part by name."""
    if not isinstance(values[0], Mapping):
        return function(*values)
    return {name: function(*(value[name] for value in values)) for name in values[0]}


def _own_scale(process: Any, times: Array, sites: int) -> Array:
    try:
        schedule = getattr(gaussian_of(process) or process, "schedule", None)
    except ValueError:  # an interpolant from other data
        schedule = None
    if not isinstance(schedule, schedules.Gaussian):
        raise ValueError(
            f"{type(process).__name__} has no Gaussian schedule to measure errors by: give scale, the standard "
            f"deviations for {times.shape[-1] - 1} steps"
        )
    return _noise(schedule, times, sites)


def _noise(schedule: schedules.Gaussian, times: Array, sites: int) -> Array:
    """Standard deviation of the noise of the ancestral step of each interval, a mean over sites."""
    t = times.reshape(times.shape + (1,) * sites)
    axes = tuple(range(times.ndim, t.ndim))
    log_snr, sigma = schedule.log_snr(t), schedule.sigma(t)
    before, after = (jax.lax.slice_in_dim(log_snr, i, i + times.shape[-1] - 1, axis=times.ndim - 1) for i in (0, 1))
    left = jnp.where(before == after, 0.0, -jnp.expm1(before - after))
    sigma = jax.lax.slice_in_dim(sigma, 1, times.shape[-1], axis=times.ndim - 1)
    return jnp.sqrt((sigma**2 * left).mean(axes))


class _Windows(NamedTuple):
    """Where all examples are."""

    first: Int[Array, " batch"]  # the step at which each window begins
    states: State  # (batch, window + 1, *sites); the first is final
    nfe: Int[Array, " batch"]
    rounds: Int[Array, " batch"]
    path: State | None  # (batch, steps + 1, *sites)


@functools.partial(jax.jit, static_argnames=("process", "shape", "solver", "window", "sharding", "trajectory"))
def _parallel(
    key, denoise, times, cond, init, observed, rows, tolerance, scale, process, shape, solver, window, sharding,
    trajectory,
):  # fmt: skip
    batch, steps, each = rows.shape[0], times.shape[-1] - 1, jax.tree.map
    start, carry, _ = Loop.of(key, denoise, times, cond, init, observed, rows, process, shape, solver).begin()
    # The same loop for `batch * window` examples: those of a window are one example at different steps.
    spread = functools.partial(each, lambda a: jnp.repeat(jnp.asarray(a), window, axis=0))

    def place(tree):
        return tree if sharding is None else jax.lax.with_sharding_constraint(tree, sharding)

    grid = times if times.ndim == 1 else spread(times)
    shown, known, whose = place(spread((cond, observed, rows)))
    flat = _each(lambda one: (batch * window, *one[1:]), dict(shape) if isinstance(start, dict) else shape)
    flat = hashable(flat)[0]
    loop = Loop.of(key, denoise, grid, shown, None, known, whose, process, flat, solver)
    ahead = jnp.arange(window)

    def allowed(scale):
        scale = jnp.pad(scale, [(0, 0)] * (scale.ndim - 1) + [(0, 1)])
        return jnp.broadcast_to(tolerance**2 * scale**2, (batch, steps + 1))

    def body(now):
        number = now.first[:, None] + ahead  # of each step
        active = number < steps
        number = jnp.minimum(number, steps - 1)
        before = each(lambda states: states[:, :-1].reshape(batch * window, *states.shape[2:]), now.states)
        state = before, carry, jnp.zeros((batch * window,), jnp.int32)
        moved, _, made = loop.step(place(state), place(number.ravel()))
        made = made.reshape(batch, window)

        def corrected(states, moved):
            guesses = states[:, 1:]
            moved = moved.reshape(guesses.shape)
            # Behind the end nothing counts; before it, what earlier steps leave to be corrected.
            errors = jnp.where(left_broadcast(active, moved), moved - guesses, 0.0)[:, :-1]
            return moved.at[:, 1:].add(jnp.cumsum(errors, axis=1))

        def near(states, found, scale):
            change = jnp.mean(jnp.square(found - states[:, 1:]).reshape(batch, window, -1), axis=-1)
            return change <= jnp.take_along_axis(allowed(scale), number + 1, axis=1)

        found = each(corrected, now.states, moved)
        good = functools.reduce(operator.and_, jax.tree.leaves(each(near, now.states, found, scale)), active)
        left = jnp.minimum(window, steps - now.first)
        stride = jnp.minimum(jnp.cumprod(good, axis=1).sum(axis=1, dtype=jnp.int32) + 1, left)
        known = each(lambda old, new: jnp.concatenate([old[:, :1], new.astype(old.dtype)], axis=1), now.states, found)
        pick = jnp.minimum(stride[:, None] + jnp.arange(window + 1), left[:, None])
        into = jnp.where(active, number + 1, steps + 1)  # none, where there is no such step

        def put(path, known):
            return path.at[jnp.arange(batch)[:, None], into].set(known[:, 1:], mode="drop")

        path = each(put, now.path, known) if trajectory else None
        return _Windows(
            now.first + stride,
            each(lambda known: jax.vmap(lambda a, i: a[i])(known, pick), known),
            now.nfe + jnp.where(active, made, 0).sum(axis=1, dtype=jnp.int32),
            now.rounds + (left > 0),
            path,
        )

    none = jnp.zeros((batch,), jnp.int32)
    states, path = (each(lambda x, n=n: jnp.repeat(x[:, None], n, axis=1), start) for n in (window + 1, steps + 1))
    first = _Windows(none, states, none, none, path if trajectory else None)
    last = jax.lax.while_loop(lambda now: jnp.any(now.first < steps), body, first)
    path = each(lambda path: jnp.moveaxis(path, 1, 0), last.path)
    return ParallelSample(each(lambda states: states[:, 0], last.states), last.nfe, last.rounds, path)
