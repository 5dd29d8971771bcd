"""Integrators of an ODE, for likelihoods: on a grid as one `lax.scan`, or adaptive."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

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
    """Tsitouras' rule of order 5(4) from diffrax, each example with its own steps, between the ends of the nodes.

    rtol, atol: what a step may be wrong by. max_steps: after which diffrax raises an error.
    Raises ValueError where one of them is not positive, ImportError where diffrax is not installed.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    max_steps: int = 4096

    def __post_init__(self):
        if not (self.rtol > 0 and self.atol > 0 and self.max_steps > 0):
            raise ValueError(f"Adaptive needs positive tolerances and steps, got {self}")

    def __call__(self, field: Field, state: PyTree, nodes: Float[Array, " steps+1"], args: PyTree = None) -> PyTree:
        """The state at the last node."""
        from ddjax.data.dataset import require

        diffrax = require("diffrax", "ode", "likelihood.Adaptive")
        term = diffrax.ODETerm(lambda position, one, args: field(one, position, args))
        control = diffrax.PIDController(rtol=self.rtol, atol=self.atol)

        def solve(state, args):
            # A batch of one: an example's steps must not depend on its neighbours.
            state, args = jax.tree.map(lambda a: a[None], (state, args))
            found = diffrax.diffeqsolve(
                term,
                diffrax.Tsit5(),
                t0=nodes[0],
                t1=nodes[-1],
                dt0=None,
                y0=state,
                args=args,
                stepsize_controller=control,
                max_steps=self.max_steps,
            )
            return jax.tree.map(lambda a: a[-1, 0], found.ys)  # the last of the saved states, which are one

        return jax.vmap(solve)(state, args)


def _over(nodes: Array, step: Callable[..., PyTree], state: PyTree) -> PyTree:
    ends = (nodes[:-1], nodes[1:] - nodes[:-1])
    return jax.lax.scan(lambda state, at: (step(state, *at), None), state, ends)[0]


def _move(state: PyTree, *slopes: tuple[Any, PyTree]) -> PyTree:
    """The state plus the slopes, each times its number."""
    for size, slope in slopes:
        state = jax.tree.map(lambda a, b, size=size: a + size * b, state, slope)
    return state
