"""Two kinds of prediction: where a discrete flow moves, and which sites are corrupted."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumerated import LAW, Drifting, both, by_hand, convert, exact, softmax

from ddjax.fixtures.categorical import all_states
from ddjax.predictions import Prediction
from ddjax.processes import Masked, Uniform
from ddjax.schedules import Cosine, Polynomial


@pytest.mark.slow
@both
def test_the_velocity_carries_the_marginals_back(x64, process):
    """-dp_t/dt = sum_z p_t(z) u(z -> .), with the exact posterior's velocity, against a difference quotient."""
    t, h, count = 0.45, 1e-5, process.num_states
    states = all_states(2, count)
    p = lambda v: (
        np.exp(np.asarray(LAW.log_p))
        @ np.array([[by_hand(process, v)[2][list(a), list(z)].prod() for z in states] for a in all_states(2, 3)])
    )
    velocity = np.asarray(exact(process, "velocity", t))
    np.testing.assert_allclose(velocity.sum(-1), 0.0, atol=1e-12)
    flow = np.zeros(count**2)
    for a, z in enumerate(states):
        for i, y in itertools.product(range(2), range(count)):
            to = z.copy()
            to[i] = y
            flow[to[0] * count + to[1]] += p(t)[a] * velocity[a, i, y]
    np.testing.assert_allclose(flow, (p(t - h) - p(t + h)) / (2 * h), atol=1e-8)
    xt = jnp.asarray(states)
    for kind in ("posterior", "cavity", "ratio"):
        back = convert(process, Prediction(jnp.asarray(velocity), "velocity"), kind, xt, t)
        used = np.asarray(xt == 3) if isinstance(process, Masked) else np.ones(xt.shape, bool)
        theirs = np.asarray(exact(process, kind, t))
        np.testing.assert_allclose(softmax(np.asarray(back))[used], softmax(theirs)[used], atol=1e-10)


@both
def test_the_planner_is_bayes_rule_on_the_coin(x64, process):
    t = 0.45
    noise, q = by_hand(process, t)[1:3]
    ours = jax.nn.sigmoid(exact(process, "planner", t))
    p = np.exp(np.asarray(LAW.log_p)).reshape(3, 3)
    for n, (a, b) in enumerate(all_states(2, process.num_states)):
        joint = p * np.outer(q[:, a], q[:, b])
        first = (p * np.outer(np.full(3, noise[a]), q[:, b])).sum() / joint.sum() if joint.sum() else None
        second = (p * np.outer(q[:, a], np.full(3, noise[b]))).sum() / joint.sum()
        np.testing.assert_allclose(ours[n], [first, second], atol=1e-10)


@both
def test_conversions_that_cannot_be(process):
    xt, t = jnp.zeros((2, 4), int), jnp.full(2, 0.5)
    for kind in ("posterior", "cavity", "ratio", "velocity"):
        with pytest.raises(ValueError, match="which sites are corrupted"):
            process.convert(Prediction(jnp.zeros((2, 4)), "planner"), kind, xt, t)
    assert process.convert(Prediction(jnp.zeros((2, 4)), "planner"), "planner", xt, t).value.shape == (2, 4)
    for kind, shape in (("planner", (2, 4, 1)), ("velocity", (2, 4, 7))):
        with pytest.raises(ValueError, match="must have shape"):
            process.convert(Prediction(jnp.zeros(shape), kind), kind, xt, t)
    for pair in (("posterior", "velocity"), ("velocity", "posterior")):
        with pytest.raises(ValueError, match="changes shape"):
            Drifting(3).convert(Prediction(jnp.zeros((2, 4, 3)), pair[0]), pair[1], xt, t)


@jax.jit
def both_ways(logits, t):
    """A number that depends on every velocity and planner of a few processes, and the velocities."""
    total, velocities = 0.0, []
    for process in (Masked(3, Cosine()), Uniform(3, Cosine()), Masked(3, Polynomial(2.0)), Uniform(3, Polynomial(2.0))):
        xt, t = jnp.asarray([[1], [process.num_states - 1], [0]]), jnp.broadcast_to(t, (3,))
        velocity = process.convert(Prediction(logits, "posterior"), "velocity", xt, t)
        total += jnp.exp(process.convert(velocity, "posterior", xt, t).value).sum()
        total += jnp.tanh(process.convert(Prediction(logits, "posterior"), "planner", xt, t).value).sum()
        velocities.append(velocity.value.ravel())
    velocities = jnp.concatenate(velocities)
    return total + (velocities**2).sum(), velocities


@pytest.mark.slow
def test_velocity_and_planner_at_both_ends_in_float32():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 1, 3)), jnp.float32)
    run = jax.jit(jax.value_and_grad(both_ways, has_aux=True))
    for t in (0.0, 1e-6, 1.0):
        (value, velocity), slope = run(logits, jnp.float32(t))
        assert np.isfinite(value)
        assert np.isfinite(np.asarray(slope)).all()
        assert np.isfinite(np.asarray(velocity)).all()
