"""Geometric Brownian motion against its closed forms, and the bound against the entropy of log-normal laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gaussian_law import GaussianLaw, expected_bound
from scipy import integrate, stats

import ddjax
from ddjax import random
from ddjax.likelihood import nelbo
from ddjax.objectives import gaussian
from ddjax.predictions import GAUSSIAN_KINDS, Prediction
from ddjax.processes import PFGM, Gaussian, Geometric
from ddjax.processes.geometric import on_log
from ddjax.schedules import EDM, VPCosine
from ddjax.solvers import Ancestral, Heun

SIGMA = 1.5  # at t = 1, with EDM's clock
GROWTH = 0.3
PROCESS = Geometric(Gaussian(EDM(SIGMA), 0.8), GROWTH)


def moments(schedule, dims, t):
    return float(schedule.alpha(jnp.asarray(t))) * np.eye(dims), float(schedule.sigma(jnp.asarray(t))) ** 2 * np.eye(
        dims
    )


def states(seed, batch=3, sites=2):
    return jnp.exp(jnp.asarray(np.random.default_rng(seed).normal(size=(batch, sites))))


def test_moments_are_those_of_geometric_brownian_motion(x64):
    """E[x] and Var[x] by their ordinary differential equations, and the density by quadrature."""
    t = 0.7
    speed = lambda t: 2 * SIGMA**2 * t  # s^2 = d(sigma^2)/dt

    def slope(t, m):  # Ito: d E[x] = mu E[x] dt, d E[x^2] = (2 mu + s^2) E[x^2] dt
        return [GROWTH * speed(t) * m[0], (2 * GROWTH + 1) * speed(t) * m[1]]

    for start in (0.4, 2.5):
        law = PROCESS.marginal(jnp.full((1, 1), start), jnp.full(1, t))
        first, second = integrate.solve_ivp(slope, (0, t), [start, start**2], rtol=1e-11, atol=1e-12).y[:, -1]
        np.testing.assert_allclose(law.mean[0, 0], first, rtol=1e-9)
        x = np.exp(np.linspace(np.log(start) - 14, np.log(start) + 14, 4001))
        weights = np.exp(np.asarray(law.log_prob(jnp.asarray(x[None]))))[0] * x * 28 / 4000  # dx = x d log x
        np.testing.assert_allclose([weights.sum(), weights @ x, weights @ x**2], [1, first, second], rtol=1e-9)


@pytest.mark.slow
def test_marginal_bridge_and_reverse_are_scipys(x64):
    x0, xt, at = states(0), states(1), states(2)
    sigma, shift = lambda t: SIGMA * t, lambda t: (GROWTH - 0.5) * (SIGMA * t) ** 2
    s, t = 0.3, 0.7
    ours = PROCESS.marginal(x0, jnp.full(3, t)).log_prob(at)
    scale = np.exp(np.log(x0) + shift(t))
    np.testing.assert_allclose(ours, stats.lognorm.logpdf(at, sigma(t), scale=scale), rtol=1e-10)
    # Brownian motion pinned at both ends, on the logarithm.
    share = (s / t) ** 2
    mean = (1 - share) * np.log(x0) + share * (np.log(xt) - shift(t)) + shift(s)
    std = sigma(s) * np.sqrt(1 - share)
    truth = stats.lognorm.logpdf(at, std, scale=np.exp(mean))
    target = PROCESS.convert(Prediction(x0, "x0"), "hyvarinen", xt, jnp.full(3, t))
    for law in (
        PROCESS.bridge(x0, xt, jnp.full(3, s), jnp.full(3, t)),
        PROCESS.reverse(target, xt, jnp.asarray(s), jnp.asarray(t)),
    ):
        np.testing.assert_allclose(law.log_prob(at), truth, rtol=1e-9)


@pytest.mark.slow
def test_scores_and_conversions(x64):
    """The score of log x and the Hyvarinen score are gradients of the two log-densities."""
    x0, xt, t = states(0), states(1), jnp.full(3, 0.6)
    density = lambda x: PROCESS.marginal(x0, t).log_prob(x).sum()
    hyvarinen = xt * jax.grad(density)(xt)
    score = jax.grad(lambda y: density(jnp.exp(y)) + y.sum())(jnp.log(xt))
    sigma, alpha = SIGMA * 0.6, 1.0
    noise = (jnp.log(xt) - jnp.log(x0) - (GROWTH - 0.5) * sigma**2) / sigma
    np.testing.assert_allclose(PROCESS.network_outputs(jnp.log(x0), xt, t, "x0"), x0, rtol=1e-12)
    truth = {
        "x0": x0,
        "noise": noise,
        "score": score,
        "hyvarinen": hyvarinen,
        "velocity": SIGMA * noise,
        "v": alpha * noise - sigma * jnp.log(x0),
    }
    for start, value in truth.items():
        for end, other in truth.items():
            ours = PROCESS.convert(Prediction(value, start), end, xt, t).value
            np.testing.assert_allclose(ours, other, atol=1e-10)


def expected(process, law, t_range):
    """The bound's three terms over log-normal data, quadratics of normals: no Monte Carlo."""
    at = functools.partial(moments, process.schedule, len(law.mean))

    class OnLogarithms:
        """`expected_bound` draws normals: those are the logarithms of the data."""

        time_at = process.time_at

        def __getattr__(self, name):
            return lambda y0, *arguments: getattr(process, name)(jnp.exp(y0), *arguments)

    noisy = lambda d, z: jnp.exp(d.shift + d.law.mean + d.law.std * z)

    class Law(GaussianLaw):
        def denoise(self, *arguments):
            """The exact denoiser, which knows the logarithm without growth's shift."""
            denoise = super().denoise(*arguments)
            return lambda xt, t: Prediction(jnp.exp(denoise(process.log(xt, t), t).value), "x0")

    law = Law(law.mean, law.covariance)
    return expected_bound(OnLogarithms(), law, at, noisy, len(law.mean), t_range), at


@pytest.mark.slow
def test_nelbo_is_the_entropy_of_a_log_normal_law(x64):
    """Where the prior is the marginal, the bound is tight; growth moves no nats."""
    law = GaussianLaw(np.zeros(2), 0.64 * np.eye(2))
    entropy = sum(stats.lognorm(0.8).entropy() for _ in range(2))
    ours, _ = expected(PROCESS, law, (1e-4, 1.0))
    np.testing.assert_allclose(ours.sum(), entropy, atol=1e-6)
    # Without the Jacobian the nats would be those of the logarithm: here the same, as E[log x] = 0; so shift the data.
    law = GaussianLaw(np.array([0.7, -1.1]), np.diag([0.5, 0.2]))
    ours, at = expected(PROCESS, law, (0.05, 1.0))
    theory = law.bound(at, 0.05, 1.0, (SIGMA**2 + 0.64) * np.eye(2)) + np.array([0.0, 0.0, law.mean.sum()])
    np.testing.assert_allclose(ours, theory, atol=1e-8)
    entropy = sum(
        stats.lognorm(np.sqrt(v), scale=np.exp(m)).entropy() for m, v in zip(law.mean, (0.5, 0.2), strict=True)
    )
    assert theory.sum() > entropy


@pytest.mark.slow
def test_nelbo_of_other_schedules_and_growths(x64):
    law = GaussianLaw(np.array([0.7, -1.1]), np.diag([0.5, 0.2]))
    for process in (Geometric(Gaussian(VPCosine(), 0.6), 0.0), Geometric(Gaussian(VPCosine(), 0.6), 1.0)):
        ours, at = expected(process, law, (0.02, 0.98))
        a, v = at(0.98)
        theory = law.bound(at, 0.02, 0.98, v + 0.36 * a @ a) + np.array([0.0, 0.0, law.mean.sum()])
        np.testing.assert_allclose(ours, theory, atol=1e-8)


def test_steps_cost_their_kl(x64):
    x0, xt, s, t = states(0), states(1), jnp.full(3, 0.3), jnp.full(3, 0.7)
    guess = Prediction(states(2), "x0")
    q, p = PROCESS.bridge(x0, xt, s, t), PROCESS.reverse(guess, xt, s, t)
    z, w = np.polynomial.hermite_e.hermegauss(12)
    total = sum(
        wi * (q.log_prob(x) - p.log_prob(x))
        for zi, wi in zip(z, w / w.sum(), strict=True)
        for x in [jnp.exp(q.shift + q.law.mean + q.law.std * zi)]
    )
    np.testing.assert_allclose(PROCESS.step_kl(x0, guess, xt, s, t), total, rtol=1e-9)


@pytest.mark.slow
def test_samples_are_positive_and_the_log_view_is_the_same_model():
    point = jnp.asarray([3.0, 0.01])
    denoise = lambda xt, t, cond: Prediction(jnp.broadcast_to(point, xt.shape), "x0")
    times = jnp.linspace(1.0, 0.0, 9)
    out = ddjax.sample(
        jax.random.key(0), denoise, PROCESS, shape=(4, 2), solver=Ancestral(PROCESS), times=times, trajectory=True
    )
    assert (np.asarray(out.trajectory) > 0).all()
    np.testing.assert_allclose(out.x0, np.tile(point, (4, 1)), rtol=1e-5)
    inner = PROCESS.process
    y = ddjax.sample(
        jax.random.key(0), on_log(denoise, PROCESS), inner, shape=(4, 2), solver=Heun(inner), times=times
    ).x0
    np.testing.assert_allclose(jnp.exp(y), out.x0, rtol=1e-5)
    # A network that states the paper's score is the same model as one that states log x0, on states or on logarithms.
    x, t = states(3), jnp.full(3, 0.4)
    said = PROCESS.convert(Prediction(jnp.sqrt(x), "x0"), "hyvarinen", x, t)
    other = on_log(lambda xt, t, cond: PROCESS.convert(Prediction(jnp.sqrt(xt), "x0"), "hyvarinen", xt, t), PROCESS)
    got = other(PROCESS.log(x, t), t)
    assert got.kind == "score"
    np.testing.assert_allclose(got.value, said.value + 1.0, rtol=1e-4)
    prior = PROCESS.prior((20_000, 1)).sample(random.example_keys(jax.random.key(1), 20_000))
    log_mean, log_std = (GROWTH - 0.5) * SIGMA**2, np.hypot(SIGMA, 0.8)
    assert stats.kstest(np.log(np.asarray(prior)[:, 0]), stats.norm(log_mean, log_std).cdf).pvalue > 1e-3


@pytest.mark.slow
def test_multiplicative_denoising_score_matching(x64):
    """The paper's target for one atom is x grad log q(x_t | x_0), and costs nothing."""
    atom = 2.0

    def apply(params, y, t, cond, **_):  # shown the logarithm, less growth
        return params - (y - jnp.log(atom)) / (SIGMA * t[:, None]) ** 2 - 1.0

    objective = gaussian(PROCESS, "hyvarinen", error="score")
    loss = lambda params: objective(jax.random.key(0), apply, params, jnp.full((8, 2), atom))[0]
    np.testing.assert_allclose([loss(0.0), loss(0.3)], [0.0, 0.09], atol=1e-6)
    # A network for x0 gives its logarithm, and so does the process when it says what is true.
    constant = lambda params, y, t, cond, **_: jnp.full_like(y, np.log(atom))
    objective = gaussian(PROCESS, "x0", error="noise")
    np.testing.assert_allclose(objective(jax.random.key(0), constant, {}, jnp.full((8, 2), atom))[0], 0.0, atol=1e-6)


def test_both_ends_are_finite_in_float32():
    x0, xt = states(0).astype(jnp.float32), states(1).astype(jnp.float32)

    def loss(value, t):
        kinds = (*GAUSSIAN_KINDS, "hyvarinen")
        return sum(PROCESS.convert(Prediction(value, "x0"), end, xt, t).value.sum() for end in kinds)

    slope = jax.jit(jax.value_and_grad(loss))
    for t in (0.0, 1.0):
        value, gradient = slope(x0, jnp.full(3, t))
        assert np.isfinite(float(value))
        assert np.isfinite(np.asarray(gradient)).all()
    denoise = lambda xt, t, cond: Prediction(jnp.zeros_like(xt), "hyvarinen")
    bound = nelbo(jax.random.key(0), denoise, PROCESS, x0[:1, :1], num_times=2)
    assert np.isfinite(np.asarray(bound.total)).all()


def test_errors():
    with pytest.raises(ValueError, match="needs a Gaussian process"):
        Geometric(PFGM(EDM()))
    with pytest.raises(ValueError, match="Geometric does not understand"):
        PROCESS.convert(Prediction(states(0), "posterior"), "x0", states(0), jnp.zeros(3))
    with pytest.raises(ValueError, match=r"on_log is for processes\.Geometric"):
        on_log(lambda *_: None, PROCESS.process)
    assert Geometric(Gaussian(EDM(2.0))) == Geometric(Gaussian(EDM(2.0)))
