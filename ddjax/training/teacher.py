"""A trained network that another one begins with, or learns from."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ddjax import denoisers, interop, naming
from ddjax.config import ConfigError
from ddjax.experiment import Experiment
from ddjax.training.state import TrainState
from ddjax.types import Apply, Params


class Teacher(NamedTuple):
    """A trained network, and what it says under which process."""

    apply: Apply
    params: Params
    process: Any
    kind: str

    @property
    def shapes(self) -> Teacher:
        """The same without its numbers: shapes and dtypes."""
        return self._replace(params=jax.eval_shape(lambda params: params, self.params))


def load(path: str | os.PathLike) -> Teacher:
    """The network of a run's folder, with its averaged parameters, or of published weights (`interop.load`).

    Parameters are NumPy's arrays: where they are to lie is not known here.
    Raises what `ddjax.load` and `interop.load` raise.
    """
    from ddjax import run  # which needs this package

    if (Path(path) / run.DESCRIPTION).is_file():
        found = run.load_on_host(path)
        return Teacher(found.experiment.apply, found.params, found.process, found.experiment.kind)
    found = interop.load(path)
    return Teacher(found.apply, jax.tree.map(np.asarray, found.params), found.process, found.kind)


def teacher_of(experiment: Experiment, read: Callable[[str], Teacher] = load) -> Teacher | None:
    """The network that `config.objective.teacher` names; None where it names none. read: in the place of `load`."""
    options = dict(experiment.config.objective.teacher)
    return read(_path(options, "config.objective.teacher")) if options else None


def taught(experiment: Experiment, teacher: Teacher | None = None) -> Apply:
    """The experiment's network, which learns from `config.objective.teacher` beside its objective.

    teacher: what `teacher_of` gave, or its `shapes`; default: read now.
    Raises ConfigError where the teacher does not say the same of the same states.
    """
    key, options = "config.objective.teacher", dict(experiment.config.objective.teacher)
    path = _path(options, key)
    teacher = load(path) if teacher is None else teacher
    if teacher.kind != experiment.kind or teacher.process != experiment.process:
        raise ConfigError(
            f"{key}: the teacher says {teacher.kind!r} under {teacher.process}, the network {experiment.kind!r} under "
            f"{experiment.process}: they must be the same"
        )
    made = {"teacher": denoisers.taught}
    return naming.make(made, "teacher", key, experiment.apply, teacher.apply, teacher.params, **options)


def inheriting(experiment: Experiment, state: TrainState, read: Callable[[str], Teacher] = load) -> TrainState:
    """The initial state with parameters of `config.train.inherit` (`denoisers.inherited`), where its own lie.

    read: in the place of `load`.
    Raises ConfigError for parameters that do not fit.
    """
    key, options = "config.train.inherit", dict(experiment.config.train.inherit)
    theirs = read(_path(options, key)).params
    alone = not experiment.learns_process and experiment.named.parameters is None
    own = state.params if alone else state.params["network"]
    new = naming.make({"inherit": denoisers.inherited}, "inherit", key, own, theirs, **options)

    def place(trees: Params) -> Params:
        """In the state's own arrays' places; what was not inherited stays."""
        network = trees if alone else trees["network"]
        placed = jax.tree.map(lambda old, now, first: old if now is first else _like(now, old), network, new, own)
        return placed if alone else {**trees, "network": placed}

    return state._replace(params=place(state.params), ema=place(state.ema))


def _path(options: dict[str, Any], key: str) -> str:
    if not isinstance(options, Mapping) or not isinstance(options.get("path"), str):
        raise ConfigError(f"{key} needs path, the folder of a run or published weights; got {options!r}")
    if not Path(options["path"]).exists():
        raise ConfigError(f"{key}.path={options['path']!r}: there is no such folder or file")
    return options.pop("path")


def _like(value: Any, old: jax.Array) -> jax.Array:
    value = np.asarray(value, old.dtype)
    return jax.make_array_from_callback(old.shape, old.sharding, lambda index: value[index])
