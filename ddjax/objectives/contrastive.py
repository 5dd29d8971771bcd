"""Contrastive flow matching (Stoica et al. 2025): towards one's own velocity, away from another example's."""

from __future__ import annotations

import jax.numpy as jnp

from ddjax.objectives.base import Objective, noised
from ddjax.objectives.densities import Density, uniform_time
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian
from ddjax.types import left_broadcast


def contrastive_flow_matching(
    process: Gaussian, kind: str = "velocity", *, strength: float = 0.05, density: Density | None = None
) -> Objective:
    """|v - u|^2 - strength |v - u_other|^2, u_other the velocity of another example's data and noise at the same time.

    (Stoica et al. 2025.) The other is the example before, in the batch that the objective is given: with
    microbatches the last of each looks at its own microbatch, so a step split into microbatches is not quite the whole
    one; a batch sharded over devices moves one row between neighbours.

    The optimum is no velocity of the data but (E[u | x_t] - strength E[u_other]) / (1 - strength): the differences
    between examples (and conditions) are enlarged, at no cost in sampling.
    strength: in [0, 1); 0 is flow matching. Raises ValueError outside, or for a batch of one example.
    """
    if not 0 <= strength < 1:
        raise ValueError(f"strength lies in [0, 1): beyond, the loss has no minimum; got {strength}")
    density = uniform_time(process) if density is None else density

    def draw(u, keys, x0):
        if x0.shape[0] < 2:
            raise ValueError("contrastive_flow_matching needs two examples in a batch, got one")
        t = density(u)
        xt = process.marginal(x0, t).sample(keys)
        clean, at = Prediction(x0, "x0"), left_broadcast(t, x0)
        target = process.convert(clean, "velocity", xt, t).value
        other_x0, other_noise = (jnp.roll(v, 1, axis=0) for v in (x0, process.convert(clean, "noise", xt, t).value))
        other = process.schedule.alpha_prime(at) * other_x0 + process.schedule.sigma_prime(at) * other_noise

        def errors(prediction):
            value = process.convert(prediction, "velocity", xt, t).value
            return (value - target) ** 2 - strength * (value - other) ** 2

        return xt, t, errors

    return noised(process, kind, draw)
