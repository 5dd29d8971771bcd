"""diffusers' scheduler_config.json: the process that a network was trained under, and how its authors sample it.

Settings have the file's own names, so that a caller says what no file says, or says it otherwise, in the same words:
`load(path, prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2")`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from ddjax import grids, solvers, thresholding
from ddjax.processes import Gaussian, LearnedVariance
from ddjax.schedules import CondOT, Table

# By class: what it draws as. Those that solve the ODE in another way have its first-order solver here.
ANCESTRAL = (
    *("DDPMScheduler", "DDPMParallelScheduler", "EulerAncestralDiscreteScheduler"),
    *("KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler"),
)
ODE = (
    *("DDIMScheduler", "DDIMParallelScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler"),
    *("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "DPMSolverMultistepScheduler"),
    *("DPMSolverSinglestepScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler"),
)
FLOW = ("FlowMatchEulerDiscreteScheduler",)
OWN_DEFAULTS = ("DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler")

KINDS = {"epsilon": "noise", "sample": "x0", "v_prediction": "v", "flow_prediction": "velocity"}
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
SPACINGS = ("leading", "trailing", "linspace")
UNSAID = {"fixed_small": -1.0, "fixed_small_log": -1.0, "fixed_large": 1.0, "learned_range": -1.0}  # v
LEAST = 1e-10  # what the last step of a chain that is meant to end in noise alone keeps: its log-SNR must be finite

CHAIN = {
    "scheduler": None, "prediction_type": "epsilon", "num_train_timesteps": 1000, "beta_schedule": "linear",
    "beta_start": 1e-4, "beta_end": 0.02, "trained_betas": None, "rescale_betas_zero_snr": False,
    "timestep_spacing": "linspace", "steps_offset": 0, "variance_type": "fixed_small", "clip_sample": False,
    "clip_sample_range": 1.0, "thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0,
}  # fmt: skip
STRAIGHT = {"scheduler": None, "prediction_type": "flow_prediction", "num_train_timesteps": 1000, "shift": 1.0}
# What a file may say otherwise only at the price of another process, or of a sampler that is not here.
FIXED = {
    "timestep_type": ("discrete",), "use_flow_sigmas": (False,), "use_dynamic_shifting": (False,),
    "invert_sigmas": (False,), "shift_terminal": (None, 0), "stochastic_sampling": (False,),
}  # fmt: skip
FIXED_FLOW = dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), (False,))


def settings(config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What the file says, or the caller: all that `model` needs.

    config: with the file's contents as "scheduler" (`tensors.open_tensors`). Without, DDPM's: noise, predicted on 1000
        linear betas.
    Raises ValueError for classes, schedules, kinds of prediction and options that are not known, each by its name.
    """
    found = dict(config.get("scheduler", {}))
    known = {"scheduler": found.get("_class_name")} if found else {}
    known |= {n: v for n, v in found.items() if n in CHAIN or n in STRAIGHT} | given
    name = known.get("scheduler")
    if name not in (None, *ANCESTRAL, *ODE, *FLOW):
        raise ValueError(f"scheduler {name!r} is not known: expected one of {', '.join((*ANCESTRAL, *ODE, *FLOW))}")
    straight = name in FLOW or known.get("prediction_type") == "flow_prediction"
    for option, values in (FIXED | (FIXED_FLOW if straight else {})).items():
        if option in found and found[option] not in values:
            raise ValueError(f"scheduler_config.json: {option}={found[option]!r} is not known: expected {values[0]!r}")
    if straight:
        result = STRAIGHT | {n: v for n, v in known.items() if n in STRAIGHT}
        _one_of(result, "prediction_type", ("flow_prediction",))
        if name in (*ANCESTRAL, *ODE):
            raise ValueError(f"prediction_type='flow_prediction' is of {FLOW[0]}, not of {name}")
        return result | {"shift": float(result["shift"])}
    if name in OWN_DEFAULTS:  # what these leave out
        known = {"timestep_spacing": "leading", "clip_sample": True} | known
    result = CHAIN | {n: v for n, v in known.items() if n in CHAIN}
    _one_of(result, "prediction_type", tuple(KINDS)[:3])
    _one_of(result, "timestep_spacing", SPACINGS)
    _one_of(result, "variance_type", tuple(UNSAID))
    if result["trained_betas"] is None:
        _one_of(result, "beta_schedule", SCHEDULES)
        needed = () if result["beta_schedule"] == "squaredcos_cap_v2" else ("beta_start", "beta_end")
        if found and (unsaid := [n for n in ("beta_schedule", *needed) if n not in known]):
            raise ValueError(f"scheduler_config.json does not say {', '.join(unsaid)}, nor trained_betas")
    elif len(result["trained_betas"]) != result["num_train_timesteps"]:
        raise ValueError(
            f"{len(result['trained_betas'])} trained_betas for num_train_timesteps={result['num_train_timesteps']}"
        )
    if result["rescale_betas_zero_snr"] and result["prediction_type"] == "epsilon":
        raise ValueError(
            "rescale_betas_zero_snr with prediction_type='epsilon': where nothing is left of the data, the noise does "
            "not say them; expected 'sample' or 'v_prediction'"
        )
    return result


def model(s: Mapping[str, Any], learned: bool = False) -> dict[str, Any]:
    """Fields of `published.Model`: the process, the kind of prediction, the sampler, and what the report tells of them.

    s: has `settings`; what is missing is DDPM's. learned: whether the network gives variances beside its prediction.
    Raises ValueError for variances that the network does not give.
    """
    if s.get("prediction_type") == "flow_prediction":
        s = STRAIGHT | s
        steps, what = s["num_train_timesteps"], f"velocity (flow_prediction) on straight paths, shift {s['shift']:g}"
        return {
            "process": LearnedVariance(CondOT()) if learned else Gaussian(CondOT()),
            "kind": "velocity",
            "steps": 50,
            "solver": solvers.DDIM,  # Euler's method, on straight paths
            "grid": partial(flow_steps, chain=steps, shift=s["shift"]),
            "notes": (_told(s, what),),
        }
    s = CHAIN | s
    if s["variance_type"] == "learned_range" and not learned:
        raise ValueError("variance_type='learned_range': the network gives no variances beside its prediction")
    schedule, steps = Table.from_betas(betas(s)), s["num_train_timesteps"]
    unsaid = UNSAID[s["variance_type"]]
    process = LearnedVariance(schedule, unsaid=unsaid) if learned or unsaid != -1.0 else Gaussian(schedule)
    ode = s["scheduler"] in ODE
    kind = KINDS[s["prediction_type"]]
    what = f"{kind} ({s['prediction_type']}) on {steps} betas, {_betas_in_words(s)}"
    return {
        "process": process,
        "kind": kind,
        "steps": min(50 if ode else 250, steps),
        "solver": solvers.DDIM if ode else solvers.Ancestral,
        "grid": partial(spaced_steps, chain=steps, spacing=s["timestep_spacing"], offset=s["steps_offset"]),
        "within": _within(s),
        "notes": (_told(s, what),),
    }


def clock(s: Mapping[str, Any]) -> float:
    """What the network is told at t = 1: a chain's last number, or the number of its steps on a flow."""
    flow = s.get("prediction_type") == "flow_prediction"
    return float(s.get("num_train_timesteps", 1000) - (not flow))


def betas(s: Mapping[str, Any]) -> np.ndarray:
    """The variances of a chain, float64, as diffusers' schedulers have them by name.

    rescale_betas_zero_snr: alpha moved and scaled so that the first stays and the last is 0 (Lin et al. 2024, algorithm
    1); here the last beta is 1 - `LEAST`.
    """
    steps, low, high = s["num_train_timesteps"], s["beta_start"], s["beta_end"]
    if s["trained_betas"] is not None:
        values = np.asarray(s["trained_betas"], np.float64)
    elif s["beta_schedule"] == "linear":
        values = np.linspace(low, high, steps)
    elif s["beta_schedule"] == "scaled_linear":
        values = np.linspace(low**0.5, high**0.5, steps) ** 2
    elif s["beta_schedule"] == "sigmoid":
        values = low + (high - low) / (1.0 + np.exp(-np.linspace(-6.0, 6.0, steps)))
    else:
        kept = np.cos(0.5 * np.pi * (np.arange(steps + 1) / steps + 0.008) / 1.008) ** 2
        values = np.minimum(1.0 - kept[1:] / kept[:-1], 0.999)
    if s["rescale_betas_zero_snr"]:
        alpha = np.cumprod(1.0 - values) ** 0.5
        alpha -= alpha[-1]
        values = np.append(values[0], 1.0 - np.maximum((alpha[1:] / alpha[:-1]) ** 2, LEAST))
    return values


def spaced_steps(steps: int, *, chain: int, spacing: str, offset: int = 0) -> np.ndarray:
    """`steps` entries of a chain, as `grids.of_table` has them. What follows is the data: `Published.sample` ends so.

    Raises ValueError where there are not so many.
    """
    if not 2 <= steps <= chain:
        raise ValueError(f"steps={steps}: expected 2 to {chain}, the steps of the chain")
    numbers = grids.spaced_entries(steps, spacing=spacing, entries=chain, offset=offset)
    if numbers[0] > chain - 1:
        raise ValueError(f"steps={steps} of {chain} with steps_offset={offset} begin at {numbers[0]}: expected fewer")
    return (numbers / (chain - 1)).astype(np.float32)


def flow_steps(steps: int, *, chain: int, shift: float) -> np.ndarray:
    """`steps` times from noise to the chain's first, and then the data.

    Evenly between the ends of the chain's shifted times, and shifted once more, as diffusers does.
    """
    if not 2 <= steps <= chain:
        raise ValueError(f"steps={steps}: expected 2 to {chain}, the steps of the chain")
    first = float(grids.shifted(np.array([1.0, 1.0 / chain]), shift)[1])
    times = grids.shifted(np.linspace(1.0, first, steps), shift)
    return np.append(np.asarray(times, np.float32), np.float32(0.0))


def _within(s: Mapping[str, Any]) -> Callable[[Any, Any], Any]:
    if s["thresholding"]:
        return partial(
            thresholding.dynamic, quantile=s["dynamic_thresholding_ratio"], largest=max(1.0, s["sample_max_value"])
        )
    limit = s["clip_sample_range"] if s["clip_sample"] else np.inf
    return partial(thresholding.static, low=-limit, high=limit)


def _one_of(s: Mapping[str, Any], name: str, values: tuple[str, ...]) -> None:
    if s[name] not in values:
        raise ValueError(f"{name}={s[name]!r} is not known: expected one of {', '.join(map(repr, values))}")


def _betas_in_words(s: Mapping[str, Any]) -> str:
    if s["trained_betas"] is not None:
        words = "trained_betas"
    elif s["beta_schedule"] == "squaredcos_cap_v2":
        words = s["beta_schedule"]
    else:
        words = f"{s['beta_schedule']} from {s['beta_start']:g} to {s['beta_end']:g}"
    return words + (", rescaled to end in noise alone" if s["rescale_betas_zero_snr"] else "")


def _told(s: Mapping[str, Any], what: str) -> str:
    if s["scheduler"] is None:
        return f"no scheduler was found: taken to predict {what} (else: prediction_type=, beta_schedule=, ...)"
    sampled = "Ancestral" if s["scheduler"] in ANCESTRAL else "DDIM"
    if s["scheduler"] in FLOW:
        sampled = "Euler's method"
    clipped = ", x0 kept in the data's range" if s.get("clip_sample") or s.get("thresholding") else ""
    return f"{s['scheduler']}: predicts {what}; sampled by {sampled}{clipped}"
