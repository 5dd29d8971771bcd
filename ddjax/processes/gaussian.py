"""Gaussian corruption: x_t = alpha_t x_0 + sigma_t noise.

Everything is a function of the log-SNR `lambda = 2 log(alpha / sigma)`; the clock t only enters through the schedule.

    bridge   q(x_s | x_t, x_0) = N(sigma_s r / sigma_t x_t + alpha_s (1 - r^2) x_0,  sigma_s^2 (1 - r^2)),
             r = exp((lambda_t - lambda_s) / 2)
    path KL  1/2 (-lambda') exp(lambda) |x_0 - x0_hat|^2                        (Kingma et al. 2021, eq. 15)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddjax import random, schedules
from ddjax.predictions import GAUSSIAN_KINDS, Prediction, check_kind
from ddjax.processes.flow import GaussianFlow
from ddjax.types import Keys, PyTree, Time, left_broadcast

X = Float[Array, "batch *sites"]


@dataclasses.dataclass(frozen=True)
class Normal:
    """Independent normals: `mean` and `std` broadcast against each other."""

    mean: X
    std: X

    def sample(self, keys: Keys) -> X:
        """One draw, one key per example."""
        return self.mean + self.std * random.normal(keys, self.mean.shape[1:], self.mean.dtype)

    @property
    def unit(self) -> X:
        """What `noise` is measured in: the standard deviation, or 1 where that is 0."""
        return jnp.where(self.std == 0, 1.0, self.std)

    def noise(self, x: X) -> X:
        """The normals whose draw is x; where nothing is drawn, what x has beyond the mean."""
        return (x - self.mean) / self.unit

    def drawn(self, noise: X | float = 0.0, fresh: X | float = 0.0) -> X:
        """The state with this `noise`, and fresh normals where there is something to draw."""
        return self.mean + self.unit * noise + self.std * fresh

    def log_prob(self, x: X) -> X:
        """Log-density of each site, nats."""
        z = (x - self.mean) / self.std
        return -0.5 * z**2 - jnp.log(self.std) - 0.5 * math.log(2.0 * math.pi)


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Gaussian corruption under any Gaussian schedule.

    schedule: alpha, sigma (see `ddjax.schedules`).
    data_std: standard deviation of a site of the data; it sets the EDM preconditioning and the width of the prior.
    """

    schedule: schedules.Gaussian = schedules.VPCosine()  # noqa: RUF009 (frozen)
    data_std: float = 1.0

    state = "gaussian"
    kinds = GAUSSIAN_KINDS

    @property
    def parameters(self) -> PyTree:
        """What learning changes: the schedule's. AttributeError where it has none."""
        return self.schedule.parameters

    def with_parameters(self, parameters: PyTree) -> Gaussian:
        """The process with these. NumPy's become constants, and the process compares by value."""
        return dataclasses.replace(self, schedule=self.schedule.with_parameters(parameters))

    @property
    def variance_parameters(self) -> tuple[str, ...]:
        """Which of the parameters leave the bound as it is and change its estimate's variance alone."""
        return getattr(self.schedule, "variance_parameters", ())

    def __post_init__(self):
        if not isinstance(self.schedule, schedules.Gaussian):
            raise ValueError(
                f"Gaussian needs a Gaussian schedule (VPLinear, VPCosine, VE, EDM, CondOT), got {self.schedule!r}"
            )
        if not self.data_std > 0:
            raise ValueError(f"data_std must be positive, got {self.data_std}")

    def as_gaussian(self) -> Gaussian:
        """Itself (see `gaussian_of`)."""
        return self

    # -- the forward process ---------------------------------------------------------------------------------

    def _coefficients(self, x: X, t: Time) -> tuple[Array, Array, Array]:
        """alpha, sigma, log-SNR at t, shaped to broadcast against x."""
        t = left_broadcast(jnp.asarray(t), x)
        return self.schedule.alpha(t), self.schedule.sigma(t), self.schedule.log_snr(t)

    def marginal(self, x0: X, t: Time) -> Normal:
        """q(x_t | x_0)."""
        alpha, sigma, _ = self._coefficients(x0, t)
        return Normal(alpha * x0, jnp.broadcast_to(sigma, x0.shape))

    def noiseless(self, x0: X, t: Time) -> X:
        """The state at a time without noise, alpha_t x_0: where a deterministic sampler ends."""
        return self.schedule.alpha(left_broadcast(jnp.asarray(t), x0)) * x0

    def bridge(self, x0: X, xt: X, s: Time, t: Time) -> Normal:
        """q(x_s | x_t, x_0) for s < t."""
        _, sigma_t, snr_t = self._coefficients(xt, t)
        alpha_s, sigma_s, snr_s = self._coefficients(xt, s)
        r = jnp.exp(0.5 * (snr_t - snr_s))
        new = -jnp.expm1(snr_t - snr_s)  # 1 - r^2, without cancellation
        mean = sigma_s * r / sigma_t * xt + alpha_s * new * x0
        return Normal(mean, jnp.broadcast_to(sigma_s * jnp.sqrt(new), xt.shape))

    def reverse(self, prediction: Prediction, xt: X, s: Time, t: Time) -> Normal:
        """The bridge at the predicted x0: DDPM's ancestral step (Ho et al. 2020, eq. 6-7), exact as s -> t."""
        return self.bridge(self.convert(prediction, "x0", xt, t).value, xt, s, t)

    def sde(self, t: Time) -> tuple[Array, Array]:
        """Coefficients (f, g^2) of dx = f x dt + g dw.

        f = alpha'/alpha, g^2 = -sigma^2 lambda' = 2 sigma (sigma' - f sigma).
        """
        t = jnp.asarray(t)
        sigma = self.schedule.sigma(t)
        f = self.schedule.alpha_prime(t) / self.schedule.alpha(t)
        return f, 2.0 * sigma * (self.schedule.sigma_prime(t) - f * sigma)

    def observe(self, keys: Keys, x0: X, t: Time) -> X:
        """What an observed site shows at time t while its neighbours are sampled."""
        return self.marginal(x0, t).sample(keys)

    def prior(self, shape: Sequence[int], t: float = 1.0) -> Normal:
        """N(0, sigma_t^2 + alpha_t^2 data_std^2): the marginal at t of zero-mean data of that width."""
        return Normal(jnp.zeros(tuple(shape)), jnp.full(tuple(shape), self.prior_std(jnp.asarray(t, float))))

    def prior_std(self, t: Array) -> Array:
        """Standard deviation of the prior at t."""
        return jnp.sqrt(self.schedule.sigma(t) ** 2 + (self.schedule.alpha(t) * self.data_std) ** 2)

    def flow(self) -> GaussianFlow:
        """The probability-flow ODE, for its likelihood."""
        return GaussianFlow(self)

    # -- the bound -------------------------------------------------------------------------------------------

    def prior_kl(self, x0: X, t: Time) -> X:
        """KL(q(x_t | x_0) || prior at t), nats per site."""
        alpha, sigma, _ = self._coefficients(x0, t)
        std = self.prior_std(left_broadcast(jnp.asarray(t), x0))
        return jnp.log(std / sigma) + (sigma**2 + (alpha * x0) ** 2) / (2.0 * std**2) - 0.5

    def path_kl(self, x0: X, prediction: Prediction, xt: X, t: Time) -> X:
        """-d(lambda)/dt exp(lambda) |x_0 - x0_hat|^2 / 2: the bound's integrand over t, nats per site."""
        t_ = left_broadcast(jnp.asarray(t), x0)
        error = x0 - self.convert(prediction, "x0", xt, t).value
        return -0.5 * self.schedule.log_snr_prime(t_) * jnp.exp(self.schedule.log_snr(t_)) * error**2

    def step_kl(self, x0: X, prediction: Prediction, xt: X, s: Time, t: Time) -> X:
        """KL(bridge || reverse) = (exp(lambda_s) - exp(lambda_t)) |x_0 - x0_hat|^2 / 2, nats per site.

        (Kingma et al. 2021, eq. 14: the two have the bridge's variance.) Infinite where s has no noise.
        """
        (_, _, snr_s), (_, _, snr_t) = self._coefficients(x0, s), self._coefficients(x0, t)
        error = x0 - self.convert(prediction, "x0", xt, t).value
        return -0.5 * jnp.exp(snr_s) * jnp.expm1(snr_t - snr_s) * error**2

    def reconstruction(self, x0: X, prediction: Prediction, xt: X, t: Time) -> X:
        """-log N(x_0; x_t / alpha, sigma / alpha): a density, for continuous data. Nats per site."""
        alpha, sigma, _ = self._coefficients(x0, t)
        return -Normal(xt / alpha, sigma / alpha).log_prob(x0)

    @property
    def t_range(self) -> tuple[float, float]:
        """The default range of times a bound integrates: log-SNR from 13 down to -10, where the schedule has them."""
        with jax.ensure_compile_time_eval():  # also while tracing
            low, high = (float(self.schedule.common.time(jnp.float32(snr))) for snr in (13.0, -10.0))
        return max(low, 0.0), min(high, 1.0)

    def time_at(self, u: Array, t_range: tuple[float, float]) -> tuple[Array, Array]:
        """Times uniform in log-SNR, and dt/du.

        The integral of f over t_range is the mean of f(t) dt/du over u in [0, 1].

        Raises ValueError where the log-SNR is infinite at an end of the range.
        """
        u = jnp.asarray(u)
        with jax.ensure_compile_time_eval():
            ends = [float(self.schedule.common.log_snr(jnp.asarray(end, u.dtype))) for end in t_range]
        if not all(map(math.isfinite, ends)):
            raise ValueError(f"the log-SNR of {self.schedule!r} is infinite at an end of t_range={t_range}: {ends}")
        schedule = self.schedule.common
        high, low = schedule.log_snr(jnp.asarray(t_range, u.dtype))
        t = jnp.clip(schedule.time(high + u * (low - high)), *t_range)  # rounding must not leave the range
        return t, (low - high) / schedule.log_snr_prime(t)

    # -- predictions -----------------------------------------------------------------------------------------

    def network_inputs(self, xt: X, t: Time, kind: str) -> tuple[Array, Array]:
        """What the network is fed: x_t and the schedule's `network_time`, or EDM's (c_in x_t, c_noise).

        (Karras et al. 2022, table 1.)
        With alpha != 1, EDM's noise level is sigma / alpha and its input x_t / alpha.
        """
        t = jnp.asarray(t)
        if kind != "edm":
            return xt, self.schedule.network_time(t)
        alpha, sigma, _ = self._coefficients(xt, t)
        c_noise = jnp.clip(
            -self.schedule.common.log_snr(t) / 8.0, -5.0, 5.0
        )  # log(sigma / alpha) / 4, finite at the ends
        return xt / jnp.sqrt(sigma**2 + (alpha * self.data_std) ** 2), c_noise

    def network_outputs(self, output: Array, xt: X, t: Time, kind: str) -> Array:
        """The prediction's value in what a network gives back: the output itself."""
        return output

    def convert(self, prediction: Prediction, kind: str, xt: X, t: Time) -> Prediction:
        """The same statement as another kind, by way of (x0, noise). Raises ValueError for an unknown kind.

        Where sigma = 0 the noise cannot be known and is set to 0 (likewise x0 where alpha = 0), unless it is what
        was predicted.
        """
        check_kind(kind, self.kinds, self)
        check_kind(prediction.kind, self.kinds, self)
        if prediction.kind == kind:
            return prediction
        return Prediction(self._value(kind, *self._x0_and_noise(prediction, xt, t), xt, t), kind)

    def _value(self, kind: str, x0: X, noise: X, xt: X, t: Time) -> X:
        """The value of a kind, for known (x0, noise)."""
        if kind in ("x0", "noise"):
            return x0 if kind == "x0" else noise
        alpha, sigma, _ = self._coefficients(xt, t)
        if kind == "score":
            return -divide(noise, sigma)
        if kind == "v":
            return alpha * noise - sigma * x0
        if kind == "velocity":
            t = left_broadcast(jnp.asarray(t), xt)
            # No noise adds nothing, also where sigma' is infinite.
            noisy = jnp.where(noise == 0, 0.0, self.schedule.sigma_prime(t) * noise)
            return self.schedule.alpha_prime(t) * x0 + noisy
        d = self.data_std  # edm
        return (sigma * x0 / d - alpha * d * noise) / jnp.sqrt(sigma**2 + (alpha * d) ** 2)

    def _x0_and_noise(self, prediction: Prediction, xt: X, t: Time) -> tuple[X, X]:
        """Solve for (x0, noise) the two equations: x_t = alpha x0 + sigma noise, and what the prediction says."""
        alpha, sigma, _ = self._coefficients(xt, t)
        value, kind = prediction.value, prediction.kind
        if kind == "x0":
            return value, divide(xt - alpha * value, sigma)
        if kind in ("noise", "score"):
            noise = value if kind == "noise" else -sigma * value
            return divide(xt - sigma * noise, alpha), noise
        if kind == "v":
            norm = alpha**2 + sigma**2
            return (alpha * xt - sigma * value) / norm, (sigma * xt + alpha * value) / norm
        if kind == "edm":
            d = self.data_std
            norm = jnp.sqrt(sigma**2 + (alpha * d) ** 2)
            return (
                alpha * (d / norm) ** 2 * xt + sigma * d / norm * value,
                sigma / norm**2 * xt - alpha * d / norm * value,
            )
        t = left_broadcast(jnp.asarray(t), xt)
        da, ds = self.schedule.alpha_prime(t), self.schedule.sigma_prime(t)
        # Where sigma' is infinite (t = 0 under VPLinear), divided by it: then x0 = x_t / alpha and noise = 0.
        infinite = jnp.isinf(ds)
        da, ds = jnp.where(infinite, 0.0, da), jnp.where(infinite, 1.0, ds)
        value = jnp.where(infinite, 0.0, value)
        kappa = da * sigma - ds * alpha
        # Where alpha and alpha' are 0 (t = 1 of PolynomialPath) the velocity says nothing of x0.
        noise = jnp.where(kappa == 0, divide(xt, sigma), divide(da * xt - alpha * value, kappa))
        return divide(sigma * value - ds * xt, kappa), noise


def gaussian_of(process: object) -> Gaussian | None:
    """The Gaussian process that solvers step: itself, that of an interpolant's marginals, or None for others.

    Raises ValueError for an interpolant whose x_1 comes with the data.
    """
    return process.as_gaussian() if hasattr(process, "as_gaussian") else None


def schedule_of(process: object) -> object:
    """The schedule whose noise levels grids go by: one for all sites, of an interpolant that of its `gaussian_of`.

    None for a process without one. Raises ValueError for an interpolant whose x_1 comes with the data.
    """
    schedule = getattr(gaussian_of(process) or process, "schedule", None)
    return getattr(schedule, "common", schedule)


def divide(a: Array, b: Array) -> Array:
    """A / b, and 0 where b is 0."""
    return jnp.where(b == 0, 0.0, a / jnp.where(b == 0, 1.0, b))
