"""From a config to objects. What its names stand for is in `ddjax.names`."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from ddjax import (
    companions,
    denoisers,
    grids,
    guidance,
    likelihood,
    names,
    naming,
    objective_names,
    objectives,
    processes,
    random,
    solvers,
)
from ddjax import data as datasets
from ddjax.config import Config, ConfigError, ProcessConfig
from ddjax.data.dataset import Dataset
from ddjax.loading import load_data as load_data
from ddjax.networks import network, output_shape, state_shape, takes
from ddjax.objectives.base import Objective
from ddjax.predictions import TwoHeads, bind, planned
from ddjax.rehearsal import rehearse
from ddjax.sampling import Observed
from ddjax.symmetric import pairs
from ddjax.training import Ema, optimizer
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
        """The condition that means "none"; None for data without labels and conditions."""
        return datasets.conditions.nulls(self.data)

    @property
    def sites(self) -> int:
        """Sites of one example: what bits per dimension divide by."""
        shapes = self.data.shape.values() if self.data.parts else [self.data.shape]
        return sum(map(math.prod, shapes))

    @property
    def block(self) -> int | None:
        """Sites in a block of a network that goes block by block (texts); None for the others."""
        return self.config.denoiser.options.get("block") if takes(self.config) == "texts" else None

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

    def to_sample(self, key: Array, rows: Array, cond: Any, x1: Any = None) -> Any:
        """The condition to sample these rows with.

        With the latent, drawn first, where the process has one; with the coherence to sample at; with x1, the ends that
        sampling starts from, where the network is shown them.
        """
        if cond is not None and self.config.data.coherence:
            cond = objectives.AtCoherence(self.config.sample.coherence[0])(cond)
        if getattr(self.coupling, "show", False):
            cond = {"x1": x1, "cond": cond}
        if (size := self.sizes(key, rows)) is not None:
            cond = {"size": size, "cond": cond}
        if not hasattr(self.process, "latents"):
            return cond
        keys = random.example_keys(jax.random.fold_in(key, 2**31 - 1), rows)  # a number that no row has
        return {"z": self.process.latents(len(rows)).sample(keys), "cond": cond}

    def sizes(self, key: Array, rows: Array) -> Array | None:
        """How many nodes these samples of graphs have, drawn as often as they occur in the training data.

        None where the data are no graphs of several sizes.
        """
        if self.data.sizes is None:
            return None
        keys = random.example_keys(jax.random.fold_in(key, 2**31 - 4), rows)  # a number that no row has
        ends = jnp.cumsum(jnp.asarray(self.data.sizes / self.data.sizes.sum(), jnp.float32))
        drawn = jnp.searchsorted(ends, random.uniform(keys), side="right")
        return jnp.minimum(drawn, int(np.flatnonzero(self.data.sizes)[-1])).astype(jnp.int32)

    def absent(self, size: Array) -> Any:
        """Sites of nodes that graphs of these sizes do not have, as known to be 0."""
        absent = jnp.arange(len(self.data.sizes) - 1) >= size[:, None]
        i, j = pairs(absent.shape[1])
        masks = {"nodes": absent, "edges": absent[:, i] | absent[:, j]}
        mask = {name: masks[name] for name in self.data.shape}
        return Observed(mask, jax.tree.map(lambda m: jnp.zeros(m.shape, jnp.int32), mask))

    @property
    def state_shape(self) -> tuple[int, ...]:
        """The shape of one state: that of the data, or longer where the process adds variables to them."""
        return state_shape(self.process, self.data.shape)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """The shape of what the network says of one continuous example."""
        return output_shape(self.process, self.data.shape, self.kind)

    def batch_shape(self, n: int) -> Any:
        """The shape of n states, `(n, *sites)`, or that of each part."""
        if isinstance(self.state_shape, Mapping):
            return {name: (n, *shape) for name, shape in self.state_shape.items()}
        return (n, *self.state_shape)

    def clean(self, xt: Array) -> Array:
        """The data in a state."""
        return self.process.clean(xt) if hasattr(self.process, "clean") else xt

    @property
    def named(self) -> objective_names.Named:
        """What the config says of the objective's name."""
        return naming.pick(objective_names.OBJECTIVES, self.config.objective.name, "config.objective.name")

    def _objective_options(self) -> dict[str, Any]:
        """The objective's options, with objects in the place of names."""
        options, key = dict(self.config.objective.options), "config.objective.options"
        for option, table in self.named.tables.items():
            if option in options:
                naming.make_option(table, option, options, key, self.process)
        if "steps" in options:
            options["times"] = tuple(np.linspace(1.0, options.pop("end", 0.0), options.pop("steps") + 1).tolist())
        return options

    def objective(self) -> Objective:
        """The training objective, with condition dropout for labelled data, teacher forced for blocks."""
        c, named, options = self.config.objective, self.named, self._objective_options()
        own = inspect.signature(named.make).parameters
        if "reconstruction" in own:
            options["reconstruction"] = self.reconstruction()
        if "block" in own:
            if self.block is None:
                raise ConfigError(
                    f"config.objective.name={c.name!r} is for networks in blocks: set config.denoiser.options.block"
                )
            options["block"] = self.block
        made = {c.name: named.make}
        objective = naming.make(made, c.name, "config.objective.name", self.process, self.kind, **options)
        if self.block is not None and "block" not in own:  # the others force the teacher's hand themselves
            objective = objectives.teacher_forced(objective)
        return (
            objectives.with_condition_dropout(objective, c.condition_dropout, self.null)
            if self.null is not None
            else objective
        )

    @functools.cached_property
    def coupling(self) -> Any:
        """How the objective pairs the ends of an interpolant; None where it does not."""
        return self._objective_options().get("coupling")

    def batches(self, data: Dataset, *, process_index: int = 0, process_count: int = 1) -> Any:
        """The training batches of one process (`data.batches`), with what the config asks for beside the items.

        Raises ConfigError for data that do not have it.
        """
        return companions.batches(self, data, process_index, process_count)

    @property
    def learns_process(self) -> bool:
        """Whether the process has parameters that train with the network."""
        return self.named.learns_process

    def trained(self, params: Params) -> tuple[Experiment, Params]:
        """What samples and scores when training is done, and the network's parameters, from those that were trained.

        Parameters of the process go into the process, those of the objective and a planner's head are cut off
        (`denoiser` gives the planner to solvers).
        """
        experiment = self
        if self.learns_process:
            process = self.process.with_parameters(jax.tree.map(np.asarray, params["process"]))
            experiment, params = dataclasses.replace(experiment, process=process), params["network"]
        if self.named.parameters is not None:
            params = params["network"]
        if heads := self.named.heads:
            experiment = dataclasses.replace(experiment, apply=denoisers.outputs.FirstHeads(self.apply, heads))
        return experiment, params

    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer over `train.steps` steps."""
        options, steps = dataclasses.asdict(self.config.optimizer), self.config.train.steps
        options["project"] = self._projection(options["project"])
        return optimizer(steps=steps, **options | {"warmup": min(options["warmup"], steps)})  # a trial run may be short

    def _projection(self, name: str) -> Callable[[Params], Params] | None:
        """Of the network's parameters, among those that are trained."""
        if not name:
            return None
        project = naming.pick(names.PROJECTIONS, name, "config.optimizer.project")
        if not self.learns_process and self.named.parameters is None:
            return project
        return lambda params: {**params, "network": project(params["network"])}

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
        log_snr = -2.0 * math.log(self._spacing / 8.0)
        return max(low, float(self.process.schedule.common.time(jnp.float32(log_snr)))), high

    @property
    def _spacing(self) -> float:
        """The least distance between levels, where noise is added to them."""
        places = getattr(self.process, "coordinates", np.asarray)(self.data.levels)
        return float(np.diff(places).min())

    def reconstruction(self) -> Any:
        """The bound's decoder: for data with known levels a probability of these, else the process's own density.

        Levels are told from x_low by the site (`binned`); where the process mixes sites, from the network's x_0, with
        the width at which the bound begins (`t_range`).
        """
        if (levels := self.data.levels) is None:
            return None
        if getattr(self.process, "sitewise", True):
            return likelihood.binned(levels)
        return likelihood.discretised(levels, std=self._spacing / 8.0)

    def solver(self, name: str | None = None, **options: Any) -> Any:
        """The sampler's step, by name; default that of the config."""
        c = self.config.sample
        options = options if name is not None else {**c.solver_options, **options}
        options = companions.with_law(self, name or c.solver, options)
        made = naming.make(names.SOLVERS, name or c.solver, "config.sample.solver", self.sampling_process, **options)
        return self._cached(made) if c.cache else made

    law = functools.cached_property(companions.fitted_law)  # of the training data, when it is first asked for

    def _cached(self, solver: Any) -> Any:
        """`solver`, without the network calls that can be spared."""
        options = self.config.denoiser.options
        timed = options.get("time", True) or self.kind not in ("posterior", "cavity")
        if timed and self.block is None:
            raise ConfigError(
                "config.sample.cache keeps predictions while nothing changes, but this network is told the time: set "
                "config.denoiser.options.time=False (kind posterior or cavity), or config.sample.cache=False"
            )
        if isinstance(solver, solvers.Reuse | solvers.Grouped):
            raise ConfigError(
                f"config.sample.cache keeps predictions, and {type(solver).__name__} runs the network for features "
                "beside them: set config.sample.cache=False"
            )
        if self.block is not None and options.get("scan"):
            raise ConfigError("config.sample.cache taps keys and values: it needs config.denoiser.options.scan=False")
        solver = solver if timed else solvers.Cached(solver)
        return solver if self.block is None else solvers.KeyValues(solver)

    def times(self, steps: int | None = None) -> Array:
        """The sampler's grid; where the network goes block by block, that of all blocks, each with as many steps."""
        c = self.config.sample
        count = c.steps if steps is None else steps
        if count % self.blocks:
            raise ConfigError(
                f"config.sample.steps={count} must be a multiple of the {self.blocks} blocks, one after the other"
            )
        count //= self.blocks
        times = names.grid(self.process, c.grid, "config.sample.grid", steps=count, **c.grid_options)
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
        if self.config.data.coherence:
            return guidance.contrasted(denoise, objectives.AtCoherence(self.config.sample.coherence[1]), scale=scale)
        return guidance.classifier_free(denoise, null=self.null, scale=scale)

    def denoiser(self, params: Params, scale: float, cond: Any) -> Denoise:
        """The network as solvers call it: guided, and with its planner where it was trained with one.

        Guidance is the denoiser's: the planner is asked under the condition alone.
        """
        denoise = bind(self.apply, params, self.sampling_process, self.kind)
        guided = self.guided(denoise, scale, cond)
        if not isinstance(self.apply, denoisers.outputs.FirstHeads) or not self.named.planner:
            return guided
        heads = TwoHeads(bind(self.apply.apply, params, self.sampling_process, self.kind))
        return heads if guided is denoise else planned(guided, heads.planner)


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
    init, apply = network(config, data, process)
    named = naming.pick(objective_names.OBJECTIVES, config.objective.name, "config.objective.name")
    if named.learns_process:
        if getattr(process, "parameters", None) is None:
            raise ConfigError(
                f"config.objective.name={config.objective.name!r} learns the process, but "
                f"config.process.name={config.process.name!r} has nothing to learn"
            )
        init = functools.partial(_with, init, "process", lambda: process.parameters)
    if named.parameters is not None:
        init = functools.partial(_with, init, "objective", named.parameters)
    experiment = Experiment(config, data, process, init, apply)
    if experiment.block is not None and hasattr(process, "times"):
        raise ConfigError(
            f"config.denoiser.options.block goes with processes in continuous time, not with {config.process.name!r}"
        )
    if config.train.eval_every and not getattr(process, "has_bound", True):
        raise ConfigError(
            f"config.train.eval_every={config.train.eval_every}: the process {config.process.name!r} has no bound to "
            "evaluate; set it to 0"
        )
    experiment.times()  # what is wrong is an error now, not after training
    if process.state == "gaussian":
        rehearse(experiment)
    else:
        experiment.objective(), experiment.solver()
    return experiment


def _with(init: Callable[[Array], Params], name: str, parameters: Callable[[], Params], key: Array) -> Params:
    return {"network": init(key), name: parameters()}


def _process(config: Config, data: Dataset) -> tuple[Any, Dataset]:
    """The process, and the data with what had to be found out about them."""
    c = config.process
    given = {"shape": data.shape, "data_std": c.data_std}
    make_schedule = naming.pick(names.SCHEDULES, c.schedule, "config.process.schedule")
    own = naming.taken(make_schedule, given)
    schedule = naming.make(names.SCHEDULES, c.schedule, "config.process.schedule", **own, **c.schedule_options)
    make_process = naming.pick(names.PROCESSES, c.name, "config.process.name")
    takes = inspect.signature(make_process).parameters
    if ("parts" in takes) != data.parts:
        wants, has = ("several parts", "of one") if "parts" in takes else ("one part", "of several")
        raise ConfigError(
            f"config.process.name={c.name!r} is for states of {wants}, but the data {data.name!r} are {has}; "
            f"config.process.name='product' has a process for each part"
        )
    categorical = "num_symbols" in takes
    if categorical != (data.num_symbols is not None):
        wants, has = ("tokens", "continuous values") if categorical else ("continuous values", "tokens")
        raise ConfigError(
            f"config.process.name={c.name!r} corrupts {wants}, but the data {data.name!r} are {has}; "
            f"set config.data.tokens={categorical}"
        )
    if "schedule" not in takes and c.schedule != ProcessConfig.schedule:
        raise ConfigError(f"config.process.schedule={c.schedule!r}: the process {c.name!r} has a schedule of its own")
    if "counts" in takes:
        data = datasets.count_symbols(data)
    given |= {"num_symbols": data.num_symbols, "counts": data.counts, "schedule": schedule, "parts": True}
    options = naming.taken(make_process, given)
    if clash := options.keys() & c.options.keys():
        raise ConfigError(f"config.process.options: {min(clash)!r} is not an option: it comes from the data")
    process = naming.make(names.PROCESSES, c.name, "config.process.options", **options, **c.options)
    _check_values(config, data, process)
    return process, data


def _check_values(config: Config, data: Dataset, process: Any) -> None:
    """Raise ConfigError where the process is not for such values as the data's levels, or their first items."""
    if not hasattr(process, "check_data"):
        return
    values = data[:64]["x0"] if data.levels is None and len(data) else data.levels
    if values is not None:
        try:
            process.check_data(values)
        except ValueError as error:
            raise ConfigError(
                f"config.process.name={config.process.name!r}: {error}; config.data.interval maps [-1, 1] onto another "
                "interval"
            ) from error
