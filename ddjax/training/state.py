"""The state of training: one pytree of arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key

from ddjax.training.watch import Losses
from ddjax.types import Params, PyTree


class TrainState(NamedTuple):
    """All that a training step reads and writes, and all that a checkpoint of it must hold.

    step: () int32, the number of optimizer updates made.
    params: nested plain dict of arrays.
    ema: like `params`, their exponential moving average. Never shares a buffer with `params`.
    opt_state: optax's own state.
    key: typed PRNG key, constant through training; step n draws from `fold_in(key, n)`.
    losses: what is remembered of them, to know a spike.
    """

    step: Int[Array, ""]
    params: Params
    ema: Params
    opt_state: PyTree
    key: Key[Array, ""]
    losses: Losses


def init_state(
    init: Callable[[jax.Array], Params], optimizer: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    """The state before the first step. Pure, so it may run under `jax.jit` and `jax.eval_shape`.

    init: `init(key) -> params`. To start from existing parameters give `lambda key: params`; they are copied.
    optimizer: the optax optimizer that `make_train_step` will be given.
    key: typed `jax.random.key`; split into the parameters' key and the training's.
    """
    init_key, train_key = jax.random.split(key)
    # Copies, because the step donates the state: a buffer shared between params and EMA would be donated
    # twice (a crash), and one shared with the caller's network would be deleted under it.
    params = jax.tree.map(jnp.copy, init(init_key))
    ema = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema, optimizer.init(params), train_key, Losses.none())
