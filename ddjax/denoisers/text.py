"""A transformer for token sequences: bidirectional, or in blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from ddjax.denoisers.given import Given
from ddjax.denoisers.layers.basic import DType, Linear, activation_of, dropout_keys
from ddjax.denoisers.layers.blocks import Block, FinalLayer, Stack
from ddjax.denoisers.layers.cross import no_entry
from ddjax.denoisers.layers.embed import TIME_SCALE, Conditioner, TokenEmbed
from ddjax.denoisers.layers.noise import NoiseConditioner
from ddjax.denoisers.layers.routing import Route
from ddjax.denoisers.sides import Side, check_blocks, in_place, keep
from ddjax.denoisers.states import check_state, check_values, hard_state
from ddjax.denoisers.unet_designs import UNET_DESIGNS
from ddjax.denoisers.views import View
from ddjax.placement import constrain
from ddjax.taps import tap
from ddjax.types import SoftTokens

CONDITIONERS = {
    "dit": Conditioner,
    "udlm": partial(Conditioner, each=True),
    "md4": partial(NoiseConditioner, design=UNET_DESIGNS["md4"], time_scale=TIME_SCALE),
}


class TextTransformer(nnx.Module):
    """Transformer with rotary positions and adaLN-zero, for discrete sequences.

    The network of Sahoo et al. 2024 (MDLM) and Shi et al. 2024 (MD4). The latter is `mlp="gated"` with
    `activation="sigmoid"`, `conditioner="md4"` and, of characters, `embed_width` (its RoPE pairs neighbouring features,
    so that columns of its weights stand in another order: `interop`). The output layer starts at zero.

    With `block` it is that of Arriola et al. 2025 (BD3-LM): a site sees its own block and those before it. The same
    parameters are called in two ways. On xt alone, blocks before the one being denoised are clean (sampling:
    `processes.in_blocks`). With `cond={"clean": x0}`, one pass over xt and x0 gives the logits of every block as if
    all blocks before it were clean and it alone were noisy (training: `objectives.teacher_forced`; the bound:
    `likelihood.nelbo` with this `cond`). A timed network is then told that x0 is at t = 0, so on xt alone it needs
    a time for each site, 0 for clean ones.

    With `cond={"groups": (batch, length)}` it goes by these groups of sites in the place of blocks, also beside
    "clean" (`objectives.grouped`), without time. With `cond={"past": (keys, values), "sites": sites}` it runs at these
    sites only and takes the keys and values of the others from the past, each `(batch, depth, length, heads, width /
    heads)`, as an earlier pass had them at the taps `block/i/keys` and `/values` (`solvers.KeyValues`). See
    `views.View`.

    With `cond={"segments": segments, "cond": labels}` a window holds several documents (`data.packing`): integers
    `(batch, length)`, the same at the sites of one document. It says of each what it says of it alone. With `block`
    every document must begin where a block does.

    Args:
        length: the longest sequence; shorter ones are accepted.
        symbols_in: tokens of xt run over `[0, symbols_in)` (`process.num_states`: the mask counts).
        symbols_out: number of logits per site (`process.num_symbols`).
        width, depth, heads: of the transformer; heads divides width, and width / heads is even.
        mlp: "gated" (SwiGLU), "geglu", "gelu", "experts" or "pooled", with options of `layers.Experts` or
            `PooledExperts` in `experts`.
        mlp_width: hidden width (of each expert), default 4 width for "gelu" and, for as many parameters, 8/3 width (to
            a multiple of 8) for gated ones.
        activation: of gates: "silu", "gelu" or "sigmoid".
        kv_heads: of keys and values, each for several heads of queries (`layers.Attention`); default heads.
        embed_width: None embeds straight to `width`; else embeds to this and projects (MD4's outside
            embedding).
        num_classes: labels run over `[0, num_classes)`, and `num_classes` is the null label. 0: no labels.
        vector: numbers of a vector that is a condition, see `DiT`. 0: none.
        context_width: width of the entries of a sequence that is a condition, to which every block attends; see `DiT`.
            0: none.
        time: False ignores t.
        modulated: False for blocks without adaLN: no time, no labels, no vector (RADD, Ou et al. 2025; LLaDA, Nie et
            al. 2025).
        rotary: base of the rotary frequencies.
        norm, epsilon: of `layers.Block`: "plain", "scaled" (MDLM's), "affine" (RADD's) or "rms" (LLaDA's).
        out_bias, head_bias: whether the layer behind each attention, and the output layer, have biases.
        block: sites in a block (the last may be shorter); None: every site sees every site.
        dropout: rate on each branch of each block, when train=True.
        dtype: compute dtype; parameters stay float32, the logits at least float32.
        cond_width: width of the conditioning vector, default `width` (MDLM: 128).
        conditioner: how time and label become this vector: "dit" (`layers.Conditioner`), "udlm" (the same, silu of
            each), or "md4" (`layers.NoiseConditioner`: waves of the time as wide as the vector, the label's row beside
            them, and `activation` behind two layers).
        attention: None, "xla" or "cudnn" (`layers.dot_product_attention`).
        scan, remat, route: see `layers.Stack`.
        rngs: keys of the initial parameters.

    Raises:
        ValueError: for sizes that do not divide or unknown options.
    """

    takes = "texts"

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
        activation: str = "silu",
        kv_heads: int | None = None,
        embed_width: int | None = None,
        num_classes: int = 0,
        vector: int = 0,
        context_width: int = 0,
        time: bool = True,
        modulated: bool = True,
        rotary: float = 1e4,
        norm: str = "plain",
        epsilon: float = 1e-6,
        out_bias: bool = True,
        head_bias: bool = True,
        block: int | None = None,
        dropout: float = 0.0,
        dtype: DType = jnp.float32,
        cond_width: int | None = None,
        conditioner: str = "dit",
        attention: str | None = None,
        route: Route | Sequence[Route] | None = None,
        scan: bool = False,
        remat: bool | str = False,
        rngs: nnx.Rngs,
    ):
        if mlp_width is None:
            mlp_width = 4 * width if mlp == "gelu" else 8 * -(-width // 3)
        if block is not None and block < 1:
            raise ValueError(f"block={block}: expected at least one site, or None for one block")
        if not modulated and (time or num_classes or vector):
            raise ValueError(
                "modulated=False: blocks without adaLN know no time, no labels and no vector: also set time=False"
            )
        cond_width = (cond_width or width) if modulated else 0
        self.block = block
        self.length, self.symbols_in, self.width = length, symbols_in, width
        self.dropout, self.dtype = dropout, jnp.dtype(dtype)
        self.tokens = TokenEmbed(symbols_in, embed_width or width, rngs=rngs)
        self.embed = Linear(embed_width, width, dtype=dtype, rngs=rngs) if embed_width else None
        if conditioner not in CONDITIONERS:
            expected = ", ".join(map(repr, CONDITIONERS))
            raise ValueError(f"conditioner={conditioner!r}: expected one of {expected}")
        make = CONDITIONERS[conditioner]
        told = {"num_classes": num_classes, "time": time, "vector": vector}
        self.condition = make(cond_width, **told, rngs=rngs) if modulated else None
        self.activated = activation_of(activation) if conditioner == "md4" else None
        block = partial(
            Block, width, heads, mlp=mlp, mlp_width=mlp_width, cond_width=cond_width, rotary=rotary,
            out_bias=out_bias, norm=norm, epsilon=epsilon, dropout=dropout, dtype=dtype, attention=attention,
            experts=experts, activation=activation, kv_heads=kv_heads, context_width=context_width,
        )  # fmt: skip
        self.stack = Stack(lambda rngs: block(rngs=rngs), depth, scan=scan, remat=remat, route=route, rngs=rngs)
        self.final = FinalLayer(
            width,
            symbols_out,
            cond_width=cond_width,
            norm=norm,
            epsilon=epsilon,
            bias=head_bias,
            dtype=dtype,
            rngs=rngs,
        )
        # Last, so that a network without it has the initial weights that it had.
        self.nothing = no_entry(context_width, rngs)

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
            cond: labels in `[0, num_classes]`; None is the null label. Or a dict of "clean" (with `block` or groups:
                the clean sequence), "groups", "segments", "past" and "sites" (where to run; a site beyond the sequence
                counts for nothing), of what else it is told (`given.Given`), and labels as "cond".
            rng: one key, or one per example, for dropout and a route; needed when train=True and one is there.
            train: whether dropout acts, and the route.

        Returns:
            Logits, at least float32; 0 at sites where the network did not run.

        Raises:
            ValueError: for a shape or dtype that the network was not built for.
        """
        h, own, view = self.body(xt, t, cond, rng=rng, train=train)
        some = h.shape[1] if view.clean is None else h.shape[1] // 2
        return view.everywhere(self.final(h[:, :some], own), self._sites(xt)[1])

    def as_side(self, blocks: int | None) -> Side:
        """Its first blocks, each added to the trunk's, as of a `DiT`."""
        keep(self.stack, check_blocks(blocks, self.stack.depth))
        self.final = None
        names = [f"block/{i}" for i in range(self.stack.depth)]
        return Side({"embed": (1, self.width)}, in_place(names, self.width))

    def hinted(self, image: Array, xt: Any, cond: Any, channels: int, scale: int) -> dict[str, Array]:
        """What the image says of each site. Raises ValueError where the condition tells of a past."""
        check_values(image, (*self._sites(xt), channels))
        return {"embed": View.of(cond).hint(image)}

    def body(
        self, xt: Any, t: Any, cond: Any = None, *, rng: Any = None, train: bool = False
    ) -> tuple[Float[Array, "batch sites width"], Float[Array, "batch *sites cond"] | None, View]:
        """What leaves the last block, clean sites too, with the vector of the condition and how it was run."""
        view, (batch, length) = View.of(cond), self._sites(xt)
        view.check(xt, 2, self.stack.depth, length, self.condition is not None and self.condition.time)
        groups = view.groups
        if groups is None and self.block is not None:
            groups = jnp.arange(length) // self.block
        layout = view.layout(length, groups)
        some = length if view.sites is None else view.sites.shape[1]
        keys = dropout_keys(self.dropout, batch, rng, train)
        tap("sites", np.arange(length, dtype=np.int32))
        told, context = Given.of(view.cond).attended(self.nothing, batch, self.dtype)
        t = t if t is None or jnp.ndim(t) < 2 else view.at(t)
        if self.condition is None:
            c = own = None
            told.check_taken()
            if told.cond is not None:
                raise ValueError("cond was given but the network has no labels: pass cond=None")
        else:
            c = own = tap("condition", self._condition(batch, t, told, sites=some))
            c = own = constrain(c, "batch", *(None,) * (c.ndim - 1))
        if view.clean is not None and c is not None:
            c = self._with_clean(own, told)
        h = self._embedded(view.seen(xt, view.clean))
        routes = self.stack.route_keys(batch, rng, train)
        return self.stack(h, c, keys, layout, route_keys=routes, context=context, train=train), own, view

    def _sites(self, xt: Any) -> tuple[int, int]:
        """Of a state, how many sequences and how long. Raises ValueError for one that it was not built for."""
        state = hard_state(xt, 2, self.symbols_in)
        length = min(state.shape[1], self.length) if state.ndim == 2 else self.length
        check_state(state, (("length",), (length,)), self.symbols_in)
        return state.shape

    def _embedded(self, seen: Any) -> Float[Array, "batch sites width"]:
        one_channel = jax.tree.map(lambda v: jnp.expand_dims(v, 2), seen)
        h = self.tokens(one_channel)[:, :, 0].astype(self.dtype)
        return tap("embed", h if self.embed is None else self.embed(h))

    def _condition(self, *told: Any, **more: Any) -> Float[Array, "batch *sites cond"]:
        c = self.condition(*told, **more)
        return c if self.activated is None else self.activated(c)

    def _with_clean(self, c: Array, told: Given) -> Array:
        """The conditioning vectors of the noisy sequence and of the clean one, which is at t = 0."""
        if not self.condition.time:
            return c  # one vector serves both
        clean = self._condition(c.shape[0], jnp.zeros(()), told)[:, None]
        c = c[:, None] if c.ndim == 2 else c
        return jnp.concatenate([c, jnp.broadcast_to(clean, c.shape)], axis=1)
