"""Block diffusion from a config: scored with the clean sequence in view, drawn from one stream, block by block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddjax
from ddjax import grids, likelihood, processes, solvers
from ddjax.config import typed
from ddjax.data import from_arrays
from ddjax.experiment import build
from ddjax.predictions import bind
from ddjax.run import Run

KEY = jax.random.key(3)
DATA = from_arrays(np.random.default_rng(0).integers(0, 3, (16, 4)), num_symbols=3)
CONFIG = {
    "denoiser": {"name": "text", "options": {"width": 8, "depth": 1, "heads": 2, "block": 2}},
    "objective": {"name": "any_order"},
    "sample": {"steps": 4},
}


@pytest.fixture(scope="module")
def run():
    """A random network; it is told the time."""
    experiment = build(typed(CONFIG), DATA)
    shapes, rng = jax.eval_shape(experiment.init, jax.random.key(0)), np.random.default_rng(1)
    return Run(experiment, jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), shapes), 0)


@pytest.mark.slow
def test_the_score_is_that_of_what_is_drawn(run):
    """What is asked of the network at a block's own time, behind the clean sequence, is what sampling asks."""
    x0, process = jnp.asarray(DATA[:]["x0"]), run.experiment.sampling_process
    assert process == processes.in_blocks(processes.Masked(3), 4, 2)
    one_stream = bind(run.experiment.apply, run.params, process, "posterior")
    xt = jnp.where(jnp.asarray(np.random.default_rng(2).random(x0.shape)) < 0.5, 3, x0)
    at_once = run.denoise(xt, jnp.full(16, 0.3), {"clean": x0}).value
    first = one_stream(xt.at[:, 2:].set(3), jnp.full(16, 0.65), None).value  # 0.3 of the way from 1/2 to 1
    second = one_stream(xt.at[:, :2].set(x0[:, :2]), jnp.full(16, 0.15), None).value
    np.testing.assert_allclose(jnp.concatenate([first[:, :2], second[:, 2:]], 1), at_once, rtol=1e-3, atol=1e-3)
    bound = likelihood.nelbo(KEY, run.denoise, processes.Masked(3), x0, {"clean": x0}, num_times=2)
    np.testing.assert_allclose(run.nelbo(KEY, x0, num_times=2, batch_size=5).total, bound.total, rtol=1e-5)


@pytest.mark.slow
def test_samples_are_the_process_in_blocks(run):
    drawn = run.sample(KEY, 5)
    process = processes.in_blocks(processes.Masked(3), 4, 2)
    expected = ddjax.sample(
        KEY,
        bind(run.experiment.apply, run.params, process, "posterior"),
        process,
        shape=(5, 4),
        solver=solvers.Ancestral(process),
        times=jnp.asarray([1.0, 0.75, 0.5, 0.25, 0.0]),
        trajectory=True,
    )
    np.testing.assert_array_equal(drawn, expected.x0)
    halfway = np.asarray(expected.trajectory[2])
    assert (halfway[:, 2:] == 3).all()
    np.testing.assert_array_equal(halfway[:, :2], np.asarray(drawn)[:, :2])
    assert (np.asarray(drawn) < 3).all()
    np.testing.assert_array_equal(run.sample(KEY, 5, batch_size=2), drawn)


def test_grids_in_turn():
    np.testing.assert_allclose(grids.in_turn(jnp.asarray([1.0, 0.4, 0.0]), 2), [1.0, 0.7, 0.5, 0.2, 0.0])
    process = processes.in_blocks(processes.Masked(3), 23, 2)
    times = np.asarray(grids.in_turn(grids.cosine(5), 12))
    # The ends of the parts are the ends of the windows, to the last bit: a block's last step reveals all of it.
    np.testing.assert_array_equal(
        times[::5], np.append(np.unique(process.clock.start.values)[::-1], 1.0)[[12, *range(12)]].astype(np.float32)
    )
    for bad in ([0.9, 0.0], [1.0, 0.1]):
        with pytest.raises(ValueError, match="a grid from 1 to 0"):
            grids.in_turn(jnp.asarray(bad), 2)
