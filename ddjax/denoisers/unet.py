"""U-Nets of residual blocks: DDPM, ADM, DDPM++, NCSN++ and VDM's, by a `UNetDesign`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from ddjax.denoisers.given import Given
from ddjax.denoisers.layers.basic import DType, at_least_float32, dropout_keys, zeros
from ddjax.denoisers.layers.convolution import Conv, GroupNorm, Resampling, ResBlock, SpatialAttention, downsample
from ddjax.denoisers.layers.cross import no_entry
from ddjax.denoisers.layers.embed import TIME_SCALE
from ddjax.denoisers.layers.noise import NoiseConditioner
from ddjax.denoisers.layers.patch_transformer import PatchTransformer
from ddjax.denoisers.layers.spatial_transformer import SpatialTransformer
from ddjax.denoisers.u_shaped import Stage, UShaped, check_sides, plan
from ddjax.denoisers.unet_designs import UNET_DESIGNS, UNetDesign
from ddjax.placement import constrain
from ddjax.taps import tap
from ddjax.types import SoftTokens


class UNet(UShaped):
    """U-Net of images, continuous or discrete, with the layout that one of the published `UNET_DESIGNS` has.

    A convolution; at each resolution some residual blocks, and down to the next; two blocks in the middle; and back up,
    one block more at each resolution, each beside what the mirrored one on the way down gave. The output layer starts
    at zero.

    Taps: "condition", "encoder/i", "middle/0" and "middle/1", "decoder/j" (resampling blocks count), each with
    "/queries", "/keys", "/values", "/attention" and "/attention/weights" where it attends (`ddjax.taps`); "skip/n" and
    "backbone/n", what the n-th block on the way up that has a skip connection joins (`freeu`); "final". With
    `transformer` "middle/0", and for its blocks "block/i" and below; with `transformer_depth` the taps of attention lie
    below "encoder/i/block/j", and so on.

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
        transformer: the middle is a transformer of patches of 2 x 2 pixels in the place of two blocks: its {"width",
            "depth", "heads"} (`layers.PatchTransformer`).
        latent: numbers of a latent that the network is told, `cond = {"z": (batch, latent), "cond": labels}`. 0: none.
        vector, image_channels: of these conditions, see `DiT`. 0: none.
        context_width: width of the entries of a sequence that is a condition, see `DiT`: blocks that attend attend to
            them too, behind the pixels (Rombach et al. 2022, "latent diffusion", section 3.3). 0: none.
        transformer_depth: where blocks attend, the number of latent diffusion's transformer blocks of pixels, in the
            place of attention alone (`layers.SpatialTransformer`). 0: there is attention alone.
        time: False ignores t.
        time_scale: the time embedding is one of time_scale * t: 1000 for t in [0, 1], 1 for EDM's c_noise.
        dropout: rate between the convolutions of each block, when train=True.
        dtype: compute dtype; parameters and the output stay float32.
        attention: None, "xla" or "cudnn" (`layers.dot_product_attention`).
        scan: neighbouring blocks that are equal are scanned (`UShaped.lay`; `stack_blocks` turns the parameters): a
            smaller program; on a CPU steps are slower, and compiling is not faster.
        remat: of each block, see `layers.Stack`.
        rngs: keys of the initial parameters.

    Raises:
        ValueError: for sizes that do not divide, options of the wrong state space, or `scan` where no two neighbouring
            blocks are equal, or `context_width` where none attends.
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
        transformer: Mapping[str, int] | None = None,
        num_classes: int = 0,
        latent: int = 0,
        vector: int = 0,
        context_width: int = 0,
        transformer_depth: int = 0,
        image_channels: int = 0,
        time: bool = True,
        time_scale: float = TIME_SCALE,
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
            shape=shape, symbols_in=symbols_in, symbols_out=symbols_out, out_channels=out_channels, width=width,
            embed_width=embed_width, bits=bits, image_channels=image_channels, dtype=dtype, rngs=rngs,
        )  # fmt: skip
        if isinstance(design, str) and design not in UNET_DESIGNS:
            raise ValueError(f"design={design!r}: expected a UNetDesign, or one of {', '.join(UNET_DESIGNS)}")
        self.design = d = UNET_DESIGNS[design] if isinstance(design, str) else design
        if d.add_input and (symbols_in is not None or self.out_channels != shape[2]):
            raise ValueError("this design adds the state to the output: a continuous state, and as many channels out")
        check_sides(shape, len(multipliers), blocks, attend_at)
        self.dropout, self.num_classes = dropout, num_classes
        cond_width = d.cond_multiple * width
        told = {"cond_width": cond_width, "dtype": dtype, "rngs": rngs} if d.told_norms else {}
        norm = partial(GroupNorm, groups=d.groups, least=d.least, epsilon=d.epsilon, **told)
        self.condition = NoiseConditioner(
            width, d, num_classes=num_classes, latent=latent, vector=vector, time=time, time_scale=time_scale, rngs=rngs
        )
        grid = tuple(side >> (len(multipliers) - 1) for side in shape[:2])
        attend, beside = SpatialAttention, context_width
        if transformer_depth:
            attend, beside = partial(SpatialTransformer, depth=transformer_depth, context_width=context_width), 0

        def block(stage: Stage) -> ResBlock | Resampling | PatchTransformer:
            if stage.transforms:
                return PatchTransformer(
                    stage.features_in, grid, **transformer, cond_width=cond_width, dropout=dropout, dtype=dtype,
                    attention=attention, context_width=context_width, scan=scan, remat=remat, rngs=rngs,
                )  # fmt: skip
            if stage.resample is not None and d.resample == "conv":
                return Resampling(stage.features_in, stage.resample, padding=d.padding, dtype=dtype, rngs=rngs)
            number = 0 if not stage.attends else heads if head_width is None else stage.features_out // head_width
            return ResBlock(
                stage.features_in, stage.features_out, cond_width=0 if d.told_norms else cond_width, heads=number,
                resample=stage.resample, weights=d.weights, scale_shift=d.scale_shift, project=d.project, gain=d.gain,
                modulation_bias=d.modulation_bias, norm=norm, dropout=dropout, dtype=dtype, attention=attention,
                attend=attend, context_width=beside, rngs=rngs,
            )  # fmt: skip

        levels = [(round(m * width), shape[0] >> i in attend_at) for i, m in enumerate(multipliers)]
        first = levels[0][0] if d.scaled_input else width
        encoder, middle, decoder = plan(levels, first, blocks, d.up_attention, (d.middle_attention, False))
        if transformer is not None:
            middle = [middle[0]._replace(attends=False, transforms=True)]
        if context_width and not any(stage.attends or stage.transforms for stage in (*encoder, *middle, *decoder)):
            raise ValueError(f"context_width={context_width}: blocks that attend look at a sequence, and none attends")
        if transformer_depth < 0 or (transformer_depth and not any(s.attends for s in (*encoder, *middle, *decoder))):
            raise ValueError(f"transformer_depth={transformer_depth}: blocks that attend have transformers; 0, or none")
        features = self.features_in * (1 + 2 * len(d.input_waves))
        self.embed = Conv(features, first, dtype=dtype, rngs=rngs)
        self.inputs = _inputs(features, encoder, d, dtype, rngs) if d.residual_input else None
        self.lay(encoder, middle, decoder, block, remat=remat, scan=scan)
        self.final = FinalConv(levels[0][0], self.features_out, norm=norm, dtype=dtype, rngs=rngs)
        # Last, so that a network without it has the initial weights that it had.
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
        """Run the network.

        Args:
            xt: the state, as `DiT` takes it.
            t: time.
            cond: labels in `[0, num_classes]`; None is the null label. Or a dict of what else the network is told
                (`given.Given`), with the labels as "cond"; an entry of None, or none, tells nothing of it.
            rng: one key, or one per example, for dropout; needed when train=True and dropout > 0.
            train: whether dropout acts.

        Returns:
            float32, `(batch, H, W, out_channels)`, or logits `(batch, H, W, C, symbols_out)`.

        Raises:
            ValueError: for a shape or dtype that the network was not built for.
        """
        h, c = self.body(xt, t, cond, rng=rng, train=train)
        y = self.images(self.final(h, c).reshape(len(h), -1, self.features_out))
        return y + xt if self.design.add_input else y

    def body(
        self, xt: Any, t: Any, cond: Any = None, *, rng: Any = None, train: bool = False
    ) -> tuple[Float[Array, "batch H W width"], Float[Array, "batch cond"]]:
        """What leaves the last block, and the vector of the condition. Arguments as above."""
        batch = self.check(xt)
        keys = dropout_keys(self.dropout, batch, rng, train)
        told, context = Given.of(cond).attended(self.nothing, batch, self.dtype)
        x, told = self.seen(xt, told)
        c = constrain(tap("condition", self.condition(batch, t, told)), "batch", None)
        tap("sites", self.places())
        x = x.reshape(batch, *self.grid, -1)
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
        join = lambda h, skip: jnp.concatenate([h, skip], axis=-1)  # noqa: E731
        more = {} if context is None else {"context": context}
        return self.walk(h, c, keys, join=join, after=after, **more), c


class FinalConv(nnx.Module):
    """Norm, silu and a convolution that starts at zero; the result is at least float32. norm: see `layers.ResBlock`."""

    def __init__(self, features: int, features_out: int, *, norm: Any, dtype: DType, rngs: nnx.Rngs):
        self.norm = norm(features)
        out_dtype = at_least_float32(dtype)
        self.out = Conv(features, features_out, kernel_init=zeros, dtype=dtype, out_dtype=out_dtype, rngs=rngs)

    def __call__(
        self, h: Float[Array, "batch H W features"], c: Float[Array, "batch cond"] | None = None
    ) -> Float[Array, "batch H W out"]:
        """Apply to an image. c: what the norm is told, if anything."""
        return self.out(tap("final", jax.nn.silu(self.norm(h, c))))


def input_waves(x: Float[Array, "... features"], exponents: Sequence[int]) -> Float[Array, "... waves"]:
    """sin(2^(n + 1) pi x) for each feature and exponent n, and the cosines of the same (Kingma et al. 2021, app. C)."""
    angles = x[..., None] * (2.0 ** jnp.asarray(exponents, x.dtype) * 2 * jnp.pi)
    angles = angles.reshape(*x.shape[:-1], -1)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


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
