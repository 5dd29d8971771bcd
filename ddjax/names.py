"""What the names in a config stand for, but for objectives (`objective_names`); `naming` makes objects of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddjax import (
    around,
    denoisers,
    grids,
    paths,
    processes,
    schedules,
    shortcuts,
    simplex,
    solvers,
    symbol_schedules,
    transforms,
)
from ddjax.config import ConfigError
from ddjax.naming import make, pick, taken
from ddjax.processes import interpolant
from ddjax.processes.gaussian import schedule_of


def _shifted(schedule: str, factor: float, scaling: str = "vp", **options: Any) -> schedules.Shifted:
    """`Shifted`, of one of `SCHEDULES`; the options are its own."""
    base = make(SCHEDULES, schedule, "config.process.schedule_options.schedule", **options)
    return schedules.Shifted(base, factor, scaling)


SCHEDULES = {
    "linear": schedules.Linear,
    "polynomial": schedules.Polynomial,
    "cosine": schedules.Cosine,
    "log_linear": schedules.LogLinear,
    "geometric": schedules.Geometric,
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
    "ou_bridge": schedules.OUBridge,
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
    rates = make(GENERATORS, generator, "config.process.options.generator", num_symbols, **options)
    return processes.Kernel(num_symbols, rates, schedule, absorb=absorb)


def _spindle(num_symbols: int, counts: np.ndarray, strength: float = 0.3) -> processes.StateMasked:
    """`StateMasked` with DiffusionBERT's schedule for the frequencies of the training data."""
    return processes.StateMasked(num_symbols, symbol_schedules.Spindle.from_frequencies(counts, strength))


def _symbol_polynomial(num_symbols: int, power: float = 1.0, eps: float = 0.0) -> processes.StateMasked:
    """`StateMasked` with the same power for each symbol: where the objective `genmd4` begins to learn them."""
    return processes.StateMasked(num_symbols, symbol_schedules.SymbolPolynomial((power,) * num_symbols, eps=eps))


def _blurring(
    schedule: schedules.Gaussian, data_std: float, shape: tuple[int, ...], blur: float = 20.0, floor: float = 0.001
) -> processes.InBasis:
    """Noise, and blur by the heat equation (`schedules.Heat`) on the cosines of an image."""
    rates = schedules.spectral.squared_frequencies(shape, (1, 2))
    return _in_cosines(schedules.Heat(rates, schedule, blur, floor), data_std, shape)


def _shortest_path(
    data_std: float, shape: tuple[int, ...], power: float = 1.59, offset: float = 0.0086
) -> processes.InBasis:
    """`schedules.ShortestPath` on the cosines of an image, for coordinates of variance power / (offset + |k|)^2.

    k is in cycles per site; the numbers are those of Das et al. 2023.
    """
    k = np.sqrt(schedules.spectral.squared_frequencies(shape, (1, 2))) / (2.0 * np.pi)
    return _in_cosines(schedules.ShortestPath(power / (offset + k) ** 2), data_std, shape)


def _in_cosines(schedule: schedules.Gaussian, data_std: float, shape: tuple[int, ...]) -> processes.InBasis:
    if len(shape) != 3:
        raise ValueError(f"its frequencies are those of images, (height, width, channels), got shape {shape}")
    return processes.InBasis(processes.Gaussian(schedule, data_std), processes.DCT((1, 2)))


PATHS = {"straight": paths.Straight, "trigonometric": paths.Trigonometric, "residual": paths.Residual}
CORRELATIONS = {
    "markov": interpolant.markov,
    "deterministic": interpolant.deterministic,
    "accumulating": interpolant.accumulating,
}


def _interpolant(
    path: str = "straight",
    noise: Mapping[str, float] | None = None,
    correlation: str = "markov",
    source_std: float | None = 1.0,
    data_std: float = 1.0,
) -> processes.Interpolant:
    """`Interpolant` along one of `PATHS`; `noise` are the arguments of `paths.Noise`.

    source_std: of Gaussian x_1; None where it comes with the data.
    """
    key = "config.process.options"
    noise = None if noise is None else make({"noise": paths.Noise}, "noise", f"{key}.noise", **noise)
    named = pick(CORRELATIONS, correlation, f"{key}.correlation")
    return processes.Interpolant(make(PATHS, path, f"{key}.path", noise), named, source_std, data_std)


GATES = {"elapsed": lambda schedule: transforms.elapsed, "noise_share": transforms.NoiseShare}


def _learned_gaussian(
    schedule: schedules.Gaussian,
    data_std: float,
    gate: str = "elapsed",
    outputs: int = 1,
    width: int = 32,
    seed: int = 0,
) -> processes.LearnedGaussian:
    """`LearnedGaussian`, its transform a small network at each site: it begins with the identity.

    gate: of `GATES`: "elapsed" is NDM's, and with 2 outputs (shift and scale) NFDM's; "noise_share" DiffEnc's.
    """
    network = transforms.SiteNetwork(width, outputs)
    gate = make(GATES, gate, "config.process.options.gate", schedule)
    values = network.initial(jax.random.key(seed))
    return processes.LearnedGaussian(transforms.Residual(network, gate), values, schedule, data_std)


def _geometric(schedule: schedules.Gaussian, data_std: float, growth: float = 0.0) -> processes.Geometric:
    """`Geometric`; data_std is that of the logarithm."""
    return processes.Geometric(processes.Gaussian(schedule, data_std), growth)


def _barycentric(marginals: int = 2, first: int = 0, last: int = 1) -> processes.Barycentric:
    """`Barycentric`, sampled along an edge of the simplex."""
    return processes.Barycentric(simplex.Edge(marginals, first, last))


def _product(
    schedule: schedules.Gaussian,
    data_std: float,
    num_symbols: Mapping[str, int | None],
    counts: Mapping[str, np.ndarray],
    parts: bool,
    symbols: str = "uniform",
    symbols_schedule: str = "cosine",
    **options: Any,
) -> processes.Product:
    """`Product`: `Gaussian` for numbers, and for each alphabet one of `PROCESSES`, whose own are the other options.

    symbols_schedule: of the alphabets, one of the survival schedules.
    """
    key = "config.process.options"
    named, survival = (
        pick(PROCESSES, symbols, f"{key}.symbols"),
        make(SCHEDULES, symbols_schedule, f"{key}.symbols_schedule"),
    )
    found = {}
    for name, number in num_symbols.items():
        if number is None:
            found[name] = processes.Gaussian(schedule, data_std)
        else:
            given = {"num_symbols": number, "schedule": survival, "counts": counts.get(name)}
            found[name] = make(PROCESSES, symbols, f"{key}.symbols", **taken(named, given), **options)
    return processes.Product(found)


# Of the arguments, num_symbols, schedule, data_std, shape and counts (of the symbols of the training data) are given
# where they are taken; the others are config.process.options. What takes num_symbols corrupts tokens, what takes parts
# too states of several parts (their num_symbols and counts are dicts).
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
    "learned_gaussian": _learned_gaussian,
    "pfgm": processes.PFGM,
    "interpolant": _interpolant,
    "barycentric": _barycentric,
    "blurring": _blurring,
    "shortest_path": _shortest_path,
    "linear_sde": processes.LinearSDE,
    "critically_damped": processes.critically_damped,
    "geometric": _geometric,
    "reflected": processes.Reflected,
    "bridge_mixture": processes.BridgeMixture,
    "mixture_output": processes.MixtureOutput,
    "soft_mixture": processes.SoftMixture,
    "adaptive_gaussian": processes.AdaptiveGaussian.initial,
    "product": _product,
}
DENOISERS = {
    "dit": denoisers.DiT,
    "text": denoisers.TextTransformer,
    "unet": denoisers.UNet,
    "edm2": denoisers.EDM2,
    "uvit": denoisers.UViT,
    "dico": denoisers.DiCo,
    "state_space": denoisers.StateSpace,
    "multi_resolution": denoisers.MultiResolution,
    "diffit": denoisers.DiffiT,
    "diffussm": denoisers.DiffuSSM,
    "tabular": denoisers.TabularMLP,
    "mixed_table": denoisers.MixedTable,
    "graph": denoisers.GraphTransformer,
    "inf_dit": denoisers.InfDiT,
    "low_rank": denoisers.LowRankGaussian,
    "neural_process": denoisers.NeuralProcess,
}


def _euler(process: Any, **options: Any) -> Any:
    """Of rates of jumps for tokens, of the ODE for real numbers."""
    return (solvers.RateEuler if process.state == "categorical" else solvers.euler)(process, **options)


def _given_latent(process: processes.AdaptiveGaussian, solver: str = "ancestral") -> solvers.GivenLatent:
    """`GivenLatent` with another of `SOLVERS`, with its defaults."""
    return solvers.GivenLatent(process, pick(SOLVERS, solver, "config.sample.solver_options.solver"))


def _parts(process: processes.Product, solvers_of: Mapping[str, str] | None = None) -> solvers.Parts:
    """`Parts`, each part named in `solvers_of` by another of `SOLVERS`, with its defaults."""
    if not isinstance(process, processes.Product):
        raise ValueError(f"parts is for config.process.name='product', not for {type(process).__name__}")
    key = "config.sample.solver_options.solvers_of"
    made = {name: pick(SOLVERS, solver, key) for name, solver in (solvers_of or {}).items()}
    if unknown := set(made) - set(process.processes):
        raise ValueError(f"{min(unknown)!r} is none of the parts {', '.join(process.processes)}")
    return solvers.Parts(process, {name: solver(process[name]) for name, solver in made.items()})


def _resampled(process: Any, solver: str = "ancestral", rounds: int = 5) -> solvers.Resampled:
    """`Resampled` around another of `SOLVERS`, with its defaults."""
    return solvers.Resampled(pick(SOLVERS, solver, "config.sample.solver_options.solver")(process), rounds)


# Of the arguments, the process comes first and law (the Gaussian law of the training data, or of a file that the option
# names) is given where it is taken; the others are config.sample.solver_options.
SOLVERS = {
    "ancestral": solvers.Ancestral,
    "ddim": solvers.DDIM,
    "heun": solvers.Heun,
    "unmask": around.unmask,
    "path_planning": solvers.PathPlanning,
    "first_hitting": solvers.FirstHitting,
    "gillespie": solvers.Gillespie,
    "planned_steps": solvers.PlannedSteps,
    "folded_heun": solvers.FoldedHeun,
    "given_latent": _given_latent,
    "fresh_latent": solvers.FreshLatent,
    "parts": _parts,
    "resampled": _resampled,
    "remasking": solvers.Remasking,
    "psi": solvers.Psi,
    "self_correction": solvers.SelfCorrection,
    "binomial_bridge": solvers.BinomialBridge,
    "poisson_bridge": solvers.PoissonBridge,
    "glauber": solvers.Glauber,
    "gibbs": solvers.Gibbs,
    "denoising_chain": solvers.DenoisingChain,
    "tweedie": solvers.Tweedie,
    "tau_leaping": solvers.TauLeaping,
    "flow_euler": solvers.FlowEuler,
    "campbell": solvers.Campbell,
    "reuse": around.reuse,
    "grouped": around.grouped,
    "nested": around.nested,
    "euler": _euler,
    "heun_in_noise": solvers.heun_in_noise,
    "bogacki_shampine": solvers.bogacki_shampine,
    "rk4": solvers.rk4,
    "rk45": solvers.Adaptive,
    "dpm_solver": solvers.dpm_solver,
    "dpm_solver_pp_singlestep": solvers.dpm_solver_pp_singlestep,
    "dpm_solver_pp": solvers.dpm_solver_pp,
    "dpm_solver_multistep": solvers.dpm_solver_multistep,
    "unipc": solvers.unipc,
    "deis": solvers.deis,
    "lms": solvers.lms,
    "adams_bashforth": solvers.adams_bashforth,
    "ipndm": solvers.ipndm,
    "pndm": solvers.pndm,
    "plms": solvers.plms,
    "gradient_estimation": solvers.gradient_estimation,
    "flow_turbo": solvers.FlowTurbo,
    "ghvb": solvers.ghvb,
    "momentum": around.momentum,
    "sde_dpm_solver_pp": solvers.sde_dpm_solver_pp,
    "sa_solver": solvers.sa_solver,
    "dpm_solver_pp_2s_ancestral": solvers.dpm_solver_pp_2s_ancestral,
    "edm_stochastic": solvers.edm_stochastic,
    "edm_restart": solvers.edm_restart,
    "euler_maruyama": solvers.EulerMaruyama,
    "predictor_corrector": solvers.predictor_corrector,
    "teleport": shortcuts.teleport,
    "redi": shortcuts.redi,
    "levenberg_marquardt": shortcuts.levenberg_marquardt,
    "preconditioned_langevin": shortcuts.preconditioned_langevin,
}
GRIDS = {
    "uniform": grids.uniform,
    "cosine": grids.cosine,
    "karras": grids.karras,
    "uniform_log_snr": grids.uniform_log_snr,
    "log_linear": grids.log_linear,
    "loss_aware": grids.loss_aware,
    "exponential": grids.exponential,
    "quadratic": grids.quadratic,
    "of_table": grids.of_table,
    "beta": grids.beta,
    "through": grids.through,
    "uniform_shifted": grids.uniform_shifted,
}


def grid(process: Any, name: str, key: str, **options: Any) -> grids.Grid:
    """One of `GRIDS`, told the schedule of a process where it takes one. ConfigError as `naming.make` raises it."""
    if not taken(pick(GRIDS, name, key), {"schedule": None}):
        return make(GRIDS, name, key, **options)
    try:
        schedule = schedule_of(process)
    except ValueError as error:
        raise ConfigError(f"{key}={name!r} is a grid of noise levels: {error}") from error
    return make(GRIDS, name, key, schedule=schedule, **options)


DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
PROJECTIONS = {"edm2": denoisers.edm2.forced}
