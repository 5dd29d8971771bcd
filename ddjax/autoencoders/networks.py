"""The convolutions of an autoencoder: each halving of an image's sides is undone by a doubling."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class Residual(nnx.Module):
    """Two 3x3 convolutions around a skip, each after a group norm and SiLU; the second starts at zero."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.norms = nnx.List([_norm(width, rngs) for _ in range(2)])
        self.first = _conv(width, width, rngs=rngs)
        self.second = _conv(width, width, kernel_init=jax.nn.initializers.zeros, rngs=rngs)

    def __call__(self, x: Float[Array, "batch H W width"]) -> Float[Array, "batch H W width"]:
        """The same shape."""
        return x + self.second(jax.nn.silu(self.norms[1](self.first(jax.nn.silu(self.norms[0](x))))))


class Encoder(nnx.Module):
    """An image to `channels` numbers at each site of a grid 2**halvings times smaller.

    Called as all networks are, `encoder(x, t, cond, rng=, train=)`, so that `denoisers.functional` fits; only x counts.
    """

    def __init__(self, channels_in: int, channels: int, *, width: int, halvings: int, blocks: int, rngs: nnx.Rngs):
        self.start = _conv(channels_in, width, rngs=rngs)
        self.stages = nnx.List([_blocks(width, blocks, rngs) for _ in range(halvings + 1)])
        self.halve = nnx.List([_conv(width, width, strides=2, rngs=rngs) for _ in range(halvings)])
        self.norm, self.out = _norm(width, rngs), _conv(width, channels, size=1, rngs=rngs)

    def __call__(self, x: Float[Array, "batch H W C"], t: Any = None, cond: Any = None, *, rng=None, train=False):
        """`(batch, H / 2**halvings, W / 2**halvings, channels)`."""
        h = self.start(x)
        for i, stage in enumerate(self.stages):
            h = self.halve[i - 1](h) if i else h
            for block in stage:
                h = block(h)
        return self.out(jax.nn.silu(self.norm(h)))


class Decoder(nnx.Module):
    """The way back, nearest neighbours before each convolution. Called as `Encoder` is."""

    def __init__(self, channels: int, channels_out: int, *, width: int, halvings: int, blocks: int, rngs: nnx.Rngs):
        self.start = _conv(channels, width, rngs=rngs)
        self.stages = nnx.List([_blocks(width, blocks, rngs) for _ in range(halvings + 1)])
        self.double = nnx.List([_conv(width, width, rngs=rngs) for _ in range(halvings)])
        self.norm, self.out = _norm(width, rngs), _conv(width, channels_out, rngs=rngs)

    def __call__(self, x: Float[Array, "batch h w c"], t: Any = None, cond: Any = None, *, rng=None, train=False):
        """`(batch, h 2**halvings, w 2**halvings, channels_out)`."""
        h = self.start(x)
        for i, stage in enumerate(self.stages):
            h = self.double[i - 1](jnp.repeat(jnp.repeat(h, 2, axis=1), 2, axis=2)) if i else h
            for block in stage:
                h = block(h)
        return self.out(jax.nn.silu(self.norm(h)))


def _conv(channels_in: int, channels_out: int, *, size: int = 3, strides: int = 1, rngs: nnx.Rngs, **options: Any):
    return nnx.Conv(channels_in, channels_out, (size, size), strides=strides, rngs=rngs, **options)


def _norm(width: int, rngs: nnx.Rngs) -> nnx.GroupNorm:
    return nnx.GroupNorm(width, num_groups=next(n for n in (32, 16, 8, 4, 2, 1) if width % n == 0), rngs=rngs)


def _blocks(width: int, count: int, rngs: nnx.Rngs) -> nnx.List:
    return nnx.List([Residual(width, rngs=rngs) for _ in range(count)])
