"""What a network is told, as tokens beside those of the state."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ddjax.denoisers.layers.basic import Linear
from ddjax.denoisers.layers.embed import check_labels, check_time, lookup, time_embedding


class ConditionTokens(nnx.Module):
    """The label and the time as tokens of `width` numbers, in this order, in float32 (Bao et al. 2023, section 3).

    A network without labels, or without time, has no token for them: `count` says how many there are. The label's table
    has `num_classes + 1` rows, the last the null label; the time's token are sines and cosines of 1000 t.

    mlp: whether two layers, the first four times as wide, follow them.
    """

    def __init__(self, width: int, *, num_classes: int, time: bool, mlp: bool = False, rngs: nnx.Rngs):
        if time and width % 2:
            raise ValueError(f"width={width}: sines and cosines of the time need an even number")
        if num_classes < 0:
            raise ValueError(f"num_classes={num_classes}: expected 0 (no labels) or more")
        self.width, self.num_classes, self.time = width, num_classes, time
        self.count = int(num_classes > 0) + int(time)
        rows = (num_classes + 1, width)
        self.labels = nnx.Param(0.02 * jax.random.normal(rngs.params(), rows, jnp.float32)) if num_classes else None
        self.time_in = Linear(width, 4 * width, rngs=rngs) if time and mlp else None
        self.time_out = Linear(4 * width, width, rngs=rngs) if time and mlp else None

    def __call__(
        self, batch: int, t: Array | None, cond: Int[Array, " batch"] | None
    ) -> Float[Array, "batch count width"]:
        """Of each example. `t` is `()` or `(batch,)`; `cond` int `(batch,)` or None (null)."""
        labels, told = check_labels(cond, self.num_classes, batch), []
        if self.labels is not None:
            told.append(lookup(self.labels[...], labels))
        if self.time:
            token = time_embedding(check_time(t, batch, None), self.width)
            if self.time_in is not None:
                token = self.time_out(jax.nn.silu(self.time_in(token)))
            told.append(token)
        return jnp.stack(told, axis=1) if told else jnp.zeros((batch, 0, self.width), jnp.float32)
