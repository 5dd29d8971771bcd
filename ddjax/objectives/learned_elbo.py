"""The bound as a function of the network and of the process at once."""

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
from ddjax.types import Rows, sites


def learned_elbo(
    process: Any,
    kind: str,
    *,
    t_range: tuple[float, float] = (0.0, 1.0),
    reconstruction: Callable[..., Array] | None = None,
) -> Objective:
    """The whole bound, nats per site, for a Gaussian-state process with parameters of its own.

    params is `{"network": ..., "process": process.parameters}`. Noisy states are functions of the parameters and of
    standard normals, so the derivative of the loss is an unbiased estimate of that of the bound, with two exceptions.
    Times are uniform on the clock. Parameters that leave the bound as it is (`process.variance_parameters`: the shape
    of VDM's schedule) follow the derivative of the mean square of an example's diffusion term instead, which lowers
    the variance of the estimate (Kingma et al. 2021, appendix I.2), at the cost of one more backward pass.
    Metrics: the bound's three terms, nats per site.

    t_range: times to integrate; the process must be noisy at the low end.
    reconstruction: the decoder, as in `likelihood.nelbo`; `binned(levels)` for data with known levels.
    Sample and evaluate with `process.with_parameters(jax.tree.map(np.asarray, params["process"]))`.
    Raises ValueError for a process without parameters.
    """
    if not hasattr(process, "parameters"):
        raise ValueError(f"learned_elbo needs a process with parameters, got {process!r}; use elbo")
    check_kind(kind, process.kinds, process)
    low, high = range_of(process, t_range)
    names = process.variance_parameters

    def objective(key, apply, params, x0, cond=None, weights=None, rows=None, train=True):
        rows, reduce = Rows.of(x0, rows), Reduction.of(weights, x0)
        time_key, *step_keys = jax.random.split(key, 5)
        noise_keys, low_keys, network_keys, low_network_keys = (
            random.example_keys(step_key, rows.index) for step_key in step_keys
        )
        t = low + (high - low) * random.stratified(time_key, rows, x0.dtype)
        first, last = (jnp.full(x0.shape[:1], end, x0.dtype) for end in t_range)

        def noised(learned, t, keys, network_keys):
            """A noisy state and what the network says there."""
            xt = reduce.shown(learned, learned.marginal(x0, t).sample(keys))
            rng = network_keys if train else None
            return bind(apply, params["network"], learned, kind, rng=rng, train=train)(xt, t, cond), xt

        def diffusion(parameters):
            learned = process.with_parameters(parameters)
            prediction, xt = noised(learned, t, noise_keys, network_keys)
            return reduce.totals((high - low) * learned.path_kl(x0, prediction, xt, t))

        parameters, to_variance = params["process"], 0.0
        if names:
            shape = {name: parameters[name] for name in names}
            path, pull = jax.vjp(lambda shape: diffusion(parameters | shape), jax.lax.stop_gradient(shape))
            (slope,) = pull(2.0 * path / sites(x0) * jax.grad(reduce.mean)(path))
            to_variance = sum(jnp.vdot(jax.lax.stop_gradient(slope[name]), shape[name]) for name in names)
            to_variance -= jax.lax.stop_gradient(to_variance)  # a slope and no value
        else:
            path = diffusion(parameters)
        learned = process.with_parameters(parameters)
        # A decoder that makes no use of the network does not run it: the compiler leaves out what nothing needs.
        prediction, x_low = noised(learned, first, low_keys, low_network_keys)
        decode = type(process).reconstruction if reconstruction is None else reconstruction
        terms = {
            "diffusion": reduce.mean(path),
            "prior": reduce(learned.prior_kl(x0, last)),
            "reconstruction": reduce(decode(learned, x0, prediction, x_low, first)),
        }
        loss = sum(terms.values())
        return loss + to_variance, {"loss": loss, **terms}

    return objective
