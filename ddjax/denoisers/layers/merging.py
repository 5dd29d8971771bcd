"""Sites that stand for others like them in attention, so that fewer attend to fewer."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Sizes = tuple[int, int, int]  # of the pool of important sites, of those that others join, and of all that remain


class Merged(NamedTuple):
    """Which sites remain, and which of these each site is, or has joined."""

    kept: Int[Array, "batch kept"]
    place: Int[Array, "batch sites"]  # in `kept`

    def mean(self, x: Float[Array, "batch sites width"]) -> Float[Array, "batch kept width"]:
        """Of all that a remaining site stands for."""
        share = jax.nn.one_hot(self.place, self.kept.shape[1], dtype=x.dtype)
        return jnp.einsum("bsk,bsw->bkw", share / share.sum(axis=1, keepdims=True), x)

    def spread(self, y: Float[Array, "batch kept width"]) -> Float[Array, "batch sites width"]:
        """What a remaining site has, at all that it stands for."""
        return jnp.take_along_axis(y, self.place[..., None], axis=1)


def check_sizes(sizes: Sizes, sites: int) -> Sizes:
    """As a tuple. Raises ValueError for numbers that cannot be."""
    pool, targets, kept = sizes
    if not 1 <= targets <= kept <= pool <= sites:
        raise ValueError(
            f"merge={tuple(sizes)}: expected (pool, targets, kept) with 1 <= targets <= kept <= pool <= {sites} sites"
        )
    return int(pool), int(targets), int(kept)


def merging(h: Float[Array, "batch sites width"], importance: Float[Array, "batch sites"], sizes: Sizes) -> Merged:
    """Which sites join which: the unimportant ones, and important ones that are like another.

    (Wu et al. 2024, "Importance-based token merging for diffusion models"; bipartite matching as in Bolya & Hoffman
    2023, "Token merging for fast Stable Diffusion".) The `pool` most important sites are a pool; `targets` of them,
    evenly over it by importance, are those that others join. Each other site is matched with the target most like it
    (by the cosine of `h`). Of the rest of the pool the `kept - targets` least like theirs remain by themselves; the
    others, and all outside the pool, join theirs.
    """
    pool, targets, kept = sizes
    sites, at = h.shape[1], jax.vmap(lambda x, i: x[i])
    ranked = jnp.argsort(-importance, axis=1, stable=True)
    into = ranked[:, jnp.arange(targets) * pool // targets]
    h = h.astype(jnp.promote_types(h.dtype, jnp.float32))
    unit = h * jax.lax.rsqrt(jnp.maximum(jnp.sum(h * h, axis=-1, keepdims=True), 1e-12))
    alike = jnp.einsum("bsw,btw->bst", unit, at(unit, into))
    best, match = alike.max(axis=-1), alike.argmax(axis=-1)
    rank = jnp.argsort(ranked, axis=1)
    is_target = (into[:, :, None] == jnp.arange(sites)).any(axis=1)
    # Targets are not candidates to remain by themselves, nor is what lies outside the pool.
    order = jnp.where(is_target | (rank >= pool), jnp.inf, best)
    alone = jnp.argsort(order, axis=1, stable=True)[:, : kept - targets]
    remaining = jnp.concatenate([into, alone], axis=1)
    own = remaining[:, :, None] == jnp.arange(sites)
    return Merged(remaining, jnp.where(own.any(axis=1), own.argmax(axis=1), match))
