"""Langevin steps at a fixed noise level, the predictor-corrector sampler, and Euler-Maruyama of the reverse SDE."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ddjax import random
from ddjax.processes import Gaussian
from ddjax.processes.gaussian import divide, gaussian_of
from ddjax.solvers.base import Info, Solver, batched, everywhere, first_carry
from ddjax.solvers.noise import Fresh, Noise
from ddjax.solvers.preconditioning import Preconditioner
from ddjax.types import left_broadcast, per_example

RULES = ("norms", "level")


def _with_score(name: str, process: Any) -> Gaussian:
    found = gaussian_of(process)
    if found is None or "score" not in found.kinds:
        raise ValueError(f"{name} needs the score of a processes.Gaussian, got {type(process).__name__}")
    return found


@dataclasses.dataclass(frozen=True)
class Langevin:
    """x <- x + e P score + sqrt(2 e) P^(1/2) z, at one time: leaves the marginal there as it is for small e.

    size, rule: "norms", e = 2 (size |z| / |score|)^2, with the norms of each example by itself (Song et al. 2021,
    algorithms 4 and 5, whose code averages them over the batch and the devices); "level", e = size sigma^2 (Song &
    Ermon 2019, algorithm 1). steps: how many. Nothing is done where sigma = 0.
    preconditioner: of P (`solvers.preconditioning`), None for 1. A P that depends on the state leaves the marginal as
        it is but for its divergence, which is left out here as in Levenberg-Marquardt-Langevin (Wang et al. 2025).
    """

    process: Gaussian
    size: float = 0.16
    steps: int = 1
    rule: str = "norms"
    noise: Noise = Fresh()  # noqa: RUF009 (frozen)
    preconditioner: Preconditioner | None = None

    def __post_init__(self):
        object.__setattr__(self, "process", _with_score("Langevin", self.process))
        if self.rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {self.rule!r}")
        if not self.size > 0 or self.steps < 1:
            raise ValueError(f"Langevin needs a positive size and at least one step, got {(self.size, self.steps)}")

    def init(self, x):
        """What the noise and the preconditioner carry."""
        return self.noise.init(x), () if self.preconditioner is None else self.preconditioner.init(x)

    def correct(self, keys, carry, x, t, denoise, cond=None):
        """All steps at time t: the state, the carry, and the evaluations that each example had."""
        calls = 1 if self.preconditioner is None else 1 + self.preconditioner.calls(x)

        def once(k, state):
            x, (noise, past) = state
            score = self.process.convert(denoise(x, batched(t, x), cond), "score", x, t).value
            z, noise = self.noise.draw(noise, random.fold_in(keys, k), x, t, t)
            sigma = self.process.schedule.sigma(left_broadcast(jnp.asarray(t), x))
            if self.rule == "level":
                e = self.size * sigma**2
            else:
                e = 2.0 * self.size**2 * divide(per_example(z**2), per_example(score**2))
                e = jnp.where(sigma == 0, 0.0, left_broadcast(e, x))
            if self.preconditioner is not None:
                noisy = -sigma * score
                metric, past = self.preconditioner.metric(past, noisy, x, t, denoise, self.process, cond)
                score, z = metric.apply(score), metric.root(z)
            return (x + e * score + jnp.sqrt(2.0 * e) * z).astype(x.dtype), (noise, past)

        x, carry = jax.lax.fori_loop(0, self.steps, once, (x, carry))
        return x, carry, jnp.full(x.shape[:1], self.steps * calls, jnp.int32)


@dataclasses.dataclass(frozen=True)
class PredictorCorrector:
    """At each time of the grid but the last, the corrector; then the predictor's step (Song et al. 2021, algorithm 1).

    predictor: any solver that takes the state it is given. corrector: `Langevin`.
    Raises ValueError for a solver that knows all states of its grid beforehand (`Learned`).
    """

    predictor: Solver
    corrector: Langevin

    def __post_init__(self):
        if getattr(self.predictor, "times", None) is not None:
            raise ValueError(
                f"{type(self.predictor).__name__} would not see what was corrected: use another solver as predictor"
            )

    @property
    def process(self) -> Gaussian:
        """The corrector's."""
        return self.corrector.process

    def init(self, xt, cond=None):
        """The carries of both."""
        return self.predictor.init(xt, cond), self.corrector.init(xt)

    def begin(self, xt, cond, denoise, known=None):
        """As `init`."""
        return first_carry(self.predictor, xt, cond, denoise, known), self.corrector.init(xt)

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        """The evaluations of both."""
        predictor, corrector = carry
        x, corrector, made = self.corrector.correct(random.fold_in(keys, 1), corrector, xt, t, denoise, cond)
        xs, predictor, info = self.predictor.step(random.fold_in(keys, 0), predictor, x, t, s, denoise, cond)
        return xs, (predictor, corrector), Info(info.nfe + made)


def predictor_corrector(process: Gaussian, size: float = 0.16, steps: int = 1) -> PredictorCorrector:
    """Song et al. 2021's "reverse diffusion + Langevin", the reverse SDE's predictor being `EulerMaruyama`."""
    return PredictorCorrector(EulerMaruyama(process), Langevin(process, size, steps))


@dataclasses.dataclass(frozen=True)
class EulerMaruyama:
    """x_s = x_t - (t - s) (velocity - eta g^2 score / 2) + sqrt(eta g^2 (t - s)) z, in the schedule's clock.

    The reverse SDE with eta times the forward process's noise (Song et al. 2021, eq. 6; eta = 0, the ODE's Euler). A
    step into sigma = 0 ends in the predicted x0; a random one from where g is infinite (alpha = 0) is ancestral.
    """

    process: Gaussian
    eta: float = 1.0
    noise: Noise = Fresh()  # noqa: RUF009 (frozen)

    def __post_init__(self):
        object.__setattr__(self, "process", _with_score("EulerMaruyama", self.process))
        if self.eta < 0:
            raise ValueError(f"eta is a share of the forward process's noise and must not be negative, got {self.eta}")

    def init(self, xt, cond=None):
        """What the noise carries."""
        return self.noise.init(xt)

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        """One evaluation."""
        prediction = denoise(xt, batched(t, xt), cond)
        x0, noise, velocity = (
            self.process.convert(prediction, kind, xt, t).value for kind in ("x0", "noise", "velocity")
        )
        schedule, t_, s_ = self.process.schedule, left_broadcast(jnp.asarray(t), xt), left_broadcast(jnp.asarray(s), xt)
        step, sigma = t_ - s_, schedule.sigma(s_)
        if self.eta == 0.0:
            xs = xt - step * velocity
        else:
            z, carry = self.noise.draw(carry, keys, xt, t, s)
            speed = -schedule.log_snr_prime(t_)  # g^2 / sigma^2
            finite = jnp.isfinite(speed)
            speed = self.eta * jnp.where(finite, speed, 0.0)
            here = schedule.sigma(t_)
            moved = xt - step * (velocity + 0.5 * speed * here * noise) + here * jnp.sqrt(speed * step) * z
            xs = jnp.where(finite, moved, schedule.alpha(s_) * x0 + sigma * z)
        xs = jnp.where(left_broadcast(everywhere(sigma == 0, xt), xt), self.process.noiseless(x0, s), xs)
        return xs, carry, Info(jnp.ones(xt.shape[0], jnp.int32))
