"""The bound of a chain whose reverse steps are mixtures."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Array, Float

from ddjax import random
from ddjax.grids import check_grid, step_at
from ddjax.objectives.base import Objective, noised
from ddjax.processes import MixtureOutput


def mixture_steps(process: MixtureOutput, kind: str, times: Float[Array, " steps+1"] | Sequence[float]) -> Objective:
    """KL(bridge || reverse) of the steps of a grid, one step and one draw of x_s for each example, nats per site.

    The maximum likelihood of the exact mixture (Li et al. 2024, section 4), where `elbo(process, kind, times=)` has an
    upper bound of it in closed form, with less variance.

    times: decreasing; there must be noise at the last. Raises ValueError for a bad grid.
    """
    times = check_grid(times)
    if process.schedule.sigma(times[-1]) == 0:
        raise ValueError(f"the grid ends at t={times[-1]:g}, where {process.schedule!r} has no noise: end it before")
    steps = times.shape[0] - 1

    def draw(u, keys, x0):
        noisy_keys, step_keys = random.split(keys)
        t, s = step_at(times, u)
        xt = process.marginal(x0, t).sample(noisy_keys)
        xs = process.bridge(x0, xt, s, t).sample(step_keys)
        return xt, t, lambda prediction: steps * process.step_nats(x0, prediction, xt, xs, s, t)

    return noised(process, kind, draw)


__all__ = ["mixture_steps"]
