"""A side network that is shown an image and steers a trained network (ControlNet)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from ddjax import taps
from ddjax.denoisers.dit import DiT
from ddjax.denoisers.functional import functional_init
from ddjax.denoisers.given import Given
from ddjax.denoisers.layers.basic import DType, Linear, zeros
from ddjax.denoisers.layers.convolution import Conv, Image
from ddjax.denoisers.u_shaped import UShaped
from ddjax.denoisers.views import View
from ddjax.lora import beside
from ddjax.types import Apply, Params

ENDS = ("final", "gain", "uncertainty")  # of networks, behind the last block: a copy goes without


class Controlled(nnx.Module):
    """A trunk and, beside its first blocks, a copy of them that is also shown an image.

    (Zhang et al. 2023, ControlNet; for transformers Chen et al. 2024, PixArt-delta, section 3.3.) What is made of the
    image, behind a layer that starts at zero, is added to what enters the copy's blocks; what the copy makes, through
    other such layers, is added in the trunk. So a new one is the trunk, bit for bit.

    Of a `UShaped` network the copy is the way down and the middle; it adds to the trunk's skip connections and to what
    leaves the middle. Of a `DiT` it is the first `blocks`; what leaves each is added to what leaves the trunk's.

    `cond = {"image": ..., ...}`, the rest as for the trunk; without an image it is the trunk.
    The trunk's blocks are reached through their taps, so that none of a DiT is rematerialised.
    """

    def __init__(
        self,
        make: Callable[[nnx.Rngs], DiT | UShaped],
        *,
        blocks: int | None,
        channels: int,
        stem: Sequence[int],
        rngs: nnx.Rngs,
    ):
        self.trunk, self.side, self.channels = make(rngs), make(rngs), channels
        u_shaped, dtype = isinstance(self.trunk, UShaped), self.trunk.dtype
        if (self.trunk if u_shaped else self.trunk.stack).scan or self.trunk.image_channels:
            raise ValueError(
                "a trunk must be built with scan=False (`unstack_blocks` turns its parameters), and must not be shown "
                "an image itself"
            )
        points = self.side.without_way_up() if u_shaped else _first(self.side, blocks)
        if u_shaped and blocks is not None:
            raise ValueError(f"blocks={blocks}: of a U-shaped network all on the way down are copied: leave it out")
        for name in ENDS:
            if hasattr(self.side, name):
                setattr(self.side, name, None)
        self.points, self.scale = tuple(points), 2 ** (len(stem) - 1) if u_shaped else 1
        features = channels * self.trunk.patch ** len(self.trunk.grid)
        self.hint = (
            Stem(channels, stem, self.trunk.stages[0][0].features_in, dtype=dtype, rngs=rngs)
            if u_shaped
            else Linear(features, self.trunk.width, kernel_init=zeros, dtype=dtype, rngs=rngs)
        )
        self.out = nnx.List([Linear(w, w, kernel_init=zeros, dtype=dtype, rngs=rngs) for w in points.values()])

    def __call__(
        self,
        xt: Any,
        t: Array | None,
        cond: Any = None,
        *,
        rng: Key[Array, ""] | Key[Array, " batch"] | None = None,
        train: bool = False,
    ) -> Array:
        """Run both. Raises ValueError for an image that does not fit, or what a trunk would not take."""
        view = View.of(cond)
        if any(getattr(view, name) is not None for name in View._fields[1:]):
            raise ValueError("a controlled network runs whole: its condition says nothing of groups or of a past")
        given = Given.of(cond)
        image, rest = given.image, {n: v for n, v in given.without("image")._asdict().items() if v is not None}
        rest = rest.get("cond") if rest.keys() <= {"cond"} else {"cond": None, **rest}
        if image is None:
            return self.trunk(xt, t, rest, rng=rng, train=train)
        hint = self._hint(image, self.trunk.check(xt))
        # Listeners outside hear the trunk.
        with taps.unheard(), taps.override({"embed": lambda h: h + hint}), taps.record(*self.points) as seen:
            self.side.hidden(xt, t, rest, rng=rng, train=train)
        added = {name: out(seen[name]) for name, out in zip(self.points, self.out, strict=True)}
        with taps.override({name: lambda h, more=more: h + more for name, more in added.items()}):
            return self.trunk(xt, t, rest, rng=rng, train=train)

    def _hint(self, image: Array, batch: int) -> Array:
        """What is added to what enters the copy's blocks."""
        if not isinstance(self.hint, Stem):
            return self.hint(self.trunk.beside(image, batch, self.channels))
        expected = (batch, *(self.scale * side for side in self.trunk.shape[:-1]), self.channels)
        if image.shape != expected:
            raise ValueError(f'cond["image"] has shape {image.shape}; expected {expected}')
        return self.hint(image)


class Stem(nnx.Module):
    """An image as features: 3 x 3 convolutions with silu behind each, and one that starts at zero.

    widths: of the convolutions; between one and the next are one more of the former, and half as many rows and columns.
        (16, 32, 96, 256) is that of Zhang et al. 2023, for latents an eighth as high as the image.
    """

    def __init__(self, channels: int, widths: Sequence[int], features: int, *, dtype: DType, rngs: nnx.Rngs):
        cast = {"dtype": dtype, "rngs": rngs}
        self.convs = nnx.List([Conv(channels, widths[0], **cast)])
        for a, b in pairwise(widths):
            self.convs.extend([Conv(a, a, **cast), Conv(a, b, stride=2, **cast)])
        self.out = Conv(widths[-1], features, kernel_init=zeros, **cast)

    def __call__(self, x: Image) -> Image:
        """Of the image."""
        for conv in self.convs:
            x = jax.nn.silu(conv(x))
        return self.out(x)


def attach(
    make: Callable[[nnx.Rngs], DiT | UShaped],
    params: Params,
    *,
    blocks: int | None = None,
    channels: int,
    stem: Sequence[int] = (16,),
    key: Key[Array, ""],
) -> tuple[Apply, Params]:
    """A trained network with a new side network: `(apply, side)`, `apply(side, xt, t, cond)`, the trunk held as it is.

    make, params: how the trunk was built (`functional_init`), a `DiT`, `UNet`, `EDM2` or `DiffiT`, and what it has
        learned.
    blocks: of the side network of a DiT, a copy of the trunk's first. channels: of the image.
    stem: of a U-shaped network, `Stem`'s widths: the image is as large as the state, and twice so for each width more.
    Raises ValueError for a trunk that is scanned or shown images itself, or blocks that it has not.
    """
    options = {"blocks": blocks, "channels": channels, "stem": tuple(stem)}
    init, apply = functional_init(lambda rngs: Controlled(make, **options, rngs=rngs))
    copied = _like(jax.eval_shape(init, key)["side"], params)
    # In one program nothing is made of what is not asked for.
    new = jax.jit(lambda key: {name: init(key)[name] for name in ("hint", "out")})(key)
    return beside(apply, params, _with_trunk), {"side": copied, **new}


def _first(side: DiT, blocks: int | None) -> dict[str, int]:
    """Leave all blocks but the first out. The taps of these, and the features of each."""
    if blocks is None or not 1 <= blocks <= side.stack.depth:
        raise ValueError(f"blocks={blocks}: expected from 1 to the trunk's {side.stack.depth}")
    side.stack.blocks = nnx.List(list(side.stack.blocks)[:blocks])
    side.stack.depth = blocks
    return {f"block/{i}": side.width for i in range(blocks)}


def _like(new: Params, params: Params) -> Params:
    """Those of the parameters that a new network has, as arrays of their own."""
    return {
        name: _like(value, params[name]) if isinstance(value, Mapping) else jnp.array(params[name])
        for name, value in new.items()
    }


def _with_trunk(trunk: Params, side: Params) -> Params:
    return {"trunk": trunk, **side}
