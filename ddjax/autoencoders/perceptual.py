"""LPIPS: how different two images look to a network of photographs (Zhang et al. 2018), with given weights."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# VGG16's convolutions, by their numbers among its layers, up to the ReLU of each part; the parts are pooled in between.
PARTS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Perceptual:
    """The distance, with its weights.

    kernels, biases: of the convolutions of each of five parts, `(3, 3, in, out)` and `(out,)`. mixes: what squared
        differences of features count, `(features,)` for each part.
    """

    kernels: tuple[tuple[Array, ...], ...]
    biases: tuple[tuple[Array, ...], ...]
    mixes: tuple[Array, ...]

    def features(self, x: Float[Array, "batch H W 3"]) -> list[Float[Array, "batch h w features"]]:
        """What each part says of images in [-1, 1], of unit length at each pixel. One channel counts as three."""
        if x.shape[-1] == 1:
            x = jnp.broadcast_to(x, (*x.shape[:-1], 3))
        h, found = (x - jnp.asarray(SHIFT, x.dtype)) / jnp.asarray(SCALE, x.dtype), []
        for i, (kernels, biases) in enumerate(zip(self.kernels, self.biases, strict=True)):
            if i:
                h = jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
            for kernel, bias in zip(kernels, biases, strict=True):
                h = jax.lax.conv_general_dilated(
                    h, kernel.astype(h.dtype), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
                h = jax.nn.relu(h + bias)
            # A pixel without features has length 0, where a square root has no gradient.
            square = jnp.sum(h * h, axis=-1, keepdims=True)
            length = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
            found.append(h / (length + 1e-10))
        return found

    def __call__(self, x: Float[Array, "batch H W C"], y: Float[Array, "batch H W C"]) -> Float[Array, " batch"]:
        """The distance of each pair of images. Raises ValueError for images that five parts cannot halve."""
        if min(x.shape[1:3]) < 16:
            raise ValueError(f"images of shape {x.shape[1:3]} are too small for LPIPS: it halves the sides four times")
        parts = zip(self.features(x), self.features(y), self.mixes, strict=True)
        return sum(jnp.mean(((a - b) ** 2) @ mix, axis=(1, 2)) for a, b, mix in parts)


def load(path: str | os.PathLike) -> Perceptual:
    """Weights from a safetensors file: the state dict of taming-transformers' `LPIPS`, VGG16 and linear layers.

    "net.slice1.0.weight" and so on, and "lin0.model.1.weight" (or "model.0", without its dropout). Raises ValueError
    that names what is missing or mis-shaped, FileNotFoundError.
    """
    from safetensors.numpy import load_file

    if not Path(path).exists():
        raise FileNotFoundError(f"there is no {path}")
    return of(load_file(path))


def of(tensors: Mapping[str, np.ndarray]) -> Perceptual:
    """See `load`."""
    layers = {(i, n): f"net.slice{i + 1}.{n}" for i, part in enumerate(PARTS) for n in part}
    mixes = [next((n for n in (f"lin{i}.model.1.weight", f"lin{i}.model.0.weight") if n in tensors), None)
             for i in range(len(PARTS))]  # fmt: skip
    missing = [f"{name}.{part}" for name in layers.values() for part in ("weight", "bias")
               if f"{name}.{part}" not in tensors]  # fmt: skip
    missing += [f"lin{i}.model.1.weight" for i, name in enumerate(mixes) if name is None]
    if missing:
        raise ValueError(f"these are not LPIPS's weights: missing {', '.join(missing[:6])} ({len(missing)})")
    features, wrong = 3, []
    for (i, n), name in layers.items():
        shape = tensors[f"{name}.weight"].shape
        if len(shape) != 4 or shape[1:] != (features, 3, 3):
            wrong.append(f"{name}.weight has {shape}, expected (out, {features}, 3, 3)")
        features = shape[0]
        if n == PARTS[i][-1] and tensors[mixes[i]].size != features:
            wrong.append(f"{mixes[i]} has {tensors[mixes[i]].shape}, expected (1, {features}, 1, 1)")
    if wrong:
        raise ValueError(f"these are not LPIPS's weights: {'; '.join(wrong)}")
    weights = lambda i, part: tuple(np.asarray(tensors[f"{layers[i, n]}.{part}"]) for n in PARTS[i])  # noqa: E731
    return Perceptual(
        tuple(tuple(jnp.asarray(w.transpose(2, 3, 1, 0)) for w in weights(i, "weight")) for i in range(len(PARTS))),
        tuple(tuple(jnp.asarray(b) for b in weights(i, "bias")) for i in range(len(PARTS))),
        tuple(jnp.asarray(tensors[name].reshape(-1)) for name in mixes),
    )
