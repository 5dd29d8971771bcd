"""Experiment configs: short ml_collections files at the edge, frozen typed dataclasses inside.

A config file defines `get_config()`, starting from `default()` and changing what it needs:

    from ddjax.config import default

    def get_config():
        config = default()
        config.denoiser.options = dict(width=96, depth=3, heads=4)
        return config

Every key is listed and explained here. What names (of processes, schedules, networks, solvers) stand for is in
`ddjax.names`, the only place that knows them.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import json
import runpy
import traceback
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict


class ConfigError(ValueError):
    """A config that cannot be used; the message names the key and what was expected."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to train on."""

    # "digits", "stdlib", or the path of a file (.csv: a table of numbers and symbols) or folder, perhaps prepared by
    # `ddjax data prepare`; Parquet and prepared folders also by an fsspec URL (ddjax.data.load)
    name: str = "digits"
    # in its place several, each a dict of name, weight and perhaps options (over those below): training takes items of
    # each by its weight, evaluation too
    mixture: list = dataclasses.field(default_factory=list)
    tokens: bool = True  # categorical states; False: values in [-1, 1]
    # of the source: length, size, vocabulary, beside, ...; of prepared text pack (whole documents into windows, each
    # seen by itself: data.packing) and align (a multiple of denoiser.options.block); of prepared data check (sizes,
    # sha256)
    options: dict = dataclasses.field(default_factory=dict)
    eval_split: str = "test"  # the split on which bounds are reported
    # arrays of the items that the network (dit, inf_dit) is told beside labels: from vector, sequence, valid and image
    # to their names (of an .npz, in options.beside); for super-resolution {"image": {"smaller": 4}}, made of the item
    conditions: dict = dataclasses.field(default_factory=dict)
    # latents in the place of images: autoencoder (a file of ddjax.autoencoders.save), scale (left out: 1 over their
    # standard deviation), rounds (draws from q(z | x) in an epoch); empty for none. workers must be 0
    latents: dict = dataclasses.field(default_factory=dict)
    # of values: what [-1, 1] is mapped onto, [0, 1] for reflected, of positive numbers for geometric
    interval: list = dataclasses.field(default_factory=lambda: [-1.0, 1.0])
    # sigma, share, seed: a share of the training items is seen through noise of standard deviation sigma, drawn once
    # for each, for the objective ambient; empty for none
    noise: dict = dataclasses.field(default_factory=dict)
    # how far labels are to be trusted: "given" (the items' own, options.beside=["coherence"] of an .npz) or "corrupted"
    # (training labels are made wrong, the more often the less coherent); the network is told
    coherence: str = ""
    # these classes are the ends of an interpolant: of multimarginal, or, two of them, x0 and x1 of coupling=paired
    classes: list = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class ProcessConfig:
    """The forward corruption."""

    # of tokens: masked, uniform, marginal, hybrid, kernel, spindle, symbol_polynomial, discretized_gaussian, thinning,
    # glauber; of values: gaussian, learned_variance, learned_gaussian (DiffEnc, NDM, NFDM), pfgm, interpolant,
    # blurring, shortest_path, linear_sde, critically_damped, geometric, reflected, bridge_mixture (GruM),
    # mixture_output and soft_mixture (SMD), adaptive_gaussian (MuLAN with its latent), barycentric (several marginals);
    # of several parts (tables of numbers and symbols): product
    name: str = "masked"
    # linear, polynomial, cosine, log_linear, geometric; for values vp_linear, vp_cosine, sub_vp, ve, edm, cond_ot,
    # trigonometric, polynomial_path, linear_vp, log_snr_linear, laplace, sigmoid, ddpm_linear, ddpm_cosine, shifted,
    # ou_bridge (bridge_mixture's), and monotone and per_site, which the objective learned_elbo trains
    schedule: str = "linear"
    schedule_options: dict = dataclasses.field(default_factory=dict)
    data_std: float = 1.0  # of values: their standard deviation
    # of the process: smoothing, probabilities, uniform_share, generator and its own, absorb, strength, power, ...;
    # pfgm: D; interpolant: path (straight, trigonometric, residual), noise (scale, start, end, or left out),
    # correlation (markov, deterministic, accumulating), source_std (None where x1 comes with the data); barycentric:
    # marginals, first, last; learned_gaussian: gate (elapsed, noise_share), outputs (1 or 2), width, seed; blurring:
    # blur, floor; shortest_path: power, offset; linear_sde: noise, rotation, data, scale, start; critically_damped:
    # mass, start; product: symbols (a process of tokens, and its options), symbols_schedule; geometric: growth;
    # mixture_output: components; soft_mixture: latent, draws; adaptive_gaussian: bits,
    # ones, width, seed, log_snr_max, log_snr_min
    options: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class DenoiserConfig:
    """The network."""

    name: str = "dit"  # of names.DENOISERS: dit, text, unet, edm2, uvit, dico, state_space, ...
    # what it predicts: posterior, cavity, ratio, deaths; x0, noise, score, velocity, v, edm; encoded
    # (learned_gaussian); hyvarinen (geometric); of an interpolant x0, x1, noise, score, velocity, residual, and where
    # it has noise pairs such as velocity+noise; ends (barycentric); of a product one for its numbers and one for its
    # symbols, noise+posterior
    kind: str = "posterior"
    # constructor arguments: width, depth, heads, dropout, label_noise (dit: CEP), time, block (text), dtype, scan,
    # remat, ...; and shared_times, a dict of until and parts: one time for each part of the first times (E-TSDM);
    # coherence_levels: with data.coherence, labels at so many levels of it instead of a number beside the label;
    # truncated_logistic: True for tokens with an order, a centre and a width for each site (D3PM);
    # size: a name of denoisers.sizes, which stands for several of these
    options: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised."""

    # elbo, any_order, cross_entropy, score_entropy, generalised_kl, d3pm_hybrid, ddpd, genmd4, glauber, duo,
    # block_elbo, grouped, diffusion_forcing, marginals; of values elbo, gaussian, learned_uncertainty, own_uncertainty,
    # adaptive, fokker_planck, contrastive_flow_matching, ddpm_hybrid, ambient, interpolant, multimarginal,
    # mixture_steps, soft_mixture; of a product elbo, tabddpm, digress, by_parts; with the process's parameters
    # learned_elbo, learned_process, adaptive_noise (adaptive_gaussian's)
    name: str = "elbo"
    condition_dropout: float = 0.1  # chance that an example's label is hidden, for classifier-free guidance
    # tabddpm: t_range, or steps and end; digress: edges; by_parts: losses, weights, and as tabddpm;
    # elbo: t_range, or steps and end (of a chain), weighting (clipped, dynamic) and w_max; cross_entropy: at;
    # genmd4: every; marginals: weight; d3pm_hybrid: steps, ce_weight; block_elbo: clip; duo: tau, log_snr, top;
    # grouped: numbers (of steps); diffusion_forcing: t_range, frame_axes; gaussian, learned_uncertainty,
    # own_uncertainty: error, weighting, density and their arguments; fokker_planck: these and weight; learned_process:
    # t_range, curvature; adaptive_noise: draws, t_range;
    # elbo, gaussian: uniforms (stratified, antithetic, independent: how times are spread over a batch);
    # mixture_steps, soft_mixture: steps, end; multimarginal: concentration; interpolant: error, density, coupling
    # (independent; transported and group; and with x1 from the data paired, coarse and factor, blurred and width, holes
    # and share, patch, fill: each with show, whether the network sees x1, the last three with std, of noise added)
    options: dict = dataclasses.field(default_factory=dict)
    # a trained network that this one learns from beside it: path (of a run, or published weights), prediction and
    # variance, weights of its distances (`denoisers.taught`)
    teacher: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """How parameters follow their gradients."""

    name: str = "adamw"  # adamw, adafactor, lion (a lower rate, b2=0.99), muon (adamw outside the blocks)
    learning_rate: float = 1e-3
    schedule: str = "cosine"  # after the warm-up: cosine, linear, constant
    warmup: int = 100  # steps
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    clip: float = 1.0  # largest gradient norm
    moments: str = "float32"  # of the first moment: float32, bfloat16
    # pairs of a regular expression and a factor: the learning rate of parameters whose path has it; the first that fits
    groups: list = dataclasses.field(default_factory=list)
    project: str = ""  # what the network's parameters become after each update: edm2 (kernels normalised)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop. Intervals are in steps; 0 means never."""

    steps: int = 2000
    batch_size: int = 64  # examples in a step, over all devices and microbatches
    accumulate: int = 1  # microbatches in a step
    ema: float = 0.999  # final decay of the parameters' moving average
    seed: int = 0
    # parameters to begin with: path (of a run, or published weights), but (a regular expression: what is found in their
    # paths stays new; default attention, `denoisers.inherited`)
    inherit: dict = dataclasses.field(default_factory=dict)
    # axis: size; -1 is all that is left. data: rows of the batch; fsdp: rows, and every large parameter in pieces;
    # tensor: heads and hidden units; sequence: sites; expert: rows, and the experts of denoiser.options.mlp="experts"
    mesh: dict = dataclasses.field(default_factory=lambda: {"data": -1})
    ema_memory: str = "device"  # where the moving average lives between steps: device, or host (pinned memory)
    log_every: int = 50
    eval_every: int = 0
    sample_every: int = 0
    checkpoint_every: int = 500
    keep: int = 2  # checkpoints, the latest
    keep_best: bool = True  # and the one with the lowest bound of those evaluated (eval_every), saved when it is found
    prefetch: int = 2  # batches loaded ahead
    workers: int = 0  # processes that load, each prefetch batches ahead; 0: threads of this one
    device_prefetch: int = 1  # batches copied to the devices ahead
    # a step whose loss or gradient is not finite, or whose loss is a spike: stop; skip (its update is left out);
    # roll_back (to the newest checkpoint, and on with the batches after the bad one)
    on_bad_step: str = "stop"
    spike: float = 0.0  # standard deviations above the mean of the last 100 good losses that make one; 0: none is
    bad_steps: int = 10  # so many skipped in a row, or returns to one checkpoint, and the run stops
    profile: list = dataclasses.field(default_factory=list)  # numbers of steps to trace, into WORKDIR/profile
    heartbeat_every: float = 10.0  # seconds between two of WORKDIR/heartbeat.json; 0: none
    notices: str = ""  # gce: the metadata server is asked whether the machine will be taken away; then as on SIGTERM
    tensorboard: bool = False  # needs ddjax[tensorboard]
    wandb: str = ""  # project; needs ddjax[wandb]


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """How samples are drawn, unless asked otherwise."""

    num: int = 64
    # ancestral; of values ddim, heun, euler, heun_in_noise, bogacki_shampine, rk4, rk45 (adaptive, whatever the steps,
    # with the options rtol and atol), dpm_solver, dpm_solver_pp,
    # dpm_solver_pp_singlestep, dpm_solver_multistep, unipc, deis, lms, adams_bashforth, ipndm, pndm, plms,
    # gradient_estimation, ghvb, flow_turbo (blocks of H and P); random ones sde_dpm_solver_pp, sa_solver,
    # dpm_solver_pp_2s_ancestral, edm_stochastic, edm_restart, euler_maruyama, predictor_corrector; with another solver
    # inside, and its options, teleport (at, law: a file, left out for that of the training data), redi (base: a file,
    # neighbours), levenberg_marquardt (damping, memory, form), momentum (beta, form, nesterov, predictor, rescaled);
    # preconditioned_langevin (law, size, steps, damping); folded_heun (reflected); given_latent (adaptive_gaussian),
    # with the option solver; fresh_latent (soft_mixture); resampled (RePaint, of known sites): solver, rounds
    # of a product parts, with the option solvers_of, a dict of solvers by the part's name (default ancestral)
    # of any states nested (a whole sample at every step): solver and its options, inner_steps (a number, or one for
    # each step), inner_grid, outer; denoising_chain: back (times) and rounds
    # of tokens euler, tweedie, tau_leaping, flow_euler, campbell, gibbs, psi; masks: unmask, with the options order
    # (random, confidence, left_to_right, local, planner) and its own; path_planning, first_hitting, remasking; masks
    # and uniform noise: gillespie, planned_steps; noise among symbols: self_correction; glauber (glauber); counts
    # (thinning): binomial_bridge, poisson_bridge
    # reuse (masks): sites (the network's, run in a cheap pass), every, solver and its options; grouped (masks, trained
    # so): order (local, random, left_to_right) and its own, keep
    solver: str = "ancestral"
    solver_options: dict = dataclasses.field(default_factory=dict)
    # spare network calls that change nothing: of a network without time where an example has not changed, of one in
    # blocks on the blocks that are done
    cache: bool = False
    steps: int = 64  # of all blocks together, where the network has blocks
    # uniform, cosine, karras, uniform_log_snr, log_linear, loss_aware, exponential, quadratic, of_table, beta, through,
    # uniform_shifted
    grid: str = "uniform"
    grid_options: dict = dataclasses.field(default_factory=dict)
    guidance: float = 1.0  # classifier-free scale; 1 is off
    # with data.coherence: that of the samples, and that which guidance leads away from
    coherence: list = dataclasses.field(default_factory=lambda: [1.0, 0.0])
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """How bounds and likelihoods are estimated."""

    num_times: int = 32  # times per example
    steps: int = 64  # of the ODE (ddjax eval --likelihood ode)
    probes: int = 8  # of its divergence
    batch_size: int = 100
    max_examples: int = 0  # 0: the whole split
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Config:
    """One experiment."""

    data: DataConfig = DataConfig()
    process: ProcessConfig = ProcessConfig()
    denoiser: DenoiserConfig = DenoiserConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()
    eval: EvalConfig = EvalConfig()


# Keys that may differ when a run is continued: they change neither the parameters' path nor their meaning.
# (`train.steps` does stretch a learning-rate decay that is still under way.)
CHANGEABLE = (
    *("train.steps", "train.log_every", "train.eval_every", "train.sample_every", "train.checkpoint_every"),
    *(
        "train.keep",
        "train.keep_best",
        "train.prefetch",
        "train.workers",
        "train.device_prefetch",
        "train.mesh",
        "train.ema_memory",
        "train.on_bad_step",
        "train.spike",
        "train.bad_steps",
        "train.profile",
        "train.heartbeat_every",
        "train.notices",
        "train.tensorboard",
        "train.wandb",
        "sample",
        "eval",
    ),
)


def default() -> ConfigDict:
    """Every key at its default, ready to be changed."""
    return ConfigDict(dataclasses.asdict(Config()))


def typed(values: Mapping[str, Any] | ConfigDict) -> Config:
    """A frozen `Config` from nested dicts. Raises ConfigError on an unknown key or a wrong type."""
    values = values.to_dict() if isinstance(values, ConfigDict) else values
    return _typed(Config, values, "config")


def _typed(cls: type, values: Mapping[str, Any], path: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path} must hold keys and values, got {values!r}")
    types = typing.get_type_hints(cls)
    known = {}
    for key, value in values.items():
        if key not in types:
            near = difflib.get_close_matches(key, types, n=1, cutoff=0.5)
            hint = f"did you mean {path}.{near[0]}?" if near else f"it has {', '.join(types)}"
            raise ConfigError(f"unknown config key {path}.{key}; {hint}")
        known[key] = _value(types[key], value, f"{path}.{key}")
    return cls(**known)


def _value(kind: type, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _typed(kind, value, path)
    if kind is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} must be a dict, got {value!r}")
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{path} must hold plain numbers, texts, lists and dicts, got {value!r}") from error
        return dict(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{path} must be of type {kind.__name__}, got {value!r}")
    return value


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file and apply overrides such as `--config.train.steps=100`.

    Values are read by the key's type; inside an `options` dict, which may be given new keys, as Python literals or
    else as text.
    Raises ConfigError for an unknown key (naming the nearest), a value of the wrong type, or a file that fails or
    has no `get_config`; FileNotFoundError where there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no config file at {path} (configs/ of the repository has some)")
    return _overridden(_read(path), overrides)


def overridden(config: Config, overrides: Sequence[str]) -> Config:
    """The config with overrides applied, as `load` does. Raises ConfigError as it does."""
    return _overridden(to_dict(config), overrides)


def _overridden(values: dict[str, Any], overrides: Sequence[str]) -> Config:
    for override in overrides:
        _override(values, override)
    return typed(values)


def _read(path: Path) -> dict[str, Any]:
    """What `get_config()` of the file gives, as nested dicts. Errors of the file are told by their line in it."""
    try:
        scope = runpy.run_path(str(path), run_name="config")
        if "get_config" not in scope:
            raise ConfigError(f"{path} must define get_config()")
        config = scope["get_config"]()
    except ConfigError:
        raise
    except SyntaxError as error:
        raise ConfigError(f"{path}, line {error.lineno}: {error.msg}") from error
    except Exception as error:  # a config file is a program; whatever it raises is about it
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"{path}, line {lines[-1]}" if lines else str(path)
        text = " ".join(str(error.args[0] if error.args else error).split())
        raise ConfigError(f"{where}: {type(error).__name__}: {text}") from error
    if not isinstance(config, ConfigDict | Mapping):
        raise ConfigError(
            f"{path}: get_config() must return a config, begun with ddjax.config.default(), not {config!r}"
        )
    return config.to_dict() if isinstance(config, ConfigDict) else dict(config)


def _override(values: dict[str, Any], text: str) -> None:
    """Put `--config.a.b=value` into nested dicts; `typed` finds keys that do not exist."""
    key, given, raw = text.removeprefix("--").partition("=")
    if not given:
        raise ConfigError(f"--{key} needs a value, as in --{key}=1")
    *parents, last = key.split(".")[1:]
    kind: Any = Config
    for name in (*parents, last):
        kind = typing.get_type_hints(kind).get(name) if dataclasses.is_dataclass(kind) else None
    for name in parents:
        if not isinstance(values.setdefault(name, {}), dict):
            raise ConfigError(f"--{key}: config has no keys under {name!r}")
        values = values[name]
    values[last] = _parsed(kind, raw, key)


def _parsed(kind: Any, raw: str, key: str) -> Any:
    if kind is str:
        return raw
    if kind is bool and raw.lower() in ("true", "false"):
        return raw.lower() == "true"
    try:
        return kind(raw) if kind in (int, float) else ast.literal_eval(raw)
    except (ValueError, SyntaxError):
        if kind is None or dataclasses.is_dataclass(kind):  # an option, which may be text; or `typed` refuses it
            return raw
    raise ConfigError(f"{key} must be of type {kind.__name__}, got {raw!r}")


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain dicts, as JSON would give them back (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The keys whose values differ and may not, as lines `key: old -> new`."""
    lines = []

    def compare(a: Any, b: Any, path: str) -> None:
        if path in CHANGEABLE or a == b:
            return
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            for key in sorted({*a, *b}):
                compare(a.get(key), b.get(key), f"{path}.{key}" if path else key)
        else:
            lines.append(f"{path}: {a!r} -> {b!r}")

    compare(old, new, "")
    return lines
