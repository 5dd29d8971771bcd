"""A diffusion transformer for images, continuous or discrete."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from ddjax import random
from ddjax.denoisers.images import ImageNetwork
from ddjax.denoisers.layers.attention import among_related
from ddjax.denoisers.layers.basic import DType, Linear, dropout_keys
from ddjax.denoisers.layers.blocks import Block, FinalLayer, Stack
from ddjax.denoisers.layers.embed import Conditioner, sincos_2d
from ddjax.denoisers.taps import tap
from ddjax.denoisers.views import View
from ddjax.placement import constrain
from ddjax.types import SoftTokens

LABELS = 2**20  # a stream of random numbers apart from the layers'


class DiT(ImageNetwork):
    """Diffusion transformer with adaLN-zero (Peebles & Xie 2023, arXiv:2212.09748).

    An image `(batch, H, W, C)` is cut into `patch` x `patch` patches, one transformer site each. A continuous
    patch is projected linearly; the tokens of a discrete one are embedded, each channel in its own table,
    concatenated and projected. Positions are a learned table that starts as 2-D sines and cosines, so that
    a short run has them from the first step. The output layer starts at zero.

    Args:
        shape: (H, W, C) of one example.
        symbols_in: None for a continuous state (float xt); else xt is int in `[0, symbols_in)`
            (`process.num_states`: the mask counts).
        symbols_out: number of logits per site, for a discrete state only (`process.num_symbols`).
        out_channels: channels of a continuous output, default C.
        patch: side of a patch, divides H and W.
        width, depth, heads: of the transformer; heads divides width.
        mlp: "gelu", "gated" (SwiGLU), or "experts", with options of `layers.Experts` in `experts`.
        mlp_ratio: hidden width of the MLP (of each expert) over width.
        num_classes: labels run over `[0, num_classes)`, and `num_classes` is the null label. 0: no labels.
        relations: None, or for each of some relations a label of every patch, row by row: the heads, in turn, attend
            only to patches with the same label (`layers.attention.among_related`).
        latent: numbers of a latent that the network is told, `cond = {"z": (batch, latent), "cond": labels}`
            (`processes.AdaptiveGaussian`). 0: none.
        time: False ignores t.
        qkv_bias: whether queries, keys and values have biases (the authors' have).
        closed_times: of the time's frequencies, `closed` of `layers.time_embedding`.
        label_noise: noise on the embedded labels when train=True (`layers.embed.Conditioner`).
        dropout: rate on each branch of each block, when train=True.
        dtype: compute dtype; parameters and the output stay float32.
        embed_width: features per discrete token, default at least 32 (less if width is).
        bits: of a token, if tokens are fed as their bits, without embeddings (`layers.embed.TokenBits`): there are
            2**bits symbols, and a mask or not. 0: embeddings.
        cond_width: width of the conditioning vector, default `width`.
        attention: None, "xla" or "cudnn" (`layers.dot_product_attention`), or "linear" (`layers.LinearAttention`).
        scan, remat: see `layers.Stack`.
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
        patch: int = 1,
        width: int,
        depth: int,
        heads: int,
        mlp: str = "gelu",
        mlp_ratio: float = 4,
        experts: Mapping[str, Any] | None = None,
        num_classes: int = 0,
        relations: Sequence[Sequence[int]] | None = None,
        latent: int = 0,
        time: bool = True,
        qkv_bias: bool = False,
        closed_times: bool = False,
        label_noise: float = 0.0,
        dropout: float = 0.0,
        dtype: DType = jnp.float32,
        embed_width: int | None = None,
        bits: int = 0,
        cond_width: int | None = None,
        attention: str | None = None,
        scan: bool = False,
        remat: bool | str = False,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            shape=shape, symbols_in=symbols_in, symbols_out=symbols_out, out_channels=out_channels, patch=patch,
            width=width, embed_width=embed_width, bits=bits, dtype=dtype, rngs=rngs,
        )  # fmt: skip
        cond_width = cond_width or width
        self.dropout = dropout
        self.embed = Linear(self.features_in, width, dtype=dtype, rngs=rngs)
        self.relations = _relations(relations, heads, math.prod(self.grid))
        self.position = nnx.Param(jnp.asarray(sincos_2d(*self.grid, width)))
        self.condition = Conditioner(
            cond_width, num_classes=num_classes, time=time, latent=latent, label_noise=label_noise,
            closed=closed_times, rngs=rngs,
        )  # fmt: skip
        block = partial(
            Block, width, heads, mlp=mlp, mlp_width=int(mlp_ratio * width), cond_width=cond_width,
            qkv_bias=qkv_bias, dropout=dropout, dtype=dtype, attention=attention, experts=experts, grid=self.grid,
        )  # fmt: skip
        self.heads = heads
        self.stack = Stack(lambda rngs: block(rngs=rngs), depth, scan=scan, remat=remat, rngs=rngs)
        self.final = FinalLayer(width, self.features_out, cond_width=cond_width, dtype=dtype, rngs=rngs)

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
            cond: labels in `[0, num_classes]`; None is the null label. With `latent` `{"z": ..., "cond": labels}`. Or
                a dict of "groups" and "clean", or of "past" and "sites", patch by patch, and the rest as "cond"
                (`views.View`).
            rng: one key, or one per example, for dropout and label_noise; needed when train=True and one is not 0.
            train: whether dropout acts.

        Returns:
            float32, `(batch, H, W, out_channels)`, or logits `(batch, H, W, C, symbols_out)`; 0 where it did not run.

        Raises:
            ValueError: for a shape or dtype that the network was not built for.
        """
        batch, length = self.check(xt), self.position[...].shape[0]
        view = View.of(cond)
        view.check(xt, 4, self.stack.depth, length, self.condition.time)
        if view.segments is not None:
            raise ValueError('cond["segments"] is for windows of text: an image is one document')
        if self.relations and view.groups is not None:
            raise ValueError("relations say who sees whom, and so do groups: build the network without relations")
        layout = view.layout(length, view.groups, among_related(self.relations, self.heads) if self.relations else None)
        keys = dropout_keys(self.dropout, batch, rng, train)
        label_keys = dropout_keys(self.condition.label_noise, batch, rng, train)
        label_keys = None if label_keys is None else random.fold_in(label_keys, LABELS)
        c = constrain(tap("condition", self.condition(batch, t, view.cond, keys=label_keys)), "batch", None)
        tap("sites", self.places())
        x = self.features(view.seen(self.patches(xt), self.patches(view.clean)))
        position = self.position[...].astype(self.dtype)
        if layout is not None:
            position = jnp.take(position, layout.positions, axis=0, mode="clip")
        h = tap("embed", self.embed(x) + position)
        h = self.stack(h, c, keys, layout)
        h = h if view.clean is None else h[:, :length]
        return self.images(view.everywhere(self.final(h, c), length))


def _relations(relations: Sequence[Sequence[int]] | None, heads: int, patches: int) -> tuple[tuple[int, ...], ...]:
    """As tuples. Raises ValueError unless there is a head for each, and a label for each patch."""
    relations = tuple(tuple(int(label) for label in labels) for labels in relations or ())
    if len(relations) > heads or any(len(labels) != patches for labels in relations):
        raise ValueError(
            f"relations: expected at most {heads} (one for each head) with a label for each of {patches} patches, "
            f"got {len(relations)} of {[len(labels) for labels in relations]} labels"
        )
    return relations
