"""The transformer block that images and texts share, and the stack of them: unrolled or scanned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from ddjax import auxiliary, random
from ddjax.denoisers.layers.attention import Attention, Layout
from ddjax.denoisers.layers.basic import (
    MLP,
    DType,
    GatedMLP,
    Linear,
    at_least_float32,
    check_rate,
    dropout,
    example_keys,
    make_norm,
    modulate,
    per_site,
    zeros,
)
from ddjax.denoisers.layers.cross import Context, CrossAttention
from ddjax.denoisers.layers.experts import Experts
from ddjax.denoisers.layers.generated import GeneratedMLP
from ddjax.denoisers.layers.linear_attention import LinearAttention
from ddjax.denoisers.layers.merging import Sizes, merging
from ddjax.denoisers.layers.pooled_experts import PooledExperts
from ddjax.denoisers.layers.routing import Route, check_routes, each_routed
from ddjax.placement import constrain
from ddjax.taps import Below, active, refuse, tap
from ddjax.types import Params

ROUTE = 2**20 + 1  # a stream of random numbers apart from the layers'
CONDITIONING = ("modulation", "attention", "weights")
MLPS = {
    "gelu": MLP, "gated": GatedMLP, "geglu": partial(GatedMLP, activation="exact gelu", bias=True), "experts": Experts,
    "pooled": PooledExperts,
}  # fmt: skip

# What the forward pass keeps for the backward pass, which computes the rest again.
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "everything": jax.checkpoint_policies.everything_saveable,
    "offload_dots": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host"),
}


class Block(nnx.Module):
    """A transformer block under adaLN-zero (Peebles & Xie 2023, section 3.2).

    The condition gives six vectors, shift, scale and gate of the attention and of the MLP. Their layer starts
    at zero, so that a new block is the identity. Dropout acts on each branch before its gate.

    mlp: "gelu", "gated" (SwiGLU), "geglu" (GEGLU, exact, with biases), or "experts" or "pooled", of which `experts`
        are the options (`layers.Experts`, `layers.PooledExperts`).
    cond_width: of the condition. 0: there is none, no modulation and no gate: `h + attention(norm(h))`, then the MLP.
    conditioning: by what the block is told of it, one or several joined by "+": "modulation" (adaLN-zero); "attention"
        (`Attention(told=)`); "weights": those of the last layer of attention, which come from outside (`projection`),
        and of a convolution within the MLP (`layers.generated`; needs the grid of patches).
    kernels: of `layers.Generator`, where weights are made.
    rotary, qkv_bias, out_bias, relative, kv_heads: of `layers.Attention`; on a grid of two axes rotary positions are
        rows and columns.
    activation: of a "gated" MLP.
    norm: "plain" (without parameters), "scaled" (with a scale of its own), "affine" (and a shift) or "rms".
    epsilon: of the norm.
    attention: `Attention`'s implementation, or "linear" (`LinearAttention`), which needs the grid of patches.
    context_width: of the entries of a sequence that sites attend to between the two (`CrossAttention`); 0: none.
    merge: (pool, targets, kept), numbers of sites (`layers.merging`).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        mlp: str,
        mlp_width: int,
        cond_width: int,
        conditioning: str = "modulation",
        kernels: int = 0,
        rotary: bool | float = False,
        qkv_bias: bool = False,
        out_bias: bool = True,
        relative: tuple[int, ...] | None = None,
        kv_heads: int | None = None,
        activation: str = "silu",
        norm: str = "plain",
        epsilon: float = 1e-6,
        dropout: float = 0.0,
        dtype: DType = jnp.float32,
        attention: str | None = None,
        experts: Mapping[str, Any] | None = None,
        grid: tuple[int, ...] | None = None,
        context_width: int = 0,
        merge: Sizes | None = None,
        rngs: nnx.Rngs,
    ):
        if mlp not in MLPS:
            raise ValueError(f"mlp={mlp!r}: expected one of {', '.join(map(repr, MLPS))}")
        if experts and mlp not in ("experts", "pooled"):
            raise ValueError(f'experts={dict(experts)} are options of mlp="experts" or "pooled", not of mlp={mlp!r}')
        if activation != "silu" and mlp != "gated":
            raise ValueError(f'activation={activation!r} is an option of mlp="gated", not of mlp={mlp!r}')
        check_rate(dropout)
        self.dropout, self.merge, self.pooled = dropout, merge, mlp == "pooled"
        by = check_conditioning(conditioning)
        self.generated = "weights" in by
        if attention == "linear" and (grid is None or rotary or qkv_bias or kv_heads or not out_bias):
            raise ValueError("attention='linear' is for the patches of images, with biases behind it alone")
        if attention == "linear" and (relative is not None or by != {"modulation"}):
            raise ValueError("attention='linear' has no scores to add to, and is told nothing: 'modulation'")
        if self.generated and (mlp != "gelu" or grid is None):
            raise ValueError(f"conditioning={conditioning!r} is for the patches of images and mlp='gelu', not {mlp!r}")
        if rotary and len(grid or ()) > 2:
            raise ValueError(f"rotary positions are of a row or of rows and columns, not of a grid {grid}")
        if merge is not None and (relative is not None or rotary):
            raise ValueError("merged sites have no place: merge goes without relative and without rotary positions")
        self.attention = (
            LinearAttention(width, heads, grid, dtype=dtype, rngs=rngs)
            if attention == "linear"
            else Attention(
                width, heads, rotary=rotary, places=grid if len(grid or ()) == 2 else None, qkv_bias=qkv_bias,
                out_bias=out_bias, relative=relative, kv_heads=kv_heads, told=cond_width if "attention" in by else 0,
                dtype=dtype, implementation=attention, rngs=rngs,
            )
        )  # fmt: skip
        options = {"activation": activation} if mlp == "gated" else experts or {}
        self.mlp = (
            GeneratedMLP(width, mlp_width, grid, cond_width, kernels=kernels, dtype=dtype, rngs=rngs)
            if self.generated
            else MLPS[mlp](width, mlp_width, dtype=dtype, **options, rngs=rngs)
        )
        self.norm_a, self.norm_m = (make_norm(norm, width, epsilon) for _ in range(2))
        modulated = cond_width and "modulation" in by
        self.modulation = (
            Linear(cond_width, 6 * width, kernel_init=zeros, dtype=dtype, rngs=rngs) if modulated else None
        )
        self.cross = (
            CrossAttention(
                width, context_width, heads, norm=norm, epsilon=epsilon, dtype=dtype, implementation=attention,
                rngs=rngs,
            )
            if context_width
            else None
        )  # fmt: skip

    def __call__(
        self,
        h: Float[Array, "batch sites width"],
        c: Float[Array, "batch *groups cond"] | None,
        *,
        keys: Key[Array, " batch"] | None = None,
        name: str | None = None,
        layout: Layout | None = None,
        context: Context | None = None,
        channels: Float[Array, "batch width"] | None = None,
        importance: Float[Array, "batch sites"] | None = None,
        projection: Float[Array, "batch width width"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch sites width"]:
        """One layer. `keys` turn dropout on; `name` is the prefix of the taps (None inside a scan).

        c: one vector for each example, or one for each of its equal runs of sites. layout: who attends to whom.
        context: the sequence, with `context_width`. channels: 0 at those that pass the block by, else 1.
        importance: of each site, with `merge`, where all attend to all: which may join others in attention.
        projection: added to the weights of the last layer of attention, for each example.
        train: whether "pooled" experts choose from the batch.
        """
        h = constrain(h, "batch", "sites", None)
        if channels is not None:
            channels = channels[:, None].astype(h.dtype)
            h, beside = channels * h, (1 - channels) * h
        named = Below(name)
        keys_a, keys_m = (None, None) if keys is None else random.split(keys)
        vectors = (None,) * 6 if self.modulation is None else jnp.split(self.modulation(c), 6, axis=-1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = vectors
        x = _normed(h, shift_a, scale_a, self.norm_a)
        told = {"c": c, "projection": projection} if isinstance(self.attention, Attention) else {}
        if importance is None:
            y = self.attention(x, layout, named, **told)
        else:
            merged = merging(h, importance, self.merge)
            y = merged.spread(self.attention(merged.mean(x), layout, named, **told))
        y = named("/attention", y)
        h = constrain(h + _gated(dropout(y, self.dropout, keys_a), gate_a), "batch", "sites", None)
        if self.cross is not None:
            h = constrain(self.cross.added(h, context, name), "batch", "sites", None)
        more = {"train": train} if self.pooled else {"c": c} if self.generated else {}
        y = named("/mlp", self.mlp(_normed(h, shift_m, scale_m, self.norm_m), **more))
        h = constrain(h + _gated(dropout(y, self.dropout, keys_m), gate_m), "batch", "sites", None)
        return named("", h if channels is None else h + beside)


def check_conditioning(conditioning: str) -> set[str]:
    """The parts of "modulation+weights", say. Raises ValueError for others than `CONDITIONING`."""
    parts = conditioning.split("+")
    if not parts or set(parts) - set(CONDITIONING) or len(set(parts)) < len(parts):
        raise ValueError(f"conditioning={conditioning!r}: expected some of {', '.join(CONDITIONING)}, joined by '+'")
    return set(parts)


def _normed(h: Array, shift: Array | None, scale: Array | None, norm: Callable[[Array], Array]) -> Array:
    """Modulated, where there is a condition."""
    return norm(h) if shift is None else modulate(h, shift, scale, norm)


def _gated(y: Array, gate: Array | None) -> Array:
    return y if gate is None else per_site(gate, y.shape[1]) * y


class FinalLayer(nnx.Module):
    """adaLN and a linear layer, both starting at zero; the result is at least float32.

    cond_width, norm, epsilon: as in `Block`. bias: whether the linear layer has one. silu: one stands before it.
    """

    def __init__(
        self,
        width: int,
        features_out: int,
        *,
        cond_width: int,
        norm: str = "plain",
        epsilon: float = 1e-6,
        bias: bool = True,
        silu: bool = False,
        dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.norm, self.silu = make_norm(norm, width, epsilon), silu
        self.modulation = (
            Linear(cond_width, 2 * width, kernel_init=zeros, dtype=dtype, rngs=rngs) if cond_width else None
        )
        self.out = Linear(
            width, features_out, bias=bias, kernel_init=zeros, dtype=dtype, out_dtype=at_least_float32(dtype), rngs=rngs
        )

    def __call__(self, h: Float[Array, "batch sites width"], c: Float[Array, "batch *groups cond"] | None) -> Array:
        """`(batch, sites, features_out)`, at least float32."""
        shift, scale = (None, None) if self.modulation is None else jnp.split(self.modulation(c), 2, axis=-1)
        h = _normed(h, shift, scale, self.norm)
        return self.out(tap("final", jax.nn.silu(h) if self.silu else h))


class Stack(nnx.Module):
    """`depth` blocks made by `make(rngs)`.

    scan=True holds one block whose parameters have a leading axis `depth` and runs it in `jax.lax.scan`:
    compile time does not grow with depth, steps can be slower. From one seed both have the same weights.
    remat says what of each block the forward pass keeps for the backward pass, which recomputes the rest
    (`jax.checkpoint`): "none" recomputes nothing, "full" all but the block's input; "dots" keeps the results of matrix
    products, "dots_no_batch" those without batch axes (not attention's), "offload_dots" these in the host's pinned
    memory, "everything" all that JAX would. True is "full", False "none".
    route: None, or (start, stop, share): in training a share of the sites, drawn for each example, bypasses blocks
    start to stop - 1 and stays as it is (Krause et al. 2025, "TREAD"; theirs from the third block to the fourth last,
    share 1/2). Or several, one after the other, each with sites of its own. Otherwise all sites go through all blocks.
    """

    def __init__(
        self,
        make: Callable[[nnx.Rngs], Block],
        depth: int,
        *,
        scan: bool = False,
        remat: bool | str = False,
        route: Route | Sequence[Route] | None = None,
        rngs: nnx.Rngs,
    ):
        if depth < 1:
            raise ValueError(f"depth={depth}: expected at least one block")
        remat = {True: "full", False: "none"}.get(remat, remat)
        if remat not in REMAT:
            raise ValueError(f"remat={remat!r}: expected True, False or one of {', '.join(map(repr, REMAT))}")
        self.depth, self.scan, self.remat = depth, scan, remat
        self.routes = check_routes(route, depth)
        keys = jax.random.split(rngs.params(), depth)
        if scan:
            structure = []

            def one(key: Key[Array, ""]) -> Params:
                graphdef, state = nnx.split(make(nnx.Rngs(key)))
                structure.append(graphdef)
                return nnx.to_pure_dict(state)

            stacked = jax.vmap(one)(keys)
            self.blocks = nnx.merge(structure[0], stacked)
        else:
            self.blocks = nnx.List([make(nnx.Rngs(key)) for key in keys])

    def __call__(
        self,
        h: Float[Array, "batch sites width"],
        c: Float[Array, "batch *groups cond"],
        keys: Key[Array, " batch"] | None = None,
        layout: Layout | None = None,
        *,
        route_keys: Key[Array, " batch"] | None = None,
        **more: Any,
    ) -> Float[Array, "batch sites width"]:
        """Run the blocks; `keys`, folded with the layer's number, turn dropout on; the rest, not None, as in `Block`.

        route_keys: one per example, turn on the route.
        """
        more = {name: value for name, value in more.items() if value is not None}
        run = self._scanned if self.scan else self._unrolled
        routes = () if route_keys is None else self.routes
        kept = each_routed(route_keys, h.shape[1], routes) if routes else []
        parts, done = [], 0
        for (start, stop, _), sites in zip(routes, kept, strict=True):
            if start > done:
                h, told = run(h, c, keys, layout, more, range(done, start))
                parts.append(told)
            there = (Layout(jnp.arange(h.shape[1]), None) if layout is None else layout).among(sites)
            c_there = c if c is None or c.ndim == 2 else _at(per_site(c, h.shape[1]), sites)
            new, told = run(_at(h, sites), c_there, keys, there, more, range(start, stop))
            parts.append(told)
            h = constrain(jax.vmap(lambda x, s, new: x.at[s].set(new))(h, sites, new), "batch", "sites", None)
            done = stop
        if done < self.depth:
            h, told = run(h, c, keys, layout, more, range(done, self.depth))
            parts.append(told)
        jax.tree.map(lambda *found: jnp.concatenate(found), *parts).mean().tell()
        return h

    def route_keys(
        self, batch: int, rng: Key[Array, ""] | Key[Array, " batch"] | None, train: bool
    ) -> Key[Array, " batch"] | None:
        """For a call: None but in training with a route. Raises ValueError without the key that it needs."""
        if not self.routes or not train:
            return None
        named = self.routes if len(self.routes) > 1 else self.routes[0]
        return random.fold_in(example_keys(batch, rng, f"route={named}"), ROUTE)

    def _unrolled(
        self, h: Array, c: Array, keys: Key[Array, " batch"] | None, layout: Layout | None, more: dict[str, Any],
        layers: range,
    ) -> tuple[Array, auxiliary.Found]:  # fmt: skip
        # A listener needs the values, which remat's inner trace would not let out; remat changes none.
        remat = "none" if active("block") else self.remat
        told = []
        for i in layers:
            graphdef, params = nnx.split(self.blocks[i])
            layer_keys = None if keys is None else random.fold_in(keys, i)
            own = layout and layout.layer(i)

            def run(params, h, c, keys, graphdef=graphdef, name=f"block/{i}", layout=own):
                with auxiliary.collect() as collector:
                    block = nnx.merge(graphdef, params)
                    h = block(h, c, keys=keys, name=name, layout=layout, **more)
                return h, collector.found()

            h, found = rematerialised(run, remat)(params, h, c, layer_keys)
            told.append(found)
        return h, jax.tree.map(lambda *found: jnp.stack(found), *told)

    def _scanned(
        self, h: Array, c: Array, keys: Key[Array, " batch"] | None, layout: Layout | None, more: dict[str, Any],
        layers: range,
    ) -> tuple[Array, auxiliary.Found]:  # fmt: skip
        refuse("block", "the blocks are scanned; build the network with scan=False (see `unstack_blocks`)")
        graphdef, stacked = nnx.split(self.blocks)
        if len(layers) < self.depth:
            stacked = jax.tree.map(lambda x: x[layers.start : layers.stop], stacked)

        def body(h: Array, layer: tuple) -> tuple[Array, auxiliary.Found]:
            params, i = layer
            layer_keys = None if keys is None else random.fold_in(keys, i)
            with auxiliary.collect() as collector:
                block, own = nnx.merge(graphdef, params), layout and layout.layer(i)
                h = block(h, c, keys=layer_keys, layout=own, **more)
            return h, collector.found()

        # Inside a scan nothing can be merged with the forward pass, so the CSE barrier would only cost.
        body = rematerialised(body, self.remat, prevent_cse=False)
        # What goes round lies as in the blocks, at both ends: else it would be gathered in each.
        numbers = jnp.arange(layers.start, layers.stop)
        h, told = jax.lax.scan(body, constrain(h, "batch", "sites", None), (stacked, numbers))
        return constrain(h, "batch", "sites", None), told


def _at(x: Array, sites: Array) -> Array:
    """At some sites of each example."""
    return jax.vmap(lambda x, s: x[s])(x, sites)


def rematerialised(function: Callable, remat: str, **options: Any) -> Callable:
    """The function, whose backward pass computes again what the policy of this name does not keep."""
    return function if remat == "none" else jax.checkpoint(function, policy=REMAT[remat], **options)
