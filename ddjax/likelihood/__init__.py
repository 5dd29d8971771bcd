"""What may be called bits: variational bounds with all their terms, and the likelihood of the probability-flow ODE."""

from ddjax.likelihood.any_order import any_order
from ddjax.likelihood.bound import Reconstruction, nelbo
from ddjax.likelihood.decoders import binned, discretised
from ddjax.likelihood.dequantise import Dequantise, UniformNoise
from ddjax.likelihood.grouped import grouped
from ddjax.likelihood.information import Information, information_rate, mutual_information, pointwise_information
from ddjax.likelihood.integrators import Adaptive, Integrator, heun, rk4
from ddjax.likelihood.marginals import chain_rule, marginals
from ddjax.likelihood.ode import FlowLikelihood, ode

__all__ = [
    "Adaptive",
    "Dequantise",
    "FlowLikelihood",
    "Information",
    "Integrator",
    "Reconstruction",
    "UniformNoise",
    "any_order",
    "binned",
    "chain_rule",
    "discretised",
    "grouped",
    "heun",
    "information_rate",
    "marginals",
    "mutual_information",
    "nelbo",
    "ode",
    "pointwise_information",
    "rk4",
]
