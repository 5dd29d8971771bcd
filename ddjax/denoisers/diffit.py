"""DiffiT in image space: a U-shaped transformer whose attention is told the time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from ddjax.denoisers.given import Given
from ddjax.denoisers.images import ImageNetwork
from ddjax.denoisers.layers.attention import Attention
from ddjax.denoisers.layers.basic import MLP, DType, check_rate, dropout, dropout_keys, layer_norm
from ddjax.denoisers.layers.convolution import Conv, GroupNorm, Image, Resampling, unwindowed, windows
from ddjax.denoisers.layers.cross import Context, CrossAttention, no_entry
from ddjax.denoisers.layers.embed import Conditioner
from ddjax.denoisers.u_shaped import Stage, UShaped, check_sides
from ddjax.denoisers.unet import FinalConv
from ddjax.placement import constrain
from ddjax.random import split
from ddjax.taps import Below, tap
from ddjax.types import SoftTokens


class DiffiT(UShaped):
    """DiffiT in image space (Hatamizadeh et al. 2023, arXiv:2312.02139, section 3.3).

    A convolution; at each resolution some blocks, and a convolution of stride 2 down to the next; and back up, nearest
    neighbours and a convolution, the first block of each resolution beside what the last on the way down gave. A block
    adds to its input a transformer block of `convolution(silu(norm(x)))`, which attends within windows and is told the
    time by its queries, keys and values (`layers.Attention(told=)`), with a bias for each difference of places. The
    output layer starts at zero. Their network of latents is `DiT(conditioning="attention", relative=True)`.

    Taps: "condition", "encoder/i", "decoder/j" (resampling counts), with "/queries", "/keys", "/values" and
    "/attention/weights", whose first axis is of windows, those of an example behind each other, "/attention" and
    "/mlp"; "skip/n" and "backbone/n" (`freeu`); "final".

    Args:
        shape: (H, W, C) of one example.
        symbols_in, symbols_out, out_channels, embed_width, bits: see `DiT`.
        width: features at the first resolution, times its multiplier.
        multipliers: of the width at each resolution, the sides halving from one to the next.
        blocks: of each resolution, down and up.
        heads: of attention. window: its sides in pixels; smaller where the image is.
        mlp_ratio: hidden width of the MLP over the features.
        cond_width: of the vector of time and label, default 4 width.
        num_classes: labels run over `[0, num_classes)`, and `num_classes` is the null label. 0: no labels.
        vector, image_channels: of these conditions, see `DiT`. 0: none.
        context_width: width of the entries of a sequence that is a condition, see `DiT`: every block attends to them
            behind the pixels. 0: none.
        time: False ignores t.
        dropout: rate on each branch of each block, when train=True.
        dtype: compute dtype; parameters and the output stay float32.
        attention: None, "xla" or "cudnn" (`layers.dot_product_attention`).
        scan, remat: see `UNet`.
        rngs: keys of the initial parameters.

    Raises:
        ValueError: for sizes that do not divide, or options of the wrong state space.
    """

    def __init__(
        self,
        *,
        shape: tuple[int, int, int],
        symbols_in: int | None = None,
        symbols_out: int | None = None,
        out_channels: int | None = None,
        width: int,
        multipliers: Sequence[int] = (1, 2, 2),
        blocks: int = 2,
        heads: int = 4,
        window: int = 4,
        mlp_ratio: float = 4,
        cond_width: int | None = None,
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
        ImageNetwork.__init__(
            self, shape=shape, symbols_in=symbols_in, symbols_out=symbols_out, out_channels=out_channels, width=width,
            embed_width=embed_width, bits=bits, image_channels=image_channels, dtype=dtype, rngs=rngs,
        )  # fmt: skip
        check_sides(shape, len(multipliers), blocks, ())
        self.dropout, cond_width = dropout, cond_width or 4 * width
        self.condition = Conditioner(
            cond_width, num_classes=num_classes, time=time, vector=vector, silu=False, rngs=rngs
        )
        encoder, decoder = _plan([m * width for m in multipliers], blocks)
        grids = iter(_windows(shape, encoder + decoder, window))

        def block(stage: Stage) -> nnx.Module:
            grid = next(grids)
            if stage.resample is not None:
                return Resampling(
                    stage.features_in, stage.resample, features_out=stage.features_out, padding=(1, 1), dtype=dtype,
                    rngs=rngs,
                )  # fmt: skip
            return DiffiTBlock(
                stage.features_in, stage.features_out, heads, grid, cond_width=cond_width, mlp_ratio=mlp_ratio,
                dropout=dropout, dtype=dtype, attention=attention, context_width=context_width, rngs=rngs,
            )  # fmt: skip

        self.embed = Conv(self.features_in, encoder[0].features_in, dtype=dtype, rngs=rngs)
        self.lay(encoder, [], decoder, block, remat=remat, scan=scan)
        norm = partial(GroupNorm, least=4)
        self.final = FinalConv(decoder[-1].features_out, self.features_out, norm=norm, dtype=dtype, rngs=rngs)
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
        h, _ = self.body(xt, t, cond, rng=rng, train=train)
        return self.images(self.final(h).reshape(len(h), -1, self.features_out))

    def body(
        self, xt: Any, t: Any, cond: Any = None, *, rng: Any = None, train: bool = False
    ) -> tuple[Float[Array, "batch H W width"], Float[Array, "batch cond"]]:
        """What leaves the last block, and the vector of the condition. Arguments as above."""
        batch = self.check(xt)
        keys = dropout_keys(self.dropout, batch, rng, train)
        told, context = Given.of(cond).attended(self.nothing, batch, self.dtype)
        x, told = self.seen(xt, told)
        c = constrain(tap("condition", self.condition(batch, t, told)), "batch", None)
        c = jnp.broadcast_to(c, (batch, c.shape[-1]))
        tap("sites", self.places())
        h = tap("embed", self.embed(x.reshape(batch, *self.grid, -1)))
        more = {} if context is None else {"context": context}
        return self.walk(h, c, keys, join=lambda h, skip: jnp.concatenate([h, skip], axis=-1), **more), c


class DiffiTBlock(nnx.Module):
    """`x + block(convolution(silu(norm(x))))`: a transformer block within windows (equations 7 to 10).

    Where the features change, the shortcut is a convolution of one pixel. grid: rows and columns of a window.
    context_width: of the entries of a sequence to which pixels attend before the MLP; 0: none.
    """

    def __init__(
        self,
        features_in: int,
        features: int,
        heads: int,
        grid: tuple[int, int],
        *,
        cond_width: int,
        mlp_ratio: float = 4,
        dropout: float = 0.0,
        dtype: DType = jnp.float32,
        attention: str | None = None,
        context_width: int = 0,
        rngs: nnx.Rngs,
    ):
        check_rate(dropout)
        self.dropout, self.grid, self.resample = dropout, grid, None
        self.norm_in = GroupNorm(features_in, least=4)
        self.conv_in = Conv(features_in, features, dtype=dtype, rngs=rngs)
        self.attention = Attention(
            features, heads, qkv_bias=True, told=cond_width, relative=grid, dtype=dtype, implementation=attention,
            rngs=rngs,
        )  # fmt: skip
        self.mlp = MLP(features, int(mlp_ratio * features), dtype=dtype, rngs=rngs)
        self.shortcut = Conv(features_in, features, 1, dtype=dtype, rngs=rngs) if features_in != features else None
        self.cross = (
            CrossAttention(features, context_width, heads, dtype=dtype, implementation=attention, rngs=rngs)
            if context_width
            else None
        )

    def __call__(
        self,
        x: Image,
        c: Float[Array, "batch cond"],
        *,
        keys: Key[Array, " batch"] | None = None,
        name: str | None = None,
        context: Context | None = None,
    ) -> Image:
        """Run the block. `keys` turn dropout on; `name` is the prefix of the taps (None inside a scan).

        context: the sequence, with `context_width`.
        """
        named = Below(name)
        keys_a, keys_m = (None, None) if keys is None else split(keys)
        x = constrain(x, "batch", None, None, None)
        h = self.conv_in(jax.nn.silu(self.norm_in(x)))
        seen = windows(layer_norm(h), self.grid)
        told = jnp.broadcast_to(c[:, None], (len(c), len(seen) // len(c), c.shape[-1])).reshape(len(seen), -1)
        # Where it lies is said: without this XLA's partitioner (jax 0.10) returns examples in another order.
        y = constrain(self.attention(seen, None, named, told), "batch", None, None)
        y = named("/attention", unwindowed(y, h.shape, self.grid))
        h = constrain(h + dropout(y, self.dropout, keys_a), "batch", None, None, None)
        h = h if self.cross is None else self.cross.added(h, context, name)
        h = h + dropout(named("/mlp", self.mlp(layer_norm(h))), self.dropout, keys_m)
        x = (x if self.shortcut is None else self.shortcut(x)) + h
        return named("", constrain(x, "batch", None, None, None))


def _plan(widths: Sequence[int], blocks: int) -> tuple[list[Stage], list[Stage]]:
    """The blocks on the way down and up."""
    encoder, decoder, last = [], [], len(widths) - 1
    for i, width in enumerate(widths):
        if i:
            encoder.append(Stage(widths[i - 1], width, "down", encodes=True, kept=False))
        encoder += [Stage(width, width, encodes=True, kept=i < last and j == blocks - 1) for j in range(blocks)]
    for i, width in reversed(list(enumerate(widths))):
        joined = i < last
        decoder += [Stage(width * (1 + (joined and not j)), width, joined=joined and not j) for j in range(blocks)]
        if i:
            decoder.append(Stage(width, widths[i - 1], "up"))
    return encoder, decoder


def _windows(shape: tuple[int, ...], stages: Sequence[Stage], window: int) -> list[tuple[int, int]]:
    """Rows and columns of a window behind each stage. Raises ValueError where they do not divide the image's."""
    sides, grids = (shape[0], shape[1]), []
    for stage in stages:
        sides = tuple({"down": side // 2, "up": 2 * side}.get(stage.resample, side) for side in sides)
        if window < 1 or any(side % min(window, side) for side in sides):
            raise ValueError(f"window={window} does not divide an image of {sides[0]} by {sides[1]} pixels")
        grids.append(tuple(min(window, side) for side in sides))
    return grids
