import json
import sys

import numpy as np
import pytest

from ddjax import bench_peers, cli


def test_without_diffusers_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"bench --vs diffusers needs torch: pip install 'ddjax\[parity\]'"):
        bench_peers.bench_diffusers(steps=2, rounds=1)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["train", "--vs", "diffusers"], "--vs is for ddjax bench sample"),
        (["sample", "--vs", "diffusers", "--vocabulary", "5"], "bench sample --vs diffusers has a network of its own"),
        (["sample", "--vs", "diffusers", "--only", "heun"], "unknown solver 'heun' to compare with diffusers"),
        (["sample", "--vs", "diffusers", "--steps", "0"], "steps and rounds must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(command, message, capsys):
    assert cli.main(["bench", *command]) != 0
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_both_draw_the_same(monkeypatch):
    """With the same network, grid and start the samples agree, so that the times compare like with like."""
    pytest.importorskip("torch", reason="install ddjax[parity] to compare with diffusers")
    pytest.importorskip("diffusers", reason="install ddjax[parity] to compare with diffusers")
    monkeypatch.setitem(bench_peers.CASES, "points", ((5, 3), 4))
    result = bench_peers.bench_diffusers(cases=("points",), steps=20, rounds=2)
    assert json.loads(json.dumps(result)) == result
    for name, row in result["cases"].items():
        assert row["difference"] < 1e-5, name
        assert np.isfinite(row["speedup"]["median"])
    assert "points, ddim (5 x 3)" in bench_peers.format_diffusers(result)
