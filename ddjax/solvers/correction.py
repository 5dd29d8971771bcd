"""Self-correction after sampling: a model of noise that hides among symbols finds and mends its own mistakes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ddjax.categorical import categorical
from ddjax.processes.categorical import Tokens, gather
from ddjax.processes.masked import Masked
from ddjax.solvers.ancestral import Ancestral
from ddjax.solvers.base import Info, Solver, batched, first_carry
from ddjax.solvers.unmask import highest


class Progress(NamedTuple):
    """How far an example's correction has come."""

    best: Float[Array, " batch"]  # the largest share of sites so far that show the network's favourite
    waited: Int[Array, " batch"]  # corrections since then
    stalled: Bool[Array, " batch"]  # nothing more to do


@dataclasses.dataclass(frozen=True)
class SelfCorrection:
    """Another solver's steps down to data, and then corrections, one for each step of the grid that begins at `below`.

    A correction (von Rütte et al. 2025, GIDD) draws a symbol for each site at a low temperature, from what the network
    says of it given the others (the cavity) at time `level`, and writes the `sites` most probable of those that differ
    from what is shown. An example is done when none differs, or when the share of sites that show the
    network's favourite has not grown for more than `patience` corrections; it then costs nothing more, nor does a step
    in which all are done. A search for likely states, not a sampler: at temperature 0 each correction of one site
    raises the likelihood, and it ends where no single symbol can be bettered.

        ddjax.sample(..., solver=SelfCorrection(process, below=0.5), times=grids.uniform(256))

    samples in 128 steps and makes up to 128 corrections. The step that would end at or under `below` goes to t = 0.
    """

    process: Any
    below: float = 0.5
    temperature: float = 0.1
    level: float = 0.01
    sites: int = 1
    patience: int = 32
    make: Callable[[Any], Solver] = Ancestral

    def __post_init__(self):
        if self.process.state != "categorical" or isinstance(self.process, Masked):
            raise ValueError(
                f"SelfCorrection needs noise that hides among symbols (Hybrid, Uniform), got "
                f"{type(self.process).__name__}; for Masked use Remasking"
            )
        for name, value, holds in (
            ("below", self.below, 0 < self.below < 1),
            ("temperature", self.temperature, self.temperature > 0),
            ("level", self.level, 0 < self.level < 1),
            ("sites", self.sites, self.sites >= 1),
            ("patience", self.patience, self.patience >= 0),
        ):
            if not holds:
                raise ValueError(f"SelfCorrection's {name} is out of range: {value}")

    def init(self, xt, cond=None):
        """The other solver's carry, and how far the correction has come."""
        return self.make(self.process).init(xt, cond), self._progress(xt)

    def begin(self, xt, cond, denoise, known=None):
        """As `init`."""
        return first_carry(self.make(self.process), xt, cond, denoise, known), self._progress(xt)

    def _progress(self, xt: Tokens) -> Progress:
        batch = xt.shape[0]
        return Progress(jnp.zeros(batch, float), jnp.zeros(batch, jnp.int32), jnp.zeros(batch, bool))

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        """The other solver's step, a correction, or nothing; all examples are at the same time."""

        def sample(inner, progress):
            to = jnp.where(s <= self.below, jnp.zeros_like(s), s)
            xs, inner, info = self.make(self.process).step(keys, inner, xt, t, to, denoise, cond)
            return xs.astype(xt.dtype), (inner, progress), info

        def correct(inner, progress):
            xs, after = self.correct(keys, progress, xt, denoise, cond)
            return xs.astype(xt.dtype), (inner, after), Info((~progress.stalled).astype(jnp.int32))

        def rest(inner, progress):
            return xt, (inner, progress), Info(jnp.zeros(xt.shape[0], jnp.int32))

        inner, progress = carry
        phase = jnp.where(jnp.all(t > self.below), 0, jnp.where(jnp.all(progress.stalled), 2, 1))
        return jax.lax.switch(phase, (sample, correct, rest), inner, progress)

    def correct(self, keys, progress: Progress, x, denoise, cond=None):
        """One correction of every example that is not done: (x, progress)."""
        level = jnp.asarray(self.level, float)
        prediction = denoise(x, batched(level, x), cond)
        logits = self.process.convert(prediction, "cavity", x, level).value / self.temperature
        drawn = categorical(keys, logits)
        # By log odds, whose order is that of the probabilities: of these many round to 1 at a low temperature.
        rest = jax.nn.logsumexp(jnp.where(jnp.arange(logits.shape[-1]) == drawn[..., None], -1e30, logits), axis=-1)
        score = jnp.where(drawn == x, -jnp.inf, gather(logits, drawn) - rest)
        new = jnp.where(highest(score, jnp.full(x.shape[0], self.sites), jnp.ones(x.shape, bool)), drawn, x)
        agrees = (new == jnp.argmax(logits, axis=-1)).reshape(x.shape[0], -1).mean(-1, dtype=progress.best.dtype)
        waited = jnp.where(agrees > progress.best, 0, progress.waited + 1)
        gave_up = waited > self.patience
        same = jnp.all((new == x).reshape(x.shape[0], -1), axis=-1)
        keep = (progress.stalled | gave_up).reshape(-1, *[1] * (x.ndim - 1))
        after = Progress(jnp.maximum(progress.best, agrees), waited, progress.stalled | gave_up | same)
        return jnp.where(keep, x, new), after
