"""From an experiment to all that a training step needs: what the loop runs is what the bench measures."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from ddjax import flops
from ddjax.config import ConfigError
from ddjax.experiment import Experiment, build
from ddjax.training.mesh import OnMesh, check_axes, compile_step, make_mesh, on_host, shapes_of, state_shardings
from ddjax.training.state import TrainState, init_state
from ddjax.training.step import Step, make_train_step
from ddjax.training.teacher import Teacher, inheriting, load, taught, teacher_of
from ddjax.types import PyTree


class Setup(NamedTuple):
    """A training about to begin."""

    mesh: Mesh
    state: TrainState  # initial, in place on the mesh; its shapes where it is to come from a checkpoint
    shardings: TrainState  # of the state
    step: OnMesh  # jitted; donates the state
    teacher: Teacher | None  # whom the step holds: shapes


def prepare(experiment: Experiment, *, fresh: bool = True) -> Setup:
    """Lay out the mesh, initialise the state on it, and jit the step (nothing of the step is compiled yet).

    fresh: False where the state is to come from a checkpoint: it is not made, and nothing is inherited.
    Raises ValueError where the mesh does not fit the devices, or has an axis with nothing to cut.
    """
    mesh = make_mesh(experiment.config.train.mesh)
    shardings, initial = places(experiment, mesh), functools.partial(initial_state, experiment)
    key, read = jax.random.key(experiment.config.train.seed), functools.cache(load)  # who teaches may be inherited too
    teacher = teacher_of(experiment, read)
    state = jax.jit(initial, out_shardings=shardings)(key) if fresh else jax.eval_shape(initial, key)
    if fresh and experiment.config.train.inherit:
        state = inheriting(experiment, state, read)
    step = compile_step(train_step(experiment, teacher), shardings, mesh)
    return Setup(mesh, state, shardings, step, teacher and teacher.shapes)


def places(experiment: Experiment, mesh: Mesh) -> TrainState:
    """The shardings of the state on a mesh. Raises ValueError as `prepare` does, ConfigError for unknown memory."""
    if (memory := experiment.config.train.ema_memory) not in ("device", "host"):
        raise ConfigError(f"config.train.ema_memory must be device or host, got {memory!r}")
    state = jax.eval_shape(functools.partial(initial_state, experiment), jax.random.key(0))
    shardings = state_shardings(state, mesh)
    check_axes(shardings, mesh)
    if memory == "host":
        shardings = shardings._replace(ema=on_host(shardings.ema))
    return shardings


def initial_state(experiment: Experiment, key: jax.Array) -> TrainState:
    """The state before the first step; pure (`init_state`)."""
    return init_state(experiment.init, experiment.optimizer(), key)


def train_step(experiment: Experiment, teacher: Teacher | None = None) -> Step:
    """The step as the pure function it is, without devices (`make_train_step`).

    teacher: of a config that has one, what `teacher_of` gave, or its `shapes`; default: read now.
    """
    return make_train_step(
        experiment.objective(),
        taught(experiment, teacher) if experiment.config.objective.teacher else experiment.apply,
        experiment.optimizer(),
        accumulate=experiment.config.train.accumulate,
        ema=experiment.ema(),
        spike=experiment.config.train.spike,
        skip_bad=experiment.config.train.on_bad_step == "skip",
    )


def step_flops(experiment: Experiment, batch: PyTree, teacher: Teacher | None = None) -> int:
    """FLOPs of one training step of the model on such a batch, without what `remat` computes again.

    teacher: as in `train_step`.
    """
    model = as_model(experiment)
    state = jax.eval_shape(functools.partial(initial_state, model), jax.random.key(0))
    step, batch = shapes_of((train_step(model, teacher), batch))
    return flops.count(lambda step, *rest: step(*rest), step, state, batch)


def as_model(experiment: Experiment) -> Experiment:
    """The same network, as the model it computes: nothing twice (remat), and nothing hidden in a fused kernel."""
    options = dict(experiment.config.denoiser.options)
    if options.get("remat"):
        options["remat"] = False
    if options.get("attention") == "cudnn":
        options["attention"] = "xla"
    denoiser = dataclasses.replace(experiment.config.denoiser, options=options)
    return build(dataclasses.replace(experiment.config, denoiser=denoiser), experiment.data)
