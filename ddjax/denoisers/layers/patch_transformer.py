"""A transformer of patches as one block of a network of convolutions."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from ddjax.denoisers.layers.basic import DType, Linear, modulate, zeros
from ddjax.denoisers.layers.blocks import Block, Stack
from ddjax.denoisers.layers.convolution import Image, unwindowed, windows
from ddjax.denoisers.layers.cross import Context
from ddjax.denoisers.layers.embed import sincos
from ddjax.placement import constrain
from ddjax.taps import Below


class PatchTransformer(nnx.Module):
    """A DiT of an image's features in the place of residual blocks: patches, blocks under adaLN-zero, and pixels again.

    (Shi et al. 2024, MD4's network of ImageNet-64; google-deepmind/md4, networks/dit.py.) Nothing passes it by, and its
    last layer starts at zero. Queries, keys and values have biases, the output of attention none.

    Args:
        features: of a pixel, in and out.
        grid: rows and columns of pixels.
        width, depth, heads: of the transformer.
        cond_width: of the conditioning vector, which passes through silu here.
        patch: side of a patch in pixels.
        dropout, dtype, attention: see `DiT`.
        context_width: of the entries of a sequence that is a condition; see `layers.Block`.
        scan, remat: see `layers.Stack`.
        rngs: keys of the initial parameters.

    Raises:
        ValueError: for patches that do not divide the grid.
    """

    def __init__(
        self,
        features: int,
        grid: tuple[int, int],
        *,
        width: int,
        depth: int,
        heads: int,
        cond_width: int,
        patch: int = 2,
        dropout: float = 0.0,
        dtype: DType = jnp.float32,
        attention: str | None = None,
        context_width: int = 0,
        scan: bool = False,
        remat: bool | str = False,
        rngs: nnx.Rngs,
    ):
        if any(side % patch for side in grid):
            raise ValueError(
                f"patches of {patch} x {patch} do not divide the {grid[0]} x {grid[1]} pixels in the middle"
            )
        self.patch = (patch, patch)
        self.embed = Linear(patch**2 * features, width, dtype=dtype, rngs=rngs)
        self.position = nnx.Param(jnp.asarray(sincos([side // patch for side in grid], width)))
        block = partial(
            Block, width, heads, mlp="gelu", mlp_width=4 * width, cond_width=cond_width, qkv_bias=True, out_bias=False,
            dropout=dropout, dtype=dtype, attention=attention, context_width=context_width,
        )  # fmt: skip
        self.stack = Stack(lambda rngs: block(rngs=rngs), depth, scan=scan, remat=remat, rngs=rngs)
        self.modulation = Linear(cond_width, 2 * width, kernel_init=zeros, dtype=dtype, rngs=rngs)
        self.out = Linear(width, patch**2 * features, kernel_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Image,
        c: Float[Array, "batch cond"],
        *,
        keys: Key[Array, " batch"] | None = None,
        name: str | None = None,
        context: Context | None = None,
    ) -> Image:
        """Of the image. `keys` turn dropout on; `name` is the tap of the result; those of its blocks are "block/i"."""
        batch, _, _, features = x.shape
        c = jax.nn.silu(c)
        patches = windows(x, self.patch).reshape(batch, -1, self.embed.kernel.shape[0])
        h = self.embed(patches) + self.position[...].astype(x.dtype)
        shift, scale = jnp.split(self.modulation(c), 2, axis=-1)
        y = self.out(modulate(self.stack(h, c, keys, context=context), shift, scale))
        y = unwindowed(y.reshape(-1, self.patch[0] * self.patch[1], features), x.shape, self.patch)
        return Below(name)("", constrain(y, "batch", None, None, None))
