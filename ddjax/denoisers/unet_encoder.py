"""The way down of a U-Net as a classifier of noisy images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from ddjax.denoisers.layers.attention import WEIGHTS, dot_product_attention
from ddjax.denoisers.layers.basic import DType, Linear, at_least_float32, dropout_keys, zeros
from ddjax.denoisers.layers.convolution import Conv, GroupNorm, Resampling, ResBlock
from ddjax.denoisers.layers.embed import TIME_SCALE
from ddjax.denoisers.layers.noise import NoiseConditioner
from ddjax.denoisers.u_shaped import Stage, UShaped, check_sides, plan
from ddjax.denoisers.unet_designs import UNET_DESIGNS, UNetDesign
from ddjax.taps import Below, tap


class UNetEncoder(UShaped):
    """The way down and the middle of a `UNet`, and attention pooling: logits of classes, for images at any noise.

    (Dhariwal & Nichol 2021, section 4, appendix H: `EncoderUNetModel` with `pool="attention"`.) It is called as a
    denoiser is, without a condition. Its taps are those of `UNet`, and "pool/queries", "/keys", "/values" and
    "/attention/weights".

    Args:
        shape: (H, W, C) of one image.
        classes: how many logits.
        design, width, multipliers, blocks, attend_at, head_width, time_scale, dropout, dtype, scan, remat, rngs: see
            `UNet`.

    Raises:
        ValueError: for sizes that do not divide.
    """

    def __init__(
        self,
        *,
        shape: tuple[int, int, int],
        classes: int,
        design: str | UNetDesign = "adm",
        width: int,
        multipliers: Sequence[float] = (1, 2, 3, 4),
        blocks: int = 2,
        attend_at: Sequence[int] = (),
        head_width: int = 64,
        time_scale: float = TIME_SCALE,
        dropout: float = 0.0,
        dtype: DType = jnp.float32,
        scan: bool = False,
        remat: bool | str = False,
        rngs: nnx.Rngs,
    ):
        super().__init__(shape=shape, symbols_in=None, symbols_out=None, width=width, dtype=dtype, rngs=rngs)
        check_sides(shape, len(multipliers), blocks, attend_at)
        d = UNET_DESIGNS[design] if isinstance(design, str) else design
        self.dropout = dropout
        norm = partial(GroupNorm, groups=d.groups, least=d.least, epsilon=d.epsilon)
        self.condition = NoiseConditioner(width, d, num_classes=0, time=True, time_scale=time_scale, rngs=rngs)

        def block(stage: Stage) -> ResBlock | Resampling:
            if stage.resample is not None and d.resample == "conv":
                return Resampling(stage.features_in, stage.resample, padding=d.padding, dtype=dtype, rngs=rngs)
            return ResBlock(
                stage.features_in, stage.features_out, cond_width=d.cond_multiple * width, norm=norm, dtype=dtype,
                heads=stage.features_out // head_width if stage.attends else 0, resample=stage.resample,
                scale_shift=d.scale_shift, dropout=dropout, rngs=rngs,
            )  # fmt: skip

        levels = [(round(m * width), shape[0] >> i in attend_at) for i, m in enumerate(multipliers)]
        encoder, middle, _ = plan(levels, levels[0][0], blocks, d.up_attention)
        self.embed = Conv(shape[2], levels[0][0], dtype=dtype, rngs=rngs)
        self.lay(encoder, middle, [], block, remat=remat, scan=scan)
        sites = (shape[0] >> (len(levels) - 1)) * (shape[1] >> (len(levels) - 1))
        self.norm = norm(levels[-1][0])
        self.pool = AttentionPool(sites, levels[-1][0], classes, levels[-1][0] // head_width, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        xt: Float[Array, "batch H W C"],
        t: Float[Array, " batch"] | Float[Array, ""],
        cond: None = None,
        *,
        rng: Key[Array, ""] | Key[Array, " batch"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch classes"]:
        """Logits of the classes, float32. Raises ValueError for another shape, or a condition."""
        batch = self.check(xt)
        keys = dropout_keys(self.dropout, batch, rng, train)
        c = tap("condition", self.condition(batch, t, cond))
        h = self.walk(tap("embed", self.embed(xt)), c, keys, join=lambda h, skip: h)
        return self.pool(tap("final", jax.nn.silu(self.norm(h))), Below("pool"))


class AttentionPool(nnx.Module):
    """What the mean of an image's pixels finds when it attends to them (Radford et al. 2021, CLIP), as logits.

    Positions are learned, the mean's first; columns of `qkv` are ordered (head, q/k/v, feature).
    """

    def __init__(self, sites: int, features: int, classes: int, heads: int, *, dtype: DType, rngs: nnx.Rngs):
        if heads < 1 or features % heads:
            raise ValueError(f"{heads} heads do not divide {features} features: choose another head_width")
        self.heads = heads
        normal = jax.random.normal(rngs.params(), (sites + 1, features), jnp.float32)
        self.position = nnx.Param(features**-0.5 * normal)
        self.qkv = Linear(features, 3 * features, dtype=dtype, rngs=rngs)
        out_dtype = at_least_float32(dtype)
        self.out = Linear(features, classes, kernel_init=zeros, dtype=dtype, out_dtype=out_dtype, rngs=rngs)

    def __call__(self, h: Float[Array, "batch H W features"], named: Below = Below()) -> Float[Array, "batch classes"]:
        """Of an image. named: taps, see `layers.Attention`; the mean alone has a query, and its key comes first."""
        h = h.reshape(h.shape[0], -1, h.shape[-1])
        h = jnp.concatenate([h.mean(axis=1, keepdims=True), h], axis=1) + self.position[...]
        qkv = self.qkv(h).reshape(*h.shape[:2], self.heads, 3, -1)
        q, k, v = qkv[:, :1, :, 0], qkv[..., 1, :], qkv[..., 2, :]
        q, k, v = named("/queries", q), named("/keys", k), named("/values", v)
        pooled = dot_product_attention(q, k, v, weights=named.asked(WEIGHTS))
        return self.out(pooled.reshape(h.shape[0], -1))
