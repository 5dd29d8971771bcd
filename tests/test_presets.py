"""Presets stand for what they say: diffusers' entries, k-diffusion's and EDM's published formulas, written again."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddjax
from ddjax import presets, solvers
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian
from ddjax.schedules import EDM, CondOT, Table, ToData

LEADING = "ddpm ddim"
LINSPACE = "euler heun kdpm2 kdpm2_ancestral lms euler_ancestral"
MULTISTEP = "dpm_solver_multistep unipc sde_dpm_solver_multistep"
# The entries of 1000 at which networks are asked in five steps; where the last step ends, the data or entry 0.
# Leading: i 1000 // 5, linspace: i 999 / 4, both from 0; multistep: i 999 / 5, rounded, but for 0.
ENTRIES = {
    LEADING: ([800, 600, 400, 200, 0], "data"),
    LINSPACE: ([999, 749.25, 499.5, 249.75, 0], "data"),
    MULTISTEP: ([999, 799, 599, 400, 200], "data"),
    "deis": ([999, 799, 599, 400, 200], "entry 0"),
    "pndm plms": ([800, 600, 400, 200], "entry 0"),  # theirs stay at 0 in the fifth
}


@pytest.mark.parametrize("names", ENTRIES)
def test_entries_of_diffusers(x64, names):
    asked, end = ENTRIES[names]
    process = Gaussian(Table.ddpm_linear())
    made = [presets.diffusers(name) for name in names.split()]
    found = [(np.asarray(one.times(process, 5)), one.solver(process, 5).process.schedule) for one in made]
    times, schedule = found[0]
    for other, its in found[1:]:
        np.testing.assert_array_equal(other, times)
        assert its == schedule
    # Between two entries sigma / alpha lies on a straight line, so that the time is not quite the entry's.
    np.testing.assert_allclose(999 * times, [*asked, 0], atol=2e-3 if names == LINSPACE else 1e-9)
    levels = np.interp(asked, np.arange(1000), np.exp(-0.5 * np.asarray(process.schedule.log_snrs)))
    np.testing.assert_allclose(np.exp(-0.5 * schedule.log_snr(times[:-1])), levels, rtol=1e-9)
    assert float(schedule.sigma(jnp.zeros(()))) == (0 if end == "data" else pytest.approx(0.01))


def test_flows_of_diffusers_go_by_a_thousandth(x64):
    for name in ("flow_match_euler", "flow_match_heun"):
        times = presets.diffusers(name).times(Gaussian(CondOT()), 4)
        np.testing.assert_allclose(times, [1, 0.667, 0.334, 0.001, 0])
        np.testing.assert_allclose(presets.diffusers(name).times(Gaussian(CondOT()), 1), [1, 0])


@pytest.mark.slow
@pytest.mark.parametrize("name", presets.DIFFUSERS)
def test_diffusers_sample_at_as_many_calls_as_theirs(name):
    """In float32, six of their steps: one call each, or two but in the last; PNDM's less the one that does nothing."""
    process = Gaussian(
        CondOT() if name.startswith("flow") else EDM() if name.startswith("edm") else Table.ddpm_linear()
    )
    preset = presets.diffusers(name)
    denoise = lambda xt, t, cond: Prediction(0.5 * jnp.tanh(xt), "x0")
    settings = {"solver": preset.solver(process, 6), "times": preset.times(process, 6)}
    out = ddjax.sample(jax.random.key(0), denoise, process, shape=(1, 3), **settings)
    assert np.isfinite(out.x0).all()
    twice = dict.fromkeys(("heun", "kdpm2", "kdpm2_ancestral", "flow_match_heun"), 11)
    assert out.nfe == {"pndm": 3 * 4 + 2, "plms": 2 + 4, **twice}.get(name, 6)


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A smooth x0 of x / alpha and sigma / alpha."""

    schedule: object

    def value(self, x, sigma, module=np):
        return module.tanh(x / module.sqrt(1 + sigma**2)) + 0.3 * module.cos(sigma) * module.cos(x)

    def __call__(self, xt, t, cond=None):
        alpha, level = self.schedule.alpha(t), jnp.exp(-0.5 * self.schedule.log_snr(t))
        return Prediction(self.value(xt / alpha[:, None], level[:, None], jnp), "x0")


def down_up(s, to):
    """k-diffusion's `get_ancestral_step` at eta = 1."""
    up = np.sqrt(to**2 * (s**2 - to**2) / s**2)
    return np.sqrt(to**2 - up**2), up


def two_stages(f, x, s, to, kind):
    """Heun, DPM-Solver-2 or DPM-Solver++ 2S from one noise level to another; Euler to 0."""
    d, middle = (x - f(x, s)) / s, np.sqrt(s * to)
    if to == 0:
        return x - s * d
    if kind == "heun":
        y = x + (to - s) * d
        return x + (to - s) * 0.5 * (d + (y - f(y, to)) / to)
    y = x + (middle - s) * d
    d2 = (y - f(y, middle)) / middle
    return x + (to - s) * d2 if kind == "dpm_2" else to / s * x + (1 - to / s) * f(y, middle)


def lms(x, sigmas, slopes, i):
    """The polynomial in sigma through the last four slopes, integrated."""
    nodes = sigmas[max(0, i - 3) : i + 1]
    for j, node in enumerate(nodes):
        rest = np.delete(nodes, j)
        basis = np.polynomial.Polynomial(np.polynomial.polynomial.polyfromroots(rest) / np.prod(node - rest))
        area = basis.integ()
        x = x + (area(sigmas[i + 1]) - area(sigmas[i])) * slopes[max(0, i - 3) + j]
    return x


def several(name, x, values, lam, i):
    """DPM-Solver++ 2M and its SDE variants with the normals left out, to a noise level above 0."""
    steps = np.diff(lam)
    h = steps[i]
    total = h if name == "dpmpp_2m" else 2.0 * h  # eta = 1
    x = np.exp(-total) * x - np.expm1(-total) * values[i]
    if i == 0:
        return x
    r0 = steps[i - 1] / h
    first = (values[i] - values[i - 1]) / r0
    if name != "dpmpp_3m_sde":
        return x - 0.5 * np.expm1(-total) * first
    phi_2 = np.expm1(-total) / total + 1
    phi_3 = phi_2 / total - 0.5
    if i == 1:
        return x + phi_2 * first
    r1 = steps[i - 2] / h
    second = (first - (values[i - 1] - values[i - 2]) / r1) / (r0 + r1)
    return x + phi_2 * (first + second * r0) - 2.0 * phi_3 * second  # k-diffusion has no 2


def published(name, f, x, sigmas, z):
    """The sampler of this name in x / alpha."""
    slopes, values = [], []
    lam = -np.log(sigmas[:-1])
    for i, (s, to) in enumerate(itertools.pairwise(sigmas)):
        down, up = down_up(s, to) if name.endswith("ancestral") else (to, 0.0)
        if name in ("heun", "dpm_2", "dpm_2_ancestral", "dpmpp_2s", "dpmpp_2s_ancestral"):
            x = two_stages(f, x, s, down, name.removesuffix("_ancestral")) + up * z[i]
            continue
        values.append(f(x, s))
        slopes.append((x - values[-1]) / s)
        if name == "lms":
            x = lms(x, sigmas, slopes, i)
        elif name.startswith("euler"):
            x = x + (down - s) * slopes[-1] + up * z[i]
        elif to == 0:
            x = values[-1]
        else:
            noise = to * np.sqrt(-np.expm1(-2 * (lam[i + 1] - lam[i]))) * z[i]
            x = several(name, x, values, lam, i) + (noise if name.endswith("sde") else 0.0)
    return x


@pytest.mark.slow
@pytest.mark.parametrize("name", [*presets.K_DIFFUSION, "edm"])
def test_published_samplers(x64, name):
    """On `get_sigmas_karras`, rho = 7, into the data, also of a table, which has noise at t = 0."""
    steps, ends = 7, (80.0, 0.002) if name == "edm" else (14.6, 0.03)
    process = Gaussian(EDM() if name == "edm" else Table.ddpm_linear())
    preset = presets.edm() if name == "edm" else presets.k_diffusion(name)
    ramp = np.linspace(ends[0] ** (1 / 7), ends[1] ** (1 / 7), steps) ** 7
    x, *z = np.random.default_rng(0).normal(size=(steps + 1, 2, 5))
    solver = preset.solver(process, steps)
    if any(field.name == "noise" for field in dataclasses.fields(solver)):
        solver = dataclasses.replace(solver, noise=solvers.Given(np.stack(z)))
    denoise, times = Denoiser(solver.process.schedule), preset.times(process, steps)
    alpha = process.schedule.alpha(times[0])
    out = ddjax.sample(jax.random.key(0), denoise, process, shape=x.shape, solver=solver, times=times,
                       init=jnp.asarray(alpha * ends[0] * x))  # fmt: skip
    kind = "heun" if name == "edm" else name
    np.testing.assert_allclose(
        out.x0, published(kind, denoise.value, ends[0] * x, np.append(ramp, 0.0), z), rtol=0, atol=1e-9
    )


def test_they_are_the_peers_choices():
    process = Gaussian(EDM())
    assert presets.edm().solver(process, 18) == solvers.heun_in_noise(process)
    np.testing.assert_allclose(80 * presets.edm().times(process, 18)[jnp.array([0, -2, -1])], [80, 0.002, 0], rtol=1e-5)
    for name in ("dpm_solver_multistep", "deis", "sde_dpm_solver_multistep", "edm_dpm_solver_multistep"):
        short, long = (presets.diffusers(name).solver(process, n) for n in (14, 15))
        assert (short.lower_order_final, long.lower_order_final) == (14, None)
    assert presets.diffusers("unipc").solver(process, 30).lower_order_final == 30
    into_data = Gaussian(ToData(EDM()))
    assert presets.k_diffusion("dpmpp_2m").solver(process, 5) == solvers.dpm_solver_pp(into_data)
    with pytest.raises(ValueError, match=r"knows ddpm.*got 'dpm\+\+'"):
        presets.diffusers("dpm++")
    with pytest.raises(ValueError, match="one step less than the 1 asked for"):
        presets.diffusers("pndm").times(process, 1)
