"""Named arrays of a data set as conditions: what the items hold, what stands for none, what samples may be told."""

import json

import numpy as np
import pytest

from ddjax.data import conditioned, conditions, from_arrays, smaller
from ddjax.data.describe import describe, from_description
from ddjax.denoisers import nulls
from ddjax.nulls import nullified

RNG = np.random.default_rng(0)
N = 6
X = RNG.integers(0, 256, size=(N, 4, 4, 1)).astype(np.uint8)
BESIDE = {
    "clip": RNG.normal(size=(N, 3)).astype(np.float32),
    "words": RNG.normal(size=(N, 5, 2)).astype(np.float32),
    "there": RNG.random((N, 5)) < 0.5,
    "low": RNG.normal(size=(N, 4, 4, 2)).astype(np.float32),
}
NAMES = {"vector": "clip", "sequence": "words", "valid": "there", "image": "low"}
SHAPES = {"vector": (3,), "sequence": (5, 2), "valid": (5,), "image": (4, 4, 2)}


def data(labels=True, tokens=False, **more):
    return from_arrays(X, np.arange(N) % 3 if labels else None, tokens=tokens, beside=BESIDE | more)


@pytest.mark.parametrize("tokens", [False, True])
def test_items_hold_their_arrays_in_the_condition(tokens):
    made = conditioned(data(tokens=tokens), NAMES)
    assert made.conditions == SHAPES
    rows = np.array([4, 1])
    items = made[rows]
    assert set(items) == {"x0", "cond"}
    for entry, name in NAMES.items():
        np.testing.assert_array_equal(items["cond"][entry], BESIDE[name][rows], err_msg=entry)
    assert items["cond"]["valid"].dtype == bool
    np.testing.assert_array_equal(items["cond"]["cond"], [1, 1])
    back = from_description(json.loads(json.dumps(describe(made))))
    assert (back.conditions, back.num_classes) == (SHAPES, 3)
    assert conditions.options(made) == {"vector": 3, "context_width": 2, "image_channels": 2}


def test_a_sequence_is_all_valid_unless_said():
    made = conditioned(data(labels=False), {"sequence": "words"})
    assert made.conditions == {"sequence": (5, 2), "valid": (5,)}
    cond = made[:2]["cond"]
    assert cond["valid"].all()
    assert cond["cond"] is None
    ones = conditioned(data(shown=np.float32([[0, 1, 0, 2, -1]] * N)), {"sequence": "words", "valid": "shown"})
    np.testing.assert_array_equal(ones[:1]["cond"]["valid"], [[0, 1, 0, 1, 0]])


def test_an_image_made_of_the_data():
    """Squares of means by their definition; what a function makes goes by the item, not by its place in a batch."""
    made = conditioned(data(), {"image": {"smaller": 2}})
    assert made.conditions == {"image": (2, 2, 1)}
    items = made[np.array([4, 1])]
    for x0, image in zip(items["x0"], items["cond"]["image"], strict=True):
        want = [[x0[2 * i : 2 * i + 2, 2 * j : 2 * j + 2, 0].mean() for j in range(2)] for i in range(2)]
        np.testing.assert_allclose(image[..., 0], want, atol=2e-7)  # float32 of numbers up to 1
    assert set(items) == {"x0", "cond", *BESIDE}
    assert smaller(X, 1).shape == X.shape
    noise = lambda row: np.random.default_rng(int(row)).normal(size=(4, 4, 1))
    noisy = conditioned(data(), {"image": lambda x0, rows: x0 + np.stack([noise(row) for row in rows])})
    some = noisy[np.array([4, 1])]
    np.testing.assert_array_equal(some["cond"]["image"][1], np.float32(some["x0"][1] + noise(1)))
    ours = conditioned(data(), {"image": {"smaller": 4}, "vector": "clip"})
    assert ours.conditions == {"image": (1, 1, 1), "vector": (3,)}
    low = {"small": np.zeros((N, 2, 2, 3), np.float32), "flat": np.zeros((N, 2, 1, 3), np.float32)}
    assert conditioned(data(**low), {"image": "small"}).conditions == {"image": (2, 2, 3)}
    for of, how, match in (
        (data(), {"smaller": 3}, "does not divide"),
        (data(), {"smaller": 2, "blurred": 1}, "expected one of smaller"),
        (data(), {"blurred": 2}, "expected one of smaller"),
        (data(tokens=True), {"smaller": 2}, "made of values"),
        (data(**low), "flat", "it is no 'image'"),
    ):
        with pytest.raises(ValueError, match=match):
            conditioned(of, {"image": how})


def test_what_stands_for_none():
    made = conditioned(data(), NAMES)
    null = conditions.nulls(made)
    assert null == nulls(made[:2]["cond"], num_classes=3)  # as networks have it
    gone = nullified(made[:2]["cond"], null, lambda value, none: np.full_like(value, none))
    assert (gone["cond"] == 3).all()
    assert not gone["valid"].any()
    assert not gone["vector"].any()
    assert conditions.nulls(data(labels=False)) is None
    assert conditions.nulls(data()) == 3
    assert "cond" not in conditions.nulls(conditioned(data(labels=False), NAMES))


def test_conditions_of_samples():
    made = conditioned(data(), NAMES)
    told = conditions.of(made, {"vector": BESIDE["clip"][0], "sequence": BESIDE["words"][:2], "cond": 1}, 2)
    np.testing.assert_array_equal(told["vector"], np.stack([BESIDE["clip"][0]] * 2))
    assert told["valid"].all()
    np.testing.assert_array_equal(told["cond"], [1, 1])
    assert not told["image"].any()
    labels = conditions.of(made, np.array([0, 2]), 2)
    assert not labels["valid"].any()
    np.testing.assert_array_equal(labels["cond"], [0, 2])
    np.testing.assert_array_equal(conditions.of(made, {"vector": np.ones(3)}, 2)["cond"], [3, 3])  # the null label
    assert conditions.of(made, None, 2) is None
    assert conditions.of(conditioned(data(labels=False), NAMES), {"vector": np.ones(3)}, 2)["cond"] is None
    for cond, match in (
        ({"voice": 1}, "cond has 'voice'"),
        ({"vector": np.ones(4)}, r"has shape \(4,\); expected \(2, 3\)"),
        ({"cond": 5}, "labels run from 0 to 2"),
    ):
        with pytest.raises(ValueError, match=match):
            conditions.of(made, cond, 2)
    with pytest.raises(ValueError, match="labels alone"):
        conditions.of(data(), {"vector": np.ones(3)}, 2)
    with pytest.raises(ValueError, match="has no labels"):
        conditions.of(data(labels=False), 1, 2)


@pytest.mark.parametrize(
    ("names", "match"),
    [
        ({"voice": "clip"}, "'voice' is no entry"),
        ({"vector": "voice"}, r"options\.beside=\['voice'\]"),
        ({"vector": "words"}, "it is no 'vector'"),
        ({"valid": "there"}, "name its 'sequence'"),
        ({"image": "clip"}, "it is no 'image'"),
        ({"sequence": "words", "valid": "clip"}, "it is no 'valid'"),
    ],
)
def test_what_does_not_fit_is_said(names, match):
    with pytest.raises(ValueError, match=match):
        conditioned(data(), names)
