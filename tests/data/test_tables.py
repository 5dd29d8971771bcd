import sys

import numpy as np
import pytest

from ddjax import data

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

THIRDS = (0.6, 0.2, 0.2)
TOKENS = np.arange(200).reshape(50, 4) % 23


def write(path, columns, group=7):
    table = arrow.table(columns)
    if path.suffix == ".parquet":
        parquet.write_table(table, path, row_group_size=group)
        return path
    with arrow.OSFile(str(path), "wb") as file, arrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=group)
    return path


def all_splits(path, **options):
    return [data.load(path, split, fractions=THIRDS, **options) for split in ("train", "valid", "test")]


@pytest.fixture(params=["a.parquet", "a.arrow"])
def path(request, tmp_path):
    return tmp_path / request.param


@pytest.mark.parametrize("fixed", [True, False])
def test_lists_of_tokens(path, fixed):
    kind = arrow.list_(arrow.int16(), 4) if fixed else arrow.list_(arrow.int16())
    columns = {"ids": arrow.array(TOKENS.tolist(), kind), "y": np.arange(50) % 3}
    write(path, columns)
    parts = all_splits(path, columns="ids", num_symbols=23, label="y", num_classes=3)
    assert [len(part) for part in parts] == [30, 10, 10]
    assert {(part.shape, part.num_symbols, part.num_classes) for part in parts} == {((4,), 23, 3)}
    rows = []
    for part in parts:
        batch = part[:]
        assert batch["x0"].dtype == batch["cond"].dtype == np.int32
        backwards = part[np.arange(len(part))[::-1]]  # groups in another order than rows
        np.testing.assert_array_equal(backwards["x0"], batch["x0"][::-1])
        rows += [(*x, y) for x, y in zip(batch["x0"].tolist(), batch["cond"].tolist(), strict=True)]
    assert sorted(rows) == sorted((*x, i % 3) for i, x in enumerate(TOKENS.tolist()))


def test_only_some_groups_are_kept(path):
    write(path, {"ids": TOKENS.tolist()}, group=2)
    part = data.load(path, "train", columns="ids", num_symbols=23)
    part[:]
    assert len(part.source.groups._cache) == 8
    assert len(part.source.groups.starts) == 26


def test_columns_of_numbers(path):
    write(path, {"a": np.arange(50.0), "b": -np.arange(50.0), "k": np.arange(50)})
    part = data.load(path, "train", columns=["a", "b"])
    assert (part.shape, part.num_symbols) == ((2,), None)
    x0 = part[:]["x0"]
    assert x0.dtype == np.float32
    np.testing.assert_array_equal(x0[:, 0], -x0[:, 1])
    assert len(set(x0[:, 0])) == 45
    assert data.load(path, "train", columns="k", num_symbols=50)[:]["x0"].shape == (45, 1)


def test_a_column_of_text(path):
    lines = [f"line {i:03}" for i in range(50)]
    write(path, {"text": lines})
    for vocabulary in ("bytes", "characters"):
        parts = all_splits(path, columns="text", length=9, vocabulary=vocabulary)
        text = ["".join(part.to_text(part[:]["x0"])) for part in parts]
        assert text == ["".join(line + "\n" for line in lines[a:b]) for a, b in ((0, 30), (30, 40), (40, 50))]
        assert len({part.num_symbols for part in parts}) == 1


def test_table_errors(path):
    columns = {"ids": TOKENS.tolist(), "x": np.arange(50) / 2, "y": np.arange(50), "b": [None, *range(49)]}
    columns["uneven"] = [[1] * (3 if i == 8 else 2) for i in range(50)]
    columns["when"] = arrow.array([0] * 50, arrow.timestamp("s"))
    write(path, columns)

    def load(columns, **options):
        return data.load(path, "train", columns=columns, fractions=(1, 0, 0), **options)

    with pytest.raises(ValueError, match="the option columns must be given"):
        data.load(path, "train")
    with pytest.raises(ValueError, match="no column 'z', only ids, x, y, b"):
        load("z")
    with pytest.raises(ValueError, match="num_symbols must be given for columns of integers"):
        load("ids")
    with pytest.raises(ValueError, match="num_classes must be given with label='y'"):
        load("ids", num_symbols=23, label="y")
    with pytest.raises(ValueError, match="the columns hold double: leave out tokens=True"):
        load("x", tokens=True)
    with pytest.raises(ValueError, match=r"columns when are .*: expected text, or"):
        load("when")
    with pytest.raises(ValueError, match=r"token 22 at index \(5, 2\) is outside \[0, 22\)"):
        load("ids", num_symbols=22)[:]
    with pytest.raises(ValueError, match="rows from 0: 1 values are missing"):
        load("b", num_symbols=50)[:]
    with pytest.raises(ValueError, match="rows from 7: row 1 of them has 3 values, expected 2 in every row"):
        load("uneven", num_symbols=2)[:]
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match=rf"{path.name}: not a readable {path.suffix} file"):
        load("ids")


def test_labels_must_fit(path):
    write(path, {"ids": TOKENS.tolist(), "y": np.arange(50)})
    part = data.load(path, "train", columns="ids", num_symbols=23, label="y", num_classes=20, fractions=(1, 0, 0))
    part[:20]
    with pytest.raises(ValueError, match=r"label 'y': token 20 at index \(20,\) is outside \[0, 20\)"):
        part[:]


def test_missing_pyarrow_says_how_to_install_it(path, monkeypatch):
    write(path, {"ids": TOKENS.tolist()})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"needs pyarrow: pip install 'ddjax\[tabular\]'"):
        data.load(path, "train", columns="ids")
