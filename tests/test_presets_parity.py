"""Presets against diffusers' schedulers with their defaults: noise levels, and whole loops (the `parity` extra).

Theirs are given the products of their alphas in float64. Their noise levels are then in float32, and so are the states
of some.
"""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="install ddjax[parity] to compare with diffusers")
diffusers = pytest.importorskip("diffusers", reason="install ddjax[parity] to compare with diffusers")

import ddjax  # noqa: E402
from ddjax import presets, solvers, thresholding  # noqa: E402
from ddjax.predictions import Prediction  # noqa: E402
from ddjax.processes import Gaussian  # noqa: E402
from ddjax.schedules import EDM, CondOT, Table  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")]
logging.getLogger("diffusers").setLevel(logging.ERROR)

TABLE = Table.ddpm_linear()
ENTRIES = np.exp(-0.5 * np.asarray(TABLE.log_snrs, np.float64))  # sigma / alpha
SHAPE = (2, 3, 4)
# Their class and its options; all else is what they choose, but for the betas, which are the process's.
THEIRS = {
    "ddpm": ("DDPM", {"clip_sample": False}),
    "ddim": ("DDIM", {"clip_sample": False}),
    "dpm_solver_multistep": ("DPMSolverMultistep", {}),
    "unipc": ("UniPCMultistep", {}),
    "deis": ("DEISMultistep", {}),
    "pndm": ("PNDM", {}),
    "plms": ("PNDM", {"skip_prk_steps": True}),
    "euler": ("EulerDiscrete", {}),
    "heun": ("HeunDiscrete", {}),
    "kdpm2": ("KDPM2Discrete", {}),
    "kdpm2_ancestral": ("KDPM2AncestralDiscrete", {}),
    "lms": ("LMSDiscrete", {}),
    "flow_match_euler": ("FlowMatchEulerDiscrete", {}),
    "flow_match_heun": ("FlowMatchHeunDiscrete", {}),
    "edm_euler": ("EDMEuler", {}),
    "sde_dpm_solver_multistep": ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}),
    "euler_ancestral": ("EulerAncestralDiscrete", {}),
    "edm_dpm_solver_multistep": ("EDMDPMSolverMultistep", {}),
}
TWO_STAGES = ("heun", "kdpm2", "kdpm2_ancestral", "flow_match_heun")
BY_ENTRY = ("ddpm", "ddim", "pndm", "plms")  # schedulers without noise levels


def scheduler_of(name, steps, **options):
    make, own = THEIRS[name]
    betas = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
    betas = {} if name.startswith(("flow", "edm")) else betas
    scheduler = getattr(diffusers, f"{make}Scheduler")(**betas, **{**own, **options})
    if betas:
        scheduler.alphas_cumprod = torch.from_numpy(1 / (1 + ENTRIES**2))
    if name in ("pndm", "plms"):
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(steps)
    return scheduler


def in_float64(scheduler, steps):
    """KDPM2 ancestral with tables of more digits: in float32 the difference that is sigma_down^2 has none left."""
    sigmas = np.append(np.interp(np.linspace(0, 999, steps)[::-1], np.arange(1000), ENTRIES), 0.0)
    before, after = torch.from_numpy(sigmas[:-1]), torch.from_numpy(sigmas[1:])
    down = after**2 / before
    lay = lambda v: torch.cat([v[:1], v[1:].repeat_interleave(2), v[-1:]])
    tables = {"sigmas": lay(torch.from_numpy(sigmas)), "sigmas_down": lay(down)}
    tables |= {"sigmas_up": lay(torch.sqrt(after**2 - down**2)), "sigmas_interpol": lay(torch.sqrt(before * down))}
    for name, table in tables.items():
        np.testing.assert_allclose(getattr(scheduler, name)[: 2 * steps - 1], table[: 2 * steps - 1], rtol=1e-2)
        setattr(scheduler, name, table)


def process_of(name):
    """Of noise levels: sigma for flows, sigma / alpha for others."""
    if name.startswith("flow"):
        return Gaussian(CondOT())
    return Gaussian(EDM(), data_std=0.5) if name.startswith("edm") else Gaussian(TABLE)


def levels(name, scheduler):
    """The noise levels between which their steps go."""
    if name in ("pndm", "plms"):  # from the last entry they step to entry 0, where they are
        return ENTRIES[np.asarray(scheduler._timesteps[::-1], int)]
    if name in BY_ENTRY:
        return np.append(ENTRIES[scheduler.timesteps.numpy()], 0.0)
    sigmas = scheduler.sigmas.numpy().astype(float)
    if name in TWO_STAGES:
        return sigmas[::2] if name.startswith("kdpm2") else np.append(sigmas[::2], sigmas[-1])
    return sigmas


@pytest.mark.parametrize("name", presets.DIFFUSERS)
def test_noise_levels(x64, name):
    """Those at which our solver, whose process may end in the data, finds the grid."""
    process, preset = process_of(name), presets.diffusers(name)
    for steps in (1, 2, 5, 10, 20, 50):
        if name in ("pndm", "plms") and steps < (4 if name == "pndm" else 2):
            if name == "pndm":
                with pytest.raises(ValueError, match="shape"):
                    scheduler_of(name, steps)
            continue
        scheduler, times = scheduler_of(name, steps), preset.times(process, steps)
        schedule = preset.solver(process, steps).process.schedule
        found = schedule.sigma(times) if name.startswith("flow") else schedule.sigma(times) / schedule.alpha(times)
        np.testing.assert_allclose(found, levels(name, scheduler), rtol=2e-6, atol=1e-12)
        if not name.startswith(("flow", "edm")):  # what the network is told: theirs is linear in another coordinate
            told = scheduler.timesteps.numpy()
            told = told[::2] if name in TWO_STAGES else told
            if name not in ("pndm", "plms"):
                np.testing.assert_allclose(999 * times[:-1], told, atol=0.01)


@dataclasses.dataclass(frozen=True)
class Network:
    """Smooth, of states as networks see them and noise levels; noise of an x0 of order 1, a velocity, or EDM's F."""

    kind: str
    schedule: object

    def value(self, x, level, module=np):
        made = module.tanh(x) + 0.3 * module.cos(level) * module.cos(2.0 * x)
        if self.kind != "noise":
            return made
        return (x * module.sqrt(1 + level**2) - made) / level

    def __call__(self, xt, t, cond=None):
        level = self.schedule.sigma(t) if self.kind == "velocity" else jnp.exp(-0.5 * self.schedule.log_snr(t))
        level = level[:, None, None]
        x = xt / jnp.sqrt(0.25 + level**2) if self.kind == "edm" else xt
        return Prediction(self.value(x, level, jnp), self.kind)


def asked_at(name, scheduler, i, t):
    """The noise level of their i-th evaluation."""
    if name in BY_ENTRY:
        return ENTRIES[int(t)]
    if name == "kdpm2" and i % 2:
        return float(scheduler.sigmas_interpol[i])
    if name == "kdpm2_ancestral" and i % 2:
        return float(scheduler.sigmas_interpol[i - 1])
    return float(scheduler.sigmas[i])


def theirs(name, scheduler, network, z):
    """Their loop as their pipelines have it, from normals z, and the normals that its steps draw."""
    generator = torch.Generator().manual_seed(3)
    given = [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(len(scheduler.timesteps) + 1)]
    generator = torch.Generator().manual_seed(3)
    first = levels(name, scheduler)[0]
    sigma_scale = name in ("euler", "euler_ancestral", "lms", *TWO_STAGES[:3])  # x / alpha
    x = torch.from_numpy(z * (np.sqrt(1 + first**2) if sigma_scale else first if name.startswith("edm") else 1.0))
    for i, t in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = torch.from_numpy(network.value(seen.numpy().astype(float), asked_at(name, scheduler, i, t)))
        if name == "sde_dpm_solver_multistep":
            draws = {"variance_noise": given[i]}
        else:
            draws = {"generator": generator} if name in ("ddpm", "euler_ancestral", "kdpm2_ancestral") else {}
        x = scheduler.step(output, t, x, **draws).prev_sample
    return x.numpy(), torch.stack(given).numpy()


def compared(name, steps, clip=False):
    """Our sample and theirs, and the scale of theirs."""
    process, preset = process_of(name), presets.diffusers(name)
    scheduler = scheduler_of(name, steps, **({"clip_sample": True} if clip else {}))
    kind = "velocity" if name.startswith("flow") else "edm" if name.startswith("edm") else "noise"
    network, solver = Network(kind, process.schedule), preset.solver(process, steps)
    if name == "kdpm2_ancestral":
        in_float64(scheduler, steps)
    z = np.random.default_rng(2).normal(size=SHAPE)
    made, given = theirs(name, scheduler, network, z)
    if any(field.name == "noise" for field in dataclasses.fields(solver)):
        solver = dataclasses.replace(solver, noise=solvers.Given(given))
    # The solver's process, so that noise levels below the table's are the network's as well.
    network = dataclasses.replace(network, schedule=solver.process.schedule)
    denoise = thresholding.static(network, solver.process) if clip else network
    out = ddjax.sample(
        jax.random.key(0), denoise, process, shape=SHAPE, solver=solver, times=preset.times(process, steps),
        init=jnp.asarray(80.0 * z if name.startswith("edm") else z),
    )  # fmt: skip
    return np.asarray(out.x0), made


@pytest.mark.parametrize("steps", [5, 20])
@pytest.mark.parametrize("name", presets.DIFFUSERS)
def test_whole_loops(x64, name, steps):
    found, made = compared(name, steps)
    gap = np.abs(found - made).max() / np.abs(made).max()
    print(name, steps, gap, np.abs(made).max())
    assert gap < 1e-5


def test_clipped_samples_of_ddpm(x64):
    """Their `clip_sample`, on by default, is `thresholding.static`."""
    found, made = compared("ddpm", 20, clip=True)
    assert np.abs(made).max() <= 1.0
    np.testing.assert_allclose(found, made, rtol=0, atol=1e-9)
