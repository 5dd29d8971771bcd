"""Passing functions through `jax.jit` as arguments."""

from __future__ import annotations

from collections.abc import Callable

import jax


def as_pytree(function: Callable) -> Callable:
    """The function itself where it is a registered pytree (`ddjax.bind`, guidance), else a leafless one.

    A jitted function then takes it as an ordinary argument: arrays inside a registered one are inputs of the compiled
    program, and calling again with other parameters does not compile again.
    """
    leaves = jax.tree.leaves(function)
    return jax.tree_util.Partial(function) if len(leaves) == 1 and leaves[0] is function else function
