import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddjax import data

quick = settings(max_examples=10, deadline=None)


def numbers(count):
    """A data set whose item i is i."""
    return data.from_arrays(np.arange(count)[:, None].repeat(2, 1), np.arange(count) % 3, name="numbers")


def take(iterator, steps):
    return [batch["x0"][:, 0] for batch in itertools.islice(iterator, steps)]


@quick
@given(st.integers(1, 23), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_every_epoch_is_a_permutation(count, batch_size, seed):
    batches = data.batches(numbers(count), batch_size=batch_size, seed=seed)
    seen = np.concatenate(take(batches, -(-3 * count // batch_size)))
    for epoch in range(3):
        np.testing.assert_array_equal(np.sort(seen[epoch * count : (epoch + 1) * count]), np.arange(count))


def test_epochs_and_seeds_differ():
    def epochs(seed):
        batches = data.batches(numbers(50), batch_size=10, seed=seed)
        return np.concatenate(take(batches, 15)).reshape(3, 50)

    a, b = epochs(0), epochs(1)
    np.testing.assert_array_equal(a, epochs(0))
    orders = {tuple(row) for row in [*a.tolist(), *b.tolist(), list(range(50))]}
    assert len(orders) == 7


def test_labels_travel_with_their_items():
    batch = next(data.batches(numbers(50), batch_size=10, seed=0))
    np.testing.assert_array_equal(batch["cond"], batch["x0"][:, 0] % 3)


@quick
@given(
    st.integers(1, 20),
    st.sampled_from([1, 2, 3, 4]),
    st.integers(1, 3),
    st.integers(0, 3),
    st.booleans(),
)
def test_processes_together_read_the_global_batch(count, process_count, rows, seed, shuffle):
    options = {"batch_size": rows * process_count, "seed": seed, "shuffle": shuffle}
    whole = take(data.batches(numbers(count), **options), 5)
    parts = [
        take(data.batches(numbers(count), **options, process_index=i, process_count=process_count), 5)
        for i in range(process_count)
    ]
    for step in range(5):
        np.testing.assert_array_equal(np.concatenate([part[step] for part in parts]), whole[step])


@pytest.mark.parametrize("prefetch", [0, 2])
def test_resume_is_exact_at_every_step(prefetch):
    def make(**options):
        return data.batches(numbers(11), batch_size=4, seed=3, prefetch=prefetch, **options)

    straight, states = [], []
    batches = make()
    for _ in range(9):  # more than three epochs, boundaries inside batches
        states.append(json.loads(json.dumps(batches.get_state())))
        straight += take(batches, 1)
    for step, state in enumerate(states):
        assert state["next_index"] == step
        resumed = make()
        resumed.set_state(state)
        assert resumed.get_state() == state
        np.testing.assert_array_equal(take(resumed, 9 - step), straight[step:])
    batches.set_state(states[2])  # back, in place
    np.testing.assert_array_equal(take(batches, 3), straight[2:5])
    # The state of one of two processes is the state of one alone.
    half = make(process_index=1, process_count=2)
    next(half)
    assert half.get_state() == states[1]
    half.set_state(states[4])
    np.testing.assert_array_equal(take(half, 1)[0], straight[4][2:])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 4}, "seed=3, this one has seed=4"),
        ({"batch_size": 5}, "batch_size=4, this one has batch_size=5"),
        ({"shuffle": False}, "shuffle=True, this one has shuffle=False"),
        ({"count": 12}, "size=11, this one has size=12"),
    ],
)
def test_a_state_of_other_batches_is_refused(other, message):
    options = {"batch_size": 4, "seed": 3}
    state = data.batches(numbers(11), **options).get_state()
    count = other.pop("count", 11)
    batches = data.batches(numbers(count), **{**options, **other})
    with pytest.raises(ValueError, match=message):
        batches.set_state(state)
    with pytest.raises(ValueError, match="not a state of a data iterator: no 'next_index'"):
        batches.set_state({"step": 3})


def test_in_order_and_once():
    batches = data.batches(numbers(10), batch_size=4, seed=0, shuffle=False, repeat=False)
    np.testing.assert_array_equal(np.concatenate(take(batches, 99)), np.arange(8))
    batches = data.batches(numbers(10), batch_size=4, seed=0, shuffle=False)
    np.testing.assert_array_equal(np.concatenate(take(batches, 5)), np.arange(20) % 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size 0 must be a positive multiple"),
        ({"batch_size": 6, "process_count": 4}, "batch_size 6 must be a positive multiple of process_count 4"),
        ({"process_index": 2, "process_count": 2}, r"process_index 2 must be in \[0, process_count 2\)"),
        ({"seed": -1}, r"seed must be in \[0, 2\*\*32\), got -1"),
        ({"prefetch": -1}, "prefetch must be 0 or more"),
        ({"batch_size": 12, "repeat": False}, "numbers: 11 items are fewer than one batch of 12"),
    ],
)
def test_errors_of_batches(options, message):
    with pytest.raises(ValueError, match=message):
        data.batches(numbers(11), **{"batch_size": 4, "seed": 0, **options})


@quick
@given(st.integers(1, 20), st.sampled_from([1, 2, 3]), st.integers(1, 4), st.sampled_from([0, 2]))
def test_epoch_weighs_every_item_once(count, process_count, rows, prefetch):
    batch_size = rows * process_count
    passes = [
        list(data.epoch(numbers(count), batch_size, process_index=i, process_count=process_count, prefetch=prefetch))
        for i in range(process_count)
    ]
    x0, weights = [], []
    for parts in zip(*passes, strict=True):
        for part in parts:
            assert part["x0"].shape == (rows, 2)
            assert part["weights"].shape == part["cond"].shape == (rows,)
            assert part["weights"].dtype == np.float32
            x0.append(part["x0"][:, 0])
            weights.append(part["weights"])
    x0, weights = np.concatenate(x0), np.concatenate(weights)
    np.testing.assert_array_equal(weights, np.arange(len(x0)) < count)
    np.testing.assert_array_equal(x0[:count], np.arange(count))
