"""Linear SDEs with auxiliary variables: momentum and more, noised together with the data (MDM, critically damped).

A state holds n parts on its last axis, one after the other; the data are the first `data` of them. With w the parts in
units of their stationary standard deviations and D = noise noise' / 2, Q = (rotation - rotation') / 2,

    dw = -tau' (D + Q) w dt + sqrt(2 tau' D) dW,     tau = log(1 + exp(-log-SNR of the schedule)).

N(0, 1) is stationary whatever noise and rotation are (Singhal et al. 2023, MDM, section 4; the "flexible" forward SDE
of Du et al. 2023 is this with metric 2 D and form Q), and noise 1 alone is the variance-preserving process. Given x_0,
with the auxiliary variables at t = 0 averaged over their law (hybrid score matching: Dockhorn et al. 2022),

    q(u_t | x_0) = N(M x_0, C),     information  J = M' C^-1 M,     score = -C^-1 (u - M E[x_0 | u])

so that, as in `Gaussian`, one predicted x_0 says everything, and J is the signal-to-noise ratio: with an error e in x_0

    path KL = tau' |sqrt(D) C^-1 M e|^2 = -1/2 e' J' e.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpy.typing import ArrayLike

from ddjax import schedules
from ddjax.frozen import Frozen
from ddjax.predictions import Prediction, check_kind
from ddjax.processes.correlated import Correlated, joined, root_of, solve, solve_transposed, transposed
from ddjax.processes.flow import StateFlow
from ddjax.processes.gaussian import Gaussian, X
from ddjax.schedules.base import array, held
from ddjax.types import Keys, Time, per_example, sites

_TERMS = 14  # of the series for a time so short that ||D + Q|| tau <= 1/4


@dataclasses.dataclass(frozen=True)
class LinearFlow(StateFlow):
    """du / dtau of whole states, the auxiliary variables with them."""

    process: LinearSDE

    def position(self, t):
        """The time tau of the module's text."""
        return jax.nn.softplus(-self.process.schedule.log_snr(t))

    def time(self, position):
        """When tau is this."""
        return self.process.schedule.time(-jnp.log(jnp.expm1(position)))

    def start(self, x0, t):
        """The mean state, M x_0; the volume is that of the data's parts."""
        m = self.process._moments(self.process._tau(t, x0))[0][..., : self.process.data, :]
        volume = jnp.linalg.slogdet(m)[1].ravel()[0] * (sites(x0) // self.process.data)
        return self.process.noiseless(x0, t), jnp.full(x0.shape[0], volume)

    def complete(self, keys, xt, t):
        """The rest as it is told by the data's parts alone, for data as flat as their noise is small."""
        process, d = self.process, self.process.data
        m, c = process._moments(process._tau(t, xt))
        b = transposed(jnp.linalg.solve(transposed(m[..., :d, :]), transposed(m[..., d:, :])))  # M_v M_x^-1
        cross = b @ c[..., :d, d:]
        root = root_of(
            c[..., d:, d:] - cross - transposed(cross) + b @ c[..., :d, :d] @ transposed(b)
        )  # the law of e_v - b e_x
        centre = jnp.zeros((*xt.shape[:-1], process.parts - d, xt.shape[-1] // process.parts), xt.dtype)
        law = Correlated(centre, jnp.asarray(process.scale[d:], xt.dtype)[:, None] * root)
        v = law.sample(keys)
        return xt.at[..., -v.shape[-1] :].add(v), per_example(law.log_prob(v))

    def slope(self, prediction, y, t):
        """The velocity on the clock tau."""
        process, scale = self.process, jnp.asarray(self.process.scale, y.dtype)[:, None]
        u = process._units(y, process.parts)
        score = scale * process.convert(prediction, "score", y, t).value.reshape(u.shape)
        d, drift = (jnp.asarray(v, y.dtype) for v in process._matrices())
        return joined(scale * (drift @ u - d @ score))


@dataclasses.dataclass(frozen=True)
class LinearSDE:
    """A linear SDE in n parts, of which the first `data` are data. States are `(batch, *sites, n / data * channels)`.

    noise: (n, any), rotation: (n, n), see the module's text: any numbers will do, and can be learned.
    schedule: sets the clock; its log-SNR must be finite at t = 1 (`VPLinear`, `LogSNRLinear`).
    data: parts that are data, 1 for one site of any data, n for none but data.
    scale: stationary standard deviation of each part (default 1).
    start: standard deviation of the auxiliary variables at t = 0, in units of `scale`.
    data_std: standard deviation of a site of the data; it sets the width of the prior.

    Data are `(batch, *sites, channels)`, channels a multiple of `data`; what `sample` gives back is a state, and
    `clean` takes the data out of it. Sites of one last axis share their time, and none can be known (`sitewise`).
    Raises ValueError for shapes that do not fit.
    """

    noise: Frozen | Array | ArrayLike
    rotation: Frozen | Array | ArrayLike
    schedule: schedules.Gaussian = schedules.VPLinear()  # noqa: RUF009 (frozen)
    data: int = 1
    scale: tuple[float, ...] | None = None
    start: float = 0.2
    data_std: float = 1.0

    state = "gaussian"
    kinds = ("x0", "noise", "score")
    sitewise = False
    variance_parameters = ()

    def __post_init__(self):
        noise, rotation = held(self.noise), held(self.rotation)
        shape = np.shape(rotation)
        if len(shape) != 2 or shape[0] != shape[1] or np.ndim(noise) != 2 or np.shape(noise)[0] != shape[0]:
            raise ValueError(f"needs noise (n, any) and rotation (n, n), got {np.shape(noise)} and {shape}")
        parts = shape[0]
        scale = (1.0,) * parts if self.scale is None else tuple(float(v) for v in self.scale)
        if not 1 <= self.data <= parts or len(scale) != parts or min(scale) <= 0:
            raise ValueError(f"needs 1 <= data <= n and n positive scales for n={parts}, got {self.data} and {scale}")
        if not (self.start >= 0 and self.data_std > 0):
            raise ValueError(f"needs start >= 0 and data_std > 0, got {self.start} and {self.data_std}")
        for name, value in (("noise", noise), ("rotation", rotation), ("scale", scale)):
            object.__setattr__(self, name, value)
        with jax.ensure_compile_time_eval():
            last = float(self.schedule.log_snr(jnp.ones(())))
        if not math.isfinite(last):
            raise ValueError(f"the log-SNR of {self.schedule!r} is {last} at t = 1: use VPLinear or LogSNRLinear")

    @property
    def parts(self) -> int:
        """How many there are, n."""
        return len(self.scale)

    @property
    def parameters(self) -> dict[str, Array]:
        """What learning changes: `{"noise", "rotation"}`."""
        return {name: jnp.array(array(getattr(self, name), 0.0)) for name in ("noise", "rotation")}

    def with_parameters(self, parameters: dict[str, Array]) -> LinearSDE:
        """The process with these."""
        return dataclasses.replace(self, **parameters)

    # -- the forward process ---------------------------------------------------------------------------------

    def _matrices(self) -> tuple[Array, Array]:
        """D and -(D + Q), in units of the stationary standard deviations."""
        noise, rotation = (v.values if isinstance(v, Frozen) else v for v in (self.noise, self.rotation))
        d = 0.5 * noise @ noise.T
        return d, -d - 0.5 * (rotation - rotation.T)

    def _flow(self, tau: Array) -> tuple[Array, Array]:
        """F, with I + F what is left of the parts after tau, and the covariance of the noise met on the way.

        Series for a very short time, doubled again and again: F(2h) = 2 F + F F, C(2h) = C + (I + F) C (I + F)'. Sums
        of like signs for short times, so that small entries (tau^3 in critically damped diffusion) keep their digits.
        """
        d, drift = self._matrices()
        if isinstance(drift, np.ndarray):
            with jax.ensure_compile_time_eval():
                longest = float(jax.nn.softplus(-self.schedule.log_snr(jnp.ones(()))))
            doublings = max(0, math.ceil(math.log2(4.0 * longest * max(np.linalg.norm(drift, 2), 1e-9))))
        else:
            doublings = 12  # learned: enough for ||D + Q|| tau up to 1000
        h = (tau / 2.0**doublings)[..., None, None]
        power, term = drift, 2.0 * d  # of h^1 in F and in C
        powers, terms = [], []
        for order in range(1, _TERMS + 1):
            powers.append(power)
            terms.append(term)
            power, term = power @ drift / (order + 1), (drift @ term + term @ drift.T) / (order + 1)
        f = c = jnp.zeros(())
        for power, term in zip(reversed(powers), reversed(terms), strict=True):
            f, c = (f + jnp.asarray(power, tau.dtype)) * h, (c + jnp.asarray(term, tau.dtype)) * h

        def double(_, flow):
            f, c = flow
            moved = c + f @ c
            return 2.0 * f + f @ f, c + moved + moved @ transposed(f)

        return jax.lax.fori_loop(0, doublings, double, (f, c))

    def _tau(self, t: Time, x: X) -> Array:
        """Tau at t, with the axes of x but for the last."""
        t = jnp.asarray(t)
        if t.ndim > x.ndim - 1:
            raise ValueError(f"the last axis of a state of shape {x.shape} shares its time, got times {t.shape}")
        t = t.reshape(t.shape + (1,) * (x.ndim - 1 - t.ndim))
        return jax.nn.softplus(-self.schedule.log_snr(t))

    def _tau_prime(self, t: Time, x: X) -> Array:
        t = jnp.asarray(t)
        t = t.reshape(t.shape + (1,) * (x.ndim - 1 - t.ndim))
        return -self.schedule.log_snr_prime(t) * jax.nn.sigmoid(-self.schedule.log_snr(t))

    def _units(self, x: Array, parts: int) -> Array:
        """`(..., entries)` as `(..., parts, group)`, in units of the stationary standard deviations."""
        if x.shape[-1] % parts:
            raise ValueError(f"the last axis must hold a multiple of {parts} entries, got shape {x.shape}")
        scale = jnp.asarray(self.scale[:parts], x.dtype)[:, None]
        return x.reshape(*x.shape[:-1], parts, -1) / scale

    def _scaled(self, law: Correlated) -> Correlated:
        scale = jnp.asarray(self.scale, law.root.dtype)[:, None]
        return Correlated(scale * law.centre, scale * law.root)

    def _moments(self, tau: Array) -> tuple[Array, Array]:
        """M and C of q(u_t | x_0), in those units."""
        f, c = self._flow(tau)
        left = f + jnp.eye(self.parts, dtype=f.dtype)
        m, others = left[..., : self.data], self.start * left[..., self.data :]
        return m, c + others @ transposed(others)

    def state_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of a state for one example of data of this shape."""
        if shape[-1] % self.data:
            raise ValueError(f"the last axis of the data must be a multiple of {self.data} parts, got shape {shape}")
        return (*shape[:-1], shape[-1] // self.data * self.parts)

    def output_shape(self, shape: Sequence[int], kind: str) -> tuple[int, ...]:
        """The shape of what a network says of one example of this shape: of the data, or of the whole state."""
        return tuple(shape) if kind == "x0" else self.state_shape(shape)

    def clean(self, xt: X) -> X:
        """The data's part of a state."""
        return xt[..., : xt.shape[-1] // self.parts * self.data]

    def flow(self) -> LinearFlow:
        """The probability-flow ODE, for its likelihood: that of whole states."""
        return LinearFlow(self)

    def marginal(self, x0: X, t: Time) -> Correlated:
        """q(u_t | x_0), the auxiliary variables at t = 0 averaged over."""
        m, c = self._moments(self._tau(t, x0))
        return self._scaled(Correlated(m @ self._units(x0, self.data), root_of(c)))

    def noiseless(self, x0: X, t: Time) -> X:
        """The state at a time without noise; auxiliary variables at their mean, 0 at t = 0."""
        return self.marginal(x0, t).mean

    def _gain(self, tau_s: Array, tau_t: Array) -> tuple[Array, ...]:
        """M_s, M_t, K and the covariance: u_s given u_t and x_0 has mean M_s x_0 + K (u_t - M_t x_0)."""
        (m_s, c_s), (m_t, c_t) = self._moments(tau_s), self._moments(tau_t)
        f, fresh = self._flow(tau_t - tau_s)
        eye = jnp.eye(self.parts, dtype=f.dtype)
        root = root_of(c_t)
        k = transposed(solve_transposed(root, solve(root, (f + eye) @ c_s)))
        rest = eye - k @ (f + eye)
        return m_s, m_t, k, rest @ c_s @ transposed(rest) + k @ fresh @ transposed(k)

    def bridge(self, x0: X, xt: X, s: Time, t: Time) -> Correlated:
        """q(u_s | u_t, x_0) for s < t."""
        m_s, m_t, k, c = self._gain(self._tau(s, xt), self._tau(t, xt))
        x0, u = self._units(x0, self.data), self._units(xt, self.parts)
        return self._scaled(Correlated(m_s @ x0 + k @ (u - m_t @ x0), root_of(c)))

    def reverse(self, prediction: Prediction, xt: X, s: Time, t: Time) -> Correlated:
        """The bridge at the predicted x0, exact as s -> t."""
        return self.bridge(self.convert(prediction, "x0", xt, t).value, xt, s, t)

    def sde(self, t: Array) -> tuple[Array, Array]:
        """Matrices (A, G G') of du = A u dt + G dW, for the n parts."""
        t = jnp.asarray(t)
        rate = (-self.schedule.log_snr_prime(t) * jax.nn.sigmoid(-self.schedule.log_snr(t)))[..., None, None]
        scale = jnp.asarray(self.scale, rate.dtype)
        d, drift = (jnp.asarray(v, rate.dtype) for v in self._matrices())
        return rate * scale[:, None] * drift / scale, 2.0 * rate * scale[:, None] * d * scale

    def observe(self, keys: Keys, x0: X, t: Time) -> X:
        """What data show at time t."""
        return self.marginal(x0, t).sample(keys)

    def _wide(self, m: Array, c: Array) -> Array:
        """Root of the covariance at that time of zero-mean data of width `data_std`."""
        m = m * (self.data_std / jnp.asarray(self.scale[: self.data], m.dtype))
        return root_of(c + m @ transposed(m))

    def prior(self, shape: Sequence[int], t: float = 1.0) -> Correlated:
        """The marginal at t of zero-mean data of width `data_std`; `shape` is that of a state."""
        mean = self._units(jnp.zeros(tuple(shape)), self.parts)
        tau = self._tau(jnp.asarray(t, float), jnp.zeros((1,) * len(shape)))
        return self._scaled(Correlated(mean, self._wide(*self._moments(tau))))

    # -- the bound -------------------------------------------------------------------------------------------

    def _shared(self, nats: Array, x0: X) -> X:
        """Nats of each group of data parts, `(batch, *lead, group)`, in equal shares."""
        return jnp.broadcast_to(nats[..., None, :] / self.data, (*x0.shape[:-1], self.data, nats.shape[-1])).reshape(
            x0.shape
        )

    def prior_kl(self, x0: X, t: Time) -> X:
        """KL(q(u_t | x_0) || prior at t), nats per site."""
        m, c = self._moments(self._tau(t, x0))
        root, wide = root_of(c), self._wide(m, c)
        distance = (solve(wide, m @ self._units(x0, self.data)) ** 2).sum(-2)
        widths = (jnp.log(jnp.diagonal(v, axis1=-2, axis2=-1)).sum(-1) for v in (wide, root))
        spread = 0.5 * ((solve(wide, root) ** 2).sum((-2, -1)) - self.parts) + next(widths) - next(widths)
        return self._shared(0.5 * distance + spread[..., None], x0)

    def _error(self, x0: X, prediction: Prediction, xt: X, t: Time) -> Array:
        return self._units(x0 - self.convert(prediction, "x0", xt, t).value, self.data)

    def path_kl(self, x0: X, prediction: Prediction, xt: X, t: Time) -> X:
        """The bound's integrand over t, tau' |sqrt(D) C^-1 M (x_0 - x0_hat)|^2, nats per site."""
        m, c = self._moments(self._tau(t, x0))
        root, error = root_of(c), self._error(x0, prediction, xt, t)
        score = solve_transposed(root, solve(root, m)) @ error
        noise = array(self.noise, score)
        rate = 0.5 * self._tau_prime(t, x0)[..., None]
        return self._shared(rate * ((noise.T @ score) ** 2).sum(-2), x0)

    def step_kl(self, x0: X, prediction: Prediction, xt: X, s: Time, t: Time) -> X:
        """KL(bridge || reverse), e' (J_s - J_t) e / 2, nats per site."""
        error = self._error(x0, prediction, xt, t)
        m_s, m_t, k, c = self._gain(self._tau(s, x0), self._tau(t, x0))
        return self._shared(0.5 * (solve(root_of(c), (m_s - k @ m_t) @ error) ** 2).sum(-2), x0)

    def reconstruction(self, x0: X, prediction: Prediction, xt: X, t: Time) -> X:
        """-log N(x_0; J^-1 M' C^-1 u, J^-1): a density, for continuous data. Nats per site."""
        u = self._units(xt, self.parts)
        half, gram, info = self._information(self._tau(t, xt))
        error = self._units(x0, self.data) - self._estimate(half, gram, info, u)
        scale = jnp.log(jnp.asarray(self.scale[: self.data], u.dtype)).sum()
        log_det = jnp.log(jnp.diagonal(info, axis1=-2, axis2=-1)).sum(-1)[..., None] - scale
        distance = ((transposed(info) @ error) ** 2).sum(-2)
        return self._shared(0.5 * distance - log_det + 0.5 * self.data * math.log(2.0 * math.pi), x0)

    @property
    def t_range(self) -> tuple[float, float]:
        """The default range of times a bound integrates: log J from 13 down to -10, where it has them."""
        return _t_range(self) if isinstance(self.noise, Frozen) else Gaussian(self.schedule).t_range

    def time_at(self, u: Array, t_range: tuple[float, float]) -> tuple[Array, Array]:
        """Times uniform in the schedule's log-SNR, and dt/du."""
        return Gaussian(self.schedule).time_at(u, t_range)

    # -- predictions -----------------------------------------------------------------------------------------

    def _information(self, tau: Array) -> tuple[Array, Array, Array]:
        """R^-1 M and R of C = R R', and the root of J = M' C^-1 M."""
        m, c = self._moments(tau)
        root = root_of(c)
        half = solve(root, m)
        return half, root, root_of(transposed(half) @ half)

    def _estimate(self, half: Array, root: Array, info: Array, u: Array) -> Array:
        """The likeliest x_0; the state's own data where nothing has happened to them yet."""
        x0 = solve_transposed(info, solve(info, transposed(half) @ solve(root, u)))
        clean = jnp.diagonal(root, axis1=-2, axis2=-1)[..., : self.data, None] == 0
        return jnp.where(clean, u[..., : self.data, :], x0)

    def network_inputs(self, xt: X, t: Time, kind: str) -> tuple[Array, Array]:
        """The state and the time."""
        return xt, jnp.asarray(t)

    def network_outputs(self, output: Array, xt: X, t: Time, kind: str) -> Array:
        """The prediction's value in what a network gives back: the output itself."""
        return output

    def convert(self, prediction: Prediction, kind: str, xt: X, t: Time) -> Prediction:
        """The same statement as another kind, by way of x0; `"velocity"`, of the ODE, can only be asked for.

        noise is z of u = M x_0 + R z, C = R R'. Scores and noises that no x_0 has are taken as those of the x_0 that
        is nearest in units of C. Raises ValueError for an unknown kind.
        """
        check_kind(kind, (*self.kinds, "velocity"), self)
        check_kind(prediction.kind, self.kinds, self)
        if prediction.kind == kind:
            return prediction
        u = self._units(xt, self.parts)
        half, root, info = self._information(self._tau(t, xt))
        scale = jnp.asarray(self.scale, u.dtype)[:, None]
        if prediction.kind == "x0":
            x0 = self._units(prediction.value, self.data)
        else:
            value = self._units(prediction.value, self.parts)
            z = scale * value if prediction.kind == "noise" else -transposed(root) @ (scale**2 * value)
            x0 = self._estimate(half, root, info, u - root @ z)
        if kind == "x0":
            return Prediction(joined(scale[: self.data] * x0), kind)
        z = solve(root, u) - half @ x0
        if kind == "noise":
            return Prediction(joined(z), kind)
        score = -solve_transposed(root, z)
        if kind == "score":
            return Prediction(joined(score / scale), kind)
        d, drift = (jnp.asarray(v, u.dtype) for v in self._matrices())
        rate = self._tau_prime(t, xt)[..., None, None]
        return Prediction(joined(scale * rate * (drift @ u - d @ score)), kind)


def critically_damped(
    schedule: schedules.Gaussian = schedules.VPLinear(),
    *,
    mass: float = 0.25,
    start: float = 0.2,
    data_std: float = 1.0,
) -> LinearSDE:
    """Critically damped Langevin diffusion: the noise goes into a velocity, one for each site (Dockhorn et al. 2022).

    dx = tau' v / mass dt,   dv = -tau' (x + friction v / mass) dt + sqrt(2 friction tau') dW,   friction^2 = 4 mass

    mass: the stationary variance of the velocity. start: their gamma is start^2 = 0.04. Their beta t, with beta = 4, is
    tau.
    Raises ValueError where mass is not positive.
    """
    if not mass > 0:
        raise ValueError(f"mass must be positive, got {mass}")
    rate = 1.0 / math.sqrt(mass)
    noise, rotation = [[0.0], [2.0 * math.sqrt(rate)]], [[0.0, -rate], [rate, 0.0]]
    return LinearSDE(noise, rotation, schedule, scale=(1.0, math.sqrt(mass)), start=start, data_std=data_std)


@functools.lru_cache(maxsize=64)
def _t_range(process: LinearSDE) -> tuple[float, float]:
    """Where the mean log J of a data part passes 13 and -10, to three digits."""
    with jax.ensure_compile_time_eval():
        first, last = (float(process.schedule.log_snr(jnp.asarray(end))) for end in (1e-7, 1.0))
        first = min(first, 14.0 + 2.0 * math.log(max(process.scale)))  # J is in units of the data
        t = jnp.clip(process.schedule.time(jnp.linspace(last, first, 2000)), 0.0, 1.0)
        info = process._information(process._tau(t, t[:, None]))[2]
        log_j = 2.0 * jnp.log(jnp.diagonal(info, axis1=-2, axis2=-1) / jnp.asarray(process.scale[: process.data]))
        t, log_j = np.asarray(t)[::-1], np.asarray(log_j).mean(-1)[::-1]
    low, high = (float(t[np.argmax(log_j <= end)]) if (log_j <= end).any() else 1.0 for end in (13.0, -10.0))
    return low, high


__all__ = ["Correlated", "LinearSDE", "critically_damped"]
