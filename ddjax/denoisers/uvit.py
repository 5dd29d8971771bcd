"""U-ViT: a transformer of images for which time, label and patches are all tokens, with long connections."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from ddjax import random
from ddjax.denoisers.layers.attention import Attention
from ddjax.denoisers.layers.basic import (
    MLP,
    DType,
    LayerNorm,
    Linear,
    at_least_float32,
    check_rate,
    dropout,
    dropout_keys,
    zeros,
)
from ddjax.denoisers.layers.convolution import Conv
from ddjax.denoisers.layers.generated import GeneratedMLP, Generator
from ddjax.denoisers.sides import Side
from ddjax.denoisers.token_row import TokenRow
from ddjax.placement import constrain
from ddjax.taps import Below, tap
from ddjax.types import SoftTokens

EPSILON = 1e-5  # of the published norms


class UViT(TokenRow):
    """U-ViT (Bao et al. 2023, "All are worth words", arXiv:2209.12152).

    The label, the time and the patches are tokens of one transformer, which has learned positions and no modulation.
    Each block behind the middle sees what its counterpart before it made, concatenated and projected. The image that
    the patches give passes a 3 x 3 convolution, which starts at zero (without one, the layer before it).

    Args:
        shape, symbols_in, symbols_out, out_channels, patch, embed_width, bits: see `DiT`.
        width, heads: of the transformer; heads divides width, and width is even.
        depth: number of blocks, odd (the authors' code counts all but the middle one); or how many are before and
            behind the middle one, as many or fewer: an encoder stronger than its decoder (Cao et al. 2022, "ASCEND").
        mlp_ratio: hidden width of the MLP over width.
        num_classes: labels run over `[0, num_classes)`, and `num_classes` is the null label. 0: no labels, no token.
        vector: numbers of a vector that is a condition, a token more, see `DiT`. 0: none.
        image_channels: of an image that is a condition, see `DiT`. 0: none.
        time: False ignores t, and there is no token for it.
        time_mlp: whether two layers follow the sines and cosines of the time (in none of the published models).
        context: entries and width of a sequence that is a condition, `cond = {"sequence": (batch, entries, width),
            "valid": which there are, ...}`, a token for each entry (their model of texts: 77 of 768). None: none.
        generated: whether time, label and sequence also make, for each example, what is added to the weights of the
            first layer, of attention's last one (the same in all blocks) and of a convolution of the patches within
            the MLP (Cai et al. 2024, "CAN"; `layers.generated`).
        kernels: 0, or of how many base kernels these are mixed in the place of being made (`layers.Generator`).
        conv: whether the convolution is there (not in the authors' models of latents); None: for continuous images (of
            tokens it would mix all logits).
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
        patch: int = 1,
        width: int,
        depth: int | tuple[int, int],
        heads: int,
        mlp_ratio: float = 4,
        num_classes: int = 0,
        vector: int = 0,
        image_channels: int = 0,
        time: bool = True,
        time_mlp: bool = False,
        context: tuple[int, int] | None = None,
        generated: bool = False,
        kernels: int = 0,
        conv: bool | None = None,
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
            shape=shape, symbols_in=symbols_in, symbols_out=symbols_out, out_channels=out_channels, patch=patch,
            width=width, embed_width=embed_width, bits=bits, image_channels=image_channels, dtype=dtype, rngs=rngs,
        )  # fmt: skip
        conv = symbols_in is None if conv is None else conv
        self.dropout = dropout
        if kernels and not generated:
            raise ValueError(f"kernels={kernels} are mixed where weights are generated: generated=True")
        block = partial(
            SkipBlock, width, heads, mlp_ratio=mlp_ratio, grid=self.grid if generated else None, kernels=kernels,
            dropout=dropout, dtype=dtype, attention=attention,
        )  # fmt: skip
        self.lay(
            width,
            depth,
            block,
            num_classes=num_classes,
            time=time,
            time_mlp=time_mlp,
            vector=vector,
            context=context,
            generated=generated,
            kernels=kernels,
            scan=scan,
            remat=remat,
            rngs=rngs,
        )
        shared = {"kernels": kernels, "dtype": dtype, "rngs": rngs}
        self.projection = Generator(width, (width, width), **shared) if generated else None
        self.norm = LayerNorm(width, epsilon=EPSILON)
        last = {"dtype": dtype, "out_dtype": at_least_float32(dtype), "rngs": rngs}
        self.out = Linear(width, self.features_out, **({} if conv else {"kernel_init": zeros}), **last)
        channels = self.features_out // patch**2
        self.conv = Conv(channels, channels, kernel_init=zeros, **last) if conv else None

    def __call__(
        self,
        xt: Float[Array, "batch H W C *symbols_in"] | Int[Array, "batch H W C"] | SoftTokens,
        t: Float[Array, " batch"] | Float[Array, ""] | None,
        cond: Int[Array, " batch"] | Mapping[str, Array | None] | None = None,
        *,
        rng: Key[Array, ""] | Key[Array, " batch"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch H W out"] | Float[Array, "batch H W C symbols_out"]:
        """Run the network.

        Args:
            xt: the state; a token outside `[0, symbols_in)` makes the example's output NaN. Or soft tokens.
            t: time in [0, 1].
            cond: labels in `[0, num_classes]`; None is the null label. Or a dict of what else the network is told
                (`given.Given`: "vector", "sequence", "valid", "image"), with the labels as "cond".
            rng: one key, or one per example, for dropout; needed when train=True and dropout > 0.
            train: whether dropout acts.

        Returns:
            float32, `(batch, H, W, out_channels)`, or logits `(batch, H, W, C, symbols_out)`.

        Raises:
            ValueError: for a shape or dtype that the network was not built for.
        """
        h = self.body(xt, t, cond, rng=rng, train=train)
        y = self.images(self.out(tap("final", self.norm(h)[:, self.condition.count :])))
        return y if self.conv is None else self.conv(y.reshape(*y.shape[:3], -1)).reshape(y.shape)

    def as_side(self, blocks: int | None) -> Side:
        """See `TokenRow`."""
        self.norm = self.out = self.conv = None
        return super().as_side(blocks)

    def body(
        self, xt: Any, t: Any, cond: Any = None, *, rng: Any = None, train: bool = False
    ) -> Float[Array, "batch tokens width"]:
        """What leaves the last block. Arguments as above."""
        batch = self.check(xt)
        keys = dropout_keys(self.dropout, batch, rng, train)
        told, h = self.row(xt, t, cond, batch)
        c = None
        if self.projection is not None:
            c = self.condition.vector(told)
            c = (c, self.projection(c))
        return self.stack(h, c, keys)


class SkipBlock(nnx.Module):
    """A transformer block without a condition: `h + attention(norm(h))`, then `h + mlp(norm(h))`.

    skips: it first takes what a long connection brings, concatenated, by a linear layer.
    grid: where a condition makes weights (`layers.GeneratedMLP`), of the patches; None: it makes none.
    kernels: of `layers.Generator`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        skips: bool,
        mlp_ratio: float = 4,
        grid: tuple[int, ...] | None = None,
        kernels: int = 0,
        dropout: float = 0.0,
        dtype: DType = jnp.float32,
        attention: str | None = None,
        rngs: nnx.Rngs,
    ):
        check_rate(dropout)
        self.dropout = dropout
        self.skip = Linear(2 * width, width, dtype=dtype, rngs=rngs) if skips else None
        self.norm_a = LayerNorm(width, epsilon=EPSILON)
        self.attention = Attention(width, heads, dtype=dtype, implementation=attention, rngs=rngs)
        self.norm_m = LayerNorm(width, epsilon=EPSILON)
        mlp = {"approximate": False, "dtype": dtype, "rngs": rngs}
        hidden = int(mlp_ratio * width)
        self.mlp = (
            MLP(width, hidden, **mlp)
            if grid is None
            else GeneratedMLP(width, hidden, grid, width, kernels=kernels, **mlp)
        )

    def __call__(
        self,
        h: Float[Array, "batch sites width"],
        skip: Float[Array, "batch sites width"] | None = None,
        c: tuple[Float[Array, "batch width"], Float[Array, "batch width width"]] | None = None,
        *,
        keys: Key[Array, " batch"] | None = None,
        name: str | None = None,
    ) -> tuple[Array, Array]:
        """The result, twice: for the next block, and for a long connection. See `layers.LongSkips`.

        c: the condition's vector, and what is added to the weights of attention's last layer.
        """
        named, more, projection = Below(name), {}, None
        if c is not None:
            more, projection = {"c": c[0]}, c[1]
        keys_a, keys_m = (None, None) if keys is None else random.split(keys)
        h = constrain(h, "batch", "sites", None)
        if self.skip is not None:
            h = self.skip(jnp.concatenate([h, named("/skip", skip)], axis=-1))
        y = named("/attention", self.attention(self.norm_a(h), None, named, projection=projection))
        h = constrain(h + dropout(y, self.dropout, keys_a), "batch", "sites", None)
        y = named("/mlp", self.mlp(self.norm_m(h), **more))
        h = named("", constrain(h + dropout(y, self.dropout, keys_m), "batch", "sites", None))
        return h, h
