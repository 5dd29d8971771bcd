"""Semi-discrete optimal transport from white noise to latents: sampling that begins in the middle (DPM-OT).

(Li et al. 2023, "DPM-OT: a new diffusion probabilistic model based on optimal transport".) The map from N(0, I) to n
points y_i of equal weight that moves least is the gradient of Brenier's potential

    u(x) = max_i <x, y_i> + h_i,        x -> the y_i whose maximum it is,

its cells {x -> y_i} all of measure 1 / n. Their heights h minimise the convex energy E u(x) - mean(h), whose gradient
is the cells' measures less 1 / n: Adam on Monte-Carlo batches finds them. With y_i draws of q(x_t | x_0) of training
data, samplers begin at t, not at 1:

    y = ddjax.transport.latents(key, process, x0, 0.4)
    brenier = ddjax.transport.fit(key, y)
    init = brenier(noise)                               # (batch, *sites), states at t = 0.4
    ddjax.sample(key, denoise, process, init=init, times=ddjax.grids.uniform(8, start=0.4), ...)
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from ddjax import random
from ddjax.frozen import FrozenTree
from ddjax.processes.gaussian import gaussian_of
from ddjax.solvers.base import Info
from ddjax.types import State


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Brenier:
    """The map x -> y_i of the cell that x lies in.

    targets: `(n, *sites)`. heights: `(n,)`, up to a constant (of each class). labels: `(n,)`, the class of each target:
    then the map of a class goes to its own targets alone, each with the same share of the class; or None.

    What lies between cells has measure 0 and goes to either side; the paper's code can also drop noise whose cell meets
    the next ones at a steep angle (the singular set between modes), and takes none by default, as here.
    """

    targets: State
    heights: Float[Array, " n"]
    labels: Int[Array, " n"] | None = None

    def scores(self, x: State, cond: Array | None = None) -> Float[Array, "batch n"]:
        """<x, y_i> + h_i; -inf at targets of other classes."""
        flat, targets = (v.reshape(len(v), -1) for v in (x, self.targets))
        scores = jnp.matmul(flat, targets.T, precision=jax.lax.Precision.HIGHEST) + self.heights
        if (self.labels is None) != (cond is None):
            raise ValueError("a map by classes needs labels of what is mapped, cond, and another takes none")
        return scores if cond is None else jnp.where(cond[:, None] == self.labels, scores, -jnp.inf)

    def cells(self, x: State, cond: Array | None = None) -> Int[Array, " batch"]:
        """The number of the cell that each x lies in."""
        return jnp.argmax(self.scores(x, cond), axis=1)

    def __call__(self, x: State, cond: Array | None = None) -> State:
        """Where white noise `(batch, *sites)` goes. cond: classes `(batch,)`, for a map by classes."""
        return self.targets[self.cells(x, cond)]

    def energy(self, x: State, cond: Array | None = None) -> Float[Array, ""]:
        """The mean of u over x, less that of h: for any heights at least the correlation of every equal assignment."""
        return jnp.max(self.scores(x, cond), axis=1).mean() - self.heights.mean()


def latents(key: Key[Array, ""], process: Any, x0: State, t: float) -> State:
    """A draw of q(x_t | x_0) for each clean example: targets at the time t."""
    x0 = jnp.asarray(x0)
    return process.marginal(x0, jnp.full(len(x0), t)).sample(random.example_keys(key, len(x0)))


def fit(
    key: Key[Array, ""],
    targets: State,
    labels: Int[Array, " n"] | None = None,
    *,
    iterations: int = 2000,
    batch: int = 4096,
    learning_rate: float = 0.02,
) -> Brenier:
    """The heights of the map from white noise to the targets: Adam with a rate that falls to 0 as a cosine.

    targets: `(n, *sites)`. labels: `(n,)`, for a map by classes; a class of noise is drawn as often as its targets are.
    iterations, batch: normals drawn are the product of the two; the error of a cell's share 1 / n is about that of its
        count among a few tens of batches. learning_rate: in units of the targets' root mean square distance from their
        mean. Memory: `(batch, n)`.
    Raises ValueError for fewer targets than one, and labels that are not one for each.
    """
    targets = jnp.asarray(targets)
    labels = None if labels is None else jnp.asarray(labels)
    if len(targets) < 1 or (labels is not None and labels.shape != targets.shape[:1]):
        shown = "none" if labels is None else labels.shape
        raise ValueError(f"targets are (n, *sites), n >= 1, and labels (n,): got {targets.shape} and {shown}")
    return _fit(key, targets, labels, iterations, batch, learning_rate)


@functools.partial(jax.jit, static_argnames=("iterations", "batch"))
def _fit(key, targets, labels, iterations, batch, learning_rate):
    centred = targets - targets.mean(0)  # the potential's slope that all share moves no cell
    scale = jnp.sqrt((centred.reshape(len(targets), -1) ** 2).sum(1).mean())
    scale = jnp.where(scale > 0, scale, 1.0)
    optimizer = optax.adam(optax.cosine_decay_schedule(1.0, iterations))

    def step(state, i):
        heights, moments = state
        noise_key, class_key = jax.random.split(jax.random.fold_in(key, i))
        x = jax.random.normal(noise_key, (batch, *targets.shape[1:]), targets.dtype)
        cond = None if labels is None else labels[jax.random.randint(class_key, (batch,), 0, len(targets))]
        slope = jax.grad(lambda h: Brenier(centred, h, labels).energy(x, cond))(heights)
        change, moments = optimizer.update(slope, moments)
        heights = heights + learning_rate * scale * change
        return (heights - heights.mean(), moments), None

    heights = jnp.zeros(len(targets), targets.dtype)
    (heights, _), _ = jax.lax.scan(step, (heights, optimizer.init(heights)), jnp.arange(iterations))
    return Brenier(targets, heights, labels)


def volumes(key: Key[Array, ""], brenier: Brenier, num: int) -> Float[Array, " n"]:
    """The measure of each cell by `num` normals: 1 / n each, where the heights are right."""
    x_key, class_key = jax.random.split(key)
    x = jax.random.normal(x_key, (num, *brenier.targets.shape[1:]), brenier.targets.dtype)
    count, labels = len(brenier.targets), brenier.labels
    cond = None if labels is None else labels[jax.random.randint(class_key, (num,), 0, count)]
    return jnp.bincount(brenier.cells(x, cond), length=count) / num


@dataclasses.dataclass(frozen=True)
class Transported:
    """The map as a solver's step: from white noise at any time to the targets' time, without an evaluation.

    For combinations of solvers, where another goes on at `time`; the step's own end is not looked at. The targets are
    constants of the compiled program: for many large ones give `ddjax.sample` the mapped states as `init`.
    Samples of a deterministic solver behind it are at most as many as the targets.

    process: Gaussian, or an interpolant from Gaussian noise; its prior is scaled to white noise. brenier: `fit`'s.
    time: that of its targets. A map by classes finds them in the condition, labels `(batch,)`.
    """

    process: Any
    brenier: FrozenTree
    time: float

    def __post_init__(self):
        object.__setattr__(self, "process", gaussian_of(self.process) or self.process)
        if self.process.state != "gaussian" or not hasattr(self.process, "prior_std"):
            raise ValueError(f"Transported maps white noise: {type(self.process).__name__} does not begin with it")
        if not 0 <= self.time < 1:
            raise ValueError(f"the targets' time lies in [0, 1), got {self.time}")
        if isinstance(self.brenier, Brenier):
            object.__setattr__(self, "brenier", FrozenTree.of(self.brenier))

    def init(self, xt, cond=None):
        """Nothing to carry."""
        return ()

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        """No evaluation."""
        brenier = jax.tree.map(lambda v: jnp.asarray(v, xt.dtype), self.brenier.tree)
        moved = brenier(xt / self.process.prior_std(jnp.asarray(t)), None if brenier.labels is None else cond)
        return moved.astype(xt.dtype), carry, Info(jnp.zeros(xt.shape[0], jnp.int32))
