"""An autoencoder: an encoder and a decoder of convolutions, and a quantiser between them or none."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from ddjax.autoencoders.networks import Decoder, Encoder
from ddjax.autoencoders.quantisers import LookupFree, Quantised
from ddjax.denoisers.functional import Functional, functional_init
from ddjax.types import Params


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """Images to latents and back. Frozen and compared by value; `params` is a plain dict of arrays.

    shape: (H, W, C) of one image, values in [-1, 1].
    width: channels of the convolutions. halvings: how often the sides are halved. blocks: residual ones at each size.
    quantiser: None for continuous latents, `(H / 2**halvings, W / 2**halvings, channels)`.
    channels: of continuous latents; a quantiser says its own.
    Raises ValueError for sizes that do not divide.
    """

    shape: tuple[int, int, int]
    width: int = 32
    halvings: int = 2
    blocks: int = 1
    quantiser: LookupFree | None = None
    channels: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "shape", tuple(self.shape))
        side = 2**self.halvings
        if len(self.shape) != 3 or self.shape[0] % side or self.shape[1] % side:
            raise ValueError(f"shape={self.shape}: expected (H, W, C) with sides that 2**halvings = {side} divides")
        if (self.quantiser is None) == (self.channels is None):
            raise ValueError("give either a quantiser or the channels of continuous latents")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Of one example's latents."""
        side = 2**self.halvings
        channels = self.channels if self.quantiser is None else self.quantiser.channels
        return self.shape[0] // side, self.shape[1] // side, channels

    def init(self, key: Key[Array, ""]) -> Params:
        """Parameters, `{"encoder": ..., "decoder": ...}`. Pure."""
        keys = jax.random.split(key)
        return {name: f.init(k) for (name, f), k in zip(_networks(self).items(), keys, strict=True)}

    def encode(self, params: Params, x: Float[Array, "batch H W C"]) -> Float[Array, "batch h w channels"]:
        """Latents as the decoder wants them: quantised where there is a quantiser."""
        return self._quantised(params, x).value

    def decode(self, params: Params, latents: Float[Array, "batch h w channels"]) -> Float[Array, "batch H W C"]:
        """Images, not clipped."""
        return _networks(self)["decoder"].apply(params["decoder"], latents, None)

    def tokens(self, params: Params, x: Float[Array, "batch H W C"]) -> Int[Array, "batch h w groups"]:
        """The tokens of images. Raises ValueError without a quantiser."""
        return self._quantiser().tokens(self.encode(params, x))

    def from_tokens(self, params: Params, tokens: Int[Array, "batch h w groups"]) -> Float[Array, "batch H W C"]:
        """Images of tokens. Raises ValueError without a quantiser."""
        return self.decode(params, self._quantiser().values(tokens))

    def objective(
        self,
        key: Any,
        apply: Any,
        params: Params,
        x0: Float[Array, "batch H W C"],
        cond: Any = None,
        weights: Any = None,
        rows: Any = None,
        train: bool = True,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """The mean squared error of reconstructions, and the quantiser's loss: for `training.make_train_step`.

        Nothing is drawn: the key, the rows and `apply` (a network's, of which this has two) are not used. The
        quantiser's entropy is that of the examples at hand: of each microbatch, where batches are split.
        Raises ValueError for weights.
        """
        if weights is not None:
            raise ValueError("an autoencoder has no weights for its examples: leave out weights")
        code = self._quantised(params, x0)
        reconstruction = jnp.mean((self.decode(params, code.value) - x0) ** 2)
        return reconstruction + code.loss, {"reconstruction": reconstruction, **code.metrics}

    def _quantised(self, params: Params, x: Array) -> Quantised:
        if x.shape[1:] != self.shape:
            raise ValueError(f"images have shape {x.shape}; the autoencoder was built for (batch, *{self.shape})")
        z = _networks(self)["encoder"].apply(params["encoder"], x, None)
        return Quantised(z, jnp.zeros(()), {}) if self.quantiser is None else self.quantiser(z)

    def _quantiser(self) -> LookupFree:
        if self.quantiser is None:
            raise ValueError("this autoencoder's latents are continuous: it has no tokens without a quantiser")
        return self.quantiser


@functools.cache
def _networks(autoencoder: Autoencoder) -> dict[str, Functional]:
    """Traced once for each architecture."""
    a, channels = autoencoder, autoencoder.latent_shape[-1]
    sizes = {"width": a.width, "halvings": a.halvings, "blocks": a.blocks}
    return {
        "encoder": functional_init(lambda rngs: Encoder(a.shape[-1], channels, **sizes, rngs=rngs)),
        "decoder": functional_init(lambda rngs: Decoder(channels, a.shape[-1], **sizes, rngs=rngs)),
    }
