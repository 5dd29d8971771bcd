"""Attention whose cost grows with the number of sites, not with its square."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ddjax.denoisers.layers.attention import Layout
from ddjax.denoisers.layers.basic import DType, Linear, at_least_float32
from ddjax.denoisers.layers.convolution import Conv
from ddjax.placement import constrain

EPSILON = 1e-6


class LinearAttention(nnx.Module):
    """Simplified linear attention of an image's patches (Wang et al. 2025, "LiT", arXiv:2501.12976, section 3).

    `f(q) mean(f(k)' v) / (f(q) mean(f(k))' + 1e-6)` with f = relu + 1e-6, and beside it a depthwise convolution of the
    values over the grid of patches, the same for all heads (their code: its channels are those of a head). Few heads
    are better than many, and cost as much (guideline 2: 2 for a DiT-S, 4 for a DiT-XL). The layers are named and
    ordered as in `Attention`.

    grid: rows and columns of patches. kernel: side of the convolution.
    Raises ValueError where heads do not divide the width, or for a grid that is no image's.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        grid: tuple[int, int],
        *,
        kernel: int = 5,
        dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if heads < 1 or width % heads:
            raise ValueError(f"heads={heads} does not divide width={width}")
        if len(grid) != 2:
            raise ValueError(f"attention='linear' is for images: its patches lie in rows and columns, not in {grid}")
        self.heads, self.grid = heads, tuple(grid)
        self.qkv = Linear(width, 3 * width, bias=False, dtype=dtype, rngs=rngs)
        self.local = Conv(width // heads, width // heads, kernel, groups=width // heads, dtype=dtype, rngs=rngs)
        self.out = Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch sites width"],
        layout: Layout | None = None,
        named: Callable[[str, Array], Array] = lambda point, x: x,
    ) -> Float[Array, "batch sites width"]:
        """Every site attends to every site. Raises ValueError for a layout.

        named: taps queries, keys and values, `(batch, sites, heads, head)`; no map of pairs of sites is ever made.
        """
        if layout is not None:
            raise ValueError("attention='linear' sees all patches: no groups, relations, past or routes of patches")
        batch, sites, width = x.shape
        qkv = constrain(self.qkv(x), "batch", "sites", "heads").reshape(batch, sites, self.heads, 3, -1)
        q, k, v = (qkv[..., i, :] for i in range(3))
        q, k, v = named("/queries", q), named("/keys", k), named("/values", v)
        sums = at_least_float32(x.dtype)
        q, k = (jax.nn.relu(y).astype(sums) + EPSILON for y in (q, k))
        memory = jnp.einsum("bnhd,bnhe->bhde", k, v.astype(sums)) / sites
        y = jnp.einsum("bnhd,bhde->bnhe", q, memory)
        y = y / (jnp.einsum("bnhd,bhd->bnh", q, k.mean(axis=1)) + EPSILON)[..., None]
        images = jnp.moveaxis(v, 2, 1).reshape(batch * self.heads, *self.grid, -1)
        beside = jnp.moveaxis(self.local(images).reshape(batch, self.heads, sites, -1), 1, 2)
        return self.out((y + beside).reshape(batch, sites, width))
