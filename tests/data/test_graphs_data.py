"""Graphs of several sizes: as states of nodes and edges, to a trained network, and samples of the same sizes."""

import jax
import numpy as np
import pytest

import ddjax
from ddjax import data
from ddjax.config import ConfigError, typed
from ddjax.data.describe import describe, from_description
from ddjax.data.graphs import from_graphs
from ddjax.experiment import build
from ddjax.symmetric import unpack
from ddjax.training import loop


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


@pytest.mark.slow
def test_train_and_sample_graphs_of_several_sizes(tmp_path):
    """What is drawn are stars of the sizes that were drawn for it, and the bound costs what there is alone."""
    np.savez(tmp_path / "graphs.npz", **arrays(), split=np.arange(60) % 20 // 18)
    train = {"steps": 400, "batch_size": 16, "checkpoint_every": 400, "sample_every": 400, "log_every": 100}
    config = {**CONFIG, "data": {"name": str(tmp_path / "graphs.npz"), "eval_split": "valid"}, "train": train}
    loop.train(typed(config), tmp_path / "work", show=False)
    run = ddjax.load(tmp_path / "work")
    key = jax.random.key(0)
    x0 = run.sample(key, 64, steps=64)
    sizes = np.asarray(run.experiment.sizes(key, np.arange(64)))
    assert set(sizes.tolist()) == {3, 4, 5}
    matrix, nodes = np.asarray(unpack(x0["edges"])), np.asarray(x0["nodes"])
    stars = 0
    for size, a, own in zip(sizes, matrix, nodes, strict=True):
        assert not own[size:].any()
        assert not a[size:].any()
        centre = np.flatnonzero(own[:size])
        want = np.zeros((5, 5), int)
        if len(centre) == 1:
            want[centre[0], :size] = want[:size, centre[0]] = 2
            want[centre[0], centre[0]] = 0
            stars += int((a == want).all())
    assert stars > 40  # of random graphs of such marginals one in fifty is
    held = data.load(tmp_path / "graphs.npz", "valid")
    items = held[:3]
    known = jax.tree.map(lambda w: w == 0, items["weights"])
    other = jax.tree.map(lambda x, k: np.where(k, 1, x).astype(np.int32), items["x0"], known)
    one, two = (run.nelbo(key, x, size=items["size"], known=known, num_times=8).total for x in (items["x0"], other))
    np.testing.assert_allclose(one, two, rtol=1e-4)  # of nodes that are not there
    assert np.isfinite(loop.evaluate(run, run.config)["bits_per_dim"])
    (written,) = (tmp_path / "work" / "samples").glob("*.npz")
    assert np.load(written)["edges"].shape == (8, 10)


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
