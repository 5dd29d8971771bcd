"""DiMR: a transformer at low resolution and convolutions at higher ones, each shown what the one below it made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from ddjax import random
from ddjax.denoisers.given import Given
from ddjax.denoisers.images import ImageNetwork
from ddjax.denoisers.layers.attention import Attention
from ddjax.denoisers.layers.basic import (
    DType,
    GatedMLP,
    Linear,
    at_least_float32,
    check_rate,
    dropout,
    dropout_keys,
    zeros,
)
from ddjax.denoisers.layers.convolution import Conv, Image
from ddjax.denoisers.layers.cross import Context, CrossAttention, no_entry
from ddjax.denoisers.layers.embed import check_labels, check_time, check_vector, lookup
from ddjax.denoisers.layers.long_skips import LongSkips
from ddjax.denoisers.layers.time_norm import TimeNorm
from ddjax.denoisers.sides import Side, check_whole
from ddjax.denoisers.states import check_values
from ddjax.placement import constrain
from ddjax.taps import Below, tap
from ddjax.types import SoftTokens

EPSILON = 1e-16  # of the norms in blocks: theirs adds 1e-8 to the root


class MultiResolution(ImageNetwork):
    """DiMR (Liu et al. 2024, "Alleviating distortion in image generation via multi-resolution diffusion models").

    Some branches, from the lowest resolution to the image's own. The lowest is a transformer over patches, with a token
    for the label; the others are ConvNeXt blocks (a depthwise convolution, and a gated MLP). Each has long connections
    from its first half to its second, as a U-ViT, and adds to its own embedding of the image what all blocks of the
    branch below have made. Nothing but the norms is told the time (`layers.TimeNorm`). The output layer, a 3 x 3
    convolution, starts at zero.

    Taps: "embed/j", what enters the blocks of the j-th branch; "block/i" and below, numbered through all branches (of
    convolutions "/conv" in the place of "/attention"); "branch/j", what a branch hands on; with `heads` "output/j",
    what the j-th branch says of the state at its own resolution, for all but the last; "final".

    Args:
        shape, symbols_in, symbols_out, out_channels, embed_width, bits: see `DiT`.
        widths, depths: of the branches, from the lowest resolution on; depths are odd, and count the middle block.
        patches: side of the patches that a branch embeds, each a multiple of the next; the last is 1.
        pools: by how much a branch takes means of the image before that (theirs: by nothing); None: ones.
        heads: of attention in the lowest branch.
        kernel: size of the depthwise convolutions.
        mlp_ratio: hidden width of the gated MLPs over width.
        output_heads: whether all branches say what they see, for `objectives.multi_resolution`.
        num_classes: labels run over `[0, num_classes)`, and `num_classes` is the null label. 0: no labels.
        vector: numbers of a vector that is a condition, a token more in the lowest branch, see `DiT`. 0: none.
        context_width: width of the entries of a sequence that is a condition, see `DiT`: the blocks of the lowest
            branch attend to them behind its own sites. 0: none.
        image_channels: of an image that is a condition, see `DiT`. 0: none.
        time: False ignores t.
        dropout: rate on each branch of each block, when train=True.
        dtype: compute dtype; parameters and the output stay float32.
        attention: None, "xla" or "cudnn" (`layers.dot_product_attention`).
        scan, remat: see `layers.Stack`.
        rngs: keys of the initial parameters.

    Raises:
        ValueError: for sizes that do not divide, an even depth, or options of the wrong state space.
    """

    def __init__(
        self,
        *,
        shape: tuple[int, int, int],
        symbols_in: int | None = None,
        symbols_out: int | None = None,
        out_channels: int | None = None,
        widths: Sequence[int],
        depths: Sequence[int],
        patches: Sequence[int] = (2, 1),
        pools: Sequence[int] | None = None,
        heads: int,
        kernel: int = 7,
        mlp_ratio: float = 2,
        output_heads: bool = False,
        num_classes: int = 0,
        vector: int = 0,
        context_width: int = 0,
        image_channels: int = 0,
        time: bool = True,
        dropout: float = 0.0,
        dtype: DType = jnp.float32,
        embed_width: int | None = None,
        bits: int = 0,
        attention: str | None = None,
        scan: bool = False,
        remat: bool | str = False,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            shape=shape, symbols_in=symbols_in, symbols_out=symbols_out, out_channels=out_channels, width=widths[0],
            embed_width=embed_width, bits=bits, image_channels=image_channels, dtype=dtype, rngs=rngs,
        )  # fmt: skip
        pools = (1,) * len(widths) if pools is None else tuple(pools)
        grids = _grids(shape, tuple(widths), tuple(depths), tuple(patches), pools)
        if output_heads and symbols_in is not None:
            raise ValueError("output_heads are for a continuous state: tokens have no mean at a lower resolution")
        if num_classes < 0:
            raise ValueError(f"num_classes={num_classes}: expected 0 (no labels) or more")
        self.dropout, self.time, self.num_classes = dropout, time, num_classes
        options = {"mlp_ratio": mlp_ratio, "dropout": dropout, "dtype": dtype}
        kinds = [partial(TransformerBlock, heads=heads, attention=attention, context_width=context_width, **options)]
        kinds += [partial(ConvNeXtBlock, kernel=kernel, **options)] * (len(widths) - 1)
        self.stack, self.branches, below = nnx.List([]), nnx.List([]), None
        for i, (width, depth, patch, pool, grid) in enumerate(zip(widths, depths, patches, pools, grids, strict=True)):
            make = partial(_make, kinds[i], width)
            self.stack.append(LongSkips(make, depth, scan=scan, remat=remat, rngs=rngs))
            self.branches.append(
                Branch(
                    self.features_in, width, grid, patch=patch, pool=pool, below=below, labels=0 if i else num_classes,
                    vector=0 if i else vector,
                    features_out=self.features_out if output_heads or i == len(widths) - 1 else 0, dtype=dtype,
                    rngs=rngs,
                )
            )  # fmt: skip
            below = (grid, width * (depth + 1))
        self.nothing = no_entry(context_width, rngs)

    def __call__(
        self,
        xt: Float[Array, "batch H W C *symbols_in"] | Int[Array, "batch H W C"] | SoftTokens,
        t: Float[Array, " batch"] | Float[Array, ""] | None,
        cond: Int[Array, " batch"] | Mapping[str, Array | None] | None = None,
        *,
        rng: Key[Array, ""] | Key[Array, " batch"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch H W out"] | Float[Array, "batch H W C symbols_out"]:
        """Run the network: arguments, result and errors as those of `UViT`."""
        h, t = self.body(xt, t, cond, rng=rng, train=train)
        y = self.branches[-1].leave(h, t, "final")
        return self.images(y.reshape(len(y), -1, self.features_out))

    def as_side(self, blocks: int | None) -> Side:
        """All but the second half of the highest branch, beside every branch as beside a U-ViT.

        A branch is shown what all blocks of the one below have made, so that those below it stay whole.
        """
        check_whole(blocks)
        points, hints, first = {}, {}, 0
        for i, (branch, stack) in enumerate(zip(self.branches, self.stack, strict=True)):
            width = branch.position.shape[-1]
            points |= stack.points(width, first)
            hints[f"embed/{i}"] = (branch.patch**2, width)
            branch.norm = branch.out = None
            first += stack.depth
        self.stack[-1].without_way_back()
        return Side(hints, points)

    def hinted(self, image: Array, xt: Any, cond: Any, channels: int, scale: int) -> dict[str, Array]:
        """The image as each branch sees one."""
        check_values(image, (self.check(xt), *self.shape[:-1], channels))
        return {f"embed/{i}": branch.hinted(image) for i, branch in enumerate(self.branches)}

    def body(
        self, xt: Any, t: Any, cond: Any = None, *, rng: Any = None, train: bool = False
    ) -> tuple[Image, Float[Array, " batch"]]:
        """What leaves the last block of the highest branch, and the time. Arguments as above."""
        batch = self.check(xt)
        keys = dropout_keys(self.dropout, batch, rng, train)
        t = check_time(t, batch, None).astype(jnp.float32) if self.time else jnp.full((batch,), 0.5, jnp.float32)
        told, context = Given.of(cond).attended(self.nothing, batch, self.dtype)
        x, told = self.seen(xt, told)
        told.check_taken(*("vector",) * (self.branches[0].vector is not None))
        labels = check_labels(told.cond, self.num_classes, batch)
        tap("sites", self.places())
        x = x.reshape(batch, *self.shape[:2], -1)
        made, first = None, 0
        for i, (branch, stack) in enumerate(zip(self.branches, self.stack, strict=True)):
            entered = tap(f"embed/{i}", branch.enter(x, made, labels, told.vector, t))
            h, shown = stack.run(entered, (t, context), keys, first)
            first += stack.depth
            if i == len(self.branches) - 1:
                break
            made = tap(f"branch/{i}", branch.handed_on((entered, *shown)))
            if branch.out is not None:
                tap(f"output/{i}", branch.leave(h, t))
        return h, t


class Branch(nnx.Module):
    """What stands around the blocks of one resolution.

    Args:
        features_in: of a pixel of the image.
        width: of the branch.
        grid: its rows and columns.
        patch, pool: of how many pixels' means on a side it makes one site.
        below: grid and features of what the branch below hands on; None: there is none, and the blocks are of
            attention, on sites in a row.
        labels: of how many there is a token; 0: none. vector: numbers of one that is a token; 0: none.
        features_out: of its output; 0: it has none.
    """

    def __init__(
        self,
        features_in: int,
        width: int,
        grid: tuple[int, int],
        *,
        patch: int,
        pool: int,
        below: tuple[tuple[int, int], int] | None,
        labels: int,
        vector: int,
        features_out: int,
        dtype: DType,
        rngs: nnx.Rngs,
    ):
        self.grid, self.pool, self.patch, self.in_row = grid, pool, patch, below is None
        self.embed = Conv(features_in, width, patch, stride=patch, padding=(0, 0), dtype=dtype, rngs=rngs)
        normal = lambda *shape: nnx.Param(0.02 * jax.random.normal(rngs.params(), shape, jnp.float32))  # noqa: E731
        self.position = normal(*grid, width)
        self.labels = normal(labels + 1, width) if labels else None
        lower, features = below or (grid, 0)
        self.ratio = grid[0] // lower[0]
        self.below_norm = TimeNorm(features) if below else None
        self.below = Linear(features, width * self.ratio**2, dtype=dtype, rngs=rngs) if below else None
        self.beside_norm = TimeNorm(width) if below else None
        self.norm = TimeNorm(width) if features_out else None
        out = {"kernel_init": zeros, "dtype": dtype, "out_dtype": at_least_float32(dtype), "rngs": rngs}
        self.out = Conv(width, features_out, **out) if features_out else None
        self.vector = Linear(vector, width, rngs=rngs) if vector else None

    def enter(
        self, x: Image, made: Image | None, labels: Int[Array, " batch"], vector: Array | None,
        t: Float[Array, " batch"],
    ) -> Float[Array, "batch sites width"] | Image:  # fmt: skip
        """The image, with what the branch below has made of it, for the blocks."""
        h = self.embed(self._pooled(x))
        h = h + self.position[...].astype(h.dtype)
        if self.below is not None:
            h = h + self.beside_norm(spread(self.below(self.below_norm(made, t)), self.ratio), t).astype(h.dtype)
        if self.in_row:
            h = h.reshape(h.shape[0], -1, h.shape[-1])
        if self.labels is not None:
            h = jnp.concatenate([lookup(self.labels[...], labels)[:, None].astype(h.dtype), h], axis=1)
        if self.vector is not None:
            token = self.vector(check_vector(vector, len(h), len(self.vector.kernel)))
            h = jnp.concatenate([token[:, None].astype(h.dtype), h], axis=1)
        return h

    def hinted(self, x: Image) -> Float[Array, "batch *sites values"]:
        """What stands in the patches of an image."""
        x, p = self._pooled(x), self.patch
        batch, (rows, columns) = len(x), self.grid
        x = x.reshape(batch, rows, p, columns, p, -1).swapaxes(2, 3)
        return x.reshape(batch, *(rows * columns,) if self.in_row else self.grid, -1)

    def _pooled(self, x: Image) -> Image:
        if self.pool == 1:
            return x
        batch, rows, columns, features = x.shape
        x = x.reshape(batch, rows // self.pool, self.pool, columns // self.pool, self.pool, features)
        return x.mean(axis=(2, 4), dtype=at_least_float32(x.dtype)).astype(x.dtype)

    def image(self, h: Float[Array, "batch sites width"] | Image) -> Image:
        """The sites in their places, without the tokens before them."""
        if not self.in_row:
            return h
        batch, sites, width = h.shape
        return h[:, sites - self.grid[0] * self.grid[1] :].reshape(batch, *self.grid, width)

    def handed_on(self, made: Sequence[Array]) -> Image:
        """What entered the blocks and what each of them made, side by side."""
        return jnp.concatenate([self.image(h) for h in made], axis=-1)

    def leave(self, h: Array, t: Float[Array, " batch"], name: str | None = None) -> Image:
        """The output of what left the blocks."""
        h = self.norm(self.image(h), t)
        return self.out(h if name is None else tap(name, h))


class BranchBlock(nnx.Module):
    """`h + mix(h)`, then `h + mlp(norm(h))`, told the time by the norms alone.

    skips: it first takes what a long connection brings, concatenated, by a linear layer.
    """

    point: str  # the tap of what sites tell each other
    cross: CrossAttention | None = None

    def __init__(self, width: int, *, skips: bool, mlp_ratio: float, dropout: float, dtype: DType, rngs: nnx.Rngs):
        check_rate(dropout)
        self.dropout = dropout
        self.skip = Linear(2 * width, width, dtype=dtype, rngs=rngs) if skips else None
        self.norm_m = TimeNorm(width, center=False, epsilon=EPSILON)
        self.mlp = GatedMLP(width, int(mlp_ratio * width), activation="exact gelu", bias=True, dtype=dtype, rngs=rngs)

    def mix(self, h: Array, t: Float[Array, " batch"], named: Below) -> Array:
        """What sites tell each other."""
        raise NotImplementedError

    def __call__(
        self,
        h: Float[Array, "batch *sites width"],
        skip: Float[Array, "batch *sites width"] | None,
        told: tuple[Float[Array, " batch"], Context | None],
        *,
        keys: Key[Array, " batch"] | None = None,
        name: str | None = None,
    ) -> tuple[Array, Array]:
        """The result, twice: for the next block, and for a long connection. See `layers.LongSkips`.

        told: the time, and the sequence to which blocks of attention attend.
        """
        (t, context), named = told, Below(name)
        keys_a, keys_m = (None, None) if keys is None else random.split(keys)
        if self.skip is not None:
            h = self.skip(jnp.concatenate([h, named("/skip", skip)], axis=-1))
        h = self._placed(h)
        h = self._placed(h + dropout(named(self.point, self.mix(h, t, named)), self.dropout, keys_a))
        h = h if self.cross is None else self._placed(self.cross.added(h, context, name))
        y = named("/mlp", self.mlp(self.norm_m(h, t)))
        h = named("", self._placed(h + dropout(y, self.dropout, keys_m)))
        return h, h

    def _placed(self, h: Array) -> Array:
        return constrain(h, "batch", *("sites", None) if h.ndim == 3 else (None, None, None))


class TransformerBlock(BranchBlock):
    """Of attention among all sites, behind a norm, and then to a sequence of entries of `context_width`, if any."""

    point = "/attention"

    def __init__(
        self, width: int, *, heads: int, attention: str | None, context_width: int, dtype: DType, rngs: nnx.Rngs,
        **options: Any,
    ):  # fmt: skip
        super().__init__(width, dtype=dtype, rngs=rngs, **options)
        shared = {"dtype": dtype, "implementation": attention, "rngs": rngs}
        self.norm_a = TimeNorm(width, center=False, epsilon=EPSILON)
        self.attention = Attention(width, heads, **shared)
        self.cross = CrossAttention(width, context_width, heads, **shared) if context_width else None

    def mix(self, h: Array, t: Float[Array, " batch"], named: Below) -> Array:
        """What sites tell each other."""
        return self.attention(self.norm_a(h, t), None, named)


class ConvNeXtBlock(BranchBlock):
    """Of a depthwise convolution, without a norm (Liu et al. 2022, "A ConvNet for the 2020s")."""

    point = "/conv"

    def __init__(self, width: int, *, kernel: int, dtype: DType, rngs: nnx.Rngs, **options: Any):
        super().__init__(width, dtype=dtype, rngs=rngs, **options)
        self.conv = Conv(width, width, kernel, groups=width, dtype=dtype, rngs=rngs)

    def mix(self, h: Image, t: Float[Array, " batch"], named: Below) -> Image:
        """What sites tell each other."""
        return self.conv(h)


def spread(x: Image, ratio: int) -> Image:
    """Each pixel as ratio x ratio of them: feature (i ratio + j) features + f becomes feature f of pixel (i, j)."""
    batch, rows, columns, features = x.shape
    x = x.reshape(batch, rows, columns, ratio, ratio, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, rows * ratio, columns * ratio, features // ratio**2)


def _make(kind: Callable[..., BranchBlock], width: int, rngs: nnx.Rngs, *, skips: bool) -> BranchBlock:
    return kind(width, skips=skips, rngs=rngs)


def _grids(
    shape: tuple[int, ...], widths: tuple[int, ...], depths: tuple[int, ...], patches: tuple[int, ...],
    pools: tuple[int, ...],
) -> list[tuple[int, int]]:  # fmt: skip
    """Rows and columns of each branch. Raises ValueError."""
    cuts = [patch * pool for patch, pool in zip(patches, pools, strict=False)]
    if not len(widths) == len(depths) == len(patches) == len(pools) > 1:
        raise ValueError(
            f"widths={widths}, depths={depths}, patches={patches}, pools={pools}: expected one of each for every "
            "branch, of which there are at least two"
        )
    if min(cuts) < 1 or cuts[-1] != 1 or any(a % b or a == b for a, b in pairwise(cuts)):
        raise ValueError(
            f"patches={patches}, pools={pools}: a site is {cuts} pixels wide; expected multiples, one of the next, "
            "down to 1"
        )
    if len(shape) != 3 or any(side % cuts[0] for side in shape[:2]):
        raise ValueError(f"shape={shape}: expected (height, width, channels), sides that divide by {cuts[0]}")
    return [(shape[0] // cut, shape[1] // cut) for cut in cuts]
