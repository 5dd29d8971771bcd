"""How nearly a denoiser projects onto the data (Permenter & Yuan 2024, "Interpreting and Improving Diffusion ...")."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddjax.processes.gaussian import gaussian_of
from ddjax.types import Denoise, State, Time, left_broadcast


class ProjectionError(NamedTuple):
    """Of each example, `(batch,)`, in x_t / alpha."""

    relative: Float[Array, " batch"]  # |x0_hat - projection| / distance; the paper's eta bounds it
    level: Float[Array, " batch"]  # sqrt(sites) sigma / alpha over the distance; their nu bounds it from both sides
    distance: Float[Array, " batch"]  # to the data


def projection_error(
    denoise: Denoise,
    process: Any,
    data: Float[Array, n * sites],
    xt: State,
    t: Time,
    cond: Any = None,
) -> ProjectionError:
    """The denoiser's x_0 against the nearest of a finite set of data.

    DDIM is gradient descent on the squared distance to the data as far as `relative` is small, and the noise level
    follows the distance as far as `level` stays near 1 (their assumption 1 and theorem 4.2). Measured along a sampler's
    path, `sample(trajectory=True)`, or at noised data.

    data: `(n, *sites)`. xt, t: `(batch, *sites)`, `(batch,)`.
    Where x_t lies on the data itself the relative error is 0 or infinite. Raises ValueError for states of another
    shape than the data, and at alpha = 0 the error is infinite or NaN: there is nothing to project.
    """
    if xt.shape[1:] != data.shape[1:]:
        raise ValueError(f"states have shape {xt.shape[1:]}, the data {data.shape[1:]}")
    schedule = (gaussian_of(process) or process).schedule
    alpha, sigma = (f(left_broadcast(jnp.asarray(t), xt)) for f in (schedule.alpha, schedule.sigma))
    flat = lambda x: x.reshape(x.shape[0], -1)  # noqa: E731
    x0 = flat(process.convert(denoise(xt, t, cond), "x0", xt, t).value)
    z, points = flat(xt / alpha), flat(jnp.asarray(data, xt.dtype))

    def nearest(v):  # directly: |v|^2 - 2 v.y + |y|^2 cancels where the distance is small
        squared = ((points - v) ** 2).sum(-1)
        return points[squared.argmin()], jnp.sqrt(squared.min())

    projected, distance = jax.lax.map(nearest, z)
    error = jnp.linalg.norm(x0 - projected, axis=-1)
    level = jnp.sqrt(z.shape[1]) * (sigma / alpha).reshape(-1) / distance
    relative = jnp.where(error == 0, 0.0, error / distance)
    return ProjectionError(relative, jnp.broadcast_to(level, distance.shape), distance)
