"""Rate matrices: scaled, reversible, near what they should be near, the same process however finely divided."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from ddjax.frozen import Frozen
from ddjax.processes import Kernel, generators


@pytest.mark.parametrize(
    "generator",
    [
        generators.uniform(6),
        generators.birth_death(6),
        generators.banded(6, 2),
        generators.gaussian(6, 0.3, 0.4),
        generators.nearest_neighbour(np.random.default_rng(0).normal(size=(6, 2)), 3),
    ],
    ids=["uniform", "birth-death", "banded", "gaussian", "nearest-neighbour"],
)
def test_generators_are_reversible_with_slowest_rate_one(generator):
    rate = generator.values
    np.testing.assert_allclose(rate.sum(1), 0.0, atol=1e-12)
    assert (rate - np.diag(np.diag(rate)) >= 0).all()
    values = np.sort(-np.linalg.eigvals(rate).real)
    np.testing.assert_allclose(values[:2], [0.0, 1.0], atol=1e-10)
    law = generators.stationary_law(rate)
    np.testing.assert_allclose(law @ rate, 0.0, atol=1e-12)
    flow = law[:, None] * rate
    np.testing.assert_allclose(flow, flow.T, atol=1e-12)


def test_which_symbols_are_near_which():
    np.testing.assert_allclose(generators.uniform(4).values, np.full((4, 4), 0.25) - np.eye(4), atol=1e-12)
    distance = np.abs(np.subtract.outer(range(6), range(6)))
    np.testing.assert_array_equal(generators.birth_death(6).values > 0, distance == 1)
    np.testing.assert_array_equal(generators.banded(6, 2).values > 0, (distance == 1) | (distance == 2))
    line = np.asarray([[0.0], [1.0], [2.1], [3.3], [4.6]])  # symbol 0 is the nearest of 1, 1 of 2, 2 of 3, 3 of 4
    rate = generators.nearest_neighbour(line, 1).values
    np.testing.assert_allclose(rate[0, 1] / rate[1, 2], 2.0)  # each other's nearest
    np.testing.assert_array_equal(rate[[0, 1, 2, 3], [1, 2, 3, 4]] > 0, True)
    assert (rate > 0).sum() == 8


def test_gaussian_rates_are_tauldr():
    """The authors' two loops (lib/models/models.py), for 8 symbols, with the target's centre at 3.5."""
    size, sigma, target = 8, 2.0, 3.0
    values, rate = np.exp(-(np.arange(size) ** 2) / sigma**2), np.zeros((size, size))
    for i, j in itertools.product(range(size), repeat=2):
        if (i < size // 2 and i < j < size - i) or (i > size // 2 and size - 1 - i < j < i):
            rate[i, j] = values[abs(i - j) - 1]
    for i, j in itertools.product(range(size), repeat=2):
        if rate[j, i] > 0:
            rate[i, j] = rate[j, i] * np.exp(-(j**2 - i**2 - (size - 1) * (j - i)) / (2 * target**2))
    rate -= np.diag(rate.sum(1))
    ours = generators.gaussian(size, sigma / (size - 1), target / (size - 1)).values
    np.testing.assert_allclose(ours / ours[0, 1], rate / rate[0, 1], atol=1e-12)


@pytest.mark.slow
def test_gaussian_rates_do_not_depend_on_how_finely_the_range_is_divided():
    """D3PM's code has 255 in its scale, so that it is another process for any other number of symbols."""
    spreads = []
    for size in (17, 33, 65):
        process = Kernel(size, generators.gaussian(size, 0.15, 0.5))
        t = jnp.asarray([0.05, 0.2])
        q = np.asarray(process.transition(jnp.zeros(2), t))[:, size // 2]
        x = np.linspace(-0.5, 0.5, size)
        spreads.append(np.sqrt(q @ x**2))
    np.testing.assert_allclose(spreads[0], spreads[2], rtol=0.05)
    np.testing.assert_allclose(spreads[1], spreads[2], rtol=0.02)
    assert spreads[2].max() < 0.2


def test_errors():
    for message, make in (
        ("every other", lambda: Kernel(2, Frozen([[-1.0, 1.0], [0.0, 0.0]]))),
        ("larger k", lambda: generators.nearest_neighbour([[0.0], [0.1], [5.0], [5.1]], 1)),
        ("embeddings", lambda: generators.nearest_neighbour(np.zeros(4), 1)),
        ("embeddings", lambda: generators.nearest_neighbour(np.zeros((4, 2)), 4)),
        ("width", lambda: generators.banded(4, 0)),
        ("at least 2", lambda: generators.uniform(1)),
        ("units of the range", lambda: generators.gaussian(4, 0.0)),
    ):
        with pytest.raises(ValueError, match=message):
            make()
