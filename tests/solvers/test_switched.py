"""Solvers one after another, and steps of Gaussian data without a network."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ode_laws import check_rows_are_their_own

import ddjax
from ddjax import grids, solvers
from ddjax.gaussian_law import GaussianLaw
from ddjax.predictions import Prediction
from ddjax.processes import PFGM, Gaussian
from ddjax.sampling import Observed
from ddjax.schedules import CondOT, VPCosine
from ddjax.solvers import DDIM, Given, Heun, Switched, Teleport, adams_bashforth, dpm_solver_pp

PROCESS = Gaussian(CondOT())
LAW = GaussianLaw(np.array([[0.3, -0.2]]), np.eye(2)[None], [[2.0, 0.1]], [0.0])
KEY = jax.random.key(0)


def curved(xt, t, cond=None):
    return Prediction(jnp.sin(3.0 * xt) - 0.2 * xt, "x0")


def drawn(solver, times, denoise=curved, batch=3, **options):
    options = {"process": PROCESS, "shape": (batch, 2), "solver": solver, "times": times} | options
    return ddjax.sample(KEY, denoise, options.pop("process"), **options)


@pytest.mark.slow
def test_it_is_one_solver_and_then_the_other(x64):
    """As two calls of sample in a row: memories begin anew, and evaluations add up."""
    first, second, times = dpm_solver_pp(PROCESS, 2), adams_bashforth(PROCESS, 3), grids.uniform(7)
    got = drawn(Switched((first, second), (times[3],)), times, trajectory=True)
    before = drawn(first, times[:4], trajectory=True)
    after = drawn(second, times[3:], init=before.x0, trajectory=True)
    np.testing.assert_allclose(got.trajectory, np.concatenate([before.trajectory, after.trajectory[1:]]), atol=1e-14)
    np.testing.assert_array_equal(got.nfe, before.nfe + after.nfe)


@pytest.mark.slow
def test_three_of_which_one_has_no_step(x64):
    """Turns whose times fall between two of the grid are passed over; one alone is that solver."""
    times = grids.uniform(4)
    pair = Switched((DDIM(PROCESS), Heun(PROCESS)), (0.5,))
    three = Switched((DDIM(PROCESS), adams_bashforth(PROCESS, 2), Heun(PROCESS)), (0.55, 0.5))
    np.testing.assert_array_equal(drawn(pair, times).nfe, 1 + 1 + 2 + 1)
    np.testing.assert_array_equal(drawn(pair, times).x0, drawn(three, times).x0)
    np.testing.assert_array_equal(drawn(Switched((Heun(PROCESS),), ()), times).x0, drawn(Heun(PROCESS), times).x0)


def test_grids_in_float32_meet_times_that_are_written_out():
    times = grids.uniform(10)
    assert times.dtype == jnp.float32
    assert drawn(Switched((Teleport(PROCESS, LAW), DDIM(PROCESS)), (0.7,)), times).nfe.tolist() == [7] * 3


def test_known_sites_and_their_solvers():
    """A solver that asks which sites are known is told when its turn begins."""

    @dataclasses.dataclass(frozen=True)
    class Told:
        process: Gaussian

        def init(self, xt, cond=None):
            return jnp.zeros(xt.shape)

        def begin(self, xt, cond, denoise, known=None):
            return known.astype(xt.dtype)

        def step(self, keys, carry, xt, t, s, denoise, cond=None):
            return carry, carry, solvers.Info(jnp.zeros(xt.shape[0], jnp.int32))

    mask = jnp.asarray([[True, False]] * 2)
    observed = Observed(mask, jnp.full((2, 2), 5.0))
    got = drawn(Switched((DDIM(PROCESS), Told(PROCESS)), (0.5,)), grids.uniform(4), batch=2, observed=observed).x0
    np.testing.assert_array_equal(got, [[5.0, 0.0]] * 2)


@pytest.mark.parametrize("steps", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_teleport_is_exact_in_any_steps(x64, steps):
    whole = drawn(Teleport(PROCESS, LAW), grids.uniform(steps), trajectory=True)
    first = np.asarray(whole.trajectory[0])
    scale = np.sqrt([2.0, 0.1])  # from standard normals, around 0 where alpha is 0, to the law
    np.testing.assert_allclose(whole.x0, LAW.means.values[0] + scale * first, atol=1e-12)
    assert not whole.nfe.any()


@pytest.mark.slow
def test_then_any_solver_goes_on(x64):
    """On Gaussian data nothing is lost by the jump: what is left is the second solver's error, of its own order."""
    denoise = LAW.denoise(PROCESS)
    exact = drawn(Teleport(PROCESS, LAW), grids.uniform(1), denoise).x0
    errors = []
    for steps in (32, 64):
        solver = Switched((Teleport(PROCESS, LAW), dpm_solver_pp(PROCESS, 2)), (0.75,))
        got = drawn(solver, grids.uniform(steps), denoise)
        errors.append(np.abs(got.x0 - exact).max())
        np.testing.assert_array_equal(got.nfe, 0.75 * steps)
    assert 3.0 < errors[0] / errors[1] < 5.5


@pytest.mark.slow
def test_rows_are_their_own():
    law = GaussianLaw(np.zeros((1, 2)), np.eye(2)[None], [[2.0, 0.1]], [0.0])
    check_rows_are_their_own(lambda process: Switched((Teleport(process, law), DDIM(process, 1.0)), (0.5,)))


@pytest.mark.slow
def test_what_counts_draws_counts_its_own_turn(x64):
    """`Given` noise begins at its first number when the turn begins."""
    z = np.random.default_rng(0).normal(size=(4, 3, 2))
    noisy, times = DDIM(PROCESS, 1.0, Given(z)), grids.uniform(4)
    got = drawn(Switched((DDIM(PROCESS), noisy), (0.5,)), times, trajectory=True).trajectory
    want = drawn(noisy, times[2:], init=got[2], trajectory=True).trajectory
    np.testing.assert_array_equal(got[2:], want)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Switched((DDIM(PROCESS), Heun(PROCESS)), ()), "need a time for each but the first"),
        (lambda: Switched((DDIM(PROCESS),) * 3, (0.5, 0.5)), "must decrease"),
        (lambda: Teleport(PFGM(CondOT(), D=4.0), LAW), "needs a processes.Gaussian"),
        (
            lambda: Switched((DDIM(PROCESS), Heun(PROCESS)), (0.5,)).step(
                None, None, jnp.zeros((2, 2)), jnp.ones(2), jnp.zeros(2), curved
            ),
            "one time for all",
        ),
        (
            lambda: Switched(
                (solvers.learned.written_out(DDIM(Gaussian(VPCosine())), np.linspace(1, 0.1, 3)), Heun(PROCESS)), (0.5,)
            ),
            "own grid",
        ),
    ],
)
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_compared_by_value():
    a, b = (Switched([Teleport(PROCESS, LAW), DDIM(PROCESS)], [at]) for at in (0.5, 0.5))
    assert a == b
    assert len({a, b}) == 1
    assert len(list(itertools.pairwise(a.solvers))) == 1
