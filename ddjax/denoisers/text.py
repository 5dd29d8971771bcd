"""A bidirectional transformer for token sequences."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from ddjax.denoisers.dit import check_state, hard_state
from ddjax.denoisers.layers.basic import DType, Linear, dropout_keys
from ddjax.denoisers.layers.blocks import Block, FinalLayer, Stack
from ddjax.denoisers.layers.embed import Conditioner, TokenEmbed
from ddjax.denoisers.taps import tap
from ddjax.types import SoftTokens


class TextTransformer(nnx.Module):
    """Bidirectional transformer with rotary positions and adaLN-zero, for discrete sequences.

    The network of Sahoo et al. 2024 (MDLM) and Shi et al. 2024 (MD4); with `mlp="gated"` and `embed_width`
    close to the latter (silu for its sigmoid gates, half-split for its interleaved RoPE). The output layer
    starts at zero.

    Args:
        length: the longest sequence; shorter ones are accepted.
        symbols_in: tokens of xt run over `[0, symbols_in)` (`process.num_states`: the mask counts).
        symbols_out: number of logits per site (`process.num_symbols`).
        width, depth, heads: of the transformer; heads divides width, and width / heads is even.
        mlp: "gated" (SwiGLU) or "gelu".
        mlp_width: hidden width, default 4 width for "gelu" and, for as many parameters, 8/3 width (to a
            multiple of 8) for "gated".
        embed_width: None embeds straight to `width`; else embeds to this and projects (MD4's outside
            embedding).
        num_classes: labels run over `[0, num_classes)`, and `num_classes` is the null label. 0: no labels.
        time: False ignores t.
        dropout: rate on each branch of each block, when train=True.
        dtype: compute dtype; parameters and the logits stay float32.
        cond_width: width of the conditioning vector, default `width` (MDLM: 128).
        attention: None, "xla" or "cudnn" (`layers.dot_product_attention`).
        scan, remat: see `layers.Stack`.
        rngs: keys of the initial parameters.

    Raises:
        ValueError: for sizes that do not divide or unknown options.
    """

    def __init__(
        self,
        *,
        length: int,
        symbols_in: int,
        symbols_out: int,
        width: int,
        depth: int,
        heads: int,
        mlp: str = "gated",
        mlp_width: int | None = None,
        embed_width: int | None = None,
        num_classes: int = 0,
        time: bool = True,
        dropout: float = 0.0,
        dtype: DType = jnp.float32,
        cond_width: int | None = None,
        attention: str | None = None,
        scan: bool = False,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        if mlp_width is None:
            mlp_width = 4 * width if mlp == "gelu" else 8 * -(-width // 3)
        cond_width = cond_width or width
        self.length, self.symbols_in = length, symbols_in
        self.dropout, self.dtype = dropout, jnp.dtype(dtype)
        self.tokens = TokenEmbed(symbols_in, embed_width or width, rngs=rngs)
        self.embed = Linear(embed_width, width, dtype=dtype, rngs=rngs) if embed_width else None
        self.condition = Conditioner(cond_width, num_classes=num_classes, time=time, rngs=rngs)
        block = partial(
            Block, width, heads, mlp=mlp, mlp_width=mlp_width, cond_width=cond_width, rotary=True,
            dropout=dropout, dtype=dtype, attention=attention,
        )  # fmt: skip
        self.stack = Stack(lambda rngs: block(rngs=rngs), depth, scan=scan, remat=remat, rngs=rngs)
        self.final = FinalLayer(width, symbols_out, cond_width=cond_width, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        xt: Int[Array, "batch length"] | Float[Array, "batch length symbols_in"] | SoftTokens,
        t: Float[Array, " batch"] | Float[Array, ""] | None,
        cond: Int[Array, " batch"] | None = None,
        *,
        rng: Key[Array, ""] | Key[Array, " batch"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch length symbols_out"]:
        """Run the network.

        Args:
            xt: the state; a token outside `[0, symbols_in)` makes the example's output NaN. Or soft tokens,
                embedded by their expectation: probabilities over the symbols, or `SoftTokens`.
            t: time in [0, 1].
            cond: labels in `[0, num_classes]`; None is the null label.
            rng: one key, or one per example, for dropout; needed when train=True and dropout > 0.
            train: whether dropout acts.

        Returns:
            float32 logits.

        Raises:
            ValueError: for a shape or dtype that the network was not built for.
        """
        state = hard_state(xt, 2, self.symbols_in)
        length = min(state.shape[1], self.length) if state.ndim == 2 else self.length
        check_state(state, (("length",), (length,)), self.symbols_in)
        batch = state.shape[0]
        keys = dropout_keys(self.dropout, batch, rng, train)
        c = tap("condition", self.condition(batch, t, cond))
        one_channel = jax.tree.map(lambda v: jnp.expand_dims(v, 2), xt)
        h = self.tokens(one_channel)[:, :, 0].astype(self.dtype)
        h = tap("embed", h if self.embed is None else self.embed(h))
        return self.final(self.stack(h, c, keys), c)
