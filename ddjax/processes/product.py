"""Several processes side by side: a state of named parts, each corrupted by its own process, at one common time.

    q(x_t | x_0) = product over parts p of q_p(x_t^p | x_0^p)

Numbers and symbols, columns of several alphabets, nodes and edges of a graph: what joins the parts is the network,
which sees all of them. The reverse path's law factorises over parts as it does over sites, so every term of the bound
is a sum over parts, and a reverse step draws each part by itself (Kotelnikov et al. 2023, TabDDPM, section 3).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from ddjax import random
from ddjax.predictions import Prediction, check_kind
from ddjax.types import Distribution, Keys, Time

Parts = Mapping[str, Any]  # an entry for each part
# What a part may not have: states of another shape than its data, times or latents of its own, ends from the data.
_OWN = ("state_shape", "times", "latents", "points", "draws", "departure")


@dataclasses.dataclass(frozen=True)
class Joint:
    """Independent laws, one for each part."""

    laws: Mapping[str, Distribution]

    def sample(self, keys: Keys) -> dict[str, Array]:
        """One draw, one key per example."""
        return {name: law.sample(random.fold_in(keys, i)) for i, (name, law) in enumerate(self.laws.items())}

    def log_prob(self, x: Parts) -> dict[str, Array]:
        """Log-probability of each site, nats; a density where the part is continuous."""
        return {name: law.log_prob(x[name]) for name, law in self.laws.items()}


@dataclasses.dataclass(frozen=True)
class Product:
    """A process for each of several parts.

        process = Product({"numbers": Gaussian(VPCosine()), "colour": Uniform(5), "shape": Masked(3)})
        x0 = {"numbers": (batch, 4), "colour": (batch, 1), "shape": (batch, 1)}

    States, predictions, terms of the bound are dicts with an entry for each part. A network is called with a dict and
    returns one. Parts that take the same kinds of prediction are a family; all parts of a family are predicted as one
    kind, and a product's kind names that of each family, in order: "noise+posterior".

    parts: processes by name, kept in this order; of any states, each as long as its data.
    clock: the part in whose coordinate the times of a bound are uniform (its own changes most along the path); default
        the first continuous one, or the first.

    Raises:
        ValueError: for no parts, an unknown clock, or a part that cannot be one.
    """

    parts: Any  # given as a mapping; kept as pairs, which can be hashed
    clock: str | None = None

    state = "product"

    def __post_init__(self):
        parts = dict(self.parts)
        if not parts:
            raise ValueError("a Product needs parts, {name: process}")
        for name, process in parts.items():
            if isinstance(process, Product):
                raise ValueError(f"part {name!r} is a Product itself: give its parts beside the others")
            if found := [own for own in _OWN if hasattr(process, own)]:
                raise ValueError(
                    f"part {name!r}: {type(process).__name__} has {found[0]} of its own, and cannot be a part"
                )
        if self.clock is not None and self.clock not in parts:
            raise ValueError(f"clock={self.clock!r} is none of the parts {', '.join(parts)}")
        object.__setattr__(self, "parts", tuple(parts.items()))

    @functools.cached_property
    def processes(self) -> dict[str, Any]:
        """The parts' processes by name."""
        return dict(self.parts)

    def __getitem__(self, name: str) -> Any:
        return self.processes[name]

    @property
    def sitewise(self) -> bool:
        """Whether every part corrupts each site by itself."""
        return all(getattr(process, "sitewise", True) for process in self.processes.values())

    @property
    def has_bound(self) -> bool:
        """Whether every part has one."""
        return all(getattr(process, "has_bound", True) for process in self.processes.values())

    # -- the forward process ---------------------------------------------------------------------------------

    def marginal(self, x0: Parts, t: Time) -> Joint:
        """q(x_t | x_0)."""
        return Joint({name: process.marginal(x0[name], t) for name, process in self.parts})

    def bridge(self, x0: Parts, xt: Parts, s: Time, t: Time) -> Joint:
        """q(x_s | x_t, x_0) for s < t."""
        return Joint({name: process.bridge(x0[name], xt[name], s, t) for name, process in self.parts})

    def reverse(self, prediction: Prediction, xt: Parts, s: Time, t: Time) -> Joint:
        """The model's p(x_s | x_t): each part's, given what is predicted from all of them."""
        return Joint(
            {name: process.reverse(self.part(prediction, name), xt[name], s, t) for name, process in self.parts}
        )

    def prior(self, shape: Mapping[str, Sequence[int]], t: float = 1.0) -> Joint:
        """Each part's, of its shape."""
        shape = dict(shape)
        return Joint({name: process.prior(shape[name], t) for name, process in self.parts})

    def observe(self, keys: Keys, x0: Parts, t: Time) -> dict[str, Array]:
        """What observed sites show at time t while their neighbours are sampled."""
        return {
            name: process.observe(random.fold_in(keys, i), x0[name], t) for i, (name, process) in enumerate(self.parts)
        }

    # -- the bound -------------------------------------------------------------------------------------------

    def path_kl(self, x0: Parts, prediction: Prediction, xt: Parts, t: Time) -> dict[str, Array]:
        """The bound's integrand over t of each part, nats per site."""
        return {
            name: process.path_kl(x0[name], self.part(prediction, name), xt[name], t) for name, process in self.parts
        }

    def step_kl(self, x0: Parts, prediction: Prediction, xt: Parts, s: Time, t: Time) -> dict[str, Array]:
        """KL(bridge || reverse) of one step of a chain, of each part, nats per site."""
        return {
            name: process.step_kl(x0[name], self.part(prediction, name), xt[name], s, t) for name, process in self.parts
        }

    def prior_kl(self, x0: Parts, t: Time) -> dict[str, Array]:
        """KL(q(x_t | x_0) || prior at t) of each part, nats per site."""
        return {name: process.prior_kl(x0[name], t) for name, process in self.parts}

    def reconstruction(self, x0: Parts, prediction: Prediction, xt: Parts, t: Time) -> dict[str, Array]:
        """-log p(x_0 | x_t) of each part, nats per site; of a continuous one minus a log-density."""
        return {
            name: process.reconstruction(x0[name], self.part(prediction, name), xt[name], t)
            for name, process in self.parts
        }

    @property
    def t_range(self) -> tuple[float, float]:
        """The times that are in every part's."""
        low, high = zip(*(process.t_range for _, process in self.parts), strict=True)
        return max(low), min(high)

    def time_at(self, u: Array, t_range: tuple[float, float]) -> tuple[Array, Array]:
        """Times uniform in the coordinate of `clock`, and dt/du."""
        continuous = [name for name, process in self.parts if process.state == "gaussian"]
        clock = self.clock or (continuous or list(self.processes))[0]
        return self[clock].time_at(u, t_range)

    # -- predictions -----------------------------------------------------------------------------------------

    @functools.cached_property
    def families(self) -> tuple[tuple[str, ...], ...]:
        """The kinds that each family of parts takes, in order of its first part."""
        return tuple(dict.fromkeys(tuple(process.kinds) for _, process in self.parts))

    @functools.cached_property
    def _kinds(self) -> dict[str, tuple[str, ...]]:
        return {"+".join(kinds): kinds for kinds in itertools.product(*self.families)}

    @property
    def kinds(self) -> tuple[str, ...]:
        """All kinds of prediction: one of each family, joined by "+"."""
        return tuple(self._kinds)

    def kind_of(self, kind: str, name: str) -> str:
        """A part's kind in a product's. Raises ValueError for an unknown kind."""
        check_kind(kind, self.kinds, self)
        return self._kinds[kind][self.families.index(tuple(self[name].kinds))]

    def part(self, prediction: Prediction, name: str) -> Prediction:
        """What is predicted of one part."""
        return Prediction(prediction.value[name], self.kind_of(prediction.kind, name))

    def network_inputs(self, xt: Parts, t: Time, kind: str) -> tuple[dict[str, Array], Array]:
        """What the network is fed: each part's state as that part's process gives it, and the common clock."""
        t = jnp.asarray(t)
        shown = {name: process.network_inputs(xt[name], t, self.kind_of(kind, name))[0] for name, process in self.parts}
        return shown, t

    def network_outputs(self, output: Parts, xt: Parts, t: Time, kind: str) -> dict[str, Array]:
        """The prediction's value in what a network gives back, part by part. Raises ValueError for other parts."""
        if not isinstance(output, Mapping) or set(output) != set(self.processes):
            found = ", ".join(output) if isinstance(output, Mapping) else type(output).__name__
            raise ValueError(f"the network must return a dict of {', '.join(self.processes)}, got {found}")
        return {
            name: process.network_outputs(output[name], xt[name], t, self.kind_of(kind, name))
            for name, process in self.parts
        }

    def convert(self, prediction: Prediction, kind: str, xt: Parts, t: Time) -> Prediction:
        """The same statement as another kind. Raises ValueError for an unknown kind."""
        value = {
            name: process.convert(self.part(prediction, name), self.kind_of(kind, name), xt[name], t).value
            for name, process in self.parts
        }
        return Prediction(value, kind)
