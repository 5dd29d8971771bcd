"""Values on another interval: items, levels, images, and what a run remembers of them."""

import dataclasses
import json

import numpy as np
import pytest

from ddjax.config import ConfigError, typed
from ddjax.data import from_arrays, rescaled
from ddjax.data.describe import describe, from_description
from ddjax.experiment import load_data

LEVELS = np.linspace(-1.0, 1.0, 17, dtype=np.float32)
DATA = dataclasses.replace(from_arrays(LEVELS.reshape(1, 17, 1, 1), np.asarray([3])), levels=LEVELS)


def test_items_and_levels_move_together():
    data = rescaled(DATA, 0.0, 1.0)
    items = data[:]
    assert len(data) == 1
    assert items["cond"] == [3]
    assert items["x0"].dtype == data.levels.dtype == np.float32
    np.testing.assert_array_equal(items["x0"].ravel(), data.levels)
    np.testing.assert_array_equal(data.levels, np.arange(17) / 16)
    np.testing.assert_allclose(rescaled(DATA, 0.5, 2.0)[:]["x0"].ravel(), 0.5 + 1.5 * np.arange(17) / 16, rtol=1e-6)


def test_images_look_the_same_also_from_a_description():
    data = rescaled(DATA, 0.5, 2.0)
    again = from_description(json.loads(json.dumps(describe(data))))
    x0 = data[:]["x0"]
    for one in (data, again):
        np.testing.assert_array_equal(one.to_images(x0), DATA.to_images(DATA[:]["x0"]))
    older = {k: v for k, v in describe(DATA).items() if k != "interval"}
    assert from_description(older).interval == (-1.0, 1.0)


@pytest.mark.slow
def test_from_a_config():
    data = load_data(typed({"data": {"tokens": False, "interval": [0.0, 1.0]}}), "train")
    np.testing.assert_array_equal(data.levels, np.arange(17) / 16)
    x0 = data[:64]["x0"]
    assert (x0.min(), x0.max()) == (0.0, 1.0)
    for wrong, message in (([1.0, 0.0], "low < high"), ([1.0], "missing"), (["a", "b"], "")):
        with pytest.raises(ConfigError, match=f"config.data.interval=.*{message}"):
            load_data(typed({"data": {"tokens": False, "interval": wrong}}), "train")
    with pytest.raises(ConfigError, match="are tokens"):
        load_data(typed({"data": {"tokens": True, "interval": [0.0, 1.0]}}), "train")
    with pytest.raises(ValueError, match="already"):
        rescaled(rescaled(DATA, 0.0, 1.0), 0.0, 1.0)
