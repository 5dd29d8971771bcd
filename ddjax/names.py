"""What the names in a config stand for, and how a name and its options become an object."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ddjax import denoisers, grids, objectives, processes, schedules, solvers, symbol_schedules
from ddjax.config import ConfigError


def _shifted(schedule: str, factor: float, scaling: str = "vp", **options: Any) -> schedules.Shifted:
    """`Shifted`, of one of `SCHEDULES`; the options are its own."""
    base = make(SCHEDULES, schedule, None, "config.process.schedule_options.schedule", **options)
    return schedules.Shifted(base, factor, scaling)


SCHEDULES = {
    "linear": schedules.Linear,
    "polynomial": schedules.Polynomial,
    "cosine": schedules.Cosine,
    "log_linear": schedules.LogLinear,
    "vp_linear": schedules.VPLinear,
    "vp_cosine": schedules.VPCosine,
    "ve": schedules.VE,
    "edm": schedules.EDM,
    "cond_ot": schedules.CondOT,
    "sub_vp": schedules.SubVP,
    "trigonometric": schedules.Trigonometric,
    "polynomial_path": schedules.PolynomialPath,
    "linear_vp": schedules.LinearVP,
    "log_snr_linear": schedules.LogSNRLinear,
    "laplace": schedules.Laplace,
    "sigmoid": schedules.Sigmoid,
    "ddpm_linear": schedules.Table.ddpm_linear,
    "ddpm_cosine": schedules.Table.ddpm_cosine,
    "shifted": _shifted,
    "monotone": schedules.Monotone.initial,
    "per_site": schedules.PerSite.initial,
}
GENERATORS = {
    "uniform": processes.generators.uniform,
    "birth_death": processes.generators.birth_death,
    "banded": processes.generators.banded,
    "gaussian": processes.generators.gaussian,
}


def _marginal(
    num_symbols: int,
    counts: np.ndarray,
    schedule: Any,
    smoothing: float = 1.0,
    probabilities: Sequence[float] | None = None,
) -> processes.Marginal:
    """`Marginal`; where no probabilities are given, with the frequencies of the training data."""
    p = counts + smoothing if probabilities is None else np.asarray(probabilities)
    return processes.Marginal(num_symbols, schedule, probabilities=p / p.sum())


def _kernel(num_symbols: int, schedule: Any, generator: str, absorb: float = 0.0, **options: Any) -> processes.Kernel:
    """`Kernel` with one of `GENERATORS`; the options are its own."""
    rates = make(GENERATORS, generator, None, "config.process.options.generator", num_symbols, **options)
    return processes.Kernel(num_symbols, rates, schedule, absorb=absorb)


def _spindle(num_symbols: int, counts: np.ndarray, strength: float = 0.3) -> processes.StateMasked:
    """`StateMasked` with DiffusionBERT's schedule for the frequencies of the training data."""
    return processes.StateMasked(num_symbols, symbol_schedules.Spindle.from_frequencies(counts, strength))


def _symbol_polynomial(num_symbols: int, power: float = 1.0, eps: float = 0.0) -> processes.StateMasked:
    """`StateMasked` with the same power for each symbol: where the objective `genmd4` begins to learn them."""
    return processes.StateMasked(num_symbols, symbol_schedules.SymbolPolynomial((power,) * num_symbols, eps=eps))


# Of the arguments, num_symbols, schedule and counts (of the symbols of the training data) are given where they are
# taken; the others are config.process.options.
PROCESSES = {
    "masked": processes.Masked,
    "uniform": processes.Uniform,
    "marginal": _marginal,
    "hybrid": processes.Hybrid,
    "kernel": _kernel,
    "spindle": _spindle,
    "symbol_polynomial": _symbol_polynomial,
    "discretized_gaussian": processes.chain.discretized_gaussian,
    "thinning": processes.Thinning,
    "glauber": processes.staggered.glauber,
    "gaussian": processes.Gaussian,
    "learned_variance": processes.LearnedVariance,
}
GAUSSIAN_PROCESSES = ("gaussian", "learned_variance")
DENOISERS = {"dit": denoisers.DiT, "text": denoisers.TextTransformer}
OBJECTIVES = {
    "elbo": objectives.elbo,
    "any_order": objectives.any_order,
    "block_elbo": objectives.block_elbo,
    "cross_entropy": objectives.cross_entropy,
    "ddpd": objectives.ddpd,
    "genmd4": objectives.genmd4,
    "learned_elbo": objectives.learned_elbo,
    "d3pm_hybrid": objectives.d3pm_hybrid,
    "generalised_kl": objectives.generalised_kl,
    "score_entropy": objectives.score_entropy,
    "glauber": objectives.glauber,
    "duo": objectives.duo,
    "gaussian": objectives.gaussian,
    "learned_uncertainty": objectives.learned_uncertainty,
    "adaptive": objectives.adaptive,
    "contrastive_flow_matching": objectives.contrastive_flow_matching,
    "ddpm_hybrid": objectives.ddpm_hybrid,
}
WEIGHTINGS = {
    "elbo": {"clipped": objectives.clipped, "dynamic": objectives.dynamic},
    "gaussian": {
        "unit": lambda: objectives.unit,
        "snr": objectives.weightings.snr,
        "truncated_snr": objectives.weightings.truncated_snr,
        "min_snr": objectives.min_snr,
        "soft_min_snr": objectives.weightings.soft_min_snr,
        "p2": objectives.weightings.p2,
        "edm": objectives.weightings.edm,
        "likelihood": objectives.weightings.likelihood,
        "sigmoid": objectives.weightings.sigmoid,
        "flow_matching": objectives.weightings.flow_matching,
    },
}
WEIGHTINGS |= dict.fromkeys(("learned_uncertainty", "adaptive"), WEIGHTINGS["gaussian"])
LEARN_PROCESS = ("genmd4", "learned_elbo")
# Objectives with parameters of their own, dropped when training is done: where these begin.
OBJECTIVE_PARAMETERS = {
    "learned_uncertainty": objectives.uncertainty_parameters,
    "adaptive": objectives.adaptive_parameters,
}
EXTRA_HEADS = {"ddpd": 1}  # outputs beside the network's own: DDPD's planner
DENSITIES = {
    "uniform_time": objectives.uniform_time,
    "uniform_log_snr": objectives.uniform_log_snr,
    "log_normal_sigma": objectives.log_normal_sigma,
    "logit_normal": objectives.densities.logit_normal,
    "sech": objectives.densities.sech,
    "laplace": objectives.densities.laplace,
}
SOLVERS = {"ancestral": solvers.Ancestral, "ddim": solvers.DDIM, "heun": solvers.Heun}
GAUSSIAN_SOLVERS = ("ddim", "heun")
GRIDS = {
    "uniform": grids.uniform,
    "cosine": grids.cosine,
    "karras": grids.karras,
    "uniform_log_snr": grids.uniform_log_snr,
}
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def pick(table: Mapping[str, Any], name: str, key: str) -> Any:
    """What `name` stands for. key: where the config says it, for the ConfigError that an unknown name raises."""
    if name not in table:
        raise ConfigError(f"{key}={name!r} is unknown; it is one of {', '.join(table)}")
    return table[name]


def make(table: Mapping[str, Callable], name: str, options: dict | None, key: str, *args: Any, **kwargs: Any) -> Any:
    """Call what `name` stands for. With `options`, its arguments are taken out of there, e.g. `gamma` for min_snr.

    Raises ConfigError for arguments that it does not take, or needs and lacks, or finds wrong.
    """
    named = pick(table, name, key)
    if options is not None:
        taken = [p for p in inspect.signature(named).parameters if p in options]
        kwargs |= {p: options.pop(p) for p in taken}
    check_options(named, kwargs, key, given=len(args))
    try:
        return named(*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}: {name!r}: {error}") from error


def check_options(named: Callable, options: Mapping[str, Any], key: str, given: int = 0) -> None:
    """Raise ConfigError for options that `named` does not take, or needs and lacks.

    Its first `given` arguments are not options.
    """
    # Of a class, its __init__: NNX's metaclass hides the signature of the call.
    parameters = inspect.signature(named.__init__ if inspect.isclass(named) else named).parameters
    taken = [p for name, p in parameters.items() if name not in ("self", "rngs")][given:]
    passes_on = any(p.kind is p.VAR_KEYWORD for p in taken)  # to something that checks them itself
    taken = [p for p in taken if p.kind is not p.VAR_KEYWORD]
    names, name = [p.name for p in taken], named.__name__.lstrip("_")
    for option in options:
        if option not in names and not passes_on:
            near = difflib.get_close_matches(option, names, n=1)
            hint = (
                f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(names)}" if names else "it takes none"
            )
            raise ConfigError(f"{key}: {name} has no option {option!r}; {hint}")
    if missing := [p.name for p in taken if p.default is p.empty and p.name not in options]:
        raise ConfigError(f"{key}: {name} needs {', '.join(missing)}")
