"""PatchGAN: for each patch of an image how real it looks (Isola et al. 2017), as latent diffusion has it."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ddjax.denoisers.layers.convolution import Conv

_normal = jax.nn.initializers.normal(0.02)


class PatchGAN(nnx.Module):
    """Convolutions of 4 x 4 pixels, `layers` of which halve the sides; features double, up to eight times `width`.

    Norms are over the batch at hand, in training and whenever else it is called: images are judged beside those that
    come with them. Called as all networks are; only x counts.
    """

    def __init__(self, channels: int, *, width: int = 64, layers: int = 3, rngs: nnx.Rngs):
        widths = [min(2**n, 8) * width for n in range(layers + 1)]
        convs = [Conv(channels, width, 4, stride=2, padding=(1, 1), kernel_init=_normal, rngs=rngs)]
        for n, (before, after) in enumerate(itertools.pairwise(widths), start=1):
            stride = 2 if n < layers else 1
            convs.append(
                Conv(before, after, 4, stride=stride, padding=(1, 1), bias=False, kernel_init=_normal, rngs=rngs)
            )
        convs.append(Conv(widths[-1], 1, 4, padding=(1, 1), kernel_init=_normal, rngs=rngs))
        self.convs = nnx.List(convs)
        self.norms = nnx.List([BatchNorm(w, rngs=rngs) for w in widths[1:]])

    def __call__(
        self, x: Float[Array, "batch H W C"], t: Any = None, cond: Any = None, *, rng=None, train=False
    ) -> Float[Array, "batch h w 1"]:
        """Logits of each patch."""
        first, *inner, last = self.convs
        h = jax.nn.leaky_relu(first(x), 0.2)
        for conv, norm in zip(inner, self.norms, strict=True):
            h = jax.nn.leaky_relu(norm(conv(h)), 0.2)
        return last(h)


class BatchNorm(nnx.Module):
    """Each feature with mean 0 and variance 1 over the batch and all pixels, then a scale and a shift."""

    def __init__(self, features: int, *, rngs: nnx.Rngs):
        self.scale = nnx.Param(1.0 + 0.02 * jax.random.normal(rngs.params(), (features,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float32))

    def __call__(self, x: Float[Array, "batch H W features"]) -> Float[Array, "batch H W features"]:
        """Of a batch."""
        x = x - x.mean(axis=(0, 1, 2))
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=(0, 1, 2)) + 1e-5) * self.scale[...] + self.bias[...]
