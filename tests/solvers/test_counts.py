"""Blackout's steps from expected deaths: exact where the count is known, and what is lost where it is not."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import ddjax
from ddjax import grids
from ddjax.fixtures import Categorical
from ddjax.fixtures.categorical import all_states
from ddjax.predictions import Prediction
from ddjax.processes import Thinning, Uniform
from ddjax.schedules import Cosine
from ddjax.solvers import Ancestral, BinomialBridge, PoissonBridge

P = Thinning(3, Cosine())
LAW = Categorical(2, 3, seed=1)


@functools.partial(jax.jit, static_argnums=0)
def site_tables(solver, deaths, xt, s, t):
    """The probabilities of every state at each site, from log_prob alone."""
    law = solver.law(Prediction(deaths, "deaths"), xt, s, t)
    each = jax.vmap(lambda y: law.log_prob(jnp.full_like(xt, y)), out_axes=-1)
    return jnp.exp(each(jnp.arange(solver.process.num_states)))


def birth(s, t):
    """(alpha_s - alpha_t) / (1 - alpha_t) of Cosine."""
    alpha = lambda v: 1 - np.sin(np.pi * v / 2)
    return (alpha(s) - alpha(t)) / (1 - alpha(t))


def test_each_step_is_its_published_law(x64):
    """SciPy's binomial and Poisson, at whole and broken numbers, and past the largest count."""
    process = Thinning(6, Cosine())
    xt = jnp.asarray([[0, 0, 1, 2, 3, 5, 0]])
    y = np.asarray([[0.0, 0.4, 1.6, 2.0, 7.5, 1.0, -0.2]])
    clipped = np.clip(y, 0, 5 - np.asarray(xt))
    k = np.arange(6) - np.asarray(xt)[..., None]
    for s, t in ((0.2, 0.6), (0.0, 0.5), (0.5, 1.0)):
        time = jnp.asarray(s, float), jnp.asarray(t, float)
        r = birth(s, t)
        binomial = stats.binom.pmf(k, np.round(clipped)[..., None], r)
        np.testing.assert_allclose(site_tables(BinomialBridge(process), y, xt, *time), binomial, atol=1e-10)
        poisson = stats.poisson.pmf(k, clipped[..., None] * r)
        poisson[..., -1] = stats.poisson.sf(k[..., -1] - 1, clipped * r)
        np.testing.assert_allclose(site_tables(PoissonBridge(process), y, xt, *time), poisson, atol=1e-10)


@pytest.mark.slow
def test_the_binomial_bridge_is_the_bridge_where_the_count_is_known(x64):
    """And the Poisson step, which is not, has its mean and a variance larger by 1 / (1 - r)."""
    process = Thinning(12, Cosine())
    x0, xt = jnp.asarray([[4, 3, 7, 2]]), jnp.asarray([[0, 2, 5, 2]])
    s, t = jnp.asarray(0.3), jnp.asarray(0.7)
    deaths = (x0 - xt).astype(float)
    each = jax.vmap(lambda y: process.bridge(x0, xt, s, t).log_prob(jnp.full_like(xt, y)), out_axes=-1)
    np.testing.assert_allclose(
        site_tables(BinomialBridge(process), deaths, xt, s, t), np.exp(each(jnp.arange(12))), atol=1e-12
    )
    born, r = np.arange(12) - np.asarray(xt)[..., None], birth(0.3, 0.7)
    p = np.asarray(site_tables(PoissonBridge(process), deaths, xt, s, t))[:, :2]
    mean = (p * born[:, :2]).sum(-1)
    np.testing.assert_allclose(mean, deaths[:, :2] * r, atol=1e-4)  # a little is lost beyond the largest count
    np.testing.assert_allclose((p * born[:, :2] ** 2).sum(-1) - mean**2, deaths[:, :2] * r, atol=1e-3)


@functools.partial(jax.jit, static_argnums=(0, 1))
def step_matrix(solver, kind, s, t):
    x = jnp.asarray(all_states(2, 3))
    said = LAW.denoise(P, kind)(x, t)
    law = P.reverse(said, x, s, t) if isinstance(solver, Ancestral) else solver.law(said, x, s, t)
    each = jax.vmap(lambda y: law.log_prob(jnp.broadcast_to(y, x.shape)).sum(-1), out_axes=1)
    return jnp.exp(each(x))


def output_law(solver, kind, steps):
    times = jnp.linspace(1.0, 0.0, steps + 1)
    p = np.eye(9)[0]  # blackout
    for t, s in itertools.pairwise(times):
        p = p @ np.asarray(step_matrix(solver, kind, s, t))
    return p


def error(solver, kind, steps):
    return 0.5 * np.abs(output_law(solver, kind, steps) - np.exp(np.asarray(LAW.log_p))).sum()


@pytest.mark.slow
def test_what_the_mean_in_place_of_the_law_costs(x64):
    """Total variation of the output. A law, a number rounded at random and Poisson births converge at first order.

    To the nearest whole number it does not: what is left does not depend on the steps.
    """
    left = {
        "law": [error(Ancestral(P), "posterior", n) for n in (32, 64)],
        "random": [error(Ancestral(P), "deaths", n) for n in (32, 64)],
        "poisson": [error(PoissonBridge(P), "deaths", n) for n in (32, 64)],
    }
    for name, (a, b) in left.items():
        assert b < 0.03, name
        assert np.log2(a / b) == pytest.approx(1.0, abs=0.15), name
    assert left["law"][1] < left["random"][1] < left["poisson"][1]
    nearest = [error(BinomialBridge(P), "deaths", n) for n in (32, 64)]
    assert min(nearest) > 0.15
    assert abs(nearest[1] - nearest[0]) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("solver", [BinomialBridge(P), PoissonBridge(P)], ids=lambda v: type(v).__name__)
def test_samples_have_the_propagated_law_whatever_the_batch(solver):
    def draw(batch):
        with jax.debug_key_reuse(False):
            return ddjax.sample(
                jax.random.key(2),
                LAW.denoise(P, "deaths"),
                P,
                shape=(batch, 2),
                solver=solver,
                times=grids.uniform(4),
            )

    batch, expected = 20_000, output_law(solver, "deaths", 4)
    out = draw(batch)
    assert (np.asarray(out.nfe) == 4).all()
    x = np.asarray(out.x0)
    counts, seen = np.bincount(3 * x[:, 0] + x[:, 1], minlength=9), expected > 1e-7
    assert counts[~seen].sum() == 0
    assert np.sum((counts - batch * expected)[seen] ** 2 / (batch * expected[seen])) < 40
    for few in (1, 2, 7):
        np.testing.assert_array_equal(draw(few).x0, x[:few])


def test_they_are_for_counts():
    for solver in (BinomialBridge, PoissonBridge):
        with pytest.raises(ValueError, match=f"{solver.__name__} is for processes.Thinning, got Uniform"):
            solver(Uniform(3))
