"""A diffusion transformer for images, sequences and volumes, continuous or discrete."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from ddjax import auxiliary, random
from ddjax.denoisers import graphs
from ddjax.denoisers.given import Given
from ddjax.denoisers.images import ImageNetwork
from ddjax.denoisers.layers.attention import Layout, among_related
from ddjax.denoisers.layers.basic import DType, Linear, dropout_keys
from ddjax.denoisers.layers.blocks import Block, FinalLayer, Stack, check_conditioning
from ddjax.denoisers.layers.cross import no_entry
from ddjax.denoisers.layers.embed import Conditioner, sincos
from ddjax.denoisers.layers.generated import GeneratedLinear, Generator
from ddjax.denoisers.layers.merging import Sizes, check_sizes
from ddjax.denoisers.layers.routing import Route, channel_mask, counted, each_routed, nearest_grid, reconstruction
from ddjax.denoisers.sides import Side, check_blocks, in_place, keep
from ddjax.denoisers.views import View
from ddjax.placement import constrain
from ddjax.taps import tap
from ddjax.types import SoftTokens

LABELS = 2**20  # a stream of random numbers apart from the layers'


class DiT(ImageNetwork):
    """Diffusion transformer with adaLN-zero (Peebles & Xie 2023, arXiv:2212.09748).

    An image `(batch, H, W, C)` is cut into `patch` x `patch` patches, one transformer site each. A continuous
    patch is projected linearly; the tokens of a discrete one are embedded, each channel in its own table,
    concatenated and projected. Positions are a learned table that starts as sines and cosines along each axis, so that
    a short run has them from the first step. The output layer starts at zero. A sequence `(batch, L, C)` and a volume
    `(batch, D, H, W, C)` are images of one side and of three.

    Args:
        shape: (H, W, C) of one example; or (L, C), or (D, H, W, C).
        symbols_in: None for a continuous state (float xt); else xt is int in `[0, symbols_in)`
            (`process.num_states`: the mask counts).
        symbols_out: number of logits per site, for a discrete state only (`process.num_symbols`).
        out_channels: channels of a continuous output, default C.
        patch: side of a patch, divides all sides.
        width, depth, heads: of the transformer; heads divides width.
        mlp: "gelu", "gated" (SwiGLU), "geglu", "experts" or "pooled", with options of `layers.Experts` or
            `PooledExperts` in `experts`.
        mlp_ratio: hidden width of the MLP (of each expert) over width.
        num_classes: labels run over `[0, num_classes)`, and `num_classes` is the null label. 0: no labels.
        relations: None, or for each of some relations a label of every patch, row by row: the heads, in turn, attend
            only to patches with the same label (`layers.attention.among_related`).
        neighbours: None, or for each patch the patches that it attends to, itself among them, as a graphical model of
            the data says (`graphs.GraphicalModel`), or blocks (`graphs.unidirectional`). Where they are few of many,
            only these are computed.
        kinds: None, or a number of each patch: those of one number share one position, and are exchangeable.
        latent: numbers of a latent that the network is told, `cond = {"z": (batch, latent), "cond": labels}`
            (`processes.AdaptiveGaussian`). 0: none.
        vector: numbers of a vector that is a condition, `cond = {"vector": (batch, vector), ...}`. 0: none.
        context_width: width of the entries of a sequence that is a condition, `cond = {"sequence": (batch, entries,
            context_width), "valid": which there are, ...}`: every block attends to them (`layers.CrossAttention`);
            without a valid entry to a learned one. A new network ignores it. 0: none.
        image_channels: of an image that is a condition, `cond = {"image": (batch, H, W, image_channels), ...}`, values
            beside those of the state. 0: none. What a condition may hold, and its nulls: `given.Given`.
        time: False ignores t.
        qkv_bias: whether queries, keys and values have biases (the authors' have).
        conditioning: by what blocks are told of the time and of what is added to it, one or several joined by "+":
            "modulation" (adaLN-zero); "attention": of queries, keys and values, a linear function of the site plus one
            of the condition (Hatamizadeh et al. 2023, "DiffiT"; alone it stands without a silu, and the last layer
            behind one); "weights": it makes for each example what is added to the weights of the first layer, of
            attention's last one (the same in all blocks) and of a convolution within the MLP (Cai et al. 2024, "CAN").
        kernels: 0, or of how many base kernels "weights" mix those of each example, in the place of making them
            (adaptive kernel selection; `layers.Generator`).
        relative: whether each head adds a learned bias for every difference of places (`layers.Attention`).
        rotary: whether queries and keys are turned by the place, row and column (`layers.rope_2d`; of a sequence
            `layers.rope`), in the place of the table of positions.
        closed_times: of the time's frequencies, `closed` of `layers.time_embedding`.
        label_noise: noise on the embedded labels when train=True (`layers.embed.Conditioner`).
        dropout: rate on each branch of each block, when train=True.
        dtype: compute dtype; parameters and the output stay float32.
        embed_width: features per discrete token, default at least 32 (less if width is).
        bits: of a token, if tokens are fed as their bits, without embeddings (`layers.embed.TokenBits`): there are
            2**bits symbols, and a mask or not. 0: embeddings.
        cond_width: width of the conditioning vector, default `width`.
        attention: None, "xla" or "cudnn" (`layers.dot_product_attention`), or "linear" (`layers.LinearAttention`).
        route: None, or (start, stop, share) of the sites that bypass these blocks in training, or several of these
            (TREAD; `layers.Stack`).
        route_loss: None, or the weight of a loss that accounts for the routes in training (TREAD's first version, 0.1):
            the objective then learns from the sites that did not bypass, route by route (`layers.routing.counted`; what
            is reported is its mean over all sites), and as many outputs as the state has channels reconstruct the noisy
            input where sites bypassed (`reconstruction`; theirs are of the denoised image, kind "x0"). 0: only the
            first of the two, also of a discrete state.
        task_share: share of the channels that blocks use at a time, a window that moves with t (denoising task routing;
            `layers.routing.channel_mask`). 1: all.
        downsample: when not training, sites attend to every `downsample`-th place along each axis only (ToDo, Smith et
            al. 2024); no other weights. 1: to all.
        merge: None, or (pool, targets, kept), numbers of patches: when not training, and told how important each is,
            `cond = {"importance": (batch, patches), ...}`, only `kept` of them attend (`layers.merging`;
            `solvers.Merging` tells it). No other weights.
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
        heads: int,
        mlp: str = "gelu",
        mlp_ratio: float = 4,
        experts: Mapping[str, Any] | None = None,
        num_classes: int = 0,
        relations: Sequence[Sequence[int]] | None = None,
        neighbours: Sequence[Sequence[int]] | None = None,
        kinds: Sequence[int] | None = None,
        latent: int = 0,
        vector: int = 0,
        context_width: int = 0,
        image_channels: int = 0,
        time: bool = True,
        qkv_bias: bool = False,
        conditioning: str = "modulation",
        kernels: int = 0,
        relative: bool = False,
        rotary: bool = False,
        closed_times: bool = False,
        label_noise: float = 0.0,
        dropout: float = 0.0,
        dtype: DType = jnp.float32,
        embed_width: int | None = None,
        bits: int = 0,
        cond_width: int | None = None,
        attention: str | None = None,
        route: Route | Sequence[Route] | None = None,
        route_loss: float | None = None,
        task_share: float = 1.0,
        downsample: int = 1,
        merge: Sizes | None = None,
        scan: bool = False,
        remat: bool | str = False,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            shape=shape, symbols_in=symbols_in, symbols_out=symbols_out, out_channels=out_channels, patch=patch,
            width=width, embed_width=embed_width, bits=bits, image_channels=image_channels, dtype=dtype, rngs=rngs,
        )  # fmt: skip
        if not 0 < task_share <= 1 or (task_share < 1 and not time):
            raise ValueError(f"task_share={task_share}, time={time}: expected a share in (0, 1], 1 without time")
        cond_width = cond_width or width
        self.dropout = dropout
        by = check_conditioning(conditioning)
        if kernels and "weights" not in by:
            raise ValueError(f"kernels={kernels} are mixed for conditioning='weights', not for {conditioning!r}")
        self.embed = (
            GeneratedLinear(self.features_in, width, cond_width, kernels=kernels, dtype=dtype, rngs=rngs)
            if "weights" in by
            else Linear(self.features_in, width, dtype=dtype, rngs=rngs)
        )
        patches = math.prod(self.grid)
        self.relations = _relations(relations, heads, patches)
        self.neighbours = None if neighbours is None else graphs.check_neighbours(neighbours, patches)
        self.kinds = None if kinds is None else tuple(int(kind) for kind in kinds)
        if self.kinds is not None and (len(self.kinds) != patches or min(self.kinds) < 0):
            raise ValueError(f"kinds: expected a number from 0 on for each of {patches} patches, got {len(self.kinds)}")
        if (relations or downsample > 1) and neighbours is not None:
            raise ValueError("neighbours say who sees whom: build the network without relations and downsample")
        rows = self.grid if self.kinds is None else (max(self.kinds) + 1,)
        self.position = None if rotary else nnx.Param(jnp.asarray(sincos(rows, width)))
        self.condition = Conditioner(
            cond_width, num_classes=num_classes, time=time, latent=latent, vector=vector, label_noise=label_noise,
            closed=closed_times, silu=conditioning != "attention", rngs=rngs,
        )  # fmt: skip
        block = partial(
            Block, width, heads, mlp=mlp, mlp_width=int(mlp_ratio * width), cond_width=cond_width,
            conditioning=conditioning, kernels=kernels, relative=self.grid if relative else None, rotary=rotary,
            qkv_bias=qkv_bias, dropout=dropout, dtype=dtype, attention=attention, experts=experts, grid=self.grid,
            context_width=context_width,
            merge=None if merge is None else check_sizes(merge, math.prod(self.grid)),
        )  # fmt: skip
        self.heads, self.width = heads, width
        if route_loss is not None and (not route or route_loss < 0 or (route_loss and symbols_in is not None)):
            raise ValueError(
                f"route_loss={route_loss}: expected a route, and a weight of 0 or more, 0 for a discrete state"
            )
        self.route_loss = route_loss
        self.task_share, self.downsample, self.merges = task_share, downsample, merge is not None
        nearest_grid(self.grid, downsample)  # raises for what cannot be
        if downsample > 1 and relations:
            raise ValueError("downsample thins out keys, and relations may need all: build the network without one")
        self.stack = Stack(lambda rngs: block(rngs=rngs), depth, scan=scan, remat=remat, route=route, rngs=rngs)
        if self.kinds is not None and (relative or rotary or "weights" in by):
            raise ValueError(
                "patches of one kind are exchangeable: kinds go without relative or rotary places, or convolutions"
            )
        if relative and neighbours is not None:
            raise ValueError("neighbours of its own for each patch go without relative positions")
        if "weights" in by and (relations or neighbours is not None or route or downsample > 1 or merge):
            raise ValueError(
                f"conditioning={conditioning!r} has convolutions, which need all patches in their places: build the "
                "network without relations, neighbours, route, downsample and merge"
            )
        self.final = FinalLayer(
            width, self.features_out, cond_width=cond_width if "modulation" in by else 0,
            silu=conditioning == "attention", dtype=dtype, rngs=rngs,
        )  # fmt: skip
        # Last, so that a network without it has the initial weights that it had.
        self.nothing = no_entry(context_width, rngs)
        shared = {"kernels": kernels, "dtype": dtype, "rngs": rngs}
        self.projection = Generator(cond_width, (width, width), **shared) if "weights" in by else None

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
            xt: the state; a token outside `[0, symbols_in)` makes the example's output NaN. Or soft tokens,
                embedded by their expectation: probabilities over the symbols, or `SoftTokens`.
            t: time in [0, 1].
            cond: labels in `[0, num_classes]`; None is the null label. Or a dict of what else the network is told
                (`given.Given`: "z", "vector", "sequence", "valid", "image"), and of how it runs: "groups" and "clean",
                or "past" and "sites", patch by patch (`views.View`); with labels, or the rest, as "cond".
            rng: one key, or one per example, for dropout, label_noise and a route; needed when train=True and one is
                there.
            train: whether dropout acts, and the route.

        Returns:
            float32, `(batch, H, W, out_channels)`, or logits `(batch, H, W, C, symbols_out)`; 0 where it did not run.

        Raises:
            ValueError: for a shape or dtype that the network was not built for.
        """
        h, c, view = self.body(xt, t, cond, rng=rng, train=train)
        y = self.final(h, c)
        if train and self.route_loss is not None:
            y = self._of_routes(y, xt, view, rng)
        return self.images(view.everywhere(y, math.prod(self.grid)))

    def as_side(self, blocks: int | None) -> Side:
        """Its first blocks, each added to the trunk's (Chen et al. 2024, PixArt-delta, section 3.3)."""
        keep(self.stack, check_blocks(blocks, self.stack.depth))
        self.final = None
        names = [f"block/{i}" for i in range(self.stack.depth)]
        return Side({"embed": (self.patch ** len(self.grid), self.width)}, in_place(names, self.width))

    def hinted(self, image: Array, xt: Any, cond: Any, channels: int, scale: int) -> dict[str, Array]:
        """What stands in each patch. Raises ValueError where the condition tells of a past."""
        return {"embed": View.of(cond).hint(super().hinted(image, xt, cond, channels, scale)["embed"])}

    def body(
        self, xt: Any, t: Any, cond: Any = None, *, rng: Any = None, train: bool = False
    ) -> tuple[Float[Array, "batch sites width"], Float[Array, "batch cond"], View]:
        """What leaves the last block, with the vector of the condition and how it was run. Arguments as above."""
        batch, length = self.check(xt), math.prod(self.grid)
        view = View.of(cond)
        given = Given.of(view.cond)
        view.check(xt, len(self.shape) + 1, self.stack.depth, length, self.condition.time)
        if view.segments is not None:
            raise ValueError('cond["segments"] is for windows of text: an image is one document')
        own = self._own_layout(length, sparse=view.past is None)
        if own is not None and view.groups is not None:
            raise ValueError("relations say who sees whom, or neighbours, and so do groups: build the network without")
        layout = view.layout(length, view.groups, own)
        if self.downsample > 1 and not train:
            layout = self._downsampled(layout, view)
        keys = dropout_keys(self.dropout, batch, rng, train)
        label_keys = dropout_keys(self.condition.label_noise, batch, rng, train)
        label_keys = None if label_keys is None else random.fold_in(label_keys, LABELS)
        told, context = given.attended(self.nothing, batch, self.dtype)
        if self.image_channels:
            told = told.without("image")
        importance = None
        if self.merges:
            told, importance = told.without("importance"), None if train else given.importance
        if importance is not None and (layout is not None or importance.shape != (batch, length)):
            raise ValueError(
                f'cond["importance"] has shape {importance.shape}; expected {(batch, length)}, for a network whose '
                "patches all attend to all"
            )
        c = constrain(tap("condition", self.condition(batch, t, told, keys=label_keys)), "batch", None)
        tap("sites", self.places())
        x = self.features(view.seen(self.patches(xt), self.patches(view.clean)))
        if self.image_channels:
            image = view.image(self.beside(given.image, batch, self.image_channels))
            x = jnp.concatenate([x, image.astype(x.dtype)], axis=-1)
        generated = self.projection is not None
        if generated and layout is not None:
            raise ValueError("conditioning by weights has convolutions: all patches run, once, and see each other")
        h = tap("embed", self._placed(self.embed(x, c) if generated else self.embed(x), layout))
        channels = None
        if self.task_share < 1:
            channels = channel_mask(jnp.broadcast_to(t, (batch,)), self.width, self.task_share)
        routes = self.stack.route_keys(batch, rng, train)
        more = {"context": context, "channels": channels, "importance": importance, "train": train}
        more["projection"] = self.projection(c) if generated else None
        h = self.stack(h, c, keys, layout, route_keys=routes, **more)
        return h if view.clean is None else h[:, :length], c, view

    def _placed(self, h: Array, layout: Layout | None) -> Array:
        """With the positions added; rotary ones are the blocks' own."""
        if self.position is None:
            return h
        position = self.position[...].astype(self.dtype)
        if self.kinds is not None:
            position = position[np.asarray(self.kinds)]
        return h + (position if layout is None else jnp.take(position, layout.positions, axis=0, mode="clip"))

    def _of_routes(self, y: Array, xt: Any, view: View, rng: Any) -> Array:
        """The output as losses see it; tells the auxiliary loss."""
        if view.clean is not None:
            raise ValueError("route_loss is of the sites of one pass: it goes without a clean state beside")
        kept = each_routed(self.stack.route_keys(y.shape[0], rng, True), y.shape[1], self.stack.routes)
        shown, went = counted(y, kept)
        if self.route_loss:
            own = y.reshape(*y.shape[:2], -1, self.out_channels)[..., : self.shape[-1]].reshape(*y.shape[:2], -1)
            noisy = self.patches(xt).reshape(own.shape)
            auxiliary.add_loss("route_reconstruction", self.route_loss * reconstruction(own, noisy, went))
        return shown

    def _own_layout(self, length: int, *, sparse: bool) -> Layout | None:
        """Who sees whom, as the network itself says (None: all)."""
        if self.relations:
            return among_related(self.relations, self.heads)
        if self.neighbours is None:
            return None
        few, there = graphs.padded(self.neighbours)
        if sparse and 4 * few.shape[1] <= length:  # gathered keys cost more than those of one product, each
            return Layout(jnp.arange(length), jnp.asarray(there), neighbours=few)
        return Layout(jnp.arange(length), jnp.asarray(graphs.mask(self.neighbours)))

    def _downsampled(self, layout: Layout | None, view: View) -> Layout:
        if view.groups is not None or view.past is not None:
            raise ValueError("downsample thins out keys: it goes with neither groups of sites nor a past")
        layout = Layout(jnp.arange(math.prod(self.grid)), None) if layout is None else layout
        return layout.seeing(nearest_grid(self.grid, self.downsample))


def _relations(relations: Sequence[Sequence[int]] | None, heads: int, patches: int) -> tuple[tuple[int, ...], ...]:
    """As tuples. Raises ValueError unless there is a head for each, and a label for each patch."""
    relations = tuple(tuple(int(label) for label in labels) for labels in relations or ())
    if len(relations) > heads or any(len(labels) != patches for labels in relations):
        raise ValueError(
            f"relations: expected at most {heads} (one for each head) with a label for each of {patches} patches, "
            f"got {len(relations)} of {[len(labels) for labels in relations]} labels"
        )
    return relations
