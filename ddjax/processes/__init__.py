"""Forward corruption processes: marginal, bridge, rate, prior, schedule, and what follows from them."""

from ddjax.processes import chain, generators, interpolant, staggered
from ddjax.processes.adaptive import AdaptiveGaussian
from ddjax.processes.barycentric import Barycentric
from ddjax.processes.bridge_mixture import BridgeMixture
from ddjax.processes.chain import Chain
from ddjax.processes.clocks import Sweeps, Windows
from ddjax.processes.gaussian import Gaussian, Normal
from ddjax.processes.geometric import Geometric
from ddjax.processes.hybrid import Hybrid
from ddjax.processes.in_basis import DCT, InBasis, Orthogonal
from ddjax.processes.interpolant import Interpolant
from ddjax.processes.kernel import Kernel
from ddjax.processes.learned_gaussian import LearnedGaussian
from ddjax.processes.learned_variance import LearnedVariance
from ddjax.processes.linear_sde import LinearSDE, critically_damped
from ddjax.processes.marginal import Marginal
from ddjax.processes.masked import Masked
from ddjax.processes.mixture import Categorical, Mixture
from ddjax.processes.mixture_output import MixtureOutput
from ddjax.processes.pfgm import PFGM
from ddjax.processes.product import Joint, Product
from ddjax.processes.reflected import Reflected
from ddjax.processes.soft_mixture import SoftMixture
from ddjax.processes.staggered import Staggered, in_blocks
from ddjax.processes.state_masked import StateMasked
from ddjax.processes.thinning import Thinning
from ddjax.processes.uniform import Uniform

__all__ = [
    "DCT",
    "PFGM",
    "AdaptiveGaussian",
    "Barycentric",
    "BridgeMixture",
    "Categorical",
    "Chain",
    "Gaussian",
    "Geometric",
    "Hybrid",
    "InBasis",
    "Interpolant",
    "Joint",
    "Kernel",
    "LearnedGaussian",
    "LearnedVariance",
    "LinearSDE",
    "Marginal",
    "Masked",
    "Mixture",
    "MixtureOutput",
    "Normal",
    "Orthogonal",
    "Product",
    "Reflected",
    "SoftMixture",
    "Staggered",
    "StateMasked",
    "Sweeps",
    "Thinning",
    "Uniform",
    "Windows",
    "chain",
    "critically_damped",
    "generators",
    "in_blocks",
    "interpolant",
    "staggered",
]
