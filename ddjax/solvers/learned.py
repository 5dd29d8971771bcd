"""Solvers whose coefficients are free: all that take linear steps with one evaluation each, and their noise.

The generalised Gaussian family (Watson et al. 2022, "Learning Fast Samplers for Diffusion Models by Differentiating
Through Sample Quality", section 3). A sampler's steps may use all former states and predictions; with the states
written out, state i is

    x_i = signal_i * (sum over j < i of w_ij x0_j) + sigma_i * (q_i0 x_0 / sigma_0 + sum over 0 < j <= i of q_ij z_j)

of the predictions x0_j, the first state x_0 and the normals z_j drawn on the way, signal_i = alpha_i - q_i0 sigma_i
alpha_0 / sigma_0. It has the process's own mean and variance at time i, for whatever data, exactly where

    sum of w_ij over j = 1        sum of q_ij^2 over j = 1

so q is the Cholesky factor of the correlations between the noises of the states: every choice of these is a q, and
the other way round. DDIM, DDPM and all multistep solvers that keep the noise's variance are points of the family
(`written_out`); deterministic ones have q_i0 = 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ddjax import files, random
from ddjax.frozen import FrozenTree
from ddjax.grids import check_grid
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian
from ddjax.processes.gaussian import gaussian_of
from ddjax.solvers.ancestral import Ancestral
from ddjax.solvers.base import Info, batched
from ddjax.solvers.gaussian import DDIM
from ddjax.types import left_broadcast

FORMAT = "ddjax sampler 1"


class Coefficients(NamedTuple):
    """Row i - 1 of the matrices is that of state i."""

    times: Float[Array, " steps+1"]
    predictions: Float[Array, "steps steps"]  # w, lower triangular
    noises: Float[Array, "steps steps+1"] | None = None  # q; None for deterministic solvers


class Carry(NamedTuple):
    """What is known so far of all states to come."""

    later: Float[Array, "batch steps *sites"]
    taken: Int[Array, " batch"]


@dataclasses.dataclass(frozen=True)
class Learned:
    """The family's solver with these coefficients (see the module). It goes with its own times only: `times`.

    coefficients: constants (`frozen`), or, while they are learned, traced arrays. One evaluation a step.
    """

    process: Gaussian
    coefficients: Any

    def __post_init__(self):
        process = gaussian_of(self.process)
        if process is None:
            raise ValueError(f"Learned is for processes.Gaussian, got {type(self.process).__name__}: it needs x0")
        object.__setattr__(self, "process", process)
        if isinstance(self.coefficients, FrozenTree):
            self._check(self.coefficients.tree)

    def _check(self, c: Coefficients) -> None:
        check_grid(c.times)
        steps = len(c.times) - 1
        shapes = [c.predictions.shape, (steps, steps + 1) if c.noises is None else c.noises.shape]
        if shapes != [(steps, steps), (steps, steps + 1)]:
            raise ValueError(f"{steps + 1} times need coefficients of shapes (n, n) and (n, n + 1), got {shapes}")
        noises = np.eye(steps, steps + 1) if c.noises is None else c.noises
        if np.triu(c.predictions, 1).any() or np.triu(noises, 2).any():
            raise ValueError("coefficients of predictions and noises to come must be 0")
        if not (np.allclose(c.predictions.sum(1), 1, atol=1e-4) and np.allclose((noises**2).sum(1), 1, atol=1e-4)):
            raise ValueError("in each row predictions' coefficients must sum to 1, and the squares of noises'")

    @property
    def times(self) -> np.ndarray:
        """The grid."""
        return (self.coefficients.tree if isinstance(self.coefficients, FrozenTree) else self.coefficients).times

    def _rows(self) -> tuple[Coefficients, Array, Array, Array]:
        """The coefficients, signal and sigma of the states after the first, and what multiplies that."""
        c = FrozenTree.arrays(self.coefficients)
        alpha, sigma = self.process.schedule.alpha(c.times), self.process.schedule.sigma(c.times)
        if alpha.shape != c.times.shape:
            raise ValueError(f"Learned is for schedules with one clock for all sites, not {self.process.schedule!r}")
        first = sigma[1:] / sigma[0] * (1.0 if c.noises is None else c.noises[:, 0])
        return c, alpha[1:] - first * alpha[0], sigma[1:], first

    def init(self, xt, cond=None):
        """The first state's share of all the others."""
        first = self._rows()[3].astype(xt.dtype)
        return Carry(left_broadcast(first[None], xt[:, None]) * xt[:, None], jnp.zeros(xt.shape[0], jnp.int32))

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        """One evaluation; its share of all states to come."""
        c, signal, sigma, _ = self._rows()
        x0 = self.process.convert(denoise(xt, batched(t, xt), cond), "x0", xt, t).value
        i = carry.taken[0]  # the same for all: shares of each example would be kept for gradients, steps^2 of them
        later = _add(carry.later, signal * c.predictions[:, i], x0)
        if c.noises is not None:
            z = random.normal(keys, xt.shape[1:], xt.dtype)
            later = _add(later, sigma * c.noises[:, i + 1], z)
        return later[:, i], Carry(later, carry.taken + 1), Info(jnp.ones(xt.shape[0], jnp.int32))


def _add(later: Array, shares: Float[Array, " steps"], x: Array) -> Array:
    return later + (left_broadcast(shares[None], later) * x[:, None]).astype(later.dtype)


def frozen(process: Gaussian, times: Sequence[float], predictions: Any, noises: Any = None) -> Learned:
    """`Learned` with constants, hashable. Raises ValueError for coefficients outside the family."""
    numbers = [None if v is None else np.asarray(v, np.float64) for v in (times, predictions, noises)]
    return Learned(process, FrozenTree.of(Coefficients(*numbers)))


def written_out(solver: Any, times: Sequence[float]) -> Learned:
    """The same sampler as a point of the family: `Ancestral`, `DDIM`, or any linear solver of one evaluation a step.

    Found by letting the solver act on the unit vectors of its first state and of the predictions, in float64.
    Raises ValueError for solvers that are not in the family.
    """
    times = np.asarray(check_grid(np.asarray(times, np.float64)), np.float64)
    eta = 1.0 if isinstance(solver, Ancestral) else getattr(solver, "eta", 0.0)
    process, name = gaussian_of(solver.process) or solver.process, type(solver).__name__
    if isinstance(solver, Ancestral) and process is not solver.process:
        raise ValueError(
            f"{name} takes the steps of {type(solver.process).__name__}'s own correlation, which are not in the "
            "generalised Gaussian family: start from DDIM(process, eta=1.0)"
        )
    schedule = process.schedule
    with jax.enable_x64(True):
        alpha, sigma, snr = (
            np.asarray(f(jnp.asarray(times))) for f in (schedule.alpha, schedule.sigma, schedule.log_snr)
        )
        if alpha.shape != times.shape:
            raise ValueError(f"Learned is for schedules with one clock for all sites, not {schedule!r}")
        stochastic = isinstance(solver, (Ancestral, DDIM)) and eta > 0
        states = _noisy(alpha, sigma, snr, eta) if stochastic else _walk(solver, times)
    steps, some = len(times) - 1, sigma[1:, None] > 0
    noises = np.where(some, states[:, [0, *range(steps + 1, 2 * steps + 1)]], 0.0)
    noises[:, 0] *= sigma[0]
    noises = np.where(some, noises / np.where(some, sigma[1:, None], 1.0), np.eye(1, steps + 1))
    signal = alpha[1:] - noises[:, 0] * sigma[1:] * alpha[0] / sigma[0]
    predictions = states[:, 1 : steps + 1] / signal[:, None]
    if not (np.allclose(predictions.sum(1), 1, atol=1e-7) and np.allclose((noises**2).sum(1), 1, atol=1e-7)):
        raise ValueError(
            f"{name} under {type(schedule).__name__} does not keep the mean and variance of pure data and noise, so it "
            "is not in the generalised Gaussian family; start from solvers of x0 or noise (DDIM, DPM-Solver++, DEIS)"
        )
    return frozen(process, times, predictions, noises if stochastic else None)


def _noisy(alpha: np.ndarray, sigma: np.ndarray, snr: np.ndarray, eta: float) -> np.ndarray:
    """States of DDIM in terms of the first one, predictions and normals drawn: (n, 1 + n + n)."""
    steps = len(alpha) - 1
    unit = np.eye(2 * steps + 1)
    x, states = unit[0], []
    for i in range(steps):
        fresh = -np.expm1(snr[i] - snr[i + 1]) * eta**2
        noise = (x - alpha[i] * unit[1 + i]) / sigma[i]
        mixed = np.sqrt(1.0 - fresh) * noise + np.sqrt(fresh) * unit[1 + steps + i]
        x = alpha[i + 1] * unit[1 + i] + sigma[i + 1] * mixed
        states.append(x)
    return np.stack(states)


def _walk(solver: Any, times: np.ndarray) -> np.ndarray:
    """The same of a deterministic solver."""
    steps, calls = len(times) - 1, []
    unit, key = jnp.eye(2 * steps + 1)[None], random.example_keys(jax.random.key(0), 1)

    @jax.jit
    def step(carry, x, i):
        def denoise(xt, t, cond=None):
            calls.append(t)  # while tracing: once, for solvers of one evaluation
            return Prediction(unit[:, i + 1], "x0")

        return solver.step(key, carry, x, jnp.asarray(times)[i], jnp.asarray(times)[i + 1], denoise)[:2]

    x, states = unit[:, 0], []
    carry = jax.jit(solver.init)(x)
    for i in range(steps):
        x, carry = step(carry, x, i)
        states.append(np.asarray(x[0]))
    if len(calls) != 1:
        raise ValueError(
            f"{type(solver).__name__} evaluates the network more than once a step, so it is not in the "
            "generalised Gaussian family: its grid can be learned (search.Grid), its coefficients cannot"
        )
    return np.stack(states)


def save(path: str | Path, solver: Learned, /, **about: Any) -> None:
    """Write a sampler with constant coefficients, and what it is for, as JSON. about: whatever is worth knowing."""
    c = solver.coefficients.tree
    values = {name: None if value is None else value.tolist() for name, value in c._asdict().items()}
    files.write(path, FORMAT, solver.process, steps=len(c.times) - 1, **values, about=about)


def load(path: str | Path, process: Gaussian) -> Learned:
    """Read a sampler. Raises ValueError for other files, and for samplers of other processes; FileNotFoundError."""
    content = files.read(path, FORMAT, gaussian_of(process) or process, "a sampler")
    try:
        return frozen(process, *(content[name] for name in Coefficients._fields))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
