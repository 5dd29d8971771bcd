"""DiCo: a hierarchical network of stages: of convolutions with channel attention, or of other blocks where asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from ddjax.denoisers.dico_blocks import BLOCKS, Told
from ddjax.denoisers.given import Given
from ddjax.denoisers.images import ImageNetwork
from ddjax.denoisers.layers.basic import DType, Linear, at_least_float32, dropout_keys, layer_norm, zeros
from ddjax.denoisers.layers.blocks import Stack, check_conditioning
from ddjax.denoisers.layers.convolution import Conv, Image
from ddjax.denoisers.layers.cross import no_entry
from ddjax.denoisers.layers.embed import Conditioner
from ddjax.denoisers.layers.generated import GeneratedLinear, Generator, surroundings
from ddjax.denoisers.layers.long_skips import run_blocks
from ddjax.denoisers.sides import Side, check_whole
from ddjax.denoisers.states import check_values
from ddjax.taps import tap
from ddjax.types import SoftTokens


class DiCo(ImageNetwork):
    """DiCo (Ai et al. 2025, arXiv:2505.11196).

    Five stages of blocks, at full, half, quarter, half and full resolution, `width` times 1, 2, 4, 2 and 2 features;
    the last two are shown what the first two gave. Each resolution has its own embedding of time and label. A block is
    a pixelwise, a depthwise 3 x 3 and a pixelwise convolution with channel attention between, then an MLP, both under
    adaLN-zero. The output layer, a 3 x 3 convolution, starts at zero.

    There may be more stages or fewer, and a stage may hold other blocks, in any order (`dico_blocks`): attention among
    its pixels and to words; the convolutions of asymmetric networks, first convolutions and then attention, the stages
    on the way up those on the way down in reverse (Kag et al. 2024, "AsCAN"); a stronger encoder than decoder (Cao et
    al. 2022, "ASCEND"); EfficientViT's blocks, whose weights the condition makes (Cai et al. 2024, "CaT").

    Args:
        shape, symbols_in, symbols_out, out_channels, embed_width, bits: see `DiT`; height and width divide by 2 once
            for each stage before the middle one.
        width: features at full resolution, even; twice as many at each next one, and on the way back up at full
            resolution.
        stages: of each stage, an odd number of them with the lowest resolution in the middle, the number of blocks (of
            convolutions), or a letter for each: "c" for a convolution, "a" for attention, "f" for AsCAN's convolution,
            "e" for EfficientViT's block, as in "fffa".
        head_width: features of a head of attention (EfficientViT's: 32).
        mlp_ratio: hidden width of the MLP over the features.
        num_classes: labels run over `[0, num_classes)`, and `num_classes` is the null label. 0: no labels.
        vector, image_channels: of these conditions, see `DiT`. 0: none.
        context_width: width of the entries of a sequence that is a condition, to which blocks of attention attend; see
            `DiT`. 0: none.
        time: False ignores t.
        conditioning: by what the blocks "e" and the last layer are told of time and label (all others by "modulation"):
            "modulation" (adaLN-zero), "weights" or "modulation+weights": for each example they make what is added to
            the weights of the first layer, of depthwise convolutions in the blocks "e", and of the last layer of their
            attention (the same in all blocks of one width).
        kernels: 0, or of how many base kernels these are mixed in the place of being made (`layers.Generator`).
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
        vector: int = 0,
        context_width: int = 0,
        image_channels: int = 0,
        time: bool = True,
        conditioning: str = "modulation",
        kernels: int = 0,
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
        stages = _letters(stages, scan)
        halvings = len(stages) // 2
        if any(side % 2**halvings for side in shape[:2]) or width % 2:
            raise ValueError(
                f"shape={shape}, width={width}: expected sides that divide by {2**halvings}, and an even width"
            )
        by = _conditioning(conditioning, kernels, stages)
        if context_width and not any("a" in stage for stage in stages):
            raise ValueError(f'context_width={context_width}: blocks of attention look at words, stages need an "a"')
        generated, self.modulated = "weights" in by, "modulation" in by
        self.dropout = dropout
        self.levels = (*range(halvings + 1), *(max(level, 1) for level in reversed(range(halvings))))
        grids = [tuple(side >> min(i, 2 * halvings - i) for side in shape[:2]) for i in range(len(stages))]
        self.widths = widths = tuple(width * 2**level for level in range(halvings + 1))
        cast = {"dtype": dtype, "rngs": rngs}
        self.embed = (
            GeneratedLinear(9 * self.features_in, width, width, kernels=kernels, **cast)
            if generated
            else Conv(self.features_in, width, **cast)
        )
        self.conditions = nnx.List(
            [Conditioner(w, num_classes=num_classes, time=time, vector=vector, rngs=rngs) for w in widths]
        )
        options = {
            "c": {},
            "f": {},
            "a": {"head_width": head_width, "context_width": context_width, "attention": attention},
            "e": {"head_width": head_width, "modulated": self.modulated, "kernels": kernels},
        }
        self.stack = nnx.List([])
        for letters, level, grid in zip(stages, self.levels, grids, strict=True):
            options["e"]["grid"] = grid if generated else None
            makes = [
                partial(BLOCKS[k], widths[level], mlp_ratio=mlp_ratio, dropout=dropout, dtype=dtype, **options[k])
                for k in letters
            ]
            self.stack.append(Stack(_in_turn(makes), len(letters), scan=scan, remat=remat, rngs=rngs))
        self.down = nnx.List([Conv(w, w // 2, bias=False, **cast) for w in widths[:-1]])
        self.up = nnx.List([Conv(w, 2 * w, bias=False, **cast) for w in reversed(widths[1:])])
        self.reduce = nnx.List([Linear(widths[i + 1], widths[max(i, 1)], **cast) for i in reversed(range(halvings))])
        out = {"kernel_init": zeros, "dtype": dtype, "out_dtype": at_least_float32(dtype)}
        self.modulation = Linear(2 * width, 4 * width, kernel_init=zeros, **cast) if self.modulated else None
        self.out = Conv(2 * width, self.features_out, **out, rngs=rngs)
        self.nothing = no_entry(context_width, rngs)
        attending = sorted({level for stage, level in zip(stages, self.levels, strict=True) if "e" in stage})
        self.projections = nnx.Dict(
            {str(i): Generator(widths[i], (2 * widths[i], widths[i]), kernels=kernels, **cast) for i in attending}
            if generated
            else {}
        )

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
        h = layer_norm(h)
        if self.modulation is not None:
            shift, scale = jnp.split(self.modulation(c)[:, None, None], 2, axis=-1)
            h = h * (1 + scale) + shift
        return self.images(self.out(tap("final", h)).reshape(len(h), -1, self.features_out))

    def as_side(self, blocks: int | None) -> Side:
        """The stages down to the middle one, added to the connections and what leaves the middle, as of a U-Net."""
        check_whole(blocks)
        halvings, self.modulation, self.out = len(self.down), None, None
        self.stack, self.up, self.reduce = nnx.List(list(self.stack)[: halvings + 1]), nnx.List([]), nnx.List([])
        kinds = [{type(block) for block in stack.blocks} for stack in self.stack]
        self.projections = nnx.Dict({i: made for i, made in self.projections.items() if BLOCKS["e"] in kinds[int(i)]})
        if all(BLOCKS["a"] not in kind for kind in kinds):
            self.nothing = None
        *last, middle = (f"block/{end - 1}" for end in accumulate(stack.depth for stack in self.stack))
        points = {last[i]: (f"skip/{halvings - 1 - i}", self.widths[i]) for i in reversed(range(halvings))}
        points[middle] = (middle, self.widths[halvings])
        return Side({"embed": (1, self.widths[0])}, points, convolved=True)

    def hinted(self, image: Array, xt: Any, cond: Any, channels: int, scale: int) -> dict[str, Array]:
        """The image, `scale` times as large as the state."""
        check_values(image, (self.check(xt), *(scale * side for side in self.shape[:-1]), channels))
        return {"embed": image}

    def body(
        self, xt: Any, t: Any, cond: Any = None, *, rng: Any = None, train: bool = False
    ) -> tuple[Image, Float[Array, "batch cond"]]:
        """What leaves the last block, and the vector of the condition. Arguments as above."""
        batch = self.check(xt)
        keys = dropout_keys(self.dropout, batch, rng, train)
        given, context = Given.of(cond).attended(self.nothing, batch, self.dtype)
        x, given = self.seen(xt, given)
        c = [condition(batch, t, given) for condition in self.conditions]
        c[1] = tap("condition", c[1])
        tap("sites", self.places())
        x = x.reshape(batch, *self.shape[:2], -1)
        if isinstance(self.embed, Conv):
            h = self.embed(x)
        else:
            h = self.embed(jnp.concatenate(surroundings(x), axis=-1), c[0])
        h = tap("embed", h)
        told = [Told(vector, context) for vector in c]
        for level, projection in self.projections.items():
            told[int(level)] = told[int(level)]._replace(projection=projection(c[int(level)]))
        first = [0, *accumulate(stack.depth for stack in self.stack)]

        def run(i: int, h: Array) -> Array:
            return run_blocks(self.stack[i], h, told[self.levels[i]], keys, first[i])[0]

        shown, halvings = [], len(self.down)
        for i, down in enumerate(self.down):
            shown.append(run(i, h))
            h = unshuffle(down(shown[-1]))
        h = run(halvings, h)
        for i, (up, reduce) in enumerate(zip(self.up, self.reduce, strict=True)):
            h = jnp.concatenate([shuffle(up(h)), tap(f"skip/{i}", shown.pop())], axis=-1)
            h = run(halvings + 1 + i, reduce(h))
        return h, c[1]


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


def _conditioning(conditioning: str, kernels: int, stages: Sequence[str]) -> set[str]:
    """By what blocks are told. Raises ValueError for what there is not, or where nothing can make weights."""
    by = check_conditioning(conditioning)
    if "attention" in by:
        raise ValueError(f'conditioning={conditioning!r}: expected "modulation", "weights" or both, joined by "+"')
    if "weights" in by and not any("e" in stage for stage in stages):
        raise ValueError(f'conditioning={conditioning!r} makes weights of EfficientViT\'s blocks: stages need an "e"')
    if kernels and "weights" not in by:
        raise ValueError(f"kernels={kernels} are mixed for conditioning='weights', not for {conditioning!r}")
    return by


def _letters(stages: Sequence[int | str], scan: bool) -> list[str]:
    """The blocks of each stage, a letter each."""
    letters = ["c" * stage if isinstance(stage, int) else stage for stage in stages]
    odd = len(letters) % 2 and len(letters) > 1
    if not odd or any(not stage or set(stage) - BLOCKS.keys() for stage in letters):
        raise ValueError(
            f"stages={tuple(stages)}: expected an odd number of them, 3 or more, of each the number of blocks (at "
            'least one), or a letter for each block: "c" (convolution), "a" (attention), "f" (AsCAN\'s convolution) or '
            '"e" (EfficientViT\'s block)'
        )
    if scan and any(len(set(stage)) > 1 for stage in letters):
        raise ValueError(f"stages={tuple(stages)}: a stage of several kinds of blocks cannot be scanned: scan=False")
    return letters
