"""What a network said, and what it meant by it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddjax.pytrees import as_pytree, unwrapped
from ddjax.types import Apply, Denoise, Params, State, Time

GAUSSIAN_KINDS = ("x0", "noise", "score", "velocity", "v", "edm")
LOGIT_KINDS = ("posterior", "cavity", "ratio")
CATEGORICAL_KINDS = (*LOGIT_KINDS, "velocity", "planner")
STATE_KINDS = ("ratio", "velocity")  # over all states, noise symbols included; the others are over clean symbols
COUNT_KINDS = ("deaths",)  # of counts (`processes.Thinning`), beside the laws over them


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prediction:
    """A network's output with its meaning.

    value: shaped like the state for Gaussian kinds, a planner, and `"deaths"` (the expected number x_0 - x_t >= 0);
        otherwise `(batch, *sites, symbols)`, as logits for `LOGIT_KINDS` and as rates for a categorical velocity.
    kind: one of `GAUSSIAN_KINDS`, `CATEGORICAL_KINDS` or `COUNT_KINDS` (docs/design.md, section 2). Static under jit.
    """

    value: Float[Array, batch * sites]
    kind: str = dataclasses.field(metadata={"static": True})


def check_kind(kind: str, allowed: tuple[str, ...], process: object) -> None:
    """Raise a ValueError that names the kinds a process understands."""
    if kind not in allowed:
        raise ValueError(
            f"{type(process).__name__} does not understand a prediction of kind {kind!r}; "
            f"it takes one of {', '.join(allowed)}"
        )


def check_sitewise(process: object, what: str) -> None:
    """Raise a ValueError where a process does not corrupt each site by itself, as `what` needs."""
    if not getattr(process, "sitewise", True):
        raise ValueError(f"{type(process).__name__} mixes sites or adds variables to them: {what} is not for it")


def check_bound(process: object) -> None:
    """Raise a ValueError where a process has no variational bound."""
    if not getattr(process, "has_bound", True):
        raise ValueError(f"{type(process).__name__} has no bound on the likelihood: it is no Markov chain to data")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BoundDenoiser:
    """A network closed over its parameters (see `bind`)."""

    params: Params
    rng: jax.Array | None
    apply: Apply  # a pytree, mostly without leaves (`as_pytree`)
    process: Any = dataclasses.field(metadata={"static": True})
    kind: str = dataclasses.field(metadata={"static": True})
    train: bool = dataclasses.field(metadata={"static": True})

    def __call__(self, xt: State, t: Time, cond: Any = None) -> Prediction:
        """Predict at state `xt`, time `t`."""
        x_in, t_in = self.process.network_inputs(xt, t, self.kind)
        options = {"train": True, "rng": self.rng} if self.train else {}
        output = self.apply(self.params, x_in, t_in, cond, **options)
        value = self.process.network_outputs(output, xt, t, self.kind)
        # Whatever the network computes in: softmax, losses and steps of the sampler have float32 at least.
        return Prediction(jax.tree.map(lambda v: v.astype(jnp.promote_types(v.dtype, jnp.float32)), value), self.kind)


def bind(
    apply: Apply,
    params: Params,
    process: Any,
    kind: str,
    *,
    rng: jax.Array | None = None,
    train: bool = False,
) -> BoundDenoiser:
    """Close a network over its parameters: `apply(params, xt, t, cond)` becomes `denoise(xt, t, cond)`.

    kind: what the network's output means for this process (for example `"posterior"` or `"velocity"`). With `"edm"` the
    process also scales the network's inputs (Karras et al. 2022, table 1).
    The result is a pytree whose leaves are `params`, and what `apply` holds (`lora.Beside`): it goes through `jax.jit`
    as an argument.
    Raises ValueError where the process has no such kind.
    """
    check_kind(kind, process.kinds, process)
    return BoundDenoiser(params, rng, as_pytree(apply), process, kind, train)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Planned:
    """See `planned`."""

    denoise: Denoise
    planner: Denoise

    calls = 2  # that `both` makes

    @property
    def evaluations(self) -> int:
        """Those of the denoiser; a call of the planner counts as much."""
        return evaluations(self.denoise)

    def __call__(self, xt: State, t: Time, cond: Any = None) -> Prediction:
        """What the denoiser predicts."""
        return self.denoise(xt, t, cond)

    def both(self, xt: State, t: Time, cond: Any = None) -> tuple[Prediction, Prediction]:
        """What the denoiser and the planner predict."""
        return self.denoise(xt, t, cond), self.planner(xt, t, cond)


def planned(denoise: Denoise, planner: Denoise) -> Planned:
    """A denoiser that comes with a planner: called like the denoiser, and has `.planner(xt, t, cond)`.

    planner: gives the log odds that each site is corrupted, a prediction of kind `"planner"` (`objectives.planner`).
    """
    return Planned(as_pytree(denoise), as_pytree(planner))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PlannerHead:
    """The planner of `TwoHeads`."""

    network: BoundDenoiser

    def __call__(self, xt: State, t: Time, cond: Any = None) -> Prediction:
        """The last output."""
        return Prediction(self.network(xt, t, cond).value[..., -1], "planner")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TwoHeads:
    """Denoiser and planner as the two heads of one network, as `objectives.ddpd` trains them.

    network: predicts `(batch, *sites, n + 1)`: the denoiser's n outputs, then the planner's log odds.
    """

    network: BoundDenoiser

    calls = 1  # that `both` makes

    @property
    def planner(self) -> PlannerHead:
        """The second head."""
        return PlannerHead(self.network)

    def __call__(self, xt: State, t: Time, cond: Any = None) -> Prediction:
        """What the denoiser's head predicts."""
        return self.both(xt, t, cond)[0]

    def both(self, xt: State, t: Time, cond: Any = None) -> tuple[Prediction, Prediction]:
        """What the two heads predict, from one evaluation."""
        out = self.network(xt, t, cond)
        return Prediction(out.value[..., :-1], out.kind), Prediction(out.value[..., -1], "planner")


def evaluations(denoise: Any) -> int:
    """Network evaluations that one call of `denoise` costs (guidance costs two)."""
    return getattr(unwrapped(denoise), "evaluations", 1)
