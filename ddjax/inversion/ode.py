"""Inversion of deterministic samplers: up the probability-flow ODE, from data to noise.

A step of the sampler, x_s = F(x_t), takes what is predicted at the noisier end, t. Going up, x_t is not known yet:

    naive          the step from s to t, with what is predicted at x_s (Song et al. 2021, "DDIM", section 5.4; Dhariwal
                   & Nichol 2021, appendix F): first order in the step for DDIM
    fixed points   x_t <- x_t + r (x_s - F(x_t)), until F(x_t) = x_s

With r = alpha_t / alpha_s and DDIM's F this is the iteration of ReNoise (Garibi et al. 2024) and AIDI (Pan et al.
2023), x_t <- alpha_t / alpha_s x_s + (sigma_t - alpha_t sigma_s / alpha_s) noise(x_t), which diverges where the
network is steep. Here r is at first what inverts the ODE of Gaussian data, and then a secant's (Barzilai & Borwein
1988), of each example by itself; what does not come nearer is taken back. The exact denoiser is the gradient of a
convex function, and so is F: small enough an r always comes nearer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddjax.processes.gaussian import gaussian_of
from ddjax.solvers.base import Solver
from ddjax.types import Denoise, Keys, State, left_broadcast, per_example


def ascend(
    keys: Keys, denoise: Denoise, process: Any, solver: Solver, x0: State, cond: Any, times: Array, iterations: int
) -> Float[Array, "steps+1 batch *sites"]:
    """The states at all times of a decreasing grid whose last one is x0.

    iterations: of each step, one run of the solver's step each, and one more; 0 is the naive inversion.
    """
    if not hasattr(process, "noiseless") or hasattr(process, "state_shape"):
        raise ValueError(f"the ODE of {type(process).__name__} does not start from the data as they are")
    if getattr(process, "source_std", None) is not None:  # others begin in data
        process = gaussian_of(process)
    carry = solver.init(x0, cond)

    def move(x, t, s):
        return solver.step(keys, carry, x, t, s, denoise, cond)[0].astype(x.dtype)

    def step(xs, i):
        t, s = times[i], times[i + 1]
        xt = _guess(process, lambda x: move(x, s, t), xs, t, s)
        if iterations:
            xt = solve(lambda x: move(x, t, s), xt, xs, _rate(process, xs, t, s), iterations)
        return xt, xt

    _, states = jax.lax.scan(step, x0, jnp.arange(times.shape[0] - 1), reverse=True)
    return jnp.concatenate([states, x0[None]])


def _rate(process: Any, xs: State, t: Array, s: Array) -> Array | float:
    """How much the ODE of data as wide as the process expects spreads from s to t, in the mean over sites."""
    if not hasattr(process, "prior_std"):
        return 1.0
    later, earlier = (process.prior_std(left_broadcast(v, xs)) for v in (s, t))
    return jnp.mean(earlier / later)


def _guess(process: Any, up: Callable[[State], State], xs: State, t: Array, s: Array) -> State:
    """The state at t by the prediction at s.

    From data, where there is no noise to predict, without one: its mean given x_0 is 0. (But for processes that begin
    in other data, which the network knows of.)
    """
    if hasattr(process, "departure"):
        return up(xs)
    clean = jnp.all(process.schedule.sigma(left_broadcast(s, xs)) == 0)
    return jax.lax.cond(clean, lambda x: process.noiseless(x, t).astype(x.dtype), up, xs)


def solve(function: Callable[[State], State], x: State, target: State, rate: float | Array, iterations: int) -> State:
    """The x with function(x) = target, of each example by itself, from a first guess.

    rate: of the first step, how much x must change for a change of function(x), `()` or `(batch,)`.
    iterations: calls of the function, and one more.
    """

    def missing(x):
        error = target - function(x)
        return error, per_example(error**2)

    def iterate(_, state):
        x, error, size, rate = state
        moved = x + left_broadcast(rate, x) * error
        new_error, new_size = missing(moved)
        step = moved - x
        turn = per_example(step * (error - new_error))  # how much function(x) changed along the step
        secant = jnp.where(turn > 0, per_example(step**2) / jnp.where(turn > 0, turn, 1.0), rate)
        better = new_size < size  # false for what is not a number
        take = left_broadcast(better, x)
        return (
            jnp.where(take, moved, x),
            jnp.where(take, new_error, error),
            jnp.where(better, new_size, size),
            jnp.where(better, secant, jnp.minimum(secant, 0.5 * rate)),
        )

    error, size = missing(x)
    rate = jnp.broadcast_to(jnp.asarray(rate, size.dtype), size.shape)
    return jax.lax.fori_loop(0, iterations, iterate, (x, error, size, rate))[0]
