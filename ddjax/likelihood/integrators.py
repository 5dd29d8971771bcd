"""Integrators of an ODE, for likelihoods: on a grid as one `lax.scan`, or adaptive."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ddjax.types import PyTree

# Field: (state, position, args) -> d state / d position. The leaves of the state and of args have a leading batch axis.
Field = Callable[[PyTree, Float[Array, ""], PyTree], PyTree]
# (field, state, nodes, args) -> the state at the last node.
Integrator = Callable[[Field, PyTree, Float[Array, " steps+1"], PyTree], PyTree]


def heun(field: Field, state: PyTree, nodes: Float[Array, " steps+1"], args: PyTree = None) -> PyTree:
    """The trapezoidal rule with an Euler step for its end: second order, two evaluations a step."""

    def step(state, start, size):
        first = field(state, start, args)
        second = field(_move(state, (size, first)), start + size, args)
        return _move(state, (size / 2, first), (size / 2, second))

    return _over(nodes, step, state)


def rk4(field: Field, state: PyTree, nodes: Float[Array, " steps+1"], args: PyTree = None) -> PyTree:
    """The classical Runge-Kutta rule: fourth order, four evaluations a step."""

    def step(state, start, size):
        first = field(state, start, args)
        second = field(_move(state, (size / 2, first)), start + size / 2, args)
        third = field(_move(state, (size / 2, second)), start + size / 2, args)
        fourth = field(_move(state, (size, third)), start + size, args)
        return _move(state, (size / 6, first), (size / 3, second), (size / 3, third), (size / 6, fourth))

    return _over(nodes, step, state)


@dataclasses.dataclass(frozen=True)
class Adaptive:
    """A Runge-Kutta rule with an error estimate from diffrax, each example with its own steps.

    rtol, atol: what a step may be wrong by. max_steps: after which diffrax raises an error, rejected ones too.
    method: the name of an explicit rule of diffrax: "Tsit5" (Tsitouras' of order 5(4)), "Dopri5" (RK45), "Bosh3",
        "Dopri8", "Heun" and others. Steps are chosen by its PID controller; the first is a tenth of the way.
    Raises ValueError where a number is not positive, and for another method; ImportError where diffrax is missing.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    max_steps: int = 4096
    method: str = "Tsit5"

    def __post_init__(self):
        if not (self.rtol > 0 and self.atol > 0 and self.max_steps > 0):
            raise ValueError(f"Adaptive needs positive tolerances and steps, got {self}")

    def __call__(self, field: Field, state: PyTree, nodes: Float[Array, " steps+1"], args: PyTree = None) -> PyTree:
        """The state at the last node."""
        return self.between(field, state, nodes[0], nodes[-1], args)[0]

    def between(
        self, field: Field, state: PyTree, start: Array, stop: Array, args: PyTree = None
    ) -> tuple[PyTree, Int[Array, " batch"]]:
        """The state at `stop`, and how often each example asked for the field. The ends: scalars, or `(batch,)`."""
        from ddjax.data.dataset import require

        diffrax = require("diffrax", "ode", "Adaptive")
        rule = getattr(diffrax, self.method, None)
        if not (inspect.isclass(rule) and issubclass(rule, diffrax.AbstractERK) and rule.tableau.b_error is not None):
            raise ValueError(
                f"method={self.method!r} is no explicit Runge-Kutta rule of diffrax with an error estimate: "
                "use 'Dopri5', 'Tsit5', 'Bosh3', 'Dopri8' or 'Heun'"
            )

        def slope(u, state, args):
            start, stop, args = args
            return jax.tree.map(lambda v: (stop - start) * v, field(state, start + u * (stop - start), args))

        def solve(state, start, stop, args):
            # A batch of one: an example's steps must not depend on its neighbours.
            state, args = jax.tree.map(lambda a: a[None], (state, args))
            found = diffrax.diffeqsolve(
                diffrax.ODETerm(slope),
                rule(),
                t0=0.0,
                t1=1.0,
                dt0=0.1,
                y0=state,
                args=(start, stop, args),
                stepsize_controller=diffrax.PIDController(rtol=self.rtol, atol=self.atol),
                max_steps=self.max_steps,
            )
            # The last of the saved states, which are one.
            return jax.tree.map(lambda a: a[-1, 0], found.ys), found.stats["num_steps"]

        batch = jax.tree.leaves(state)[0].shape[:1]
        state, steps = jax.vmap(solve)(state, *(jnp.broadcast_to(v, batch) for v in (start, stop)), args)
        kept = int(rule.tableau.fsal)  # a step's last slope is the next one's first, also where the step is rejected
        return state, (kept + (rule.tableau.num_stages - kept) * steps).astype(jnp.int32)


def _over(nodes: Array, step: Callable[..., PyTree], state: PyTree) -> PyTree:
    ends = (nodes[:-1], nodes[1:] - nodes[:-1])
    return jax.lax.scan(lambda state, at: (step(state, *at), None), state, ends)[0]


def _move(state: PyTree, *slopes: tuple[Any, PyTree]) -> PyTree:
    """The state plus the slopes, each times its number."""
    for size, slope in slopes:
        state = jax.tree.map(lambda a, b, size=size: a + size * b, state, slope)
    return state
