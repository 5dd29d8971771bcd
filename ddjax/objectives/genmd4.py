"""GenMD4: the exponents of a masking schedule per symbol, learned with the network.

(Shi et al. 2024, section 6 and appendix I.2.) The exponents change which noisy states are drawn, so the derivative of
the expected loss has a part that goes through the draw. It is estimated with two draws z1, z2 at the same time
(REINFORCE, each the other's baseline):

    d/dw E[l] = E[dl/dw] + E[1/2 (l(z1) - l(z2)) d/dw (log q(z1) - log q(z2))]
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddjax import random
from ddjax.grids import range_of
from ddjax.objectives.base import Objective, Reduction
from ddjax.predictions import bind, check_kind
from ddjax.processes import StateMasked
from ddjax.processes.mixture import PerSite, Tokens
from ddjax.symbol_schedules import SymbolPolynomial
from ddjax.types import Rows, Time, left_broadcast, per_example


def genmd4(process: StateMasked, kind: str = "posterior", *, t_range: tuple[float, float] | None = None) -> Objective:
    """The whole bound, nats per site, as a function of the network's parameters and of the schedule's.

    Two network calls per example. The loss is an unbiased estimate of the bound with the paper's decoder in closed
    form at the low end (`closed_form_reconstruction`), and so is its gradient of the bound's. Metrics: "diffusion",
    the term that `elbo` estimates, and the least and greatest exponent.

    process: `StateMasked` with a `SymbolPolynomial`, whose powers are where learning starts and whose coordinate
        times are drawn in; neither time nor range moves with the learned powers.
    kind: what the network predicts, `"posterior"` in the paper. A cavity does not change with the schedule.
    t_range: times to integrate; default `process.t_range`, (1e-3, 1) for powers of 1.

    params is `{"network": ..., "process": process.parameters}`. Train with no weight decay on "process". Sample and
    evaluate with `process.with_parameters(np.asarray(params["process"]))`.
    Raises ValueError for another process, schedule or kind.
    """
    if not (isinstance(process, StateMasked) and isinstance(process.schedule, SymbolPolynomial)):
        raise ValueError(f"genmd4 learns the powers of a StateMasked with a SymbolPolynomial, got {process!r}")
    check_kind(kind, process.kinds, process)
    ends = range_of(process, t_range)

    def objective(key, apply, params, x0, cond=None, weights=None, rows=None, train=True):
        rows, reduce = Rows.of(x0, rows), Reduction.of(weights, x0)
        time_key, noise_key, network_key = jax.random.split(key, 3)
        t, scale = process.time_at(random.stratified(time_key, rows), ends)
        learned = process.with_parameters(params["process"])
        marginal = learned.marginal(x0, t)

        def draw(noise_keys, network_keys):
            """What one noisy draw costs, and its log-probability."""
            z = reduce.shown(learned, marginal.sample(noise_keys))
            rng = network_keys if train else None
            denoise = bind(apply, params["network"], learned, kind, rng=rng, train=train)
            costs = left_broadcast(scale, x0) * learned.path_kl(x0, denoise(z, t, cond), z, t)
            return reduce.totals(costs), per_example(marginal.log_prob(z))  # a known site's is the same in both draws

        noise_keys, network_keys = (random.split(random.example_keys(k, rows.index)) for k in (noise_key, network_key))
        diffusion = reduce.mean(leave_one_out(*(draw(*keys) for keys in zip(noise_keys, network_keys, strict=True))))
        low, high = (jnp.full(x0.shape[:1], end, t.dtype) for end in ends)
        loss = diffusion + reduce(closed_form_reconstruction(learned, x0, low) + learned.prior_kl(x0, high))
        powers = learned.schedule.powers
        return loss, {"loss": loss, "diffusion": diffusion, "least_power": powers.min(), "greatest_power": powers.max()}

    return objective


def leave_one_out(
    first: tuple[Float[Array, " batch"], Float[Array, " batch"]],
    second: tuple[Float[Array, " batch"], Float[Array, " batch"]],
) -> Float[Array, " batch"]:
    """The mean of two draws' losses, with the gradient of their expectation also through the draws' distribution.

    Each draw is (loss, log-probability). (Shi et al. 2024, appendix I.2; Kool et al. 2019, "Buy 4 REINFORCE samples,
    get a baseline for free".)
    """
    (loss, log_q), (other_loss, other_log_q) = first, second
    through_draws = 0.5 * jax.lax.stop_gradient(loss - other_loss) * (log_q - other_log_q)
    return 0.5 * (loss + other_loss) + through_draws - jax.lax.stop_gradient(through_draws)


def closed_form_reconstruction(process: StateMasked, x0: Tokens, t: Time) -> PerSite:
    """E[-log p(x_0 | x_t)] for the decoder that takes a mask to v with probability ∝ sigma_v(t), nats per site.

    (Shi et al. 2024's code.) That is the posterior of a uniform cavity; a revealed site costs nothing.
    """
    every = process.schedule.log_sigma(left_broadcast(t, x0, 1), jnp.arange(process.num_symbols))
    t = left_broadcast(t, x0)
    nats = jax.nn.logsumexp(every, axis=-1) - process.schedule.log_sigma(t, x0)
    return process.schedule.sigma(t, x0) * nats


__all__ = ["closed_form_reconstruction", "genmd4", "leave_one_out"]
