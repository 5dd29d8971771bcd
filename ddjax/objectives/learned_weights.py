"""Gaussian objectives with a few parameters of their own, which train with the network's and are dropped afterwards.

params is `{"network": ..., "objective": ...}`; both take gradients from the one loss, so there is no state to carry
from step to step and nothing to synchronise between devices. Of `own_uncertainty` they are the network's.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ddjax import taps
from ddjax.objectives import densities
from ddjax.objectives.base import Objective, noised
from ddjax.objectives.densities import Density
from ddjax.objectives.gaussian import weighted_errors
from ddjax.objectives.weightings import Weighting
from ddjax.processes import Gaussian
from ddjax.types import left_broadcast, per_example, sites

# Waves over log-SNR / 8, EDM's c_noise (Karras et al. 2024, eq. 75, "MP-Fourier"): drawn once for all.
_RNG = np.random.default_rng(0)
_FREQUENCIES, _PHASES = 2.0 * math.pi * _RNG.normal(size=128), 2.0 * math.pi * _RNG.uniform(size=128)


def learned_uncertainty(
    process: Gaussian,
    kind: str,
    *,
    error: str | None = None,
    weighting: Weighting | None = None,
    density: Density | None = None,
) -> Objective:
    """EDM2's loss: error / exp(u) + u, with u(log-SNR) learned (Karras et al. 2024, eq. 14-15 and 21).

    error is that of `gaussian` with the same options. At the optimum exp(u) is the expected error at each noise level,
    so that all levels pull equally on the network. The loss is not a bound and may be negative.

    params is `{"network": ..., "objective": uncertainty_parameters()}`; they begin with u = 0, the plain loss.
    """
    base = weighted_errors(process, error or kind, weighting, density)

    def objective(key, apply, params, x0, cond=None, weights=None, rows=None, train=True):
        def draw(u, keys, x0):
            xt, t, errors = base(u, keys, x0)
            log_error = left_broadcast(uncertainty(params["objective"], process.schedule.common.log_snr(t)), x0)
            return xt, t, lambda prediction: _uncertain(errors(prediction), log_error)

        return noised(process, kind, draw)(key, apply, params["network"], x0, cond, weights, rows, train)

    return objective


def _uncertain(errors: Array, log_error: Array) -> Array:
    """Equation 15."""
    return jnp.exp(-log_error) * errors + log_error


def uncertainty_parameters() -> dict[str, Array]:
    """Where the uncertainty of `learned_uncertainty` begins: 0 at every noise level."""
    return {"weights": jnp.zeros(_FREQUENCIES.shape), "bias": jnp.zeros(())}


def uncertainty(parameters: dict[str, Array], log_snr: Float[Array, " batch"]) -> Float[Array, " batch"]:
    """u: the logarithm of the error expected at a noise level."""
    frequencies, phases = (jnp.asarray(v, log_snr.dtype) for v in (_FREQUENCIES, _PHASES))
    waves = math.sqrt(2.0) * jnp.cos(-log_snr[..., None] / 8.0 * frequencies + phases)
    return waves @ parameters["weights"] / math.sqrt(len(_FREQUENCIES)) + parameters["bias"]


def own_uncertainty(
    process: Gaussian,
    kind: str,
    *,
    error: str | None = None,
    weighting: Weighting | None = None,
    density: Density | None = None,
) -> Objective:
    """`learned_uncertainty` with the uncertainty u that the network itself tells, at the tap "uncertainty".

    (`denoisers.EDM2(uncertainty=128)`, whose u is the authors', NVlabs/edm2's `Precond` and `EDM2Loss`: a layer with
    normalised weights, which stays with the network and in its average.) params are the network's.

    Raises ValueError, when called, for a network that tells none.
    """
    base = weighted_errors(process, error or kind, weighting, density)

    def objective(key, apply, params, x0, cond=None, weights=None, rows=None, train=True):
        told = {}

        def listened(params, xt, t, cond=None, **options):
            with taps.record("uncertainty") as seen:
                out = apply(params, xt, t, cond, **options)
            told.update(seen)
            return out

        def draw(u, keys, x0):
            xt, t, errors = base(u, keys, x0)
            # The network has told it by the time that its errors are asked for.
            return xt, t, lambda prediction: _uncertain(errors(prediction), left_broadcast(told["uncertainty"], x0))

        return noised(process, kind, draw)(key, listened, params, x0, cond, weights, rows, train)

    return objective


def adaptive(
    process: Gaussian,
    kind: str,
    *,
    error: str = "noise",
    weighting: Weighting | None = None,
    floor: float = 0.01,
) -> Objective:
    """`gaussian(..., measure="log_snr")` under a density of noise levels that learns where the loss varies.

    The loss is the same in expectation whatever the density p (importance sampling), and its second moment, the
    integral of E[f^2] / p for an integrand f, is least for p ∝ sqrt(E[f^2]): the loss-second-moment sampling of Nichol
    & Dhariwal (2021, section 3.3) and the aim of VDM++'s adaptive schedule (Kingma & Gao 2023). Both keep
    running averages of losses; here p is piecewise constant in log-SNR and its logits descend the gradient of the
    second moment, -E[(f / p)^2 grad log p], with the draws at hand and the network's own optimiser (one such as Adam:
    the gradient's size is that of the loss squared). Only they move with it; the loss's value is not changed.

    floor: share of the draws that stays uniform in log-SNR. No weight exceeds 1 / floor times the uniform's.
    params is `{"network": ..., "objective": adaptive_parameters()}`. Raises ValueError for a floor outside (0, 1].
    """
    if not 0 < floor <= 1:
        raise ValueError(f"floor is the share of uniform draws, in (0, 1], got {floor}")
    weighted_errors(process, error, weighting, None)  # a wrong kind is an error now

    def density(logits):
        return densities.binned(process, (1.0 - floor) * jax.nn.softmax(logits) + floor / logits.shape[0])

    def objective(key, apply, params, x0, cond=None, weights=None, rows=None, train=True):
        learned = density(params["objective"]["logits"])
        drawn = density(jax.lax.stop_gradient(params["objective"]["logits"]))
        base = weighted_errors(process, error, weighting, drawn, "log_snr")

        def draw(u, keys, x0):
            xt, t, errors = base(u, keys, x0)
            log_p = jnp.log(learned.pdf(process.schedule.common.log_snr(t)))

            def descending(prediction):
                values = errors(prediction)
                moment = jax.lax.stop_gradient(per_example(values) / sites(x0)) ** 2
                return values - left_broadcast(moment * (log_p - jax.lax.stop_gradient(log_p)), x0)

            return xt, t, descending

        return noised(process, kind, draw)(key, apply, params["network"], x0, cond, weights, rows, train)

    return objective


def adaptive_parameters(bins: int = 64) -> dict[str, Array]:
    """Where the density of `adaptive` begins: uniform in log-SNR."""
    return {"logits": jnp.zeros((bins,))}


__all__ = [
    "adaptive",
    "adaptive_parameters",
    "learned_uncertainty",
    "own_uncertainty",
    "uncertainty",
    "uncertainty_parameters",
]
