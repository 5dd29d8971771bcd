"""The one place where ddjax draws tokens and coins, exact in float32.

JAX's default uniforms have 23 random bits, so a Gumbel race cannot win by more than 15.94 nats and an event of
probability below 2**-23 is never, or too often, drawn. Over a thousand steps and fifty thousand symbols
this visibly lowers the entropy of samples (docs/departures.md). Both draws here use the `high` mode, whose
tails are right.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ddjax import random
from ddjax.frozen import Frozen
from ddjax.types import Keys

# With more symbols than this, a part of them is drawn first: random numbers cost more than exponentials.
MANY = 512


def categorical(keys: Keys, logits: Float[Array, "batch *sites symbols"]) -> Int[Array, batch * sites]:
    """Draw one symbol per site from unnormalised log-probabilities (`-inf` is never drawn). int32."""
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    draw = _race if logits.shape[-1] <= MANY else _race_in_parts
    return jax.vmap(draw)(keys, logits.astype(dtype)).astype(jnp.int32)


def categorical_where(
    keys: Keys, logits: Float[Array, "batch *sites symbols"], where: Bool[Array, batch * sites]
) -> Int[Array, batch * sites]:
    """As `categorical` where asked, and 0 elsewhere, at little cost there. int32.

    Each site draws with a key of its own, so that a draw depends neither on other sites nor on other examples. The
    sites asked for are gathered, a quarter, a sixteenth or a 64th of all where so few are enough; with few symbols only
    on a CPU, as elsewhere all of them are drawn before those asked for are found.
    """
    batch, sites, symbols = where.shape[0], math.prod(where.shape[1:]), logits.shape[-1]
    race = _race if symbols <= MANY else _race_in_parts
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    flat, asked = logits.reshape(batch, sites, symbols), where.reshape(batch, sites)

    def draw(keys: Keys, rows: Array, index: Array) -> Array:
        """Of some sites of each example, whose logits are `rows` and whose numbers are `index`."""

        def one(key: Array, row: Array, i: Array) -> Array:
            return race(jax.random.fold_in(key, i), row.astype(dtype)).astype(jnp.int32)

        return jax.vmap(jax.vmap(one, in_axes=(None, 0, 0)))(keys, rows, index)

    def all_of_them() -> Array:
        return draw(keys, flat, jnp.broadcast_to(jnp.arange(sites), (batch, sites)))

    def some(size: int) -> Array:
        order = jnp.argsort(~asked, axis=1, stable=True)[:, :size]  # those asked for first
        drawn = draw(keys, jnp.take_along_axis(flat, order[..., None], axis=1), order)
        return jax.vmap(lambda i, v: jnp.zeros(sites, jnp.int32).at[i].set(v))(order, drawn)

    def gathered() -> Array:
        sizes = sorted({-(-sites // part) for part in (64, 16, 4)} - {sites})
        enough = jnp.searchsorted(jnp.asarray([*sizes, sites]), asked.sum(axis=1).max())
        return jax.lax.switch(enough, [*(functools.partial(some, size) for size in sizes), all_of_them])

    drawn = gathered() if symbols > MANY else jax.lax.platform_dependent(cpu=gathered, default=all_of_them)
    return jnp.where(where, drawn.reshape(where.shape), 0)


def _race(key: Array, logits: Array) -> Array:
    return jax.random.categorical(key, logits, axis=-1, mode="high")


def _race_in_parts(key: Array, logits: Array) -> Array:
    """A part of the symbols by its total, then a symbol of the part: 2 sqrt(n) random numbers in the place of n."""
    symbols = logits.shape[-1]
    size = math.isqrt(symbols - 1) + 1
    part_key, symbol_key = jax.random.split(key)
    full = -(-symbols // size) * size - symbols
    padded = jnp.pad(logits, [(0, 0)] * (logits.ndim - 1) + [(0, full)], constant_values=-jnp.inf)
    parts = padded.reshape(*logits.shape[:-1], -1, size)
    part = _race(part_key, jax.nn.logsumexp(parts, axis=-1))[..., None]
    within = jnp.take_along_axis(parts, part[..., None], axis=-2)[..., 0, :]
    return (part * size)[..., 0] + _race(symbol_key, within)


def gumbel(keys: Keys, shape: tuple[int, ...], dtype=jnp.float32) -> Float[Array, batch * shape]:
    """Gumbel noise, of which `categorical` adds some to its logits; `shape` is that of one example."""
    return jax.vmap(lambda k: jax.random.gumbel(k, shape, dtype, mode="high"))(keys)


def bernoulli(keys: Keys, p: Float[Array, batch * sites]) -> Bool[Array, batch * sites]:
    """Toss one coin per site, true with probability `p`."""
    return jax.vmap(lambda k, row: jax.random.bernoulli(k, row, mode="high"))(keys, p)


def poisson(keys: Keys, mean: Float[Array, batch * sites]) -> Int[Array, batch * sites]:
    """Poisson numbers, exact for rare events too (as two coins: a third event has a chance below 2e-10). int32."""
    any_keys, again_keys, many_keys = random.split(keys, 3)
    few, many = jnp.minimum(mean, 1e-3), jnp.maximum(mean, 1e-3)
    some = -jnp.expm1(-few)
    # P(n > 1) / P(n > 0), by its series: the quotient would be 0 / 0.
    again = few * (1.0 / 2.0 - few / 12.0)
    rare = bernoulli(any_keys, some) * (1 + bernoulli(again_keys, again))
    common = jax.vmap(lambda k, row: jax.random.poisson(k, row, dtype=jnp.int32))(many_keys, many)
    return jnp.where(mean < 1e-3, rare, common).astype(jnp.int32)


def uniform_symbols(keys: Keys, shape: tuple[int, ...], num_symbols: int) -> Int[Array, batch * shape]:
    """Draw symbols uniformly from `[0, num_symbols)`; `shape` is that of one example. int32."""
    return jax.vmap(lambda k: jax.random.randint(k, shape, 0, num_symbols, jnp.int32))(keys)


class AliasTable(NamedTuple):
    """A law over n symbols as n fair choices between two: `symbol`, kept with probability `keep`, or `alias`."""

    keep: Float[np.ndarray, " symbols"]
    alias: Int[np.ndarray, " symbols"]


@functools.lru_cache(maxsize=16)
def alias_table(probabilities: Frozen) -> AliasTable:
    """Vose's alias table of a law `(symbols,)`, in float64 (Vose 1991, IEEE Trans. Softw. Eng. 17)."""
    scaled = probabilities.values * len(probabilities.values)
    keep, alias = np.ones_like(scaled), np.arange(len(scaled), dtype=np.int32)
    small, large = list(np.flatnonzero(scaled < 1)), list(np.flatnonzero(scaled >= 1))
    scaled = scaled.copy()
    while small and large:
        poor, rich = small.pop(), large[-1]
        keep[poor], alias[poor] = scaled[poor], rich
        scaled[rich] -= 1.0 - scaled[poor]
        if scaled[rich] < 1:
            small.append(large.pop())
    # What is left of either list is 1 up to rounding; but a symbol that cannot occur must never be kept.
    return AliasTable(np.where(probabilities.values > 0, keep, 0.0), alias)


def alias_draw(keys: Keys, table: AliasTable, shape: tuple[int, ...]) -> Int[Array, batch * shape]:
    """Draw symbols from a fixed law in constant time and memory per site; `shape` is that of one example. int32."""
    which_keys, coin_keys = random.split(keys)
    which = uniform_symbols(which_keys, shape, len(table.alias))
    kept = bernoulli(coin_keys, jnp.asarray(table.keep, float)[which])
    return jnp.where(kept, which, jnp.asarray(table.alias)[which])


def log_or_floor(p: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Log p, with -1e30 for 0: finite, so that `0 * log 0` is 0 and gradients stay finite."""
    positive = p > 0
    return jnp.where(positive, jnp.log(jnp.where(positive, p, 1.0)), -1e30)
