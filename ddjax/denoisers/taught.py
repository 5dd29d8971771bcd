"""A network that learns from another beside its own objective."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ddjax import auxiliary, taps
from ddjax.pytrees import as_pytree
from ddjax.types import Apply, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Taught:
    """See `taught`."""

    apply: Apply
    teacher: Apply
    teacher_params: Params
    prediction: float = dataclasses.field(metadata={"static": True})
    variance: float = dataclasses.field(metadata={"static": True})

    def __call__(
        self, params: Params, xt: Array, t: Array, cond: Any = None, *, rng: Any = None, train: bool = False
    ) -> Array:
        """Run the network, and in training the teacher."""
        out = self.apply(params, xt, t, cond, rng=rng, train=train)
        if not train:
            return out
        with taps.unheard(), auxiliary.collect():  # nobody listens to the teacher, and its own losses are not learned
            teacher_params = jax.tree.map(jnp.asarray, self.teacher_params)  # NumPy's would be indexed by tracers
            target = jax.lax.stop_gradient(self.teacher(teacher_params, xt, t, cond))
        if target.shape != out.shape:
            raise ValueError(f"the teacher says {target.shape}, the network {out.shape}: build both alike")
        squared = jnp.square(out - target)
        channels = xt.shape[-1] if out.shape == (*xt.shape[:-1], 2 * xt.shape[-1]) else out.shape[-1]
        mean = lambda x: x.reshape(len(x), -1).mean(axis=-1) if x.size else 0.0  # noqa: E731
        loss = self.prediction * mean(squared[..., :channels]) + self.variance * mean(squared[..., channels:])
        auxiliary.add_loss("distillation", loss)
        return out


def taught(
    apply: Apply, teacher: Apply, teacher_params: Params, *, prediction: float = 0.5, variance: float = 0.05
) -> Taught:
    """A network that adds, in training, how far it is from a teacher at the same states, times and conditions.

    (The hybrid distillation of Wang et al. 2025, "LiT", guideline 5, whose objective is `ddpm_hybrid`'s; in a config
    `objective.teacher`.) To any objective: the loss `distillation` of each example is `prediction` times the mean
    squared distance of the predictions, and `variance` times that of what says the variance, where outputs are twice as
    long on the last axis as the state (`processes.LearnedVariance`). Out of training it is the network itself; its
    parameters are the network's. The weights are by default theirs. It is a pytree, the teacher's parameters its leaves
    (as in `lora.Beside`).

    apply: the network. teacher, teacher_params: another, with outputs of the same kind and shape; it does not learn.
    Raises ValueError for negative weights, and, when called, for outputs of different shapes.
    """
    if not (prediction >= 0 and variance >= 0):
        raise ValueError(f"prediction={prediction}, variance={variance}: expected weights of 0 or more")
    return Taught(as_pytree(apply), as_pytree(teacher), teacher_params, float(prediction), float(variance))
