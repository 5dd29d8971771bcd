"""Corruption towards a given law: counting it, drawing from it, and two laws that have names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax import random
from ddjax.categorical import alias_draw, alias_table
from ddjax.frozen import Frozen
from ddjax.predictions import Prediction
from ddjax.processes import Marginal, Masked, Uniform
from ddjax.schedules import Cosine

PROBABILITIES = [0.5, 0.2, 0.0, 0.3]


@pytest.mark.slow
@pytest.mark.parametrize(("named", "probabilities"), [(Uniform, [1 / 3] * 3), (Masked, [0, 0, 0, 1])])
def test_named_laws(x64, named, probabilities):
    """The same bridge and integrand as the processes that have these laws by construction."""
    process, other = Marginal(3, Cosine(), probabilities=probabilities), named(3, Cosine())
    x0, xt = jnp.asarray([[0, 1, 2, 1]]), jnp.asarray([[other.num_states - 1, 1, 2, other.num_states - 1]])
    s, t = jnp.asarray([0.3]), jnp.asarray([0.5])
    logits = Prediction(jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 3))), "cavity")
    np.testing.assert_allclose(
        jax.nn.softmax(process.bridge(x0, xt, s, t).logits),
        jax.nn.softmax(other.bridge(x0, xt, s, t).logits),
        atol=1e-12,
    )
    np.testing.assert_allclose(process.path_kl(x0, logits, xt, t), other.path_kl(x0, logits, xt, t), rtol=1e-10)
    np.testing.assert_allclose(process.step_kl(x0, logits, xt, s, t), other.step_kl(x0, logits, xt, s, t), rtol=1e-10)


def test_the_alias_table_is_the_law():
    """Each symbol's kept share and what is passed to it add up to its probability, also of rare and absent ones."""
    rng = np.random.default_rng(0)
    for p in (np.asarray(PROBABILITIES), np.asarray([1.0]), rng.dirichlet(np.full(1000, 0.05)), np.eye(5)[2]):
        p = p / p.sum()
        table = alias_table(Frozen(p))
        total = table.keep / len(p)
        np.add.at(total, table.alias, (1 - table.keep) / len(p))
        np.testing.assert_allclose(total, p, atol=1e-12)
        assert (total[p == 0] == 0).all()


def test_draws_follow_the_law():
    draws = alias_draw(random.example_keys(jax.random.key(0), 50), alias_table(Frozen(PROBABILITIES)), (1000,))
    assert draws.dtype == jnp.int32
    counts = np.bincount(np.asarray(draws).ravel(), minlength=4) / 50_000
    np.testing.assert_allclose(counts, PROBABILITIES, atol=0.01)
    assert counts[2] == 0


def test_counted_from_data():
    tokens = np.asarray([[0, 0, 1], [2, 0, 0]])
    process = Marginal.of(tokens, 4)
    np.testing.assert_allclose(process.pi, [0.5, 0.2, 0.2, 0.1], rtol=1e-6)
    assert process == Marginal.of(tokens, 4)
    assert hash(process) == hash(Marginal.of(tokens, 4)) != hash(Marginal.of(tokens, 4, smoothing=2.0))
    with pytest.raises(ValueError, match=r"tokens must lie in \[0, 2\), found 2"):
        Marginal.of(tokens, 2)


@pytest.mark.parametrize("bad", [[0.5, 0.5], [0.5, 0.6, -0.1], [0.2, 0.2, 0.2], [[1.0, 0.0, 0.0]]])
def test_bad_probabilities_are_refused(bad):
    with pytest.raises(ValueError, match="at least num_symbols=3 non-negative numbers that sum to 1"):
        Marginal(3, probabilities=bad)


@pytest.mark.slow
def test_noised_states_follow_the_marginal():
    process, x0 = Marginal(3, probabilities=PROBABILITIES), jnp.ones((30_000, 1), jnp.int32)
    xt = process.marginal(x0, jnp.full(30_000, 0.7)).sample(random.example_keys(jax.random.key(0), 30_000))
    expected = 0.7 * np.asarray(PROBABILITIES) + 0.3 * np.eye(4)[1]
    np.testing.assert_allclose(np.bincount(np.asarray(xt)[:, 0], minlength=4) / 30_000, expected, atol=0.012)
