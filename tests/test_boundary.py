"""The best noise of many on conditional Gaussian data, where what each is worth is a quadratic."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddjax
from ddjax import boundary, grids, random
from ddjax.gaussian_law import GaussianLaw
from ddjax.processes import Gaussian
from ddjax.schedules import CondOT
from ddjax.solvers import DDIM, Teleport

PROCESS, KEY = Gaussian(CondOT()), jax.random.key(0)
RNG = np.random.default_rng(0)
SPREAD = np.array([[1.5, 0.2], [0.6, 0.9], [1.0, 1.0]])  # standard deviations of each label, along the axes
MEANS = RNG.normal(size=(3, 2))
LAW = GaussianLaw(MEANS, np.stack([np.eye(2)] * 3), SPREAD**2, np.zeros(3), (0.5, 0.5, 1.0))
LABELS = np.array([0, 1, 1, 0, 1])
REFERENCES = MEANS[LABELS] + RNG.normal(size=(5, 2))


def by_hand(noises):
    """From standard normals, where alpha is 0, the ODE leads to mean + std z."""
    samples = MEANS[LABELS] + SPREAD[LABELS] * np.asarray(noises)[:, None]
    return ((samples - REFERENCES) ** 2).mean(-1).mean(1)


def searched(solver=None, times=None, **options):
    settings = {"references": REFERENCES, "cond": jnp.asarray(LABELS), "solver": solver or Teleport(PROCESS, LAW)}
    settings |= {"times": grids.uniform(1) if times is None else times}
    return boundary.best_noise(KEY, LAW.denoise(PROCESS), PROCESS, **settings | options)


@pytest.mark.parametrize("chunk", [3, pytest.param(1000, marks=pytest.mark.slow)])
def test_scores_are_the_quadratic(x64, chunk):
    found = searched(candidates=9, chunk=chunk)
    noises = PROCESS.prior((9, 2)).sample(random.example_keys(KEY, 9))
    want = by_hand(noises)
    np.testing.assert_allclose(found.scores, want, rtol=1e-6)
    assert found.index == np.argmin(want)
    np.testing.assert_array_equal(found.noise, noises[np.argmin(want)])


@pytest.mark.slow
def test_given_candidates_among_which_is_the_minimum(x64):
    """The quadratic's own minimum is found, and reused for conditions that were not in the set."""
    total = (SPREAD[LABELS] ** 2).sum(0)
    least = (SPREAD[LABELS] * (REFERENCES - MEANS[LABELS])).sum(0) / total
    others = least + 0.1 * RNG.normal(size=(6, 2))
    found = searched(candidates=jnp.asarray(np.concatenate([others, least[None]])))
    assert found.index == 6
    np.testing.assert_allclose(found.noise, least)
    init = jnp.broadcast_to(found.noise, (2, 2))
    settings = {"shape": (2, 2), "solver": Teleport(PROCESS, LAW), "times": grids.uniform(1), "init": init}
    new = ddjax.sample(jax.random.key(5), LAW.denoise(PROCESS), PROCESS, cond=jnp.asarray([2, 0]), **settings).x0
    np.testing.assert_allclose(new, MEANS[[2, 0]] + SPREAD[[2, 0]] * least, atol=1e-6)


def absolute(x0, reference):
    return jnp.abs(x0 - reference).max(-1)


@pytest.mark.slow
def test_any_distance_any_solver_and_dicts(x64):
    """Through the denoiser, with a distance of one's own; more candidates leave the first ones as they are."""
    times = grids.uniform(200)
    few, many = (searched(DDIM(PROCESS), times, candidates=n, distance=absolute, chunk=8) for n in (3, 6))
    samples = (
        MEANS[LABELS] + SPREAD[LABELS] * np.asarray(PROCESS.prior((6, 2)).sample(random.example_keys(KEY, 6)))[:, None]
    )
    want = np.abs(samples - REFERENCES).max(-1).mean(1)
    np.testing.assert_allclose(many.scores, want, rtol=0.02)
    np.testing.assert_array_equal(few.scores, many.scores[:3])
    inner = functools.partial(searched, candidates=3)
    np.testing.assert_array_equal(inner(cond={"cond": jnp.asarray(LABELS)}).scores, inner().scores)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"candidates": 0}, "at least one candidate"),
        ({"candidates": jnp.zeros((3, 4))}, "like the references"),
        ({"cond": jnp.zeros(3, int)}, "the 5 references"),
        ({"chunk": 0}, "chunk"),
    ],
)
def test_errors(options, words):
    with pytest.raises(ValueError, match=words):
        searched(**options)
