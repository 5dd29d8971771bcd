"""Condition dropout: the right rate, for the right rows, and only while training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddjax
from ddjax.objectives import coherent_labels, elbo, with_condition_dropout, with_condition_noise
from ddjax.processes import Masked

PROCESS = Masked(3)


def conditions_seen(rate, batch, cond, null=10, rows=None, train=True, seed=0):
    """The conditions that reach the network."""
    seen = []

    def spy(params, xt, t, cond, **_):
        seen.append(cond)
        return jnp.zeros((*xt.shape, 3))

    objective = with_condition_dropout(elbo(PROCESS, "posterior"), rate, null)
    objective(jax.random.key(seed), spy, {}, jnp.zeros((batch, 2), int), cond, rows=rows, train=train)
    return seen[0]


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_rate(rate):
    labels = np.arange(10_000) % 10
    seen = np.asarray(conditions_seen(rate, 10_000, jnp.asarray(labels)))
    dropped = seen == 10
    assert abs(dropped.mean() - rate) <= 4 * np.sqrt(rate * (1 - rate) / 10_000)  # exact at 0 and 1
    np.testing.assert_array_equal(seen[~dropped], labels[~dropped])


@pytest.mark.slow
def test_only_while_training():
    labels = jnp.arange(20)
    np.testing.assert_array_equal(conditions_seen(1.0, 20, labels, train=False), labels)
    assert conditions_seen(0.5, 20, None) is None


def test_split_rows_drop_the_same():
    labels = jnp.arange(40)
    whole = np.asarray(conditions_seen(0.5, 40, labels, null=-1))
    parts = [
        conditions_seen(0.5, 10, labels[i : i + 10], -1, ddjax.Rows(jnp.arange(i, i + 10), 40))
        for i in range(0, 40, 10)
    ]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert (whole != np.asarray(conditions_seen(0.5, 40, labels, null=-1, seed=1))).any()


def test_a_tree_is_dropped_whole():
    cond = {"label": jnp.arange(100), "text": jnp.ones((100, 3))}
    null = {"label": -1, "text": np.array([7.0, 8.0, 9.0])}
    seen = conditions_seen(0.5, 100, cond, null)
    dropped = np.asarray(seen["label"]) == -1
    assert 20 < dropped.sum() < 80
    np.testing.assert_array_equal(
        np.asarray(seen["text"])[dropped], np.broadcast_to([7.0, 8.0, 9.0], (dropped.sum(), 3))
    )
    np.testing.assert_array_equal(np.asarray(seen["text"])[~dropped], 1.0)


@pytest.mark.slow
def test_entries_are_dropped_each_by_itself():
    batch = 2000
    cond = {
        "vector": jnp.ones((batch, 3)),
        "cond": {"valid": jnp.ones((batch, 2), bool), "cond": jnp.arange(batch) % 9},
    }
    null, rates = {"vector": 0.0, "valid": False, "cond": 10}, {"vector": 0.2, "valid": 0.5}
    seen = conditions_seen(rates, batch, cond, null)
    dropped = {"vector": seen["vector"] == 0, "valid": ~seen["cond"]["valid"]}
    for name, mask in dropped.items():
        mask = np.asarray(mask)
        np.testing.assert_array_equal(mask.all(1), mask.any(1))  # an example's whole entry
        rate = rates[name]
        assert abs(mask[:, 0].mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / batch)
    both = np.asarray(dropped["vector"][:, 0] & dropped["valid"][:, 0]).mean()
    assert abs(both - 0.1) < 4 * np.sqrt(0.1 * 0.9 / batch)  # independent of each other
    np.testing.assert_array_equal(seen["cond"]["cond"], cond["cond"]["cond"])  # its rate is 0
    part = jax.tree.map(lambda x: x[500:600], cond)
    some = conditions_seen(rates, 100, part, null, ddjax.Rows(jnp.arange(500, 600), batch))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[500:600]), some, seen)


@pytest.mark.slow
def test_condition_noise_has_gammas_size():
    """N(0, gamma^2 / d) on each embedding; labels and evaluation untouched; split rows as the whole."""
    embeddings = jnp.zeros((4000, 3, 16))
    seen = []

    def spy(params, xt, t, cond, **_):
        seen.append(cond)
        return jnp.zeros((*xt.shape, 3))

    def run(cond, gamma=2.0, **options):
        batch = len(cond["label"])
        objective = with_condition_noise(elbo(PROCESS, "posterior"), gamma)
        objective(jax.random.key(0), spy, {}, jnp.zeros((batch, 2), int), cond, **options)
        return seen[-1]

    cond = {"label": jnp.arange(4000), "text": embeddings, "weight": jnp.ones(4000)}
    noisy = run(cond)
    np.testing.assert_array_equal(noisy["label"], cond["label"])
    np.testing.assert_array_equal(noisy["weight"], cond["weight"])  # a number, not an embedding
    values = np.asarray(noisy["text"])
    assert abs(values.std() - 0.5) < 4 * 0.5 / np.sqrt(2 * values.size)
    assert abs(values.mean()) < 4 * 0.5 / np.sqrt(values.size)
    part = {k: v[10:20] for k, v in cond.items()}
    np.testing.assert_array_equal(run(part, rows=ddjax.Rows(jnp.arange(10, 20), 4000))["text"], values[10:20])
    for kept in (run(cond, train=False), run(cond, gamma=0.0)):
        np.testing.assert_array_equal(kept["text"], embeddings)
    with pytest.raises(ValueError, match="needs a condition with embeddings"):
        run({"label": jnp.arange(3)})
    with pytest.raises(ValueError, match="gamma must not be negative"):
        run(cond, gamma=-1.0)


def test_coherent_labels():
    labels, coherence = jnp.asarray([0, 0, 2, 2, 1]), jnp.asarray([0.0, 1.0, 0.49, 0.5, 0.74])
    np.testing.assert_array_equal(coherent_labels(labels, coherence, 4), [0, 3, 9, 10, 6])
    assert coherent_labels(labels, coherence, 4).dtype == labels.dtype


def test_errors():
    for rate in (-0.1, 1.1):
        with pytest.raises(ValueError, match="probability"):
            with_condition_dropout(elbo(PROCESS, "posterior"), rate, 0)
    for null in (10, {"cond": 10}):
        with pytest.raises(ValueError, match="give a null for each"):
            with_condition_dropout(elbo(PROCESS, "posterior"), {"cond": 0.1, "valid": 0.2}, null)
