"""Sequences longer than a network's window, one window after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key

from ddjax.sampling import Observed, hashable, sample
from ddjax.solvers import Stopping
from ddjax.solvers.base import Solver
from ddjax.types import Denoise, Sample


def sample_long(
    key: Key[Array, ""],
    denoise: Denoise,
    process: Any,
    *,
    shape: Sequence[int] | Mapping[str, Sequence[int]],
    window: int,
    stride: int,
    solver: Solver,
    times: Array,
    cond: Any = None,
    observed: Observed | None = None,
    stop: int | None = None,
    rows: Int[Array, " batch"] | None = None,
) -> Sample:
    """Draw sequences of any length, semi-autoregressively (Sahoo et al. 2024, MDLM).

    A window is drawn; its last `window - stride` tokens are known sites of the next, which begins `stride` sites later;
    and so on to the end. The last window moves on by less where `shape` asks for less, and knows more.

    shape: `(batch, length)`, length >= window; of a `processes.Product` that of each part, by name: sequences side by
        side, of one length. window: the length that the network sees. stride: 1 ... window; equal to it, windows know
        nothing of each other.
    times: the grid of each window. cond, rows: as in `ddjax.sample`. observed: known sites, `(batch, length)`.
    stop: a token behind the first of which all is that token again, and costs nothing (`solvers.Stopping`); no window
        is drawn once every sequence has one. Not of several parts.

    Of length `window` it is `ddjax.sample`, bit for bit. The law is that of a chain of windows: exact where what lies
    further back than the tokens kept says nothing more (Markov chains of that order), and each window's law is exact.
    Compiled once for all windows. Raises ValueError for lengths that do not fit, and as `ddjax.sample` does.
    """
    each, (static, parts) = jax.tree.map, hashable(shape)
    if len(set(parts.values())) != 1 or any(len(one) != 2 for one in parts.values()):
        raise ValueError(f"windows move along sequences, (batch, length), all parts of one length: got shape={shape}")
    batch, length = next(iter(parts.values()))
    if not 1 <= window <= length:
        raise ValueError(f"a window of {window} does not fit sequences of {length}: draw at least a window")
    if not 1 <= stride <= window:
        raise ValueError(f"stride must be 1 to {window}, the window, got {stride}")
    if not getattr(process, "sitewise", True):
        raise ValueError(f"{type(process).__name__} mixes sites: windows cannot know some of theirs")
    if observed is None:

        def zeros(process):
            return jnp.zeros((batch, length), jnp.int32 if process.state == "categorical" else float)

        nothing = {name: zeros(process[name]) for name in parts} if isinstance(shape, Mapping) else zeros(process)
        observed = Observed(each(lambda value: jnp.zeros(value.shape, bool), nothing), nothing)
    if stop is not None:
        solver = Stopping(solver, stop)
    known, value = each(jnp.asarray, tuple(observed))
    found = each(jnp.shape, known), each(jnp.shape, value)
    if any(hashable(one)[0] != static for one in found):
        raise ValueError(f"observed has shapes {found[0]} and {found[1]}, but shape={shape} was asked for")
    nfe, drawn = jnp.zeros(batch, jnp.int32), 0
    # Of a row that no example has: `key` itself is the first window's.
    others = jax.random.fold_in(key, 2**32 - 1)
    while drawn < length:
        start = min(max(drawn + stride - window, 0), length - window)
        here = slice(start, start + window)
        out = sample(
            key if drawn == 0 else jax.random.fold_in(others, start),
            denoise,
            process,
            shape=each(lambda known: (batch, window), known),
            solver=solver,
            times=times,
            cond=cond,
            observed=Observed(*each(lambda a, here=here: a[:, here], (known, value))),
            rows=rows,
        )
        drawn, nfe = start + window, nfe + out.nfe
        known = each(lambda known, here=here: known.at[:, here].set(True), known)
        value = each(lambda value, x0, here=here: value.at[:, here].set(x0), value, out.x0)
        if stop is not None:
            ended = (value[:, :drawn] == stop).any(axis=1, keepdims=True)
            behind = jnp.arange(length) >= drawn
            known, value = known | (ended & behind), jnp.where(ended & behind, stop, value)
            if bool(ended.all()):
                break
    return Sample(value, nfe)


def extended(observed: Observed | None, length: int) -> Observed | None:
    """What is known of the first sites of a sequence, as of `length` sites."""
    if observed is None or observed.mask.shape[1] >= length:
        return observed
    rest = [(0, 0), (0, length - observed.mask.shape[1])]
    return Observed(jnp.pad(jnp.asarray(observed.mask), rest), jnp.pad(jnp.asarray(observed.value), rest))
