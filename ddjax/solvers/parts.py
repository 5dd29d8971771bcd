"""A solver for each part of a product's states."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ddjax import random
from ddjax.predictions import Prediction
from ddjax.processes.product import Product
from ddjax.solvers.ancestral import Ancestral
from ddjax.solvers.base import Info, batched, first_carry, told
from ddjax.types import Denoise, State, Time


@dataclasses.dataclass(frozen=True)
class Parts:
    """Each part by its own solver, all of them by one evaluation of the network a step.

        Parts(process, {"numbers": dpm_solver_pp(process["numbers"])})

    solvers: by the part's name, each made for that part's process; default `Ancestral`, for all that are not named.

    A step asks the network once, at the states and the time that it begins at. Raises ValueError for names that are no
    parts, and, when a sampler is compiled, for a solver that asks again (`Heun`) or at another state (`StepsDown`): the
    other parts have no states there.
    """

    process: Product
    solvers: Any = ()  # given as a mapping; kept as pairs, which can be hashed

    def __post_init__(self):
        if not isinstance(self.process, Product):
            raise ValueError(f"Parts is for processes.Product, got {type(self.process).__name__}")
        given = dict(self.solvers)
        if unknown := set(given) - set(self.process.processes):
            raise ValueError(f"{min(unknown)!r} is none of the parts {', '.join(self.process.processes)}")
        found = tuple((name, given.get(name) or Ancestral(process)) for name, process in self.process.parts)
        object.__setattr__(self, "solvers", found)

    def init(self, xt: State, cond: Any = None) -> dict[str, Any]:
        """What each part's first step needs."""
        return {name: solver.init(xt[name], cond) for name, solver in self.solvers}

    def begin(self, xt: State, cond: Any, denoise: Denoise, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """As `init`, for solvers that must know more."""
        return {
            name: first_carry(
                solver, xt[name], cond, _Once(self.process, name, xt, denoise), None if known is None else known[name]
            )
            for name, solver in self.solvers
        }

    def told(self, observed: Any) -> Parts:
        """The same, each part's solver knowing what is observed of the part."""
        mask, value = observed
        own = {name: told(one, observed._replace(mask=mask[name], value=value[name])) for name, one in self.solvers}
        return Parts(self.process, own)

    def step(
        self, keys: Any, carry: dict[str, Any], xt: State, t: Time, s: Time, denoise: Denoise, cond: Any = None
    ) -> tuple[State, dict[str, Any], Info]:
        """One evaluation, and a step of each part."""
        prediction, xs, after = denoise(xt, batched(t, xt), cond), {}, {}
        for i, (name, solver) in enumerate(self.solvers):
            shown = _Once(self.process, name, xt, lambda *_: prediction)
            own = random.fold_in(keys, i)
            xs[name], after[name], info = solver.step(own, carry[name], xt[name], t, s, shown, cond)
        return xs, after, info


class _Once:
    """What the network says of one part, to be asked once, at the state of all parts."""

    def __init__(self, process: Product, name: str, xt: State, denoise: Denoise):
        self.process, self.name, self.xt, self.denoise, self.asked = process, name, xt, denoise, 0

    def __call__(self, x: Any, t: Time, cond: Any = None) -> Prediction:
        """The part's prediction. Raises ValueError as `Parts` says."""
        self.asked += 1
        if self.asked > 1 or x is not self.xt[self.name]:
            raise ValueError(
                f"the solver of part {self.name!r} asks the network again within a step, where the other parts have no "
                "states: give one with one evaluation a step (Ancestral, DDIM, multistep solvers)"
            )
        return self.process.part(self.denoise(self.xt, t, cond), self.name)
