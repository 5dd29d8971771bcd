"""Diffusion mixtures: bridges to the data, of which the network predicts the end (GruM).

    dx = vol^2 (E[x_0 | x_t] - cosh(pull v) x) / S(v) dt + vol dW,    backwards from x_1 ~ N(0, 1)

(Jo et al. 2024, "Graph Generation with Diffusion Mixture", eq. 8; v, S and vol as in `schedules.OUBridge`.) Given x_0,
all of q(x_t | x_0) is Gaussian: predictions, objectives, ODE and their solvers are those of `Gaussian`. What differs is
how the states at two times go together, that is, the noise of the sampler:

    bridge   q(x_s | x_t, x_0) = N((S(v_t - v_s) x_0 + S(v_s) x_t) / S(v_t),  S(v_s) S(v_t - v_s) / S(v_t))
    path KL  1/2 vol^2 |x_0 - x0_hat|^2 / S(v)^2                                            (their objective)
"""

from __future__ import annotations

import dataclasses
from typing import NoReturn

import jax.numpy as jnp
from jaxtyping import Array

from ddjax import schedules
from ddjax.predictions import Prediction
from ddjax.processes.gaussian import Gaussian, Normal, X
from ddjax.types import Time, left_broadcast


@dataclasses.dataclass(frozen=True)
class BridgeMixture(Gaussian):
    """A mixture of Ornstein-Uhlenbeck (or Brownian) bridges from N(0, 1) to the data.

    schedule: `schedules.OUBridge`. data_std: as for `Gaussian`; the prior at t = 1 is N(0, 1) exactly.

    A mixture of bridges is no Markov process, its model is: so the bound is not tight even for the exact denoiser. It
    lies above that of `Gaussian(schedule)`, whatever is predicted: with other noise w the path's KL goes as (a + b w)^2
    / w, least at a diffusion's own. That one has the same marginals, the same optimum and a tight bound: train or
    evaluate with either. Graphs are vectors of pairs (`ddjax.symmetric`).
    """

    schedule: schedules.OUBridge = schedules.OUBridge()  # noqa: RUF009 (frozen)

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.schedule, schedules.OUBridge):
            raise ValueError(f"BridgeMixture needs schedules.OUBridge, got {self.schedule!r}")

    def _between(self, x: X, s: Time, t: Time) -> tuple[Array, Array, Array]:
        """S(v_s), S(v_t), S(v_t - v_s), shaped to broadcast against x."""
        v_s, v_t = (self.schedule.elapsed(left_broadcast(jnp.asarray(time), x)) for time in (s, t))
        return tuple(self.schedule.hyperbolic_sine(v) for v in (v_s, v_t, v_t - v_s))

    def bridge(self, x0: X, xt: X, s: Time, t: Time) -> Normal:
        """q(x_s | x_t, x_0) for s < t: again a bridge, from x_t to x_0."""
        first, whole, rest = self._between(xt, s, t)
        std = jnp.sqrt(first * rest / whole)
        return Normal((rest * x0 + first * xt) / whole, jnp.broadcast_to(std, xt.shape))

    def drift(self, prediction: Prediction, xt: X, t: Time) -> X:
        """Of the generating SDE, per unit of its own clock 1 - t; its noise is sqrt(schedule.squared_volatility(t))."""
        t_ = left_broadcast(jnp.asarray(t), xt)
        v = self.schedule.elapsed(t_)
        pulled = self.convert(prediction, "x0", xt, t).value - self.schedule.hyperbolic_cosine(v) * xt
        return self.schedule.squared_volatility(t_) / self.schedule.hyperbolic_sine(v) * pulled

    def path_kl(self, x0: X, prediction: Prediction, xt: X, t: Time) -> X:
        """The bound's integrand over t: half the squared difference of drifts over the squared volatility."""
        t_ = left_broadcast(jnp.asarray(t), xt)
        error = x0 - self.convert(prediction, "x0", xt, t).value
        v = self.schedule.hyperbolic_sine(self.schedule.elapsed(t_))
        return 0.5 * self.schedule.squared_volatility(t_) * (error / v) ** 2

    def step_kl(self, x0: X, prediction: Prediction, xt: X, s: Time, t: Time) -> X:
        """KL(bridge || reverse), nats per site; infinite where s has no noise."""
        first, whole, rest = self._between(xt, s, t)
        error = x0 - self.convert(prediction, "x0", xt, t).value
        return 0.5 * rest / (whole * first) * error**2

    def sde(self, t: Time) -> NoReturn:
        """Not defined: given x_0 the drift is `drift`, and noising has no drift that is linear in x alone."""
        raise ValueError("a mixture of bridges has no linear noising SDE; `drift` is that of its generating SDE")
