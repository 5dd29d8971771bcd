"""Sampling that skips its middle: a base of former trajectories, and jumps along the nearest of them.

    base = retrieval.build(key, denoise, process, shape=(1000, 16, 16, 1), solver=solver, times=times, early=4, late=12)
    ddjax.sample(other_key, denoise, process, solver=retrieval.redi(solver, base), times=times, ...)

(Zhang et al. 2023, "ReDi: Efficient Learning-Free Diffusion Inference via Trajectory Retrieval".) The first steps are
made as ever; the state they lead to is looked up among those of the base, and the state to which the nearest one led
later is taken in its place. On paths of an ODE with a sensitivity of at most L from the early time to the end, what is
lost is at most L times the distance to the neighbour (the paper bounds L by Lipschitz constants).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key
from numpy.typing import ArrayLike

from ddjax import files, sampling
from ddjax.frozen import Frozen
from ddjax.gaussian_law import labels_in
from ddjax.solvers.base import Info, Solver
from ddjax.solvers.switched import Switched
from ddjax.types import Denoise, State

FORMAT = "ddjax trajectories 1"


@dataclasses.dataclass(frozen=True)
class Trajectories:
    """Pairs of states of the same samplings at two times.

    early, late: `(n, *shape)`, the keys and what they led to. times: of both, decreasing. labels: `(n,)`, under which
    they were sampled, or None. They are constants of the compiled sampler: for bases of some hundred megabytes at most.
    """

    early: Frozen | ArrayLike
    late: Frozen | ArrayLike
    times: tuple[float, float]
    labels: Frozen | ArrayLike | None = None

    def __post_init__(self):
        object.__setattr__(self, "times", tuple(float(t) for t in self.times))
        for name in ("early", "late", "labels"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Frozen):
                object.__setattr__(self, name, Frozen(value))
        shapes = self.early.values.shape, self.late.values.shape
        if shapes[0] != shapes[1] or len(self) < 1:
            raise ValueError(f"early and late states must be as many and alike, and at least one, got {shapes}")
        if self.labels is not None and self.labels.values.shape != (len(self),):
            raise ValueError(f"labels must be {len(self)}, got shape {self.labels.values.shape}")
        if len(self.times) != 2 or not self.times[0] > self.times[1]:
            raise ValueError(f"times are an earlier and a later one, decreasing, got {self.times}")

    def __len__(self) -> int:
        return len(self.early.values)

    def save(self, path: str | os.PathLike) -> None:
        """Write them as a safetensors file."""
        from ddjax.training import export_safetensors  # here: the mathematics needs no training

        arrays = {"early": self.early.values, "late": self.late.values, "times": np.asarray(self.times)}
        if self.labels is not None:
            arrays["labels"] = self.labels.values
        export_safetensors(path, arrays, {"format": FORMAT})


def load(path: str | os.PathLike) -> Trajectories:
    """Read what `save` wrote. Raises ValueError for other files, FileNotFoundError where there is none."""
    what = "trajectories that `Trajectories.save` wrote: build some and save them"
    arrays = files.read_arrays(path, FORMAT, what)
    return Trajectories(arrays["early"], arrays["late"], tuple(arrays["times"]), arrays.get("labels"))


def build(
    key: Key[Array, ""],
    denoise: Denoise,
    process: Any,
    *,
    shape: Sequence[int],
    solver: Solver,
    times: Array,
    early: int,
    late: int,
    cond: Any = None,
    rows: Int[Array, " batch"] | None = None,
) -> Trajectories:
    """Sample as far as step `late` of the grid, and keep the states after `early` and `late` steps.

    shape, solver, times, cond, rows: as in `sample`. Labels are kept where `cond` is an array of them, or a dict with
    an entry "cond" that is. Keys that are
    used again to sample find their own trajectories: take others.
    Raises ValueError for steps that are not on the grid in this order.
    """
    _check_steps(early, late, len(times) - 1)
    settings = {"shape": shape, "solver": solver, "times": times[: late + 1], "cond": cond, "rows": rows}
    path = sampling.sample(key, denoise, process, **settings, trajectory=True).trajectory
    labels = labels_in(cond)
    labels = labels if isinstance(labels, (np.ndarray, jax.Array)) and labels.ndim == 1 else None
    return Trajectories(path[early], path[late], (float(times[early]), float(times[late])), labels)


def _check_steps(early: int, late: int, steps: int) -> None:
    if not 0 <= early < late <= steps:
        raise ValueError(f"expected 0 <= early < late <= {steps}, the grid's steps, got {early} and {late}")


@dataclasses.dataclass(frozen=True)
class Retrieved:
    """One step to the later state of the nearest trajectory; then it rests. Without evaluations.

    The distance is Euclid's, over all sites, found exactly, `chunk` trajectories at a time. Among trajectories with the
    example's own label, where the base has labels and any such; else among all.
    neighbours: how many are combined, by the weights whose combination of early states is the nearest to the state
        (least squares, of the least norm); 1 takes the later state of the nearest as it is.
    """

    process: Any
    base: Trajectories
    neighbours: int = 1
    chunk: int = 256

    def __post_init__(self):
        if getattr(self.process, "state", None) != "gaussian":
            raise ValueError(f"trajectories are retrieved for real states, not those of {type(self.process).__name__}")
        if not 1 <= self.neighbours <= len(self.base) or self.chunk < 1:
            raise ValueError(
                f"neighbours must be one of 1 ... {len(self.base)}, the trajectories of the base, and chunk positive, "
                f"got {self.neighbours} and {self.chunk}"
            )

    def init(self, xt, cond=None):
        """Whether it has jumped."""
        return jnp.zeros((), bool)

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        """The jump, or nothing."""
        xs = jax.lax.cond(carry, lambda: xt, lambda: self._jump(xt, cond))
        return xs, jnp.ones((), bool), Info(jnp.zeros(xt.shape[0], jnp.int32))

    def _jump(self, xt: State, cond: Any) -> State:
        found, _ = nearest(self.base, xt, cond, self.neighbours, self.chunk)
        late = jnp.asarray(self.base.late.values, xt.dtype)[found]
        if self.neighbours == 1:
            return late[:, 0]
        early = jnp.asarray(self.base.early.values, xt.dtype)[found]

        def combined(x, early, late):
            columns = early.reshape(self.neighbours, -1).T
            return jnp.tensordot(jnp.linalg.lstsq(columns, x.ravel())[0], late, axes=1)

        return jax.vmap(combined)(xt, early, late)


def nearest(
    base: Trajectories, xt: State, cond: Any = None, neighbours: int = 1, chunk: int = 256
) -> tuple[Int[Array, "batch neighbours"], Float[Array, "batch neighbours"]]:
    """Which early states are nearest, the nearest first, and how far they are. Of equals, the first of the base."""
    if xt.shape[1:] != base.early.values.shape[1:]:
        raise ValueError(f"the base is of states of shape {base.early.values.shape[1:]}, got {xt.shape[1:]}")
    count = len(base)
    labels = None if base.labels is None else labels_in(cond)
    size = min(chunk, count)
    padded = -(-count // size) * size
    parts = jnp.asarray(base.early.values, xt.dtype).reshape(count, -1)
    parts = jnp.pad(parts, ((0, padded - count), (0, 0))).reshape(-1, size, parts.shape[1])
    index = jnp.arange(padded).reshape(-1, size)
    own = jnp.zeros(padded) if labels is None else jnp.pad(jnp.asarray(base.labels.values), (0, padded - count))
    x = xt.reshape(len(xt), -1)

    def better(best, part):
        states, index, own = part
        squared = jnp.square(x[:, None] - states).sum(-1)
        squared = jnp.where(index < count, squared, jnp.inf)
        if labels is not None:  # those of another label come behind all of the own
            strange = jnp.broadcast_to(own != labels[:, None], squared.shape)
        else:
            strange = jnp.zeros(squared.shape, bool)
        strange, squared, index = (
            jnp.concatenate([old, jnp.broadcast_to(new, squared.shape)], axis=1)
            for old, new in zip(best, (strange, squared, index), strict=True)
        )
        order = jnp.lexsort((index, squared, strange), axis=1)[:, :neighbours]
        return tuple(jnp.take_along_axis(v, order, axis=1) for v in (strange, squared, index)), None

    shape = (len(x), neighbours)
    none = jnp.ones(shape, bool), jnp.full(shape, jnp.inf, x.dtype), jnp.full(shape, padded, index.dtype)
    (_, squared, found), _ = jax.lax.scan(better, none, (parts, index, own.reshape(-1, size)))
    return found, jnp.sqrt(squared)


def redi(solver: Solver, base: Trajectories, neighbours: int = 1) -> Switched:
    """`solver` as far as the base's earlier time, the jump, and `solver` again from its later one, without a memory.

    Put both times on the grid; the evaluations of the steps between them are spared.
    """
    return Switched((solver, Retrieved(solver.process, base, neighbours), solver), base.times)


def for_run(
    run: Any,
    key: Key[Array, ""],
    n: int,
    *,
    early: int,
    late: int,
    steps: int | None = None,
    solver: str | Any | None = None,
    guidance: float | None = None,
    batch_size: int = 256,
) -> Trajectories:
    """A base of n samplings of a trained run (`ddjax.load`), of all labels in turn, on its config's grid.

    early, late: numbers of steps. steps, solver, guidance: as in `run.sample`, and the same there afterwards:

        base = retrieval.for_run(run, jax.random.key(1), 4096, steps=24, early=6, late=14, solver="heun")
        base.save("base.safetensors")
        run.sample(key, 64, cond=labels, steps=24, solver="redi", solver_options={"base": ..., "solver": "heun"})

    batch_size: sampled at a time; it does not change them.
    """
    experiment = run.experiment
    made, times = run.sampler(solver, steps)
    scale = run.config.sample.guidance if guidance is None else guidance
    labels = run.labels(np.arange(n, dtype=np.int32) % run.data.num_classes if run.data.num_classes else None, n)
    denoise = experiment.denoiser(run.params, float(scale), labels)
    _check_steps(early, late, len(times) - 1)
    parts = []
    for start in range(0, n, batch_size):
        rows = np.minimum(np.arange(start, start + min(batch_size, n)), n - 1)  # the last chunk repeats its last row
        own = jax.tree.map(lambda v, rows=rows: jnp.asarray(v[rows]), labels)
        cond = experiment.to_sample(key, jnp.asarray(rows), own)
        settings = {"shape": (len(rows), *experiment.state_shape), "solver": made, "times": times, "cond": cond}
        parts.append(
            build(
                key, denoise, experiment.sampling_process, **settings, early=early, late=late, rows=jnp.asarray(rows)
            )
        )  # fmt: skip
    states = (np.concatenate([getattr(part, name).values for part in parts])[:n] for name in ("early", "late"))
    return Trajectories(*states, parts[0].times, labels)
