"""Guidance by another network, against its definition: a linear log-probability has the same gradient everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax import guidance, solvers
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian, LearnedVariance
from ddjax.schedules import VPCosine

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 4, 3)).astype(np.float32)
SLOPE, Z = RNG.normal(size=(4, 3)).astype(np.float32), RNG.normal(size=(1, 2, 4, 3)).astype(np.float32)
T, S = 0.7, 0.3


def log_prob(x, t, cond):
    return (1.0 + cond) * t * (x * SLOPE).sum((1, 2))


def denoiser(process, seen, learned=False):
    def denoise(xt, t, cond):
        seen.append(cond)
        value = jnp.sin(xt)
        return Prediction(jnp.concatenate([value, 0.3 * value], -1) if learned else value, "noise")

    return denoise


COND = jnp.array([0.0, 2.0])
GRADIENT = (2.5 * T * (1 + np.asarray(COND)))[:, None, None] * SLOPE


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("told", [False, True])
def test_the_score_gains_the_gradient(learned, told):
    process, seen = (LearnedVariance if learned else Gaussian)(VPCosine()), []
    plain = denoiser(process, seen, learned)
    guided = guidance.by_classifier(plain, log_prob, process, scale=2.5, told=told)
    out = guided(jnp.asarray(X), jnp.full(2, T), COND)
    sigma = float(process.schedule.sigma(jnp.float32(T)))
    assert (out.kind, out.value.shape[-1]) == ("noise", 6 if learned else 3)
    np.testing.assert_allclose(out.value[..., :3], np.sin(X) - sigma * GRADIENT, rtol=1e-5, atol=1e-5)
    if learned:
        np.testing.assert_array_equal(out.value[..., 3:], 0.3 * jnp.sin(X))
    assert (seen[-1] is None) == (not told)


@pytest.mark.parametrize("learned", [False, True])
def test_means_move_by_variance_times_gradient(learned):
    process = (LearnedVariance if learned else Gaussian)(VPCosine())
    plain = denoiser(process, [], learned)
    guided = guidance.by_classifier(plain, log_prob, process, scale=2.5)
    solver = guidance.GuidedMean(process, solvers.noise.Given(Z))
    xt, keys = jnp.asarray(X), jax.random.split(jax.random.key(0))
    law = process.reverse(plain(xt, jnp.full(2, T), None), xt, S, T)
    assert 0.05 < float(law.std.max()) < 0.9  # its square is another number
    found = solver.step(keys, solver.init(xt), xt, jnp.float32(T), jnp.float32(S), guided, COND)[0]
    np.testing.assert_allclose(found, law.mean + law.std**2 * GRADIENT + law.std * Z[0], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="by_classifier"):
        solver.step(keys, solver.init(xt), xt, T, S, plain, COND)


def test_away_from_a_weaker_one():
    seen = []
    strong, weak = (
        (lambda xt, t, cond: Prediction(xt * 2, "v")),
        lambda xt, t, cond: seen.append(cond) or Prediction(xt * t[:, None, None], "v"),
    )
    out = guidance.by_weaker(strong, weak, scale=3.0, told=False)(jnp.asarray(X), jnp.full(2, T), COND)
    np.testing.assert_allclose(out.value, X * (T + 3 * (2 - T)), rtol=1e-5)
    assert seen == [None]
    assert guidance.by_weaker(strong, weak, scale=1.0) is strong
    other = lambda xt, t, cond: Prediction(xt, "noise")
    with pytest.raises(ValueError, match="predict 'v' and 'noise'"):
        guidance.by_weaker(strong, other, scale=2.0)(jnp.asarray(X), jnp.full(2, T), COND)


def test_parts_and_impossible_symbols():
    """Of a product each part; a symbol that is impossible for either network is judged by the stronger."""
    impossible = jnp.array([0.0, -jnp.inf])

    def says(first, second):
        return lambda xt, t, cond=None: Prediction({"a": jnp.asarray(first), "b": second}, "noise+posterior")

    out = guidance.by_weaker(says([3.0], impossible), says([1.0], impossible), scale=2.0)({}, jnp.ones(1))
    np.testing.assert_array_equal(out.value["a"], [5.0])
    np.testing.assert_array_equal(out.value["b"], impossible)

    def symbols(xt, t, cond):
        return Prediction({"a": jnp.log(jnp.array([[0.5, 0.5], [0.2, 0.8]]))[cond]}, "posterior")

    free = guidance.classifier_free(symbols, null=0, scale=2.0)
    out = free({"a": jnp.zeros((1, 1), int)}, jnp.ones(1), jnp.array([1])).value["a"]
    np.testing.assert_allclose(jax.nn.softmax(out), [[0.04 / 0.68, 0.64 / 0.68]], rtol=1e-5)
