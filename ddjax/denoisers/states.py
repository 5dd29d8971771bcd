"""The states that networks are given: hard tokens, soft ones, or values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ddjax.types import SoftTokens


def hard_state(xt: Array | SoftTokens, axes: int, symbols_in: int | None) -> Array:
    """The shape and dtype of the tokens that soft ones stand for; another state as it is.

    Raises ValueError for soft tokens that do not fit the network's table.
    """
    if isinstance(xt, SoftTokens):
        if xt.ids.shape != xt.weights.shape or not jnp.issubdtype(xt.weights.dtype, jnp.floating):
            raise ValueError(
                f"soft tokens have ids of shape {xt.ids.shape} and {xt.weights.dtype} weights of shape "
                f"{xt.weights.shape}: expected one float weight for each id"
            )
        return jax.ShapeDtypeStruct(xt.ids.shape[:-1], xt.ids.dtype)
    if symbols_in is None or xt.ndim != axes + 1 or not jnp.issubdtype(xt.dtype, jnp.floating):
        return xt
    if xt.shape[-1] != symbols_in:
        raise ValueError(f"soft tokens have shape {xt.shape}; the last axis must hold symbols_in={symbols_in} numbers")
    return jax.ShapeDtypeStruct(xt.shape[:-1], jnp.int32)


def check_state(xt: Array, expected: tuple[tuple[str, ...], tuple[int, ...]], symbols_in: int | None) -> None:
    """Raise ValueError unless `xt` has the batch axis, sizes and kind of dtype the network was built for."""
    names, sizes = expected
    described = f"(batch, {', '.join(names)}) = (batch, {', '.join(map(str, sizes))})"
    if xt.ndim != len(sizes) + 1:
        raise ValueError(
            f"xt has {xt.ndim} axes, shape {xt.shape}; expected {len(sizes) + 1}: {described} "
            "(the first axis is always the batch, and a single channel still has its axis)"
        )
    if xt.shape[1:] != sizes:
        raise ValueError(f"xt has shape {xt.shape}; the network was built for {described}")
    if symbols_in is None and not jnp.issubdtype(xt.dtype, jnp.floating):
        raise ValueError(f"xt has dtype {xt.dtype}; a continuous network takes floats: set symbols_in for tokens")
    if symbols_in is not None and not jnp.issubdtype(xt.dtype, jnp.integer):
        raise ValueError(
            f"xt has dtype {xt.dtype}; with symbols_in={symbols_in} the network takes integer tokens: "
            "leave symbols_in out for a continuous state"
        )


def check_values(image: Array, expected: tuple[int, ...]) -> None:
    """Raise ValueError unless the values of an image at the sites of a state have this shape."""
    if jnp.shape(image) != expected:
        raise ValueError(f"the image in cond has shape {jnp.shape(image)}; expected {expected}")
