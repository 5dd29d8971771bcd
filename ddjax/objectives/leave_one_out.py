"""Slopes through draws that have none of their own."""

from __future__ import annotations

import jax
from jaxtyping import Array, Float


def leave_one_out(
    losses: Float[Array, "draws batch"], log_probs: Float[Array, "draws batch"]
) -> Float[Array, " batch"]:
    """0, with the slope of E[loss] in the parameters of the law that the draws come from; two draws or more.

    Each draw's loss is compared with the mean of the others': REINFORCE with a baseline that is independent of the
    draw, hence unbiased (Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free").
    """
    draws = losses.shape[0]
    advantage = jax.lax.stop_gradient(losses - losses.mean(0)) * draws / (draws - 1)
    return (advantage * (log_probs - jax.lax.stop_gradient(log_probs))).mean(0)


__all__ = ["leave_one_out"]
