"""A transformer of graphs: features of nodes, of edges, and of the whole, each of which tells the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from ddjax import random
from ddjax.denoisers.given import Given
from ddjax.denoisers.graph_features import EIGENVECTORS, GLOBAL_FEATURES, NODE_FEATURES, eigenvectors, graph_features
from ddjax.denoisers.layers.attention import WEIGHTS
from ddjax.denoisers.layers.basic import (
    DType,
    LayerNorm,
    Linear,
    at_least_float32,
    check_rate,
    dropout,
    dropout_keys,
    zeros,
)
from ddjax.denoisers.layers.blocks import Stack
from ddjax.denoisers.layers.embed import check_labels, check_time, check_vector, lookup
from ddjax.denoisers.layers.long_skips import run_blocks
from ddjax.denoisers.sides import Side, check_blocks, keep
from ddjax.denoisers.states import check_state, check_values, hard_state
from ddjax.placement import constrain
from ddjax.symmetric import pack, unpack
from ddjax.taps import Below, tap
from ddjax.types import SoftTokens

EPSILON = 1e-5  # of the published norms
# Features of nodes, of edges, of the whole; and which nodes there are, None for all.
Parts = tuple[Array, Array, Array, Array | None]


class GraphTransformer(nnx.Module):
    """The network of DiGress (Vignac et al. 2023, arXiv:2209.14734, section 4.3 and appendix B).

    The state is an undirected graph: the type of each pair of nodes (`ddjax.symmetric`), 0 for no edge, and before
    them, where nodes have types, that of each node, in one alphabet. Or, with an alphabet for each, a dict of "edges"
    and perhaps "nodes" (`processes.Product`). Outputs go with any permutation of the nodes.

    Graphs of several sizes are states of the largest, told how many nodes there are, the first ones; what is said of
    them is what would be said of the graph alone (but for its share of the largest size, which the network is told).

    Taps: "condition", "embed/nodes" and "embed/edges"; of layer i (the last is "block/last") "block/i/queries", "/keys"
    and "/values", `(batch, nodes, width)`, "/attention/weights", `(batch, width, queries, keys)`, where each
    feature has a softmax of its own, "/attention" (the branch of the nodes), "/nodes", "/edges" and "/whole". The last
    layer has no more of these than it needs: without types no values and weights, and nothing of nodes and the whole.

    A layer attends among nodes; edges scale and shift the products of queries and keys (FiLM), from which they are made
    anew, and the whole graph, told the time and the label, scales and shifts both. The output layers start at zero.

    Args:
        nodes: their number, or the largest.
        symbols_in: tokens run over `[0, symbols_in)` (`process.num_states`: the mask counts); or those of each part.
        symbols_out: number of logits per site; an edge is there where its token is in `[1, symbols_out)`; or of each
            part of a dict.
        typed: whether nodes have types: the state then has `nodes` sites more, the first. (A dict says it itself.)
        sizes: whether graphs have a number of nodes each: `cond={"size": ..., "cond": labels}`.
        width, edge_width, global_width: of the features; heads divides width.
        depth: number of layers, at least 2.
        heads: of attention.
        hidden: widths inside the MLPs at both ends, of nodes, edges and the whole.
        feed_forward: widths inside those of each layer.
        features: whether nodes and the whole are told cycles and the spectrum of the noised graph (`graph_features`).
        eigenvectors: whether nodes are told two eigenvectors, too (`graph_features.eigenvectors`), as published.
        skip: whether the one-hot state is added to the logits, as published; a new network then says the state again.
        num_classes: labels run over `[0, num_classes)`, and `num_classes` is the null label. 0: no labels.
        vector: numbers of a vector that is a condition, see `DiT`. 0: none.
        time: False ignores t.
        dropout: rate on each branch of each layer, when train=True.
        dtype: compute dtype; parameters and the output stay float32.
        scan, remat: see `layers.Stack`.
        rngs: keys of the initial parameters.

    Raises:
        ValueError: for sizes that cannot be.
    """

    takes = "graphs"

    def __init__(
        self,
        *,
        nodes: int,
        symbols_in: int | Mapping[str, int],
        symbols_out: int | Mapping[str, int],
        typed: bool = False,
        sizes: bool = False,
        width: int = 256,
        edge_width: int = 64,
        global_width: int = 64,
        depth: int = 5,
        heads: int = 8,
        hidden: Sequence[int] = (256, 128, 128),
        feed_forward: Sequence[int] = (256, 128, 2048),
        features: bool = True,
        eigenvectors: bool = False,
        skip: bool = False,
        num_classes: int = 0,
        vector: int = 0,
        time: bool = True,
        dropout: float = 0.0,
        dtype: DType = jnp.float32,
        scan: bool = False,
        remat: bool | str = False,
        rngs: nnx.Rngs,
    ):
        check_rate(dropout)
        if nodes < 2 or depth < 2 or num_classes < 0 or len(hidden) != 3 or len(feed_forward) != 3:
            raise ValueError(
                f"nodes={nodes}, depth={depth}, hidden={tuple(hidden)}, feed_forward={tuple(feed_forward)}: expected 2 "
                "nodes and layers or more, and three widths each"
            )
        self.split = isinstance(symbols_in, Mapping)  # a dict of parts
        typed = "nodes" in symbols_in if self.split else typed
        if self.split and not set(symbols_in) == set(symbols_out) == {"edges", *(["nodes"] if typed else [])}:
            raise ValueError(
                f"symbols_in={symbols_in}, symbols_out={symbols_out}: expected those of edges, and of nodes"
            )
        both = {"nodes": symbols_in, "edges": symbols_in}, {"nodes": symbols_out, "edges": symbols_out}
        both = (symbols_in, symbols_out) if self.split else both
        self.symbols = tuple(tuple(symbols.items()) for symbols in both)  # in and out, hashable
        self.nodes, self.typed, self.sizes, self.num_classes = nodes, typed, sizes, num_classes
        self.features, self.eigenvectors, self.skip, self.time = features, eigenvectors, skip, time
        self.dropout, self.dtype = dropout, jnp.dtype(dtype)
        self.pairs = nodes * (nodes - 1) // 2
        self.widths = widths = (width, edge_width, global_width)
        # Without a type, or anything to be told, there is a constant.
        node_inputs = (self.symbols_in["nodes"] if typed else 1) + NODE_FEATURES * features
        node_inputs += EIGENVECTORS * eigenvectors
        global_inputs = 1 + GLOBAL_FEATURES * features + sizes
        mlp = partial(EndMLP, dtype=dtype, rngs=rngs)
        self.nodes_in = mlp(node_inputs, hidden[0], width, last=True)
        self.edges_in = mlp(self.symbols_in["edges"], hidden[1], edge_width, last=True)
        self.global_in = mlp(global_inputs, hidden[2], global_width, last=True)
        rows = (num_classes + 1, global_width)
        self.labels = nnx.Param(0.02 * jax.random.normal(rngs.params(), rows, jnp.float32)) if num_classes else None
        layer = partial(GraphLayer, widths, heads, tuple(feed_forward), dropout=dropout, dtype=dtype)
        self.stack = Stack(lambda rngs: layer(rngs=rngs), depth - 1, scan=scan, remat=remat, rngs=rngs)
        # Nothing asks what the whole is behind the last layer, nor, without types, what nodes are.
        self.last = layer(tells=(typed, True, False), rngs=rngs)
        self.nodes_out = mlp(width, hidden[0], self.symbols_out["nodes"]) if typed else None
        self.edges_out = mlp(edge_width, hidden[1], self.symbols_out["edges"])
        self.vector = Linear(vector, global_width, bias=False, rngs=rngs) if vector else None

    def __call__(
        self,
        xt: Any,
        t: Float[Array, " batch"] | Float[Array, ""] | None,
        cond: Int[Array, " batch"] | Mapping[str, Any] | None = None,
        *,
        rng: Key[Array, ""] | Key[Array, " batch"] | None = None,
        train: bool = False,
    ) -> Any:
        """Run the network.

        Args:
            xt: the state, `(batch, sites)`, or a dict of `(batch, nodes)` and `(batch, pairs)`; a token outside `[0,
                symbols_in)` makes the example's output NaN. Or soft tokens, `(batch, sites, symbols_in)`.
            t: time in [0, 1].
            cond: labels in `[0, num_classes]`; None is the null label. With `sizes`, `{"size": (batch,), "cond":
                labels}`; with `vector`, "vector" beside them.
            rng: one key, or one per example, for dropout; needed when train=True and dropout > 0.
            train: whether dropout acts.

        Returns:
            Logits, at least float32: `(batch, sites, symbols_out)`, or a dict of them; 0 where there are no nodes.

        Raises:
            ValueError: for a shape or dtype that the network was not built for.
        """
        (x, e, there), own, edges = self.body(xt, t, cond, rng=rng, train=train)
        e = self.edges_out(e)
        logits = {} if self.nodes_out is None else {"nodes": self.nodes_out(x)}
        logits["edges"] = (e + e.swapaxes(1, 2)) / 2
        if self.skip:
            logits["edges"] = logits["edges"] + edges[..., : self.symbols_out["edges"]]
            logits |= {"nodes": logits["nodes"] + own[..., : self.symbols_out["nodes"]]} if self.typed else {}
        found, said = _among(logits.get("nodes"), logits["edges"], there)
        parts = ({} if found is None else {"nodes": found}) | {"edges": pack(said)}
        return parts if self.split else jnp.concatenate(list(parts.values()), axis=1)

    def as_side(self, blocks: int | None) -> Side:
        """Its first layers, of all but the last: nodes, edges and the whole of each are added to the trunk's.

        The image are values at the sites of the state, in its form; only where nodes have types do they have any.
        """
        keep(self.stack, check_blocks(blocks, self.stack.depth))
        self.last = self.nodes_out = self.edges_out = None
        widths = dict(zip(("nodes", "edges", "whole"), self.widths, strict=True))
        hints = {f"embed/{name}": (1, widths[name]) for name in self._counts()}
        points = {f"block/{i}/{name}": width for i in range(self.stack.depth) for name, width in widths.items()}
        return Side(hints, {name: (name, width) for name, width in points.items()})

    def hinted(self, image: Any, xt: Any, cond: Any, channels: int, scale: int) -> dict[str, Array]:
        """What the image says of nodes, and of pairs, as symmetric matrices."""
        batch, counts = self._onehot(xt)[1].shape[0], self._counts()
        if not self.split:
            check_values(image, (batch, sum(counts.values()), channels))
            image = {"nodes": image[:, : -self.pairs], "edges": image[:, -self.pairs :]}
        elif not isinstance(image, Mapping) or set(image) != set(counts):
            raise ValueError(f'expected cond["image"] of the parts {", ".join(counts)}, got {type(image).__name__}')
        for name, count in counts.items():
            check_values(image[name], (batch, count, channels))
        nodes = {"embed/nodes": image["nodes"]} if self.typed else {}
        return nodes | {"embed/edges": unpack(image["edges"])}

    def body(
        self, xt: Any, t: Any, cond: Any = None, *, rng: Any = None, train: bool = False
    ) -> tuple[Any, Array | None, Array]:
        """What leaves the last layer and which nodes there are; and the state: nodes, and pairs as matrices."""
        own, pairs = self._onehot(xt)
        batch, edges = pairs.shape[0], unpack(pairs)
        keys = dropout_keys(self.dropout, batch, rng, train)
        given, there = self._sized(cond, batch)
        given.check_taken(*("vector",) * (self.vector is not None))
        nodes = [own if self.typed else jnp.ones((batch, self.nodes, 1), jnp.float32)]
        whole = [check_time(t, batch, None)[:, None] if self.time else jnp.ones((batch, 1), jnp.float32)]
        adjacency = edges[..., 1 : self.symbols_out["edges"]].sum(axis=-1)
        if self.features:
            more, of_all = graph_features(adjacency, there)
            nodes, whole = [*nodes, more], [*whole, of_all]
        if self.eigenvectors:
            nodes = [*nodes, eigenvectors(adjacency, there)]
        if there is not None:
            whole = [*whole, there.sum(axis=-1, keepdims=True) / self.nodes]
        x = tap("embed/nodes", self.nodes_in(jnp.concatenate(nodes, axis=-1)))
        e = tap("embed/edges", self.edges_in(edges))
        x, e, y = *_among(x, e, there), self.global_in(jnp.concatenate(whole, axis=-1))
        labels = check_labels(given.cond, self.num_classes, batch)
        if self.labels is not None:
            y = y + lookup(self.labels[...], labels).astype(y.dtype)
        if self.vector is not None:
            y = y + self.vector(check_vector(given.vector, batch, self.vector.kernel.shape[0])).astype(y.dtype)
        y = tap("condition", y)
        h, _ = run_blocks(self.stack, (x, e, y, there), None, keys)
        if self.last is not None:
            last_keys = None if keys is None else random.fold_in(keys, self.stack.depth)
            h, _ = self.last(h, keys=last_keys, name="block/last")
        return (h[0], h[1], there), own, edges

    @property
    def symbols_in(self) -> dict[str, int]:
        """Of nodes and edges."""
        return dict(self.symbols[0])

    @property
    def symbols_out(self) -> dict[str, int]:
        """Of nodes and edges."""
        return dict(self.symbols[1])

    def _counts(self) -> dict[str, int]:
        """Of sites of each part."""
        return ({"nodes": self.nodes} if self.typed else {}) | {"edges": self.pairs}

    def _onehot(self, xt: Any) -> tuple[Array | None, Array]:
        """Of nodes, if they have types, and of pairs. Raises ValueError for other shapes."""
        counts = self._counts()
        if not self.split:
            symbols, sites = self.symbols_in["edges"], sum(counts.values())
            check_state(hard_state(xt, 2, symbols), (("sites",), (sites,)), symbols)
            onehot = _onehot(xt, symbols)
            return (onehot[:, : self.nodes] if self.typed else None), onehot[:, sites - self.pairs :]
        if not isinstance(xt, Mapping) or set(xt) != set(counts):
            raise ValueError(f"expected a state of the parts {', '.join(counts)}, got {type(xt).__name__}")
        for name, count in counts.items():
            check_state(hard_state(xt[name], 2, self.symbols_in[name]), ((name,), (count,)), self.symbols_in[name])
        own = _onehot(xt["nodes"], self.symbols_in["nodes"]) if self.typed else None
        return own, _onehot(xt["edges"], self.symbols_in["edges"])

    def _sized(self, cond: Any, batch: int) -> tuple[Given, Bool[Array, "batch nodes"] | None]:
        """What else is given, and which nodes there are."""
        size, rest = None, cond
        if isinstance(cond, Mapping) and "size" in cond:
            size, rest = cond["size"], {name: value for name, value in cond.items() if name != "size"}
            rest = rest if rest.keys() - {"cond"} else rest.get("cond")
        if self.sizes != (size is not None) or (size is not None and jnp.shape(size) != (batch,)):
            wanted = (
                f'{{"size": ({batch},), "cond": labels}}' if self.sizes else "labels: build the network with sizes=True"
            )
            raise ValueError(f"expected cond={wanted}, got {jax.tree.map(jnp.shape, cond)}")
        return Given.of(rest), jnp.arange(self.nodes) < size[:, None] if self.sizes else None


def _among(x: Array | None, e: Array, there: Array | None) -> tuple[Array | None, Array]:
    """Features of nodes, and of pairs, 0 where there is no node."""
    if there is None:
        return x, e
    both = there[:, :, None, None] & there[:, None, :, None]
    return None if x is None else jnp.where(there[..., None], x, 0), jnp.where(both, e, 0)


class EndMLP(nnx.Module):
    """Two layers, a ReLU behind the first, and behind the second if it is the `last`; without, the second is zero."""

    def __init__(self, features_in: int, hidden: int, out: int, *, last: bool = False, dtype: DType, rngs: nnx.Rngs):
        self.relu = last
        self.up = Linear(features_in, hidden, dtype=dtype, rngs=rngs)
        options = {} if last else {"kernel_init": zeros, "out_dtype": at_least_float32(dtype)}
        self.down = Linear(hidden, out, dtype=dtype, **options, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Apply to the last axis."""
        y = self.down(jax.nn.relu(self.up(x)))
        return jax.nn.relu(y) if self.relu else y


class Branch(nnx.Module):
    """`norm(h + new)`, then `norm(h + mlp(h))`: what follows attention, for each of the three kinds of features."""

    def __init__(self, width: int, hidden: int, *, dropout: float, dtype: DType, rngs: nnx.Rngs):
        self.dropout = dropout
        self.norm_a, self.norm_m = (LayerNorm(width, epsilon=EPSILON) for _ in range(2))
        self.up = Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.down = Linear(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, h: Array, new: Array, keys: Key[Array, " batch"] | None) -> Array:
        """The next features. `keys` turn dropout on."""
        keys_a, keys_m = (None, None) if keys is None else random.split(keys)
        h = self.norm_a(h + dropout(new, self.dropout, keys_a)).astype(new.dtype)
        y = self.down(jax.nn.relu(self.up(h)))
        return self.norm_m(h + dropout(y, self.dropout, keys_m)).astype(new.dtype)


class GraphLayer(nnx.Module):
    """One layer of `GraphTransformer`. tells: which of nodes, edges and the whole it makes anew; others stay."""

    def __init__(
        self,
        widths: tuple[int, int, int],
        heads: int,
        hidden: tuple[int, int, int],
        *,
        tells: tuple[bool, bool, bool] = (True, True, True),
        dropout: float = 0.0,
        dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ):
        width, edge, whole = widths
        if heads < 1 or width % heads:
            raise ValueError(f"heads={heads} does not divide width={width}")
        self.heads, self.dropout = heads, dropout
        linear = partial(Linear, dtype=dtype, rngs=rngs)
        branch = partial(Branch, dropout=dropout, dtype=dtype, rngs=rngs)
        self.q, self.k = linear(width, width), linear(width, width)
        self.e_mul, self.e_add = linear(edge, width), linear(edge, width)
        self.y_e_mul, self.y_e_add, self.e_out = linear(whole, width), linear(whole, width), linear(width, edge)
        self.edges = branch(edge, hidden[1])
        nodes, globals_ = tells[0], tells[2]
        self.v = linear(width, width) if nodes else None
        self.y_x_mul = linear(whole, width) if nodes else None
        self.y_x_add = linear(whole, width) if nodes else None
        self.x_out = linear(width, width) if nodes else None
        self.nodes = branch(width, hidden[0]) if nodes else None
        self.y_y = linear(whole, whole) if globals_ else None
        self.x_y = linear(4 * width, whole) if globals_ else None
        self.e_y = linear(4 * edge, whole) if globals_ else None
        self.y_up = linear(whole, whole) if globals_ else None
        self.y_down = linear(whole, whole) if globals_ else None
        self.whole = branch(whole, hidden[2]) if globals_ else None

    def __call__(
        self,
        h: Parts,
        skip: None = None,
        c: None = None,
        *,
        keys: Key[Array, " batch"] | None = None,
        name: str | None = None,
    ) -> tuple[Parts, None]:
        """The next features, and nothing for a long connection. See `layers.LongSkips`."""
        named = Below(name)
        keys = (None, None, None) if keys is None else random.split(keys, 3)
        x, e, y, there = h
        x, e = constrain(x, "batch", None, None), constrain(e, "batch", None, None, None)
        width = x.shape[-1]
        q, k = named("/queries", self.q(x)), named("/keys", self.k(x))
        scores = q[:, :, None] * k[:, None] / (width // self.heads) ** 0.5  # (batch, n, n, width)
        scores = scores * (self.e_mul(e) + 1) + self.e_add(e)
        new = self.e_out(self.y_e_add(y)[:, None, None] + (self.y_e_mul(y)[:, None, None] + 1) * scores)
        new_e = named("/edges", self.edges(e, new, keys[1]))
        new_x = x
        if self.nodes is not None:
            # Each feature has a softmax of its own: products are not summed over the features of a head.
            wide = scores.astype(at_least_float32(scores.dtype))
            wide = wide if there is None else jnp.where(there[:, None, :, None], wide, -1e30)
            weights, listened = jax.nn.softmax(wide, axis=2), named.asked(WEIGHTS)
            if listened is not None:  # features in the place of heads, as everywhere
                weights = jnp.moveaxis(listened(jnp.moveaxis(weights, -1, 1)), 1, -1)
            mixed = (weights.astype(scores.dtype) * named("/values", self.v(x))[:, None]).sum(axis=2)
            new = self.x_out(self.y_x_add(y)[:, None] + (self.y_x_mul(y)[:, None] + 1) * mixed)
            new_x = named("/nodes", self.nodes(x, named("/attention", new), keys[0]))
        if self.whole is not None:
            of_pairs = None if there is None else there[:, :, None] & there[:, None]
            new = self.y_y(y) + self.x_y(_summary(x, (1,), there)) + self.e_y(_summary(e, (1, 2), of_pairs))
            y = named("/whole", self.whole(y, self.y_down(jax.nn.relu(self.y_up(new))), keys[2]))
        return (*_among(new_x, new_e, there), y, there), None


def _summary(x: Array, axes: tuple[int, ...], there: Array | None) -> Array:
    """Mean, least, largest, and standard deviation (of a sample) along axes, side by side, of what there is."""
    x = x.astype(at_least_float32(x.dtype))
    there = jnp.ones(x.shape[:-1], bool)[..., None] if there is None else there[..., None]
    number = there.sum(axis=axes)
    mean = jnp.where(there, x, 0.0).sum(axis=axes) / number
    off = jnp.where(there, x - mean.reshape(mean.shape[0], *(1,) * len(axes), -1), 0.0)
    # The root of no variance at all has no slope: 1e-12 gives it one.
    std = jnp.sqrt((off**2).sum(axis=axes) / jnp.maximum(number - 1, 1) + 1e-12)
    least, most = jnp.where(there, x, jnp.inf).min(axis=axes), jnp.where(there, x, -jnp.inf).max(axis=axes)
    return jnp.concatenate([mean, least, most, std], axis=-1)


def _onehot(xt: Any, symbols: int) -> Float[Array, "batch sites symbols"]:
    """Tokens as vectors, NaN for one beyond the symbols; soft ones as the mean of theirs."""
    if isinstance(xt, SoftTokens):
        return (xt.weights[..., None] * _onehot(xt.ids, symbols)).sum(axis=-2)
    if jnp.issubdtype(xt.dtype, jnp.floating):
        return xt.astype(at_least_float32(xt.dtype))
    # Not a product with NaN: of a one-hot vector XLA makes a choice between that and 0.
    return jnp.where(((xt >= 0) & (xt < symbols))[..., None], jax.nn.one_hot(xt, symbols), jnp.nan)
