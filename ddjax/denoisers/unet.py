"""U-Nets of residual blocks: DDPM, ADM, DDPM++, NCSN++ and VDM's, by a `UNetDesign`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from ddjax import random
from ddjax.denoisers.images import ImageNetwork
from ddjax.denoisers.layers.basic import DType, at_least_float32, dropout_keys, zeros
from ddjax.denoisers.layers.blocks import REMAT
from ddjax.denoisers.layers.convolution import Conv, GroupNorm, Resampling, ResBlock, downsample
from ddjax.denoisers.layers.embed import TIME_SCALE
from ddjax.denoisers.layers.noise import NoiseConditioner
from ddjax.denoisers.unet_designs import UNET_DESIGNS, UNetDesign
from ddjax.placement import constrain
from ddjax.taps import active, tap
from ddjax.types import SoftTokens


class Stage(NamedTuple):
    """What one block of a U-Net does."""

    features_in: int
    features_out: int
    resample: str | None = None
    attends: bool = False
    encodes: bool = False  # it is on the way down
    joined: bool = False  # a skip connection stands beside its input
    kept: bool = True  # on the way down: what it gives is one


class UShaped(ImageNetwork):
    """A network of images that goes down in resolution and back up, with skip connections between."""

    def lay(
        self,
        encoder: Sequence[Stage],
        decoder: Sequence[Stage],
        block: Callable[[Stage], nnx.Module],
        *,
        middle_attends: bool | None,
        remat: bool | str,
    ) -> None:
        """Make the blocks: on the way down, two in the middle, on the way up. Raises ValueError for unknown `remat`.

        middle_attends: whether the first in the middle does; None: there is none.
        """
        self.remat = {True: "full", False: "none"}.get(remat, remat)
        if self.remat not in REMAT:
            raise ValueError(f"remat={remat!r}: expected True, False or one of {', '.join(map(repr, REMAT))}")
        last = encoder[-1].features_out
        self.encoder = nnx.List([block(stage) for stage in encoder])
        middle = () if middle_attends is None else (middle_attends, False)
        self.middle = nnx.List([block(Stage(last, last, attends=attends)) for attends in middle])
        self.decoder = nnx.List([block(stage) for stage in decoder])
        self.joined = tuple(stage.joined for stage in decoder)
        self.kept = tuple(stage.kept for stage in encoder)

    def walk(
        self,
        h: Array,
        c: Array,
        keys: Key[Array, " batch"] | None,
        *,
        join: Callable[[Array, Array], Array],
        after: Callable[[nnx.Module, Array], Array] = lambda block, h: h,
    ) -> Array:
        """Run the blocks, each `(h, c, keys=, name=)`.

        join: of the backbone and a skip connection. after: a block on the way down, what is made of its result.
        """
        made = iter(range(len(self.encoder) + len(self.middle) + len(self.decoder)))

        def run(block: nnx.Module, name: str, h: Array) -> Array:
            i = next(made)
            return self._run(block, name, h, c, None if keys is None else random.fold_in(keys, i))

        skips = [h]
        for i, block in enumerate(self.encoder):
            h = after(block, run(block, f"encoder/{i}", h))
            if self.kept[i]:
                skips.append(h)
        for i, block in enumerate(self.middle):
            h = run(block, f"middle/{i}", h)
        for i, block in enumerate(self.decoder):
            if self.joined[i]:
                n = sum(self.joined[:i])
                h = join(tap(f"backbone/{n}", h), tap(f"skip/{n}", skips.pop()))
            h = run(block, f"decoder/{i}", h)
        return h

    def _run(self, block: nnx.Module, name: str, h: Array, c: Array, keys: Array | None) -> Array:
        # A listener needs the values, which remat's inner trace would not let out; remat changes none.
        if self.remat == "none" or active():
            return block(h, c, keys=keys, name=name)
        graphdef, params = nnx.split(block)
        body = lambda params, h, c, keys: nnx.merge(graphdef, params)(h, c, keys=keys, name=name)  # noqa: E731
        return jax.checkpoint(body, policy=REMAT[self.remat])(params, h, c, keys)


class UNet(UShaped):
    """U-Net of images, continuous or discrete, with the layout that one of the published `UNET_DESIGNS` has.

    A convolution; at each resolution some residual blocks, and down to the next; two blocks in the middle; and back up,
    one block more at each resolution, each beside what the mirrored one on the way down gave. The output layer starts
    at zero.

    Taps: "condition", "encoder/i", "middle/0" and "middle/1", "decoder/j" (resampling blocks count), each with
    "/attention", "/attention/keys" and "/attention/values" where it attends; "skip/n" and "backbone/n", what the n-th
    block on the way up that has a skip connection joins (`freeu`); "final".

    Args:
        shape: (H, W, C) of one example.
        symbols_in, symbols_out, out_channels, embed_width, bits: see `DiT`.
        design: a name of `UNET_DESIGNS`, or a `UNetDesign`.
        width: features at the first resolution, times its multiplier.
        multipliers: of the width at each resolution, the sides halving from one to the next.
        blocks: of each resolution on the way down.
        attend_at: heights of the image at which blocks attend.
        heads, head_width: number of heads where blocks attend, or in its place the features of each.
        num_classes: labels run over `[0, num_classes)`, and `num_classes` is the null label, which adds nothing.
        latent: numbers of a latent that the network is told, `cond = {"z": (batch, latent), "cond": labels}`. 0: none.
        time: False ignores t.
        time_scale: the time embedding is one of time_scale * t: 1000 for t in [0, 1], 1 for EDM's c_noise.
        dropout: rate between the convolutions of each block, when train=True.
        dtype: compute dtype; parameters and the output stay float32.
        attention: None, "xla" or "cudnn" (`layers.dot_product_attention`).
        remat: of each block, see `layers.Stack`.
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
        design: str | UNetDesign = "adm",
        width: int,
        multipliers: Sequence[float] = (1, 2, 2, 2),
        blocks: int = 2,
        attend_at: Sequence[int] = (),
        heads: int = 1,
        head_width: int | None = None,
        num_classes: int = 0,
        latent: int = 0,
        time: bool = True,
        time_scale: float = TIME_SCALE,
        dropout: float = 0.0,
        dtype: DType = jnp.float32,
        embed_width: int | None = None,
        bits: int = 0,
        attention: str | None = None,
        remat: bool | str = False,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            shape=shape, symbols_in=symbols_in, symbols_out=symbols_out, out_channels=out_channels, width=width,
            embed_width=embed_width, bits=bits, dtype=dtype, rngs=rngs,
        )  # fmt: skip
        if isinstance(design, str) and design not in UNET_DESIGNS:
            raise ValueError(f"design={design!r}: expected a UNetDesign, or one of {', '.join(UNET_DESIGNS)}")
        self.design = d = UNET_DESIGNS[design] if isinstance(design, str) else design
        if d.add_input and (symbols_in is not None or self.out_channels != shape[2]):
            raise ValueError("this design adds the state to the output: a continuous state, and as many channels out")
        check_sides(shape, len(multipliers), blocks, attend_at)
        self.dropout, self.num_classes = dropout, num_classes
        norm = partial(GroupNorm, groups=d.groups, least=d.least, epsilon=d.epsilon)
        cond_width = d.cond_multiple * width
        self.condition = NoiseConditioner(
            width, d, num_classes=num_classes, latent=latent, time=time, time_scale=time_scale, rngs=rngs
        )

        def block(stage: Stage) -> ResBlock | Resampling:
            if stage.resample is not None and d.resample == "conv":
                return Resampling(stage.features_in, stage.resample, padding=d.padding, dtype=dtype, rngs=rngs)
            number = 0 if not stage.attends else heads if head_width is None else stage.features_out // head_width
            return ResBlock(
                stage.features_in, stage.features_out, cond_width=cond_width, heads=number, resample=stage.resample,
                weights=d.weights, scale_shift=d.scale_shift, project=d.project, gain=d.gain,
                modulation_bias=d.modulation_bias, norm=norm, dropout=dropout, dtype=dtype, attention=attention,
                rngs=rngs,
            )  # fmt: skip

        levels = [(round(m * width), shape[0] >> i in attend_at) for i, m in enumerate(multipliers)]
        first = levels[0][0] if d.scaled_input else width
        encoder, decoder = plan(levels, first, blocks, d.up_attention)
        features = self.features_in * (1 + 2 * len(d.input_waves))
        self.embed = Conv(features, first, dtype=dtype, rngs=rngs)
        self.inputs = _inputs(features, encoder, d, dtype, rngs) if d.residual_input else None
        self.lay(encoder, decoder, block, middle_attends=d.middle_attention, remat=remat)
        self.final = FinalConv(levels[0][0], self.features_out, norm=norm, dtype=dtype, rngs=rngs)

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
            xt: the state, as `DiT` takes it.
            t: time.
            cond: labels in `[0, num_classes]`; None is the null label. With `latent` `{"z": ..., "cond": labels}`;
                a z of None, or labels alone, tell nothing of it.
            rng: one key, or one per example, for dropout; needed when train=True and dropout > 0.
            train: whether dropout acts.

        Returns:
            float32, `(batch, H, W, out_channels)`, or logits `(batch, H, W, C, symbols_out)`.

        Raises:
            ValueError: for a shape or dtype that the network was not built for.
        """
        batch = self.check(xt)
        keys = dropout_keys(self.dropout, batch, rng, train)
        c = constrain(tap("condition", self.condition(batch, t, cond)), "batch", None)
        tap("sites", self.places())
        x = self.features(self.patches(xt)).reshape(batch, *self.grid, -1)
        if waves := self.design.input_waves:
            x = jnp.concatenate([x, input_waves(x, waves)], axis=-1)
        shown = iter(self.inputs or ())

        def after(block: nnx.Module, h: Array) -> Array:
            nonlocal x
            if self.inputs is not None and block.resample == "down":
                # Beyond the image the convolution goes on, over zeros: the filter sees its results, and no zeros.
                x = h = (h + downsample(next(shown)(x), self.design.weights, padding=0)) * 0.5**0.5
            return h

        h = tap("embed", self.embed(x))
        h = self.walk(h, c, keys, join=lambda h, skip: jnp.concatenate([h, skip], axis=-1), after=after)
        y = self.images(self.final(h).reshape(batch, -1, self.features_out))
        return y + xt if self.design.add_input else y


class FinalConv(nnx.Module):
    """Norm, silu and a convolution that starts at zero; the result is at least float32."""

    def __init__(self, features: int, features_out: int, *, norm: Any, dtype: DType, rngs: nnx.Rngs):
        self.norm = norm(features)
        out_dtype = at_least_float32(dtype)
        self.out = Conv(features, features_out, kernel_init=zeros, dtype=dtype, out_dtype=out_dtype, rngs=rngs)

    def __call__(self, h: Float[Array, "batch H W features"]) -> Float[Array, "batch H W out"]:
        """Apply to an image."""
        return self.out(tap("final", jax.nn.silu(self.norm(h))))


def input_waves(x: Float[Array, "... features"], exponents: Sequence[int]) -> Float[Array, "... waves"]:
    """sin(2^(n + 1) pi x) for each feature and exponent n, and the cosines of the same (Kingma et al. 2021, app. C)."""
    angles = x[..., None] * (2.0 ** jnp.asarray(exponents, x.dtype) * 2 * jnp.pi)
    angles = angles.reshape(*x.shape[:-1], -1)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def plan(
    levels: Sequence[tuple[int, bool]], first: int, blocks: int, up_attention: str
) -> tuple[list[Stage], list[Stage]]:
    """The blocks on the way down and up, for the features of each resolution and whether it attends."""
    encoder, decoder, skips, features = [], [], [first], first
    for i, (width, attends) in enumerate(levels):
        if i:
            encoder.append(Stage(features, features, "down", encodes=True))
            skips.append(features)
        for _ in range(blocks):
            encoder.append(Stage(features, width, attends=attends, encodes=True))
            features = width
            skips.append(features)
    for i, (width, attends) in reversed(list(enumerate(levels))):
        for j in range(blocks + 1):
            own = attends and (up_attention == "all" or j == blocks)
            decoder.append(Stage(features + skips.pop(), width, attends=own, joined=True))
            features = width
        if i:
            decoder.append(Stage(features, features, "up"))
    return encoder, decoder


def _inputs(features: int, encoder: Sequence[Stage], design: UNetDesign, dtype: DType, rngs: nnx.Rngs) -> nnx.List:
    """Of NCSN++: a convolution of the image, as the resolution before saw it, for each resolution but the first."""
    margin = 1 + (len(design.weights) - 1) // 2
    convs = []
    for stage in encoder:
        if stage.resample == "down":
            width = stage.features_out
            convs.append(Conv(features, width, padding=(margin, margin), dtype=dtype, rngs=rngs))
            features = width
    return nnx.List(convs)


def check_sides(shape: Sequence[int], levels: int, blocks: int, attend_at: Sequence[int]) -> None:
    """Raise ValueError for an image that cannot be halved so often, or never has the sides at which blocks attend."""
    if levels < 1 or blocks < 1:
        raise ValueError(f"blocks={blocks} at {levels} resolutions: expected one or more of each")
    if any(side % 2 ** (levels - 1) for side in shape[:2]):
        raise ValueError(
            f"{levels} multipliers halve the sides {levels - 1} times, which {tuple(shape[:2])} do not allow"
        )
    sides = [shape[0] >> i for i in range(levels)]
    if missed := [side for side in attend_at if side not in sides]:
        raise ValueError(f"attend_at={tuple(attend_at)}: the image is never {missed[0]} high, but {sides}")
