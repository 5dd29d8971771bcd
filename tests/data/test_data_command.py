import numpy as np
import pytest

from ddjax import data
from ddjax.cli import main


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """`main` sets JAX's compilation cache for its process; the tests have their own."""
    monkeypatch.setattr("ddjax.cli._prepare_jax", lambda: None)


def run(capsys, *arguments):
    code = main(["data", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_prepare_and_verify(tmp_path, capsys):
    text, out = tmp_path / "a.txt", tmp_path / "out"
    text.write_text("one line\n" * 500)
    prepare = ("prepare", text, "--out", out, "--document", "line", "--vocabulary", "characters", "--shard-size", 0.002)
    code, said, wrong = run(capsys, *prepare)
    assert (code, wrong) == (0, "")
    assert said.splitlines()[-1] == f"{out}: 500 documents, 4,000 numbers in 2 shards"
    found = data.load(out, "train", length=8, fractions=(1, 0, 0))
    assert found.to_text(found[:2]["x0"]) == ["one line"] * 2
    assert run(capsys, "verify", out)[:2] == (0, f"{out}: every shard is as its manifest says\n")
    assert run(capsys, *prepare)[1].endswith("in 2 shards, 2 of which were there\n")
    (out / "00001.bin").unlink()
    code, said, wrong = run(capsys, "verify", out)
    assert (code, said) == (1, "")
    assert wrong.startswith(
        f"ddjax data: the shard {out}/00001.bin is missing: restore it from a copy, or run the same"
    )
    assert len(wrong.splitlines()) == 1
    assert run(capsys, *prepare)[0] == 0
    assert run(capsys, "verify", out)[0] == 0
    code, _, wrong = run(capsys, *prepare[:-1], 1)
    assert code == 1
    assert "prepared by other options or from other input (shard_bytes: 2097 -> 1048576)" in wrong


def test_images(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", x=np.arange(320, dtype=np.uint8).reshape(5, 8, 8), y=np.arange(5))
    assert run(capsys, "prepare", tmp_path / "a.npz", "--out", tmp_path / "out")[0] == 0
    back, own = (data.load(tmp_path / name, "train", fractions=(1, 0, 0)) for name in ("out", "a.npz"))
    for name in ("x0", "cond"):
        np.testing.assert_array_equal(back[:][name], own[:][name])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prepare", "{}/a.txt", "--out", "{}/x", "--size", "8"], "--size is for images, and "),
        (["prepare", "{}/a.txt", "digits", "--out", "{}/x"], "either files and folders of text, or one folder or file"),
        (["prepare", "{}/none", "--out", "{}/x"], "none: no such file or folder"),
        (["prepare", "{}/a.txt", "--out", "{}"], "is not empty and was not prepared"),
        (["prepare", "digits", "--out", "{}/x"], "digits: unknown option 'fractions'"),
        (["verify", "{}"], "no manifest.json in this folder: `ddjax data prepare` has not made it, or not finished"),
        (["verify", "nothing://x"], "nothing://x: Protocol not known: nothing"),
    ],
)
def test_errors_are_one_line(tmp_path, capsys, arguments, words):
    (tmp_path / "a.txt").write_text("text")
    code, _, wrong = run(capsys, *(argument.format(tmp_path) for argument in arguments))
    assert code == 1
    assert len(wrong.splitlines()) == 1
    assert words in wrong
