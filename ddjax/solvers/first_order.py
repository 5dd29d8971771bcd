"""Ancestral sampling of a law times a property's likelihood, to first order in the step."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ddjax.processes.categorical import Categorical
from ddjax.processes.gaussian import Normal, gaussian_of
from ddjax.processes.product import Joint
from ddjax.solvers.base import Info, batched
from ddjax.types import batch_size


@dataclasses.dataclass(frozen=True)
class FirstOrder:
    """x_s ~ p(x_s | x_t) exp(<slope at x_t, x_s>), normalised, with denoisers of `guidance.regressed`.

    log p(y | x_s) is taken at its tangent in x_t. For symbols, in their one-hot vectors, the slope adds to the logits
    of the reverse step (Vignac et al. 2023, "DiGress", section 5); for numbers the mean moves by the variance times the
    slope (Dhariwal & Nichol 2021, algorithm 1). Of a product each part moves so; of an interpolant from Gaussian noise
    the steps are those of the Gaussian process that it is.

    Raises ValueError, when a sampler is compiled, for a denoiser without slopes, and a step that is neither.
    """

    process: Any

    def __post_init__(self):
        object.__setattr__(self, "process", gaussian_of(self.process) or self.process)

    def init(self, xt, cond=None):
        """Nothing to carry."""
        return ()

    def law(self, prediction, xt, s, t, slopes):
        """The guided reverse step."""
        law = self.process.reverse(prediction, xt, s, t)
        if isinstance(law, Joint):
            return Joint({name: _tilted(self.process[name], own, slopes[name]) for name, own in law.laws.items()})
        return _tilted(self.process, law, slopes)

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        """One draw."""
        if not hasattr(denoise, "slopes"):
            raise ValueError("FirstOrder needs the slope of a property: give the denoiser of guidance.regressed")
        now = batched(t, xt)
        law = self.law(denoise(xt, now, cond), xt, s, t, denoise.slopes(xt, now, cond))
        return law.sample(keys), carry, Info(jnp.ones(batch_size(xt), jnp.int32))


def _tilted(process: Any, law: Any, slope: Any) -> Any:
    if process.state == "categorical":
        if isinstance(law, Categorical):
            return Categorical(law.logits + slope.astype(law.logits.dtype))
        states = jnp.arange(slope.shape[-1])  # of laws that are not made of logits, each state's probability
        logits = jax.vmap(lambda k: law.log_prob(jnp.full(slope.shape[:-1], k)), out_axes=-1)(states)
        return Categorical(logits + slope.astype(logits.dtype))
    if isinstance(law, Normal):
        return Normal(law.mean + law.std**2 * slope, law.std)
    raise ValueError(f"a step that draws from {type(law).__name__} has no first-order guidance")
