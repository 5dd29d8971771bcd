"""Named points inside a network that can be read or overridden from outside.

A network calls `h = tap("block/3/attention", h)`. Nothing happens (at trace time, and nothing at all in the
compiled program) unless someone outside listens:

    with taps.record() as seen:                            # every point
        apply(params, xt, t)
    seen["block/3/attention"]

    with taps.override({"block/0/mlp": lambda h: 0 * h}):  # a function or an array
        apply(params, xt, t)

Both act while Python runs the network, that is at trace time. Inside a compiled function, put the `with`
inside it too and return what was recorded; a `with` around a call of an already compiled function cannot act,
and raises. Over the steps of a sampler: `ddjax.sample(..., taps=("block/0/mlp",))`.

A transformer's block i has the points `block/i/queries`, `/keys`, `/values`, `/attention` (the branch), `/mlp` and
`block/i` itself; and `/attention/weights`, `(batch, heads, queries, keys)`, a softmax that no fused kernel would
write down: it is made where someone asks for it by name and nowhere else.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state
from jaxtyping import Array

GUIDANCE = "guidance/change"  # what a condition changes, shaped like the prediction, of guidance between two

Override = Callable[[Array], Array] | Array


@dataclasses.dataclass(frozen=True, eq=False)
class _Listener:
    seen: dict[str, Array]  # what was recorded; for an override, what passed through
    names: frozenset[str] | None  # None: every name
    overrides: Mapping[str, Override]
    trace: object  # where the listener was installed

    def wants(self, name: str) -> bool:
        return self.names is None or name in self.names

    def check_trace(self, name: str) -> None:
        if self.trace != get_opaque_trace_state():
            raise ValueError(
                f"the tap {name!r} ran inside a jit, grad, vmap or scan that was entered after the taps "
                "context: its value would leak out of (or be cached into) that program; put the `with` "
                "inside the transformed function and return what it recorded"
            )


# A context variable, not a global: threads and tasks do not see each other's listeners.
_LISTENERS: contextvars.ContextVar[tuple[_Listener, ...]] = contextvars.ContextVar("ddjax_taps", default=())


def tap(name: str, value: Array) -> Array:
    """Name a point of a network. Returns `value`, or what an `override` makes of it.

    Overrides act first, in the order their contexts were entered; recordings hold what the rest of the
    network used.
    """
    listeners = [listener for listener in _LISTENERS.get() if listener.wants(name)]
    for listener in listeners:
        listener.check_trace(name)
        if name in listener.overrides:
            value = _overridden(name, value, listener.overrides[name])
            listener.seen[name] = value
    for listener in listeners:
        if not listener.overrides:
            listener.seen[name] = value
    return value


@contextlib.contextmanager
def record(*names: str) -> Iterator[dict[str, Array]]:
    """Record the named points (where none is named all, but for those made on demand) of the networks run inside.

    Yields a dict from name to array, filled as the network runs; of a network called twice it holds the last
    call. Raises ValueError where a named point was never reached, or is inside a scanned stack or a later
    transformation.
    """
    with _listen(frozenset(names) or None, {}) as seen:
        yield seen


@contextlib.contextmanager
def override(overrides: Mapping[str, Override]) -> Iterator[None]:
    """Replace named points: each value is an array, or a function of the array that was there.

    A replacement must have the shape of what it replaces and is cast to its dtype. Raises ValueError
    otherwise, and where a named point was never reached, or is inside a scanned stack or a later
    transformation.
    """
    with _listen(frozenset(overrides), dict(overrides)):
        yield


def wanted(name: str) -> bool:
    """Whether anyone asks for this point by its name: what costs to make is made only then."""
    return any(listener.names is not None and name in listener.names for listener in _LISTENERS.get())


class Below(NamedTuple):
    """The taps of a part of a network, below a prefix: `Below("block/3")("/mlp", h)`. Without a prefix: none."""

    prefix: str | None = None

    def __call__(self, point: str, value: Array) -> Array:
        """See `tap`."""
        return value if self.prefix is None else tap(f"{self.prefix}{point}", value)

    def wanted(self, point: str) -> bool:
        """See `wanted`."""
        return self.prefix is not None and wanted(f"{self.prefix}{point}")

    def asked(self, point: str) -> Callable[[Array], Array] | None:
        """The tap of what is made on demand; None where nobody asks for it by its name."""
        return functools.partial(self, point) if self.wanted(point) else None


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Nobody outside listens to what runs inside the context: a network inside another, with the same names."""
    token = _LISTENERS.set(())
    try:
        yield
    finally:
        _LISTENERS.reset(token)


def active(prefix: str = "") -> bool:
    """Whether anyone listens below a prefix (networks then drop `remat`, whose inner trace would hide the values)."""
    return any(
        listener.names is None or any(name.startswith(prefix) for name in listener.names)
        for listener in _LISTENERS.get()
    )


def refuse(prefix: str, reason: str) -> None:
    """Raise ValueError if anyone listens for a name below `prefix`, where the network cannot offer it."""
    for listener in _LISTENERS.get():
        asked = [prefix] if listener.names is None else [n for n in listener.names if n.startswith(prefix)]
        if asked:
            raise ValueError(f"the taps {', '.join(sorted(asked))}... cannot be reached: {reason}")


@contextlib.contextmanager
def _listen(names: frozenset[str] | None, overrides: Mapping[str, Override]) -> Iterator[dict[str, Array]]:
    listener = _Listener({}, names, overrides, get_opaque_trace_state())
    token = _LISTENERS.set((*_LISTENERS.get(), listener))
    try:
        yield listener.seen
    finally:
        _LISTENERS.reset(token)
    if missed := sorted((names or frozenset()) - listener.seen.keys()):
        raise ValueError(
            f"the taps {', '.join(missed)} were never reached: the name is wrong (`taps.record()` without "
            "names lists them), or the network ran as an already compiled function"
        )


def _overridden(name: str, value: Array, by: Override) -> Array:
    new = jnp.asarray(by(value) if callable(by) else by)
    if new.shape != value.shape:
        raise ValueError(f"override of the tap {name!r} has shape {new.shape}; what it replaces has {value.shape}")
    return jax.lax.convert_element_type(new, value.dtype)
