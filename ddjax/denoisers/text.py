"""A transformer for token sequences: bidirectional, or in blocks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from ddjax.denoisers.dit import check_state, hard_state
from ddjax.denoisers.layers.attention import Layout, Past, block_causal, block_teacher_forced
from ddjax.denoisers.layers.basic import DType, Linear, dropout_keys
from ddjax.denoisers.layers.blocks import Block, FinalLayer, Stack
from ddjax.denoisers.layers.embed import Conditioner, TokenEmbed
from ddjax.denoisers.taps import tap
from ddjax.placement import constrain
from ddjax.types import SoftTokens


class TextTransformer(nnx.Module):
    """Transformer with rotary positions and adaLN-zero, for discrete sequences.

    The network of Sahoo et al. 2024 (MDLM) and Shi et al. 2024 (MD4); with `mlp="gated"` and `embed_width`
    close to the latter (silu for its sigmoid gates, half-split for its interleaved RoPE). The output layer
    starts at zero.

    With `block` it is that of Arriola et al. 2025 (BD3-LM): a site sees its own block and those before it. The same
    parameters are called in two ways. On xt alone, blocks before the one being denoised are clean (sampling:
    `processes.in_blocks`). With `cond={"clean": x0}`, one pass over xt and x0 gives the logits of every block as if
    all blocks before it were clean and it alone were noisy (training: `objectives.teacher_forced`; the bound:
    `likelihood.nelbo` with this `cond`). A timed network is then told that x0 is at t = 0, so on xt alone it needs
    a time for each site, 0 for clean ones.

    With `cond={"past": (keys, values), "sites": sites}` it runs at these sites only and takes the keys and values of
    the others from the past, each `(batch, depth, length, heads, width / heads)`, as an earlier pass had them at the
    taps `block/i/keys` and `/values` (`solvers.KeyValues`).

    Args:
        length: the longest sequence; shorter ones are accepted.
        symbols_in: tokens of xt run over `[0, symbols_in)` (`process.num_states`: the mask counts).
        symbols_out: number of logits per site (`process.num_symbols`).
        width, depth, heads: of the transformer; heads divides width, and width / heads is even.
        mlp: "gated" (SwiGLU), "gelu", or "experts", with options of `layers.Experts` in `experts`.
        mlp_width: hidden width (of each expert), default 4 width for "gelu" and, for as many parameters, 8/3 width (to
            a multiple of 8) for gated ones.
        embed_width: None embeds straight to `width`; else embeds to this and projects (MD4's outside
            embedding).
        num_classes: labels run over `[0, num_classes)`, and `num_classes` is the null label. 0: no labels.
        time: False ignores t.
        block: sites in a block (the last may be shorter); None: every site sees every site.
        dropout: rate on each branch of each block, when train=True.
        dtype: compute dtype; parameters stay float32, the logits at least float32.
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
        experts: Mapping[str, Any] | None = None,
        embed_width: int | None = None,
        num_classes: int = 0,
        time: bool = True,
        block: int | None = None,
        dropout: float = 0.0,
        dtype: DType = jnp.float32,
        cond_width: int | None = None,
        attention: str | None = None,
        scan: bool = False,
        remat: bool | str = False,
        rngs: nnx.Rngs,
    ):
        if mlp_width is None:
            mlp_width = 4 * width if mlp == "gelu" else 8 * -(-width // 3)
        if block is not None and block < 1:
            raise ValueError(f"block={block}: expected at least one site, or None for one block")
        cond_width = cond_width or width
        self.block = block
        self.length, self.symbols_in = length, symbols_in
        self.dropout, self.dtype = dropout, jnp.dtype(dtype)
        self.tokens = TokenEmbed(symbols_in, embed_width or width, rngs=rngs)
        self.embed = Linear(embed_width, width, dtype=dtype, rngs=rngs) if embed_width else None
        self.condition = Conditioner(cond_width, num_classes=num_classes, time=time, rngs=rngs)
        block = partial(
            Block, width, heads, mlp=mlp, mlp_width=mlp_width, cond_width=cond_width, rotary=True,
            dropout=dropout, dtype=dtype, attention=attention, experts=experts,
        )  # fmt: skip
        self.stack = Stack(lambda rngs: block(rngs=rngs), depth, scan=scan, remat=remat, rngs=rngs)
        self.final = FinalLayer(width, symbols_out, cond_width=cond_width, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        xt: Int[Array, "batch length"] | Float[Array, "batch length symbols_in"] | SoftTokens,
        t: Float[Array, " batch"] | Float[Array, ""] | Float[Array, "batch length"] | None,
        cond: Int[Array, " batch"] | Mapping[str, Any] | None = None,
        *,
        rng: Key[Array, ""] | Key[Array, " batch"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch length symbols_out"]:
        """Run the network.

        Args:
            xt: the state; a token outside `[0, symbols_in)` makes the example's output NaN. Or soft tokens,
                embedded by their expectation: probabilities over the symbols, or `SoftTokens`.
            t: time in [0, 1], of each example or of each site.
            cond: labels in `[0, num_classes]`; None is the null label. With `block` also
                `{"clean": x0, "cond": labels}` (without "cond" for None), x0 being the clean sequence. Or
                `{"past": (keys, values), "sites": (batch, some), "cond": labels}`: where to run; a site beyond the
                sequence counts for nothing.
            rng: one key, or one per example, for dropout; needed when train=True and dropout > 0.
            train: whether dropout acts.

        Returns:
            Logits, at least float32; 0 at sites where the network did not run.

        Raises:
            ValueError: for a shape or dtype that the network was not built for.
        """
        if isinstance(cond, Mapping) and "past" in cond:
            return self._at_sites(xt, t, **cond)
        state = hard_state(xt, 2, self.symbols_in)
        length = min(state.shape[1], self.length) if state.ndim == 2 else self.length
        check_state(state, (("length",), (length,)), self.symbols_in)
        batch, clean = state.shape[0], None
        if isinstance(cond, Mapping) and "clean" in cond:
            clean, cond = cond["clean"], cond.get("cond")
            self._check_clean(clean, xt)
        keys = dropout_keys(self.dropout, batch, rng, train)
        c = own = tap("condition", self.condition(batch, t, cond, sites=length))
        c = own = constrain(c, "batch", *(None,) * (c.ndim - 1))
        if clean is not None:
            layout, seen = block_teacher_forced(length, self.block), jnp.concatenate([xt, clean], axis=1)
            c = self._with_clean(own, cond)
        else:
            layout, seen = None if self.block is None else block_causal(length, self.block), xt
        return self.final(self.stack(self._embedded(seen), c, keys, layout)[:, :length], own)

    def _embedded(self, seen: Any) -> Float[Array, "batch sites width"]:
        one_channel = jax.tree.map(lambda v: jnp.expand_dims(v, 2), seen)
        h = self.tokens(one_channel)[:, :, 0].astype(self.dtype)
        return tap("embed", h if self.embed is None else self.embed(h))

    def _at_sites(self, xt: Any, t: Any, past: Past, sites: Int[Array, "batch some"], cond: Any = None) -> Array:
        """Logits at some sites, the keys and values of the others being given."""
        if isinstance(xt, SoftTokens) or xt.ndim != 2:
            raise ValueError("soft tokens cannot be run at some sites only: give hard ones, or no past")
        check_state(xt, (("length",), (min(xt.shape[1], self.length),)), self.symbols_in)
        batch, length = xt.shape
        expected = (batch, self.stack.depth, length)
        if any(v.shape[:3] != expected for v in past) or sites.shape[:1] != (batch,):
            raise ValueError(
                f'cond["past"] has keys of shape {past[0].shape} and cond["sites"] has shape {sites.shape}; expected '
                f"{expected} and two axes more, and ({batch}, some)"
            )
        at = partial(jnp.take_along_axis, indices=sites, axis=1, mode="clip")
        c = tap("condition", self.condition(batch, at(t) if jnp.ndim(t) > 1 else t, cond, sites=sites.shape[1]))
        everywhere, queries = jnp.arange(length), sites[:, :, None]
        own = queries == everywhere  # where each site is, `(batch, some, length)`
        inside = (sites < length)[:, None]
        # A site that is run again shows its new keys, not those of the past.
        keys = jnp.concatenate([jnp.broadcast_to(everywhere, xt.shape), sites], axis=1)
        mask = jnp.concatenate([~own.any(axis=1)[:, None], inside], axis=2)
        mask = mask if self.block is None else mask & (queries // self.block >= keys[:, None] // self.block)
        layout = Layout(sites, jnp.broadcast_to(mask, (*sites.shape, length + sites.shape[1])), past)
        out = self.final(self.stack(self._embedded(at(xt)), c, None, layout), c)
        out = jnp.take_along_axis(out, own.argmax(axis=1)[..., None], axis=1)
        return jnp.where(own.any(axis=1)[..., None], out, 0.0)

    def _with_clean(self, c: Array, cond: Array | None) -> Array:
        """The conditioning vectors of the noisy sequence and of the clean one, which is at t = 0."""
        if not self.condition.time:
            return c  # one vector serves both
        clean = self.condition(c.shape[0], jnp.zeros(()), cond)[:, None]
        c = c[:, None] if c.ndim == 2 else c
        return jnp.concatenate([c, jnp.broadcast_to(clean, c.shape)], axis=1)

    def _check_clean(self, clean: Array, xt: Array) -> None:
        if self.block is None:
            raise ValueError('cond has a "clean" sequence but the network sees all of xt: build it with block=...')
        if isinstance(xt, SoftTokens) or xt.ndim != 2:
            raise ValueError("soft tokens have no teacher-forced pass: give hard ones, or no clean sequence")
        if clean.shape != xt.shape or not jnp.issubdtype(clean.dtype, jnp.integer):
            raise ValueError(
                f'cond["clean"] has shape {clean.shape}, {clean.dtype}; expected the clean tokens of xt, {xt.shape}'
            )
