"""GenMD4: the exponents of a masking schedule per symbol, learned with the network.

(Shi et al. 2024, section 6 and appendix I.2.) The exponents change which noisy states are drawn, so the derivative of
the expected loss has a part that goes through the draw. It is estimated with two draws z1, z2 at the same time
(REINFORCE, each the other's baseline):

    d/dw E[l] = E[dl/dw] + E[1/2 (l(z1) - l(z2)) d/dw (log q(z1) - log q(z2))]

There are few exponents to learn and many sites to learn them from, so the second draw, a second call of the network, is
made for a part of the batch only.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddjax import random
from ddjax.grids import range_of
from ddjax.objectives.base import Objective, Reduction
from ddjax.objectives.leave_one_out import leave_one_out
from ddjax.predictions import bind, check_kind
from ddjax.processes import StateMasked
from ddjax.processes.mixture import PerSite, Tokens
from ddjax.symbol_schedules import SymbolPolynomial
from ddjax.types import Rows, Time, left_broadcast, per_example


def genmd4(
    process: StateMasked,
    kind: str = "posterior",
    *,
    t_range: tuple[float, float] | None = None,
    every: int = 8,
) -> Objective:
    """The whole bound, nats per site, as a function of the network's parameters and of the schedule's.

    1 + 1 / every network calls per example. The loss is an unbiased estimate of the bound with the paper's decoder in
    closed form at the low end (`closed_form_reconstruction`), and so is its gradient of the bound's. Metrics:
    "diffusion", the term that `elbo` estimates, and the least and greatest exponent.

    process: `StateMasked` with a `SymbolPolynomial`, whose powers are where learning starts and whose coordinate
        times are drawn in; neither time nor range moves with the learned powers.
    kind: what the network predicts, `"posterior"` in the paper. A cavity does not change with the schedule.
    t_range: times to integrate; default `process.t_range`, (1e-3, 1) for powers of 1.
    every: one example in so many is drawn twice; 1 is the paper's. These are the first of a batch, and the part of the
        gradient that goes through their draws, weighted as the loss is, counts `every` times: averaged over the orders
        of a batch's rows it is that of all of them, whatever the weights. (Rows in an order that means something would
        bias it.) Where `every` does not divide the batch, their greatest common divisor takes its place.

    params is `{"network": ..., "process": process.parameters}`. Train with no weight decay on "process". Sample and
    evaluate with `process.with_parameters(np.asarray(params["process"]))`.
    Raises ValueError for another process, schedule or kind, or `every` below 1.
    """
    if not (isinstance(process, StateMasked) and isinstance(process.schedule, SymbolPolynomial)):
        raise ValueError(f"genmd4 learns the powers of a StateMasked with a SymbolPolynomial, got {process!r}")
    if every < 1:
        raise ValueError(f"one example in `every` is drawn twice: it must be at least 1, got {every}")
    check_kind(kind, process.kinds, process)
    ends = range_of(process, t_range)

    def objective(key, apply, params, x0, cond=None, weights=None, rows=None, train=True):
        rows, reduce = Rows.of(x0, rows), Reduction.of(weights, x0)
        time_key, noise_key, network_key = jax.random.split(key, 3)
        batch, parts = len(x0), math.gcd(every, len(x0), rows.total)
        # Neighbours have neighbouring times. They are dealt out, so that those drawn twice span the whole range.
        dealt = rows.index % (rows.total // parts) * parts + rows.index // (rows.total // parts)
        t, scale = process.time_at(random.stratified(time_key, Rows(dealt, rows.total)), ends)
        learned = process.with_parameters(params["process"])

        def draw(num, *keys):
            """What one noisy draw of each of the first examples costs, and its log-probability."""
            first = jax.tree.map(lambda v: v[:num], (x0, t, scale, cond, weights, *keys))
            x, at, slope, shown, w, noise_keys, network_keys = first
            some, marginal = Reduction.of(w, x), learned.marginal(x, at)
            z = some.shown(learned, marginal.sample(noise_keys))
            rng = network_keys if train else None
            denoise = bind(apply, params["network"], learned, kind, rng=rng, train=train)
            costs = left_broadcast(slope, x) * learned.path_kl(x, denoise(z, at, shown), z, at)
            return some.totals(costs), per_example(marginal.log_prob(z))  # a known site's is the same in both draws

        noise_keys, network_keys = (random.split(random.example_keys(k, rows.index)) for k in (noise_key, network_key))
        # The first rows, not rows here and there: those of microbatches (`split_batch`) are then those of the whole.
        # Over devices they are divided anew, at the price of moving their tokens.
        draws = map(draw, (batch, batch // parts), noise_keys, network_keys)
        diffusion = reduce.mean(drawn_twice(*draws))
        low, high = (jnp.full(x0.shape[:1], end, t.dtype) for end in ends)
        loss = diffusion + reduce(closed_form_reconstruction(learned, x0, low) + learned.prior_kl(x0, high))
        powers = learned.schedule.powers
        return loss, {"loss": loss, "diffusion": diffusion, "least_power": powers.min(), "greatest_power": powers.max()}

    return objective


def drawn_twice(
    first: tuple[Float[Array, " batch"], Float[Array, " batch"]],
    second: tuple[Float[Array, " some"], Float[Array, " some"]],
) -> Float[Array, " batch"]:
    """Losses, of examples drawn twice the mean of both, with the gradient also through the draws' distribution.

    Each draw is (loss, log-probability), the second of the first examples alone; their gradients through the draws
    stand for those of all (Shi et al. 2024, appendix I.2).
    """
    some = len(second[0])
    losses, log_probs = (jnp.stack([a[:some], b]) for a, b in zip(first, second, strict=True))
    through_draws = len(first[0]) / some * leave_one_out(losses, log_probs)
    return jnp.concatenate([losses.mean(0) + through_draws, first[0][some:]])


def closed_form_reconstruction(process: StateMasked, x0: Tokens, t: Time) -> PerSite:
    """E[-log p(x_0 | x_t)] for the decoder that takes a mask to v with probability ∝ sigma_v(t), nats per site.

    (Shi et al. 2024's code.) That is the posterior of a uniform cavity; a revealed site costs nothing.
    """
    every = process.schedule.log_sigma(left_broadcast(t, x0, 1), jnp.arange(process.num_symbols))
    t = left_broadcast(t, x0)
    nats = jax.nn.logsumexp(every, axis=-1) - process.schedule.log_sigma(t, x0)
    return process.schedule.sigma(t, x0) * nats


__all__ = ["closed_form_reconstruction", "drawn_twice", "genmd4"]
