"""Uniform corruption against the formulas in print."""

import jax
import jax.numpy as jnp
import numpy as np

from ddjax.predictions import Prediction
from ddjax.processes import Uniform
from ddjax.schedules import Cosine

PROCESS = Uniform(5, Cosine())


def test_path_kl_is_udlm(x64):
    """Schiff et al. 2024, eq. 18, with x_bar = K alpha x + 1 - alpha, written out."""
    rng = np.random.default_rng(0)
    t = 0.35
    alpha, rate = float(PROCESS.schedule.alpha(jnp.asarray(t))), float(PROCESS.schedule.alpha_prime(jnp.asarray(t)))
    theta = rng.dirichlet(np.ones(5))
    for x0 in range(5):
        for z in range(5):
            bar = 5 * alpha * np.eye(5)[x0] + 1 - alpha
            bar_theta = 5 * alpha * theta + 1 - alpha
            inner = np.sum(bar / bar[z] * np.log(bar_theta[z] * bar / (bar_theta * bar[z])))
            expected = rate / (5 * alpha) * (5 / bar[z] - 5 / bar_theta[z] - inner)
            prediction = Prediction(jnp.log(jnp.asarray(theta))[None, None], "cavity")
            ours = PROCESS.path_kl(jnp.asarray([[x0]]), prediction, jnp.asarray([[z]]), jnp.asarray([t]))
            np.testing.assert_allclose(ours[0, 0], expected, rtol=1e-9)


def test_reverse_is_udlm(x64):
    """Schiff et al. 2024, eq. 14: the plug-in posterior."""
    s, t, z = 0.2, 0.7, 3
    a_s, a_t = (float(PROCESS.schedule.alpha(jnp.asarray(v))) for v in (s, t))
    theta = np.random.default_rng(1).dirichlet(np.ones(5))
    a_ts, e_z = a_t / a_s, np.eye(5)[z]
    top = 5 * a_t * e_z * theta + (a_ts - a_t) * e_z + (a_s - a_t) * theta + (1 - a_ts) * (1 - a_s) / 5
    expected = top / (5 * a_t * theta[z] + 1 - a_t)
    prediction = Prediction(jnp.log(jnp.asarray(theta))[None, None], "cavity")
    ours = PROCESS.reverse(prediction, jnp.asarray([[z]]), jnp.asarray([s]), jnp.asarray([t])).logits[0, 0]
    np.testing.assert_allclose(jax.nn.softmax(ours), expected, rtol=1e-9)


def test_posterior_and_cavity_differ(x64):
    value = jnp.zeros((1, 1, 5))
    posterior = PROCESS.convert(Prediction(value, "cavity"), "posterior", jnp.asarray([[2]]), jnp.asarray([0.3])).value
    alpha = float(PROCESS.schedule.alpha(jnp.asarray(0.3)))
    expected = alpha * np.eye(5)[2] + (1 - alpha) / 5  # a flat cavity leaves the likelihood
    np.testing.assert_allclose(jax.nn.softmax(posterior)[0, 0], expected, rtol=1e-12)
