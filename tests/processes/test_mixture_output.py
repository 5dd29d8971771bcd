"""Reverse steps that are mixtures: exact on data that are points, in any number of steps, where one normal is not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import ddjax
from ddjax import random
from ddjax.likelihood import binned
from ddjax.objectives import elbo, mixture_steps
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian, LearnedVariance, MixtureOutput
from ddjax.schedules import CondOT, VPCosine
from ddjax.solvers import Ancestral

ATOMS, P = np.asarray([-1.0, 1.0]), np.asarray([0.3, 0.7])
ENTROPY = -(P * np.log(P)).sum()
GRID = (1.0, 0.5, 0.02)  # no data is left at 1 (alpha = 0), and nothing to say at 0.02
PROCESS = MixtureOutput(VPCosine())


def logits(xt, t):
    """p(x0 | x_t), unnormalised."""
    alpha, sigma = VPCosine().alpha(t)[:, None, None], VPCosine().sigma(t)[:, None, None]
    return jnp.log(P) - 0.5 * ((xt[..., None] - alpha * ATOMS) / sigma) ** 2


def true_mixture(params, xt, t, cond, *, rng=None, train=False):
    said = logits(xt, t)
    return jnp.concatenate([jnp.broadcast_to(ATOMS, said.shape), said], -1)


def posterior_mean(params, xt, t, cond, *, rng=None, train=False):
    return (jax.nn.softmax(logits(xt, t)) * ATOMS).sum(-1)


@pytest.fixture
def expected(monkeypatch):
    """An objective's expectation over the step, the atom, x_t and x_s, by the trapezoidal rule on the noises."""

    def run(objective, apply, both=True, nodes=121):
        z, h = np.linspace(-8.0, 8.0, nodes, retstep=True)
        wz = h * np.exp(-0.5 * z**2) / np.sqrt(2.0 * np.pi)
        steps = len(GRID) - 1
        grid = np.meshgrid(np.arange(steps), [0, 1], np.arange(nodes), np.arange(nodes if both else 1), indexing="ij")
        n, a, i, j = (g.ravel() for g in grid)
        weights = P[a] * wz[i] * (wz[j] if both else 1.0) / steps
        drawn, half = {}, 10**8
        monkeypatch.setattr(random, "example_keys", lambda key, rows: rows)
        monkeypatch.setattr(random, "split", lambda keys, num=2: (keys, keys + half))
        monkeypatch.setattr(random, "stratified", lambda key, rows, dtype=None: drawn["u"])
        noise = lambda keys, shape, dtype=None: jnp.where((keys < half)[:, None], drawn["first"], drawn["second"])
        monkeypatch.setattr(random, "normal", noise)

        @jax.jit
        def cost(x0, weights, **draws):
            drawn.update(draws)
            return objective(jax.random.key(0), apply, {}, x0, None, weights, train=False)[0]

        draws = {"u": (n + 0.5) / steps, "first": z[i][:, None], "second": z[j][:, None]}
        return float(cost(ATOMS[a][:, None], weights, **draws)) * weights.sum()

    return run


def test_the_true_mixture_costs_the_entropy_in_two_steps_and_one_normal_more(x64, expected):
    """The bound's ends are 0 here. The closed form of `step_kl` lies between, and is that of a normal for one."""
    mixture = expected(mixture_steps(PROCESS, "x0", GRID), true_mixture)
    np.testing.assert_allclose(mixture, ENTROPY, atol=1e-8)
    normal = expected(elbo(Gaussian(VPCosine()), "x0", times=GRID), posterior_mean, both=False)
    assert normal > ENTROPY + 10.0  # one normal, the best mean
    closed = expected(elbo(PROCESS, "x0", times=GRID), true_mixture, both=False)
    assert ENTROPY < closed < ENTROPY + 0.5
    alone = expected(elbo(PROCESS, "x0", times=GRID), posterior_mean, both=False)
    np.testing.assert_allclose(alone, normal, rtol=1e-10)


@pytest.mark.slow
def test_so_does_one_normal_of_the_best_width(x64, expected):
    """Even with a learned variance two steps of normals cost more than the entropy."""
    wide, best = LearnedVariance(VPCosine()), np.inf
    for v in (-1.0, 0.0, 0.5, 0.8, 0.9, 1.0):
        two = lambda *args, v=v, **kw: jnp.concatenate([posterior_mean(*args, **kw), jnp.full_like(args[1], v)], -1)
        best = min(best, expected(elbo(wide, "x0", times=GRID), two, both=False))
    assert best > ENTROPY + 0.1


def levels(process, x0, prediction, x_low, low):
    """The plain process's decoder: binned ones refuse a process whose sites go together."""
    return binned((-1.0, 1.0))(Gaussian(process.schedule), x0, prediction, x_low, low)


@pytest.mark.slow
def test_the_evaluator_bounds_it_and_two_steps_sample_it():
    """`likelihood.nelbo` with the closed form, from above; ancestral samples are the points in their proportions."""
    n = 4000
    denoise = ddjax.bind(true_mixture, {}, PROCESS, "x0")
    x0 = jnp.where(jnp.arange(n) < 0.3 * n, -1.0, 1.0)[:, None]
    bound = ddjax.likelihood.nelbo(
        jax.random.key(0), denoise, PROCESS, x0, times=jnp.asarray(GRID), num_times=2, reconstruction=levels
    )
    error = float(bound.total.std()) / np.sqrt(n)
    assert ENTROPY - 3 * error < float(bound.total.mean()) < ENTROPY + 0.5
    samples = ddjax.sample(
        jax.random.key(1), denoise, PROCESS, shape=(n, 1), solver=Ancestral(PROCESS), times=jnp.asarray(GRID)
    ).x0
    assert (np.abs(np.abs(samples) - 1.0) < 6 * 0.044).all()
    assert abs(float((samples > 0).mean()) - 0.7) < 4.5 * np.sqrt(0.21 / n)


def some_prediction(rng, kind="x0"):
    return Prediction(jnp.asarray(rng.normal(size=(1, 2, 6))), kind)


@pytest.mark.slow
def test_a_steps_density_is_the_mixtures_and_its_draws_and_mean_follow(x64):
    """Two sites, three components: the joint density against SciPy, its integral, its mean; draws by their moments."""
    process, rng = MixtureOutput(CondOT(), components=3), np.random.default_rng(0)
    said, xt, xs = some_prediction(rng), jnp.asarray(rng.normal(size=(1, 2))), jnp.asarray(rng.normal(size=(1, 2)))
    s, t = jnp.asarray([0.4]), jnp.asarray([0.8])
    step = process.reverse(said, xt, s, t)
    plain = Gaussian(CondOT())
    total = np.asarray(said.value[0, :, 3:]).sum(0)  # over the sites
    weights = np.exp(total) / np.exp(total).sum()
    bridges = [plain.bridge(said.value[..., k], xt, s, t) for k in range(3)]
    density = lambda x: sum(
        w * scipy.stats.norm(np.asarray(b.mean[0]), np.asarray(b.std[0])).pdf(x).prod(-1)
        for w, b in zip(weights, bridges, strict=True)
    )
    np.testing.assert_allclose(step.log_prob(xs).sum(), np.log(density(np.asarray(xs[0]))), rtol=1e-11)
    true = plain.bridge(xt - 0.2, xt, s, t)
    nats = process.step_nats(xt - 0.2, said, xt, xs, s, t)
    np.testing.assert_allclose(nats.sum(), true.log_prob(xs).sum() - np.log(density(np.asarray(xs[0]))), rtol=1e-10)
    axis, h = np.linspace(-6.0, 6.0, 241, retstep=True)
    square = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    ours = np.exp(np.asarray(jax.jit(lambda x: jax.vmap(lambda x: step.log_prob(x[None]).sum())(x))(square)))
    np.testing.assert_allclose(h**2 * ours.sum(), 1.0, atol=1e-9)
    mean = h**2 * ours @ square
    x0 = process.convert(said, "x0", xt, t)
    np.testing.assert_allclose(plain.bridge(x0.value, xt, s, t).mean[0], mean, atol=1e-8)
    velocity = process.convert(said, "velocity", xt, t).value
    np.testing.assert_allclose(velocity, plain.convert(x0, "velocity", xt, t).value, rtol=1e-12)
    # A statement of another kind is converted component by component.
    noises = process.convert(some_prediction(rng, "noise"), "x0", xt, t)
    assert noises.value.shape == xt.shape
    # The step's divergence is at most the closed form, by integration.
    q = np.exp(np.asarray(jax.jit(jax.vmap(lambda x: true.log_prob(x[None]).sum()))(jnp.asarray(square))))
    kl = h**2 * (q * (np.log(q) - np.log(ours))).sum()
    closed = float(process.step_kl(xt - 0.2, said, xt, s, t).sum())
    assert 0 < kl < closed < kl + 1.0


@pytest.mark.slow
def test_draws_choose_one_component_for_all_sites():
    n = 20_000
    said = jnp.broadcast_to(jnp.asarray([[-1.0, 1.0, 0.2, 0.0], [-1.0, 1.0, 0.0, 0.5]]), (n, 2, 4))
    process = MixtureOutput(CondOT())
    xt = jnp.zeros((n, 2))
    step = process.reverse(Prediction(said, "x0"), xt, jnp.asarray(0.1), jnp.asarray(0.9))
    x = np.asarray(step.sample(random.example_keys(jax.random.key(0), n)))
    high = x > 0
    assert (high[:, 0] == high[:, 1]).mean() > 0.999
    share = 1.0 / (1.0 + np.exp(0.2 - 0.5))
    assert abs(high[:, 0].mean() - share) < 4.5 * np.sqrt(0.25 / n)


@pytest.mark.slow
def test_losses_and_gradients_are_finite_in_float32():
    process, rng = MixtureOutput(VPCosine(), components=3), np.random.default_rng(0)
    params = jnp.asarray(rng.normal(size=(2, 12)), jnp.float32)
    apply = lambda params, xt, t, cond, **options: 30.0 * jnp.tanh(xt @ params) + t[:, None]
    x0 = jnp.asarray(rng.normal(size=(5, 2)), jnp.float32)
    for objective in (mixture_steps(process, "noise", (0.98, 0.6, 0.01)), elbo(process, "x0", times=(1.0, 0.6, 0.01))):
        loss, slope = jax.jit(jax.value_and_grad(lambda p, f=objective: f(jax.random.key(0), apply, p, x0)[0]))(params)
        assert np.isfinite(loss)
        assert np.isfinite(slope).all()
        assert np.abs(slope).max() > 0


@pytest.mark.slow
def test_errors_say_what_is_wrong():
    process, x0 = MixtureOutput(VPCosine(), components=3), jnp.zeros((5, 2))
    assert dataclasses.replace(process, components=2) != process
    with pytest.raises(ValueError, match="components"):
        MixtureOutput(VPCosine(), components=0)
    with pytest.raises(ValueError, match="6 numbers"):
        process.split(Prediction(jnp.zeros((5, 2, 4)), "x0"), x0, 0.5)
    with pytest.raises(ValueError, match="grid"):
        mixture_steps(process, "x0", (0.5,))
    with pytest.raises(ValueError, match="MixtureOutput mixes sites"):
        mixture_steps(process, "x0", (1.0, 0.1))(jax.random.key(0), true_mixture, {}, x0, weights=jnp.ones_like(x0))
