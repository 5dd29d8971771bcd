"""Guidance away from what the same network says of less: with its attention disturbed, or of a blurred state."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

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
    _among_themselves(weights, "perturbed-attention")
    return jnp.broadcast_to(jnp.eye(weights.shape[-1], dtype=weights.dtype), weights.shape)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SelfAttention:
    """See `self_attention`."""

    denoise: Denoise
    scale: jax.Array
    block: str = dataclasses.field(metadata={"static": True})
    process: Any = dataclasses.field(metadata={"static": True})
    threshold: float = dataclasses.field(metadata={"static": True})
    sigma: float = dataclasses.field(metadata={"static": True})
    kernel: int = dataclasses.field(metadata={"static": True})

    @property
    def evaluations(self) -> int:
        """Two network evaluations a call."""
        return 2 * cost(self.denoise)

    def __call__(self, xt: State, t: Time, cond: Any = None) -> Prediction:
        """Extrapolate from the prediction of the blurred state through the state's own, which listeners hear."""
        at, process = f"{self.block}/attention/weights", self.process
        with taps.record(at) as seen:
            strong = self.denoise(xt, t, cond)
        x0 = process.convert(strong, "x0", xt, t).value
        blur = jnp.where(_attended(seen[at], xt, self.threshold), _blurred(x0, self.sigma, self.kernel) - x0, 0.0)
        moved = process.noiseless(blur, t)  # of the state, whose noise stays as predicted
        with taps.unheard():
            weak = self.denoise(xt + moved, t, cond)
        # What is predicted is linear in x0 and noise. Without the blur's own part it is what the noise of the blurred
        # state says of x_t: noises are compared, as in the paper, whatever is predicted.
        own = process.convert(Prediction(blur, "x0"), strong.kind, moved, t).value
        if strong.value.shape[:-1] != own.shape[:-1]:
            raise ValueError(
                f"self-attention guidance needs one statement of a state: a prediction of shape {strong.value.shape} "
                f"is none of one of shape {xt.shape}"
            )
        (plain, beside), (weak, _) = (jnp.split(out.value, [own.shape[-1]], axis=-1) for out in (strong, weak))
        # A learned variance stays.
        return Prediction(jnp.concatenate([along(plain, weak - own, self.scale), beside], axis=-1), strong.kind)


def self_attention(
    denoise: Denoise,
    block: str,
    process: Any,
    *,
    scale: float,
    threshold: float = 1.0,
    sigma: float = 1.0,
    kernel: int = 9,
) -> Denoise:
    """Guide away from the state that is blurred where the network attends (self-attention guidance): no condition.

    `weak + scale * (strong - weak)`, of noises, whatever the network predicts: Hong et al. 2023, arXiv:2210.00939,
    "Improving sample quality of diffusion models using self-attention guidance", equation 16, whose scale is one less
    than this. The map of a block, averaged over heads, says how much each of its sites is seen by all together; where
    that exceeds the threshold the predicted x0 is blurred, and has its predicted noise added again.

    denoise: the network's own; other guidance goes around this one. `classifier_free(self_attention(...), ...)` has it
        on both sides and costs four evaluations. The paper's combination (equation 25), u + g (c - u) + s (u - u_weak)
        with u told no condition, costs three:
        `by_weaker(denoise, self_attention(denoise, ..., scale=1 - s / (g - 1)), scale=g, told=False)`.
    block: whose map of self-attention is looked at, by the name of its taps (`ddjax.taps`): "middle/0" of a U-Net,
        "block/7" of a transformer. Its sites are those of the state `(batch, *sides, channels)`, row by row, or
        squares (intervals, cubes) of them.
    process: whose states are, but for their noise, linear in x0: `Gaussian`, `InBasis`, `LinearSDE`, `Interpolant`.
    scale: 1 is off, and returns the denoiser itself. Each call costs two network evaluations.
    threshold: of what a site gets from all, 1 on average.
    sigma, kernel: of the Gaussian blur, in sites of the state, and how many of its weights are used, along each side.
        The defaults are diffusers'; the authors' code has 3 or 9 and 31.

    Raises ValueError for another process or an even kernel; and when called, for a block that has no attention among
    its own sites, or is scanned, or whose sites are not those of a grid of the state.
    """
    if isinstance(scale, (int, float)) and scale == 1.0:
        return denoise
    if process.state != "gaussian" or not hasattr(process, "noiseless") or not {"noise", "velocity"} & {*process.kinds}:
        raise ValueError(
            f"{type(process).__name__} does not say a state by x0 and noise alone: self-attention guidance is for "
            "Gaussian processes and interpolants (of Geometric: for `on_log` and its process)"
        )
    if kernel < 1 or kernel % 2 == 0 or not sigma > 0:
        raise ValueError(f"kernel={kernel}, sigma={sigma}: expected an odd number of weights, and a positive width")
    scale = jnp.asarray(scale, jnp.result_type(float))
    return SelfAttention(as_pytree(denoise), scale, block, process, threshold, sigma, kernel)


def _attended(
    weights: Float[Array, "batch heads sites keys"], xt: State, threshold: float
) -> Bool[Array, "batch *sides one"]:
    """Where in the state the sites lie that get more than the threshold from all together."""
    _among_themselves(weights, "self-attention")
    batch, *sides, _ = xt.shape
    count, grids = weights.shape[-1], {}
    for side in range(1, max(sides, default=0) + 1):
        if not any(whole % side for whole in sides):
            grids[np.prod([whole // side for whole in sides])] = side
    if weights.shape[0] != batch or count not in grids:
        raise ValueError(
            f"the attention map {weights.shape} is not of the sites of a state {xt.shape}: expected {batch} examples "
            f"of {' or '.join(map(str, grids)) or 'no'} sites (put classifier-free guidance around self-attention "
            "guidance, not within)"
        )
    side = grids[count]
    got = weights.mean(axis=1).sum(axis=1)
    mask = (got > threshold).reshape(batch, *(whole // side for whole in sides), 1)
    for axis in range(1, len(sides) + 1):
        mask = jnp.repeat(mask, side, axis)
    return mask


def _blurred(
    x: Float[Array, "batch *sides channels"], sigma: float, kernel: int
) -> Float[Array, "batch *sides channels"]:
    """Each channel under a Gaussian filter of so many weights along every side, the state reflected at its ends."""
    offsets = np.arange(kernel) - kernel // 2
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    for axis in range(1, x.ndim - 1):
        margins = [(kernel // 2, kernel // 2) if i == axis else (0, 0) for i in range(x.ndim)]
        wide = jnp.pad(x, margins, mode="reflect")
        parts = (jax.lax.slice_in_dim(wide, i, i + x.shape[axis], axis=axis) for i in range(kernel))
        x = sum(float(w) * part for w, part in zip(weights / weights.sum(), parts, strict=True))
    return x


def _among_themselves(weights: Float[Array, "batch heads sites keys"], kind: str) -> None:
    """Raise ValueError for a map that is not of sites to themselves."""
    if weights.shape[-2] != weights.shape[-1]:
        raise ValueError(
            f"the attention map {weights.shape} is not of sites to themselves: {kind} guidance is for blocks where "
            "all sites, and nothing else, are seen"
        )
