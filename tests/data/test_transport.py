"""Pairs by optimal transport: the best of all permutations, the same on any number of hosts and after a resume."""

import itertools

import numpy as np
import pytest

from ddjax import data
from ddjax.data.transport import assignment


def test_the_best_of_all_permutations():
    rng = np.random.default_rng(0)
    x0, x1 = rng.normal(size=(6, 2, 3)), rng.normal(size=(6, 2, 3))
    costs = {p: ((x0 - x1[list(p)]) ** 2).sum() for p in itertools.permutations(range(6))}
    assert tuple(assignment(x0, x1)) == min(costs, key=costs.get)
    with pytest.raises(ValueError, match="one shape"):
        assignment(x0, x1[:, :1])


def pairs(group=4, seed=3, index=0, count=1, start=0, steps=3, labelled=True):
    x0 = np.random.default_rng(1).normal(size=(40, 3)).astype(np.float32)
    source = data.from_arrays(x0, np.arange(40) % 5) if labelled else data.from_arrays(x0)
    plain = data.batches(source, batch_size=8, seed=0, process_index=index, process_count=count)
    batches = data.Transported(plain, group=group, seed=seed, process_index=index)
    if start:
        batches.set_state({**batches.get_state(), "next_index": start})
    return [next(batches) for _ in range(steps)]


def test_hosts_and_resumes_see_the_same_pairs():
    whole = pairs()
    for step, parts in enumerate(zip(pairs(index=0, count=2), pairs(index=1, count=2), strict=True)):
        for name in ("x1", "cond"):
            np.testing.assert_array_equal(np.concatenate([p["cond"][name] for p in parts]), whole[step]["cond"][name])
    np.testing.assert_array_equal(pairs(start=2, steps=1)[0]["cond"]["x1"], whole[2]["cond"]["x1"])
    drawn = np.stack([b["cond"]["x1"] for b in whole])
    assert len(np.unique(drawn)) == drawn.size  # no draw is used twice
    assert not np.array_equal(drawn[0], pairs(seed=4, steps=1)[0]["cond"]["x1"])
    assert pairs(labelled=False, steps=1)[0]["cond"]["cond"] is None


@pytest.mark.slow
def test_pairs_are_nearer_and_the_law_of_x1_is_kept():
    """Permuting within a batch leaves x1 standard normal over all, though not given x0."""
    many = pairs(group=8, steps=400)
    x0, x1 = (np.concatenate([f(b) for b in many]) for f in (lambda b: b["x0"], lambda b: b["cond"]["x1"]))
    assert ((x0 - x1) ** 2).mean() < 0.7 * (x0.var() + 1)
    assert abs(x1.mean()) < 4.5 / np.sqrt(x1.size)
    assert abs(x1.var() - 1) < 4.5 * np.sqrt(2 / x1.size)


def test_errors():
    with pytest.raises(ValueError, match="no multiple of group=3"):
        pairs(group=3)
    with pytest.raises(ValueError, match="at least 1"):
        pairs(group=0)
