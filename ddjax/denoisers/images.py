"""The two ends of a network of images: the state as features of patches, and what it says of each pixel."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ddjax.denoisers.layers.basic import DType
from ddjax.denoisers.layers.embed import TokenBits, TokenEmbed
from ddjax.denoisers.states import check_state, hard_state
from ddjax.types import SoftTokens


class ImageNetwork(nnx.Module):
    """A network of images `(batch, H, W, C)`, continuous or discrete, in patches (of one pixel, for convolutions).

    The tokens of a discrete image are embedded, each channel in its own table, and concatenated.

    Args:
        shape, symbols_in, symbols_out, out_channels, patch, embed_width, bits: see `DiT`.
        width: of the network; an embedding is no wider.
        dtype: compute dtype.

    Raises:
        ValueError: for sizes that do not divide, or options of the wrong state space.
    """

    def __init__(
        self,
        *,
        shape: tuple[int, int, int],
        symbols_in: int | None,
        symbols_out: int | None,
        out_channels: int | None = None,
        patch: int = 1,
        width: int,
        embed_width: int | None = None,
        bits: int = 0,
        dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ):
        _check_config(shape, symbols_in, symbols_out, out_channels, patch, embed_width, bits)
        height, wide, channels = shape
        sites = patch * patch * channels  # of one patch
        self.shape, self.patch = tuple(shape), patch
        self.grid = (height // patch, wide // patch)  # of patches
        self.symbols_in, self.symbols_out = symbols_in, symbols_out
        self.out_channels, self.dtype = out_channels or channels, jnp.dtype(dtype)
        if symbols_in is None:
            self.tokens = None
            self.features_in, self.features_out = sites, patch * patch * self.out_channels  # of one patch
        else:
            features = bits or embed_width or max(min(32, width), width // sites)
            self.tokens = (
                TokenBits(symbols_in, bits, channels=channels)
                if bits
                else TokenEmbed(symbols_in, features, channels=channels, rngs=rngs)
            )
            self.features_in, self.features_out = sites * features, sites * symbols_out

    def check(self, xt: Array | SoftTokens) -> int:
        """The batch. Raises ValueError for a state that the network was not built for."""
        state = hard_state(xt, 4, self.symbols_in)
        check_state(state, (("height", "width", "channels"), self.shape), self.symbols_in)
        return state.shape[0]

    def patches(self, x: Any) -> Any:
        """A state's entries, row by row of patches: `(batch, patches, patch, patch, C, ...)`."""
        return jax.tree.map(lambda v: _patches(v, self.patch), x)

    def features(self, patches: Any) -> Float[Array, "batch patches features_in"]:
        """What stands in each patch: the values themselves, or the embedded tokens."""
        x = patches if self.tokens is None else self.tokens(patches)
        return x.reshape(*x.shape[:2], -1)

    def images(self, y: Float[Array, "batch patches features_out"]) -> Array:
        """Outputs of patches as images: `(batch, H, W, out_channels)`, or `(batch, H, W, C, symbols_out)`."""
        height, wide, channels = self.shape
        p, (rows, columns) = self.patch, self.grid
        last = (self.out_channels,) if self.symbols_out is None else (channels, self.symbols_out)
        y = y.reshape(y.shape[0], rows, columns, p, p, *last)
        return jnp.swapaxes(y, 2, 3).reshape(y.shape[0], height, wide, *last)

    def places(self) -> Int[np.ndarray, "H W C"]:
        """The number of the patch that each site of a state is in."""
        rows, columns = (np.arange(side, dtype=np.int32) // self.patch for side in self.shape[:2])
        place = rows[:, None] * self.grid[1] + columns
        return np.broadcast_to(place[..., None], self.shape)


def _patches(x: Array, p: int) -> Array:
    batch, height, width, *rest = x.shape
    x = jnp.swapaxes(x.reshape(batch, height // p, p, width // p, p, *rest), 2, 3)
    return x.reshape(batch, -1, p, p, *rest)


def _check_config(
    shape: tuple, symbols_in: int | None, symbols_out: int | None, out_channels: int | None, patch: int,
    embed_width: int | None, bits: int,
) -> None:  # fmt: skip
    if len(shape) != 3:
        raise ValueError(f"shape={shape}: expected (height, width, channels) of one example, without the batch")
    if patch < 1 or shape[0] % patch or shape[1] % patch:
        raise ValueError(f"patch={patch} does not divide the image's height and width {tuple(shape[:2])}")
    if (symbols_in is None) != (symbols_out is None):
        raise ValueError(
            f"symbols_in={symbols_in}, symbols_out={symbols_out}: give both for a discrete state "
            "(num_states and num_symbols of the process), neither for a continuous one"
        )
    if symbols_in is not None and out_channels is not None:
        raise ValueError(
            f"out_channels={out_channels} is for a continuous state; a discrete one has symbols_out logits"
        )
    if symbols_in is None and embed_width is not None:
        raise ValueError(f"embed_width={embed_width} is for a discrete state; a continuous patch is projected directly")
    if bits and (symbols_in not in (2**bits, 2**bits + 1) or embed_width is not None):
        raise ValueError(
            f"bits={bits} is for 2**bits symbols, with a mask or without, and no embed_width; "
            f"got symbols_in={symbols_in}, embed_width={embed_width}"
        )
