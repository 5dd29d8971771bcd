"""Relaxed tokens: softmax(w / tau) of a Gaussian w = a e_x + s eps, and the token argmax(w) that it stands for.

a**2 + s**2 = 1 and lambda = 2 log(a / s) (Sahoo et al. 2025, "The Diffusion Duality"); for large vocabularies only
the largest entries of w are drawn (Deschenaux et al. 2026, "The Diffusion Duality, Chapter II").
Normals have exact upper tails in float32, where the argmax of fifty thousand of them lies.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.scipy.special import log_ndtr, ndtri
from jaxtyping import Array, Float, Int

from ddjax import random
from ddjax.types import Keys, SoftTokens, left_broadcast

Tokens = Int[Array, "batch *sites"]


def softmax_tokens(
    keys: Keys, x0: Tokens, log_snr: Float[Array, " batch"], *, num_symbols: int, tau: float
) -> tuple[Float[Array, "batch *sites symbols"], Tokens]:
    """softmax(w / tau) and argmax(w) at each site, one key per example."""
    a, s = _scales(log_snr, x0)
    z = _normal(keys, (*x0.shape[1:], num_symbols), a.dtype)
    w = a[..., None] * jax.nn.one_hot(x0, num_symbols, dtype=a.dtype) + s[..., None] * z
    return jax.nn.softmax(w / tau), jnp.argmax(w, axis=-1).astype(jnp.int32)


def top_tokens(
    keys: Keys, x0: Tokens, log_snr: Float[Array, " batch"], *, num_symbols: int, tau: float, top: int
) -> tuple[SoftTokens, Tokens]:
    """The `top` largest entries of softmax(w / tau) with their symbols, and argmax(w), without the others.

    The largest of the K - 1 entries that are only noise are drawn in order; which symbols they belong to is a uniform
    draw without replacement. The clean symbol's entry is drawn by itself and shown where it is among the largest. In
    the softmax's denominator the entries never drawn stand by their expected sum, so that the law is exact for
    `top = num_symbols` and that of argmax(w) for any.
    """
    a, s = _scales(log_snr, x0)
    clean_keys, noise_keys, symbol_keys = random.split(keys, 3)
    sites, others = x0.shape[1:], num_symbols - 1
    clean = a + s * _normal(clean_keys, sites, a.dtype)
    z = top_normals(noise_keys, sites, others, min(top, others), a.dtype)
    values, edge = s[..., None] * z, z[..., -1]
    ids = _distinct(symbol_keys, sites, others, values.shape[-1])
    ids = ids + (ids >= x0[..., None])  # of the other symbols
    if top > others:
        values, ids = jnp.append(values, clean[..., None], -1), jnp.append(ids, x0[..., None], -1)
        hidden = jnp.full((*x0.shape, 0), 0.0, a.dtype)
    else:
        last = values[..., -1]
        values = values.at[..., -1].set(jnp.maximum(last, clean))
        ids = ids.at[..., -1].set(jnp.where(clean > last, x0, ids[..., -1]))
        hidden = jnp.minimum(last, clean)[..., None] / tau
        if others > top:
            below = math.log(others - top) + log_mean_exp_below(edge, s / tau)
            hidden = jnp.append(hidden, below[..., None], -1)
    logits = values / tau
    total = jax.nn.logsumexp(jnp.concatenate([logits, hidden], -1), axis=-1, keepdims=True)
    best = jnp.argmax(values, axis=-1)[..., None]
    xt = jnp.take_along_axis(ids, best, -1)[..., 0].astype(jnp.int32)
    return SoftTokens(ids.astype(jnp.int32), jnp.exp(logits - total)), xt


def top_normals(
    keys: Keys, shape: tuple[int, ...], count: int, top: int, dtype=jnp.float32
) -> Float[Array, "batch *shape top"]:
    """The `top` largest of `count` standard normals, decreasing; `shape` is that of one example.

    log Phi of the largest is -E_1 / count, and each next one is lower by E_j / (count - j + 1), with E exponential
    (Renyi 1953): sums of small numbers, which float32 holds where a uniform near 1 would be rounded.
    """
    gaps = _exponential(keys, (*shape, top), dtype) / (count - jnp.arange(top, dtype=dtype))
    log_cdf = -jnp.cumsum(gaps, axis=-1)
    above = log_cdf > -math.log(2.0)
    tail = jnp.where(above, -jnp.expm1(log_cdf), jnp.exp(log_cdf))
    return jnp.where(above, -1.0, 1.0) * ndtri(tail)


def log_mean_exp_below(edge: Array, scale: Array) -> Array:
    """Log E[exp(scale Z) | Z < edge] for a standard normal Z.

    It is scale edge + log(phi(edge) / Phi(edge)) + log M(scale - edge) with Mills' ratio M(y) = Phi(-y) / phi(y), which
    subtracts no large squares.
    """
    half_log = 0.5 * math.log(2.0 * math.pi)
    y = scale - edge
    far = y > 4.0
    near_y, far_y = jnp.where(far, 0.0, y), jnp.where(far, y, 4.0)
    fraction = far_y
    for i in range(40, 0, -1):  # Laplace's continued fraction
        fraction = far_y + i / fraction
    log_mills = jnp.where(far, -jnp.log(fraction), log_ndtr(-near_y) + 0.5 * near_y**2 + half_log)
    return scale * edge - 0.5 * edge**2 - half_log - log_ndtr(edge) + log_mills


def _scales(log_snr: Array, x0: Tokens) -> tuple[Array, Array]:
    """A and s at each site."""
    log_snr = jnp.broadcast_to(left_broadcast(jnp.asarray(log_snr), x0), x0.shape)
    return jnp.sqrt(jax.nn.sigmoid(log_snr)), jnp.sqrt(jax.nn.sigmoid(-log_snr))


def _exponential(keys: Keys, shape: tuple[int, ...], dtype) -> Array:
    """Exponentials whose small values, as of the largest normals, are not on a grid."""
    return jnp.exp(-jax.vmap(lambda key: jax.random.gumbel(key, shape, dtype, mode="high"))(keys))


def _normal(keys: Keys, shape: tuple[int, ...], dtype) -> Array:
    """Standard normals with an exact upper tail."""
    return -ndtri(-jnp.expm1(-_exponential(keys, shape, dtype)))


def _distinct(keys: Keys, shape: tuple[int, ...], count: int, chosen: int) -> Int[Array, "batch *shape chosen"]:
    """`chosen` of `count` numbers without replacement, in uniformly random order (Floyd's algorithm, shuffled).

    Floyd's own order is not random: a late number can only come late, and the first goes to the largest entry.
    """
    last = jnp.arange(count - chosen, count)
    draw_keys, order_keys = random.split(keys)
    draws = jax.vmap(lambda key: jax.random.randint(key, (*shape, chosen), 0, last + 1))(draw_keys)

    def choose(i, ids):
        taken = (ids == draws[..., i, None]).any(-1)
        return ids.at[..., i].set(jnp.where(taken, last[i], draws[..., i]))

    ids = jax.lax.fori_loop(0, chosen, choose, jnp.full_like(draws, -1))
    order = jax.vmap(lambda key: jax.random.bits(key, (*shape, chosen)))(order_keys)
    return jnp.take_along_axis(ids, jnp.argsort(order, axis=-1), -1)
