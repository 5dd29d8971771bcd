"""DiffuSSM: a network of images without attention, of long convolutions within hourglasses of dense layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from ddjax.denoisers.given import Given
from ddjax.denoisers.images import ImageNetwork
from ddjax.denoisers.layers.basic import DType, Linear, check_rate, dropout, dropout_keys, modulate, zeros
from ddjax.denoisers.layers.blocks import FinalLayer, Stack
from ddjax.denoisers.layers.cross import Context, CrossAttention, no_entry
from ddjax.denoisers.layers.diagonal_ssm import DiagonalSSM
from ddjax.denoisers.layers.embed import Conditioner, sincos
from ddjax.denoisers.layers.long_skips import run_blocks
from ddjax.denoisers.sides import Side, check_blocks, in_place, keep
from ddjax.placement import constrain
from ddjax.taps import Below, tap
from ddjax.types import SoftTokens


class DiffuSSM(ImageNetwork):
    """DiffuSSM (Yan et al. 2024, "Diffusion models without attention", arXiv:2311.18257).

    The pixels are a sequence, row by row, of which `ratio` neighbours make one site. A block (`Hourglass`) spreads its
    sites out again to the whole sequence for a state space in both directions, and its dense layers work on sites. The
    condition scales and shifts what enters a block. The output layer starts at zero.

    Args:
        shape, symbols_in, symbols_out, out_channels, patch, embed_width, bits: see `DiT` (theirs: patches of 1).
        width: of a site.
        depth: number of blocks.
        ratio: of the lengths of the whole sequence and of the sites, divides both 2 width and the number of patches.
        state: numbers of each feature's state (`layers.DiagonalSSM`).
        num_classes: labels run over `[0, num_classes)`, and `num_classes` is the null label. 0: no labels.
        vector, image_channels: of these conditions, see `DiT`. 0: none.
        context_width: width of the entries of a sequence that is a condition, see `DiT`: every block attends to them
            behind its state space, with `heads`, which divide width. 0: none.
        time: False ignores t.
        dropout: rate on each block's branch, when train=True.
        dtype: compute dtype; parameters, the state spaces and the output stay float32.
        attention: to a sequence: None, "xla" or "cudnn" (`layers.dot_product_attention`).
        scan, remat: see `layers.Stack`.
        rngs: keys of the initial parameters.

    Raises:
        ValueError: for sizes that do not divide, or options of the wrong state space.
    """

    def __init__(
        self,
        *,
        shape: tuple[int, ...],
        symbols_in: int | None = None,
        symbols_out: int | None = None,
        out_channels: int | None = None,
        patch: int = 1,
        width: int,
        depth: int,
        ratio: int = 2,
        state: int = 64,
        num_classes: int = 0,
        vector: int = 0,
        context_width: int = 0,
        heads: int = 8,
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
            shape=shape, symbols_in=symbols_in, symbols_out=symbols_out, out_channels=out_channels, patch=patch,
            width=width, embed_width=embed_width, bits=bits, image_channels=image_channels, dtype=dtype, rngs=rngs,
        )  # fmt: skip
        patches = math.prod(self.grid)
        if ratio < 1 or patches % ratio or 2 * width % ratio:
            raise ValueError(f"ratio={ratio}: expected a divisor of {patches} patches and of 2 width = {2 * width}")
        self.dropout, self.ratio = dropout, ratio
        self.embed = Linear(ratio * self.features_in, width, dtype=dtype, rngs=rngs)
        self.position = nnx.Param(jnp.asarray(sincos((patches // ratio,), width)))
        self.condition = Conditioner(width, num_classes=num_classes, time=time, vector=vector, rngs=rngs)
        block = partial(
            HourglassBlock, width, ratio=ratio, state=state, context_width=context_width, heads=heads, dropout=dropout,
            dtype=dtype, attention=attention,
        )  # fmt: skip
        self.stack = Stack(lambda rngs: block(rngs=rngs), depth, scan=scan, remat=remat, rngs=rngs)
        self.final = FinalLayer(width, ratio * self.features_out, cond_width=width, dtype=dtype, rngs=rngs)
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
        h, c = self.body(xt, t, cond, rng=rng, train=train)
        return self.images(self.final(h, c).reshape(len(h), -1, self.features_out))

    def as_side(self, blocks: int | None) -> Side:
        """Its first blocks, each added to the trunk's, as of a `DiT`."""
        keep(self.stack, check_blocks(blocks, self.stack.depth))
        self.final, width = None, self.position.shape[-1]
        names = [f"block/{i}" for i in range(self.stack.depth)]
        return Side({"embed": (self.ratio * self.patch ** len(self.grid), width)}, in_place(names, width))

    def hinted(self, image: Array, xt: Any, cond: Any, channels: int, scale: int) -> dict[str, Array]:
        """What stands in the patches of each site."""
        x = super().hinted(image, xt, cond, channels, scale)["embed"]
        return {"embed": x.reshape(len(x), x.shape[1] // self.ratio, -1)}

    def body(
        self, xt: Any, t: Any, cond: Any = None, *, rng: Any = None, train: bool = False
    ) -> tuple[Float[Array, "batch sites width"], Float[Array, "batch width"]]:
        """What leaves the last block, and the vector of the condition. Arguments as above."""
        batch = self.check(xt)
        keys = dropout_keys(self.dropout, batch, rng, train)
        told, context = Given.of(cond).attended(self.nothing, batch, self.dtype)
        x, told = self.seen(xt, told)
        c = constrain(tap("condition", self.condition(batch, t, told)), "batch", None)
        c = jnp.broadcast_to(c, (batch, c.shape[-1]))
        tap("sites", self.places() // self.ratio)
        h = self.embed(x.reshape(batch, x.shape[1] // self.ratio, -1))
        h = tap("embed", h + self.position[...].astype(h.dtype))
        return run_blocks(self.stack, h, (c, context), keys)[0], c


class HourglassBlock(nnx.Module):
    """`h + hourglass(norm(h) (1 + scale) + shift)`, scale and shift of the condition, starting at zero.

    context_width, heads: of the sequence to which sites attend behind that (`layers.CrossAttention`); 0: none.
    """

    def __init__(
        self,
        width: int,
        *,
        ratio: int,
        state: int = 64,
        context_width: int = 0,
        heads: int = 8,
        dropout: float = 0.0,
        dtype: DType = jnp.float32,
        attention: str | None = None,
        rngs: nnx.Rngs,
    ):
        check_rate(dropout)
        self.dropout = dropout
        self.hourglass = Hourglass(width, ratio=ratio, state=state, dtype=dtype, rngs=rngs)
        self.modulation = Linear(width, 2 * width, kernel_init=zeros, dtype=dtype, rngs=rngs)
        self.cross = (
            CrossAttention(width, context_width, heads, dtype=dtype, implementation=attention, rngs=rngs)
            if context_width
            else None
        )

    def __call__(
        self,
        h: Float[Array, "batch sites width"],
        skip: None,
        told: tuple[Float[Array, "batch width"], Context | None],
        *,
        keys: Key[Array, " batch"] | None = None,
        name: str | None = None,
    ) -> tuple[Array, None]:
        """The next features, and nothing for a long connection. See `layers.LongSkips`.

        told: the vector of the condition, and the sequence.
        """
        (c, context), named = told, Below(name)
        h = constrain(h, "batch", "sites", None)
        shift, scale = jnp.split(self.modulation(c), 2, axis=-1)
        y = named("/hourglass", self.hourglass(modulate(h, shift, scale), named))
        h = constrain(h + dropout(y, self.dropout, keys), "batch", "sites", None)
        return named("", h if self.cross is None else self.cross.added(h, context, name)), None


class Hourglass(nnx.Module):
    """The gated state space of Yan et al. 2024, section 3.2.

    Of sites I_j, with sigma a GELU, `ratio` = M places l = M j + k of the sequence for each site:
    U_l = sigma(up_k(sigma(inner(I_j)))); Y_l is what two `DiagonalSSM`, onward and backward, make of U, side by side;
    I'_j holds sigma(down_k(Y_l)) for all k, side by side; and O_j = outer(sigma(mixed(I'_j)) sigma(gate(I_j))).
    """

    def __init__(self, width: int, *, ratio: int, state: int = 64, dtype: DType = jnp.float32, rngs: nnx.Rngs):
        self.ratio = ratio
        linear = partial(Linear, dtype=dtype, rngs=rngs)
        self.inner = linear(width, width)
        self.up = linear(width, ratio * width)
        self.onward, self.backward = (DiagonalSSM(width, state=state, rngs=rngs) for _ in range(2))
        # One layer for each place of a site.
        share = 2 * width // ratio
        bound = (6 / (2 * width + share)) ** 0.5
        kernels = jax.random.uniform(rngs.params(), (ratio, 2 * width, share), jnp.float32, -bound, bound)
        self.down, self.down_bias = nnx.Param(kernels), nnx.Param(jnp.zeros((2 * width,), jnp.float32))
        self.gate, self.mixed = linear(width, 2 * width), linear(2 * width, 2 * width)
        self.outer = linear(2 * width, width)

    def __call__(
        self, x: Float[Array, "batch sites width"], named: Below = Below()
    ) -> Float[Array, "batch sites width"]:
        """What the sites tell each other, and what each makes of it."""
        batch, sites, width = x.shape
        sigma = partial(jax.nn.gelu, approximate=False)
        u = sigma(self.up(sigma(self.inner(x)))).reshape(batch, sites * self.ratio, width)
        u = constrain(u, "batch", None, "hidden")
        y = jnp.concatenate([self.onward(u), self.backward(u[:, ::-1])[:, ::-1]], axis=-1)
        y = named("/state", y).astype(u.dtype).reshape(batch, sites, self.ratio, 2 * width)
        down = jnp.einsum("bsrf,rfo->bsro", y, self.down[...].astype(u.dtype), preferred_element_type=u.dtype)
        down = sigma(down.reshape(batch, sites, 2 * width) + self.down_bias[...].astype(u.dtype))
        return self.outer(sigma(self.mixed(down)) * sigma(self.gate(x)))
