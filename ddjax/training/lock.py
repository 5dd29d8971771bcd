"""One training at a time in a folder."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ddjax import cluster
from ddjax.config import ConfigError

FILE = "training.lock"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # file systems that cannot lock


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Hold a folder against other trainings, on process 0. The system lets go when the process ends, however it ends.

    Two trainings in one folder would sweep each other's checkpoints away: what is left of a job that was killed, and
    the same job started again. Raises ConfigError (elsewhere ClusterError) where another holds it.
    """
    held: list[int] = []

    def take() -> None:
        try:
            import fcntl
        except ImportError:  # Windows
            return
        file = os.open(workdir / FILE, os.O_CREAT | os.O_RDWR, 0o644)
        held.append(file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return
            owner = os.read(file, 100).decode(errors="replace").strip()
            raise ConfigError(
                f"another training ({owner or 'of unknown process'}) is running in {workdir}; wait for its end, stop "
                "it, or use another --workdir"
            ) from error
        os.ftruncate(file, 0)
        os.write(file, f"process {os.getpid()} on {os.uname().nodename}\n".encode())

    try:
        cluster.on_first(take)
        yield
    finally:
        for file in held:
            os.close(file)
