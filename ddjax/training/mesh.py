"""Devices: meshes, where each array of the state lives, and the compiled step.

Meshes have automatic axes: the compiler places intermediates, and a model's reshapes and gathers work
unchanged. The names `data` and `fsdp` carry the batch; `fsdp` also cuts large parameters; any other name is
the rules' own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ddjax.training.state import TrainState
from ddjax.training.step import Step
from ddjax.types import PyTree

Rules = Sequence[tuple[str, PartitionSpec]]

BATCH_AXES = ("data", "fsdp")
FSDP_MIN_SIZE = 2**14  # below this many elements, gathering a parameter costs more than holding it


def make_mesh(axes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the named axes over `devices` (default: all).

    axes: name -> size, in order; one size may be -1, meaning all that is left. Default `{"data": -1}`.
    Raises ValueError where the sizes do not multiply to the number of devices.
    """
    axes = {"data": -1} if axes is None else dict(axes)
    devices = list(jax.devices() if devices is None else devices)
    count, wanted = len(devices), ", ".join(f"{name}={size}" for name, size in axes.items())
    free = [name for name, size in axes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"only one mesh axis may be -1, got {wanted}")
    if bad := [name for name, size in axes.items() if size < 1 and size != -1]:
        raise ValueError(f"mesh axis {bad[0]!r} must be a positive size or -1, got {wanted}")
    fixed = math.prod(size for size in axes.values() if size != -1)
    if free:
        if count % fixed:
            raise ValueError(f"a mesh of {wanted} does not fit {count} devices: {fixed} does not divide {count}")
        axes[free[0]] = count // fixed
    elif fixed != count:
        raise ValueError(
            f"a mesh of {wanted} takes {fixed} devices, there are {count}; give one axis the size -1, "
            "or pass the devices to use"
        )
    # Explicitly Auto: jax.make_mesh defaults to Explicit axes, under which ordinary reshapes raise.
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes), devices=devices)


def path_name(path: Sequence[Any]) -> str:
    """A pytree path as `params/block_0/kernel`."""
    return "/".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)


def state_shardings(
    abstract_state: PyTree, mesh: Mesh, rules: Rules = (), fsdp_min_size: int = FSDP_MIN_SIZE
) -> PyTree:
    """Where each array lives: a pytree of NamedSharding like `abstract_state`.

    rules: (regular expression, PartitionSpec) pairs. The first whose expression is found in the array's path
        (such as `params/block_0/kernel`, `ema/...`, `opt_state/0/mu/...`) decides. Where no rule speaks: with
        an `fsdp` axis the largest axis it divides, of arrays of at least `fsdp_min_size` elements; otherwise
        replicated. Keys are always replicated. Optimizer statistics of another shape than their parameter
        pass by a rule that does not fit them.
    Raises ValueError where a rule names an axis the mesh lacks, or does not fit a parameter's shape.
    """
    compiled = [(re.compile(pattern), spec) for pattern, spec in rules]
    for pattern, spec in compiled:
        if missing := [name for name in _axis_names(spec) if name not in mesh.shape]:
            raise ValueError(
                f"rule {pattern.pattern!r} names the mesh axis {missing[0]!r}; the mesh has {dict(mesh.shape)}"
            )

    def place(path, leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return NamedSharding(mesh, PartitionSpec())
        name = path_name(path)
        for pattern, spec in compiled:
            if not pattern.search(name):
                continue
            if _fits(spec, leaf.shape, mesh):
                return NamedSharding(mesh, spec)
            if not name.startswith("opt_state"):
                raise ValueError(
                    f"rule {pattern.pattern!r} -> {spec} does not fit {name} of shape {leaf.shape} "
                    f"on a mesh of {dict(mesh.shape)}"
                )
        return NamedSharding(mesh, _fsdp_spec(leaf.shape, mesh, fsdp_min_size))

    return jax.tree_util.tree_map_with_path(place, abstract_state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The batch's first axis over the mesh axes `data` and `fsdp`, those of them that exist."""
    axes = tuple(name for name in BATCH_AXES if name in mesh.shape)
    return NamedSharding(mesh, PartitionSpec(axes) if axes else PartitionSpec())


def shard_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Rows of this process (numpy, leading axis) -> global arrays laid over the mesh.

    Each process gives its own contiguous block of the global batch, in mesh order.
    Raises ValueError where the rows do not divide over the devices.
    """
    sharding = batch_sharding(mesh)
    ways = math.prod(mesh.shape[name] for name in BATCH_AXES if name in mesh.shape)

    def place(path, leaf):
        local = np.asarray(leaf)
        total = local.shape[0] * jax.process_count() if local.ndim else 0
        if not local.ndim or total % ways:
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} of shape {local.shape} ({jax.process_count()} processes) "
                f"does not divide over {ways} devices of the mesh axes {dict(mesh.shape)}"
            )
        return jax.make_array_from_process_local_data(sharding, local)

    return jax.tree_util.tree_map_with_path(place, batch)


def compile_step(step: Step, state_shardings: PyTree, mesh: Mesh) -> Step:
    """`jax.jit(step)`, laid over the mesh. The given state is donated: its buffers are gone after the call.

    Takes batches from `shard_batch` (or numpy). Metrics come back replicated.
    """
    return jax.jit(
        step,
        in_shardings=(state_shardings, batch_sharding(mesh)),
        out_shardings=(state_shardings, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )


def init_sharded(
    init_fn: Callable[[jax.Array], TrainState], mesh: Mesh, rules: Rules, key: jax.Array, **options: Any
) -> tuple[TrainState, PyTree]:
    """Initialise the state in place, each device holding only its part: `(state, shardings)`.

    init_fn: `init_fn(key) -> TrainState`, usually `functools.partial(init_state, init, optimizer)`.
    options: passed to `state_shardings`.
    """
    shardings = state_shardings(jax.eval_shape(init_fn, key), mesh, rules, **options)
    return jax.jit(init_fn, out_shardings=shardings)(key), shardings


def abstract_state(state: PyTree, shardings: PyTree | None = None) -> PyTree:
    """Shapes, dtypes and shardings of a state: what `Checkpoints.restore` takes.

    state: arrays, or what `jax.eval_shape` gives.
    shardings: default, those of the state's own arrays.
    """
    if shardings is None:
        shardings = jax.tree.map(lambda a: a.sharding, state)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings)


def _axis_names(spec: PartitionSpec) -> list[str]:
    return [name for entry in spec for name in ((entry,) if isinstance(entry, str) else entry or ())]


def _fits(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh) -> bool:
    if len(spec) > len(shape):
        return False
    ways = [math.prod(mesh.shape[name] for name in _axis_names(PartitionSpec(entry))) for entry in spec]
    return all(size % n == 0 for size, n in zip(shape, ways, strict=False))


def _fsdp_spec(shape: tuple[int, ...], mesh: Mesh, min_size: int) -> PartitionSpec:
    ways = mesh.shape.get("fsdp", 1)
    if ways == 1 or math.prod(shape) < min_size:
        return PartitionSpec()
    for axis in sorted(range(len(shape)), key=lambda i: -shape[i]):
        if shape[axis] % ways == 0:
            return PartitionSpec(*("fsdp" if i == axis else None for i in range(len(shape))))
    return PartitionSpec()
