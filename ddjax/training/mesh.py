"""Devices: meshes, where each array of the state lives, and the compiled step.

Meshes have automatic axes: the compiler places intermediates, and a model's reshapes and gathers work
unchanged. `data`, `fsdp` and `expert` carry the batch; `fsdp` also cuts large parameters, `tensor` the columns or rows
of matrices and the heads, `expert` the experts (`LAYOUT`); `sequence` cuts the sites of activations
(`ddjax.placement`). Any other name is the rules' own.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ddjax.placement import AXES, BATCH_AXES, layer_axes, path_name
from ddjax.training.state import TrainState
from ddjax.training.step import Batch, Metrics, Step
from ddjax.types import PyTree

Rules = Sequence[tuple[str, PartitionSpec]]

# Our networks: what the last axes of a parameter are cut over, those before them (layers) not at all. Columns of the
# matrices that open a branch and rows of those that close it, so that a branch costs one sum over `tensor`.
LAYOUT = (
    (r"/mlp/(up|gate)$", ("expert", "fsdp", "tensor")),
    (r"/mlp/down$", ("expert", "tensor", "fsdp")),
    (r"/(attention/(qkv|told)|cross/(query|key_value))/kernel$", ("fsdp", "tensor")),
    (r"/(attention|cross)/out/kernel$", ("tensor", "fsdp")),
    (r"/mlp/(shared/)?(up|gate)/kernel$", ("fsdp", "tensor")),
    (r"/mlp/(shared/)?up/bias$", ("tensor",)),
    (r"/mlp/(shared/)?down/kernel$", ("tensor", "fsdp")),
    (r"/modulation/kernel$", ("tensor", "fsdp")),  # its input has no sites: a sum of it is cheap
    (r"/conv_in/kernel$", ("fsdp", "tensor")),
    (r"/conv_out/kernel$", ("tensor", "fsdp")),
    (r"/(skip|inner|expand)/kernel$", ("fsdp", "tensor")),
    (r"/(outer|reduce)/kernel$", ("tensor", "fsdp")),
    (r"/tokens/table$", ("fsdp", "tensor")),
    (r"/final/out/kernel$", ("fsdp", "tensor")),
)

FSDP_MIN_SIZE = 2**14  # below this many elements, gathering a parameter costs more than holding it


def make_mesh(axes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the named axes over `devices` (default: all).

    axes: name -> size, in order; one size may be -1, meaning all that is left. Default `{"data": -1}`.
    Raises ValueError where the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    axes = mesh_sizes(axes, len(devices))
    # Not jax.make_mesh: its axes are Explicit unless told otherwise, under which ordinary reshapes raise, and on TPUs
    # it refuses sizes that are no product of sides of the slice, such as 8 x 8 on 4 x 4 x 4.
    grid = mesh_utils.create_device_mesh(tuple(axes.values()), devices, allow_split_physical_axes=True)
    return Mesh(grid, tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


def mesh_sizes(axes: Mapping[str, int] | None, count: int) -> dict[str, int]:
    """The sizes of the axes on so many devices. Takes and raises what `make_mesh` does."""
    axes = {"data": -1} if axes is None else dict(axes)
    wanted = ", ".join(f"{name}={size}" for name, size in axes.items())
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
    return axes


def state_shardings(
    abstract_state: PyTree, mesh: Mesh, rules: Rules = (), fsdp_min_size: int = FSDP_MIN_SIZE
) -> PyTree:
    """Where each array lives: a pytree of NamedSharding like `abstract_state`.

    rules: (regular expression, PartitionSpec) pairs. The first whose expression is found in the array's path
        (such as `params/block_0/kernel`, `ema/...`, `opt_state/0/mu/...`) decides. Where no rule speaks, averages and
        optimizer statistics lie as the parameter whose path they end in, if they have its shape; parameters of our
        networks as `LAYOUT` says; and, with an `fsdp` axis, every array of at least `fsdp_min_size` elements is cut
        along the largest axis that `fsdp` divides. All else is replicated, keys always. Optimizer statistics of another
        shape than their parameter pass by a rule that does not fit them.
    Raises ValueError where a rule names an axis the mesh lacks, or does not fit a parameter's shape.
    """
    compiled = [(re.compile(pattern), spec) for pattern, spec in rules]
    for pattern, spec in compiled:
        if missing := [name for name in _axis_names(spec) if name not in mesh.shape]:
            raise ValueError(
                f"rule {pattern.pattern!r} names the mesh axis {missing[0]!r}; the mesh has {dict(mesh.shape)}"
            )

    def ruled(name: str, leaf: Any) -> PartitionSpec | None:
        for pattern, spec in compiled:
            if not pattern.search(name):
                continue
            if _fits(spec, leaf.shape, mesh):
                return spec
            if not name.startswith("opt_state"):
                raise ValueError(
                    f"rule {pattern.pattern!r} -> {spec} does not fit {name} of shape {leaf.shape} "
                    f"on a mesh of {dict(mesh.shape)}"
                )
        return None

    paths = [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_state)]
    owners = {}
    for name, leaf in paths:
        if name.startswith("params/"):
            spec = ruled(name, leaf)
            spec = _own_spec(name, leaf.shape, mesh, fsdp_min_size) if spec is None else spec
            owners[name.removeprefix("params/")] = leaf.shape, spec

    def place(path, leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return NamedSharding(mesh, PartitionSpec())
        name = path_name(path)
        spec = ruled(name, leaf)
        if spec is None and (owner := _owner(name, owners)) and owner[0] == leaf.shape:
            spec = owner[1]
        return NamedSharding(mesh, _own_spec(name, leaf.shape, mesh, fsdp_min_size) if spec is None else spec)

    return jax.tree_util.tree_map_with_path(place, abstract_state)


def check_axes(state_shardings: PyTree, mesh: Mesh) -> None:
    """Raise ValueError for a mesh axis that this library does not know, or that cuts nothing of this state."""
    if unknown := [name for name in mesh.shape if name not in AXES]:
        raise ValueError(f"the mesh has an axis {unknown[0]!r}; its axes are of {', '.join(AXES)}")
    used = {name for sharding in jax.tree.leaves(state_shardings) for name in _axis_names(sharding.spec)}
    why = {
        "fsdp": f"no parameter has {FSDP_MIN_SIZE:,} elements and an axis that it divides: let data carry the batch",
        "tensor": "it divides no matrix that it may cut",
        "expert": 'the network has no experts that it divides (mlp="experts")',
    }
    for name, reason in why.items():
        if mesh.shape.get(name, 1) > 1 and name not in used:
            raise ValueError(f"the mesh axis {name}={mesh.shape[name]} cuts nothing: {reason}")


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The batch's first axis over the mesh axes that carry it (`BATCH_AXES`), those of them that exist."""
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


class OnMesh:
    """A jitted step, and what it holds (`make_train_step`), which goes in as an argument (`compile_step`)."""

    def __init__(self, jitted: Any, step: Step, shardings: PyTree):
        self.jitted, self._step, self._shardings = jitted, step, shardings
        self._shapes = shapes_of(step)

    @functools.cached_property
    def held(self) -> PyTree:
        """The step with its arrays in place on the mesh; as they were given they are let go."""
        step, self._step = self._step, None
        return jax.tree.map(_placed, step, self._shardings)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        """Make the step. The given state is gone afterwards."""
        return self.jitted(self.held, state, batch)

    def lower(self, state: PyTree, batch: PyTree) -> jax.stages.Lowered:
        """The program for arrays of such shapes, of the step, state and batch."""
        return self.jitted.lower(self._shapes, state, batch)


def shapes_of(tree: PyTree) -> PyTree:
    """Shapes and dtypes in the place of arrays."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def compile_step(step: Step, shardings: PyTree, mesh: Mesh) -> OnMesh:
    """`jax.jit(step)`, laid over the mesh. The given state is donated: its buffers are gone after the call.

    Takes batches from `shard_batch` (or numpy). Metrics come back replicated. Arrays that live in the host's memory
    (`on_host`) visit the devices for the length of a step. What the step holds is no constant of the program, and lies
    as parameters do.

    shardings: of the state (`state_shardings`).
    """

    def laid(step: Step, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # networks constrain what they compute by it
            new, metrics = step(jax.tree.map(_fetch, state, shardings), batch)
        return jax.tree.map(_put_back, new, shardings), metrics

    held = state_shardings(step, mesh)
    jitted = jax.jit(
        laid,
        in_shardings=(held, shardings, batch_sharding(mesh)),
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=1,
    )
    return OnMesh(jitted, step, held)


def _placed(array: Any, sharding: NamedSharding) -> jax.Array:
    if jax.process_count() == 1:
        return jax.device_put(array, sharding)
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


HOST = "pinned_host"


def on_devices(arrays: PyTree) -> PyTree:
    """The arrays in the devices' own memory, wherever they lay."""

    def move(array: jax.Array) -> jax.Array:
        own = next(iter(array.sharding.device_set)).default_memory().kind
        return jax.device_put(array, array.sharding.with_memory_kind(own))

    return jax.tree.map(move, arrays)


def on_host(shardings: PyTree) -> PyTree:
    """The same places in the memory of the host beside the devices.

    Raises ValueError where the backend has no such memory.
    """

    def move(sharding: NamedSharding) -> NamedSharding:
        if isinstance(sharding.mesh, jax.sharding.AbstractMesh):
            return sharding.with_memory_kind(HOST)  # no devices to ask
        device = next(iter(sharding.mesh.devices.flat))
        if HOST not in (kinds := [memory.kind for memory in device.addressable_memories()]):
            raise ValueError(
                f"{device.device_kind} has no {HOST} memory, only {', '.join(kinds)}: keep it on the device"
            )
        return sharding.with_memory_kind(HOST)

    return jax.tree.map(move, shardings)


def _fetch(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    return jax.device_put(array, jax.memory.Space.Device) if sharding.memory_kind == HOST else array


def _put_back(array: jax.Array, sharding: NamedSharding) -> jax.Array:
    return jax.device_put(array, sharding) if sharding.memory_kind == HOST else array


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


def _owner(name: str, owners: Mapping[str, tuple]) -> tuple | None:
    """The shape and spec of the parameter whose path this one ends in."""
    while "/" in name:
        name = name.split("/", 1)[1]
        if name in owners:
            return owners[name]
    return None


def _own_spec(name: str, shape: tuple[int, ...], mesh: Mesh, min_size: int) -> PartitionSpec:
    """What `LAYOUT` says, as far as the mesh has its axes and they divide; and `fsdp` in any case."""
    entries: list[tuple[str, ...]] = [()] * len(shape)
    names = next((names for pattern, names in LAYOUT if re.search(pattern, name)), ())
    large = math.prod(shape) >= min_size
    if len(names) <= len(shape):
        for axis, wanted in enumerate(names, len(shape) - len(names)):
            ways = mesh.shape.get(wanted, 1)
            if ways > 1 and shape[axis] % ways == 0 and (wanted != "fsdp" or large):
                entries[axis] = (wanted,)
    ways = mesh.shape.get("fsdp", 1)
    if ways > 1 and large and ("fsdp",) not in entries:
        for axis in sorted(range(layer_axes(name), len(shape)), key=lambda i: -shape[i]):
            if shape[axis] % (ways * math.prod(mesh.shape[n] for n in entries[axis])) == 0:
                entries[axis] = (*entries[axis], "fsdp")
                break
    while entries and not entries[-1]:
        entries.pop()
    return PartitionSpec(*(entry[0] if len(entry) == 1 else entry or None for entry in entries))
