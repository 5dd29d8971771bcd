"""The noise of steps that draw symbols: DICE's residuals, or Gumbel noise.

Along a path, at each step, between what was drawn and what the model said (He et al. 2024, "Discrete Inversion Enabling
Controllable Editing", algorithms 1 and 2, eq. 4 and 6):

    z = y - log p(. | x_t, c),          y = log one-hot(what was drawn)                                      ("logit")

and again, with another condition c' and fresh Gumbel noise g,

    draw argmax( log p(. | x_t, c') + lambda_1 z + lambda_2 g )

lambda_1 = 1, lambda_2 = 0 and c' = c give the example back, bit for bit; lambda_1 = 0, lambda_2 = 1 samples from c'.
Or z is the Gumbel noise itself ("gumbel"), drawn given that its maximum was where it was (Maddison et al. 2014, "A*
sampling"): then an example of the model, replayed under c' with lambda_1 = 1, is one of the model under c' in law.

What is drawn: for `Masked`, the symbols of the sites that a step reveals, and which these are is replayed as recorded;
for other processes the next state of every site.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ddjax import random
from ddjax.categorical import gumbel
from ddjax.processes.categorical import Categorical
from ddjax.processes.masked import Reveal
from ddjax.types import Keys, State

RESIDUALS = ("logit", "gumbel")
INJECTIONS = ("linear", "max")
FLOOR = math.log(1e-30)  # VQ-Diffusion's log one-hot, DICE's

# The least log-probability of a model: with its own infinities what is subtracted would not come back when added.
_LEAST = math.log(1e-30)


def log_law(law: Any, process: Any) -> Array:
    """The log-probabilities from which a step draws: of symbols for `Masked`, else of the next states.

    Raises ValueError for a step that is not one draw from a law over states.
    """
    if type(law) not in (Reveal, Categorical):
        raise ValueError(
            f"the reverse step of {type(process).__name__} is not one draw from a law over states: inversion is for "
            "Masked, and for mixtures, kernels and chains"
        )
    return jnp.maximum(jax.nn.log_softmax(law.logits), _LEAST)


def residual(keys: Keys, log_p: Array, drawn: State, kind: str, floor: float) -> Array:
    """What is added to log_p for its maximum to be at `drawn`."""
    here = jnp.arange(log_p.shape[-1]) == jnp.minimum(drawn, log_p.shape[-1] - 1)[..., None]
    if kind == "logit":
        return jnp.where(here, 0.0, floor) - log_p
    top_keys, rest_keys = random.split(keys)
    top = gumbel(top_keys, (*drawn.shape[1:], 1), log_p.dtype)
    # Gumbel variables with location log_p, cut off above `top`: a hair below, for the maximum to survive rounding.
    rest = log_p - jnp.logaddexp(log_p - top, -gumbel(rest_keys, log_p.shape[1:], log_p.dtype))
    return jnp.where(here, top, jnp.minimum(rest, top - 1e-4)) - log_p


def redrawn(keys: Keys, log_p: Array, noise: Array, recorded: Array, fresh: Array, injection: str) -> State:
    """The symbols at the maximum, with the recorded noise and fresh noise by their weights."""
    join = jnp.add if injection == "linear" else jnp.maximum
    return jnp.argmax(log_p + join(recorded * noise, fresh * gumbel(keys, log_p.shape[1:], log_p.dtype)), axis=-1)
