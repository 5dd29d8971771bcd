"""Block diffusion (Arriola et al. 2025, BD3-LM): denoising in blocks, each behind the clean blocks before it.

A network such as `TextTransformer(block=...)` is shown the clean sequence beside the noisy one, and gives all at once:

    -log p(x) <= sum_b E[bound of block b | clean blocks before it]
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from ddjax import random
from ddjax.objectives.base import Objective, at_times, noised
from ddjax.types import Apply, Params, State


def with_clean(x0: State, cond: Any = None) -> dict[str, Any]:
    """The condition of a network that is shown the clean sequence beside the noisy one, and `cond` as before."""
    return {"clean": x0} if cond is None else {"clean": x0, "cond": cond}


def teacher_forced(objective: Objective) -> Objective:
    """Any objective, with the clean sequence in the network's condition (`with_clean`).

    Under `with_condition_dropout`, not over it: what is dropped is the condition that the caller gave.
    """

    def forced(key, apply, params, x0, cond=None, weights=None, rows=None, train=True):
        return objective(key, apply, params, x0, with_clean(x0, cond), weights, rows, train)

    return forced


def block_elbo(process: Any, kind: str, *, block: int, clip: tuple[float, float] = (1e-3, 1.0)) -> Objective:
    """The bound's integrand, at a time for each block, teacher forced, nats per site.

    (Arriola et al. 2025, eq. 8 and section 5.) The expectation of `teacher_forced(elbo(...))` with less variance,
    where the whole range is sampled. Times are low-discrepancy over examples and blocks: those of one example are
    spread over the range, and those of one block over the examples. They are given to the network for each site.

    block: sites in a block (the last may be shorter), as in the network.
    clip: the range of noise levels (for `Masked`, of mask rates) sampled, uniformly. The loss is the mean of the
        integrand over it, so that losses of different ranges are comparable; with (0, 1) it is the bound.
    Raises ValueError for a range that is not inside [0, 1], an empty block, or a process without a survival schedule.
    """
    _check(process, block)
    check_clip(clip)
    return _clipped(process, kind, block, *clip)


def _clipped(process: Any, kind: str, block: int, low: Array | float, high: Array | float) -> Objective:
    """`block_elbo` for a range that may be traced."""

    def draw(u, keys, x0):
        def time_at(u):
            ends = process.schedule.time_of_sigma(jnp.asarray([low, high], u.dtype))
            t, slope = process.time_at(u, jnp.minimum(ends, 1.0))  # a schedule may not lose all
            return tuple(jnp.repeat(v, block, axis=1)[:, : x0.shape[1]] for v in (t, slope / (high - low)))

        return at_times(process, time_at, process.path_kl)(u, keys, x0)

    return teacher_forced(noised(process, kind, draw, times_each=lambda x0: -(-x0.shape[1] // block)))


class ClipSearch(NamedTuple):
    """What `search_clip` found."""

    best: tuple[float, float]
    variances: dict[tuple[float, float], float]  # of one example's loss, for each candidate


def search_clip(
    key: Key[Array, ""],
    apply: Apply,
    params: Params,
    process: Any,
    x0: State,
    candidates: Sequence[tuple[float, float]],
    *,
    kind: str,
    block: int,
    cond: Any = None,
    draws: int = 8,
) -> ClipSearch:
    """The range of noise levels under which `block_elbo` of one example varies least, over data and noise.

    (Arriola et al. 2025, section 5.3.) Each of the given examples, `(batch, length)`, has its loss drawn `draws` times,
    with the same random numbers for every candidate. One compiled program, whatever the candidates.
    Raises ValueError for a range that is not inside [0, 1], no candidates, or fewer than two losses.
    """
    _check(process, block)
    for clip in candidates:
        check_clip(clip)
    if not len(candidates) or draws * x0.shape[0] < 2:
        raise ValueError(f"needs candidates and two losses of each, got {len(candidates)} and {draws * x0.shape[0]}")
    ranges = jnp.asarray(candidates, float)
    found = np.asarray(_variances(key, params, x0, cond, ranges, apply, process, kind, block, draws))
    names = [(float(low), float(high)) for low, high in candidates]
    return ClipSearch(names[int(found.argmin())], dict(zip(names, found.tolist(), strict=True)))


@functools.partial(jax.jit, static_argnames=("apply", "process", "kind", "block", "draws"))
def _variances(key, params, x0, cond, ranges, apply, process, kind, block, draws) -> Float[Array, " candidates"]:
    rows = random.example_keys(key, x0.shape[0])

    def variance(clip):
        objective = _clipped(process, kind, block, clip[0], clip[1])

        def one(key, x0, cond):  # as a batch of its own, so that its loss comes out
            first = jax.tree.map(lambda leaf: leaf[None], (x0, cond))
            return objective(key, apply, params, *first, train=False)[0]

        losses = jax.lax.map(lambda i: jax.vmap(one)(random.fold_in(rows, i), x0, cond), jnp.arange(draws))
        return losses.var(ddof=1)

    return jax.lax.map(variance, ranges)


def check_clip(clip: tuple[float, float]) -> None:
    """Raise a ValueError unless this is a range of noise levels."""
    low, high = clip
    if not 0 <= low < high <= 1:
        raise ValueError(f"clip is a range of noise levels, 0 <= low < high <= 1, got {tuple(clip)}")


def _check(process: Any, block: int) -> None:
    if block < 1:
        raise ValueError(f"block={block}: expected at least one site")
    if not hasattr(getattr(process, "schedule", None), "time_of_sigma"):
        raise ValueError(
            f"clip is in noise levels, which {type(process).__name__} does not have: give a process with a survival "
            "schedule, or use teacher_forced(elbo(...))"
        )
