"""Information that a condition has about the data, from denoising errors (I-MMSE).

For an exact denoiser the error path of the bound, with the condition less without it, is a log-ratio:

    integral of path_kl(without) - path_kl(with)  over [low, high]
        = E_q(x_low | x0) log p(x_low | y) / p(x_low)  -  the same at high            (pointwise)

and for Gaussian states its mean over data is that of the squared distance of the two predictions, by orthogonality:

    I(x_low; y) - I(x_high; y) = E 1/2 integral of (-lambda') exp(lambda) |x0_hat(y) - x0_hat|^2

Guo, Shamai and Verdu 2005, theorem 1; Kong et al. 2023, "Information-Theoretic Diffusion"; Kong et al. 2024,
"Interpretable Diffusion via Information Decomposition", section 2. The whole of the range gives log p(x0 | y) / p(x0)
and I(x0; y).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ddjax import random
from ddjax.grids import range_of
from ddjax.likelihood.bound import mean_and_error
from ddjax.predictions import Prediction
from ddjax.processes.gaussian import gaussian_of
from ddjax.pytrees import as_pytree
from ddjax.types import Rows, State, Time, per_example, time_dtype


class Information(NamedTuple):
    """What the condition says of each example, nats: an unbiased estimate of an integral over `t_range`.

    `error` is its standard error over the drawn times and noises, from their spread as if they were independent: an
    upper limit, for the times are stratified; infinite for one draw. The mean over data estimates mutual information.
    """

    nats: Float[Array, " batch"]
    sites: Float[Array, batch * sites]  # where in the example it lies; they add up to `nats`
    error: Float[Array, " batch"]
    t_range: tuple[float, float]


def information_rate(
    process: Any,
    x0: State,
    informed: Prediction,
    ignorant: Prediction,
    xt: State,
    t: Time,
    *,
    orthogonal: bool = False,
) -> Float[Array, batch * sites]:
    """The integrand over t: what `ignorant` errs more than `informed` at x_t, nats per site.

    orthogonal: the squared distance of the two predictions in place of the difference of their errors.
    """
    if orthogonal:
        return process.path_kl(process.convert(informed, "x0", xt, t).value, ignorant, xt, t)
    return process.path_kl(x0, ignorant, xt, t) - process.path_kl(x0, informed, xt, t)


def pointwise_information(
    key: Key[Array, ""],
    denoise: Any,
    process: Any,
    x0: State,
    cond: Any,
    *,
    without: Any = None,
    num_times: int = 16,
    t_range: tuple[float, float] | None = None,
    rows: Rows | None = None,
) -> Information:
    """Log p(x0 | cond) / p(x0 | without) of each example, which may be negative: a difference of two bounds.

    Both denoisers see the same noise. Up to the ends of t_range this is the log-ratio where both are exact (for
    categorical processes too); their error terms cancel, but do not vanish, where they are not.

    cond, without: the condition, and what it is compared with: None, the label that means none, or part of the
    condition (then the information is conditional on that part). num_times: stratified times per example, two calls
    of the network each. t_range: default `process.t_range`.
    Raises ValueError where num_times < 1 or the range is empty.
    """
    return _information(key, denoise, process, x0, cond, without, num_times, t_range, rows, orthogonal=False)


def mutual_information(
    key: Key[Array, ""],
    denoise: Any,
    process: Any,
    x0: State,
    cond: Any,
    *,
    without: Any = None,
    num_times: int = 16,
    t_range: tuple[float, float] | None = None,
    rows: Rows | None = None,
) -> Information:
    """What averages to the mutual information of data and condition, never negative, with less variance.

    The mean over draws of (x0, cond) of `.nats` is I(x_low; cond | without) - I(x_high; cond | without). That of one
    example is no log-ratio (for which: `pointwise_information`); its `sites` say where the condition matters to it.
    Arguments and errors as in `pointwise_information`; ValueError too for a categorical process.
    """
    if process.state != "gaussian":
        raise ValueError(
            f"mutual_information is for Gaussian states, got {type(process).__name__}; "
            "average pointwise_information over the data instead"
        )
    return _information(key, denoise, process, x0, cond, without, num_times, t_range, rows, orthogonal=True)


def _information(key, denoise, process, x0, cond, without, num_times, t_range, rows, *, orthogonal) -> Information:
    if num_times < 1:
        raise ValueError(f"num_times must be at least 1, got {num_times}")
    process = gaussian_of(process) or process
    t_range = range_of(process, t_range)
    rows = Rows.of(x0, rows)
    parts = _estimate(key, as_pytree(denoise), x0, cond, without, rows.index, process, num_times, t_range, orthogonal)
    return Information(*parts, t_range=t_range)


@functools.partial(jax.jit, static_argnames=("process", "num_times", "t_range", "orthogonal"))
def _estimate(key, denoise, x0, cond, without, rows, process, num_times, t_range, orthogonal):
    batch, dtype = x0.shape[0], time_dtype(x0)
    time_keys, noise_keys = random.split(random.example_keys(key, rows))

    def one_time(j):
        t, weight = process.time_at(random.stratum(time_keys, j, num_times, dtype), t_range)
        xt = process.marginal(x0, t).sample(random.fold_in(noise_keys, j))
        informed, ignorant = denoise(xt, t, cond), denoise(xt, t, without)
        rate = information_rate(process, x0, informed, ignorant, xt, t, orthogonal=orthogonal)
        rate = weight[:, None] * rate.reshape(batch, -1)
        return jnp.concatenate([rate, per_example(rate)[:, None]], axis=-1)

    mean, error = mean_and_error(one_time, num_times, (batch, x0[0].size + 1), dtype)
    return mean[:, -1], mean[:, :-1].reshape(x0.shape), error[:, -1]
