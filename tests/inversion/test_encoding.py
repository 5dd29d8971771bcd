"""Up the ODE from data to noise: closed forms on Gaussian data, exact inverses of steps on a mixture."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ode_laws import Pair

from ddjax import inversion
from ddjax.inversion.ode import solve
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian, Interpolant, Uniform
from ddjax.schedules import EDM, VE, CondOT, VPCosine, VPLinear
from ddjax.solvers import DDIM, Heun, euler, rk4

KEY = jax.random.key
VP = Gaussian(VPCosine(0.0))
MEAN, VARIANCE = 0.4, 0.3
X0 = np.linspace(-1.5, 2.0, 6).reshape(3, 2)


def linear(process):
    """The exact denoiser of N(MEAN, VARIANCE)."""

    def denoise(xt, t, cond=None):
        alpha, sigma = (v[:, None] for v in (process.schedule.alpha(t), process.schedule.sigma(t)))
        gain = alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2)
        return Prediction(MEAN + gain * (xt - alpha * MEAN), "x0")

    return jax.tree_util.Partial(denoise)


def levels(steps):
    """alpha, sigma and the width of the data's law at the times of a uniform grid, in NumPy."""
    angle = 0.5 * np.pi * np.linspace(1.0, 0.0, steps + 1)
    alpha, sigma = np.cos(angle), np.sin(angle)
    return alpha, sigma, alpha**2 * VARIANCE + sigma**2


def factor(a, s, b, r, width):
    """A DDIM step of the distance to the law's mean, from level (a, s) of variance `width` to (b, r)."""
    return (b * a * VARIANCE + r * s) / width


def round_trip(process, solver, denoise, steps, iterations, x0=None):
    x0 = jnp.asarray(X0) if x0 is None else x0
    made = inversion.record(
        KEY(0), denoise, process, x0, times=jnp.linspace(1.0, 0.0, steps + 1), solver=solver, iterations=iterations
    )
    return made, inversion.round_trip_error(x0, inversion.edit(KEY(1), denoise, process, made).x0)


def test_the_naive_way_up_is_its_closed_form_and_its_error_first_order(x64):
    errors, encoded = [], []
    for steps in (16, 32):
        alpha, sigma, width = levels(steps)
        made, error = round_trip(VP, DDIM(VP), linear(VP), steps, 0)
        there = np.asarray(made.states) - MEAN * alpha[:, None]  # (3, steps + 1, 2)
        up = [factor(alpha[i + 1], sigma[i + 1], alpha[i], sigma[i], width[i + 1]) for i in range(steps)]
        down = [factor(alpha[i], sigma[i], alpha[i + 1], sigma[i + 1], width[i]) for i in range(steps)]
        grown = np.cumprod([1.0, *up[::-1]])[::-1]
        away = np.asarray(X0) - MEAN
        np.testing.assert_allclose(there, away[:, None] * grown[:, None], atol=1e-12)
        lost = np.abs(np.prod(up) * np.prod(down) - 1.0) * np.sqrt((away**2).mean(-1))
        np.testing.assert_allclose(error, lost, rtol=1e-8)
        errors.append(lost.max())
        # The solution of the ODE keeps the distance to the mean in units of the law's width.
        encoded.append(np.abs(there[:, 0] - away * np.sqrt(width[0] / VARIANCE)).max())
    assert 1.7 < errors[0] / errors[1] < 2.3
    assert 1.7 < encoded[0] / encoded[1] < 2.3


SOLVERS = {"ddim": DDIM, "heun": Heun, "rk4": functools.partial(rk4, form="noise")}


@pytest.mark.parametrize("name", SOLVERS)
def test_with_fixed_points_the_way_up_is_the_inverse(x64, name):
    """On Gaussian data and on a mixture, whose plain iteration with r = alpha_t / alpha_s does not converge."""
    solver = SOLVERS[name](VP)
    made, error = round_trip(VP, solver, linear(VP), 6, 8)
    assert (error < 1e-10).all()
    assert np.isfinite(made.states).all()
    mixture = Pair(VP)
    _, far = round_trip(VP, solver, mixture, 6, 0)
    made, error = round_trip(VP, solver, mixture, 6, 20)
    assert (error < 1e-10).all()
    assert (far > 1e-4).all()
    if name == "ddim":  # every state is what the step makes of the one before
        keys, states = None, np.asarray(made.states)
        for i, (t, s) in enumerate(zip(made.times[:-1], made.times[1:], strict=True)):
            below = solver.step(keys, (), made.states[:, i], t, s, mixture)[0]
            np.testing.assert_allclose(below, states[:, i + 1], atol=1e-10)


@pytest.mark.slow
def test_the_encoding_converges_to_the_solution(x64):
    """Of the ODE in closed form: with fixed points at first order for DDIM, at second for Heun."""
    for solver, order in ((DDIM, 1), (Heun, 2)):
        errors = []
        for steps in (8, 16):
            made, _ = round_trip(VP, solver(VP), linear(VP), steps, 6)
            exact = (np.asarray(X0) - MEAN) * np.sqrt(1.0 / VARIANCE)  # alpha = 0 at the top
            errors.append(np.abs(np.asarray(made.states[:, 0]) - exact).max())
        assert abs(np.log2(errors[0] / errors[1]) - order) < 0.35, (solver, errors)


SCHEDULES = [VPCosine(0.0), EDM(80.0), VPLinear(), CondOT(), VE()]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_no_nan_from_data_without_noise(schedule):
    """In float32, by one step or five; the network is not asked where there is no noise."""
    process = Gaussian(schedule)
    x0 = jnp.asarray(X0, jnp.float32)
    for kind, make, steps in (("noise", DDIM, 5), ("score", DDIM, 1), ("edm", Heun, 5)):

        def denoise(xt, t, cond, kind=kind):
            value = jnp.where(process.schedule.sigma(t)[:, None] == 0, jnp.nan, 0.5 * jnp.tanh(xt))
            return Prediction(value, kind)

        made, error = round_trip(process, make(process), jax.tree_util.Partial(denoise), steps, 2, x0)
        assert np.isfinite(made.states).all(), (kind, make)
        assert np.isfinite(error).all()


@pytest.mark.slow
def test_an_interpolant_goes_up_to_its_other_end(x64):
    """Straight lines, of a network that knows them: Euler's steps are exact in both directions."""
    process = Interpolant()
    x1 = X0[::-1] + 1.0
    denoise = jax.tree_util.Partial(lambda xt, t, cond: Prediction(x1 - X0, "velocity"))
    made, error = round_trip(process, euler(process), denoise, 3, 0)
    np.testing.assert_allclose(made.states[:, 0], x1, atol=1e-12)
    assert (error < 1e-12).all()


@pytest.mark.slow
def test_a_later_start_and_rows_of_their_own():
    denoise = jax.tree_util.Partial(lambda xt, t, cond: Prediction(0.5 * xt, "v"))
    x0 = jnp.asarray(np.random.default_rng(0).normal(size=(7, 2)), jnp.float32)
    whole, _ = round_trip(VP, DDIM(VP), denoise, 5, 3, x0)
    for batch in (1, 2):
        np.testing.assert_array_equal(
            round_trip(VP, DDIM(VP), denoise, 5, 3, x0[:batch])[0].states, whole.states[:batch]
        )
    late = inversion.edit(KEY(0), denoise, VP, whole, skip=3, trajectory=True)
    assert late.trajectory.shape == (3, 7, 2)
    np.testing.assert_allclose(late.x0, x0, atol=1e-5)


def test_steps_that_plain_iteration_would_not_invert(x64):
    """Slopes from 0.2 to 30, far from the first rate of 1; what is not a number is never taken."""
    slopes = jnp.asarray([[0.2], [1.0], [30.0]])
    function = lambda x: slopes * x + jnp.sin(0.1 * x)
    target = jnp.full((3, 1), 0.7)
    x = solve(function, jnp.zeros((3, 1)), target, 1.0, 25)
    np.testing.assert_allclose(function(x), target, atol=1e-12)
    bounded = lambda x: jnp.where(jnp.abs(x) > 1.0, jnp.nan, 0.1 * x)
    x = solve(bounded, jnp.zeros((3, 1)), target, 1.0, 25)
    assert np.isfinite(x).all()
    assert (np.abs(target - bounded(x)) < 0.63).all()


def test_errors():
    record = functools.partial(inversion.record, KEY(0), Pair(VP), times=(1.0, 0.5, 0.0))
    made, tokens = record(VP, jnp.asarray(X0), solver=DDIM(VP)), jnp.zeros((2, 2), jnp.int32)
    for call, words in (
        (lambda: record(VP, X0, solver=DDIM(VP), iterations=-1), "iterations=-1: a number of fixed-point"),
        (lambda: inversion.edit(KEY(0), Pair(VP), VP, made, lambda_1=0.5), "no noise for lambda_1, lambda_2"),
        (lambda: inversion.edit(KEY(0), Pair(VP), VP, made, lambda_1=jnp.ones(2)), "no noise for lambda_1, lambda_2"),
        (lambda: record(Uniform(3), tokens, iterations=1), "for solvers without noise"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
