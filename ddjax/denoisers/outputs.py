"""Networks whose outputs are cut, moved or set apart."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ddjax.predictions import Prediction
from ddjax.types import Apply, Params


@dataclasses.dataclass(frozen=True)
class FirstHeads:
    """A network without its last outputs."""

    apply: Apply
    dropped: int

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        """Run the network."""
        return self.apply(*args, **kwargs)[..., : -self.dropped]


@dataclasses.dataclass(frozen=True)
class Apart:
    """A network for `processes.MixtureOutput` whose components begin apart, spread over [-0.1, 0.1].

    Equal ones would get equal gradients for ever.
    """

    apply: Apply
    components: int

    def __call__(self, params: Params, xt: Array, t: Array, cond: Any = None, **options: Any) -> Array:
        """Run the network."""
        places = np.linspace(-0.1, 0.1, self.components) if self.components > 1 else np.zeros(1)
        output = self.apply(params, xt, t, cond, **options)
        return output + jnp.asarray(np.repeat(np.append(places, 0.0 * places), xt.shape[-1]), output.dtype)


@dataclasses.dataclass(frozen=True)
class Ratios:
    """A network whose output 0 says the ratios of data uniform over symbols, at all times.

    The authors of score entropy add the same to theirs, up to a constant (Lou et al. 2024, section 5.1 and code).
    """

    apply: Apply
    process: Any

    def __call__(self, params: Params, xt: Array, t: Array, cond: Any = None, **options: Any) -> Array:
        """Run the network."""
        output = self.apply(params, xt, t, cond, **options)
        nothing = Prediction(jnp.zeros((*xt.shape, self.process.num_symbols), output.dtype), "cavity")
        return output + self.process.convert(nothing, "ratio", xt, t).value


__all__ = ["Apart", "FirstHeads", "Ratios"]
