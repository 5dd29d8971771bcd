"""What a network says beside its output while it trains: losses of its own, and numbers to report.

A layer calls `add_loss` or `report`; `make_train_step` collects both around the objective. Where nobody collects,
nothing happens. Values pass through no transformation by themselves: what runs a layer inside a scan or
`jax.checkpoint` collects there, returns what it found, and tells it again outside (`Found.tell`).
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state
from jaxtyping import Array, Float


class Found(NamedTuple):
    """What was told, by name, `(batch,)` each: the mean over the calls."""

    losses: dict[str, Float[Array, " batch"]]
    reports: dict[str, Float[Array, " batch"]]

    def tell(self) -> None:
        """Tell it to who collects outside."""
        for name, value in self.losses.items():
            add_loss(name, value)
        for name, value in self.reports.items():
            report(name, value)

    def mean(self) -> Found:
        """Of what a scan has stacked, or several layers."""
        return jax.tree.map(lambda value: value.mean(axis=0), self)


class _Collector:
    def __init__(self) -> None:
        self.trace, self.losses, self.reports = get_opaque_trace_state(), {}, {}

    def found(self) -> Found:
        mean = lambda values: sum(values[1:], values[0]) / len(values)  # noqa: E731
        return Found(*({name: mean(v) for name, v in kind.items()} for kind in (self.losses, self.reports)))


_COLLECTOR: contextvars.ContextVar[_Collector | None] = contextvars.ContextVar("ddjax_auxiliary", default=None)


def add_loss(name: str, value: Float[Array, " batch"]) -> None:
    """Add a loss of each example, in the units of the objective, to what is minimised."""
    _tell("losses", name, value)


def report(name: str, value: Float[Array, " batch"]) -> None:
    """A number of each example, for the metrics."""
    _tell("reports", name, value)


@contextlib.contextmanager
def collect() -> Iterator[_Collector]:
    """Collect what is told inside the context; ask for it with `.found()`."""
    collector = _Collector()
    token = _COLLECTOR.set(collector)
    try:
        yield collector
    finally:
        _COLLECTOR.reset(token)


def _tell(kind: str, name: str, value: Array) -> None:
    collector = _COLLECTOR.get()
    if collector is None:
        return
    if collector.trace != get_opaque_trace_state():
        raise ValueError(
            f"a layer's {name!r} was told inside a jit, grad, vmap or scan that was entered after collecting began: it "
            "would leak; this objective does not go with layers that have losses of their own"
        )
    getattr(collector, kind).setdefault(name, []).append(jnp.asarray(value))
