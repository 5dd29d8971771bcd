"""Gaussian laws of data: their denoiser, their score and their probability-flow ODE, in closed form.

    law = gaussian_law.fit(data, rank=64)                              # one pass over the data
    solver = solvers.Switched((solvers.Teleport(process, law), solvers.Heun(process)), (0.7,))

(Wang & Vastola 2023, "Diffusion Models Generate Images Like Painters"; 2024, "The Unreasonable Effectiveness of
Gaussian Score Approximation for Diffusion Models and its Applications".) While noise prevails, a trained network says
nearly what the Gaussian with the data's mean and covariance says, and that one needs no network.

A covariance has eigenvalues `variances` along orthonormal `directions`, and `rest` along all others. Each function of
it, f(C) d = f(rest) d + sum over i of (f(variance_i) - f(rest)) u_i <u_i, d>, costs as much as the directions hold.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from ddjax import files
from ddjax.frozen import Frozen
from ddjax.predictions import Prediction, check_kind
from ddjax.processes import Gaussian
from ddjax.processes.gaussian import divide, gaussian_of
from ddjax.types import Denoise, State, Time

FORMAT = "ddjax Gaussian law 1"


@dataclasses.dataclass(frozen=True)
class GaussianLaw:
    """Normal laws of states: one law, or one for each label and behind them one of all items together.

    means: `(laws, *shape)`. directions: `(laws, rank, sites)`, orthonormal rows. variances: `(laws, rank)`, along them.
    rest: `(laws,)`, the variance along every other direction. weights: `(laws,)`, how frequent each label is.

    Every method takes `cond`, labels `(batch,)` (or a dict with an entry "cond" that holds them): the label's own law,
    and for the number behind the last label, or None, that of all items.
    Raises ValueError for arrays that do not fit, and directions that are not orthonormal.
    """

    means: Frozen | ArrayLike
    directions: Frozen | ArrayLike
    variances: Frozen | ArrayLike
    rest: Frozen | ArrayLike
    weights: Frozen | ArrayLike = (1.0,)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            object.__setattr__(self, field.name, value if isinstance(value, Frozen) else Frozen(value))
        laws, rank, sites = self.directions.values.shape
        fitting = {"means": (laws, *self.shape), "variances": (laws, rank), "rest": (laws,), "weights": (laws,)}
        for name, shape in fitting.items():
            if getattr(self, name).values.shape != shape:
                raise ValueError(f"{name} must have shape {shape}, got {getattr(self, name).values.shape}")
        if int(np.prod(self.shape)) != sites or rank > sites:
            raise ValueError(f"directions {(laws, rank, sites)} are not those of states of shape {self.shape}")
        if min(self.variances.values.min(initial=0.0), self.rest.values.min()) < 0:
            raise ValueError("variances must not be negative")
        u = self.directions.values
        error = np.abs(u @ u.transpose(0, 2, 1) - np.eye(rank)).max(initial=0.0)
        if not error < 1e-6:
            raise ValueError(f"directions must be orthonormal, but their products are off by {error:.1e}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one state."""
        return self.means.values.shape[1:]

    @property
    def laws(self) -> int:
        """How many there are: 1, or one more than labels."""
        return len(self.rest.values)

    @property
    def rank(self) -> int:
        """How many directions have a variance of their own."""
        return self.variances.values.shape[1]

    def covariance(self, law: int = -1) -> Float[np.ndarray, "sites sites"]:
        """The matrix, where it is small enough to be written out."""
        u, rest = self.directions.values[law], self.rest.values[law]
        return (u.T * (self.variances.values[law] - rest)) @ u + rest * np.eye(u.shape[1])

    # -- what the law says of noisy states ---------------------------------------------------------------------

    def denoise(self, process: Any, kind: str = "x0", *, mixture: bool = False) -> Denoise:
        """The exact denoiser under a Gaussian process, or an interpolant from Gaussian noise, as `kind`.

        mixture: without a label, that of the mixture of all labels' laws, in the place of one Gaussian.
        Raises ValueError where the process's noise is not normal and the same for all sites.
        """
        check_process("a Gaussian law", process)
        check_kind(kind, process.kinds, process)
        if mixture and self.laws == 1:
            raise ValueError("a mixture has a law for each label, and there is one law: fit with labels")
        return _ExactDenoiser(self, process, kind, mixture)

    def x0(self, process: Gaussian, xt: State, t: Time, cond: Any = None) -> State:
        """E[x_0 | x_t] = m + alpha C (alpha^2 C + sigma^2)^-1 (x_t - alpha m); t is a number or `(batch,)`."""
        alpha, sigma = levels(process, t)
        chosen = self._chosen(xt, cond)
        gain = lambda v: divide(alpha * v, alpha**2 * v + sigma**2)  # noqa: E731
        return self._shaped(chosen.mean + chosen.apply(gain, _flat(xt) - alpha * chosen.mean), xt)

    def score(self, process: Gaussian, xt: State, t: Time, cond: Any = None) -> State:
        """Gradient of log p_t: -(alpha^2 C + sigma^2)^-1 (x_t - alpha m)."""
        alpha, _ = levels(process, t)
        dev = self._shaped(_flat(xt) - alpha * self._chosen(xt, cond).mean, xt)
        return -self.curved(process, lambda h: h, dev, t, cond)

    def curved(
        self, process: Gaussian, function: Callable[[Array], Array], x: State, t: Time, cond: Any = None
    ) -> State:
        """f(H) x, H = (alpha^2 C + sigma^2)^-1 the Hessian of -log p_t, which is the same everywhere."""
        alpha, sigma = levels(process, t)
        inverse = lambda v: function(divide(jnp.ones(()), alpha**2 * v + sigma**2))  # noqa: E731
        return self._shaped(self._chosen(x, cond).apply(inverse, _flat(x)), x)

    def flow(self, process: Gaussian, xt: State, t: Time, s: Time, cond: Any = None) -> State:
        """The probability-flow ODE's solution at s from x_t at t, exactly, whatever the two times are.

        Along each direction the deviation from alpha m grows with the marginal's standard deviation,
        sqrt(alpha^2 variance + sigma^2) (Wang & Vastola 2023, for any schedule). Where nothing varies at t, the
        deviation is 0.
        """
        (alpha, sigma), (alpha_s, sigma_s) = levels(process, t), levels(process, s)
        chosen = self._chosen(xt, cond)
        growth = lambda v: jnp.sqrt(divide(alpha_s**2 * v + sigma_s**2, alpha**2 * v + sigma**2))  # noqa: E731
        return self._shaped(alpha_s * chosen.mean + chosen.apply(growth, _flat(xt) - alpha * chosen.mean), xt)

    # -- the picture of outlines first, details later ------------------------------------------------------------

    def settled(self, process: Gaussian, t: float | Array) -> Float[Array, "laws rank"]:
        """The share of its outcome that the predicted x_0 shows of each direction at time t, from 0 to 1.

        Along a path of the ODE <u, E[x_0 | x_t] - m> = share <u, x_0 - m>, share = alpha / sqrt(alpha^2 + sigma^2 /
        variance): directions of high variance, the outline, settle first (Wang & Vastola 2023).
        """
        (alpha, sigma), v = levels(process, t), jnp.asarray(self.variances.values, float)
        return divide(alpha * jnp.sqrt(v), jnp.sqrt(alpha**2 * v + sigma**2))

    def settling_time(self, process: Gaussian, share: float = 0.5) -> Float[Array, "laws rank"]:
        """The time at which this share of each direction is settled: alpha^2 / sigma^2 = share^2 / (1 - share^2) / v.

        Within [0, 1]; 0, where the data are, for directions without variance.
        """
        if not 0 < share < 1:
            raise ValueError(f"share lies between 0 and 1, got {share}")
        process = check_process("settling_time", process)
        v = jnp.asarray(self.variances.values, float)
        log_snr = jnp.log(share**2 / (1.0 - share**2)) - jnp.log(jnp.where(v > 0, v, 1.0))
        return jnp.where(v > 0, jnp.clip(process.schedule.time(log_snr), 0.0, 1.0), 0.0)

    def sensitivity(self, process: Gaussian, t: float | Array) -> Float[Array, "laws rank"]:
        """How much a small change of x_t along each direction changes the outcome: d x_0 / d x_t.

        sqrt(v / (alpha^2 v + sigma^2)): largest along directions of high variance, whatever the time (Wang & Vastola
        2023). Times alpha it is the share settled; what it takes away from 1 or adds is forgotten or
        amplified on the way.
        """
        (alpha, sigma), v = levels(process, t), jnp.asarray(self.variances.values, float)
        return jnp.sqrt(divide(v, alpha**2 * v + sigma**2))

    # -- files -----------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike) -> None:
        """Write it as a safetensors file."""
        from ddjax.training import export_safetensors  # here: the mathematics needs no training

        arrays = {field.name: getattr(self, field.name).values for field in dataclasses.fields(self)}
        export_safetensors(path, arrays, {"format": FORMAT})

    # -- the parts -------------------------------------------------------------------------------------------------

    def _chosen(self, x: State, cond: Any) -> _Chosen:
        """The law of each example, or the one of all."""
        if x.shape[1:] != self.shape:
            raise ValueError(f"this law is of states of shape {self.shape}, got {x.shape[1:]}")
        label = labels_in(cond)
        which = slice(self.laws - 1, None) if label is None or self.laws == 1 else label
        parts = (
            jnp.asarray(v.values, x.dtype)[which] for v in (self.means, self.directions, self.variances, self.rest)
        )
        mean, directions, variances, rest = parts
        return _Chosen(mean.reshape(len(mean), -1), directions, variances, rest[:, None])

    def _shaped(self, flat: Array, like: State) -> State:
        return flat.reshape(like.shape).astype(like.dtype)

    def _mixture(self, process: Gaussian, xt: State, t: Time) -> State:
        """E[x_0 | x_t] under the mixture of the labels' laws."""
        alpha, sigma = levels(process, t)
        x, sites = _flat(xt), int(np.prod(self.shape))

        def one(mean, directions, variances, rest, weight):
            law = _Chosen(mean[None], directions[None], variances[None], rest[None, None])
            dev = x - alpha * mean
            total = lambda v: alpha**2 * v + sigma**2  # noqa: E731
            distance = (dev * law.apply(lambda v: 1.0 / total(v), dev)).sum(-1)
            volume = jnp.log(total(law.variances)).sum(-1)
            if self.rank < sites:
                volume = volume + (sites - self.rank) * jnp.log(total(law.rest))[:, 0]
            x0 = mean + law.apply(lambda v: alpha * v / total(v), dev)
            return jnp.log(weight) - 0.5 * (distance + volume), x0

        parts = (self.means.values.reshape(self.laws, -1), self.directions.values, self.variances.values)
        parts = (jnp.asarray(v, x.dtype)[:-1] for v in (*parts, self.rest.values, self.weights.values))
        log_joint, x0 = jax.vmap(one)(*parts)
        return self._shaped(jnp.einsum("kb,kbi->bi", jax.nn.softmax(log_joint, axis=0), x0), xt)


@dataclasses.dataclass(frozen=True)
class _Chosen:
    """Flat arrays of one law, or of one for each example."""

    mean: Array  # (1 or batch, sites)
    directions: Array  # (1 or batch, rank, sites)
    variances: Array  # (1 or batch, rank)
    rest: Array  # (1 or batch, 1)

    def apply(self, function: Callable[[Array], Array], dev: Array) -> Array:
        """f(C) d of each example."""
        one = len(self.directions) == 1
        u = self.directions[0] if one else self.directions
        along = jnp.einsum("ki,bi->bk" if one else "bki,bi->bk", u, dev, precision="highest")
        whole = self.directions.shape[1] == self.directions.shape[2]  # nothing is left over: no need to cancel it
        rest = 0.0 if whole else function(self.rest)
        changed = (function(self.variances) - rest) * along
        return rest * dev + jnp.einsum("ki,bk->bi" if one else "bki,bk->bi", u, changed, precision="highest")


@dataclasses.dataclass(frozen=True)
class _ExactDenoiser:
    law: GaussianLaw
    process: Any
    kind: str
    mixture: bool

    def __call__(self, xt, t, cond=None):
        """The posterior mean of x0, converted to the kind asked for."""
        t, law, label = jnp.asarray(t), self.law, labels_in(cond)
        x0 = law._mixture(self.process, xt, t) if self.mixture else law.x0(self.process, xt, t, label)
        if self.mixture and label is not None:
            none = (label == law.laws - 1).reshape(-1, *[1] * (xt.ndim - 1))
            x0 = jnp.where(none, x0, law.x0(self.process, xt, t, label))
        return self.process.convert(Prediction(x0, "x0"), self.kind, xt, t)


def check_process(name: str, process: Any) -> Gaussian:
    """The Gaussian process that this is. Raises ValueError unless it adds normal noise, the same at all sites."""
    found = gaussian_of(process)
    if found is None or "score" not in found.kinds or found.schedule.common is not found.schedule:
        raise ValueError(
            f"{name} needs a processes.Gaussian with one schedule for all sites, got {type(process).__name__} with "
            f"{type(getattr(process, 'schedule', None)).__name__}"
        )
    return found


def levels(process: Any, t: Time) -> tuple[Array, Array]:
    """Alpha and sigma at a number or at `(batch,)` times, as columns."""
    t, schedule = jnp.asarray(t), (gaussian_of(process) or process).schedule
    if t.ndim > 1:
        raise ValueError(f"a Gaussian law has one time for all sites of an example, got times of shape {t.shape}")
    t = t[:, None] if t.ndim else t
    return schedule.alpha(t), schedule.sigma(t)


def _flat(x: State) -> Array:
    return x.reshape(x.shape[0], -1)


def labels_in(cond: Any) -> Array | None:
    """The labels in a condition, which may be a dict around them."""
    return labels_in(cond.get("cond")) if isinstance(cond, dict) else cond


# -- from data ---------------------------------------------------------------------------------------------------------


def fit(
    data: Any, rank: int | None = None, *, labels: ArrayLike | bool | None = None, chunk: int = 4096
) -> GaussianLaw:
    """The Gaussian with the mean and the covariance of data, in one pass, float64.

    data: states `(n, *shape)`, or a split of `ddjax.data`. rank: how many of the largest eigenvalues are kept; the
        others become their mean (the likeliest such law, Tipping & Bishop 1999); None: all of them.
    labels: `(n,)` whole numbers, or True for those of the data set: a law for each label, and one of all items behind.
    chunk: items read at a time. Needs memory for one square matrix of sites for each law.
    Raises ValueError for labels without items, values that are not finite, and a rank out of range.
    """
    chunks, shape, num_labels = _chunks(data, labels, chunk)
    sites, laws = int(np.prod(shape)), num_labels + 1
    rank = sites if rank is None else rank
    if not 0 <= rank <= sites:
        raise ValueError(f"rank must be one of 0 ... {sites}, the sites of a state, got {rank}")
    counts, sums, squares = np.zeros(laws), np.zeros((laws, sites)), np.zeros((laws, sites, sites))
    shift = None
    for x, label in chunks:
        x = np.asarray(x, np.float64).reshape(len(x), -1)
        if not np.isfinite(x).all():
            raise ValueError("data of a Gaussian law must be finite numbers")
        shift = x.mean(0) if shift is None else shift  # near the mean, so that squares do not cancel
        x = x - shift
        for k in range(laws):
            own = x if k == num_labels else x[np.asarray(label) == k]
            counts[k] += len(own)
            sums[k] += own.sum(0)
            squares[k] += own.T @ own
    if not counts.all():
        raise ValueError(
            f"there are no items of label {int(np.argmin(counts))}" if counts[-1] else "there are no items"
        )
    means = sums / counts[:, None]
    variances, directions = np.linalg.eigh(squares / counts[:, None, None] - means[:, :, None] * means[:, None, :])
    variances = np.maximum(variances[:, ::-1], 0.0)  # largest first
    directions = directions.transpose(0, 2, 1)[:, ::-1]
    rest = variances[:, rank:].mean(1) if rank < sites else np.zeros(laws)
    means = (means + shift).reshape(laws, *shape)
    return GaussianLaw(means, directions[:, :rank], variances[:, :rank], rest, counts / counts[-1])


def _chunks(data: Any, labels: Any, chunk: int) -> tuple[Iterator[tuple[Any, Any]], tuple[int, ...], int]:
    """The items in chunks with their labels, the shape of a state, and how many labels there are."""
    starts = range(0, len(data), chunk)
    if isinstance(data, (np.ndarray, jax.Array)):
        if labels is None:
            return ((data[i : i + chunk], None) for i in starts), data.shape[1:], 0
        labels = np.asarray(labels)
        if labels.shape != data.shape[:1] or labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
            raise ValueError(f"labels are {len(data)} whole numbers from 0 on, got shape {labels.shape}")
        pairs = ((data[i : i + chunk], labels[i : i + chunk]) for i in starts)
        return pairs, data.shape[1:], int(labels.max()) + 1
    if data.num_symbols is not None:
        raise ValueError(f"{data.name!r} are tokens, which have no Gaussian law: load them with tokens=False")
    if labels and not data.num_classes:
        raise ValueError(f"{data.name!r} has no labels: leave labels out")
    items = (data[slice(i, i + chunk)] for i in starts)
    return ((item["x0"], labels_in(item.get("cond"))) for item in items), data.shape, data.num_classes if labels else 0


def load(path: str | os.PathLike) -> GaussianLaw:
    """Read what `GaussianLaw.save` wrote. Raises ValueError for other files, FileNotFoundError where there is none."""
    what = "Gaussian law that `GaussianLaw.save` wrote: fit one and save it"
    return GaussianLaw(**files.read_arrays(path, FORMAT, what))
