"""The identities that unite variational, score-based and flow-based views, each side computed by itself.

(Luo 2022, "Understanding diffusion models: a unified perspective"; Lai et al. 2025, "The principles of diffusion
models".) The law is a mixture with full covariances, so that nothing is Gaussian by accident.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from ddjax.fixtures import GaussianMixture
from ddjax.guidance import classifier_free
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian
from ddjax.schedules import VE, CondOT, VPCosine

LAW = GaussianMixture(dims=3, components=3)
T = np.array([0.15, 0.4, 0.8])  # float64 under x64, made before it
schedules = pytest.mark.parametrize("schedule", [VPCosine(), CondOT(), VE()], ids=lambda s: type(s).__name__)


def noised(schedule):
    """Points in the bulk of the noised law, with their alpha and sigma, `(batch,)`."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)))
    alpha, sigma = schedule.alpha(jnp.asarray(T)), schedule.sigma(jnp.asarray(T))
    return alpha[:, None] * x + sigma[:, None] * x[::-1], alpha, sigma


def log_density(x, alpha, sigma, cond=None):
    return LAW.log_prob(x, alpha, sigma, cond)


@schedules
def test_tweedie_and_the_three_predictions(x64, schedule):
    """The score is the gradient of the log-density; x0 and noise are what it says of them by Tweedie's formula."""
    xt, alpha, sigma = noised(schedule)
    process = Gaussian(schedule)
    score = jax.grad(lambda x: log_density(x, alpha, sigma).sum())(xt)
    x0 = (xt + sigma[:, None] ** 2 * score) / alpha[:, None]
    noise = -sigma[:, None] * score
    for kind, value in {"score": score, "x0": x0, "noise": noise}.items():
        stated = LAW.denoise(process, kind)(xt, jnp.asarray(T)).value
        np.testing.assert_allclose(stated, value, rtol=1e-8, atol=1e-10)
        for other, expected in {"score": score, "x0": x0, "noise": noise}.items():
            converted = process.convert(Prediction(value, kind), other, xt, jnp.asarray(T)).value
            np.testing.assert_allclose(converted, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.slow
@schedules
def test_guidance_is_bayes_rule(x64, schedule):
    """grad log p(x | y) - grad log p(x) = grad log p(y | x), and classifier-free guidance adds it scale times."""
    xt, alpha, sigma = noised(schedule)
    process, label, scale = Gaussian(schedule), jnp.asarray([0, 1, 2]), 2.5
    log_w = LAW.parameters()[0]

    def log_classifier(x):
        """Of the labels, from densities alone."""
        joint = jnp.stack([log_density(x, alpha, sigma, jnp.full(3, y)) + log_w[y] for y in range(3)])
        return jnp.take_along_axis(jax.nn.log_softmax(joint, axis=0), label[None], axis=0)[0]

    likelihood = jax.grad(lambda x: log_classifier(x).sum())(xt)
    score = jax.grad(lambda x: log_density(x, alpha, sigma).sum())(xt)
    guided = classifier_free(LAW.denoise(process, "score"), null=jnp.int32(3), scale=scale)
    stated = process.convert(guided(xt, jnp.asarray(T), label), "score", xt, jnp.asarray(T)).value
    np.testing.assert_allclose(stated, score + scale * likelihood, rtol=1e-8, atol=1e-9)


@schedules
def test_the_bound_is_weighted_score_matching(x64, schedule):
    """path_kl of a prediction = g^2 / 2 |score of q(x_t | x0) - predicted score|^2."""
    xt, alpha, sigma = noised(schedule)
    process = Gaussian(schedule)
    x0 = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3)))
    predicted = jnp.asarray(np.random.default_rng(2).normal(size=(3, 3)))
    conditional = jax.grad(lambda x: jax.scipy.stats.norm.logpdf(x, alpha[:, None] * x0, sigma[:, None]).sum())(xt)
    squared = (conditional - predicted) ** 2
    # g^2 = d sigma^2/dt - 2 (d log alpha/dt) sigma^2, by differences of the schedule.
    h = 1e-5
    slope = lambda of: (of(T + h) - of(T - h)) / (2 * h)
    log_alpha = lambda t: jnp.log(schedule.alpha(t))
    g2 = slope(lambda t: schedule.sigma(t) ** 2) - 2.0 * slope(log_alpha) * sigma**2
    kl = process.path_kl(x0, Prediction(predicted, "score"), xt, jnp.asarray(T))
    np.testing.assert_allclose(kl, 0.5 * g2[:, None] * squared, rtol=1e-6)


@pytest.mark.slow
@schedules
def test_ode_and_sde_have_the_same_marginals(x64, schedule):
    """d p/dt by the continuity equation of the velocity, and by the Fokker-Planck equation of the forward SDE."""
    xt, process = noised(schedule)[0], Gaussian(schedule)
    f, g2 = process.sde(jnp.asarray(T))

    def density(x, t):
        return jnp.exp(LAW.log_prob(x[None], schedule.alpha(t), schedule.sigma(t))[0])

    for x, t, drift, diffusion in zip(xt, jnp.asarray(T), f, g2, strict=True):
        h = 1e-5
        change = (density(x, t + h) - density(x, t - h)) / (2 * h)
        flux = lambda x, t=t: density(x, t) * LAW.denoise(process, "velocity")(x[None], t[None]).value[0]
        continuity = -jnp.trace(jax.jacfwd(flux)(x))
        drifted = lambda x, t=t, drift=drift: drift * x * density(x, t)
        laplacian = jnp.trace(jax.hessian(lambda x, t=t: density(x, t))(x))
        fokker_planck = -jnp.trace(jax.jacfwd(drifted)(x)) + 0.5 * diffusion * laplacian
        np.testing.assert_allclose(continuity, change, rtol=1e-6)
        np.testing.assert_allclose(fokker_planck, change, rtol=1e-6)


@pytest.mark.slow
def test_flow_maps_compose(x64):
    """From t to r is from t to s and on to r; back again is the identity; densities follow the Jacobian."""
    process = Gaussian(CondOT())
    velocity = jax.jit(lambda x, t: LAW.denoise(process, "velocity")(x[None], t[None]).value[0])

    def flow(x, t, s):
        return solve_ivp(lambda t, x: velocity(x, jnp.asarray(t)), (t, s), x, rtol=1e-10, atol=1e-10).y[:, -1]

    x = np.asarray(noised(CondOT())[0][1])
    whole = flow(x, 0.9, 0.1)
    np.testing.assert_allclose(flow(flow(x, 0.9, 0.5), 0.5, 0.1), whole, atol=1e-8)
    np.testing.assert_allclose(flow(whole, 0.1, 0.9), x, atol=1e-8)
    h = 1e-4
    jacobian = np.stack([(flow(x + h * e, 0.9, 0.1) - flow(x - h * e, 0.9, 0.1)) / (2 * h) for e in np.eye(3)], -1)
    log_p = lambda x, t: float(LAW.log_prob(jnp.asarray(x)[None], CondOT().alpha(t), CondOT().sigma(t))[0])
    change = np.linalg.slogdet(jacobian)[1]
    np.testing.assert_allclose(log_p(whole, 0.1) + change, log_p(x, 0.9), atol=1e-5)
