"""Guidance: off is off, on is the formula, impossible stays impossible."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddjax
from ddjax import grids
from ddjax.fixtures import GaussianMixture
from ddjax.guidance import classifier_free
from ddjax.predictions import Prediction, evaluations
from ddjax.processes import Gaussian, Masked
from ddjax.schedules import VPCosine
from ddjax.solvers import DDIM, Ancestral, Heun

MIXTURE = GaussianMixture(dims=2, components=3)
PROCESS = Gaussian(VPCosine())
XT, T, COND = jnp.asarray([[0.3, -1.0], [1.0, 0.2]]), jnp.asarray([0.3, 0.7]), jnp.asarray([0, 2])


def test_scale_one_is_the_denoiser_itself():
    denoise = MIXTURE.denoise(PROCESS)
    assert classifier_free(denoise, null=3, scale=1.0) is denoise
    assert classifier_free(denoise, null=3, scale=1) is denoise


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "scale"), [("x0", 0.0), ("x0", 3.0), ("noise", 0.5), ("velocity", 3.0)])
def test_gaussian_formula_at_every_kind(x64, kind, scale):
    """s_u + w (s_c - s_u) on the mixture's own scores, whichever kind the network speaks."""
    guided = classifier_free(MIXTURE.denoise(PROCESS, kind), null=3, scale=scale)(XT, T, COND)
    assert guided.kind == kind
    alpha, sigma = PROCESS.schedule.alpha(T), PROCESS.schedule.sigma(T)
    with_cond, without = MIXTURE.score(XT, alpha, sigma, COND), MIXTURE.score(XT, alpha, sigma)
    score = PROCESS.convert(guided, "score", XT, T).value
    np.testing.assert_allclose(score, without + scale * (with_cond - without), rtol=1e-6)


def table_denoiser(logits):
    """Logits by condition; row 2 is the unconditional one."""
    return lambda xt, t, cond: Prediction(jnp.asarray(logits)[cond][:, None] + jnp.zeros((*xt.shape, 1)), "posterior")


def test_categorical_formula():
    p = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.3, 0.4, 0.3]])
    # Unnormalised logits on purpose: the formula is about probabilities.
    guided = classifier_free(table_denoiser(np.log(p) + np.array([[5.0], [0.0], [-3.0]])), null=2, scale=2.5)
    out = guided(jnp.full((2, 4), 3), jnp.ones(2), jnp.asarray([0, 1]))
    expected = p[:2] ** 2.5 * p[2] ** -1.5
    expected /= expected.sum(-1, keepdims=True)
    np.testing.assert_allclose(jax.nn.softmax(out.value)[:, 0], expected, rtol=1e-5)
    assert out.value.shape == (2, 4, 3)


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_impossible_symbols_give_no_nan(scale):
    logits = np.array([[0.0, -np.inf, -np.inf], [0.0, 0.0, 0.0], [0.0, -np.inf, 0.0]])
    out = classifier_free(table_denoiser(logits), null=2, scale=scale)(
        jnp.full((1, 1), 3), jnp.ones(1), jnp.asarray([0])
    )
    np.testing.assert_allclose(jax.nn.softmax(out.value)[0, 0], [1.0, 0.0, 0.0], atol=1e-7)
    # Impossible without the condition, possible with it: finite.
    out = classifier_free(table_denoiser(logits), null=2, scale=scale)(
        jnp.full((1, 1), 3), jnp.ones(1), jnp.asarray([1])
    )
    assert np.isfinite(np.asarray(out.value)).all()


@pytest.mark.parametrize(("solver", "nfe"), [(DDIM, 8), (Heun, 16)])
def test_evaluations_double(solver, nfe):
    denoise = MIXTURE.denoise(PROCESS)
    guided = classifier_free(denoise, null=3, scale=2.0)
    assert evaluations(guided) == 2
    assert evaluations(classifier_free(guided, null=3, scale=2.0)) == 4
    settings = {"shape": (2, 2), "solver": solver(PROCESS), "times": grids.uniform(4), "cond": COND}
    plain = ddjax.sample(jax.random.key(0), denoise, PROCESS, **settings)
    out = ddjax.sample(jax.random.key(0), guided, PROCESS, **settings)
    assert (np.asarray(out.nfe) == nfe).all()
    assert (np.asarray(plain.nfe) == nfe // 2).all()
    assert np.abs(np.asarray(out.x0 - plain.x0)).max() > 1e-3


def test_the_scale_does_not_recompile_and_masked_samples_follow_the_condition():
    traces = []

    def apply(params, xt, t, cond):
        traces.append(1)
        return jnp.zeros((*xt.shape, 3)) + params[cond][:, None]

    process, params = Masked(3), jnp.asarray([[2.0, 0, 0], [0, 2.0, 0], [0, 0, 0]])
    share = {}
    for scale in (0.0, 2.0, 4.0):
        guided = classifier_free(ddjax.bind(apply, params, process, "posterior"), null=2, scale=scale)
        out = ddjax.sample(
            jax.random.key(0),
            guided,
            process,
            shape=(2000, 1),
            solver=Ancestral(process),
            times=grids.uniform(2),
            cond=jnp.zeros(2000, int),
        )
        share[scale] = (np.asarray(out.x0) == 0).mean()
    for scale, ours in share.items():
        expected = np.exp(2 * scale) / (np.exp(2 * scale) + 2)
        assert abs(ours - expected) < 4 * np.sqrt(expected * (1 - expected) / 2000) + 1e-3
    assert len(traces) <= 2  # abstract and concrete evaluation of one compilation


def test_a_tree_of_conditions():
    cond = {"a": COND, "b": jnp.ones((2, 3))}
    null = {"a": 3, "b": 0.0}
    denoise = lambda xt, t, cond: Prediction(xt + cond["a"][:, None] + cond["b"].sum(-1, keepdims=True), "x0")
    out = classifier_free(denoise, null=null, scale=2.0)(XT, T, cond).value
    with_cond, without = XT + COND[:, None] + 3, XT + 3
    np.testing.assert_allclose(out, without + 2 * (with_cond - without), rtol=1e-6)


def test_errors():
    with pytest.raises(ValueError, match="needs a condition"):
        classifier_free(MIXTURE.denoise(PROCESS), null=3, scale=2.0)(XT, T, None)


def test_of_a_dict_the_entry_cond_is_the_condition():
    """The others are shown on both sides."""
    seen = []

    def denoise(xt, t, cond):
        seen.append(cond)
        return Prediction(cond["z"] + 10.0 * cond["cond"][:, None], "x0")

    z = jnp.asarray([[1.0, 2.0], [3.0, 4.0]])
    guided = classifier_free(denoise, null=5, scale=3.0)(XT, T, {"z": z, "cond": COND})
    np.testing.assert_array_equal(seen[0]["z"], np.concatenate([z, z]))
    np.testing.assert_array_equal(seen[0]["cond"], [0, 2, 5, 5])
    np.testing.assert_allclose(guided.value, z + 10.0 * (5 + 3 * (COND[:, None] - 5)))
