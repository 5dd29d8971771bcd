"""What comes with a batch's items beside their labels, as a config asks for it: noise levels, coherence, other ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from ddjax import data as datasets
from ddjax import gaussian_law, names, naming, objective_names, random
from ddjax.config import Config, ConfigError
from ddjax.data.beside import PLAIN
from ddjax.data.dataset import Dataset
from ddjax.loading import load_data

if TYPE_CHECKING:
    from ddjax.experiment import Experiment

# Numbers that no row has, for streams of their own; `Experiment.to_sample` has 2**31 - 1.
_DEGRADE, _DEPART = 2**31 - 3, 2**31 - 2


def check_coherence(config: Config, data: Dataset, process: Any) -> None:
    """Raise ConfigError where a network cannot be told the coherence that the config asks for."""
    c = config.data.coherence
    if c not in ("", "given", "corrupted"):
        raise ConfigError(f"config.data.coherence={c!r} is unknown; it is one of given, corrupted, or empty")
    if c and not data.num_classes:
        raise ConfigError(f"config.data.coherence={c!r} is for labels, and the data {data.name!r} have none")
    if c and (hasattr(process, "latents") or hasattr(process, "points")):
        raise ConfigError(f"config.data.coherence={c!r} does not go with config.process.name={config.process.name!r}")
    if not c and "coherence_levels" in config.denoiser.options:
        raise ConfigError("config.denoiser.options.coherence_levels goes with config.data.coherence")


def companions(experiment: Experiment) -> dict[str, tuple[int, ...]]:
    """Their names, the innermost first, and the shapes of one item's."""
    c, shape = experiment.config.data, experiment.data.shape
    found = {"coherence": ()} if c.coherence else {}
    found |= {"sigma": ()} if c.noise else {}
    coupling = experiment.coupling
    if isinstance(coupling, (objective_names.Paired, objective_names.Transported)):
        found["x1"] = shape
    if experiment.config.objective.name == "multimarginal":
        found["ends"] = (*shape, (len(c.classes) or getattr(experiment.process, "points", 2)) - 1)
    return found


def batches(experiment: Experiment, data: Dataset, process_index: int, process_count: int) -> Any:
    """See `Experiment.batches`."""
    c, coupling = experiment.config, experiment.coupling
    transported = isinstance(coupling, objective_names.Transported)
    wanted = companions(experiment)
    if "segments" in data[:1]:
        _check_segments(c)
        data = _in_condition(data, "segments")
    if data.sizes is not None:
        data = _in_condition(data, "size")
    if c.data.coherence == "corrupted":
        made = {"corrupted": datasets.mislabelled}
        data = naming.make(made, "corrupted", "config.data.coherence", data)
    if extra := sorted(set(data[:1]) - PLAIN - set(wanted)):
        raise ConfigError(f"the items of {data.name!r} come with {extra[0]!r}, which nothing in the config uses")
    if c.data.coherence:
        data = _in_condition(data, "coherence")
    if c.data.noise:
        data = naming.make({"noise": datasets.noisy}, "noise", "config.data.noise", data, **c.data.noise)
    for name in ("x1", "ends"):
        if name in wanted and not transported:
            data = _in_condition(data, name)
    found = datasets.batches(
        data,
        batch_size=c.train.batch_size,
        seed=c.train.seed,
        process_index=process_index,
        process_count=process_count,
        prefetch=c.train.prefetch,
        workers=c.train.workers,
    )
    if not transported:
        return found

    def source(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        return np.float32(experiment.process.source_std) * datasets.transport.gaussian_source(rng, shape)

    return datasets.Transported(
        found, group=coupling.group, seed=c.train.seed, source=source, process_index=process_index
    )


def _check_segments(config: Config) -> None:
    """Raise ConfigError where the network, or the rest of the config, does not take packed documents."""
    c, block = config.data, config.denoiser.options.get("block")
    if config.denoiser.name != "text" or c.coherence:
        raise ConfigError("config.data.options.pack is for config.denoiser.name='text', without config.data.coherence")
    for entry in c.mixture or ({},):
        align = {**c.options, **entry.get("options", {})}.get("align", 1)
        if block is not None and align % block:
            raise ConfigError(
                f"packed documents must begin where a block does: set config.data.options.align={block}, or a multiple "
                f"of config.denoiser.options.block, not {align}"
            )


def _in_condition(data: Dataset, name: str) -> Dataset:
    try:
        return datasets.in_condition(data, name)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def starts(experiment: Experiment, key: Key[Array, ""], items: Mapping[str, Any]) -> Array:
    """The ends x_1 of items of a data set, from which `run.sample(init=...)` goes to x_0.

    items: such as `ddjax.loading.load_data(config, "test")[:64]`. key: of the degradation, where it is random.
    Raises ValueError where sampling starts from a prior.
    """
    if not starts_from_data(experiment):
        raise ValueError(f"sampling of config.process.name={experiment.config.process.name!r} starts from its prior")
    x0 = jnp.asarray(items["x0"])
    if "ends" in items:
        every = jnp.concatenate([x0[..., None], jnp.asarray(items["ends"])], -1)
        return every[..., experiment.process.path.last]
    keys = random.example_keys(jax.random.fold_in(key, _DEGRADE), jnp.arange(len(x0)))
    return experiment.coupling(keys, x0, dict(items))[0]


def starts_from_data(experiment: Experiment) -> bool:
    """Whether sampling has no prior to start from."""
    return hasattr(experiment.process, "departure") and getattr(experiment.process, "source_std", None) is None


def depart(experiment: Experiment, key: Key[Array, ""], init: Array, rows: Int[Array, " batch"]) -> Array:
    """The states in which sampling starts, given its ends x_1; for other processes, given those states."""
    if not hasattr(experiment.process, "departure"):
        return init
    return experiment.process.departure(init).sample(random.example_keys(jax.random.fold_in(key, _DEPART), rows))


def held_out_starts(experiment: Experiment, data: Dataset, key: Key[Array, ""], num: int) -> tuple[Array, Any]:
    """Ends x_1 of the first items of a data set, in turn, and their labels."""
    items = data[np.arange(num) % len(data)]
    return starts(experiment, key, items), items.get("cond")


def held_out_conditions(data: Dataset, rows: np.ndarray) -> Any:
    """The conditions of items of a data set, by their numbers, again from the first after the last."""
    return data[np.asarray(rows) % len(data)]["cond"]


__all__ = [
    "batches",
    "check_coherence",
    "companions",
    "depart",
    "held_out_conditions",
    "held_out_starts",
    "starts",
    "starts_from_data",
]


def with_law(experiment: Experiment, solver: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The solver's options, with the Gaussian law of the training data, or of a file, where it takes one.

    Raises ConfigError for a law of other states or labels, and for data without one.
    """
    if "law" not in naming.taken(naming.pick(names.SOLVERS, solver, "config.sample.solver"), {"law": None}):
        return dict(options)
    key, path, data = "config.sample.solver_options.law", options.get("law"), experiment.data
    if path is None:
        return {**options, "law": experiment.law}
    try:
        found = gaussian_law.load(path)
    except ValueError as error:
        raise ConfigError(f"{key}={path!r}: {error}") from error
    if found.shape != data.shape or found.laws not in (1, data.num_classes + 1):
        raise ConfigError(
            f"{key}={path!r} has {found.laws} laws of states of shape {found.shape}; {data.name!r} has states of shape "
            f"{data.shape} and {data.num_classes} labels"
        )
    return {**options, "law": found}


def fitted_law(experiment: Experiment) -> gaussian_law.GaussianLaw:
    """The Gaussian law of the training data, for each label where they have labels."""
    data = experiment.data if len(experiment.data) else load_data(experiment.config, "train")
    try:
        return gaussian_law.fit(data, labels=bool(data.num_classes))
    except ValueError as error:
        raise ConfigError(f"config.sample.solver_options.law: {error}") from error
