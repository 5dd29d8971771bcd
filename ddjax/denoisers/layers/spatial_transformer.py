"""A transformer of an image's pixels in the place of attention among them, as latent diffusion has it."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ddjax.denoisers.layers.basic import DType, Linear, zeros
from ddjax.denoisers.layers.blocks import Block
from ddjax.denoisers.layers.convolution import GroupNorm, Image
from ddjax.denoisers.layers.cross import Context
from ddjax.taps import Below


class SpatialTransformer(nnx.Module):
    """Latent diffusion's whole block (Rombach et al. 2022, appendix E.2.1; `SpatialTransformer` of their code).

    A norm and a linear layer of each pixel; `depth` transformer blocks, each attention among the pixels, attention to a
    sequence and a GEGLU four times as wide, behind layer norms with scale and shift; and a linear layer, which starts
    at zero. It takes the place of `SpatialAttention` in a `ResBlock`.

    heads: of both attentions. context_width: of the entries of the sequence; 0: there is none. norm: makes the first
    norm, whose epsilon is 1e-6.
    """

    def __init__(
        self,
        features: int,
        heads: int,
        *,
        depth: int = 1,
        context_width: int = 0,
        norm: Callable[..., GroupNorm] = GroupNorm,
        dtype: DType = jnp.float32,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        self.heads = heads
        self.norm = norm(features, epsilon=1e-6)
        self.embed = Linear(features, features, dtype=dtype, rngs=rngs)
        block = lambda: Block(  # noqa: E731
            features, heads, mlp="geglu", mlp_width=4 * features, cond_width=0, norm="affine", epsilon=1e-5,
            context_width=context_width, dtype=dtype, attention=implementation, rngs=rngs,
        )  # fmt: skip
        self.blocks = nnx.List([block() for _ in range(depth)])
        self.out = Linear(features, features, kernel_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Image,
        c: Float[Array, "batch cond"] | None = None,
        named: Below = Below(),
        context: Context | None = None,
    ) -> Image:
        """The branch, to be added to x. c: for the norm. named: taps "/block/i" and below. context: the sequence."""
        h = self.embed(self.norm(x, c).reshape(len(x), -1, x.shape[-1]))
        for i, block in enumerate(self.blocks):
            h = block(h, None, name=named.prefix and f"{named.prefix}/block/{i}", context=context)
        return self.out(h).reshape(x.shape)
