"""From an experiment to all that a training step needs: what the loop runs is what the bench measures."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from ddjax.config import ConfigError
from ddjax.experiment import Experiment
from ddjax.training.mesh import check_axes, compile_step, make_mesh, on_host, state_shardings
from ddjax.training.state import TrainState, init_state
from ddjax.training.step import Step, make_train_step


class Setup(NamedTuple):
    """A training about to begin."""

    mesh: Mesh
    state: TrainState  # initial, in place on the mesh
    shardings: TrainState  # of the state
    step: Step  # jitted; donates the state


def prepare(experiment: Experiment) -> Setup:
    """Lay out the mesh, initialise the state on it, and jit the step (nothing of the step is compiled yet).

    Raises ValueError where the mesh does not fit the devices, or has an axis with nothing to cut.
    """
    mesh = make_mesh(experiment.config.train.mesh)
    key = jax.random.key(experiment.config.train.seed)
    shardings = places(experiment, mesh)
    state = jax.jit(functools.partial(initial_state, experiment), out_shardings=shardings)(key)
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
        experiment.apply,
        experiment.optimizer(),
        accumulate=experiment.config.train.accumulate,
        ema=experiment.ema(),
    )
