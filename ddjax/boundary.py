"""One noise to start all samples from: the best of many for a conditional model and a deterministic solver.

    found = boundary.best_noise(key, denoise, process, references=x0, cond=cond, solver=solver, times=times)
    init = jnp.broadcast_to(found.noise, (n, *found.noise.shape))
    ddjax.sample(key, denoise, process, shape=init.shape, solver=solver, times=times, cond=new_cond, init=init)

(Ma et al. 2024, "Solving Diffusion ODEs with Optimal Boundary Conditions for Better Image Super-Resolution".) What a
noise is good for depends little on the condition: that which does best on a few references is used for all inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ddjax import random
from ddjax.grids import check_grid
from ddjax.pytrees import as_pytree
from ddjax.search import draw
from ddjax.solvers import Solver
from ddjax.solvers.base import check_own_times
from ddjax.types import Denoise, State

Distance = Callable[[State, State], Float[Array, " batch"]]  # of samples and references


class Best(NamedTuple):
    """The best noise, and what all are worth."""

    noise: State  # (*shape), of one example
    index: Array  # which candidate it is
    scores: Float[Array, " candidates"]  # the mean distance of each; the less the better


def squared_error(x0: State, reference: State) -> Float[Array, " batch"]:
    """The mean over sites of each example."""
    return jnp.square(x0 - reference).reshape(len(x0), -1).mean(axis=1)


def best_noise(
    key: Key[Array, ""],
    denoise: Denoise,
    process: Any,
    *,
    references: State,
    cond: Any = None,
    solver: Solver,
    times: Array,
    candidates: int | State = 64,
    distance: Distance = squared_error,
    chunk: int = 256,
) -> Best:
    """Sample every reference's condition from every candidate, and score candidates by the mean distance.

    references: what the samples should be, `(m, *shape)`. cond: under what, a pytree with the same leading axis.
    candidates: how many to draw from the prior at `times[0]`, by `key` and number alone; or the states themselves,
        `(n, *shape)`. solver: a deterministic one. distance: a function that compares by value, such as a perceptual
        one (the paper's is LPIPS). chunk: samples drawn at a time. Costs candidates times references samplings.
    The result is a device array; nothing is read back on the way.
    Raises ValueError for shapes that do not fit.
    """
    references, times = jnp.asarray(references), check_grid(times)
    check_own_times(solver, times)
    count, shape = references.shape[0], references.shape[1:]
    for leaf in jax.tree.leaves(cond):
        if jnp.shape(leaf)[:1] != (count,):
            raise ValueError(
                f"cond has a leaf of shape {jnp.shape(leaf)}; its first axis must be the {count} references"
            )
    if isinstance(candidates, int):
        if candidates < 1:
            raise ValueError(f"at least one candidate is needed, got {candidates}")
        prior = process.prior((candidates, *shape), times[0])
        candidates = prior.sample(random.example_keys(key, candidates))
    noises = jnp.asarray(candidates)
    if noises.shape[1:] != shape or not noises.size or not references.size:
        raise ValueError(f"candidates of shape {noises.shape} must be some of states like the references', {shape}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    chunk = min(chunk, noises.shape[0] * count)
    scores = _scores(key, as_pytree(denoise), times, noises, references, cond, solver, distance, chunk)
    index = jnp.argmin(scores)
    return Best(noises[index], index, scores)


@functools.partial(jax.jit, static_argnames=("solver", "distance", "chunk"))
def _scores(key, denoise, times, noises, references, cond, solver, distance, chunk):
    count, pairs = references.shape[0], noises.shape[0] * references.shape[0]
    padded = -(-pairs // chunk) * chunk

    def of_some(pair):
        candidate, reference = pair // count, pair % count
        own = jax.tree.map(lambda leaf: jnp.asarray(leaf)[reference], cond)
        keys = random.example_keys(key, candidate)  # for solvers that draw: the same for all references
        x0 = draw(keys, denoise, solver, times, noises[candidate], own)
        return distance(x0, references[reference])

    some = jnp.minimum(jnp.arange(padded), pairs - 1).reshape(-1, chunk)
    found = jax.lax.map(of_some, some).reshape(-1)[:pairs]
    return found.reshape(-1, count).mean(axis=1)
