"""Solvers by name that take another solver by name, and spare evaluations or hope to."""

from __future__ import annotations

from typing import Any

from ddjax import retrieval, solvers
from ddjax.gaussian_law import GaussianLaw
from ddjax.naming import make


def _inner(process: Any, solver: str, **options: Any) -> Any:
    """Another of `names.SOLVERS`; the options are its own."""
    from ddjax.names import SOLVERS  # here: these are some of them

    return make(SOLVERS, solver, "config.sample.solver_options.solver", process, **options)


def teleport(process: Any, law: GaussianLaw, at: float = 0.75, solver: str = "heun", **options: Any) -> Any:
    """`Teleport` as far as the time `at`, and from there another of `names.SOLVERS`; the options are that one's own."""
    return solvers.Switched((solvers.Teleport(process, law), _inner(process, solver, **options)), (at,))


def redi(process: Any, base: str, solver: str = "ddim", neighbours: int = 1, **options: Any) -> Any:
    """`retrieval.redi` around another of `names.SOLVERS`, with the base in a file; the options are that one's own."""
    return retrieval.redi(_inner(process, solver, **options), retrieval.load(base), neighbours)


def levenberg_marquardt(
    process: Any,
    solver: str = "dpm_solver_pp",
    damping: float = 100.0,
    memory: float = 0.1,
    form: str = "x0",
    **options: Any,
) -> solvers.Preconditioned:
    """`Preconditioned` by `LevenbergMarquardt` around another of `names.SOLVERS`; the options are that one's own."""
    preconditioner = solvers.LevenbergMarquardt(damping, memory)
    return solvers.Preconditioned(_inner(process, solver, **options), preconditioner, form)


def preconditioned_langevin(
    process: Any, law: GaussianLaw, size: float = 0.16, steps: int = 1, damping: float = 0.1
) -> solvers.PredictorCorrector:
    """`predictor_corrector`, its steps of `size` sigma^2 preconditioned by the Hessian of the data's Gaussian law."""
    preconditioner = solvers.ExactHessian(damping, law)
    corrector = solvers.Langevin(process, size, steps, "level", preconditioner=preconditioner)
    return solvers.PredictorCorrector(solvers.EulerMaruyama(process), corrector)
