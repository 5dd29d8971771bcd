"""Gaussian corruption whose reverse steps learn their variance with their mean (Nichol & Dhariwal 2021, section 3.1).

    p(x_s | x_t) = N(the bridge's mean at x0_hat,  exp(f log upper + (1 - f) log lower)),   f = (v + 1) / 2

v is a second output at each site. `lower` is the bridge's variance, right for data known exactly; `upper` is right for
data N(0, data_std^2): with a variance-preserving schedule and data_std = 1 it is the forward step's, the paper's beta.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ddjax.predictions import Prediction
from ddjax.processes.gaussian import Gaussian, Normal, X
from ddjax.types import Time, left_broadcast


@dataclasses.dataclass(frozen=True)
class LearnedVariance(Gaussian):
    """`Gaussian`, with predictions that may have v beside them, twice as long on the last axis: `(..., 2 channels)`.

    The first half is of the prediction's kind, the second v. What is shaped like the state says nothing about the
    variance and stands for v = `unsaid`: -1, DDPM's posterior variance, or 1, its beta. Conversions, continuous time
    and solvers other than `Ancestral` need the first half alone. v is not clipped: outside [-1, 1] it extrapolates, as
    in the released code.
    Into s = 0 with no noise there is no variance to learn, and the step ends at x0_hat.
    """

    unsaid: float = -1.0

    def output_shape(self, shape: Sequence[int], kind: str) -> tuple[int, ...]:
        """The shape of what a network says of one example of this shape: the prediction and v."""
        return (*shape[:-1], 2 * shape[-1])

    def split(self, prediction: Prediction, xt: X) -> tuple[Prediction, X]:
        """The prediction proper, and f = (v + 1) / 2, 0 at the lower variance and 1 at the upper."""
        value, channels = prediction.value, xt.shape[-1]
        if value.shape == xt.shape:
            return prediction, jnp.full_like(value, 0.5 * (self.unsaid + 1.0))
        if value.shape != (*xt.shape[:-1], 2 * channels):
            raise ValueError(
                f"LearnedVariance takes a prediction shaped like the state, {xt.shape}, or twice as long on its last "
                f"axis; got {value.shape}"
            )
        return Prediction(value[..., :channels], prediction.kind), 0.5 * (value[..., channels:] + 1.0)

    def convert(self, prediction: Prediction, kind: str, xt: X, t: Time) -> Prediction:
        """As `Gaussian.convert`; the result is shaped like the state, v is dropped."""
        return super().convert(self.split(prediction, xt)[0], kind, xt, t)

    def reverse(self, prediction: Prediction, xt: X, s: Time, t: Time) -> Normal:
        """The bridge's mean at the predicted x0, with the learned variance (Nichol & Dhariwal 2021, eq. 15)."""
        bridge = super().reverse(prediction, xt, s, t)
        widening = self.split(prediction, xt)[1] * self._log_range(xt, s, t)
        return Normal(bridge.mean, bridge.std * jnp.exp(0.5 * widening))

    def step_kl(self, x0: X, prediction: Prediction, xt: X, s: Time, t: Time) -> X:
        """KL(bridge || reverse), nats per site. The noise at s must not be 0."""
        bridge, reverse = self.bridge(x0, xt, s, t), self.reverse(prediction, xt, s, t)
        widening = self.split(prediction, xt)[1] * self._log_range(xt, s, t)  # log of the ratio of the variances
        moved = (bridge.mean - reverse.mean) / reverse.std
        return 0.5 * (jnp.expm1(-widening) + widening + moved**2)

    def _log_range(self, xt: X, s: Time, t: Time) -> Array:
        """log(upper / lower): what is known of data of the given width at s and at t, in nats times two."""
        snr_s, snr_t = (self.schedule.log_snr(left_broadcast(jnp.asarray(time), xt)) for time in (s, t))
        width = 2.0 * math.log(self.data_std)
        clean = jnp.isinf(snr_s)
        gap = jax.nn.softplus(jnp.where(clean, snr_t, snr_s) + width) - jax.nn.softplus(snr_t + width)
        return jnp.where(clean, 0.0, gap)
