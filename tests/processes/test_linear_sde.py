"""Linear SDEs with auxiliary variables against integrated moments, matrices and the theory of Gaussian data."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
from gaussian_law import GaussianLaw, affine, expected_bound

import ddjax
from ddjax import random
from ddjax.likelihood import nelbo
from ddjax.objectives import learned_elbo
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian, LinearSDE, critically_damped
from ddjax.schedules import VPCosine, VPLinear
from ddjax.solvers import Ancestral, Heun

RNG = np.random.default_rng(5)
DAMPED = critically_damped(data_std=0.8)
# Three parts, one of them data, noise of rank 2; and two parts that are both data (Du et al.'s flexible SDE).
GENERAL = LinearSDE(RNG.normal(size=(3, 2)), RNG.normal(size=(3, 3)), scale=(1.3, 0.6, 0.9), start=0.5)
FLEXIBLE = LinearSDE(RNG.normal(size=(2, 2)), RNG.normal(size=(2, 2)), data=2, scale=(1.0, 0.7))
PROCESSES = [DAMPED, GENERAL, FLEXIBLE]
every = pytest.mark.parametrize("process", PROCESSES, ids=["damped", "general", "flexible"])


@functools.lru_cache(maxsize=4096)
def one_site(process, t, start=0.0):
    """M and C of one site at t (and from `start`, E and C), by integrating the moments' equations."""
    n, d = process.parts, process.data
    noise, rotation, scale = np.asarray(process.noise), np.asarray(process.rotation), np.diag(process.scale)
    drift = -scale @ (0.5 * noise @ noise.T + 0.5 * (rotation - rotation.T)) @ np.linalg.inv(scale)
    spread = scale @ noise @ noise.T @ scale
    beta = lambda t: 0.1 + 19.9 * t  # VPLinear's

    def slope(t, y):
        e, c = y.reshape(2, n, n)
        a = beta(t) * drift
        return np.stack([a @ e, a @ c + c @ a.T + beta(t) * spread]).ravel()

    begin = np.stack([np.eye(n), np.zeros((n, n))])
    e, c = (
        begin
        if t == start
        else scipy.integrate.solve_ivp(slope, (start, t), begin.ravel(), method="DOP853", rtol=1e-12, atol=1e-14)
        .y[:, -1]
        .reshape(2, n, n)
    )
    if start > 0:
        return e, c
    others = process.start * (e @ scale)[:, d:]
    return e[:, :d], c + others @ others.T


def moments(process, groups, t):
    """The same for a state of `groups` groups, flat."""
    return tuple(np.kron(v, np.eye(groups)) for v in one_site(process, float(t)))


@functools.partial(jax.jit, static_argnums=0)
def laws(process, x0, guess, xt, s, t):
    """All that a step says, compiled at once."""
    prediction = Prediction(guess, "x0")
    marginal, bridge = process.marginal(x0, t), process.bridge(x0, xt, s, t)
    reverse = process.reverse(prediction, xt, s, t)
    return {
        "marginal": (marginal.mean, marginal.root),
        "log_prob": marginal.log_prob(xt),
        "bridge": (bridge.mean, bridge.root),
        "reverse": reverse.mean,
        "step_kl": process.step_kl(x0, prediction, xt, s, t),
        "path_kl": process.path_kl(x0, prediction, xt, t),
        "prior_kl": process.prior_kl(x0, t),
        "reconstruction": process.reconstruction(x0, prediction, xt, t),
        "sde": process.sde(t[0]),
    }


def square(root):
    """The covariance of two groups that a law's root (the same for all examples) stands for."""
    root = np.reshape(root, (-1, *np.shape(root)[-2:]))[0]
    return np.kron(root @ root.T, np.eye(2))


def states(process, seed, groups=2, batch=3):
    rng = np.random.default_rng(seed)
    data, entries = process.data * groups, process.parts * groups
    return (jnp.asarray(rng.normal(size=(batch, n))) for n in (data, data, entries))


@pytest.mark.slow
@every
def test_moments_bridge_and_bound_are_linear_algebra(x64, process):
    """Moments against the integrated equations to 1e-8, the rest against matrices made of those."""
    x0, guess, xt = states(process, 0)
    wide = functools.partial(moments, process, 2)
    for s, t in ((0.3, 0.6), (0.05, 0.7)):
        got = laws(process, x0, guess, xt, jnp.full(3, s), jnp.full(3, t))
        (m_s, c_s), (m_t, c_t) = wide(s), wide(t)
        mean, root = got["marginal"]
        np.testing.assert_allclose(mean, x0 @ m_t.T, atol=1e-8)
        np.testing.assert_allclose(square(root), c_t, atol=1e-8)
        off = xt - x0 @ m_t.T
        density = -0.5 * np.einsum("bi,ij,bj->b", off, np.linalg.inv(c_t), off)
        np.testing.assert_allclose(
            got["log_prob"].sum(-1), density - 0.5 * np.linalg.slogdet(2 * np.pi * c_t)[1], rtol=1e-7
        )
        step, fresh = (np.kron(v, np.eye(2)) for v in one_site(process, t, s))
        gain = np.linalg.solve(step @ c_s @ step.T + fresh, step @ c_s).T
        rest = c_s - gain @ step @ c_s
        mean, root = got["bridge"]
        np.testing.assert_allclose(mean, x0 @ m_s.T + off @ gain.T, atol=1e-7)
        np.testing.assert_allclose(square(root), rest, atol=1e-7)
        model = guess @ m_s.T + (xt - guess @ m_t.T) @ gain.T
        np.testing.assert_allclose(got["reverse"], model, atol=1e-7)
        difference = mean - model
        kl = 0.5 * np.einsum("bi,ij,bj->b", difference, np.linalg.inv(rest), difference)
        np.testing.assert_allclose(got["step_kl"].sum(-1), kl, rtol=1e-5, atol=1e-8)
        # The path's KL: half the squared difference of the drifts, where there is noise, over the noise.
        a, spread = (np.kron(v, np.eye(2)) for v in got["sde"])
        score = np.linalg.solve(c_t, m_t @ np.asarray(x0 - guess).T)
        np.testing.assert_allclose(
            got["path_kl"].sum(-1), 0.5 * np.einsum("ib,ij,jb->b", score, spread, score), rtol=1e-6
        )
        prior = c_t + process.data_std**2 * m_t @ m_t.T
        far = np.einsum("bi,ij,bj->b", x0 @ m_t.T, np.linalg.inv(prior), x0 @ m_t.T)
        kl = 0.5 * (np.trace(np.linalg.solve(prior, c_t)) - len(prior) + far)
        kl += 0.5 * (np.linalg.slogdet(prior)[1] - np.linalg.slogdet(c_t)[1])
        np.testing.assert_allclose(got["prior_kl"].sum(-1), kl, rtol=1e-5, atol=1e-9)
        info = m_t.T @ np.linalg.solve(c_t, m_t)
        off = x0 - np.linalg.solve(info, m_t.T @ np.linalg.solve(c_t, np.asarray(xt).T)).T
        nats = 0.5 * np.einsum("bi,ij,bj->b", off, info, off) - 0.5 * np.linalg.slogdet(info / (2 * np.pi))[1]
        np.testing.assert_allclose(got["reconstruction"].sum(-1), nats, rtol=1e-6)
        # N(0, scale^2) is stationary.
        stationary = np.kron(np.diag(np.square(process.scale)), np.eye(2))
        np.testing.assert_allclose(a @ stationary + stationary @ a.T + spread, 0.0, atol=1e-10)


def test_noise_alone_is_the_variance_preserving_process(x64):
    process, plain = LinearSDE([[1.0]], [[0.0]], data_std=0.7), Gaussian(VPLinear(), 0.7)
    x0, guess, xt = states(process, 0)
    s, t = jnp.full(3, 0.3), jnp.full(3, 0.6)
    ours, prediction = laws(process, x0, guess, xt, s, t), Prediction(guess, "x0")
    for name, arguments in {
        "path_kl": (x0, prediction, xt, t),
        "step_kl": (x0, prediction, xt, s, t),
        "reconstruction": (x0, prediction, xt, t),
        "prior_kl": (x0, t),
    }.items():
        np.testing.assert_allclose(ours[name], getattr(plain, name)(*arguments), rtol=1e-8)
    bridge = plain.bridge(x0, xt, s, t)
    np.testing.assert_allclose(ours["bridge"][0], bridge.mean, atol=1e-11)
    np.testing.assert_allclose(np.ravel(ours["bridge"][1])[0], bridge.std[0, 0], rtol=1e-10)
    # The default range is one of log J, in the data's own units; while it learns, the schedule's.
    np.testing.assert_allclose(VPLinear().log_snr(jnp.asarray(process.t_range)), [13.0, -10.0], atol=0.02)
    wide = LinearSDE([[1.0]], [[0.0]], scale=(2.0,)).t_range
    np.testing.assert_allclose(
        VPLinear().log_snr(jnp.asarray(wide)), 2 * np.log(2) + np.array([13.0, -10.0]), atol=0.02
    )
    learned = process.with_parameters(process.parameters)
    assert learned.t_range == plain.t_range
    np.testing.assert_allclose(process.time_at(jnp.asarray([0.0, 1.0]), (0.2, 0.8))[0], [0.2, 0.8], rtol=1e-12)


@pytest.mark.slow
def test_critically_damped_is_the_papers_sde(x64):
    """Dockhorn et al. 2022, eq. 5-6, with their beta = 4 and M = 1/4: a constant rate, the same at all times."""
    mass, beta = 0.25, 4.0
    friction = 2 * np.sqrt(mass)
    process = critically_damped(VPLinear(beta, beta), mass=mass)
    for t in (0.01, 0.7):
        drift, spread = process.sde(jnp.asarray(t))
        np.testing.assert_allclose(drift, beta * np.array([[0, 1 / mass], [-1, -friction / mass]]), atol=1e-12)
        np.testing.assert_allclose(spread, [[0, 0], [0, 2 * friction * beta]], atol=1e-12)
    # The data's variance from rest (x_0 = v_0 = 0), and E[x_t] = (1 + y) exp(-y) x_0 with y = 2 tau = 2 beta t.
    law = critically_damped(VPLinear(beta, beta), start=0.0).marginal(jnp.ones((1, 1)), jnp.asarray([0.3]))
    np.testing.assert_allclose(law.mean[0, 0], (1 + 2.4) * np.exp(-2.4), rtol=1e-10)
    np.testing.assert_allclose(law.root[0, 0, 0] ** 2, scipy.special.gammainc(3, 4.8), rtol=1e-10)


@pytest.mark.slow
def test_draws_priors_and_data(x64):
    """Draws are the centre and the root times normals; the prior is the marginal of data of the given width."""
    keys = lambda: random.example_keys(jax.random.key(0), 3)
    process, t = GENERAL, jnp.full(3, 0.6)
    x0, _, xt = states(process, 0)
    law, z = process.marginal(x0, t), np.asarray(random.normal(keys(), (3, 2), jnp.float64))
    m, c = moments(process, 2, 0.6)
    root = np.kron(np.linalg.cholesky(one_site(process, 0.6)[1]), np.eye(2))
    np.testing.assert_allclose(law.sample(keys()), x0 @ m.T + z.reshape(3, -1) @ root.T, atol=1e-7)
    np.testing.assert_array_equal(process.observe(keys(), x0, t), law.sample(keys()))
    np.testing.assert_allclose(square(process.prior((3, 6), 0.6).root), c + m @ m.T, atol=1e-7)
    assert process.clean(xt).shape == x0.shape
    np.testing.assert_array_equal(FLEXIBLE.clean(xt), xt)
    # Learned: as many doublings as any parameters may need.
    learned = process.with_parameters(process.parameters).marginal(x0, jnp.ones(3))
    np.testing.assert_allclose(learned.root, process.marginal(x0, jnp.ones(3)).root, atol=1e-12)
    # At t = 0 the state's own data are what it says, whatever its noise is said to be.
    said = process.convert(Prediction(xt, "noise"), "x0", xt, jnp.zeros(3)).value
    np.testing.assert_allclose(said, process.clean(xt), rtol=1e-12)


def test_short_times_keep_their_digits():
    """From rest, critically damped diffusion has the variance gammainc(3, 2 y) in x, y = 2 tau: 4 y^3 / 3 at first."""
    process, t = critically_damped(start=0.0), np.geomspace(1e-4, 1.0, 30, dtype=np.float32)
    y = 2.0 * (0.1 * t.astype(float) + 0.5 * 19.9 * t.astype(float) ** 2)
    root = jax.jit(lambda t: process.marginal(jnp.zeros((30, 1)), t).root)(jnp.asarray(t))
    np.testing.assert_allclose(np.asarray(root)[..., 0, 0].ravel() ** 2, scipy.special.gammainc(3, 2 * y), rtol=3e-5)


@pytest.mark.slow
@every
def test_nelbo_is_the_theory_on_gaussian_data(x64, process):
    groups = 2 if process.data == 1 else 1
    law, entries = GaussianLaw.random(2), groups * process.parts
    at, (low, high) = functools.partial(moments, process, groups), (0.15, 0.8)
    m, c = at(high)

    def noisy(d, z):
        return d.mean + (d.root @ z.reshape(len(z), process.parts, groups)).reshape(len(z), -1)

    exact = law.bound(at, low, high, c + process.data_std**2 * m @ m.T)
    shift = np.array([0.3, -0.2])
    ours = expected_bound(process, law, at, noisy, entries, (low, high), order=12)
    np.testing.assert_allclose(ours, exact, atol=1e-7)
    shifted = expected_bound(process, law, at, noisy, entries, (low, high), order=12, shift=shift)
    information = [m.T @ np.linalg.solve(c, m) for m, c in (at(low), at(high))]
    np.testing.assert_allclose(shifted[1] - ours[1], 0.5 * shift @ (information[0] - information[1]) @ shift, rtol=1e-7)


@pytest.mark.slow
@every
def test_conversions_are_their_definitions(x64, process):
    x0, _, z = states(process, 3, groups=1)
    t = jnp.full(3, 0.4)
    m, c = one_site(process, 0.4)
    root, rate = np.linalg.cholesky(c), 0.1 + 19.9 * 0.4
    xt = x0 @ m.T + z @ root.T
    noise, rotation, scale = np.asarray(process.noise), np.asarray(process.rotation), np.diag(process.scale)
    d, q = 0.5 * noise @ noise.T, 0.5 * (rotation - rotation.T)
    score = -np.linalg.solve(c, (xt - x0 @ m.T).T).T
    drift = -scale @ (d + q) @ np.linalg.inv(scale)
    true = {
        "x0": x0,
        "noise": z,
        "score": score,
        "velocity": rate * (xt @ drift.T - score @ (scale @ d @ scale).T),
    }

    @jax.jit
    def convert(values):
        ends = (*process.kinds, "velocity")
        return {(a, b): process.convert(Prediction(values[a], a), b, xt, t).value for a in process.kinds for b in ends}

    for (_, end), value in convert({k: jnp.asarray(v) for k, v in true.items()}).items():
        np.testing.assert_allclose(value, true[end], atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("solver", [Heun, Ancestral], ids=lambda s: s.__name__)
def test_samplers_reach_the_law(x64, solver):
    """Steps are affine for Gaussian data, so that the law of what they make is known exactly."""
    law, errors = GaussianLaw(np.array([0.4]), np.array([[0.5]])), []
    at = functools.partial(moments, DAMPED, 1)
    for steps in (128, 256) if solver is Heun else (32, 64):
        times = np.linspace(0.4, 0.1, steps + 1)
        denoise, make = law.denoise(at, times), solver(DAMPED)

        @jax.jit
        def step(x, t, s, denoise=denoise, make=make):
            if solver is Heun:
                return make.step(random.example_keys(jax.random.key(0), 3), (), x, t, s, denoise)[0], jnp.zeros((2, 2))
            reverse = DAMPED.reverse(denoise(x, jnp.full(len(x), t)), x, s, t)
            return reverse.mean, reverse.root.reshape(-1, 2, 2)[0]

        def noisy_law(t):
            m, c = at(t)
            return m @ law.mean, m @ law.covariance @ m.T + c

        mean, c = noisy_law(times[0])
        for t, s in itertools.pairwise(times):
            t, s = jnp.asarray(t), jnp.asarray(s)
            matrix, offset = affine(lambda x, t=t, s=s: step(x, t, s)[0], 2)
            root = np.asarray(step(jnp.zeros((3, 2)), t, s)[1])
            mean, c = matrix @ mean + offset, matrix @ c @ matrix.T + root @ root.T
        errors.append(np.abs(c - noisy_law(times[-1])[1]).max() + np.abs(mean - noisy_law(times[-1])[0]).max())
    assert errors[1] < 0.03
    assert abs(np.log2(errors[0] / errors[1]) - (2 if solver is Heun else 1)) < 0.35, errors


def test_the_bounds_gradient_by_its_parameters(x64):
    """What learns the process: `learned_elbo` at fixed draws, against finite differences."""
    objective = learned_elbo(DAMPED, "x0", t_range=(0.1, 0.9))
    apply = lambda params, xt, t, cond, **_: 0.5 * xt[..., :2]
    x0 = jnp.asarray(np.random.default_rng(0).normal(size=(8, 2)))
    loss = jax.jit(lambda p: objective(jax.random.key(0), apply, {"network": {}, "process": p}, x0)[0])
    start = DAMPED.parameters
    gradient, eps = jax.jit(jax.grad(loss))(start), 1e-5
    for name, at in (("noise", (1, 0)), ("rotation", (0, 1))):
        ends = [loss(start | {name: start[name].at[at].add(e)}) for e in (eps, -eps)]
        np.testing.assert_allclose(gradient[name][at], (ends[0] - ends[1]) / (2 * eps), rtol=1e-5)


def test_images_bound_and_sample_in_float32():
    """Three channels share their matrices; the default range, both ends of time, and the sampler are finite."""
    process = DAMPED
    x0 = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 3)), jnp.float32)
    denoise = lambda xt, t, cond: Prediction(0.5 * process.clean(xt), "x0")
    bound = nelbo(jax.random.key(0), denoise, process, x0, num_times=4)
    assert np.isfinite(np.asarray(bound.total)).all()
    out = ddjax.sample(
        jax.random.key(0), denoise, process, shape=(2, 4, 4, 6), solver=Ancestral(process), times=jnp.linspace(1, 0, 5)
    )
    assert process.clean(out.x0).shape == x0.shape
    assert np.isfinite(np.asarray(out.x0)).all()

    @jax.jit
    def ends(value, t):
        xt = process.marginal(x0, t).mean
        return sum(
            (process.convert(Prediction(value, "x0"), end, xt, t).value ** 2).sum() for end in ("noise", "score")
        )

    for t in (0.0, 1.0):
        value, gradient = jax.value_and_grad(ends)(x0, jnp.full(2, t))
        assert np.isfinite(float(value))
        assert np.isfinite(np.asarray(gradient)).all()


def test_errors():
    for bad, what in (
        (lambda: LinearSDE([[1.0]], [[0.0, 1.0]]), "noise"),
        (lambda: LinearSDE([[1.0]], [[0.0]], data=2), "data"),
        (lambda: LinearSDE([[1.0]], [[0.0]], scale=(0.0,)), "scale"),
        (lambda: LinearSDE([[1.0]], [[0.0]], start=-1.0), "start"),
        (lambda: LinearSDE([[1.0]], [[0.0]], VPCosine(0.0)), "t = 1"),
        (lambda: critically_damped(mass=0.0), "mass"),
        (lambda: DAMPED.prior((2, 3)), "multiple of 2"),
        (lambda: DAMPED.marginal(jnp.zeros((2, 3)), jnp.zeros((2, 3))), "shares its time"),
        (lambda: DAMPED.convert(Prediction(jnp.zeros((1, 2)), "velocity"), "x0", jnp.zeros((1, 2)), 0.5), "understand"),
        (lambda: nelbo(jax.random.key(0), None, DAMPED, jnp.zeros((1, 1)), known=jnp.ones((1, 1), bool)), "mixes"),
    ):
        with pytest.raises(ValueError, match=what):
            bad()
    assert critically_damped() == critically_damped() != critically_damped(mass=0.3)
