"""Multi-head attention, who attends to whom, and rotary positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ddjax.denoisers.layers.basic import DType, Linear, at_least_float32
from ddjax.placement import constrain

IMPLEMENTATIONS = (None, "xla", "cudnn")


Past = tuple[Float[Array, "batch depth length heads head"], Float[Array, "batch depth length heads head"]]


class Layout(NamedTuple):
    """Where the sites that a network sees stand, and which of them each attends to."""

    positions: Int[Array, "*batch sites"]
    mask: Bool[Array, "*batch sites keys"]  # (queries, keys), or (batch or 1, heads, queries, keys); none without a key
    past: Past | None = None  # keys and values of sites that the network does not see now: keys before its own

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


def put(new: Array, sites: Int[Array, "batch some"], old: Array, axis: int = 1) -> Array:
    """`old`, with `new` in its place at some sites of the axis; those beyond it count for nothing."""
    own = sites[:, :, None] == jnp.arange(old.shape[axis])
    shape = [old.shape[i] if i in (0, axis) else 1 for i in range(old.ndim)]
    ran, where = (v.reshape(shape) for v in (own.any(axis=1), own.argmax(axis=1)))
    return jnp.where(ran, jnp.take_along_axis(new, where, axis=axis), old)


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


def dot_product_attention(
    q: Float[Array, "batch sites heads head"],
    k: Float[Array, "batch keys heads head"],
    v: Float[Array, "batch keys heads head"],
    implementation: str | None = None,
    mask: Bool[Array, "*batch sites keys"] | None = None,
) -> Float[Array, "batch sites heads head"]:
    """`softmax(q k' / sqrt(head)) v`, scores and softmax in float32 (on a CPU, of float64 in float64).

    mask: `(queries, keys)`, one for each example, or `(1, heads, queries, keys)`, true where a query attends; every
        query needs a key. None: everywhere, at no cost.

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
    if implementation is None and jax.default_backend() == "cpu":
        # Heads first by hand: XLA's CPU backend then runs plain batched products, faster than one einsum.
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        sums = at_least_float32(q.dtype)
        scores = jnp.einsum("bhqd,bhkd->bhqk", q * q.shape[-1] ** -0.5, k, preferred_element_type=sums)
        scores = scores if mask is None else jnp.where(mask, scores, -1e30)
        weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        return jnp.einsum("bhqk,bhkd->bhqd", weights, v).swapaxes(1, 2)
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation or "xla")


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
    qkv_bias, out_bias: whether there are biases on q, k and v, and on the output.

    The columns of `qkv` are ordered (head, q/k/v, feature), so that sharding the columns shards the heads.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        rotary: bool | float = False,
        qkv_bias: bool = False,
        out_bias: bool = True,
        dtype: DType = jnp.float32,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        if heads < 1 or width % heads:
            raise ValueError(f"heads={heads} does not divide width={width}")
        head = width // heads
        if rotary and head % 2:
            raise ValueError(f"rotary positions pair features: width / heads = {head} must be even")
        check_implementation(implementation, dtype, head)
        self.heads = heads
        self.rotary = rotary
        self.implementation = implementation
        self.qkv = Linear(width, 3 * width, bias=qkv_bias, dtype=dtype, rngs=rngs)
        self.out = Linear(width, width, bias=out_bias, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch sites width"],
        layout: Layout | None = None,
        named: Callable[[str, Array], Array] = lambda point, x: x,
    ) -> Float[Array, "batch sites width"]:
        """Every site attends to every site, or as the layout (of one layer) says. `named` taps keys and values."""
        batch, sites, width = x.shape
        qkv = self.qkv(x).reshape(batch, sites, self.heads, 3, width // self.heads)
        q, k, v = qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :]
        q = constrain(q, "batch", "sites", "heads", None)
        if self.rotary:
            base = 1e4 if self.rotary is True else self.rotary
            q, k = (rope(x, layout and layout.positions, base) for x in (q, k))
        k, v = named("/keys", k), named("/values", v)
        if layout is not None and layout.past is not None:
            k, v = (jnp.concatenate(pair, axis=1) for pair in zip(layout.past, (k, v), strict=True))
        # Every query meets all keys: where sites are cut over devices, keys and values travel, and queries stay.
        k, v = (constrain(x, "batch", None, "heads", None) for x in (k, v))
        y = dot_product_attention(q, k, v, self.implementation, layout and layout.mask)
        return self.out(y.reshape(batch, sites, width))
