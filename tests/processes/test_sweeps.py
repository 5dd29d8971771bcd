"""One site at a time, in turn: the clock at its knots, products of single-site matrices, nothing lost in any bound."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddjax
from ddjax import random
from ddjax.fixtures import Categorical, exact_nelbo
from ddjax.fixtures.categorical import all_states
from ddjax.likelihood import nelbo
from ddjax.objectives import elbo
from ddjax.predictions import Prediction
from ddjax.processes import Hybrid, Masked, Staggered, Sweeps, Uniform
from ddjax.schedules import Cosine
from ddjax.solvers import Ancestral

BACKWARDS = Sweeps(turn=[1, 0], rounds=3)
PROCESSES = [
    Staggered(Uniform(3, Cosine()), BACKWARDS),
    Staggered(Masked(3, Cosine()), Sweeps.cyclic((2,))),
    Staggered(Hybrid(3, uniform_share=0.3), Sweeps.cyclic((2,), rounds=3)),
]
every_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p.process).__name__)


def moves_made(clock, n):
    """How often each site has moved after n steps, by counting."""
    turn = np.asarray(clock.turn).astype(int)
    made = np.zeros(turn.shape, int)
    for k in range(n):
        made += turn == k % turn.size
    return made


@pytest.mark.slow
def test_the_clock_is_exact_at_its_knots_and_linear_between():
    """In float32 and compiled, as it is used; 49 and 7 are where k / n, times n, is not k."""
    for clock in (Sweeps.shuffled((7, 1), rounds=49), Sweeps.cyclic((3,)), Sweeps.cyclic((1,), rounds=3), BACKWARDS):
        times = clock.times[::-1]
        n, shape = len(times) - 1, np.asarray(clock.turn).shape
        made = np.stack([moves_made(clock, k) for k in range(n + 1)])
        x = jnp.zeros((n + 1, *shape), jnp.int32)
        own, slope = jax.jit(clock.local)(times, x), jax.jit(clock.slope)(times, x)
        np.testing.assert_array_equal(own, (made / clock.rounds).astype(np.float32))
        np.testing.assert_array_equal(slope, 0.0)
        between = times[:-1] + 0.3 * jnp.diff(times)
        own, slope = jax.jit(clock.local)(between, x[1:]), jax.jit(clock.slope)(between, x[1:])
        np.testing.assert_allclose(own, (0.7 * made[:-1] + 0.3 * made[1:]) / clock.rounds, atol=1e-5)
        np.testing.assert_allclose(slope, np.diff(made, axis=0) / clock.rounds * n, rtol=1e-6)
        for level in (1e-3, 0.2, 1 / clock.rounds, 0.9, 1.0):
            # The first knot at which some site has come so far, and the part of the step to it.
            after = next(k for k in range(n + 1) if made[k].max() / clock.rounds >= level - 1e-12)
            part = level * clock.rounds - made[after - 1].max()
            assert clock.reached(level) == pytest.approx((after - 1 + part) / n)


def matrix(process, t):
    """q_t(y | k) of one site, on all states (noise stays noise), without the process's formulas."""
    t, states = float(t), process.num_states
    if isinstance(process, Hybrid):
        c = 2 * 0.3 / 0.7 * math.sqrt(t * (1 - t))
        alpha, noise = (1 - t) / (1 + c), np.append(np.full(3, c / 3), t) / (1 + c)
    else:
        alpha = 1 - math.sin(math.pi * t / 2)
        noise = (1 - alpha) * (np.full(3, 1 / 3) if states == 3 else np.eye(4)[3])
    return alpha * np.eye(states) + noise


def transition(process, s, t):
    """Q_{t|s} of all sites at once, `(states ** 2,) * 2`: the product of the matrices of the sites, step by step."""
    clock, states = process.clock, process.num_states
    knots = [k / clock.steps for k in range(clock.steps + 1) if s < k / clock.steps < t]
    total = np.eye(states**2)
    for a, b in itertools.pairwise([s, *knots, t]):
        step = math.floor((a + b) / 2 * clock.steps)
        site = list(np.asarray(clock.turn)).index(step % 2)
        own = [(step // 2 + v * clock.steps - step) / clock.rounds for v in (a, b)]
        one = np.linalg.solve(matrix(process.process, own[0]), matrix(process.process, own[1]))
        total = total @ np.kron(*([one, np.eye(states)] if site == 0 else [np.eye(states), one]))
    return total


@functools.partial(jax.jit, static_argnums=0)
def tables(process, x0, xt, y, s, t):
    """Probabilities of x_t given x_0, of y at s given both, and of y at s under a cavity that is sure of x_0."""
    s, t = (jnp.full(len(x0), v) for v in (s, t))
    sure = Prediction(jnp.where(jnp.arange(3) == x0[..., None], 0.0, -1e6), "cavity")
    laws = process.marginal(x0, t), process.bridge(x0, xt, s, t), process.reverse(sure, xt, s, t)
    return [jnp.exp(law.log_prob(v).sum(-1)) for law, v in zip(laws, (xt, y, y), strict=True)]


@every_process
@pytest.mark.parametrize(("s", "t"), [(1 / 6, 5 / 6), (0.5, 1.0), (0.2, 0.55), (0.55, 0.6)])
def test_marginal_and_bridge_are_products_of_single_site_matrices(x64, process, s, t):
    states = all_states(2, process.num_states)
    clean = np.flatnonzero((states < 3).all(1))
    a, b, c = (v.ravel() for v in np.meshgrid(clean, range(len(states)), range(len(states)), indexing="ij"))
    early, late = transition(process, 0.0, s), transition(process, s, t)
    joint = early[a, c] * late[c, b]
    whole = (early @ late)[a, b]
    possible = whole > 1e-12
    marginal, bridge, reverse = tables(process, *(jnp.asarray(states[v]) for v in (a, b, c)), s, t)
    np.testing.assert_allclose(marginal, whole, atol=1e-10)
    np.testing.assert_allclose(
        np.asarray(bridge)[possible], (joint / np.where(possible, whole, 1))[possible], atol=1e-10
    )
    sure = possible if process.num_states == 3 else possible & (states[b] == 3).all(1)  # a shown symbol is carried over
    np.testing.assert_allclose(np.asarray(reverse)[sure], np.asarray(bridge)[sure], atol=1e-10)


@every_process
def test_one_site_steps_give_the_entropy(x64, process):
    """Each step moves one site, so that no step forgets a correlation."""
    law = Categorical(2, 3)
    bound = exact_nelbo(law, law.denoise(process, "cavity"), process, times=process.clock.times)
    np.testing.assert_allclose(float(bound.total[0]), law.entropy, atol=1e-9)


@pytest.mark.parametrize("clock", [Sweeps.shuffled((3,), rounds=2, seed=1), Sweeps.cyclic((1,), rounds=3)], ids=repr)
def test_one_site_steps_of_more_sites_and_of_one(x64, clock):
    process, law = Staggered(Uniform(3), clock), Categorical(clock.turn.values.size, 3)
    bound = exact_nelbo(law, law.denoise(process, "cavity"), process, times=clock.times)
    np.testing.assert_allclose(float(bound.total[0]), law.entropy, atol=1e-9)


def expected_path_kl(process, law, nodes, weights):
    """The integral of the expected `path_kl`: `exact_nelbo`'s, with a quadrature of our own."""
    states = jnp.asarray(all_states(2, process.num_states))
    x0, xt = jnp.repeat(law.configurations, len(states), axis=0), jnp.tile(states, (9, 1))
    denoise, p = law.denoise(process, "cavity"), jnp.repeat(jnp.exp(law.log_p), len(states))

    def at(t):
        t = jnp.full(len(x0), t)
        q = p * jnp.exp(process.marginal(x0, t).log_prob(xt).sum(-1))
        said = jnp.tile(denoise(states, t[: len(states)], None).value, (9, 1, 1))
        costs = process.path_kl(x0, Prediction(said, "cavity"), xt, t).sum(-1)
        return jnp.where(q > 0, q * costs, 0.0).sum()

    return jax.jit(lambda nodes, weights: weights @ jax.lax.map(at, nodes))(nodes, weights)


@every_process
def test_continuous_time_gives_the_entropy(x64, process):
    """Each step of the clock is a piece of its own, refined towards both ends, where noise grows like a root."""
    x, w = np.polynomial.legendre.leggauss(20)
    small = 0.1 ** np.arange(14.0, 0.0, -1.0)
    edges = np.concatenate([[0.0], small, [0.5], 1 - small[:5:-1], [1.0]])
    half, middle = 0.5 * np.diff(edges)[:, None], 0.5 * (edges[1:] + edges[:-1])[:, None]
    steps = np.arange(process.clock.steps)[:, None]
    nodes = (steps + (middle + half * x).ravel()).ravel() / process.clock.steps
    weights = np.tile((half * w).ravel(), len(steps)) / process.clock.steps
    law = Categorical(2, 3)
    total = expected_path_kl(process, law, jnp.asarray(nodes), jnp.asarray(weights))
    np.testing.assert_allclose(float(total), law.entropy, atol=1e-6)


def test_draws_agree_with_the_entropy_and_have_finite_gradients():
    """In float32: the bound in continuous time and on the grid, and the objective."""
    law, batch = Categorical(2, 3), 20_000
    x0 = law.sample(random.example_keys(jax.random.key(0), batch))
    params = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)), jnp.float32)
    apply = lambda params, xt, t, cond, **_: params[xt]
    for inner, times in ((Masked(3, Cosine()), None), (Uniform(3, Cosine()), BACKWARDS.times)):
        process = Staggered(inner, BACKWARDS)
        exact = law.denoise(process, "cavity")
        draws = np.asarray(nelbo(jax.random.key(1), exact, process, x0, num_times=4, times=times).total)
        assert draws.std() / math.sqrt(batch) < 0.04
        assert abs(draws.mean() - law.entropy) < 4 * draws.std() / math.sqrt(batch)
        loss = lambda p: elbo(process, "cavity", times=times)(jax.random.key(3), apply, p, x0[:64])[0]  # noqa: B023
        value, slope = jax.jit(jax.value_and_grad(loss))(params)
        assert np.isfinite(float(value))
        assert np.isfinite(np.asarray(slope)).all()


@pytest.mark.slow
def test_ancestral_steps_of_one_site_draw_the_law():
    law, batch, process = Categorical(2, 3), 20_000, PROCESSES[2]
    with jax.debug_key_reuse(False):
        out = ddjax.sample(
            jax.random.key(0),
            law.denoise(process, "cavity"),
            process,
            shape=(batch, 2),
            solver=Ancestral(process),
            times=process.clock.times,
        )
    counts = np.bincount(np.asarray(out.x0) @ np.asarray([3, 1]), minlength=9) / batch
    np.testing.assert_allclose(counts, np.exp(np.asarray(law.log_p)), atol=0.015)


def test_bad_sweeps_are_refused():
    for turn in ([0, 0], [1, 2], [0.5, 1.5], [[0, 1], [2, 2]]):
        with pytest.raises(ValueError, match=r"a permutation of 0 \.\.\. L - 1"):
            Sweeps(turn)
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        Sweeps.cyclic((2,), rounds=0)
    with pytest.raises(ValueError, match=r"over examples of shape \(2,\), got a state of shape \(4, 3\)"):
        Staggered(Masked(3), BACKWARDS).marginal(jnp.zeros((4, 3), int), jnp.zeros(4))
    assert hash(Sweeps([1, 0], 3)) == hash(BACKWARDS)
    assert Sweeps([1, 0], 3) == BACKWARDS != Sweeps.cyclic((2,), 3)
