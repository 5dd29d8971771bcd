"""The Fokker-Planck equation as a regulariser: the scores of one diffusing density are bound to each other.

With dx = f x dt + g dw and s(x, t) the score of the density at t,

    ds/dt = grad [ g^2 / 2 (div s + |s|^2) - f x.s ]

(Lai et al. 2023, "FP-Diffusion".) A network's score does not obey it; by how much bounds the distance between
what its ODE and its SDE draw (Deveney et al. 2025).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ddjax import random
from ddjax.objectives.base import Objective, Reduction
from ddjax.objectives.densities import Density, uniform_time
from ddjax.predictions import bind
from ddjax.processes import Gaussian
from ddjax.types import Denoise, Rows, State, Time, left_broadcast, sites


def fokker_planck_residual(
    denoise: Denoise, process: Gaussian, xt: State, t: Time, cond=None, probe: State | None = None
) -> State:
    """The left side of the score's equation minus the right, shaped like the state.

    t: `(batch,)`. probe: signs, shaped like the state, for an unbiased estimate of the divergence (Hutchinson 1990) at
    the price of one derivative along it; None: the exact divergence, one derivative for each site. The network must
    treat examples apart. Costs about five calls of the network with a probe, and its derivatives are differentiable.
    """
    f, g2 = (left_broadcast(v, xt) for v in process.sde(t))

    def score(x, t):
        return process.convert(denoise(x, t, cond), "score", x, t).value

    def potential(x):
        """Of all examples together: none depends on another."""

        def along(direction):
            return direction * jax.jvp(lambda x: score(x, t), (x,), (jnp.broadcast_to(direction, x.shape),))[1]

        if probe is None:
            divergence = jax.vmap(along)(jnp.eye(sites(x), dtype=x.dtype).reshape(-1, 1, *x.shape[1:])).sum(axis=0)
        else:
            divergence = along(probe)
        s = score(x, t)
        return (0.5 * g2 * (divergence + s**2) - f * x * s).sum()

    change = jax.jvp(lambda t: score(xt, t), (t,), (jnp.ones_like(t),))[1]
    return change - jax.grad(potential)(xt)


def with_fokker_planck(
    objective: Objective, process: Gaussian, kind: str, *, weight: float, density: Density | None = None
) -> Objective:
    """`objective` plus weight times the mean over sites of |sigma residual|^2, at noisy states and times of its own.

    (Deveney et al. 2025; Lai et al. 2023.) The residual is estimated with one probe, so the penalty's expectation is
    the true one plus the estimate's variance; both are 0 for a score that is linear in x and obeys the equation. In
    units of the noise (times sigma), it does not drown the loss where sigma is small. No dropout in it.

    kind: what the network predicts. params are the network's own. Metrics: "fokker_planck", the penalty before its
    weight. Raises ValueError for a negative weight, or weights per site.
    """
    if not weight >= 0:
        raise ValueError(f"the weight of a penalty must not be negative, got {weight}")
    density = uniform_time(process) if density is None else density

    def regularised(key, apply, params, x0, cond=None, weights=None, rows=None, train=True):
        if weights is not None and weights.ndim > 1:
            raise ValueError("with_fokker_planck takes one weight per example, not one per site")
        key, *own = jax.random.split(key, 4)
        rows = Rows.of(x0, rows)
        loss, metrics = objective(key, apply, params, x0, cond, weights, rows, train)
        t = density(random.stratified(own[0], rows))
        xt = process.marginal(x0, t).sample(random.example_keys(own[1], rows.index))
        probe = signs(random.example_keys(own[2], rows.index), xt)
        residual = fokker_planck_residual(bind(apply, params, process, kind), process, xt, t, cond, probe)
        scaled = left_broadcast(process.schedule.sigma(t), xt) * residual
        penalty = Reduction.of(weights, x0)(scaled**2)
        total = loss + weight * penalty
        return total, metrics | {"loss": total, "fokker_planck": penalty}

    return regularised


def signs(keys: Array, like: State) -> State:
    """+1 or -1 at each site, one key per example."""
    return jax.vmap(lambda key: jax.random.rademacher(key, like.shape[1:], like.dtype))(keys)


__all__ = ["fokker_planck_residual", "signs", "with_fokker_planck"]
