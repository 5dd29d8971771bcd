"""The ODE's likelihood of every process that has one, against densities known in closed form.

Denoisers are exact by formulas of this file (NumPy's matrices, sums of images, Gaussian posteriors), so that the ODE
carries the law's own density; where something is drawn beside, every draw must have it too, or be below it by what
theory says.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.linalg import expm
from scipy import stats

from ddjax import random
from ddjax.experiment import build
from ddjax.fixtures import GaussianMixture
from ddjax.likelihood import Adaptive, UniformNoise, ode
from ddjax.objectives import learned_elbo
from ddjax.paths import Noise, Straight, Trigonometric
from ddjax.predictions import Prediction
from ddjax.processes import (
    AdaptiveGaussian,
    Barycentric,
    Gaussian,
    Geometric,
    InBasis,
    Interpolant,
    LearnedGaussian,
    LinearSDE,
    Orthogonal,
    Reflected,
    critically_damped,
)
from ddjax.processes.linear_sde import LinearFlow
from ddjax.run import Run
from ddjax.schedules import VE, CondOT, Heat, LogSNRLinear, Monotone, PerSite, ShortestPath, VPCosine, VPLinear
from ddjax.training.loop import evaluate
from ddjax.training.report import describe_bound

KEY = jax.random.key(0)
RNG = np.random.default_rng(3)


def between(schedule, high=18.0, low=-24.0):
    """The times of these log-SNRs, between which nothing is lost to 1e-4."""
    return tuple(float(np.clip(schedule.time(jnp.asarray(v, float)), 0.0, 1.0)) for v in (high, low))


# -- positive states ---------------------------------------------------------------------------------------------

POSITIVE = Geometric(Gaussian(CondOT()), growth=0.2)
LOG_MEAN, LOG_STD = np.array([0.3, -0.8]), np.array([0.5, 1.2])


def of_logarithm(xt, t, cond=None):
    """The exact noise in the logarithm of x_t, whose growth is 0.2, for log-normal data."""
    alpha, sigma = 1.0 - t[:, None], t[:, None]
    off = jnp.log(xt) + 0.3 * sigma**2 - alpha * LOG_MEAN
    return Prediction(sigma * off / (alpha**2 * LOG_STD**2 + sigma**2), "noise")


@pytest.mark.slow
def test_positive_states_have_their_own_density(x64):
    x0 = np.exp(LOG_MEAN + LOG_STD * RNG.normal(size=(4, 2)))
    found = ode(KEY, of_logarithm, POSITIVE, x0, t_range=between(POSITIVE.schedule), num_steps=160)
    exact = stats.lognorm.logpdf(x0, LOG_STD, scale=np.exp(LOG_MEAN)).sum(-1)
    np.testing.assert_allclose(found.log_prob, exact, atol=1e-4)
    shift = -0.3 * float(POSITIVE.schedule.sigma(found.t_range[1])) ** 2
    wide = float(POSITIVE.process.prior_std(jnp.asarray(found.t_range[1])))
    prior = stats.lognorm.logpdf(np.asarray(found.latent), wide, scale=math.exp(shift)).sum(-1)
    np.testing.assert_allclose(found.prior, prior, rtol=1e-9)
    assert not found.bound
    assert not found.drawn.any()


# -- the box -----------------------------------------------------------------------------------------------------

BOX = Reflected(VE(0.02, 2.0))
CENTRES, MASSES, WIDTH = np.array([0.0, 0.3, 0.95]), np.array([0.2, 0.5, 0.3]), 0.15


def folded_law(x, sigma):
    """Log-density of normals folded into the box, noised: images on either side."""
    away = jnp.stack([x - c for c in CENTRES] + [x + c for c in CENTRES])[..., None] - 2.0 * np.arange(-9, 10)
    wide = jnp.hypot(sigma, WIDTH)
    logs = -0.5 * (away / wide) ** 2 + np.log(np.tile(MASSES, 2))[:, None]
    return jax.nn.logsumexp(logs) - jnp.log(wide) - 0.5 * math.log(2 * math.pi)


def of_box(xt, t, cond=None):
    sigma = jnp.repeat(BOX.schedule.sigma(t), xt.shape[1])
    return Prediction(jax.vmap(jax.grad(folded_law))(xt.ravel(), sigma).reshape(xt.shape), "score")


def test_in_the_box_also_at_its_walls(x64):
    x0 = jnp.asarray([[0.0, 0.999], [0.02, 1.0], [0.45, 0.7], [0.3, 0.6]])
    found = ode(KEY, of_box, BOX, x0, num_steps=160)
    exact = jax.vmap(lambda x: folded_law(x, 0.02))(x0.ravel()).reshape(x0.shape).sum(-1)
    np.testing.assert_allclose(found.log_prob, exact, atol=1e-5)
    assert ((found.latent >= 0) & (found.latent <= 1)).all()
    np.testing.assert_array_equal(found.prior, 0.0)


@pytest.mark.slow
def test_noise_of_a_bin_stays_where_values_may_be(x64):
    """The bins of the outermost of five levels are half as wide in the box; probabilities of all add up to 1."""
    levels = jnp.linspace(0.0, 1.0, 5)
    keys = random.example_keys(KEY, 4000)
    x, log_q = UniformNoise(0.25, *BOX.support)(keys, jnp.tile(levels, (4000, 1)))
    assert ((x > 0) & (x <= 1)).all()
    np.testing.assert_allclose(np.exp(-log_q[0]), [0.125, 0.25, 0.25, 0.25, 0.125], rtol=1e-12)
    for site, (low, wide) in enumerate([(0, 0.125), (0.125, 0.25), (0.375, 0.25), (0.625, 0.25), (0.875, 0.125)]):
        assert stats.kstest(np.asarray(x[:, site]), stats.uniform(low, wide).cdf).pvalue > 1e-3
    with pytest.raises(ValueError, match="low < high"):
        UniformNoise(0.1, 1.0, 0.0)


# -- orthonormal bases -------------------------------------------------------------------------------------------

TURN = np.linalg.qr(RNG.normal(size=(3, 3)))[0]
FACTOR = np.diag([0.5, 0.9, 1.3]) + 0.2 * RNG.normal(size=(3, 3))
MEAN, COVARIANCE = 0.5 * RNG.normal(size=3), FACTOR @ FACTOR.T
COEFFICIENTS = np.stack([np.linspace(-0.5, 0.5, 3), np.ones(3), np.linspace(0.3, 1.2, 3)])


def of_gaussian(moments):
    """E[x0 | u] of N(MEAN, COVARIANCE) data under u = A x0 + N(0, V), (A, V) = moments(t)."""

    def denoise(u, t, cond=None):
        a, v = moments(t[0])
        gain = jnp.linalg.solve(a @ COVARIANCE @ a.T + v, a @ COVARIANCE).T
        return Prediction((u - a @ MEAN) @ gain.T + MEAN, "x0")

    return denoise


@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param(ShortestPath(np.array([2.0, 1.0, 0.2])), marks=pytest.mark.slow),
        pytest.param(Heat(np.array([0.0, 0.3, 1.0]), blur=1.5), marks=pytest.mark.slow),
        pytest.param(PerSite(COEFFICIENTS, 18.0, -24.0), marks=pytest.mark.slow),
    ],
    ids=["ShortestPath", "Heat", "PerSite"],
)
def test_in_any_basis_and_with_a_schedule_for_each_coordinate(x64, schedule):
    process = InBasis(Gaussian(schedule), Orthogonal(TURN))

    def moments(t):
        alpha, sigma = (jnp.broadcast_to(f(t), (3,)) for f in (schedule.alpha, schedule.sigma))
        return TURN @ (alpha[:, None] * TURN.T), TURN @ (sigma[:, None] ** 2 * TURN.T)

    x0 = jnp.asarray(RNG.multivariate_normal(MEAN, COVARIANCE, 4))
    options = {"t_range": between(schedule.common), "num_steps": 160}
    found = ode(KEY, of_gaussian(moments), process, x0, **options)
    a, v = (np.asarray(m) for m in moments(jnp.asarray(found.t_range[0])))
    noised = stats.multivariate_normal(a @ MEAN, a @ COVARIANCE @ a.T + v).logpdf(np.asarray(x0) @ a.T)
    np.testing.assert_allclose(found.log_prob, noised + np.linalg.slogdet(a)[1], atol=1e-4)
    exact = stats.multivariate_normal(MEAN, COVARIANCE).logpdf(x0)
    np.testing.assert_allclose(found.log_prob, exact, atol=1e-3)  # of little noise
    assert not found.bound


@pytest.mark.slow
def test_a_schedule_learns_in_a_basis(x64):
    """The bound's slope by the coefficients is that of the process on the coordinates themselves."""
    inner = Gaussian(PerSite(COEFFICIENTS, 10.0, -10.0))
    turned, x0 = InBasis(inner, Orthogonal(TURN)), jnp.asarray(RNG.normal(size=(8, 3)))

    def slope(process, network, x0):
        def loss(parameters):
            params = {"network": {}, "process": parameters}
            return learned_elbo(process, "x0")(jax.random.key(0), network, params, x0, train=False)[0]

        return jax.jit(jax.value_and_grad(loss))(process.parameters)

    # The same normals are drawn in the coordinates of both.
    value, of_turned = slope(turned, lambda _, xt, *a, **k: jnp.tanh(xt @ TURN) @ TURN.T, x0)
    same, of_inner = slope(inner, lambda _, yt, *a, **k: jnp.tanh(yt), x0 @ TURN)
    np.testing.assert_allclose(value, same, rtol=1e-10)
    np.testing.assert_allclose(of_turned, of_inner, rtol=1e-8)
    assert np.abs(of_inner).max() > 1e-3
    replaced = turned.with_parameters(2.0 * COEFFICIENTS)
    assert replaced == InBasis(Gaussian(PerSite(2.0 * COEFFICIENTS, 10.0, -10.0)), Orthogonal(TURN))
    assert InBasis(Gaussian(Monotone.initial()), Orthogonal(TURN)).variance_parameters
    assert not hasattr(InBasis(Gaussian(VPCosine()), Orthogonal(TURN)), "parameters")


# -- auxiliary variables -----------------------------------------------------------------------------------------

NOISE, ROTATION = np.array([[1.4, 0.2], [0.4, 2.2]]), np.array([[0.0, -0.6], [0.6, 0.0]])
DAMPED = critically_damped(VPLinear(), mass=0.25, start=0.3)
STILL = critically_damped(start=0.0)
GENERAL = LinearSDE(NOISE, ROTATION, VPLinear(), scale=(1.2, 0.7), start=0.4)
POINTS = np.array([[-1.0, 0.2, 0.5], [0.3, 0.4, -0.9], [1.2, -0.3, 1.1]])


def left_and_met(process, t):
    """What is left of two parts after t, by the exponential of a generator, and the noise met, in units of `scale`.

    Noise that has come in is what the parts lack to be stationary.
    """
    noise, rotation = (np.asarray(v) for v in (process.noise, process.rotation))
    generator = -0.5 * noise @ noise.T - 0.5 * (rotation - rotation.T)
    left = expm(generator * jnp.log1p(jnp.exp(-process.schedule.log_snr(t))))
    return left, jnp.eye(2) - left @ left.T


def of_parts(process, off=0.0):
    """The exact x0 of three sites of N(MEAN, COVARIANCE) on the last axis."""
    scale = np.asarray(process.scale)

    def moments(t):
        left, met = left_and_met(process, t)
        met = met + process.start**2 * jnp.outer(left[:, 1], left[:, 1])
        a = scale[:, None] * left[:, :1] / scale[0]
        return jnp.kron(a, jnp.eye(3)), jnp.kron(scale[:, None] * met * scale, jnp.eye(3))

    exact = of_gaussian(moments)

    def denoise(u, t, cond=None):
        return Prediction(exact(u, t).value + off * jnp.tanh(u[:, 3:] + t[:, None]), "x0")

    return denoise


EARLY = float(np.asarray(VPLinear().time(jnp.asarray(-np.log(np.expm1(1e-5))))))


@pytest.mark.slow
@pytest.mark.parametrize("process", [DAMPED, STILL, GENERAL], ids=["damped", "from 0", "general"])
def test_auxiliary_variables_leave_the_datas_density(x64, process):
    """The joint law of data and auxiliary variables, less that of the latter: no draw is off."""
    found = ode(KEY, of_parts(process), process, POINTS, num_steps=256, t_range=(EARLY, 1.0))
    exact = stats.multivariate_normal(MEAN, COVARIANCE).logpdf(POINTS)
    np.testing.assert_allclose(found.log_prob, exact, atol=1e-4)
    assert found.bound
    assert not found.discrete
    assert (found.dims, found.latent.shape) == (3, (3, 6))


def width(process, t):
    """Of the auxiliary variable at t, given the data's part and nothing of x0."""
    left, met = (np.asarray(v) for v in left_and_met(process, jnp.asarray(t)))
    met = met + process.start**2 * np.outer(left[:, 1], left[:, 1])
    row = np.array([-left[1, 0] / left[0, 0], 1.0])
    return process.scale[1] * math.sqrt(row @ met @ row)


@pytest.mark.slow
def test_the_entropy_of_what_is_drawn(x64):
    found = ode(KEY, of_parts(GENERAL), GENERAL, np.tile(POINTS, (400, 1)), num_steps=8, t_range=(0.05, 1.0))
    entropy = 3 * stats.norm(scale=width(GENERAL, 0.05)).entropy()
    assert abs(found.drawn.mean() - entropy) < 3 * found.drawn.std() / math.sqrt(1200)
    assert found.drawn.std() > 0.5


NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(9)
GRID = np.stack(np.meshgrid(NODES, NODES, NODES), -1).reshape(-1, 3)
CHANCES = np.prod(np.stack(np.meshgrid(WEIGHTS, WEIGHTS, WEIGHTS), -1).reshape(-1, 3), -1) / (2 * np.pi) ** 1.5


class ChosenFlow(LinearFlow):
    def complete(self, keys, xt, t):
        with jax.ensure_compile_time_eval():
            law = stats.norm(scale=width(GENERAL, 0.02))
        v = law.std() * GRID
        return xt.at[:, 3:].add(v), jnp.asarray(law.logpdf(v).sum(-1))


class Chosen(LinearSDE):
    """Its auxiliary variables are not drawn: those of row i are GRID[i], in units of their width."""

    def flow(self):
        return ChosenFlow(self)


@pytest.mark.slow
def test_a_wrong_networks_bound_is_below_its_density(x64):
    """log p(x) by quadrature over the joint density, and the mean of the draws by quadrature too."""
    denoise, x0, options = of_parts(GENERAL, off=0.3), POINTS[:1], {"num_steps": 64, "t_range": (0.02, 1.0)}
    process = Chosen(NOISE, ROTATION, VPLinear(), scale=(1.2, 0.7), start=0.4)
    chosen = np.asarray(ode(KEY, denoise, process, np.tile(x0, (len(GRID), 1)), **options).log_prob)
    density, mean = np.log(CHANCES @ np.exp(chosen)), CHANCES @ chosen
    assert density - mean > 0.01
    found = ode(KEY, denoise, GENERAL, np.tile(x0, (1000, 1)), **options).log_prob
    assert abs(found.mean() - mean) < 3 * found.std() / math.sqrt(1000)


@pytest.mark.slow
def test_without_auxiliary_variables_it_is_the_density(x64):
    """All parts data: nothing is drawn."""
    process = LinearSDE(NOISE, ROTATION, LogSNRLinear(16.0, -24.0), data=2, scale=(1.2, 0.7))
    scale = np.array([1.2, 0.7])
    generator = -0.5 * NOISE @ NOISE.T - 0.5 * (ROTATION - ROTATION.T)
    mean, covariance = MEAN[:2], COVARIANCE[:2, :2]

    def denoise(u, t, cond=None):
        left = expm(generator * jnp.log1p(jnp.exp(-process.schedule.log_snr(t[0]))))
        a, v = scale[:, None] * left / scale, scale[:, None] * (jnp.eye(2) - left @ left.T) * scale
        gain = jnp.linalg.solve(a @ covariance @ a.T + v, a @ covariance).T
        return Prediction((u - a @ mean) @ gain.T + mean, "x0")

    found = ode(KEY, denoise, process, POINTS[:, :2], num_steps=200, t_range=(0.0, 1.0))
    np.testing.assert_allclose(
        found.log_prob, stats.multivariate_normal(mean, covariance).logpdf(POINTS[:, :2]), atol=1e-4
    )
    assert not found.bound
    np.testing.assert_array_equal(found.drawn, 0.0)


@pytest.mark.slow
def test_hutchinson_sees_all_parts(x64):
    many = np.tile(POINTS, (60, 1))
    exact = ode(KEY, of_parts(GENERAL, 0.3), GENERAL, many, num_steps=16)
    found = ode(KEY, of_parts(GENERAL, 0.3), GENERAL, many, num_steps=16, divergence="hutchinson", num_probes=6)
    np.testing.assert_allclose(found.latent, exact.latent, atol=1e-12)
    off = np.asarray(found.volume - exact.volume)
    assert abs(off.mean()) < 3 * off.std() / math.sqrt(len(off))
    assert off.std() > 0.01
    assert np.mean(np.asarray(found.volume_error) ** 2) == pytest.approx(np.mean(off**2), rel=0.3)


# -- latents -----------------------------------------------------------------------------------------------------

CENTRE = np.array([[-0.8, 0.5], [0.4, 0.9], [1.0, -0.7]])
SPREAD = np.array([[0.5, 0.3], [0.6, 0.8], [0.4, 0.5]])


def responsibilities(parameters, x0):
    """Log N(x0; z), the logits of the posterior of z for chances that are the same; tempered."""
    logs = -0.5 * ((x0[:, None] - CENTRE) / SPREAD) ** 2 - np.log(SPREAD)
    return parameters["temper"] * logs.sum(-1)


def curves(parameters, z):
    """A polynomial for each latent and site."""
    return jnp.einsum("bk,ckn->cbn", z, parameters["table"])


def mulan(temper):
    table = np.stack([np.full((3, 2), -0.4), 0.3 * RNG.normal(size=(3, 2)), 1.0 + 0.2 * RNG.normal(size=(3, 2))])
    values = {"encoder": {"temper": np.asarray(temper)}, "polynomials": {"table": table}}
    return AdaptiveGaussian(responsibilities, curves, values, bits=3, ones=1, log_snr_max=18.0, log_snr_min=-24.0)


def of_component(process):
    def denoise(xt, t, cond):
        mean, var, schedule = cond["z"] @ CENTRE, (cond["z"] @ SPREAD) ** 2, process.given(cond["z"]).schedule
        alpha, sigma = schedule.alpha(t[:, None]), schedule.sigma(t[:, None])
        return Prediction(mean + alpha * var * (xt - alpha * mean) / (alpha**2 * var + sigma**2), "x0")

    return denoise


def components(x0):
    """Log N(x0; z), (batch, latents)."""
    return np.stack([stats.norm.logpdf(x0, c, s).sum(-1) for c, s in zip(CENTRE, SPREAD, strict=True)], -1)


@pytest.mark.slow
def test_a_latent_with_its_posterior_costs_nothing(x64):
    process, x0 = mulan(1.0), jnp.asarray(CENTRE[:, ::-1].copy())
    found = ode(KEY, of_component(process), process, x0, t_range=(0.0, 1.0), num_steps=160)
    exact = np.logaddexp.reduce(components(x0), -1) - math.log(3)
    np.testing.assert_allclose(found.log_prob, exact, atol=1e-4)
    assert found.bound


@pytest.mark.slow
def test_another_posterior_costs_its_divergence(x64):
    """Each draw is log p(x, z) - log q(z | x) of its z; the mean is below log p(x) by KL(q(z | x) || p(z | x))."""
    process, x0 = mulan(0.3), np.repeat(CENTRE[:, ::-1], 300, axis=0)
    found = ode(KEY, of_component(process), process, jnp.asarray(x0), t_range=(0.0, 1.0), num_steps=100)
    logs = components(x0)
    tempered = 0.3 * logs - np.logaddexp.reduce(0.3 * logs, -1, keepdims=True)
    values = logs - math.log(3) - tempered
    off = np.abs(np.asarray(found.log_prob)[:, None] - values)
    assert off.min(-1).max() < 2e-4
    assert len(set(off.argmin(-1))) == 3
    draws = np.asarray(found.log_prob).reshape(3, 300)
    mean = (np.exp(tempered) * values).sum(-1).reshape(3, 300)[:, 0]
    assert (np.abs(draws.mean(-1) - mean) < 3 * draws.std(-1) / math.sqrt(300) + 1e-4).all()
    exact = (np.logaddexp.reduce(logs, -1) - math.log(3)).reshape(3, 300)[:, 0]
    divergence = (np.exp(tempered) * (tempered - logs)).sum(-1) + np.logaddexp.reduce(logs, -1)
    np.testing.assert_allclose(exact - mean, divergence.reshape(3, 300)[:, 0], rtol=1e-9)
    assert (exact - mean > 0.01).all()


@pytest.mark.slow
def test_adaptive_steps_know_each_examples_latent(x64):
    pytest.importorskip("diffrax")
    process, x0 = mulan(1.0), jnp.asarray(CENTRE[:, ::-1].copy())
    options = {"t_range": (0.0, 1.0)}
    found = ode(KEY, of_component(process), process, x0, integrator=Adaptive(1e-8, 1e-8), **options)
    exact = np.logaddexp.reduce(components(x0), -1) - math.log(3)
    np.testing.assert_allclose(found.log_prob, exact, atol=1e-4)


# -- what every flow promises ------------------------------------------------------------------------------------

BENT = InBasis(Gaussian(ShortestPath(np.array([2.0, 1.0, 0.2]))), Orthogonal(TURN))


def log_det(f, x):
    """The log-volume of a map of one example, `(1, sites)` to itself, by its Jacobian."""
    return np.linalg.slogdet(np.asarray(jax.jacfwd(lambda v: f(v[None])[0])(x[0])))[1]


@pytest.mark.parametrize("process", [Gaussian(VPCosine()), BENT, POSITIVE, BOX, DAMPED], ids=lambda p: type(p).__name__)
def test_log_volumes_are_those_of_jacobians(x64, process):
    """Half way, where they are not nearly 0 as at the low end of a range."""
    flow, t, x0 = process.flow(), jnp.asarray(0.6), jnp.asarray([[0.3, 0.7, 0.2]])
    kept = x0.shape[1]  # of a longer state the part that data are
    start, volume = flow.start(x0, t)
    found = log_det(lambda v: flow.start(v, t)[0][:, :kept], x0)
    np.testing.assert_allclose(volume, [found], rtol=1e-10, atol=1e-12)
    y, entered = flow.enter(start, t)
    np.testing.assert_allclose(entered, [log_det(lambda v: flow.enter(v, t)[0], start)], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(flow.leave(y, t), start, rtol=1e-12)
    np.testing.assert_allclose(flow.time(flow.position(t)), t, rtol=1e-9)


def test_the_rest_of_a_state_is_drawn_as_its_data_tell_it(x64):
    """For flat data e_v - b e_x is left of the velocity, e the noise met and b = M_v / M_x."""
    flow, t, x0 = GENERAL.flow(), jnp.asarray(0.6), jnp.asarray([[0.3, 0.7, 0.2]])
    left, met = left_and_met(GENERAL, t)
    scale = np.asarray(GENERAL.scale)
    met = scale[:, None] * (met + GENERAL.start**2 * np.outer(left[:, 1], left[:, 1])) * scale
    contrast = np.array([-float(scale[1] * left[1, 0] / (scale[0] * left[0, 0])), 1.0])
    start = flow.start(x0, t)[0]
    state, log_p = flow.complete(random.example_keys(KEY, 1), start, t)
    law = stats.norm(0.0, np.sqrt(contrast @ met @ contrast))
    np.testing.assert_allclose(log_p, [law.logpdf(state - start)[0, 3:].sum()], rtol=1e-9)


# -- learned corruption, and interpolants ------------------------------------------------------------------------


def affine(parameters, x0, t):
    """F = (1 + 0.3 t) x0 + 0.2 t, k = 0.8 t (1 - t)."""
    t = t[:, None]
    return (1.0 + 0.3 * t) * x0 + 0.2 * t, jnp.broadcast_to(0.8 * t * (1.0 - t), x0.shape)


@pytest.mark.slow
def test_a_learned_corruption_linear_in_the_data(x64):
    schedule, mean, std = CondOT(), 0.4, 0.6
    process = LearnedGaussian(affine, (), schedule, 0.8)

    def moments(t):
        gain, sigma = (1 - t) * (1 + 0.3 * t), t * jnp.exp(0.8 * t * (1 - t))
        return gain, (1 - t) * 0.2 * t, sigma**2

    def denoise(xt, t, cond=None):
        gain, shift, variance = moments(t[:, None])
        return Prediction(mean + gain * std**2 * (xt - gain * mean - shift) / (gain**2 * std**2 + variance), "x0")

    x0 = jnp.asarray([[-0.7], [0.5], [1.3]])
    found = ode(KEY, denoise, process, x0, t_range=between(schedule), num_steps=200)
    low = found.t_range[0]
    gain, shift, variance = (float(v) for v in moments(low))
    law = stats.norm(gain * mean + shift, math.sqrt(gain**2 * std**2 + variance))
    exact = law.logpdf((1 - low) * x0[:, 0]) + math.log(1 - low)
    np.testing.assert_allclose(found.log_prob, exact, atol=1e-4)
    np.testing.assert_allclose(found.log_prob, stats.norm(mean, std).logpdf(x0[:, 0]), atol=1e-3)
    with pytest.raises(ValueError, match="cannot make 'velocity' of a prediction of kind 'encoded'"):
        ode(KEY, lambda *a: Prediction(denoise(*a).value, "encoded"), process, x0)


LAW = GaussianMixture(dims=2, components=2, scale=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("path", [Straight(), Trigonometric(), Straight(Noise(0.5, 1.0, 0.0))], ids=repr)
def test_interpolants_from_gaussian_noise(x64, path):
    process, x0 = Interpolant(path, source_std=0.7), LAW.sample(random.example_keys(KEY, 4))

    def denoise(xt, t, cond=None):
        alpha, beta, gamma = path.alpha(t), path.beta(t), path.gamma(t)
        sigma = jnp.hypot(0.7 * beta, gamma)
        clean = LAW.x0(xt, alpha, sigma)
        z = (gamma / jnp.maximum(sigma, 1e-300) ** 2)[:, None] * (xt - alpha[:, None] * clean)
        if path.noise is None:
            return Prediction(clean, "x0")
        return Prediction(jnp.stack([clean, z], -1), "x0+noise")

    found = ode(KEY, denoise, process, x0, num_steps=200, t_range=(0.02, 1.0))
    low = jnp.asarray(0.02)
    alpha, sigma = path.alpha(low), jnp.hypot(0.7 * path.beta(low), path.gamma(low))
    exact = LAW.log_prob(alpha * x0, alpha, sigma) + 2 * jnp.log(alpha)
    np.testing.assert_allclose(found.log_prob, exact, atol=1e-4)


# -- from a config -----------------------------------------------------------------------------------------------

NAMED = (
    "geometric", "geometric, levels", "reflected", "mulan", "critically damped", "damped bound", "linear sde",
    "blurring", "shortest path", "ndm", "nfdm", "iadb", "stochastic interpolant", "rddm",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_eval_by_ode_from_a_config(name):
    """In float32, an untrained network: finite, and the terms add up."""
    import test_names

    experiment = build(*test_names.CONFIGS[name])
    data = experiment.data
    params = jax.tree.map(lambda a: a + 0.01, jax.jit(experiment.init)(KEY))
    run = Run(*experiment.trained(params), 0)
    found = evaluate(run, run.config, data, likelihood="ode")
    for suffix in ("", "_labelled"):
        terms = [found[term + suffix] for term in ("prior", "volume", "data", "drawn")]
        assert np.isfinite(terms).all()
        np.testing.assert_allclose(sum(terms), found[f"bits_per_dim{suffix}"], rtol=1e-4, atol=1e-4)
    drawn = name in ("mulan", "critically damped", "damped bound", "linear sde")
    assert bool(found["drawn"]) == drawn
    assert ("drawn" in describe_bound(found, "test")) == drawn


# -- what is refused ---------------------------------------------------------------------------------------------


def test_what_has_no_density_says_so():
    x0, denoise = jnp.ones((2, 2)), lambda xt, t, cond: Prediction(xt, "x0")
    with pytest.raises(ValueError, match=r"the likelihood of the ODE: x1 of this interpolant comes with the data"):
        ode(KEY, denoise, Interpolant(), x0)
    assert not hasattr(Barycentric, "flow")
