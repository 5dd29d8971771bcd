"""Images as the latents of an autoencoder: what latent diffusion is trained on, and how its samples are shown."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddjax.data.dataset import Dataset, Source
from ddjax.types import Params

CHUNK = 64  # images encoded or decoded at once


@dataclasses.dataclass(frozen=True)
class Latents:
    """An autoencoder in a file, and by what its latents are multiplied (Rombach et al. 2022, section G).

    path: what `ddjax.autoencoders.save` wrote, read when it is first needed. scale: 1 over the latents' standard
        deviation, so that what is diffused has about 1 (0.18215 for Stable Diffusion's).
    """

    path: str
    scale: float

    @functools.cached_property
    def read(self) -> tuple[Any, Params]:
        """The autoencoder and its parameters. Raises FileNotFoundError, and ValueError for another file."""
        from ddjax import autoencoders  # here: only where there are latents

        return autoencoders.load(self.path)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of what they are latents of."""
        return self.read[0].shape

    def moments(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Means and standard deviations of the latents of images `(n, H, W, C)` in [-1, 1], before the scale."""
        autoencoder, params = self.read
        parts = [_moments(autoencoder, params, images[i : i + CHUNK]) for i in range(0, len(images), CHUNK)]
        return tuple(np.concatenate([np.asarray(part[k]) for part in parts]) for k in (0, 1))

    def decode(self, latents: Any) -> np.ndarray:
        """Images of scaled latents `(n, h, w, channels)`, float32, not clipped."""
        autoencoder, params = self.read
        latents = np.asarray(latents, np.float32) / np.float32(self.scale)
        parts = [_decoded(autoencoder, params, latents[i : i + CHUNK]) for i in range(0, len(latents), CHUNK)]
        return np.concatenate([np.asarray(part) for part in parts])


@functools.partial(jax.jit, static_argnums=0)
def _moments(autoencoder: Any, params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    if not hasattr(autoencoder, "posterior"):
        mean = autoencoder.encode(params, x)
        return mean, jnp.zeros_like(mean)
    posterior = autoencoder.posterior(params, x)
    return posterior.mean, jnp.exp(0.5 * posterior.log_variance)


@functools.partial(jax.jit, static_argnums=0)
def _decoded(autoencoder: Any, params: Params, latents: jax.Array) -> jax.Array:
    return autoencoder.decode(params, latents)


@dataclasses.dataclass(frozen=True, eq=False)
class _Encoded:
    """See `encoded`."""

    source: Source
    latents: Latents
    rounds: int
    seed: int

    def __len__(self) -> int:
        return self.rounds * len(self.source)

    def __getitem__(self, index: np.ndarray) -> dict[str, Any]:
        index = np.asarray(index)
        items = self.source[index % len(self.source)]
        mean, std = self.latents.moments(items["x0"])
        noise = [np.random.default_rng((self.seed, int(row))).standard_normal(mean.shape[1:], np.float32)
                 for row in index]  # fmt: skip
        return {**items, "x0": np.float32(self.latents.scale) * (mean + std * np.stack(noise).reshape(mean.shape))}


def encoded(data: Dataset, latents: Latents, rounds: int = 1, seed: int = 0) -> Dataset:
    """The data with latents in the place of images: scale times a draw from q(z | x), encoded when they are read.

    A draw goes by the item's row, the same in every epoch; with `rounds`, items come so many times in an epoch, with
    other draws. `Dataset.to_images` decodes. Labels and conditions stay.
    Raises ValueError for tokens, and for images of another shape than the autoencoder's.
    """
    if data.num_symbols is not None:
        raise ValueError(f"{data.name!r} are tokens: latents are of images with values (config.data.tokens=False)")
    autoencoder = latents.read[0]
    if data.shape != autoencoder.shape:
        raise ValueError(f"images of {data.name!r} have shape {data.shape}, the autoencoder's {autoencoder.shape}")
    if rounds < 1 or (rounds > 1 and data.mixture is not None):
        raise ValueError(f"rounds must be at least 1, and 1 for a mixture of sources, got {rounds}")
    return dataclasses.replace(
        data,
        source=_Encoded(data.source, latents, rounds, seed),
        shape=tuple(autoencoder.latent_shape),
        levels=None,
        latents=latents,
    )


def scale_of(data: Dataset, path: str | Path, count: int = 256) -> float:
    """1 over the standard deviation of the latents of the first items, all numbers together (Rombach et al. 2022)."""
    found = encoded(data, Latents(str(path), 1.0))[: min(count, len(data))]["x0"]
    return float(1.0 / np.std(found, dtype=np.float64))


__all__ = ["Latents", "encoded", "scale_of"]
