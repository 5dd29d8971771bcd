"""DiCo: a hierarchical network of convolutions with channel attention under adaLN, or of attention where asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from ddjax import random
from ddjax.denoisers.images import ImageNetwork
from ddjax.denoisers.layers.attention import Attention
from ddjax.denoisers.layers.basic import (
    MLP,
    DType,
    Linear,
    at_least_float32,
    check_rate,
    dropout,
    dropout_keys,
    layer_norm,
    zeros,
)
from ddjax.denoisers.layers.blocks import Stack
from ddjax.denoisers.layers.convolution import Conv, Image
from ddjax.denoisers.layers.embed import Conditioner
from ddjax.denoisers.layers.long_skips import run_blocks
from ddjax.placement import constrain
from ddjax.taps import Below, tap
from ddjax.types import SoftTokens

KINDS = "caf"  # of blocks: convolution, attention, AsCAN's convolution


class DiCo(ImageNetwork):
    """DiCo (Ai et al. 2025, arXiv:2505.11196).

    Five stages of blocks, at full, half, quarter, half and full resolution, `width` times 1, 2, 4, 2 and 2 features;
    the last two are shown what the first two gave. Each resolution has its own embedding of time and label. A block is
    a pixelwise, a depthwise 3 x 3 and a pixelwise convolution with channel attention between, then an MLP, both under
    adaLN-zero. The output layer, a 3 x 3 convolution, starts at zero.

    A stage may also hold attention among its pixels in the place of convolutions, in any order: asymmetric networks,
    with convolutions first and attention later (Kag et al. 2024, "AsCAN"), or a stronger encoder than decoder
    (Cao et al. 2022, "ASCEND"). And it may hold `FusedBlock`s, those of the former.

    Args:
        shape, symbols_in, symbols_out, out_channels, embed_width, bits: see `DiT`; height and width divide by 4.
        width: features at full resolution, even.
        stages: of each of the five the number of blocks (of convolutions), or a letter for each: "c" for a
            convolution, "a" for attention, "f" for AsCAN's convolution, as in "fffa".
        head_width: features of a head of attention.
        mlp_ratio: hidden width of the MLP over the features.
        num_classes: labels run over `[0, num_classes)`, and `num_classes` is the null label. 0: no labels.
        time: False ignores t.
        dropout: rate on each branch of each block, when train=True.
        dtype: compute dtype; parameters and the output stay float32.
        attention: None, "xla" or "cudnn" (`layers.dot_product_attention`).
        scan, remat: see `layers.Stack`; scan needs stages of one kind of blocks each.
        rngs: keys of the initial parameters.

    Raises:
        ValueError: for sizes that do not divide, unknown letters, or options of the wrong state space.
    """

    def __init__(
        self,
        *,
        shape: tuple[int, int, int],
        symbols_in: int | None = None,
        symbols_out: int | None = None,
        out_channels: int | None = None,
        width: int,
        stages: Sequence[int | str] = (2, 5, 8, 5, 2),
        head_width: int = 64,
        mlp_ratio: float = 4,
        num_classes: int = 0,
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
            shape=shape, symbols_in=symbols_in, symbols_out=symbols_out, out_channels=out_channels, width=width,
            embed_width=embed_width, bits=bits, dtype=dtype, rngs=rngs,
        )  # fmt: skip
        if shape[0] % 4 or shape[1] % 4 or width % 2:
            raise ValueError(f"shape={shape}, width={width}: expected sides that divide by 4, and an even width")
        stages = _letters(stages, scan)
        self.dropout = dropout
        widths = [width, 2 * width, 4 * width]
        self.embed = Conv(self.features_in, width, dtype=dtype, rngs=rngs)
        self.conditions = nnx.List([Conditioner(w, num_classes=num_classes, time=time, rngs=rngs) for w in widths])
        options = {"mlp_ratio": mlp_ratio, "dropout": dropout, "dtype": dtype}
        kinds = {
            "c": partial(ConvBlock, **options),
            "a": partial(AttentionBlock, **options, head_width=head_width, attention=attention),
            "f": partial(FusedBlock, **options),
        }
        self.stack = nnx.List([])
        for letters, level in zip(stages, LEVELS, strict=True):
            makes = [partial(kinds[letter], widths[level]) for letter in letters]
            self.stack.append(Stack(_in_turn(makes), len(letters), scan=scan, remat=remat, rngs=rngs))
        bare = {"bias": False, "dtype": dtype, "rngs": rngs}
        self.down = nnx.List([Conv(w, w // 2, **bare) for w in widths[:2]])
        self.up = nnx.List([Conv(w, 2 * w, **bare) for w in (widths[2], widths[1])])
        reduced = {"dtype": dtype, "rngs": rngs}
        self.reduce = nnx.List([Linear(4 * width, 2 * width, **reduced), Linear(2 * width, 2 * width, **reduced)])
        self.modulation = Linear(2 * width, 4 * width, kernel_init=zeros, dtype=dtype, rngs=rngs)
        out = {"kernel_init": zeros, "dtype": dtype, "out_dtype": at_least_float32(dtype)}
        self.out = Conv(2 * width, self.features_out, **out, rngs=rngs)

    def __call__(
        self,
        xt: Float[Array, "batch H W C *symbols_in"] | Int[Array, "batch H W C"] | SoftTokens,
        t: Float[Array, " batch"] | Float[Array, ""] | None,
        cond: Int[Array, " batch"] | None = None,
        *,
        rng: Key[Array, ""] | Key[Array, " batch"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch H W out"] | Float[Array, "batch H W C symbols_out"]:
        """Run the network: arguments, result and errors as those of `UViT`."""
        batch = self.check(xt)
        keys = dropout_keys(self.dropout, batch, rng, train)
        c = [condition(batch, t, cond) for condition in self.conditions]
        tap("condition", c[1])
        tap("sites", self.places())
        h = self.embed(self.features(self.patches(xt)).reshape(batch, *self.shape[:2], -1))
        h = tap("embed", h)
        first = [0, *accumulate(stack.depth for stack in self.stack)]

        def run(i: int, h: Array) -> Array:
            return run_blocks(self.stack[i], h, c[LEVELS[i]], keys, first[i])[0]

        shown = []
        for i in range(2):
            shown.append(run(i, h))
            h = unshuffle(self.down[i](shown[-1]))
        h = run(2, h)
        for i in range(2):
            h = jnp.concatenate([shuffle(self.up[i](h)), shown.pop()], axis=-1)
            h = run(3 + i, self.reduce[i](h))
        shift, scale = jnp.split(self.modulation(c[1])[:, None, None], 2, axis=-1)
        h = tap("final", layer_norm(h) * (1 + scale) + shift)
        return self.images(self.out(h).reshape(batch, -1, self.features_out))


LEVELS = (0, 1, 2, 1, 1)  # of the stages: their widths and conditions; the last has the width of the middle level


class ConvBlock(nnx.Module):
    """DiCo's block: `outer(x * channels(x))` with x = gelu(depthwise(inner(h))), and an MLP, both under adaLN-zero.

    Channel attention is the sigmoid of a linear layer of the mean over all pixels.
    """

    def __init__(
        self, width: int, *, mlp_ratio: float = 4, dropout: float = 0.0, dtype: DType = jnp.float32, rngs: nnx.Rngs
    ):
        check_rate(dropout)
        self.dropout = dropout
        self.inner = Linear(width, width, dtype=dtype, rngs=rngs)
        self.depthwise = Conv(width, width, groups=width, dtype=dtype, rngs=rngs)
        self.channels = Linear(width, width, dtype=dtype, rngs=rngs)
        self.outer = Linear(width, width, dtype=dtype, rngs=rngs)
        self.mlp = MLP(width, int(mlp_ratio * width), approximate=False, dtype=dtype, rngs=rngs)
        self.modulation = Linear(width, 6 * width, kernel_init=zeros, dtype=dtype, rngs=rngs)

    def mix(self, x: Image, named: Below) -> Image:
        """What pixels tell each other."""
        x = jax.nn.gelu(self.depthwise(self.inner(x)), approximate=False)
        mean = x.mean(axis=(1, 2), keepdims=True, dtype=at_least_float32(x.dtype))
        return self.outer(x * jax.nn.sigmoid(self.channels(mean)))

    def __call__(
        self,
        h: Image,
        skip: None,
        c: Float[Array, "batch width"],
        *,
        keys: Key[Array, " batch"] | None = None,
        name: str | None = None,
    ) -> tuple[Image, None]:
        """The next image, and nothing for a long connection. See `layers.LongSkips`."""
        named = Below(name)
        keys_a, keys_m = (None, None) if keys is None else random.split(keys)
        h = constrain(h, "batch", None, None, None)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(self.modulation(c)[:, None, None], 6, axis=-1)
        y = named("/mix", self.mix(layer_norm(h) * (1 + scale_a) + shift_a, named))
        h = h + gate_a * dropout(y, self.dropout, keys_a)
        y = named("/mlp", self.mlp(layer_norm(h) * (1 + scale_m) + shift_m))
        return named("", h + gate_m * dropout(y, self.dropout, keys_m)), None


class AttentionBlock(ConvBlock):
    """The same block with attention among all pixels, heads of `head_width` features, instead of convolutions."""

    def __init__(
        self,
        width: int,
        *,
        head_width: int = 64,
        mlp_ratio: float = 4,
        dropout: float = 0.0,
        dtype: DType = jnp.float32,
        attention: str | None = None,
        rngs: nnx.Rngs,
    ):
        check_rate(dropout)
        if width % head_width:
            raise ValueError(f"head_width={head_width} does not divide a stage of {width} features")
        self.dropout = dropout
        options = {"dtype": dtype, "implementation": attention, "rngs": rngs}
        self.attention = Attention(width, width // head_width, **options)
        self.mlp = MLP(width, int(mlp_ratio * width), approximate=False, dtype=dtype, rngs=rngs)
        self.modulation = Linear(width, 6 * width, kernel_init=zeros, dtype=dtype, rngs=rngs)

    def mix(self, x: Image, named: Below) -> Image:
        """What pixels tell each other."""
        return self.attention(x.reshape(x.shape[0], -1, x.shape[-1]), None, named).reshape(x.shape)


class FusedBlock(nnx.Module):
    """AsCAN's convolution (Kag et al. 2024, section 3.1): a fused inverted bottleneck, under adaLN-zero.

    `outer(x * channels(x))` with x = gelu(expand(norm(h))): a 3 x 3 convolution to `mlp_ratio` times as many features,
    squeeze and excitation (Hu et al. 2018: from the mean over all pixels, by way of a quarter of the block's features,
    a factor in (0, 1) for each), and a convolution of one pixel back.
    """

    def __init__(
        self, width: int, *, mlp_ratio: float = 4, dropout: float = 0.0, dtype: DType = jnp.float32, rngs: nnx.Rngs
    ):
        check_rate(dropout)
        self.dropout, hidden = dropout, int(mlp_ratio * width)
        self.expand = Conv(width, hidden, dtype=dtype, rngs=rngs)
        self.squeeze = Linear(hidden, max(width // 4, 1), dtype=dtype, rngs=rngs)
        self.excite = Linear(max(width // 4, 1), hidden, dtype=dtype, rngs=rngs)
        self.outer = Linear(hidden, width, dtype=dtype, rngs=rngs)
        self.modulation = Linear(width, 3 * width, kernel_init=zeros, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        h: Image,
        skip: None,
        c: Float[Array, "batch width"],
        *,
        keys: Key[Array, " batch"] | None = None,
        name: str | None = None,
    ) -> tuple[Image, None]:
        """The next image, and nothing for a long connection. See `layers.LongSkips`."""
        named = Below(name)
        h = constrain(h, "batch", None, None, None)
        shift, scale, gate = jnp.split(self.modulation(c)[:, None, None], 3, axis=-1)
        x = jax.nn.gelu(self.expand(layer_norm(h) * (1 + scale) + shift), approximate=False)
        mean = x.mean(axis=(1, 2), keepdims=True, dtype=at_least_float32(x.dtype))
        channels = jax.nn.sigmoid(self.excite(jax.nn.silu(self.squeeze(mean))))
        y = named("/mix", self.outer(x * channels))
        return named("", h + gate * dropout(y, self.dropout, keys)), None


def unshuffle(x: Image) -> Image:
    """Squares of 2 x 2 pixels as one: feature f of pixel (i, j) becomes feature 4 f + 2 i + j."""
    batch, height, width, features = x.shape
    x = x.reshape(batch, height // 2, 2, width // 2, 2, features)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(batch, height // 2, width // 2, 4 * features)


def shuffle(x: Image) -> Image:
    """The inverse of `unshuffle`."""
    batch, height, width, features = x.shape
    x = x.reshape(batch, height, width, features // 4, 2, 2)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(batch, 2 * height, 2 * width, features // 4)


def _in_turn(makes: Sequence[Callable[..., nnx.Module]]) -> Callable[[nnx.Rngs], nnx.Module]:
    """Makes the blocks of a stage, which differ only where the stage is not scanned, in their order."""
    left = iter(makes)
    return lambda rngs: next(left, makes[0])(rngs=rngs)


def _letters(stages: Sequence[int | str], scan: bool) -> list[str]:
    """The blocks of each stage, a letter each."""
    letters = ["c" * stage if isinstance(stage, int) else stage for stage in stages]
    if len(letters) != len(LEVELS) or any(not stage or set(stage) - set(KINDS) for stage in letters):
        raise ValueError(
            f"stages={tuple(stages)}: expected five, of each the number of blocks (at least one), or a letter for each "
            'block: "c" (convolution), "a" (attention) or "f" (AsCAN\'s convolution)'
        )
    if scan and any(len(set(stage)) > 1 for stage in letters):
        raise ValueError(f"stages={tuple(stages)}: a stage of several kinds of blocks cannot be scanned: scan=False")
    return letters
