"""Grids end where they say, decrease, and are the ones in print."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax import grids
from ddjax.schedules import EDM, CondOT, Cosine, Linear, ToData, VPCosine, VPLinear

# Align Your Steps' for Stable Diffusion 1.5 (Sabour et al. 2024, appendix).
STABLE = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029, 0.0)
GRIDS = {
    "uniform": grids.uniform,
    "cosine": grids.cosine,
    "log-linear": grids.log_linear,
    "loss-aware": lambda n: grids.loss_aware(n, [0.1, 0.5, 0.7], [4.0, 0.0, 1.0]),
    "karras": lambda n: grids.karras(EDM(), n),
    "karras-vp": lambda n: grids.karras(VPCosine(), n),
    "exponential": lambda n: grids.exponential(CondOT(), n),
    "quadratic": grids.quadratic,
    "beta": grids.beta,
    "through": lambda n: grids.through(EDM(), n, sigmas=STABLE),
    "shifted": grids.uniform_shifted,
    "leading": lambda n: grids.of_table(n, spacing="leading", offset=1),
    "trailing": grids.of_table,
    "linspace": lambda n: grids.of_table(n, spacing="linspace"),
    "linspace, data": lambda n: grids.of_table(n, spacing="linspace", denoise=True),
    "log-snr": lambda n: grids.uniform_log_snr(VPLinear(), n, start=-8.0, end=8.0),
    "log-snr-tokens": lambda n: grids.uniform_log_snr(Linear(), n, start=-8.0, end=8.0),
}


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("steps", [1, 2, 10, 257])
def test_decreasing_from_noise_to_data(name, steps):
    times = np.asarray(GRIDS[name](steps))
    assert times.shape == (steps + 1,)
    # VPCosine has noise left at t = 0, above the default sigma_min: EDM's last noise levels fall on it.
    assert (np.diff(times) <= 0).all() if name == "karras-vp" else (np.diff(times) < 0).all()
    assert 0 <= times[-1] < times[0] <= 1
    if "log-snr" not in name:
        assert times[-1] == 0
    noisiest = ("uniform", "cosine", "karras", "log-linear", "loss-aware", "quadratic", "beta", "shifted")
    if name in (*noisiest, "trailing", "linspace"):
        assert times[0] == 1


def test_karras_is_equation_5(x64):
    n, rho = 18, 7
    i = np.arange(n)
    expected = (80 ** (1 / rho) + i / (n - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
    np.testing.assert_allclose(80 * grids.karras(EDM(), n), [*expected, 0], rtol=1e-9)
    flow = grids.karras(CondOT(), n)  # the same noise levels under another schedule
    np.testing.assert_allclose((flow / (1 - flow))[:-1], expected, rtol=1e-9)
    np.testing.assert_allclose(80 * grids.karras(EDM(), 1), [80, 0], rtol=1e-9)


def test_equal_steps(x64):
    np.testing.assert_allclose(grids.uniform(4, start=0.9, end=0.1), [0.9, 0.7, 0.5, 0.3, 0.1])
    np.testing.assert_allclose(grids.cosine(3), [np.cos(np.pi / 2 * i / 3) for i in range(4)], atol=1e-12)
    for schedule in (VPLinear(), Cosine()):
        times = grids.uniform_log_snr(schedule, 10, start=-5.0, end=6.0)
        np.testing.assert_allclose(jax.vmap(schedule.log_snr)(times), np.linspace(-5, 6, 11), atol=1e-6)


def test_log_linear_reveals_the_same_share_in_each_step(x64):
    times = np.asarray(grids.log_linear(7, end=1e-3))
    np.testing.assert_allclose(times[1:-1] / times[:-2], 1e-3 ** (1 / 6), rtol=1e-9)
    np.testing.assert_allclose(grids.log_linear(2, end=0.1), [1.0, 0.1, 0.0])


@pytest.mark.parametrize(
    ("times", "losses"),
    [
        ([0.0, 1.0], [1.0, 1.0]),
        ([0.1, 0.5, 0.7], [4.0, 0.0, 1.0]),
        ([0.3], [2.0]),
        ([0.0, 0.4, 0.6, 1.0], [1, 0, 0, 3]),
    ],
)
def test_loss_aware_steps_have_equal_losses(x64, times, losses):
    """By quadrature of the profile that the docstring says."""
    grid = np.asarray(grids.loss_aware(9, times, losses))
    fine = np.linspace(0.0, 1.0, 2_000_001)
    density = np.interp(fine, times, losses)
    total = np.concatenate([[0.0], np.cumsum(0.5 * (density[1:] + density[:-1])) * (fine[1] - fine[0])])
    np.testing.assert_allclose(-np.diff(np.interp(grid, fine, total)), total[-1] / 9, rtol=1e-4)
    if len(set(losses)) == 1:
        np.testing.assert_allclose(grid, grids.uniform(9), atol=1e-12)


def test_bad_profiles_and_ends():
    for times, losses in (
        ([0.5, 0.2], [1, 1]),
        ([0.5], [1, 2]),
        ([-0.1], [1]),
        ([0.5], [0.0]),
        ([0.5], [-1.0]),
        ([], []),
    ):
        with pytest.raises(ValueError, match=r"times must increase|losses must be finite"):
            grids.loss_aware(3, times, losses)
    for end in (0.0, 1.0):
        with pytest.raises(ValueError, match="between 0 and 1"):
            grids.log_linear(3, end=end)


def test_other_noise_levels(x64):
    levels = 80 * grids.exponential(EDM(), 5, sigma_min=0.5, sigma_max=8.0)
    np.testing.assert_allclose(levels, [8, 4, 2, 1, 0.5, 0], rtol=1e-9)
    np.testing.assert_allclose(grids.quadratic(4, end=0.25), [1, 0.875**2, 0.75**2, 0.625**2, 0.25], rtol=1e-9)
    np.testing.assert_allclose(80 * grids.through(EDM(), 11, sigmas=STABLE), STABLE, rtol=1e-9)
    np.testing.assert_allclose(80 * grids.through(EDM(), 3, sigmas=[16.0, 4.0, 1.0, 0.25]), [16, 4, 1, 0.25], rtol=1e-9)
    np.testing.assert_allclose(80 * grids.through(EDM(), 4, sigmas=[16.0, 1.0]), [16, 8, 4, 2, 1], rtol=1e-9)
    np.testing.assert_allclose(80 * grids.through(EDM(), 3, sigmas=[16.0, 1.0, 0.0]), [16, 4, 1, 0], rtol=1e-9)
    flow = grids.uniform_shifted(4, shift=3.0)
    np.testing.assert_allclose((flow / (1 - flow))[1:], 3 * np.array([3, 1, 1 / 3, 0]), rtol=1e-9)
    np.testing.assert_array_equal(grids.shifted(grids.uniform(4), 1.0), grids.uniform(4))


def test_beta_quantiles(x64):
    """Of Beta(1/2, 1/2), the arcsine law: sin^2(pi q / 2); of Beta(2, 1): sqrt(q)."""
    q = np.linspace(1, 0, 9)
    np.testing.assert_allclose(grids.beta(8, a=0.5, b=0.5), np.sin(np.pi * q / 2) ** 2, atol=1e-12)
    np.testing.assert_allclose(grids.beta(8, a=2.0, b=1.0, start=0.9, end=0.1), 0.1 + 0.8 * np.sqrt(q), atol=1e-12)


def test_entries_of_a_table(x64):
    """As Lin et al. (2024, table 2) give them for 1000 entries and few steps."""
    for steps, spacing, picked in [
        (5, "trailing", [999, 799, 599, 399, 199, 0]),
        (4, "leading", [800, 600, 400, 200, 0]),
        (2, "linspace", [999, 500, 0]),
    ]:
        np.testing.assert_allclose(grids.of_table(steps, spacing=spacing) * 999, picked, atol=1e-9)
    np.testing.assert_allclose(grids.of_table(1, entries=10, spacing="leading", offset=1) * 9, [6, 0], atol=1e-9)


def test_entries_of_a_table_and_the_data(x64):
    """The last entry is asked too: entry 0 just above t = 0. Their one-step schedulers'."""
    for steps, spacing, offset, picked in [
        (5, "leading", 0, [800, 600, 400, 200, 0]),
        (5, "leading", 1, [801, 601, 401, 201, 1]),
        (1, "leading", 0, [0]),
        (4, "linspace", 0, [999, 666, 333, 0]),
        (5, "trailing", 0, [999, 799, 599, 399, 199]),
    ]:
        times = grids.of_table(steps, spacing=spacing, offset=offset, denoise=True)
        np.testing.assert_allclose(times * 999, [*picked, 0], atol=1e-9)
        assert times[-2] == max(picked[-1] / 999, ToData.least)
        assert times[-1] == 0
    whole = grids.of_table(1000, denoise=True)  # every entry
    np.testing.assert_allclose(whole * 999, [*range(999, -1, -1), 0], atol=1e-9)


def test_bad_grids():
    for call, message in [
        (lambda: grids.of_table(4, spacing="even"), "spacing must be"),
        (lambda: grids.of_table(20, entries=10), "be used once"),
        (lambda: grids.of_table(1, spacing="leading", offset=600), "be used once"),
        (lambda: grids.beta(4, a=0.0), "positive a and b"),
        (lambda: grids.through(EDM(), 4, sigmas=[1.0, 2.0]), "at least two noise levels"),
        (lambda: grids.through(EDM(), 4, sigmas=[1.0]), "at least two noise levels"),
        (lambda: grids.through(Cosine(), 4, sigmas=[2.0, 1.0]), "grid of noise levels"),
        (lambda: grids.exponential(Cosine(), 4), "grid of noise levels"),
        (lambda: grids.shifted(grids.uniform(4), 0.0), "shift must be positive"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("name", GRIDS)
def test_errors(name):
    with pytest.raises(ValueError, match="at least one step"):
        GRIDS[name](0)


def test_grids_are_arrays():
    assert isinstance(grids.uniform(3), jnp.ndarray)
