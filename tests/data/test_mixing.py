import itertools
import json

import numpy as np
import pytest

from ddjax import data
from ddjax.config import default, typed
from ddjax.experiment import load_data


def numbers(start, count, **options):
    x0 = np.arange(start, start + count)[:, None].repeat(2, 1)
    return data.from_arrays(x0, num_symbols=1000, name=f"from {start}", **options)


def mixture():
    return data.mixed([numbers(0, 30), numbers(100, 7), numbers(200, 300)], [3, 1, 1])


def take(batches, steps):
    return np.stack([batch["x0"][:, 0] for batch in itertools.islice(batches, steps)])


def test_items_come_by_weight_and_each_source_by_its_own_epochs():
    mixed = mixture()
    assert (len(mixed), mixed.mixture) == (337, ((30, 0.6), (7, 0.2), (300, 0.2)))
    seen = take(data.batches(mixed, batch_size=10, seed=1), 60).ravel()
    source = seen // 100
    np.testing.assert_allclose(np.bincount(source[source < 2]), [360, 120], atol=2)
    # Not only in the end: no stretch is far from the weights.
    assert np.abs(np.cumsum(source == 0) - 0.6 * np.arange(1, 601)).max() < 1.5
    for number, count in ((0, 30), (1, 7)):  # one permutation after the other
        own = seen[source == number]
        for epoch in range(len(own) // count):
            assert len(set(own[epoch * count : (epoch + 1) * count])) == count
    assert len(set(seen[source >= 2])) == (source >= 2).sum()
    again = take(data.batches(mixture(), batch_size=10, seed=1), 60).ravel()
    np.testing.assert_array_equal(again, seen)


def test_sources_of_one_size_are_shuffled_apart():
    mixed = data.mixed([numbers(0, 40), numbers(100, 40)], [1, 1])
    seen = take(data.batches(mixed, batch_size=8, seed=0), 10).ravel()
    assert (seen[seen < 100] != seen[seen >= 100] - 100).mean() > 0.5


@pytest.mark.parametrize("prefetch", [0, 2])
def test_resume_is_exact_and_processes_share_the_batch(prefetch):
    def make(**options):
        return data.batches(mixture(), batch_size=6, seed=2, prefetch=prefetch, **options)

    straight, batches = take(make(), 12), make()
    take(batches, 5)
    state = json.loads(json.dumps(batches.get_state()))
    assert state["next_index"] == 5
    resumed = make()
    resumed.set_state(state)
    np.testing.assert_array_equal(take(resumed, 7), straight[5:])
    parts = []
    for process in range(3):
        part = make(process_index=process, process_count=3)
        part.set_state(state)
        parts.append(take(part, 7))
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), straight[5:])
    other = data.batches(data.mixed([numbers(0, 30), numbers(100, 307)], [1, 1]), batch_size=6, seed=2)
    with pytest.raises(ValueError, match="the state is of a data iterator with mixture="):
        other.set_state(state)


def test_the_first_items_are_of_each_by_its_weight():
    mixed = mixture()
    np.testing.assert_array_equal(mixed[mixed.first(10)]["x0"][:, 0], [0, 1, 2, 3, 4, 5, 100, 101, 200, 201])
    assert len(mixed.first(1000)) == 30 + 7 + 200
    np.testing.assert_array_equal(numbers(0, 5).first(3), [0, 1, 2])


def test_what_cannot_be_mixed():
    labels = numbers(0, 9, cond=np.arange(9) % 2)
    short = data.from_arrays(np.zeros((4, 3), int), num_symbols=1000, name="short")
    for parts, weights, message in (
        ([numbers(0, 4)], [1, 2], "each source of a mixture has a weight, got 1 sources and 2 weights"),
        ([numbers(0, 4), short], [1, 2], r"'from 0' and 'short' cannot be mixed, .* in shape: \[2\] and \[3\]"),
        ([numbers(0, 4), labels], [1, 2], r"num_classes: 0 and 2; items: \['x0'\] and \['cond', 'x0'\]"),
        ([numbers(0, 4), numbers(1, 4)], [1, 0], r"weights must be positive, got \[1, 0\]"),
        ([numbers(0, 4), mixture()], [1, 1], "is a mixture itself"),
    ):
        with pytest.raises(ValueError, match=message):
            data.mixed(parts, weights)


def test_a_config_names_a_mixture(tmp_path):
    config = default()
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 100)
    config.data.options = {"length": 5}
    config.data.mixture = [
        {"name": str(tmp_path / "a.txt"), "weight": 1.0},
        {"name": str(tmp_path / "b.txt"), "weight": 3.0, "options": {"fractions": [0.5, 0.25, 0.25]}},
    ]
    mixed = load_data(typed(config), "train")
    assert mixed.mixture == ((18, 0.25), (10, 0.75))
    assert mixed.to_text(mixed[np.array([0, 18])]["x0"]) == ["aaaaa", "bbbbb"]
    config.data.mixture = [{"name": "digits"}]
    with pytest.raises(ValueError, match=r"config\.data\.mixture: expected dicts of name, weight and perhaps options"):
        load_data(typed(config), "train")
