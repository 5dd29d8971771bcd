"""The kinetic-optimal path: its energy by quadrature of the exact velocity, against its closed form and other paths."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax import schedules as sc
from ddjax.fixtures import GaussianMixture
from ddjax.processes import Gaussian

LAW = GaussianMixture(dims=1, components=3, seed=1, spread=1.5)
GRID = np.linspace(-9.0, 9.0, 3001)


def second_moment():
    log_w, means, covariances = LAW.parameters()
    return float((jnp.exp(log_w) * (means[:, 0] ** 2 + covariances[:, 0, 0])).sum())


@jax.jit
@jax.vmap
def moments(alpha, sigma):
    """Over x_t, by the trapezoidal rule: E x0_hat^2, E x0_hat x_t, E x_t^2."""
    x = jnp.asarray(GRID)[:, None]
    p = jnp.exp(LAW.log_prob(x, alpha, sigma)) * (GRID[1] - GRID[0])
    x0 = LAW.x0(x, alpha, sigma)[:, 0]
    return p @ x0**2, p @ (x0 * x[:, 0]), p @ x[:, 0] ** 2


def energy(schedule):
    """The integral over t of E|alpha' x0_hat + sigma' (x - alpha x0_hat) / sigma|^2."""
    nodes, weights = np.polynomial.legendre.leggauss(64)
    t = jnp.asarray(0.5 * (nodes + 1))
    a, s, da, ds = (f(t) for f in (schedule.alpha, schedule.sigma, schedule.alpha_prime, schedule.sigma_prime))
    hat, cross, square = moments(a, s)
    of_x0, of_x = da - ds * a / s, ds / s
    return float(0.5 * weights @ (of_x0**2 * hat + 2 * of_x0 * of_x * cross + of_x**2 * square))


@functools.cache
def optimal():
    m = second_moment()
    log_snrs = jnp.linspace(16.0, -12.0, 256)
    hats = moments(jax.nn.sigmoid(log_snrs) ** 0.5, jax.nn.sigmoid(-log_snrs) ** 0.5)[0]
    return sc.KineticOptimal.from_errors(log_snrs, np.maximum(m - np.asarray(hats), 0.0), m, parts=512)


@pytest.mark.slow
def test_its_energy_is_its_closed_form_and_the_least(x64):
    best = optimal()
    found = energy(best)
    np.testing.assert_allclose(found, best.energy, rtol=1e-3)
    for other in (sc.CondOT(), sc.Trigonometric(), sc.PolynomialPath(2.0), sc.LinearVP(), sc.Sigmoid()):
        assert energy(other) > found + 1e-2, other


@pytest.mark.slow
@pytest.mark.parametrize("change", [-0.2, 0.2])
def test_changes_to_the_separation_cost_energy(x64, change):
    """Other paths of the same family, near it: tilted towards data or towards noise, or to another size."""
    best = optimal()
    separation = np.asarray(best.separation)
    tilt = np.linspace(-1, 1, len(separation))
    tilted = sc.KineticOptimal(np.clip(separation * (1 + change * tilt), 0, 1), best.second_moment)
    resized = sc.KineticOptimal(separation, best.second_moment * (1 + change))
    assert energy(tilted) > energy(best) + 1e-5
    assert energy(resized) > energy(best) + 1e-5


@pytest.mark.slow
def test_data_far_apart_go_straight(x64):
    """No error at any noise level: CondOT, whatever the data's size."""
    t = jnp.linspace(0.0, 1.0, 41)
    schedule = sc.KineticOptimal.from_errors((5.0, -5.0), (0.0, 0.0), 2.3)
    for name in ("alpha", "sigma", "alpha_prime", "sigma_prime"):
        np.testing.assert_allclose(getattr(schedule, name)(t), getattr(sc.CondOT(), name)(t), atol=1e-12)
    np.testing.assert_allclose(schedule.energy, 3.3, rtol=1e-12)


@pytest.mark.parametrize("std", [1.0, 0.5])
def test_gaussian_data_only_change_their_width(x64, std):
    """Error d^2 s^2 / (a^2 d^2 + s^2): the standard deviation is linear in t, and the energy (1 - d)^2."""
    log_snrs = np.linspace(15, -15, 300)
    schedule = sc.KineticOptimal.from_errors(log_snrs, std**2 / (1 + std**2 * np.exp(log_snrs)), std**2)
    t = jnp.linspace(0.0, 1.0, 41)
    width = jnp.sqrt(schedule.alpha(t) ** 2 * std**2 + schedule.sigma(t) ** 2)
    np.testing.assert_allclose(width, std + (1 - std) * t, atol=1e-6)
    np.testing.assert_allclose(schedule.energy, (1 - std) ** 2, atol=1e-6)


@pytest.mark.slow
def test_a_process_takes_it(x64):
    low, high = Gaussian(optimal(), 1.5).t_range
    assert 0 < low < 0.05 < 0.9 < high < 1
