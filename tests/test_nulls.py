"""What stands for none, put where a condition has it."""

import numpy as np
import pytest

from ddjax.nulls import nullified

PUT = lambda value, null: (value, null)


def test_a_null_like_the_condition():
    assert nullified(1, 9, PUT) == (1, 9)
    assert nullified({"z": 5, "cond": 1}, 9, PUT) == {"z": 5, "cond": (1, 9)}
    assert nullified({"z": 5, "cond": None}, 9, PUT) == {"z": 5, "cond": None}
    assert nullified([1, 2], [8, 9], PUT) == [(1, 8), (2, 9)]


def test_nulls_by_name_wherever_they_are():
    cond = {"x1": 0, "cond": {"vector": 3, "image": None, "cond": {"valid": 4, "cond": 1}}}
    by_name = nullified(cond, {"valid": False, "cond": 9, "image": 0.0}, PUT)
    inner = {"valid": (4, False), "cond": (1, 9)}
    assert by_name == {"x1": 0, "cond": {"vector": 3, "image": None, "cond": inner}}
    assert nullified({"label": 1, "text": 2}, {"label": 8, "text": 9}, PUT) == {"label": (1, 8), "text": (2, 9)}
    assert nullified(1, {"cond": 9}, PUT) == (1, 9)
    assert nullified({"vector": 3, "cond": 1}, {"vector": 0.0}, PUT) == {"vector": (3, 0.0), "cond": 1}
    assert nullified({"z": np.pi}, {}, PUT) == {"z": np.pi}


def test_a_name_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="null names valid, and the condition has no such entry"):
        nullified({"vector": 1, "cond": 2}, {"valid": False, "cond": 3}, PUT)
    with pytest.raises(ValueError, match="null names cond"):
        nullified({"vector": 1}, {"cond": 3}, PUT)
