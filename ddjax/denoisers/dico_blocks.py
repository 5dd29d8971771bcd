"""The blocks of which `DiCo`'s stages are made: DiCo's own, attention, AsCAN's and EfficientViT's."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from ddjax import random
from ddjax.denoisers.layers.attention import Attention
from ddjax.denoisers.layers.basic import (
    MLP,
    DType,
    Linear,
    at_least_float32,
    check_rate,
    dropout,
    layer_norm,
    zeros,
)
from ddjax.denoisers.layers.convolution import Conv, Image
from ddjax.denoisers.layers.cross import Context, CrossAttention
from ddjax.denoisers.layers.efficient import MBConv, MultiScaleAttention
from ddjax.placement import constrain
from ddjax.taps import Below


class Told(NamedTuple):
    """What the blocks of a stage are told."""

    vector: Float[Array, "batch width"]  # of the condition
    context: Context | None = None  # words
    projection: Float[Array, "batch attended width"] | None = None  # what is added to attention's last weights


class StageBlock(nnx.Module):
    """`h + mix(norm(h))`, what pixels tell each other, then `h + mlp(norm(h))`, each by itself; by default adaLN-zero.

    Between the two the pixels attend to words where there is a `cross`. Subclasses make `mix` and `mlp`, and call `lay`
    last.
    """

    cross: CrossAttention | None = None

    def lay(self, width: int, *, dropout: float, dtype: DType, modulated: bool = True, rngs: nnx.Rngs) -> None:
        """Make what blocks have in common. modulated: whether adaLN-zero tells them the condition."""
        check_rate(dropout)
        self.dropout = dropout
        self.modulation = Linear(width, 6 * width, kernel_init=zeros, dtype=dtype, rngs=rngs) if modulated else None

    def mix(self, x: Image, c: Told, named: Below) -> Image:
        """What pixels tell each other."""
        raise NotImplementedError

    def each(self, x: Image, c: Told) -> Image:
        """What becomes of each pixel."""
        return self.mlp(x)

    def __call__(
        self,
        h: Image,
        skip: None,
        c: Told,
        *,
        keys: Key[Array, " batch"] | None = None,
        name: str | None = None,
    ) -> tuple[Image, None]:
        """The next image, and nothing for a long connection. See `layers.LongSkips`."""
        named = Below(name)
        keys_a, keys_m = (None, None) if keys is None else random.split(keys)
        h = constrain(h, "batch", None, None, None)
        vectors = (None,) * 6
        if self.modulation is not None:
            vectors = jnp.split(self.modulation(c.vector)[:, None, None], 6, axis=-1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = vectors
        y = named("/mix", self.mix(_normed(h, shift_a, scale_a), c, named))
        h = h + _gated(dropout(y, self.dropout, keys_a), gate_a)
        if self.cross is not None:
            below = Below(name and f"{name}/cross")
            h = h + below("", self.cross(h.reshape(len(h), -1, h.shape[-1]), c.context, below)).reshape(h.shape)
        y = named("/mlp", self.each(_normed(h, shift_m, scale_m), c))
        return named("", h + _gated(dropout(y, self.dropout, keys_m), gate_m)), None


def _normed(h: Image, shift: Array | None, scale: Array | None) -> Image:
    h = layer_norm(h)
    return h if shift is None else h * (1 + scale) + shift


def _gated(y: Image, gate: Array | None) -> Image:
    return y if gate is None else gate * y


class ConvBlock(StageBlock):
    """DiCo's block: `outer(x * channels(x))` with x = gelu(depthwise(inner(h))), and an MLP, both under adaLN-zero.

    Channel attention is the sigmoid of a linear layer of the mean over all pixels.
    """

    def __init__(
        self, width: int, *, mlp_ratio: float = 4, dropout: float = 0.0, dtype: DType = jnp.float32, rngs: nnx.Rngs
    ):
        self.inner = Linear(width, width, dtype=dtype, rngs=rngs)
        self.depthwise = Conv(width, width, groups=width, dtype=dtype, rngs=rngs)
        self.channels = Linear(width, width, dtype=dtype, rngs=rngs)
        self.outer = Linear(width, width, dtype=dtype, rngs=rngs)
        self.mlp = MLP(width, int(mlp_ratio * width), approximate=False, dtype=dtype, rngs=rngs)
        self.lay(width, dropout=dropout, dtype=dtype, rngs=rngs)

    def mix(self, x: Image, c: Told, named: Below) -> Image:
        """What pixels tell each other."""
        x = jax.nn.gelu(self.depthwise(self.inner(x)), approximate=False)
        mean = x.mean(axis=(1, 2), keepdims=True, dtype=at_least_float32(x.dtype))
        return self.outer(x * jax.nn.sigmoid(self.channels(mean)))


class AttentionBlock(StageBlock):
    """A transformer block under adaLN-zero: attention among all pixels, and where there are words to these.

    head_width: features of a head. context_width: of a word (`layers.CrossAttention`); 0: there are none.
    """

    def __init__(
        self,
        width: int,
        *,
        head_width: int = 64,
        context_width: int = 0,
        mlp_ratio: float = 4,
        dropout: float = 0.0,
        dtype: DType = jnp.float32,
        attention: str | None = None,
        rngs: nnx.Rngs,
    ):
        heads = heads_of(width, head_width)
        options = {"dtype": dtype, "implementation": attention, "rngs": rngs}
        self.attention = Attention(width, heads, **options)
        self.mlp = MLP(width, int(mlp_ratio * width), approximate=False, dtype=dtype, rngs=rngs)
        self.lay(width, dropout=dropout, dtype=dtype, rngs=rngs)
        self.cross = CrossAttention(width, context_width, heads, **options) if context_width else None

    def mix(self, x: Image, c: Told, named: Below) -> Image:
        """What pixels tell each other."""
        return self.attention(x.reshape(x.shape[0], -1, x.shape[-1]), None, named).reshape(x.shape)


class EfficientBlock(StageBlock):
    """EfficientViT's block: linear attention of two scales, and an inverted bottleneck (Cai et al. 2023).

    Norms stand before the branches, without parameters.

    modulated: whether adaLN-zero tells it the condition. grid: None, or of the pixels, where the condition makes the
        weights of the depthwise convolution and of attention's last layer (`Told.projection`). kernels: of
        `layers.Generator`, there. head_width: features of a head.
    """

    def __init__(
        self,
        width: int,
        *,
        head_width: int = 32,
        mlp_ratio: float = 4,
        modulated: bool = True,
        grid: tuple[int, int] | None = None,
        kernels: int = 0,
        dropout: float = 0.0,
        dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.attention = MultiScaleAttention(width, heads_of(width, head_width), dtype=dtype, rngs=rngs)
        generated = None if grid is None else (grid, width)
        self.mlp = MBConv(width, int(mlp_ratio * width), generated=generated, kernels=kernels, dtype=dtype, rngs=rngs)
        self.lay(width, dropout=dropout, dtype=dtype, modulated=modulated, rngs=rngs)

    def mix(self, x: Image, c: Told, named: Below) -> Image:
        """What pixels tell each other."""
        return self.attention(x, named, c.projection)

    def each(self, x: Image, c: Told) -> Image:
        """What becomes of each pixel."""
        return self.mlp(x, c.vector)


class FusedBlock(nnx.Module):
    """AsCAN's convolution (Kag et al. 2024, section 3.1): a fused inverted bottleneck, under adaLN-zero.

    `outer(x * channels(x))` with x = gelu(expand(norm(h))): a 3 x 3 convolution to `mlp_ratio` times as many features,
    squeeze and excitation (Hu et al. 2018: from the mean over all pixels, by way of a quarter of the block's features,
    a factor in (0, 1) for each), and a convolution of one pixel back.
    """

    def __init__(
        self, width: int, *, mlp_ratio: float = 4, dropout: float = 0.0, dtype: DType = jnp.float32, rngs: nnx.Rngs
    ):
        check_rate(dropout)
        self.dropout, hidden = dropout, int(mlp_ratio * width)
        self.expand = Conv(width, hidden, dtype=dtype, rngs=rngs)
        self.squeeze = Linear(hidden, max(width // 4, 1), dtype=dtype, rngs=rngs)
        self.excite = Linear(max(width // 4, 1), hidden, dtype=dtype, rngs=rngs)
        self.outer = Linear(hidden, width, dtype=dtype, rngs=rngs)
        self.modulation = Linear(width, 3 * width, kernel_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        h: Image,
        skip: None,
        c: Told,
        *,
        keys: Key[Array, " batch"] | None = None,
        name: str | None = None,
    ) -> tuple[Image, None]:
        """The next image, and nothing for a long connection. See `layers.LongSkips`."""
        named = Below(name)
        h = constrain(h, "batch", None, None, None)
        shift, scale, gate = jnp.split(self.modulation(c.vector)[:, None, None], 3, axis=-1)
        x = jax.nn.gelu(self.expand(_normed(h, shift, scale)), approximate=False)
        mean = x.mean(axis=(1, 2), keepdims=True, dtype=at_least_float32(x.dtype))
        channels = jax.nn.sigmoid(self.excite(jax.nn.silu(self.squeeze(mean))))
        y = named("/mix", self.outer(x * channels))
        return named("", h + gate * dropout(y, self.dropout, keys)), None


def heads_of(width: int, head_width: int) -> int:
    """Of attention in a stage. Raises ValueError where they do not divide its features."""
    if head_width < 1 or width % head_width:
        raise ValueError(f"head_width={head_width} does not divide a stage of {width} features")
    return width // head_width


# By the letters that stand for them in `DiCo`'s stages.
BLOCKS = {"c": ConvBlock, "a": AttentionBlock, "f": FusedBlock, "e": EfficientBlock}
