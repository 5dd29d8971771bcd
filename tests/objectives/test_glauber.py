"""Noise against signal: the paper's chain and coin by enumeration, the cavity as the only optimum, the heat bath."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax import random
from ddjax.fixtures import Categorical
from ddjax.fixtures.categorical import all_states
from ddjax.objectives import base, glauber
from ddjax.processes import Hybrid, Marginal, Masked, Staggered, Sweeps, Uniform, Windows
from ddjax.processes.categorical import Categorical as Law
from ddjax.processes.mixture import Corrupted
from ddjax.schedules import LogLinear

LAW, STATES = Categorical(2, 3), all_states(2, 3)
PI = {"Uniform": np.full(3, 1 / 3), "Marginal": np.asarray([0.6, 0.3, 0.1])}
PROCESSES = [
    Staggered(Uniform(3, LogLinear(0.1)), Sweeps(turn=[1, 0], rounds=2)),
    Staggered(Marginal(3, LogLinear(0.2), probabilities=PI["Marginal"]), Sweeps.cyclic((2,), rounds=2)),
]
every_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p.process).__name__)


def look_up(params, xt, t, cond, *, rng=None, train=False):
    return params[xt[:, 0] * 3 + xt[:, 1]]


def table(seed=0):
    """Logits of a wrong network for every configuration of both sites."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=(9, 2, 3)))


def step(process, k):
    """Which site moves in step k from the data, its own times, and the common times, by counting."""
    site = list(np.asarray(process.clock.turn)).index(k % 2)
    return site, (k // 2 / 2, (k // 2 + 1) / 2), (k / 4, (k + 1) / 4)


def one_site(process, t):
    """q_t(y | k) of one site at its own time t, without the process's formulas."""
    alpha = 1 - (1 - process.process.schedule.eps) * t
    return alpha * np.eye(3) + (1 - alpha) * PI[type(process.process).__name__]


def noise_and_kept(process, own):
    """Pi(a) for each symbol, and Pi(phi)."""
    step = np.linalg.solve(one_site(process, own[0]), one_site(process, own[1]))
    kept = step[0, 0] - step[1, 0]
    return step[1] - kept * np.eye(3)[1], kept


def before(process, k):
    """P(x_0, x_s) at the start of step k of the noising, `(9, 9)`: each site has made the moves before k."""
    made = [sum(step(process, j)[0] == site for j in range(k)) for site in (0, 1)]
    first, second = (one_site(process, n / 2) for n in made)
    return np.exp(np.asarray(LAW.log_p))[:, None] * np.kron(first, second)


@functools.partial(jax.jit, static_argnums=(0, 1))
def expected(objective, process, params, u):
    """The objective's loss, averaged over the law and every draw that it makes at the uniform u."""
    grid = np.meshgrid(range(9), range(9), range(9), indexing="ij")
    x0, xs, hiding = (jnp.asarray(STATES[v.ravel()]) for v in grid)
    p = [jnp.repeat(jnp.exp(LAW.log_p), 81)]

    def sample(values):
        def draw(self, keys):
            p.append(jnp.exp(self.log_prob(values).sum(-1)))
            return values

        return draw

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(random, "stratified", lambda key, rows: jnp.full(len(rows.index), u))
        patch.setattr(Corrupted, "sample", sample(xs))
        patch.setattr(Law, "sample", sample(hiding))
        patch.setattr(base, "weighted_mean", lambda values, weights: values)
        losses, _ = objective(jax.random.key(0), look_up, params, x0, train=False)
    assert len(p) == 3
    return (p[0] * p[1] * p[2] * losses).sum()


value_and_slope = jax.jit(jax.value_and_grad(expected, argnums=2), static_argnums=(0, 1))


def classifiers(process, k, law):
    """P(x_s^-i, Z): of the other site's state and what was drawn (3: nothing), and P(noise | a) under `law`'s p_s."""
    site, own, _ = step(process, k)
    joint = before(process, k).sum(0).reshape(3, 3)
    joint = joint if site == 1 else joint.T  # (other, this)
    noise, kept = noise_and_kept(process, own)
    as_noise, as_signal = joint.sum(1, keepdims=True) * noise, kept * joint
    return as_noise, as_signal, noise / (noise + kept * law(joint))


def said(process, k, params):
    """The heat bath's law by a network that states the cavity: rows are (other site's state, what the site shows)."""
    site, own, _ = step(process, k)
    params = np.asarray(params).reshape(3, 3, 2, 3)[:, :, site]
    params = params if site == 1 else params.swapaxes(0, 1)
    cavity = np.exp(params) / np.exp(params).sum(-1, keepdims=True)
    return cavity @ one_site(process, own[0])


def shows(process, own):
    """What stands at the site in question: the marginal at its own time of a uniform symbol."""
    return one_site(process, own[1]).mean(0)


def exact_table(process, k, kind="cavity"):
    t = step(process, k)[2][1]
    return LAW.denoise(process, kind)(jnp.asarray(STATES), jnp.full(9, t)).value


@pytest.mark.slow
@every_process
def test_loss_is_the_papers_and_its_excess_the_kl_of_the_classifiers(x64, process):
    """A coin or a token is drawn and classified; the excess over the exact cavity's loss is the binary KL."""
    params = table()
    for k in range(4):
        u = 1 - (k + 0.5) / 4  # the grid runs from noise to data
        loss = 0.0
        _, own, _ = step(process, k)
        kl = 0.0
        for show, chance in enumerate(shows(process, own)):
            law = said(process, k, params)[:, show]
            as_noise, as_signal, p = classifiers(process, k, lambda joint, law=law: law)
            loss += chance * -(as_noise * np.log(p) + as_signal * np.log1p(-p)).sum()
            true = as_noise / (as_noise + as_signal)
            kls = true * np.log(true / p) + (1 - true) * np.log((1 - true) / (1 - p))
            kl += chance * ((as_noise + as_signal) * kls).sum()
        ours = float(expected(glauber(process), process, params, u))
        np.testing.assert_allclose(ours, loss, rtol=1e-10)
        least = float(expected(glauber(process), process, exact_table(process, k), u))
        np.testing.assert_allclose(ours - least, kl, rtol=1e-8)
        assert kl > 1e-3


@pytest.mark.slow
@every_process
def test_the_exact_network_is_the_optimum(x64, process):
    """Zero gradient at every step, whichever kind the network predicts."""
    for k in range(4):
        u = 1 - (k + 0.5) / 4
        for kind in ("cavity", "posterior"):
            slope = value_and_slope(glauber(process, kind), process, exact_table(process, k, kind), u)[1]
            assert np.abs(slope).max() < 1e-12
        wrong = value_and_slope(glauber(process), process, table(), u)[1]
        assert np.abs(wrong).max() > 1e-3


@pytest.mark.slow
def test_no_other_network_does_as_well(x64):
    """The Hessian at the exact cavity: no direction is flat but those of a number added to all logits of a law."""
    process, k = PROCESSES[0], 1
    moved, exact = step(process, k)[0], exact_table(process, k)
    loss = lambda v: expected(glauber(process), process, exact.at[:, moved].set(v.reshape(9, 3)), 1 - (k + 0.5) / 4)
    curvature = np.linalg.eigvalsh(jax.jit(jax.hessian(loss))(exact[:, moved].ravel()))
    assert (np.abs(curvature[:9]) < 1e-12).all()
    assert curvature[9] > 1e-9


@every_process
@pytest.mark.parametrize("kind", ["cavity", "posterior"])
def test_the_heat_bath_preserves_the_law_exactly(x64, process, kind):
    """From the law at t = 1 the steps go through the exact laws at every knot, down to the data's."""
    xt = jnp.repeat(jnp.asarray(STATES), 9, axis=0)
    xs = jnp.tile(jnp.asarray(STATES), (9, 1))

    @jax.jit
    def bath(s, t):
        t = jnp.full(81, t)
        prediction = LAW.denoise(process, kind)(xt, t)
        return jnp.exp(process.heat_bath(prediction, xt, s, t).log_prob(xs).sum(-1)).reshape(9, 9)

    p = before(process, 4).sum(0)
    for k in (3, 2, 1, 0):
        _, _, (s, t) = step(process, k)
        kernel = np.asarray(bath(jnp.full(81, s), t))
        np.testing.assert_allclose(kernel.sum(1), 1.0, atol=1e-12)
        p = p @ kernel
        np.testing.assert_allclose(p, before(process, k).sum(0), atol=1e-12)
    np.testing.assert_allclose(p, np.exp(np.asarray(LAW.log_p)), atol=1e-12)


@pytest.mark.slow
def test_draws_have_the_expected_loss():
    """The objective as it is, in float32, against the enumeration over its four steps."""
    process, batch = PROCESSES[1], 40_000
    x0 = LAW.sample(random.example_keys(jax.random.key(0), batch))
    params = table().astype(jnp.float32)
    loss, slope = jax.jit(jax.value_and_grad(lambda p: glauber(process)(jax.random.key(1), look_up, p, x0)[0]))(params)
    steps = [value_and_slope(glauber(process), process, params, (k + 0.5) / 4) for k in range(4)]
    assert float(loss) == pytest.approx(np.mean([v for v, _ in steps]), rel=0.01)
    np.testing.assert_allclose(slope, np.mean([g for _, g in steps], 0), atol=1e-3)


@pytest.mark.slow
def test_one_site_one_row_and_logits_of_any_size():
    process = Staggered(Uniform(3, LogLinear(0.1)), Sweeps.cyclic((1, 1)))
    for scale in (0.0, 1e4):
        apply = lambda params, xt, t, cond, **_: params[xt]
        params = scale * jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)), jnp.float32)
        loss = lambda p, apply=apply: glauber(process)(jax.random.key(0), apply, p, jnp.zeros((1, 1, 1), int))[0]
        value, slope = jax.jit(jax.value_and_grad(loss))(params)
        assert np.isfinite(float(value))
        assert np.isfinite(np.asarray(slope)).all()


@pytest.mark.slow
def test_sites_of_weight_zero_are_shown_clean_and_cost_nothing():
    process = Staggered(Uniform(3, LogLinear(0.1)), Sweeps.shuffled((4,), rounds=2))
    x0 = Categorical(4, 3).sample(random.example_keys(jax.random.key(0), 64))
    weights = jnp.broadcast_to(jnp.asarray([1.0, 1.0, 0.0, 1.0]), x0.shape)
    params = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)), jnp.float32)

    @jax.jit
    def run(x0, weights):
        seen = []

        def apply(params, xt, t, cond, **_):
            seen.extend((xt, t))
            return params[xt]

        return glauber(process)(jax.random.key(3), apply, params, x0, weights=weights)[0], *seen

    loss = lambda x0, weights: float(run(x0, weights)[0])
    kept, (_, seen, t) = loss(x0, weights), run(x0, weights)
    np.testing.assert_array_equal(np.unique(t), process.clock.times[::-1][1:])  # the noisy ends of all steps
    np.testing.assert_array_equal(seen[:, 2], x0[:, 2])
    assert (seen != x0).any()
    assert kept == loss(x0.at[:, 2].set((x0[:, 2] + 1) % 3), weights) > 0
    assert loss(x0, jnp.ones(x0.shape)) == pytest.approx(loss(x0, None), rel=1e-6)
    # One site in four costs nothing and the mean is over the others: about the same.
    assert kept == pytest.approx(loss(x0, None), rel=0.3)


@pytest.mark.slow
def test_processes_from_which_nothing_can_be_learned_are_refused():
    sweeps = Sweeps.cyclic((2,), rounds=2)
    for process in (Uniform(3), Staggered(Uniform(3), Windows(0.0, 1.0)), Staggered(PROCESSES[0], sweeps)):
        with pytest.raises(ValueError, match="glauber needs Staggered"):
            glauber(process)
    never_drawn = Marginal(3, LogLinear(0.1), probabilities=[0.5, 0.5, 0.0])
    for inner in (Masked(3, LogLinear(0.1)), Uniform(3), Hybrid(3), never_drawn):
        with pytest.raises(ValueError, match="glauber tells noise from signal"):
            glauber(Staggered(inner, sweeps))
    with pytest.raises(ValueError, match="does not understand"):
        glauber(PROCESSES[0], "deaths")
    with pytest.raises(ValueError, match=r"for a state of shape \(2, 2\) must have shape \(2, 2, 3\)"):
        glauber(PROCESSES[0])(jax.random.key(0), lambda *_, **__: jnp.zeros((2, 2, 4)), {}, jnp.zeros((2, 2), int))
