"""A multilayer perceptron for the rows of a table, numerical or categorical."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from ddjax import random
from ddjax.denoisers.layers.basic import (
    DType,
    Linear,
    at_least_float32,
    check_rate,
    dropout,
    dropout_keys,
    zeros,
)
from ddjax.denoisers.layers.embed import TokenEmbed, check_labels, check_time, lookup, time_embedding
from ddjax.denoisers.states import check_state, hard_state
from ddjax.placement import constrain
from ddjax.taps import tap
from ddjax.types import SoftTokens


class TabularMLP(nnx.Module):
    """The network of TabDDPM (Kotelnikov et al. 2023, arXiv:2209.15421, section 3).

    The row, projected, and embeddings of the time and the label are added up; layers of ReLUs follow. A categorical
    column enters as the projection of its one-hot vector, a table of its own. The output layer starts at zero.

    Args:
        columns: number of columns of a row.
        symbols_in: None for numerical columns (float xt); else xt is int in `[0, symbols_in)`.
        symbols_out: number of logits per column, for categorical ones.
        out_columns: numbers said of a numerical row, default as many as columns.
        width: of the sum, even.
        hidden: widths of the layers.
        num_classes: labels run over `[0, num_classes)`, and `num_classes` is the null label. 0: no labels.
        time: False ignores t.
        dropout: rate behind each layer, when train=True.
        dtype: compute dtype; parameters and the output stay float32.
        rngs: keys of the initial parameters.

    Raises:
        ValueError: for sizes that cannot be, or options of the wrong state space.
    """

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
        time: bool = True,
        dropout: float = 0.0,
        dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_rate(dropout)
        if columns < 1 or not hidden or width % 2 or num_classes < 0:
            raise ValueError(
                f"columns={columns}, hidden={tuple(hidden)}, width={width}, num_classes={num_classes}: expected "
                "columns, layers, an even width and no negative number"
            )
        if (symbols_in is None) != (symbols_out is None) or (symbols_in is not None and out_columns is not None):
            raise ValueError(
                f"symbols_in={symbols_in}, symbols_out={symbols_out}, out_columns={out_columns}: give both of the "
                "first for categorical columns, neither for numerical ones; out_columns is for these alone"
            )
        self.columns, self.symbols_in, self.symbols_out = columns, symbols_in, symbols_out
        self.num_classes, self.dropout, self.dtype = num_classes, dropout, jnp.dtype(dtype)
        options = {"dtype": dtype, "rngs": rngs}
        self.tokens = None if symbols_in is None else TokenEmbed(symbols_in, width, channels=columns, rngs=rngs)
        self.embed = Linear(columns, width, **options) if symbols_in is None else None
        self.embed_bias = None if symbols_in is None else nnx.Param(jnp.zeros((width,), jnp.float32))
        self.time_in = Linear(width, width, rngs=rngs) if time else None
        self.time_out = Linear(width, width, rngs=rngs) if time else None
        rows = (num_classes + 1, width)
        self.labels = nnx.Param(jax.random.normal(rngs.params(), rows, jnp.float32)) if num_classes else None
        widths = [width, *hidden]
        self.layers = nnx.List([Linear(a, b, **options) for a, b in zip(widths, hidden, strict=False)])
        outputs = columns * symbols_out if symbols_in else out_columns or columns
        wide = at_least_float32(dtype)
        self.out = Linear(widths[-1], outputs, kernel_init=zeros, out_dtype=wide, **options)

    def __call__(
        self,
        xt: Float[Array, "batch columns *symbols_in"] | Int[Array, "batch columns"] | SoftTokens,
        t: Float[Array, " batch"] | Float[Array, ""] | None,
        cond: Int[Array, " batch"] | None = None,
        *,
        rng: Key[Array, ""] | Key[Array, " batch"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch out"] | Float[Array, "batch columns symbols_out"]:
        """Run the network.

        Args:
            xt: rows; a token outside `[0, symbols_in)` makes the row's output NaN. Or soft tokens.
            t: time in [0, 1].
            cond: labels in `[0, num_classes]`; None is the null label.
            rng: one key, or one per example, for dropout; needed when train=True and dropout > 0.
            train: whether dropout acts.

        Returns:
            float32, `(batch, out_columns)`, or logits `(batch, columns, symbols_out)`.

        Raises:
            ValueError: for a shape or dtype that the network was not built for.
        """
        state = hard_state(xt, 2, self.symbols_in)
        check_state(state, (("columns",), (self.columns,)), self.symbols_in)
        batch = state.shape[0]
        keys = dropout_keys(self.dropout, batch, rng, train)
        labels, told = check_labels(cond, self.num_classes, batch), 0.0
        if self.time_in is not None:
            told = time_embedding(check_time(t, batch, None), self.time_in.kernel.shape[0])
            told = self.time_out(jax.nn.silu(self.time_in(told)))
        if self.labels is not None:
            told = told + jax.nn.silu(lookup(self.labels[...], labels))
        tap("condition", told)
        h = self.embed(xt) if self.tokens is None else self.tokens(xt).sum(axis=-2) + self.embed_bias[...]
        h = tap("embed", (h + told).astype(self.dtype))
        for i, layer in enumerate(self.layers):
            h = constrain(jax.nn.relu(layer(h)), "batch", None)
            h = tap(f"layer/{i}", dropout(h, self.dropout, None if keys is None else random.fold_in(keys, i)))
        y = self.out(h)
        return y if self.symbols_out is None else y.reshape(batch, self.columns, self.symbols_out)
