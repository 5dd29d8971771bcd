"""Graphs of several sizes: as states of nodes and edges, to a trained network, and samples of the same sizes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddjax import data
from ddjax.config import ConfigError, typed
from ddjax.data.describe import describe, from_description
from ddjax.data.graphs import from_graphs
from ddjax.experiment import build
from ddjax.run import Run
from ddjax.symmetric import unpack
from ddjax.training import init_state, make_train_step


def arrays(n=60, types=True):
    """Stars of 3 to 5 nodes: the first, of type 1, is joined to all the others, of type 0, by edges of type 2."""
    sizes = 3 + np.arange(n) % 3
    edges = [[0, j] if j % 2 else [j, 0] for size in sizes for j in range(1, size)]
    found = {"n_nodes": sizes, "edges": np.array(edges), "edge_off": np.concatenate([[0], np.cumsum(sizes - 1)])}
    if types:
        found["node_types"] = np.concatenate([np.eye(1, size, dtype=int)[0] for size in sizes])
        found["edge_types"] = np.full(len(edges), 2)
    return found


def test_items_are_padded_graphs():
    graphs = from_graphs(arrays(), "train", fractions=(1.0, 0.0, 0.0))
    assert graphs.shape == {"nodes": (5,), "edges": (10,)}
    assert graphs.num_symbols == {"nodes": 2, "edges": 3}
    np.testing.assert_array_equal(graphs.sizes, [0, 0, 0, 20, 20, 20])
    items = graphs[np.array([1, 0])]
    np.testing.assert_array_equal(items["size"], [4, 3])
    np.testing.assert_array_equal(items["x0"]["nodes"], [[1, 0, 0, 0, 0]] * 2)
    np.testing.assert_array_equal(items["weights"]["nodes"], [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    star = np.zeros((5, 5), int)
    star[0, 1:4] = star[1:4, 0] = 2
    np.testing.assert_array_equal(np.asarray(unpack(items["x0"]["edges"]))[0], star)
    there = np.asarray(unpack(items["weights"]["edges"]))
    np.testing.assert_array_equal(there[0], (np.outer([1, 1, 1, 1, 0], [1, 1, 1, 1, 0]) - np.diag([1, 1, 1, 1, 0])))
    assert describe(from_description(describe(graphs))) == describe(graphs)


def test_counts_leave_out_what_is_not_there():
    graphs = data.count_symbols(from_graphs(arrays(), "train", fractions=(1.0, 0.0, 0.0)))
    np.testing.assert_array_equal(graphs.counts["nodes"], [20 * (2 + 3 + 4), 60])
    np.testing.assert_array_equal(graphs.counts["edges"], [20 * (1 + 3 + 6), 0, 20 * (2 + 3 + 4)])


CONFIG = {
    "process": {"name": "product", "options": {"symbols": "marginal", "symbols_schedule": "cosine"}},
    "denoiser": {
        "name": "graph",
        "options": {"width": 32, "edge_width": 16, "global_width": 16, "depth": 3, "heads": 4, "hidden": [32, 32, 32],
                    "feed_forward": [32, 32, 32], "eigenvectors": True},
    },
    "objective": {"name": "digress"},
    "optimizer": {"warmup": 10, "learning_rate": 3e-3},
    "sample": {"num": 8, "steps": 8},
    "eval": {"max_examples": 6, "num_times": 4},
}  # fmt: skip


def logits(params, xt, t, cond=None, **_):
    """A network of a few numbers that sees its own site and the size."""
    told = {name: jax.nn.one_hot(x, len(params[name])) @ params[name] for name, x in xt.items()}
    return {name: v + 0.1 * cond["size"][:, None, None] * jnp.arange(v.shape[-1]) for name, v in told.items()}


PARAMS = {"nodes": jnp.asarray([[0.5, -0.2], [0.1, 0.7]]), "edges": jnp.asarray(np.eye(3) - 0.3)}


@pytest.fixture(scope="module")
def run():
    """A run with that network in the place of the config's, whose construction is checked."""
    built = build(typed(CONFIG), from_graphs(arrays(), "train", fractions=(1.0, 0.0, 0.0)))
    assert set(built.process.processes) == {"nodes", "edges"}
    return Run(dataclasses.replace(built, apply=logits), PARAMS, 0)


@pytest.mark.slow
def test_samples_have_the_sizes_that_were_drawn(run):
    key = jax.random.key(0)
    x0 = run.sample(key, 200, steps=3, batch_size=150)
    sizes = np.asarray(run.experiment.sizes(key, np.arange(200)))
    np.testing.assert_allclose(np.bincount(sizes)[3:] / 200, 1 / 3, atol=4 * np.sqrt(2 / 9 / 200))
    absent = np.arange(5) >= sizes[:, None]
    beside = absent[:, :, None] | absent[:, None]
    assert not np.asarray(x0["nodes"])[absent].any()
    assert not np.asarray(unpack(x0["edges"]))[beside].any()
    assert np.asarray(x0["nodes"])[~absent].any()
    assert np.asarray(unpack(x0["edges"]))[~beside].any()
    again = run.sample(key, 2, steps=3, rows=[170, 3])
    for name, part in again.items():
        np.testing.assert_array_equal(part, np.asarray(x0[name])[[170, 3]])


@pytest.mark.slow
def test_a_bound_is_of_the_nodes_that_there_are(run):
    """What stands where there are none does not count, and costs nothing."""
    items, key = from_graphs(arrays(), "train", fractions=(1.0, 0.0, 0.0))[:3], jax.random.key(0)
    known = jax.tree.map(lambda w: w == 0, items["weights"])
    other = jax.tree.map(lambda x, k: np.where(k, 1, x).astype(np.int32), items["x0"], known)
    score = lambda x, known: np.asarray(run.nelbo(key, x, size=items["size"], known=known, num_times=4).total)
    one, two = score(items["x0"], known), score(other, known)
    np.testing.assert_allclose(one, two, rtol=1e-5)
    all_of_it = score(items["x0"], jax.tree.map(np.zeros_like, known))
    assert (all_of_it[:2] > one[:2] + 1e-3).all()
    np.testing.assert_allclose(all_of_it[2], one[2], rtol=1e-5)  # the largest graph has all nodes


@pytest.mark.slow
def test_a_training_step_weighs_the_nodes_that_there_are(run):
    """A batch in two halves is the batch: losses of parts, each by its own weights, averaged over microbatches."""
    graphs = from_graphs(arrays(), "train", fractions=(1.0, 0.0, 0.0))
    items = graphs[np.array([0, 3, 6, 9, 12, 15, 18, 21])]  # of one size: halves then weigh the same
    batch = {"x0": items["x0"], "weights": items["weights"], "cond": {"size": items["size"], "cond": None}}
    states = []
    for parts in (1, 2):
        step = make_train_step(run.experiment.objective(), logits, optax.sgd(0.1), accumulate=parts)
        state = init_state(lambda key: PARAMS, optax.sgd(0.1), jax.random.key(0))
        states.append(jax.jit(step)(state, batch))
    np.testing.assert_allclose(states[0][1]["loss"], states[1][1]["loss"], rtol=1e-5)
    for name in PARAMS:
        one, two = (np.asarray(state.params[name]) for state, _ in states)
        np.testing.assert_allclose(one, two, rtol=1e-5)
        assert np.abs(one - PARAMS[name]).max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"edges": np.zeros((3, 2), int)}, "need edge_off of"),
        ({"edges": np.full((180, 2), 1)}, "joins a node to itself"),
        ({"node_types": np.zeros(3, int)}, "3 node_types for 240 nodes"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        from_graphs({**arrays(), **change}, "train")


def test_other_networks_refuse_graphs_of_parts():
    graphs = from_graphs(arrays(types=False), "train")
    wrong = {**CONFIG, "denoiser": {"name": "dit"}}
    with pytest.raises(ConfigError, match="'dit' is for images"):
        build(typed(wrong), graphs)
