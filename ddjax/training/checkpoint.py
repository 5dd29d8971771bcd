"""Checkpoints that are proved good before they are used.

Orbax (v0 `CheckpointManager`) stores the arrays; this module adds what it leaves open: a manifest of sizes
and sha256 per step, falling back past damaged steps and saying so, and errors in words. Orbax is imported on
first use.

    with Checkpoints(workdir / "checkpoints") as checkpoints:
        found = checkpoints.restore(abstract_state(state))
        ...
        checkpoints.save(step, state, data=iterator.get_state(), config=config)
"""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from ddjax.training import manifest, scores
from ddjax.training.backend import differences, disk_full, orbax
from ddjax.training.manifest import CheckpointError, barrier, newest_good, report
from ddjax.training.provenance import versions
from ddjax.types import Params, PyTree

DAMAGED = "damaged"  # the folder where bad steps are put aside
_TMP = ".orbax-checkpoint-tmp"
WORTH_CUTTING = 2**20  # bytes of an array that devices hand over in parts


class Checkpoints:
    """The checkpoints of one run. Use as a context manager: leaving it waits for the last save.

    directory: a folder of its own, made if absent. On several hosts, shared by all; every host calls every
        method.
        One process group writes it at a time: opening removes what interrupted saves left. To read beside a
        running training use `load_ema`.
    keep: how many of the latest steps to keep.
    best: "min" or "max": keep the step with the best `score` besides; None keeps none.

    Attribute `problems`: what the last `restore` found damaged, one line for each step.
    Raises CheckpointError if the folder cannot be opened.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep: int = 2,
        best: Literal["min", "max"] | None = None,
    ):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        if best not in ("min", "max", None):
            raise ValueError(f"best must be 'min', 'max' or None, got {best!r}")
        self.directory = Path(directory).absolute()
        self.keep, self.best = keep, best
        self.problems: list[str] = []
        self._saving: int | None = None
        self._closed = False
        try:
            if jax.process_index() == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._sweep()
            barrier("open")
            self._scores = scores.read(self.directory)[1]
            self._manager = self._open()
        except Exception as error:  # Orbax has no common error class, here and below
            raise CheckpointError(f"could not open the checkpoints in {self.directory}: {error}") from error

    def save(
        self,
        step: int,
        state: PyTree,
        *,
        data: Any = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Store the state, in the background. It is copied off first, so it may be donated once this returns.

        step: the number to store it under, above all those stored.
        data, config: anything JSON can hold: the data iterator's state and the run's configuration. JSON
            makes tuples lists.

        Raises CheckpointError if this save, or the one before it, failed: a full disk, a step already stored.
        """
        ocp = orbax()
        extras = {"step": step, "data": data, "config": config, "versions": versions()}
        try:
            extras = json.loads(json.dumps(extras, default=_plain))
        except TypeError as error:
            raise CheckpointError(f"checkpoint {step}: data and config must be JSON: {error}") from error
        self.wait()
        latest = self.latest_step()
        if latest is not None and latest >= step:
            raise CheckpointError(
                f"cannot save checkpoint {step}: {self.directory} already holds step {latest}. Restore it "
                "first, or use another directory"
            )
        self._saving = step
        if jax.process_count() == 1:
            state = jax.tree.map(_one_copy, state)
        try:
            items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), extras=ocp.args.JsonSave(extras))
            if not self._manager.save(step, args=items):
                raise RuntimeError("Orbax declined to save this step")
        except Exception as error:
            raise self._save_error(error) from error

    def wait(self) -> None:
        """Block until the last save is on disk. Raises CheckpointError if it failed."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._save_error(error) from error
        self._saving = None
        if jax.process_index() == 0:
            self._drop_stale_manifests()

    def restore(self, abstract: PyTree) -> tuple[PyTree, dict[str, Any]] | None:
        """The newest state whose files are all as they were written: `(state, extras)`; None if there is none.

        Newer steps that are damaged are reported (`warnings.warn`, and `problems`), and once the older one is
        restored they are moved to `directory/damaged`, so that their numbers are free again.

        abstract: shapes, dtypes and shardings to restore onto (`mesh.abstract_state`); the mesh may be
            another than at the save.
        extras: "step", "data", "config" as given to `save`, and "versions".

        Raises CheckpointError if no step is good, or if the state has another structure (another network).
        """
        ocp = orbax()
        self.wait()
        self._manager.reload()
        step, damaged = newest_good(self.directory, list(self._manager.all_steps()))
        self.problems = report(self.directory, step, damaged)
        if step is None:
            return None
        try:
            saved = self._manager.item_metadata(step).state.tree
        except Exception as error:
            raise self._read_error(step, error) from error
        if differs := differences(saved, abstract):
            raise CheckpointError(
                f"checkpoint {step} in {self.directory} holds another state than this run's:\n"
                + "\n".join(f"  {line}" for line in differs[:5])
                + (f"\n  and {len(differs) - 5} more" if len(differs) > 5 else "")
                + "\nUse the network and optimizer it was trained with (its config is stored beside it), or "
                "start afresh in another directory"
            )
        arguments = ocp.checkpoint_utils.construct_restore_args(abstract)
        items = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(item=abstract, restore_args=arguments), extras=ocp.args.JsonRestore()
        )
        try:
            restored = self._manager.restore(step, args=items)
        except Exception as error:
            raise self._read_error(step, error) from error
        if jax.process_index() == 0:
            for line in self.problems:
                warnings.warn(line, stacklevel=2)
        self._put_aside([k for k, _ in damaged])
        return restored.state, restored.extras

    def latest_step(self) -> int | None:
        """The highest step stored or being stored, good or not."""
        return self._manager.latest_step()

    def score(self, step: int, value: float) -> None:
        """Say how good a step is, when it is saved or being saved; values that are not finite never count.

        Not a part of the save: an evaluation takes its time, and the state is safe before it begins.
        """
        if self.best is None or not math.isfinite(value):
            return
        kept = {k: v for k, v in self._scores.items() if k in self._manager.all_steps()}
        self._scores = {**kept, step: float(value)}
        if jax.process_index() == 0:
            scores.write(self.directory, self.best, self._scores)

    def would_be_best(self, value: float) -> bool:
        """Whether a step of this score would be kept as the best."""
        best = self.best_step()
        if self.best is None or not math.isfinite(value):
            return False
        return best is None or (value < self._scores[best] if self.best == "min" else value > self._scores[best])

    def best_step(self) -> int | None:
        """The step with the best score (the later of equals) of those on disk or being saved; None without scores."""
        return self._best_of(self._manager.all_steps())

    def all_steps(self) -> list[int]:
        """The steps on disk, ascending, after the last save is done."""
        self.wait()
        return sorted(self._manager.all_steps())

    def reached_preemption(self, step: int) -> bool:
        """Whether all hosts agreed to stop at this step (several processes only; see Orbax)."""
        return self._manager.reached_preemption(step)

    def close(self) -> None:
        """Wait for the last save and let go. Raises CheckpointError if that save failed."""
        if self._closed:
            return
        self._closed = True
        try:
            self.wait()
        finally:
            self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is not None and jax.process_count() > 1:
            return  # the others may be gone, and closing waits for them
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            warnings.warn(str(failure), stacklevel=2)  # the error under way is the one to see

    def _best_of(self, steps: Sequence[int]) -> int | None:
        return scores.best_of(self.best, {k: v for k, v in self._scores.items() if k in steps})

    def _open(self):
        ocp = orbax()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_LatestAndBest(self),
            save_root_metadata=False,
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._vouch),
        )
        # Named handlers: without them a manager that has saved nothing yet knows no metadata of older steps.
        handlers = {"state": ocp.PyTreeCheckpointHandler(), "extras": ocp.JsonCheckpointHandler()}
        return ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def _vouch(self) -> None:
        # Orbax calls this on process 0 when every file is written and before the step gets its final name. So
        # a visible step always has its manifest, and older steps are deleted only after.
        step = self._saving
        folders = [path for path in self.directory.glob(f"{step}{_TMP}*") if path.is_dir()]
        manifest.write_manifest(self.directory, step, folders[0] if folders else None)

    def _save_error(self, error: Exception) -> CheckpointError:
        """Clean up after a failed save and say what happened."""
        step, self._saving = self._saving, None
        if jax.process_index() == 0:
            self._sweep()
        if jax.process_count() == 1:  # elsewhere opening waits for the others, whose saves may have gone well
            self._manager = self._open()  # the failed one would raise again
        good = max((k for k in stored_steps(self.directory) if k != step), default=None)
        last = f"the last good checkpoint is step {good}" if good is not None else "there is no older checkpoint"
        reason = f"no space left on {self.directory}" if disk_full(error) else f"{type(error).__name__}: {error}"
        return CheckpointError(f"could not save checkpoint at step {step}: {reason}; {last}")

    def _read_error(self, step: int, error: Exception) -> CheckpointError:
        return CheckpointError(f"could not read checkpoint {step} in {self.directory}: {error}")

    def _sweep(self) -> None:
        """Remove what interrupted saves left behind (never a committed step)."""
        for path in self.directory.glob(f"*{_TMP}*"):
            shutil.rmtree(path)
        for path in (self.directory / manifest.FOLDER).glob("*.tmp"):
            path.unlink()
        self._drop_stale_manifests()

    def _drop_stale_manifests(self) -> None:
        for path in (self.directory / manifest.FOLDER).glob("*.json"):
            if not (self.directory / path.stem).exists():
                path.unlink()

    def _put_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        if jax.process_index() == 0:
            for step in steps:
                target = self.directory / DAMAGED / str(step)
                shutil.rmtree(target, ignore_errors=True)
                target.parent.mkdir(exist_ok=True)
                os.replace(self.directory / str(step), target)
            self._drop_stale_manifests()
        barrier("put_aside")
        self._manager.reload()
        self._scores = {step: score for step, score in self._scores.items() if step not in steps}


class _LatestAndBest:
    """What Orbax asks which steps to keep (its `PreservationPolicy`)."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        steps, mine = [found.step for found in checkpoints], self._checkpoints
        best = mine._best_of(steps)
        return [step == best or step in steps[-mine.keep :] for step in steps]


def stored_steps(directory: Path) -> list[int]:
    """The steps in a folder, ascending, good or not."""
    return (
        sorted(int(p.name) for p in directory.glob("*") if p.name.isdigit() and p.is_dir())
        if directory.is_dir()
        else []
    )


def _one_copy(array: Any) -> Any:
    """Of a small array that every device holds, what the first has; other arrays as they are.

    Orbax cuts an array up so that every device hands over a part of it: a program and a transfer for each of these.
    """
    whole = isinstance(array, jax.Array) and array.is_fully_replicated and array.nbytes < WORTH_CUTTING
    if not whole or jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        return array
    return array.addressable_shards[0].data


def _plain(value: Any) -> Any:
    """Numpy's scalars and arrays for JSON, which knows neither."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"cannot store {value!r} of type {type(value).__name__}")


def load_ema(
    directory: str | os.PathLike, step: int | Literal["best"] | None = None, which: Literal["ema", "params"] = "ema"
) -> tuple[Params, dict[str, Any]]:
    """Parameters for inference, without the network or the optimizer that made them; writes nothing.

    directory: that of a `Checkpoints`, which may be in use by a running training.
    step: default the newest good one; damaged newer ones are warned of. "best": the one with the best `score`.
    which: the average or the raw parameters.

    Returns a nested plain dict of numpy arrays, and the extras of `Checkpoints.restore`.
    Raises CheckpointError if there is no such step or it is damaged.
    """
    ocp = orbax()
    directory = Path(directory).absolute()
    steps = stored_steps(directory)
    if step == "best":
        best, known = scores.read(directory)
        step = scores.best_of(best, {k: v for k, v in known.items() if k in steps})
        if step is None:
            raise CheckpointError(f"no checkpoint in {directory} was evaluated, so none is the best; it has {steps}")
    if step is not None:
        if step not in steps:
            raise CheckpointError(f"{directory} has no checkpoint {step}; it has {steps}")
        steps = [step]
    good, damaged = newest_good(directory, steps)
    for line in report(directory, good, damaged):
        warnings.warn(line, stacklevel=2)
    if good is None:
        raise CheckpointError(f"there is no checkpoint in {directory}")
    folder = directory / str(good)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            saved = checkpointer.metadata(folder / "state").item_metadata.tree
            item = {which: saved[which]}
            arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
            request = ocp.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=True)
            state = checkpointer.restore(folder / "state", args=request)
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            extras = checkpointer.restore(folder / "extras", args=ocp.args.JsonRestore())
    except Exception as error:
        raise CheckpointError(f"could not read {which!r} of checkpoint {good} in {directory}: {error}") from error
    return state[which], extras
