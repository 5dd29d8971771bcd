"""Condition dropout: one network learns the conditional and the unconditional law, for classifier-free guidance."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ddjax import random
from ddjax.categorical import bernoulli
from ddjax.objectives.base import Objective
from ddjax.types import Rows, left_broadcast


def with_condition_dropout(objective: Objective, rate: float, null: Any) -> Objective:
    """Replace an example's condition by `null` with probability `rate` while training.

    (Ho & Salimans 2022, "Classifier-free diffusion guidance", algorithm 1.)

    null: the condition that means "none", a pytree like one example's `cond` (for class labels: the integer
        num_classes).
    Raises ValueError for a rate outside [0, 1].
    """
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"the rate of condition dropout is a probability, got {rate}")

    def dropped(key, apply, params, x0, cond=None, weights=None, rows=None, train=True):
        if cond is not None and train and rate > 0:
            key, drop_key = jax.random.split(key)
            rows = Rows.all(x0.shape[0]) if rows is None else rows
            drop = bernoulli(random.example_keys(drop_key, rows.index), jnp.full((x0.shape[0],), rate))
            cond = jax.tree.map(lambda c, n: jnp.where(left_broadcast(drop, c), jnp.asarray(n, c.dtype), c), cond, null)
        return objective(key, apply, params, x0, cond, weights, rows, train)

    return dropped
