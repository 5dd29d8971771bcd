"""Learned schedules: VDM's leaves the bound as it is, MuLAN's changes that of a chain, both as theory says."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddjax import schedules as sc
from ddjax.fixtures import GaussianMixture
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian

ENDS = (9.0, -6.0)
X, W = np.polynomial.hermite_e.hermegauss(3)  # exact for the squared errors of linear denoisers
W = W / W.sum()
NODES, WEIGHTS = np.polynomial.legendre.leggauss(40)


def integral(f, parts=16):
    """Gauss-Legendre over [0, 1], in parts; f takes all times at once."""
    t = (np.arange(parts)[:, None] + 0.5 * (NODES + 1)).ravel() / parts
    return f(jnp.asarray(t)) @ jnp.asarray(np.tile(0.5 * WEIGHTS / parts, parts))


def wiggly(seed, ends=ENDS):
    """A shape far from straight."""
    hidden = np.random.default_rng(seed).normal(size=(3, 6)) * np.asarray([[6.0], [3.0], [4.0]])
    return sc.Monotone(ends, 0.3, hidden, clock=ENDS)


SHAPES = [sc.Monotone.initial(6, 0, *ENDS), wiggly(0), wiggly(1)]


def linear(process, std):
    """The exact denoiser of independent N(0, std_i^2)."""
    alpha, sigma = process.schedule.alpha, process.schedule.sigma
    gain = lambda t: alpha(t) * std**2 / (alpha(t) ** 2 * std**2 + sigma(t) ** 2)
    return lambda xt, t: Prediction(gain(t) * xt, "x0")


def expected(process, denoise, cost, t, x0s, weights):
    """E cost(x0, prediction, xt, t) over (x0, noise), by quadrature, at every time: shape (times, sites)."""
    k, (n,), sites = len(x0s), t.shape, np.shape(x0s)[-1]
    x0 = jnp.broadcast_to(jnp.asarray(x0s)[:, None, None], (k, 3, n, sites)).reshape(-1, sites)
    z = jnp.broadcast_to(jnp.asarray(X)[None, :, None, None], (k, 3, n, 1)).reshape(-1, 1)
    t = jnp.tile(t, 3 * k)
    marginal = process.marginal(x0, t)
    xt = marginal.mean + marginal.std * z
    costs = cost(x0, denoise(xt, t[:, None]), xt, t).reshape(k, 3, n, sites)
    return jnp.einsum("i,j,ijns->ns", jnp.asarray(weights), jnp.asarray(W), costs)


@functools.partial(jax.jit, static_argnums=1)
def gaussian_bound(parameters, std):
    """The three terms for N(0, std^2), one site."""
    process = Gaussian(SHAPES[0].with_parameters(parameters), std)
    x0s = std * X[:, None]
    denoise = linear(process, std)
    path = integral(lambda t: expected(process, denoise, process.path_kl, t, x0s, W)[:, 0])
    decoder = expected(process, denoise, process.reconstruction, jnp.zeros(1), x0s, W)[0, 0]
    return (
        W @ process.prior_kl(jnp.asarray(x0s), jnp.ones(3))[:, 0],
        path,
        decoder,
    )


@pytest.mark.slow
@pytest.mark.parametrize("ends", [ENDS, (7.0, -5.0)], ids=repr)
def test_the_bound_depends_on_the_ends_alone(x64, ends):
    """H + log(1 + s^2 / d^2) / 2, s = exp(-ends[0] / 2): what the decoder does not know of the data's width."""
    std = 0.7
    entropy = 0.5 * math.log(2 * math.pi * math.e * std**2)
    for shape in SHAPES:
        parameters = shape.parameters | {"ends": jnp.asarray(ends)}
        total = float(sum(gaussian_bound(parameters, std)))
        np.testing.assert_allclose(total, entropy + 0.5 * math.log1p(math.exp(-ends[0]) / std**2), atol=1e-9)
    slope = jax.grad(lambda p: gaussian_bound(p, std)[1])(wiggly(0).parameters)
    assert max(float(jnp.abs(slope[name]).max()) for name in sc.Monotone.variance_parameters) < 1e-9
    assert float(jnp.abs(slope["ends"]).min()) > 1e-5


def test_so_does_that_of_a_mixture(x64):
    """Exact denoiser, nonlinear; the diffusion term of the same x0 and noises under each shape."""
    law = GaussianMixture(dims=2, components=3, scale=0.5)

    @jax.jit
    def path(parameters):
        process = Gaussian(SHAPES[0].with_parameters(parameters))
        exact = law.denoise(process)
        denoise = lambda xt, t: exact(xt, t[:, 0])
        return integral(lambda t: expected(process, denoise, process.path_kl, t, [[0.3, -0.5]], [1.0]).sum(-1), 24)

    paths = [float(path(shape.parameters)) for shape in SHAPES]
    np.testing.assert_allclose(paths, paths[0], rtol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SHAPES[1:], ids=["first", "second"])
def test_monotone_closed_forms(x64, schedule):
    t = jnp.linspace(0.0, 1.0, 33)
    np.testing.assert_allclose(schedule.log_snr(t)[jnp.asarray([0, -1])], ENDS, rtol=1e-14)
    np.testing.assert_allclose(schedule.log_snr_prime(t), jax.vmap(jax.grad(schedule.log_snr))(t), rtol=1e-10)
    assert (np.asarray(schedule.log_snr_prime(t)) < 0).all()
    np.testing.assert_allclose(schedule.time(schedule.log_snr(t)), t, atol=1e-12)
    np.testing.assert_allclose(schedule.time(jnp.asarray([20.0, -20.0])), [0.0, 1.0])
    # What a network is told is the noise level.
    told = Gaussian(schedule).network_inputs(t, t, "noise")[1]
    np.testing.assert_allclose(told, (ENDS[0] - schedule.log_snr(t)) / 15.0, rtol=1e-12, atol=1e-14)


def test_monotone_is_the_network_it_says(x64):
    """By its definition, with signs that must not matter; what networks are told stays when the ends move."""
    slope, (a, b, c) = -0.4, np.asarray([[-6.0, 2.0], [1.0, -0.5], [3.0, -2.0]])
    schedule, t = sc.Monotone((7.0, -5.0), slope, np.stack([a, b, c]), clock=ENDS), np.linspace(0.0, 1.0, 7)
    f = lambda t: abs(slope) * t + np.mean(np.abs(c) * np.tanh((np.abs(a) * (2 * t[..., None] - 1) + b) / 2), axis=-1)
    start, stop = f(np.zeros(())), f(np.ones(()))
    expected = 7.0 - 12.0 * (f(t) - start) / (stop - start)
    np.testing.assert_allclose(schedule.log_snr(jnp.asarray(t)), expected, rtol=1e-12)
    np.testing.assert_allclose(schedule.network_time(jnp.asarray(t)), (9.0 - expected) / 15.0, rtol=1e-12)


@pytest.mark.slow
def test_the_inverse_has_the_derivatives_of_an_inverse(x64):
    schedule, nudge = wiggly(0), 1e-6
    p = schedule.parameters
    time = lambda p, snr: schedule.with_parameters(p).time(snr)
    of_p, of_snr = jax.grad(time, argnums=(0, 1))(p, 1.3)
    for name in p:
        direction = jnp.asarray(np.random.default_rng(0).normal(size=p[name].shape))
        up, down = (float(time(p | {name: p[name] + e * direction}, 1.3)) for e in (nudge, -nudge))
        np.testing.assert_allclose(jnp.vdot(of_p[name], direction), (up - down) / (2 * nudge), rtol=1e-6)
    np.testing.assert_allclose(of_snr, 1 / schedule.log_snr_prime(schedule.time(1.3)), rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule", [wiggly(0), sc.PerSite(np.random.default_rng(0).normal(size=(3, 2)))], ids=["m", "p"]
)
def test_parameters_come_back_and_constants_compare_by_value(schedule):
    parameters = jax.tree.map(np.asarray, schedule.parameters)
    again = Gaussian(schedule).with_parameters(parameters)
    assert again == Gaussian(schedule).with_parameters(parameters)
    assert hash(again) == hash(Gaussian(schedule).with_parameters(parameters))
    t = jnp.linspace(0.0, 1.0, 5)[:, None]
    np.testing.assert_allclose(again.schedule.log_snr(t), schedule.log_snr(t), rtol=1e-6)
    assert not hasattr(Gaussian(sc.CondOT()), "parameters")

    def ends(parameters):
        learned = schedule.with_parameters(parameters)
        values = [f(jnp.asarray([[0.0], [1.0]])).sum() for f in (learned.alpha, learned.sigma, learned.log_snr_prime)]
        return sum(values)

    slopes = jax.grad(ends)(schedule.parameters)  # in float32
    assert all(bool(jnp.isfinite(v).all()) for v in jax.tree.leaves(slopes))


def test_per_site_is_mulans_polynomial(x64):
    """Its derivative is a square, by autodiff and by quadrature of the square; the ends are common."""
    a, b, c = coefficients = np.random.default_rng(1).normal(size=(3, 2, 2))
    schedule = sc.PerSite(coefficients, *ENDS)
    for t in (0.0, 0.2, 0.9, 1.0):
        whole, part = (
            integral(
                lambda u, e=e: (
                    e
                    * jnp.moveaxis((a * (e * u[:, None, None]) ** 2 + b * e * u[:, None, None] + c) ** 2 + 1e-3, 0, -1)
                ),
                1,
            )
            for e in (1.0, t)
        )
        np.testing.assert_allclose(schedule.log_snr(jnp.asarray(t)), ENDS[0] - 15 * part / whole, rtol=1e-10)
        np.testing.assert_allclose(schedule.log_snr_prime(jnp.asarray(t)), jax.jacfwd(schedule.log_snr)(t), rtol=1e-10)
    for name in ("alpha", "sigma"):
        ours = getattr(schedule, f"{name}_prime")(jnp.asarray(0.4))
        np.testing.assert_allclose(ours, jax.jacfwd(getattr(schedule, name))(0.4), rtol=1e-10)
    assert schedule.alpha(jnp.full((5, 1, 1), 0.3)).shape == (5, 2, 2)
    assert sc.PerSite(coefficients, *ENDS, "ve").common == sc.LogSNRLinear(*ENDS, "ve")
    with pytest.raises(NotImplementedError, match="common"):
        schedule.time(0.0)


STDS = np.asarray([0.1, 2.0])  # an anisotropic Gaussian
STEPS = 2


@jax.jit
def chain_bound(coefficients):
    """The diffusion term of the chain with `STEPS` equal steps, exact denoiser, both sites."""
    process = Gaussian(sc.PerSite(coefficients, *ENDS))
    t = jnp.linspace(1.0, 0.0, STEPS + 1)[:-1]
    step = lambda x0, prediction, xt, t: process.step_kl(x0, prediction, xt, t - 1 / STEPS, t)
    return expected(process, linear(process, STDS), step, t, X[:, None] * STDS, W).sum()


@pytest.mark.slow
def test_a_schedule_for_each_site_lowers_a_chains_bound_to_its_least(x64):
    """One site costs sum (y_{i-1} / y_i - 1) / 2, y = 1 + d^2 exp(log-SNR): least where the y are geometric."""
    y = lambda log_snr: 1 + STDS**2 * np.exp(log_snr)
    ratio = y(ENDS[0]) / y(ENDS[1])
    least = float((STEPS / 2 * (ratio ** (1 / STEPS) - 1)).sum())
    middle = np.linspace(*ENDS, 20_001)[:, None]
    shared = float((0.5 * (y(ENDS[0]) / y(middle) + y(middle) / y(ENDS[1]) - 2)).sum(-1).min())
    optimizer = optax.adam(0.05)
    descend = jax.jit(functools.partial(train, optimizer, 200))
    start = sc.PerSite.initial((2,)).parameters
    learned = float(chain_bound(descend(start)))
    assert least <= learned < least + 1e-3 < shared - 0.1
    # The same code with what it learns shared between the sites reaches the best shared schedule and no more.
    tied = float(chain_bound(jax.jit(functools.partial(train, optimizer, 200, tied=True))(start)))
    assert abs(tied - shared) < 1e-3


def train(optimizer, steps, coefficients, tied=False):
    def step(carry, _):
        values, state = carry
        slope = jax.grad(chain_bound)(values)
        slope = jnp.broadcast_to(slope.mean(-1, keepdims=True), slope.shape) if tied else slope
        updates, state = optimizer.update(slope, state)
        return (values + updates, state), None

    return jax.lax.scan(step, (coefficients, optimizer.init(coefficients)), None, steps)[0][0]


def test_in_continuous_time_the_exact_denoiser_pays_the_same_on_every_path(x64):
    """Half the log of the ratio of signal to noise gained, site by site: 1/2 log(y_0 / y_1)."""
    random = np.random.default_rng(2).normal(size=(3, 2))
    for coefficients in (sc.PerSite.initial((2,)).parameters, random, 3 * random[::-1]):
        process = Gaussian(sc.PerSite(coefficients, *ENDS))
        cost = lambda t, p=process: expected(p, linear(p, STDS), p.path_kl, t, X[:, None] * STDS, W).T
        y0, y1 = (1 + STDS**2 * math.exp(end) for end in ENDS)
        np.testing.assert_allclose(integral(cost), 0.5 * np.log(y0 / y1), rtol=1e-8)
