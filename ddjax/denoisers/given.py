"""What a network is told beside the state and the time: the entries of a condition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ddjax.types import PyTree

# How a network is built that takes them.
OPTIONS = {
    "z": "latent",
    "vector": "vector",
    "sequence": "context_width",
    "valid": "context_width",
    "image": "image_channels",
    "importance": "merge",
}


class Given(NamedTuple):
    """A condition is int labels, or a dict of some of these entries, with the labels (or another dict) as "cond".

    What each says when it says nothing, for dropout and guidance (`nulls`): labels `num_classes`, a vector and an image
    zeros, a sequence has no valid entry.
    """

    cond: Int[Array, " batch"] | None = None  # labels
    z: Float[Array, "batch latent"] | None = None  # the latent of a process (`processes.AdaptiveGaussian`)
    vector: Float[Array, "batch vector"] | None = None  # an embedding of a text or an image, say
    sequence: Float[Array, "batch entries context"] | None = None  # what sites attend to: embedded words, say
    valid: Bool[Array, "batch entries"] | None = None  # which entries of the sequence there are; None: all
    image: Float[Array, "batch *sites channels"] | None = None  # values at the sites of the state: further channels
    importance: Float[Array, "batch patches"] | None = None  # of the network's sites, for merging others in attention

    @classmethod
    def of(cls, cond: Any) -> Given:
        """Of entries side by side, or each in another's "cond". Raises ValueError for entries of other names."""
        if isinstance(cond, cls):
            return cond
        names, given = set(cls._fields), {}
        while isinstance(cond, Mapping) and cond.keys() & (names - {"cond"}):
            if unknown := sorted(cond.keys() - names):
                raise ValueError(
                    f"cond has entries {', '.join(unknown)}; beside {', '.join(cls._fields)} there are none"
                )
            given |= {name: value for name, value in cond.items() if name != "cond"}
            cond = cond.get("cond")
        return cls(cond, **given)

    def without(self, *names: str) -> Given:
        """All but these entries, which the network has taken."""
        return self._replace(**dict.fromkeys(names))

    def attended(
        self, nothing: Array | None, batch: int, dtype: Any
    ) -> tuple[Given, tuple[Array, Array | None] | None]:
        """The rest, and the sequence that sites attend to, with which of its entries there are (None: all).

        nothing: of the network, the entry in the place of none at all; None: it takes no sequence.
        Raises ValueError for shapes that do not fit.
        """
        if nothing is None:
            return self, None
        sequence, valid = at_least_one(self.sequence, self.valid, nothing[...], batch)
        return self.without("sequence", "valid"), (sequence.astype(dtype), valid)

    def check_taken(self, *taken: str) -> None:
        """Raise ValueError for an entry that the network would not look at."""
        for name, option in OPTIONS.items():
            if getattr(self, name) is not None and name not in taken:
                raise ValueError(
                    f'cond["{name}"] was given but the network takes none: build it with {option}=..., or leave it out'
                )


def nulls(cond: PyTree, num_classes: int) -> dict[str, Any]:
    """What stands for none in each entry that a condition has, `null` of `objectives.with_condition_dropout` and
    `guidance.classifier_free`. A latent z is no condition: it stays.

    Raises ValueError for a sequence that does not say which of its entries are valid.
    """
    given = Given.of(cond)
    if given.sequence is not None and given.valid is None:
        raise ValueError('a sequence without a valid entry stands for none: give cond["valid"], (batch, entries)')
    every = {"cond": num_classes, "vector": 0.0, "valid": False, "image": 0.0}
    return {name: null for name, null in every.items() if getattr(given, name) is not None}


def at_least_one(
    sequence: Float[Array, "batch entries context"] | None,
    valid: Bool[Array, "batch entries"] | None,
    nothing: Float[Array, " context"],
    batch: int,
) -> tuple[Float[Array, "batch entries context"], Bool[Array, "batch entries"] | None]:
    """The sequence, where an example has no valid entry `nothing` as its only one.

    Raises ValueError for shapes that do not fit.
    """
    if sequence is None:
        if valid is not None:
            raise ValueError('cond["valid"] says which entries of a sequence there are: give cond["sequence"] too')
        return jnp.broadcast_to(nothing, (batch, 1, nothing.shape[0])), None
    if sequence.ndim != 3 or sequence.shape[0] != batch or sequence.shape[2] != nothing.shape[0]:
        raise ValueError(f'cond["sequence"] has shape {sequence.shape}; expected ({batch}, entries, {len(nothing)})')
    if valid is None:
        return sequence, None
    if valid.shape != sequence.shape[:2] or valid.dtype != jnp.bool_:
        raise ValueError(f'cond["valid"] has shape {valid.shape}, {valid.dtype}; expected bool {sequence.shape[:2]}')
    instead = ~valid.any(axis=1, keepdims=True) & (jnp.arange(valid.shape[1]) == 0)
    return jnp.where(instead[..., None], nothing.astype(sequence.dtype), sequence), valid | instead
