"""Classifier-free guidance (Ho & Salimans 2022), for any state space."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ddjax.nulls import nullified
from ddjax.predictions import LOGIT_KINDS, Prediction
from ddjax.predictions import evaluations as cost
from ddjax.pytrees import as_pytree
from ddjax.taps import GUIDANCE, tap
from ddjax.types import Denoise, State, Time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ClassifierFree:
    """See `classifier_free`."""

    denoise: Denoise
    null: Any
    scale: jax.Array

    @property
    def evaluations(self) -> int:
        """Two network evaluations a call."""
        return 2 * cost(self.denoise)

    def __call__(self, xt, t, cond=None):
        """Extrapolate from the unconditional prediction through the conditional one."""
        return _extrapolated(self.denoise, xt, t, cond, lambda cond: _without(cond, self.null), self.scale)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Contrasted:
    """See `contrasted`."""

    denoise: Denoise
    scale: jax.Array
    weaker: Callable[[Any], Any] = dataclasses.field(metadata={"static": True})

    @property
    def evaluations(self) -> int:
        """Two network evaluations a call."""
        return 2 * cost(self.denoise)

    def __call__(self, xt, t, cond=None):
        """Extrapolate from the prediction under the weaker condition through that under the condition itself."""
        return _extrapolated(self.denoise, xt, t, cond, self.weaker, self.scale)


def _extrapolated(
    denoise: Denoise, xt: State, t: Time, cond: Any, weaker: Callable[[Any], Any], scale: jax.Array
) -> Prediction:
    """Weaker + scale * (given cond - weaker), as one doubled batch."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *_sides(cond, weaker, cost(denoise)))
    out = denoise(jax.tree.map(lambda x: jnp.concatenate([x, x]), xt), jnp.concatenate([t, t]), both)
    # Of a product's symbols the logits as they are: what is added to all of a site's changes no law.
    value = jax.tree.map(jax.nn.log_softmax, out.value) if out.kind in LOGIT_KINDS else out.value
    return Prediction(jax.tree.map(lambda v: along(*jnp.split(v, 2), scale), value), out.kind)


def along(with_cond: jax.Array, without: jax.Array, scale: jax.Array) -> jax.Array:
    """`without + scale * (with_cond - without)`, but for symbols that are impossible on either side: these stay so.

    They are judged by the condition alone: -inf - -inf would be NaN.
    """
    impossible = jnp.isneginf(with_cond) | jnp.isneginf(without)
    change = tap(GUIDANCE, jnp.where(impossible, 0.0, with_cond) - jnp.where(impossible, 0.0, without))
    return jnp.where(impossible, with_cond, without + scale * change)


def _sides(cond: Any, weaker: Callable[[Any], Any], calls: int) -> tuple[Any, Any]:
    """The condition and the weaker one.

    Of how the network is to run (`denoisers.views.View`) both have their own past: it is the first or the second half
    of what `solvers.key_values` puts side by side in the place of one network's layers. calls: evaluations of a half.
    """
    if not isinstance(cond, dict) or not cond.keys() & {"past", "groups"}:
        return cond, weaker(cond)

    def half(v: jax.Array, i: int) -> jax.Array:
        return v.reshape(v.shape[0], calls, 2, -1, *v.shape[2:])[:, :, i].reshape(v.shape[0], -1, *v.shape[2:])

    sides = _sides(cond.get("cond"), weaker, calls)
    pasts = [jax.tree.map(lambda v, i=i: half(v, i), cond.get("past")) for i in (0, 1)]
    return tuple({**cond, "past": past, "cond": side} for past, side in zip(pasts, sides, strict=True))


def _without(cond: Any, null: Any) -> Any:
    if cond is None:
        raise ValueError(
            "classifier-free guidance needs a condition; for unconditional samples use the denoiser without it"
        )
    return nullified(cond, null, lambda c, n: jnp.broadcast_to(jnp.asarray(n, c.dtype), c.shape))


def classifier_free(denoise: Denoise, *, null: Any, scale: float) -> Denoise:
    """Guide towards the condition: `without + scale * (with - without)`, at the level of what the network predicts.

    Level: Gaussian kinds are linear in each other at fixed x_t, so x0, noise, score and velocity give one and the
        same guided sampler.
    Categorical kinds are extrapolated as log-probabilities, p_with^scale p_without^(1 - scale) normalised (at the
    level of x0; Schiff et al. 2024,
    eq. 12, for absorbing noise). With scale other than 1 the result is not the law of any diffusion.

    null: the condition that stands for none, as in `objectives.with_condition_dropout` (of a dict with an entry "cond",
    that entry; the others, such as a latent, stay; or a dict of nulls by the names of entries, `denoisers.nulls`: away
    from all that it names at once). scale: 1 is off, and returns
    `denoise` itself at no cost; 0 is unconditional. Each call costs two network evaluations, made as one batch.
    """
    if isinstance(scale, (int, float)) and scale == 1.0:
        return denoise
    return ClassifierFree(as_pytree(denoise), null, jnp.asarray(scale, jnp.result_type(float)))


def contrasted(denoise: Denoise, weaker: Callable[[Any], Any], *, scale: float) -> Denoise:
    """Guide from one condition through another: `weak + scale * (with - weak)`, as `classifier_free` does.

    weaker: what becomes of the condition, a pytree of the same shapes: `objectives.AtCoherence(0.0)` for the same
        label, not trusted (Dufour et al. 2024, "Don't drop your samples!", their coherence-aware guidance). A function
        that compares by value.
    """
    if isinstance(scale, (int, float)) and scale == 1.0:
        return denoise
    return Contrasted(as_pytree(denoise), jnp.asarray(scale, jnp.result_type(float)), weaker)
