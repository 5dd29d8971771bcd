"""A small optimizer factory: AdamW with warm-up, decay to zero, and clipping."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import optax

from ddjax.types import Params, PyTree

Decay = Literal["cosine", "linear", "constant"]


def learning_rate_schedule(
    learning_rate: float, steps: int, warmup: int = 0, schedule: Decay = "cosine"
) -> optax.Schedule:
    """Rate of update n = 0, 1, ...: linear over `warmup` updates, then decay to 0 at n = `steps`.

    The ramp is `(n + 1) / warmup`, so that the first update is not lost to a rate of zero.
    Raises ValueError for an unknown schedule, or a warm-up outside [0, steps].
    """
    if schedule not in ("cosine", "linear", "constant"):
        raise ValueError(f"unknown schedule {schedule!r}; it is one of cosine, linear, constant")
    if not 0 <= warmup <= steps:
        raise ValueError(f"the warm-up must lie in [0, steps={steps}], got {warmup}")

    def rate(n):
        n = jnp.asarray(n, jnp.result_type(float))
        ramp = jnp.minimum(1.0, (n + 1) / max(warmup, 1))
        done = jnp.clip((n - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        if schedule == "cosine":
            decay = 0.5 * (1 + jnp.cos(jnp.pi * done))
        elif schedule == "linear":
            decay = 1 - done
        else:
            decay = jnp.ones_like(done)
        return learning_rate * ramp * decay

    return rate


def decays(params: Params) -> PyTree:
    """Which parameters weight decay shrinks: those with two axes or more (not biases, scales, scalars)."""
    return jax.tree.map(lambda p: p.ndim >= 2, params)


def adamw(
    learning_rate: float,
    steps: int,
    warmup: int = 0,
    schedule: Decay = "cosine",
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    clip: float | None = None,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) on `learning_rate_schedule`.

    weight_decay: decoupled, times the learning rate; on parameters of two axes or more only.
    clip: bound on the gradient's global norm, applied before Adam's moments; None or 0 for none.
    """
    rate = learning_rate_schedule(learning_rate, steps, warmup, schedule)
    update = optax.adamw(rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=decays)
    return optax.chain(optax.clip_by_global_norm(clip), update) if clip else update
