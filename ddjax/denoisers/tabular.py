"""A multilayer perceptron for the rows of a table: numerical, categorical, or both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from ddjax import random
from ddjax.denoisers.given import Given
from ddjax.denoisers.layers.basic import (
    DType,
    Linear,
    at_least_float32,
    check_rate,
    dropout,
    dropout_keys,
    zeros,
)
from ddjax.denoisers.layers.embed import TokenEmbed, check_labels, check_time, check_vector, lookup, time_embedding
from ddjax.denoisers.sides import Side, check_blocks
from ddjax.denoisers.states import check_state, check_values, hard_state
from ddjax.placement import constrain
from ddjax.taps import tap
from ddjax.types import SoftTokens


class RowMLP(nnx.Module):
    """What the networks of rows share: the time, the label, and the layers behind a projected row."""

    def __init__(
        self,
        outputs: int,
        *,
        width: int,
        hidden: Sequence[int],
        num_classes: int,
        vector: int,
        time: bool,
        dropout: float,
        dtype: DType,
        rngs: nnx.Rngs,
    ):
        self.num_classes, self.dropout, self.dtype = num_classes, dropout, jnp.dtype(dtype)
        options = {"dtype": dtype, "rngs": rngs}
        self.time_in = Linear(width, width, rngs=rngs) if time else None
        self.time_out = Linear(width, width, rngs=rngs) if time else None
        rows = (num_classes + 1, width)
        self.labels = nnx.Param(jax.random.normal(rngs.params(), rows, jnp.float32)) if num_classes else None
        widths = [width, *hidden]
        self.layers = nnx.List([Linear(a, b, **options) for a, b in zip(widths, hidden, strict=False)])
        wide = at_least_float32(dtype)
        self.out = Linear(widths[-1], outputs, kernel_init=zeros, out_dtype=wide, **options)
        self.vector = Linear(vector, width, rngs=rngs) if vector else None

    def as_side(self, blocks: int | None) -> Side:
        """Its first layers: what each gives is added to what the trunk's does."""
        self.layers = nnx.List(list(self.layers)[: check_blocks(blocks, len(self.layers))])
        self.out = None
        widths = [layer.kernel.shape[1] for layer in self.layers]
        points = {f"layer/{i}": (f"layer/{i}", width) for i, width in enumerate(widths)}
        return Side({"embed": (self.entries, self.layers[0].kernel.shape[0])}, points)

    def projected(self, xt: Any) -> Float[Array, "batch width"]:
        """A row as features. Raises ValueError for one that the network was not built for."""
        raise NotImplementedError

    def body(
        self, xt: Any, t: Any, cond: Any = None, *, rng: Any = None, train: bool = False
    ) -> Float[Array, "batch features"]:
        """What leaves the last layer but the output's."""
        row = self.projected(xt)
        batch = row.shape[0]
        keys = dropout_keys(self.dropout, batch, rng, train)
        given = Given.of(cond)
        given.check_taken(*("vector",) * (self.vector is not None))
        labels, told = check_labels(given.cond, self.num_classes, batch), 0.0
        if self.time_in is not None:
            told = time_embedding(check_time(t, batch, None), self.time_in.kernel.shape[0])
            told = self.time_out(jax.nn.silu(self.time_in(told)))
        if self.labels is not None:
            told = told + jax.nn.silu(lookup(self.labels[...], labels))
        if self.vector is not None:
            vector = check_vector(given.vector, batch, self.vector.kernel.shape[0])
            told = told + jax.nn.silu(self.vector(vector))
        h = tap("embed", (row + tap("condition", told)).astype(self.dtype))
        for i, layer in enumerate(self.layers):
            h = constrain(jax.nn.relu(layer(h)), "batch", None)
            h = tap(f"layer/{i}", dropout(h, self.dropout, None if keys is None else random.fold_in(keys, i)))
        return h


def _check_sizes(columns: int, hidden: Sequence[int], width: int, num_classes: int, rate: float) -> None:
    check_rate(rate)
    if columns < 1 or not hidden or width % 2 or num_classes < 0:
        raise ValueError(
            f"columns={columns}, hidden={tuple(hidden)}, width={width}, num_classes={num_classes}: expected "
            "columns, layers, an even width and no negative number"
        )


class TabularMLP(RowMLP):
    """The network of TabDDPM (Kotelnikov et al. 2023, arXiv:2209.15421, section 3).

    The row, projected, and embeddings of the time and the label (or, by a linear layer in the place of the table, of a
    vector: one number is their target of a regression) are added up; layers of ReLUs follow. A categorical
    column enters as the projection of its one-hot vector, a table of its own. The output layer starts at zero.

    Args:
        columns: number of columns of a row.
        symbols_in: None for numerical columns (float xt); else xt is int in `[0, symbols_in)`.
        symbols_out: number of logits per column, for categorical ones.
        out_columns: numbers said of a numerical row, default as many as columns.
        width: of the sum, even.
        hidden: widths of the layers.
        num_classes: labels run over `[0, num_classes)`, and `num_classes` is the null label. 0: no labels.
        vector: numbers of a vector that is a condition, see `DiT`. 0: none.
        time: False ignores t.
        dropout: rate behind each layer, when train=True.
        dtype: compute dtype; parameters and the output stay float32.
        rngs: keys of the initial parameters.

    Raises:
        ValueError: for sizes that cannot be, or options of the wrong state space.
    """

    takes = "rows"

    def __init__(
        self,
        *,
        columns: int,
        symbols_in: int | None = None,
        symbols_out: int | None = None,
        out_columns: int | None = None,
        width: int = 128,
        hidden: Sequence[int] = (256, 256),
        num_classes: int = 0,
        vector: int = 0,
        time: bool = True,
        dropout: float = 0.0,
        dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ):
        _check_sizes(columns, hidden, width, num_classes, dropout)
        if (symbols_in is None) != (symbols_out is None) or (symbols_in is not None and out_columns is not None):
            raise ValueError(
                f"symbols_in={symbols_in}, symbols_out={symbols_out}, out_columns={out_columns}: give both of the "
                "first for categorical columns, neither for numerical ones; out_columns is for these alone"
            )
        self.columns = self.entries = columns
        self.symbols_in, self.symbols_out = symbols_in, symbols_out
        options = {"dtype": dtype, "rngs": rngs}
        self.tokens = None if symbols_in is None else TokenEmbed(symbols_in, width, channels=columns, rngs=rngs)
        self.embed = Linear(columns, width, **options) if symbols_in is None else None
        self.embed_bias = None if symbols_in is None else nnx.Param(jnp.zeros((width,), jnp.float32))
        outputs = columns * symbols_out if symbols_in else out_columns or columns
        more = {"num_classes": num_classes, "vector": vector, "time": time, "dropout": dropout}
        super().__init__(outputs, width=width, hidden=hidden, **more, **options)

    def __call__(
        self,
        xt: Float[Array, "batch columns *symbols_in"] | Int[Array, "batch columns"] | SoftTokens,
        t: Float[Array, " batch"] | Float[Array, ""] | None,
        cond: Int[Array, " batch"] | Mapping[str, Array | None] | None = None,
        *,
        rng: Key[Array, ""] | Key[Array, " batch"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch out"] | Float[Array, "batch columns symbols_out"]:
        """Run the network.

        Args:
            xt: rows; a token outside `[0, symbols_in)` makes the row's output NaN. Or soft tokens.
            t: time in [0, 1].
            cond: labels in `[0, num_classes]`; None is the null label. With `vector` `{"vector": ..., "cond": labels}`.
            rng: one key, or one per example, for dropout; needed when train=True and dropout > 0.
            train: whether dropout acts.

        Returns:
            float32, `(batch, out_columns)`, or logits `(batch, columns, symbols_out)`.

        Raises:
            ValueError: for a shape or dtype that the network was not built for.
        """
        y = self.out(self.body(xt, t, cond, rng=rng, train=train))
        return y if self.symbols_out is None else y.reshape(*y.shape[:1], self.columns, self.symbols_out)

    def projected(self, xt: Any) -> Float[Array, "batch width"]:
        """The row, by a linear layer, or by its columns' tables."""
        self._batch(xt)
        return self.embed(xt) if self.tokens is None else self.tokens(xt).sum(axis=-2) + self.embed_bias[...]

    def hinted(self, image: Array, xt: Any, cond: Any, channels: int, scale: int) -> dict[str, Array]:
        """What the image says of all columns, one behind the other."""
        check_values(image, (self._batch(xt), self.columns, channels))
        return {"embed": image.reshape(len(image), -1)}

    def _batch(self, xt: Any) -> int:
        state = hard_state(xt, 2, self.symbols_in)
        check_state(state, (("columns",), (self.columns,)), self.symbols_in)
        return state.shape[0]


class MixedTable(RowMLP):
    """The network of TabDDPM for columns of numbers and of symbols, each of its own alphabet (`processes.Product`).

    As `TabularMLP`: numbers and one-hot symbols, side by side, are projected and added to the embeddings of the time
    and the label; the outputs are cut into the parts' own.

    Args:
        parts: what each part of the state is, by name: (columns, None, outputs) of numbers, and (columns, symbols_in,
            symbols_out) of symbols.
        width, hidden, num_classes, vector, time, dropout, dtype, rngs: as in `TabularMLP`.

    Raises:
        ValueError: for sizes that cannot be.
    """

    takes = "parts"

    def __init__(
        self,
        *,
        parts: Mapping[str, tuple[int, int | None, int]],
        width: int = 128,
        hidden: Sequence[int] = (256, 256),
        num_classes: int = 0,
        vector: int = 0,
        time: bool = True,
        dropout: float = 0.0,
        dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.parts = tuple((name, *sizes) for name, sizes in parts.items())
        columns = min((columns for _, columns, *_ in self.parts), default=0)
        self.entries = sum(columns for _, columns, *_ in self.parts)
        _check_sizes(columns, hidden, width, num_classes, dropout)
        options = {"dtype": dtype, "rngs": rngs}
        self.embed = nnx.List(
            [
                Linear(columns, width, bias=False, **options)
                if symbols is None
                else TokenEmbed(symbols, width, channels=columns, rngs=rngs)
                for _, columns, symbols, _ in self.parts
            ]
        )
        self.embed_bias = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.sizes = tuple(out if symbols is None else columns * out for _, columns, symbols, out in self.parts)
        more = {"num_classes": num_classes, "vector": vector, "time": time, "dropout": dropout}
        super().__init__(sum(self.sizes), width=width, hidden=hidden, **more, **options)

    def __call__(
        self,
        xt: Mapping[str, Array | SoftTokens],
        t: Float[Array, " batch"] | Float[Array, ""] | None,
        cond: Int[Array, " batch"] | Mapping[str, Array | None] | None = None,
        *,
        rng: Key[Array, ""] | Key[Array, " batch"] | None = None,
        train: bool = False,
    ) -> dict[str, Array]:
        """Run the network.

        Args:
            xt: of each part numbers or symbols, `(batch, columns)`; a symbol outside `[0, symbols_in)` makes the row's
                outputs NaN. Or soft tokens.
            t, cond, rng, train: as in `TabularMLP`.

        Returns:
            At least float32, of each part `(batch, outputs)`, or logits `(batch, columns, symbols_out)`.

        Raises:
            ValueError: for other parts, or a shape or dtype that the network was not built for.
        """
        y, found = self.out(self.body(xt, t, cond, rng=rng, train=train)), {}
        ends = np.cumsum(self.sizes)
        for (name, columns, symbols, out), end, size in zip(self.parts, ends, self.sizes, strict=True):
            own = y[:, end - size : end]
            found[name] = own if symbols is None else own.reshape(-1, columns, out)
        return found

    def projected(self, xt: Any) -> Float[Array, "batch width"]:
        """The sum over parts, numbers by a linear layer, symbols by tables."""
        self._check_parts("a state", xt)
        row = self.embed_bias[...]
        for (name, columns, symbols, _), embed in zip(self.parts, self.embed, strict=True):
            check_state(hard_state(xt[name], 2, symbols), (("columns",), (columns,)), symbols)
            row = row + (embed(xt[name]) if symbols is None else embed(xt[name]).sum(axis=-2))
        return row

    def hinted(self, image: Any, xt: Any, cond: Any, channels: int, scale: int) -> dict[str, Array]:
        """What the image, a dict of the parts' own, says of all columns, one behind the other."""
        self._check_parts("a state", xt)
        self._check_parts('cond["image"]', image)
        for name, columns, symbols, _ in self.parts:
            check_values(image[name], (hard_state(xt[name], 2, symbols).shape[0], columns, channels))
        return {"embed": jnp.concatenate([image[name].reshape(len(image[name]), -1) for name, *_ in self.parts], -1)}

    def _check_parts(self, what: str, given: Any) -> None:
        if not isinstance(given, Mapping) or set(given) != {name for name, *_ in self.parts}:
            found = ", ".join(given) if isinstance(given, Mapping) else type(given).__name__
            raise ValueError(f"expected {what} of the parts {', '.join(name for name, *_ in self.parts)}, got {found}")
