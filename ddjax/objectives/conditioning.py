"""What is done to conditions in training: dropout and perturbation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from ddjax import random
from ddjax.categorical import bernoulli
from ddjax.nulls import nullified
from ddjax.objectives.base import Objective
from ddjax.types import Rows, batch_size, left_broadcast


def with_condition_dropout(objective: Objective, rate: float | Mapping[str, float], null: Any) -> Objective:
    """Replace an example's condition by `null` with probability `rate` while training.

    (Ho & Salimans 2022, "Classifier-free diffusion guidance", algorithm 1.)

    rate: of the whole condition at once; or of entries by name, each dropped by itself (Liu et al. 2022, Brooks et al.
        2023: guidance of several conditions). For both put one around the other.
    null: the condition that means "none", a pytree like one example's `cond` (for class labels: the integer
        num_classes). Of a dict with an entry "cond", what an objective is given and the network is not (`paired`,
        `ambient`), that entry is the condition. Or a dict of nulls by the names of entries, "cond" for the labels
        (`denoisers.nulls`); what it does not name is never dropped.
    Raises ValueError for a rate outside [0, 1], or of an entry for which there is no null.
    """
    rates = rate if isinstance(rate, Mapping) else {"": rate}
    if any(not 0.0 <= r <= 1.0 for r in rates.values()):
        raise ValueError(f"the rate of condition dropout is a probability, got {rate}")
    if rates is rate and (not isinstance(null, Mapping) or rates.keys() - null.keys()):
        raise ValueError(f"the rates {dict(rate)} are of entries by name: give a null for each, not null={null}")

    def dropped(key, apply, params, x0, cond=None, weights=None, rows=None, train=True):
        if cond is not None and train and any(r > 0 for r in rates.values()):
            key, drop_key = jax.random.split(key)
            keys = random.example_keys(drop_key, Rows.of(x0, rows).index)
            for i, name in enumerate(sorted(rates)):
                own = random.fold_in(keys, i) if name else keys
                drop = bernoulli(own, jnp.full((batch_size(x0),), rates[name]))
                cond = nullified(cond, {name: null[name]} if name else null, partial(_where, drop))
        return objective(key, apply, params, x0, cond, weights, rows, train)

    return dropped


def _where(drop: Bool[Array, " batch"], value: Array, null: Any) -> Array:
    return jnp.where(left_broadcast(drop, value), jnp.asarray(null, value.dtype), value)


def with_condition_noise(objective: Objective, gamma: float = 1.0) -> Objective:
    """Add N(0, gamma^2 / d) to the floats of the condition while training, d the length of their last axis.

    (Chen et al. 2024, "Slight corruption in pre-training data makes better diffusion models": CEP.) An
    embedding of unit-sized entries is so moved by about gamma, however long it is. For conditions that come as
    embeddings; labels are left as they are (a network that embeds them perturbs them itself: `DiT(label_noise=)`).
    Raises ValueError for a negative gamma, or (when called) a condition without floats.
    """
    if not gamma >= 0:
        raise ValueError(f"gamma must not be negative, got {gamma}")

    def perturbed(key, apply, params, x0, cond=None, weights=None, rows=None, train=True):
        if cond is not None and train and gamma > 0:
            key, noise_key = jax.random.split(key)
            rows = Rows.of(x0, rows)
            leaves, tree = jax.tree.flatten(cond)
            floats = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim > 1]
            if not floats:
                raise ValueError("with_condition_noise needs a condition with embeddings, floats (batch, ..., d)")
            for i in floats:
                keys = random.example_keys(jax.random.fold_in(noise_key, i), rows.index)
                noise = random.normal(keys, leaves[i].shape[1:], leaves[i].dtype)
                leaves[i] = leaves[i] + gamma / math.sqrt(leaves[i].shape[-1]) * noise
            cond = jax.tree.unflatten(tree, leaves)
        return objective(key, apply, params, x0, cond, weights, rows, train)

    return perturbed
