"""The shapes and the few values that every part of ddjax passes around."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

# A Gaussian state is Float[Array, "batch *sites"], a categorical one Int[Array, "batch *sites"]; that of a
# `processes.Product` is a dict of such arrays.
State = Float[Array, "batch *sites"] | Int[Array, "batch *sites"]
Time = Float[Array, "batch *#sites"]
Keys = Key[Array, "batch"]
PyTree = Any
Params = PyTree  # a nested plain dict of arrays
Apply = Callable[..., Array]  # (params, xt, t, cond, *, rng=None, train=False) -> Array
# Keys and values of every layer of a network at sites that it ran at before.
Past = tuple[Float[Array, "batch depth length heads head"], Float[Array, "batch depth length heads head"]]


class Rows(NamedTuple):
    """Which rows of the global batch some examples are: randomness is drawn by global row.

    Microbatches, devices and hosts each hold a slice of the step's batch. Drawing by global row makes the
    step's noise the same however the batch is split.
    """

    index: Int[Array, " batch"]
    total: int

    @classmethod
    def all(cls, batch: int) -> Rows:
        """Every row of a batch that is held whole."""
        return cls(jnp.arange(batch), batch)

    @classmethod
    def of(cls, x: State, rows: Rows | None) -> Rows:
        """The given rows; None: x, `(batch, ...)`, is the whole batch."""
        return cls.all(batch_size(x)) if rows is None else rows


@runtime_checkable
class Distribution(Protocol):
    """A law over states, independent over sites given its arguments."""

    def sample(self, keys: Keys) -> State:
        """One draw, one key per example."""

    def log_prob(self, x: State) -> Float[Array, batch * sites]:
        """Log-probability (density for Gaussian states) of each site, nats."""


class SoftTokens(NamedTuple):
    """A law over the symbols of each site, by its few largest probabilities (they need not sum to 1)."""

    ids: Int[Array, "batch *sites top"]
    weights: Float[Array, "batch *sites top"]


class Sample(NamedTuple):
    """What `ddjax.sample` returns."""

    x0: State  # (batch, *sites)
    nfe: Int[Array, " batch"]  # network evaluations spent on each example
    trajectory: Array | None = None  # (steps + 1, batch, *sites), only on request
    taps: dict[str, Array] | None = None  # (steps, ...) of each that was asked for


class Bound(NamedTuple):
    """A variational bound on -log p(x0), in nats per example: the sum of three terms.

    `diffusion` is an unbiased Monte-Carlo estimate of the integral over `t_range`; `prior` and
    `reconstruction` are what lies beyond its two ends. `diffusion_error` is the estimate's standard error, from the
    spread of its draws as if they were independent: an upper limit, for they are stratified; infinite for one draw.
    """

    prior: Float[Array, " batch"]
    diffusion: Float[Array, " batch"]
    reconstruction: Float[Array, " batch"]
    diffusion_error: Float[Array, " batch"]
    t_range: tuple[float, float]
    dims: int  # sites per example

    @property
    def total(self) -> Float[Array, " batch"]:
        """The bound, nats per example."""
        return self.prior + self.diffusion + self.reconstruction

    @property
    def bits_per_dim(self) -> Float[Array, " batch"]:
        """The bound in bits per site. Only for discrete data (or a binned reconstruction) is it a code length."""
        return self.total / (self.dims * math.log(2.0))

    def perplexity(self, units: Float[Array, " batch"] | int | None = None) -> Float[Array, ""]:
        """Exp of the bound per unit, over all examples together.

        units: how many each example has: tokens (default: `dims`), or the words its text had before tokenisation.
        """
        units = jnp.broadcast_to(jnp.asarray(self.dims if units is None else units), self.total.shape)
        return jnp.exp(self.total.sum() / units.sum())


def batch_size(x: State) -> int:
    """Number of examples in a state, an array or a dict of them."""
    return jax.tree.leaves(x)[0].shape[0]


def sites(x: State) -> int:
    """Number of sites of one example, in all parts."""
    return sum(math.prod(part.shape[1:]) for part in jax.tree.leaves(x))


def left_broadcast(t: jax.Array, x: jax.Array, trailing: int = 0) -> jax.Array:
    """Reshape a time so that it broadcasts against `x` from the left (and `trailing` axes more).

    `t` is `()` , `(batch,)`, or has the first axes of `x` (per-site times).
    """
    if t.ndim > x.ndim:
        raise ValueError(f"a time of shape {t.shape} does not broadcast against a state of shape {x.shape}")
    return t.reshape(t.shape + (1,) * (x.ndim + trailing - t.ndim))


def time_dtype(x: jax.Array) -> jnp.dtype:
    """What times and totals for a state are computed in: its own floats, 32 bits at least; JAX's default for tokens."""
    dtypes = [part.dtype for part in jax.tree.leaves(x)]
    floating = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)]
    return jnp.result_type(jnp.float32, *floating) if floating else jnp.result_type(float)


def per_example(x: Float[Array, batch * sites]) -> Float[Array, " batch"]:
    """Sum over sites, of all parts."""
    return sum(part.reshape(part.shape[0], -1).sum(axis=-1) for part in jax.tree.leaves(x))


Denoise = Callable[..., Any]  # (xt, t, cond) -> Prediction
