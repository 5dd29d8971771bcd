"""The autoencoder of latent diffusion: a normal law of latents for each image, nearly a point (Rombach et al. 2022)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from ddjax import random
from ddjax.denoisers.functional import Functional, functional_init
from ddjax.denoisers.layers.convolution import Conv, GroupNorm, Resampling, ResBlock
from ddjax.denoisers.u_shaped import check_sides
from ddjax.types import Keys, Params

Latents = Float[Array, "batch h w channels"]


class Posterior(NamedTuple):
    """q(z | x), independent normals."""

    mean: Latents
    log_variance: Latents

    def sample(self, keys: Keys) -> Latents:
        """One draw, one key per example."""
        return self.mean + jnp.exp(0.5 * self.log_variance) * random.normal(keys, self.mean.shape[1:])

    def kl(self) -> Float[Array, " batch"]:
        """KL(q || N(0, 1)) of each example, nats."""
        terms = self.mean**2 + jnp.exp(self.log_variance) - 1.0 - self.log_variance
        return 0.5 * jnp.sum(terms, axis=(1, 2, 3))


@dataclasses.dataclass(frozen=True)
class KLAutoencoder:
    """Images to a law of latents and back. Frozen and compared by value; `params` is a plain dict of arrays.

    (Rombach et al. 2022, appendix E.3; CompVis/latent-diffusion's and diffusers' `AutoencoderKL`.) Residual blocks at
    each resolution, attention in the middle; convolutions of one pixel behind the encoder and before the decoder.

    shape: (H, W, C) of one image, values in [-1, 1]. channels: of the latents.
    width, multipliers: features at each resolution, the sides halving from one to the next. blocks: residual ones at
        each on the way down, one more on the way up. attend_at: heights at which they attend too.
    groups: of norms. middle_attention; quant: the convolutions of one pixel, behind the encoder and before the decoder.
    Raises ValueError for sizes that do not divide.
    """

    shape: tuple[int, int, int]
    channels: int = 4
    width: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    attend_at: tuple[int, ...] = ()
    groups: int = 32
    middle_attention: bool = True
    quant: tuple[bool, bool] = (True, True)

    def __post_init__(self):
        for name in ("shape", "multipliers", "attend_at", "quant"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.shape) != 3:
            raise ValueError(f"shape={self.shape}: expected (H, W, C) of one image")
        check_sides(self.shape, len(self.multipliers), self.blocks, self.attend_at)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Of one example's latents."""
        halvings = len(self.multipliers) - 1
        return self.shape[0] >> halvings, self.shape[1] >> halvings, self.channels

    def init(self, key: Key[Array, ""]) -> Params:
        """Parameters, `{"encoder": ..., "decoder": ...}`. Pure."""
        return _functional(self)["whole"].init(key)

    def posterior(self, params: Params, x: Float[Array, "batch H W C"]) -> Posterior:
        """The law of an image's latents. Raises ValueError for another shape."""
        if x.shape[1:] != self.shape:
            raise ValueError(f"images have shape {x.shape}; the autoencoder was built for (batch, *{self.shape})")
        moments = _functional(self)["encoder"].apply(params["encoder"], x, None)
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return Posterior(mean, jnp.clip(log_variance, -30.0, 20.0))

    def encode(self, params: Params, x: Float[Array, "batch H W C"]) -> Latents:
        """The mean of the law."""
        return self.posterior(params, x).mean

    def decode(self, params: Params, latents: Latents) -> Float[Array, "batch H W C"]:
        """Images, not clipped."""
        return _functional(self)["decoder"].apply(params["decoder"], latents, None)


class KLNetwork(nnx.Module):
    """Both halves of a `KLAutoencoder`; called, an image comes back by the mean of its latents."""

    def __init__(self, autoencoder: KLAutoencoder, *, rngs: nnx.Rngs):
        self.encoder, self.decoder = Encoder(autoencoder, rngs=rngs), Decoder(autoencoder, rngs=rngs)

    def __call__(self, x: Float[Array, "batch H W C"], t: Any = None, cond: Any = None, *, rng=None, train=False):
        """`(batch, H, W, C)`."""
        return self.decoder(jnp.split(self.encoder(x), 2, axis=-1)[0])


class Encoder(nnx.Module):
    """An image to means and log-variances of latents, `(batch, h, w, 2 channels)`."""

    def __init__(self, a: KLAutoencoder, *, rngs: nnx.Rngs):
        block, norm = _parts(a, rngs)
        widths = [m * a.width for m in a.multipliers]
        self.start = Conv(a.shape[2], a.width, rngs=rngs)
        layers, features = [], a.width
        for i, width in enumerate(widths):
            layers += [Resampling(features, "down", padding=(0, 1), dtype=jnp.float32, rngs=rngs)] if i else []
            for _ in range(a.blocks):
                layers.append(block(features, width, a.shape[0] >> i in a.attend_at))
                features = width
        self.blocks = nnx.List(layers)
        self.middle = nnx.List([block(features, features, attends) for attends in (a.middle_attention, False)])
        self.norm = norm(features)
        self.out = Conv(features, 2 * a.channels, rngs=rngs)
        self.quant = Conv(2 * a.channels, 2 * a.channels, 1, rngs=rngs) if a.quant[0] else None

    def __call__(self, x: Float[Array, "batch H W C"], t: Any = None, cond: Any = None, *, rng=None, train=False):
        """Called as all networks are, so that `denoisers.functional` fits; only x counts."""
        h = self.start(x)
        for layer in (*self.blocks, *self.middle):
            h = layer(h, None)
        h = self.out(jax.nn.silu(self.norm(h)))
        return h if self.quant is None else self.quant(h)


class Decoder(nnx.Module):
    """Latents to an image. Called as `Encoder` is."""

    def __init__(self, a: KLAutoencoder, *, rngs: nnx.Rngs):
        block, norm = _parts(a, rngs)
        features = a.multipliers[-1] * a.width
        self.quant = Conv(a.channels, a.channels, 1, rngs=rngs) if a.quant[1] else None
        self.start = Conv(a.channels, features, rngs=rngs)
        self.middle = nnx.List([block(features, features, attends) for attends in (a.middle_attention, False)])
        layers = []
        for i, multiplier in reversed(list(enumerate(a.multipliers))):
            for _ in range(a.blocks + 1):
                layers.append(block(features, multiplier * a.width, a.shape[0] >> i in a.attend_at))
                features = multiplier * a.width
            layers += [Resampling(features, "up", padding=(1, 1), dtype=jnp.float32, rngs=rngs)] if i else []
        self.blocks = nnx.List(layers)
        self.norm = norm(features)
        self.out = Conv(features, a.shape[2], rngs=rngs)

    def __call__(self, x: Latents, t: Any = None, cond: Any = None, *, rng=None, train=False):
        """`(batch, H, W, C)`."""
        h = self.start(x if self.quant is None else self.quant(x))
        for layer in (*self.middle, *self.blocks):
            h = layer(h, None)
        return self.out(jax.nn.silu(self.norm(h)))


def _parts(a: KLAutoencoder, rngs: nnx.Rngs) -> Sequence[Any]:
    """What makes a residual block, and a norm."""
    norm = partial(GroupNorm, groups=a.groups, epsilon=1e-6)

    def block(features_in: int, features_out: int, attends: bool) -> ResBlock:
        return ResBlock(features_in, features_out, cond_width=0, heads=int(attends), norm=norm, rngs=rngs)

    return block, norm


@functools.cache
def _functional(autoencoder: KLAutoencoder) -> dict[str, Functional]:
    """Traced once for each architecture."""
    a = autoencoder
    return {
        "whole": functional_init(lambda rngs: KLNetwork(a, rngs=rngs)),
        "encoder": functional_init(lambda rngs: Encoder(a, rngs=rngs)),
        "decoder": functional_init(lambda rngs: Decoder(a, rngs=rngs)),
    }
