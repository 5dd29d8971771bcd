"""Embeddings: times, labels, tokens, positions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ddjax import random
from ddjax.denoisers.given import Given
from ddjax.denoisers.layers.basic import Linear
from ddjax.types import Keys, SoftTokens

# t in [0, 1] becomes the step number of a 1000-step diffusion, which the frequencies were made for.
TIME_SCALE = 1000.0
TIME_FEATURES = 256


def time_embedding(
    t: Float[Array, "*batch"], features: int = TIME_FEATURES, *, closed: bool = False
) -> Float[Array, "*batch features"]:
    """Cosines and sines of `1000 t` at geometric frequencies from 1 to 1e-4, float32.

    As in Peebles & Xie 2023 (DiT), after Vaswani et al. 2017. `t` in [0, 1]; `features` even.
    closed: whether 1e-4 is the last frequency (Ho et al. 2020; diffusers' DiT) or would be the next.
    """
    half = features // 2
    frequencies = jnp.exp(-jnp.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / (half - closed))
    angles = TIME_SCALE * t.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def lookup(table: Float[Array, "rows features"], ids: Int[Array, "*batch"]) -> Float[Array, "*batch features"]:
    """Rows of a table; an id beyond it gives NaN, where JAX's clamping would silently give the last row."""
    return jnp.take(table, ids, axis=0, mode="fill", fill_value=jnp.nan)


def sincos(grid: Sequence[int], features: int) -> np.ndarray:
    """Sines and cosines of the place along each axis of a grid, `(places, features)`, an equal share of them each."""

    def axis(positions: np.ndarray, size: int) -> np.ndarray:
        half = (size + 1) // 2
        angles = positions[:, None] * 10000.0 ** (-np.arange(half) / half)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)[:, :size]

    places = np.unravel_index(np.arange(math.prod(grid)), tuple(grid))
    shares = np.diff([i * features // len(grid) for i in range(len(grid) + 1)])
    return np.concatenate([axis(*pair) for pair in zip(places, shares, strict=True)], axis=-1).astype(np.float32)


def sincos_2d(height: int, width: int, features: int) -> np.ndarray:
    """`sincos` of rows and columns, `(height * width, features)`."""
    return sincos((height, width), features)


class TokenEmbed(nnx.Module):
    """Tokens to vectors, one table for each of `channels` (an image's channels are different variables).

    Table entries are normal with standard deviation `1 / sqrt(features)`: unit-norm rows.
    """

    def __init__(self, symbols: int, features: int, *, channels: int = 1, rngs: nnx.Rngs):
        scale = features**-0.5
        self.table = nnx.Param(scale * jax.random.normal(rngs.params(), (channels * symbols, features), jnp.float32))
        self.symbols = symbols
        self.channels = channels

    def __call__(
        self, tokens: Int[Array, "*batch channels"] | Float[Array, "*batch channels symbols"] | SoftTokens
    ) -> Float[Array, "*batch channels features"]:
        """Embed tokens, or soft ones by their expectation: probabilities over the symbols, or a few of them.

        A token outside `[0, symbols)` gives NaN.
        """
        offsets = self.symbols * jnp.arange(self.channels, dtype=jnp.int32)
        if isinstance(tokens, SoftTokens):
            rows = self._rows(tokens.ids, offsets[:, None])
            return jnp.einsum("...k,...kf->...f", tokens.weights.astype(rows.dtype), rows)
        if jnp.issubdtype(tokens.dtype, jnp.floating):
            tables = self.table[...].reshape(self.channels, self.symbols, -1)
            return jnp.einsum("...ck,ckf->...cf", tokens.astype(tables.dtype), tables)
        return self._rows(tokens, offsets)

    def _rows(self, ids: Array, offsets: Array) -> Array:
        ids = ids.astype(jnp.int32)  # uint8 pixels would overflow below
        beyond = self.channels * self.symbols
        # Outside its own table a token would read the next channel's: send it beyond all of them.
        return lookup(self.table[...], jnp.where((ids >= 0) & (ids < self.symbols), ids + offsets, beyond))


class TokenBits(TokenEmbed):
    """Tokens as their bits, 1 and -1, without a table to learn (Weber et al. 2024, "MaskBit").

    Those from 2**bits on, such as the mask, are zeros. A token of many bits may be several of few: a channel for each
    group of bits, which are then masked and predicted by themselves.
    """

    def __init__(self, symbols: int, bits: int, *, channels: int = 1):
        self.symbols, self.bits, self.channels = symbols, bits, channels

    @property
    def table(self) -> Float[Array, "rows bits"]:
        """The bits of each token, the lowest first."""
        ids = np.arange(self.symbols)[:, None]
        signs = np.where(ids < 2**self.bits, 2 * (ids >> np.arange(self.bits) & 1) - 1, 0)
        return jnp.tile(jnp.asarray(signs, jnp.float32), (self.channels, 1))


class Conditioner(nnx.Module):
    """Time and label to one conditioning vector, `silu(time_mlp(t) + label_table[label])`, in float32.

    The label table has `num_classes + 1` rows, the last the null label (Ho & Salimans 2022). An untimed,
    unlabelled network keeps the null row alone: a learned constant. It runs in float32 whatever the network's
    compute dtype, since it costs nothing and bfloat16 would round nearby times to the same features.

    latent: numbers of a latent that comes along, `cond = {"z": (batch, latent), "cond": label}`, and is added too.
    closed: of the time's frequencies (`time_embedding`).
    vector: numbers of a vector that is a condition, `cond = {"vector": (batch, vector), "cond": label}`, zeros: none.
    silu: whether the sum has passed through silu.
    each: silu(time_mlp(t)) + silu(label_table[label]) in its place (UDLM, Schiff et al. 2024).
    label_noise: in training the label's row gets N(0, label_noise^2 / width) (condition embedding perturbation, Chen et
        al. 2024, "Slight corruption in pre-training data makes better diffusion models").
    """

    def __init__(
        self,
        width: int,
        *,
        num_classes: int,
        time: bool,
        latent: int = 0,
        vector: int = 0,
        label_noise: float = 0.0,
        closed: bool = False,
        silu: bool = True,
        each: bool = False,
        rngs: nnx.Rngs,
    ):
        if not label_noise >= 0 or (label_noise and not num_classes):
            raise ValueError(f"label_noise={label_noise}, num_classes={num_classes}: expected 0 or more, for labels")
        if num_classes < 0:
            raise ValueError(f"num_classes={num_classes}: expected 0 (no labels) or more")
        self.time = time
        self.num_classes = num_classes
        self.time_in = Linear(TIME_FEATURES, width, kernel_init=_normal, rngs=rngs) if time else None
        self.time_out = Linear(width, width, kernel_init=_normal, rngs=rngs) if time else None
        labelled = num_classes > 0 or not time
        self.labels = nnx.Param(_normal(rngs.params(), (num_classes + 1, width), jnp.float32)) if labelled else None
        self.latent = Linear(latent, width, kernel_init=_normal, rngs=rngs) if latent else None
        self.vector = Linear(vector, width, kernel_init=_normal, rngs=rngs) if vector else None
        self.label_noise, self.closed, self.silu, self.each = label_noise, closed, silu, each

    def __call__(
        self,
        batch: int,
        t: Array | None,
        cond: Array | Mapping[str, Array | None] | Given | None,
        sites: int | None = None,
        keys: Keys | None = None,
    ) -> Float[Array, "batch *sites width"]:
        """The vector of each example. `t` is `()` or `(batch,)`; `cond` int `(batch,)`, None (null), or `Given`'s dict.

        sites: where given, `t` may also be `(batch, sites)`, and there is then a vector for each site.
        keys: of the noise on labels, one per example; None for none.
        """
        given = Given.of(cond)
        given.check_taken(*("z",) * (self.latent is not None), *("vector",) * (self.vector is not None))
        total, part = jnp.zeros((), jnp.float32), jax.nn.silu if self.each else lambda v: v
        if self.time:
            features = time_embedding(check_time(t, batch, sites), closed=self.closed)
            total = part(self.time_out(jax.nn.silu(self.time_in(features))))
        labels = check_labels(given.cond, self.num_classes, batch)
        told = []
        if self.labels is not None:
            row = lookup(self.labels[...], labels)
            if keys is not None and self.label_noise:
                row = row + self.label_noise * row.shape[-1] ** -0.5 * random.normal(keys, row.shape[1:])
            told.append(row)
        if self.latent is not None:
            told.append(self.latent(_check_latent(given.z, batch, self.latent.kernel.shape[0])))
        if self.vector is not None:
            told.append(self.vector(check_vector(given.vector, batch, self.vector.kernel.shape[0])))
        for v in told:
            total = total + part(v[:, None] if total.ndim == 3 else v)
        return jax.nn.silu(total) if self.silu and not self.each else total


def _normal(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    return 0.02 * jax.random.normal(key, shape, dtype)


def check_time(t: Array | None, batch: int, sites: int | None) -> Array:
    """One time per example, or per site. Raises ValueError."""
    if t is None:
        raise ValueError(
            f"t is None but the network takes the time: pass shape ({batch},), or build it with time=False"
        )
    t = jnp.asarray(t)
    if sites is not None and t.shape == (batch, sites):
        return t
    if t.ndim > 1:
        each = "is not supported by this network yet" if sites is None else f"has shape {(batch, sites)}"
        raise ValueError(f"t has shape {t.shape}: a time of its own for each site {each}; expected ({batch},) or ()")
    if t.shape not in ((), (batch,)):
        raise ValueError(f"t has shape {t.shape}; expected ({batch},), one time per example, or ()")
    return jnp.broadcast_to(t, (batch,))


def _check_latent(z: Array | None, batch: int, numbers: int) -> Float[Array, "batch latent"]:
    if z is None or z.shape != (batch, numbers):
        raise ValueError(
            f'the network knows a latent: expected cond={{"z": ({batch}, {numbers}), "cond": labels or None}}'
        )
    return z


def check_vector(vector: Array | None, batch: int, numbers: int) -> Float[Array, "batch vector"]:
    """A vector that is a condition, zeros where there is none. Raises ValueError for another shape."""
    if vector is None:
        return jnp.zeros((batch, numbers), jnp.float32)
    if vector.shape != (batch, numbers):
        raise ValueError(f'cond["vector"] has shape {vector.shape}; expected ({batch}, {numbers})')
    return vector


def check_labels(cond: Array | None, num_classes: int, batch: int) -> Int[Array, " batch"]:
    """Labels, the null one where there are none. Raises ValueError."""
    if cond is None:
        return jnp.full((batch,), num_classes, jnp.int32)
    if num_classes == 0:
        raise ValueError(
            "cond was given but the network has no labels: build it with num_classes > 0, or pass cond=None"
        )
    if not hasattr(cond, "shape") or not jnp.issubdtype(cond.dtype, jnp.integer) or cond.shape != (batch,):
        found = f"shape {cond.shape}, {cond.dtype}" if hasattr(cond, "shape") else type(cond).__name__
        raise ValueError(
            f"cond ({found}): expected int labels of shape ({batch},) in [0, {num_classes}], the last "
            "being the null label"
        )
    return cond
