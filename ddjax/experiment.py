"""From a config to objects. What its names stand for is in `ddjax.names`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from ddjax import data as datasets
from ddjax import denoisers, grids, guidance, likelihood, names, objectives, processes
from ddjax.config import Config, ConfigError, ProcessConfig
from ddjax.data.dataset import Dataset
from ddjax.objectives.base import Objective
from ddjax.predictions import COUNT_KINDS, STATE_KINDS, Prediction
from ddjax.training import Ema, adamw
from ddjax.types import Apply, Denoise, Params


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a config means, on data of a given shape. Nothing here is trained, nothing is on disk."""

    config: Config
    data: Dataset  # shapes, symbols and display; its items are not read
    process: Any
    init: Callable[[Array], Params]
    apply: Apply

    @property
    def kind(self) -> str:
        """What the network predicts."""
        return self.config.denoiser.kind

    @property
    def null(self) -> Any:
        """The condition that means "none"; None for unlabelled data."""
        return jnp.int32(self.data.num_classes) if self.data.num_classes else None

    @property
    def sites(self) -> int:
        """Sites of one example: what bits per dimension divide by."""
        return int(functools.reduce(lambda a, b: a * b, self.data.shape, 1))

    @property
    def block(self) -> int | None:
        """Sites in a block of a network that goes block by block (texts); None for the others."""
        return self.config.denoiser.options.get("block")

    @property
    def blocks(self) -> int:
        """How many blocks are drawn one after the other."""
        return 1 if self.block is None else -(-self.sites // self.block)

    @property
    def sampling_process(self) -> Any:
        """What samples are drawn from: the process, block by block where the network goes so."""
        return self.process if self.block is None else processes.in_blocks(self.process, self.sites, self.block)

    def shown(self, x0: Array, cond: Any) -> Any:
        """The condition under which the network is trained and scored on x0."""
        return cond if self.block is None else objectives.with_clean(x0, cond)

    def objective(self) -> Objective:
        """The training objective, with condition dropout for labelled data, teacher forced for blocks."""
        c = self.config.objective
        options, key = dict(c.options), "config.objective.options"
        if "weighting" in options and c.name in names.WEIGHTINGS:
            table, name = names.WEIGHTINGS[c.name], options["weighting"]
            taken = inspect.signature(names.pick(table, name, f"{key}.weighting")).parameters
            process = {"process": self.process} if "process" in taken else {}
            options["weighting"] = names.make(table, name, options, f"{key}.weighting", **process)
        if "density" in options:
            options["density"] = names.make(
                names.DENSITIES, options["density"], options, f"{key}.density", self.process
            )
        if "steps" in options:
            options["times"] = tuple(np.linspace(1.0, 0.0, options.pop("steps") + 1).tolist())
        if c.name == "learned_elbo":
            options["reconstruction"] = self.reconstruction()
        if c.name == "block_elbo":
            if self.block is None:
                raise ConfigError(
                    "config.objective.name='block_elbo' is for networks in blocks: set config.denoiser.options.block"
                )
            options["block"] = self.block
        objective = names.make(
            names.OBJECTIVES, c.name, None, "config.objective.name", self.process, self.kind, **options
        )
        if self.block is not None and c.name != "block_elbo":  # which does so itself
            objective = objectives.teacher_forced(objective)
        return (
            objectives.with_condition_dropout(objective, c.condition_dropout, self.null)
            if self.null is not None
            else objective
        )

    @property
    def learns_process(self) -> bool:
        """Whether the process has parameters that train with the network."""
        return self.config.objective.name in names.LEARN_PROCESS

    def trained(self, params: Params) -> tuple[Experiment, Params]:
        """What samples and scores when training is done, and the network's parameters, from those that were trained.

        Parameters of the process go into the process, those of the objective and a planner's head are cut off.
        """
        experiment = self
        if self.learns_process:
            process = self.process.with_parameters(jax.tree.map(np.asarray, params["process"]))
            experiment, params = dataclasses.replace(experiment, process=process), params["network"]
        if self.config.objective.name in names.OBJECTIVE_PARAMETERS:
            params = params["network"]
        if heads := names.EXTRA_HEADS.get(self.config.objective.name, 0):
            experiment = dataclasses.replace(experiment, apply=_FirstHeads(self.apply, heads))
        return experiment, params

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW over `train.steps` steps."""
        options, steps = dataclasses.asdict(self.config.optimizer), self.config.train.steps
        return adamw(steps=steps, **options | {"warmup": min(options["warmup"], steps)})  # a trial run may be short

    def ema(self) -> Ema:
        """The moving average of the parameters."""
        return Ema(self.config.train.ema)

    @property
    def t_range(self) -> tuple[float, float] | None:
        """The times a bound integrates: `process.t_range`, begun where a binned decoder can tell the levels apart.

        At a noise level of an eighth of the levels' spacing the decoder errs once in 30,000; below it the bound
        would only pay for the network's error where nothing is left to say. Any range gives a valid bound.
        """
        if hasattr(self.process, "times"):
            return None  # a chain: its bound is a sum over its steps
        low, high = self.process.t_range
        if self.data.levels is None:
            return low, high
        log_snr = -2.0 * math.log(float(np.diff(self.data.levels).min()) / 8.0)
        return max(low, float(self.process.schedule.common.time(jnp.float32(log_snr)))), high

    def reconstruction(self) -> Any:
        """The bound's decoder: bins for continuous data with known levels, else the process's own."""
        return likelihood.binned(self.data.levels) if self.data.levels is not None else None

    def solver(self, name: str | None = None, **options: Any) -> Any:
        """The sampler's step, by name; default that of the config."""
        c = self.config.sample
        options = options if name is not None else {**c.solver_options, **options}
        if (name or c.solver) in names.GAUSSIAN_SOLVERS and self.process.state != "gaussian":
            raise ConfigError(
                f"config.sample.solver={name or c.solver!r} is for the gaussian process, "
                f"not for {self.config.process.name!r}"
            )
        return names.make(
            names.SOLVERS, name or c.solver, None, "config.sample.solver", self.sampling_process, **options
        )

    def times(self, steps: int | None = None) -> Array:
        """The sampler's grid; where the network goes block by block, that of all blocks, each with as many steps."""
        c = self.config.sample
        if c.grid == "karras" and self.process.state != "gaussian":
            raise ConfigError(
                f"config.sample.grid='karras' is for the gaussian process, not for {self.config.process.name!r}"
            )
        first = (self.process.schedule.common,) if c.grid in ("karras", "uniform_log_snr") else ()
        count = c.steps if steps is None else steps
        if count % self.blocks:
            raise ConfigError(
                f"config.sample.steps={count} must be a multiple of the {self.blocks} blocks, one after the other"
            )
        count //= self.blocks
        times = names.make(names.GRIDS, c.grid, None, "config.sample.grid", *first, steps=count, **c.grid_options)
        if not (np.diff(np.asarray(times)) < 0).all():
            raise ConfigError(
                f"config.sample.grid={c.grid!r} repeats times under "
                f"config.process.schedule={self.config.process.schedule!r}: it leaves the schedule's noise levels; "
                "see config.sample.grid_options"
            )
        try:
            return times if self.block is None else grids.in_turn(times, self.blocks)
        except ValueError as error:
            raise ConfigError(f"config.sample.grid={c.grid!r}: {error}") from error

    def guided(self, denoise: Denoise, scale: float, cond: Any) -> Denoise:
        """`denoise` under classifier-free guidance, where there is a condition to guide towards."""
        if cond is None:
            return denoise
        return guidance.classifier_free(denoise, null=self.null, scale=scale)


def load_data(config: Config, split: str) -> Dataset:
    """A split of the config's data.

    Raises what `ddjax.data.load` raises, and ConfigError for options that do not fit.
    """
    c = config.data
    if clash := {"tokens", "split"} & set(c.options):
        raise ConfigError(
            f"config.data.options: {min(clash)!r} is not an option; "
            "there are config.data.tokens and config.data.eval_split"
        )
    try:
        return datasets.load(c.name, split, tokens=c.tokens, **c.options)
    except TypeError as error:
        raise ConfigError(f"config.data.options: {error}") from error


def build(config: Config, data: Dataset) -> Experiment:
    """Make the process and the network that a config names, for data of this shape.

    Raises ConfigError naming the key whose value cannot be used.
    """
    process, data = _process(config, data)
    if config.denoiser.kind not in process.kinds:
        raise ConfigError(
            f"config.denoiser.kind={config.denoiser.kind!r}: the process {config.process.name!r} takes one of "
            f"{', '.join(process.kinds)}"
        )
    init, apply = _network(config, data, process)
    if config.objective.name in names.LEARN_PROCESS:
        if not hasattr(process, "parameters"):
            raise ConfigError(
                f"config.objective.name={config.objective.name!r} learns the process, but "
                f"config.process.name={config.process.name!r} has nothing to learn"
            )
        init = functools.partial(_with, init, "process", lambda: process.parameters)
    if config.objective.name in names.OBJECTIVE_PARAMETERS:
        init = functools.partial(_with, init, "objective", names.OBJECTIVE_PARAMETERS[config.objective.name])
    experiment = Experiment(config, data, process, init, apply)
    if experiment.block is not None and hasattr(process, "times"):
        raise ConfigError(
            f"config.denoiser.options.block goes with processes in continuous time, not with {config.process.name!r}"
        )
    experiment.objective(), experiment.solver(), experiment.times()  # a wrong name is an error now, not after training
    return experiment


@dataclasses.dataclass(frozen=True)
class _FirstHeads:
    """A network without its last outputs."""

    apply: Apply
    dropped: int

    def __call__(self, *args: Any, **kwargs: Any) -> Array:
        return self.apply(*args, **kwargs)[..., : -self.dropped]


@dataclasses.dataclass(frozen=True)
class _Ratios:
    """A network whose output 0 says the ratios of data uniform over symbols, at all times.

    The authors of score entropy add the same to theirs, up to a constant (Lou et al. 2024, section 5.1 and code).
    """

    apply: Apply
    process: Any

    def __call__(self, params: Params, xt: Array, t: Array, cond: Any = None, **options: Any) -> Array:
        output = self.apply(params, xt, t, cond, **options)
        nothing = Prediction(jnp.zeros((*xt.shape, self.process.num_symbols), output.dtype), "cavity")
        return output + self.process.convert(nothing, "ratio", xt, t).value


def _with(init: Callable[[Array], Params], name: str, parameters: Callable[[], Params], key: Array) -> Params:
    return {"network": init(key), name: parameters()}


def _process(config: Config, data: Dataset) -> tuple[Any, Dataset]:
    """The process, and the data with what had to be found out about them."""
    c = config.process
    make_schedule = names.pick(names.SCHEDULES, c.schedule, "config.process.schedule")
    shape = {"shape": data.shape} if "shape" in inspect.signature(make_schedule).parameters else {}
    schedule = names.make(names.SCHEDULES, c.schedule, None, "config.process.schedule", **shape, **c.schedule_options)
    categorical = c.name not in names.GAUSSIAN_PROCESSES
    if c.name in names.PROCESSES and categorical != (data.num_symbols is not None):
        wants, has = ("tokens", "continuous values") if categorical else ("continuous values", "tokens")
        raise ConfigError(
            f"config.process.name={c.name!r} corrupts {wants}, but the data {data.name!r} are {has}; "
            f"set config.data.tokens={categorical}"
        )
    options = {"num_symbols": data.num_symbols} if categorical else {"data_std": c.data_std}
    taken = inspect.signature(names.pick(names.PROCESSES, c.name, "config.process.name")).parameters
    if "counts" in taken:
        data = datasets.count_symbols(data)
        options["counts"] = data.counts
    if "shape" in taken:
        options["shape"] = data.shape
    if "schedule" in taken:
        options["schedule"] = schedule
    elif c.schedule != ProcessConfig.schedule:
        raise ConfigError(f"config.process.schedule={c.schedule!r}: the process {c.name!r} has a schedule of its own")
    if clash := options.keys() & c.options.keys():
        raise ConfigError(f"config.process.options: {min(clash)!r} is not an option: it comes from the data")
    return names.make(names.PROCESSES, c.name, None, "config.process.options", **options, **c.options), data


def _network(config: Config, data: Dataset, process: Any) -> tuple[Callable, Apply]:
    c = config.denoiser
    options = dict(c.options)
    if "dtype" in options:
        options["dtype"] = names.pick(names.DTYPES, options["dtype"], "config.denoiser.options.dtype")
    if data.num_symbols is not None:
        numbers = process.num_states if c.kind in STATE_KINDS else process.num_symbols
        numbers = 1 if c.kind in COUNT_KINDS else numbers  # of each site
        numbers += names.EXTRA_HEADS.get(config.objective.name, 0)
        options |= {"symbols_in": process.num_states, "symbols_out": numbers}
    options |= {"num_classes": data.num_classes}
    if c.name == "text":
        if len(data.shape) != 1 or data.num_symbols is None:
            raise ConfigError(
                f"config.denoiser.name='text' is for token sequences, not for {data.name!r} of shape {data.shape}"
            )
        options["length"] = data.shape[0]
    else:
        if len(data.shape) != 3:
            raise ConfigError(
                f"config.denoiser.name={c.name!r} is for images, not for {data.name!r} of shape {data.shape}"
            )
        options["shape"] = data.shape
        if isinstance(process, processes.LearnedVariance):
            options["out_channels"] = 2 * data.shape[-1]  # the prediction and its variance
    network = names.pick(names.DENOISERS, c.name, "config.denoiser.name")
    names.check_options(network, options, "config.denoiser.options")

    def make(rngs):
        try:
            return network(**options, rngs=rngs)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"config.denoiser.options={c.options}: {error}") from error

    init, apply = denoisers.functional_init(make)
    return init, _Ratios(apply, process) if c.kind == "ratio" else apply
