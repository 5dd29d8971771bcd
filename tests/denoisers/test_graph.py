"""DiGress's network: its definition, permutations, and what it counts."""

import itertools

import jax
import numpy as np
import numpy_networks
import pytest

from ddjax import data
from ddjax.config import ConfigError, typed
from ddjax.denoisers import GraphTransformer, functional_init, graph_features
from ddjax.denoisers.graph_features import cycles
from ddjax.experiment import build as experiment
from ddjax.symmetric import pack, pairs, unpack

SMALL = {
    "nodes": 5, "symbols_in": 4, "symbols_out": 3, "width": 8, "edge_width": 6, "global_width": 4, "depth": 3,
    "heads": 2, "hidden": (7, 9, 5), "feed_forward": (10, 11, 12), "num_classes": 3,
}  # fmt: skip
T = np.array([0.1, 0.7, 0.4], np.float32)
LABELS = np.array([0, 3, 2], np.int32)


@pytest.fixture(scope="module")
def net(build, noise):
    """A network whose weights are so large that nodes and edges are told apart."""

    def net(**options):
        make = lambda rngs: GraphTransformer(**{**SMALL, **options}, rngs=rngs)
        run, params = build(make)
        return run, noise(params, scale=1.0)

    return net


def inputs(typed=True):
    rng = np.random.default_rng(1)
    return rng.integers(0, 4, (3, 5 * typed + 10)).astype(np.int32)


def by_definition(p, xt, t, labels, features, *, sizes=None, vectors=False, symbols=(4, 4, 3, 3)):
    """Vignac et al. 2023 (cvignac/DiGress, src/models/transformer_model.py), one graph of typed nodes at a time.

    sizes: of the graphs, whose other nodes are not looked at; outputs there are 0. symbols: of nodes and edges, in and
    out.
    """
    nodes_in, edges_in, nodes_out, edges_out = symbols
    linear = lambda p, x: x @ np.asarray(p["kernel"], np.float64) + p["bias"]
    relu = lambda x: np.maximum(x, 0)
    norm = lambda p, x: numpy_networks.normalised(x, 1e-5) * p["scale"] + p["bias"]
    mlp = lambda p, x: linear(p["down"], relu(linear(p["up"], x)))

    def branch(p, h, new):
        h = norm(p["norm_a"], h + new)
        return norm(p["norm_m"], h + mlp(p, h))

    def summary(x):  # over all rows
        x = x.reshape(-1, x.shape[-1])
        return np.concatenate([x.mean(0), x.min(0), x.max(0), x.std(0, ddof=1)])

    def layer(p, x, e, y):
        n = len(x)
        scores = np.zeros((n, n, 8))
        for i in range(n):
            for j in range(n):
                q, k = linear(p["q"], x[i]), linear(p["k"], x[j])
                scores[i, j] = q * k / 2.0 * (linear(p["e_mul"], e[i, j]) + 1) + linear(p["e_add"], e[i, j])
        new_e = linear(p["e_out"], linear(p["y_e_add"], y) + (linear(p["y_e_mul"], y) + 1) * scores)
        v, mixed = linear(p["v"], x), np.zeros((n, 8))
        for i in range(n):
            weights = np.exp(scores[i] - scores[i].max(0))
            weights = weights / weights.sum(0)
            mixed[i] = (weights * v).sum(0)
        new_x = linear(p["x_out"], linear(p["y_x_add"], y) + (linear(p["y_x_mul"], y) + 1) * mixed)
        new_y = None
        if "whole" in p:
            z = linear(p["y_y"], y) + linear(p["x_y"], summary(x)) + linear(p["e_y"], summary(e))
            new_y = branch(p["whole"], y, linear(p["y_down"], relu(linear(p["y_up"], z))))
        return branch(p["nodes"], x, new_x), branch(p["edges"], e, new_e), new_y

    out = []
    for n, row in enumerate(xt):
        number = 5 if sizes is None else sizes[n]
        nodes, edges = np.eye(nodes_in)[row[:number]], np.zeros((number, number, edges_in))
        for (i, j), token in zip(zip(*pairs(5), strict=True), row[5:], strict=True):
            if j < number:
                edges[i, j] = edges[j, i] = np.eye(edges_in)[token]
        y = np.array([t[n]], np.float64)
        x_in, adjacency = nodes, (edges[..., 1:edges_out].sum(-1) > 0).astype(int)
        if features:
            more, of_all = features_by_hand(adjacency)
            x_in, y = np.concatenate([nodes, more], axis=-1), np.concatenate([y, of_all])
        if vectors:
            x_in = np.concatenate([x_in, vectors_by_hand(adjacency)], axis=-1)
        if sizes is not None:
            y = np.append(y, number / 5)
        x, e, y = relu(mlp(p["nodes_in"], x_in)), relu(mlp(p["edges_in"], edges)), relu(mlp(p["global_in"], y))
        y, e = y + p["labels"][labels[n]], (e + e.swapaxes(0, 1)) / 2
        for i in range(2):
            x, e, y = layer(p["stack"]["blocks"][str(i)], x, e, y)
        x, e, _ = layer(p["last"], x, e, y)
        e = mlp(p["edges_out"], e)
        e = (e + e.swapaxes(0, 1)) / 2
        said, whole = np.zeros((5, nodes_out)), np.zeros((5, 5, edges_out))
        said[:number] = mlp(p["nodes_out"], x) + nodes[:, :nodes_out]
        whole[:number, :number] = e + edges[..., :edges_out]
        out.append((said, whole[pairs(5)]))
    said, whole = (np.array(part) for part in zip(*out, strict=True))
    return (said, whole) if nodes_out != edges_out else np.concatenate([said, whole], axis=1)


def vectors_by_hand(a):
    """Of the two least positive eigenvalues, their cubes adding up to something positive; 0 where there are fewer."""
    values, vectors = np.linalg.eigh(np.diag(a.sum(0)) - a)
    found = vectors[:, values > 1e-8][:, :2]
    found = found * np.where((found**3).sum(0) < 0, -1.0, 1.0)
    return np.pad(found, ((0, 0), (0, 2 - found.shape[1])))


def cycles_by_hand(a):
    """Through each node, and in all, by trying all paths."""
    n = len(a)
    through, counts = np.zeros((n, 4)), np.zeros(4)
    for length in (3, 4, 5, 6):
        for path in itertools.permutations(range(n), length):
            closed = zip(path, (*path[1:], path[0]), strict=True)
            if path[0] == min(path) and path[1] < path[-1] and all(a[i, j] for i, j in closed):
                counts[length - 3] += 1
                through[list(path), length - 3] += 1
    return through[:, :3], counts


def features_by_hand(a):
    n, left, parts = len(a), set(range(len(a))), []
    while left:
        part, new = set(), {min(left)}
        while new:
            part |= new
            new = {j for i in new for j in range(n) if a[i, j]} - part
        parts.append(part)
        left -= part
    largest = max(map(len, parts))
    outside = np.array([[1.0 if len(next(p for p in parts if i in p)) < largest else 0.0] for i in range(n)])
    through, counts = cycles_by_hand(a)
    values = np.sort(np.linalg.eigvalsh(np.diag(a.sum(0)) - a))[len(parts) :] / n
    values = np.concatenate([values, np.full(5, 2.0)])[:5]
    few = lambda x: np.minimum(x / 10, 1.0)
    return np.concatenate([few(through), outside], axis=-1), np.concatenate([few(counts), [len(parts)], values])


def graphs(nodes=6, number=12):
    rng = np.random.default_rng(0)
    density = np.linspace(0.0, 1.0, number)[:, None]
    return np.asarray(unpack((rng.uniform(size=(number, nodes * (nodes - 1) // 2)) < density).astype(np.int32)))


def test_cycles_are_those_that_one_counts():
    a = graphs()
    through, counts = cycles(a.astype(np.float32))
    for i, one in enumerate(a):
        by_node, of_all = cycles_by_hand(one)
        np.testing.assert_allclose(through[i], by_node, atol=1e-3)
        np.testing.assert_allclose(counts[i], of_all, atol=1e-3)
    assert counts[-1, 3] == 60  # of all 6-cycles of the complete graph


def test_features_are_those_by_hand():
    a = graphs()
    nodes, whole = graph_features(a.astype(np.float32))
    for i, one in enumerate(a):
        own, of_all = features_by_hand(one)
        np.testing.assert_allclose(nodes[i], own, atol=1e-4)
        np.testing.assert_allclose(whole[i], of_all, atol=1e-4)


@pytest.mark.parametrize("features", [pytest.param(False, marks=pytest.mark.slow), True])
def test_it_is_the_published_network(features, net):
    run, params = net(typed=True, skip=True, features=features)
    xt = inputs()
    want = by_definition(params, xt, T, LABELS, features)
    apart = (want - np.eye(4)[xt][..., :3])[:, 5:].std(axis=1)
    assert apart.mean() > 1e-3 * np.abs(want).max()  # edges differ by far more than the tolerance
    np.testing.assert_allclose(run(params, xt, T, LABELS), want, rtol=0, atol=2e-5 * np.abs(want).max())


ALPHABETS = {"symbols_in": {"nodes": 4, "edges": 3}, "symbols_out": {"nodes": 4, "edges": 2}}
SIZES = np.array([3, 5, 4], np.int32)


def parts(seed=1):
    """Graphs as rows of tokens and as dicts, in two alphabets."""
    rng = np.random.default_rng(seed)
    nodes, edges = rng.integers(0, 4, (3, 5)), rng.integers(0, 3, (3, 10))
    split = {"nodes": nodes.astype(np.int32), "edges": edges.astype(np.int32)}
    return np.concatenate([nodes, edges], axis=1), split


def irregular(seed, size):
    """Whether the graph's spectrum says which eigenvectors, and their cubes which sign."""
    rows, _ = parts(seed)
    for row, number in zip(rows, size, strict=True):
        a = np.zeros((5, 5))
        a[pairs(5)] = row[5:] == 1
        a = (a + a.T)[:number, :number]
        values, vectors = np.linalg.eigh(np.diag(a.sum(0)) - a)
        first = int((values < 1e-8).sum())
        if (np.diff(values[first:]) < 1e-3).any() or (np.abs((vectors[:, first:] ** 3).sum(0)) < 1e-3).any():
            return False
    return True


def seed():
    """The first with such graphs."""
    return next(k for k in range(10_000) if irregular(k, SIZES))


def test_graphs_of_several_sizes_and_two_alphabets_are_the_published_network(net):
    """What is said of a padded graph is what is said of the graph alone, by the definition, eigenvectors included."""
    options = {**ALPHABETS, "sizes": True, "eigenvectors": True, "skip": True}
    run, params = net(**options)
    rows, split = parts(seed())
    cond = {"size": SIZES, "cond": LABELS}
    told = {"sizes": SIZES, "vectors": True, "symbols": (4, 3, 4, 2)}
    want = by_definition(params, rows, T, LABELS, True, **told)
    found = run(params, split, T, cond)
    for name, part in zip(("nodes", "edges"), want, strict=True):
        np.testing.assert_allclose(found[name], part, rtol=0, atol=2e-5 * np.abs(part).max())
    # What stands where there are no nodes does not count.
    absent = np.arange(5) >= SIZES[:, None]
    i, j = pairs(5)
    other = {
        "nodes": np.where(absent, 3 - split["nodes"], split["nodes"]).astype(np.int32),
        "edges": np.where(absent[:, i] | absent[:, j], 2 - split["edges"], split["edges"]).astype(np.int32),
    }
    again = run(params, other, T, cond)
    for name in ("nodes", "edges"):
        assert np.abs(other[name] - split[name]).max() > 0
        np.testing.assert_allclose(again[name], found[name], atol=2e-5 * np.abs(found[name]).max())


@pytest.mark.slow
def test_padded_graphs_go_with_their_nodes(net):
    """Any order of the nodes that there are; eigenvectors too, where the spectrum says which they are."""
    run, params = net(**ALPHABETS, sizes=True, eigenvectors=True)
    _, split = parts(seed())
    cond = {"size": SIZES, "cond": LABELS}
    orders = np.array([[2, 0, 1, 3, 4], [3, 0, 4, 1, 2], [1, 3, 0, 2, 4]])  # of the first nodes among themselves
    out = run(params, split, T, cond)

    def permuted(x):
        nodes = np.take_along_axis(x["nodes"], orders.reshape(3, 5, *(1,) * (x["nodes"].ndim - 2)), axis=1)
        matrix = np.asarray(unpack(x["edges"]))
        matrix = np.stack([m[o][:, o] for m, o in zip(matrix, orders, strict=True)])
        return {"nodes": nodes, "edges": np.asarray(pack(matrix))}

    out = {name: np.asarray(part) for name, part in out.items()}
    moved = run(params, permuted(split), T, cond)
    for name, part in permuted(out).items():
        np.testing.assert_allclose(moved[name], part, atol=5e-5 * np.abs(part).max())
        assert np.abs(part - out[name]).max() > 5e-4 * np.abs(part).max()


def test_sizes_are_asked_for_and_parts_are_checked(net):
    run, params = net(**ALPHABETS, sizes=True)
    _, split = parts()
    with pytest.raises(ValueError, match="expected cond="):
        run(params, split, T, LABELS)
    with pytest.raises(ValueError, match="expected a state of the parts nodes, edges"):
        run(params, split["edges"], T, {"size": SIZES, "cond": LABELS})
    plain, weights = net(**ALPHABETS)
    with pytest.raises(ValueError, match="build the network with sizes=True"):
        plain(weights, split, T, {"size": SIZES, "cond": LABELS})


@pytest.mark.slow
@pytest.mark.parametrize("with_types", [False, True])
def test_outputs_go_with_the_nodes(with_types, net):
    run, params = net(typed=with_types)
    xt, order = inputs(with_types), np.array([3, 0, 4, 1, 2])

    def permuted(x):
        own, matrix = x[:, : x.shape[1] - 10], np.asarray(unpack(x[:, x.shape[1] - 10 :]))
        own = own[:, order] if with_types else own
        return np.concatenate([own, pack(matrix[:, order][:, :, order])], axis=1)

    out = np.asarray(run(params, xt, T, LABELS))
    np.testing.assert_allclose(run(params, permuted(xt), T, LABELS), permuted(out), atol=2e-5 * np.abs(out).max())
    assert np.abs(permuted(out) - out).max() > 1e-2


@pytest.mark.slow
def test_soft_tokens_and_tokens_out_of_range(net):
    run, params = net(typed=True)
    xt = inputs()
    hard = np.asarray(run(params, xt, T, LABELS))
    np.testing.assert_allclose(run(params, np.eye(4, dtype=np.float32)[xt], T, LABELS), hard, atol=1e-4)
    xt[0, 7] = 4
    wrong = np.asarray(run(params, xt, T, LABELS))
    assert np.isnan(wrong[0]).any()
    np.testing.assert_allclose(wrong[1:], hard[1:], atol=1e-4)


@pytest.mark.slow
def test_graphs_of_a_config():
    rng = np.random.default_rng(0)
    sizes = {key: SMALL[key] for key in ("width", "edge_width", "global_width", "depth", "heads")}
    for with_types, sites in ((False, 10), (True, 15)):
        rows = rng.integers(0, 3, (16, sites)).astype(np.int32)
        items = data.from_arrays(rows, num_symbols=3)
        denoiser = {"name": "graph", "options": {**sizes, "typed": with_types}}
        built = experiment(
            typed({"process": {"name": "marginal"}, "objective": {"name": "cross_entropy"}, "denoiser": denoiser}),
            items,
        )
        loss, _ = built.objective()(jax.random.key(1), built.apply, built.init(jax.random.key(0)), rows[:8])
        np.testing.assert_allclose(loss, np.log(3), atol=0.4)  # of a network that says nothing yet
    wrong = data.from_arrays(np.zeros((4, 9), np.int32), num_symbols=3)
    with pytest.raises(ConfigError, match="'graph' is for graphs"):
        experiment(typed({"denoiser": {"name": "graph"}}), wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nodes": 1}, "nodes=1"),
        ({"depth": 1}, "depth=1"),
        ({"heads": 3}, "heads=3 does not divide width=8"),
        ({"hidden": (1, 2)}, "three widths"),
    ],
)
def test_what_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        functional_init(lambda rngs: GraphTransformer(**{**SMALL, **change}, rngs=rngs))
