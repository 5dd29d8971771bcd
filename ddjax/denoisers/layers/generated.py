"""Layers whose weights are made for each example from its condition (condition-aware networks)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ddjax.denoisers.layers.basic import DType, Linear, at_least_float32, zeros


class Generator(nnx.Module):
    """Weights of one layer as a linear function of the condition (Cai et al. 2024, arXiv:2404.01143, section 3.2).

    They stand beside weights of the layer's own, and start at zero.

    shape: of the weights.
    kernels: 0, or of how many base kernels they are a mixture in the place of that, in shares that are a softmax of a
        linear function of the condition (adaptive kernel selection, the paper's baseline; Kang et al. 2023, "GigaGAN",
        equation 1). Shares add up to 1: the layer's base kernels are its own weights plus each of these.
    Raises ValueError for a single kernel, of which there is nothing to choose.
    """

    def __init__(
        self, cond_width: int, shape: Sequence[int], *, kernels: int = 0, dtype: DType = jnp.float32, rngs: nnx.Rngs
    ):
        if kernels < 0 or kernels == 1:
            raise ValueError(f"kernels={kernels}: expected 2 or more to choose from, or 0: weights are generated")
        self.shape, rows = tuple(shape), kernels or cond_width
        self.weights = Linear(rows, math.prod(shape), bias=False, kernel_init=zeros, dtype=dtype, rngs=rngs)
        self.choose = Linear(cond_width, kernels, dtype=at_least_float32(dtype), rngs=rngs) if kernels else None

    def __call__(self, c: Float[Array, "batch cond"]) -> Float[Array, "batch ..."]:
        """For each example."""
        shares = c if self.choose is None else jax.nn.softmax(self.choose(c))
        return self.weights(shares).reshape(len(c), *self.shape)


def with_weights(
    linear: Linear, x: Float[Array, "batch *sites in"], weights: Float[Array, "batch inputs outputs"] | None
) -> Float[Array, "batch *sites out"]:
    """The linear layer with these weights added to its own, those of an example each; None: the layer itself."""
    y = linear(x)
    if weights is None:
        return y
    kernel = weights.astype(linear.dtype)
    return y + jnp.einsum("b...i,bio->b...o", x.astype(linear.dtype), kernel, preferred_element_type=y.dtype)


class GeneratedLinear(nnx.Module):
    """`x (kernel + generated(c)) + bias`, a linear layer for each example. kernels: of `Generator`."""

    def __init__(
        self,
        features_in: int,
        features_out: int,
        cond_width: int,
        *,
        kernels: int = 0,
        dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.linear = Linear(features_in, features_out, dtype=dtype, rngs=rngs)
        self.generator = Generator(cond_width, (features_in, features_out), kernels=kernels, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch *sites in"], c: Float[Array, "batch cond"]
    ) -> Float[Array, "batch *sites out"]:
        """Apply to the last axis."""
        return with_weights(self.linear, x, self.generator(c))


def surroundings(x: Float[Array, "batch *grid features"]) -> list[Float[Array, "batch *grid features"]]:
    """What stands at each of the places next to a site, its own among them, row by row; zeros outside the grid."""
    grid = x.shape[1:-1]
    padded = jnp.pad(x, [(0, 0), *((1, 1),) * len(grid), (0, 0)])
    windows = (zip(offset, grid, strict=True) for offset in np.ndindex(*(3,) * len(grid)))
    return [padded[:, *(slice(o, o + side) for o, side in window)] for window in windows]


class GeneratedDepthwise(nnx.Module):
    """A depthwise convolution of size 3 over a grid of sites, zeros around it, with a kernel for each example.

    grid: one, two or three sides. kernels: of `Generator`.
    """

    def __init__(
        self,
        features: int,
        grid: Sequence[int],
        cond_width: int,
        *,
        kernels: int = 0,
        dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.grid, self.dtype = tuple(grid), jnp.dtype(dtype)
        size = 3 ** len(self.grid)
        bound = size**-0.5
        self.kernel = nnx.Param(jax.random.uniform(rngs.params(), (size, features), jnp.float32, -bound, bound))
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float32))
        self.generator = Generator(cond_width, (size, features), kernels=kernels, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch sites features"], c: Float[Array, "batch cond"]
    ) -> Float[Array, "batch sites features"]:
        """Of sites row by row."""
        kernel = self.kernel[...].astype(self.dtype) + self.generator(c)
        y = self.bias[...].astype(self.dtype)
        for i, seen in enumerate(surroundings(x.reshape(len(x), *self.grid, -1))):
            y = y + seen * kernel[:, i].reshape(len(x), *(1,) * len(self.grid), -1)
        return y.reshape(x.shape)


class GeneratedMLP(nnx.Module):
    """Two layers with a GELU, and a `GeneratedDepthwise` of the hidden sites between them.

    Sites before those of the grid (tokens of a condition) have no place in it, and skip the convolution.

    kernels: of `Generator`.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        grid: Sequence[int],
        cond_width: int,
        *,
        approximate: bool = True,
        kernels: int = 0,
        dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.approximate = approximate
        self.up = Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.depthwise = GeneratedDepthwise(hidden, grid, cond_width, kernels=kernels, dtype=dtype, rngs=rngs)
        self.down = Linear(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "batch sites width"], c: Float[Array, "batch cond"]
    ) -> Float[Array, "batch sites width"]:
        """Of sites row by row, those without a place first."""
        h = self.up(x)
        count = h.shape[1] - math.prod(self.depthwise.grid)
        h = jnp.concatenate([h[:, :count], self.depthwise(h[:, count:], c)], axis=1)
        return self.down(jax.nn.gelu(h, approximate=self.approximate))
