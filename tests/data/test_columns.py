"""Tables of numbers and symbols: as states of several parts, and back."""

import csv
import json

import jax
import numpy as np
import pytest
from scipy.stats import norm

import ddjax
from ddjax import data
from ddjax.config import ConfigError, typed
from ddjax.data.columns import Columns
from ddjax.data.describe import describe, from_description
from ddjax.evaluation import nearest_record_distance, utility
from ddjax.experiment import build
from ddjax.processes import Gaussian, Product, Uniform
from ddjax.training import loop

COLOURS, SIZES = ("blue", "green", "red"), ("L", "S")


def rows(n=400, seed=0):
    """Numbers that symbols say much of: the colour the mean of one, the size the sign of another."""
    rng = np.random.default_rng(seed)
    colour, size = rng.integers(0, 3, n), rng.integers(0, 2, n)
    weight = np.round(10.0 * colour + rng.gamma(2.0, size=n), 2)
    count = rng.poisson(3 + 10 * size)
    return {
        "weight": weight.tolist(),
        "colour": [COLOURS[k] for k in colour],
        "count": count.tolist(),
        "size": [SIZES[k] for k in size],
        "code": rng.integers(0, 2, n).tolist(),
    }


@pytest.fixture
def path(tmp_path):
    data.write_csv(tmp_path / "table.csv", rows())
    return tmp_path / "table.csv"


def test_a_file_is_parts_and_comes_back(path):
    train = data.load(path, "train", categorical=["code"])
    assert train.shape == {"numbers": (2,), "colour": (1,), "size": (1,), "code": (1,)}
    assert train.num_symbols == {"numbers": None, "colour": 3, "size": 2, "code": 2}
    assert not train.is_image
    items = train[:]["x0"]
    with open(path, newline="") as file:
        original = list(csv.DictReader(file))
    from ddjax.data import splits

    kept = [original[row] for row in splits.items(400, "train", splits.FRACTIONS, "")]
    back = train.columns.decode(items)
    assert list(back) == list(rows())
    for name in ("colour", "size", "code"):
        assert back[name] == [row[name] for row in kept]
    assert back["count"] == [int(row["count"]) for row in kept]
    # Ten quantiles at least; between two of them values lie on a line.
    np.testing.assert_allclose(back["weight"], [float(row["weight"]) for row in kept], atol=0.011)


def test_numbers_are_normal_quantiles_of_ranks():
    """The definition, on as many values as there are quantiles: rank r of n goes to the quantile r / (n - 1)."""
    rng = np.random.default_rng(0)
    values = rng.permutation(np.sort(rng.gamma(1.0, size=10)))
    table = {"v": values.tolist()}
    columns = Columns.fit(table, np.arange(10), numbers=["v"])
    found = columns.encode(table)["x0"]["numbers"][:, 0]
    share = np.argsort(np.argsort(values)) / 9
    inside = (share > 0) & (share < 1)
    np.testing.assert_allclose(found[inside], norm.ppf(share[inside]), rtol=1e-5)
    assert found[share == 0] < -5
    assert found[share == 1] > 5
    np.testing.assert_allclose(columns.decode({"numbers": np.zeros((1, 1))})["v"], np.median(values), atol=1e-8)


def test_what_columns_are_is_saved_as_json(path):
    test = data.load(path, "test", categorical=["code"], label="size")
    assert test.num_classes == 2
    assert set(test[:2]) == {"x0", "cond"}
    stored = json.loads(json.dumps(describe(test)))
    again = from_description(stored)
    assert describe(again) == stored == describe(data.load(path, "train", categorical=["code"], label="size"))
    x0, cond = test[:]["x0"], test[:]["cond"]
    assert again.columns.decode(x0, cond) == test.columns.decode(x0, cond)
    assert "size" not in test.columns.decode(x0)
    drawn = again.columns.labels(np.arange(4000))
    np.testing.assert_allclose(drawn.mean(), test.columns.shares[1], atol=4 * 0.5 / np.sqrt(4000))
    np.testing.assert_array_equal(again.columns.labels([7, 3]), drawn[[7, 3]])


def test_counts_are_of_each_part(path):
    train = data.count_symbols(data.load(path, "train", categorical=["code"]))
    values, counts = np.unique(train.columns.decode(train[:]["x0"])["colour"], return_counts=True)
    assert values.tolist() == list(COLOURS)
    np.testing.assert_array_equal(train.counts["colour"], counts)
    assert set(train.counts) == {"colour", "size", "code"}


@pytest.mark.slow
def test_real_rows_are_useful_and_no_strangers_to_themselves():
    columns = Columns.fit(rows(), np.arange(400), numbers=["weight", "count", "code"])
    train, test, noise = rows(), rows(200, 1), rows(300, 2)
    found = utility(columns, train, train, test, "colour")
    assert found.score == "f1"
    assert found.synthetic == found.real > 0.9
    shuffled = {name: np.random.default_rng(k).permutation(v).tolist() for k, (name, v) in enumerate(noise.items())}
    assert utility(columns, shuffled, train, test, "colour").synthetic < 0.6
    assert utility(columns, train, train, test, "weight").score == "r2"
    np.testing.assert_allclose(nearest_record_distance(columns, train, train), 0.0, atol=1e-6)
    near = nearest_record_distance(columns, noise, train)
    assert 0.0 < np.median(near) < np.median(nearest_record_distance(columns, shuffled, train))
    # By hand: one number and one symbol apart.
    one = {"v": [0.0, 1.0, 2.0], "s": ["a", "a", "b"]}
    small = Columns.fit({name: v * 4 for name, v in one.items()}, np.arange(12), numbers=["v"])
    moved = {"v": [1.0], "s": ["b"]}
    apart = nearest_record_distance(small, moved, {"v": [1.0], "s": ["a"]})
    np.testing.assert_allclose(apart, 1.0, atol=1e-6)


CONFIG = {
    "process": {"name": "product", "schedule": "vp_cosine"},
    "denoiser": {"name": "mixed_table", "kind": "noise+posterior", "options": {"width": 32, "hidden": [32]}},
    "objective": {"name": "tabddpm"},
    "optimizer": {"warmup": 10, "learning_rate": 3e-3},
    "sample": {"num": 32, "steps": 8},
    "eval": {"max_examples": 16, "num_times": 4},
}


def test_the_process_of_a_config_has_each_alphabet(path):
    items = data.load(path, "train", categorical=["code"])
    built = build(typed(CONFIG), items)
    assert isinstance(built.process, Product)
    assert isinstance(built.process["numbers"], Gaussian)
    assert built.process["colour"] == Uniform(3, ddjax.schedules.Cosine())
    assert built.sites == 5
    by_masks = {
        **CONFIG,
        "process": {**CONFIG["process"], "options": {"symbols": "masked", "symbols_schedule": "linear"}},
    }
    assert build(typed(by_masks), items).process["size"].num_states == 3
    with pytest.raises(ConfigError, match="is for states of one part, but the data"):
        build(typed({"process": {"name": "masked"}}), items)
    with pytest.raises(ConfigError, match="is for states of several parts"):
        build(typed({"process": {"name": "product", "schedule": "vp_cosine"}}), data.load("digits", "train"))
    with pytest.raises(ConfigError, match="'text' is for token sequences"):
        build(typed({**CONFIG, "denoiser": {"name": "text", "kind": "noise+posterior"}}), items)


@pytest.mark.slow
@pytest.mark.parametrize("label", [None, "size"])
def test_train_sample_and_score_a_table(path, tmp_path, label):
    """From a CSV file to a CSV file, and by another process of the same run."""
    config = {
        **CONFIG,
        "data": {"name": str(path), "options": {"categorical": ["code"]} | ({"label": label} if label else {})},
        "train": {"steps": 300, "batch_size": 64, "checkpoint_every": 300, "sample_every": 300, "log_every": 100},
        "sample": {**CONFIG["sample"], "solver": "parts", "solver_options": {"solvers_of": {"numbers": "ddim"}}},
    }
    work = tmp_path / "work"
    loop.train(typed(config), work, show=False)
    run = ddjax.load(work)
    n = 512
    cond = run.data.columns.labels(np.arange(n)) if label else None
    x0 = run.sample(jax.random.key(0), n, cond=cond, steps=32, batch_size=200)
    assert {name: v.shape[1:] for name, v in x0.items()} == run.data.shape
    synthetic = run.data.columns.decode(x0, cond)
    assert list(synthetic) == list(rows())
    weight = np.array(synthetic["weight"])
    means = [weight[np.array(synthetic["colour"]) == colour].mean() for colour in COLOURS]
    assert means[0] + 4 < means[1] < means[2] - 4  # 2, 12, 22 in the data
    again = run.sample(jax.random.key(0), 2, cond=None if cond is None else cond[5:7], steps=32, rows=[5, 6])
    for name, part in again.items():
        np.testing.assert_allclose(part, x0[name][5:7], atol=1e-4)
    scores = loop.evaluate(run, run.config)
    assert np.isfinite(scores["bits_per_dim"])
    assert scores["bits_per_dim"] == pytest.approx(
        scores["prior"] + scores["diffusion"] + scores["reconstruction"], abs=1e-5
    )
    (written,) = (work / "samples").glob("*.csv")
    table = data.read_csv(written)
    assert list(table) == list(rows())
    assert len(table["weight"]) == 32
    path_drawn = run.sample(jax.random.key(0), 3, cond=None if cond is None else cond[:3], steps=4, trajectory=True)
    assert path_drawn.trajectory["numbers"].shape == (5, 3, 2)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a,b\n1,x\n2", {}, "row 1 has 1 entries, expected 2"),
        ("a,b\n1,x\n,y\n", {}, "row 1 has no 'a'"),
        ("a,b\n1,x\n2,y\n", {"label": "c"}, "no column 'c'"),
        ("a,b\n1,x\n2,y\n", {"leave_out": ["c"]}, "no column 'c'"),
        ("a,numbers\n1,x\n2,y\n", {}, "a column of symbols is called 'numbers'"),
        ("a,b\n1,x\n2,y\n", {"missing": "guess"}, "missing is error, keep or drop"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, text, options, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        data.load(tmp_path / "t.csv", "train", **{"fractions": (1.0, 0.0, 0.0), **options})


def test_new_symbols_and_missing_rows(tmp_path):
    (tmp_path / "blank.csv").write_text("a,b\n\n1,x\n2,y\n\n")
    assert data.read_csv(tmp_path / "blank.csv") == {"a": ["1", "2"], "b": ["x", "y"]}
    (tmp_path / "t.csv").write_text("a,b\n1,x\n,y\n3,z\n")
    kept = data.load(tmp_path / "t.csv", "train", missing="keep", fractions=(1.0, 0.0, 0.0))
    assert kept.num_symbols == {"a": 3, "b": 3}  # what is missing is a symbol: then the column is none of numbers
    dropped = data.load(tmp_path / "t.csv", "train", missing="drop", fractions=(1.0, 0.0, 0.0))
    assert dropped.num_symbols == {"numbers": None, "b": 2}
    with pytest.raises(ValueError, match="column 'b': the value 'w' is new"):
        dropped.columns.encode({"a": [1.0], "b": ["w"]})
    with pytest.raises(ValueError, match="expected states of parts"):
        dropped.columns.decode({"b": np.zeros((1, 1), int)})
