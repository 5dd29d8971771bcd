"""A diffusion transformer for images, continuous or discrete."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from ddjax import random
from ddjax.denoisers.layers.attention import among_related
from ddjax.denoisers.layers.basic import DType, Linear, dropout_keys
from ddjax.denoisers.layers.blocks import Block, FinalLayer, Stack
from ddjax.denoisers.layers.embed import Conditioner, TokenBits, TokenEmbed, sincos_2d
from ddjax.denoisers.taps import tap
from ddjax.denoisers.views import View
from ddjax.placement import constrain
from ddjax.types import SoftTokens

LABELS = 2**20  # a stream of random numbers apart from the layers'


class DiT(nnx.Module):
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
        label_noise: noise on the embedded labels when train=True (`layers.embed.Conditioner`).
        dropout: rate on each branch of each block, when train=True.
        dtype: compute dtype; parameters and the output stay float32.
        embed_width: features per discrete token, default at least 32 (less if width is).
        bits: of a token, if tokens are fed as their bits, without embeddings (`layers.embed.TokenBits`): there are
            2**bits symbols, and a mask or not. 0: embeddings.
        cond_width: width of the conditioning vector, default `width`.
        attention: None, "xla" or "cudnn" (`layers.dot_product_attention`).
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
        _check_config(shape, symbols_in, symbols_out, out_channels, patch, embed_width, bits)
        height, wide, channels = shape
        sites = patch * patch * channels  # of one patch
        cond_width = cond_width or width
        self.shape, self.patch = tuple(shape), patch
        self.symbols_in, self.symbols_out = symbols_in, symbols_out
        self.out_channels = out_channels or channels
        self.dropout, self.dtype = dropout, jnp.dtype(dtype)

        if symbols_in is None:
            self.tokens = None
            self.embed = Linear(sites, width, dtype=dtype, rngs=rngs)
            features_out = patch * patch * self.out_channels
        else:
            features = bits or embed_width or max(min(32, width), width // sites)
            self.tokens = (
                TokenBits(symbols_in, bits, channels=channels)
                if bits
                else TokenEmbed(symbols_in, features, channels=channels, rngs=rngs)
            )
            self.embed = Linear(sites * features, width, dtype=dtype, rngs=rngs)
            features_out = sites * symbols_out
        self.relations = _relations(relations, heads, height // patch * (wide // patch))
        self.position = nnx.Param(jnp.asarray(sincos_2d(height // patch, wide // patch, width)))
        self.condition = Conditioner(
            cond_width, num_classes=num_classes, time=time, latent=latent, label_noise=label_noise, rngs=rngs
        )
        block = partial(
            Block, width, heads, mlp=mlp, mlp_width=int(mlp_ratio * width), cond_width=cond_width,
            dropout=dropout, dtype=dtype, attention=attention, experts=experts,
        )  # fmt: skip
        self.heads = heads
        self.stack = Stack(lambda rngs: block(rngs=rngs), depth, scan=scan, remat=remat, rngs=rngs)
        self.final = FinalLayer(width, features_out, cond_width=cond_width, dtype=dtype, rngs=rngs)

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
        state = hard_state(xt, 4, self.symbols_in)
        check_state(state, (("height", "width", "channels"), self.shape), self.symbols_in)
        batch, length = state.shape[0], self.position[...].shape[0]
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
        tap("sites", self._places())
        patches = [jax.tree.map(lambda v: _patches(v, self.patch), v) for v in (xt, view.clean)]
        x = view.seen(*patches)  # (batch, patches, patch, patch, channels, ...)
        if self.tokens is not None:
            x = self.tokens(x)
        position = self.position[...].astype(self.dtype)
        if layout is not None:
            position = jnp.take(position, layout.positions, axis=0, mode="clip")
        h = tap("embed", self.embed(x.reshape(*x.shape[:2], -1)) + position)
        h = self.stack(h, c, keys, layout)
        h = h if view.clean is None else h[:, :length]
        return self._images(view.everywhere(self.final(h, c), length))

    def _places(self) -> np.ndarray:
        """The number of the patch that each site of a state is in."""
        height, wide, channels = self.shape
        rows, columns = (np.arange(side, dtype=np.int32) // self.patch for side in (height, wide))
        place = rows[:, None] * (wide // self.patch) + columns
        return np.broadcast_to(place[..., None], (height, wide, channels))

    def _images(self, y: Float[Array, "batch patches features"]) -> Array:
        height, wide, channels = self.shape
        p, (rows, columns) = self.patch, (height // self.patch, wide // self.patch)
        last = (self.out_channels,) if self.symbols_out is None else (channels, self.symbols_out)
        y = y.reshape(y.shape[0], rows, columns, p, p, *last)
        return jnp.swapaxes(y, 2, 3).reshape(y.shape[0], height, wide, *last)


def _relations(relations: Sequence[Sequence[int]] | None, heads: int, patches: int) -> tuple[tuple[int, ...], ...]:
    """As tuples. Raises ValueError unless there is a head for each, and a label for each patch."""
    relations = tuple(tuple(int(label) for label in labels) for labels in relations or ())
    if len(relations) > heads or any(len(labels) != patches for labels in relations):
        raise ValueError(
            f"relations: expected at most {heads} (one for each head) with a label for each of {patches} patches, "
            f"got {len(relations)} of {[len(labels) for labels in relations]} labels"
        )
    return relations


def hard_state(xt: Array | SoftTokens, axes: int, symbols_in: int | None) -> Array:
    """The shape and dtype of the tokens that soft ones stand for; another state as it is.

    Raises ValueError for soft tokens that do not fit the network's table.
    """
    if isinstance(xt, SoftTokens):
        if xt.ids.shape != xt.weights.shape or not jnp.issubdtype(xt.weights.dtype, jnp.floating):
            raise ValueError(
                f"soft tokens have ids of shape {xt.ids.shape} and {xt.weights.dtype} weights of shape "
                f"{xt.weights.shape}: expected one float weight for each id"
            )
        return jax.ShapeDtypeStruct(xt.ids.shape[:-1], xt.ids.dtype)
    if symbols_in is None or xt.ndim != axes + 1 or not jnp.issubdtype(xt.dtype, jnp.floating):
        return xt
    if xt.shape[-1] != symbols_in:
        raise ValueError(f"soft tokens have shape {xt.shape}; the last axis must hold symbols_in={symbols_in} numbers")
    return jax.ShapeDtypeStruct(xt.shape[:-1], jnp.int32)


def check_state(xt: Array, expected: tuple[tuple[str, ...], tuple[int, ...]], symbols_in: int | None) -> None:
    """Raise ValueError unless `xt` has the batch axis, sizes and kind of dtype the network was built for."""
    names, sizes = expected
    described = f"(batch, {', '.join(names)}) = (batch, {', '.join(map(str, sizes))})"
    if xt.ndim != len(sizes) + 1:
        raise ValueError(
            f"xt has {xt.ndim} axes, shape {xt.shape}; expected {len(sizes) + 1}: {described} "
            "(the first axis is always the batch, and a single channel still has its axis)"
        )
    if xt.shape[1:] != sizes:
        raise ValueError(f"xt has shape {xt.shape}; the network was built for {described}")
    if symbols_in is None and not jnp.issubdtype(xt.dtype, jnp.floating):
        raise ValueError(f"xt has dtype {xt.dtype}; a continuous network takes floats: set symbols_in for tokens")
    if symbols_in is not None and not jnp.issubdtype(xt.dtype, jnp.integer):
        raise ValueError(
            f"xt has dtype {xt.dtype}; with symbols_in={symbols_in} the network takes integer tokens: "
            "leave symbols_in out for a continuous state"
        )


def _patches(x: Array, p: int) -> Array:
    batch, height, width, *rest = x.shape
    x = jnp.swapaxes(x.reshape(batch, height // p, p, width // p, p, *rest), 2, 3)
    return x.reshape(batch, -1, p, p, *rest)


def _check_config(
    shape: tuple, symbols_in: int | None, symbols_out: int | None, out_channels: int | None, patch: int,
    embed_width: int | None, bits: int,
) -> None:  # fmt: skip
    if len(shape) != 3:
        raise ValueError(f"shape={shape}: expected (height, width, channels) of one example, without the batch")
    if patch < 1 or shape[0] % patch or shape[1] % patch:
        raise ValueError(f"patch={patch} does not divide the image's height and width {tuple(shape[:2])}")
    if (symbols_in is None) != (symbols_out is None):
        raise ValueError(
            f"symbols_in={symbols_in}, symbols_out={symbols_out}: give both for a discrete state "
            "(num_states and num_symbols of the process), neither for a continuous one"
        )
    if symbols_in is not None and out_channels is not None:
        raise ValueError(
            f"out_channels={out_channels} is for a continuous state; a discrete one has symbols_out logits"
        )
    if symbols_in is None and embed_width is not None:
        raise ValueError(f"embed_width={embed_width} is for a discrete state; a continuous patch is projected directly")
    if bits and (symbols_in not in (2**bits, 2**bits + 1) or embed_width is not None):
        raise ValueError(
            f"bits={bits} is for 2**bits symbols, with a mask or without, and no embed_width; "
            f"got symbols_in={symbols_in}, embed_width={embed_width}"
        )
