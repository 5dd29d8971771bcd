"""Solvers that go back towards noise, by the forward process's own kernel, around steps of any deterministic solver.

    ancestral     a step to less noise than asked for, then forward to the level asked for
    churn         forward a little, then the step                               (Karras et al. 2022, algorithm 2)
    restart       at one level: forward a long way, and all the steps again     (Xu et al. 2023, algorithm 1)

What leaves the right law leaves it there: the forward kernel takes the marginal at s to the marginal at t.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ddjax import random
from ddjax.processes import Gaussian
from ddjax.processes.gaussian import divide, gaussian_of
from ddjax.solvers.base import Info, Solver, first_carry
from ddjax.solvers.noise import Fresh, Noise
from ddjax.solvers.singlestep import dpm_solver_pp_singlestep, heun_in_noise
from ddjax.types import State, Time, left_broadcast


def diffuse(process: Gaussian, x: State, s: Time, t: Time, z: State) -> State:
    """A draw of q(x_t | x_s) for t >= s, made of the normals z."""
    schedule, s_, t_ = process.schedule, left_broadcast(jnp.asarray(s), x), left_broadcast(jnp.asarray(t), x)
    same = t_ == s_
    change = jnp.where(same, 0.0, schedule.log_snr(t_) - schedule.log_snr(s_))
    grown = divide(schedule.alpha(t_), schedule.alpha(s_)) * x + schedule.sigma(t_) * jnp.sqrt(-jnp.expm1(change)) * z
    return jnp.where(same, x, grown)


class _Renoised:
    """A solver with forward noise around it."""

    solver: Solver
    noise: Noise

    def _check(self) -> None:
        """Raise a ValueError for a solver that cannot be taken off its way."""
        name, process = type(self).__name__, gaussian_of(getattr(self.solver, "process", None))
        if process is None or "score" not in process.kinds:
            raise ValueError(
                f"{name} goes forward by the kernel of processes.Gaussian: the solver must be of one, "
                f"got {self.solver!r}"
            )
        if getattr(self.solver, "times", None) is not None:
            made = type(self.solver).__name__
            raise ValueError(f"{name} leaves the grid that {made} is made for: use another solver")

    @property
    def process(self) -> Gaussian:
        """The solver's."""
        return gaussian_of(self.solver.process)

    def init(self, xt, cond=None):
        """The solver's carry and the noise's."""
        return self.solver.init(xt, cond), self.noise.init(xt)

    def begin(self, xt, cond, denoise, known=None):
        """As `init`."""
        return first_carry(self.solver, xt, cond, denoise, known), self.noise.init(xt)


def _time(process: Gaussian, log_snr: Array, low: Time, high: Time) -> Array:
    """The time of this log-SNR, within [low, high]: so is the noise that schedules have."""
    finite = jnp.isfinite(log_snr)
    time = process.schedule.common.time(jnp.where(finite, log_snr, 0.0))
    return jnp.clip(jnp.where(finite, time, jnp.where(log_snr > 0, low, high)), low, high)


@dataclasses.dataclass(frozen=True)
class StepsDown(_Renoised):
    """k-diffusion's ancestral samplers: the solver's step to sigma_down, then as much noise as brings back sigma_s.

    In x / alpha, sigma_down^2 = sigma_s^2 - eta^2 sigma_s^2 (1 - sigma_s^2 / sigma_t^2). With DDIM's step this is
    `DDIM(eta)`, and eta = 1 `Ancestral`. eta = 0 is the solver itself. Where the schedule has no noise as low as
    sigma_down (at its end), its lowest, and the less noise after.

    solver: of one evaluation or more, without a memory (`SingleStep`, `Heun`).
    """

    solver: Solver
    eta: float = 1.0
    noise: Noise = Fresh()  # noqa: RUF009 (frozen)

    def __post_init__(self):
        self._check()
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"StepsDown's eta lies in [0, 1], got {self.eta}")

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        """The solver's evaluations."""
        inner, noise = carry
        if self.eta == 0.0:
            xs, inner, info = self.solver.step(keys, inner, xt, t, s, denoise, cond)
            return xs, (inner, noise), info
        schedule, t, s = self.process.schedule.common, jnp.asarray(t), jnp.asarray(s)
        before, after = schedule.log_snr(t), schedule.log_snr(s)
        wanted = after - jnp.log1p(self.eta**2 * jnp.expm1(before - after))
        down = jnp.where(jnp.isposinf(after), s, _time(self.process, wanted, jnp.zeros_like(s), s))
        x, inner, info = self.solver.step(random.fold_in(keys, 0), inner, xt, t, down, denoise, cond)
        z, noise = self.noise.draw(noise, random.fold_in(keys, 1), xt, t, s)
        return diffuse(self.process, x, down, s, z), (inner, noise), info


def dpm_solver_pp_2s_ancestral(process: Gaussian, eta: float = 1.0) -> StepsDown:
    """k-diffusion's DPM++ 2S ancestral: DPM-Solver++ 2S to sigma_down."""
    return StepsDown(dpm_solver_pp_singlestep(process, 2), eta)


@dataclasses.dataclass(frozen=True)
class Churned(_Renoised):
    """EDM's stochastic sampler around any solver: each step begins at (1 + gamma) times its noise level.

    gamma: 0 is the solver itself. low, high: S_min and S_max, the levels sigma / alpha at which it is done. scale:
    S_noise, of the normals. Levels end at that of t = 1.
    """

    solver: Solver
    gamma: float
    low: float = 0.0
    high: float = math.inf
    scale: float = 1.0
    noise: Noise = Fresh()  # noqa: RUF009 (frozen)

    def __post_init__(self):
        self._check()
        if not (self.gamma >= 0 and 0 <= self.low <= self.high and self.scale > 0):
            raise ValueError(
                "Churned needs gamma >= 0, 0 <= low <= high and scale > 0, got "
                f"{(self.gamma, self.low, self.high, self.scale)}"
            )

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        """The solver's evaluations."""
        inner, noise = carry
        if self.gamma == 0.0:
            xs, inner, info = self.solver.step(keys, inner, xt, t, s, denoise, cond)
            return xs, (inner, noise), info
        t = jnp.asarray(t)
        log_snr = self.process.schedule.common.log_snr(t)
        level = jnp.exp(-0.5 * log_snr)
        wanted = _time(self.process, log_snr - 2.0 * math.log1p(self.gamma), t, jnp.ones_like(t))
        up = jnp.where((level >= self.low) & (level <= self.high) & jnp.isfinite(level), wanted, t)
        z, noise = self.noise.draw(noise, random.fold_in(keys, 1), xt, up, t)
        x = diffuse(self.process, xt, t, up, self.scale * z).astype(xt.dtype)
        xs, inner, info = self.solver.step(random.fold_in(keys, 0), inner, x, up, s, denoise, cond)
        return xs, (inner, noise), info


def edm_stochastic(
    process: Gaussian,
    steps: int,
    *,
    churn: float = 40.0,
    low: float = 0.05,
    high: float = 50.0,
    scale: float = 1.003,
) -> Churned:
    """EDM's algorithm 2 (Karras et al. 2022): Heun in sigma / alpha, gamma = min(S_churn / steps, sqrt(2) - 1).

    steps: those of the grid. The defaults are the paper's for ImageNet-64 (its table 5).
    """
    return Churned(heun_in_noise(process), min(churn / steps, math.sqrt(2.0) - 1.0), low, high, scale)


@dataclasses.dataclass(frozen=True)
class Interval:
    """Where to restart.

    low, high: the noise levels sigma / alpha between which it goes back and forth; the lower end is the grid's first
    time at or below `low`. steps: of each pass, on Karras et al.'s grid of `rho`. times: how often.
    """

    low: float
    high: float
    steps: int = 4
    times: int = 2
    rho: float = 7.0

    def __post_init__(self):
        if not (0 < self.low < self.high < math.inf and self.steps >= 1 and self.times >= 1 and self.rho > 0):
            raise ValueError(f"a restart interval needs 0 < low < high, steps >= 1, times >= 1 and rho > 0, got {self}")


@dataclasses.dataclass(frozen=True)
class Restart(_Renoised):
    """Restart sampling (Xu et al. 2023): a deterministic solver whose errors are forgotten by large noise now and then.

    Upon reaching an interval's lower end: forward to its upper end and back again by the solver, `times` times.
    solver: begins each pass without a memory. intervals: `Interval`, or tuples (low, high, steps, times).
    """

    solver: Solver
    intervals: tuple[Interval, ...]
    noise: Noise = Fresh()  # noqa: RUF009 (frozen)

    def __post_init__(self):
        self._check()
        made = (v if isinstance(v, Interval) else Interval(*v) for v in self.intervals)
        object.__setattr__(self, "intervals", tuple(made))

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        """The solver's step, and the passes where it reaches the end of an interval."""
        inner, noise = carry
        t, s = jnp.asarray(t), jnp.asarray(s)
        x, inner, info = self.solver.step(random.fold_in(keys, 0), inner, xt, t, s, denoise, cond)
        x, nfe = x.astype(xt.dtype), info.nfe
        before, after = (jnp.exp(-0.5 * self.process.schedule.common.log_snr(v)) for v in (t, s))
        for j, interval in enumerate(self.intervals):
            reached = (before > interval.low) & (after <= interval.low)

            def passes(state, j=j, interval=interval):
                return self._passes(random.fold_in(keys, j + 1), state, s, after, interval, denoise, cond)

            made = jax.lax.cond(jnp.any(reached), passes, lambda state: state, (x, noise, jnp.zeros_like(nfe)))
            x = jnp.where(left_broadcast(reached, x), made[0], x)
            noise, nfe = made[1], nfe + jnp.where(reached, made[2], 0)
        return x, (inner, noise), Info(nfe)

    def _passes(self, keys, state, s, level, interval, denoise, cond):
        """All passes of one interval that ends at s."""
        power = 1.0 / interval.rho
        ends = interval.high**power, level**power
        levels = [(ends[0] + i / interval.steps * (ends[1] - ends[0])) ** interval.rho for i in range(interval.steps)]
        inside = [_time(self.process, -2.0 * jnp.log(v), s, jnp.ones_like(s)) for v in levels]
        times = jnp.stack([jnp.broadcast_to(v, s.shape).astype(s.dtype) for v in (*inside, s)])

        def once(k, state):
            x, noise, nfe = state
            own = random.fold_in(keys, k)
            z, noise = self.noise.draw(noise, random.fold_in(own, interval.steps), x, times[0], s)
            x = diffuse(self.process, x, s, times[0], z).astype(x.dtype)

            def down(i, state):
                x, inner, nfe = state
                moved, inner, info = self.solver.step(
                    random.fold_in(own, i), inner, x, times[i], times[i + 1], denoise, cond
                )
                return moved.astype(x.dtype), inner, nfe + info.nfe

            first = first_carry(self.solver, x, cond, denoise)
            x, _, nfe = jax.lax.fori_loop(0, interval.steps, down, (x, first, nfe))
            return x, noise, nfe

        return jax.lax.fori_loop(0, interval.times, once, state)


def edm_restart(process: Gaussian, intervals: Sequence[Interval | Sequence[float]]) -> Restart:
    """Restart around Heun in sigma / alpha, as its authors have it on EDM's grid."""
    return Restart(heun_in_noise(process), tuple(intervals))
