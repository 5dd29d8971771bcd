"""What a training would take on devices that are not there: memory, traffic, arithmetic, and what bounds a step.

The step that `ddjax train` would run is compiled for the mesh, without its devices. With libtpu installed the TPU
compiler does it, for the TPUs asked for, or for v5p in the place of GPUs (whose compiler wants one at hand). Without
it as many fake CPU devices must do: the partitioner is the same, but the CPU computes and sends in float32 what is
bfloat16 elsewhere, and sums whole gradients where others scatter the sums. The plan says which it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from ddjax.chips import chip, slice_shape
from ddjax.collectives import Collective, by_axes, collectives
from ddjax.config import Config
from ddjax.data.dataset import Dataset
from ddjax.experiment import Experiment, build
from ddjax.names import DENOISERS
from ddjax.naming import taken
from ddjax.placement import path_name
from ddjax.training.loop import check_batch_size
from ddjax.training.mesh import compile_step, make_mesh, mesh_sizes, shapes_of, state_shardings
from ddjax.training.setup import initial_state, places, step_flops, train_step
from ddjax.training.state import TrainState
from ddjax.training.teacher import teacher_of

COMPILERS = ("auto", "tpu", "cpu", "none")
RARE = ("ema on the host", "held")  # not in the table where there are none
STAND_IN = "v5p"  # compiled for in the place of chips without a compiler here


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter."""

    path: str
    shape: tuple[int, ...]
    spec: str
    bytes: int  # on a device


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of a training. Bytes are those of one device."""

    mesh: dict[str, int]
    chip: str | None
    batch_size: int
    parameters: int
    rows: tuple[Row, ...]
    state: dict[str, int]  # params, optimizer, ema, ema on the host, and held: a teacher, what an adapter is beside
    compiler: str  # how the rest was found
    temporary: int | None  # activations, gradients, gathered parameters: the compiled program's own
    arguments: int | None  # of the compiled program: the state and the batch
    collectives: tuple[Collective, ...]
    flops: int  # of the model, a step, all devices together

    @property
    def devices(self) -> int:
        """How many."""
        return math.prod(self.mesh.values())

    @property
    def total(self) -> int | None:
        """Bytes on a device at the height of a step."""
        if self.temporary is None:
            return None
        return self.temporary + self.state["params"] + self.state["held"] + self.on_device

    @property
    def on_device(self) -> int:
        """Bytes of the optimizer and the average on a device."""
        return self.state["optimizer"] + self.state["ema"]

    def seconds(self) -> dict[str, float]:
        """Least times of a step by what bounds it: arithmetic, the device's memory, traffic inside and beyond a domain.

        Memory: the state is read and written once, gradients written and read; what activations move is not in it.
        Traffic outside a pod of TPUs has no number of its own and counts as infinite.
        """
        c, moved = chip(self.chip), 2 * (self.state["params"] + self.on_device) + 2 * self.state["params"]
        inside = [one for one in self.collectives if spans(one, self.mesh) <= c.domain]
        beyond = sum(one.sent for one in self.collectives) - sum(one.sent for one in inside)
        return {
            "arithmetic": self.flops / self.devices / c.flops,
            "memory": moved / c.bandwidth,
            "links": sum(one.sent for one in inside) / c.link,
            "network": beyond / c.network if c.network else math.inf if beyond else 0.0,
        }


def plan(config: Config, data: Dataset, devices: int, *, chip_name: str | None = None, compiler: str = "auto") -> Plan:
    """Plan the training of `config` on so many devices.

    data: a data set, or the description of one (`described`).
    chip_name: of `ddjax.chips.CHIPS`; None estimates no times.
    compiler: "tpu", "cpu", or "none" (the layout alone); "auto" is "tpu" where libtpu is installed and the devices
        are a power of two, else "cpu". "cpu" needs a process whose JAX has that many CPU devices
        (`jax_num_cpu_devices`, set before JAX is used).
    Raises ValueError where the mesh does not fit, or a compiler or its devices are missing.
    """
    if compiler not in COMPILERS:
        raise ValueError(f"unknown compiler {compiler!r}; it is one of {', '.join(COMPILERS)}")
    if devices < 1:
        raise ValueError(f"devices must be at least 1, got {devices}")
    known = None if chip_name is None else chip(chip_name)
    experiment = build(_plannable(config), data)
    if compiler == "auto":
        compiler = "tpu" if importlib.util.find_spec("libtpu") and devices & (devices - 1) == 0 else "cpu"
    target = slice_shape(chip_name if known and known.topology else STAND_IN, devices) if compiler == "tpu" else ""
    mesh = _mesh(config.train.mesh, devices, target, compiler)
    shardings = places(experiment, mesh)
    state = jax.eval_shape(functools.partial(initial_state, experiment), jax.random.key(0))
    batch = _batch(experiment, data)
    check_batch_size(config, mesh)
    found: dict[str, Any] = {"compiler": "not compiled", "temporary": None, "arguments": None, "collectives": ()}
    teacher = teacher_of(experiment)
    teacher = teacher and teacher.shapes
    step = train_step(experiment, teacher)
    if compiler != "none":
        lowered = compile_step(step, shardings, mesh).lower(state, batch)
        words = f"TPU topology {target}" if target else f"{devices} fake CPU devices: float32, sums unscattered"
        if target and known and not known.topology:
            words += f", in the place of {chip_name}"
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            first = str(error).split("\n\n")[0].replace("RESOURCE_EXHAUSTED: ", "")
            raise ValueError(
                f"the step does not fit ({words}): {first}. Cut the batch (config.train.accumulate), activations "
                "(denoiser.options.remat) or parameters (more fsdp or tensor in config.train.mesh)"
            ) from error
        found = {
            "compiler": f"compiled for {words}",
            "temporary": compiled.memory_analysis().temp_size_in_bytes,
            "arguments": compiled.memory_analysis().argument_size_in_bytes,
            "collectives": tuple(collectives(compiled.as_text(), tuple(mesh.shape.items()))),
        }
    paths = jax.tree_util.tree_leaves_with_path(state.params)
    places_of = jax.tree.leaves(shardings.params)
    rows = tuple(
        Row(path_name(path), leaf.shape, _spec(place), _bytes(leaf, place))
        for (path, leaf), place in zip(paths, places_of, strict=True)
    )
    with _no_warnings():
        operations = step_flops(experiment, batch, teacher)
    return Plan(
        dict(mesh.shape), chip_name, config.train.batch_size, sum(math.prod(leaf.shape) for _, leaf in paths), rows,
        _state_bytes(state, shardings) | {"held": _total(shapes_of(step), state_shardings(step, mesh))},
        flops=operations, **found,
    )  # fmt: skip


def described(
    shape: tuple[int, ...] | Mapping[str, tuple[int, ...]], symbols: int | Mapping[str, int | None] | None, classes: int
) -> Dataset:
    """Data that are not there: of tokens (symbols) or values (None). Of several parts both by name."""
    from ddjax.data.describe import from_description

    nothing = dict.fromkeys(("levels", "vocabulary", "counts"))
    return from_description(
        {**nothing, "name": "described", "shape": shape, "num_symbols": symbols, "num_classes": classes}
    )


def spans(one: Collective, mesh: Mapping[str, int]) -> int:
    """Devices, counted as they are numbered, from the first to the last of a group: what must lie in one domain."""
    stride, last = 1, 0
    for name, size in reversed(mesh.items()):
        last += stride * (size - 1) if name in one.over else 0
        stride *= size
    return math.prod(mesh.values()) if one.over == ("?",) else last + 1


def format_plan(p: Plan) -> str:
    """The plan as text."""
    wide = max(len(row.path) for row in p.rows)
    shapes = max(len(_shape(row.shape)) for row in p.rows)
    specs = max(len(row.spec) for row in p.rows)
    lines = [f"{'parameter':<{wide}}  {'shape':<{shapes}}  {'over':<{specs}}  bytes/device"]
    lines += [f"{r.path:<{wide}}  {_shape(r.shape):<{shapes}}  {r.spec:<{specs}}  {_si(r.bytes)}B" for r in p.rows]
    mesh = ", ".join(f"{name} {size}" for name, size in p.mesh.items())
    lines += ["", f"{p.parameters:,} parameters on {p.devices} devices ({mesh}), batches of {p.batch_size:,}"]
    lines += [f"the step: {p.compiler}", "", "bytes on a device"]
    lines += [f"  {name:<18}{_si(size)}B" for name, size in p.state.items() if size or name not in RARE]
    if p.temporary is not None:
        lines += [f"  {'activations etc.':<18}{_si(p.temporary)}B", f"  {'together':<18}{_si(p.total)}B"]
        if p.chip:
            lines[-1] += f" of {_si(chip(p.chip).memory)}B: {p.total / chip(p.chip).memory:.0%}"
        lines += ["", "collectives of a step, and what a device sends in them"]
        for (kind, over), (runs, sent) in by_axes(p.collectives).items():
            lines.append(f"  {kind:<18} over {'+'.join(over):<18} {runs:>6} runs  {_si(sent)}B")
    lines += ["", f"arithmetic of a step: {_si(p.flops)}FLOP, {_si(p.flops / p.devices)}FLOP a device"]
    if p.chip:
        seconds = p.seconds() if p.temporary is not None else {"arithmetic": p.seconds()["arithmetic"]}
        lines.append(f"least times of a step on {p.chip} ({chip(p.chip).source})")
        lines += [f"  {name:<12}{1e3 * s:,.2f} ms" for name, s in seconds.items()]
        if len(seconds) > 1:
            apart, hidden = sum(seconds.values()), max(seconds.values())
            lines.append(
                f"MFU at most {seconds['arithmetic'] / hidden:.0%} where all overlaps, "
                f"{seconds['arithmetic'] / apart:.0%} where nothing does; bound by {max(seconds, key=seconds.get)}"
            )
    return "\n".join(lines)


def _mesh(axes: Mapping[str, int], devices: int, target: str, compiler: str) -> Mesh:
    if compiler == "tpu":
        if not importlib.util.find_spec("libtpu"):
            raise ValueError("--compile tpu needs the TPU compiler: pip install 'jax[tpu]'")
        from jax.experimental import topologies

        # It looks for the machine that it is on; there is none.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        found = topologies.get_topology_desc(platform="tpu", topology_name=target).devices
    elif compiler == "none":
        shape = mesh_sizes(axes, devices)
        return jax.sharding.AbstractMesh(tuple(shape.values()), tuple(shape), (AxisType.Auto,) * len(shape))
    else:
        found = jax.devices("cpu")
        if len(found) < devices:
            raise ValueError(
                f"compiling for {devices} devices needs as many CPU devices, and this process has {len(found)}: "
                "use the command, ddjax plan, or set jax_num_cpu_devices before JAX is used"
            )
        found = found[:devices]
    return make_mesh(axes, found)


def _plannable(config: Config) -> Config:
    """Attention as XLA computes it on accelerators: a fused kernel compiles for its own device only, and the default
    on a CPU, where plans are made, is another. Networks without the option, and other kinds, stay as they are.
    """
    options = config.denoiser.options
    takes = taken(DENOISERS[config.denoiser.name], {"attention": "xla"})
    if options.get("attention") not in (None, "cudnn") or not takes:
        return config
    options = options | takes
    return dataclasses.replace(config, denoiser=dataclasses.replace(config.denoiser, options=options))


def _batch(experiment: Experiment, data: Dataset) -> dict[str, Any]:
    size = experiment.config.train.batch_size
    if len(data):
        first = next(experiment.batches(data))
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), first)

    def part(shape: tuple[int, ...], symbols: int | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size, *shape), jnp.float32 if symbols is None else jnp.int32)

    shape, symbols = data.shape, data.num_symbols
    x0 = {name: part(shape[name], symbols[name]) for name in shape} if data.parts else part(shape, symbols)
    return {"x0": x0, "cond": jax.ShapeDtypeStruct((size,), jnp.int32)} if data.num_classes else {"x0": x0}


def _state_bytes(state: TrainState, shardings: TrainState) -> dict[str, int]:
    ema = _total(state.ema, shardings.ema)
    host = any(place.memory_kind == "pinned_host" for place in jax.tree.leaves(shardings.ema))
    return {
        "params": _total(state.params, shardings.params),
        "optimizer": _total(state.opt_state, shardings.opt_state),
        "ema": 0 if host else ema,
        "ema on the host": ema if host else 0,
    }


def _total(tree: Any, places: Any) -> int:
    return sum(map(_bytes, jax.tree.leaves(tree), jax.tree.leaves(places)))


def _bytes(leaf: Any, place: NamedSharding) -> int:
    return math.prod(place.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize


def _spec(place: NamedSharding) -> str:
    entries = ["+".join((e,) if isinstance(e, str) else e) if e else "-" for e in place.spec]
    return ", ".join(entries) or "whole"


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "1"


def _si(value: float) -> str:
    for factor, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.3g} "


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
