"""Gaussian schedules against their papers' formulas, written here again."""

import jax.numpy as jnp
import numpy as np
import pytest

from ddjax import schedules as sc

TIMES = np.linspace(0.01, 0.99, 50)
T = jnp.asarray(TIMES, jnp.float32)


def near(values, expected, rtol=1e-9):
    np.testing.assert_allclose(np.asarray(values), expected, rtol=rtol)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1000, 50])
def test_ddpm_tables_are_the_products_of_their_betas(x64, steps):
    """At step i of the chain, i = 0 ... steps - 1: DDPM's and improved DDPM's loops."""
    t = jnp.arange(steps) / (steps - 1)
    linear = np.linspace(1000 / steps * 1e-4, 1000 / steps * 0.02, steps)
    bar = lambda u: np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    cosine = np.asarray([min(1 - bar((i + 1) / steps) / bar(i / steps), 0.999) for i in range(steps)])
    for table, betas in ((sc.Table.ddpm_linear(steps), linear), (sc.Table.ddpm_cosine(steps), cosine)):
        kept = np.cumprod(1 - betas)
        near(table.alpha(t), np.sqrt(kept), rtol=1e-10)
        near(table.sigma(t), np.sqrt(1 - kept), rtol=1e-10)
        halfway = table.log_snr((t[:-1] + t[1:]) / 2)
        near(halfway, 0.5 * (np.log(kept / (1 - kept))[:-1] + np.log(kept / (1 - kept))[1:]), rtol=1e-8)
        near(table.time(table.log_snr(t)), t, rtol=1e-9)


def test_sub_vp_solves_its_sde(x64):
    """Variance of dx = -beta x / 2 dt + g dw, g^2 = beta (1 - exp(-2 B)), by quadrature (Song et al., eq. 29)."""
    schedule, (low, high) = sc.SubVP(0.2, 12.0), (0.2, 12.0)
    whole = lambda u: low * u + 0.5 * (high - low) * u**2
    nodes, weights = np.polynomial.legendre.leggauss(60)
    u, w = 0.5 * TIMES[:, None] * (nodes + 1), 0.5 * TIMES[:, None] * weights
    g2 = (low + u * (high - low)) * (1 - np.exp(-2 * whole(u)))
    variance = (w * np.exp(whole(u) - whole(TIMES)[:, None]) * g2).sum(-1)
    near(schedule.sigma(jnp.asarray(TIMES)) ** 2, variance)
    near(schedule.alpha(jnp.asarray(TIMES)), np.exp(-0.5 * whole(TIMES)))


def test_formulas_in_print(x64):
    t, one = jnp.asarray(TIMES), 1 - TIMES
    near(sc.Trigonometric().alpha(t), np.cos(np.pi / 2 * TIMES))
    near(sc.Trigonometric().sigma(t), np.sin(np.pi / 2 * TIMES))
    near(sc.PolynomialPath(3.0).alpha(t), one**3)
    near(sc.PolynomialPath(3.0).sigma(t), 1 - one**3)
    near(sc.LinearVP().alpha(t), one)
    near(sc.LinearVP().sigma(t), np.sqrt(1 - one**2))
    near(sc.LogSNRLinear(8.0, -6.0).log_snr(t), 8 - 14 * TIMES)
    # Hang et al. 2024, table 1, with tails too far out to matter.
    laplace = 0.3 - 0.5 * np.sign(0.5 - TIMES) * np.log(1 - 2 * np.abs(TIMES - 0.5))
    near(sc.Laplace(0.3, 0.5, 40.0, -40.0).log_snr(t), laplace)
    # Chen 2023, algorithm 1 (with least in the place of its clip).
    start, end, tau, least = -1.0, 3.0, 0.8, 1e-6
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    v0, v1, v = sigmoid(start / tau), sigmoid(end / tau), sigmoid((TIMES * (end - start) + start) / tau)
    near(sc.Sigmoid(start, end, tau, least).alpha(t) ** 2, least + (1 - least) * (v1 - v) / (v1 - v0))
    # Hoogeboom et al. 2023, eq. 4: 256 pixels a side, as noisy as 64 would be.
    near(sc.Shifted(sc.VPCosine(0.0), 4.0).log_snr(t), -2 * np.log(np.tan(np.pi / 2 * TIMES)) + 2 * np.log(64 / 256))
    # Esser et al. 2024, eq. 23.
    near(sc.Shifted(sc.CondOT(), 3.0, "cond_ot").sigma(t), 3 * TIMES / (1 + 2 * TIMES))
    near(sc.Shifted(sc.CondOT(), 3.0, "cond_ot").alpha(t), 1 - 3 * TIMES / (1 + 2 * TIMES))


@pytest.mark.parametrize("schedule", [sc.Laplace(1.0, 2.0, 6.0, -4.0), sc.Laplace(-1.0, 0.7, 4.0, -9.0)], ids=repr)
def test_uniform_times_have_the_cut_laplace_law(x64, schedule):
    """-1 / log_snr' is its density, which integrates to 1 between the ends."""
    density = lambda x: np.exp(-np.abs(x - schedule.mean) / schedule.scale)
    parts = [(schedule.log_snr_min, schedule.mean), (schedule.mean, schedule.log_snr_max)]
    nodes, weights = np.polynomial.legendre.leggauss(40)
    mass = sum(0.5 * (b - a) * (weights * density(0.5 * (b - a) * (nodes + 1) + a)).sum() for a, b in parts)
    t = jnp.asarray(TIMES)
    near(-1 / schedule.log_snr_prime(t), density(np.asarray(schedule.log_snr(t))) / mass)


@pytest.mark.parametrize("base", [sc.VPLinear(), sc.CondOT(), sc.VE()], ids=repr)
def test_scalings_keep_the_log_snr(x64, base):
    t = jnp.asarray(TIMES)
    norms = {"vp": lambda a, s: a**2 + s**2, "ve": lambda a, s: a, "cond_ot": lambda a, s: a + s}
    for scaling, norm in norms.items():
        schedule = sc.Shifted(base, 1.0, scaling)
        near(norm(schedule.alpha(t), schedule.sigma(t)), 1.0, rtol=1e-12)
        near(schedule.sigma(t) / schedule.alpha(t), base.sigma(t) / base.alpha(t))
    own = {sc.VPLinear: "vp", sc.CondOT: "cond_ot", sc.VE: "ve"}[type(base)]
    for name in ("alpha", "sigma", "alpha_prime", "sigma_prime"):
        near(getattr(sc.Shifted(base, 1.0, own), name)(t), getattr(base, name)(t), rtol=1e-8)


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_derivatives_have_their_limits_at_the_ends(t):
    """CondOT through its log-SNR alone, which is infinite there."""
    schedule = sc.Shifted(sc.CondOT(), 3.0, "cond_ot")
    limit = {0.0: 3.0, 1.0: 1 / 3}[t]  # of 3 / (1 + 2 t)^2
    near(schedule.sigma_prime(jnp.float32(t)), limit, rtol=1e-4)
    near(schedule.alpha_prime(jnp.float32(t)), -limit, rtol=1e-4)
