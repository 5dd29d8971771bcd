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
from ddjax.training.mesh import OnMesh, check_axes, compile_step, make_mesh, on_host, state_shardings
from ddjax.training.state import TrainState, init_state
from ddjax.training.step import Step, make_train_step
from ddjax.training.teacher import inheriting, taught
from ddjax.types import PyTree


class Setup(NamedTuple):
    """A training about to begin."""

    mesh: Mesh
    state: TrainState  # initial, in place on the mesh
    shardings: TrainState  # of the state
    step: OnMesh  # jitted; donates the state


def prepare(experiment: Experiment) -> Setup:
    """Lay out the mesh, initialise the state on it, and jit the step (nothing of the step is compiled yet).

    Raises ValueError where the mesh does not fit the devices, or has an axis with nothing to cut.
    """
    mesh = make_mesh(experiment.config.train.mesh)
    key = jax.random.key(experiment.config.train.seed)
    shardings = places(experiment, mesh)
    state = jax.jit(functools.partial(initial_state, experiment), out_shardings=shardings)(key)
    if experiment.config.train.inherit:
        state = inheriting(experiment, state)
    return Setup(mesh, state, shardings, compile_step(train_step(experiment), shardings, mesh))


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


def train_step(experiment: Experiment) -> Step:
    """The step as the pure function it is, without devices (`make_train_step`)."""
    return make_train_step(
        experiment.objective(),
        taught(experiment) if experiment.config.objective.teacher else experiment.apply,
        experiment.optimizer(),
        accumulate=experiment.config.train.accumulate,
        ema=experiment.ema(),
        spike=experiment.config.train.spike,
        skip_bad=experiment.config.train.on_bad_step == "skip",
    )


def step_flops(experiment: Experiment, batch: PyTree) -> int:
    """FLOPs of one training step of the model on such a batch, without what `remat` computes again."""
    model = as_model(experiment)
    state = jax.eval_shape(functools.partial(initial_state, model), jax.random.key(0))
    batch = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), batch)
    return flops.count(train_step(model), state, batch)


def as_model(experiment: Experiment) -> Experiment:
    """The same network, as the model it computes: nothing twice (remat), and nothing hidden in a fused kernel."""
    options = dict(experiment.config.denoiser.options)
    if options.get("remat"):
        options["remat"] = False
    if options.get("attention") == "cudnn":
        options["attention"] = "xla"
    denoiser = dataclasses.replace(experiment.config.denoiser, options=options)
    return build(dataclasses.replace(experiment.config, denoiser=denoiser), experiment.data)
