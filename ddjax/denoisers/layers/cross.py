"""Attention of sites to a sequence that comes with the example: words, say."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from ddjax.denoisers.layers.attention import WEIGHTS, check_implementation, dot_product_attention
from ddjax.denoisers.layers.basic import DType, Linear, layer_norm, zeros
from ddjax.placement import constrain
from ddjax.taps import Below

# The entries of a sequence, and which of them there are (None: all).
Context = tuple[Float[Array, "batch entries context"], Bool[Array, "batch entries"] | None]


class CrossAttention(nnx.Module):
    """Multi-head attention of sites to the entries of a sequence (Chen et al. 2023, PixArt-alpha, section 2.3).

    The output layer starts at zero, so that a new network does not look at the sequence. No biases on q, k, v.
    """

    def __init__(
        self,
        width: int,
        context_width: int,
        heads: int,
        *,
        dtype: DType = jnp.float32,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        check_implementation(implementation, dtype, width // heads)
        self.heads, self.implementation = heads, implementation
        self.query = Linear(width, width, bias=False, dtype=dtype, rngs=rngs)
        self.key_value = Linear(context_width, 2 * width, bias=False, dtype=dtype, rngs=rngs)
        self.out = Linear(width, width, kernel_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(
        self, h: Float[Array, "batch sites width"], context: Context, named: Below = Below()
    ) -> Float[Array, "batch sites width"]:
        """What the sites see; every example needs a valid entry.

        named: taps queries, `(batch, sites, heads, head)`, keys and values of entries, and, where someone asks for
        them, weights, `(batch, heads, sites, entries)`.
        """
        sequence, valid = context
        batch, sites, width = h.shape
        head = width // self.heads
        q = self.query(layer_norm(h)).reshape(batch, sites, self.heads, head)
        k, v = jnp.moveaxis(self.key_value(sequence).reshape(batch, -1, self.heads, 2, head), 3, 0)
        q = constrain(q, "batch", "sites", "heads", None)
        k, v = (constrain(x, "batch", None, "heads", None) for x in (k, v))
        q, k, v = named("/queries", q), named("/keys", k), named("/values", v)
        mask = None if valid is None else valid[:, None]
        y = dot_product_attention(q, k, v, self.implementation, mask, named.asked(WEIGHTS))
        return self.out(y.reshape(batch, sites, width))
