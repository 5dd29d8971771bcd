"""From an experiment to all that a training step needs: what the loop runs is what the bench measures."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from ddjax.experiment import Experiment
from ddjax.training.mesh import compile_step, init_sharded, make_mesh
from ddjax.training.state import TrainState, init_state
from ddjax.training.step import Step, make_train_step
from ddjax.types import PyTree


class Setup(NamedTuple):
    """A training about to begin."""

    mesh: Mesh
    state: TrainState  # initial, in place on the mesh
    shardings: PyTree  # of the state
    step: Step  # jitted; donates the state


def prepare(experiment: Experiment) -> Setup:
    """Lay out the mesh, initialise the state on it, and jit the step (nothing of the step is compiled yet).

    Raises ValueError where the mesh does not fit the devices.
    """
    mesh = make_mesh(experiment.config.train.mesh)
    init = functools.partial(initial_state, experiment)
    state, shardings = init_sharded(init, mesh, (), jax.random.key(experiment.config.train.seed))
    return Setup(mesh, state, shardings, compile_step(train_step(experiment), shardings, mesh))


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
