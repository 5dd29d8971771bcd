"""Solvers that use the predictions of past steps: one evaluation a step, at any order.

All of them put a polynomial through the last few predictions and integrate it (`solvers.forms`); they differ in what
the polynomial is of, in which coordinate, and in how they begin and end.

    solver                        form       coordinate            slope      start
    DPM-Solver++ 2M, 3M           x0         log_snr               0.5
    DPM-Solver, multistep         noise      log_snr               0.5
    UniP, UniPC (+ corrector)     either     log_snr               bh1, bh2
    DEIS rhoAB, tAB, log-rho AB   noise      clock, time, log_snr
    LMS (k-diffusion)             noise      clock
    iPNDM; PNDM; PLMS             noise      steps                            -; rk4; heun
    gradient estimation           noise      steps                 gamma - 1
    SDE-DPM-Solver++, SA-Solver   x0         log_snr, eta          0.5; bh1
    GHVB                          noise      steps, momentum
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ddjax.processes.gaussian import divide
from ddjax.solvers.base import Info, batched, everywhere
from ddjax.solvers.forms import Form, Place, check_order, weights
from ddjax.solvers.noise import Fresh, Noise
from ddjax.solvers.singlestep import METHODS, run_stages
from ddjax.types import State, Time, left_broadcast, time_dtype

SLOPES = ("exact", "bh1", "bh2")


class Carry(NamedTuple):
    """What is kept of past steps. Times have the shape of the schedule's coefficients, with a leading batch axis."""

    values: tuple[State, ...]  # past predictions (or velocities, with momentum), the newest first
    coordinates: tuple[Array, ...]
    known: Array  # how many of them count
    taken: Array  # steps so far
    partial: State | None = None  # what the corrector makes of the last step, but for the prediction at its end,
    share: Array | None = None  # and the weight of that
    corrects: Array | None = None
    noise: Any = ()  # what the source of noise carries


@dataclasses.dataclass(frozen=True)
class Multistep:
    """The last `order` predictions, interpolated by a polynomial that is integrated exactly.

    order: 1 to 5, the most predictions in use: the order of convergence, where the start does not lower it (see below)
        and the coordinate is not "steps", which is of order 2 but on grids of equal steps of the form's clock.
    form, coordinate: see `solvers.forms`.
    slope: where only two predictions are in use, the integral of the coordinate over the step (from 0 to 1), as a
        multiple of that of 1: "exact"; a number (0.5: DPM-Solver++, and UniPC's "bh2"); "bh1", UniPC's other choice.
    corrector: whether the prediction at the end of each step but the last also corrects that step, at no cost (UniC,
        Zhao et al. 2023, algorithm 1): the order is one more.
    start: a method of `solvers.singlestep.METHODS` for the first steps, and how many of them. None: the first step has
        order 1, the second 2 and so on. One step of order 1 has an error of h^2: it lowers order 3 and above to 2.
    lower_order_final: the number of steps of the grid, which lowers the last ones to as many as are left; None does
        not.
    to_zero: a last step into sigma = 0 ends in the predicted "x0", or in that of the "polynomial" (in the coordinates
        "clock" and "steps").
    momentum: below 1, predictions are replaced by velocities v <- (1 - momentum) v + momentum y, and the polynomials
        make up for the lag (GHVB; Wizadwongsa et al. 2023). At order 1 nothing does: Polyak's heavy ball.
    eta: above 0, the reverse SDE with the same marginals and eta times the forward process's noise (tau^2 of Xue et al.
        2023, eq. 6), for predictions of x0 in log-SNR; a number, or a function of the time at which a step begins
        (`Window`), compared by value.
    noise: see `solvers.noise`.
    compensation: a ratio r for each step. What follows from a prediction (but for the correction of the step that led
        to it) uses in its place the polynomial through it and those before, r of the way from the one before to it:
        1 is none (DC-Solver; Zhao et al. 2024, eq. 8). See `ddjax.search`.

    Predictions at alpha = 0 (of x0 or noise) are not kept, and a step from there is DDIM's.
    """

    process: Any
    order: int = 2
    form: str = "x0"
    coordinate: str = "log_snr"
    slope: float | str = "exact"
    corrector: bool = False
    start: tuple[str, int] | None = None
    lower_order_final: int | None = None
    to_zero: str = "x0"
    momentum: float = 1.0
    eta: float | Callable[[Time], Array] = 0.0
    noise: Noise = Fresh()  # noqa: RUF009 (frozen)
    compensation: tuple[float, ...] | None = None

    def __post_init__(self):
        check_order("Multistep", self.order, 5)
        object.__setattr__(self, "process", Form(self.process, self.form, self.coordinate).process)
        if self.slope not in SLOPES and not isinstance(self.slope, (int, float)):
            raise ValueError(f"slope must be a number or one of {', '.join(SLOPES)}, got {self.slope!r}")
        if self.slope == "bh1" and self.coordinate != "log_snr":
            raise ValueError('slope "bh1" is for coordinate "log_snr"')
        if self.start is not None and (self.start[0] not in METHODS or self.start[1] < 0):
            raise ValueError(f"start must be (one of {', '.join(METHODS)}, a number of steps), got {self.start}")
        if self.lower_order_final is not None and self.lower_order_final < 1:
            raise ValueError(f"lower_order_final is the number of steps of the grid, got {self.lower_order_final}")
        if self.to_zero not in ("x0", "polynomial"):
            raise ValueError(f"to_zero must be 'x0' or 'polynomial', got {self.to_zero!r}")
        if self.to_zero == "polynomial" and not (self.form == "noise" and self.coordinate in ("clock", "steps")):
            raise ValueError(
                "to_zero='polynomial' needs predictions of noise and a coordinate that is finite at sigma = 0 ('clock' "
                "or 'steps'): use to_zero='x0'"
            )
        if not 0.0 < self.momentum <= 1.0:
            raise ValueError(f"momentum lies in (0, 1], 1 being none, got {self.momentum}")
        if self.corrector and self.momentum < 1.0:
            raise ValueError("a corrector with momentum is not defined: choose one")
        if not callable(self.eta) and self.eta < 0:
            raise ValueError(f"eta is a share of the forward process's noise and must not be negative, got {self.eta}")
        if self._random and ((self.form, self.coordinate) != ("x0", "log_snr") or self.start or self.momentum < 1.0):
            raise ValueError("eta > 0 needs predictions of x0 in log_snr, no start and no momentum")
        if self._random and "score" not in self.process.kinds:
            raise ValueError(f"{type(self.process).__name__} has no SDE to take noise from: eta must be 0")
        if self.compensation is not None and (self.order < 2 or self.momentum < 1.0):
            raise ValueError("compensation needs a past prediction (order 2 or more), and no momentum")
        if self.compensation is not None and self._random:
            raise ValueError("compensation is for the ODE: eta must be 0")

    @property
    def grid_steps(self) -> int | None:
        """The steps of the grid it is made for; None: any."""
        return None if self.compensation is None else len(self.compensation)

    @property
    def _random(self) -> bool:
        return callable(self.eta) or self.eta > 0

    @property
    def _past(self) -> int:
        """How many past predictions are kept."""
        return max(self.order - 1, int(self.momentum < 1.0))

    def init(self, xt, cond=None):
        """An empty past."""
        form = Form(self.process, self.form, self.coordinate)
        dtype = time_dtype(xt)
        like = jax.eval_shape(lambda: form.at(jnp.zeros(xt.shape[:1], dtype), xt).coordinate)
        zeros = jnp.zeros(jnp.broadcast_shapes(like.shape, (xt.shape[0], *[1] * (xt.ndim - 1))), dtype)
        number = jnp.zeros(zeros.shape, jnp.int32)
        carry = Carry((jnp.zeros_like(xt),) * self._past, (zeros,) * self._past, number, jnp.zeros_like(number))
        carry = carry._replace(noise=self.noise.init(xt))
        if not self.corrector:
            return carry
        return carry._replace(partial=jnp.zeros_like(xt), share=zeros, corrects=jnp.zeros(zeros.shape, bool))

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        """One evaluation, more where the start asks for them."""
        form = Form(self.process, self.form, self.coordinate)
        here, there = form.at(t, xt), form.at(s, xt)
        prediction = denoise(xt, batched(t, xt), cond)
        y = form.value(prediction, xt, t)
        base, growth, left = form.first(prediction, xt, t, here, there), 1.0, 1.0
        if self._random:
            eta = self.eta(jnp.asarray(t)) if callable(self.eta) else self.eta
            eta = left_broadcast(jnp.asarray(eta, here.level.dtype), xt)
            faded = jnp.where(eta == 0, 0.0, -eta * (there.level - here.level))
            growth, left = 1.0 + eta, jnp.exp(faded)  # of the noise that is there
            z, noise = self.noise.draw(carry.noise, keys, xt, t, s)
            carry = carry._replace(noise=noise)
            old = self.process.convert(prediction, "noise", xt, t).value
            base = base + there.sigma * ((left - 1.0) * old + jnp.sqrt(-jnp.expm1(2.0 * faded)) * z)
        if self.corrector:
            change = jnp.where(carry.corrects, carry.partial + carry.share * y - xt, 0.0)
            base = base + left * divide(there.scale, here.scale) * change

        ends = there.last if self.to_zero == "x0" else jnp.zeros_like(there.last)
        whole = jnp.isfinite(here.level) & ~ends  # where the polynomial can be integrated
        order = jnp.where(whole, jnp.minimum(carry.known + 1, self.order), 1)
        if self.lower_order_final is not None:
            order = jnp.minimum(order, jnp.maximum(self.lower_order_final - carry.taken, 1))
        nodes, known = self._nodes(carry, here, there, order)
        if self.compensation is not None:
            better = self._compensated(carry, y, nodes)
            whole_step = dataclasses.replace(form, coordinate="clock").moments(here, there, 1)[0]
            base = base + jnp.where(carry.known > 0, whole_step * (better - y), 0.0)
            y = better
        moments = form.moments(here, there, self.order + 1, whole, growth)
        slope = self._slope(form, here, there, moments, whole, growth)

        lag = 0.0
        if self.momentum < 1.0:
            v = jnp.where(carry.known > 0, (1.0 - self.momentum) * carry.values[0] + self.momentum * y, y)
            lag, y = jnp.where(whole, moments[0] * (v - y), 0.0), v
        values = [y, *carry.values]
        xs = base + lag + _change(values, nodes, known, _paired(moments, slope, order == 2))
        if self.momentum < 1.0:
            falls = [a - b for a, b in itertools.pairwise(values)]
            one_less = [order > k + 1 for k in range(1, len(falls))]
            again = _change(falls, nodes[: len(one_less)], one_less, _paired(moments, slope, order == 3))
            lost = jnp.where(order > 1, moments[0] * falls[0] + again, 0.0)
            xs = xs + (1.0 / self.momentum - 1.0) * lost
        clean = self.process.noiseless(self.process.convert(prediction, "x0", xt, t).value, s)
        if self.form == "velocity":  # the others end there by themselves, from the corrected state
            xs = jnp.where(there.last, clean, xs)
        made, kept = jnp.ones(xt.shape[:1], jnp.int32), self._kept(carry, y, here)
        starting = jnp.zeros_like(whole)
        if self.start is not None:
            starting = (carry.taken < self.start[1]) & whole
            steps = dataclasses.replace(form, coordinate="time" if self.coordinate == "steps" else "clock")

            def begin(_):
                moved = run_stages(steps, self.start[0], prediction, xt, t, s, lambda x, u: denoise(x, u, cond))
                return moved.astype(xs.dtype)

            xs = jnp.where(starting, jax.lax.cond(jnp.any(starting), begin, lambda _: xs, None), xs)
            made = jnp.where(everywhere(~starting, xt), made, len(METHODS[self.start[0]]))

        if self.corrector:
            found = weights([*nodes, jnp.ones_like(slope)], [*known, whole], _paired(moments, slope, order == 1))
            partial = base + sum(w * (v - y) for w, v in zip(found, carry.values, strict=False)) - found[-1] * y
            kept = kept._replace(
                partial=partial.astype(carry.partial.dtype),
                share=_like(found[-1], carry.share),
                corrects=_like(whole & ~starting, carry.corrects),
            )
        return xs, kept, Info(made)

    def _nodes(self, carry: Carry, here: Place, there: Place, order: Array) -> tuple[list[Array], list[Array]]:
        """Where the past predictions lie in units of the step, and which are in use."""
        span = there.coordinate - here.coordinate
        span = jnp.where(jnp.isfinite(span) & (span != 0), span, 1.0)
        where = jnp.where(jnp.isfinite(here.coordinate), here.coordinate, 0.0)
        past = range(1, self.order)
        if self.coordinate == "steps":
            nodes = [jnp.full_like(span, -float(k)) for k in past]
        else:
            # XLA divides a batch by one number as a product with its inverse, but not a batch of one: so ask for that.
            unit = jax.lax.optimization_barrier(1.0 / span)
            nodes = [(carry.coordinates[k - 1] - where) * unit for k in past]
        return nodes, [order > k for k in past]

    def _compensated(self, carry: Carry, y: State, nodes: list[Array]) -> State:
        """The polynomial through all predictions, at the step's ratio."""
        place = (1.0 - jnp.asarray(self.compensation)[carry.taken]) * nodes[0]
        powers = [place**j for j in range(self.order)]
        return y + _change([y, *carry.values], nodes, [carry.known > k for k in range(len(nodes))], powers)

    def _slope(
        self, form: Form, here: Place, there: Place, moments: list[Array], whole: Array, growth: float | Array
    ) -> Array:
        """The integral of u where only two predictions are in use."""
        if self.slope == "exact":
            return moments[1]
        if self.slope == "bh1":
            h = growth * form.length(here, there, whole)
            return 0.5 * h * (there.alpha if self.form == "x0" else -there.sigma)
        return (0.5 if self.slope == "bh2" else self.slope) * moments[0]

    def _kept(self, carry: Carry, y: State, here: Place) -> Carry:
        """The past of the next step."""
        finite = jnp.isfinite(here.level)
        known = jnp.where(finite, jnp.minimum(carry.known + 1, self._past), 0)
        values, coordinates = carry.values, carry.coordinates
        if self._past:
            where = jnp.where(finite, here.coordinate, 0.0)
            values = (y.astype(values[0].dtype), *values[:-1])
            coordinates = (_like(where, coordinates[0]), *coordinates[:-1])
        return carry._replace(values=values, coordinates=coordinates, known=known, taken=carry.taken + 1)


@dataclasses.dataclass(frozen=True)
class Window:
    """An eta for times of [start, end], and 0 outside (the tau(t) that Xue et al. 2023, section 6, recommend)."""

    eta: float = 1.0
    start: float = 0.2
    end: float = 0.8

    def __call__(self, t):
        """At each time."""
        return jnp.where((t >= self.start) & (t <= self.end), self.eta, 0.0)


def _like(value: Array, other: Array) -> Array:
    """The value in the shape and dtype in which it is carried."""
    return jnp.broadcast_to(value, other.shape).astype(other.dtype)


def _paired(moments: list[Array], slope: Array, two: Array) -> list[Array]:
    """The moments, the second replaced where two predictions are in use."""
    return [moments[0], jnp.where(two, slope, moments[1]), *moments[2:]]


def _change(values: list[State], nodes: list[Array], known: list[Array], moments: list[Array]) -> State:
    """What the polynomial through the values adds to the step of a constant values[0]."""
    found = weights(nodes, known, moments)
    return sum((w * (v - values[0]) for w, v in zip(found, values[1:], strict=False)), jnp.zeros_like(values[0]))


def _start(lower_order_start: bool, order: int, method: str = "rk4") -> tuple[str, int] | None:
    return None if lower_order_start or order == 1 else (method, order - 1)


def dpm_solver_pp(
    process: Any, order: int = 2, *, lower_order_start: bool = True, lower_order_final: int | None = None
) -> Multistep:
    """DPM-Solver++ 1, 2M, 3M (Lu et al. 2022b, algorithm 2). order: 1 is DDIM.

    lower_order_start: if false, the first order - 1 steps are Runge-Kutta's, of four evaluations.
    """
    check_order("dpm_solver_pp", order, 3)
    start = _start(lower_order_start, order)
    return Multistep(process, order, "x0", slope=0.5, start=start, lower_order_final=lower_order_final)


def dpm_solver_multistep(
    process: Any, order: int = 2, *, lower_order_start: bool = True, lower_order_final: int | None = None
) -> Multistep:
    """DPM-Solver (Lu et al. 2022a) with past predictions of the noise, as in its authors' code."""
    check_order("dpm_solver_multistep", order, 3)
    start = _start(lower_order_start, order)
    return Multistep(process, order, "noise", slope=0.5, start=start, lower_order_final=lower_order_final)


def sde_dpm_solver_pp(
    process: Any,
    order: int = 2,
    *,
    eta: float = 1.0,
    slope: float | str = 0.5,
    lower_order_final: int | None = None,
    noise: Noise = Fresh(),
) -> Multistep:
    """SDE-DPM-Solver++ 1, 2M (Lu et al. 2022b, section 5) and k-diffusion's 3M.

    eta: 1 is the reverse SDE, 0 `dpm_solver_pp`. slope: 0.5 is their "midpoint", "exact" their "heun".
    """
    check_order("sde_dpm_solver_pp", order, 3)
    return Multistep(process, order, slope=slope, lower_order_final=lower_order_final, eta=eta, noise=noise)


def sa_solver(
    process: Any,
    order: int = 2,
    *,
    eta: float | Callable[[Time], Array] = Window(),
    corrector: bool = True,
    lower_order_final: int | None = None,
    noise: Noise = Fresh(),
) -> Multistep:
    """SA-Solver, stochastic Adams, in predictions of x0 (Xue et al. 2023, algorithm 1).

    order: predictions that the predictor uses; the corrector uses one more. eta: their tau(t)^2.
    """
    return Multistep(
        process, order, slope="bh1", corrector=corrector, lower_order_final=lower_order_final, eta=eta, noise=noise
    )


def unipc(
    process: Any,
    order: int = 2,
    *,
    form: str = "x0",
    variant: str = "bh2",
    corrector: bool = True,
    lower_order_start: bool = True,
    lower_order_final: int | None = None,
) -> Multistep:
    """UniPC (Zhao et al. 2023, algorithms 3 and 4); UniP without the corrector. variant: B(h), "bh1" or "bh2"."""
    if variant not in ("bh1", "bh2"):
        raise ValueError(f"unipc: variant must be 'bh1' or 'bh2', got {variant!r}")
    start = _start(lower_order_start, order)
    return Multistep(process, order, form, "log_snr", variant, corrector, start, lower_order_final)


def deis(
    process: Any,
    order: int = 3,
    *,
    variant: str = "tab",
    lower_order_start: bool = True,
    lower_order_final: int | None = None,
) -> Multistep:
    """DEIS (Zhang & Chen 2023, algorithm 1). order: predictions in use, one more than the polynomial's degree.

    variant: "tab", polynomials in the clock; "rhoab", in sigma / alpha; "logrhoab", in its logarithm (diffusers).
    """
    variants = {"tab": "time", "rhoab": "clock", "logrhoab": "log_snr"}
    if variant not in variants:
        raise ValueError(f"deis: variant must be one of {', '.join(variants)}, got {variant!r}")
    start = _start(lower_order_start, order)
    return Multistep(process, order, "noise", variants[variant], start=start, lower_order_final=lower_order_final)


def lms(process: Any, order: int = 4) -> Multistep:
    """k-diffusion's linear multistep method in sigma / alpha, of full order into sigma = 0."""
    return Multistep(process, order, "noise", "clock", to_zero="polynomial")


def adams_bashforth(process: Any, order: int = 2, *, lower_order_start: bool = True) -> Multistep:
    """Adams and Bashforth's method on the velocity, in the schedule's clock, on any grid."""
    return Multistep(process, order, "velocity", "clock", start=_start(lower_order_start, order))


def ipndm(process: Any, order: int = 4) -> Multistep:
    """Improved PNDM (Zhang & Chen 2023, appendix): PNDM's multistep part, from order 1 up."""
    return Multistep(process, order, "noise", "steps", to_zero="polynomial")


def pndm(process: Any, order: int = 4) -> Multistep:
    """PNDM (Liu et al. 2022): pseudo Runge-Kutta steps, then linear multistep ones.

    order: 4 is F-PNDM, three steps of four evaluations and then four predictions; 2 is S-PNDM, one step of pseudo Heun,
        of two, and then two predictions. Raises ValueError for others.
    """
    if order not in (2, 4):
        raise ValueError(f"pndm has order 4 (F-PNDM) or 2 (S-PNDM), got {order}")
    return dataclasses.replace(ipndm(process, order), start=("rk4", 3) if order == 4 else ("heun", 1))


def plms(process: Any) -> Multistep:
    """PLMS of latent diffusion: one step of pseudo Heun, of two evaluations, then two, three, four predictions."""
    return dataclasses.replace(ipndm(process), start=("heun", 1))


def gradient_estimation(process: Any, gamma: float = 2.0) -> Multistep:
    """DDIM along gamma noise + (1 - gamma) (noise before) (Permenter & Yuan 2024, algorithm 2).

    gamma: 1 is DDIM, 1.5 of second order on equal steps of sigma / alpha.
    """
    return Multistep(process, 2, "noise", "steps", slope=gamma - 1.0)


def ghvb(process: Any, order: int = 2, momentum: float = 0.8) -> Multistep:
    """Generalised heavy ball (Wizadwongsa et al. 2023, "Diffusion Sampling with Momentum").

    momentum: their beta; the smaller, the more stable and the less accurate. Order 1 is heavy ball.
    """
    return Multistep(process, order, "noise", "steps", momentum=momentum)


__all__ = [
    "Multistep",
    "Window",
    "adams_bashforth",
    "deis",
    "dpm_solver_multistep",
    "dpm_solver_pp",
    "ghvb",
    "gradient_estimation",
    "ipndm",
    "lms",
    "plms",
    "pndm",
    "sa_solver",
    "sde_dpm_solver_pp",
    "unipc",
]
