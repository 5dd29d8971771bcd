"""Thresholding against its definition, off, and within a sampler."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddjax
from ddjax import grids, solvers, thresholding
from ddjax.guidance import classifier_free
from ddjax.predictions import Prediction, evaluations
from ddjax.processes import Gaussian, LearnedVariance, Masked
from ddjax.schedules import CondOT

PROCESS = Gaussian(CondOT())
XT = jnp.asarray([[0.5, -2.0, 3.0, 0.1], [0.2, 0.1, -0.3, 0.4]])
T = jnp.asarray([0.4, 0.4])


def strong(xt, t, cond=None):
    """A noise that stands for x0 = 4 xt."""
    return Prediction((xt - (1 - t[:, None]) * 4 * xt) / t[:, None], "noise")


def test_static_and_dynamic_are_their_definitions():
    clipped = thresholding.static(strong, PROCESS, low=-1.0, high=2.0)(XT, T)
    assert clipped.kind == "x0"
    np.testing.assert_allclose(clipped.value, np.clip(4 * XT, -1, 2), rtol=1e-5)
    for limit, largest in ((1.0, math.inf), (1.0, 5.0), (2.0, math.inf)):
        said = thresholding.dynamic(strong, PROCESS, quantile=0.75, limit=limit, largest=largest)(XT, T)
        for x0, row in zip(4 * np.asarray(XT), np.asarray(said.value), strict=True):
            s = np.clip(np.quantile(np.abs(x0), 0.75), limit, largest)
            np.testing.assert_allclose(row, np.clip(x0, -s, s) * limit / s, rtol=1e-5)
        assert np.abs(said.value).max() <= limit * (1 + 1e-6)
    alone = thresholding.dynamic(strong, PROCESS)(XT[1:], T[1:]).value
    np.testing.assert_array_equal(alone[0], thresholding.dynamic(strong, PROCESS)(XT, T).value[1])


@pytest.mark.parametrize("one", [thresholding.static, thresholding.dynamic])
def test_a_learned_variance_stays(one):
    process, v = LearnedVariance(CondOT()), 0.1 * XT
    both = lambda xt, t, cond=None: Prediction(jnp.concatenate([strong(xt, t).value, v], -1), "noise")
    prediction, share = process.split(one(both, process)(XT, T), XT)
    np.testing.assert_array_equal(prediction.value, one(strong, PROCESS)(XT, T).value)
    np.testing.assert_allclose(share, (v + 1) / 2)


def test_off_is_the_denoiser_itself():
    assert thresholding.static(strong, PROCESS, low=-math.inf, high=math.inf) is strong
    assert thresholding.dynamic(strong, PROCESS, limit=math.inf) is strong


@pytest.mark.slow
def test_samples_stay_in_the_range():
    """Around guidance, whose evaluations are counted, with any solver, from noise to data."""
    guided = classifier_free(lambda xt, t, cond: Prediction(cond[:, None] + 0 * xt, "x0"), null=0.0, scale=3.0)
    denoise = thresholding.static(guided, PROCESS)
    assert evaluations(denoise) == 2
    for solver in (solvers.dpm_solver_pp(PROCESS), solvers.DDIM(PROCESS)):
        settings = {"shape": (2, 3), "solver": solver, "times": grids.uniform(4), "cond": jnp.ones(2)}
        wild = ddjax.sample(jax.random.key(0), guided, PROCESS, **settings)
        tame = ddjax.sample(jax.random.key(0), denoise, PROCESS, **settings)
        np.testing.assert_allclose(wild.x0, 3.0, rtol=1e-5)
        np.testing.assert_allclose(tame.x0, 1.0, rtol=1e-5)
        np.testing.assert_array_equal(tame.nfe, 8)


def test_errors():
    for call, message in [
        (lambda: thresholding.static(strong, PROCESS, low=1.0, high=0.0), "low < high"),
        (lambda: thresholding.dynamic(strong, PROCESS, quantile=1.5), "quantile"),
        (lambda: thresholding.dynamic(strong, PROCESS, limit=2.0, largest=1.0), "limit <= largest"),
        (lambda: thresholding.static(strong, Masked(3)), "Gaussian states"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
