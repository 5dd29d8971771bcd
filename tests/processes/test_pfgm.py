"""PFGM++ against the definition: the power law, its radius, the augmented field, and the Gaussian limit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

import ddjax
from ddjax import grids, random
from ddjax.objectives import gaussian, log_normal_sigma
from ddjax.predictions import Prediction
from ddjax.processes import PFGM, Gaussian
from ddjax.schedules import EDM, CondOT
from ddjax.solvers import Heun

ATOMS, MASSES = np.array([-1.0, 0.2, 1.5]), np.array([0.3, 0.5, 0.2])


def kernel(distance2, sigma, D, dims):
    """The normalised power law: its constant is that of the radius, R^2 / r^2 ~ Beta-prime(dims / 2, D / 2)."""
    r2 = sigma**2 * D
    sphere = 2 * np.pi ** (dims / 2) / special.gamma(dims / 2)
    mass = sphere * r2 ** (-D / 2) * special.beta(dims / 2, D / 2) / 2
    return (distance2 + r2) ** (-(dims + D) / 2) / mass


@pytest.mark.slow
@pytest.mark.parametrize("D", [1.0, 41.0, 7.5])
def test_the_density_is_the_power_law(x64, D):
    process, t = PFGM(EDM(8.0), D=D), jnp.asarray([0.1])
    for dims in (1, 3):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(6, dims))) * 2
        x0 = 0.3 * jnp.ones((1, dims))
        got = process.marginal(x0, t).log_prob(x)
        assert got.shape == x.shape
        expected = np.log(kernel(((x - x0) ** 2).sum(-1), 0.8, D, dims))
        np.testing.assert_allclose(got.sum(-1), expected, rtol=1e-10)

    # Normalised, by quadrature: over the line, and over a plane by its radius.
    def density(x):
        return np.exp(np.asarray(process.marginal(jnp.zeros((1, 1)), t).log_prob(jnp.asarray([[x]])))).item()

    if D > 1:
        np.testing.assert_allclose(2 * integrate.quad(density, 0, np.inf, epsabs=1e-11)[0], 1.0, atol=1e-8)


@pytest.mark.slow
def test_draws_have_the_beta_prime_radius_and_no_direction():
    D, dims, n = 3.0, 4, 20_000
    process = PFGM(EDM(8.0), D=D)
    x = np.asarray(
        process.marginal(jnp.full((n, dims), 0.5), jnp.full(n, 0.1)).sample(random.example_keys(jax.random.key(0), n))
    )
    radius2 = ((x - 0.5) ** 2).sum(-1) / (0.8**2 * D)
    assert stats.kstest(radius2, stats.betaprime(dims / 2, D / 2).cdf).pvalue > 1e-3
    angle = (x - 0.5) / np.sqrt(((x - 0.5) ** 2).sum(-1, keepdims=True))
    assert stats.kstest(0.5 * (1 + angle[:, 0]), stats.beta((dims - 1) / 2, (dims - 1) / 2).cdf).pvalue > 1e-3
    assert (np.abs(angle.T @ angle / n - np.eye(dims) / dims) < 0.01).all()
    assert abs(np.corrcoef(radius2 < np.median(radius2), angle[:, 0])[0, 1]) < 4.5 / np.sqrt(n)


@pytest.mark.slow
def test_large_d_tends_to_the_gaussian_at_first_order(x64):
    """The log-density's distance to the normal's halves when D doubles; in float32 it does not break."""
    x0, t, x = jnp.zeros((1, 3)), jnp.asarray([0.1]), jnp.asarray([[0.5, -1.0, 2.0]])
    limit = Gaussian(EDM(8.0)).marginal(x0, t).log_prob(x).sum()
    gaps = [abs(float(PFGM(EDM(8.0), D=D).marginal(x0, t).log_prob(x).sum() - limit)) for D in (1e3, 2e3, 4e3)]
    np.testing.assert_allclose(np.log2(np.array(gaps[:-1]) / gaps[1:]), 1.0, atol=0.02)
    wide = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3072)), jnp.float32)
    far = PFGM(EDM(8.0), D=1e6).marginal(jnp.zeros_like(wide), jnp.float32(0.1)[None]).log_prob(wide)
    assert far.dtype == jnp.float32
    squares = (np.asarray(wide, float) ** 2).sum() / 0.64
    expected = (
        special.gammaln(0.5 * (1e6 + 3072)) - special.gammaln(0.5e6) - 1536 * np.log(np.pi * 1e6 * 0.64)
        - 0.5 * (1e6 + 3072) * np.log1p(squares / 1e6)
    )  # fmt: skip
    np.testing.assert_allclose(far.sum(), expected, rtol=1e-5)
    draws = PFGM(EDM(8.0), D=1e6).prior((4, 3072)).sample(random.example_keys(jax.random.key(0), 4))
    np.testing.assert_allclose(draws.std(-1), np.sqrt(65.0), rtol=0.06)


def posterior_mean(x, sigma, D):
    weights = MASSES * kernel((x[:, None] - ATOMS) ** 2, sigma, D, 1)
    return weights @ ATOMS / weights.sum(-1)


def denoiser(D):
    """The exact posterior mean of one site with a few values, as JAX."""

    def denoise(xt, t, cond=None):
        sigma = 8.0 * jnp.broadcast_to(jnp.asarray(t), xt.shape[:1])[:, None]
        log_w = jnp.log(MASSES) - 0.5 * (1 + D) * jnp.log((xt - ATOMS) ** 2 + D * sigma**2)
        return Prediction(jax.nn.softmax(log_w) @ ATOMS[:, None], "x0")

    return denoise


@pytest.mark.parametrize("D", [1.0, 3.0])
def test_the_ode_is_the_field_of_the_augmented_space(x64, D):
    """dx/dr = E_x / E_r of point charges in 1 + D dimensions, and it transports the noised law."""
    process, x = PFGM(EDM(8.0), D=D), np.linspace(-3, 3, 9)
    sigma = 0.7
    r = sigma * np.sqrt(D)
    force = MASSES / ((x[:, None] - ATOMS) ** 2 + r**2) ** ((1 + D) / 2)
    field = (force * (x[:, None] - ATOMS)).sum(-1) / (force * r).sum(-1)
    t = jnp.full(9, sigma / 8.0)
    said = denoiser(D)(jnp.asarray(x)[:, None], t)
    np.testing.assert_allclose(said.value[:, 0], posterior_mean(x, sigma, D), rtol=1e-10)
    velocity = process.convert(said, "velocity", jnp.asarray(x)[:, None], t).value[:, 0]
    np.testing.assert_allclose(velocity, field * np.sqrt(D) * 8.0, rtol=1e-10)  # dr = sqrt(D) d sigma, d sigma = 8 dt

    def log_p(x, t):
        log_k = process.marginal(jnp.asarray(ATOMS)[:, None], t[None]).log_prob(x[None, None])[:, 0]
        return jax.nn.logsumexp(log_k + jnp.log(MASSES))

    def b(x, t):
        return process.convert(denoiser(D)(x[None, None], t[None]), "velocity", x[None, None], t[None]).value[0, 0]

    @jax.vmap
    def balance(x, t):
        return jax.grad(log_p, 1)(x, t) + jax.grad(b)(x, t) + b(x, t) * jax.grad(log_p)(x, t)

    np.testing.assert_allclose(balance(jnp.asarray(x), t), 0.0, atol=1e-9)


@pytest.mark.slow
def test_the_posterior_mean_is_that_of_the_draws():
    """E[x0 | x_t in a bin], from drawn pairs: kernel and denoiser are of one law."""
    D, n, t = 2.0, 400_000, 0.1
    which = np.random.default_rng(0).choice(3, size=n, p=MASSES)
    x0 = jnp.asarray(ATOMS[which], jnp.float32)[:, None]
    xt = np.asarray(PFGM(EDM(8.0), D=D).marginal(x0, jnp.full(n, t)).sample(random.example_keys(jax.random.key(1), n)))[
        :, 0
    ]
    for centre in (-2.0, 0.0, 1.5, 4.0):
        near = np.abs(xt - centre) < 0.05
        expected = posterior_mean(xt[near].astype(float), 0.8, D).mean()
        assert abs(ATOMS[which[near]].mean() - expected) < 4.5 * ATOMS[which[near]].std() / np.sqrt(near.sum())


@pytest.mark.slow
def test_edm_samples_and_trains_it_unchanged():
    """Heun on the Karras grid from the heavy-tailed prior finds the atoms with their masses; EDM's loss is finite."""
    process, n = PFGM(EDM(8.0), data_std=1.0, D=4.0), 4000
    drawn = ddjax.sample(
        jax.random.key(0), denoiser(4.0), process, shape=(n, 1), solver=Heun(process),
        times=grids.karras(process.schedule, 24, sigma_max=8.0, sigma_min=0.01),
    )  # fmt: skip
    x = np.asarray(drawn.x0)[:, 0]
    nearest = np.abs(x[:, None] - ATOMS).argmin(-1)
    assert (np.abs(x - ATOMS[nearest]) < 0.02).mean() > 0.99
    np.testing.assert_allclose(np.bincount(nearest) / n, MASSES, atol=0.05)
    objective = gaussian(process, "edm", density=log_normal_sigma(process))

    def apply(params, xt, t, cond, *, rng=None, train=False):
        return params * xt

    x0 = jnp.asarray(ATOMS[nearest[:64]], jnp.float32)[:, None]
    loss, grad = jax.value_and_grad(lambda p: objective(jax.random.key(1), apply, p, x0, train=False)[0])(
        jnp.float32(0.5)
    )
    assert np.isfinite(loss)
    assert np.isfinite(grad)


def test_conversions_are_those_of_the_gaussian(x64):
    process, other = PFGM(CondOT(), 0.5, D=3.0), Gaussian(CondOT(), 0.5)
    value, xt = (jnp.asarray(np.random.default_rng(i).normal(size=(3, 2))) for i in (0, 1))
    t = jnp.asarray([0.1, 0.5, 0.9])
    law, prior = process.marginal(value, t), process.prior((3, 2), 0.4)
    np.testing.assert_allclose(law.mean, (1 - t)[:, None] * value, rtol=1e-12)
    np.testing.assert_allclose(jnp.broadcast_to(law.scale, (3, 2)), jnp.broadcast_to(t[:, None], (3, 2)), rtol=1e-12)
    np.testing.assert_allclose(prior.scale, np.hypot(0.4, 0.5 * 0.6), rtol=1e-12)
    np.testing.assert_array_equal(prior.mean, 0.0)
    assert set(process.kinds) == {"x0", "noise", "velocity", "v", "edm"}
    for kind in process.kinds:
        ours = process.convert(Prediction(value, kind), "x0", xt, t).value
        np.testing.assert_array_equal(ours, other.convert(Prediction(value, kind), "x0", xt, t).value)


def test_errors():
    process, x, t = PFGM(EDM(), D=2.0), jnp.zeros((2, 3)), jnp.full(2, 0.5)
    for D in (0.0, np.inf):
        with pytest.raises(ValueError, match="D must be positive"):
            PFGM(D=D)
    with pytest.raises(ValueError, match="does not understand"):
        process.convert(Prediction(x, "score"), "x0", x, t)
    said = Prediction(x, "x0")
    for name, arguments in {
        "bridge": (x, x, t, t),
        "reverse": (said, x, t, t),
        "sde": (t,),
        "prior_kl": (x, t),
        "path_kl": (x, said, x, t),
        "step_kl": (x, said, x, t, t),
        "reconstruction": (x, said, x, t),
    }.items():
        with pytest.raises(ValueError, match="is an ODE"):
            getattr(process, name)(*arguments)
