"""The bound with its two ends, also as a function of the network and of the process at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ddjax import random
from ddjax.grids import range_of
from ddjax.objectives.base import Objective, Reduction
from ddjax.predictions import bind, check_kind
from ddjax.types import Rows, left_broadcast, sites, time_dtype


def whole_elbo(
    process: Any,
    kind: str,
    *,
    t_range: tuple[float, float] | None = None,
    reconstruction: Callable[..., Array] | None = None,
) -> Objective:
    """The bound with its two ends, nats per site: `elbo`'s term in continuous time, the prior's and the decoder's.

    An unbiased estimate, one time per example, of what `likelihood.nelbo` estimates. Metrics: its three terms.

    t_range: times to integrate; default `process.t_range`. reconstruction: as in `likelihood.nelbo`.
    """
    check_kind(kind, process.kinds, process)
    ends = range_of(process, t_range)
    estimate = _estimate(kind, ends, lambda u: process.time_at(u, ends), reconstruction)

    def objective(key, apply, params, x0, cond=None, weights=None, rows=None, train=True):
        diffusion, whole = estimate(key, apply, params, x0, cond, weights, rows, train)
        return whole(process, diffusion(process))

    return objective


def learned_elbo(
    process: Any,
    kind: str,
    *,
    t_range: tuple[float, float] = (0.0, 1.0),
    reconstruction: Callable[..., Array] | None = None,
) -> Objective:
    """`whole_elbo` for a Gaussian-state process with a schedule of its own to learn, times uniform on the clock.

    params is `{"network": ..., "process": process.parameters}`. Noisy states are functions of the parameters and of
    standard normals, so the derivative of the loss is an unbiased estimate of that of the bound, with one exception:
    parameters that leave the bound as it is (`process.variance_parameters`: the shape of VDM's schedule) follow the
    derivative of the mean square of an example's diffusion term instead, which lowers the variance of the estimate
    (Kingma et al. 2021, appendix I.2), at the cost of one more backward pass.

    t_range: times to integrate; the process must be noisy at the low end, as learned schedules are at 0.
    reconstruction: the decoder, as in `likelihood.nelbo`; `binned(levels)` for data with known levels.
    Sample and evaluate with `process.with_parameters(jax.tree.map(np.asarray, params["process"]))`.
    Raises ValueError for a process without parameters, or without noise at the low end.
    """
    if not hasattr(process, "parameters"):
        raise ValueError(f"learned_elbo needs a process with parameters, got {process!r}; use elbo")
    check_kind(kind, process.kinds, process)
    low, high = ends = range_of(process, t_range)
    with jax.ensure_compile_time_eval():
        if not jnp.isfinite(process.schedule.common.log_snr(jnp.asarray(low))).all():
            raise ValueError(
                f"at t={low:g} {process.schedule!r} has no noise, and the bound there is infinite: begin later, "
                f"for example with t_range={tuple(round(end, 6) for end in process.t_range)}"
            )
    names = process.variance_parameters

    def on_clock(u):
        # In the process's own coordinate the shape of the schedule would have no say in the variance.
        return low + (high - low) * u, jnp.full_like(u, high - low)

    estimate = _estimate(kind, ends, on_clock, reconstruction)

    def objective(key, apply, params, x0, cond=None, weights=None, rows=None, train=True):
        diffusion, whole = estimate(key, apply, params["network"], x0, cond, weights, rows, train)
        parameters = params["process"]
        learned = process.with_parameters(parameters)
        if not names:
            return whole(learned, diffusion(learned))
        shape = {name: parameters[name] for name in names}
        path, pull = jax.vjp(
            lambda shape: diffusion(process.with_parameters(parameters | shape)), jax.lax.stop_gradient(shape)
        )
        (slope,) = pull(2.0 * path / sites(x0) * jax.grad(Reduction.of(weights, x0).mean)(path))
        to_variance = sum(jnp.vdot(jax.lax.stop_gradient(slope[name]), shape[name]) for name in names)
        loss, metrics = whole(learned, path)
        return loss + (to_variance - jax.lax.stop_gradient(to_variance)), metrics  # a slope and no value

    return objective


def _estimate(kind, ends, time_at, reconstruction):
    """An objective's arguments -> the bound at the draws that they decide, as two functions of the process.

    `diffusion(process)` is that term, one total per example; `whole(process, totals)` what an objective returns.
    time_at: uniforms -> times and their weights.
    """

    def estimate(key, apply, params, x0, cond, weights, rows, train):
        rows, reduce, dtype = Rows.of(x0, rows), Reduction.of(weights, x0), time_dtype(x0)
        time_key, *step_keys = jax.random.split(key, 5)
        noise_keys, low_keys, network_keys, low_network_keys = (
            random.example_keys(step_key, rows.index) for step_key in step_keys
        )
        u = random.stratified(time_key, rows, dtype)
        low, high = (jnp.full(x0.shape[:1], end, dtype) for end in ends)

        def noised(process, t, keys, network_keys):
            """A noisy state and what the network says there."""
            xt = reduce.shown(process, process.marginal(x0, t).sample(keys))
            rng = network_keys if train else None
            return bind(apply, params, process, kind, rng=rng, train=train)(xt, t, cond), xt

        def diffusion(process):
            t, weight = time_at(u)
            prediction, xt = noised(process, t, noise_keys, network_keys)
            return reduce.totals(left_broadcast(weight, x0) * process.path_kl(x0, prediction, xt, t))

        def whole(process, path):
            # A decoder that makes no use of the network does not run it: the compiler leaves out what nothing needs.
            prediction, x_low = noised(process, low, low_keys, low_network_keys)
            decode = type(process).reconstruction if reconstruction is None else reconstruction
            terms = {
                "diffusion": reduce.mean(path),
                "prior": reduce(process.prior_kl(x0, high)),
                "reconstruction": reduce(decode(process, x0, prediction, x_low, low)),
            }
            loss = sum(terms.values())
            return loss, {"loss": loss, **terms}

        return diffusion, whole

    return estimate
