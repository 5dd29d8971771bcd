"""A job of several processes on this machine's CPU: what a cluster does, to be tried at home (`ddjax launch local`)."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import TextIO

GRACE = 10.0  # seconds that the others have to end by themselves when one process has failed


def local(
    command: Sequence[str],
    *,
    processes: int,
    devices_per_process: int = 1,
    grace: float = GRACE,
    out: TextIO | None = None,
) -> int:
    """Run `command` as several processes that find each other (`ddjax.cluster`), each with CPU devices of its own.

    What they print comes line by line with the number of the process, "[0] ...". SIGTERM, and Ctrl-C, are passed on as
    SIGTERM; a second one kills. Where a process fails the others have `grace` seconds, then they are killed, and one
    last line on stderr says which process ended first, and how.

    command: a program with its arguments. out: in place of stdout and stderr.
    Returns 0 where all processes did, else the status of the first that did not (128 + the signal's number).
    Raises ValueError for fewer than one process or device.
    """
    if processes < 1 or devices_per_process < 1:
        raise ValueError(
            f"at least one process and one device are needed, got {processes} and {devices_per_process} for each"
        )
    port, ends = _free_port(), queue.SimpleQueue()
    children = [
        subprocess.Popen(
            command,
            env=_environment(number, processes, devices_per_process, port),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        for number in range(processes)
    ]
    threads = [threading.Thread(target=lambda n=n, c=c: ends.put((n, c.wait()))) for n, c in enumerate(children)]
    lock = threading.Lock()
    for number, child in enumerate(children):
        for pipe, to in ((child.stdout, out or sys.stdout), (child.stderr, out or sys.stderr)):
            threads.append(threading.Thread(target=_prefix, args=(number, pipe, to, lock)))
    for thread in threads:
        thread.start()
    before, asked = _pass_on(children)
    failed, deadline, left = None, None, processes
    try:
        while left:
            try:
                number, status = ends.get(timeout=0.2 if deadline is None else max(0.0, deadline - time.monotonic()))
                left -= 1
                if status and failed is None:
                    failed, deadline = (number, status), time.monotonic() + grace
            except queue.Empty:
                if deadline is not None and time.monotonic() >= deadline:
                    _kill(children)
                    deadline = time.monotonic() + 60.0
    finally:
        _kill(children)
        for thread in threads:
            thread.join()
        for which, handler in before.items():
            signal.signal(which, handler)
    if failed is None:
        return 0
    number, status = failed
    if status < 0:
        words, status = f"was killed by {signal.Signals(-status).name}", 128 - status
    else:
        words = f"ended with status {status}"
    asked_to = " after being asked to stop" if asked.is_set() else ""
    print(f"ddjax launch: process {number} of {processes} {words}{asked_to}", file=out or sys.stderr, flush=True)
    return status


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def _environment(number: int, processes: int, devices: int, port: int) -> dict[str, str]:
    flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "xla_force_host_platform_device_count" not in f]
    return os.environ | {
        "DDJAX_CLUSTER": "explicit",
        "DDJAX_COORDINATOR": f"localhost:{port}",
        "DDJAX_PROCESSES": str(processes),
        "DDJAX_PROCESS": str(number),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "XLA_FLAGS": " ".join(flags),
        "PYTHONUNBUFFERED": "1",
    }


def _prefix(number: int, pipe: TextIO, to: TextIO, lock: threading.Lock) -> None:
    with pipe:
        for line in pipe:
            if line.startswith("[Gloo] Rank"):
                continue  # each device of each process says for every collective that it is connected
            with lock:
                to.write(f"[{number}] {line.rstrip()}\n")
                to.flush()


def _pass_on(children: Sequence[subprocess.Popen]) -> tuple[dict[int, object], threading.Event]:
    """Hand signals on to the processes. What was there before, and whether one came."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        return {}, asked

    def hand_on(number, frame):
        again = asked.is_set()
        asked.set()
        for child in children:
            if child.poll() is None:
                child.send_signal(signal.SIGKILL if again else signal.SIGTERM)

    return {which: signal.signal(which, hand_on) for which in (signal.SIGINT, signal.SIGTERM)}, asked


def _kill(children: Sequence[subprocess.Popen]) -> None:
    for child in children:
        if child.poll() is None:
            child.kill()
