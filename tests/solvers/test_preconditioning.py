"""Preconditioned drifts: exact inverses, the law that Langevin steps leave, and published recurrences."""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from ode_laws import check_rows_are_their_own

import ddjax
from ddjax import grids
from ddjax.fixtures import GaussianMixture
from ddjax.gaussian_law import GaussianLaw
from ddjax.predictions import Prediction
from ddjax.processes import PFGM, Gaussian
from ddjax.schedules import CondOT, VPCosine
from ddjax.solvers import (
    DDIM,
    ExactHessian,
    FixedHessian,
    Given,
    Langevin,
    LevenbergMarquardt,
    Preconditioned,
    PredictorCorrector,
    dpm_solver_multistep,
    dpm_solver_pp,
    euler,
)
from ddjax.solvers.preconditioning import LowRank

DIMS, DAMPING = 3, 0.2
PROCESS, T = Gaussian(CondOT()), 0.3  # alpha 0.7, sigma 0.3


@functools.cache
def law():
    """Ill-conditioned Gaussian data, and H = sigma^2 (alpha^2 C + sigma^2)^-1 by linear algebra."""
    u = np.linalg.qr(np.random.default_rng(0).normal(size=(DIMS, DIMS)))[0]
    v = np.array([9.0, 0.5, 0.01])
    h = 0.09 * np.linalg.inv(0.49 * (u.T * v) @ u + 0.09 * np.eye(DIMS))
    return GaussianLaw(np.full((1, DIMS), 0.2), u[None], v[None], [0.0]), h


def damped(h, damping=DAMPING):
    return damping * np.linalg.inv(h + damping * np.eye(len(h)))


def states(n=2, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, DIMS)))


def test_low_rank_is_the_inverse_and_its_root(x64):
    """Vectors of any angles, and none; at full rank, with the roots of H as vectors, the inverse of H itself."""
    h = law()[1]
    both = jax.jit(
        lambda v: tuple(f(jnp.eye(DIMS)).T for f in (LowRank(v[None], DAMPING).apply, LowRank(v[None], DAMPING).root))
    )
    some = np.random.default_rng(1).normal(size=(3, DIMS))
    some[2] = 0.0
    for vectors in (some, np.linalg.cholesky(h).T):
        (inverse, root), want = both(jnp.asarray(vectors)), damped(vectors.T @ vectors)
        np.testing.assert_allclose(inverse, want, atol=1e-12)
        np.testing.assert_allclose(root, scipy.linalg.sqrtm(want).real, atol=1e-12)


def test_the_exact_hessian_of_a_gaussian(x64):
    """In closed form and by differentiating the denoiser: the score times (H + lambda)^-1."""
    exact, h = law()
    x, t = states(), jnp.full(2, T)
    score = jax.jit(lambda x: exact.score(PROCESS, x, t))(x)
    want = np.asarray(score) @ damped(h)
    for preconditioner in (ExactHessian(DAMPING, exact), ExactHessian(DAMPING)):

        @jax.jit
        def both(x, score, preconditioner=preconditioner):
            metric, _ = preconditioner.metric((), score, x, t, exact.denoise(PROCESS, "noise"), PROCESS, None)
            return metric.apply(score), metric.root(metric.root(score))

        for got in both(x, score):
            np.testing.assert_allclose(got, want, atol=1e-10)
    full = LowRank(jnp.asarray(np.linalg.cholesky(h).T)[None], DAMPING)
    np.testing.assert_allclose(full.apply(score), want, atol=1e-10)


@pytest.mark.slow
def test_the_exact_hessian_of_a_mixture(x64):
    """By differentiating the density twice; curvature that is not concave counts as none."""
    mixture, t = GaussianMixture(dims=DIMS, spread=2.0), 0.5
    alpha, sigma = 0.5, 0.5
    x = states(4)
    log_p = lambda x: mixture.log_prob(x[None], alpha, sigma)[0]
    hessians = -(sigma**2) * np.asarray(jax.jit(jax.vmap(jax.hessian(log_p)))(x))
    assert (np.linalg.eigvalsh(hessians) < 0).any()
    metric, _ = ExactHessian(DAMPING).metric((), x, x, jnp.asarray(t), mixture.denoise(PROCESS), PROCESS, None)
    for i, h in enumerate(hessians):
        values, u = np.linalg.eigh(h)
        want = (u * (DAMPING / (np.maximum(values, 0) + DAMPING))) @ u.T
        np.testing.assert_allclose(metric.apply(x)[i], want @ x[i], atol=1e-8)


class Rows(NamedTuple):
    """Normals that are given as they are."""

    z: jax.Array

    def init(self, x):
        return ()

    def draw(self, state, keys, x, t, s):
        return self.z, state


def affine(corrector, exact):
    """The step's matrix, and what multiplies its noise."""
    denoise, nothing, eye = exact.denoise(PROCESS), np.zeros((1, DIMS)), np.eye(DIMS)

    @jax.jit
    def step(x, z):
        own = dataclasses.replace(corrector, rule="level", noise=Rows(z))
        return own.correct(None, own.init(x), x, jnp.asarray(T), denoise)[0]

    rows = step(np.concatenate([nothing, eye, 0 * eye]), np.concatenate([nothing, 0 * eye, eye]))
    rows = np.asarray(rows[1:] - rows[0])
    return rows[:DIMS].T, rows[DIMS:].T


@pytest.fixture
def any_keys(monkeypatch):
    """`Given` noise asks for no keys."""
    monkeypatch.setattr("ddjax.random.fold_in", lambda keys, data: keys)


@pytest.mark.usefixtures("any_keys")
def test_langevin_leaves_the_law_as_it_is(x64):
    """Its stationary covariance, from Lyapunov's equation, tends to the marginal's at first order, whatever P is."""
    exact, h = law()
    marginal = 0.09 * np.linalg.inv(h)
    vectors, errors = np.random.default_rng(1).normal(size=(2, DIMS)), []  # P does not commute with H
    for size in (0.1, 0.05):
        b, noise = affine(Langevin(PROCESS, size, preconditioner=FixedHessian(vectors, DAMPING)), exact)
        p, e = damped(vectors.T @ vectors), size * 0.09
        np.testing.assert_allclose(b, np.eye(DIMS) - size * p @ h, atol=1e-12)
        np.testing.assert_allclose(noise @ noise.T, 2 * e * p, atol=1e-12)
        stationary = scipy.linalg.solve_discrete_lyapunov(b, noise @ noise.T)
        errors.append(np.abs(stationary - marginal).max())
    assert 1.8 < errors[0] / errors[1] < 2.2
    # Where P is a function of H itself, each direction's variance is known.
    size = 0.3
    b, noise = affine(Langevin(PROCESS, size, preconditioner=ExactHessian(DAMPING, exact)), exact)
    values, u = np.linalg.eigh(h)
    shrunk = size * values * DAMPING / (values + DAMPING)
    want = (u * (0.09 / values / (1 - shrunk / 2))) @ u.T
    np.testing.assert_allclose(scipy.linalg.solve_discrete_lyapunov(b, noise @ noise.T), want, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.usefixtures("any_keys")
def test_fewer_steps_on_ill_conditioned_data(x64):
    """At steps that are equally far from unstable, by the factor that theory says."""
    exact, h = law()
    steps, damping, size = [], 0.02, 0.5
    for preconditioner, own in ((None, size), (ExactHessian(damping, exact), size * (1 + damping) / damping)):
        b, _ = affine(Langevin(PROCESS, own, preconditioner=preconditioner), exact)
        values = np.linalg.eigvals(b).real
        assert values.min() > 1 - size * 1.0001
        steps.append(np.log(1e-3) / np.log(np.abs(values).max()))
    low = np.linalg.eigvalsh(h)[0]
    plain, better = (np.log(1e-3) / np.log1p(-v) for v in (size * low, size * low * (1 + damping) / (low + damping)))
    np.testing.assert_allclose(steps, [plain, better], rtol=1e-6)
    assert steps[0] > 20 * steps[1]


@pytest.mark.slow
def test_without_end_of_damping_it_is_plain_langevin(x64):
    exact, _ = law()
    x, z = states(), np.random.default_rng(2).normal(size=(3, 2, DIMS))
    moved = []
    for preconditioner in (None, LevenbergMarquardt(1e14), ExactHessian(1e14, exact), FixedHessian(np.eye(3), 1e14)):
        corrector = Langevin(PROCESS, 0.2, 3, noise=Given(z), preconditioner=preconditioner)
        keys = ddjax.random.example_keys(jax.random.key(0), 2)
        x3, _, calls = corrector.correct(keys, corrector.init(x), x, jnp.asarray(T), exact.denoise(PROCESS))
        moved.append(x3)
        np.testing.assert_array_equal(calls, 3)
    for other in moved[1:]:
        np.testing.assert_allclose(other, moved[0], atol=1e-10)


@pytest.mark.slow
def test_evaluations_are_counted():
    solver = PredictorCorrector(DDIM(PROCESS), Langevin(PROCESS, 0.1, 2, "level", preconditioner=ExactHessian(0.1)))
    settings = {"shape": (2, DIMS), "solver": solver, "times": grids.uniform(2)}
    drawn = ddjax.sample(jax.random.key(0), law()[0].denoise(PROCESS), PROCESS, **settings)
    np.testing.assert_array_equal(drawn.nfe, 2 * (1 + 2 * (1 + 1 + DIMS)))
    assert np.isfinite(drawn.x0).all()


def prediction(xt, t, cond=None):
    return Prediction(jnp.sin(2.0 * xt) + 0.3 * xt, "x0")


def published(x, times, damping, memory, form):
    """The first-order solver of a form with its drift multiplied, as its authors have it, but for the last step."""
    before = None
    for t, s in itertools.pairwise(times):
        x0 = np.sin(2 * x) + 0.3 * x
        noise = (x - (1 - t) * x0) / t
        if form == "noise":
            h = np.log((1 - s) / s) - np.log((1 - t) / t) if s else np.inf
            kept, d = (1 - s) / (1 - t) * x, -s * np.expm1(h) * noise if s else -t / (1 - t) * noise
        elif form == "x0":
            kept, d = s / t * x, (1 - s - s / t * (1 - t)) * x0
        else:
            kept, d = x, (s - t) * (noise - x0)
        m = d if before is None else memory * before + (1 - memory) * d
        turned = d - m * (m * d).sum(-1, keepdims=True) / (damping + (m * m).sum(-1, keepdims=True))
        turned *= np.linalg.norm(d, axis=-1, keepdims=True) / np.linalg.norm(turned, axis=-1, keepdims=True)
        x, before = kept + (turned if s else d), d
    return x


def drawn(solver, x, times, **options):
    settings = {"shape": x.shape, "solver": solver, "times": jnp.asarray(times), "init": x} | options
    return ddjax.sample(jax.random.key(0), prediction, PROCESS, **settings)


@pytest.mark.parametrize("form", ["noise", *[pytest.param(f, marks=pytest.mark.slow) for f in ("x0", "velocity")]])
def test_the_published_recurrence(x64, form):
    x, times, (memory, damping) = states(4), np.array([0.9, 0.6, 0.3, 0.1, 0.0]), (0.3, 1e-2)
    inner = euler(PROCESS) if form == "velocity" else DDIM(PROCESS)
    solver = Preconditioned(inner, LevenbergMarquardt(damping, memory), form)
    got = drawn(solver, x, times)
    np.testing.assert_allclose(got.x0, published(np.asarray(x), times, damping, memory, form), atol=1e-9)
    np.testing.assert_array_equal(got.nfe, 4)
    # From pure noise: the first step is the solver's own, and no drift to remember.
    x1 = 0.1 * (np.sin(2 * x) + 0.3 * x) + 0.9 * np.asarray(x)
    got = drawn(solver, x, np.array([1.0, *times]))
    np.testing.assert_allclose(got.x0, published(x1, times, damping, memory, form), atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("solver", "form"), [(dpm_solver_multistep(PROCESS), "noise"), (dpm_solver_pp(PROCESS), "x0")])
def test_around_other_solvers(x64, solver, form):
    """Without memory, or with all damping, it is the solver; else another sample, finite at both ends."""
    x, times = states(3), grids.uniform(4)
    plain = drawn(solver, x, times).x0
    for same in (LevenbergMarquardt(1e-3, 0.0), LevenbergMarquardt(1e12, 0.5)):
        np.testing.assert_allclose(drawn(Preconditioned(solver, same, form), x, times).x0, plain, atol=1e-9)
    other = drawn(Preconditioned(solver, LevenbergMarquardt(0.1, 0.5), form), x, times)
    assert np.abs(other.x0 - plain).max() > 1e-2
    assert np.isfinite(other.x0).all()
    for steps in (1, 2):
        assert np.isfinite(drawn(Preconditioned(solver, LevenbergMarquardt(), form), x, grids.uniform(steps)).x0).all()


@pytest.mark.slow
def test_rows_are_their_own():
    check_rows_are_their_own(lambda process: Preconditioned(DDIM(process), LevenbergMarquardt(0.1, 0.5)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LevenbergMarquardt(0.0), "positive damping"),
        (lambda: LevenbergMarquardt(1.0, 1.0), "memory"),
        (lambda: ExactHessian(-1.0), "positive damping"),
        (lambda: FixedHessian(np.zeros(3), 1.0), "vectors"),
        (lambda: Preconditioned(DDIM(PROCESS), LevenbergMarquardt(), "v"), "form must be"),
        (lambda: Preconditioned(DDIM(PFGM(VPCosine(), D=4.0)), LevenbergMarquardt()), "needs a processes.Gaussian"),
    ],
)
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()
