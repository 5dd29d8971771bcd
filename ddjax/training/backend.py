"""Orbax kept quiet, and what it says put into words."""

from __future__ import annotations

import errno
import functools
import logging
import os
import sys

import jax
import numpy as np

from ddjax.placement import path_name
from ddjax.types import PyTree


class _QuietOrbax(logging.Filter):
    """Drops what Orbax logs short of a crash: its failures reach the caller as exceptions."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.CRITICAL or f"{os.sep}orbax{os.sep}" not in record.pathname


_quiet = _QuietOrbax()


def orbax():
    """Orbax, imported late: `import ddjax.training` must not need it."""
    import orbax.checkpoint as ocp
    from absl import logging as absl_logging

    absl_logging.get_absl_logger().addFilter(_quiet)  # added once however often this is called
    _quiet_threads()
    return ocp


@functools.cache
def _quiet_threads() -> None:
    """Drop what TensorStore's threads print when a save has failed already, and its event loop is gone."""
    before = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        if not (unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed"):
            before(unraisable)

    sys.unraisablehook = hook


def differences(saved: PyTree, abstract: PyTree) -> list[str]:
    """Where the stored arrays and the wanted ones differ in name, shape or dtype."""

    def of(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
        return f"{tuple(leaf.shape)} {np.dtype(leaf.dtype).name}"

    def table(tree):
        return {path_name(path): of(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    there, here = table(saved), table(abstract)
    absent = "absent"
    return [
        f"{name}: {there.get(name, absent)} in the checkpoint, {here.get(name, absent)} here"
        for name in sorted(there | here, key=lambda n: (not n.startswith("params"), n))
        if there.get(name) != here.get(name)
    ]


def disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a full disk; TensorStore gives that as text only."""
    while error is not None:
        text = str(error)
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text:
            return True
        error = error.__cause__ or error.__context__
    return False
