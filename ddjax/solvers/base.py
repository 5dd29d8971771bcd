"""The solver contract."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ddjax.types import Denoise, Keys, State, Time, batch_size


class Info(NamedTuple):
    """What a step reports, beside the state."""

    # Calls of `denoise` that each example takes. Where the examples of a batch are at times of their own, some may take
    # fewer than are made: what is made for others is thrown away.
    nfe: Int[Array, " batch"]


def batched(t: Float[Array, ""] | Time, xt: State) -> Time:
    """The time as `denoise` takes it, `(batch,)`; `sample` hands solvers one number for the whole batch."""
    return jnp.full((batch_size(xt),), t) if jnp.ndim(t) == 0 else t


def everywhere(flag: Array, xt: State) -> Bool[Array, " batch"]:
    """Whether a flag that broadcasts against the state from the left holds at every site of each example."""
    return jnp.broadcast_to(flag.reshape(flag.shape[0], -1).all(axis=1), xt.shape[:1])


def first_carry(
    solver: Any, xt: State, cond: Any, denoise: Denoise, known: Bool[Array, batch * sites] | None = None
) -> Any:
    """What the first step needs: `solver.begin`, of solvers that have it, or else `solver.init`."""
    return solver.begin(xt, cond, denoise, known) if hasattr(solver, "begin") else solver.init(xt, cond)


def told(solver: Any, observed: Any) -> Any:
    """The solver, knowing what is observed (`sampling.Observed`): by its own `told`, or that of those it is made of.

    Those are the values of its fields, alone or in tuples, and what a field `make` makes.
    """
    if hasattr(solver, "told"):
        return solver.told(observed)
    if not dataclasses.is_dataclass(solver):
        return solver
    fields = {field.name: getattr(solver, field.name) for field in dataclasses.fields(solver) if field.init}
    new = {name: _told(name, value, observed) for name, value in fields.items()}
    new = {name: value for name, value in new.items() if value is not fields[name]}
    return dataclasses.replace(solver, **new) if new else solver


def _told(name: str, value: Any, observed: Any) -> Any:
    if name == "make":
        return _Telling(value, observed)
    if isinstance(value, tuple):
        new = tuple(_told("", one, observed) for one in value)
        return value if all(a is b for a, b in zip(new, value, strict=True)) else new
    return told(value, observed) if hasattr(value, "step") else value


@dataclasses.dataclass(frozen=True)
class _Telling:
    """Makes solvers that know what is observed."""

    make: Any
    observed: Any

    def __call__(self, process: Any) -> Any:
        return told(self.make(process), self.observed)


class Solver(Protocol):
    """A frozen dataclass: hashable, compared by value, so that samplers compile once.

    One that holds predictions, must know which sites are observed (`known`, None for none), or is made around another
    solver also has `begin(xt, cond, denoise, known)`, which is then called in the place of `init` (`base.first_carry`).
    One that has a whole sample before the last step has `shown(carry)`, which gives it (`sampling.stream`). One that
    says what each step is has `grid_steps`, their number. One that puts known sites in itself has `told(observed)`,
    which gives the solver that knows them; one made of others needs none (`base.told`), unless it cuts states up.
    """

    def init(self, xt: State, cond: Any = None) -> Any:
        """What the first step needs; a pytree of arrays with a leading batch axis."""

    def step(
        self, keys: Keys, carry: Any, xt: State, t: Time, s: Time, denoise: Denoise, cond: Any = None
    ) -> tuple[State, Any, Info]:
        """One step from time t to time s < t: both scalars (as `sample` gives them), or `(batch,)`.

        Scalars let the schedule be evaluated once, so that its rounding cannot depend on the batch.
        """


def check_own_times(solver: Any, times: Array) -> None:
    """Raise a ValueError where a solver that is made for one grid, or one number of steps, is given another."""
    made_for, steps = getattr(solver, "grid_steps", None), times.shape[-1] - 1
    if made_for not in (None, steps):
        raise ValueError(f"{type(solver).__name__} says what each of {made_for} steps is: the grid has {steps}")
    own = getattr(solver, "times", None)
    if own is None or isinstance(times, jax.core.Tracer):
        return
    if times.shape != own.shape or not np.allclose(times, own, rtol=1e-4, atol=1e-7):
        raise ValueError(f"{type(solver).__name__} is made for its own times: give times=solver.times, got {times}")
