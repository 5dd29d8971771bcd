"""Draws: the right law, also for events that 23 random bits cannot see, and one key per example."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ddjax import random
from ddjax.categorical import (
    MANY,
    bernoulli,
    categorical,
    categorical_where,
    log_or_floor,
    poisson,
    uniform_symbols,
)


def keys(batch, seed=0):
    return random.example_keys(jax.random.key(seed), batch)


def chi_squared(counts, p):
    expected = counts.sum() * p
    return np.sum((counts - expected) ** 2 / expected)


def test_categorical_has_the_law():
    p = np.array([0.5, 0.2, 0.15, 0.1, 0.04, 0.01])
    logits = jnp.broadcast_to(jnp.log(p) + 3.0, (100, 2000, 6))  # unnormalised
    x = np.asarray(jax.jit(categorical)(keys(100), logits))
    assert x.dtype == np.int32
    assert chi_squared(np.bincount(x.ravel(), minlength=6), p) < 35  # 5 degrees of freedom: 1e-6
    pairs = np.bincount(6 * x[:, :-1:2].ravel() + x[:, 1::2].ravel(), minlength=36)
    assert chi_squared(pairs, np.outer(p, p).ravel()) < 95  # neighbouring sites are independent


@pytest.mark.slow
def test_many_symbols_have_the_law():
    """A part and then a symbol of it: all of 1,000 symbols, some impossible, and those of a part with nothing else."""
    p = np.random.default_rng(0).dirichlet(np.full(1000, 0.5))
    p[::7] = p[64:96] = 0
    p /= p.sum()
    logits = jnp.broadcast_to(jnp.where(p > 0, jnp.log(jnp.maximum(p, 1e-300)), -jnp.inf) + 3.0, (20, 1000, 1000))
    assert len(p) > MANY
    counts = np.bincount(np.asarray(jax.jit(categorical)(keys(20), logits)).ravel(), minlength=1000)
    assert counts[p == 0].sum() == 0
    often = p > 1e-4
    error = chi_squared(np.append(counts[often], counts[~often].sum()), np.append(p[often], p[~often].sum()))
    assert abs(error - often.sum()) < 5 * np.sqrt(2 * often.sum())


@pytest.mark.parametrize("symbols", [5, 600])
def test_draws_where_asked_do_not_depend_on_the_others(symbols):
    """Of 130 sites: the law where asked, 0 elsewhere, and the same among any sites and examples."""
    p = np.random.default_rng(1).dirichlet(np.full(symbols, 0.5))
    draw = jax.jit(lambda k, where: categorical_where(k, jnp.broadcast_to(jnp.log(p), (*where.shape, symbols)), where))
    counts, rng = np.zeros(symbols), np.random.default_rng(2)
    for few in (0.0, 0.01, 0.1, 0.2, 0.9, 1.0):
        where = rng.random((8, 130)) < few
        where[0] = rng.random(130) < 0.05  # little, among much
        x = np.asarray(draw(keys(8, seed=int(100 * few)), where))
        assert (x[~where] == 0).all()
        counts += np.bincount(x[where], minlength=symbols)
        first = np.where(np.arange(8)[:, None] == 0, where, False)
        for others in (first, where & first[0], np.ones((8, 130), bool)):
            again = np.asarray(draw(keys(8, seed=int(100 * few)), others))
            both = where & others
            np.testing.assert_array_equal(again[both], x[both])
    often = p > 0.002
    error = chi_squared(np.append(counts[often], counts[~often].sum()), np.append(p[often], p[~often].sum()))
    assert abs(error - often.sum()) < 5 * np.sqrt(2 * often.sum())


def test_bernoulli_has_the_law():
    p = jnp.asarray([0.0, 1e-3, 0.3, 0.999, 1.0])
    x = np.asarray(bernoulli(keys(5), jnp.broadcast_to(p[:, None], (5, 40_000)))).mean(1)
    error = np.sqrt(np.asarray(p) * (1 - np.asarray(p)) / 40_000)
    assert (np.abs(x - np.asarray(p)) <= 4.5 * error).all()  # exactly never at 0, always at 1


def test_uniform_symbols_are_uniform():
    x = np.asarray(uniform_symbols(keys(100), (2000,), 7))
    assert x.dtype == np.int32
    assert chi_squared(np.bincount(x.ravel(), minlength=7), np.full(7, 1 / 7)) < 40


@pytest.mark.parametrize("low", [-jnp.inf, -1e30])
def test_the_impossible_is_never_drawn(low):
    logits = jnp.broadcast_to(jnp.asarray([low, 0.0, low, -20.0]), (10, 5000, 4))
    x = np.asarray(categorical(keys(10), logits))
    assert set(np.unique(x)) <= {1, 3}
    assert (categorical(keys(3), jnp.asarray([[low, low, 0.0]] * 3)) == 2).all()


def count(draw, rounds, batch=16):
    """The number of hits of `draw(keys)` over many rounds, without holding them all."""

    @jax.jit
    def run(k):
        body = lambda total, i: (total + draw(random.fold_in(k, i)).sum(dtype=jnp.int32), None)
        return jax.lax.scan(body, jnp.int32(0), jnp.arange(rounds))[0]

    return int(run(keys(batch, seed=1)))


def test_a_coin_rarer_than_the_grid_of_uniforms():
    """p = 2**-26, tossed 2**27 times: 2 expected; JAX's default uniforms are 0 once in 2**23, and give 16."""
    p, sites = 2.0**-26, 2**18
    low = jax.vmap(lambda k: jax.random.bernoulli(k, jnp.full(sites, p), mode="low"))
    assert count(lambda k: bernoulli(k, jnp.full((16, sites), p)), 32) <= 8
    assert count(low, 32) > 8


def test_poisson_has_the_law():
    """Chi-squared at means on both sides of where two coins take over, and exactly none at 0."""
    mean = jnp.asarray([0.0, 9e-4, 1.1e-3, 0.7, 12.0])
    n = np.asarray(jax.jit(poisson)(keys(5), jnp.broadcast_to(mean[:, None], (5, 50_000))))
    assert n.dtype == np.int32
    assert (n[0] == 0).all()
    for drawn, m in zip(n[1:], np.asarray(mean)[1:], strict=True):
        p = scipy.stats.poisson.pmf(np.arange(40), m)
        seen = p * 50_000 > 5
        counts = np.bincount(drawn, minlength=40)[:40]
        rest = 50_000 * (1 - p[seen].sum())
        assert abs((50_000 - counts[seen].sum()) - rest) < 6 + 6 * np.sqrt(rest)
        assert np.sum((counts[seen] - 50_000 * p[seen]) ** 2 / (50_000 * p[seen])) < 30 + 2 * seen.sum()


@pytest.mark.slow
def test_a_number_rarer_than_the_grid_of_uniforms():
    """Mean 2**-25, 2**26 draws: 2 expected. JAX's own Poisson, whose uniforms lie on a grid of 2**-23, gives none."""
    mean, sites = 2.0**-25, 2**18
    assert 1 <= count(lambda k: poisson(k, jnp.full((16, sites), mean)) > 0, 16) <= 8


@pytest.mark.slow
def test_the_tail_of_a_large_vocabulary():
    """256 symbols of probability 2**-25 behind a likely one, 2**19 draws: 4 expected from the tail.

    So rare is a symbol of a Zipf law over 50,257 behind a sampler's stay-state of 1 - 1/50. The Gumbels of the default
    mode end at 15.94 nats, and such symbols lose nearly always.
    """
    tail, each, draws = 256, 2.0**-25, 2**11
    logits = jnp.log(jnp.concatenate([jnp.asarray([1 - tail * each]), jnp.full(tail, each)]))
    low = jax.vmap(lambda k: jax.random.categorical(k, logits, shape=(draws,), mode="low") > 0)
    ours = count(lambda k: categorical(k, jnp.broadcast_to(logits, (16, draws, tail + 1))) > 0, 16)
    assert 1 <= ours <= 14
    assert count(low, 16) == 0


@pytest.mark.slow
def test_rows_do_not_depend_on_the_batch():
    logits = jax.random.normal(jax.random.key(9), (7, 50, 11))
    p = jax.nn.sigmoid(logits[..., 0])
    whole = categorical(keys(7), logits), bernoulli(keys(7), p), uniform_symbols(keys(7), (50,), 11)
    for batch in (1, 2):
        part = (
            categorical(keys(batch), logits[:batch]),
            bernoulli(keys(batch), p[:batch]),
            uniform_symbols(keys(batch), (50,), 11),
        )
        for a, b in zip(part, whole, strict=True):
            np.testing.assert_array_equal(a, b[:batch])


def test_low_precision_logits_are_drawn_in_float32():
    logits = jnp.log(jnp.asarray([0.9, 0.1])).astype(jnp.bfloat16)
    x = np.asarray(categorical(keys(10), jnp.broadcast_to(logits, (10, 4000, 2))))
    p = np.asarray(jax.nn.softmax(logits.astype(jnp.float32)))[1]
    assert abs(x.mean() - p) < 4.5 * np.sqrt(p * (1 - p) / 40_000)


def test_log_or_floor():
    p = jnp.asarray([0.0, 1e-30, 0.5, 1.0])
    np.testing.assert_allclose(log_or_floor(p), [-1e30, np.log(1e-30), np.log(0.5), 0.0], rtol=1e-6)
    gradient = jax.grad(lambda p: jnp.sum(p * log_or_floor(p)))(p)
    assert np.isfinite(np.asarray(gradient)).all()
    assert float(p[0] * log_or_floor(p)[0]) == 0.0
