"""Semi-discrete transport: quantiles in one dimension, known measures, weak duality, and the sampler that it begins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ode_laws import Pair
from scipy import stats
from scipy.optimize import linear_sum_assignment

import ddjax
from ddjax import grids, transport
from ddjax.processes import Gaussian, Masked
from ddjax.solvers import DDIM
from ddjax.transport import Brenier, Transported

Y = np.array([-1.0, 2.0, 0.3, 0.9, -2.5])  # in no order
RANKS = np.argsort(np.argsort(Y))
BOUNDS = stats.norm.ppf(np.arange(1, 5) / 5)


def quantile_heights():
    """Of a line: neighbours meet at the quantiles, h_i - h_{i+1} = b (y_{i+1} - y_i)."""
    steps = -BOUNDS * np.diff(np.sort(Y))
    return np.concatenate([[0.0], np.cumsum(steps)])[RANKS]


def measures(heights):
    """Of the cells on a line, by the normal's distribution function."""
    order = np.argsort(Y)
    bounds = -np.diff(np.asarray(heights)[order]) / np.diff(Y[order])
    assert (np.diff(bounds) > 0).all()  # else a cell is empty, and this no formula
    return np.diff(stats.norm.cdf(np.concatenate([[-np.inf], bounds, [np.inf]])))[RANKS]


@pytest.mark.slow
def test_on_a_line_the_cells_are_quantiles(x64):
    """With the known heights the map is monotone and its cells are fifths; the energy is flat there."""
    brenier = Brenier(jnp.asarray(Y)[:, None], jnp.asarray(quantile_heights()))
    np.testing.assert_allclose(measures(brenier.heights), 0.2, atol=1e-12)
    x = stats.norm.ppf((np.arange(5000) + 0.5) / 5000)[:, None]
    np.testing.assert_array_equal(np.sort(Y)[np.arange(5000) // 1000], np.asarray(brenier(jnp.asarray(x)))[:, 0])
    slope = jax.grad(lambda h: Brenier(brenier.targets, h).energy(jnp.asarray(x)))(brenier.heights)
    np.testing.assert_allclose(slope, 0, atol=1e-12)
    other = Brenier(brenier.targets, brenier.heights + 0.1 * jnp.arange(5))
    slope = jax.grad(lambda h: Brenier(brenier.targets, h).energy(jnp.asarray(x)))(other.heights)
    np.testing.assert_allclose(slope, measures(other.heights) - 0.2, atol=2e-4)


@pytest.mark.slow
def test_fitted_heights_are_the_quantiles_and_the_map_is_the_cheapest():
    """Cells' measures in closed form, far off 1 / 5 before the fit; heights within the error that this makes."""
    start = stats.norm.cdf(0)  # with equal heights inner targets have no cell at all
    assert start == 0.5
    fitted = transport.fit(jax.random.key(0), jnp.asarray(Y, jnp.float32)[:, None] + 10, iterations=400, batch=2000)
    np.testing.assert_allclose(measures(np.asarray(fitted.heights) + 0 * Y), 0.2, atol=0.01)
    x = np.random.default_rng(0).normal(size=(500, 1)).astype(np.float32)
    gain = x @ np.repeat(np.asarray(fitted.targets), 100, axis=0).T
    best = gain[linear_sum_assignment(-gain)].mean()
    energy = float(fitted_centred(fitted).energy(jnp.asarray(x))) + 10 * x.mean()
    assert best <= energy + 1e-4  # weak duality
    assert energy < best + 0.02


def fitted_centred(fitted):
    return Brenier(fitted.targets - 10, fitted.heights)


@pytest.mark.slow
def test_many_targets_in_the_plane_against_exact_assignments():
    """Weak duality for any heights, and a gap that the fit closes; cells of equal measure."""
    rng = np.random.default_rng(1)
    y = jnp.asarray(rng.normal(size=(40, 2)) * [2.0, 0.5] + [1.0, 0.0], jnp.float32)
    fitted = transport.fit(jax.random.key(0), y, iterations=800, batch=2000)
    share = np.asarray(transport.volumes(jax.random.key(1), fitted, 50_000))
    np.testing.assert_allclose(share, 1 / 40, atol=5 * np.sqrt(1 / 40 / 50_000) + 2e-3)
    x = rng.normal(size=(1000, 2)).astype(np.float32)
    gain = x @ np.repeat(np.asarray(y), 25, axis=0).T
    best = gain[linear_sum_assignment(-gain)].mean()
    shift = float(jnp.mean(jnp.asarray(x) @ y.mean(0)))
    gaps = [
        float(Brenier(y - y.mean(0), h).energy(jnp.asarray(x))) + shift - best
        for h in (fitted.heights, 0 * fitted.heights)
    ]
    print(gaps)
    assert -1e-4 < gaps[0] < 0.02
    assert gaps[1] > 5 * gaps[0]


@pytest.mark.slow
def test_symmetric_targets_share_the_plane():
    """With equal heights a pentagon's cells are fifths; with one raised, its cell grows."""
    angles = 2 * np.pi * np.arange(5) / 5
    y = jnp.asarray(np.stack([np.cos(angles), np.sin(angles)], 1), jnp.float32)
    share = np.asarray(transport.volumes(jax.random.key(0), Brenier(y, jnp.zeros(5)), 50_000))
    np.testing.assert_allclose(share, 0.2, atol=5 * np.sqrt(0.16 / 50_000))
    assert transport.volumes(jax.random.key(0), Brenier(y, jnp.eye(5)[0]), 50_000)[0] > 0.3


@pytest.mark.slow
def test_classes_have_maps_of_their_own():
    labels = jnp.asarray([0, 1, 1, 0, 1])
    fitted = transport.fit(jax.random.key(0), jnp.asarray(Y, jnp.float32)[:, None], labels, iterations=400, batch=2000)
    np.testing.assert_allclose(transport.volumes(jax.random.key(1), fitted, 50_000), 0.2, atol=0.012)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1000, 1)), jnp.float32)
    for c in (0, 1):
        went = np.asarray(fitted(x, jnp.full(1000, c)))[:, 0]
        assert set(np.unique(went)) == set(Y[np.asarray(labels) == c].astype(np.float32))
        order = np.argsort(np.asarray(x)[:, 0])
        assert (np.diff(went[order]) >= 0).all()
    with pytest.raises(ValueError, match="needs labels"):
        fitted(x)


@pytest.mark.slow
def test_as_init_and_as_a_step():
    """The step is the map of scaled noise, costs nothing, and samples from it have the law of the targets' marginal."""
    process = Gaussian()
    rng = np.random.default_rng(0)
    x0 = jnp.asarray(rng.choice([-0.8, 0.8], (50, 1)) + 0.5 * rng.normal(size=(50, 1)))
    y = transport.latents(jax.random.key(0), process, x0, 0.4)
    brenier = transport.fit(jax.random.key(1), y, iterations=500, batch=1000)
    solver = Transported(process, brenier, 0.4)
    assert solver == Transported(process, brenier, 0.4)
    assert hash(solver) == hash(Transported(process, brenier, 0.4))
    settings = {"shape": (3000, 1), "times": grids.uniform(1, end=0.4)}
    with jax.debug_key_reuse(False):
        out = ddjax.sample(jax.random.key(2), Pair(process), process, solver=solver, **settings)
        assert (np.asarray(out.nfe) == 0).all()
        assert np.isin(np.asarray(out.x0), np.asarray(y)).all()
        np.testing.assert_allclose(np.quantile(out.x0, [0.1, 0.5, 0.9]), np.quantile(y, [0.1, 0.5, 0.9]), atol=0.1)
        few = {"shape": (3000, 1), "solver": DDIM(process, 1.0), "times": grids.uniform(5, start=0.4), "init": out.x0}
        x = np.asarray(ddjax.sample(jax.random.key(3), Pair(process), process, **few).x0)
    assert abs(np.mean(np.abs(x)) - np.mean(np.abs(np.asarray(x0)))) < 0.2
    x = 2.0 * y[:3]
    moved = solver.step(None, (), x, jnp.asarray(1.0), 0.4, None)[0]
    np.testing.assert_array_equal(moved, brenier(x / process.prior_std(1.0)))


def test_bad_arguments():
    y = jnp.zeros((3, 2))
    for make, match in (
        (lambda: transport.fit(None, y, jnp.zeros(2)), "labels"),
        (lambda: transport.fit(None, y[:0]), "n >= 1"),
        (lambda: Transported(Masked(3), Brenier(y, jnp.zeros(3)), 0.4), "white noise"),
        (lambda: Transported(Gaussian(), Brenier(y, jnp.zeros(3)), 1.0), r"lies in \[0, 1\)"),
        (lambda: Brenier(y, jnp.zeros(3))(y, jnp.zeros(3)), "takes none"),
    ):
        with pytest.raises(ValueError, match=match):
            make()
