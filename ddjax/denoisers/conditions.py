"""Networks that are told more than a time and a label, by what `DiT` has for labels and latents."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ddjax.coherence import coherent_labels
from ddjax.types import Apply, Params


@dataclasses.dataclass(frozen=True)
class Coherent:
    """A network of labels that is told how far each is to be trusted, `cond = {"coherence": ..., "cond": labels}`.

    (Dufour et al. 2024, "Don't drop your samples!".) Labels alone have coherence 1, and `classes`, "none", has none.

    levels: the coherence is one of so many, and the network has `classes * levels` labels (`coherent_labels`); 0: the
        network is told it as a latent of one number (`DiT(latent=1)`).
    """

    apply: Apply
    classes: int
    levels: int = 0

    def __call__(self, params: Params, xt: Array, t: Array, cond: Any = None, **options: Any) -> Array:
        """Run the network."""
        return self.apply(params, xt, t, self._coded(xt.shape[:1], cond), **options)

    def _coded(self, shape: tuple[int, ...], cond: Any) -> Any:
        """The network's own condition."""
        if isinstance(cond, dict) and "coherence" not in cond:  # how it runs (`views.View`), and the rest
            return {**cond, "cond": self._coded(shape, cond.get("cond"))}
        labels = cond["cond"] if isinstance(cond, dict) else cond
        labels = jnp.full(shape, self.classes) if labels is None else jnp.asarray(labels)
        given = cond["coherence"] if isinstance(cond, dict) else jnp.ones(labels.shape)
        none = labels == self.classes
        if self.levels:
            return jnp.where(none, self.classes * self.levels, coherent_labels(labels, given, self.levels))
        return {"z": jnp.where(none, 0.0, given)[:, None], "cond": labels}


@dataclasses.dataclass(frozen=True)
class OverDraws:
    """A network that is told several draws of a latent (`processes.SoftMixture`), one after the other.

    cond is `{"z": (batch, draws, latent), "cond": ...}`, the output `(batch, *sites, 2 draws)`: what the network states
    for each draw, and logits of 0.
    """

    apply: Apply

    def __call__(self, params: Params, xt: Array, t: Array, cond: Any = None, **options: Any) -> Array:
        """Run the network. Raises ValueError without the draws."""
        if not isinstance(cond, dict) or jnp.ndim(cond.get("z")) != 3:
            raise ValueError('the network is told draws of a latent: give cond={"z": (batch, draws, latent), ...}')

        def one(z: Array) -> Array:
            return self.apply(params, xt, t, {**cond, "z": z}, **options)

        stated = jax.vmap(one, in_axes=1, out_axes=-1)(cond["z"])
        return jnp.concatenate([stated, jnp.zeros_like(stated)], -1)


@dataclasses.dataclass(frozen=True)
class Pointed:
    """A network that is told a point of the simplex in the place of the time (`processes.Barycentric`), as a latent."""

    apply: Apply

    def __call__(self, params: Params, xt: Array, point: Array, cond: Any = None, **options: Any) -> Array:
        """Run the network, which takes no time."""
        return self.apply(params, xt, None, {"z": point, "cond": cond}, **options)


@dataclasses.dataclass(frozen=True)
class ShownX1:
    """A network that sees x_1 beside x_t, as further channels: `cond = {"x1": ..., "cond": ...}`."""

    apply: Apply

    def __call__(self, params: Params, xt: Array, t: Array, cond: Any = None, **options: Any) -> Array:
        """Run the network. Raises ValueError without x_1."""
        if not isinstance(cond, dict) or "x1" not in cond:
            raise ValueError('the network is shown x1: give cond={"x1": ..., "cond": ...}')
        return self.apply(params, jnp.concatenate([xt, cond["x1"]], -1), t, cond.get("cond"), **options)


__all__ = ["Coherent", "OverDraws", "Pointed", "ShownX1"]
