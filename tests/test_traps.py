"""The numerical traps of docs/traps.md that no test of a part already covers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddjax
from ddjax import grids, likelihood, objectives, random
from ddjax.categorical import categorical
from ddjax.predictions import Prediction, bind
from ddjax.processes import Masked, Uniform
from ddjax.solvers import Ancestral


def network(params, xt, t, cond, **options):
    return params[xt]


def test_trap_02_temperatures_are_taken_in_log_space():
    """exp(logits) / (-log u)**T overflows: a cold draw is the likeliest symbol, or one of its equals."""
    logits = jnp.asarray([-300.0, 200.0, 199.0, 200.0])
    draw = lambda temperature: np.asarray(
        categorical(random.example_keys(jax.random.key(0), 50), jnp.broadcast_to(logits / temperature, (50, 400, 4)))
    )
    counts = np.bincount(draw(1e-4).ravel(), minlength=4)
    assert counts[0] == counts[2] == 0
    assert abs(counts[1] - 10_000) < 4.5 * np.sqrt(5_000)
    counts = np.bincount(draw(2.0).ravel(), minlength=4)  # at 2, the square root of the law
    p = np.exp(np.array([-np.inf, 0.0, -0.5, 0.0])) / (2 + np.exp(-0.5))
    assert (np.abs(counts - 20_000 * p) <= 4.5 * np.sqrt(20_000 * p)).all()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=["float16", "bfloat16"])
def test_trap_03_networks_of_half_precision_lose_no_probabilities(dtype):
    """A symbol of 1e-9 and steps of 1 / 1000: in float16 the first is 0 and so is its product with the second."""
    symbols, t = 8, jnp.asarray([0.5])
    params = jnp.zeros((symbols + 1, symbols), dtype).at[:, 3].set(-20.0)
    xt, s = jnp.asarray([[5]]), t - 1e-3
    for process, kind in ((Uniform(symbols), "cavity"), (Masked(symbols), "posterior")):
        x = xt if kind == "cavity" else jnp.full_like(xt, process.mask)
        rare = process.reverse(bind(network, params, process, kind)(x, t), x, s, t).log_prob(jnp.full_like(x, 3))
        kl = process.path_kl(jnp.full_like(x, 3), bind(network, params, process, kind)(x, t), x, t)
        with jax.enable_x64(True):
            wide = Prediction(jnp.asarray(params, float)[x], kind)
            now, before = jnp.asarray([0.5]), jnp.asarray([0.499])
            expected = process.reverse(wide, x, before, now).log_prob(jnp.full_like(x, 3))
            np.testing.assert_allclose(rare, expected, rtol=1e-4)
            np.testing.assert_allclose(kl, process.path_kl(jnp.full_like(x, 3), wide, x, now), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("process", [Masked(3), Uniform(3)], ids=lambda p: type(p).__name__)
def test_trap_08_evaluations_do_not_depend_on_the_batch(process):
    """Cached or not, an example costs what it costs alone: with one that has nothing left to do, and without."""
    params = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    done = jnp.asarray([[0, 1], [process.num_states - 1] * 2, [2, process.num_states - 1]])

    def draw(rows):
        return ddjax.sample(
            jax.random.key(0),
            bind(network, params, process, "posterior"),
            process,
            shape=(len(rows), 2),
            solver=Ancestral(process),
            times=grids.uniform(4),
            init=done[jnp.asarray(rows)],
            rows=jnp.asarray(rows),
        )

    whole = draw([0, 1, 2])
    for row in (0, 1):
        alone = draw([row])
        assert alone.nfe.shape == (1,)
        np.testing.assert_array_equal(alone.nfe, whole.nfe[row : row + 1])
        np.testing.assert_array_equal(alone.x0, whole.x0[row : row + 1])


EVERY = {
    "elbo": (objectives.elbo, "posterior"),
    "chain": (lambda process, kind: objectives.elbo(process, kind, times=(1.0, 0.5, 0.0)), "posterior"),
    "any_order": (objectives.any_order, "posterior"),
    "cross_entropy": (objectives.cross_entropy, "posterior"),
    "score_entropy": (objectives.score_entropy, "cavity"),
    "generalised_kl": (objectives.generalised_kl, "posterior"),
}


@pytest.mark.slow
@pytest.mark.parametrize("sites", [1, 3])
def test_trap_09_a_batch_of_one_is_a_batch(sites):
    """Shapes, and the values that the same rows have among others: a squeeze would broadcast or fail."""
    process, x0 = Masked(3), jnp.asarray(np.random.default_rng(1).integers(0, 3, (2, sites)), jnp.int32)
    params = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    for name, (make, kind) in EVERY.items():
        objective = make(process, kind)
        run = jax.jit(
            lambda x, index, f=objective: f(jax.random.key(0), network, params, x, rows=ddjax.Rows(index, 2))[0]
        )
        losses = [run(x0[i : i + 1], jnp.arange(i, i + 1)) for i in range(2)]
        assert losses[0].shape == (), name
        np.testing.assert_allclose(run(x0, jnp.arange(2)), np.mean(losses), rtol=1e-5, err_msg=name)
    denoise = bind(network, params, process, "posterior")
    for bound in (likelihood.nelbo, likelihood.any_order):
        whole, alone = (bound(jax.random.key(0), denoise, process, x) for x in (x0, x0[:1]))
        assert alone.total.shape == alone.bits_per_dim.shape == (1,)
        np.testing.assert_allclose(alone.total, whole.total[:1], rtol=1e-6)
