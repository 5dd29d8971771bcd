"""T and its schedule against closed forms and quadrature of other integrals, at both ends, in float32 and float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special

from ddjax import duality
from ddjax import schedules as sc
from ddjax.duality import Duality, gaussian_log_snr, survival_log_odds, survival_log_odds_prime
from ddjax.fixtures import Categorical, exact_nelbo
from ddjax.processes import Uniform

LOG_2PI = np.log(2 * np.pi)
SIZES = (2, 3, 27, 50257)
RATIOS = np.array([1e-6, 1e-3, 0.1, 0.7, 1.5, 2.4, 4.0, 5.75, 8.0, 12.0])


def integral(f):
    """Over the line, of a function that is smooth at the scale of 0.05 and gone beyond 40."""
    panels = np.arange(-40.0, 40.0)
    return sum(integrate.quad(f, a, a + 1, epsabs=0, epsrel=1e-11, limit=200)[0] for a in panels)


def phi(z):
    return np.exp(-0.5 * z * z - 0.5 * LOG_2PI)


def win(r, mine, num_symbols):
    """P(entry `mine` is the largest) of independent normals, of which entry 0 has the mean r."""
    others = lambda z: special.log_ndtr(z - r) + (num_symbols - 2) * special.log_ndtr(z)
    if mine == 0:
        return integral(lambda z: phi(z - r) * np.exp((num_symbols - 1) * special.log_ndtr(z)))
    return integral(lambda z: phi(z) * np.exp(others(z)))


def log_odds(r, num_symbols, dtype=float):
    return np.asarray(survival_log_odds(jnp.asarray(2 * np.log(r), dtype), num_symbols))


@pytest.mark.slow
def test_closed_forms_of_two_and_three_symbols(x64):
    """Two: erf(r / 2). Three: an orthant of a bivariate normal of correlation 1/2, by Owen's T."""
    np.testing.assert_allclose(special.expit(log_odds(RATIOS, 2)), special.erf(RATIOS / 2), rtol=1e-11)
    np.testing.assert_allclose(special.expit(-log_odds(RATIOS, 2)), special.erfc(RATIOS / 2), rtol=1e-10)
    far = np.array([20.0, 39.0, 41.0, 300.0])
    np.testing.assert_allclose(log_odds(far, 2), far**2 / 4 - np.log(special.erfcx(far / 2)), rtol=1e-14)
    h = RATIOS / np.sqrt(2)
    p = special.ndtr(h) - 2 * special.owens_t(h, np.sqrt(1 / 3))
    np.testing.assert_allclose(special.expit(log_odds(RATIOS, 3)), (3 * p - 1) / 2, atol=1e-14)


@pytest.mark.filterwarnings("ignore::scipy.integrate.IntegrationWarning")  # at the last digit
@pytest.mark.parametrize("num_symbols", SIZES)
def test_transformation_is_its_definition(x64, num_symbols):
    """The integral in print, and at both ends the small one of the two relative to itself."""
    k, y = num_symbols, log_odds(RATIOS, num_symbols)
    printed = np.array([k / (k - 1) * (win(r, 0, k) - 1 / k) for r in RATIOS])
    np.testing.assert_allclose(special.expit(y), printed, atol=1e-11)
    beaten = lambda z, r: -phi(z - r) * np.expm1((k - 1) * special.log_ndtr(z))
    lost = [k / (k - 1) * integral(functools.partial(beaten, r=r)) for r in RATIOS]
    np.testing.assert_allclose(special.expit(-y), lost, rtol=1e-10)
    # T'(0) = E[max of K] / (K - 1), by integration by parts.
    expected = integral(lambda z: z * k * phi(z) * np.exp((k - 1) * special.log_ndtr(z)))
    np.testing.assert_allclose(special.expit(y[0]) / RATIOS[0], expected / (k - 1), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("num_symbols", SIZES)
def test_float32(num_symbols):
    """Within the rounding of the log-SNR itself, in alpha and, relatively, in the smaller of alpha and sigma."""
    snr = np.linspace(-30.0, 5.0, 400, dtype=np.float32)
    single = np.asarray(survival_log_odds(snr, num_symbols))
    with jax.enable_x64(True):
        double = np.asarray(survival_log_odds(snr.astype(np.float64), num_symbols))
    assert single.dtype == np.float32
    assert np.abs(special.expit(single.astype(float)) - special.expit(double)).max() < 4e-7
    assert (np.abs(single - double) / np.maximum(1.0, np.abs(double))).max() < 3e-6
    back = np.asarray(gaussian_log_snr(single, num_symbols))
    np.testing.assert_allclose(back, snr, rtol=3e-6, atol=2e-6)


@pytest.mark.slow
def test_argmax_is_uniform_corruption(x64):
    """Every symbol's chance to be the largest, by its own integral, is the marginal: the other symbols are alike."""
    t = 0.6
    for k in (3, 27):
        process = Uniform(k, Duality(sc.CondOT(), k))
        r = (1 - t) / t
        x0 = jnp.full((k, 1), 1)
        q = np.exp(process.marginal(x0, jnp.full(k, t)).log_prob(jnp.arange(k)[:, None]))[:, 0]
        expected = np.full(k, win(r, 1, k))
        expected[1] = win(r, 0, k)
        np.testing.assert_allclose(expected.sum(), 1.0, atol=1e-12)
        np.testing.assert_allclose(q, expected, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("num_symbols", SIZES)
def test_inverse_and_derivative(x64, num_symbols):
    snr = jnp.concatenate([jnp.linspace(-80.0, 18.0, 997), jnp.asarray([-jnp.inf, jnp.inf])])
    y = survival_log_odds(snr, num_symbols)
    assert (np.diff(y[:-2]) > 0).all()
    np.testing.assert_array_equal(y[-2:], [-np.inf, np.inf])
    np.testing.assert_allclose(gaussian_log_snr(y, num_symbols), snr, rtol=1e-12, atol=1e-12)
    one = jnp.linspace(-20.0, 7.0, 500)
    slope = jax.vmap(jax.grad(lambda s: survival_log_odds(s, num_symbols)))(one)
    np.testing.assert_allclose(survival_log_odds_prime(one, num_symbols), slope, rtol=1e-13)
    h = 1e-4
    centred = (survival_log_odds(one + h, num_symbols) - survival_log_odds(one - h, num_symbols)) / (2 * h)
    np.testing.assert_allclose(slope, centred, rtol=1e-6)
    back = jax.vmap(jax.grad(lambda y: gaussian_log_snr(y, num_symbols)))(survival_log_odds(one, num_symbols))
    np.testing.assert_allclose(back * slope, 1.0, rtol=1e-8)


@pytest.mark.slow
def test_the_table_holds_between_its_points(x64):
    """At random ratios, against the integrals that it was made of."""
    r = np.exp(np.random.default_rng(0).uniform(-9, 9, 300))
    for k in SIZES:
        exact = np.log(r) + r**2 / 4 + duality._exact_remainder(r, k)
        np.testing.assert_allclose(log_odds(r, k), exact, rtol=1e-14, atol=2e-11)


@pytest.mark.slow
@pytest.mark.parametrize("gaussian", [sc.CondOT(), sc.VPCosine(), sc.VPCosine(0.0), sc.VPLinear(), sc.EDM()], ids=repr)
def test_both_ends_of_the_shadow_in_float32(gaussian):
    """No NaN, and the slope of alpha is its limit; sigma is 0 long before the data, where the log-SNR still counts."""
    schedule = Duality(gaussian, 27)
    t = jnp.asarray([0.0, 1e-6, 0.5, 1.0 - 1e-6, 1.0], jnp.float32)
    names = ("alpha", "sigma", "alpha_prime", "sigma_prime", "log_snr", "log_snr_prime")
    values = {name: np.asarray(getattr(schedule, name)(t)) for name in names}
    for name, value in values.items():
        assert value.dtype == np.float32, name
        assert not np.isnan(value).any(), (name, value)
    assert values["sigma"][0] == values["sigma_prime"][0] == 0
    assert (values["log_snr_prime"] < 0).all()
    assert np.isfinite(values["sigma_prime"]).all()
    np.testing.assert_allclose(schedule.time(values["log_snr"])[2:], t[2:], rtol=1e-5)
    gradient = jax.vmap(jax.grad(schedule.alpha))(t[1:-1])
    np.testing.assert_allclose(gradient, values["alpha_prime"][1:-1], rtol=1e-3, atol=1e-6)


def test_slope_where_nothing_is_left(x64):
    """CondOT ends with r = 1 - t: alpha'(1) = -T'(0), in closed form for two symbols."""
    np.testing.assert_allclose(Duality(sc.CondOT(), 2).sigma_prime(jnp.asarray(1.0)), np.pi**-0.5, rtol=1e-12)


def test_exact_denoiser_gives_the_entropy(x64):
    law = Categorical(2, 3)
    process = Uniform(3, Duality(sc.CondOT(), 3))
    t_range = float(process.schedule.time_of_sigma(jnp.asarray(1e-6))), 1.0
    bound = exact_nelbo(law, law.denoise(process, "cavity"), process, t_range=t_range, order=24)
    np.testing.assert_allclose(float(bound.total[0]), law.entropy, atol=1e-6, rtol=0)


def test_errors_and_values():
    with pytest.raises(ValueError, match="Gaussian schedule"):
        Duality(sc.Linear(), 3)
    with pytest.raises(ValueError, match="at least 2"):
        Duality(sc.VE(), 1)
    assert Duality(sc.VE(), 3) == Duality(sc.VE(), 3) != Duality(sc.VE(), 4)
    assert hash(Duality(sc.VE(), 3)) == hash(Duality(sc.VE(), 3))
