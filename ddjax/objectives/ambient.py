"""Training on noisy data (ambient diffusion): each example carries the noise level that it was observed at.

y = x_0 + sigma_n noise. Noised further to t, x_t = alpha x_0 + sigma noise with sigma / alpha > sigma_n, and

    E[y | x_t] = (1 - r) E[x_0 | x_t] + r x_t / alpha,    r = (sigma_n alpha / sigma)^2

so that the network learns to denoise to x_0, which nobody saw, by guessing y (Daras et al. 2024, 2025).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from ddjax.objectives import weightings
from ddjax.objectives.base import Objective, noised
from ddjax.objectives.densities import Density, uniform_time
from ddjax.objectives.weightings import Weighting
from ddjax.processes import Gaussian
from ddjax.processes.gaussian import Normal
from ddjax.types import left_broadcast


def with_noise_level(sigma: Float[Array, " batch"], cond: Any = None) -> dict[str, Any]:
    """The condition for `ambient`: the examples' noise levels (0 for clean ones) beside the network's own `cond`."""
    return {"sigma": sigma, "cond": cond}


def ambient(
    process: Gaussian, kind: str, *, weighting: Weighting | None = None, density: Density | None = None
) -> Objective:
    """weighting(lambda) |y - E_hat[y | x_t]|^2 from data y, each with a noise level of its own.

    An example counts at the times whose sigma / alpha exceeds its own; drawn at another, it costs nothing. For clean
    ones this is `gaussian(error="x0")`. The optimum is the denoiser of the clean law wherever clean or noisy examples
    reach; as there is no noise to take off below the least level, clean examples teach the rest.

    The data are `x0=y`, their levels are in the condition, `cond=with_noise_level(sigma, cond)`, sigma in units of x_0;
    the network sees `cond` alone. weighting: of the x0 error, default EDM's. density: of all times.
    Raises ValueError where the condition is another.
    """
    weighting = weightings.edm(process) if weighting is None else weighting
    density = uniform_time(process) if density is None else density

    def objective(key, apply, params, x0, cond=None, weights=None, rows=None, train=True):
        if not (isinstance(cond, dict) and set(cond) == {"sigma", "cond"}):
            raise ValueError("ambient needs the examples' noise levels: give cond=with_noise_level(sigma, cond)")

        def draw(u, keys, y):
            t = density(u)
            at = left_broadcast(t, y)
            alpha, sigma = process.schedule.alpha(at), process.schedule.sigma(at)
            share = (left_broadcast(cond["sigma"], y) * alpha / sigma) ** 2
            counts = share < 1.0
            share = jnp.where(counts, share, 0.0)
            # Where it does not count, x_t is only shown: any noise will do.
            xt = Normal(alpha * y, jnp.broadcast_to(sigma * jnp.sqrt(1.0 - share), y.shape)).sample(keys)
            weight = left_broadcast(weighting(process.schedule.common.log_snr(t)), y)

            def errors(prediction):
                guess = (1.0 - share) * process.convert(prediction, "x0", xt, t).value + share * xt / alpha
                return jnp.where(counts, weight * (y - guess) ** 2, 0.0)

            return xt, t, errors

        return noised(process, kind, draw)(key, apply, params, x0, cond["cond"], weights, rows, train)

    return objective
