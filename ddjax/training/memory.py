"""The most memory that was in use so far."""

from __future__ import annotations

import sys

import jax


def device_peak() -> int | None:
    """Of the devices of this process the fullest, bytes; None where their allocator does not tell (CPU)."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s), default=None)


def host_peak() -> int | None:
    """Of this process, bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
