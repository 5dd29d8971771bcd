"""Diffusion evolution: one generation by loops, the posterior mean as its limit, and functions with known optima."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax import evolution
from ddjax.evolution import Evolution, evolve
from ddjax.processes import Gaussian
from ddjax.schedules import VPCosine

PROCESS = Gaussian(VPCosine(0.0))
RNG = np.random.default_rng(0)


def levels(t):
    return np.cos(np.pi * t / 2), np.sin(np.pi * t / 2)


def log_density(x):
    return 800.0 - jnp.abs(x).sum((1, 2))  # whose exponential overflows


@pytest.mark.parametrize("latent", [None, 2])
def test_a_generation_is_two_loops(x64, latent):
    """Each individual's average over all, with its own time, in the latent space where there is one."""
    x, t = RNG.normal(size=(5, 2, 3)), np.linspace(0.2, 0.9, 5)
    rows = None if latent is None else np.asarray(evolution.random_projection(jax.random.key(0), 6, latent))
    if latent is not None:
        np.testing.assert_allclose((rows**2).sum(1), 1)
    denoise = Evolution(PROCESS, log_density, None if rows is None else jnp.asarray(rows))
    out = jax.jit(lambda x, t: denoise(x, t))(jnp.asarray(x), jnp.asarray(t))
    assert out.kind == "x0"
    flat = x.reshape(5, 6)
    z = flat if rows is None else flat @ rows.T
    for i in range(5):
        alpha, sigma = levels(t[i])
        total, weight = np.zeros(6), np.longdouble(0)
        for j in range(5):
            fit = np.exp(np.longdouble(-np.abs(x[j]).sum()))
            w = fit * np.exp(np.longdouble(-((z[i] - alpha * z[j]) ** 2).sum() / (2 * sigma**2)))
            total, weight = total + w * flat[j], weight + w
        np.testing.assert_allclose(out.value[i].ravel(), (total / weight).astype(float), atol=1e-12)


def test_it_tends_to_the_posterior_mean_of_the_population_times_the_density(x64):
    """N(0, v) individuals of density exp(-x^2 / 2 c): E[x0 | x_t] in closed form; the error falls as 1 / sqrt(n)."""
    v, c, t = 0.8, 1.5, 0.6
    alpha, sigma = levels(t)
    variance = 1 / (1 / v + 1 / c)
    gain = alpha * variance / (alpha**2 * variance + sigma**2)
    denoise = jax.jit(Evolution(PROCESS, lambda x: -0.5 * (x**2).sum(1) / c))
    errors = []
    for n in (250, 4000):
        x = np.sqrt(v) * RNG.normal(size=(n, 1))
        x[:50] = np.linspace(-1, 1, 50)[:, None]
        out = denoise(jnp.asarray(x), jnp.full(n, t)).value
        errors.append(np.sqrt(np.mean((np.asarray(out)[:50] - gain * x[:50]) ** 2)))
    print(errors)
    assert errors[1] < 0.02
    assert errors[0] / errors[1] > 2  # 4 in the mean


CENTRES = np.array([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])


def peaks(x):
    """Four optima of one height."""
    return -jnp.min(jnp.sum((x[:, None] - CENTRES) ** 2, axis=-1), axis=1)


@pytest.mark.slow
def test_all_optima_are_found():
    """With the hill of a sphere: one optimum, to 0.05; with four: each has its tenth of the population within 0.3."""
    out = evolve(jax.random.key(0), peaks, (256, 2), temperature=0.05, steps=50)
    distance = np.sqrt(((np.asarray(out.population)[:, None] - CENTRES) ** 2).sum(-1))
    assert ((distance < 0.3).mean(0) > 0.1).all()
    assert (distance.min(1) < 0.3).mean() > 0.9
    assert float(out.best_fitness) == float(out.fitness.max()) > -1e-2
    np.testing.assert_array_equal(out.best, out.population[int(np.argmax(out.fitness))])


@pytest.mark.slow
@pytest.mark.parametrize(("dims", "latent"), [(4, None), (20, 3)])
def test_the_optimum_of_a_convex_function(dims, latent):
    """In a few dimensions, and in 20 by distances in 3 random ones; candidates of another scale are as far."""
    target = np.linspace(-0.5, 0.5, dims)
    settings = {"temperature": 0.5, "latent": latent}
    shape = (512, dims)
    out = evolve(jax.random.key(1), lambda x: -((x - target) ** 2).sum(1), shape, **settings)
    start = -(1 + (target**2).mean()) * dims
    assert float(out.best_fitness) > 0.2 * start
    moved = evolve(jax.random.key(1), lambda x: -((x / 4 - target) ** 2).sum(1), shape, scale=4.0, **settings)
    np.testing.assert_allclose(moved.best_fitness, out.best_fitness, rtol=1e-4)


@pytest.mark.slow
def test_ends_and_nobody_fit():
    """No noise: each is itself. All noise: the fittest's average. Nobody fit: the kernel's. One alone: itself."""
    x = jnp.asarray(RNG.normal(size=(4, 2)), jnp.float32)
    denoise = Evolution(PROCESS, lambda x: x[:, 0])
    np.testing.assert_array_equal(denoise(x, jnp.zeros(4)).value, x)
    w = np.exp(np.asarray(x[:, 0], np.float64))
    np.testing.assert_allclose(denoise(x, jnp.ones(4)).value, np.tile(w @ np.asarray(x) / w.sum(), (4, 1)), atol=1e-5)
    nobody = Evolution(PROCESS, lambda x: jnp.full(len(x), -jnp.inf))(x, jnp.full(4, 0.5)).value
    np.testing.assert_allclose(nobody, Evolution(PROCESS, lambda x: jnp.zeros(len(x)))(x, jnp.full(4, 0.5)).value)
    np.testing.assert_allclose(denoise(x[:1], jnp.full(1, 0.5)).value, x[:1])


def test_bad_arguments():
    for options, match in (({"temperature": 0.0}, "must be positive"), ({"latent": 3}, "latent must be 1 to 2")):
        with pytest.raises(ValueError, match=match):
            evolve(jax.random.key(0), peaks, (4, 2), **options)
