"""What training minimises.

Every objective is `objective(key, apply, params, x0, cond=None, weights=None, rows=None, train=True) -> (loss,
metrics)`: the loss
is the weighted mean over examples of nats per site (docs/design.md, section 2).
"""

from ddjax.coherence import AtCoherence, coherent_labels
from ddjax.objectives import degradations, densities, weightings
from ddjax.objectives.adaptive_noise import adaptive_noise
from ddjax.objectives.ambient import ambient, with_noise_level
from ddjax.objectives.blocks import ClipSearch, block_elbo, search_clip, teacher_forced, with_clean
from ddjax.objectives.by_parts import by_parts, digress, tabddpm
from ddjax.objectives.categorical import cross_entropy, d3pm_hybrid, ddpd, planner
from ddjax.objectives.conditioning import with_condition_dropout, with_condition_noise
from ddjax.objectives.contrastive import contrastive_flow_matching
from ddjax.objectives.ddpm_hybrid import ddpm_hybrid
from ddjax.objectives.densities import log_normal_sigma, uniform_log_snr, uniform_time
from ddjax.objectives.diffusion_forcing import diffusion_forcing
from ddjax.objectives.duo import duo
from ddjax.objectives.elbo import any_order, elbo
from ddjax.objectives.fokker_planck import fokker_planck_residual, with_fokker_planck
from ddjax.objectives.gaussian import gaussian
from ddjax.objectives.genmd4 import genmd4
from ddjax.objectives.glauber import glauber
from ddjax.objectives.grouped import grouped
from ddjax.objectives.interpolant import independent, interpolant, paired
from ddjax.objectives.learned_process import curvature, learned_process, weighted_sum
from ddjax.objectives.learned_weights import (
    adaptive,
    adaptive_parameters,
    learned_uncertainty,
    own_uncertainty,
    uncertainty_parameters,
)
from ddjax.objectives.marginals import energy_marginals, energy_parameters, marginals
from ddjax.objectives.mixture_steps import mixture_steps
from ddjax.objectives.multi_resolution import multi_resolution
from ddjax.objectives.multimarginal import multimarginal, path_cost, together
from ddjax.objectives.rates import FlowBound, clipped, dynamic, generalised_kl, score_entropy
from ddjax.objectives.soft_mixture import soft_mixture
from ddjax.objectives.velocity_refiner import velocity_refiner
from ddjax.objectives.weightings import min_snr, unit
from ddjax.objectives.whole_elbo import learned_elbo, whole_elbo

__all__ = [
    "AtCoherence",
    "ClipSearch",
    "FlowBound",
    "adaptive",
    "adaptive_noise",
    "adaptive_parameters",
    "ambient",
    "any_order",
    "block_elbo",
    "by_parts",
    "clipped",
    "coherent_labels",
    "contrastive_flow_matching",
    "cross_entropy",
    "curvature",
    "d3pm_hybrid",
    "ddpd",
    "ddpm_hybrid",
    "degradations",
    "densities",
    "diffusion_forcing",
    "digress",
    "duo",
    "dynamic",
    "elbo",
    "energy_marginals",
    "energy_parameters",
    "fokker_planck_residual",
    "gaussian",
    "generalised_kl",
    "genmd4",
    "glauber",
    "grouped",
    "independent",
    "interpolant",
    "learned_elbo",
    "learned_process",
    "learned_uncertainty",
    "log_normal_sigma",
    "marginals",
    "min_snr",
    "mixture_steps",
    "multi_resolution",
    "multimarginal",
    "own_uncertainty",
    "paired",
    "path_cost",
    "planner",
    "score_entropy",
    "search_clip",
    "soft_mixture",
    "tabddpm",
    "teacher_forced",
    "together",
    "uncertainty_parameters",
    "uniform_log_snr",
    "uniform_time",
    "unit",
    "velocity_refiner",
    "weighted_sum",
    "weightings",
    "whole_elbo",
    "with_clean",
    "with_condition_dropout",
    "with_condition_noise",
    "with_fokker_planck",
    "with_noise_level",
]
