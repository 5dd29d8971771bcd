"""Passing functions through `jax.jit` as arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Around:
    """A dataclass around functions that hold arrays (see `as_pytree`): the arrays are its leaves."""

    inner: dict[str, Callable]
    outer: Callable = dataclasses.field(metadata={"static": True})  # without them

    @property
    def func(self) -> Callable:
        """The function itself."""
        return dataclasses.replace(self.outer, **self.inner)

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Call it."""
        return self.func(*args, **options)


def as_pytree(function: Callable) -> Callable:
    """The function itself where it is a registered pytree (`ddjax.bind`, guidance), else one without leaves.

    A jitted function then takes it as an ordinary argument: arrays inside a registered one are inputs of the compiled
    program, and calling again with other parameters does not compile again. So they are where a dataclass compared by
    value (`denoisers.outputs`, `interop.adapters`) has a registered one in the place of its network.
    """
    leaves = jax.tree.leaves(function)
    if not (len(leaves) == 1 and leaves[0] is function):
        return function
    if inner := _holding(function):
        return Around(inner, dataclasses.replace(function, **dict.fromkeys(inner)))
    return jax.tree_util.Partial(function)


def unwrapped(function: Callable) -> Callable:
    """What was made a pytree, itself."""
    return function.func if isinstance(function, jax.tree_util.Partial | Around) else function


def _holding(function: Callable) -> dict[str, Callable]:
    """The fields of a dataclass that are functions with arrays."""
    if not dataclasses.is_dataclass(function) or type(function).__eq__ is object.__eq__:
        return {}
    fields = {f.name: getattr(function, f.name) for f in dataclasses.fields(function) if f.init}
    inner = {name: as_pytree(value) for name, value in fields.items() if callable(value)}
    return {name: value for name, value in inner.items() if jax.tree.leaves(value)}
