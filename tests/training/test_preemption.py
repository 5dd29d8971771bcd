"""A cloud's notice that the machine will be taken away is heard as SIGTERM."""

import contextlib
import http.server
import os
import signal
import threading
import time
import warnings
from urllib.parse import parse_qs, urlparse

import pytest

from ddjax.config import ConfigError
from ddjax.training import preemption
from ddjax.training.preemption import notices, stop_signals


class Metadata(http.server.ThreadingHTTPServer):
    """Answers as Google's metadata server does: a value, its tag, held back until it changes."""

    def __init__(self):
        self.values = {"preempted": "FALSE", "maintenance-event": "NONE"}
        self.changed, self.asked, self.broken = threading.Condition(), [], False
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                url = urlparse(self.path)
                name, query = url.path.removeprefix("/computeMetadata/v1/instance/"), parse_qs(url.query)
                server.asked.append(name)
                if server.broken or self.headers["Metadata-Flavor"] != "Google" or query["wait_for_change"] != ["true"]:
                    self.send_error(503)
                    return
                (tag,), (wait,) = query["last_etag"], query["timeout_sec"]
                with server.changed:
                    server.changed.wait_for(lambda: server.tag(name) != tag, float(wait))
                    value, now = server.values[name], server.tag(name)
                self.send_response(200)
                self.send_header("ETag", now)
                self.end_headers()
                self.wfile.write(value.encode())

            def log_message(self, *args):
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    def tag(self, name):
        return self.values[name].lower()

    def say(self, name, value):
        with self.changed:
            self.values[name] = value
            self.changed.notify_all()


def within(seconds, condition):
    """Whether it comes about. (An event's own wait may hold its lock when the signal's handler wants it.)"""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(condition())


@pytest.fixture
def server(monkeypatch):
    server = Metadata()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("name", "harmless", "word"),
    [
        ("preempted", None, "TRUE"),
        ("maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE", "TERMINATE_ON_HOST_MAINTENANCE"),
    ],
)
def test_a_notice_stops_the_run_once(server, name, harmless, word):
    with stop_signals() as stop, notices("gce"):
        if harmless:
            server.say(name, harmless)
        assert not within(0.2, stop.is_set)
        assert len(server.asked) <= 5  # answers are waited for, not asked for again and again
        server.say(name, word)
        assert within(20, stop.is_set)
        for other in preemption._GCE:  # a second signal would raise KeyboardInterrupt
            server.say(other, preemption._GCE[other])
        time.sleep(0.2)


def test_a_notice_that_is_there_at_the_start_is_heard(server):
    server.say("preempted", "TRUE")
    with stop_signals() as stop, notices("gce"):
        assert within(20, stop.is_set)


def test_nothing_is_heard_once_it_is_closed(server):
    with stop_signals() as stop:
        with notices("gce"):
            pass
        server.say("preempted", "TRUE")
        assert not within(0.3, stop.is_set)


def test_a_server_that_is_away_for_a_while(server, monkeypatch):
    monkeypatch.setattr(preemption, "_AGAIN", 0.05)
    with warnings.catch_warnings(record=True) as told, stop_signals() as stop, notices("gce"):
        warnings.simplefilter("always")
        server.broken = True
        server.say("preempted", "OTHER")  # ends the waiting
        words = "does not say 'preempted' any more"
        assert within(20, lambda: any(words in str(one.message) for one in told))
        server.broken = False
        server.say("preempted", "TRUE")
        assert within(20, stop.is_set)


def test_what_cannot_be_listened_to(monkeypatch):
    with pytest.raises(ConfigError, match="must be one of '', 'gce', got 'aws'"), notices("aws"):
        pass
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"no metadata server answers at 127[.]0[.]0[.]1:9"), notices("gce"):
        pass


def test_no_source_starts_nothing():
    before = threading.active_count()
    with notices(""):
        assert threading.active_count() == before


def test_a_second_signal_interrupts():
    with stop_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert within(20, stop.is_set)
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
            pytest.fail("nothing was raised")
