"""Schedules: derivatives by autodiff, inverses, both ends, for any parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddjax import schedules as sc
from ddjax.duality import Duality

SURVIVAL = [
    sc.Linear(),
    sc.LogLinear(1e-3),
    sc.Polynomial(),
    sc.Polynomial(2.0),
    sc.Polynomial(0.5),
    sc.Cosine(),
    sc.Geometric(),
]
SURVIVAL += [Duality(sc.VE(0.1, 100.0), 27)]
GAUSSIAN = [sc.VPLinear(), sc.VPCosine(), sc.VPCosine(0.0), sc.VE(), sc.EDM(), sc.CondOT()]
GAUSSIAN += [sc.SubVP(), sc.Trigonometric(), sc.PolynomialPath(3.0), sc.LinearVP(), sc.LogSNRLinear()]
GAUSSIAN += [sc.Laplace(), sc.Laplace(1.0, 2.0, 14.0, -9.0, "cond_ot"), sc.Sigmoid(), sc.Sigmoid(0.0, 3.0, 0.7)]
GAUSSIAN += [sc.Table.ddpm_linear(), sc.Table.ddpm_cosine(20), sc.Table((9.0, 1.0, -7.0), "ve")]
GAUSSIAN += [sc.Shifted(sc.VPCosine(), 4.0), sc.Shifted(sc.CondOT(), 3.0, "cond_ot"), sc.Shifted(sc.EDM(), 0.5, "ve")]
GAUSSIAN += [sc.KineticOptimal((0.9, 0.7, 0.0, 0.4), 0.8), sc.Monotone.initial(8)]
GAUSSIAN += [sc.VPLinear(4.0, 4.0), sc.SubVP(3.0, 3.0)]  # beta constant
GAUSSIAN += [sc.ToData(sc.Table.ddpm_linear())]
METHODS = ("alpha", "sigma", "alpha_prime", "sigma_prime", "log_snr", "log_snr_prime")
every = pytest.mark.parametrize("schedule", SURVIVAL + GAUSSIAN, ids=repr)
survival = pytest.mark.parametrize("schedule", SURVIVAL, ids=repr)
gaussian = pytest.mark.parametrize("schedule", GAUSSIAN, ids=repr)
TIMES = np.linspace(0.01, 0.99, 50)


def check(schedule, times=TIMES):
    """Derivatives, definition of the log-SNR, monotonicity, inverse."""
    t = jnp.asarray(times)
    slope = lambda f: np.asarray(jax.vmap(jax.grad(f))(t))
    for name in ("alpha", "sigma", "log_snr"):
        ours = np.asarray(getattr(schedule, f"{name}_prime")(t))
        np.testing.assert_allclose(ours, slope(getattr(schedule, name)), rtol=1e-8, atol=1e-10)
    factor = 1.0 if isinstance(schedule, sc.Survival) else 2.0
    alpha, sigma = np.asarray(schedule.alpha(t)), np.asarray(schedule.sigma(t))
    np.testing.assert_allclose(schedule.log_snr(t), factor * np.log(alpha / sigma), rtol=1e-8, atol=1e-8)
    assert (np.diff(np.asarray(schedule.log_snr(t))) < 0).all()
    assert (np.diff(sigma) > 0).all() or isinstance(schedule, sc.KineticOptimal)
    np.testing.assert_allclose(schedule.time(schedule.log_snr(t)), t, rtol=1e-7)


@pytest.mark.slow
@every
def test_closed_forms(x64, schedule):
    check(schedule)


@pytest.mark.slow
def test_a_schedule_up_to_the_data(x64):
    """From `least` on the schedule itself, below a straight line of sigma / alpha to 0."""
    for schedule in (sc.Table.ddpm_linear(), sc.VE(), sc.CondOT()):
        new, first = sc.ToData(schedule), jnp.asarray(sc.ToData.least)
        check(new, sc.ToData.least * TIMES)
        for name in METHODS:
            for t in (first, jnp.asarray(0.3), jnp.asarray(1.0)):
                assert getattr(new, name)(t) == getattr(schedule, name)(t)
        level = jnp.exp(-0.5 * schedule.log_snr(first))
        np.testing.assert_allclose(jnp.exp(-0.5 * new.log_snr(first * TIMES)), level * TIMES, rtol=1e-12)
        assert (new.alpha(jnp.zeros(())), new.sigma(jnp.zeros(())), new.time(jnp.inf)) == (1, 0, 0)
    # All that a variance-preserving schedule has left below entry 0 keeps the variance.
    t = sc.ToData.least * TIMES
    kept = sc.ToData(sc.Table.ddpm_linear())
    np.testing.assert_allclose(kept.alpha(t) ** 2 + kept.sigma(t) ** 2, 1.0, atol=1e-8)
    with pytest.raises(ValueError, match="needs a Gaussian schedule"):
        sc.ToData(sc.Linear())


@pytest.mark.parametrize(
    ("make", "bounds"),
    [
        (sc.Polynomial, [(0.3, 5.0)]),
        (sc.LogLinear, [(0.0, 0.9)]),
        (lambda a, b: sc.VPLinear(a, a + b), [(0.01, 1.0), (1.0, 25.0)]),
        (sc.VPCosine, [(0.0, 0.5)]),
        (lambda a, b: sc.VE(a, a * b), [(1e-3, 1.0), (2.0, 1e4)]),
        (sc.EDM, [(0.1, 1000.0)]),
        (lambda a, b: sc.SubVP(a, a + b), [(0.01, 1.0), (1.0, 25.0)]),
        (sc.PolynomialPath, [(1.0, 5.0)]),
        (sc.Laplace, [(-3.0, 3.0), (0.3, 5.0)]),
        (lambda a, b, tau: sc.Sigmoid(a, a + b, tau), [(-3.0, 1.0), (0.5, 6.0), (0.3, 2.0)]),
        (lambda a, b: sc.Table((a, a - b, a - 2 * b - 1)), [(0.0, 15.0), (0.1, 10.0)]),
        (lambda k: sc.Shifted(sc.CondOT(), k, "cond_ot"), [(0.1, 10.0)]),
        (lambda a, b, m: sc.KineticOptimal((a, b, a), m), [(0.0, 1.0), (0.1, 1.0), (0.1, 5.0)]),
    ],
    ids=lambda value: None if isinstance(value, list) else getattr(value, "__name__", None),
)
def test_closed_forms_for_any_parameters(x64, make, bounds):
    @settings(max_examples=8, deadline=None, derandomize=True, database=None)
    @given(st.tuples(*(st.floats(low, high) for low, high in bounds)))
    def property_holds(parameters):
        check(make(*parameters))

    property_holds()


@survival
def test_survival_and_loss_sum_to_one(x64, schedule):
    t = jnp.linspace(0.0, 1.0, 101)
    np.testing.assert_allclose(schedule.alpha(t) + schedule.sigma(t), 1.0, atol=1e-15)
    np.testing.assert_allclose(schedule.time_of_sigma(schedule.sigma(t)), t, atol=1e-7)


@pytest.mark.parametrize("schedule", [sc.VPLinear(), sc.VPCosine()], ids=repr)
def test_variance_preserving(x64, schedule):
    t = jnp.linspace(0.0, 1.0, 101)
    np.testing.assert_allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1.0, atol=1e-14)


@every
def test_both_ends_in_float32(schedule):
    """No NaN; the sign of an infinity is that of the limit; the log-SNR's slope is negative."""
    for t in (0.0, 1.0):
        values = {name: np.asarray(getattr(schedule, name)(jnp.float32(t))) for name in METHODS}
        assert all(v.dtype == np.float32 for v in values.values())
        assert not any(np.isnan(v) for v in values.values()), values
        assert values["log_snr_prime"] < 0
        assert np.isfinite(values["alpha"])
        assert np.isfinite(values["sigma"])
        if values["sigma"] == 0:
            assert values["log_snr"] == np.inf
        elif values["alpha"] == 0:
            assert values["log_snr"] == -np.inf
        else:
            assert np.isfinite(values["log_snr"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "alpha", "sigma"),
    [
        (sc.Linear(), (1, 0), (0, 1)),
        (sc.LogLinear(1e-3), (1, 1e-3), (0, 1 - 1e-3)),
        (sc.Polynomial(3.0), (1, 0), (0, 1)),
        (sc.Cosine(), (1, 0), (0, 1)),
        (sc.VPLinear(0.1, 20.0), (1, np.exp(-0.25 * 20.1)), (0, np.sqrt(1 - np.exp(-0.5 * 20.1)))),
        (sc.VPLinear(3.0, 3.0), (1, np.exp(-1.5)), (0, np.sqrt(1 - np.exp(-3.0)))),
        (sc.VPCosine(0.0), (1, 0), (0, 1)),
        (sc.VPCosine(0.008), (np.cos(np.pi / 2 * 0.008 / 1.008), 0), (np.sin(np.pi / 2 * 0.008 / 1.008), 1)),
        (sc.VE(0.01, 50.0), (1, 1), (0.01, 50)),
        (sc.EDM(80.0), (1, 1), (0, 80)),
        (sc.CondOT(), (1, 0), (0, 1)),
        (sc.SubVP(0.1, 20.0), (1, np.exp(-0.25 * 20.1)), (0, 1 - np.exp(-0.5 * 20.1))),
        (sc.Trigonometric(), (1, 0), (0, 1)),
        (sc.PolynomialPath(3.0), (1, 0), (0, 1)),
        (sc.LinearVP(), (1, 0), (0, 1)),
        (
            sc.LogSNRLinear(6.0, -4.0),
            tuple((1 + np.exp([-6.0, 4.0])) ** -0.5),
            tuple((1 + np.exp([6.0, -4.0])) ** -0.5),
        ),
        (sc.Laplace(0.0, 0.5, 6.0, -4.0, "ve"), (1, 1), tuple(np.exp([-3.0, 2.0]))),
        (sc.Sigmoid(), (1, 1e-9**0.5), (0, 1)),
        (sc.Table((6.0, 1.0, -4.0), "ve"), (1, 1), tuple(np.exp([-3.0, 2.0]))),
        (sc.Shifted(sc.CondOT(), 3.0, "cond_ot"), (1, 0), (0, 1)),
        (sc.Shifted(sc.EDM(), 0.5, "ve"), (1, 1), (0, 40)),
        (sc.KineticOptimal((0.9, 0.7, 0.0, 0.4), 0.8), (1, 0), (0, 1)),
    ],
    ids=repr,
)
def test_values_at_the_ends(schedule, alpha, sigma):
    ends = jnp.asarray([0.0, 1.0])
    np.testing.assert_allclose(schedule.alpha(ends), alpha, rtol=2e-6, atol=0)
    np.testing.assert_allclose(schedule.sigma(ends), sigma, rtol=2e-6, atol=0)


@survival
@pytest.mark.parametrize("gap", [1e-3, 1e-6])
def test_survival_keeps_its_precision_at_both_ends(schedule, gap):
    """alpha near t = 1 and sigma near t = 0 are small numbers, not differences of large ones."""
    t = np.float32(1 - gap)
    single = float(schedule.alpha(jnp.float32(t)))
    with jax.enable_x64(True):
        double = float(schedule.alpha(jnp.asarray(t, jnp.float64)))
        small = float(schedule.sigma(jnp.asarray(np.float32(gap), jnp.float64)))
    np.testing.assert_allclose(single, double, rtol=1e-4)
    np.testing.assert_allclose(float(schedule.sigma(jnp.float32(gap))), small, rtol=1e-5)


def test_formulas_in_print(x64):
    t = jnp.asarray(TIMES)
    np.testing.assert_allclose(sc.Cosine().alpha(t), 1 - np.cos(np.pi / 2 * (1 - TIMES)), rtol=1e-9)
    angle = np.pi / 2 * (TIMES + 0.008) / 1.008
    np.testing.assert_allclose(sc.VPCosine().alpha(t) ** 2, np.cos(angle) ** 2, rtol=1e-9)
    grid = np.linspace(0, 1, 20_001)
    beta = 0.1 + grid * 19.9
    integral = np.concatenate([[0], np.cumsum(0.5 * (beta[1:] + beta[:-1]) * np.diff(grid))])
    np.testing.assert_allclose(sc.VPLinear().alpha(t), np.exp(-0.5 * np.interp(TIMES, grid, integral)), rtol=1e-6)
    np.testing.assert_allclose(sc.VE().sigma(t), 0.01 * 5000.0**TIMES, rtol=1e-9)
    np.testing.assert_allclose(-np.log(sc.LogLinear(1e-3).alpha(t)), -np.log1p(-(1 - 1e-3) * TIMES), rtol=1e-9)


@pytest.mark.parametrize(
    "make",
    [
        lambda: sc.Polynomial(0.0),
        lambda: sc.Polynomial(-1.0),
        lambda: sc.LogLinear(1.0),
        lambda: sc.LogLinear(-1e-3),
        lambda: sc.VPLinear(0.0, 1.0),
        lambda: sc.VPLinear(2.0, 1.0),
        lambda: sc.VPCosine(-0.1),
        lambda: sc.VE(0.0, 1.0),
        lambda: sc.VE(1.0, 1.0),
        lambda: sc.EDM(0.0),
        lambda: sc.EDM(-1.0),
        lambda: sc.SubVP(2.0, 1.0),
        lambda: sc.PolynomialPath(0.5),
        lambda: sc.LogSNRLinear(-1.0, 1.0),
        lambda: sc.LogSNRLinear(scaling="variance_preserving"),
        lambda: sc.Laplace(scale=0.0),
        lambda: sc.Laplace(mean=20.0),
        lambda: sc.Sigmoid(3.0, -3.0),
        lambda: sc.Sigmoid(tau=0.0),
        lambda: sc.Sigmoid(least=0.0),
        lambda: sc.Table((1.0,)),
        lambda: sc.Table((1.0, 2.0)),
        lambda: sc.Table.from_betas((0.1, 1.0)),
        lambda: sc.Table.ddpm_linear(20),
        lambda: sc.Shifted(sc.Linear()),
        lambda: sc.Shifted(sc.CondOT(), 0.0),
        lambda: sc.KineticOptimal((0.5, 1.5)),
        lambda: sc.KineticOptimal((0.5,), 0.0),
        lambda: sc.KineticOptimal.from_errors((1.0, 2.0), (0.5,), 1.0),
        lambda: sc.Monotone((-5.0, 13.0), 1.0, np.zeros((3, 2))),
        lambda: sc.Monotone((13.0, -5.0), 1.0, np.zeros((2, 2))),
        lambda: sc.PerSite(np.zeros((2, 4))),
        lambda: sc.PerSite.initial((4,), -1.0, 1.0),
    ],
)
def test_errors(make):
    with pytest.raises(ValueError, match=r"\("):
        make()


def test_compared_by_value():
    assert sc.Polynomial(2.0) == sc.Polynomial(2.0)
    assert hash(sc.VE()) == hash(sc.VE())
    assert sc.Linear() != sc.LogLinear(0.0)
