"""Solvers for Gaussian states. They ask for (x0, noise) and never see what the network predicts."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ddjax.processes import Gaussian
from ddjax.processes.gaussian import Normal, gaussian_of
from ddjax.solvers.base import Info, batched, everywhere
from ddjax.solvers.noise import Fresh, Noise
from ddjax.types import left_broadcast


@dataclasses.dataclass(frozen=True)
class DDIM:
    """x_s = alpha_s x0 + sqrt(sigma_s^2 - eta^2 b^2) noise + eta b z,  b^2 = sigma_s^2 (1 - exp(lambda_t - lambda_s)).

    (Song et al. 2021, eq. 12 and 16.) eta = 0: first-order ODE solver, exponential in the noise (Euler in sigma /
    alpha). eta = 1: ancestral.
    """

    process: Gaussian
    eta: float = 0.0
    noise: Noise = Fresh()  # noqa: RUF009 (frozen)

    def __post_init__(self):
        process = gaussian_of(self.process)
        if process is None:
            raise ValueError(
                f"DDIM is for processes.Gaussian, got {type(self.process).__name__}: use Heun or Ancestral"
            )
        if not 0.0 <= self.eta <= 1.0:
            raise ValueError(f"DDIM's eta lies in [0, 1], got {self.eta}")
        if self.eta > 0 and "score" not in process.kinds:
            raise ValueError(f"{type(self.process).__name__} has no SDE to take noise from: DDIM's eta must be 0")
        object.__setattr__(self, "process", process)

    def init(self, xt, cond=None):
        """What the noise carries; nothing for `Fresh`."""
        return self.noise.init(xt)

    @property
    def deterministic(self) -> bool:
        """Whether nothing is drawn."""
        return self.eta == 0.0

    def law(self, prediction, xt, s, t) -> Normal:
        """What a step draws from; without noise where eta = 0."""
        x0 = self.process.convert(prediction, "x0", xt, t).value
        noise = self.process.convert(prediction, "noise", xt, t).value
        schedule = self.process.schedule
        s, t = left_broadcast(jnp.asarray(s), xt), left_broadcast(jnp.asarray(t), xt)
        alpha, sigma = schedule.alpha(s), schedule.sigma(s)
        if self.deterministic:
            return Normal(alpha * x0 + sigma * noise, jnp.zeros_like(xt))
        fresh = -jnp.expm1(schedule.log_snr(t) - schedule.log_snr(s)) * self.eta**2
        mean = alpha * x0 + sigma * jnp.sqrt(1.0 - fresh) * noise
        return Normal(mean, jnp.broadcast_to(sigma * jnp.sqrt(fresh), xt.shape))

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        """One step; noise is drawn only where eta > 0."""
        law = self.law(denoise(xt, batched(t, xt), cond), xt, s, t)
        xs = law.mean
        if not self.deterministic:
            z, carry = self.noise.draw(carry, keys, xt, t, s)
            xs = xs + law.std * z
        return xs, carry, Info(jnp.ones(xt.shape[0], jnp.int32))


@dataclasses.dataclass(frozen=True)
class Heun:
    """The trapezoidal rule on dx/dt = velocity, in the schedule's own clock; second order.

    Under `schedules.EDM`, where the clock is sigma, this is EDM's deterministic sampler (Karras et al. 2022,
    algorithm 1); under
    `CondOT`, Heun for flow matching. A step into sigma = 0 ends at the state that the predicted x0 is there
    (`process.noiseless`: x0 itself at t = 0, EDM's Euler step), and costs one evaluation. For any process with a
    velocity.
    """

    process: Any

    deterministic = True

    def __post_init__(self):
        if self.process.state != "gaussian":
            raise ValueError(f"Heun is for Gaussian states, got {type(self.process).__name__}: use Ancestral")
        if not hasattr(self.process, "noiseless"):
            raise ValueError(f"{type(self.process).__name__} has no ODE for its states as they are: use Ancestral")

    def init(self, xt, cond=None):
        """Nothing to carry."""
        return ()

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        """Two evaluations, one where s has no noise."""
        schedule = self.process.schedule
        first = denoise(xt, batched(t, xt), cond)
        slope = self.process.convert(first, "velocity", xt, t).value
        dt = left_broadcast(s - t, xt)
        last = everywhere(schedule.sigma(left_broadcast(s, xt)) == 0, xt)

        def correct(_):
            euler = xt + dt * slope
            again = self.process.convert(denoise(euler, batched(s, xt), cond), "velocity", euler, s).value
            return xt + 0.5 * dt * (slope + again)

        x0 = self.process.convert(first, "x0", xt, t).value
        clean = self.process.noiseless(x0, s)
        # A real branch: on the last step of a grid the second evaluation is not made at all.
        moved = jax.lax.cond(jnp.all(last), lambda _: clean, correct, None)
        xs = jnp.where(left_broadcast(last, xt), clean, moved)
        return xs, carry, Info(jnp.where(last, 1, 2).astype(jnp.int32))
