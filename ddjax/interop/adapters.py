"""What stands between our process and a published network: its time, its tokens, its outputs.

Each is an `apply` around another; all are compared by value, as `denoisers.ModuleApply` is.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ddjax.denoisers.layers.embed import TIME_SCALE
from ddjax.guidance import classifier_free
from ddjax.predictions import Prediction
from ddjax.predictions import evaluations as cost
from ddjax.pytrees import as_pytree
from ddjax.schedules import Survival
from ddjax.types import Apply, Denoise, Params, SoftTokens, left_broadcast


@dataclasses.dataclass(frozen=True)
class OtherTime:
    """A network that is told `factor t + offset` (factor 999 / 1000: its 1000 steps are numbered 0 to 999)."""

    apply: Apply
    factor: float
    offset: float = 0.0

    def __call__(self, params: Params, xt: Any, t: Any, cond: Any = None, **options: Any) -> Array:
        """Run the network."""
        return self.apply(params, xt, self.factor * jnp.asarray(t) + self.offset, cond, **options)


@dataclasses.dataclass(frozen=True)
class ToldNoise:
    """A network that is told the total noise, -log alpha(t), as it is, or 0 at all times."""

    apply: Apply
    schedule: Survival
    timed: bool = True

    def __call__(self, params: Params, xt: Any, t: Any, cond: Any = None, **options: Any) -> Array:
        """Run the network."""
        t = jnp.asarray(t)
        told = total_noise(self.schedule, t) / TIME_SCALE if self.timed else jnp.zeros_like(t)
        return self.apply(params, xt, told, cond, **options)


@dataclasses.dataclass(frozen=True)
class WithMask:
    """A masked process's states and symbols, for a network whose vocabulary has the mask as token `mask`.

    The process's mask is its last state. Where the network's is too, nothing moves; else `mask` is no symbol that data
    have, and is never predicted. All other tokens keep their numbers.
    """

    apply: Apply
    mask: int
    num_symbols: int

    def __call__(self, params: Params, xt: Any, t: Any, cond: Any = None, **options: Any) -> Array:
        """Run the network."""
        logits = self.apply(params, self._theirs(xt), t, cond, **options)[..., : self.num_symbols]
        if self.mask == self.num_symbols:
            return logits
        return jnp.where(jnp.arange(self.num_symbols) == self.mask, -1e30, logits)

    def _theirs(self, xt: Any) -> Any:
        if self.mask == self.num_symbols:
            return xt
        if isinstance(xt, SoftTokens):
            return xt._replace(ids=self._theirs(xt.ids))
        if jnp.issubdtype(xt.dtype, jnp.floating):
            return xt[..., : self.num_symbols].at[..., self.mask].add(xt[..., self.num_symbols])
        return jnp.where(xt == self.num_symbols, self.mask, xt)


@dataclasses.dataclass(frozen=True)
class LogScores:
    """A network of score entropy under masks (Lou et al. 2024, section 4 and code): its output becomes log ratios.

    scaled: log(exp(total noise) - 1) and log(states - 1) are taken away, so that an output near 0 is likely.
    The ratio of the state that a site shows is 1.
    """

    apply: Apply
    schedule: Survival
    scaled: bool

    def __call__(self, params: Params, xt: Any, t: Any, cond: Any = None, **options: Any) -> Array:
        """Run the network."""
        out = self.apply(params, xt, t, cond, **options)
        if self.scaled:
            t = jnp.broadcast_to(jnp.asarray(t), out.shape[:1])
            # exp(-log alpha) - 1 = sigma / alpha
            odds = jnp.log(self.schedule.sigma(t)) - jnp.log(self.schedule.alpha(t))
            odds = jnp.where(t > 0, odds, 0.0)  # at t = 0 there is no mask to say anything of
            out = out - left_broadcast(odds, out) - jnp.log(out.shape[-1] - 1.0)
        return jnp.where(jax.nn.one_hot(xt, out.shape[-1], dtype=bool), 0.0, out)


@dataclasses.dataclass(frozen=True)
class TowardsData:
    """A flow's network that is told 1 - t, 0 at noise, and gives the velocity towards the data, minus ours.

    channels: how many of its outputs are the velocity (the others were never trained, and are cut off).
    """

    apply: Apply
    channels: int

    def __call__(self, params: Params, xt: Any, t: Any, cond: Any = None, **options: Any) -> Array:
        """Run the network."""
        out = self.apply(params, xt, (1.0 - jnp.asarray(t)) / TIME_SCALE, cond, **options)
        return -out[..., : self.channels]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GuidedChannels:
    """Classifier-free guidance of the first outputs only; the others are as the condition says (DiT's sampler)."""

    denoise: Denoise
    null: Any
    scale: jax.Array
    channels: int = dataclasses.field(metadata={"static": True})

    @property
    def evaluations(self) -> int:
        """Two network evaluations a call."""
        return 2 * cost(self.denoise)

    def __call__(self, xt: Array, t: Array, cond: Any = None) -> Prediction:
        """Guided."""
        kept: list[Prediction] = []

        def both(*arguments: Any) -> Prediction:
            kept.append(self.denoise(*arguments))
            return kept[-1]

        guided = classifier_free(both, null=self.null, scale=self.scale)(xt, t, cond)
        conditional = jnp.split(kept[-1].value, 2)[0]
        first = jnp.arange(conditional.shape[-1]) < self.channels
        return Prediction(jnp.where(first, guided.value, conditional), guided.kind)


def guided_channels(denoise: Denoise, *, null: Any, scale: float, channels: int) -> Denoise:
    """`guidance.classifier_free` of the first `channels` outputs; scale 1 returns the denoiser itself."""
    if scale == 1.0:
        return denoise
    return GuidedChannels(as_pytree(denoise), null, jnp.asarray(scale, jnp.result_type(float)), channels)


def total_noise(schedule: Survival, t: Array) -> Array:
    """-log alpha(t), from sigma = 1 - alpha where that is small."""
    sigma = schedule.sigma(t)
    return jnp.where(sigma < 0.5, -jnp.log1p(-jnp.minimum(sigma, 0.5)), -jnp.log(schedule.alpha(t)))
