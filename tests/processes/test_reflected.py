"""Reflected diffusion against sums of hundreds of images and waves, enumeration of small laws, and entropies."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

import ddjax
from ddjax import random
from ddjax.likelihood import nelbo
from ddjax.objectives import elbo
from ddjax.predictions import Prediction
from ddjax.processes import Reflected
from ddjax.processes.reflected import CROSSOVER, fold, log_wrapped
from ddjax.schedules import EDM, VE, VPLinear
from ddjax.solvers import Ancestral, FoldedHeun

PROCESS = Reflected(VE(0.05, 2.0))
ATOMS, MASSES = np.array([0.0, 0.3, 1.0]), np.array([0.2, 0.5, 0.3])
NODES, WEIGHTS = (0.5 * v for v in np.polynomial.legendre.leggauss(44))
NODES = NODES + 0.5  # on [0, 1]
Z = np.linspace(-7, 7, 85)
WZ = 14 / 84 * stats.norm.pdf(Z)


def by_images(x, x0, sigma):
    """Density and its derivative in x: the reflection principle."""
    shift = 2.0 * np.arange(-40, 41)
    away = np.stack([np.subtract.outer(x - x0, shift), np.subtract.outer(x + x0, shift)])
    density = stats.norm.pdf(away, scale=sigma)
    return density.sum((0, -1)), (-away / sigma**2 * density).sum((0, -1))


def by_waves(x, x0, sigma):
    """The same by the eigenfunctions cos(pi k x)."""
    k = np.pi * np.arange(1, 400)
    terms = 2 * np.exp(-0.5 * (k * sigma) ** 2) * np.cos(np.multiply.outer(x0, k))
    kx = np.multiply.outer(x, k)
    return 1 + (terms * np.cos(kx)).sum(-1), -(terms * k * np.sin(kx)).sum(-1)


def distribution(x, x0, sigma):
    """The distribution function of the kernel."""
    shift = 2.0 * np.arange(-40, 41)
    upper = stats.norm.cdf(np.subtract.outer(x - x0, shift) / sigma) + stats.norm.cdf(
        np.subtract.outer(x + x0, shift) / sigma
    )
    lower = stats.norm.cdf((-x0 - shift) / sigma) + stats.norm.cdf((x0 - shift) / sigma)
    return (upper - lower).sum(-1)


def law(x, sigma, width=0.0, of=by_images):
    """The noised law of the atoms, or of kernels of this width around them: what `of` says, averaged."""
    values = [np.array(of(x, a, np.hypot(sigma, width))) for a in ATOMS]
    return sum(m * v for m, v in zip(MASSES, values, strict=True))


def denoise(width=0.0, process=PROCESS):
    """The exact score of that law, by a sum that is no part of the process."""

    def density(x, sigma):
        shift = 2.0 * np.arange(-9, 10)
        away = jnp.stack([x - a for a in ATOMS] + [x + a for a in ATOMS])[..., None] - shift
        logs = -0.5 * (away / sigma) ** 2 + np.log(np.tile(MASSES, 2)).reshape(6, 1)
        return jax.nn.logsumexp(logs)

    slope = jax.vmap(jax.grad(density))

    def denoise(xt, t, cond=None):
        sigma = jnp.broadcast_to(jnp.hypot(process.schedule.sigma(t), width), xt.shape[:1])
        return Prediction(slope(xt.ravel(), jnp.repeat(sigma, xt.size // len(sigma))).reshape(xt.shape), "score")

    return denoise


def time(sigma):
    return PROCESS.schedule.time(-2.0 * jnp.log(jnp.asarray(sigma)))


def test_kernel_and_score_by_both_series(x64):
    x, x0 = (v.ravel() for v in np.meshgrid([0.0, 0.013, 0.4, 0.77, 1.0], [0.0, 0.02, 0.5, 1.0]))
    for sigma in (0.5, 0.7, CROSSOVER, 0.9, 1.2):
        for one, other in zip(by_images(x, x0, sigma), by_waves(x, x0, sigma), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-11)
    score = jax.jit(lambda x, x0, sigma: PROCESS.marginal(x0, time(sigma)).log_prob_and_score(x))
    for sigma in (0.2, 0.79, 0.8, 1.2, 1.9):
        density, slope = by_images(x, x0, sigma)
        log_p, s = score(jnp.asarray(x), jnp.asarray(x0), sigma)
        np.testing.assert_allclose(np.exp(log_p), density, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(s, slope / density, rtol=1e-10, atol=1e-11)
    # Where densities underflow, the nearest image alone speaks.
    log_p, s = score(jnp.asarray([0.9]), jnp.asarray([0.3]), 0.0501)
    np.testing.assert_allclose([log_p[0], s[0]], [stats.norm(0.3, 0.0501).logpdf(0.9), -0.6 / 0.0501**2], rtol=1e-10)


@pytest.mark.slow
def test_draws_are_folded_normals():
    n = 5_000
    x = np.asarray(PROCESS.marginal(jnp.full((n, 1), 0.1), time(jnp.full(n, 0.4))).sample(_keys(n)))[:, 0]
    assert ((x >= 0) & (x <= 1)).all()
    assert stats.kstest(x, lambda x: distribution(x, 0.1, 0.4)).pvalue > 1e-3
    points = jnp.asarray([-2.3, -1.2, -0.2, 0.7, 1.6, 2.9])
    np.testing.assert_allclose(fold(points)[0], [0.3, 0.8, 0.2, 0.7, 0.4, 0.9], atol=1e-6)
    np.testing.assert_array_equal(fold(points)[1], jax.vmap(jax.grad(lambda v: fold(v)[0]))(points))
    prior = PROCESS.prior((n, 1)).sample(_keys(n))
    assert stats.kstest(np.asarray(prior)[:, 0], "uniform").pvalue > 1e-3


def _keys(n):
    return random.example_keys(jax.random.key(0), n)


def test_the_exact_score_minimises_the_objective(x64):
    """By enumeration of three atoms, two of them on walls: whatever is added costs its square."""
    x, x0 = (jnp.asarray(v.ravel())[:, None] for v in np.meshgrid(NODES, ATOMS))
    exact, off = jax.jit(lambda xt, t: denoise()(xt, t).value), 0.3 + jnp.sin(3.0 * x)
    cost = jax.jit(lambda value, t: PROCESS.path_kl(x0, Prediction(value, "score"), x, t)[:, 0])
    for sigma in (0.1, 0.6, 1.5):
        t = jnp.full(len(x), time(sigma))
        density = np.concatenate([m * by_images(NODES, a, sigma)[0] for a, m in zip(ATOMS, MASSES, strict=True)])
        weights = density * np.tile(WEIGHTS, 3)
        score = exact(x, t)
        half_g2 = float(sigma * PROCESS.schedule.sigma_prime(time(sigma)))
        excess = weights @ np.asarray(cost(score + off, t) - cost(score, t))
        np.testing.assert_allclose(excess, half_g2 * weights @ np.asarray(off[:, 0]) ** 2, rtol=1e-7)


@jax.jit
def bound(weights, width, low, high):
    """The three terms of the bound for data of these weights at NODES, which have kernels' width: by quadrature."""
    x0 = jnp.asarray(np.repeat(NODES, len(Z)))[:, None]
    z, w = jnp.asarray(np.tile(Z, len(NODES)))[:, None], jnp.kron(weights, WZ)
    say = denoise(width)
    u, wu = np.polynomial.legendre.leggauss(20)

    def path(node):
        sigma = low * (high / low) ** node
        t = jnp.full(len(x0), time(sigma))
        xt = fold(x0 + sigma * z)[0]
        dt = jnp.log(high / low) / PROCESS.schedule.sigma_prime(t[0]) * sigma
        return dt * (w @ PROCESS.path_kl(x0, say(xt, t), xt, t)[:, 0])

    diffusion = jnp.asarray(0.5 * wu) @ jax.lax.map(path, jnp.asarray(0.5 * u + 0.5))
    t = jnp.full(len(x0), time(low))
    x_low = fold(x0 + low * z)[0]
    last = w @ PROCESS.reconstruction(x0, Prediction(x_low, "score"), x_low, t)[:, 0]
    prior = weights @ PROCESS.prior_kl(jnp.asarray(NODES)[:, None], jnp.full(len(NODES), time(high)))[:, 0]
    return jnp.stack([prior, diffusion, last])


def entropy(sigma, width):
    p = law(NODES, sigma, width)[0]
    return -WEIGHTS @ (p * np.log(p))


def test_nelbo_is_the_entropy(x64):
    """Uniform law: 0 nats whatever the range. A mixture: what the theory says, which tends to its entropy."""
    width = 2.5  # uniform to rounding
    assert abs(np.asarray(denoise(width)(jnp.asarray([[0.1], [0.9]]), time(0.1)).value)).max() < 1e-9
    np.testing.assert_allclose(bound(WEIGHTS, width, 0.1, 0.5).sum(), 0.0, atol=1e-6)
    width = 0.15
    ours = bound(WEIGHTS * law(NODES, 0.0, width)[0], width, 0.1, 2.0)
    # Prior -h(x_high | x_0), path h(x_low) - h(x_low | x_0) less that at the high end, decoder h(x_low | x_0).
    np.testing.assert_allclose(ours.sum(), entropy(0.1, width) - entropy(2.0, width), atol=1e-8)
    assert entropy(0.0, width) < ours.sum()
    assert entropy(1e-4, width) - entropy(2.0, width) - entropy(0.0, width) < 1e-6


@pytest.mark.slow
def test_prior_kl_is_quadrature(x64):
    for sigma in (0.06, 0.3, 0.8, 2.0):
        x0 = np.array([0.0, 0.11, 0.5])
        ours = PROCESS.prior_kl(jnp.asarray(x0)[:, None], time(jnp.full(3, sigma)))[:, 0]
        for a, kl in zip(x0, ours, strict=True):
            nats = lambda x, a=a, sigma=sigma: (lambda p: p * np.log(p) if p > 0 else 0.0)(
                float(by_images(x, a, sigma)[0])
            )
            truth = integrate.quad(nats, 0, 1, points=[a], epsabs=1e-12, limit=200)[0]
            np.testing.assert_allclose(kl, truth, atol=1e-8)


@pytest.mark.slow
def test_ancestral_reaches_the_law_at_first_order(x64):
    """The law of the steps by matrices over a grid of midpoints, against the noised law itself."""
    x = (np.arange(160) + 0.5) / 160
    grid, say = jnp.asarray(x)[:, None], denoise()

    @jax.jit
    def transitions(t, s):  # (from, to)
        step = PROCESS.reverse(say(grid, jnp.full(160, t)), grid, s, t)
        wide = type(step)(jnp.broadcast_to(step.centre, (160, 160)), step.std)
        return jnp.exp(wide.log_prob(grid.T)) / 160

    errors = []
    for steps in (16, 32):
        p = np.ones(160)
        for t, s in itertools.pairwise(np.asarray(time(np.geomspace(2.0, 0.2, steps + 1)))):
            p = p @ np.asarray(transitions(jnp.asarray(t), jnp.asarray(s)))
        errors.append(np.abs(p - law(x, 0.2)[0]).max())
    assert errors[1] < 0.15
    assert 0.7 < np.log2(errors[0] / errors[1]) < 1.4, errors


def test_the_ode_keeps_quantiles_at_second_order(x64):
    x, solver, errors = jnp.linspace(0.003, 0.997, 41)[:, None], FoldedHeun(PROCESS), []
    step = jax.jit(lambda x, t, s: solver.step(None, (), x, t, s, denoise())[0])
    quantiles = law(np.asarray(x)[:, 0], 2.0, of=distribution)
    for steps in (8, 16):
        y = x
        for t, s in itertools.pairwise(time(np.geomspace(2.0, 0.2, steps + 1))):
            y = step(y, t, s)
        errors.append(np.abs(law(np.asarray(y)[:, 0], 0.2, of=distribution) - quantiles).max())
    assert errors[1] < 0.01
    assert 1.6 < np.log2(errors[0] / errors[1]) < 2.6, errors


def test_heun_bounces_off_the_walls_on_the_unfolded_line(x64):
    """A field that is odd about both walls, as scores are: the rule on the whole line, folded at the end."""
    process, x = Reflected(EDM(2.0)), np.array([0.05, 0.3, 0.93])
    field = lambda v: -4.0 * np.sin(np.pi * v) + 3.0 * np.sin(2 * np.pi * v)
    triangle = lambda v: np.arccos(np.cos(np.pi * v)) / np.pi

    def say(xt, t, cond=None):
        value = -4.0 * jnp.sin(jnp.pi * xt) + 3.0 * jnp.sin(2 * jnp.pi * xt)
        return Prediction(jnp.where(t[:, None] > 0, value, jnp.nan), "noise")

    for t, s in ((0.9, 0.4), (0.5, 0.0)):
        h = 2.0 * (s - t)
        euler = x + h * field(x)
        assert ((euler < 0) | (euler > 1)).any()
        truth = triangle(x + 0.5 * h * (field(x) + field(euler))) if s else triangle(euler)
        step = FoldedHeun(process).step(None, (), jnp.asarray(x)[:, None], jnp.asarray(t), jnp.asarray(s), say)
        np.testing.assert_allclose(step[0][:, 0], truth, atol=1e-10)


@pytest.mark.slow
def test_samples_stay_in_the_box_and_end_at_the_data():
    process = Reflected(EDM(2.0))

    def point(xt, t, cond=None):
        return Prediction(process.marginal(jnp.full_like(xt, 0.02), t).log_prob_and_score(xt)[1], "score")

    for solver in (Ancestral(process), FoldedHeun(process)):
        times = jnp.append(jnp.geomspace(1.0, 0.002, 30), 0.0)
        out = ddjax.sample(jax.random.key(0), point, process, shape=(5, 2), solver=solver, times=times, trajectory=True)
        path = np.asarray(out.trajectory)
        assert ((path >= 0) & (path <= 1)).all()
        np.testing.assert_allclose(out.x0, 0.02, atol=0.002 if solver == Ancestral(process) else 0.01)


@pytest.mark.slow
def test_the_objective_is_the_bounds_integral():
    """A network that says 0 pays the entropy that one atom's kernel gains, whatever the draws of times."""
    process, n = Reflected(VE(0.01, 5.0)), 8192
    objective = elbo(process, "noise", t_range=(0.2, 0.9))
    low, high = (float(process.schedule.sigma(t)) for t in (0.2, 0.9))
    assert high > 2
    at = np.linspace(0, 1, 4001)
    p = np.maximum(by_images(at, 0.5, low)[0], 1e-300)
    entropy = -np.trapezoid(p * np.log(p), at)
    apply = lambda params, xt, t, cond, **_: params * jnp.ones_like(xt)
    x0 = jnp.full((n, 1), 0.5)
    loss = lambda w: objective(jax.random.key(0), apply, w, x0)[0]
    value, slope = jax.jit(jax.value_and_grad(loss))(jnp.zeros(()))
    np.testing.assert_allclose(value, -entropy, rtol=0.05)
    assert np.isfinite(float(slope))
    # Uniform data, a score of 0: 0 nats on average, by the evaluator's own draws.
    zero = lambda xt, t, cond: Prediction(jnp.zeros_like(xt), "noise")
    total = np.asarray(nelbo(jax.random.key(1), zero, process, jax.random.uniform(jax.random.key(2), (n, 1))).total)
    assert abs(total.mean()) < 4 * total.std() / np.sqrt(n) < 0.1


def test_conversions():
    process, xt = Reflected(EDM(3.0)), jnp.asarray([[0.2, 0.7]])
    value, t = Prediction(jnp.asarray([[1.0, -2.0]]), "score"), jnp.asarray([0.5])
    truth = {"score": value.value, "noise": -1.5 * value.value, "velocity": -4.5 * value.value}  # sigma 1.5, sigma' 3
    for start, end in itertools.product(truth, truth):
        ours = process.convert(Prediction(truth[start], start), end, xt, t).value
        np.testing.assert_allclose(ours, truth[end], rtol=1e-6)
    np.testing.assert_allclose(process.network_inputs(xt, t, "score")[0], [[-0.6, 0.4]], rtol=1e-6)


@pytest.mark.slow
def test_both_ends_are_finite_in_float32():
    """And the score keeps its digits at every width."""
    process, x0, xt = Reflected(EDM(5.0)), jnp.asarray([[0.0, 0.2, 1.0]]), jnp.asarray([[0.5, 0.2, 1.0]])

    def total(x0, t):
        law = process.marginal(x0, t)
        said = Prediction(x0 - xt, "noise")
        values = [*law.log_prob_and_score(xt), process.reverse(said, xt, 0.5 * t, t).centre, process.prior_kl(x0, t)]
        return sum(v.sum() for v in values) + process.convert(said, "score", xt, t).value.sum()

    slope = jax.jit(jax.value_and_grad(total))
    for t in (0.0, 1e-4, 1.0):
        value, gradient = slope(x0, jnp.asarray([t]))
        assert np.isfinite(float(value))
        assert np.isfinite(np.asarray(gradient)).all()
    for sigma in (0.01, 0.3, 0.79, 0.81, 2.0):
        single = sigma * log_wrapped(jnp.float32([0.1, 0.7]), jnp.full(2, sigma, jnp.float32))[1]
        density, derivative = (v / 2 for v in by_waves(np.array([0.1, 0.7]), 0.0, sigma))
        if sigma < 0.02:  # the waves do not reach so far down
            density, derivative = np.ones(2), -np.array([0.1, 0.7]) / sigma**2
        np.testing.assert_allclose(single, sigma * derivative / density, rtol=3e-5, atol=1e-6)


def test_errors():
    with pytest.raises(ValueError, match="alpha = 1"):
        Reflected(VPLinear())
    with pytest.raises(ValueError, match="does not understand"):
        PROCESS.convert(Prediction(jnp.zeros((1, 1)), "x0"), "score", jnp.zeros((1, 1)), jnp.zeros(1))
    with pytest.raises(ValueError, match="no bridge or step_kl"):
        PROCESS.bridge(None, None, None, None)
