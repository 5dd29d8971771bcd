"""One key per example, and times that fill the interval evenly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax import Rows, random


def test_rows_do_not_depend_on_the_batch():
    draw = lambda keys: (random.normal(keys, (3, 2)), random.uniform(keys_of(keys), (4,)))
    keys_of = lambda keys: random.fold_in(keys, 1)
    whole = draw(random.example_keys(jax.random.key(0), 7))
    for rows in (1, 2, jnp.asarray([6, 3])):
        index = np.arange(rows) if isinstance(rows, int) else np.asarray(rows)
        for a, b in zip(draw(random.example_keys(jax.random.key(0), rows)), whole, strict=True):
            np.testing.assert_array_equal(a, b[index])
    assert len(np.unique(np.asarray(whole[0]))) == 42


def test_streams_differ():
    keys = random.example_keys(jax.random.key(0), 5)
    streams = [random.normal(k, (8,)) for k in random.split(random.fold_in(keys, 0), 3)]
    streams += [random.normal(random.fold_in(keys, 1), (8,)), random.normal(random.fold_in(keys, 2), (8,))]
    assert len(np.unique(np.concatenate(streams))) == 5 * 8 * 5


def test_moments():
    keys = random.example_keys(jax.random.key(0), 20_000)
    z, u = np.asarray(random.normal(keys, (2,))), np.asarray(random.uniform(random.fold_in(keys, 1)))
    assert abs(z.mean()) < 4 / 200
    assert abs(z.std() - 1) < 4 / 400
    assert u.shape == (20_000,)
    assert 0 <= u.min() < u.max() < 1
    assert abs(u.mean() - 0.5) < 4 * 12**-0.5 / 141


@pytest.mark.parametrize("total", [1, 2, 7, 49, 98, 103, 392, 784])
def test_stratified_hits_every_part_once(x64, total):
    for seed in range(5):
        u = np.asarray(random.stratified(jax.random.key(seed), Rows.all(total), jnp.float64))
        assert u.shape == (total,)
        np.testing.assert_array_equal(np.sort(np.floor(u * total)), np.arange(total))
        np.testing.assert_allclose(np.diff(np.sort(u)), 1 / total, atol=1e-12)


def test_every_batch_size_has_one_time_in_each_part():
    """`arange(0, 1, 1 / batch)`, the usual way, has the wrong length for many sizes, 49 the first of them."""
    most = 64
    draw = lambda key, total: random.stratified(key, Rows(jnp.arange(most), total))
    u = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), most), jnp.arange(1, most + 1))
    for total, row in enumerate(np.asarray(u, np.float64), start=1):
        np.testing.assert_array_equal(np.sort(np.floor(row[:total] * total)), np.arange(total))


@pytest.mark.slow
def test_each_row_is_uniform_on_its_own():
    """A row confined to its part of the interval would see one noise level for ever."""
    u = jax.vmap(lambda key: random.stratified(key, Rows.all(8)))(jax.random.split(jax.random.key(0), 4000))
    for row in np.asarray(u).T:
        counts = np.histogram(row, bins=10, range=(0, 1))[0]
        assert np.sum((counts - 400) ** 2 / 400) < 40  # 9 degrees of freedom
    assert u.dtype == jnp.float32
    assert 0 <= u.min() < u.max() < 1


def test_stratified_split_over_microbatches():
    total = 12
    whole = random.stratified(jax.random.key(3), Rows.all(total))
    parts = [random.stratified(jax.random.key(3), Rows(jnp.arange(i, i + 3), total)) for i in range(0, total, 3)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_antithetic_pairs_add_up_to_one(x64):
    """Each is uniform; pairs are independent; rows are the same wherever they are held; an odd last row is alone."""
    u = np.asarray(random.antithetic(jax.random.key(0), Rows.all(4001), jnp.float64))
    np.testing.assert_allclose(u[0:4000:2] + u[1:4000:2], 1.0, atol=1e-15)
    half = np.sort(u[0::2])
    assert np.abs(half - np.linspace(0, 1, len(half))).max() < 1.63 / np.sqrt(len(half))  # Kolmogorov, 1 %
    assert abs(np.corrcoef(u[0:3998:2], u[2:4000:2])[0, 1]) < 0.1
    part = random.antithetic(jax.random.key(0), Rows(jnp.asarray([7, 2, 4000]), 4001), jnp.float64)
    np.testing.assert_array_equal(part, u[[7, 2, 4000]])
    alone = random.independent(jax.random.key(0), Rows.all(2001), jnp.float64)
    np.testing.assert_array_equal(alone, u[0::2])


def test_antithetic_uniforms_stay_below_one(monkeypatch):
    monkeypatch.setattr(random, "uniform", lambda keys, dtype: jnp.zeros(keys.shape, dtype))
    assert (np.asarray(random.antithetic(jax.random.key(0), Rows.all(2))) == [0.0, 1.0 - 2.0**-24]).all()
