"""Several processes as one job: finding the others, joining them, and agreeing.

JAX's own runtime does the work (`jax.distributed`, one process per host, every process runs the same program). What it
needs is an address, a count and a number for each process; `find` reads them from the environment:

    explicit    DDJAX_COORDINATOR=host:port, DDJAX_PROCESSES, DDJAX_PROCESS (`ddjax launch local` sets them)
    Kubernetes  the same but for DDJAX_PROCESS: an Indexed Job numbers its pods (JOB_COMPLETION_INDEX)
    Slurm       a step of several tasks (`srun`)
    TPU         TPU_WORKER_HOSTNAMES (GKE), or DDJAX_CLUSTER=tpu (TPU VMs); JAX asks the TPU for the rest

DDJAX_CLUSTER=none stays alone whatever the environment says; explicit, kubernetes, slurm or tpu take that one.
"""

from __future__ import annotations

import dataclasses
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

JOIN_SECONDS = 300  # how long processes wait for each other to start
_EXPLICIT = ("DDJAX_COORDINATOR", "DDJAX_PROCESSES", "DDJAX_PROCESS")
_joining = False  # set once, when the process begins to join others
_KINDS = ("explicit", "kubernetes", "slurm", "tpu", "none")


class ClusterError(RuntimeError):
    """Processes that cannot become one job; the message says what was missing, and what to do."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where this process stands among those of its job."""

    kind: str  # where this was read from
    coordinator: str | None = None  # host:port of process 0; None, and None below: JAX asks the TPU
    processes: int | None = None
    process: int | None = None
    devices: tuple[int, ...] | None = None  # of the host, those that are this process's; None for all

    def __str__(self) -> str:
        return (
            f"process {self.process} of {self.processes} ({self.kind})" if self.processes else f"a {self.kind} worker"
        )


def find(environment: Mapping[str, str]) -> Place | None:
    """The place that an environment describes; None for a process on its own.

    Raises ClusterError for one that is incomplete or makes no sense.
    """
    kind = environment.get("DDJAX_CLUSTER", "").lower()
    if kind and kind not in _KINDS:
        raise ClusterError(f"DDJAX_CLUSTER={kind!r}: expected one of {', '.join(_KINDS)}, or leave it unset")
    if not kind:
        kind = _told(environment)
    place = {
        "explicit": lambda: _explicit(environment, "explicit", "DDJAX_PROCESS"),
        "kubernetes": lambda: _explicit(environment, "kubernetes", "JOB_COMPLETION_INDEX"),
        "slurm": lambda: _slurm(environment),
        "tpu": lambda: Place("tpu"),
        "none": lambda: None,
    }[kind]()
    if place is not None and place.processes is not None and not 0 <= place.process < place.processes:
        raise ClusterError(f"there is no process {place.process} among {place.processes}: they are numbered from 0")
    return place


def join(environment: Mapping[str, str] | None = None) -> Place | None:
    """Become one of a job's processes, where the environment says that there are others; else do nothing.

    Before anything asks JAX for devices. Waits for the others, DDJAX_JOIN_SECONDS (default 300) at most.
    Raises ClusterError where the environment is incomplete, or process 0 does not answer. Process 0 ends with one line
    where the others do not come: nothing can be done with JAX in that process any more.
    """
    import jax

    environment = os.environ if environment is None else environment
    place = find(environment)
    if place is None or jax.distributed.is_initialized():
        return place
    seconds = _number(environment, "DDJAX_JOIN_SECONDS") if "DDJAX_JOIN_SECONDS" in environment else JOIN_SECONDS
    # Where JAX itself runs out of patience it ends the process from C++: it is given longer than we wait.
    options: dict[str, Any] = {"initialization_timeout": seconds + 60}
    if place.coordinator is not None:
        options |= {
            "coordinator_address": place.coordinator,
            "num_processes": place.processes,
            "process_id": place.process,
            "local_device_ids": place.devices,
            "cluster_detection_method": "deactivate",  # `find` has looked, and says so where it finds nothing
        }
    global _joining
    _joining = place.processes != 1
    if place.process:  # not process 0, whom the others come to
        _reach(place, seconds)
    watch = threading.Timer(seconds, _give_up, (_alone(place, seconds),))
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(**options)
    except Exception as error:  # JAX has no common error class for what may fail here
        raise ClusterError(f"{_alone(place, seconds)} ({_first_line(error)})") from error
    finally:
        watch.cancel()
    return place


def joined() -> bool:
    """Whether this process is one of several that `join` brought together, or tried to. Asks JAX for nothing."""
    return _joining


def first() -> bool:
    """Whether this is the process that writes and speaks: process 0, or the only one."""
    import jax

    return jax.process_index() == 0


def agreed(value: bool) -> bool:
    """What process 0 says. Every process has to ask."""
    import jax

    if jax.process_count() == 1:
        return value
    import numpy as np
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.int32(value)))


def on_first(action: Callable[[], None]) -> None:
    """Act on process 0 alone, the others waiting; where it fails, all of them do.

    Raises on process 0 what `action` raises, elsewhere ClusterError.
    """
    error = None
    if first():
        try:
            action()
        except Exception as caught:  # whatever it is, the others must not wait for ever
            error = caught
    ok = agreed(error is None)
    if error is not None:
        raise error
    if not ok:
        raise ClusterError("process 0 stopped; it says why")


def _reach(place: Place, seconds: int) -> None:
    """Wait until process 0 listens."""
    host, port = place.coordinator.rsplit(":", 1)
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() >= end:
                raise ClusterError(f"{_alone(place, seconds)} ({error})") from error
            time.sleep(0.2)


def _alone(place: Place, seconds: int) -> str:
    where = f" at {place.coordinator}" if place.coordinator else ""
    what = f"waited in vain for the others{where}" if place.process == 0 else f"could not join process 0{where}"
    return (
        f"{place} {what}, {seconds} s long; check that all processes were started, that this address is process 0's as "
        "the others see it, and that its port is free there and open between hosts. DDJAX_JOIN_SECONDS is how long to "
        "wait, DDJAX_CLUSTER=none runs alone"
    )


def _give_up(why: str) -> None:
    """From a thread, while JAX waits and cannot be interrupted."""
    print(f"ddjax: {why}", file=sys.stderr, flush=True)
    os._exit(1)


def _told(environment: Mapping[str, str]) -> str:
    """The kind of cluster that an environment speaks of."""
    if any(name in environment for name in _EXPLICIT):
        kubernetes = "DDJAX_PROCESS" not in environment and "JOB_COMPLETION_INDEX" in environment
        return "kubernetes" if kubernetes else "explicit"
    # Inside `srun`: the batch script itself, and an interactive allocation, have no step.
    if "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return "slurm"
    return "tpu" if "," in environment.get("TPU_WORKER_HOSTNAMES", "") else "none"


def _explicit(environment: Mapping[str, str], kind: str, process: str) -> Place:
    names = (*_EXPLICIT[:2], process)
    if absent := [name for name in names if not environment.get(name)]:
        raise ClusterError(f"{' and '.join(absent)} must be set too: several processes need all of {', '.join(names)}")
    coordinator = environment["DDJAX_COORDINATOR"]
    if not re.fullmatch(r".+:\d+", coordinator):
        raise ClusterError(f"DDJAX_COORDINATOR={coordinator!r}: expected host:port, the address of process 0")
    return Place(kind, coordinator, _number(environment, "DDJAX_PROCESSES"), _number(environment, process))


def _slurm(environment: Mapping[str, str]) -> Place:
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if absent := [name for name in names if not environment.get(name)]:
        raise ClusterError(f"{absent[0]} is not set: start the processes with srun, inside a Slurm job")
    # A port of the job's own: two jobs may share a node. Below the ports that systems give out by themselves.
    port = 12_000 + _number(environment, "SLURM_JOB_ID") % 16_000
    processes, process = _number(environment, "SLURM_STEP_NUM_TASKS"), _number(environment, "SLURM_PROCID")
    visible = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    nodes = int(environment.get("SLURM_STEP_NUM_NODES", "1"))
    # Several tasks on a node that all see its devices take one each; with --gpus-per-task each sees its own.
    share = processes > nodes and len(visible) > 1
    devices = (_number(environment, "SLURM_LOCALID"),) if share else None
    return Place("slurm", f"{_first_host(environment['SLURM_STEP_NODELIST'])}:{port}", processes, process, devices)


def _first_host(nodes: str) -> str:
    """Of Slurm's list of hosts: `gpu[001-003,007],login1` begins with gpu001, `rack1-[2-3]n4` with rack1-2n4."""
    head = re.match(r"(?:\[[^\]]*\]|[^,\[])+", nodes)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", head.group()) if head else nodes


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError as error:
        raise ClusterError(f"{name}={environment[name]!r}: expected a whole number") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
