"""Grids end where they say, decrease, and are the ones in print."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax import grids
from ddjax.schedules import EDM, CondOT, Cosine, Linear, VPCosine, VPLinear

GRIDS = {
    "uniform": grids.uniform,
    "cosine": grids.cosine,
    "karras": lambda n: grids.karras(EDM(), n),
    "karras-vp": lambda n: grids.karras(VPCosine(), n),
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
    if name in ("uniform", "cosine", "karras"):
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


@pytest.mark.parametrize("name", GRIDS)
def test_errors(name):
    with pytest.raises(ValueError, match="at least one step"):
        GRIDS[name](0)


def test_grids_are_arrays():
    assert isinstance(grids.uniform(3), jnp.ndarray)
