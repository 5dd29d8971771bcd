"""Fast samplers learned for a trained model, by gradient descent through the whole sampling loop.

(Watson et al. 2022, "Learning Fast Samplers for Diffusion Models by Differentiating Through Sample Quality".)

    start = solvers.learned.written_out(solvers.dpm_solver_pp(process), times)     # a good solver, as coefficients
    examples = search.fine_examples(key, denoise, process, shape=(256, 2), times=times, fine=grids.uniform(200))
    found = search.search(key, denoise, search.General(start), search.to_fine, examples)
    ddjax.sample(key, denoise, process, shape=..., solver=found.solver, times=found.times)

The model's weights stay as they are. Three families of samplers can be searched: `General` (all coefficients, noise
and times), `Compensation` (DC-Solver's ratios) and `Grid` (the times of any solver). Losses: `to_fine`, `kernel`,
`reward`, or any differentiable function of the samples.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from ddjax import random
from ddjax.frozen import Frozen
from ddjax.grids import check_grid
from ddjax.processes.gaussian import gaussian_of
from ddjax.pytrees import as_pytree
from ddjax.sampling import sample
from ddjax.solvers import DDIM, Learned, Multistep, Solver
from ddjax.solvers.base import first_carry
from ddjax.solvers.learned import Coefficients, frozen, written_out
from ddjax.types import Denoise, Keys, Params, PyTree, State


class Examples(NamedTuple):
    """What a search draws its batches from; all with one leading axis."""

    init: State  # states at the first time
    target: PyTree = None  # what the loss compares with
    cond: PyTree = None


Loss = Callable[[State, Examples], Float[Array, ""]]  # of samples, and the examples they began from


class Found(NamedTuple):
    """A searched sampler: for `sample(solver=found.solver, times=found.times)`."""

    solver: Any
    times: np.ndarray
    losses: np.ndarray  # of each iteration, on its batch
    iteration: int  # whose parameters these are: the last, or the best of those looked at


# -- the families ------------------------------------------------------------------------------------------------


class _Times:
    """Decreasing times between two that stay where they are: their steps are a softmax of free numbers."""

    @staticmethod
    def free(times: Any) -> Array:
        return jnp.log(jnp.asarray(-np.diff(np.asarray(times, np.float64)), float))

    @staticmethod
    def of(free: Array, ends: tuple[float, float]) -> Array:
        steps = jax.nn.softmax(free) * (ends[0] - ends[1])
        # Summed from the data's end: there the steps are small, and so is their rounding error.
        inner = ends[1] + jnp.cumsum(steps[::-1])[::-1][1:]
        first, last = (jnp.full((1,), end, steps.dtype) for end in ends)
        return jnp.concatenate([first, inner, last])


@dataclasses.dataclass(frozen=True)
class General:
    """The generalised Gaussian family, from a point of it (`solvers.learned.written_out`).

    Noise is learned where the start has some; a deterministic start stays deterministic. times: whether these move.
    """

    start: Learned
    times: bool = True

    @property
    def parameters(self) -> Params:
        """Where the search begins."""
        c = self.start.coefficients.tree
        free = {"predictions": jnp.asarray(np.tril(c.predictions, -1), float)}
        free |= {"times": _Times.free(c.times)} if self.times else {}
        return free if c.noises is None else free | {"noises": jnp.asarray(c.noises, float)}

    def make(self, parameters: Params) -> tuple[Learned, Array]:
        """The solver and its times, valid for any parameters."""
        c = self.start.coefficients.tree
        times = jnp.asarray(c.times, float)
        if self.times:
            times = _Times.of(parameters["times"], (float(c.times[0]), float(c.times[-1])))
        past = jnp.tril(parameters["predictions"], -1)
        noises = None
        if c.noises is not None:
            noises = jnp.tril(parameters["noises"], 1)
            noises = noises / jnp.linalg.norm(noises, axis=1, keepdims=True)
        made = Coefficients(times, past + jnp.diag(1.0 - past.sum(1)), noises)
        return Learned(self.start.process, made), times

    def finish(self, parameters: Params) -> tuple[Learned, np.ndarray]:
        """The same, as constants."""
        solver = frozen(self.start.process, *self.make(parameters)[0].coefficients)
        return solver, solver.times


@dataclasses.dataclass(frozen=True)
class Grid:
    """The times of any solver of states with noise; the first and the last stay."""

    solver: Solver
    start: Frozen

    def __post_init__(self):
        object.__setattr__(self, "start", _constant(self.start))

    @property
    def parameters(self) -> Params:
        """Where the search begins."""
        return {"times": _Times.free(self.start)}

    def make(self, parameters: Params) -> tuple[Any, Array]:
        """The solver and the times, which decrease for any parameters."""
        ends = self.start.values[[0, -1]]
        return self.solver, _Times.of(parameters["times"], (float(ends[0]), float(ends[1])))

    def finish(self, parameters: Params) -> tuple[Any, np.ndarray]:
        """The same, as constants."""
        return self.solver, np.asarray(self.make(parameters)[1], np.float64)


@dataclasses.dataclass(frozen=True)
class Compensation:
    """DC-Solver's ratio for each step of a multistep solver, between 0 and 2 (Zhao et al. 2024).

    Raises ValueError for other solvers, and for those of order 1.
    """

    solver: Multistep
    start: Frozen

    def __post_init__(self):
        object.__setattr__(self, "start", _constant(self.start))
        if not isinstance(self.solver, Multistep):
            raise ValueError(f"ratios compensate solvers.Multistep, not {type(self.solver).__name__}")
        self.make(self.parameters)  # raises for orders without a past

    @property
    def parameters(self) -> Params:
        """Where the search begins: no compensation."""
        return {"ratios": jnp.zeros(len(self.start.values) - 1)}

    def make(self, parameters: Params) -> tuple[Multistep, Array]:
        """The solver with its ratios."""
        ratios = 1.0 + jnp.tanh(parameters["ratios"])
        return dataclasses.replace(self.solver, compensation=ratios), jnp.asarray(self.start.values, float)

    def finish(self, parameters: Params) -> tuple[Multistep, np.ndarray]:
        """The same, as constants."""
        solver = self.make(parameters)[0]
        ratios = tuple(np.asarray(solver.compensation, np.float64).tolist())
        return dataclasses.replace(solver, compensation=ratios), self.start.values


def _constant(times: Any) -> Frozen:
    return times if isinstance(times, Frozen) else Frozen(check_grid(np.asarray(times, np.float64)))


# -- the losses --------------------------------------------------------------------------------------------------


def to_fine(x0: State, examples: Examples) -> Float[Array, ""]:
    """Mean squared distance to the fine solution from the same noise, `examples.target`."""
    return jnp.mean((x0 - examples.target) ** 2)


def kernel(features: Callable[[State], Float[Array, "n dims"]] | None = None, degree: int = 3) -> Loss:
    """The kernel distance to data, `examples.target`, in a space of features (Binkowski et al. 2018, KID).

    features: states to vectors, differentiable; default: all values in a row. See `squared_mmd`.
    """

    def loss(x0: State, examples: Examples) -> Float[Array, ""]:
        flat = features or (lambda x: x.reshape(x.shape[0], -1))
        return squared_mmd(flat(x0), flat(examples.target), degree)

    return loss


def squared_mmd(x: Float[Array, "n dims"], y: Float[Array, "m dims"], degree: int = 3) -> Float[Array, ""]:
    """The unbiased estimate of the squared distance of two laws under the kernel (x.y / dims + 1)^degree."""
    if min(len(x), len(y)) < 2:
        raise ValueError(f"a kernel distance needs at least two vectors of each law, got {len(x)} and {len(y)}")

    def k(a, b):
        return (a @ b.T / a.shape[1] + 1.0) ** degree

    def within(a):
        whole = k(a, a)
        return (whole.sum() - jnp.trace(whole)) / (len(a) * (len(a) - 1))

    return within(x) + within(y) - 2.0 * k(x, y).mean()


def reward(function: Callable[[State], Float[Array, " batch"]]) -> Loss:
    """Minus the mean of a differentiable reward of each sample."""
    return lambda x0, examples: -jnp.mean(function(x0))


# -- the search --------------------------------------------------------------------------------------------------


def fine_examples(
    key: Key[Array, ""],
    denoise: Denoise,
    process: Any,
    *,
    shape: Sequence[int],
    times: Any,
    fine: Any,
    solver: Solver | None = None,
    cond: PyTree = None,
) -> Examples:
    """First states, and where a solver (default: DDIM) takes them on a fine grid, which must begin where `times` does.

    Raises ValueError where it does not.
    """
    if not np.isclose(float(fine[0]), float(times[0])):
        raise ValueError(f"the fine grid begins at {float(fine[0])}, the other at {float(times[0])}: they must agree")
    init = process.prior(tuple(shape), jnp.asarray(times[0], float)).sample(random.example_keys(key, shape[0]))
    solver = DDIM(process) if solver is None else solver
    drawn = sample(key, denoise, process, shape=shape, solver=solver, times=fine, cond=cond, init=init)
    return Examples(init, drawn.x0, cond)


def draw(keys: Keys, denoise: Denoise, solver: Solver, times: Array, init: State, cond: PyTree = None) -> State:
    """What `ddjax.sample` draws from `init`, differentiable in all that the solver and the times are made of.

    Each evaluation of the network is made again on the way back, so that of a step only states are kept.
    keys: those of the steps, one for each example.
    """
    network = jax.checkpoint(lambda xt, t, cond: denoise(xt, t, cond))

    def step(state, i):
        x, carry = state
        step_keys = random.fold_in(keys, i)
        moved, carry, _ = solver.step(step_keys, carry, x, times[i], times[i + 1], network, cond)
        return (moved.astype(x.dtype), carry), None

    if not isinstance(solver, Learned):  # whose carry is long, but adds up: nothing of it is needed on the way back
        step = jax.checkpoint(step)
    first = first_carry(solver, init, cond, network)
    (x0, _), _ = jax.lax.scan(step, (init, first), jnp.arange(times.shape[0] - 1))
    return x0


def evaluate(
    key: Key[Array, ""], denoise: Denoise, family: Any, parameters: Params, loss: Loss, examples: Examples
) -> Float[Array, ""]:
    """The loss of the samples from all the examples: differentiable in the parameters."""
    solver, times = family.make(parameters)
    keys = random.example_keys(key, examples.init.shape[0])
    return loss(draw(keys, denoise, solver, times, examples.init, examples.cond), examples)


def search(
    key: Key[Array, ""],
    denoise: Denoise,
    family: General | Grid | Compensation,
    loss: Loss,
    examples: Examples,
    *,
    iterations: int = 300,
    batch: int = 64,
    learning_rate: float = 0.02,
    choose: Examples | None = None,
    every: int = 25,
) -> Found:
    """Adam on the family's parameters, its rate falling to 0 as a cosine; batches are drawn from the examples.

    choose: other examples, on which the parameters of every `every` iterations (the first and the last too) are
        compared; the best are given back. None: the last. A search can follow its examples' noise where it leads away
        from others', and is never worse here than where it began.
    The same key gives the same sampler. Raises ValueError for examples that do not agree in number, and RuntimeError
    where the search leaves the finite numbers.
    """
    count = examples.init.shape[0]
    for some in (examples, *(() if choose is None else (choose,))):
        if any(leaf.shape[0] != some.init.shape[0] for leaf in jax.tree.leaves(some)):
            raise ValueError(f"all examples must have the leading axis of the first states, {some.init.shape[0]}")
    if min(iterations, batch, every) < 1:
        raise ValueError(f"iterations, batch and every must be 1 or more, got {iterations}, {batch} and {every}")
    batch = min(batch, count)
    parameters, denoise = family.parameters, as_pytree(denoise)
    rate, state = optax.cosine_decay_schedule(learning_rate, iterations), _ADAM.init(parameters)
    losses, looked = [], []
    for i in range(iterations + 1):
        if choose is not None and (i % every == 0 or i == iterations):
            looked.append((_judged(key, parameters, denoise, choose, family, loss), i, parameters))
        if i < iterations:
            own = jax.random.fold_in(key, i)
            parameters, state, value = _update(own, parameters, state, rate(i), denoise, examples, family, loss, batch)
            losses.append(value)
    losses = np.asarray(jnp.stack(losses))
    if not (np.isfinite(losses).all() and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(parameters))):
        at = int(np.argmin(np.isfinite(losses)))
        raise RuntimeError(f"the search left the finite numbers at iteration {at}: lower learning_rate")
    _, at, parameters = min(looked or [(0.0, iterations, parameters)], key=lambda one: float(one[0]))
    return Found(*family.finish(parameters), losses, at)


_ADAM = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())


@functools.partial(jax.jit, static_argnames=("family", "loss", "batch"))
def _update(key, parameters, state, rate, denoise, examples, family, loss, batch):
    rows = jax.random.choice(key, examples.init.shape[0], (batch,), replace=False)
    some = jax.tree.map(lambda leaf: leaf[rows], examples)
    value, gradient = jax.value_and_grad(lambda p: evaluate(key, denoise, family, p, loss, some))(parameters)
    way, state = _ADAM.update(gradient, state)
    return jax.tree.map(lambda p, d: p - (rate * d).astype(p.dtype), parameters, way), state, value


@functools.partial(jax.jit, static_argnames=("family", "loss"))
def _judged(key, parameters, denoise, examples, family, loss):
    return evaluate(key, denoise, family, parameters, loss, examples)


FAMILIES = {
    "general": lambda solver, times: General(written_out(solver, times)),
    "grid": Grid,
    "compensation": Compensation,
}
LOSSES = {"fine": to_fine, "kernel": kernel()}


class Report(NamedTuple):
    """A search for a trained model."""

    solver: Learned
    before: float  # the loss of the hand-made solver that the search began from, on examples not searched on
    after: float
    found: Found  # the same as it was searched


def for_run(
    run: Any,
    key: Key[Array, ""],
    *,
    steps: int,
    loss: str | Loss = "fine",
    family: str = "general",
    solver: str = "dpm_solver_pp",
    num: int = 256,
    fine_steps: int = 200,
    guidance: float | None = None,
    **options: Any,
) -> Report:
    """Learn a sampler of a trained run (`ddjax.load`), on its config's grid of that many steps.

    loss: "fine", the distance to DDIM in `fine_steps`; "kernel", the distance to the training data in pixels; or any
        other, whose target is training data too: `kernel(features)`, `reward(function)`.
    family, solver: what is learned, and where it begins. num: examples to learn from, as many again to choose the
        iteration by, and as many again for the losses reported. options: those of `search`.
    Raises ValueError for names that are unknown, and for what does not go together.
    """
    from ddjax.loading import load_data  # here: the mathematics needs no data sets

    by = LOSSES.get(loss, loss)
    if not callable(by):
        raise ValueError(f"loss={loss!r} is unknown; it is one of {', '.join(LOSSES)}, or a function")
    if family not in FAMILIES:
        raise ValueError(f"family={family!r} is unknown; it is one of {', '.join(FAMILIES)}")
    experiment, process = run.experiment, gaussian_of(run.process)
    if process is None:
        raise ValueError(f"samplers are learned for Gaussian processes, not for {run.config.process.name!r}")
    if guidance not in (None, 1.0) and not run.data.num_classes:
        raise ValueError(f"guidance={guidance} leads towards labels, and {run.data.name!r} has none: leave it out")
    times, started = experiment.times(steps), experiment.solver(solver)
    learned = FAMILIES[family](started, times)
    if family != "general":
        written_out(started, times)  # what is given back is of that family too: an error now, not after the search
    items = load_data(run.config, "train")
    if by is not to_fine and len(items) < 3 * num:
        raise ValueError(f"num={num} examples three times over are needed, but there are {len(items)} to train on")

    def examples(which: int) -> tuple[Denoise, Examples]:
        own, rows = jax.random.fold_in(key, which), np.arange(num) + which * num
        rows = rows % len(items)
        labels = jax.tree.map(jnp.asarray, items[rows].get("cond"))
        scale = run.config.sample.guidance if guidance is None else guidance
        denoise = experiment.guided(run.denoise, float(scale), labels)
        cond, shape = experiment.to_sample(own, jnp.arange(num), labels), experiment.batch_shape(num)
        fine = experiment.times(fine_steps) if by is to_fine else times
        found = fine_examples(own, denoise, process, shape=shape, times=times, fine=fine, cond=cond)
        return denoise, found if by is to_fine else found._replace(target=jnp.asarray(items[rows]["x0"]))

    denoise, some = examples(0)
    found = search(key, denoise, learned, by, some, choose=examples(1)[1], **options)
    end, (_, held_out) = written_out(found.solver, found.times) if family != "general" else found.solver, examples(2)

    def measured(solver: Solver, times: Any) -> float:
        drawn = sample(
            key, denoise, process, shape=held_out.init.shape, solver=solver, times=jnp.asarray(times, float),
            cond=held_out.cond, init=held_out.init,
        )  # fmt: skip
        return float(by(drawn.x0, held_out))

    return Report(end, measured(started, times), measured(end, end.times), found)
