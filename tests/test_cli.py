import dataclasses
import json
import subprocess

import jax
import numpy as np
import pytest
import tiny

import ddjax
from ddjax.cli import main
from ddjax.experiment import build
from ddjax.training import load_safetensors, loop

COMMANDS = ("train", "sample", "edit", "search", "eval", "bench", "data", "export", "convert")


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """`main` sets JAX's compilation cache for its process; the tests have their own."""
    monkeypatch.setattr("ddjax.cli._prepare_jax", lambda: None)


@pytest.fixture
def run():
    return tiny.trained()


def ok(capsys, *arguments):
    code = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert (code, err) == (0, ""), err
    return out


def fails(capsys, *arguments, code=1):
    """The one line on stderr."""
    found = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert found == code, out + err
    assert "Traceback" not in err
    assert err.count("\n") == 1, err
    assert err.startswith(f"ddjax {arguments[0]}: ")
    return err


@pytest.mark.parametrize("command", COMMANDS)
def test_help(capsys, command):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: ddjax {command}")
    assert ("--config.train.steps=2000" in out) == (command in ("train", "bench"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the following arguments are required: command"),
        (["trian"], "invalid choice: 'trian'"),
        (["train", "--workdir", "x"], "the following arguments are required: --config"),
        (["sample"], "the following arguments are required: --workdir"),
        (["sample", "--workdir", "x", "--num", "many"], "argument --num: invalid int value: 'many'"),
    ],
)
def test_wrong_usage(capsys, arguments, words):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_stray_arguments(capsys, tmp_path):
    config = tiny.write(tmp_path / "c.py")
    base = ["train", "--config", config, "--workdir", tmp_path / "run"]
    assert "unknown argument --stepz" in fails(capsys, *base, "--stepz=3", code=2)
    assert "unknown argument 100 (see ddjax train --help; overrides are --config.key=value)" in fails(
        capsys, *base, "--config.train.steps", "100", code=2
    )
    assert "unknown argument --config.train.steps=3" in fails(
        capsys, "sample", "--workdir", tmp_path, "--config.train.steps=3", code=2
    )
    assert "unknown argument --config.train.steps=3" in fails(
        capsys, "eval", "--workdir", tmp_path, "--config.train.steps=3", code=2
    )
    assert not (tmp_path / "run").exists()


def arrays(path, **members):
    np.savez(path, **members)
    return path


def bad_data(tmp_path):
    """Options of `train` that point it at data that cannot be used, and what it must say."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 not quite")
    (tmp_path / "data.xyz").write_bytes(b"?")
    np.arange(4000, dtype=np.uint16).tofile(tmp_path / "tokens.bin")
    (tmp_path / "short.txt").write_text("abc")
    odd = arrays(tmp_path / "odd.npz", x=np.zeros((64, 7, 6), np.uint8))
    flat = arrays(tmp_path / "flat.npz", x=np.zeros((64, 5), np.int64))
    big = arrays(tmp_path / "big.npz", x=np.full((64, 8, 8), 30))
    floats = arrays(tmp_path / "floats.npz", x=np.zeros((64, 8, 8)))
    name, symbols = "--config.data.name=", "--config.data.options.num_symbols="
    text = ["--config.denoiser.name=text", "--config.denoiser.options={'width': 8, 'depth': 1, 'heads': 2}"]
    return [
        ([f"{name}{tmp_path}/none.npz"], "no such file or folder, and no built-in data set"),
        ([f"{name}{tmp_path}/empty"], "no images and no text in this folder"),
        ([f"{name}{tmp_path}/data.xyz"], "unsupported extension"),
        ([f"{name}{tmp_path}/broken.npz"], "broken.npz: not a readable .npz file"),
        ([f"{name}{odd}"], "patch=4 does not divide the image's height and width (7, 6)"),
        ([f"{name}{flat}"], "is for images, not for"),
        ([f"{name}{floats}"], "continuous"),
        ([f"{name}{big}", f"{symbols}17"], "30"),
        ([f"{name}{tmp_path}/tokens.bin", *text], "the option num_symbols must be given"),
        ([f"{name}{tmp_path}/tokens.bin", f"{symbols}9", "--config.data.options.length=16", *text], "tokens.bin"),
        ([f"{name}{tmp_path}/short.txt", *text], "short.txt"),
    ]


def test_data_that_cannot_be_used(capsys, tmp_path):
    config = tiny.write(tmp_path / "c.py", train={"eval_every": 0, "sample_every": 0})
    for number, (options, words) in enumerate(bad_data(tmp_path)):
        workdir = tmp_path / f"run{number}"
        err = fails(capsys, "train", "--config", config, "--workdir", workdir, *options)
        assert words in err
        assert not list(workdir.glob("checkpoints/[0-9]*"))


@pytest.mark.slow
def test_configs_that_cannot_be_used(capsys, tmp_path):
    config, workdir = tiny.write(tmp_path / "c.py"), tmp_path / "run"
    base = ["train", "--config", config, "--workdir", workdir]
    assert "did you mean config.train.steps?" in fails(capsys, *base, "--config.train.stepz=3")
    assert "did you mean 'width'?" in fails(capsys, *base, "--config.denoiser.options.widht=3")
    assert "must be of type int, got 'x'" in fails(capsys, *base, "--config.train.steps=x")
    assert "takes 3 devices" in fails(capsys, *base, "--config.train.mesh={'data': 3}")
    assert "no config file at" in fails(capsys, "train", "--config", tmp_path / "no.py", "--workdir", workdir)
    (tmp_path / "bad.py").write_text("def get_config(:\n")
    err = fails(capsys, "train", "--config", tmp_path / "bad.py", "--workdir", workdir)
    assert "bad.py, line 1: invalid syntax" in err
    assert not workdir.exists()
    workdir.mkdir()
    (workdir / "notes.txt").write_text("mine")
    assert "is not empty and holds no run" in fails(capsys, *base)
    assert [p.name for p in workdir.iterdir()] == ["notes.txt"]


def test_a_workdir_of_another_config(capsys, tmp_path, run):
    config = tiny.write(tmp_path / "c.py")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    err = fails(capsys, "train", "--config", config, "--workdir", run, "--config.train.seed=1")
    assert "belongs to a run with another config (train.seed: 0 -> 1)" in err
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


@pytest.mark.slow
def test_train_quiet_and_again(capsys, tmp_path):
    config, workdir = tiny.write(tmp_path / "c.py"), tmp_path / "run"
    assert ok(capsys, "train", "--config", config, "--workdir", workdir, "--quiet") == ""
    tiny.assert_same_run(workdir, tiny.trained())  # metrics.jsonl, too
    out = ok(capsys, "train", "--config", config, "--workdir", workdir)
    assert "finished already, at step 10" in out
    tiny.assert_same_run(workdir, tiny.trained())
    tiny.truncate(workdir, 10)
    with pytest.warns(UserWarning, match="checkpoint 10 is damaged: .*; using 9"):  # on stderr, outside of pytest
        assert ok(capsys, "train", "--config", config, "--workdir", workdir, "--quiet") == ""


def test_a_loss_that_is_none(capsys, tmp_path, monkeypatch):
    def stop(*args, **options):
        raise loop.BadStep("the loss is not finite\nat step 3")

    monkeypatch.setattr(loop, "train", stop)
    err = fails(capsys, "train", "--config", tiny.write(tmp_path / "c.py"), "--workdir", tmp_path / "run")
    assert err == "ddjax train: the loss is not finite at step 3\n"
    monkeypatch.setenv("DDJAX_DEBUG", "1")
    with pytest.raises(loop.BadStep):
        main(["train", "--config", str(tmp_path / "c.py"), "--workdir", str(tmp_path / "run")])


def test_interrupted(capsys, tmp_path, monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train", stop)
    config = tiny.write(tmp_path / "c.py")
    assert "interrupted" in fails(capsys, "train", "--config", config, "--workdir", tmp_path / "run", code=130)


def test_sample(capsys, tmp_path, run):
    png, npy = tmp_path / "new" / "x.png", tmp_path / "x.npy"
    out = ok(capsys, "sample", "--workdir", run, "--out", png)
    assert out == f"4 samples -> {png}\n"
    assert png.read_bytes().startswith(b"\x89PNG\r\n")
    ok(capsys, "sample", "--workdir", run, "--out", npy, "--seed", 5, "--label", 3)
    expected = ddjax.load(run).sample(jax.random.key(5), 4, cond=3)
    np.testing.assert_array_equal(np.load(npy), expected)
    ok(capsys, "sample", "--workdir", run, "--out", npy)
    expected = ddjax.load(run).sample(jax.random.key(0), 4, cond=np.arange(4))
    np.testing.assert_array_equal(np.load(npy), expected)
    ok(capsys, "sample", "--workdir", run, "--out", npy, "--unconditional", "--step", 9)
    expected = ddjax.load(run, step=9).sample(jax.random.key(0), 4)
    np.testing.assert_array_equal(np.load(npy), expected)


@pytest.mark.slow
def test_sample_rows_and_an_animation(capsys, tmp_path, run):
    """Single samples again, by their numbers, with the labels they had; and how they came about."""
    npy, gif = tmp_path / "x.npy", tmp_path / "x.gif"
    ok(capsys, "sample", "--workdir", run, "--out", npy)
    whole = np.load(npy)
    assert ok(capsys, "sample", "--workdir", run, "--out", npy, "--rows", 2, 0, 3, 3) == f"4 samples -> {npy}\n"
    np.testing.assert_array_equal(np.load(npy), whole[[2, 0, 3, 3]])
    pytest.importorskip("PIL")
    assert ok(capsys, "sample", "--workdir", run, "--out", gif) == f"4 samples -> {gif}\n"
    assert gif.read_bytes().startswith(b"GIF89a")
    assert "--rows names 2 samples and --num 3" in fails(capsys, "sample", "--workdir", run, "--rows", 2, 0, "--num", 3)


@pytest.mark.slow
def test_sample_takes_the_shape_of_laws_and_options_of_solvers(capsys, tmp_path, run):
    npy = tmp_path / "x.npy"
    base = ["sample", "--workdir", run, "--out", npy]
    ok(capsys, *base, "--temperature", 0.2, "--solver", "ancestral", "--top-k", 3, "--top-p", 0.9, "--repetition", 1.5)
    shape = {"temperature": 0.2, "top_k": 3, "top_p": 0.9, "repetition": 1.5}
    expected = ddjax.load(run).sample(jax.random.key(0), 4, cond=np.arange(4), **shape)
    np.testing.assert_array_equal(np.load(npy), expected)
    assert (expected != ddjax.load(run).sample(jax.random.key(0), 4, cond=np.arange(4))).any()
    assert "has no option 'eta'" in fails(capsys, *base, "--solver-option", "eta=0.5")
    assert "expected KEY=VALUE, for example eta=0.5" in fails(capsys, *base, "--solver-option", "eta")
    assert "top_k must be a whole number, 1 or more, got 0" in fails(capsys, *base, "--top-k", 0)
    assert "top_p must be in (0, 1], got 2.0" in fails(capsys, *base, "--top-p", 2)
    assert "prompt: it is for text" in fails(capsys, *base, "--prompt", "To be")
    assert "sequences (batch, length)" in fails(capsys, *base, "--no-repeats")
    assert "leave one of them out" in fails(capsys, *base, "--label", 3, "--unconditional")
    assert "there are none: give cond" in fails(capsys, *base, "--guidance", 2, "--unconditional")


@pytest.fixture
def writer(tmp_path, monkeypatch):
    """A run on text, untrained, that the command line loads."""
    (tmp_path / "abc.txt").write_text("abc " * 100)
    config = tiny.config(
        data={"name": str(tmp_path / "abc.txt"), "options": {"length": 8, "vocabulary": "characters"}},
        denoiser={"name": "text", "options": {"width": 8, "depth": 1, "heads": 2}},
    )
    config = dataclasses.replace(
        config, denoiser=dataclasses.replace(config.denoiser, options={"width": 8, "depth": 1, "heads": 2})
    )
    experiment = build(config, ddjax.data.load(config.data.name, "train", **config.data.options))
    made = ddjax.Run(experiment, jax.jit(experiment.init)(jax.random.key(0)), 0)
    monkeypatch.setattr("ddjax.run.load", lambda workdir, step=None: made)
    return made


def test_sample_around_known_text(capsys, tmp_path, writer):
    txt, page = tmp_path / "x.txt", tmp_path / "x.html"
    base = ["sample", "--workdir", "none", "--out", txt]
    out = ok(capsys, *base, "--prompt", "cab", "--rows", 7, 1)
    first, second = txt.read_text().split("\n" + "-" * 80 + "\n")
    assert out == f"2 samples -> {txt}\n{first}\n"
    assert (first[:3], second[:3], len(first)) == ("cab", "cab", 8)
    ok(capsys, *base, "--infill", "a___b", "--num", 2)
    first, second = txt.read_text().split("\n" + "-" * 80 + "\n")
    assert all(x[0] + x[-1] == "ab" and len(x) == 8 for x in (first, second))
    ok(capsys, "sample", "--workdir", "none", "--out", page, "--infill", "a___b", "--num", 2)
    assert "a" + 6 * "\\u2588" + "b" in page.read_text(encoding="utf-8")  # masks are blocks
    assert "character 'x' at 1 is not among the 4" in fails(capsys, *base, "--prompt", "ax")
    assert "give one of them" in fails(capsys, *base, "--prompt", "a", "--infill", "a___")
    assert "use a name ending in .html" in fails(capsys, "sample", "--workdir", "none", "--out", tmp_path / "x.gif")


def test_sample_text(tmp_path):
    text = ddjax.data.load(tiny.write(tmp_path / "c.py").rename(tmp_path / "c.txt"), "train", length=8)
    path = loop.write_samples(text, text[:2]["x0"], tmp_path / "out")
    assert path == tmp_path / "out.txt"
    first, second = path.read_text().split("\n" + "-" * 80 + "\n")
    assert first + second == (tmp_path / "c.txt").read_text()[:16]


@pytest.mark.slow
def test_samples_that_cannot_be_drawn(capsys, tmp_path, run):
    base = ["sample", "--workdir", run, "--out", tmp_path / "x.png"]
    assert "labels run from 0 to 9 (10 means none), got 11" in fails(capsys, *base, "--label", 11)
    assert "got -1" in fails(capsys, *base, "--label", -1)
    assert "'rk5' is unknown; it is one of ancestral, ddim, heun" in fails(capsys, *base, "--solver", "rk5")
    assert "DDIM is for processes.Gaussian, got Masked" in fails(capsys, *base, "--solver", "ddim")
    assert "Masked has tokens" in fails(capsys, *base, "--parallel", 4, "--tolerance", 0.2)
    assert "--num must be at least 1, got 0" in fails(capsys, *base, "--num", 0)
    assert "at least one step, got 0" in fails(capsys, *base, "--steps", 0)
    assert "has no checkpoint 4; it has [" in fails(capsys, *base, "--step", 4)
    err = fails(capsys, "sample", "--workdir", run, "--out", tmp_path / "x.jpg")
    assert "use a name ending in .png or .npy" in err
    assert "use a name ending in .png" in fails(capsys, "sample", "--workdir", run, "--out", tmp_path / "x.txt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["sample", "eval", "export"])
def test_a_folder_without_a_run(capsys, tmp_path, command):
    out = ["--out", tmp_path / "x.safetensors"] if command == "export" else []
    err = fails(capsys, command, "--workdir", tmp_path / "none", *out)
    assert "no run in" in err
    assert "train one with `ddjax train --workdir" in err


@pytest.mark.slow
def test_eval(capsys, tmp_path, run):
    out = ok(capsys, "eval", "--workdir", run, "--out", tmp_path / "new" / "x.json")
    values = json.loads((tmp_path / "new" / "x.json").read_text())
    assert values.pop("step") == 10
    assert values == loop.evaluate(ddjax.load(run), tiny.config())
    # It is the number that the training itself reported.
    last = [m for m in tiny.metrics(run) if "eval/bits_per_dim" in m][-1]
    np.testing.assert_allclose(values["bits_per_dim"], last["eval/bits_per_dim"], rtol=1e-6)
    lines = out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"test NELBO {values['bits_per_dim']:.4f} ± ")
    assert "bits/dim without label (prior" in lines[0]
    assert "bits/dim with label (prior" in lines[1]


def test_eval_options(capsys, tmp_path, run, monkeypatch):
    seen = []

    def fake(loaded, config, likelihood):
        seen.append((config.eval.num_times, config.data.name, likelihood, config.eval.probes))
        return dict.fromkeys(("bits_per_dim", "stderr", "prior", "diffusion", "reconstruction"), 1.0)

    monkeypatch.setattr(loop, "evaluate", fake)
    monkeypatch.setattr(loop, "judge_labels", lambda run, config, num, scale: seen.append((num, scale)) or 0.75)
    out = ok(capsys, "eval", "--workdir", run, "--num-times", 3, "--data", "x.npz", "--labels", 8, "--guidance", 2,
             "--config.eval.probes=5")  # fmt: skip
    assert seen == [(3, "x.npz", "bound", 5), (8, 2.0)]
    assert "75.0% of 8 samples are given their own label (guidance 2)" in out
    monkeypatch.undo()
    assert "no such file" in fails(capsys, "eval", "--workdir", run, "--data", tmp_path / "none.npz")


def test_eval_by_the_ode_is_for_densities(capsys, run):
    err = fails(capsys, "eval", "--workdir", run, "--likelihood", "ode")
    assert "'masked' corrupts tokens, which have no density" in err
    with pytest.raises(SystemExit):
        main(["eval", "--workdir", str(run), "--likelihood", "exact"])


@pytest.mark.slow
def test_eval_by_the_ode(capsys, tmp_path):
    config = tiny.write(
        tmp_path / "c.py",
        data={"tokens": False},
        process={"name": "gaussian", "schedule": "vp_cosine"},
        denoiser={"kind": "v"},
        objective={"name": "gaussian"},
        train={"steps": 2, "eval_every": 0, "sample_every": 0},
        eval={"steps": 3, "probes": 2},
    )
    workdir = tmp_path / "run"
    ok(capsys, "train", "--config", config, "--workdir", workdir, "--quiet")
    bits = {}
    for likelihood, name in (("ode", "ODE"), ("bound", "NELBO")):
        out = ok(capsys, "eval", "--workdir", workdir, "--likelihood", likelihood, "--out", tmp_path / "x.json")
        values = json.loads((tmp_path / "x.json").read_text())
        bits[likelihood] = values["bits_per_dim"]
        assert out.startswith(
            f"test {name} {values['bits_per_dim']:.4f} ± {values['stderr']:.4f} bits/dim without label"
        )
        assert out.count(f"test {name}") == 2
    assert bits["ode"] > np.log2(1.2)  # a code for pixels, by a network that knows nothing
    assert values.keys() >= {"prior", "diffusion", "reconstruction"}


def test_judging_labels(run, monkeypatch):
    # The data themselves in place of samples: a judge that is right, seen through all that lies between.
    real = ddjax.data.load("digits", "train")
    items = real[:]
    rows = np.array([np.flatnonzero(items["cond"] == k % 10)[k // 10] for k in range(100)])
    shown = [items["x0"][rows], items["x0"][np.roll(rows, 1)]]
    monkeypatch.setattr(loop.Run, "sample", lambda self, key, n, *, cond, guidance: shown.pop(0))
    loaded = ddjax.load(run)
    assert loop.judge_labels(loaded, loaded.config, 100, 1.0) > 0.97
    assert loop.judge_labels(loaded, loaded.config, 100, 1.0) < 0.03


def test_export(capsys, tmp_path, run):
    path = tmp_path / "model.safetensors"
    assert ok(capsys, "export", "--workdir", run, "--out", path) == f"parameters of step 10 -> {path}\n"
    params, metadata = load_safetensors(path)
    expected = ddjax.load(run).params
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)
    assert metadata["step"] == "10"
    assert json.loads(metadata["config"]) == json.loads((run / "run.json").read_text())["config"]


@pytest.mark.slow
def test_a_child_process(tmp_path):
    child = tiny.ddjax("train", "--config", tmp_path / "no.py", "--workdir", tmp_path / "run")
    out, err = child.communicate(timeout=120)
    assert (child.returncode, out) == (1, "")
    assert err == f"ddjax train: no config file at {tmp_path}/no.py (configs/ of the repository has some)\n"


@pytest.mark.slow
def test_the_whole_road_in_child_processes(tmp_path):
    config, run = tiny.write(tmp_path / "c.py"), tmp_path / "run"
    for command in (
        ["train", "--config", config, "--workdir", run],
        ["sample", "--workdir", run, "--num", 3, "--out", tmp_path / "x.png"],
        ["eval", "--workdir", run, "--labels", 20, "--out", tmp_path / "x.json"],
        ["export", "--workdir", run, "--out", tmp_path / "x.safetensors"],
    ):
        child = tiny.ddjax(*command)
        out, err = child.communicate(timeout=300)
        assert (child.returncode, err) == (0, ""), out + err
    assert {"x.png", "x.json", "x.safetensors"} <= {p.name for p in tmp_path.iterdir()}
    assert 0 <= json.loads((tmp_path / "x.json").read_text())["label_accuracy"] <= 1
    # A reader that goes away is not an error worth a traceback.
    command = f"exec 3>&1; {subprocess.list2cmdline(tiny.ddjax('--help').args)} | head -n 1"
    shell = subprocess.run(["bash", "-c", command], env=tiny.environment(), capture_output=True, text=True)
    assert "Traceback" not in shell.stderr
