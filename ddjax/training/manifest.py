"""Manifests: the size and sha256 of every file of a checkpoint.

Orbax stores no checksums: a flipped bit restores silently as a wrong number, and a truncated newest step is
still "the latest". A manifest, written before a step becomes visible, is what says that a step is good.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import jax
import numpy as np

FOLDER = "manifests"
# Orbax rewrites these two while committing; a step restores without them.
_UNLISTED = {"commit_success.txt", "_CHECKPOINT_METADATA"}


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written or read; the message says which, why, and what to do."""


def manifest_path(directory: Path, step: int) -> Path:
    """Where the manifest of a step lies."""
    return directory / FOLDER / f"{step}.json"


def describe(folder: Path) -> dict[str, list]:
    """`{relative path: [bytes, sha256]}` of every file under `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in _UNLISTED)
    return {path.relative_to(folder).as_posix(): [path.stat().st_size, _sha256(path)] for path in files}


def write_manifest(directory: str | os.PathLike, step: int, folder: str | os.PathLike | None = None) -> None:
    """Vouch for a step: record what its files are now. Atomic.

    `Checkpoints` does this itself. By hand it adopts a checkpoint that has no manifest, or was edited on
    purpose.

    folder: where the step's files are at the moment; default `directory / str(step)`.
    """
    directory = Path(directory)
    content = describe(directory / str(step) if folder is None else Path(folder))
    write_atomically(manifest_path(directory, step), json.dumps(content, indent=1).encode())


def problem(directory: Path, step: int) -> str | None:
    """What is wrong with a step, in words; None if every file is as its manifest says."""
    path, folder = manifest_path(directory, step), directory / str(step)
    if not path.exists():
        return f"it has no manifest ({path} is missing), so nothing vouches for its files"
    try:
        listed = {name: (int(size), str(digest)) for name, (size, digest) in json.loads(path.read_bytes()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        return f"its manifest {path} is unreadable ({error})"
    if not listed:
        return f"its manifest {path} lists no file"
    # All sizes before any hash: cheap, and a truncation is better named as one.
    for name, (size, _) in listed.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (found := (folder / name).stat().st_size) != size:
            return f"{name} has {found} bytes, expected {size}"
    for name, (_, digest) in listed.items():
        if _sha256(folder / name) != digest:
            return f"{name} has the right size but another content (sha256 differs)"
    return None


def newest_good(directory: Path, steps: list[int]) -> tuple[int | None, list[tuple[int, str]]]:
    """The newest step that verifies (None if none does), and the newer ones with what is wrong with each.

    Only process 0 reads; the others are told. Trying to restore and falling back on an error would leave
    processes that disagree hanging at Orbax's barriers.
    """
    good, damaged = None, []
    if jax.process_index() == 0:
        for step in sorted(steps, reverse=True):
            if (wrong := problem(directory, step)) is None:
                good = step
                break
            damaged.append((step, wrong))
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        good, count = (
            int(v) for v in multihost_utils.broadcast_one_to_all(np.array([-1 if good is None else good, len(damaged)]))
        )
        good = None if good < 0 else good
        if jax.process_index() != 0:
            damaged = [(s, "see process 0") for s in sorted(steps, reverse=True)[:count]]
    return good, damaged


def report(directory: Path, good: int | None, damaged: list[tuple[int, str]]) -> list[str]:
    """One line for each damaged step; CheckpointError if there is nothing else."""
    lines = [f"checkpoint {step} is damaged: {wrong}" for step, wrong in damaged]
    if good is None and lines:
        raise CheckpointError(
            f"no checkpoint in {directory} is good:\n"
            + "\n".join(f"  {line}" for line in lines)
            + "\nRestore the folder from a copy, or remove it to start afresh. To use a step all the same, "
            "accept its files as they are with ddjax.training.write_manifest(directory, step)"
        )
    return [f"{line}; using {good}" for line in lines]


def barrier(name: str) -> None:
    """Wait for every process to arrive here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(f"ddjax_checkpoints_{name}")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is either wholly there or not there at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed write does not say of what
        raise
    finally:
        partial.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
