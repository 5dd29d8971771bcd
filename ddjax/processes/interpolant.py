"""Interpolants: x_t = alpha x_0 + beta x_1 + gamma z between any two coupled ends.

A state has three parts, x_0, x_1 and z; what a network says of them is linear, given x_t. So one network that states
two things at once, or two that state one each (`both`), say everything, the velocity and the score included:

    velocity  b = alpha' x_0 + beta' x_1 + gamma' z          score  -z / gamma          residual  x_1 - x_0

(posterior means given x_t throughout.) Where the network is shown x_1, one statement is enough (`knowing_x1`): then it
is a bridge from a given end (I2SB, DDBM). Given the ends, the noises at two times s < t may have any correlation rho:

    bridge  q(x_s | x_t, x_0, x_1) = N(alpha_s x_0 + beta_s x_1 + gamma_s rho z,  gamma_s^2 (1 - rho^2))

and all have the same marginals, so rho is chosen when sampling: 1 is the ODE, and
rho = exp(-integral from s to t of w / gamma^2) the SDE of diffusion coefficient w,

    dx = (b - w score) dt + sqrt(2 w) dW, backwards in time     (Albergo et al. 2023, corollary 18; DDIM's eta for ends)
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ddjax.paths import Path, Straight
from ddjax.predictions import GAUSSIAN_KINDS, Prediction, check_kind
from ddjax.predictions import evaluations as cost
from ddjax.processes.flow import GaussianFlow
from ddjax.processes.from_source import FromSource
from ddjax.processes.gaussian import Normal, X, divide
from ddjax.pytrees import as_pytree
from ddjax.schedules import OfPath
from ddjax.types import Denoise, Keys, Time, left_broadcast

# (path, s, t) -> rho, the correlation of the noises at s and t given both ends
Correlation = Callable[[Path, Array, Array], Array]
Parts = tuple[Array, Array, Array]  # x_0, x_1, z

PARTS = ("x0", "x1", "noise")
STATEMENTS = (*PARTS, "score", "velocity", "residual")
# The others say the same twice: of the noise; of the residual, along a straight path where gamma is greatest.
PAIRS = tuple(
    f"{a}+{b}"
    for a, b in itertools.permutations(STATEMENTS, 2)
    if {a, b} not in ({"noise", "score"}, {"velocity", "residual"})
)


def deterministic(path: Path, s: Time, t: Time) -> Array:
    """The ODE dx = b dt: rho = 1, w = 0."""
    return jnp.ones(jnp.broadcast_shapes(s.shape, t.shape), t.dtype)


def markov(path: Path, s: Time, t: Time) -> Array:
    """Given x_1, a diffusion from x_0 to it (Brownian bridge): rho = (alpha_t / gamma_t) / (alpha_s / gamma_s).

    The step is then that of I2SB (Liu et al. 2023): x_1 is not needed once x_t is known. w = -gamma^2 d/dt
    log(alpha / gamma).
    """
    return path.signal_to_noise(t) / path.signal_to_noise(s)


def accumulating(path: Path, s: Time, t: Time) -> Array:
    """For growing noise, every step adds some: rho = gamma_s / gamma_t, w = gamma gamma' (RDDM with eta = 1)."""
    if path.noise is None or path.noise.end > 0:
        raise ValueError(f"the noise of {path!r} does not grow to t = 1: use Noise(scale, start, end=0), or `markov`")
    return path.gamma(s) / path.gamma(t)


@dataclasses.dataclass(frozen=True)
class Diffusion:
    """Any diffusion coefficient w(t) >= 0: rho = exp(-(t - s) w / gamma^2), the two at the middle of the step.

    First order in the step where t (1 - t) w / gamma^2 is bounded (half an order for a constant w where gamma vanishes
    like t: the noise is then renewed ever faster towards the end).

    w: a function of times; give one that compares by value (a module's function), or each call compiles anew.
    """

    w: Callable[[Array], Array]

    def __call__(self, path, s, t):
        """The correlation over one step, to second order."""
        middle = 0.5 * (s + t)
        return jnp.exp(-(t - s) * self.w(middle) / path.gamma(middle) ** 2)


@dataclasses.dataclass(frozen=True)
class Interpolant:
    """An interpolant along a path (`ddjax.paths`).

    schedule: the path.
    correlation: how the noises at two times go together in `bridge` and `reverse`; replace it to sample otherwise.
    source_std: of x_1 ~ N(0, source_std^2) independent of x_0; None where x_1 comes with the data, and sampling starts
        from `init=x1`.
    data_std: standard deviation of a site of the data, where x_1 is Gaussian: it sets the width of the prior before
        t = 1.

    `kinds` are the single statements and, where there is noise, their pairs "a+b", with values `(batch, *sites, 2)`.
    Without noise one statement says everything. Where x_1 is Gaussian, so that this is a Gaussian process too
    (`as_gaussian`), `convert` also takes and gives the kinds of those, but for "noise", which is z.
    """

    schedule: Path = Straight()  # noqa: RUF009 (frozen)
    correlation: Correlation = markov
    source_std: float | None = None
    data_std: float = 1.0

    state = "gaussian"
    has_bound = False

    def __post_init__(self):
        if not isinstance(self.schedule, Path):
            raise ValueError(f"Interpolant needs a path (ddjax.paths: Straight, ...), got {self.schedule!r}")
        if self.source_std is not None and not self.source_std > 0:
            raise ValueError(f"source_std must be positive, or None where x1 is given, got {self.source_std}")
        if not self.data_std > 0:
            raise ValueError(f"data_std must be positive, got {self.data_std}")

    @property
    def kinds(self) -> tuple[str, ...]:
        """What a network may state."""
        return ("x0", "x1", "velocity", "residual") if self.schedule.noise is None else (*STATEMENTS, *PAIRS)

    @property
    def _understood(self) -> tuple[str, ...]:
        """What `convert` takes and gives."""
        if self.source_std is None:
            return self.kinds
        return tuple(dict.fromkeys((*self.kinds, *(kind for kind in GAUSSIAN_KINDS if kind != "noise"))))

    @property
    def t_range(self) -> tuple[float, float]:
        """Where an objective draws times: all of [0, 1], but for ends at which gamma' is infinite."""
        noise = self.schedule.noise
        low = 1e-3 if noise is not None and noise.start < 1 else 0.0
        return low, 1.0 - 1e-3 if noise is not None and 0 < noise.end < 1 else 1.0

    def time_at(self, u: Array, t_range: tuple[float, float]) -> tuple[Array, Array]:
        """Times uniform on the clock, and dt/du."""
        low, high = t_range
        return low + (high - low) * jnp.asarray(u), jnp.full_like(u, high - low)

    def _weights(self, x: X, t: Time) -> tuple[Array, Array, Array]:
        """alpha, beta, gamma at t, shaped to broadcast against x."""
        t = left_broadcast(jnp.asarray(t), x)
        return self.schedule.alpha(t), self.schedule.beta(t), self.schedule.gamma(t)

    # -- the forward process ---------------------------------------------------------------------------------

    def marginal(self, x0: X, t: Time, x1: X | None = None) -> Normal:
        """q(x_t | x_0, x_1); without x_1, q(x_t | x_0) under the Gaussian source."""
        alpha, beta, gamma = self._weights(x0, t)
        if x1 is not None:
            return Normal(alpha * x0 + beta * x1, jnp.broadcast_to(gamma, x0.shape))
        return Normal(alpha * x0, jnp.broadcast_to(jnp.hypot(self._source("marginal") * beta, gamma), x0.shape))

    def noiseless(self, x0: X, t: Time) -> X:
        """The state at a time without noise and without x_1 (t = 0): alpha_t x_0."""
        return self._weights(x0, t)[0] * x0

    def bridge(self, x0: X, xt: X, s: Time, t: Time, x1: X) -> Normal:
        """q(x_s | x_t, x_0, x_1) for s < t."""
        alpha, beta, gamma = self._weights(xt, t)
        return self._step((x0, x1, divide(xt - alpha * x0 - beta * x1, gamma)), xt, s, t)

    def reverse(self, prediction: Prediction, xt: X, s: Time, t: Time) -> Normal:
        """The bridge at the predicted parts: exact as s -> t, whatever the correlation."""
        return self._step(self.parts(prediction, xt, t), xt, s, t)

    def _step(self, parts: Parts, xt: X, s: Time, t: Time) -> Normal:
        x0, x1, z = parts
        alpha, beta, gamma = self._weights(xt, s)
        if self.schedule.noise is None:
            return Normal(alpha * x0 + beta * x1, jnp.zeros_like(xt))
        rho = self.correlation(self.schedule, *(left_broadcast(jnp.asarray(v), xt) for v in (s, t)))
        std = gamma * jnp.sqrt((1.0 - rho) * (1.0 + rho))
        return Normal(alpha * x0 + beta * x1 + gamma * rho * z, jnp.broadcast_to(std, xt.shape))

    def observe(self, keys: Keys, x0: X, t: Time) -> X:
        """What an observed site shows at time t while its neighbours are sampled (Gaussian source)."""
        return self.marginal(x0, t).sample(keys)

    def prior(self, shape: Sequence[int], t: float = 1.0) -> Normal:
        """N(0, beta_t^2 source_std^2 + gamma_t^2 + alpha_t^2 data_std^2): at t = 1 all that is not x_0."""
        noise = self.marginal(jnp.zeros(tuple(shape)), jnp.asarray(t, float))
        alpha = self.schedule.alpha(jnp.asarray(t, float))
        return Normal(noise.mean, jnp.sqrt(noise.std**2 + (alpha * self.data_std) ** 2))

    def flow(self) -> GaussianFlow:
        """The probability-flow ODE, for its likelihood: that of `as_gaussian`, which raises its errors."""
        self._source("the likelihood of the ODE")
        return self.as_gaussian().flow()

    def as_gaussian(self) -> FromSource:
        """The Gaussian process of the same marginals, which the solvers of those step.

        Raises ValueError where x_1 is not said to be Gaussian, and as `schedules.OfPath` does.
        """
        std = self._source("what is for Gaussian processes (Ancestral, Heun and solvers of the velocity are for all)")
        return FromSource(OfPath(self.schedule, std), self.data_std, self)

    def departure(self, x1: X) -> Normal:
        """What sampling starts from, given x_1: x_1 with the noise that is left at t = 1."""
        return self.marginal(jnp.zeros_like(x1), jnp.ones(()), x1)

    def _source(self, what: str) -> float:
        if self.source_std is None:
            raise ValueError(
                f"{what}: x1 of this interpolant comes with the data: give it (sampling: init=x1), "
                "or say source_std where it is Gaussian and independent"
            )
        return self.source_std

    # -- predictions -----------------------------------------------------------------------------------------

    def network_inputs(self, xt: X, t: Time, kind: str) -> tuple[Array, Array]:
        """What the network is fed: (x_t, t)."""
        return xt, jnp.asarray(t)

    def output_shape(self, shape: Sequence[int], kind: str) -> tuple[int, ...]:
        """The shape of what a network says of one example of this shape: pairs side by side on the last axis."""
        return (*shape[:-1], 2 * shape[-1]) if "+" in kind else tuple(shape)

    def network_outputs(self, output: Array, xt: X, t: Time, kind: str) -> Array:
        """The prediction's value in what a network gives back: for pairs, the two halves of a doubled last axis."""
        doubled = (*xt.shape[:-1], 2 * xt.shape[-1])
        return jnp.stack(jnp.split(output, 2, -1), -1) if "+" in kind and output.shape == doubled else output

    def convert(self, prediction: Prediction, kind: str, xt: X, t: Time) -> Prediction:
        """The same statement as another kind, single or a pair, by way of the three parts.

        Raises ValueError for an unknown kind, and for one statement where two are needed.
        """
        check_kind(kind, self._understood, self)
        said, names = self.said(prediction, xt), kind.split("+")
        if set(names) <= said.keys():
            values = [said[name] for name in names]
        elif self._one_is_enough(*said, *names):
            values = self._from_marginals(names, prediction, xt, t)
        else:
            parts = self._solve(said, prediction.kind, xt, t)
            values = [said[name] if name in said else self.statement(name, parts, t) for name in names]
        return Prediction(values[0] if len(values) == 1 else jnp.stack(values, -1), kind)

    def statement(self, kind: str, parts: Parts, t: Time) -> Array:
        """The value of a kind, single or a pair, for known parts (x_0, x_1, z)."""
        if "+" in kind:
            return jnp.stack([self.statement(name, parts, t) for name in kind.split("+")], -1)
        x0, x1, z = parts
        t = left_broadcast(jnp.asarray(t), x0)
        if kind == "score":
            return -divide(z, self.schedule.gamma(t))
        if kind == "velocity":
            # No noise adds nothing, also where gamma' is infinite.
            noisy = jnp.where(z == 0, 0.0, self.schedule.gamma_prime(t) * z)
            return self.schedule.alpha_prime(t) * x0 + self.schedule.beta_prime(t) * x1 + noisy
        return {"x0": x0, "x1": x1, "noise": z}[kind] if kind != "residual" else x1 - x0

    def parts(self, prediction: Prediction, xt: X, t: Time) -> Parts:
        """(x_0, x_1, z) as predicted.

        They add up to x_t. Where a weight is 0 its part cannot be known and is 0, unless it is what was predicted.
        Raises ValueError where the prediction does not determine them.
        """
        if "+" not in prediction.kind and self._one_is_enough(prediction.kind):
            return tuple(self._from_marginals(PARTS, prediction, xt, t))
        return self._solve(self.said(prediction, xt), prediction.kind, xt, t)

    def _one_is_enough(self, *names: str) -> bool:
        """Whether z and x_1 both follow from x_0, being noise; or one of these is said of the two together."""
        noisy = self.schedule.noise is not None or not set(names) <= set(self.kinds)
        return self.source_std is not None and noisy

    def _from_marginals(self, names: Sequence[str], prediction: Prediction, xt: X, t: Time) -> list[Array]:
        """Statements that follow where all but x_0 is noise; what was said stays as it is."""
        marginals, said = self.as_gaussian(), self.said(prediction, xt)
        return [said[name] if name in said else marginals.statement(name, prediction, xt, t) for name in names]

    def said(self, prediction: Prediction, xt: X) -> dict[str, Array]:
        """What was predicted, by name."""
        check_kind(prediction.kind, self._understood, self)
        names, value = prediction.kind.split("+"), prediction.value
        shape = xt.shape if len(names) == 1 else (*xt.shape, 2)
        if value.shape != shape:
            raise ValueError(
                f"a {prediction.kind} prediction for a state of shape {xt.shape} must have shape {shape}, "
                f"got {value.shape}"
            )
        return {name: value if len(names) == 1 else value[..., i] for i, name in enumerate(names)}

    def _solve(self, said: dict[str, Array], kind: str, xt: X, t: Time) -> Parts:
        """The three parts from two statements and x_t = alpha x_0 + beta x_1 + gamma z."""
        weights = dict(zip(PARTS, self._weights(xt, t), strict=True))
        said = dict(said)
        if self.schedule.noise is None:
            said["noise"] = jnp.zeros_like(xt)
        if "score" in said:
            said["noise"] = -weights["noise"] * said.pop("score")
        if len(said) < 2:
            raise ValueError(
                f"{kind!r} alone does not determine the parts of a noisy interpolant: predict a pair such as "
                "'velocity+noise' (from two networks: `both`), or show the network x1 (`knowing_x1`)"
            )
        parts = {name: said.pop(name) for name in PARTS if name in said}
        rest = xt - sum(weights[name] * value for name, value in parts.items())
        unknown = [name for name in PARTS if name not in parts]
        if not said:
            parts[unknown[0]] = divide(rest, weights[unknown[0]])
        else:
            (name, value), (u, v) = said.popitem(), unknown
            slopes = self._slopes(name, left_broadcast(jnp.asarray(t), xt))
            self._check_determined(kind, name, u, v)
            # Where gamma' is infinite: a known noise adds nothing, and for an unknown one, divided by it, z = 0.
            infinite = jnp.isinf(slopes["noise"])
            if "noise" in parts:
                slopes["noise"] = jnp.where(infinite, 0.0, slopes["noise"])
            else:
                slopes = {n: jnp.where(infinite, float(n == "noise"), slope) for n, slope in slopes.items()}
                value = jnp.where(infinite, 0.0, value)
            value = value - sum(slopes[n] * part for n, part in parts.items())
            det = weights[u] * slopes[v] - weights[v] * slopes[u]
            # Where nothing more is said than x_t says itself, it is all due to the first part that has a weight.
            first, second = weights[u] != 0, (weights[u] == 0) & (weights[v] != 0)
            parts[u] = jnp.where(
                det == 0,
                jnp.where(first, divide(rest, weights[u]), 0.0),
                divide(slopes[v] * rest - weights[v] * value, det),
            )
            parts[v] = jnp.where(
                det == 0,
                jnp.where(second, divide(rest, weights[v]), 0.0),
                divide(weights[u] * value - slopes[u] * rest, det),
            )
        return tuple(parts[name] for name in PARTS)

    def _slopes(self, name: str, t: Array) -> dict[str, Array]:
        """What a velocity or a residual is made of."""
        path = self.schedule
        if name == "velocity":
            return {"x0": path.alpha_prime(t), "x1": path.beta_prime(t), "noise": path.gamma_prime(t)}
        return {"x0": -jnp.ones_like(t), "x1": jnp.ones_like(t), "noise": jnp.zeros_like(t)}

    def _check_determined(self, kind: str, name: str, u: str, v: str) -> None:
        """Raise a ValueError where the statement says of u and v at all times what x_t says itself."""
        with jax.ensure_compile_time_eval():
            t = jnp.asarray(0.37)
            path, slopes = self.schedule, self._slopes(name, t)
            weights = dict(zip(PARTS, (path.alpha(t), path.beta(t), path.gamma(t)), strict=True))
            det = float(weights[u] * slopes[v] - weights[v] * slopes[u])
        if abs(det) < 1e-6:
            raise ValueError(f"along {path!r}, {kind!r} does not tell {u} from {v}: predict another pair")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Both:
    """See `both`."""

    first: Denoise
    second: Denoise

    @property
    def evaluations(self) -> int:
        """Those of the two."""
        return cost(self.first) + cost(self.second)

    def __call__(self, xt, t, cond=None):
        """Ask the two networks and set their answers side by side."""
        one, two = self.first(xt, t, cond), self.second(xt, t, cond)
        return Prediction(jnp.stack([one.value, two.value], -1), f"{one.kind}+{two.kind}")


def both(first: Denoise, second: Denoise) -> Denoise:
    """Two networks with a statement each, such as a velocity and a score, as one denoiser with a pair."""
    return _Both(as_pytree(first), as_pytree(second))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _KnowingX1:
    """See `knowing_x1`."""

    denoise: Denoise

    @property
    def evaluations(self) -> int:
        """Those of the network."""
        return cost(self.denoise)

    def __call__(self, xt, t, cond):
        """Add x1 to what the network states."""
        said = self.denoise(xt, t, cond)
        return Prediction(jnp.stack([said.value, cond["x1"]], -1), f"{said.kind}+x1")


def knowing_x1(denoise: Denoise) -> Denoise:
    """A bridge's denoiser: one that states one thing, knowing x1, which is `cond["x1"]`.

    The network is given the whole of `cond`. What it states must not be x1 itself.
    """
    return _KnowingX1(as_pytree(denoise))
