"""Multi-head attention, who attends to whom, and rotary positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ddjax.denoisers.layers.basic import DType, Linear, at_least_float32, per_site
from ddjax.denoisers.layers.generated import with_weights
from ddjax.placement import constrain
from ddjax.taps import Below
from ddjax.types import Past

IMPLEMENTATIONS = (None, "xla", "cudnn")
WEIGHTS = "/attention/weights"  # the tap


class Layout(NamedTuple):
    """Where the sites that a network sees stand, and which of them each attends to."""

    positions: Int[Array, "*batch sites"]
    # (queries, keys), or (batch or 1, heads, queries, keys); no query without a key. None: all see all.
    mask: Bool[Array, "*batch sites keys"] | None
    past: Past | None = None  # keys and values of sites that the network does not see now: keys before its own
    keys: Int[np.ndarray, " some"] | None = None  # only these sites are seen, by all; None: all are
    # Each site's own few keys: mask is then of these, `(sites, few)`.
    neighbours: Int[np.ndarray, "sites few"] | None = None

    def layer(self, i: int | Array) -> Layout:
        """With the past of one layer, `(batch, length, heads, head)` each."""
        return self if self.past is None else self._replace(past=tuple(v[:, i] for v in self.past))

    def at(self, sites: Int[Array, "batch some"], past: Past) -> Layout:
        """At some sites only, which attend to whom they did; the others have the keys and values of the past.

        A site that is run again shows its new keys, not those of the past; one beyond the sequence shows none.
        """
        length, mask = self.mask.shape[-1], self.mask
        mask = mask[0] if mask.ndim == 4 and len(mask) == 1 else mask
        shared = mask.ndim == 2 or self.mask.shape[0] == 1  # by all examples: nothing is copied for each
        rows = jax.vmap(lambda m, s: jnp.take(m, s, axis=-2, mode="clip"), (None if shared else 0, 0))(mask, sites)
        new = jax.vmap(lambda r, s: jnp.take(r, s, axis=-1, mode="clip") & (s < length))(rows, sites)
        again = (sites[:, :, None] == jnp.arange(length)).any(axis=1)
        rows = rows & ~again.reshape(-1, *(1,) * (rows.ndim - 2), length)
        both = jnp.concatenate([rows, new], axis=-1)
        return Layout(sites, both if both.ndim == 4 else both[:, None], past)

    def among(self, sites: Int[Array, "batch some"]) -> Layout:
        """At some sites only, each of which attends to whom it did among them."""
        if self.past is not None or self.keys is not None or self.neighbours is not None:
            raise ValueError("routed sites attend to whoever is there: without a past, without neighbours of their own")
        mask = self.mask
        if mask is not None:
            mask = mask[0] if mask.ndim == 4 and len(mask) == 1 else mask
            shared = None if mask.ndim == 2 or self.mask.shape[0] == 1 else 0
            cut = lambda m, s: jnp.take(jnp.take(m, s, axis=-2), s, axis=-1)  # noqa: E731
            mask = jax.vmap(cut, (shared, 0))(mask, sites)
        own = jnp.broadcast_to(self.positions, (sites.shape[0], self.positions.shape[-1]))
        return Layout(jnp.take_along_axis(own, sites, axis=1), mask)

    def seeing(self, keys: Int[np.ndarray, " some"]) -> Layout:
        """As before, but sites attend to these only."""
        return self._replace(keys=keys, mask=None if self.mask is None else self.mask[..., keys])


def everywhere(length: int) -> Layout:
    """Sites attend to all sites."""
    return Layout(jnp.arange(length), jnp.ones((length, length), bool))


def group_causal(groups: Int[Array, "*batch length"]) -> Layout:
    """Sites attend to those of their own group and of groups with lower numbers."""
    return Layout(jnp.arange(groups.shape[-1]), groups[..., :, None] >= groups[..., None, :])


def group_teacher_forced(groups: Int[Array, "*batch length"]) -> Layout:
    """A noisy sequence and then the clean one, so that every group is seen at once behind a clean past.

    (Arriola et al. 2025, section 3.2, for blocks; Zhang et al. 2025, "Locality-aware parallel decoding", for any
    groups.) A noisy site attends to its own group of the noisy sequence and to the groups before it of the clean one; a
    clean site to its own group of the clean one and those before it.
    """
    length = groups.shape[-1]
    own, noisy = jnp.concatenate([groups, groups], axis=-1), jnp.arange(2 * length) < length
    same, before = own[..., :, None] == own[..., None, :], own[..., :, None] > own[..., None, :]
    mask = jnp.where(noisy, noisy[:, None] & same, before | (~noisy[:, None] & same))
    return Layout(jnp.arange(2 * length) % length, mask)


def within(segments: Int[Array, "batch sites"], layout: Layout | None = None) -> Layout:
    """The layout (None: every site sees every site) of a window that holds several documents, one after the other.

    Sites attend within their own document only, and positions count from its start. Of a layout that shows the window
    twice, a site sees its document in both.

    segments: the same number at the sites of one document, another than its neighbours'.
    """
    site = jnp.arange(segments.shape[1])
    begins = jnp.diff(segments, axis=1, prepend=segments[:, :1] - 1) != 0
    positions = site - jax.lax.cummax(jnp.where(begins, site, 0), axis=1)
    same = segments[:, :, None] == segments[:, None]
    if layout is None:
        return Layout(positions, same)
    times = layout.mask.shape[-1] // len(site)
    return layout._replace(
        positions=jnp.tile(positions, (1, times)), mask=layout.mask & jnp.tile(same, (1, times, times))
    )


def among_related(relations: Sequence[Sequence[int]], heads: int) -> Layout:
    """Each head attends within the groups of one relation between sites, in turn: a sparse graph of the user's.

    (Weilbach et al. 2023, graphically structured diffusion: what depends on what in the data is known beforehand.)
    relations: for each a label of every site; sites with the same label are related.
    """
    labels = jnp.asarray(relations)[jnp.arange(heads) % len(relations)]
    return Layout(jnp.arange(labels.shape[1]), (labels[:, :, None] == labels[:, None])[None])


def rope(
    x: Float[Array, "batch sites heads head"],
    positions: Int[Array, "*batch sites"] | None = None,
    base: float = 1e4,
) -> Float[Array, "batch sites heads head"]:
    """Rotate the features of site n by angles `n base^(-2i/head)`: scores then depend on `n - m` only.

    Su et al. 2021, in the half-split layout: feature i is paired with feature `i + head / 2` (in the
    interleaved layout with its neighbour; weights do not carry over). Rotated in at least float32; the dtype is kept.

    positions: n for each site; default 0, 1, ...
    """
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    positions = jnp.arange(x.shape[1]) if positions is None else positions
    angles = positions.astype(jnp.float32)[..., None, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(at_least_float32(x.dtype)), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


def rope_2d(
    x: Float[Array, "batch sites heads head"],
    rows: Int[Array, "*batch sites"],
    columns: Int[Array, "*batch sites"],
    base: float = 1e4,
) -> Float[Array, "batch sites heads head"]:
    """`rope` by the row in the first half of a head's features, by the column in the other.

    Scores then depend on the two differences only (Heo et al. 2024, "Rotary Position Embedding for Vision Transformer",
    axial frequencies; Inf-DiT's).

    rows, columns: of each site. Raises ValueError where a head's features do not divide by four.
    """
    if x.shape[-1] % 4:
        raise ValueError(f"rope_2d pairs the features of each half: expected a multiple of 4, not {x.shape[-1]}")
    by_row, by_column = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([rope(by_row, rows, base), rope(by_column, columns, base)], axis=-1)


def dot_product_attention(
    q: Float[Array, "batch sites heads head"],
    k: Float[Array, "batch keys groups head"],
    v: Float[Array, "batch keys groups head"],
    implementation: str | None = None,
    mask: Bool[Array, "*batch sites keys"] | None = None,
    weights: Callable[[Array], Array] | None = None,
    bias: Float[Array, "*batch heads sites keys"] | None = None,
) -> Float[Array, "batch sites heads head"]:
    """`softmax(q k' / sqrt(head) + bias) v`, scores and softmax in float32 (on a CPU, of float64 in float64).

    k, v: of as many heads, or of fewer, each then for as many neighbouring heads of q (grouped, Ainslie et al. 2023).
    mask: `(queries, keys)`, one for each example, or `(1, heads, queries, keys)`, true where a query attends; every
        query needs a key. None: everywhere, at no cost.
    weights: what is done to the weights of the sum, `(batch, heads, sites, keys)`, which are then written down whatever
        the implementation; None: nothing.
    bias: of the scores, one for all examples or each. None: 0, at no cost.

    implementation: `"xla"` and `"cudnn"` are `jax.nn.dot_product_attention`'s. None is two batched
    products on a CPU, where they are faster (the same arithmetic), and `"xla"` elsewhere. `"cudnn"` never falls back.
    Raises ValueError where `"cudnn"` cannot run: no GPU, a dtype other than bfloat16 or float16, or a head
    size that is not a multiple of 8 up to 128.
    """
    check_implementation(implementation, q.dtype, q.shape[-1])
    if implementation == "cudnn" and jax.default_backend() != "gpu":
        raise ValueError(
            f"attention='cudnn' needs a GPU and the default backend is {jax.default_backend()!r}; use attention=None"
        )
    if mask is not None and mask.ndim < 4:
        mask = mask.reshape(-1, 1, *mask.shape[-2:])
    bias = bias[None] if bias is not None and bias.ndim == 3 else bias
    by_hand = implementation is None and jax.default_backend() == "cpu"
    if not by_hand and weights is None:
        return jax.nn.dot_product_attention(q, k, v, bias, mask, implementation=implementation or "xla")
    # Heads first by hand: XLA's CPU backend then runs plain batched products, faster than one einsum.
    k, v = (_for_each_head(x, q.shape[2]) for x in (k, v))
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    sums, scale = at_least_float32(q.dtype), q.shape[-1] ** -0.5
    scores = jnp.einsum("bhqd,bhkd->bhqk", q * scale if by_hand else q, k, preferred_element_type=sums)
    scores = scores if by_hand else scores * scale  # where `jax.nn` does: a listener changes no bit
    scores = scores if bias is None else scores + bias.astype(sums)
    scores = scores if mask is None else jnp.where(mask, scores, -1e30)
    shares = jax.nn.softmax(scores, axis=-1)
    shares = (shares if weights is None else weights(shares)).astype(v.dtype)
    return jnp.einsum("bhqk,bhkd->bhqd", shares, v).swapaxes(1, 2)


def attention_to_neighbours(
    q: Float[Array, "batch sites heads head"],
    k: Float[Array, "batch sites groups head"],
    v: Float[Array, "batch sites groups head"],
    neighbours: Int[np.ndarray, "sites few"],
    mask: Bool[Array, "sites few"],
    weights: Callable[[Array], Array] | None = None,
) -> Float[Array, "batch sites heads head"]:
    """`dot_product_attention` where each site has a few keys: the work and the memory of these alone.

    weights: as there, of the few, `(batch, heads, sites, few)`.
    """
    k, v = (_for_each_head(x, q.shape[2])[:, neighbours] for x in (k, v))
    sums = at_least_float32(q.dtype)
    scores = jnp.einsum("bqhd,bqfhd->bhqf", q * q.shape[-1] ** -0.5, k, preferred_element_type=sums)
    shares = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1)
    shares = (shares if weights is None else weights(shares)).astype(v.dtype)
    return jnp.einsum("bhqf,bqfhd->bqhd", shares, v)


def _for_each_head(x: Float[Array, "batch keys groups head"], heads: int) -> Float[Array, "batch keys heads head"]:
    return x if x.shape[2] == heads else jnp.repeat(x, heads // x.shape[2], axis=2)


def check_implementation(implementation: str | None, dtype: DType, head: int) -> None:
    """Raise ValueError for an unknown implementation, or a dtype or head size `"cudnn"` cannot take."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention={implementation!r}: expected one of {IMPLEMENTATIONS}")
    if implementation != "cudnn":
        return
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
        raise ValueError(f"attention='cudnn' needs bfloat16 or float16, not {jnp.dtype(dtype)}: set dtype=jnp.bfloat16")
    if head % 8 or head > 128:
        raise ValueError(f"attention='cudnn' needs a head size that is a multiple of 8 up to 128, not {head}")


class Attention(nnx.Module):
    """Multi-head self-attention, by default without biases on q, k, v (a bias on k would not change a softmax).

    rotary: False, True, or the base of the rotary frequencies (`rope`; True is 10000).
    places: None, or the grid of the sites, whose rows and columns rotary positions then are (`rope_2d`).
    qkv_bias, out_bias: whether there are biases on q, k and v, and on the output.
    told: width of a condition of which queries, keys and values are a linear function too, added to that of the site
        (Hatamizadeh et al. 2023, "DiffiT", equations 3 to 5: time-dependent self-attention). 0: none.
    relative: None, or the grid of the sites: each head then adds to its scores a learned bias for every difference
        between two places (Liu et al. 2021, "Swin", equation 4).
    kv_heads: of keys and values, each for heads / kv_heads neighbouring queries (grouped, Ainslie et al. 2023); default
        heads. The taps `keys` and `values` have so many.

    The columns of `qkv` are ordered (head, q/k/v, feature), so that sharding the columns shards the heads; grouped ones
    (head of keys, its queries and then k and v, feature).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        rotary: bool | float = False,
        places: tuple[int, int] | None = None,
        qkv_bias: bool = False,
        out_bias: bool = True,
        told: int = 0,
        relative: tuple[int, ...] | None = None,
        kv_heads: int | None = None,
        dtype: DType = jnp.float32,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        if heads < 1 or width % heads:
            raise ValueError(f"heads={heads} does not divide width={width}")
        kv_heads = heads if kv_heads is None else kv_heads
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"kv_heads={kv_heads} does not divide heads={heads}")
        head = width // heads
        if rotary and head % (2 if places is None else 4):
            raise ValueError(
                f"rotary positions pair features: width / heads = {head} must be even, and divide by 4 on a grid"
            )
        check_implementation(implementation, dtype, head)
        self.heads, self.kv_heads = heads, kv_heads
        self.rotary, self.places = rotary, places
        self.implementation = implementation
        self.qkv = Linear(width, width + 2 * kv_heads * head, bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.out = Linear(width, width, bias=out_bias, dtype=dtype, rngs=rngs)
        self.told = Linear(told, width + 2 * kv_heads * head, bias=False, dtype=dtype, rngs=rngs) if told else None
        self.grid = relative
        rows = (math.prod(2 * side - 1 for side in relative or ()), heads)
        self.relative = (
            None if relative is None else nnx.Param(0.02 * jax.random.normal(rngs.params(), rows, jnp.float32))
        )

    def __call__(
        self,
        x: Float[Array, "batch sites width"],
        layout: Layout | None = None,
        named: Below = Below(),
        c: Float[Array, "batch *groups cond"] | None = None,
        projection: Float[Array, "batch width width"] | None = None,
    ) -> Float[Array, "batch sites width"]:
        """Every site attends to every site, or as the layout (of one layer) says.

        named: taps queries, keys, values and, where someone asks for them, weights. c: the condition, with `told`.
        projection: added to the weights of the last layer, for each example (`layers.generated`).
        """
        batch, sites, width = x.shape
        qkv = self.qkv(x)
        if self.told is not None:
            qkv = qkv + per_site(self.told(c), sites)
        qkv = qkv.reshape(batch, sites, self.kv_heads, -1, width // self.heads)
        q, k, v = qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]
        q = q.reshape(batch, sites, self.heads, -1)
        q = constrain(q, "batch", "sites", "heads", None)
        if self.rotary:
            q, k = (self._turned(x, jnp.arange(sites) if layout is None else layout.positions) for x in (q, k))
        q, k, v = named("/queries", q), named("/keys", k), named("/values", v)
        if layout is not None and layout.keys is not None:
            k, v = k[:, layout.keys], v[:, layout.keys]
        if layout is not None and layout.past is not None:
            k, v = (jnp.concatenate(pair, axis=1) for pair in zip(layout.past, (k, v), strict=True))
        # Every query meets all keys: where sites are cut over devices, keys and values travel, and queries stay.
        k, v = (constrain(x, "batch", None, "heads", None) for x in (k, v))
        weights = named.asked(WEIGHTS)
        bias = None if self.relative is None else relative_bias(self.relative[...], self.grid, layout)
        if layout is not None and layout.neighbours is not None:
            y = attention_to_neighbours(q, k, v, layout.neighbours, layout.mask, weights)
            return with_weights(self.out, y.reshape(batch, sites, width), projection)
        y = dot_product_attention(q, k, v, self.implementation, layout and layout.mask, weights, bias)
        return with_weights(self.out, y.reshape(batch, sites, width), projection)

    def _turned(self, x: Array, positions: Int[Array, "*batch sites"]) -> Array:
        base = 1e4 if self.rotary is True else self.rotary
        if self.places is None:
            return rope(x, positions, base)
        return rope_2d(x, positions // self.places[1], positions % self.places[1], base)


def relative_bias(
    table: Float[Array, "differences heads"], grid: tuple[int, ...], layout: Layout | None = None
) -> Float[Array, "*batch heads sites keys"]:
    """A row of the table for each pair of sites, by the difference of their places on the grid.

    Raises ValueError for a layout whose keys are not some of the sites at hand.
    """
    places = np.stack(np.unravel_index(np.arange(math.prod(grid)), grid), axis=-1)
    difference = places[:, None] - places + np.subtract(grid, 1)
    numbers = np.ravel_multi_index(tuple(np.moveaxis(difference, -1, 0)), tuple(2 * side - 1 for side in grid))
    if layout is None:
        return jnp.moveaxis(table[numbers], -1, 0)
    if layout.past is not None or layout.neighbours is not None:
        raise ValueError("a relative position bias goes with neither a past nor neighbours: build the network without")
    queries = layout.positions
    keys = queries if layout.keys is None else queries[..., layout.keys]
    return jnp.moveaxis(table[jnp.asarray(numbers)[queries[..., :, None], keys[..., None, :]]], -1, -3)
