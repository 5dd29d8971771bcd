"""Geometric Brownian motion: a Gaussian process on the logarithm of positive states.

    dx = mu x dt + s x dw,     s^2 = d(sigma^2)/dt,  mu = growth s^2     (Shetty et al. 2025, "Dale meets Langevin")

By Ito, d log x = (mu - s^2 / 2) dt + s dw, so that with the schedule's alpha = 1 and sigma

    log x_t = log x_0 + (growth - 1/2) sigma^2 + sigma z,      E[x_t | x_0] = x_0 exp(growth sigma^2)

and everything is what `Gaussian` says of y = log x - (growth - 1/2) sigma^2. Nats of the path are the same in any
coordinates; densities of states are those of y over x. An alpha below 1 pulls the logarithm towards 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ddjax import schedules
from ddjax.predictions import Prediction, check_kind
from ddjax.predictions import evaluations as cost
from ddjax.processes.flow import GaussianFlow
from ddjax.processes.gaussian import Gaussian, Normal, X
from ddjax.pytrees import as_pytree
from ddjax.types import Denoise, Keys, Time, left_broadcast, per_example


@dataclasses.dataclass(frozen=True)
class LogNormal:
    """exp(shift + y) of a normal y."""

    law: Normal
    shift: Array

    @property
    def mean(self) -> X:
        """Of the states, not of their logarithms."""
        return jnp.exp(self.shift + self.law.mean + 0.5 * self.law.std**2)

    def sample(self, keys: Keys) -> X:
        """One draw, one key per example; positive."""
        return jnp.exp(self.shift + self.law.sample(keys))

    def noise(self, x: X) -> X:
        """That of the logarithm."""
        return self.law.noise(jnp.log(x) - self.shift)

    def drawn(self, noise: X | float = 0.0, fresh: X | float = 0.0) -> X:
        """The state whose logarithm has this noise."""
        return jnp.exp(self.shift + self.law.drawn(noise, fresh))

    def log_prob(self, x: X) -> X:
        """Log-density of each site, nats."""
        log_x = jnp.log(x)
        return self.law.log_prob(log_x - self.shift) - log_x


@dataclasses.dataclass(frozen=True)
class LogFlow(GaussianFlow):
    """The ODE of the logarithm; log |d log x / dx| = -log x."""

    outer: Geometric

    def start(self, x0, t):
        """The state whose logarithm is that of the data without noise."""
        y, volume = super().start(jnp.log(x0), t)
        xt = self.outer.exp(y, t)
        return xt, volume + per_example(jnp.log(xt) - jnp.log(x0))

    def enter(self, xt, t):
        """What the logarithm enters as."""
        y, volume = super().enter(self.outer.log(xt, t), t)
        return y, volume - per_example(jnp.log(xt))

    def leave(self, y, t):
        """The state whose logarithm y stands for."""
        return self.outer.exp(super().leave(y, t), t)

    def slope(self, prediction, y, t):
        """That of the logarithm."""
        return super().slope(self.outer._inner(prediction), y, t)


@dataclasses.dataclass(frozen=True)
class Geometric:
    """`process` on the logarithm of positive states.

    process: `Gaussian`. Its schedule's alpha = 1 (`EDM`, `VE`) is geometric Brownian motion; its `data_std` is that of
        log x_0. Raises ValueError where exp(5 sigma_max) does not fit into float32.
    growth: mu / s^2. With 0, states keep their mean; with 1/2, their median. It moves no nats.

    States are positive (a sign would never change: shift data that have one). Networks are shown the logarithm and
    predict in it: a score is that of log x, and so on; `"hyvarinen"` is x grad log p(x) = score - 1, the paper's. A
    predicted x0 is the state whose logarithm is predicted, exp E[log x_0 | x_t] (networks give the logarithm). `on_log`
    makes the denoiser of `process` from one of this, for solvers and decoders of levels
    (`binned(log(levels))`) that know of `Gaussian` alone.
    """

    process: Gaussian = Gaussian(schedules.EDM(5.0))  # noqa: RUF009 (frozen)
    growth: float = 0.0

    state = "gaussian"
    support = (0.0, math.inf)

    def __post_init__(self):
        if type(self.process) is not Gaussian:
            raise ValueError(f"Geometric needs a Gaussian process for the logarithm, got {self.process!r}")
        with jax.ensure_compile_time_eval():
            sigma = float(self.schedule.sigma(jnp.ones(())).max())
        if (reach := abs(self.growth - 0.5) * sigma**2 + 5.0 * sigma) > 85.0:
            raise ValueError(f"logarithms reach {reach:.4g}, beyond float32: take less noise than {self.schedule!r}")

    def check_data(self, x0: np.ndarray) -> None:
        """Raise ValueError for values that have no logarithm."""
        if not (x0 > 0).all():
            raise ValueError(f"Geometric is for positive values, got some from {x0.min():.4g} to {x0.max():.4g}")

    def coordinates(self, x0: np.ndarray) -> np.ndarray:
        """Values where noise is added to them: their logarithms."""
        return np.log(x0)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The process's, of the logarithm, and `"hyvarinen"`."""
        return (*self.process.kinds, "hyvarinen")

    @property
    def schedule(self) -> schedules.Gaussian:
        """That of the logarithm."""
        return self.process.schedule

    def _shift(self, t: Time, x: X) -> Array:
        """What growth adds to the logarithm, (growth - 1/2) sigma^2."""
        return (self.growth - 0.5) * self.schedule.sigma(left_broadcast(jnp.asarray(t), x)) ** 2

    def log(self, xt: X, t: Time) -> X:
        """The state of `process`: log x_t less what growth has added."""
        return jnp.log(xt) - self._shift(t, xt)

    def exp(self, y: X, t: Time) -> X:
        """The state whose `log` is y."""
        return jnp.exp(y + self._shift(t, y))

    def marginal(self, x0: X, t: Time) -> LogNormal:
        """q(x_t | x_0)."""
        return LogNormal(self.process.marginal(jnp.log(x0), t), self._shift(t, x0))

    def bridge(self, x0: X, xt: X, s: Time, t: Time) -> LogNormal:
        """q(x_s | x_t, x_0)."""
        return LogNormal(self.process.bridge(jnp.log(x0), self.log(xt, t), s, t), self._shift(s, xt))

    def reverse(self, prediction: Prediction, xt: X, s: Time, t: Time) -> LogNormal:
        """The bridge at the predicted x0: a multiplicative step, exact as s -> t."""
        law = self.process.reverse(self._inner(prediction), self.log(xt, t), s, t)
        return LogNormal(law, self._shift(s, xt))

    def prior(self, shape: Sequence[int], t: float = 1.0) -> LogNormal:
        """What sampling starts from."""
        law = self.process.prior(shape, t)
        return LogNormal(law, self._shift(jnp.asarray(t, float), law.mean))

    def observe(self, keys: Keys, x0: X, t: Time) -> X:
        """What an observed site shows at time t."""
        return self.marginal(x0, t).sample(keys)

    def flow(self) -> LogFlow:
        """The probability-flow ODE, for its likelihood."""
        return LogFlow(self.process, self)

    # -- the bound -------------------------------------------------------------------------------------------

    def prior_kl(self, x0: X, t: Time) -> X:
        """KL(q(x_t | x_0) || prior at t), nats per site."""
        return self.process.prior_kl(jnp.log(x0), t)

    def path_kl(self, x0: X, prediction: Prediction, xt: X, t: Time) -> X:
        """The bound's integrand over t, nats per site."""
        return self.process.path_kl(jnp.log(x0), self._inner(prediction), self.log(xt, t), t)

    def step_kl(self, x0: X, prediction: Prediction, xt: X, s: Time, t: Time) -> X:
        """KL(bridge || reverse), nats per site."""
        return self.process.step_kl(jnp.log(x0), self._inner(prediction), self.log(xt, t), s, t)

    def reconstruction(self, x0: X, prediction: Prediction, xt: X, t: Time) -> X:
        """-log of the density of x_0 (not of its logarithm) given x_t, nats per site."""
        log_x0 = jnp.log(x0)
        return self.process.reconstruction(log_x0, self._inner(prediction), self.log(xt, t), t) + log_x0

    @property
    def t_range(self) -> tuple[float, float]:
        """The process's."""
        return self.process.t_range

    def time_at(self, u: Array, t_range: tuple[float, float]) -> tuple[Array, Array]:
        """Times uniform in log-SNR, and dt/du."""
        return self.process.time_at(u, t_range)

    # -- predictions -----------------------------------------------------------------------------------------

    def network_inputs(self, xt: X, t: Time, kind: str) -> tuple[Array, Array]:
        """The logarithm, scaled where the kind asks for it, and the time."""
        return self.process.network_inputs(self.log(xt, t), t, kind)

    def network_outputs(self, output: Array, xt: X, t: Time, kind: str) -> Array:
        """The prediction's value in what a network gives back: the output itself, exp of it for an x0."""
        return jnp.exp(output) if kind == "x0" else output

    def _inner(self, prediction: Prediction) -> Prediction:
        """The prediction as `process` understands it. Raises ValueError for an unknown kind."""
        check_kind(prediction.kind, self.kinds, self)
        if prediction.kind == "hyvarinen":
            return Prediction(prediction.value + 1.0, "score")
        return Prediction(jnp.log(prediction.value), "x0") if prediction.kind == "x0" else prediction

    def convert(self, prediction: Prediction, kind: str, xt: X, t: Time) -> Prediction:
        """The same statement as another kind. Raises ValueError for an unknown one."""
        check_kind(kind, self.kinds, self)
        if prediction.kind == kind:
            return prediction
        inner = "score" if kind == "hyvarinen" else kind
        value = self.process.convert(self._inner(prediction), inner, self.log(xt, t), t).value
        return Prediction(value - 1.0 if kind == "hyvarinen" else jnp.exp(value) if kind == "x0" else value, kind)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _OnLog:
    """See `on_log`."""

    denoise: Denoise
    process: Geometric = dataclasses.field(metadata={"static": True})

    @property
    def evaluations(self) -> int:
        """Those of the network."""
        return cost(self.denoise)

    def __call__(self, y: X, t: Time, cond: Any = None) -> Prediction:
        """Ask at the state whose logarithm this is."""
        return self.process._inner(self.denoise(self.process.exp(y, t), t, cond))


def on_log(denoise: Denoise, process: Geometric) -> Denoise:
    """The denoiser of `process.process` that a denoiser of `process` is: sample with it, and take exp of the samples.

    Raises ValueError for another process.
    """
    if not isinstance(process, Geometric):
        raise ValueError(f"on_log is for processes.Geometric, got {type(process).__name__}")
    return _OnLog(as_pytree(denoise), process)


__all__ = ["Geometric", "LogNormal", "on_log"]
