"""EfficientViT's two layers: linear attention at several scales, and an inverted bottleneck (Cai et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import glorot_uniform
from jaxtyping import Array, Float

from ddjax.denoisers.layers.basic import DType, Linear, at_least_float32
from ddjax.denoisers.layers.convolution import Conv, Image
from ddjax.denoisers.layers.generated import GeneratedDepthwise, with_weights
from ddjax.taps import Below

EPSILON = 1e-15


class MultiScaleAttention(nnx.Module):
    """Linear attention among all pixels, by heads of several scales (Cai et al. 2023, arXiv:2205.14756, section 3.1).

    A head's queries, keys and values are those of the pixels or, at each further scale, what a depthwise convolution
    makes of them, and then a matrix of the head's own for each of the three. A head gives
    `relu(q) sum(relu(k)' v) / (relu(q) sum(relu(k))' + 1e-15)`. One linear layer takes the heads of all scales; the
    columns of `qkv` are ordered as in `Attention`. Nothing has a bias.

    scales: sides of the convolutions. Raises ValueError where heads do not divide the width.
    """

    def __init__(
        self, width: int, heads: int, *, scales: Sequence[int] = (5,), dtype: DType = jnp.float32, rngs: nnx.Rngs
    ):
        if heads < 1 or width % heads:
            raise ValueError(f"heads={heads} does not divide width={width}")
        self.heads, self.head, every = heads, width // heads, 3 * width
        bare = {"bias": False, "dtype": dtype, "rngs": rngs}
        self.qkv = Linear(width, every, **bare)
        self.around = nnx.List([Conv(every, every, scale, groups=every, **bare) for scale in scales])
        shape = (len(scales), heads, 3, self.head, self.head)
        self.mix = nnx.Param(glorot_uniform(batch_axis=(0, 1, 2))(rngs.params(), shape, jnp.float32))
        self.out = Linear(width * (1 + len(scales)), width, **bare)

    def __call__(
        self, x: Image, named: Below = Below(), projection: Float[Array, "batch attended width"] | None = None
    ) -> Image:
        """Every pixel attends to every pixel. `named` taps queries, keys and values, `(batch, sites, heads, head)`.

        projection: added to the weights of the last layer, for each example (`layers.generated`).
        """
        batch = x.shape[0]
        qkv = self.qkv(x)
        heads = [y.reshape(batch, -1, self.heads, 3, self.head) for y in (qkv, *(f(qkv) for f in self.around))]
        for i, mix in enumerate(self.mix[...].astype(qkv.dtype)):
            heads[1 + i] = jnp.einsum("bnhpd,hpde->bnhpe", heads[1 + i], mix)
        q, k, v = jnp.moveaxis(jnp.concatenate(heads, axis=2), 3, 0)
        q, k, v = named("/queries", q), named("/keys", k), named("/values", v)
        sums = at_least_float32(x.dtype)
        q, k, v = jax.nn.relu(q.astype(sums)), jax.nn.relu(k.astype(sums)), v.astype(sums)
        y = jnp.einsum("bnhd,bhde->bnhe", q, jnp.einsum("bnhd,bnhe->bhde", k, v))
        y = y / (jnp.einsum("bnhd,bhd->bnh", q, k.sum(axis=1)) + EPSILON)[..., None]
        return with_weights(self.out, y.reshape(*x.shape[:-1], -1), projection)


class MBConv(nnx.Module):
    """An inverted bottleneck: `down(f(depthwise(f(up(x)))))`, f a hard swish, without a bias at the end.

    generated: None, or the grid of pixels and the width of a condition that makes the depthwise convolution's weights
        for each example (`layers.GeneratedDepthwise`). kernels: of `layers.Generator`, there.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        generated: tuple[tuple[int, int], int] | None = None,
        kernels: int = 0,
        dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options = {"dtype": dtype, "rngs": rngs}
        self.up = Linear(width, hidden, **options)
        self.generated = generated is not None
        self.depthwise = (
            GeneratedDepthwise(hidden, *generated, kernels=kernels, **options)
            if generated
            else Conv(hidden, hidden, groups=hidden, **options)
        )
        self.down = Linear(hidden, width, bias=False, **options)

    def __call__(self, x: Image, c: Float[Array, "batch cond"] | None = None) -> Image:
        """Apply to an image; c: the condition, where it makes weights."""
        h = jax.nn.hard_swish(self.up(x))
        if self.generated:
            h = self.depthwise(h.reshape(len(h), -1, h.shape[-1]), c).reshape(h.shape)
        else:
            h = self.depthwise(h)
        return self.down(jax.nn.hard_swish(h))
