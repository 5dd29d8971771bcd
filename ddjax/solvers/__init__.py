"""Reverse steps. A solver has `init(xt) -> carry` and `step(keys, carry, xt, t, s, denoise) -> (xs, carry, Info)`."""

from ddjax.solvers.adaptive import Adaptive
from ddjax.solvers.ancestral import Ancestral
from ddjax.solvers.base import Info, Solver
from ddjax.solvers.cached import Cached
from ddjax.solvers.chain import DenoisingChain
from ddjax.solvers.codebook import Codebook
from ddjax.solvers.correction import SelfCorrection
from ddjax.solvers.counts import BinomialBridge, PoissonBridge
from ddjax.solvers.discrete_flow import Campbell, FlowEuler
from ddjax.solvers.events import FirstHitting, Gillespie, PlannedSteps
from ddjax.solvers.first_order import FirstOrder
from ddjax.solvers.flow_turbo import FlowTurbo, refined
from ddjax.solvers.gaussian import DDIM, Heun
from ddjax.solvers.given import FreshLatent, GivenLatent
from ddjax.solvers.grouped import Grouped
from ddjax.solvers.key_values import KeyValues
from ddjax.solvers.langevin import EulerMaruyama, Langevin, PredictorCorrector, predictor_corrector
from ddjax.solvers.learned import Learned
from ddjax.solvers.merging import Merging
from ddjax.solvers.momentum import Momentum
from ddjax.solvers.multistep import (
    Multistep,
    Window,
    adams_bashforth,
    deis,
    dpm_solver_multistep,
    dpm_solver_pp,
    ghvb,
    gradient_estimation,
    ipndm,
    lms,
    plms,
    pndm,
    sa_solver,
    sde_dpm_solver_pp,
    unipc,
)
from ddjax.solvers.nested import Nested
from ddjax.solvers.noise import Brownian, Fresh, Given, Noise
from ddjax.solvers.orders import Confidence, LeftToRight, Local, Planner, RandomOrder
from ddjax.solvers.parts import Parts
from ddjax.solvers.preconditioning import ExactHessian, FixedHessian, LevenbergMarquardt, Preconditioned
from ddjax.solvers.rates import RateEuler, TauLeaping, Tweedie
from ddjax.solvers.reflected import FoldedHeun
from ddjax.solvers.remasking import Psi, Remasking
from ddjax.solvers.renoised import (
    Churned,
    Interval,
    Restart,
    StepsDown,
    dpm_solver_pp_2s_ancestral,
    edm_restart,
    edm_stochastic,
)
from ddjax.solvers.resampled import Resampled
from ddjax.solvers.reuse import Reuse
from ddjax.solvers.singlestep import (
    SingleStep,
    bogacki_shampine,
    dpm_solver,
    dpm_solver_pp_singlestep,
    euler,
    heun_in_noise,
    rk4,
)
from ddjax.solvers.stopping import Stopping
from ddjax.solvers.sweeps import Gibbs, Glauber
from ddjax.solvers.switched import Switched, Teleport
from ddjax.solvers.unmask import PathPlanning, Unmask

__all__ = [
    "DDIM",
    "Adaptive",
    "Ancestral",
    "BinomialBridge",
    "Brownian",
    "Cached",
    "Campbell",
    "Churned",
    "Codebook",
    "Confidence",
    "DenoisingChain",
    "EulerMaruyama",
    "ExactHessian",
    "FirstHitting",
    "FirstOrder",
    "FixedHessian",
    "FlowEuler",
    "FlowTurbo",
    "FoldedHeun",
    "Fresh",
    "FreshLatent",
    "Gibbs",
    "Gillespie",
    "Given",
    "GivenLatent",
    "Glauber",
    "Grouped",
    "Heun",
    "Info",
    "Interval",
    "KeyValues",
    "Langevin",
    "Learned",
    "LeftToRight",
    "LevenbergMarquardt",
    "Local",
    "Merging",
    "Momentum",
    "Multistep",
    "Nested",
    "Noise",
    "Parts",
    "PathPlanning",
    "PlannedSteps",
    "Planner",
    "PoissonBridge",
    "Preconditioned",
    "PredictorCorrector",
    "Psi",
    "RandomOrder",
    "RateEuler",
    "Remasking",
    "Resampled",
    "Restart",
    "Reuse",
    "SelfCorrection",
    "SingleStep",
    "Solver",
    "StepsDown",
    "Stopping",
    "Switched",
    "TauLeaping",
    "Teleport",
    "Tweedie",
    "Unmask",
    "Window",
    "adams_bashforth",
    "bogacki_shampine",
    "deis",
    "dpm_solver",
    "dpm_solver_multistep",
    "dpm_solver_pp",
    "dpm_solver_pp_2s_ancestral",
    "dpm_solver_pp_singlestep",
    "edm_restart",
    "edm_stochastic",
    "euler",
    "ghvb",
    "gradient_estimation",
    "heun_in_noise",
    "ipndm",
    "lms",
    "plms",
    "pndm",
    "predictor_corrector",
    "refined",
    "rk4",
    "sa_solver",
    "sde_dpm_solver_pp",
    "unipc",
]
