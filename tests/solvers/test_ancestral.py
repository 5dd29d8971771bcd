"""Ancestral sampling of categorical states: the law of the output, by propagating every state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddjax
from ddjax import grids, random
from ddjax.fixtures import Categorical
from ddjax.fixtures.categorical import all_states
from ddjax.predictions import Prediction
from ddjax.processes import Masked, Uniform
from ddjax.schedules import Cosine
from ddjax.solvers import Ancestral

LAW = Categorical(2, 3, seed=1)
both = pytest.mark.parametrize("kind", [Masked, Uniform])


@functools.partial(jax.jit, static_argnums=(0, 1))
def propagate(process, prediction, grid, steps):
    """The law of the sampler's output over all states: prior times one transition matrix per step.

    grid: room for the times, of which the first `steps + 1` count (one program for all numbers of steps).
    """
    states = jnp.asarray(all_states(2, process.num_states))
    n = len(states)
    prior = jnp.exp(process.prior((n, 2), grid[0]).log_prob(states).sum(-1))

    def step(i, p):
        t, s = jnp.full(n, grid[i]), jnp.full(n, grid[i + 1])
        reverse = process.reverse(LAW.denoise(process, prediction)(states, t), states, s, t)
        log_p = jax.vmap(lambda y: reverse.log_prob(jnp.broadcast_to(y, states.shape)).sum(-1), out_axes=1)(states)
        return p @ jnp.exp(log_p)

    return jax.lax.fori_loop(0, steps, step, prior)


def output_law(process, prediction, times):
    return np.asarray(propagate(process, prediction, jnp.pad(times, (0, 129 - len(times))), len(times) - 1))


def clean(process):
    """The law itself, over the process's states."""
    p = np.zeros((process.num_states,) * 2)
    p[:3, :3] = np.exp(np.asarray(LAW.log_p)).reshape(3, 3)
    return p.reshape(-1)


@pytest.mark.slow
@both
@pytest.mark.parametrize("prediction", ["posterior", "cavity", "ratio"])
def test_the_law_converges_at_first_order(x64, kind, prediction):
    process = kind(3)
    distance = [
        0.5 * np.abs(output_law(process, prediction, jnp.linspace(1.0, 0.0, n + 1)) - clean(process)).sum()
        for n in (1, 16, 32, 64, 128)
    ]
    assert distance[0] > 0.1
    assert distance[-1] < 0.005
    slopes = np.log2(np.array(distance[1:-1]) / distance[2:])
    np.testing.assert_allclose(slopes, 1.0, atol=0.15)


def test_masked_error_is_the_chance_of_revealing_both_at_once(x64):
    """On equal steps of the linear schedule two masks go in the same step with probability 1/n: an exact answer."""
    p = clean(Masked(3)).reshape(4, 4)
    independent = np.outer(p.sum(1), p.sum(0))
    for n in (1, 2, 10):
        law = output_law(Masked(3), "posterior", jnp.linspace(1.0, 0.0, n + 1)).reshape(4, 4)
        np.testing.assert_allclose(law, (1 - 1 / n) * p + independent / n, atol=1e-12)


@both
@pytest.mark.parametrize("steps", [1, 4])
def test_sample_has_the_propagated_law(kind, steps):
    """Chi-squared of `ddjax.sample` against the transition matrices, few steps and many samples."""
    process, batch = kind(3, Cosine()), 20_000
    times = grids.cosine(steps)
    law = output_law(process, "posterior", times).reshape((process.num_states,) * 2)
    out = ddjax.sample(
        jax.random.key(steps),
        LAW.denoise(process),
        process,
        shape=(batch, 2),
        solver=Ancestral(process),
        times=times,
    )
    counts = np.zeros_like(law)
    np.add.at(counts, tuple(np.asarray(out.x0).T), 1)
    seen = law > 1e-7
    assert counts[~seen].sum() == 0
    assert np.sum((counts - batch * law)[seen] ** 2 / (batch * law[seen])) < 40  # 8 degrees of freedom, p < 1e-5
    assert (np.asarray(out.nfe) == steps).all()
    assert out.x0.dtype == jnp.int32


def draw(process, batch, **options):
    """Samples of the first rows; `options` go to ddjax.sample."""
    settings = {"shape": (batch, 2), "solver": Ancestral(process), "times": grids.uniform(6), **options}
    return ddjax.sample(jax.random.key(5), LAW.denoise(process), process, **settings)


@pytest.mark.slow
@both
def test_samples_do_not_depend_on_the_batch(kind):
    process = kind(3)
    whole = np.asarray(draw(process, 7).x0)
    for batch in (1, 2):
        np.testing.assert_array_equal(draw(process, batch).x0, whole[:batch])
    np.testing.assert_array_equal(draw(process, 2, rows=jnp.asarray([6, 3])).x0, whole[[6, 3]])
    assert len(np.unique(np.asarray(draw(process, 64).x0), axis=0)) > 3


@pytest.mark.slow
@both
def test_trajectory_and_init(kind):
    process = kind(3)
    out = draw(process, 4, trajectory=True)
    assert out.trajectory.shape == (7, 4, 2)
    np.testing.assert_array_equal(out.trajectory[-1], out.x0)
    assert draw(process, 4).trajectory is None
    init = jnp.full((4, 2), process.num_states - 1)
    started = draw(process, 4, init=init, trajectory=True)
    np.testing.assert_array_equal(started.trajectory[0], init)
    if kind is Masked:  # the prior is the mask, so starting from it changes nothing
        np.testing.assert_array_equal(started.x0, out.x0)
        shown = np.asarray(out.trajectory) != process.mask
        assert (shown[:-1] <= shown[1:]).all()


def test_inpainting_is_exact_for_masked():
    """Hold site 0 at 1: site 1 has the law's own conditional, in one step already."""
    process, batch = Masked(3), 20_000
    observed = ddjax.Observed(jnp.broadcast_to(jnp.asarray([True, False]), (batch, 2)), jnp.ones((batch, 2), jnp.int32))
    p = clean(process).reshape(4, 4)[1, :3]
    for steps in (1, 4):
        x = np.asarray(draw(process, batch, observed=observed, times=grids.uniform(steps)).x0)
        assert (x[:, 0] == 1).all()
        counts, expected = np.bincount(x[:, 1], minlength=3), batch * p / p.sum()
        assert np.sum((counts - expected) ** 2 / expected) < 25


@pytest.mark.slow
def test_inpainting_keeps_the_known_sites_for_uniform():
    process = Uniform(3)
    observed = ddjax.Observed(jnp.asarray([[True, False]] * 4), jnp.ones((4, 2), jnp.int32))
    out = draw(process, 4, observed=observed, trajectory=True)
    assert (np.asarray(out.x0)[:, 0] == 1).all()
    np.testing.assert_array_equal(out.trajectory[-1], out.x0)


def test_sample_compiles_once():
    """New but equal processes and solvers, new parameters: the program is the same. A new number of steps is not."""
    traces = []

    def apply(params, xt, t, cond):
        traces.append(1)
        return jnp.zeros((*xt.shape, 3)) + params["bias"]

    def run(bias, steps=5):
        process = Masked(3, Cosine())
        denoise = ddjax.bind(apply, {"bias": jnp.full(3, bias)}, process, "posterior")
        return ddjax.sample(
            jax.random.key(0), denoise, process, shape=(2, 2), solver=Ancestral(process), times=grids.uniform(steps)
        )

    run(0.0)
    first = len(traces)
    assert first >= 1
    run(1.0)
    run(2.0)
    assert len(traces) == first
    run(0.0, steps=4)
    assert len(traces) > first


def test_a_plain_function_is_a_denoiser():
    process = Masked(3)
    denoise = lambda xt, t, cond: Prediction(jnp.zeros((*xt.shape, 3)), "posterior")
    out = ddjax.sample(
        jax.random.key(0), denoise, process, shape=(5, 2), solver=Ancestral(process), times=grids.uniform(2)
    )
    assert np.asarray(out.x0).max() < 3


@pytest.mark.slow
def test_the_reverse_step_is_drawn_with_the_keys_of_the_rows():
    """A step's draw for a row is the same alone as among others."""
    process = Uniform(3)
    xt, t = jnp.asarray(all_states(2, 3)), jnp.full(9, 0.5)
    keys = lambda: random.example_keys(jax.random.key(0), 9)
    step = jax.jit(lambda keys, xt, t: Ancestral(process).step(keys, (), xt, t, t - 0.1, LAW.denoise(process)))
    whole, _, info = step(keys(), xt, t)
    alone, _, _ = step(keys()[4:5], xt[4:5], t[4:5])
    np.testing.assert_array_equal(whole[4:5], alone)
    assert (np.asarray(info.nfe) == 1).all()


def test_errors():
    process = Masked(3)
    for bad, match in (
        ({"times": jnp.asarray([1.0])}, "times"),
        ({"times": jnp.zeros((2, 2))}, "times"),
        ({"init": jnp.zeros((3, 2), int)}, "init"),
        ({"cond": jnp.zeros(3)}, "cond"),
        ({"rows": jnp.arange(3)}, "rows"),
        ({"observed": ddjax.Observed(jnp.zeros((3, 2), bool), jnp.zeros((4, 2), int))}, "observed.mask"),
        ({"observed": ddjax.Observed(jnp.zeros((4, 2), bool), jnp.zeros((3, 2), int))}, "observed.value"),
    ):
        with pytest.raises(ValueError, match=match):
            draw(process, 4, **bad)
