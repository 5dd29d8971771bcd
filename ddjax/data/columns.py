"""Rows of a table of numbers and symbols as states of several parts, and back.

Numbers become normal, column by column: each to the normal quantile of its rank among the training rows (Kotelnikov et
al. 2023, TabDDPM, section 4: scikit-learn's `QuantileTransformer`). Each column of symbols is a part of its own, for
its alphabet is its own.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddjax.data import splits
from ddjax.data.dataset import Dataset

NUMBERS = "numbers"  # the part that holds all columns of numbers, in their order
Table = Mapping[str, Sequence[Any]]  # columns by name


@dataclasses.dataclass(frozen=True, eq=False)
class Columns:
    """What the columns of a table are; all of it is what JSON can hold (`describe`).

    names: all columns, in order. numbers: those of numbers.
    symbols: the values of each of the others, in the order of their tokens.
    quantiles: `(quantiles, numbers)`, of the training rows, increasing. whole: columns of numbers without fractions.
    decimals: how many decimals each column of numbers has, for writing.
    label: the column that is the label, among `symbols`, or None. shares: how often each label occurs.
    """

    names: list[str]
    numbers: list[str]
    symbols: dict[str, list[str]]
    quantiles: list[list[float]]
    decimals: list[int]
    label: str | None = None
    shares: list[float] | None = None

    @classmethod
    def fit(cls, table: Table, rows: np.ndarray, *, numbers: Sequence[str], label: str | None = None) -> Columns:
        """Of these rows of a table; alphabets are those of all rows.

        Raises ValueError for names that are no columns, or a label of numbers.
        """
        for name in (*numbers, *([label] if label else [])):
            if name not in table:
                raise ValueError(f"no column {name!r}, only {', '.join(table)}")
        if label in numbers:
            raise ValueError(f"label={label!r} is a column of numbers: name it in categorical, too")
        symbols = {name: sorted(set(values)) for name, values in table.items() if name not in numbers}
        if NUMBERS in symbols:
            raise ValueError(f"a column of symbols is called {NUMBERS!r}, as the part of all numbers is: rename it")
        values = _values(table, numbers)[rows]
        quantiles = []
        if numbers:
            from sklearn.preprocessing import QuantileTransformer  # here: it takes a second to import

            count = max(min(len(rows) // 30, 1000), 10)
            fitted = QuantileTransformer(n_quantiles=min(count, len(rows)), subsample=None).fit(values)
            quantiles = fitted.quantiles_.tolist()
        shares = None
        if label is not None:
            found = np.array([symbols[label].index(table[label][row]) for row in rows])
            shares = (np.bincount(found, minlength=len(symbols[label])) / len(rows)).tolist()
        return cls(list(table), list(numbers), symbols, quantiles, [_decimals(v) for v in values.T], label, shares)

    def describe(self) -> dict[str, Any]:
        """What JSON can hold, the arguments of `Columns`."""
        return dataclasses.asdict(self)

    @property
    def shape(self) -> dict[str, tuple[int, ...]]:
        """Of each part."""
        numbers = {NUMBERS: (len(self.numbers),)} if self.numbers else {}
        return numbers | {name: (1,) for name in self.symbols if name != self.label}

    @property
    def num_symbols(self) -> dict[str, int | None]:
        """Of each part; None for the numbers."""
        return {name: None if name == NUMBERS else len(self.symbols[name]) for name in self.shape}

    def encode(self, table: Table) -> dict[str, Any]:
        """Items: "x0", a dict of parts, and, with a label, "cond".

        Raises ValueError for a symbol that `fit` has not seen, and for what is no number.
        """
        x0 = {}
        if self.numbers:
            x0[NUMBERS] = self._transformer().transform(_values(table, self.numbers)).astype(np.float32)
        for name, known in self.symbols.items():
            order = {value: token for token, value in enumerate(known)}
            try:
                x0[name] = np.array([order[value] for value in table[name]], np.int32)[:, None]
            except KeyError as error:
                raise ValueError(f"column {name!r}: the value {error} is new; known are {known[:10]}") from error
        cond = {} if self.label is None else {"cond": x0.pop(self.label)[:, 0]}
        return {"x0": x0, **cond}

    def decode(self, x0: Mapping[str, Any], cond: Any = None) -> dict[str, list[Any]]:
        """States as columns by name, in the table's order: numbers (whole where the table's are), and symbols.

        cond: labels `(n,)`; without them the label's column is left out.
        Raises ValueError for states of other parts.
        """
        x0 = {name: np.asarray(part) for name, part in x0.items()}
        found = {name: part.shape[1:] for name, part in x0.items()}
        if found != self.shape:
            raise ValueError(f"expected states of parts {self.shape}, got {found}")
        table = {}
        if self.numbers:
            values = self._transformer().inverse_transform(x0[NUMBERS].astype(np.float64))
            for k, name in enumerate(self.numbers):
                column = np.round(values[:, k], self.decimals[k])
                table[name] = (column.astype(np.int64) if self.decimals[k] == 0 else column).tolist()
        tokens = {name: x0[name][:, 0] for name in self.symbols if name != self.label}
        if self.label is not None and cond is not None:
            tokens[self.label] = np.asarray(cond)
        for name, part in tokens.items():
            table[name] = [self.symbols[name][token] for token in part]
        return {name: table[name] for name in self.names if name in table}

    def labels(self, rows: Sequence[int], seed: int = 0) -> np.ndarray:
        """Labels drawn as often as they occur, one for each row number, the same whatever the others are."""
        uniforms = np.array([np.random.default_rng((seed, int(row))).random() for row in rows])
        return np.minimum(np.searchsorted(np.cumsum(self.shares), uniforms, side="right"), len(self.shares) - 1)

    def features(self, table: Table, but: Sequence[str] = ()) -> np.ndarray:
        """Rows for other methods: quantile-transformed numbers, then each symbol as a one-hot vector, `(n, features)`.

        but: columns that are left out.
        """
        items = dataclasses.replace(self, label=None).encode(table)["x0"]
        parts = [items[NUMBERS][:, [name not in but for name in self.numbers]]] if self.numbers else []
        parts += [np.eye(len(known))[items[name][:, 0]] for name, known in self.symbols.items() if name not in but]
        return np.concatenate(parts, axis=1)

    def _transformer(self) -> Any:
        """Scikit-learn's, as it was when it was fitted."""
        from sklearn.preprocessing import QuantileTransformer

        quantiles = np.asarray(self.quantiles)
        made = QuantileTransformer(n_quantiles=len(quantiles), output_distribution="normal", subsample=None)
        made.n_quantiles_, made.quantiles_, made.n_features_in_ = len(quantiles), quantiles, quantiles.shape[1]
        made.references_ = np.linspace(0.0, 1.0, len(quantiles))
        return made


def _values(table: Table, numbers: Sequence[str]) -> np.ndarray:
    """Columns of numbers side by side."""
    try:
        columns = [np.asarray(table[name], np.float64) for name in numbers]
    except ValueError as error:
        raise ValueError(f"columns {', '.join(numbers)} are numbers: {error}") from error
    return np.stack(columns, axis=1) if columns else np.zeros((len(next(iter(table.values()))), 0))


def _decimals(values: np.ndarray) -> int:
    """The fewest decimals, up to 9, with which all values are written exactly."""
    return next((d for d in range(9) if np.allclose(values, np.round(values, d), rtol=0, atol=10.0 ** -(d + 6))), 9)


@dataclasses.dataclass(frozen=True, eq=False)
class _Rows:
    """Items of several parts in memory."""

    x0: dict[str, np.ndarray]
    cond: np.ndarray | None = None

    def __len__(self) -> int:
        return len(next(iter(self.x0.values())))

    def __getitem__(self, index: np.ndarray) -> dict[str, Any]:
        items = {"x0": {name: part[index] for name, part in self.x0.items()}}
        return items if self.cond is None else {**items, "cond": self.cond[index]}


def read_csv(path: Path | str, missing: str = "error") -> dict[str, list[str]]:
    """The columns of a CSV file with a first line of names, as text.

    missing: what to do about rows with an empty entry: "error", "keep" (it is a symbol like others) or "drop".
    Raises ValueError for rows of another length than the first, and for empty entries.
    """
    if missing not in ("error", "keep", "drop"):
        raise ValueError(f"missing is error, keep or drop, got {missing!r}")
    with open(path, newline="", encoding="utf-8") as file:
        names, *rows = (row for row in csv.reader(file, skipinitialspace=True) if row)  # blank lines are no rows
    for i, row in enumerate(rows):
        if len(row) != len(names):
            raise ValueError(f"{path}: row {i} has {len(row)} entries, expected {len(names)}: {', '.join(names)}")
        if missing == "error" and "" in row:
            raise ValueError(
                f"{path}: row {i} has no {names[row.index('')]!r}: give the option missing='drop', or 'keep' to make "
                "it a symbol"
            )
    rows = [row for row in rows if "" not in row] if missing == "drop" else rows
    return {name: [row[k] for row in rows] for k, name in enumerate(names)}


def write_csv(path: Path | str, table: Table) -> None:
    """Columns as a CSV file with a first line of names."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(table)
        writer.writerows(zip(*table.values(), strict=True))


def csv_table(
    path: Path,
    split: str,
    *,
    tokens: bool | None = None,
    categorical: Sequence[str] = (),
    leave_out: Sequence[str] = (),
    label: str | None = None,
    missing: str = "error",
    fractions: tuple[float, float, float] = splits.FRACTIONS,
) -> Dataset:
    """A CSV file of numbers and symbols, in memory: states of several parts, for `processes.Product`.

    Columns whose entries all are numbers are the part "numbers"; each other is a part of its own name. What they stand
    for is the data set's `columns` (`Columns`), fitted on the training rows; rows are divided by a fixed permutation.

    Args:
        path: the file.
        split: "train", "valid" or "test".
        tokens: does not matter: columns are what they are.
        categorical: columns of numbers that are symbols.
        leave_out: columns that are not read.
        label: the column of symbols that is the condition; None: all are part of the state.
        missing: of rows with an empty entry: "error", "keep" (a symbol of its own) or "drop".
        fractions: (train, valid, test).

    Raises:
        ValueError: columns that are not there, or do not fit.
    """
    table = read_csv(path, missing)
    for name in (*categorical, *leave_out):
        if name not in table:
            raise ValueError(f"{path}: no column {name!r}, only {', '.join(table)}")
    table = {name: values for name, values in table.items() if name not in leave_out}
    numbers = [name for name, values in table.items() if name not in (*categorical, label) and _all_numbers(values)]
    count = len(next(iter(table.values())))
    rows = {part: splits.items(count, part, fractions, str(path)) for part in {"train", split}}
    columns = Columns.fit(table, rows["train"], numbers=numbers, label=label)
    items = columns.encode({name: [values[row] for row in rows[split]] for name, values in table.items()})
    return Dataset(
        name=str(path),
        split=split,
        source=_Rows(items["x0"], items.get("cond")),
        shape=columns.shape,
        num_symbols=columns.num_symbols,
        num_classes=0 if label is None else len(columns.symbols[label]),
        columns=columns,
    )


def _all_numbers(values: Sequence[str]) -> bool:
    try:
        return bool(np.isfinite(np.asarray(values, np.float64)).all())
    except ValueError:
        return False
