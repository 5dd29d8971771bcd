"""The noise of Gaussian states: round trips, and by linear algebra the noise, its law and that of an edit."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddjax
from ddjax import inversion
from ddjax.predictions import Prediction
from ddjax.processes import (
    DCT,
    PFGM,
    BridgeMixture,
    Gaussian,
    Geometric,
    InBasis,
    Interpolant,
    LearnedVariance,
    LinearSDE,
    MixtureOutput,
    Staggered,
)
from ddjax.processes.clocks import Windows
from ddjax.schedules import EDM, VE, CondOT, ShortestPath, VPCosine, VPLinear
from ddjax.solvers import DDIM, Ancestral, dpm_solver_pp

KEY = jax.random.key
VP = Gaussian(VPCosine(0.0))
TIMES = (1.0, 0.7, 0.4, 0.15, 0.0)
MEANS, VARIANCES = np.array([0.3, -0.6]), np.array([0.49, 0.16])  # of data under conditions 0 and 1


@dataclasses.dataclass(frozen=True)
class Exact:
    """E[x0 | x_t] of N(mean, variance) under each condition."""

    process: Gaussian

    def __call__(self, xt, t, cond):
        schedule, shape = self.process.schedule, (-1,) + (1,) * (xt.ndim - 1)
        alpha, sigma = (v.reshape(shape) for v in (schedule.alpha(t), schedule.sigma(t)))
        mean, c = (jnp.asarray(v)[cond].reshape(shape) for v in (MEANS, VARIANCES))
        return Prediction(mean + alpha * c * (xt - alpha * mean) / (alpha**2 * c + sigma**2), "x0")


def condition(c, batch):
    return jnp.full((batch,), c)


def data(batch, sites=1, c=0):
    return jnp.asarray(MEANS[c] + np.sqrt(VARIANCES[c]) * np.random.default_rng(c).normal(size=(batch, sites)))


def wild(kind, width=1, sites=None):
    """A network that mixes sites and knows the time and the condition."""

    def denoise(xt, t, cond):
        at = t.reshape(-1, *[1] * (xt.ndim - 1))
        value = jnp.sin(3.0 * xt + jnp.roll(xt, 1, -1) + at) + 0.3 * cond.reshape(at.shape)
        value = jnp.exp(value) if kind == "positive" else value
        value = value[..., :sites] if sites else value
        return Prediction(jnp.concatenate([value] * width, -1), "x0" if kind == "positive" else kind)

    return jax.tree_util.Partial(denoise)


ROUND_TRIPS = {
    "vp_cosine": (VP, Ancestral, wild("v")),
    "edm": (Gaussian(EDM(80.0), 0.5), Ancestral, wild("edm")),
    "vp_linear-ddim": (Gaussian(VPLinear()), lambda p: DDIM(p, 0.5), wild("noise")),
    "cond_ot": (Gaussian(CondOT()), Ancestral, wild("velocity")),
    "ve-ddim": (Gaussian(VE()), lambda p: DDIM(p, 1.0), wild("score")),
    "learned_variance": (LearnedVariance(VPCosine(0.0)), Ancestral, wild("x0", 2)),
    "in_basis": (InBasis(Gaussian(ShortestPath(np.array([1.0, 0.2, 0.1, 0.05]))), DCT((1,))), Ancestral, wild("x0")),
    "geometric": (Geometric(), Ancestral, wild("positive")),
    "bridges": (BridgeMixture(), Ancestral, wild("x0")),
    "staggered": (Staggered(VP, Windows([0.0, 0.1, 0.2, 0.3], [0.5, 0.8, 0.9, 1.0])), Ancestral, wild("v")),
    "linear_sde": (
        LinearSDE(((0.0,), (1.0,)), ((0.0, -1.0), (0.0, 0.0)), VPLinear()), Ancestral, wild("x0", sites=4)
    ),
    "interpolant": (Interpolant(source_std=1.0), Ancestral, wild("x0")),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_a_path_of_normals_gives_its_example_back(x64, name):
    """Under any network, also from later on; what is between is given back too."""
    process, make, denoise = ROUND_TRIPS[name]
    x0, cond, solver = jnp.exp(data(3, 4)), condition(1, 3), make(process)
    for independent in (False, True):
        options = {"times": TIMES, "solver": solver, "independent": independent}
        made = inversion.record(KEY(0), denoise, process, x0, cond, **options)
        assert np.isfinite(made.noise).all()
        np.testing.assert_allclose(made.states[:, -1, :4], x0, atol=1e-12)
        again = inversion.edit(KEY(1), denoise, process, made, cond, trajectory=True)
        np.testing.assert_allclose(jnp.moveaxis(again.trajectory, 0, 1), made.states, atol=1e-10)
        assert (np.asarray(again.nfe) == 4).all()
        error = inversion.round_trip_error(made.states[:, -1], again.x0)
        assert error.shape == (3,)
        assert (error < 1e-10).all()
        if name != "interpolant":  # two steps of which say all
            assert (np.abs(np.asarray(made.noise)[:, :-1]).std() > 0.1).all()
    late = inversion.edit(KEY(1), denoise, process, made, cond, skip=3)
    np.testing.assert_allclose(late.x0, made.states[:, -1], atol=1e-10)
    other = inversion.edit(KEY(1), denoise, process, made, condition(0, 3))
    assert (inversion.round_trip_error(made.states[:, -1], other.x0) > 0.01).all()


def coefficients(times, eta=None):
    """(alpha, sigma) at all times; and of each step x_s ~ a x_0 + k x_t + std z given x_0, by conditioning normals.

    eta: DDIM's; None: the forward process is Markov, cov(x_s, x_t | x_0) = alpha_t / alpha_s sigma_s^2.
    """
    at = np.asarray(times)
    alpha, sigma = np.cos(0.5 * np.pi * at), np.sin(0.5 * np.pi * at)
    steps = []
    for (a_t, s_t), (a_s, s_s) in zip(zip(alpha, sigma), list(zip(alpha, sigma))[1:]):  # noqa: B905
        k, variance = a_t / a_s * s_s**2 / s_t**2, s_s**2 - (a_t / a_s * s_s**2 / s_t) ** 2
        if eta is not None:
            variance *= eta**2
            k = np.sqrt(s_s**2 - variance) / s_t
        steps.append((a_s - k * a_t, k, np.sqrt(max(variance, 0.0))))
    return alpha, sigma, steps


def predicted(alpha, sigma, c):
    """E[x0 | x_t] = gain x_t + offset."""
    gain = alpha * VARIANCES[c] / (alpha**2 * VARIANCES[c] + sigma**2)
    return gain, MEANS[c] * (1.0 - gain * alpha)


def noise_of_states(times, eta, c):
    """Matrix and offset: the noise of all steps, given the states at all times."""
    alpha, sigma, steps = coefficients(times, eta)
    matrix, offset = np.zeros((len(steps), len(times))), np.zeros(len(steps))
    for i, (a, k, std) in enumerate(steps):
        gain, shift = predicted(alpha[i], sigma[i], c)
        unit = std if std > 1e-12 else 1.0
        matrix[i, i + 1], matrix[i, i], offset[i] = 1.0 / unit, -(k + a * gain) / unit, -a * shift / unit
    return matrix, offset


SPACES = {"path": (None, False), "independent": (None, True), "ddim": (0.6, False), "ddim-independent": (0.6, True)}


@functools.cache
def recorded(space):
    """A recording of many examples, and the closed forms of its noise and of its covariance."""
    eta, independent = SPACES[space]
    solver = Ancestral(VP) if eta is None else DDIM(VP, eta)
    batch = 40_000
    options = {"times": jnp.asarray(TIMES), "solver": solver, "independent": independent}
    made = inversion.record(KEY(2), Exact(VP), VP, data(batch), condition(0, batch), **options)
    matrix, offset = noise_of_states(TIMES, eta, 0)
    alpha, sigma, steps = coefficients(TIMES, eta)
    given = np.diag(sigma**2)  # the covariance of the states given x_0
    if not independent:
        for i, (_, k, std) in enumerate(steps):
            given[i + 1, : i + 1] = given[: i + 1, i + 1] = k * given[i, : i + 1]
            np.testing.assert_allclose(given[i + 1, i + 1], k**2 * given[i, i] + std**2, atol=1e-12)
    states = given + VARIANCES[0] * np.outer(alpha, alpha)
    return made, matrix, offset, states, matrix @ states @ matrix.T


@pytest.mark.slow
@pytest.mark.parametrize("space", SPACES)
def test_the_noise_and_its_law_are_the_closed_forms(x64, space):
    made, matrix, offset, of_states, covariance = recorded(space)
    states, noise = (np.asarray(v)[..., 0] for v in (made.states, made.noise))
    np.testing.assert_allclose(noise, states @ matrix.T + offset, atol=1e-9)
    found, size = np.cov(noise.T), np.sqrt(np.outer(np.diag(covariance), np.diag(covariance)))
    np.testing.assert_allclose(found / size, covariance / size, atol=0.035)  # 5 standard errors
    width = np.sqrt(np.diag(of_states))
    np.testing.assert_allclose(
        np.cov(states.T) / np.outer(width, width), of_states / np.outer(width, width), atol=0.035
    )
    correlation = covariance / size
    if space == "path":  # the reverse process is Markov: what it draws is uncorrelated, at any number of steps
        np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-12)
    if space == "independent":  # the closed form says so; it is the paper's finding
        assert (np.diagonal(correlation, 1)[1:] < -0.1).all()
        assert (np.diag(covariance)[:-1] > np.diag(recorded("path")[-1])[:-1] - 1e-12).all()


@pytest.mark.slow
def test_many_steps_of_a_path_are_standard_normals(x64):
    """The excess over variance 1 falls like the step: what the model lacks is only that it takes x0 for known."""
    batch, excess = 20_000, []
    for steps in (32, 64):
        times = np.linspace(0.95, 0.05, steps + 1)
        matrix, _ = noise_of_states(times, None, 0)
        alpha, sigma, _ = coefficients(times)
        variance = alpha**2 * VARIANCES[0] + sigma**2
        i, j = np.indices((steps + 1, steps + 1))
        i, j = np.minimum(i, j), np.maximum(i, j)
        law = matrix @ (alpha[i] / alpha[j] * variance[j]) @ matrix.T
        excess.append(np.abs(law - np.eye(steps)).max())
    assert 1.7 < excess[0] / excess[1] < 2.3
    x0 = data(batch)
    made = inversion.record(KEY(3), Exact(VP), VP, x0, condition(0, batch), times=times)
    found = np.cov(np.asarray(made.noise)[..., 0].T)
    np.testing.assert_allclose(found, law, atol=0.06)


def affine(denoise, times, steps, c):
    """The edit under c as a map of the first state and the noises: matrix (1, steps + 1) and offset."""
    unit = jnp.concatenate([jnp.zeros((1, steps + 1)), jnp.eye(steps + 1)])[..., None]
    states = jnp.concatenate([unit[:, :1], jnp.zeros((steps + 2, steps, 1))], 1)
    made = inversion.Recording(jnp.asarray(times), states, unit[:, 1:], Ancestral(VP))
    out = np.asarray(inversion.edit(KEY(0), denoise, VP, made, condition(c, steps + 2)).x0)[:, 0]
    return out[1:] - out[0], out[0]


def sampled(times, c):
    """Mean and variance of ancestral sampling from N(0, 1) under c."""
    alpha, sigma, steps = coefficients(times)
    mean, variance = 0.0, 1.0
    for i, (a, k, std) in enumerate(steps):
        gain, shift = predicted(alpha[i], sigma[i], c)
        mean, variance = (k + a * gain) * mean + a * shift, (k + a * gain) ** 2 * variance + std**2
    return mean, variance


@pytest.mark.slow
def test_an_example_of_the_model_becomes_one_of_another_model_in_law(x64):
    """Its own noise is standard normal, and 0 at the last step: decoded by another model it has that model's law."""
    matrix, offset = affine(Exact(VP), TIMES, 4, 1)
    mean, variance = sampled(TIMES, 1)
    np.testing.assert_allclose(offset, mean, atol=1e-12)
    np.testing.assert_allclose((matrix[:-1] ** 2).sum(), variance, atol=1e-12)
    np.testing.assert_allclose(matrix[-1], 1.0)  # what the last state had beyond its mean is added as it is


@pytest.mark.slow
def test_examples_of_the_data_become_those_of_the_other_law_at_first_order(x64):
    """The noise recorded of data (its law in closed form), put through the edit: the other condition's data."""
    errors = []
    for steps in (16, 32, 64):
        times = np.linspace(1.0, 0.0, steps + 1)
        map_, offset = affine(Exact(VP), times, steps, 1)
        noise, shift = noise_of_states(times, None, 0)
        alpha, sigma, _ = coefficients(times)
        variance = alpha**2 * VARIANCES[0] + sigma**2
        i, j = np.indices((steps + 1, steps + 1))
        i, j = np.minimum(i, j), np.maximum(i, j)
        whole = map_[0] * np.eye(steps + 1)[0] + map_[1:] @ noise  # of the states
        mean = offset + whole @ (alpha * MEANS[0]) + map_[1:] @ shift
        spread = whole @ (alpha[i] / alpha[j] * variance[j]) @ whole
        np.testing.assert_allclose(mean, MEANS[1], atol=1e-12)
        errors.append(abs(spread - VARIANCES[1]))
    assert errors[-1] < 0.02
    for coarse, fine in itertools.pairwise(errors):
        assert 1.8 < coarse / fine < 2.2


@pytest.mark.slow
def test_weights_of_recorded_and_fresh_noise(x64):
    """lambda_1 = 0 and lambda_2 = 1 are ancestral sampling; a linear network shows that both only weigh."""
    made = inversion.record(KEY(4), Exact(VP), VP, data(5, 2), condition(0, 5), times=TIMES)
    change = lambda own, new: inversion.edit(
        KEY(5), Exact(VP), VP, made, condition(1, 5), lambda_1=own, lambda_2=new
    ).x0  # fmt: skip
    none, own, new = change(0.0, 0.0), change(1.0, 0.0), change(0.0, 1.0)
    drawn = ddjax.sample(
        KEY(5), Exact(VP), VP, shape=(5, 2), solver=Ancestral(VP), times=jnp.asarray(TIMES), cond=condition(1, 5),
        init=made.states[:, 0],
    ).x0  # fmt: skip
    np.testing.assert_allclose(new, drawn, atol=1e-12)
    np.testing.assert_allclose(change(0.6, 0.8), none + 0.6 * (own - none) + 0.8 * (new - none), atol=1e-12)
    steps = jnp.asarray([1.0, 0.0, 1.0, 0.0])
    np.testing.assert_allclose(change(steps, 0.0) + change(1.0 - steps, 0.0), own + none, atol=1e-12)


@pytest.mark.slow
def test_rows_do_not_depend_on_the_batch():
    denoise = jax.tree_util.Partial(lambda xt, t, cond: Prediction(0.5 * xt, "v"))
    x0 = data(7, 2).astype(jnp.float32)

    def both(batch, rows=None):
        there = x0[:batch] if rows is None else x0[rows]
        made = inversion.record(KEY(6), denoise, VP, there, times=TIMES, rows=rows)
        changed = inversion.edit(KEY(7), denoise, VP, made, lambda_1=0.6, lambda_2=0.8, rows=rows)
        return made.states, made.noise, changed.x0

    whole = both(7)
    for some, part in ((both(1), slice(1)), (both(2), slice(2)), (both(1, jnp.asarray([4])), slice(4, 5))):
        for a, b in zip(some, whole, strict=True):
            np.testing.assert_array_equal(a, b[part])


def test_errors():
    record = lambda process, denoise=wild("x0"), **options: inversion.record(
        KEY(0), denoise, process, data(2, 4), condition(0, 2), **{"times": TIMES} | options
    )  # fmt: skip
    made = inversion.Recording(jnp.asarray(TIMES), jnp.zeros((2, 5, 4)), jnp.zeros((2, 4, 4)), Ancestral(VP))
    edit = functools.partial(inversion.edit, KEY(0), wild("x0"), VP, made, condition(0, 2))
    for call, words in (
        (lambda: record(PFGM()), "no bridge, reverse step"),
        (lambda: record(MixtureOutput(VPCosine(0.0), components=1)), "not made of normals"),
        (lambda: record(VP, solver=dpm_solver_pp(VP)), "Multistep does not say what its steps draw from"),
        (lambda: record(VP, iterations=3), "fixed-point iterations, for solvers without noise"),
        (lambda: record(VP, solver=DDIM(VP), independent=True), "DDIM draws nothing"),
        (lambda: edit(skip=4), "skip=4 leaves none of the 4 steps; it is 0 ... 3"),
        (lambda: edit(skip=1, lambda_1=jnp.ones(4)), "one for each of the 3 steps"),
        (lambda: edit(injection="max"), "injection='max' is for tokens"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
