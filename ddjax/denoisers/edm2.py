"""EDM2's U-Net, whose layers keep the magnitude of what passes through them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from ddjax.denoisers.given import Given
from ddjax.denoisers.layers.attention import WEIGHTS, check_implementation, dot_product_attention
from ddjax.denoisers.layers.basic import DType, at_least_float32, check_rate, dropout, dropout_keys
from ddjax.denoisers.layers.convolution import Image, downsample, upsample
from ddjax.denoisers.layers.cross import Context
from ddjax.denoisers.layers.embed import check_labels, check_time, check_vector, lookup
from ddjax.denoisers.sides import Side
from ddjax.denoisers.u_shaped import Stage, UShaped, check_sides, plan
from ddjax.placement import constrain, layer_axes, path_name
from ddjax.taps import Below, tap
from ddjax.types import Params, SoftTokens

EPSILON = 1e-4


def normalized(x: Array, axes: int | Sequence[int]) -> Array:
    """`x` over its root mean square (and a little) along the axes, computed in at least float32 (equation 47)."""
    wide = x.astype(at_least_float32(x.dtype))
    return (wide / (EPSILON + jnp.sqrt(jnp.mean(wide * wide, axis=axes, keepdims=True)))).astype(x.dtype)


def mp_silu(x: Array) -> Array:
    """The function silu over 0.596: of unit magnitude for normal inputs (equation 81)."""
    return jax.nn.silu(x) / 0.596


def mp_sum(a: Array, b: Array, t: float) -> Array:
    """(1 - t) a + t b, of unit magnitude where a and b are, and independent (equation 88)."""
    return ((1 - t) * a + t * b) / math.hypot(1 - t, t)


def mp_concatenate(a: Array, b: Array, t: float) -> Array:
    """Of the features, both parts with the weights 1 - t and t in the magnitude whatever their sizes (equation 103)."""
    sizes = a.shape[-1], b.shape[-1]
    whole = math.sqrt(sum(sizes)) / math.hypot(1 - t, t)
    return jnp.concatenate([a * (whole * (1 - t) / sizes[0] ** 0.5), b * (whole * t / sizes[1] ** 0.5)], axis=-1)


def mp_fourier(
    t: Float[Array, " batch"], frequencies: Float[Array, " waves"], phases: Float[Array, " waves"]
) -> Float[Array, "batch waves"]:
    """sqrt(2) cos(frequency t + phase), of unit magnitude (equation 75); frequencies and phases get no gradient."""
    return 2**0.5 * jnp.cos(t[:, None] * jax.lax.stop_gradient(frequencies) + jax.lax.stop_gradient(phases))


def random_waves(waves: int, rngs: nnx.Rngs) -> tuple[nnx.Param, nnx.Param]:
    """Frequencies, normal, and phases, uniform, of `mp_fourier`; both times 2 pi."""
    normal, uniform = (f(rngs.params(), (waves,)) for f in (jax.random.normal, jax.random.uniform))
    return nnx.Param(2 * jnp.pi * normal), nnx.Param(2 * jnp.pi * uniform)


class MPConv(nnx.Module):
    """A convolution, or with `size` 0 a linear layer, with normalised weights and no bias (equations 47 and 66).

    The weights of each output have unit magnitude, times `gain / sqrt(number of them)`. Kernel `(size, size, in, out)`
    or `(in, out)`, normal at first.
    """

    def __init__(self, features_in: int, features_out: int, size: int, *, dtype: DType = jnp.float32, rngs: nnx.Rngs):
        shape = (size, size, features_in, features_out) if size else (features_in, features_out)
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32))
        self.dtype = jnp.dtype(dtype)

    def weights(self, gain: float | Array = 1.0) -> Array:
        """The kernel as it acts."""
        kernel = self.kernel[...]
        inputs = tuple(range(kernel.ndim - 1))
        return normalized(kernel, inputs) * (gain / math.prod(kernel.shape[:-1]) ** 0.5)

    def __call__(self, x: Array, gain: float | Array = 1.0) -> Array:
        """Apply to the last axis, or to an image."""
        kernel, x = self.weights(gain).astype(self.dtype), x.astype(self.dtype)
        if kernel.ndim == 2:
            return x @ kernel
        margin = (kernel.shape[0] // 2,) * 2
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), (margin, margin), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )


class MPAttention(nnx.Module):
    """Self-attention among all pixels: queries, keys and values of each head are normalised (figure 21)."""

    def __init__(self, features: int, heads: int, *, dtype: DType, implementation: str | None, rngs: nnx.Rngs):
        check_implementation(implementation, dtype, features // heads)
        self.heads, self.implementation = heads, implementation
        self.qkv = MPConv(features, 3 * features, 1, dtype=dtype, rngs=rngs)
        self.out = MPConv(features, features, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x: Image, named: Below = Below()) -> Image:
        """The branch. named: taps, see `layers.Attention`."""
        batch, height, width, features = x.shape
        qkv = self.qkv(x).reshape(batch, height * width, self.heads, 3, features // self.heads)
        heads = "heads" if self.heads > 1 else None  # a single one is on every device
        q, k, v = (constrain(normalized(qkv[..., i, :], -1), "batch", None, heads, None) for i in range(3))
        q, k, v = named("/queries", q), named("/keys", k), named("/values", v)
        y = dot_product_attention(q, k, v, self.implementation, weights=named.asked(WEIGHTS))
        return self.out(y.reshape(x.shape))


class MPCrossAttention(nnx.Module):
    """Attention of pixels to the entries of a sequence, under the rules of `MPAttention`, whatever their magnitude."""

    def __init__(
        self, features: int, context_width: int, heads: int, *, dtype: DType, implementation: str | None,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        self.heads, self.implementation = heads, implementation
        self.query = MPConv(features, features, 0, dtype=dtype, rngs=rngs)
        self.key_value = MPConv(context_width, 2 * features, 0, dtype=dtype, rngs=rngs)
        self.out = MPConv(features, features, 0, dtype=dtype, rngs=rngs)

    def __call__(self, x: Image, context: Context, named: Below = Below()) -> Image:
        """The branch; every example needs a valid entry. named: taps, see `layers.CrossAttention`."""
        (sequence, valid), head = context, x.shape[-1] // self.heads
        q = self.query(x).reshape(len(x), -1, self.heads, head)
        k, v = jnp.moveaxis(self.key_value(sequence).reshape(len(x), -1, self.heads, 2, head), 3, 0)
        heads = "heads" if self.heads > 1 else None
        q, k, v = (constrain(normalized(y, -1), "batch", None, heads, None) for y in (q, k, v))
        q, k, v = named("/queries", q), named("/keys", k), named("/values", v)
        mask = None if valid is None else valid[:, None]
        y = dot_product_attention(q, k, v, self.implementation, mask, named.asked(WEIGHTS))
        return self.out(y.reshape(x.shape))


class MPBlock(nnx.Module):
    """A residual block, with attention behind it where there are heads (Karras et al. 2024, figure 21).

    Behind that pixels attend to a sequence whose entries have `context_width` numbers (0: there is none).

    On the way down (`encodes`) the shortcut's convolution comes first and each pixel is normalised; on the way up the
    convolution is only in the shortcut. The condition scales, by 1 + gain * (a linear function of it).
    """

    def __init__(
        self,
        stage: Stage,
        *,
        cond_width: int,
        heads: int,
        dropout: float,
        balance: float,
        clip: float,
        dtype: DType,
        attention: str | None,
        context_width: int = 0,
        rngs: nnx.Rngs,
    ):
        check_rate(dropout)
        a, b = stage.features_in, stage.features_out
        self.resample, self.encodes, self.dropout = stage.resample, stage.encodes, dropout
        self.balance, self.clip = balance, clip
        self.conv_in = MPConv(b if stage.encodes else a, b, 3, dtype=dtype, rngs=rngs)
        self.modulation = MPConv(cond_width, b, 0, rngs=rngs)
        self.modulation_gain = nnx.Param(jnp.zeros((), jnp.float32))
        self.conv_out = MPConv(b, b, 3, dtype=dtype, rngs=rngs)
        self.shortcut = MPConv(a, b, 1, dtype=dtype, rngs=rngs) if a != b else None
        options = {"dtype": dtype, "implementation": attention, "rngs": rngs}
        self.attention = MPAttention(b, heads, **options) if heads else None
        self.cross = MPCrossAttention(b, context_width, heads, **options) if heads and context_width else None

    def __call__(
        self,
        x: Image,
        c: Float[Array, "batch cond"],
        *,
        keys: Key[Array, " batch"] | None = None,
        name: str | None = None,
        context: Context | None = None,
    ) -> Image:
        """Run the block. `keys` turn dropout on; `name` is the prefix of the taps (None inside a scan).

        context: the sequence, with `context_width`.
        """
        x, named = constrain(x, "batch", None, None, None), Below(name)
        if self.resample is not None:
            x = downsample(x) if self.resample == "down" else upsample(x)
        if self.encodes:
            x = normalized(x if self.shortcut is None else self.shortcut(x), -1)
        h = self.conv_in(mp_silu(x))
        scale = 1 + self.modulation(c, self.modulation_gain[...])
        h = self.conv_out(dropout(mp_silu(h * scale[:, None, None].astype(h.dtype)), self.dropout, keys))
        if not self.encodes and self.shortcut is not None:
            x = self.shortcut(x)
        x = mp_sum(x, h, self.balance)
        if self.attention is not None:
            y = named("/attention", self.attention(x, named))
            x = mp_sum(x, y, self.balance)
        if self.cross is not None:
            below = Below(name and f"{name}/cross")
            x = mp_sum(x, below("", self.cross(x, context, below)), self.balance)
        return named("", constrain(jnp.clip(x, -self.clip, self.clip), "batch", None, None, None))


class Uncertainty(nnx.Module):
    """u(t), the logarithm of the squared error to be expected at a time (Karras et al. 2024, equations 14 and 21).

    A layer with normalised weights, and no bias, of so many waves of the time.
    """

    def __init__(self, waves: int, *, rngs: nnx.Rngs):
        self.frequencies, self.phases = random_waves(waves, rngs)
        self.linear = MPConv(waves, 1, 0, rngs=rngs)

    def __call__(self, t: Float[Array, " batch"]) -> Float[Array, " batch"]:
        """Of each time."""
        return self.linear(mp_fourier(t, self.frequencies[...], self.phases[...]))[:, 0]


class EDM2(UShaped):
    """The network of Karras et al. 2024 (arXiv:2312.02696, figure 21, configuration G), continuous or discrete.

    No norm with statistics of the data, no bias: every layer keeps the magnitude of its input. It is made for inputs of
    unit magnitude and told EDM's c_noise as the time (`kind="edm"`). A gain that starts at zero scales the output.
    While it trains, its kernels should be normalised after each update (`forced`): the learning rate then means
    something. Its taps are those of `UNet`, and "uncertainty", `(batch,)`.

    Args:
        shape, symbols_in, symbols_out, out_channels, embed_width, bits: see `DiT`.
        width, multipliers, blocks, attend_at, num_classes, time, dropout, dtype, attention, scan, remat: see
            `UNet`.
        head_width: features of each head.
        time_scale: the random waves are those of time_scale * t.
        balance: weight of each branch against its shortcut, 0 to 1.
        label_balance: weight of the label against the time, and of a vector against both.
        vector, image_channels: of these conditions, see `DiT`; a vector is expected to have unit magnitude. 0: none.
        context_width: width of the entries of a sequence that is a condition, see `DiT`, of any magnitude: blocks that
            attend attend to them too, behind the pixels, with the weight `balance`. 0: none.
        skip_balance: weight of the skip connection against the backbone.
        clip: largest number behind a block.
        uncertainty: waves of the time of which the network makes its uncertainty, told at the tap alone, for
            `objectives.own_uncertainty` (theirs: 128). 0: it has none.
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
        width: int,
        multipliers: Sequence[float] = (1, 2, 3, 4),
        blocks: int = 3,
        attend_at: Sequence[int] = (),
        head_width: int = 64,
        num_classes: int = 0,
        vector: int = 0,
        context_width: int = 0,
        image_channels: int = 0,
        time: bool = True,
        time_scale: float = 1.0,
        dropout: float = 0.0,
        balance: float = 0.3,
        label_balance: float = 0.5,
        skip_balance: float = 0.5,
        clip: float = 256.0,
        uncertainty: int = 0,
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
        check_sides(shape, len(multipliers), blocks, attend_at)
        self.dropout, self.skip_balance, self.label_balance = dropout, skip_balance, label_balance
        self.time, self.time_scale, self.num_classes = time, time_scale, num_classes
        levels = [(round(m * width), shape[0] >> i in attend_at) for i, m in enumerate(multipliers)]
        first, cond_width = levels[0][0], max(size for size, _ in levels)

        self.frequencies, self.phases = random_waves(first, rngs)
        self.time_in = MPConv(first, cond_width, 0, rngs=rngs)
        self.labels = MPConv(num_classes, cond_width, 0, rngs=rngs) if num_classes else None

        def block(stage: Stage) -> MPBlock:
            heads = stage.features_out // head_width if stage.attends else 0
            if stage.attends and stage.features_out % head_width:
                raise ValueError(
                    f"head_width={head_width} does not divide the {stage.features_out} features of a block"
                )
            return MPBlock(
                stage, cond_width=cond_width, heads=heads, dropout=dropout, balance=balance,
                clip=clip, dtype=dtype, attention=attention, context_width=context_width, rngs=rngs,
            )  # fmt: skip

        encoder, middle, decoder = plan(levels, first, blocks, "all")
        self.embed = MPConv(self.features_in + 1, first, 3, dtype=dtype, rngs=rngs)
        self.lay(encoder, middle, decoder, block, remat=remat, scan=scan)
        self.final = MPConv(first, self.features_out, 3, dtype=at_least_float32(dtype), rngs=rngs)
        self.gain = nnx.Param(jnp.zeros((), jnp.float32))
        if uncertainty and not time:
            raise ValueError(f"uncertainty={uncertainty} is a function of the time, which time=False ignores")
        # Last, so that a network without them has the initial weights that it had.
        self.uncertainty = Uncertainty(uncertainty, rngs=rngs) if uncertainty else None
        self.vector = MPConv(vector, cond_width, 0, rngs=rngs) if vector else None
        self.nothing = MPConv(context_width, 1, 0, rngs=rngs) if context_width else None

    def __call__(
        self,
        xt: Float[Array, "batch H W C *symbols_in"] | Int[Array, "batch H W C"] | SoftTokens,
        t: Float[Array, " batch"] | Float[Array, ""] | None,
        cond: Int[Array, " batch"] | Mapping[str, Array | None] | None = None,
        *,
        rng: Key[Array, ""] | Key[Array, " batch"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch H W out"] | Float[Array, "batch H W C symbols_out"]:
        """Run the network: arguments, result and errors are those of `UNet`, without a latent."""
        h, _ = self.body(xt, t, cond, rng=rng, train=train)
        y = self.final(tap("final", h), self.gain[...])
        return self.images(y.reshape(len(h), -1, self.features_out))

    def as_side(self, blocks: int | None) -> Side:
        """As of every U-shaped network; what the time alone says of the output is of the trunk."""
        self.gain = self.uncertainty = None
        return super().as_side(blocks)

    def body(
        self, xt: Any, t: Any, cond: Any = None, *, rng: Any = None, train: bool = False
    ) -> tuple[Float[Array, "batch H W width"], Float[Array, "batch cond"]]:
        """What leaves the last block, and the vector of the condition. Arguments as above."""
        batch = self.check(xt)
        keys = dropout_keys(self.dropout, batch, rng, train)
        t = check_time(t, batch, None).astype(jnp.float32) if self.time else jnp.zeros((), jnp.float32)
        t = jnp.broadcast_to(self.time_scale * t, (batch,))
        nothing = None if self.nothing is None else self.nothing.weights(len(self.nothing.kernel) ** 0.5)[:, 0]
        told, context = Given.of(cond).attended(nothing, batch, self.dtype)
        x, told = self.seen(xt, told)
        c = constrain(tap("condition", self._condition(t, told)), "batch", None)
        if self.uncertainty is not None:
            tap("uncertainty", self.uncertainty(t))
        tap("sites", self.places())
        x = x.reshape(batch, *self.grid, -1)
        h = tap("embed", self.embed(jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)))
        join = lambda h, skip: mp_concatenate(h, skip, self.skip_balance)  # noqa: E731
        more = {} if context is None else {"context": context}
        return self.walk(h, c, keys, join=join, **more), c

    def _condition(self, t: Float[Array, " batch"], given: Given) -> Float[Array, "batch cond"]:
        given.check_taken(*("vector",) * (self.vector is not None))
        labels = check_labels(given.cond, self.num_classes, len(t))
        c = self.time_in(mp_fourier(t, self.frequencies[...], self.phases[...]))
        if self.labels is not None:
            known = (labels != self.num_classes)[:, None]
            rows = self.labels.weights(self.num_classes**0.5)
            c = mp_sum(c, jnp.where(known, lookup(rows, labels), 0), self.label_balance)
        if self.vector is not None:
            vector = check_vector(given.vector, len(t), self.vector.kernel.shape[0])
            c = mp_sum(c, self.vector(vector), self.label_balance)
        return mp_silu(c)


def forced(params: Params) -> Params:
    """EDM2's parameters with all kernels normalised, which changes no output: for after each update (equation 66).

    Scanned blocks (`scan=True`) have a kernel for each layer.
    """

    def one(path: tuple, value: Array) -> Array:
        name = path_name(path)
        if not name.endswith("/kernel"):
            return value
        return normalized(value, tuple(range(layer_axes(name), np.ndim(value) - 1)))

    return jax.tree_util.tree_map_with_path(one, params)


# Arguments of `EDM2` for the published networks of ImageNet-512, on latents (64, 64, 4), with num_classes=1000.
EDM2_SIZES: dict[str, dict[str, Any]] = {
    name: {"width": width, "multipliers": (1, 2, 3, 4), "blocks": 3, "attend_at": (16, 8), "dropout": rate}
    for name, width, rate in (
        ("edm2-xs", 128, 0.0), ("edm2-s", 192, 0.0), ("edm2-m", 256, 0.1), ("edm2-l", 320, 0.1),
        ("edm2-xl", 384, 0.1), ("edm2-xxl", 448, 0.1),
    )
}  # fmt: skip
