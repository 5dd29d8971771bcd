"""Solvers that look at several points within a step and keep nothing from one step to the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ddjax.predictions import Prediction
from ddjax.solvers.base import Info, batched, everywhere
from ddjax.solvers.forms import Form, Place, check_order, weights
from ddjax.types import State, Time


class Stage(NamedTuple):
    """A point at which the ODE's right-hand side is asked, or, the last one, the end of the step.

    at: its place in the step, 0 to 1 in the coordinate.
    weights: of the predictions at the stages before it, but for the first (the start), which has what is left to 1.
    through: instead, which of those (from 1 on) a polynomial goes through, to be integrated exactly.
    """

    at: float
    weights: tuple[float, ...] = ()
    through: tuple[int, ...] = ()


# Runge-Kutta methods: the rows of a tableau divided by their sums.
METHODS = {
    "euler": (Stage(1.0),),
    "midpoint": (Stage(0.5), Stage(1.0, (1.0,))),
    "heun": (Stage(1.0), Stage(1.0, (0.5,))),
    "bogacki_shampine": (Stage(0.5), Stage(0.75, (1.0,)), Stage(1.0, (1 / 3, 4 / 9))),
    "rk4": (Stage(0.5), Stage(0.5, (1.0,)), Stage(1.0, (0.0, 1.0)), Stage(1.0, (1 / 3, 1 / 3, 1 / 6))),
    # Exponential ones, in log-SNR (Lu et al. 2022a, algorithm 2 and appendix B; DPM-Solver-2 is "midpoint" there).
    "dpm_solver_2_taylor": (Stage(0.5), Stage(1.0, through=(1,))),
    "dpm_solver_3": (Stage(1 / 3), Stage(2 / 3, through=(1,)), Stage(1.0, through=(2,))),
    "dpm_solver_3_taylor": (Stage(1 / 3), Stage(2 / 3, through=(1,)), Stage(1.0, through=(1, 2))),
}


@dataclasses.dataclass(frozen=True)
class SingleStep:
    """A Runge-Kutta method on one of the forms of the ODE (`solvers.forms`).

    method: one of `METHODS`. coordinate: where the stages lie, and in which polynomials are; "clock" is the form's own,
    in which "rk4" and the others of that kind have their full order.
    A step into sigma = 0 ends in the predicted x0 and costs one evaluation. So does one from alpha = 0 (of a form but
    the velocity), where the forms end: DDIM's step.
    """

    process: Any
    method: str
    form: str = "noise"
    coordinate: str = "clock"

    deterministic = True

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        object.__setattr__(self, "process", Form(self.process, self.form, self.coordinate).process)

    def init(self, xt, cond=None):
        """Nothing to carry."""
        return ()

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        """As many evaluations as the method has stages, or one."""
        form = Form(self.process, self.form, self.coordinate)
        here, there = form.at(t, xt), form.at(s, xt)
        prediction = denoise(xt, batched(t, xt), cond)
        base = form.first(prediction, xt, t, here, there)
        base = jnp.where(
            there.last, self.process.noiseless(self.process.convert(prediction, "x0", xt, t).value, s), base
        )
        first_order = there.last | ~jnp.isfinite(here.level) | ~jnp.isfinite(there.level)

        def rest(_):
            moved = run_stages(form, self.method, prediction, xt, t, s, lambda x, u: denoise(x, u, cond))
            return moved.astype(base.dtype)

        # A real branch: on the last step of a grid the other evaluations are not made.
        moved = jax.lax.cond(jnp.all(first_order), lambda _: base, rest, None)
        made = jnp.where(everywhere(first_order, xt), 1, len(METHODS[self.method]))
        return jnp.where(first_order, base, moved), carry, Info(made.astype(jnp.int32))


def run_stages(
    form: Form,
    method: str,
    prediction: Prediction,
    xt: State,
    t: Time,
    s: Time,
    denoise: Callable[[State, Time], Prediction],
) -> State:
    """The state at s by one of `METHODS`. prediction: what is predicted at t."""
    here = form.at(t, xt)
    values, places = [form.value(prediction, xt, t)], [0.0]
    for i, stage in enumerate(METHODS[method]):
        u = s if stage.at == 1.0 else form.between(t, s, stage.at)
        state = _stage(form, stage, here, form.at(u, xt), form.first(prediction, xt, t, here, form.at(u, xt)), values,
                       places)  # fmt: skip
        if i + 1 < len(METHODS[method]):
            values.append(form.value(denoise(state, batched(u, xt)), state, u))
            places.append(stage.at)
    return state


def _stage(
    form: Form, stage: Stage, here: Place, there: Place, base: State, values: list[State], places: list[float]
) -> State:
    """The state at a stage: what a constant prediction gives, and what is known of its change."""
    moments = form.moments(here, there, len(stage.through) + 1)
    if not stage.through:
        found: list[Array] = [w * moments[0] for w in stage.weights]
        used = values[1:]
    else:
        nodes = [jnp.full_like(moments[0], places[k] / stage.at) for k in stage.through]
        found = weights(nodes, [jnp.ones_like(n, bool) for n in nodes], moments)
        used = [values[k] for k in stage.through]
    return base + sum((w * (y - values[0]) for w, y in zip(found, used, strict=False)), jnp.zeros_like(base))


def dpm_solver(process: Any, order: int = 2, form: str = "noise", taylor: bool = False) -> SingleStep:
    """DPM-Solver-1, -2, -3 (Lu et al. 2022a); with form="x0", DPM-Solver++ 1S, 2S, 3S (Lu et al. 2022b).

    order: the number of evaluations in a step too. taylor: the exact integral of the polynomial through all of them.
    """
    check_order("dpm_solver", order, 3)
    methods = (
        ("euler", "dpm_solver_2_taylor", "dpm_solver_3_taylor") if taylor else ("euler", "midpoint", "dpm_solver_3")
    )
    return SingleStep(process, methods[order - 1], form, "log_snr")


def dpm_solver_pp_singlestep(process: Any, order: int = 2, taylor: bool = False) -> SingleStep:
    """DPM-Solver++ 2S and 3S (Lu et al. 2022b, algorithm 1): `dpm_solver` on predictions of x0."""
    return dpm_solver(process, order, "x0", taylor)


def heun_in_noise(process: Any) -> SingleStep:
    """Heun's rule in sigma / alpha, the ODE of k-diffusion under any schedule (`Heun` is in the schedule's clock)."""
    return SingleStep(process, "heun", "noise")


def euler(process: Any) -> SingleStep:
    """Euler's rule on the velocity, in the schedule's clock; first order. In sigma / alpha it is `DDIM`."""
    return SingleStep(process, "euler", "velocity")


def rk4(process: Any, form: str = "velocity") -> SingleStep:
    """The classical method of fourth order, in the clock of the form."""
    return SingleStep(process, "rk4", form)


def bogacki_shampine(process: Any, form: str = "velocity") -> SingleStep:
    """Bogacki and Shampine's method of third order, in the clock of the form."""
    return SingleStep(process, "bogacki_shampine", form)
