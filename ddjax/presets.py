"""The choices of other libraries, as a solver and a grid: what their samplers of the same name do.

    preset = ddjax.presets.diffusers("unipc")
    ddjax.sample(key, denoise, process, solver=preset.solver(process, 20), times=preset.times(process, 20), ...)

Each is two of the independent choices of `ddjax.sample`; thresholding and guidance are others. Presets whose peer steps
to sigma = 0 end in the data also where the process has noise at t = 0 (`schedules.ToData`). What the peers do that is
not here is in docs/departures.md.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ddjax import grids, solvers
from ddjax.grids import Grid
from ddjax.processes.gaussian import gaussian_of, schedule_of
from ddjax.schedules import ToData
from ddjax.solvers import Solver


@dataclasses.dataclass(frozen=True)
class Preset:
    """A solver and a grid, of a process and a number of steps."""

    make: Callable[[Any, int], Solver]
    grid: Callable[[Any, int], Grid]

    def solver(self, process: Any, steps: int) -> Solver:
        """The solver. steps: those of the grid, which some of them must know to lower the order of the last ones."""
        return self.make(process, steps)

    def times(self, process: Any, steps: int) -> Grid:
        """The grid."""
        return self.grid(process, steps)


Make = Callable[[Any, int], Solver]


def _any_steps(make: Callable[..., Solver], **options: Any) -> Make:
    return lambda process, steps: make(process, **options)


def _short_ends(make: Callable[..., Solver], below: float = float("inf"), **options: Any) -> Make:
    """With the last orders lowered, on grids of fewer steps than `below`."""
    return lambda process, steps: make(process, lower_order_final=steps if steps < below else None, **options)


def _into_data(make: Make) -> Make:
    """For the process with the data at t = 0."""

    def with_data(process, steps):
        gaussian = gaussian_of(process)
        if gaussian is not None:  # others are refused by the solver
            process = dataclasses.replace(gaussian, schedule=ToData(gaussian.schedule))
        return make(process, steps)

    return with_data


def _table(spacing: str, denoise: bool = False) -> Callable[[Any, int], Grid]:
    return lambda process, steps: grids.of_table(steps, spacing=spacing, denoise=denoise)


def _to_entry_0(process: Any, steps: int) -> Grid:
    """PNDM's: multiples of 1000 // steps, down to 0; its last step stays there, and is left out."""
    if steps < 2:
        raise ValueError(f"pndm and plms have one step less than the {steps} asked for: ask for two at least")
    return grids.of_table(steps - 1, spacing="leading")


def _between_entries(process: Any, steps: int) -> Grid:
    """Evenly from entry 999 to 0, then data; sigma / alpha is linear between the entries, as theirs."""
    entries = np.arange(1000)
    times = jnp.asarray(np.maximum(entries / 999, ToData.least))
    schedule = schedule_of(process)
    levels = np.exp(-0.5 * np.asarray(schedule.log_snr(times)))
    asked = np.interp(np.linspace(0, 999, steps)[::-1], entries, levels)
    return grids.through(ToData(schedule), steps, sigmas=[*asked, 0.0])


def _flow(process: Any, steps: int) -> Grid:
    """Evenly from sigma = 1 to 1 / 1000, then data, on the clock of `CondOT`; with one step {1, 0}."""
    return jnp.append(jnp.linspace(1.0, 1e-3, steps), 0.0)


def _karras(sigma_min: float, sigma_max: float) -> Callable[[Any, int], Grid]:
    return lambda process, steps: grids.karras(
        schedule_of(process), steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=7.0
    )


def _dpm_2_ancestral(process: Any) -> Solver:
    """k-diffusion's: DPM-Solver-2 to sigma_down."""
    return solvers.StepsDown(solvers.dpm_solver(process, 2))


DIFFUSERS = {
    "ddpm": (_into_data(_any_steps(solvers.Ancestral)), _table("leading", denoise=True)),
    "ddim": (_into_data(_any_steps(solvers.DDIM)), _table("leading", denoise=True)),
    "dpm_solver_multistep": (_into_data(_short_ends(solvers.dpm_solver_pp, 15)), _table("linspace")),
    "unipc": (_into_data(_short_ends(solvers.unipc)), _table("linspace")),
    "deis": (_short_ends(solvers.deis, 15, order=2, variant="logrhoab"), _table("linspace")),
    "pndm": (_any_steps(solvers.pndm), _to_entry_0),
    "plms": (_any_steps(solvers.plms), _to_entry_0),
    "euler": (_into_data(_any_steps(solvers.DDIM)), _between_entries),
    "heun": (_into_data(_any_steps(solvers.heun_in_noise)), _between_entries),
    "kdpm2": (_into_data(_any_steps(solvers.dpm_solver, order=2)), _between_entries),
    "kdpm2_ancestral": (_into_data(_any_steps(_dpm_2_ancestral)), _between_entries),
    "lms": (_into_data(_any_steps(solvers.lms)), _between_entries),
    "flow_match_euler": (_any_steps(solvers.euler), _flow),
    "flow_match_heun": (_any_steps(solvers.Heun), _flow),
    "edm_euler": (_any_steps(solvers.DDIM), _karras(0.002, 80.0)),
    "sde_dpm_solver_multistep": (_into_data(_short_ends(solvers.sde_dpm_solver_pp, 15)), _table("linspace")),
    "euler_ancestral": (_into_data(_any_steps(solvers.Ancestral)), _between_entries),
    "edm_dpm_solver_multistep": (_short_ends(solvers.dpm_solver_pp, 15), _karras(0.002, 80.0)),
}
K_DIFFUSION = {
    "euler": solvers.DDIM,
    "euler_ancestral": solvers.Ancestral,
    "heun": solvers.heun_in_noise,
    "dpm_2": functools.partial(solvers.dpm_solver, order=2),
    "dpm_2_ancestral": _dpm_2_ancestral,
    "lms": solvers.lms,
    "dpmpp_2s": functools.partial(solvers.dpm_solver_pp_singlestep, order=2),
    "dpmpp_2m": solvers.dpm_solver_pp,
    "dpmpp_2s_ancestral": solvers.dpm_solver_pp_2s_ancestral,
    "dpmpp_2m_sde": solvers.sde_dpm_solver_pp,
    "dpmpp_3m_sde": functools.partial(solvers.sde_dpm_solver_pp, order=3, slope="exact"),
}


def diffusers(name: str) -> Preset:
    """One of `DIFFUSERS`: a scheduler of diffusers 0.42.1 and its grid, with its defaults but for `clip_sample`.

    Entry i of 1000 is at t = i / 999 of the process, whose schedule says the betas (theirs have several defaults).
    steps: those of `set_timesteps`; of "pndm" and "plms" one more than the grid has, theirs changing nothing in the
    last. "flow_..." are for `CondOT`, "edm_..." for `EDM()`. "plms" is PNDM with `skip_prk_steps`, and
    "sde_dpm_solver_multistep" DPMSolverMultistep with `algorithm_type="sde-dpmsolver++"`. Noise levels and states agree
    with theirs on the same normals (tests/test_presets_parity.py).
    """
    return Preset(*_pick(DIFFUSERS, name, "diffusers"))


def k_diffusion(name: str, *, sigma_min: float = 0.03, sigma_max: float = 14.6) -> Preset:
    """One of `K_DIFFUSION`: a `sample_...` function with its defaults on `get_sigmas_karras`, into sigma = 0.

    "dpmpp_2s" is `sample_dpmpp_2s_ancestral` with eta = 0. "dpmpp_3m_sde" has the whole term of third order where
    theirs has half of it.
    """
    make = _into_data(_any_steps(_pick(K_DIFFUSION, name, "k_diffusion")))
    return Preset(make, _karras(sigma_min, sigma_max))


def edm(*, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Preset:
    """EDM's deterministic sampler (Karras et al. 2022, algorithm 1): Heun in sigma, rho = 7; 18 steps are 35 calls."""
    return Preset(_any_steps(solvers.heun_in_noise), _karras(sigma_min, sigma_max))


def _pick(table: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in table:
        raise ValueError(f"presets.{where} knows {', '.join(table)}; got {name!r}")
    return table[name]
