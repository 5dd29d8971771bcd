"""Guidance by another network: a classifier of noisy states, or a weaker denoiser."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddjax.guidance.classifier_free import along
from ddjax.predictions import Prediction
from ddjax.predictions import evaluations as cost
from ddjax.processes.gaussian import Normal, gaussian_of
from ddjax.pytrees import as_pytree
from ddjax.solvers.ancestral import Ancestral
from ddjax.types import Denoise, State, Time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ByClassifier:
    """See `by_classifier`."""

    denoise: Denoise
    log_prob: Callable
    scale: jax.Array
    process: Any = dataclasses.field(metadata={"static": True})
    told: bool = dataclasses.field(metadata={"static": True})

    @property
    def evaluations(self) -> int:
        """Those of the denoiser; the classifier's are not counted."""
        return cost(self.denoise)

    def plain(self, xt: State, t: Time, cond: Any) -> Prediction:
        """What the denoiser says without the classifier."""
        return self.denoise(xt, t, cond if self.told else None)

    def gradient(self, xt: State, t: Time, cond: Any) -> Float[Array, batch * sites]:
        """`scale` times the gradient of log p(cond | x_t) in x_t."""
        return self.scale * jax.grad(lambda x: self.log_prob(x, t, cond).sum())(xt)

    def __call__(self, xt: State, t: Time, cond: Any = None) -> Prediction:
        """The denoiser's prediction, of the state whose score has the gradient added."""
        out, process = self.plain(xt, t, cond), self.process
        score = process.convert(out, "score", xt, t).value + self.gradient(xt, t, cond)
        value = process.convert(Prediction(score, "score"), out.kind, xt, t).value
        beside = out.value[..., value.shape[-1] :]  # a learned variance stays
        return Prediction(jnp.concatenate([value, beside], axis=-1), out.kind)


def by_classifier(
    denoise: Denoise, log_prob: Callable, process: Any, *, scale: float, told: bool = False
) -> ByClassifier:
    """Guide by a classifier of noisy states: the score gains `scale` grad log p(cond | x_t).

    (Dhariwal & Nichol 2021, section 4; as a denoiser it is their algorithm 2, for any solver. `GuidedMean` is their
    algorithm 1, ancestral sampling, for this denoiser alone.) Of continuous states under a Gaussian process.

    log_prob: `(xt, t, cond) -> (batch,)`, log p(cond | x_t); a registered pytree keeps its parameters out of the
        compiled program (`jax.tree_util.Partial`).
    told: whether the denoiser is told the condition too.
    """
    scale = jnp.asarray(scale, jnp.result_type(float))
    return ByClassifier(as_pytree(denoise), as_pytree(log_prob), scale, process, told)


@dataclasses.dataclass(frozen=True)
class GuidedMean(Ancestral):
    """Ancestral steps whose mean moves by their variance times the gradient (Dhariwal & Nichol 2021, algorithm 1).

    The denoiser is one of `by_classifier`; another raises ValueError. Of an interpolant from Gaussian noise the steps
    are those of the Gaussian process that it is: in a step of its own the score has another weight than the variance.
    """

    def __post_init__(self):
        object.__setattr__(self, "process", gaussian_of(self.process) or self.process)

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        """One draw."""
        if not isinstance(denoise, ByClassifier):
            raise ValueError("GuidedMean moves means by a classifier's gradient: give it guidance.by_classifier(...)")

        def law(prediction, xt, s, t):
            plain = self.process.reverse(prediction, xt, s, t)
            times = jnp.broadcast_to(jnp.asarray(t, xt.dtype), xt.shape[:1])
            return Normal(plain.mean + plain.std**2 * denoise.gradient(xt, times, cond), plain.std)

        moved = _Moved(self.process, law)
        return Ancestral(moved, self.noise).step(keys, carry, xt, t, s, denoise.plain, cond)


@dataclasses.dataclass(frozen=True)
class _Moved:
    """A process of another reverse step."""

    process: Any
    reverse: Callable


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ByWeaker:
    """See `by_weaker`."""

    denoise: Denoise
    weaker: Denoise
    scale: jax.Array
    told: bool = dataclasses.field(metadata={"static": True})

    @property
    def evaluations(self) -> int:
        """Those of both."""
        return cost(self.denoise) + cost(self.weaker)

    def __call__(self, xt: State, t: Time, cond: Any = None) -> Prediction:
        """Extrapolate from the weaker prediction through the other."""
        strong, weak = self.denoise(xt, t, cond), self.weaker(xt, t, cond if self.told else None)
        if strong.kind != weak.kind:
            raise ValueError(
                f"the denoisers predict {strong.kind!r} and {weak.kind!r}: guidance needs the same of both"
            )
        value = jax.tree.map(lambda s, w: along(s, w, self.scale), strong.value, weak.value)
        return Prediction(value, strong.kind)


def by_weaker(denoise: Denoise, weaker: Denoise, *, scale: float, told: bool = True) -> Denoise:
    """Guide away from a weaker denoiser: `weak + scale * (strong - weak)`, of the same process and kind.

    The weaker one is a smaller or less trained network (autoguidance, Karras et al. 2024, "Guiding a diffusion model
    with a bad version of itself"), or one without labels (EDM2's classifier-free guidance, Karras et al. 2024).
    told: whether it is told the condition. scale: 1 is off, and returns the denoiser itself.
    """
    if isinstance(scale, (int, float)) and scale == 1.0:
        return denoise
    return ByWeaker(as_pytree(denoise), as_pytree(weaker), jnp.asarray(scale, jnp.result_type(float)), told)
