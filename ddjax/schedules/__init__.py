"""Schedules: how much of the data is left at time t.

A schedule is two functions of the clock t in [0, 1] (0 data, 1 noise), `alpha(t)` and `sigma(t)`, with closed-form
derivatives, and the log signal-to-noise ratio, which is the coordinate in which everything else is written.

    Gaussian:     x_t = alpha x_0 + sigma noise        log_snr = 2 log(alpha / sigma)
    categorical:  q(x_t | x_0) = alpha e_{x_0} + sigma pi, sigma = 1 - alpha      log_snr = log(alpha / sigma)

All functions follow the dtype of t and are defined at both ends (`log_snr` is infinite where alpha or sigma is 0).
"""

from ddjax.schedules.base import ByLogSNR, Gaussian, Schedule, Survival, Times
from ddjax.schedules.bridge import OUBridge
from ddjax.schedules.gaussian import (
    EDM,
    VE,
    CondOT,
    LinearVP,
    PolynomialPath,
    SubVP,
    Trigonometric,
    VPCosine,
    VPLinear,
)
from ddjax.schedules.kinetic import KineticOptimal
from ddjax.schedules.learned import Monotone, PerSite
from ddjax.schedules.log_snr import Laplace, LogSNRLinear, Shifted, Sigmoid, Table, ToData
from ddjax.schedules.of_path import OfPath
from ddjax.schedules.spectral import Heat, ShortestPath, squared_frequencies
from ddjax.schedules.survival import Cosine, Geometric, Linear, LogLinear, Polynomial

__all__ = [
    "EDM",
    "VE",
    "ByLogSNR",
    "CondOT",
    "Cosine",
    "Gaussian",
    "Geometric",
    "Heat",
    "KineticOptimal",
    "Laplace",
    "Linear",
    "LinearVP",
    "LogLinear",
    "LogSNRLinear",
    "Monotone",
    "OUBridge",
    "OfPath",
    "PerSite",
    "Polynomial",
    "PolynomialPath",
    "Schedule",
    "Shifted",
    "ShortestPath",
    "Sigmoid",
    "SubVP",
    "Survival",
    "Table",
    "Times",
    "ToData",
    "Trigonometric",
    "VPCosine",
    "VPLinear",
    "squared_frequencies",
]
