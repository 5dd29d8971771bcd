import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddjax.data import splits
from ddjax.data.packing import PackedSource, best_fit, pack


class Numbers:
    """A stream that is its own places."""

    def ranges(self, starts, stops):
        return np.concatenate([np.arange(a, b) for a, b in zip(starts, stops, strict=True)])


def by_hand(sizes, length):
    """Best-fit decreasing, piece by piece: how much room each window is left with."""
    rooms = []
    for size in sorted(sizes, reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else length) - size)
    return sorted(rooms)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 24), st.lists(st.integers(0, 23), min_size=1, max_size=50))
def test_it_is_best_fit_decreasing(length, draws):
    sizes = np.array([1 + draw % length for draw in draws])
    order, first = best_fit(sizes, length)
    assert sorted(order) == list(range(len(sizes)))
    assert first[-1] == len(sizes)
    rooms = [length - sizes[order[a:b]].sum() for a, b in itertools.pairwise(first)]
    assert sorted(rooms) == by_hand(sizes, length)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=2, max_size=20), st.sampled_from([1, 2, 4]), st.data())
def test_every_document_is_whole_in_its_segments(lengths, align, drawn):
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rows = np.array(sorted(drawn.draw(st.sets(st.integers(0, len(lengths) - 1), min_size=1))))
    if sum(lengths[row] for row in rows) == 0:
        return
    source = PackedSource(Numbers(), pack(offsets, rows, 8, align), 10_000)
    index = np.random.default_rng(0).permutation(len(source))
    batch, found = source[index], []
    for x0, segments, weights in zip(batch["x0"], batch["segments"], batch["weights"], strict=True):
        np.testing.assert_array_equal(weights, segments > 0)
        assert not x0[segments == 0].any()
        for segment in range(1, segments.max() + 1):
            (sites,) = np.nonzero(segments == segment)
            np.testing.assert_array_equal(np.diff(sites), 1)
            assert sites[0] % align == 0
            found.append(tuple(x0[sites]))
    documents = [np.arange(offsets[row], offsets[row + 1]) for row in rows]
    assert sorted(found) == sorted(tuple(d[i : i + 8]) for d in documents for i in range(0, len(d), 8))
    assert source.plan.filled == pytest.approx(batch["weights"].mean())


def test_short_documents_fill_their_windows():
    sizes = np.random.default_rng(0).integers(1, 400, 5000)
    plan = pack(np.concatenate([[0], np.cumsum(sizes)]), np.arange(5000), 512)
    assert plan.filled > 0.995
    assert len(plan) < 1.005 * sizes.sum() / 512 + 1


def test_lengths_that_do_not_fit():
    offsets = np.array([0, 3, 3])
    with pytest.raises(ValueError, match="length=6 must be a positive multiple of align=4"):
        pack(offsets, np.arange(2), 6, 4)
    with pytest.raises(ValueError, match="no tokens to pack"):
        pack(offsets, np.array([1]), 4)
    with pytest.raises(ValueError, match=r"documents: token 7 at index \(0, 7\) is outside \[0, 7\)"):
        PackedSource(Numbers(), pack(np.array([0, 8]), np.arange(1), 8), 7)[np.arange(1)]


def test_which_documents_go_together_does_not_depend_on_their_order():
    # Of one length, neighbours in the input would otherwise always be neighbours in a window.
    plan = pack(np.arange(0, 101 * 4, 4), np.arange(100), 8)
    pairs = plan.starts.reshape(50, 2) // 4
    assert np.mean(np.abs(np.diff(pairs, axis=1))) > 20
    np.testing.assert_array_equal(np.sort(pairs.ravel()), np.arange(100))
    np.testing.assert_array_equal(pairs.ravel(), splits.permutation(100))
