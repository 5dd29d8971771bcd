"""Sequences that end early."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from ddjax.processes.staggered import common
from ddjax.solvers.base import Info, first_carry
from ddjax.types import State


def lengths(x: Int[Array, "batch length"], stop: int) -> Int[Array, " batch"]:
    """How many tokens come before the first stop token of each sequence; all of them where there is none."""
    return jnp.where((x == stop).any(axis=1), jnp.argmax(x == stop, axis=1), x.shape[1])


def behind(x: Int[Array, "batch length"], stop: int) -> Bool[Array, "batch length"]:
    """Which sites lie behind the first stop token."""
    return jnp.arange(x.shape[1]) > lengths(x, stop)[:, None]


@dataclasses.dataclass(frozen=True)
class Stopping:
    """`solver`, with everything behind the first stop token of a sequence made padding as soon as it is written.

    Exact where that is so in the data too, for masked processes: padding is then certain, and taken without being
    asked for. Once every sequence has its stop token and nothing before it is masked, steps cost nothing: they make no
    network call. Inside, `Cached` spares each of those that are done, and `KeyValues` whole blocks.
    `Remasking` and `PathPlanning` inside, which take back what they wrote, are cut short when all is said.

    stop: the token. padding: what is written behind it; None: the stop token again.
    Raises ValueError for tokens outside the symbols, and for a process without a mask.
    """

    solver: Any
    stop: int
    padding: int | None = None

    def __post_init__(self):
        if not hasattr(common(self.process), "mask"):
            raise ValueError(f"stop tokens are for masked processes, not for {type(common(self.process)).__name__}")
        for name in ("stop", "padding"):
            token = getattr(self, name)
            if token is not None and not 0 <= token < self.process.num_symbols:
                raise ValueError(f"{name} must be a symbol, 0 to {self.process.num_symbols - 1}, got {token}")

    @property
    def process(self) -> Any:
        """The solver's."""
        return self.solver.process

    def init(self, xt, cond=None):
        """The solver's."""
        return self.solver.init(xt, cond)

    def begin(self, xt, cond, denoise, known=None):
        """The solver's."""
        return first_carry(self.solver, xt, cond, denoise, known)

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        """The solver's step, cut off behind the stop token; none where all is said."""
        if xt.ndim != 2:
            raise ValueError(f"stop tokens are for sequences, (batch, length), got a state of shape {xt.shape}")

        def go() -> tuple[State, Any, Info]:
            xs, after, info = self.solver.step(keys, carry, xt, t, s, denoise, cond)
            padding = self.stop if self.padding is None else self.padding
            return jnp.where(behind(xs, self.stop), padding, xs).astype(xt.dtype), after, info

        said = (xt == self.stop).any(axis=1) & (xt != common(self.process).mask).all(axis=1)
        rest = Info(jnp.zeros(xt.shape[:1], jnp.int32))
        return jax.lax.cond(said.all(), lambda: (xt, carry, rest), go)
