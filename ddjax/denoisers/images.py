"""The two ends of a network of images: the state as features of patches, and what it says of each pixel.

An image has one, two or three sides: a sequence, a picture, a volume.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ddjax.denoisers.given import Given
from ddjax.denoisers.layers.basic import DType
from ddjax.denoisers.layers.embed import TokenBits, TokenEmbed
from ddjax.denoisers.states import check_state, check_values, hard_state
from ddjax.types import SoftTokens

# The axes of a state, by their number.
AXES = {2: ("length", "channels"), 3: ("height", "width", "channels"), 4: ("depth", "height", "width", "channels")}


class ImageNetwork(nnx.Module):
    """A network of images `(batch, H, W, C)`, continuous or discrete, in patches (of one pixel, for convolutions).

    Or of sequences `(batch, L, C)` or volumes `(batch, D, H, W, C)`: `shape` says which. The tokens of a discrete image
    are embedded, each channel in its own table, and concatenated.

    Args:
        shape, symbols_in, symbols_out, out_channels, patch, embed_width, bits, image_channels: see `DiT`.
        width: of the network; an embedding is no wider.
        dtype: compute dtype.

    Raises:
        ValueError: for sizes that do not divide, or options of the wrong state space.
    """

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        symbols_in: int | None,
        symbols_out: int | None,
        out_channels: int | None = None,
        patch: int = 1,
        width: int,
        embed_width: int | None = None,
        bits: int = 0,
        image_channels: int = 0,
        dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ):
        _check_config(shape, symbols_in, symbols_out, out_channels, patch, embed_width, bits)
        *sides, channels = shape
        self.shape, self.patch, self.image_channels = tuple(shape), patch, image_channels
        self.grid = tuple(side // patch for side in sides)  # of patches
        pixels = patch ** len(sides)
        sites = pixels * channels  # of one patch
        self.symbols_in, self.symbols_out = symbols_in, symbols_out
        self.out_channels, self.dtype = out_channels or channels, jnp.dtype(dtype)
        if symbols_in is None:
            self.tokens = None
            self.features_in, self.features_out = sites, pixels * self.out_channels  # of one patch
        else:
            features = bits or embed_width or max(min(32, width), width // sites)
            self.tokens = (
                TokenBits(symbols_in, bits, channels=channels)
                if bits
                else TokenEmbed(symbols_in, features, channels=channels, rngs=rngs)
            )
            self.features_in, self.features_out = sites * features, sites * symbols_out
        self.features_in += pixels * image_channels

    def check(self, xt: Array | SoftTokens) -> int:
        """The batch. Raises ValueError for a state that the network was not built for."""
        state = hard_state(xt, len(self.shape) + 1, self.symbols_in)
        check_state(state, (AXES[len(self.shape)], self.shape), self.symbols_in)
        return state.shape[0]

    def patches(self, x: Any) -> Any:
        """A state's entries, row by row of patches: `(batch, patches, patch, patch, C, ...)`."""
        return jax.tree.map(lambda v: _patches(v, self.patch, len(self.grid)), x)

    def features(self, patches: Any) -> Float[Array, "batch patches features"]:
        """What stands in each patch: the values themselves, or the embedded tokens."""
        x = patches if self.tokens is None else self.tokens(patches)
        return x.reshape(*x.shape[:2], -1)

    def beside(self, image: Array | None, batch: int, channels: int) -> Float[Array, "batch patches features"]:
        """The features of an image that is a condition; zeros of none. Raises ValueError for another shape."""
        if image is None:
            image = jnp.zeros((batch, *self.shape[:-1], channels), self.dtype)
        check_values(image, (batch, *self.shape[:-1], channels))
        patches = self.patches(image.astype(self.dtype))
        return patches.reshape(*patches.shape[:2], -1)

    def hinted(self, image: Array, xt: Any, cond: Any, channels: int, scale: int) -> dict[str, Array]:
        """Of the image of a side network (`sides.Side`), what stands in each patch."""
        return {"embed": self.beside(image, self.check(xt), channels)}

    def seen(self, xt: Any, given: Given) -> tuple[Float[Array, "batch patches features_in"], Given]:
        """What stands in each patch, of the state and of an image that is a condition, and what else is given.

        Raises ValueError for an image of another shape.
        """
        x = self.features(self.patches(xt))
        if not self.image_channels:
            return x, given
        image = self.beside(given.image, x.shape[0], self.image_channels)
        return jnp.concatenate([x, image.astype(x.dtype)], axis=-1), given.without("image")

    def images(self, y: Float[Array, "batch patches features_out"]) -> Array:
        """Outputs of patches as images: `(batch, H, W, out_channels)`, or `(batch, H, W, C, symbols_out)`."""
        *sides, channels = self.shape
        last = (self.out_channels,) if self.symbols_out is None else (channels, self.symbols_out)
        n = len(sides)
        y = y.reshape(y.shape[0], *self.grid, *(self.patch,) * n, *last)
        y = jnp.transpose(y, (0, *(1 + i + n * j for i in range(n) for j in range(2)), *range(1 + 2 * n, y.ndim)))
        return y.reshape(y.shape[0], *sides, *last)

    def places(self) -> Int[np.ndarray, "H W C"]:
        """The number of the patch that each site of a state is in."""
        along = np.indices(self.shape[:-1], np.int32) // self.patch
        place = np.ravel_multi_index(tuple(along), self.grid).astype(np.int32)
        return np.broadcast_to(place[..., None], self.shape)


def _patches(x: Array, p: int, n: int) -> Array:
    """Of the `n` axes behind the first."""
    batch, sides, rest = x.shape[0], x.shape[1 : 1 + n], x.shape[1 + n :]
    x = x.reshape(batch, *(size for side in sides for size in (side // p, p)), *rest)
    order = (0, *range(1, 2 * n, 2), *range(2, 2 * n + 1, 2), *range(1 + 2 * n, x.ndim))
    return jnp.transpose(x, order).reshape(batch, -1, *(p,) * n, *rest)


def _check_config(
    shape: tuple, symbols_in: int | None, symbols_out: int | None, out_channels: int | None, patch: int,
    embed_width: int | None, bits: int,
) -> None:  # fmt: skip
    if len(shape) not in AXES:
        raise ValueError(
            f"shape={shape}: expected (height, width, channels) of one example, without the batch; or (length, "
            "channels), or (depth, height, width, channels)"
        )
    if patch < 1 or any(side % patch for side in shape[:-1]):
        sides = " and ".join(AXES[len(shape)][:-1])
        raise ValueError(f"patch={patch} does not divide the image's {sides} {tuple(shape[:-1])}")
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
