"""Guidance by the gradient of a model of a property, for any state space: classifier and regressor guidance."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ddjax.predictions import Prediction
from ddjax.predictions import evaluations as cost
from ddjax.pytrees import as_pytree
from ddjax.types import Denoise, State, Time

# (xt, t, cond) -> log p(property | x_t) of each example, `(batch,)` nats. Tokens come as one-hot vectors.
LogLikelihood = Callable[[State, Time, Any], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Regressed:
    """See `regressed`."""

    denoise: Denoise
    log_likelihood: LogLikelihood
    scale: jax.Array
    process: Any = dataclasses.field(metadata={"static": True})

    @property
    def evaluations(self) -> int:
        """Those of the denoiser; the model of the property is none of its."""
        return cost(self.denoise)

    def __call__(self, xt: State, t: Time, cond: Any = None) -> Prediction:
        """What the denoiser predicts, unguided."""
        return self.denoise(xt, t, cond)

    def slopes(self, xt: State, t: Time, cond: Any = None) -> Any:
        """Scale times the gradient of the log-likelihood: shaped like numbers, `(batch, *sites, states)` for tokens."""
        shown = _each(lambda process, x: _shown(process, x, t), self.process, xt)
        slopes = jax.grad(lambda x: self.log_likelihood(x, t, cond).sum())(shown)
        return jax.tree.map(lambda g: self.scale * g, slopes)


def regressed(denoise: Denoise, process: Any, log_likelihood: LogLikelihood, *, scale: float) -> Denoise:
    """A denoiser that comes with the slope of a property's log-likelihood, for `solvers.FirstOrder`.

    (Vignac et al. 2023, "DiGress", section 5 and algorithm 4; of numbers Dhariwal & Nichol 2021, algorithm 1.) Called,
    it predicts what `denoise` does: guidance is of the reverse step, not of the prediction.

    log_likelihood: of what is wanted, given the noised state, which a regressor is trained to read; differentiable.
        Where the regressor says a mean with unit variance it is minus half the squared error. (DiGress takes minus the
        squared error; so their lambda is half of `scale`.)
    scale: 1 is Bayes' rule to first order; 0 is off, and returns `denoise` itself.
    """
    if isinstance(scale, (int, float)) and scale == 0.0:
        return denoise
    return Regressed(as_pytree(denoise), as_pytree(log_likelihood), jnp.asarray(scale, jnp.result_type(float)), process)


def _shown(process: Any, x: Any, t: Time) -> jax.Array:
    return jax.nn.one_hot(x, process.num_states, dtype=t.dtype) if process.state == "categorical" else x


def _each(function: Callable[[Any, Any], Any], process: Any, x: Any) -> Any:
    """Of a state, or of each part of a product's."""
    if process.state == "product":
        return {name: function(process[name], part) for name, part in x.items()}
    return function(process, x)
