"""A side network that is shown an image and steers a trained network (ControlNet)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Key

from ddjax import taps
from ddjax.denoisers.dit import DiT
from ddjax.denoisers.functional import functional_init
from ddjax.denoisers.given import Given
from ddjax.denoisers.layers.basic import Linear, zeros
from ddjax.denoisers.views import View
from ddjax.lora import beside
from ddjax.types import Apply, Params


class Controlled(nnx.Module):
    """A trunk and, beside its first blocks, a copy of them that is also shown an image.

    (Zhang et al. 2023, ControlNet; for transformers Chen et al. 2024, PixArt-delta, section 3.3.) The image's patches,
    through a linear layer that starts at zero, are added to what enters the copy; what leaves each of its blocks,
    through another such layer, is added to what leaves the trunk's block. So a new one is the trunk, bit for bit.

    `cond = {"image": (batch, *sites, channels), ...}`, the rest as for the trunk; without an image it is the trunk.
    The trunk's blocks are reached through their taps, so that none of them is rematerialised.
    """

    def __init__(self, make: Callable[[nnx.Rngs], DiT], *, blocks: int, channels: int, rngs: nnx.Rngs):
        self.trunk, self.side = make(rngs), make(rngs)
        if self.trunk.stack.scan or self.trunk.image_channels:
            raise ValueError(
                "a trunk must be built with scan=False (`unstack_blocks` turns its parameters), and must not be shown "
                "an image itself"
            )
        if not 1 <= blocks <= self.trunk.stack.depth:
            raise ValueError(f"blocks={blocks}: expected from 1 to the trunk's {self.trunk.stack.depth}")
        del self.side.final
        self.side.stack.blocks = nnx.List(list(self.side.stack.blocks)[:blocks])
        self.side.stack.depth, self.channels = blocks, channels
        width, dtype = self.trunk.width, self.trunk.dtype
        features = channels * self.trunk.patch ** len(self.trunk.grid)
        self.hint = Linear(features, width, kernel_init=zeros, dtype=dtype, rngs=rngs)
        self.out = nnx.List([Linear(width, width, kernel_init=zeros, dtype=dtype, rngs=rngs) for _ in range(blocks)])

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
        hint = self.hint(self.trunk.beside(image, self.trunk.check(xt), self.channels))
        names = [f"block/{i}" for i in range(len(self.out))]
        # Listeners outside hear the trunk.
        with taps.unheard(), taps.override({"embed": lambda h: h + hint}), taps.record(*names) as seen:
            self.side.hidden(xt, t, rest, rng=rng, train=train)
        added = {name: out(seen[name]) for name, out in zip(names, self.out, strict=True)}
        with taps.override({name: lambda h, more=more: h + more for name, more in added.items()}):
            return self.trunk(xt, t, rest, rng=rng, train=train)


def attach(
    make: Callable[[nnx.Rngs], DiT], params: Params, *, blocks: int, channels: int, key: Key[Array, ""]
) -> tuple[Apply, Params]:
    """A trained `DiT` with a new side network: `(apply, side)`, `apply(side, xt, t, cond)`, the trunk held as it is.

    make, params: how the trunk was built (`functional_init`), and what it has learned. blocks: of the side network, a
    copy of the trunk's first. channels: of the image.
    """
    init, apply = functional_init(lambda rngs: Controlled(make, blocks=blocks, channels=channels, rngs=rngs))
    new = init(key)
    copied = {name: value for name, value in params.items() if name in new["side"]}
    first = {str(i): params["stack"]["blocks"][str(i)] for i in range(blocks)}
    copied = jax.tree.map(lambda x: x, {**copied, "stack": {"blocks": first}})
    return beside(apply, params, _with_trunk), {"side": copied, "hint": new["hint"], "out": new["out"]}


def _with_trunk(trunk: Params, side: Params) -> Params:
    return {"trunk": trunk, **side}
