"""The three forms of the probability-flow ODE that solvers integrate, and polynomials through past predictions.

In each form a prediction y drives a rescaled state along a clock q of its own, d(x / m) = y dq, so that

    x_s = (m_s / m_t) x_t + m_s * (integral of y dq from t to s)

    form        y           m        q                  solvers
    x0          data        sigma    alpha / sigma      DPM-Solver++ (Lu et al. 2022b, eq. 8)
    noise       noise       alpha    sigma / alpha      DDIM, DPM-Solver (Lu et al. 2022a, eq. 3.4), DEIS, PNDM
    velocity    dx/dt       1        t                  Euler, Adams-Bashforth of flows

A constant y gives the DDIM step in the first two, and Euler's in the third. More accurate solvers put a polynomial
through predictions, in some coordinate, and integrate it against dq.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ddjax.predictions import Prediction
from ddjax.processes.gaussian import divide, gaussian_of
from ddjax.types import State, Time, left_broadcast

FORMS = ("x0", "noise", "velocity")
COORDINATES = ("log_snr", "clock", "time", "steps")
_POINTS, _SHARES = (0.5 * (v + shift) for v, shift in zip(np.polynomial.legendre.leggauss(16), (1.0, 0.0), strict=True))


class Place(NamedTuple):
    """A time, and what the schedule says there, shaped to broadcast against the state."""

    t: Array
    alpha: Array
    sigma: Array
    scale: Array  # m
    level: Array  # log(alpha / sigma); the time, for velocities
    coordinate: Array
    last: Array  # no noise is left, at any site


@dataclasses.dataclass(frozen=True)
class Form:
    """One form of a process's ODE, with the coordinate in which its predictions are polynomials.

    process: becomes the Gaussian one that has the predictions (`processes.gaussian.gaussian_of`); with velocities it
        stays as it is.
    coordinate: "log_snr"; "clock", the form's own q; "time"; "steps", the number of the step, as if steps were equal
    and q linear along each of them.
    """

    process: Any
    name: str
    coordinate: str

    def __post_init__(self):
        if self.name not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {self.name!r}")
        if self.coordinate not in COORDINATES:
            raise ValueError(f"coordinate must be one of {', '.join(COORDINATES)}, got {self.coordinate!r}")
        of_flow = self.name == "velocity"
        process = self.process if of_flow else gaussian_of(self.process)
        if self.process.state != "gaussian" or not hasattr(process, "noiseless"):
            raise ValueError(
                f"{type(self.process).__name__} has no ODE of the form {self.name!r}: use Ancestral"
                + (", Heun or form='velocity'" if self.process.state == "gaussian" and not of_flow else "")
            )
        if of_flow and self.coordinate == "log_snr":
            raise ValueError("velocities are integrated over time: coordinate must be 'clock' or 'steps'")
        object.__setattr__(self, "process", process)

    def at(self, t: Time, x: State) -> Place:
        """What the schedule says at t."""
        schedule, t_ = self.process.schedule, left_broadcast(jnp.asarray(t), x)
        alpha, sigma = schedule.alpha(t_), schedule.sigma(t_)
        last = left_broadcast(jnp.all(sigma.reshape(sigma.shape[0], -1) == 0, axis=1), x)
        if self.name == "velocity":
            return Place(t_, alpha, sigma, jnp.ones_like(t_), t_, t_, last)
        level = 0.5 * schedule.log_snr(t_)
        own, scale = (divide(alpha, sigma), sigma) if self.name == "x0" else (divide(sigma, alpha), alpha)
        time = jnp.broadcast_to(t_, own.shape)  # sites may have schedules of their own
        coordinate = {"log_snr": level, "clock": own}.get(self.coordinate, time)
        return Place(t_, alpha, sigma, scale, level, coordinate, last)

    def value(self, prediction: Prediction, xt: State, t: Time) -> State:
        """The prediction as y."""
        return self.process.convert(prediction, self.name, xt, t).value

    def first(self, prediction: Prediction, xt: State, t: Time, here: Place, there: Place) -> State:
        """The state at another time if y stays what it is: finite where alpha or sigma is 0 at either end."""
        if self.name == "velocity":
            return xt + (there.t - here.t) * self.value(prediction, xt, t)
        x0, noise = (self.process.convert(prediction, kind, xt, t).value for kind in ("x0", "noise"))
        return there.alpha * x0 + there.sigma * noise

    def between(self, t: Time, s: Time, fraction: float) -> Time:
        """The time at a fraction of the step from t to s, in the coordinate; t where that is infinite at t."""
        schedule = self.process.schedule
        if self.name == "velocity" or self.coordinate in ("time", "steps"):
            return t + fraction * (s - t)
        schedule = schedule.common
        levels = [0.5 * schedule.log_snr(v) for v in (t, s)]
        sign = 1.0 if self.name == "x0" else -1.0
        if self.coordinate == "log_snr":
            level = levels[0] + fraction * (levels[1] - levels[0])
        else:
            ends = [jnp.exp(sign * v) for v in levels]
            level = sign * jnp.log(ends[0] + fraction * (ends[1] - ends[0]))
        return jnp.where(jnp.isfinite(level), schedule.time(2.0 * jnp.where(jnp.isfinite(level), level, 0.0)), t)

    def moments(
        self, here: Place, there: Place, count: int, whole: Any = True, growth: float | Array = 1.0
    ) -> list[Array]:
        """m_s times the integrals of u^j dq from t to s, j < count; u: the coordinate, 0 at t and 1 at s.

        whole: where false, whatever is finite. growth: of the exponential of an SDE whose predictions are x0, in
        log-SNR; 1: the ODE's.
        """
        if self.name == "velocity":
            total = there.t - here.t
        elif self.name == "x0":
            total = there.alpha - there.sigma * divide(here.alpha, here.sigma)
        else:
            total = there.sigma - there.alpha * divide(here.sigma, here.alpha)
        if self.name == "velocity" or self.coordinate in ("clock", "steps"):
            return [total / (j + 1) for j in range(count)]
        h = self.length(here, there, whole)
        z, size = (-growth * h, there.alpha * growth * h) if self.name == "x0" else (h, -there.sigma * h)
        if self.coordinate == "log_snr":
            return [size * v for v in exponential_moments(z, count)]
        found, span = [0.0] * count, jnp.where(there.t == here.t, 1.0, there.t - here.t)
        for point, share in zip(_POINTS, _SHARES, strict=True):  # Gauss-Legendre in log-SNR
            u = (self.process.schedule.time(2.0 * (jnp.where(whole, here.level, 0.0) + point * h)) - here.t) / span
            found = [v + size * share * jnp.exp(z * (1.0 - point)) * u**j for j, v in enumerate(found)]
        return found

    def length(self, here: Place, there: Place, whole: Any = True) -> Array:
        """The growth of log(alpha / sigma) over the step; 1 where it is infinite, or `whole` is false."""
        h = there.level - here.level
        return jnp.where(whole & jnp.isfinite(h), h, 1.0)


def exponential_moments(z: Array, count: int) -> list[Array]:
    """The integrals of exp(z (1 - u)) u^j over [0, 1], j < count: j! phi_{j+1}(z) of exponential integrators."""
    small = jnp.abs(z) < 2.0
    near, far = jnp.where(small, z, 0.0), jnp.where(small, 2.0, z)
    by_parts = [jnp.expm1(far) / far]
    for j in range(1, count):
        by_parts.append((j * by_parts[-1] - 1.0) / far)
    found = []
    for j in range(count):  # the recursion cancels for small z, where this many points give all digits
        by_points = sum(
            float(share * point**j) * jnp.exp(near * float(1.0 - point))
            for point, share in zip(_POINTS, _SHARES, strict=True)
        )
        found.append(jnp.where(small, by_points, by_parts[j]))
    return found


def weights(nodes: Sequence[Array], known: Sequence[Array], moments: Sequence[Array]) -> list[Array]:
    """Weights w_k such that base + sum of w_k (y_k - y_0) integrates the polynomial through y_0 and all known y_k.

    nodes: where the y_k are; y_0 is at 0. known: which of them count. moments: integrals of u^j, j = 0 ... len(nodes).
    """
    found = []
    for k, node in enumerate(nodes):
        r = jnp.where(known[k], node, 1.0)
        polynomial = [jnp.zeros_like(r), 1.0 / r]  # Lagrange's: 1 at this node, 0 at the others
        for j, other in enumerate(nodes):
            if j == k:
                continue
            both = known[j] & known[k]
            gap, root = jnp.where(both, r - other, 1.0), jnp.where(both, other, 0.0)
            rise, rest = jnp.where(both, 1.0 / gap, 0.0), jnp.where(both, -root / gap, 1.0)
            polynomial = [
                rest * a + rise * b
                for a, b in zip([*polynomial, jnp.zeros_like(r)], [jnp.zeros_like(r), *polynomial], strict=True)
            ]
        total = sum(a * m for a, m in zip(polynomial, moments, strict=False))
        found.append(jnp.where(known[k], total, 0.0))
    return found


def check_order(name: str, order: int, highest: int) -> None:
    """Raise a ValueError unless the order is one of 1 ... highest."""
    if order not in range(1, highest + 1):
        raise ValueError(f"{name}: order must be one of 1 ... {highest}, got {order}")
