"""Block diffusion with an exact cache of keys and values (Arriola et al. 2025, BD3-LM, section 3.2 and algorithm 2)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from ddjax import taps
from ddjax.predictions import evaluations
from ddjax.processes import Staggered, in_blocks
from ddjax.solvers.base import Info, batched, first_carry
from ddjax.types import Denoise, Past, State, Time


class Written(NamedTuple):
    """Keys and values of the blocks that are done, how many these are, and what the solver itself carries."""

    past: Past
    blocks: Int[Array, " batch"]  # one number for all
    inner: Any


@dataclasses.dataclass(frozen=True)
class KeyValues:
    """`solver`, with the network run on the current block only, behind the keys and values of those before it.

    Equal to `solver` up to the rounding of the network's sums: a site of such a network sees its own block and those
    before it, which no longer change. When a block is done the network is run once more on it, clean, for its keys and
    values. `Info.nfe` counts calls, each of a block's sites and not of the sequence's.

    solver: over `processes.in_blocks`, with blocks as long as the network's (`TextTransformer(block=...)`), on a grid
        with no step into two of them (`grids.in_turn`). Its carry begins anew with every block; `Cached` goes inside.
    Raises ValueError for another process, a network whose keys and values cannot be tapped (none of
    `TextTransformer`'s, or with scan=True), or times for each example.
    """

    solver: Any

    def __post_init__(self):
        process, length = self.process, self._length
        if length is None or process != in_blocks(process.process, length, self.block):
            raise ValueError(
                f"KeyValues goes block by block: it needs a solver over processes.in_blocks, not {process}"
            )

    @property
    def process(self) -> Any:
        """The solver's."""
        return self.solver.process

    @property
    def _length(self) -> int | None:
        starts = getattr(getattr(self.process, "clock", None), "start", None)
        return None if not isinstance(self.process, Staggered) or starts is None else len(starts.values)

    @property
    def block(self) -> int:
        """Sites in a block."""
        return int(np.unique(self.process.clock.start.values, return_counts=True)[1].max())

    def begin(self, xt: State, cond: Any, denoise: Denoise, known: Any = None) -> Written:
        """Nothing written yet."""
        t = jnp.ones(xt.shape[:1], jnp.result_type(float))
        shapes = jax.eval_shape(lambda x: keys_values(denoise, x, t, cond), xt)
        past = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), shapes)
        inner = first_carry(self.solver, xt, self._view(xt, past, 0, cond), denoise, known)
        return Written(past, jnp.zeros(xt.shape[:1], jnp.int32), inner)

    def init(self, xt, cond=None):
        """Not to be had without the denoiser."""
        raise ValueError("KeyValues holds keys and values, whose shape the denoiser tells: call begin")

    def _view(self, xt: State, past: Past, block: int | Array, cond: Any) -> dict[str, Any]:
        """The condition under which the network runs on one block."""
        sites = block * self.block + jnp.arange(self.block)
        return {"past": past, "sites": jnp.broadcast_to(sites, (xt.shape[0], self.block)), "cond": cond}

    def _moving(self, s: Array, t: Array) -> Int[Array, ""]:
        """The block whose turn it is."""
        s, t = (self.process.clock.local(v, jnp.zeros((1, self._length)))[0] for v in (s, t))
        return (jnp.argmax(s < t) // self.block).astype(jnp.int32)

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        """The solver's step, after a pass over the block that was finished before, if one was."""
        if jnp.ndim(t) or jnp.ndim(s):
            raise ValueError("KeyValues takes one time for the whole batch, as ddjax.sample gives it")
        now = self._moving(s, t)
        then, times = carry.blocks[0], batched(t, xt)

        def write(block: Array, past: Past) -> Past:
            new = keys_values(denoise, xt, times, self._view(xt, past, block, cond))  # each site of it is at its t = 0
            return tuple(
                jax.lax.dynamic_update_slice_in_dim(a, b, block * self.block, axis=2)
                for a, b in zip(past, new, strict=True)
            )

        past = jax.lax.fori_loop(then, now, write, carry.past)
        view = self._view(xt, past, now, cond)
        inner = jax.lax.cond(now > then, lambda: first_carry(self.solver, xt, view, denoise), lambda: carry.inner)
        xs, inner, info = self.solver.step(keys, inner, xt, t, s, denoise, view)
        return (
            xs,
            Written(past, jnp.full_like(carry.blocks, now), inner),
            Info(info.nfe + now - then),
        )


def keys_values(denoise: Denoise, xt: State, t: Time, cond: Any = None) -> Past:
    """Keys and values of every layer where the network ran, `(batch, depth, sites, heads, head)` each.

    Under guidance, which evaluates the network for several conditions in one batch, the layers of all of these, one
    after the other: so guidance takes them in `cond["past"]` and hands each evaluation its own.
    Raises ValueError for a network that names none.
    """
    with taps.record() as seen:
        denoise(xt, t, cond)
    return tapped(seen, denoise, xt)


def tapped(seen: Mapping[str, Array], denoise: Denoise, xt: State) -> Past:
    """Keys and values in what `taps.record` saw of a call. Raises ValueError where there are none."""
    depth = next(i for i in itertools.count() if f"block/{i}/keys" not in seen)
    if not depth:
        raise ValueError("this network's keys and values cannot be tapped: it must be one like TextTransformer")
    batch, calls = xt.shape[0], evaluations(denoise)
    layers = [[seen[f"block/{i}/{what}"] for i in range(depth)] for what in ("keys", "values")]
    if layers[0][0].shape[0] != calls * batch:
        raise ValueError(
            f"this network is evaluated {calls} times, not in one batch, so that the keys and values of all cannot be "
            "tapped: use the solver by itself"
        )

    def together(each: list[Array]) -> Array:
        v = jnp.stack(each, axis=1)
        v = jnp.swapaxes(v.reshape(calls, batch, *v.shape[1:]), 0, 1)
        return v.reshape(batch, calls * depth, *v.shape[3:])

    return tuple(map(together, layers))
