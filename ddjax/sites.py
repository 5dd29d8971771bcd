"""A network's sites, each of which holds some of a state's: patches of an image, tokens of a text."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ddjax import taps
from ddjax.types import Denoise, State, Time


class Sites:
    """Which of the network's sites each of the state's belongs to; all hold equally many.

    place: a number for each site of a state, from 0 on.
    """

    def __init__(self, place: np.ndarray):
        self.place = np.asarray(place)
        self.count = int(self.place.max()) + 1

    @classmethod
    def of(cls, denoise: Denoise, xt: State, t: Time, cond: Any = None) -> Sites:
        """As a network says it itself, at its tap "sites". Nothing is computed.

        denoise: or anything else that calls the network with these arguments.
        """
        place = []

        def look(*arguments):
            with taps.record("sites") as seen:
                denoise(*arguments)
            place.append(np.asarray(seen["sites"]))

        jax.eval_shape(look, xt, t, cond)
        return cls(place[0])

    @property
    def grid(self) -> tuple[int, ...]:
        """Their numbers along the axes of the state; sites are counted in this order."""
        _, first = np.unique(self.place, return_index=True)
        return tuple(len(np.unique(along)) for along in np.unravel_index(first, self.place.shape))

    def gathered(self, x: State) -> Array:
        """`(batch, *sites)` of the state as `(batch, network's sites, what each holds)`."""
        order = np.argsort(self.place.reshape(-1), kind="stable")
        return x.reshape(x.shape[0], -1)[:, order].reshape(x.shape[0], self.count, -1)

    def spread(self, v: Array) -> Array:
        """One value of each of the network's sites, `(batch, count)`, at the sites of the state."""
        return v[:, self.place.reshape(-1)].reshape(v.shape[0], *self.place.shape)


def put(new: Array, sites: Int[Array, "batch some"], old: Array, axis: int = 1) -> Array:
    """`old`, with `new` in its place at some sites of the axis; those beyond it count for nothing."""
    own = sites[:, :, None] == jnp.arange(old.shape[axis])
    shape = [old.shape[i] if i in (0, axis) else 1 for i in range(old.ndim)]
    ran, where = (v.reshape(shape) for v in (own.any(axis=1), own.argmax(axis=1)))
    return jnp.where(ran, jnp.take_along_axis(new, where, axis=axis), old)
