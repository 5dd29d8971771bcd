import numpy as np
import pytest

import ddjax
from ddjax.evaluation import label_accuracy


@pytest.fixture(scope="module")
def digits():
    train, test = (ddjax.data.load("digits", split) for split in ("train", "test"))
    return train[:], test[:]


def test_real_digits_are_their_own_class_and_others_are_not(digits):
    train, test = digits
    real = train["x0"], train["cond"]
    assert label_accuracy(*real, test["x0"], test["cond"]) > 0.97
    assert label_accuracy(*real, test["x0"], (test["cond"] + 1) % 10) < 0.03
    noise = np.random.default_rng(0).integers(0, 17, test["x0"].shape)
    assert label_accuracy(*real, noise, test["cond"]) < 0.3


def test_it_is_the_fraction_of_agreeing_labels(digits):
    train, _ = digits
    few = {k: v[:300] for k, v in train.items()}
    half = np.where(np.arange(300) < 150, few["cond"], (few["cond"] + 5) % 10)
    assert label_accuracy(few["x0"], few["cond"], few["x0"], half) == pytest.approx(0.5, abs=0.01)
    with pytest.raises(ValueError, match="300 real states with 300 labels, 300 samples with 299 labels"):
        label_accuracy(few["x0"], few["cond"], few["x0"], half[:-1])
