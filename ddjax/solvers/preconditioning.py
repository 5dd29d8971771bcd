"""Second-order geometry for first-order drifts: directions multiplied by an inverse of the Hessian of -log p_t.

    corrector = solvers.Langevin(process, 0.1, rule="level", preconditioner=ExactHessian(damping=0.1))
    solver = solvers.Preconditioned(solvers.dpm_solver_pp(process), LevenbergMarquardt(damping=100.0, memory=0.1))

(Wang et al. 2025, "Unleashing High-Quality Image Generation in Diffusion Sampling Using Second-Order
Levenberg-Marquardt-Langevin".) With H the Hessian of -log p_t times sigma^2, whose eigenvalues are 1 where there is
noise alone and small where data vary much, and a damping lambda,

    P = lambda (H + lambda I)^-1:      1 where H is 0, and everywhere as lambda grows: the plain step.

A preconditioner is a frozen dataclass with `init(x) -> carry`, `calls(x)`, the evaluations it makes at each step, and
`metric(carry, direction, x, t, denoise, process, cond) -> (metric, carry)`, where the direction is what is to be
multiplied. A metric has `apply(v)`, P v, and `root(z)`, P^(1/2) z, and is symmetric.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from ddjax.frozen import Frozen
from ddjax.gaussian_law import GaussianLaw, check_process
from ddjax.processes import Gaussian
from ddjax.processes.gaussian import divide, gaussian_of
from ddjax.solvers.base import Info, Solver, batched, first_carry
from ddjax.solvers.forms import FORMS
from ddjax.types import State, left_broadcast, per_example


class Metric(Protocol):
    """A positive definite matrix for each example."""

    def apply(self, v: State) -> State:
        """P v."""

    def root(self, z: State) -> State:
        """P^(1/2) z, the symmetric root."""


class Preconditioner(Protocol):
    """See above."""

    def init(self, x: State) -> Any:
        """What the first metric needs."""

    def calls(self, x: State) -> int:
        """Evaluations that a metric costs."""

    def metric(
        self, carry: Any, direction: State, x: State, t: Any, denoise: Any, process: Gaussian, cond: Any
    ) -> tuple[Metric, Any]:
        """P at a state."""


# -- metrics -----------------------------------------------------------------------------------------------------------


def _damped(damping: float) -> Callable[[Array], Array]:
    """The eigenvalue of P where that of H is h; a negative curvature, where log p is not concave, counts as none."""
    return lambda h: damping / (jnp.maximum(h, 0.0) + damping)


class LowRank(NamedTuple):
    """P for H = sum of v v', `vectors` `(1 or batch, rank, sites)` of any length and angles: no matrix of sites."""

    vectors: Array
    damping: float

    def apply(self, v):
        """By Woodbury: lambda (V'V + lambda)^-1 = 1 - V' (V V' + lambda)^-1 V, one small system for each example."""
        along, back = self._along(v)
        gram = self._gram() + self.damping * jnp.eye(self.vectors.shape[1], dtype=self.vectors.dtype)
        solved = jnp.linalg.solve(jnp.broadcast_to(gram, (len(along), *gram.shape[1:])), along[..., None])
        return v - back(solved[..., 0])

    def root(self, z):
        """On the eigenvectors of V V', g: 1 + V' ((lambda / (g + lambda))^(1/2) - 1) / g V."""
        along, back = self._along(z)
        g, q = jnp.linalg.eigh(self._gram())
        g = jnp.maximum(g, 0.0)
        # -1 / (sqrt(g + lambda) (sqrt(g + lambda) + sqrt(lambda))), which is the same and does not cancel.
        whole = jnp.sqrt(g + self.damping)
        change = -1.0 / (whole * (whole + jnp.sqrt(jnp.asarray(self.damping, g.dtype))))
        return z + back(jnp.einsum("bij,bj->bi", q, change * jnp.einsum("bij,bi->bj", q, along)))

    def _gram(self) -> Array:
        return jnp.einsum("bki,bli->bkl", self.vectors, self.vectors, precision="highest")

    def _along(self, v: State) -> tuple[Array, Callable[[Array], State]]:
        """<v_k, v>, and how such numbers become a state."""
        vectors = jnp.broadcast_to(self.vectors, (len(v), *self.vectors.shape[1:]))
        along = jnp.einsum("bki,bi->bk", vectors, v.reshape(len(v), -1), precision="highest")
        return along, lambda c: jnp.einsum("bki,bk->bi", vectors, c, precision="highest").reshape(v.shape)


class Dense(NamedTuple):
    """P by all eigenvalues and eigenvectors of H."""

    eigenvalues: Array  # (batch, sites)
    eigenvectors: Array  # (batch, sites, sites), columns
    damping: float

    def apply(self, v):
        """Each eigenvalue of P."""
        return self._function(_damped(self.damping)(self.eigenvalues), v)

    def root(self, z):
        """Each root."""
        return self._function(jnp.sqrt(_damped(self.damping)(self.eigenvalues)), z)

    def _function(self, f: Array, v: State) -> State:
        u = self.eigenvectors
        along = jnp.einsum("bij,bi->bj", u, v.reshape(len(v), -1), precision="highest")
        return jnp.einsum("bij,bj->bi", u, f * along, precision="highest").reshape(v.shape)


class OfLaw(NamedTuple):
    """P of a Gaussian law, H = sigma^2 (alpha^2 C + sigma^2)^-1."""

    function: Callable[[Callable[[Array], Array], State], State]
    damping: float

    def apply(self, v):
        """In the law's eigenbasis."""
        return self.function(_damped(self.damping), v)

    def root(self, z):
        """In the law's eigenbasis."""
        return self.function(lambda h: jnp.sqrt(_damped(self.damping)(h)), z)


# -- preconditioners ---------------------------------------------------------------------------------------------------


def _check_damping(name: str, damping: float) -> None:
    if not damping > 0:
        raise ValueError(f"{name} needs a positive damping, got {damping}")


class Past(NamedTuple):
    """The direction before, and whether there was one."""

    direction: State
    known: Bool[Array, " batch"]


@dataclasses.dataclass(frozen=True)
class LevenbergMarquardt:
    """The paper's approximation: H is the product of one vector with itself, as in Gauss and Newton's.

    H ~ m m', m = memory d_before + (1 - memory) d, with d the direction now and that of the step before. Costs no
    evaluation. memory = 0, as in the published scripts, only makes d shorter, so that `Preconditioned`, which keeps its
    length, does nothing at all. damping: against |m|^2, in d's own units. Where it is far below memory |m|^2, what is
    left of d is what is orthogonal to m, and leads astray.

    The rank of one is an approximation without a bound for any given law; `ExactHessian` says what it stands for.
    """

    damping: float = 100.0
    memory: float = 0.1

    def __post_init__(self):
        _check_damping("LevenbergMarquardt", self.damping)
        if not 0 <= self.memory < 1:
            raise ValueError(f"memory is the former direction's share, in [0, 1), got {self.memory}")

    def init(self, x):
        """No direction yet."""
        return Past(jnp.zeros_like(x), jnp.zeros(x.shape[:1], bool))

    def calls(self, x):
        """None."""
        return 0

    def metric(self, carry, direction, x, t, denoise, process, cond):
        """Of rank one."""
        known = left_broadcast(carry.known, x)
        mean = jnp.where(known, self.memory * carry.direction + (1.0 - self.memory) * direction, direction)
        after = Past(direction.astype(carry.direction.dtype), jnp.ones_like(carry.known))
        return LowRank(mean.reshape(len(x), 1, -1), self.damping), after


@dataclasses.dataclass(frozen=True)
class FixedHessian:
    """H = sum of v v' with the same vectors, `(rank, sites)`, at all states and times."""

    vectors: Frozen
    damping: float

    def __post_init__(self):
        _check_damping("FixedHessian", self.damping)
        if not isinstance(self.vectors, Frozen):
            object.__setattr__(self, "vectors", Frozen(np.asarray(self.vectors)))
        if self.vectors.values.ndim != 2:
            raise ValueError(f"FixedHessian needs vectors (rank, sites), got shape {self.vectors.values.shape}")

    def init(self, x):
        """Nothing to carry."""
        return ()

    def calls(self, x):
        """None."""
        return 0

    def metric(self, carry, direction, x, t, denoise, process, cond):
        """Always the same."""
        return LowRank(jnp.asarray(self.vectors.values, x.dtype)[None], self.damping), carry


@dataclasses.dataclass(frozen=True)
class ExactHessian:
    """H as it is: that of a Gaussian law in closed form, or of any denoiser by differentiating it.

    sigma^2 times the Hessian of -log p_t is 1 - alpha dE[x_0 | x_t] / dx_t (Tweedie's formula, once more). law: a
    `GaussianLaw` in the place of the denoiser. Without one each metric costs an evaluation and its derivative along
    every site, and the eigenvectors of a matrix of sites: for proofs, and few sites.
    """

    damping: float
    law: GaussianLaw | None = None

    def __post_init__(self):
        _check_damping("ExactHessian", self.damping)

    def init(self, x):
        """Nothing to carry."""
        return ()

    def calls(self, x):
        """Without a law one, and a derivative along each site."""
        return 0 if self.law is not None else 1 + x[0].size

    def metric(self, carry, direction, x, t, denoise, process, cond):
        """At this state."""
        t = jnp.asarray(t)
        if self.law is not None:
            sigma = process.schedule.sigma(t)
            squared = sigma[:, None] ** 2 if sigma.ndim else sigma**2

            def function(f, v):
                return self.law.curved(process, lambda h: f(squared * h), v, t, cond)

            return OfLaw(function, self.damping), carry

        def x0(flat):
            state = flat.reshape(x.shape)
            value = process.convert(denoise(state, batched(t, state), cond), "x0", state, t).value
            return value.reshape(len(x), -1)

        flat = x.reshape(len(x), -1)

        def along(unit):
            return jax.jvp(x0, (flat,), (jnp.broadcast_to(unit, flat.shape),))[1]

        columns = jax.vmap(along)(jnp.eye(flat.shape[1], dtype=flat.dtype))  # (sites, batch, sites)
        jacobian = jnp.moveaxis(columns, 0, -1)
        alpha = left_broadcast(process.schedule.alpha(t), jacobian)
        h = jnp.eye(flat.shape[1]) - alpha * 0.5 * (jacobian + jacobian.swapaxes(1, 2))
        return Dense(*jnp.linalg.eigh(h), self.damping), carry


# -- in deterministic solvers ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Preconditioned:
    """Any deterministic solver, with its drift multiplied by P and given its length back.

    A step x_s = r x_t + d has a part that only rescales the state and a drift d, made of predictions: r = sigma_s /
    sigma_t where these are of x0, alpha_s / alpha_t of the noise, and 1 of the velocity (`solvers.forms`). It becomes

        x_s = r x_t + |d| P d / |P d|

    as in the paper's samplers (DPM-Solver, DPM-Solver++ and Euler with their drifts multiplied). The step into
    sigma = 0, which is the prediction itself, and those from alpha = 0 stay as they are. The result no longer converges
    to the ODE's solution: what is gained is gained in few steps, if at all.

    solver: one that takes whatever state it is given. form: of `solvers.forms.FORMS`; that of the noise is two large
        numbers' difference near alpha = 0, which a turned d upsets.
    """

    solver: Solver
    preconditioner: Preconditioner
    form: str = "x0"

    def __post_init__(self):
        check_process("Preconditioned", getattr(self.solver, "process", None))
        if self.form not in FORMS:
            raise ValueError(f"form must be one of {', '.join(FORMS)}, got {self.form!r}")
        if getattr(self.solver, "times", None) is not None:
            raise ValueError(f"{type(self.solver).__name__} would not see what was multiplied: use another solver")

    @property
    def process(self) -> Gaussian:
        """The solver's."""
        return gaussian_of(self.solver.process)

    def init(self, xt, cond=None):
        """The carries of both."""
        return self.solver.init(xt, cond), self.preconditioner.init(xt)

    def begin(self, xt, cond, denoise, known=None):
        """As `init`."""
        return first_carry(self.solver, xt, cond, denoise, known), self.preconditioner.init(xt)

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        """The solver's evaluations, and the preconditioner's."""
        inner, before = carry
        plain, inner, info = self.solver.step(keys, inner, xt, t, s, denoise, cond)
        schedule, (t_, s_) = self.process.schedule, (left_broadcast(jnp.asarray(v), xt) for v in (t, s))
        stays = (schedule.alpha(t_) == 0) | (schedule.sigma(s_) == 0)
        scale = {"x0": schedule.sigma, "noise": schedule.alpha, "velocity": jnp.ones_like}[self.form]
        kept = divide(scale(s_), scale(t_)) * xt
        drift = plain - kept
        metric, after = self.preconditioner.metric(before, drift, xt, t, denoise, self.process, cond)
        moved = metric.apply(drift)
        length = jnp.sqrt(divide(per_example(drift**2), per_example(moved**2)))
        xs = jnp.where(stays, plain, kept + left_broadcast(length, xt) * moved)
        # What was no drift is not remembered as one.
        stays = jnp.broadcast_to(stays.reshape(-1), xt.shape[:1])
        after = jax.tree.map(lambda new, old: jnp.where(left_broadcast(stays, new), old, new), after, before)
        return xs.astype(xt.dtype), (inner, after), Info(info.nfe + self.preconditioner.calls(xt))
