"""How a run hears that it is to stop: signals, and the notices of a cloud."""

from __future__ import annotations

import os
import signal
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from ddjax.config import ConfigError

NOTICES = ("", "gce")
# A value under instance/ of Google Cloud's metadata server, and what it says when the machine is about to be taken
# away (cloud.google.com/compute/docs/metadata: spot machines; hosts under maintenance that cannot be moved elsewhere).
_GCE = {"preempted": "TRUE", "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}
_WAIT = 30  # seconds the server holds a question back until the value changes
_AGAIN = 5.0  # seconds before asking a server again that did not answer


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; a second one interrupts as usual.

    Only with one process: with several, `jax.distributed` catches SIGTERM itself, and Orbax agrees on a step.
    """
    stop = threading.Event()
    if jax.process_count() > 1 or threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number, frame):
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def notices(source: str) -> Iterator[None]:
    """While it is open, a notice of the cloud that the machine will be taken away is a SIGTERM to this process.

    source: "gce", the metadata server of a Google Cloud machine (at $GCE_METADATA_HOST where that is set); "" none.
    Raises ConfigError for another source, and where no such server answers.
    """
    if source not in NOTICES:
        raise ConfigError(f"config.train.notices must be one of {', '.join(map(repr, NOTICES))}, got {source!r}")
    closed = threading.Event()
    if source == "gce":
        try:
            first = {name: _ask(name, "0") for name in _GCE}
        except (OSError, urllib.error.URLError) as error:
            raise ConfigError(
                f"config.train.notices='gce' but no metadata server answers at {_host()} ({error}): leave it out where "
                "the machine is not Google Cloud's"
            ) from error
        heard = threading.Event()  # one signal, whatever the number of notices: a second would interrupt the saving
        for name, (value, tag) in first.items():
            threading.Thread(target=_listen, args=(name, value, tag, heard, closed), daemon=True).start()
    try:
        yield
    finally:
        closed.set()


def _listen(name: str, value: str, tag: str, heard: threading.Event, closed: threading.Event) -> None:
    lost = False
    while value != _GCE[name]:
        try:
            value, tag = _ask(name, tag)
            lost = False
        except OSError as error:
            if not lost and not closed.is_set():
                warnings.warn(f"the metadata server does not say {name!r} any more: {error}; asking on", stacklevel=1)
            lost = True
            time.sleep(_AGAIN)
        if closed.is_set() or heard.is_set():
            return
    if not heard.is_set():
        heard.set()
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)


def _host() -> str:
    return os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")


def _ask(name: str, tag: str) -> tuple[str, str]:
    """A value and its tag: when it is another than that of `tag` ("0": at once), or after a while."""
    url = (
        f"http://{_host()}/computeMetadata/v1/instance/{name}?wait_for_change=true&timeout_sec={_WAIT}&last_etag={tag}"
    )
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    with urllib.request.urlopen(request, timeout=2 * _WAIT) as answer:
        return answer.read().decode().strip(), answer.headers.get("ETag", "0")
