"""An up-sampler of images of any size: a diffusion transformer whose memory, block by block, is that of a row."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from ddjax.denoisers.given import Given
from ddjax.denoisers.images import ImageNetwork
from ddjax.denoisers.layers.basic import MLP, DType, Linear, layer_norm, modulate, per_site, zeros
from ddjax.denoisers.layers.block_attention import BlockAttention, KeysValues, NearbyAttention
from ddjax.denoisers.layers.blocks import FinalLayer, Stack
from ddjax.denoisers.layers.cross import Context, CrossAttention, no_entry
from ddjax.denoisers.layers.embed import Conditioner
from ddjax.denoisers.sides import Side, check_blocks, in_place, keep
from ddjax.placement import constrain
from ddjax.taps import Below, refuse, tap, unheard
from ddjax.types import Params


class UpsamplerBlock(nnx.Module):
    """A layer of `InfDiT`: block attention, in the first a look at the low-resolution image, and an MLP.

    adaLN-zero as in `layers.Block`; the look has no modulation. low: entries that it sees; 0: it does not look.
    context_width: of the entries of a sequence to which patches attend before the MLP; 0: none.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        block: int,
        grid: tuple[int, int],
        *,
        mlp_width: int,
        cond_width: int,
        low: int = 0,
        context_width: int = 0,
        dtype: DType = jnp.float32,
        attention: str | None = None,
        rngs: nnx.Rngs,
    ):
        self.grid = tuple(grid)  # of blocks
        options = {"dtype": dtype, "implementation": attention, "rngs": rngs}
        self.attention = BlockAttention(width, heads, block, **options)
        self.nearby = NearbyAttention(width, heads, block**2, low, **options) if low else None
        self.mlp = MLP(width, mlp_width, dtype=dtype, rngs=rngs)
        self.modulation = Linear(cond_width, 6 * width, kernel_init=zeros, dtype=dtype, rngs=rngs)
        self.cross = CrossAttention(width, context_width, heads, **options) if context_width else None

    def __call__(
        self, h: Array, c: Array, *, low: Array | None = None, context: Context | None = None, keys: Any = None,
        layout: None = None, name: str | None = None,
    ) -> Float[Array, "batch sites width"]:  # fmt: skip
        """All blocks at once. low: `(batch, blocks, entries, width)`. context: a sequence. name: prefix of the taps."""
        h, named = constrain(h, "batch", "sites", None), Below(name)
        told = jnp.split(self.modulation(c), 6, axis=-1)
        y = named("/attention", self.attention(modulate(h, *told[:2]), self.grid, named))
        h = h + per_site(told[2], h.shape[1]) * y
        return named("", self._rest(h, told[3:], low, context, name))

    def behind(
        self,
        h: Array,
        c: Array,
        at: tuple[Array, Array],
        past: KeysValues,
        seen: Array,
        low: Array | None = None,
        context: Context | None = None,
    ) -> tuple[Float[Array, "batch patches width"], KeysValues]:
        """One block, behind those that it sees (`BlockAttention.behind`). low: `(batch, 1, entries, width)`."""
        told = jnp.split(self.modulation(c), 6, axis=-1)
        y, own = self.attention.behind(modulate(h, *told[:2]), at, past, seen)
        return self._rest(h + per_site(told[2], h.shape[1]) * y, told[3:], low, context), own

    def _rest(
        self, h: Array, told: list[Array], low: Array | None, context: Context | None, name: str | None = None
    ) -> Array:
        named, near = Below(name), Below(name and f"{name}/nearby")
        if self.nearby is not None:
            x = layer_norm(h).reshape(-1, self.attention.block**2, h.shape[-1])
            h = h + near("", self.nearby(x, low.reshape(-1, *low.shape[2:]), near).reshape(h.shape))
        h = h if self.cross is None else self.cross.added(h, context, name)
        y = named("/mlp", self.mlp(modulate(h, *told[:2])))
        return h + per_site(told[2], h.shape[1]) * y


class InfDiT(ImageNetwork):
    """Inf-DiT (Yang et al. 2024, arXiv:2405.04312; THUDM/Inf-DiT): super-resolution at any size.

    It denoises an image told one with `scale` times fewer rows and columns, `cond = {"image": (batch, H / scale,
    W / scale, image_channels), ...}`: enlarged (bicubic), as channels beside the state's, and as it is, of which each
    block of patches sees what lies under it and around it. Patches attend to their own block and the three before it
    that touch it (`layers.block_attention`). No parameter depends on the size of the image: a network trained on small
    ones has the parameters of one for large ones.

    In turn, every evaluation goes from block to block, each behind keys and values of those before it, and remembers
    one row of blocks of these (theirs: `--inference_type ar`, at each step of the sampler). The result is the same, and
    memory, but for the images themselves, does not grow with the number of rows.

    Taps: those of a transformer (`ddjax.taps`), of which the first layer's are "first" and below, the others'
    "block/i"; "first/nearby" is the look at the low-resolution image, with "/queries", "/keys", "/values" and
    "/attention/weights". Sites and maps go block by block (`BlockAttention`). In turn the layers have none.

    Args:
        shape: (H, W, C) of an image.
        out_channels: default C.
        scale: how many times larger than the low-resolution image.
        image_channels: of that image, default C. low_patch: side of its patches.
        patch, width, depth, heads, mlp_ratio, cond_width, num_classes, vector, time, dtype, attention: see `DiT`
            (attention None, "xla" or "cudnn"); theirs are told a vector (CLIP's of the low-resolution image).
        context_width: width of the entries of a sequence that is a condition, see `DiT`: every layer attends to them
            before its MLP. 0: none.
        block: side of a block in patches. A block is whole patches of the low-resolution image.
        in_turn: whether it runs block by block when not training.
        scan, remat: see `layers.Stack`; of all layers but the first.
        rngs: keys of the initial parameters.

    Raises:
        ValueError: for sizes that do not divide.
    """

    def __init__(
        self,
        *,
        shape: tuple[int, int, int],
        out_channels: int | None = None,
        scale: int = 4,
        image_channels: int | None = None,
        low_patch: int = 2,
        patch: int = 4,
        block: int = 32,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4,
        cond_width: int | None = None,
        num_classes: int = 0,
        vector: int = 0,
        context_width: int = 0,
        time: bool = True,
        dtype: DType = jnp.float32,
        attention: str | None = None,
        in_turn: bool = False,
        scan: bool = False,
        remat: bool | str = False,
        rngs: nnx.Rngs,
    ):
        image_channels = image_channels or shape[-1]
        super().__init__(
            shape=shape, symbols_in=None, symbols_out=None, out_channels=out_channels, patch=patch, width=width,
            image_channels=image_channels, dtype=dtype, rngs=rngs,
        )  # fmt: skip
        pixels = block * patch
        if len(shape) != 3 or min(scale, low_patch, block) < 1 or any(side % pixels for side in shape[:-1]):
            raise ValueError(f"block={block} patches of {patch} pixels do not divide the image's sides {shape[:-1]}")
        if pixels % (scale * low_patch):
            raise ValueError(
                f"a block of {pixels} pixels is not whole patches of {low_patch} pixels of an image {scale} times "
                "smaller: choose another block, scale or low_patch"
            )
        if depth < 2:
            raise ValueError(f"depth={depth}: expected two layers or more, of which the first looks at the image")
        self.scale, self.low_patch, self.block, self.in_turn = scale, low_patch, block, in_turn
        self.blocks = tuple(side // pixels for side in shape[:-1])  # rows and columns of them
        self.low_side = pixels // (scale * low_patch)  # patches of the low-resolution image along a block
        cond_width = cond_width or width
        layer = {
            "mlp_width": int(mlp_ratio * width), "cond_width": cond_width, "context_width": context_width,
            "dtype": dtype, "attention": attention,
        }  # fmt: skip
        self.embed = Linear(self.features_in, width, dtype=dtype, rngs=rngs)
        self.low_embed = Linear(low_patch**2 * image_channels, width, dtype=dtype, rngs=rngs)
        self.condition = Conditioner(cond_width, num_classes=num_classes, time=time, vector=vector, rngs=rngs)
        entries = (3 * self.low_side) ** 2
        self.first = UpsamplerBlock(width, heads, block, self.blocks, low=entries, **layer, rngs=rngs)
        self.stack = Stack(
            lambda rngs: UpsamplerBlock(width, heads, block, self.blocks, **layer, rngs=rngs), depth - 1,
            scan=scan, remat=remat, rngs=rngs,
        )  # fmt: skip
        self.final = FinalLayer(width, self.features_out, cond_width=cond_width, dtype=dtype, rngs=rngs)
        self.heads, self.width = heads, width
        self.nothing = no_entry(context_width, rngs)

    def __call__(
        self,
        xt: Float[Array, "batch H W C"],
        t: Float[Array, " batch"] | Float[Array, ""] | None,
        cond: Any = None,
        *,
        rng: Key[Array, ""] | Key[Array, " batch"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch H W out"]:
        """Run the network; it has nothing random. cond: labels, or with others a dict, see `given.Given`.

        Raises ValueError for shapes that the network was not built for, and where taps are asked for of one in turn.
        """
        if self.in_turn and not train:
            for prefix in ("first", "block"):
                refuse(prefix, "the blocks run in turn; build the network with in_turn=False")
            entering = self._entering(xt, t, cond)
            with unheard():
                y = self._in_turn(*entering)
        else:
            y = self.final(*self.body(xt, t, cond))
        return self.images(self._by_row(y))

    def as_side(self, blocks: int | None) -> Side:
        """Its first layers, each added to the trunk's, as of a `DiT`."""
        blocks = check_blocks(blocks, self.stack.depth + 1)
        keep(self.stack, blocks - 1)
        self.final = None
        names = ["first", *(f"block/{i}" for i in range(blocks - 1))]
        return Side({"embed": (self.patch**2, self.width)}, in_place(names, self.width))

    def hinted(self, image: Array, xt: Any, cond: Any, channels: int, scale: int) -> dict[str, Array]:
        """What stands in each patch of an image as large as the state."""
        x = super().hinted(image, xt, cond, channels, scale)["embed"]
        return {"embed": self._by_block(x.reshape(len(x), *self.grid, -1))}

    def body(
        self, xt: Any, t: Any, cond: Any = None, *, rng: Any = None, train: bool = False
    ) -> tuple[Float[Array, "batch sites width"], Float[Array, "batch cond"]]:
        """What leaves the last layer, all blocks at once, and the vector of the condition. Arguments as above."""
        x, low, c, context = self._entering(xt, t, cond)
        seen = jax.vmap(lambda i: self._around(low, i), out_axes=1)(jnp.arange(math.prod(self.blocks)))
        h = tap("embed", self.embed(self._by_block(self._features(x, self.grid))))
        h = self.first(h, c, low=seen, context=context, name="first")
        return self.stack(h, c, context=context), c

    def _entering(self, xt: Array, t: Any, cond: Any) -> tuple[Array, Array, Array, Context | None]:
        """The state with the enlarged image beside it, the low-resolution image, the vector of the condition, words."""
        batch, given = self.check(xt), Given.of(cond)
        given, context = given.attended(self.nothing, batch, self.dtype)
        c = constrain(tap("condition", self.condition(batch, t, given.without("image"))), "batch", None)
        tap("sites", self.places())
        low = self._low(given.image, batch)
        enlarged = jax.image.resize(low, (batch, *self.shape[:-1], low.shape[-1]), "cubic")
        x = jnp.concatenate([xt.astype(self.dtype), enlarged.astype(self.dtype)], axis=-1)
        return x, low, c, context

    def _low(self, image: Array | None, batch: int) -> Float[Array, "batch h w low"]:
        """The low-resolution image."""
        expected = (batch, *(side // self.scale for side in self.shape[:-1]), self.image_channels)
        image = jnp.zeros(expected, jnp.float32) if image is None else image
        if image.shape != expected:
            raise ValueError(f'cond["image"] has shape {image.shape}; expected {expected}, of the low resolution')
        return image

    def _features(self, x: Array, grid: tuple[int, int]) -> Float[Array, "batch rows columns features"]:
        """Of patches, those of the state before those of the enlarged image."""
        batch, p = x.shape[0], self.patch
        x = x.reshape(batch, grid[0], p, grid[1], p, -1).swapaxes(2, 3)
        state, image = jnp.split(x, [self.shape[-1]], axis=-1)
        flat = (batch, *grid, -1)
        return jnp.concatenate([state.reshape(flat), image.reshape(flat)], axis=-1)

    def _by_block(self, x: Float[Array, "batch rows columns features"]) -> Float[Array, "batch sites features"]:
        """Patches in the order of `BlockAttention`."""
        batch, features = x.shape[0], x.shape[-1]
        x = x.reshape(batch, self.blocks[0], self.block, self.blocks[1], self.block, features)
        return x.swapaxes(2, 3).reshape(batch, -1, features)

    def _by_row(self, y: Float[Array, "batch sites features"]) -> Float[Array, "batch sites features"]:
        """And back to rows of patches."""
        batch, features = y.shape[0], y.shape[-1]
        y = y.reshape(batch, *self.blocks, self.block, self.block, features)
        return y.swapaxes(2, 3).reshape(batch, -1, features)

    def _around(self, low: Float[Array, "batch h w low"], i: Int[Array, ""]) -> Float[Array, "batch entries width"]:
        """What block i sees of the low-resolution image: its patches there and around, zeros beyond."""
        side, p, batch = self.low_side, self.low_patch, low.shape[0]
        row, column = i // self.blocks[1], i % self.blocks[1]
        margin = side * p
        padded = jnp.pad(low, [(0, 0), (margin, margin), (margin, margin), (0, 0)])
        start = (0, row * margin, column * margin, 0)
        window = jax.lax.dynamic_slice(padded, start, (batch, 3 * margin, 3 * margin, low.shape[-1]))
        window = window.reshape(batch, 3 * side, p, 3 * side, p, -1).swapaxes(2, 3)
        embedded = self.low_embed(window.reshape(batch, 3 * side, 3 * side, -1))
        place = jnp.arange(3 * side) // side - 1
        inside = [(at + place >= 0) & (at + place < n) for at, n in zip((row, column), self.blocks, strict=True)]
        there = inside[0][:, None] & inside[1]
        return jnp.where(there[..., None], embedded, 0).reshape(batch, (3 * side) ** 2, -1)

    def _in_turn(
        self, x: Float[Array, "batch H W both"], low: Float[Array, "batch h w low"], c: Float[Array, "batch cond"],
        context: Context | None,
    ) -> Float[Array, "batch sites features"]:  # fmt: skip
        """From block to block, row by row, behind keys and values of the row of blocks before each."""
        batch, (rows, columns), side = x.shape[0], self.blocks, self.block * self.patch
        layers = self.stack.depth + 1
        own = (layers, 2, batch, self.block**2, self.heads, self.width // self.heads)

        def one(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], Array]:
            row, corner = carry  # of the last block in each column; of the one above and to the left
            at = i // columns, i % columns
            cut = jax.lax.dynamic_slice(x, (0, at[0] * side, at[1] * side, 0), (batch, side, side, x.shape[-1]))
            features = self._features(cut, (self.block,) * 2)
            above, left = row[at[1]], row[at[1] - 1]
            past = jnp.stack([corner, left, above], axis=2)
            seen = jnp.stack([at[0] >= 0, (at[0] > 0) & (at[1] > 0), at[1] > 0, at[0] > 0])
            h = self.embed(features.reshape(batch, self.block**2, -1))
            h, new = self._layers(h, c, at, past, seen, self._around(low, i)[:, None], context)
            return (row.at[at[1]].set(new), above), self.final(h, c)

        start = jnp.zeros((columns, *own), self.dtype), jnp.zeros(own, self.dtype)
        _, y = jax.lax.scan(one, start, jnp.arange(rows * columns))
        return jnp.moveaxis(y, 0, 1).reshape(batch, math.prod(self.grid), -1)

    def _layers(
        self,
        h: Array,
        c: Array,
        at: tuple[Array, Array],
        past: Float[Array, "layers 2 3 ..."],
        seen: Array,
        low: Array,
        context: Context | None,
    ) -> tuple[Array, Float[Array, "layers 2 ..."]]:
        h, first = self.first.behind(h, c, at, past[0], seen, low, context)
        if not self.stack.scan:
            news = [first]
            for block, own in zip(self.stack.blocks, past[1:], strict=True):
                h, new = block.behind(h, c, at, own, seen, context=context)
                news.append(new)
            return h, jnp.stack(news)
        graphdef, stacked = nnx.split(self.stack.blocks)

        def body(h: Array, layer: tuple[Params, Array]) -> tuple[Array, Array]:
            return nnx.merge(graphdef, layer[0]).behind(h, c, at, layer[1], seen, context=context)

        h, news = jax.lax.scan(body, h, (stacked, past[1:]))
        return h, jnp.concatenate([first[None], news])
