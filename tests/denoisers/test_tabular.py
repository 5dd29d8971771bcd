"""TabDDPM's network against its published definition."""

import jax
import numpy as np
import numpy_networks
import pytest

from ddjax import data
from ddjax.config import ConfigError, typed
from ddjax.denoisers import MixedTable, TabularMLP, functional_init
from ddjax.experiment import build as experiment

SMALL = {"columns": 5, "width": 8, "hidden": (6, 7), "num_classes": 3}
T = np.array([0.0, 0.0625, 0.015625], np.float32)  # angles whose rounding does not count
LABELS = np.array([0, 3, 2], np.int32)


def by_definition(p, x, t, labels):
    """Kotelnikov et al. 2023 (tab_ddpm/modules.py, MLPDiffusion and MLP): x is a row of numbers."""
    linear = lambda p, x: x @ np.asarray(p["kernel"], np.float64) + p["bias"]
    silu = numpy_networks.silu
    told = linear(p["time_out"], silu(linear(p["time_in"], numpy_networks.waves(1000.0 * t, 8))))
    told = told + silu(np.asarray(p["labels"], np.float64)[labels])
    h = linear(p["embed"], x) + told
    for i in range(2):
        h = np.maximum(linear(p["layers"][str(i)], h), 0)
    return linear(p["out"], h)


def test_numerical_rows(build):
    run, params = build(lambda rngs: TabularMLP(**SMALL, rngs=rngs))
    x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    want = by_definition(params, x, T, LABELS)
    np.testing.assert_allclose(run(params, x, T, LABELS), want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_categorical_rows_are_their_one_hot_vectors(build):
    run, params = build(lambda rngs: TabularMLP(**SMALL, symbols_in=4, symbols_out=3, rngs=rngs))
    x = np.random.default_rng(0).integers(0, 4, (3, 5)).astype(np.int32)
    onehot = np.eye(4)[x].reshape(3, 20)
    published = {**params, "embed": {"kernel": params["tokens"]["table"], "bias": params["embed_bias"]}}
    want = by_definition(published, onehot, T, LABELS).reshape(3, 5, 3)
    np.testing.assert_allclose(run(params, x, T, LABELS), want, rtol=0, atol=2e-5 * np.abs(want).max())


OTHERS = {key: value for key, value in SMALL.items() if key != "columns"}
PARTS = {"numbers": (2, None, 2), "colour": (1, 4, 3), "size": (2, 3, 3)}


def test_mixed_rows_are_numbers_beside_one_hot_vectors(build):
    """The published network: numbers, then each column's vector, in one linear layer; outputs cut up the same way."""
    run, params = build(lambda rngs: MixedTable(parts=PARTS, **OTHERS, rngs=rngs))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 2)).astype(np.float32)
    colour, size = rng.integers(0, 4, (3, 1)).astype(np.int32), rng.integers(0, 3, (3, 2)).astype(np.int32)
    rows = np.concatenate([x, np.eye(4)[colour].reshape(3, 4), np.eye(3)[size].reshape(3, 6)], axis=1)
    numbers, *tables = (params["embed"][str(k)] for k in range(3))
    kernel = np.concatenate([numbers["kernel"], *(own["table"] for own in tables)])
    want = by_definition({**params, "embed": {"kernel": kernel, "bias": params["embed_bias"]}}, rows, T, LABELS)
    found = run(params, {"numbers": x, "colour": colour, "size": size}, T, LABELS)
    parts = {"numbers": want[:, :2], "colour": want[:, 2:5].reshape(3, 1, 3), "size": want[:, 5:].reshape(3, 2, 3)}
    for name, part in parts.items():
        np.testing.assert_allclose(found[name], part, rtol=0, atol=2e-5 * np.abs(want).max())
    with pytest.raises(ValueError, match="expected a state of the parts numbers, colour, size, got numbers"):
        run(params, {"numbers": x}, T, LABELS)


@pytest.mark.slow
@pytest.mark.parametrize("categorical", [False, True])
def test_a_table_of_a_config(categorical):
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 4, (16, 6)).astype(np.int32) if categorical else rng.normal(size=(16, 6)).astype(np.float32)
    items = data.from_arrays(rows, **({"num_symbols": 4} if categorical else {}))
    if categorical:
        settings = {"objective": {"name": "cross_entropy"}, "denoiser": {"name": "tabular"}}
    else:
        process = {"name": "gaussian", "schedule": "vp_cosine"}
        settings = {
            "process": process,
            "objective": {"name": "gaussian"},
            "denoiser": {"name": "tabular", "kind": "noise"},
        }
    built = experiment(typed(settings), items)
    params = built.init(jax.random.key(0))
    loss, _ = built.objective()(jax.random.key(1), built.apply, params, rows[:8])
    assert np.isfinite(loss)
    images = data.from_arrays(np.zeros((4, 4, 4, 1), rows.dtype), **({"num_symbols": 4} if categorical else {}))
    with pytest.raises(ConfigError, match="'tabular' is for rows of columns"):
        experiment(typed(settings), images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": ()}, "expected columns, layers"),
        ({"width": 7}, "an even width"),
        ({"symbols_in": 3}, "give both of the first"),
        ({"symbols_in": 3, "symbols_out": 3, "out_columns": 5}, "for these alone"),
        ({"dropout": -1.0}, "dropout=-1.0"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        functional_init(lambda rngs: TabularMLP(**{**SMALL, **change}, rngs=rngs))
