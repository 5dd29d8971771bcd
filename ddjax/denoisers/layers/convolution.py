"""Layers of convolutional networks: images are `(batch, height, width, features)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from ddjax.denoisers.layers.attention import WEIGHTS, check_implementation, dot_product_attention
from ddjax.denoisers.layers.basic import (
    DType,
    Initializer,
    Linear,
    at_least_float32,
    check_rate,
    dropout,
    xavier,
    zeros,
)
from ddjax.denoisers.layers.cross import Context, CrossAttention
from ddjax.placement import constrain
from ddjax.taps import Below

Filter = Sequence[float]
Image = Float[Array, "batch H W features"]


class Conv(nnx.Module):
    """A convolution with zeros around the image, kernel `(size, size, in, out)`.

    Parameters float32, cast to `dtype` where they are used. padding: rows and columns of zeros before and after the
    image; default size // 2 each. groups: features in and out are in so many groups that do not meet (each by itself:
    a depthwise convolution). out_dtype: the result's dtype (default `dtype`), in which it is computed.
    """

    def __init__(
        self,
        features_in: int,
        features_out: int,
        size: int = 3,
        *,
        stride: int = 1,
        padding: tuple[int, int] | None = None,
        groups: int = 1,
        bias: bool = True,
        kernel_init: Initializer = xavier,
        dtype: DType = jnp.float32,
        out_dtype: DType | None = None,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(
            kernel_init(rngs.params(), (size, size, features_in // groups, features_out), jnp.float32)
        )
        self.bias = nnx.Param(jnp.zeros((features_out,), jnp.float32)) if bias else None
        self.stride, self.padding, self.groups = stride, tuple(padding or (size // 2, size // 2)), groups
        self.dtype = jnp.dtype(dtype if out_dtype is None else out_dtype)

    def __call__(self, x: Image) -> Image:
        """Apply to an image."""
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype), self.kernel[...].astype(self.dtype), (self.stride,) * 2, (self.padding,) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=self.groups,
        )  # fmt: skip
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class GroupNorm(nnx.Module):
    """Group normalisation with scale and shift (Wu & He 2018), computed and returned in at least float32.

    groups: of neighbouring features, as many in each: fewer where each would have less than `least` features.
    cond_width: of a condition whose linear functions are the scale, less 1, and the shift, in the place of parameters
        (Shi et al. 2024, MD4's network of ImageNet-64); their layer, of this dtype, starts at zero. 0: there is none.
    """

    def __init__(
        self,
        features: int,
        *,
        groups: int = 32,
        least: int = 1,
        epsilon: float = 1e-5,
        cond_width: int = 0,
        dtype: DType = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        self.groups, self.epsilon = min(groups, features // least), epsilon
        if self.groups < 1 or features % self.groups:
            raise ValueError(f"{self.groups} groups of a norm do not divide {features} features: choose another width")
        self.modulation = (
            Linear(cond_width, 2 * features, kernel_init=zeros, dtype=dtype, rngs=rngs) if cond_width else None
        )
        own = lambda value: None if cond_width else nnx.Param(jnp.full((features,), value, jnp.float32))  # noqa: E731
        self.scale, self.bias = own(1.0), own(0.0)

    def __call__(self, x: Image, c: Float[Array, "batch cond"] | None = None) -> Image:
        """Normalise each group over its features and all pixels. c: the condition, seen with `cond_width` alone."""
        y = x.astype(at_least_float32(x.dtype)).reshape(x.shape[0], -1, self.groups, x.shape[-1] // self.groups)
        y = y - y.mean(axis=(1, 3), keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=(1, 3), keepdims=True) + self.epsilon)
        y = y.reshape(x.shape)
        if self.modulation is None:
            return y * self.scale[...] + self.bias[...]
        scale, shift = jnp.split(self.modulation(c)[:, None, None], 2, axis=-1)
        return y * (1 + scale) + shift


def downsample(x: Image, weights: Filter = (1, 1), padding: int | None = None) -> Image:
    """Half as many rows and columns: a weighted mean of neighbours (Zhang 2019; (1, 1): the mean of 2 x 2 pixels).

    weights: along either axis, an even number of them. padding: rows and columns of zeros on each side, by default as
    many as make the sides half.
    """
    total, count = sum(weights), len(weights)
    padding = (count - 1) // 2 if padding is None else padding
    y = x.astype(at_least_float32(x.dtype))
    for axis in (1, 2):
        y = _padded(y, axis, padding, padding)
        half = (y.shape[axis] - count) // 2 + 1
        parts = [_strided(y, axis, k, half) * (w / total) for k, w in enumerate(weights)]
        y = sum(parts[1:], parts[0])
    return y.astype(x.dtype)


def upsample(x: Image, weights: Filter = (1, 1)) -> Image:
    """Twice as many rows and columns: zeros between the pixels, and then the filter ((1, 1): each pixel four times).

    weights: as in `downsample`, whose transpose it is, times 4.
    """
    total, count = sum(weights), len(weights)
    padding = (count - 1) // 2
    y = x.astype(at_least_float32(x.dtype))
    for axis in (1, 2):
        size, phases = y.shape[axis], []
        y = _padded(y, axis, count, count)
        for phase in (0, 1):  # y[2 m + phase] is a sum over the inputs m + (phase + padding - k) / 2
            parts = [
                jax.lax.slice_in_dim(y, first, first + size, axis=axis) * (2 * w / total)
                for k, w in enumerate(weights)
                if (phase + padding - k) % 2 == 0
                for first in [count + (phase + padding - k) // 2]
            ]
            phases.append(sum(parts[1:], parts[0]))
        y = jnp.stack(phases, axis=axis + 1)
        y = y.reshape(*y.shape[:axis], 2 * size, *y.shape[axis + 2 :])
    return y.astype(x.dtype)


class Resampling(nnx.Module):
    """Down by a convolution of stride 2, or up by nearest neighbours and a convolution (Ho et al. 2020).

    direction: "down" or "up". padding: of the convolution down. features_out: default as many.
    """

    def __init__(
        self,
        features: int,
        direction: str,
        *,
        features_out: int | None = None,
        padding: tuple[int, int],
        dtype: DType,
        rngs: nnx.Rngs,
    ):
        self.resample = direction
        stride, padding = (1, (1, 1)) if direction == "up" else (2, padding)
        self.conv = Conv(features, features_out or features, stride=stride, padding=padding, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Image, c: Array, *, keys: Key[Array, " batch"] | None = None, name: str | None = None, **more: Any
    ) -> Image:
        """Of the image; the rest is for blocks in its place."""
        return Below(name)("", self.conv(upsample(x) if self.resample == "up" else x))


class SpatialAttention(nnx.Module):
    """Self-attention among all pixels, behind a norm, with biases; the last layer starts at zero.

    The columns of `qkv` are ordered (head, q/k/v, feature), as in `Attention`.
    """

    def __init__(
        self,
        features: int,
        heads: int,
        *,
        norm: Callable[[int], GroupNorm] = GroupNorm,
        dtype: DType = jnp.float32,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        if heads < 1 or features % heads:
            raise ValueError(f"{heads} heads do not divide {features} features")
        check_implementation(implementation, dtype, features // heads)
        self.heads, self.implementation = heads, implementation
        self.norm = norm(features)
        self.qkv = Linear(features, 3 * features, dtype=dtype, rngs=rngs)
        self.out = Linear(features, features, kernel_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Image, c: Float[Array, "batch cond"] | None = None, named: Below = Below(), context: None = None
    ) -> Image:
        """The branch, to be added to x. c: for the norm. named: taps, see `Attention`. context: for those that look."""
        batch, height, width, features = x.shape
        qkv = self.qkv(self.norm(x, c)).reshape(batch, height * width, self.heads, 3, features // self.heads)
        heads = "heads" if self.heads > 1 else None  # a single one is on every device
        q, k, v = (constrain(qkv[..., i, :], "batch", None, heads, None) for i in range(3))
        q, k, v = named("/queries", q), named("/keys", k), named("/values", v)
        y = dot_product_attention(q, k, v, self.implementation, weights=named.asked(WEIGHTS))
        return self.out(y.reshape(x.shape))


class ResBlock(nnx.Module):
    """Two convolutions beside a shortcut, and attention behind them where there are heads.

    norm, silu, (resample,) convolution; the condition added, or scaling and shifting behind the second norm; norm,
    silu, dropout, convolution (Ho et al. 2020; Dhariwal & Nichol 2021, section 3; Song et al. 2021, appendix H;
    Karras et al. 2022, table 1 and appendix F.2).

    Args:
        features_in, features_out: where they differ the shortcut has a convolution of one pixel.
        cond_width: of the conditioning vector; 0: there is none.
        heads: 0 for no attention.
        resample: None, "down" or "up": of what the first convolution sees, and of the shortcut.
        weights: of the resampling filter.
        scale_shift: whether the condition scales and shifts the second norm's result, or is added before that norm.
        project: a resampled shortcut has a convolution in any case.
        gain: times each sum of the branch and the shortcut.
        modulation_bias: whether the layer of the condition has biases.
        norm: makes a norm of so many features; with one that is told the condition itself cond_width is 0.
        dropout: rate.
        dtype: compute dtype.
        attention: None, "xla" or "cudnn".
        attend: makes the attention of so many features and heads, which is handed the sequence too.
        context_width: of the entries of a sequence to which blocks that attend attend too, behind that; 0: none.
        rngs: keys of the initial parameters.
    """

    def __init__(
        self,
        features_in: int,
        features_out: int,
        *,
        cond_width: int,
        heads: int = 0,
        resample: str | None = None,
        weights: Filter = (1, 1),
        scale_shift: bool = True,
        project: bool = False,
        gain: float = 1.0,
        modulation_bias: bool = True,
        norm: Callable[[int], GroupNorm] = GroupNorm,
        dropout: float = 0.0,
        dtype: DType = jnp.float32,
        attention: str | None = None,
        attend: Callable[..., nnx.Module] = SpatialAttention,
        context_width: int = 0,
        rngs: nnx.Rngs,
    ):
        check_rate(dropout)
        self.resample, self.weights = resample, tuple(weights)
        self.scale_shift, self.gain, self.dropout = scale_shift, gain, dropout
        self.norm_in = norm(features_in)
        self.conv_in = Conv(features_in, features_out, dtype=dtype, rngs=rngs)
        numbers = (1 + scale_shift) * features_out
        self.modulation = (
            Linear(cond_width, numbers, bias=modulation_bias, dtype=dtype, rngs=rngs) if cond_width else None
        )
        self.norm_out = norm(features_out)
        self.conv_out = Conv(features_out, features_out, kernel_init=zeros, dtype=dtype, rngs=rngs)
        projects = features_in != features_out or (project and resample is not None)
        self.shortcut = Conv(features_in, features_out, 1, dtype=dtype, rngs=rngs) if projects else None
        self.attention = (
            attend(features_out, heads, norm=norm, dtype=dtype, implementation=attention, rngs=rngs) if heads else None
        )
        self.cross = (
            CrossAttention(features_out, context_width, heads, dtype=dtype, implementation=attention, rngs=rngs)
            if heads and context_width
            else None
        )

    def __call__(
        self,
        x: Float[Array, "batch H W in"],
        c: Float[Array, "batch cond"] | None,
        *,
        keys: Key[Array, " batch"] | None = None,
        name: str | None = None,
        context: Context | None = None,
    ) -> Float[Array, "batch H2 W2 out"]:
        """Run the block. `keys` turn dropout on; `name` is the prefix of the taps (None inside a scan).

        context: the sequence, for attention that looks at one.
        """
        x, named = constrain(x, "batch", None, None, None), Below(name)
        h = jax.nn.silu(self.norm_in(x, c)).astype(x.dtype)
        if self.resample is not None:
            change = downsample if self.resample == "down" else upsample
            h, x = change(h, self.weights), change(x, self.weights)
        h = self.conv_in(h)
        m = 0.0 if self.modulation is None else self.modulation(c)[:, None, None]
        if self.scale_shift and self.modulation is not None:
            scale, shift = jnp.split(m, 2, axis=-1)
            h = self.norm_out(h) * (1 + scale) + shift
        else:
            h = self.norm_out(h + m, c)
        h = self.conv_out(dropout(jax.nn.silu(h), self.dropout, keys))
        x = self.gain * ((x if self.shortcut is None else self.shortcut(x)) + h)
        if self.attention is not None:
            y = named("/attention", self.attention(x, c, named, context))
            x = self.gain * (x + y)
        if self.cross is not None:
            x = self.gain * self.cross.added(x, context, name)
        return named("", constrain(x, "batch", None, None, None))


def windows(x: Image, grid: tuple[int, int]) -> Float[Array, "windows sites features"]:
    """The windows of all images, row by row, those of an image one behind the other; grid: rows and columns of each."""
    batch, height, width, features = x.shape
    rows, columns = grid
    x = x.reshape(batch, height // rows, rows, width // columns, columns, features)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, rows * columns, features)


def unwindowed(x: Float[Array, "windows sites features"], shape: tuple[int, ...], grid: tuple[int, int]) -> Image:
    """The images, of this shape, whose windows these are."""
    batch, height, width, _ = shape
    rows, columns = grid
    x = x.reshape(batch, height // rows, width // columns, rows, columns, x.shape[-1])
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height, width, x.shape[-1])


def _padded(x: Array, axis: int, before: int, after: int) -> Array:
    return jnp.pad(x, [(before, after) if i == axis else (0, 0) for i in range(x.ndim)])


def _strided(x: Array, axis: int, first: int, count: int) -> Array:
    return jax.lax.slice_in_dim(x, first, first + 2 * count - 1, stride=2, axis=axis)
