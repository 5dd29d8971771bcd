"""What the names of objectives in a config stand for, and of what they are made: weightings, densities, couplings."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ddjax import (
    likelihood,
    objectives,
    processes,
    random,
)
from ddjax.objectives.base import Objective
from ddjax.objectives.interpolant import Coupling
from ddjax.types import Bound

SITE_WEIGHTINGS = {"clipped": objectives.clipped, "dynamic": objectives.dynamic}
WEIGHTINGS = {
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
}
CLOCK_DENSITIES = {"uniform_time": objectives.uniform_time, "logit_normal": objectives.densities.logit_normal}
DENSITIES = CLOCK_DENSITIES | {
    "uniform_log_snr": objectives.uniform_log_snr,
    "log_normal_sigma": objectives.log_normal_sigma,
    "sech": objectives.densities.sech,
    "laplace": objectives.densities.laplace,
}


@dataclasses.dataclass(frozen=True)
class Transported:
    """x_1 is noise paired with x_0 by optimal transport within groups of a batch: `data.Transported` puts it there."""

    group: int

    def __call__(self, keys: Any, x0: Any, cond: Any) -> tuple[Any, Any]:
        """The batch's x_1, and the network's own condition."""
        return objectives.paired()(keys, x0, cond)


def _independent(process: processes.Interpolant) -> Coupling:
    """`independent` noise of the process's width."""
    if not isinstance(process, processes.Interpolant):
        raise ValueError(f"the ends of {type(process).__name__} are not for choosing: the objective is Interpolant's")
    if process.source_std is None:
        raise ValueError("x1 is noise, and has a width: leave out config.process.options.source_std=None")
    return objectives.independent(process.source_std)


@dataclasses.dataclass(frozen=True)
class Paired:
    """x_1 comes with the data (`objectives.paired`)."""

    show: bool = False

    def __call__(self, keys: Any, x0: Any, cond: Any) -> tuple[Any, Any]:
        """The batch's x_1, and what the network sees."""
        return objectives.paired(self.show)(keys, x0, cond)


def _given(make: Callable[..., Coupling]) -> Callable[..., Coupling]:
    """`make`, for processes whose x_1 comes with the data."""

    @functools.wraps(make)
    def made(process, *args, **options):
        if getattr(process, "source_std", 1.0) is not None:
            raise ValueError("x1 comes with the data, not from a Gaussian: set config.process.options.source_std=None")
        return make(*args, **options)

    own = inspect.signature(make)
    process = inspect.Parameter("process", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    made.__signature__ = own.replace(parameters=[process, *own.parameters.values()])
    return made


COUPLINGS = {
    "independent": _independent,
    "transported": Transported,
    "paired": _given(Paired),
    "coarse": _given(objectives.degradations.Coarse),
    "blurred": _given(objectives.degradations.Blurred),
    "holes": _given(objectives.degradations.Holes),
}


def _interpolant_loss(
    process: Any, kind: str, coupling: Coupling | None = None, error: str | None = None, density: Any = None
) -> Objective:
    """`interpolant`, its ends independent where nothing else is said."""
    coupling = _independent(process) if coupling is None else coupling
    return objectives.interpolant(process, kind, coupling, error=error, density=density)


def _multimarginal(process: Any, kind: str, concentration: float = 1.0) -> Objective:
    """`multimarginal`, the marginals coming with the data."""
    if not isinstance(process, processes.Barycentric) or kind != "ends":
        raise ValueError(
            f"it is for config.process.name='barycentric' and config.denoiser.kind='ends', not for "
            f"{type(process).__name__} and {kind!r}"
        )
    return objectives.multimarginal(process, concentration=concentration)


def _fokker_planck(
    process: Any, kind: str, weight: float, error: str | None = None, weighting: Any = None, density: Any = None
) -> Objective:
    """`gaussian` with the penalty of `with_fokker_planck`."""
    plain = objectives.gaussian(process, kind, error=error, weighting=weighting, density=density)
    return objectives.with_fokker_planck(plain, process, kind, weight=weight, density=density)


def _learned_process(
    process: Any, kind: str, curvature: float = 0.0, t_range: Sequence[float] | None = None, reconstruction: Any = None
) -> Objective:
    """`learned_process` of the whole bound, and of the curvature of its paths where that has a weight (NFDM-OT)."""

    def on(process: Any) -> Objective:
        bound = objectives.whole_elbo(process, kind, t_range=t_range, reconstruction=reconstruction)
        if not curvature:
            return bound
        bent = objectives.curvature(process, kind, t_range=t_range)
        return objectives.weighted_sum(bound=(1.0, bound), curvature=(curvature, bent))

    return objectives.learned_process(process, on)


@dataclasses.dataclass(frozen=True)
class Named:
    """An objective, and what training with it needs beside the network.

    make: (process, kind, **options) -> objective. Of the options, reconstruction (the decoder) and block are given
        where they are taken.
    tables: of the options that are names, what these stand for; their own arguments are options too, but for the
        process, which is given where it is taken.
    learns_process: whether the process's parameters train with the network's.
    parameters: where the objective's own parameters begin; they are dropped when training is done.
    heads: outputs beside the network's own. planner: whether they are a planner's, which solvers ask. listens: whether
        it asks for taps of the network.
    bound: what evaluates such networks in the place of `likelihood.nelbo`, with steps (the sampler's) and num_draws.
    """

    make: Callable[..., Objective]
    tables: Mapping[str, Mapping[str, Callable]] = dataclasses.field(default_factory=dict)
    learns_process: bool = False
    parameters: Callable[[], Any] | None = None
    heads: int = 0
    planner: bool = False
    listens: bool = False
    bound: Callable[..., Bound] | None = None


# How times are spread over a batch.
UNIFORMS = {
    "stratified": lambda: random.stratified,
    "antithetic": lambda: random.antithetic,
    "independent": lambda: random.independent,
}
_FACTORS = {"weighting": WEIGHTINGS, "density": DENSITIES}
OBJECTIVES = {
    "elbo": Named(objectives.elbo, {"weighting": SITE_WEIGHTINGS, "uniforms": UNIFORMS}),
    "any_order": Named(objectives.any_order),
    "block_elbo": Named(objectives.block_elbo),
    "cross_entropy": Named(objectives.cross_entropy),
    "grouped": Named(objectives.grouped, bound=likelihood.grouped),
    "ddpd": Named(objectives.ddpd, heads=1, planner=True),
    "marginals": Named(objectives.marginals, heads=1),  # log p of any subset
    "genmd4": Named(objectives.genmd4, learns_process=True),
    "learned_elbo": Named(objectives.learned_elbo, learns_process=True),
    "learned_process": Named(_learned_process, learns_process=True),
    "d3pm_hybrid": Named(objectives.d3pm_hybrid),
    "generalised_kl": Named(objectives.generalised_kl),
    "score_entropy": Named(objectives.score_entropy),
    "glauber": Named(objectives.glauber),
    "duo": Named(objectives.duo),
    "diffusion_forcing": Named(objectives.diffusion_forcing),
    "gaussian": Named(objectives.gaussian, _FACTORS | {"uniforms": UNIFORMS}),
    "fokker_planck": Named(_fokker_planck, _FACTORS),
    "learned_uncertainty": Named(
        objectives.learned_uncertainty, _FACTORS, parameters=objectives.uncertainty_parameters
    ),
    "own_uncertainty": Named(objectives.own_uncertainty, _FACTORS, listens=True),
    "adaptive": Named(objectives.adaptive, {"weighting": WEIGHTINGS}, parameters=objectives.adaptive_parameters),
    "contrastive_flow_matching": Named(objectives.contrastive_flow_matching, {"density": DENSITIES}),
    "ddpm_hybrid": Named(objectives.ddpm_hybrid),
    "multi_resolution": Named(objectives.multi_resolution, _FACTORS | {"uniforms": UNIFORMS}, listens=True),
    "ambient": Named(objectives.ambient, _FACTORS),
    "interpolant": Named(_interpolant_loss, {"coupling": COUPLINGS, "density": CLOCK_DENSITIES}),
    "multimarginal": Named(_multimarginal),
    "mixture_steps": Named(objectives.mixture_steps),
    "soft_mixture": Named(objectives.soft_mixture),
    "adaptive_noise": Named(objectives.adaptive_noise, learns_process=True),
    "by_parts": Named(objectives.by_parts),
    "tabddpm": Named(objectives.tabddpm),
    "digress": Named(objectives.digress),
}
