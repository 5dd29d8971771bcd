"""Which code wrote a file."""

from __future__ import annotations

import functools
import importlib.metadata
import subprocess
from pathlib import Path


@functools.cache
def versions() -> dict[str, str | None]:
    """Versions of ddjax and of what it stands on, and ddjax's git commit ("+changes" if it was edited since).

    The commit is None outside a git checkout of ddjax.
    """
    import ddjax  # here, because ddjax may be importing us

    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    found = {name: _version(name) for name in names}
    return {"ddjax": ddjax.__version__, **found, "commit": _commit()}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    package = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(package), *arguments],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    # An installed package may lie inside somebody else's repository: ask whether this one tracks us.
    if git("ls-files", "--error-unmatch", "types.py") is None or (commit := git("rev-parse", "HEAD")) is None:
        return None
    return commit + ("+changes" if git("status", "--porcelain", "--", ".") else "")
