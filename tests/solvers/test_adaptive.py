"""The adaptive solver: Gaussian data in closed form, a mixture by another library, the count of evaluations."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ode_laws import Pair, reference

import ddjax
from ddjax import grids, random
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian, InBasis, Interpolant, Masked, Orthogonal, Reflected, critically_damped
from ddjax.schedules import EDM, VE, CondOT, VPCosine, VPLinear
from ddjax.solvers import Adaptive

pytest.importorskip("diffrax")
TURN = np.asarray([[0.6, -0.8], [0.8, 0.6]])
MEAN, STD = np.array([0.4, -1.1]), np.array([0.5, 1.7])


def normal(process):
    """The exact v = alpha noise - sigma x0 for data N(MEAN, STD^2), which says all at both ends."""

    def denoise(xt, t, cond=None):
        alpha, sigma = (f(t)[:, None] for f in (process.schedule.alpha, process.schedule.sigma))
        off = (xt - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        return Prediction(alpha * sigma * off - sigma * (MEAN + alpha * STD**2 * off), "v")

    return denoise


def solve(solver, denoise, init, times, **options):
    settings = {"shape": init.shape, "solver": solver, "times": jnp.asarray(times), "init": jnp.asarray(init)}
    return ddjax.sample(jax.random.key(0), denoise, solver.process, **settings, **options)


@pytest.mark.parametrize(
    "schedule",
    [CondOT(), *(pytest.param(s, marks=pytest.mark.slow) for s in (VPCosine(0.0), EDM(), VE(), VPLinear()))],
    ids=repr,
)
def test_gaussian_data_in_closed_form(x64, schedule):
    """(x_t - alpha_t mean) / width_t is constant along the ODE, from t = 1 to no noise; the error goes with rtol."""
    process, z = Gaussian(schedule, data_std=0.5), np.random.default_rng(0).normal(size=(3, 2))
    ends = [np.asarray([float(f(jnp.asarray(t))) for f in (schedule.alpha, schedule.sigma)]) for t in (1.0, 0.0)]
    start, end = (alpha * MEAN + np.hypot(alpha * STD, sigma) * z for alpha, sigma in ends)
    errors = []
    for tolerance in (1e-4, 1e-9):
        found = solve(Adaptive(process, tolerance, tolerance), normal(process), start, [1.0, 0.0])
        errors.append(np.abs(found.x0 - end).max())
        assert errors[-1] < 30 * tolerance, errors
    assert errors[1] < 1e-3 * errors[0]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["Dopri5", "Tsit5", "Bosh3"])
def test_a_mixture_against_scipy(x64, method):
    for schedule in (VPCosine(), CondOT()):
        process = Gaussian(schedule)
        x, solution = reference(schedule, 0.85, 0.35)
        for times in ([0.85, 0.35], [0.85, 0.6, 0.35]):
            found = solve(Adaptive(process, 1e-9, 1e-9, method=method), Pair(process), x[None], times)
            np.testing.assert_allclose(found.x0[0], solution, atol=3e-8)


@pytest.mark.parametrize("method", ["Dopri5", pytest.param("Heun", marks=pytest.mark.slow)])
def test_every_evaluation_is_counted_and_none_depends_on_neighbours(method):
    process, calls = Gaussian(VPCosine()), []
    solver = Adaptive(process, 1e-3, 1e-3, method=method)

    def denoise(xt, t, cond):
        jax.debug.callback(lambda: calls.append(1))
        return Pair(process)(xt, t, cond)

    init = jnp.asarray([[0.3, 0.1], [40.0, -2.0], [-1.5, 2.0]])  # the second is far from easy
    key, times = jax.random.key(0), jnp.asarray([1.0, 0.4, 0.0])
    settings = {"solver": solver, "times": times}
    alone = []
    draw = jax.jit(lambda x: ddjax.sample(key, denoise, process, shape=(1, 2), init=x, **settings))
    for x in init:
        calls.clear()
        alone.append(jax.block_until_ready(draw(x[None])))
        jax.effects_barrier()
        assert len(calls) == int(alone[-1].nfe[0])
    together = ddjax.sample(key, Pair(process), process, shape=(3, 2), init=init, **settings)
    np.testing.assert_array_equal(together.nfe, [int(one.nfe[0]) for one in alone])
    quiet = [ddjax.sample(key, Pair(process), process, shape=(1, 2), init=x[None], **settings).x0[0] for x in init]
    np.testing.assert_array_equal(together.x0, quiet)
    # The program that calls back is another one, which the compiler may round differently.
    np.testing.assert_allclose(quiet, [one.x0[0] for one in alone], rtol=2e-6)
    assert len(set(map(int, together.nfe))) > 1


@pytest.mark.slow
def test_all_flows_end_without_nan():
    """Float32, the whole way, batch 1, n = 1 and 2."""
    turned = InBasis(Gaussian(CondOT()), Orthogonal(TURN))
    cases = {
        "basis": (turned, (1, 2), lambda xt, t, cond: Prediction(0.3 * xt, "v")),
        "interpolant": (Interpolant(source_std=1.0), (1, 2), lambda xt, t, cond: Prediction(-xt, "velocity")),
        "box": (Reflected(VE(0.02, 2.0)), (1, 2), lambda xt, t, cond: Prediction(0.5 - xt, "score")),
        "damped": (critically_damped(VPLinear()), (1, 4), lambda xt, t, cond: Prediction(-xt, "score")),
    }
    for name, (process, shape, denoise) in cases.items():
        for steps in (1, 2):
            solver, times = Adaptive(process, 1e-3, 1e-3), grids.uniform(steps)
            found = ddjax.sample(jax.random.key(0), denoise, process, shape=shape, solver=solver, times=times)
            assert np.isfinite(np.asarray(found.x0)).all(), name
            assert (np.asarray(found.nfe) >= 7 * steps).all(), name


def test_errors(monkeypatch):
    with pytest.raises(ValueError, match="Masked has no probability-flow ODE"):
        Adaptive(Masked(3))
    with pytest.raises(ValueError, match="positive"):
        Adaptive(Gaussian(), rtol=0.0)
    process, keys, x = Gaussian(), random.example_keys(jax.random.key(0), 1), jnp.ones((1, 2))
    step = lambda solver: solver.step(keys, (), x, jnp.ones(1), jnp.zeros(1), Pair(process))
    for method in ("Euler", "Kvaerno5", "ODETerm", "rk45"):
        with pytest.raises(ValueError, match=f"{method}.*Dopri5"):
            step(Adaptive(process, method=method))
    monkeypatch.setitem(sys.modules, "diffrax", None)
    with pytest.raises(ImportError, match=r"ddjax\[ode\]"):
        step(Adaptive(process))
