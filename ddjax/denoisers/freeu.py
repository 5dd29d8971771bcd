"""FreeU: what a U-Net's backbone and its skip connections weigh, changed without training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ddjax import taps
from ddjax.denoisers.layers.basic import at_least_float32
from ddjax.types import Apply

Image = Float[Array, "batch H W features"]


@dataclasses.dataclass(frozen=True)
class Backbone:
    """The first half of the features times a factor (Si et al. 2023, equations 4 and 5).

    The factor of a pixel is 1 + (b - 1) m: m is the mean over all features, scaled to [0, 1] in each example, or 1
    where `adaptive` is False (their first version, which diffusers has).
    """

    b: float
    adaptive: bool = True

    def __call__(self, h: Image) -> Image:
        """Of the features."""
        if self.b == 1:
            return h
        x = h.astype(at_least_float32(h.dtype))
        mean = jnp.ones(())
        if self.adaptive:
            mean = x.mean(axis=-1, keepdims=True)
            low, high = (f(mean, axis=(1, 2), keepdims=True) for f in (jnp.min, jnp.max))
            mean = (mean - low) / jnp.where(high > low, high - low, 1)
        first = jnp.arange(x.shape[-1]) < x.shape[-1] // 2
        return (x * jnp.where(first, 1 + (self.b - 1) * mean, 1)).astype(h.dtype)


@dataclasses.dataclass(frozen=True)
class Skip:
    """The lowest frequencies of a skip connection times s (Si et al. 2023, equations 6 to 8).

    Those from -threshold to threshold - 1 of both axes, as in their code; the real part is kept.
    """

    s: float
    threshold: int = 1

    def __call__(self, h: Image) -> Image:
        """Of the features."""
        if self.s == 1:
            return h
        x = h.astype(at_least_float32(h.dtype))
        low = [self._low(side) for side in x.shape[1:3]]
        kept = jnp.fft.fft2(x, axes=(1, 2)) * (low[0][:, None, None] & low[1][:, None])
        # The others stay what they are, bit for bit but for this sum.
        return (x + (self.s - 1) * jnp.fft.ifft2(kept, axes=(1, 2)).real).astype(h.dtype)

    def _low(self, side: int) -> np.ndarray:
        frequencies = np.fft.fftfreq(side, 1 / side)
        return (frequencies >= -self.threshold) & (frequencies < self.threshold)


def freeu(
    b: Sequence[float] = (1.2, 1.4),
    s: Sequence[float] = (0.9, 0.2),
    *,
    blocks: int = 2,
    adaptive: bool = True,
    threshold: int = 1,
) -> dict[str, Backbone | Skip]:
    """FreeU (Si et al. 2023, arXiv:2309.11497) as overrides of a U-Net's taps: `taps.override(freeu(...))`.

    Where a block on the way up joins the backbone and a skip connection, half of the backbone's features grow and the
    skip's low frequencies shrink. With 1 for all factors nothing changes, bit for bit.

    Args:
        b, s: factors of the backbone and of the skip connections at the lowest resolution, the next, and so on.
        blocks: of the network (`UNet`), which joins blocks + 1 times at each resolution.
        adaptive: see `Backbone`.
        threshold: see `Skip`.

    Raises:
        ValueError: for different numbers of b and s.
    """
    if len(b) != len(s):
        raise ValueError(f"b={tuple(b)}, s={tuple(s)}: expected one of each for each resolution")
    overrides: dict[str, Backbone | Skip] = {}
    for level, (factor, scale) in enumerate(zip(b, s, strict=True)):
        for n in range(level * (blocks + 1), (level + 1) * (blocks + 1)):
            overrides[f"backbone/{n}"] = Backbone(factor, adaptive)
            overrides[f"skip/{n}"] = Skip(scale, threshold)
    return overrides


@dataclasses.dataclass(frozen=True)
class FreeU:
    """A U-Net under FreeU, for sampling: `ddjax.bind(FreeU(apply, blocks=3), ...)`.

    Hashable and compared by value, as `apply` is. The options are those of `freeu`.
    """

    apply: Apply
    b: tuple[float, ...] = (1.2, 1.4)
    s: tuple[float, ...] = (0.9, 0.2)
    blocks: int = 2
    adaptive: bool = True
    threshold: int = 1

    @property
    def overrides(self) -> Mapping[str, Backbone | Skip]:
        """Of the taps."""
        return freeu(self.b, self.s, blocks=self.blocks, adaptive=self.adaptive, threshold=self.threshold)

    def __call__(self, params: Any, xt: Any, t: Any, cond: Any = None, **options: Any) -> Any:
        """Run the network."""
        with taps.override(self.overrides):
            return self.apply(params, xt, t, cond, **options)
