"""`run.record`, `run.edit` and `ddjax edit`."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny

import ddjax
from ddjax import editing, inversion
from ddjax.cli import main
from ddjax.data import from_arrays
from ddjax.experiment import build, load_data

KEY = jax.random.key


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """`main` sets JAX's compilation cache for its process; the tests have their own."""
    monkeypatch.setattr("ddjax.cli._prepare_jax", lambda: None)


@pytest.fixture(scope="module")
def tokens():
    return ddjax.load(tiny.trained())


def untrained(config, data):
    experiment = build(config, data)
    params = jax.tree.map(lambda a: a + 0.1, jax.jit(experiment.init)(KEY(0)))
    return ddjax.Run(experiment, params, 0)


@pytest.fixture(scope="module")
def real():
    """A Gaussian process on the digits."""
    config = tiny.config(
        data={"name": "digits", "tokens": False},
        process={"name": "gaussian", "schedule": "edm", "data_std": 0.5},
        denoiser={"kind": "edm", "options": tiny.BASE["denoiser"]["options"]},
        objective={"name": "gaussian"},
        sample={"solver": "heun", "steps": 3, "num": 4},
    )
    return untrained(config, load_data(config, "train"))


def items(run, rows):
    return load_data(run.config, "test")[np.asarray(rows)]


def command(capsys, monkeypatch, run, *arguments, code=0):
    monkeypatch.setattr("ddjax.run.load", lambda workdir, step=None: run)
    found = main(["edit", "--workdir", "none", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert found == code, out + err
    assert "Traceback" not in err
    return err if code else out


def test_tokens_come_back_and_do_not_depend_on_the_batch(tokens):
    data = items(tokens, range(3))
    made = tokens.record(KEY(0), data["x0"], cond=data["cond"])
    assert made.states.shape == (3, 4, 8, 8, 1)
    np.testing.assert_array_equal(tokens.edit(KEY(1), made, cond=data["cond"], guidance=1.0), data["x0"])
    parts = tokens.record(KEY(0), data["x0"], cond=data["cond"], batch_size=2)
    np.testing.assert_array_equal(parts.states, made.states)
    whole, some = (tokens.edit(KEY(1), m, cond=3, guidance=3.0, batch_size=n) for m, n in ((made, 3), (parts, 2)))
    np.testing.assert_array_equal(whole, some)
    short = tokens.record(KEY(0), data["x0"], cond=data["cond"], start=0.4)
    np.testing.assert_array_equal(short.times, np.asarray(made.times)[-2:])


@pytest.mark.slow
def test_values_come_back_by_noise_and_by_the_ode(real):
    """The run's own process, grid and guidance are those of the functions that it calls."""
    data = items(real, range(3))
    for options in ({}, {"independent": True}, {"solver": "heun", "iterations": 20}):
        made = real.record(KEY(0), data["x0"], cond=data["cond"], **options)
        again = real.edit(KEY(1), made, cond=data["cond"], guidance=1.0)
        assert (inversion.round_trip_error(data["x0"], again) < 1e-3).all(), options
    direct = inversion.record(
        KEY(0), real.denoise, real.process, data["x0"], data["cond"], times=real.experiment.times(), independent=True
    )
    made = real.record(KEY(0), data["x0"], cond=data["cond"], independent=True)
    np.testing.assert_array_equal(made.states, direct.states)
    np.testing.assert_allclose(
        real.edit(KEY(2), made, cond=4, guidance=2.0, skip=1),
        inversion.edit(
            KEY(2), real.experiment.denoiser(real.params, 2.0, 4), real.process, direct, np.full(3, 4, np.int32), skip=1
        ).x0,
        atol=1e-5,
    )


@pytest.mark.slow
def test_images_side_by_side(capsys, monkeypatch, tmp_path, tokens, real):
    for run, options in ((tokens, []), (real, ["--method", "ode", "--iterations", 20])):
        png, npy = tmp_path / "new" / "x.png", tmp_path / "x.npy"
        base = ["--rows", 4, 0, "--label", 7, "--steps", 3, *options]
        out = command(capsys, monkeypatch, run, *base, "--out", npy)
        assert out.startswith("round-trip error: ")
        assert out.endswith(f"2 originals, reconstructions and edits -> {npy}\n")
        found, data = np.load(npy), items(run, [4, 0])
        assert found.shape == (3, 2, 8, 8, 1)
        np.testing.assert_array_equal(found[0], data["x0"])
        np.testing.assert_allclose(found[1], data["x0"], atol=0.01)
        solver = "heun" if options else "ancestral"
        made = run.record(jax.random.split(KEY(0), 3)[0], data["x0"], cond=data["cond"], solver=solver, iterations=20)
        edited = run.edit(jax.random.split(KEY(0), 3)[2], made, cond=7)
        np.testing.assert_array_equal(found[2], edited)
    assert "no noise for lambda_1, lambda_2" in command(
        capsys, monkeypatch, real, *base, "--lambda-1", 0.5, "--out", png, code=1
    )  # fmt: skip
    command(capsys, monkeypatch, tokens, *base[:7], "--out", png)
    assert png.read_bytes().startswith(b"\x89PNG\r\n")


def test_pictures_in_blocks(tmp_path):
    data = from_arrays(np.zeros((4, 2, 2), np.uint8), num_symbols=4, tokens=True)
    seen = {}
    shown = {name: np.full((18, 2, 2, 1), i) for i, name in enumerate(("original", "reconstruction", "edit"))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(editing.datasets, "grid", lambda images, columns, scale: seen.update(images=images, n=columns))
        patch.setattr(editing.datasets, "write_png", lambda path, image: None)
        editing.write_images(data, shown, tmp_path / "x.png")
    assert seen["n"] == 16
    assert len(seen["images"]) == 2 * 3 * 16  # the second three rows have two images and white
    np.testing.assert_array_equal(seen["images"][[0, 16, 32, 48, 50, 64], 0, 0, 0], [0, 85, 170, 0, 255, 85])


def test_text_in_three_blocks(capsys, monkeypatch, tmp_path):
    (tmp_path / "abc.txt").write_text("abc " * 100)
    config = tiny.config(
        data={"name": str(tmp_path / "abc.txt"), "options": {"length": 8, "vocabulary": "characters"}},
        denoiser={"name": "text", "options": {"width": 8, "depth": 1, "heads": 2}},
    )
    options = {"width": 8, "depth": 1, "heads": 2}
    config = dataclasses.replace(config, denoiser=dataclasses.replace(config.denoiser, options=options))
    run = untrained(config, load_data(config, "train"))
    txt, call = tmp_path / "x.txt", lambda *a, **k: command(capsys, monkeypatch, run, *a, "--out", txt, **k)
    out = call("--text", "abcc bab", "--lambda-1", 0, "--lambda-2", 1)
    assert "round-trip error: 0 on average" in out
    blocks = txt.read_text().split("\n" + "-" * 80 + "\n")
    assert [b.split("\n")[0] for b in blocks] == ["original 0", "reconstruction 0", "edit 0"]
    assert blocks[0].split("\n")[1] == blocks[1].split("\n")[1] == "abcc bab"
    assert len(blocks[2].split("\n")[1]) == 8
    (tmp_path / "short.txt").write_text("abc")
    assert "3 tokens, and an example has 8" in call("--text-file", tmp_path / "short.txt", code=1)
    assert "give one of them" in call("--text", "abc", "--text-file", tmp_path / "short.txt", code=1)
    assert "leave one of them out" in call("--text", "abcc bab", "--rows", 1, code=1)
    assert "has no labels to edit towards" in call("--label", 1, code=1)


def test_errors(capsys, monkeypatch, tmp_path, tokens, real):
    fails = lambda run, *a: command(capsys, monkeypatch, run, *a, "--out", tmp_path / "x.png", code=1)
    assert "have no ODE to go up" in fails(tokens, "--method", "ode")
    assert "has items 0 to" in fails(tokens, "--rows", 0, 100000)
    assert "one for each of 1 items, got 2" in fails(tokens, "--label", 1, 2)
    assert "labels run from 0 to 9" in fails(tokens, "--label", 12)
    assert "in (0, 1], got 0.0" in fails(tokens, "--start", 0)
    assert "it is for text" in fails(tokens, "--text", "abc")
    assert "does not say what its steps draw from" in fails(real, "--solver", "dpm_solver_pp")
    assert "use a name ending in .png" in command(
        capsys, monkeypatch, tokens, "--out", tmp_path / "x.txt", code=1
    )  # fmt: skip
