"""Attention of square blocks of patches to those before them that touch, and to a low-resolution image around them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ddjax.denoisers.layers.attention import WEIGHTS, check_implementation, dot_product_attention, rope_2d
from ddjax.denoisers.layers.basic import DType, LayerNorm, Linear, zeros
from ddjax.placement import constrain
from ddjax.taps import Below

BEFORE = ((0, 0), (1, 1), (0, 1), (1, 0))  # rows and columns from a block to itself, and to the three that it sees

# Keys and values of one block, (2, batch, patches, heads, head), or of the three before it, (2, 3, batch, ...).
KeysValues = Float[Array, "2 *three batch patches heads head"]


class BlockAttention(nnx.Module):
    """Unidirectional block attention (Yang et al. 2024, Inf-DiT, section 3.2; THUDM/Inf-DiT, dit/model.py).

    Patches attend to their own block and to those to the left, above, and above to the left of it, as far as there are
    such. Queries and keys are normalised in each head and rotated by row (half of a head's features) and column (the
    other half); to the keys a learned vector of each of the four directions is added.

    Patches are ordered block by block (row by row of blocks), and row by row within each.

    Raises ValueError where heads do not divide the width, or a head's features not into four.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        block: int,
        *,
        dtype: DType = jnp.float32,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        if heads < 1 or width % heads or width // heads % 4:
            raise ValueError(f"heads={heads}: expected to divide width={width} into heads of a multiple of 4 features")
        head = width // heads
        check_implementation(implementation, dtype, head)
        self.heads, self.block, self.implementation, self.dtype = heads, block, implementation, jnp.dtype(dtype)
        self.qkv = Linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.query_norm, self.key_norm = LayerNorm(head), LayerNorm(head)
        self.direction = nnx.Param(jnp.zeros((4, heads, head), jnp.float32))
        self.out = Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch sites width"], grid: tuple[int, int], named: Below = Below()
    ) -> Float[Array, "batch sites width"]:
        """Of all blocks at once, `grid` of them.

        named: taps queries, keys (of the sites, without a direction) and values, `(batch, sites, heads, head)`, and,
        where someone asks for them, weights, `(batch * blocks, heads, patches, 4 * patches)`: of each block's patches
        on those of the block itself, of the one above and to the left, of the one to the left, and of the one above.
        """
        batch, sites, width = x.shape
        own = jnp.arange(grid[0] * grid[1])
        q, k, v = self._own(x, *self._within(own // grid[1], own % grid[1]))
        q, k, v = named("/queries", q), named("/keys", k), named("/values", v)
        shape = (batch, *grid, self.block**2, self.heads, width // self.heads)
        k, v = (jnp.stack([_moved(y.reshape(shape), *by) for by in BEFORE], axis=3) for y in (k, v))
        seen = jnp.stack([_inside(grid, *by) for by in BEFORE], axis=-1)
        blocks = lambda y: y.reshape(-1, *y.shape[3:])  # noqa: E731
        seen = jnp.tile(seen.reshape(-1, 4), (batch, 1))
        y = self._attend(blocks(q.reshape(shape)), blocks(k), blocks(v), seen, named)
        return self.out(constrain(y.reshape(batch, sites, width), "batch", "sites", None))

    def behind(
        self, x: Float[Array, "batch patches width"], at: tuple[Array, Array], past: KeysValues, seen: Bool[Array, " 4"]
    ) -> tuple[Float[Array, "batch patches width"], KeysValues]:
        """Of one block, in that row and column of blocks, behind the three before it; and its own keys and values."""
        batch, patches, width = x.shape
        q, k, v = self._own(x, *self._within(*at))
        k, v = k.astype(self.dtype), v.astype(self.dtype)
        keys, values = (
            jnp.concatenate([own[:, None], jnp.moveaxis(old, 0, 1)], axis=1)
            for own, old in zip((k, v), past, strict=True)
        )
        y = self._attend(q, keys, values, jnp.broadcast_to(seen, (batch, 4)))
        return self.out(y.reshape(batch, patches, width)), jnp.stack([k, v])

    def _within(self, row: Array, column: Array) -> tuple[Int[Array, " sites"], Int[Array, " sites"]]:
        """Rows and columns of the patches of blocks."""
        inner = jnp.arange(self.block**2)
        places = (
            jnp.asarray(where)[..., None] * self.block + part
            for where, part in ((row, inner // self.block), (column, inner % self.block))
        )
        return tuple(place.reshape(-1) for place in places)

    def _own(self, x: Array, rows: Array, columns: Array) -> tuple[Array, Array, Array]:
        batch, sites, width = x.shape
        qkv = self.qkv(x).reshape(batch, sites, self.heads, 3, width // self.heads)
        q, k, v = (qkv[..., i, :] for i in range(3))
        q, k = (rope_2d(norm(y), rows, columns) for norm, y in ((self.query_norm, q), (self.key_norm, k)))
        return q.astype(self.dtype), k.astype(self.dtype), v

    def _attend(
        self, q: Array, k: Array, v: Array, seen: Bool[Array, "blocks 4"], named: Below = Below()
    ) -> Float[Array, "blocks patches heads head"]:
        """q: `(blocks, patches, heads, head)`; k, v: `(blocks, 4, patches, heads, head)`."""
        k = k + self.direction[...][:, None].astype(k.dtype)
        k, v = (y.reshape(y.shape[0], -1, *y.shape[3:]) for y in (k, v))
        mask = jnp.repeat(seen, self.block**2, axis=-1)[:, None, None]
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], q.shape[1], mask.shape[-1]))
        return dot_product_attention(q, k, v, self.implementation, mask, named.asked(WEIGHTS))


class NearbyAttention(nnx.Module):
    """Attention of each block's patches to those of a low-resolution image in its own place and the eight around it.

    (Inf-DiT, section 3.3.) Both have learned positions, within the block and within the nine. Beyond the image they
    attend to zeros. The output layer starts at zero. The columns of `key_value` are ordered (head, key/value, feature).

    entries: of the low-resolution image, that a block attends to.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        patches: int,
        entries: int,
        *,
        dtype: DType = jnp.float32,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        head = width // heads
        self.heads, self.implementation, self.dtype = heads, implementation, jnp.dtype(dtype)
        self.query = Linear(width, width, dtype=dtype, rngs=rngs)
        self.key_value = Linear(width, 2 * width, dtype=dtype, rngs=rngs)
        # A shift of all keys by one vector would change no softmax.
        self.query_norm, self.key_norm = LayerNorm(head), LayerNorm(head, bias=False)
        self.query_position, self.key_position = (
            nnx.Param(0.02 * jax.random.normal(rngs.params(), (n, heads, head), jnp.float32))
            for n in (patches, entries)
        )
        self.out = Linear(width, width, kernel_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "blocks patches width"], low: Float[Array, "blocks entries width"], named: Below = Below()
    ) -> Float[Array, "blocks patches width"]:
        """What the patches of each block see. named: taps, see `CrossAttention`, of blocks in the place of examples."""
        blocks, patches, width = x.shape
        q = self.query(x).reshape(blocks, patches, self.heads, -1)
        kv = self.key_value(low).reshape(blocks, low.shape[1], self.heads, 2, -1)
        q = (self.query_norm(q) + self.query_position[...]).astype(self.dtype)
        k = (self.key_norm(kv[..., 0, :]) + self.key_position[...]).astype(self.dtype)
        q, k, v = named("/queries", q), named("/keys", k), named("/values", kv[..., 1, :])
        y = dot_product_attention(q, k, v, self.implementation, weights=named.asked(WEIGHTS))
        return self.out(y.reshape(blocks, patches, width))


def _moved(y: Float[Array, "batch rows columns *rest"], down: int, right: int) -> Array:
    """What blocks see so many rows above and columns to the left; zeros beyond the image."""
    padded = jnp.pad(y, [(0, 0), (down, 0), (right, 0), *[(0, 0)] * (y.ndim - 3)])
    return padded[:, : y.shape[1], : y.shape[2]]


def _inside(grid: tuple[int, int], down: int, right: int) -> Bool[Array, "rows columns"]:
    rows, columns = (jnp.arange(side) for side in grid)
    return (rows >= down)[:, None] & (columns >= right)
