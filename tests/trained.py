"""Objectives whose expectation is a bound's diffusion term: their own loss, expected by enumeration and quadrature.

With the two ends of the bound added, which `by_definition` knows, it must be the entropy with the exact denoiser and
dearer by the exact KL with a wrong one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import enumerated
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_definition import tanh_sinh
from enumerated import LAW
from pairs import CHAINS, CONTINUOUS, Pair, by_definition, denoiser, exact_gap, named, process_of

from ddjax import objectives, random
from ddjax.fixtures.categorical import all_states
from ddjax.objectives import base


@dataclasses.dataclass(frozen=True)
class Trained:
    """An objective, and the pair whose bound it trains. make: (process, kind, times) -> objective.

    free: the network's ratios are moved themselves, and are then those of no distribution.
    """

    name: str
    pair: Pair
    make: Callable[[Any, str, Any], Any] = dataclasses.field(repr=False)
    free: bool = False

    def __str__(self):
        return f"{self.name}-{self.pair}{'-free' if self.free else ''}"


ELBO = lambda process, kind, ends: objectives.elbo(process, kind, t_range=ends)
ON_GRID = lambda process, kind, times: objectives.elbo(process, kind, times=times)
SCORE = lambda process, kind, ends: objectives.score_entropy(process, kind, t_range=ends)
FLOW = lambda flow, kind, ends: objectives.generalised_kl(flow.process, kind, t_range=ends)
ANY_ORDER = lambda process, kind, _: objectives.any_order(process, kind)
D3PM = lambda process, kind, times: objectives.d3pm_hybrid(process, kind, times=times, ce_weight=0.0)
OBJECTIVES = [
    Trained("elbo", named("Masked", "posterior", CONTINUOUS), ELBO),
    Trained("elbo", named("Uniform, t^2", "cavity", CONTINUOUS), ELBO),
    Trained("score_entropy", named("Uniform, t^2", "ratio", CONTINUOUS), SCORE, free=True),
    Trained("any_order", dataclasses.replace(named("Masked", "posterior", CONTINUOUS), low=0.0), ANY_ORDER),
    Trained("d3pm_hybrid, ce_weight=0", named("Uniform, cosine", "posterior", CHAINS), D3PM),
    Trained("score_entropy", named("Masked", "ratio", CONTINUOUS), SCORE, free=True),
    Trained("generalised_kl", named("Masked", "posterior", CONTINUOUS[-2:]), FLOW),
    Trained("elbo", named("Hybrid", "cavity", CONTINUOUS), ELBO),
    Trained("elbo", named("Marginal", "posterior", CONTINUOUS), ELBO),
    Trained("score_entropy", named("Hybrid", "ratio", CONTINUOUS), SCORE, free=True),
    Trained("score_entropy", named("Uniform, t^2", "cavity", CONTINUOUS), SCORE),
    Trained("generalised_kl", named("Masked", "velocity", CONTINUOUS[-2:]), FLOW),
    Trained("elbo, times", named("Uniform, cosine", "ratio", CHAINS), ON_GRID),
    Trained("elbo, times", named("Masked", "cavity", CHAINS), ON_GRID),
    Trained("d3pm_hybrid, ce_weight=0", named("Masked", "cavity", CHAINS), D3PM),
]


def expected_loss(row, wrong):
    """An objective's loss, expected over its own draws by enumeration and quadrature, nats per example."""
    pair, process = row.pair, process_of(row.pair, LAW)
    network = denoiser(pair, LAW, 0.0 if row.free else wrong)
    noisy = jnp.asarray(all_states(LAW.sites, process.num_states))
    change = wrong * jnp.asarray(free_change(process.num_states)) if row.free else 0.0
    params = lambda t: network(noisy, jnp.full(len(noisy), t)).value + (1 - t) * change
    if row.name == "any_order":
        return np.mean([_any_order(row, params(0.5), u, order) for u in (0.25, 0.75) for order in ((0, 1), (1, 0))])
    if pair.times is not None:
        objective, steps = row.make(process, pair.kind, pair.times), len(pair.times) - 1
        return np.mean([loss_at(objective, process, params(pair.times[i]), (i + 0.5) / steps) for i in range(steps)])
    ends = pair.low, 1.0
    objective = row.make(process, pair.kind, ends)
    nodes, weights = np.array(list(tanh_sinh([0.0, 1.0]))).T
    at = lambda u: loss_at(objective, process, params(process.time_at(u, ends)[0]), u)
    return float(weights @ jax.jit(lambda u: jax.lax.map(at, u))(nodes))


def loss_at(objective, process, params, u):
    """The expectation over pairs at the uniform u."""
    losses, p, *_ = enumerated.pairs(objective, process, params, jnp.asarray(u))
    return jnp.where(p > 0, p * losses, 0.0).sum()


def _any_order(row, params, u, order):
    process, clean = process_of(row.pair, LAW), LAW.configurations
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random, "stratified", lambda key, rows: jnp.full(len(rows.index), u))
        patch.setattr(jax.random, "permutation", lambda key, count: jnp.asarray(order))
        patch.setattr(base, "weighted_mean", lambda values, weights: values)
        objective = row.make(process, row.pair.kind, None)
        run = jax.jit(lambda p: objective(jax.random.key(0), enumerated.network(process), p, clean, train=False)[0])
        return float(jnp.exp(LAW.log_p) @ run(params)) * LAW.sites


def free_change(states):
    """What, times 1 - t, is added to log ratios, `(configurations, sites, states)`; at t = 1 rates are infinite."""
    return np.random.default_rng(4).normal(size=(states**2, 2, states))


def trained_gap(row, wrong):
    """The loss with both ends by definition added, less the entropy: that of the bound, if the loss is its."""
    pair = row.pair
    low, ends = pair.low, by_definition(pair, LAW, 0.0 if row.free else wrong)
    if pair.times is not None:
        prior, decoder = ends.ends_given_data(0.0, pair.times[0])[0], 0.0  # the last step is the decoder
    else:
        prior, decoder = ends.ends_given_data(low)
    return expected_loss(row, wrong) + prior + decoder - LAW.entropy


def exact_trained_gap(row, wrong):
    """What that gap is by definition."""
    if not row.free:
        return exact_gap(row.pair, LAW, wrong, row.pair.low)
    exact = by_definition(row.pair, LAW, 0.0)
    change = wrong * free_change(exact.states)
    return exact.gap(row.pair.low, ratios=lambda t: np.exp((1 - t) * change) * exact.true_ratios(t))
