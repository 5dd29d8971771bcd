"""The network of a config, for a process and its data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddjax import companions, denoisers, names, naming, objective_names
from ddjax.config import Config, ConfigError
from ddjax.data import conditions
from ddjax.data.dataset import Dataset
from ddjax.predictions import COUNT_KINDS, STATE_KINDS
from ddjax.processes import Gaussian
from ddjax.types import Apply


def state_shape(process: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the states whose data have this shape."""
    return process.state_shape(shape) if hasattr(process, "state_shape") else shape


def output_shape(process: Any, shape: tuple[int, ...], kind: str) -> tuple[int, ...]:
    """Of what a network says of one continuous example of this shape."""
    return process.output_shape(shape, kind) if hasattr(process, "output_shape") else shape


def takes(config: Config) -> str:
    """What the config's network is for, of `TAKES`. Raises ConfigError for a name that no network has."""
    return getattr(naming.pick(names.DENOISERS, config.denoiser.name, "config.denoiser.name"), "takes", "images")


def network(config: Config, data: Dataset, process: Any) -> tuple[Callable, Apply]:
    """Its initial parameters, as a function of a key, and how it is called. Raises ConfigError."""
    c = config.denoiser
    options = _sized(c.name, c.options)
    companions.check_coherence(config, data, process)
    levels, shows = options.pop("coherence_levels", 0), config.objective.options.get("show", False)
    shared, ordinal = options.pop("shared_times", None), options.pop("truncated_logistic", False)
    heads = naming.pick(objective_names.OBJECTIVES, config.objective.name, "config.objective.name").heads
    if ordinal and (heads or c.kind not in ("posterior", "cavity")):
        raise ConfigError(
            "config.denoiser.options.truncated_logistic is for a posterior or a cavity of tokens, "
            f"not for {c.kind!r} with config.objective.name={config.objective.name!r}"
        )
    if "dtype" in options:
        options["dtype"] = naming.pick(names.DTYPES, options["dtype"], "config.denoiser.options.dtype")
    if data.num_symbols is not None and not data.parts:
        numbers = 2 if ordinal else _numbers(process, c.kind) + heads
        options |= {"symbols_in": process.num_states, "symbols_out": numbers}
    make_network = naming.pick(names.DENOISERS, c.name, "config.denoiser.name")
    told = {"num_classes": data.num_classes * max(levels, 1)}
    options |= (told if data.num_classes else naming.taken(make_network, told)) | _conditions(make_network, data)
    if hasattr(process, "latents"):
        options |= {"latent": process.latent}
    if config.data.coherence and not levels:
        options |= {"latent": 1}
    if hasattr(process, "points"):
        options |= {"latent": process.points, "time": False}
    if "points" in data.conditions and takes(config) != "points":
        raise ConfigError(f"config.data.conditions has points: they are for 'neural_process', not for {c.name!r}")
    options |= TAKES[takes(config)](config, data, process, 1 + shows)
    options |= _scale(make_network, config, data)
    naming.check_options(make_network, options, "config.denoiser.options")

    def make(rngs):
        try:
            return make_network(**options, rngs=rngs)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"config.denoiser.options={c.options}: {error}") from error

    if data.parts and "ratio" in c.kind.split("+"):
        raise ConfigError(f"config.denoiser.kind={c.kind!r}: of several parts no network says ratios; take 'posterior'")
    init, apply = denoisers.functional_init(make)
    if ordinal:
        apply = denoisers.TruncatedLogistic(apply, process.num_symbols)
    if config.data.coherence:
        apply = denoisers.Coherent(apply, data.num_classes, levels)
    if hasattr(process, "points"):
        apply = denoisers.Pointed(apply)
    if hasattr(process, "draws"):
        apply = denoisers.OverDraws(apply)
    if shows:
        apply = denoisers.ShownX1(apply)
    if shared is not None:
        apply = _sharing_times(apply, process, data, config, shared)
    return init, denoisers.outputs.Ratios(apply, process) if c.kind == "ratio" else apply


def _conditions(make_network: Any, data: Dataset) -> dict[str, Any]:
    """By which options the network takes the data's conditions; one that makes tokens of a sequence has its shape."""
    options = conditions.options(data)
    if "context_width" in options and (tokens := naming.taken(make_network, {"context": data.conditions["sequence"]})):
        del options["context_width"]
        options |= tokens
    return options


def _numbers(process: Any, kind: str) -> int:
    """How many a network says of each discrete site."""
    if kind in COUNT_KINDS:
        return 1
    return process.num_states if kind in STATE_KINDS else process.num_symbols


def _unfit(config: Config, data: Dataset, what: str) -> ConfigError:
    return ConfigError(
        f"config.denoiser.name={config.denoiser.name!r} is for {what}, not for {data.name!r} of shape {data.shape}"
    )


def _images(config: Config, data: Dataset, process: Any, copies: int) -> dict[str, Any]:
    if data.parts or len(data.shape) != 3:
        raise _unfit(config, data, "images")
    *sides, channels = state_shape(process, data.shape)
    options = {"shape": (*sides, copies * channels)}
    if data.num_symbols is None:
        options["out_channels"] = output_shape(process, data.shape, config.denoiser.kind)[-1]
    return options


def _scale(make_network: Any, config: Config, data: Dataset) -> dict[str, int]:
    """How many times smaller than the state the image in the condition is, for networks that ask.

    Raises ConfigError where the network, or its options, take images of another size.
    """
    if "image" not in data.conditions:
        return {}
    asks, times = naming.taken(make_network, {"scale": 1}), data.shape[0] // data.conditions["image"][0]
    if not asks and times > 1:
        raise ConfigError(
            f"config.denoiser.name={config.denoiser.name!r} takes an image of its state's size in the condition, and "
            f"that of {data.name!r} is {times} times smaller: for super-resolution there is 'inf_dit'"
        )
    if asks and config.denoiser.options.get("scale", times) != times:
        raise ConfigError(
            f"config.denoiser.options.scale={config.denoiser.options['scale']}, and the image in the condition of "
            f"{data.name!r} is {times} times smaller: leave scale out"
        )
    return {"scale": times} if asks else {}


def _texts(config: Config, data: Dataset, process: Any, copies: int) -> dict[str, Any]:
    if data.parts or len(data.shape) != 1 or data.num_symbols is None:
        raise _unfit(config, data, "token sequences")
    return {"length": data.shape[0]}


def _rows(config: Config, data: Dataset, process: Any, copies: int) -> dict[str, Any]:
    if data.parts or len(data.shape) != 1:
        raise _unfit(config, data, "rows of columns")
    options = {"columns": copies * state_shape(process, data.shape)[0]}
    if data.num_symbols is None:
        options["out_columns"] = output_shape(process, data.shape, config.denoiser.kind)[-1]
    return options


def _parts(config: Config, data: Dataset, process: Any, copies: int) -> dict[str, Any]:
    if not data.parts or any(len(shape) != 1 for shape in data.shape.values()):
        raise _unfit(config, data, "tables of several parts")
    found = {}
    for name, (columns,) in data.shape.items():
        part, kind = process[name], process.kind_of(config.denoiser.kind, name)
        if data.num_symbols[name] is None:
            found[name] = (columns, None, output_shape(part, (columns,), kind)[-1])
        else:
            found[name] = (columns, part.num_states, _numbers(part, kind))
    return {"parts": found}


def _graphs(config: Config, data: Dataset, process: Any, copies: int) -> dict[str, Any]:
    if not data.parts:
        return {"nodes": _nodes(data, bool(config.denoiser.options.get("typed", False)))}
    if data.sizes is None:
        raise _unfit(config, data, "graphs")
    numbers, kind = {"symbols_in": {}, "symbols_out": {}}, config.denoiser.kind
    for name in data.shape:
        numbers["symbols_in"][name] = process[name].num_states
        numbers["symbols_out"][name] = _numbers(process[name], process.kind_of(kind, name))
    return {**numbers, "nodes": len(data.sizes) - 1, "sizes": True}


def _points(config: Config, data: Dataset, process: Any, copies: int) -> dict[str, Any]:
    """How many points there are, and of how many coordinates, is no option."""
    if data.conditions.keys() != {"points"}:
        raise _unfit(config, data, 'values at points (config.data.conditions={"points": ...}, and nothing else)')
    shapes = {state_shape(process, data.shape), output_shape(process, data.shape, config.denoiser.kind)}
    if data.num_symbols is not None or copies > 1 or shapes != {data.shape}:
        raise _unfit(config, data, "one number, noised and predicted, at each point")
    return {}


def _law(config: Config, data: Dataset, process: Any, copies: int) -> dict[str, Any]:
    """The network's law has the data's shape, and says x_0 of what the process makes of it."""
    if type(process) is not Gaussian or hasattr(process.schedule, "parameters") or copies > 1:
        raise _unfit(config, data, "config.process.name='gaussian' with a schedule that is not learned")
    if config.denoiser.kind != "x0":
        raise ConfigError(
            f"config.denoiser.kind={config.denoiser.kind!r}: {config.denoiser.name!r} is E[x_0 | x_t]; take 'x0'"
        )
    return {"shape": data.shape, "schedule": process.schedule}


# What a network is for, its class's `takes` (images, where it does not say), and the options that follow from the data:
# (config, data, process, how many states the network is shown) -> options. All raise ConfigError for other data.
TAKES = {
    "images": _images, "texts": _texts, "rows": _rows, "parts": _parts, "graphs": _graphs, "points": _points,
    "law": _law,
}  # fmt: skip


def _nodes(data: Dataset, typed: bool) -> int:
    """Of the graphs that the items are: a site for each pair of nodes, and for each node if these have types."""
    sites = data.shape[0] if len(data.shape) == 1 and data.num_symbols is not None else 0
    nodes = next((n for n in range(2, sites + 2) if n * (n - 1) // 2 + n * typed == sites), None)
    if nodes is None:
        raise ConfigError(
            "config.denoiser.name='graph' is for graphs, tokens of pairs of nodes (1, 3, 6, 10, ...; with typed=True, "
            f"of nodes before them), not for {data.name!r} of shape {data.shape}"
        )
    return nodes


def _sized(network: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, "size" replaced by what it stands for; those beside it count."""
    options = dict(options)
    if "size" not in options:
        return options
    key, sizes = "config.denoiser.options.size", denoisers.sizes.SIZES.get(network)
    if sizes is None:
        raise ConfigError(f"{key}={options['size']!r}: config.denoiser.name={network!r} has no named sizes")
    return {**naming.pick(sizes, options.pop("size"), key), **options}


def _sharing_times(apply: Apply, process: Any, data: Dataset, config: Config, options: Mapping[str, Any]) -> Apply:
    """The network, told one time for each of a few parts of the first times (E-TSDM)."""
    key, t = "config.denoiser.options.shared_times", jnp.full((1,), 0.37)
    with jax.ensure_compile_time_eval():
        xt = jnp.zeros((1, *state_shape(process, data.shape)), jnp.int32 if data.num_symbols is not None else None)
        told = process.network_inputs(xt, t, config.denoiser.kind)[1]
    if not np.array_equal(told, t):
        raise ConfigError(
            f"{key} is for networks that are told the clock, not for config.denoiser.kind={config.denoiser.kind!r} "
            f"under config.process.schedule={config.process.schedule!r}"
        )
    return naming.make({"shared_times": denoisers.SharedEarlyTimes}, "shared_times", key, apply, **options)
