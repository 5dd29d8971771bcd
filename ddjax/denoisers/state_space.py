"""DiS: a network of images without attention, of selective state spaces along the row of all tokens."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from ddjax.denoisers.given import Given
from ddjax.denoisers.layers.basic import (
    DType,
    Linear,
    RMSNorm,
    at_least_float32,
    check_rate,
    dropout,
    dropout_keys,
    layer_norm,
    zeros,
)
from ddjax.denoisers.layers.cross import Context, CrossAttention, no_entry
from ddjax.denoisers.layers.selective_scan import Mamba
from ddjax.denoisers.sides import Side
from ddjax.denoisers.token_row import TokenRow
from ddjax.placement import constrain
from ddjax.taps import Below, tap
from ddjax.types import SoftTokens


class StateSpace(TokenRow):
    """DiS (Fei et al. 2024, "Scalable diffusion models with state space backbone", arXiv:2402.05608).

    The label, the time and the patches are tokens in a row, with learned positions. A block is a bidirectional `Mamba`
    behind a norm; those behind the middle are shown what their counterparts before it made. With labels the last norm
    is under adaLN of the sum of the time's and the label's tokens. The output layer starts at zero.

    Args:
        shape, symbols_in, symbols_out, out_channels, patch, embed_width, bits: see `DiT`.
        width: of the tokens, even.
        depth: number of blocks, odd (the authors' code counts all but the middle one).
        state, expand, kernel: see `layers.Mamba`.
        num_classes: labels run over `[0, num_classes)`, and `num_classes` is the null label. 0: no labels, no token.
        vector: numbers of a vector that is a condition, a token more, see `DiT`. 0: none.
        context_width: width of the entries of a sequence that is a condition, see `DiT`: every block attends to them
            behind its state space, with `heads`, which divide width. 0: none.
        image_channels: of an image that is a condition, see `DiT`. 0: none.
        time: False ignores t, and there is no token for it.
        time_mlp: whether two layers follow the sines and cosines of the time.
        dropout: rate on each block's branch, when train=True.
        dtype: compute dtype; parameters, the scan, the sum of the branches and the output stay float32.
        attention: to a sequence: None, "xla" or "cudnn" (`layers.dot_product_attention`).
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
        depth: int,
        state: int = 16,
        expand: int = 2,
        kernel: int = 4,
        num_classes: int = 0,
        vector: int = 0,
        context_width: int = 0,
        heads: int = 8,
        image_channels: int = 0,
        time: bool = True,
        time_mlp: bool = True,
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
        self.dropout = dropout
        block = partial(
            StateSpaceBlock, width, state=state, expand=expand, kernel=kernel, context_width=context_width, heads=heads,
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
            scan=scan,
            remat=remat,
            rngs=rngs,
        )
        self.norm = RMSNorm(width)
        modulation = {"kernel_init": zeros, "dtype": dtype, "rngs": rngs}
        self.modulation = Linear(width, 2 * width, **modulation) if num_classes else None
        out = {"kernel_init": zeros, "dtype": dtype, "out_dtype": at_least_float32(dtype)}
        self.out = Linear(width, self.features_out, **out, rngs=rngs)
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
        (made, total), told = self.body(xt, t, cond, rng=rng, train=train)
        h = layer_norm(self.norm(total + made)[:, self.condition.count :])
        if self.modulation is not None:
            shift, scale = jnp.split(self.modulation(jax.nn.silu(told.sum(axis=1)))[:, None], 2, axis=-1)
            h = h * (1 + scale) + shift
        return self.images(self.out(tap("final", h)))

    def as_side(self, blocks: int | None) -> Side:
        """See `TokenRow`; what blocks make is added to what blocks make."""
        self.norm = self.modulation = self.out = None
        return super().as_side(blocks)

    def body(
        self, xt: Any, t: Any, cond: Any = None, *, rng: Any = None, train: bool = False
    ) -> tuple[tuple[Array, Array], Float[Array, "batch told width"]]:
        """What the last block has made and the total before it, and the tokens of the label and the time."""
        batch = self.check(xt)
        keys = dropout_keys(self.dropout, batch, rng, train)
        given, context = Given.of(cond).attended(self.nothing, batch, self.dtype)
        told, h = self.row(xt, t, given, batch)
        return self.stack((h, jnp.zeros(h.shape, at_least_float32(h.dtype))), context, keys), told


class StateSpaceBlock(nnx.Module):
    """`total += made`, then `made = mamba(norm(total))`: what a block makes is added by the one behind it.

    skips: what was made first takes what a long connection brings, concatenated, by a linear layer.
    context_width, heads: of the sequence to which the tokens attend behind the mixer (`layers.CrossAttention`), which
        then is a part of what the block makes; 0: none.
    """

    def __init__(
        self,
        width: int,
        *,
        skips: bool,
        state: int = 16,
        expand: int = 2,
        kernel: int = 4,
        context_width: int = 0,
        heads: int = 8,
        dropout: float = 0.0,
        dtype: DType = jnp.float32,
        attention: str | None = None,
        rngs: nnx.Rngs,
    ):
        check_rate(dropout)
        self.dropout = dropout
        self.skip = Linear(2 * width, width, dtype=dtype, rngs=rngs) if skips else None
        self.norm = RMSNorm(width)
        self.mixer = Mamba(width, state=state, expand=expand, kernel=kernel, dtype=dtype, rngs=rngs)
        self.cross = (
            CrossAttention(width, context_width, heads, dtype=dtype, implementation=attention, rngs=rngs)
            if context_width
            else None
        )

    def __call__(
        self,
        h: tuple[Float[Array, "batch sites width"], Float[Array, "batch sites width"]],
        skip: Float[Array, "batch sites width"] | None = None,
        context: Context | None = None,
        *,
        keys: Key[Array, " batch"] | None = None,
        name: str | None = None,
    ) -> tuple[tuple[Array, Array], Array]:
        """h: what was made, and the total before it. Returns the same, and what was made. See `layers.LongSkips`."""
        named = Below(name)
        made, total = h
        if self.skip is not None:
            made = self.skip(jnp.concatenate([made, named("/skip", skip)], axis=-1))
        total = constrain(total + made, "batch", "sites", None)
        made = dropout(self.mixer(self.norm(total)), self.dropout, keys)
        if self.cross is not None:
            below = Below(name and f"{name}/cross")
            made = made + below("", self.cross(total + made, context, below))
        made = named("", made)
        return (made, total), made
