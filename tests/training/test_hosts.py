"""Two processes with two devices each take the steps that one process takes: same times, same noise, same gradient."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

JOB = pathlib.Path(__file__).with_name("host_job.py")


def run(out, processes, accumulate):
    """One training as `processes` processes; the parameters that each of them ends with."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(JOB.parents[2])}
    arguments = [str(v) for v in (port, processes, accumulate, out)]
    started = [
        subprocess.Popen(
            [sys.executable, JOB, str(i), *arguments],
            env=environment,
            cwd=JOB.parents[2],
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    for process in started:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
    return [np.load(f"{out}-{accumulate}-{processes}-{i}.npy") for i in range(processes)]


@pytest.mark.slow
def test_hosts_and_microbatches_give_the_gradient_of_one(tmp_path):
    (one,) = run(tmp_path / "params", 1, 1)
    assert np.abs(one).max() > 1e-3
    for accumulate in (1, 2):
        first, second = run(tmp_path / "params", 2, accumulate)
        np.testing.assert_array_equal(first, second)
        np.testing.assert_allclose(first, one, atol=1e-12)
