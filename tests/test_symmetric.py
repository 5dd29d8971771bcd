"""Undirected graphs as pairs of nodes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ddjax
from ddjax import grids, symmetric
from ddjax.fixtures import Categorical, exact_nelbo
from ddjax.processes import Marginal
from ddjax.solvers import Ancestral


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(st.integers(2, 7), st.integers(1, 3), st.sampled_from([(), (2,)]))
def test_there_and_back(nodes, batch, features):
    count = nodes * (nodes - 1) // 2
    sites = jnp.arange(batch * count * int(np.prod(features))).reshape(batch, count, *features)
    matrix = symmetric.unpack(sites, diagonal=-1)
    assert matrix.shape == (batch, nodes, nodes, *features)
    np.testing.assert_array_equal(matrix, jnp.swapaxes(matrix, 1, 2))
    assert (np.asarray(matrix)[:, np.arange(nodes), np.arange(nodes)] == -1).all()
    np.testing.assert_array_equal(symmetric.pack(matrix), sites)


def test_sampled_graphs_follow_their_law():
    """Three nodes, three pairs, three kinds of edge; drawn through a process, symmetric by construction."""
    law = Categorical(3, 3, seed=1)
    process = Marginal(3, probabilities=[0.6, 0.3, 0.1])
    out = ddjax.sample(
        jax.random.key(0),
        law.denoise(process, "cavity"),
        process,
        shape=(4000, 3),
        solver=Ancestral(process),
        times=grids.uniform(24),
    )
    graphs = np.asarray(symmetric.unpack(out.x0))
    assert (graphs == graphs.transpose(0, 2, 1)).all()
    assert (graphs[:, [0, 1, 2], [0, 1, 2]] == 0).all()
    first = np.bincount(graphs[:, 0, 1], minlength=3) / 4000
    expected = np.exp(np.asarray(law.log_p)).reshape(3, 3, 3).sum((1, 2))
    np.testing.assert_allclose(first, expected, atol=0.04)


@pytest.mark.slow
def test_the_bound_counts_each_pair_once(x64):
    law, process = Categorical(3, 2, seed=1), Marginal(2, probabilities=[0.7, 0.3])
    bound = exact_nelbo(law, law.denoise(process, "cavity"), process, t_range=(1e-6, 1.0), order=24)
    np.testing.assert_allclose(float(bound.total[0]), law.entropy, atol=1e-6)


@pytest.mark.slow
def test_a_lifted_network_does_not_depend_on_the_order_of_the_nodes():
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)))

    def apply(params, matrix, t, cond=None):
        """Messages along edges, not symmetric in (i, j)."""
        h = params[matrix]  # (batch, n, n, 5)
        return h + h.sum(2, keepdims=True) + 0.3 * h.sum(1, keepdims=True) ** 2

    nodes = 5
    sites = jax.random.randint(jax.random.key(0), (2, 10), 1, 4)
    order = np.random.default_rng(1).permutation(nodes)
    network = symmetric.on_pairs(apply)
    moved = symmetric.pack(symmetric.unpack(sites)[:, order][:, :, order])
    ours = symmetric.unpack(network(weights, moved, None))
    expected = symmetric.unpack(network(weights, sites, None))[:, order][:, :, order]
    np.testing.assert_allclose(ours, expected, rtol=1e-4)


def test_refusals():
    with pytest.raises(ValueError, match="4 sites are not the pairs of any number of nodes"):
        symmetric.unpack(jnp.zeros((1, 4)))
    with pytest.raises(ValueError, match=r"expected matrices of shape \(batch, nodes, nodes, ...\), got \(1, 2, 3\)"):
        symmetric.pack(jnp.zeros((1, 2, 3)))
