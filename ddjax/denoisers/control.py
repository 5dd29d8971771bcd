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
from ddjax.denoisers.functional import functional_init
from ddjax.denoisers.layers.basic import DType, Linear, zeros
from ddjax.denoisers.layers.convolution import Conv, Image
from ddjax.lora import beside
from ddjax.types import Apply, Params


class Controlled(nnx.Module):
    """A trunk and, beside its first blocks, a copy of them that is also shown an image.

    (Zhang et al. 2023, ControlNet; for transformers Chen et al. 2024, PixArt-delta, section 3.3.) What is made of the
    image, behind a layer that starts at zero, is added to what enters the copy's blocks; what the copy makes, through
    other such layers, is added in the trunk. So a new one is the trunk, bit for bit.

    A network says itself what its copy is and where it adds to the trunk (`sides.Side`, its `as_side`). With
    connections from its first half to its second (`UNet`, `EDM2`, `DiffiT`, `DiCo`, `UViT`, `StateSpace`,
    `MultiResolution`) that is ControlNet: the copy ends with the middle, and adds to the connections and to what leaves
    the middle. Else (`DiT`, `TextTransformer`, `DiffuSSM`, `InfDiT`, `GraphTransformer`, `NeuralProcess`, `TabularMLP`,
    `MixedTable`) it is PixArt-delta: the first `blocks`, and what each makes is added to what the trunk's makes.

    `cond = {entry: image, ...}`, the rest as for the trunk; without an image it is the trunk. "Image" stands for values
    at the sites of the state, `(batch, *sites, channels)`, in a dict of parts where the state is one.
    The trunk's blocks are reached through their taps, so that those of a stack are not rematerialised.
    """

    def __init__(
        self,
        make: Callable[[nnx.Rngs], nnx.Module],
        *,
        blocks: int | None,
        channels: int,
        stem: Sequence[int] | None,
        entry: str,
        rngs: nnx.Rngs,
    ):
        self.trunk, self.side, self.channels, self.entry = make(rngs), make(rngs), channels, entry
        if not hasattr(self.side, "as_side") or not hasattr(self.side, "body"):
            raise ValueError(
                f"{type(self.trunk).__name__} has no side network; those that have are UNet, EDM2, DiffiT, DiCo, UViT, "
                "StateSpace, MultiResolution, DiT, TextTransformer, DiffuSSM, InfDiT, GraphTransformer, "
                "NeuralProcess, TabularMLP and MixedTable"
            )
        if any(getattr(part, "scan", False) for _, part in nnx.iter_graph(self.trunk)):
            raise ValueError("a trunk must be built with scan=False (`unstack_blocks` turns its parameters)")
        if entry == "image" and getattr(self.trunk, "image_channels", 0):
            raise ValueError(
                'a trunk whose side is told cond["image"] must not be shown an image itself: name another entry=... '
                "for the side's"
            )
        hints, points, convolved = self.side.as_side(blocks)
        if stem is not None and not convolved:
            raise ValueError(f"stem={tuple(stem)}: only networks of images with convolutions look at one through them")
        stem = tuple(stem or (16,))
        self.taps, self.points, self.scale = tuple(hints), _ends(points), 2 ** (len(stem) - 1)
        zero = {"kernel_init": zeros, "dtype": self.trunk.dtype, "rngs": rngs}
        self.hint = nnx.List(
            [
                Stem(channels, stem, features, dtype=self.trunk.dtype, rngs=rngs)
                if convolved
                else Linear(values * channels, features, **zero)
                for values, features in hints.values()
            ]
        )
        self.out = nnx.List([Linear(features, features, **zero) for _, features in points.values()])

    def __call__(
        self,
        xt: Any,
        t: Array | None,
        cond: Any = None,
        *,
        rng: Key[Array, ""] | Key[Array, " batch"] | None = None,
        train: bool = False,
    ) -> Any:
        """Run both. Raises ValueError for an image that does not fit, or what a trunk would not take."""
        image, rest = _taken(cond, self.entry)
        if image is None:
            return self.trunk(xt, t, rest, rng=rng, train=train)
        values = self.side.hinted(image, xt, rest, self.channels, self.scale)
        hints = {name: _adding(layer(values[name])) for name, layer in zip(self.taps, self.hint, strict=True)}
        # Listeners outside hear the trunk.
        with taps.unheard(), taps.override(hints), taps.record(*(name for name, _ in self.points)) as seen:
            self.side.body(xt, t, rest, rng=rng, train=train)
        added = {to: _adding(out(seen[name])) for (name, to), out in zip(self.points, self.out, strict=True)}
        with taps.override(added):
            return self.trunk(xt, t, rest, rng=rng, train=train)


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
    make: Callable[[nnx.Rngs], nnx.Module],
    params: Params,
    *,
    blocks: int | None = None,
    channels: int,
    stem: Sequence[int] | None = None,
    entry: str = "image",
    key: Key[Array, ""],
) -> tuple[Apply, Params]:
    """A trained network with a new side network: `(apply, side)`, `apply(side, xt, t, cond)`, the trunk held as it is.

    make, params: how the trunk was built (`functional_init`), a network of those that `Controlled` names, and what it
        has learned.
    blocks: of a network without connections between its halves, how many of its first the side copies (of a
        `GraphTransformer` not the last). channels: of the image.
    stem: of a network of convolutions, `Stem`'s widths, default (16,): the image is as large as the state, and twice so
        for each width more.
    entry: of the condition, the image; another than "image" where the trunk is shown one itself (`InfDiT` always is).
    Raises ValueError for a trunk that has no side or is scanned, an entry that it takes itself, or blocks that it has
    not.
    """
    options = {"blocks": blocks, "channels": channels, "stem": stem and tuple(stem), "entry": entry}
    init, apply = functional_init(lambda rngs: Controlled(make, **options, rngs=rngs))
    copied = _like(jax.eval_shape(init, key)["side"], params)
    # In one program nothing is made of what is not asked for.
    new = jax.jit(lambda key: {name: init(key)[name] for name in ("hint", "out")})(key)
    return beside(apply, params, _with_trunk), {"side": copied, **new}


def _ends(points: Mapping[str, tuple[str, int]]) -> tuple[tuple[str, str], ...]:
    return tuple((name, to) for name, (to, _) in points.items())


def _adding(more: Array) -> Callable[[Array], Array]:
    """Adds to the last of the sites: tokens of what a network is told stand before those of the state."""

    def add(h: Array) -> Array:
        before = h.shape[1] - more.shape[1]
        return h + (jnp.pad(more, [(0, 0), (before, 0), *[(0, 0)] * (h.ndim - 2)]) if before else more)

    return add


def _taken(cond: Any, name: str) -> tuple[Any, Any]:
    """An entry of a condition, in which others may stand in "cond", and the rest."""
    if not isinstance(cond, Mapping):
        return None, cond
    found, rest = cond.get(name), {key: value for key, value in cond.items() if key != name}
    if found is None and "cond" in rest:
        found, rest["cond"] = _taken(rest["cond"], name)
    return found, rest.get("cond") if rest.keys() <= {"cond"} else rest


def _like(new: Params, params: Params) -> Params:
    """Those of the parameters that a new network has, as arrays of their own."""
    return {
        name: _like(value, params[name]) if isinstance(value, Mapping) else jnp.array(params[name])
        for name, value in new.items()
    }


def _with_trunk(trunk: Params, side: Params) -> Params:
    return {"trunk": trunk, **side}
