"""Distillation beside an objective: its value by hand, and that the student ends as the teacher."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax import auxiliary, taps
from ddjax.denoisers import taught
from ddjax.objectives import ddpm_hybrid
from ddjax.processes import LearnedVariance
from ddjax.schedules import VPCosine
from ddjax.training import init_state, make_train_step, optimizer


def linear(params, xt, t, cond=None, *, rng=None, train=False):
    """A prediction and v, `params` times the state, and the time."""
    y = jnp.concatenate([xt, xt], axis=-1) * params["w"]
    return y + t[:, None] * (0.0 if cond is None else cond[:, None])


def test_its_loss_is_the_weighted_distance_and_only_in_training():
    rng = np.random.default_rng(0)
    own, theirs = ({"w": rng.normal(size=6).astype(np.float32)} for _ in range(2))
    xt, t, cond = rng.normal(size=(4, 3)).astype(np.float32), rng.uniform(size=4), rng.normal(size=4)
    network = taught(linear, linear, theirs, prediction=0.5, variance=0.2)
    with auxiliary.collect() as collector:
        np.testing.assert_array_equal(network(own, xt, t, cond), linear(own, xt, t, cond))
        assert not collector.found().losses
        network(own, xt, t, cond, train=True)
    apart = (np.concatenate([xt, xt], -1) * (own["w"] - theirs["w"])) ** 2
    want = 0.5 * apart[:, :3].mean(-1) + 0.2 * apart[:, 3:].mean(-1)
    np.testing.assert_allclose(collector.found().losses["distillation"], want, rtol=1e-5)
    with pytest.raises(ValueError, match="the teacher says"):
        taught(linear, lambda params, xt, *args: xt, theirs)(own, xt, t, cond, train=True)
    with pytest.raises(ValueError, match="weights of 0 or more"):
        taught(linear, linear, theirs, prediction=-1.0)


def test_nobody_hears_the_teacher():
    """Its activations have the student's names, and what its layers tell is not the student's."""

    def telling(params, xt, t, cond=None, **_):
        auxiliary.add_loss("balance", params * jnp.ones(len(xt)))
        return taps.tap("h", params * xt)

    network, xt = taught(telling, telling, jnp.float32(5.0)), jnp.ones((2, 3))
    with auxiliary.collect() as collector, taps.record("h") as seen:
        network(jnp.float32(2.0), xt, jnp.ones(2), train=True)
    np.testing.assert_array_equal(seen["h"], 2 * xt)
    np.testing.assert_array_equal(collector.found().losses["balance"], [2.0, 2.0])


@pytest.mark.slow
def test_a_student_of_it_alone_becomes_the_teacher():
    process = LearnedVariance(VPCosine())
    theirs = {"w": jnp.array([0.3, -0.7, 1.1, 0.2, 0.4, -0.5])}
    network = taught(linear, linear, theirs, prediction=1e4, variance=1e4)  # the objective says nothing against it
    objective = ddpm_hybrid(process, "noise", times=np.linspace(0.98, 0.02, 9))
    descent = optimizer("adamw", 0.05, 300)
    step = jax.jit(make_train_step(objective, network, descent))
    state = init_state(lambda key: {"w": jnp.zeros(6)}, descent, jax.random.key(0))
    batch = {"x0": np.random.default_rng(1).normal(size=(16, 3)).astype(np.float32)}
    for _ in range(300):
        state, metrics = step(state, batch)
    np.testing.assert_allclose(state.params["w"], theirs["w"], atol=2e-3)
    assert metrics["distillation"] < 0.1
