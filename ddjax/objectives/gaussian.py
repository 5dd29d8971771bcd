"""Objectives for Gaussian states: an error space, a weighting of noise levels, a density of noise levels.

    loss = E_{t ~ density} weighting(lambda_t) |target - prediction|^2                  in the error space
    loss = 1/2 of the integral of weighting(lambda) |target - prediction|^2 d lambda    with measure="log_snr"

The three are independent. Errors in different spaces differ by a factor of the noise level alone
(`objectives.weightings`), so any two settings with equal products have equal losses (proved in tests/objectives).
Settings from the literature:

    DDPM "simple"        error="noise",    unit,  uniform_time
    EDM                  error="edm",      unit,  log_normal_sigma(-1.2, 1.2)    (Karras et al. 2022, table 1)
    flow matching        error="velocity", unit,  uniform_time                   (Lipman et al. 2023)
    Stable Diffusion 3   error="velocity", unit,  logit_normal(0, 1)             (Esser et al. 2024)
    min-SNR-5            error="noise",    min_snr(5),  uniform_time             (Hang et al. 2023)
    bound                error="noise",    unit,        any density, measure="log_snr"
    SiD2, VDM++          error="noise",    sigmoid(b),  any density, measure="log_snr"

What is learned beside the network: `objectives.learned` (uncertainty, density), `objectives.ddpm_hybrid` (variance).
"""

from __future__ import annotations

from ddjax.objectives.base import Draw, Objective, Uniforms, at_times, noised
from ddjax.objectives.densities import Density, uniform_time
from ddjax.objectives.weightings import Weighting, unit
from ddjax.predictions import GAUSSIAN_KINDS, Prediction, check_kind
from ddjax.processes import Gaussian


def gaussian(
    process: Gaussian,
    kind: str,
    *,
    error: str | None = None,
    weighting: Weighting | None = None,
    density: Density | None = None,
    measure: str = "density",
    uniforms: Uniforms | None = None,
) -> Objective:
    """A weighted squared error.

    kind: what the network predicts. error: the kind in which the error is measured (default: `kind`).
    weighting: factor as a function of log-SNR (default 1). density: times, as an inverse distribution function
    (default: uniform in t over the times whose log-SNR is finite).
    measure: `"density"`, the mean over the density; `"log_snr"`, half the integral over log-SNR, the same whatever the
        density, which then only decides the variance: importance sampling (Kingma & Gao 2023). With the noise
        error and weight 1 it is the bound's diffusion term, nats per site. It covers the log-SNRs that the density
        reaches.
    uniforms: how times are spread over a batch: `random.stratified` (low discrepancy, default), `antithetic` or
        `independent`.
    Raises ValueError for an unknown error space or measure, or a density without `pdf` where one is needed.
    """
    return noised(
        process, kind, weighted_errors(process, error or kind, weighting, density, measure), uniforms=uniforms
    )


def weighted_errors(
    process: Gaussian, error: str, weighting: Weighting | None, density: Density | None, measure: str = "density"
) -> Draw:
    """The draw of `gaussian`: noisy states, times, and the weighted error of a prediction at each site."""
    check_kind(error, GAUSSIAN_KINDS, process)
    weighting = unit if weighting is None else weighting
    density = uniform_time(process) if density is None else density
    if measure not in ("density", "log_snr"):
        raise ValueError(f"measure is 'density' or 'log_snr', got {measure!r}")
    if measure == "log_snr" and not hasattr(density, "pdf"):
        raise ValueError("measure='log_snr' divides by the density: give a densities.Density, which knows its pdf")

    def time_at(u):
        t = density(u)
        log_snr = process.schedule.common.log_snr(t)
        weight = weighting(log_snr)
        return t, weight if measure == "density" else 0.5 * weight / density.pdf(log_snr)

    def site_loss(x0, prediction, xt, t):
        target = process.convert(Prediction(x0, "x0"), error, xt, t).value
        return (target - process.convert(prediction, error, xt, t).value) ** 2

    return at_times(process, time_at, site_loss)
