import threading
import time

import numpy as np
import pytest

from ddjax import data


def batches(**options):
    numbers = data.from_arrays(np.arange(40)[:, None].repeat(2, 1), num_symbols=40)
    return data.batches(numbers, batch_size=4, seed=0, **options)


def first(batch):
    return batch["x0"][:, 0]


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_order_and_state_are_those_of_the_batches(depth):
    straight = [first(next(plain)) for plain in [batches()] for _ in range(9)]
    ahead = data.Ahead(batches(), first, depth)
    assert ahead.get_state() == batches().get_state()
    for step in range(4):
        np.testing.assert_array_equal(next(ahead), straight[step])
    state = ahead.get_state()
    assert state["next_index"] == 4  # what is ready and was not handed out does not count
    other = data.Ahead(batches(prefetch=2), first, depth)
    next(other)
    other.set_state(state)
    assert other.get_state() == state
    for step in range(4, 9):
        np.testing.assert_array_equal(next(other), straight[step])
        np.testing.assert_array_equal(next(ahead), straight[step])
    ahead.close()
    other.close()


def test_batches_are_made_while_others_are_used():
    made, enough = [], threading.Event()

    def place(batch):
        made.append(threading.get_ident())
        if len(made) == 3:
            enough.set()
        return batch

    ahead = data.Ahead(batches(), place, 2)
    next(ahead)
    assert enough.wait(10)  # two more than were asked for
    time.sleep(0.05)
    assert len(made) == 3  # and no third
    assert set(made) != {threading.get_ident()}
    ahead.close()
    with pytest.raises(ValueError, match="depth must be 0 or more, got -1"):
        data.Ahead(batches(), first, -1)


def test_an_error_comes_where_its_batch_would_have():
    class Failing:
        count = 0

        def __next__(self):
            self.count += 1
            if self.count == 3:
                raise data.ShardError("the third is lost")
            return self.count

        def get_state(self):
            return self.count

    ahead = data.Ahead(Failing(), lambda v: v, 5)
    assert (next(ahead), next(ahead)) == (1, 2)
    assert ahead.get_state() == 2
    with pytest.raises(data.ShardError, match="the third is lost"):
        next(ahead)
    assert ahead.get_state() == 2
    ahead.close()
