"""The solver contract."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from jaxtyping import Array, Int

from ddjax.types import Denoise, Keys, State, Time


class Info(NamedTuple):
    """What a step reports, beside the state."""

    nfe: Int[Array, " batch"]  # calls of `denoise` made for each example


class Solver(Protocol):
    """A frozen dataclass: hashable, compared by value, so that samplers compile once."""

    def init(self, xt: State, cond: Any = None) -> Any:
        """What the first step needs; a pytree of arrays with a leading batch axis."""

    def step(
        self, keys: Keys, carry: Any, xt: State, t: Time, s: Time, denoise: Denoise, cond: Any = None
    ) -> tuple[State, Any, Info]:
        """One step from time t to time s < t, both `(batch,)`."""
