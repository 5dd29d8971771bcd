"""What a network is told, as tokens beside those of the state."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ddjax.denoisers.given import Given
from ddjax.denoisers.layers.basic import Linear
from ddjax.denoisers.layers.embed import check_labels, check_time, check_vector, lookup, time_embedding


class ConditionTokens(nnx.Module):
    """The label and the time as tokens of `width` numbers, in this order, in float32 (Bao et al. 2023, section 3).

    A network without labels, or without time, has no token for them: `count` says how many there are. The label's table
    has `num_classes + 1` rows, the last the null label; the time's token are sines and cosines of 1000 t.

    vector: numbers of a vector that is a condition, by a linear layer a token behind these; zeros: none. 0: no vector.
    mlp: whether two layers, the first four times as wide, follow them.
    context: entries and width of a sequence (embedded words, say), each a token more by a linear layer. An entry that
        there is not, or all of none, are a learned vector. None: no sequence.
    """

    def __init__(
        self,
        width: int,
        *,
        num_classes: int,
        time: bool,
        vector: int = 0,
        mlp: bool = False,
        context: tuple[int, int] | None = None,
        rngs: nnx.Rngs,
    ):
        if time and width % 2:
            raise ValueError(f"width={width}: sines and cosines of the time need an even number")
        if num_classes < 0:
            raise ValueError(f"num_classes={num_classes}: expected 0 (no labels) or more")
        self.width, self.num_classes, self.time = width, num_classes, time
        self.count = int(num_classes > 0) + int(time) + int(vector > 0)
        rows = (num_classes + 1, width)
        self.labels = nnx.Param(0.02 * jax.random.normal(rngs.params(), rows, jnp.float32)) if num_classes else None
        self.time_in = Linear(width, 4 * width, rngs=rngs) if time and mlp else None
        self.time_out = Linear(4 * width, width, rngs=rngs) if time and mlp else None
        self.entries, features = context or (0, 0)
        self.count += self.entries
        self.context = Linear(features, width, rngs=rngs) if features else None
        nothing = lambda: 0.02 * jax.random.normal(rngs.params(), (features,), jnp.float32)  # noqa: E731
        self.nothing = nnx.Param(nothing()) if features else None
        self.vector_in = Linear(vector, width, rngs=rngs) if vector else None

    def __call__(self, batch: int, t: Array | None, cond: Any) -> Float[Array, "batch count width"]:
        """Of each example. `t` is `()` or `(batch,)`; `cond` int `(batch,)`, None (null), or `Given`'s dict."""
        given = Given.of(cond)
        taken = ("vector",) * (self.vector_in is not None), ("sequence", "valid") * (self.context is not None)
        given.check_taken(*taken[0], *taken[1])
        labels, told = check_labels(given.cond, self.num_classes, batch), []
        if self.labels is not None:
            told.append(lookup(self.labels[...], labels))
        if self.time:
            token = time_embedding(check_time(t, batch, None), self.width)
            if self.time_in is not None:
                token = self.time_out(jax.nn.silu(self.time_in(token)))
            told.append(token)
        if self.vector_in is not None:
            told.append(self.vector_in(check_vector(given.vector, batch, self.vector_in.kernel.shape[0])))
        told = jnp.stack(told, axis=1) if told else jnp.zeros((batch, 0, self.width), jnp.float32)
        if self.context is None:
            return told
        words = self.context(self._there(given.sequence, given.valid, batch))
        return jnp.concatenate([told, words], axis=1)

    def vector(self, told: Float[Array, "batch count width"]) -> Float[Array, "batch width"]:
        """All that is told as one vector, `silu(label + time + vector + the mean of the sequence)`."""
        first = self.count - self.entries
        total = told[:, :first].sum(axis=1)
        return jax.nn.silu(total + told[:, first:].mean(axis=1) if self.entries else total)

    def _there(self, sequence: Array | None, valid: Array | None, batch: int) -> Float[Array, "batch entries context"]:
        """The sequence, with the learned vector where there is no entry. Raises ValueError for another shape."""
        shape = (batch, self.entries, len(self.nothing))
        if sequence is None:
            if valid is not None:
                raise ValueError('cond["valid"] says which entries of a sequence there are: give cond["sequence"] too')
            return jnp.broadcast_to(self.nothing[...], shape)
        if sequence.shape != shape:
            raise ValueError(f'cond["sequence"] has shape {sequence.shape}; expected {shape}')
        if valid is None:
            return sequence
        if valid.shape != shape[:2] or valid.dtype != jnp.bool_:
            raise ValueError(f'cond["valid"] has shape {valid.shape}, {valid.dtype}; expected bool {shape[:2]}')
        return jnp.where(valid[..., None], sequence, self.nothing[...].astype(sequence.dtype))
