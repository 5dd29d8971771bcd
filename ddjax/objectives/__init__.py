"""What training minimises.

Every objective is `objective(key, apply, params, x0, cond=None, weights=None, rows=None, train=True) -> (loss,
metrics)`: the loss
is the weighted mean over examples of nats per site (docs/design.md, section 2).
"""

from ddjax.objectives.blocks import ClipSearch, block_elbo, search_clip, teacher_forced, with_clean
from ddjax.objectives.categorical import cross_entropy, d3pm_hybrid, ddpd, planner
from ddjax.objectives.conditioning import with_condition_dropout
from ddjax.objectives.diffusion_forcing import diffusion_forcing
from ddjax.objectives.duo import duo
from ddjax.objectives.elbo import any_order, elbo
from ddjax.objectives.gaussian import (
    gaussian,
    log_normal_sigma,
    min_snr,
    uniform_log_snr,
    uniform_time,
    unit,
)
from ddjax.objectives.genmd4 import genmd4
from ddjax.objectives.glauber import glauber
from ddjax.objectives.learned_elbo import learned_elbo
from ddjax.objectives.rates import FlowBound, clipped, dynamic, generalised_kl, score_entropy

__all__ = [
    "ClipSearch",
    "FlowBound",
    "any_order",
    "block_elbo",
    "clipped",
    "cross_entropy",
    "d3pm_hybrid",
    "ddpd",
    "diffusion_forcing",
    "duo",
    "dynamic",
    "elbo",
    "gaussian",
    "generalised_kl",
    "genmd4",
    "glauber",
    "learned_elbo",
    "log_normal_sigma",
    "min_snr",
    "planner",
    "score_entropy",
    "search_clip",
    "teacher_forced",
    "uniform_log_snr",
    "uniform_time",
    "unit",
    "with_clean",
    "with_condition_dropout",
]
