"""A loss at every resolution at which a network says what it sees."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from ddjax import taps
from ddjax.objectives.base import Objective, Uniforms, at_times, noised
from ddjax.objectives.densities import Density, uniform_time
from ddjax.objectives.weightings import Weighting, unit
from ddjax.predictions import GAUSSIAN_KINDS, Prediction, check_kind
from ddjax.processes import Gaussian


def multi_resolution(
    process: Gaussian,
    kind: str,
    *,
    coefficients: Sequence[float] = (0.25,),
    weighting: Weighting | None = None,
    density: Density | None = None,
    uniforms: Uniforms | None = None,
) -> Objective:
    """`gaussian`, and the squared errors of what the lower branches of a `denoisers.MultiResolution` say.

    (Liu et al. 2024, "Alleviating distortion in image generation via multi-resolution diffusion models"; their code's
    `multi_scale_targets`.) The target at a lower resolution is the sum over ratio x ratio pixels over ratio, so that
    white noise stays white noise.

    kind: what the network predicts, in which errors are measured.
    coefficients: of the branches from the lowest on, but for the last, whose is 1 (theirs: 1/4 for one of two).
    weighting, density, uniforms: as in `gaussian`.
    Raises ValueError for another process, and, when called, for a network that has no such branches.
    """
    check_kind(kind, GAUSSIAN_KINDS, process)
    weighting = unit if weighting is None else weighting
    density = uniform_time(process) if density is None else density
    names = [f"output/{i}" for i in range(len(coefficients))]

    def time_at(u):
        t = density(u)
        return t, weighting(process.schedule.common.log_snr(t))

    def objective(key, apply, params, x0, cond=None, weights=None, rows=None, train=True):
        lower = {}

        def listened(params, xt, t, cond=None, **options):
            with taps.record(*names) as seen:
                out = apply(params, xt, t, cond, **options)
            lower.update(seen)
            return out

        def site_loss(x0, prediction, xt, t):
            target = process.convert(Prediction(x0, "x0"), kind, xt, t).value
            loss = (target - prediction.value) ** 2
            for name, coefficient in zip(names, coefficients, strict=True):
                loss = loss + coefficient * _lower_loss(target, lower[name])
            return loss

        draw = at_times(process, time_at, site_loss)
        return noised(process, kind, draw, uniforms=uniforms)(key, listened, params, x0, cond, weights, rows, train)

    return objective


def pooled(x: Float[Array, "batch H W C"], ratio: int) -> Float[Array, "batch H2 W2 C"]:
    """Sums over ratio x ratio pixels, over ratio."""
    batch, rows, columns, channels = x.shape
    return x.reshape(batch, rows // ratio, ratio, columns // ratio, ratio, channels).sum(axis=(2, 4)) / ratio


def _lower_loss(target: Float[Array, "batch H W C"], said: Float[Array, "batch H2 W2 C"]) -> Array:
    """At each pixel the squared error of the one that holds it: the means over both are the same."""
    ratio = target.shape[1] // said.shape[1]
    loss = (pooled(target, ratio) - said) ** 2
    return jnp.repeat(jnp.repeat(loss, ratio, axis=1), ratio, axis=2)
