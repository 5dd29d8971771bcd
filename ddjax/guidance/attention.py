"""Guidance away from the same network whose attention is disturbed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddjax import taps
from ddjax.guidance.classifier_free import along
from ddjax.predictions import Prediction
from ddjax.predictions import evaluations as cost
from ddjax.pytrees import as_pytree
from ddjax.types import Denoise, State, Time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerturbedAttention:
    """See `perturbed_attention`."""

    denoise: Denoise
    scale: jax.Array
    blocks: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    @property
    def evaluations(self) -> int:
        """Two network evaluations a call."""
        return 2 * cost(self.denoise)

    def __call__(self, xt: State, t: Time, cond: Any = None) -> Prediction:
        """Extrapolate from the disturbed prediction through the network's own, which is what listeners hear."""
        strong = self.denoise(xt, t, cond)
        with taps.unheard(), taps.override({f"{block}/attention/weights": _to_itself for block in self.blocks}):
            weak = self.denoise(xt, t, cond)
        value = jax.tree.map(lambda s, w: along(s, w, self.scale), strong.value, weak.value)
        return Prediction(value, strong.kind)


def perturbed_attention(denoise: Denoise, blocks: Sequence[str], *, scale: float) -> Denoise:
    """Guide away from the network whose sites, in some blocks, attend to themselves alone: no condition is needed.

    `weak + scale * (strong - weak)`: Ahn et al. 2024, arXiv:2403.17377, "Self-rectifying diffusion sampling with
    perturbed-attention guidance", equations 14 to 16, whose scale is one less than this (theirs of 3: 4).

    blocks: whose map of self-attention is the identity, by the names of their taps (`ddjax.taps`): "middle/0" of a
        U-Net, "block/7" of a transformer. Published: those in the middle.
    scale: 1 is off, and returns the denoiser itself. Each call costs two network evaluations.

    Raises ValueError, when called, for a block that has no attention among its own sites, or is scanned.
    """
    if not blocks:
        raise ValueError("perturbed attention needs the names of blocks, such as 'middle/0': none were given")
    if isinstance(scale, (int, float)) and scale == 1.0:
        return denoise
    return PerturbedAttention(as_pytree(denoise), jnp.asarray(scale, jnp.result_type(float)), tuple(blocks))


def _to_itself(weights: Float[Array, "batch heads sites keys"]) -> Float[Array, "batch heads sites keys"]:
    if weights.shape[-2] != weights.shape[-1]:
        raise ValueError(
            f"the attention map {weights.shape} is not of sites to themselves: perturbed attention is for blocks where "
            "all sites, and nothing else, are seen"
        )
    return jnp.broadcast_to(jnp.eye(weights.shape[-1], dtype=weights.dtype), weights.shape)
