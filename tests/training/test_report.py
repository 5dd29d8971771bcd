import json
import sys

import pytest
import tiny

from ddjax.training.report import Report, describe_bound, require_writers

NUMBERS = ("bits_per_dim", "stderr", "prior", "diffusion", "reconstruction")


def report(folder, show=False, **train):
    config = tiny.config(train={"steps": 7, "log_every": 3, **train})
    return Report(folder, config, parameters=1234, show=show)


def run(r, first, last):
    for step in range(first, last + 1):
        r.step(step, {"loss": float(step), "grad_norm": 1.0})


def test_windows_are_averaged_and_the_last_one_may_be_short(tmp_path, capsys):
    with report(tmp_path, show=True) as r:
        r.start(0, [])
        run(r, 1, 7)
        r.finished(7)
    assert tiny.metrics(tmp_path) == [
        {"step": 3, "loss": 2.0, "grad_norm": 1.0},
        {"step": 6, "loss": 5.0, "grad_norm": 1.0},
        {"step": 7, "loss": 7.0, "grad_norm": 1.0},
    ]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"digits: masked process, dit denoiser with 1,234 parameters, 7 steps of 8 -> {tmp_path}"
    assert lines[1].startswith("step       3  loss 2.0000  ")
    assert lines[1].endswith(" min left")
    assert lines[-1] == f"finished 7 steps; try: ddjax sample --workdir {tmp_path}"
    assert len(lines) == 5


def test_a_resumed_file_reads_as_if_it_had_never_stopped(tmp_path, capsys):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    with report(tmp_path / "whole") as r:
        r.start(0, [])
        run(r, 1, 7)
    with report(tmp_path / "parts") as r:
        r.start(0, [])
        run(r, 1, 5)
        window = json.loads(json.dumps(r.window()))
        run(r, 6, 6)
    with open(tmp_path / "parts" / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 7, "lo\xff')  # killed while writing
    with report(tmp_path / "parts", show=True) as r:
        r.start(5, window)
        run(r, 6, 7)
    assert "resuming from step 5\n" in capsys.readouterr().out
    assert tiny.metrics(tmp_path / "parts") == tiny.metrics(tmp_path / "whole")


def test_quiet_prints_nothing_and_writes_all_the_same(tmp_path, capsys):
    with report(tmp_path, tensorboard=True) as r:
        r.start(0, [])
        run(r, 1, 3)
        r.bound(3, dict.fromkeys(NUMBERS, 1.0))
        r.stopped(3)
    assert capsys.readouterr() == ("", "")
    assert [m["step"] for m in tiny.metrics(tmp_path)] == [3, 3]
    assert r.has_bound(3)
    assert not r.has_bound(2)
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_tensorboard_holds_the_metrics_and_a_resumed_one_purges(tmp_path):
    records = pytest.importorskip("tensorboardX.record_writer")
    assert records
    from tensorboardX.proto.event_pb2 import Event

    with report(tmp_path, tensorboard=True) as r:
        r.start(0, [])
        run(r, 1, 3)
    content = b"".join(p.read_bytes() for p in (tmp_path / "tensorboard").glob("events*"))
    found, place = {}, 0
    while place < len(content):  # TFRecord: length, its checksum, data, its checksum
        size = int.from_bytes(content[place : place + 8], "little")
        event = Event.FromString(content[place + 12 : place + 12 + size])
        found |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
        place += 16 + size
    assert found["loss", 3] == 2.0
    assert found["grad_norm", 3] == 1.0


@pytest.mark.parametrize(("key", "value", "package"), [("wandb", "p", "wandb"), ("tensorboard", True, "tensorboardX")])
def test_a_missing_package_gives_the_command_that_installs_it(monkeypatch, key, value, package):
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails
    require_writers(tiny.config())
    extra = "wandb" if key == "wandb" else "tensorboard"
    with pytest.raises(ImportError, match=rf"config.train.{key} needs {package}: pip install 'ddjax\[{extra}\]'"):
        require_writers(tiny.config(train={key: value}))


def test_wandb_is_given_the_metrics(tmp_path, monkeypatch):
    import types

    calls = []
    fake = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values["loss"])), finish=lambda: calls.append("finish")
    )
    init = lambda **options: calls.append((options["project"], options["config"]["train"]["steps"])) or fake
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with report(tmp_path, wandb="mine") as r:
        r.start(0, [])
        run(r, 1, 3)
    assert calls == [("mine", 7), (3, 2.0), "finish"]


def test_time_that_is_not_training_does_not_count(tmp_path, monkeypatch):
    clock = iter(float(n) for n in range(0, 1000, 10))
    monkeypatch.setattr("ddjax.training.report.time.perf_counter", lambda: next(clock))
    with report(tmp_path) as r:
        r.start(0, [])  # at 10
        with r.paused():  # from 20 to 30
            pass
        run(r, 1, 3)  # ends at 40: 20 seconds of training
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["steps_per_second"] == pytest.approx(3 / 20)
    assert line["examples_per_second"] == pytest.approx(8 * 3 / 20)


def test_describe_bound():
    values = dict(zip(NUMBERS, (3.0, 0.1, 0.5, 2.0, 0.5), strict=True))
    assert describe_bound(values, "test") == (
        "test NELBO 3.0000 ± 0.1000 bits/dim (prior 0.5000 + diffusion 2.0000 + reconstruction 0.5000)"
    )
    both = values | {f"{name}_labelled": value for name, value in values.items()}
    lines = describe_bound(both, "test").splitlines()
    assert len(lines) == 2
    assert "bits/dim without label (" in lines[0]
    assert "bits/dim with label (" in lines[1]
