"""The local launcher with children that need no JAX; tests/training/test_cluster_training.py trains with it."""

import io
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from ddjax import launch

ROOT = pathlib.Path(__file__).parents[1]


def run(code, processes=2, **options):
    out = io.StringIO()
    status = launch.local([sys.executable, "-c", code], processes=processes, out=out, **options)
    return status, out.getvalue().splitlines()


def test_every_line_has_the_number_of_its_process():
    names = "DDJAX_PROCESS", "DDJAX_PROCESSES", "DDJAX_COORDINATOR", "JAX_NUM_CPU_DEVICES", "JAX_PLATFORMS"
    code = f"import os, sys; print(*map(os.environ.get, {names})); print('warned', file=sys.stderr)"
    status, lines = run(code, 3, devices_per_process=4)
    assert status == 0
    assert sorted(line for line in lines if "warned" in line) == [f"[{n}] warned" for n in range(3)]
    told = sorted(line for line in lines if "warned" not in line)
    ports = {re.fullmatch(rf"\[{n}\] {n} 3 localhost:(\d+) 4 cpu", line).group(1) for n, line in enumerate(told)}
    assert len(told) == 3
    assert len(ports) == 1


def test_what_chatters_is_left_out():
    assert run("print('[Gloo] Rank 0 is connected to 1 peer ranks.'); print('kept')", 1) == (0, ["[0] kept"])


@pytest.mark.parametrize(
    ("act", "words", "expected"),
    [
        ("os.kill(os.getpid(), 9)", "was killed by SIGKILL", 137),
        ("sys.exit(3)", "ended with status 3", 3),
    ],
)
def test_a_failure_ends_the_others_and_is_named(act, words, expected):
    code = f"import os, sys, time\nif os.environ['DDJAX_PROCESS'] == '1': {act}\ntime.sleep(100)"
    began = time.monotonic()
    status, lines = run(code, 2, grace=0.2)
    assert time.monotonic() - began < 50
    assert (status, lines) == (expected, [f"ddjax launch: process 1 of 2 {words}"])


def test_others_may_end_by_themselves_first():
    code = "import os, sys, time\nif os.environ['DDJAX_PROCESS'] == '1': sys.exit(75)\ntime.sleep(0.5)\nprint('saved')"
    status, lines = run(code, 2)
    assert (status, lines) == (75, ["[0] saved", "ddjax launch: process 1 of 2 ended with status 75"])


# The module alone: the whole package would import JAX.
LAUNCHER = f"""
import runpy, sys
sys.exit(runpy.run_path({str(ROOT / "ddjax" / "launch.py")!r})["local"](sys.argv[1:], processes=2))
"""
HEEDS = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(0)))
print('ready', flush=True)
time.sleep(100)
"""
IGNORES = HEEDS.replace("sys.exit(0)", "None")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_is_passed_on_and_a_second_one_kills(number):
    for code, times, status in ((HEEDS, 1, 0), (IGNORES, 2, 137)):
        launcher = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert {launcher.stdout.readline() for _ in range(2)} == {"[0] ready\n", "[1] ready\n"}
        launcher.send_signal(number)
        assert {launcher.stdout.readline() for _ in range(2)} == {"[0] saved\n", "[1] saved\n"}
        if times == 2:
            launcher.send_signal(number)
        _, err = launcher.communicate(timeout=60)
        assert launcher.returncode == status
        assert ("was killed by SIGKILL after being asked to stop" in err) == (times == 2)


def test_numbers_that_cannot_be():
    for options in ({"processes": 0}, {"processes": 2, "devices_per_process": 0}):
        with pytest.raises(ValueError, match="at least one process and one device"):
            launch.local(["true"], **options)
