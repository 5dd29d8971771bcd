"""Codebooks of normals that an integer makes: what `ddjax.codebooks` writes samples down with (DDCM)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ddjax.types import Keys, State

Score = Callable[[Array], Array]  # vectors (entries, 1 or batch, *shape) to (entries, batch)


@dataclasses.dataclass(frozen=True)
class Codebook:
    """For each draw of a sampler `size` vectors of normals, of which it takes one: a source of noise (`solvers.noise`).

    (Ohayon et al. 2025, "Compressed image generation with denoising diffusion codebook models".) As
    `noise=` of a solver the entry is any, with equal chances, by the example's key; over the draw of the codebook, that
    is the law of fresh normals. All examples share the codebook.

    seed: makes it, with the state's shape and dtype; no vector is kept. size: K, of each codebook.
    atoms: M, how many entries a draw may join (the paper's finer codes, by matching pursuit): to the sum z so far the
        next joins as (sqrt(w) z + sqrt(1 - w) entry) / root mean square. levels: w is one of j / levels, 0 < j <
        levels; or the sum stays as it is, which makes `levels` choices.
    chunk: how many entries are made and scored at a time.
    Raises ValueError for numbers out of range.
    """

    seed: int
    size: int
    atoms: int = 1
    levels: int = 2
    chunk: int = 128

    def __post_init__(self):
        for name, least in (("seed", 0), ("size", 1), ("atoms", 1), ("levels", 2), ("chunk", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"Codebook's {name} must be at least {least}, got {getattr(self, name)}")

    @property
    def bits(self) -> float:
        """Of one draw: M log2 K + (M - 1) log2 levels."""
        return self.atoms * math.log2(self.size) + (self.atoms - 1) * math.log2(self.levels)

    # -- a source of noise ------------------------------------------------------------------------------------

    def init(self, x: State) -> Array:
        """The number of the next draw; 0 is that of the first state."""
        return jnp.ones((), jnp.int32)

    def draw(self, state: Array, keys: Keys, x: State, t: Any, s: Any) -> tuple[State, Array]:
        """Any entry of the next codebook."""
        return self.entries(state, self.any(keys), x.shape[1:], x.dtype), state + 1

    def any(self, keys: Keys) -> Int[Array, " batch"]:
        """A number of an entry for each example, all with equal chances."""
        return jax.vmap(lambda key: jax.random.randint(key, (), 0, self.size))(keys)

    # -- vectors ----------------------------------------------------------------------------------------------

    def entries(self, draw: Array | int, numbers: Int[Array, " n"], shape: Sequence[int], dtype: Any) -> Array:
        """The entries of these numbers of the draw's codebook, `(n, *shape)`."""
        key = jax.random.fold_in(jax.random.key(self.seed), draw)
        return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(key, k), tuple(shape), dtype))(numbers)

    def vector(self, draw: Array | int, indices: Array, weights: Array, shape: Sequence[int], dtype: Any) -> State:
        """What a draw's code says, `(batch, *shape)`: indices `(batch, atoms)`, weights `(batch, atoms - 1)`."""

        def join(z, m):
            entry = self.entries(draw, indices[:, m], shape, dtype)
            level = weights[:, m - 1].reshape(-1, *[1] * len(shape)) if self.atoms > 1 else 0
            return jnp.where(m == 0, entry, jnp.where(level > 0, self._joined(z, entry, level), z)), None

        none = jnp.zeros((indices.shape[0], *shape), dtype)
        return join(none, 0)[0] if self.atoms == 1 else jax.lax.scan(join, none, jnp.arange(self.atoms))[0]

    def _joined(self, z: Array, entry: Array, level: Array) -> Array:
        """A sum and another entry; one leading axis, or two where there are several entries."""
        w = jnp.asarray(level, z.dtype) / self.levels
        new = jnp.sqrt(w) * z + jnp.sqrt(1.0 - w) * entry
        sites = tuple(range(jnp.ndim(new) - (jnp.ndim(z) - 1), jnp.ndim(new)))
        mean = jnp.mean(new**2, axis=sites, keepdims=True) if sites else new**2
        return new / jnp.sqrt(jnp.where(mean > 0, mean, 1.0))

    # -- the choice -------------------------------------------------------------------------------------------

    def best(
        self, draw: Array | int, score: Score, batch: int, shape: Sequence[int], dtype: Any
    ) -> tuple[Int[Array, "batch atoms"], Int[Array, "batch atoms-1"]]:
        """The code of the highest score, found atom by atom: indices and weights.

        score: of vectors `(entries, batch or 1, *shape)`, `(entries, batch)`. Of equal ones the first. An atom that
        does not raise the score does not join.
        """
        some = min(self.chunk, self.size)
        numbers = jnp.arange(math.ceil(self.size / some) * some).reshape(-1, some)

        def search(z: State | None, least: Array) -> tuple[Array, Array, Array]:
            """The best next atom, if its score is above the least: (score, number, level)."""
            levels = jnp.zeros(1, jnp.int32) if z is None else jnp.arange(1, self.levels)

            def chunk(best, k):
                entries = self.entries(draw, k, shape, dtype)[:, None]

                def at(level):
                    found = score(entries if z is None else self._joined(z, entries, level))
                    return jnp.where((k < self.size)[:, None], found, -jnp.inf)

                scores = jax.lax.map(at, levels)  # (levels, chunk, batch)
                flat = scores.reshape(-1, batch)
                place = jnp.argmax(flat, axis=0)
                value = jnp.take_along_axis(flat, place[None], axis=0)[0]
                new = value, k[place % some], levels[place // some]
                better = value > best[0]
                return tuple(jnp.where(better, a, b) for a, b in zip(new, best, strict=True)), None

            nothing = jnp.zeros(batch, numbers.dtype), jnp.zeros(batch, levels.dtype)
            return jax.lax.scan(chunk, (least, *nothing), numbers)[0]

        kind = jax.eval_shape(score, jax.ShapeDtypeStruct((1, 1, *shape), dtype)).dtype
        value, first, _ = search(None, jnp.full(batch, -jnp.inf, kind))
        if self.atoms == 1:
            return first[:, None].astype(jnp.int32), jnp.zeros((batch, 0), jnp.int32)

        def pursue(state, _):
            value, z = state
            value, index, level = search(z, value)
            wide = level.reshape(-1, *[1] * len(shape))
            entry = self.entries(draw, index, shape, dtype)
            return (value, jnp.where(wide > 0, self._joined(z, entry, wide), z)), (index, level)

        z = self.entries(draw, first, shape, dtype)
        _, (indices, weights) = jax.lax.scan(pursue, (value, z), None, length=self.atoms - 1)
        indices = jnp.concatenate([first[None], indices])
        return indices.T.astype(jnp.int32), weights.T.astype(jnp.int32)
