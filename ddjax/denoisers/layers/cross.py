"""Attention of sites to a sequence that comes with the example: words, say."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from ddjax.denoisers.layers.attention import WEIGHTS, check_implementation, dot_product_attention
from ddjax.denoisers.layers.basic import DType, Linear, make_norm, zeros
from ddjax.placement import constrain
from ddjax.taps import Below

# The entries of a sequence, and which of them there are (None: all).
Context = tuple[Float[Array, "batch entries context"], Bool[Array, "batch entries"] | None]


class CrossAttention(nnx.Module):
    """Multi-head attention of sites to the entries of a sequence (Chen et al. 2023, PixArt-alpha, section 2.3).

    The output layer starts at zero, so that a new network does not look at the sequence. No biases on q, k, v.
    norm, epsilon: of the sites, as in `layers.Block`. Raises ValueError where heads do not divide the width.
    """

    def __init__(
        self,
        width: int,
        context_width: int,
        heads: int,
        *,
        norm: str = "plain",
        epsilon: float = 1e-6,
        dtype: DType = jnp.float32,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        if heads < 1 or width % heads:
            raise ValueError(f"heads={heads} does not divide width={width}, of the sites that attend to a sequence")
        check_implementation(implementation, dtype, width // heads)
        self.heads, self.implementation = heads, implementation
        self.norm = make_norm(norm, width, epsilon)
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
        q = self.query(self.norm(h)).reshape(batch, sites, self.heads, head)
        k, v = jnp.moveaxis(self.key_value(sequence).reshape(batch, -1, self.heads, 2, head), 3, 0)
        q = constrain(q, "batch", "sites", "heads", None)
        k, v = (constrain(x, "batch", None, "heads", None) for x in (k, v))
        q, k, v = named("/queries", q), named("/keys", k), named("/values", v)
        mask = None if valid is None else valid[:, None]
        y = dot_product_attention(q, k, v, self.implementation, mask, named.asked(WEIGHTS))
        return self.out(y.reshape(batch, sites, width))

    def added(self, x: Float[Array, "batch *sites width"], context: Context, name: str | None) -> Array:
        """A block's sites, or its image, and what they see. name: of the block, below which the taps are "/cross"."""
        below = Below(name and f"{name}/cross")
        y = self(x.reshape(x.shape[0], -1, x.shape[-1]), context, below)
        return x + below("", y.reshape(x.shape))


def no_entry(context_width: int, rngs: nnx.Rngs) -> nnx.Param | None:
    """What sites attend to where there is nothing else (`Given.attended`), learned; None where there is no sequence."""
    if not context_width:
        return None
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), (context_width,), jnp.float32))
