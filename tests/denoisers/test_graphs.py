"""Graphical models as who attends to whom: by hand, sparse as dense, and what is exchangeable is."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ddjax.denoisers import DiT, functional_init, taps
from ddjax.denoisers.graphs import GraphicalModel, mask, padded, unidirectional
from ddjax.denoisers.layers.attention import attention_to_neighbours, dot_product_attention

RNG = np.random.default_rng(1)
T, N, M = 2, 3, 4  # E (n, m) = sum over t of A (t, m) R (t, n)


def factorisation(intermediate):
    """The authors' matrix factorisation, with or without the products on the way."""
    ranges = list(itertools.product(range(T), range(N), range(M)))
    if not intermediate:
        sums = [[("E", n, m), *((("A", t, m)) for t in range(T)), *(("R", t, n) for t in range(T))]
                for n in range(N) for m in range(M)]  # fmt: skip
        return GraphicalModel.of({"A": (T, M), "E": (N, M), "R": (T, N)}, sums)
    products = [[("K", t, n, m), ("A", t, m), ("R", t, n)] for t, n, m in ranges]
    sums = [[("E", n, m), *(("K", t, n, m) for t in range(T))] for n in range(N) for m in range(M)]
    return GraphicalModel.of({"A": (T, M), "E": (N, M), "K": (T, N, M), "R": (T, N)}, products + sums)


@pytest.mark.parametrize("intermediate", [False, True])
def test_edges_are_those_of_the_authors_matrix_factorisation(intermediate):
    a, e, k = T * M, N * M, T * N * M * intermediate
    edges = {(i, i) for i in range(a + e + k + T * N)}
    for t, n, m in itertools.product(range(T), range(N), range(M)):
        site = {"A": t * M + m, "E": a + n * M + m, "R": a + e + k + t * N + n, "K": a + e + t * N * M + n * M + m}
        for pair in ("KA", "KR", "EK") if intermediate else ("EA", "ER"):
            one, other = (site[name] for name in pair)
            edges |= {(one, other), (other, one)}
    model = factorisation(intermediate)
    assert {(i, j) for i, own in enumerate(model.neighbours()) for j in own} == edges
    assert model.kinds == (*[0] * a, *[1] * e, *[2] * k, *[2 + intermediate] * (T * N))
    np.testing.assert_array_equal(np.argwhere(mask(model.neighbours())), sorted(edges))


def test_a_markov_blanket_has_the_other_parents():
    model = GraphicalModel.of({"x": (4,), "y": ()}, [[("y",), ("x", 0), ("x", 1)], [("x", 2), ("x", 1)]])
    assert model.neighbours() == ((0, 4), (1, 2, 4), (1, 2), (3,), (0, 1, 4))
    assert model.neighbours(blanket=True) == ((0, 1, 4), (0, 1, 2, 4), (1, 2), (3,), (0, 1, 4))
    for variable in (("z", 0), ("x", 4), ("x",), ("y", 0)):
        with pytest.raises(ValueError, match="no variable"):
            GraphicalModel.of({"x": (4,), "y": ()}, [[variable]])


def test_sparse_attention_is_masked_attention():
    neighbours = factorisation(True).neighbours()
    few, there = padded(neighbours)
    q, k, v = (jnp.asarray(RNG.normal(size=(2, len(neighbours), 2, 4)).astype(np.float32)) for _ in range(3))
    dense = dot_product_attention(q, k, v, None, jnp.asarray(mask(neighbours)))
    np.testing.assert_allclose(attention_to_neighbours(q, k, v, few, jnp.asarray(there)), dense, atol=1e-5)


@pytest.mark.slow
def test_sites_are_moved_by_their_neighbours_in_as_many_layers(build):
    model = factorisation(True)
    config = {"width": 16, "heads": 2, "neighbours": model.neighbours(), "kinds": model.kinds}
    x, seen = RNG.normal(size=(1, model.count, 1)).astype(np.float32), mask(model.neighbours())
    reach = np.eye(model.count, dtype=bool)
    for depth in (1, 2):
        run, params = build(lambda rngs, depth=depth: DiT(shape=(model.count, 1), depth=depth, **config, rngs=rngs))
        reach = reach @ seen
        for site in (0, 9, 25):
            moved = x + (np.arange(model.count) == site)[None, :, None]
            change = np.abs(np.asarray(run(params, moved, np.ones(1)) - run(params, x, np.ones(1))))[0, :, 0]
            np.testing.assert_array_equal(change > 0, reach[:, site])
    assert params["position"].shape == (4, 16)


@pytest.mark.slow
def test_exchangeable_variables_may_be_exchanged(build):
    """Another order of the rows of R and of the columns of E: the outputs in that order."""
    for intermediate in (False, True):  # dense, sparse
        model = factorisation(intermediate)
        config = {"width": 16, "heads": 2, "depth": 2, "neighbours": model.neighbours(), "kinds": model.kinds}
        run, params = build(lambda rngs: DiT(shape=(model.count, 1), **config, rngs=rngs))  # noqa: B023
        rows, columns = (2, 0, 1), (1, 3, 0, 2)
        order = [model.site("A", t, columns[m]) for t in range(T) for m in range(M)]
        order += [model.site("E", rows[n], columns[m]) for n in range(N) for m in range(M)]
        if intermediate:
            order += [model.site("K", t, rows[n], columns[m]) for t in range(T) for n in range(N) for m in range(M)]
        order += [model.site("R", t, rows[n]) for t in range(T) for n in range(N)]
        x, t = RNG.normal(size=(2, model.count, 1)).astype(np.float32), np.float32([0.3, 0.8])
        np.testing.assert_allclose(run(params, x[:, order], t), run(params, x, t)[:, order], atol=1e-4)


def test_blocks_see_those_that_touch_them_before():
    seen = mask(unidirectional((4, 6), 2))
    for q, k in itertools.product(range(24), repeat=2):
        (row, column), (other, beside) = ((i // 6 // 2, i % 6 // 2) for i in (q, k))
        touches = (other, beside) in [(row, column), (row - 1, column), (row, column - 1), (row - 1, column - 1)]
        assert seen[q, k] == touches
    with pytest.raises(ValueError, match=r"block=4 does not divide the grid \(4, 6\)"):
        unidirectional((4, 6), 4)


@pytest.mark.slow
def test_block_by_block_behind_its_neighbours_keys_and_values_is_the_whole(noise):
    """Inf-DiT: every block is run once, all layers, with the past of the three before it and of no other."""
    depth, grid = 3, (6, 6)
    config = {"width": 16, "heads": 2, "depth": depth, "neighbours": unidirectional(grid, 2)}
    init, apply = functional_init(lambda rngs: DiT(shape=(*grid, 1), **config, rngs=rngs))
    params = noise(jax.eval_shape(init, jax.random.key(0)))
    x, t = RNG.normal(size=(2, *grid, 1)).astype(np.float32), np.float32([0.3, 0.8])
    whole, out = np.asarray(apply(params, x, t)), np.zeros((2, *grid, 1), np.float32)
    past = np.full((2, 2, depth, 36, 2, 8), np.nan, np.float32)  # keys and values
    names = [f"block/{i}/{part}" for part in ("keys", "values") for i in range(depth)]
    for row, column in itertools.product(range(3), repeat=2):
        sites = np.array([(2 * row + i) * 6 + 2 * column + j for i in range(2) for j in range(2)])
        near = np.zeros(36, bool)
        for i, j in ((0, 1), (1, 0), (1, 1)):
            if row >= i and column >= j:
                near[(sites - 12 * i - 2 * j)] = True
        carried = np.where(near[:, None, None], past, 0)  # nothing else need be kept
        assert np.isfinite(carried).all()
        with taps.record(*names) as seen:
            some = apply(params, x, t, {"past": tuple(carried), "sites": np.tile(sites, (2, 1))})
        new = np.asarray([seen[name] for name in names]).reshape(2, depth, 2, 4, 2, 8)
        past[:, :, :, sites] = new.swapaxes(1, 2)
        out.reshape(2, 36)[:, sites] = np.asarray(some).reshape(2, 36)[:, sites]
    np.testing.assert_allclose(out, whole, atol=1e-4)


def test_errors():
    make = lambda **config: DiT(shape=(4, 1), width=8, depth=1, heads=2, **config, rngs=nnx.Rngs(0))
    ring = [[i, (i + 1) % 4] for i in range(4)]
    for config, message in (
        ({"neighbours": ring[:3]}, "neighbours: expected some for each of 4 sites, among them, got 3 rows"),
        ({"neighbours": [*ring[:3], []]}, "expected some"),
        ({"neighbours": [*ring[:3], [4]]}, "expected some"),
        ({"kinds": [0, 1]}, "kinds: expected a number from 0 on for each of 4 patches"),
        ({"neighbours": ring, "downsample": 2}, "neighbours say who sees whom"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**config)
    init, apply = functional_init(lambda rngs: DiT(
        shape=(4, 1), width=8, depth=1, heads=2, neighbours=ring, time=False, rngs=rngs))  # fmt: skip
    params = jax.eval_shape(init, jax.random.key(0))
    with pytest.raises(ValueError, match="so do groups"):
        jax.eval_shape(
            lambda p: apply(p, np.zeros((2, 4, 1), np.float32), None, {"groups": np.zeros((2, 4), int)}), params
        )
