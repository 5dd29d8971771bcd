import contextlib
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddjax import data
from ddjax.data import builtin, splits
from ddjax.data.sources import WindowSource, levels


@pytest.mark.slow
def test_import_is_light():
    code = (
        "import sys, json, ddjax.data; "
        "print(json.dumps([m for m in ('grain', 'sklearn', 'PIL', 'pyarrow', 'tokenizers') if m in sys.modules]))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(out) == []


def test_digits_split_is_scikit_learns_stratified_one():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    train, test = data.load("digits", "train"), data.load("digits", "test")
    assert (len(train), len(test)) == (1500, 297)
    assert (train.shape, train.num_symbols, train.num_classes, train.levels) == ((8, 8, 1), 17, 10, None)
    _, expected = train_test_split(np.arange(1797), test_size=297, stratify=labels, random_state=0)
    batch = test[:]
    np.testing.assert_array_equal(batch["x0"].reshape(297, 64), images[np.sort(expected)])
    np.testing.assert_array_equal(batch["cond"], labels[np.sort(expected)])
    assert batch["x0"].dtype == batch["cond"].dtype == np.int32
    # Disjoint and covering: every image once, counting the few that occur twice.
    both = np.concatenate([train[:]["x0"], batch["x0"]]).reshape(1797, 64)
    found, expected = ([row.astype(np.uint8).tobytes() for row in x] for x in (both, images))
    assert sorted(found) == sorted(expected)


def test_digits_continuous_values_are_exactly_the_levels():
    tokens, values = data.load("digits", "test")[:]["x0"], data.load("digits", "test", tokens=False)
    assert values.num_symbols is None
    np.testing.assert_array_equal(values.levels, np.arange(17, dtype=np.float32) / 8 - 1)
    x0 = values[:]["x0"]
    assert x0.dtype == np.float32
    np.testing.assert_array_equal(x0, tokens / 8 - 1)
    np.testing.assert_array_equal(values.to_images(x0), data.load("digits", "test").to_images(tokens))


def test_digits_have_no_validation_split_unless_carved():
    with pytest.raises(ValueError, match=r"digits has no 'valid' split, only train and test; valid_fraction=f"):
        data.load("digits", "valid")
    train = data.load("digits", "train", valid_fraction=0.1)
    valid = data.load("digits", "valid", valid_fraction=0.1)
    whole = data.load("digits", "train")
    assert len(train) + len(valid) == 1500
    assert 145 <= len(valid) <= 155
    counts = np.bincount(valid[:]["cond"])
    np.testing.assert_allclose(counts, 0.1 * np.bincount(whole[:]["cond"]), atol=0.5)
    joined = np.concatenate([train[:]["x0"], valid[:]["x0"]])
    assert sorted(x.tobytes() for x in joined) == sorted(x.tobytes() for x in whole[:]["x0"])
    np.testing.assert_array_equal(
        data.load("digits", "test", valid_fraction=0.1)[:]["x0"], data.load("digits", "test")[:]["x0"]
    )


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 2])
def test_valid_fraction_must_be_a_fraction(fraction):
    with pytest.raises(ValueError, match="valid_fraction must lie between 0 and 1"):
        data.load("digits", "train", valid_fraction=fraction)


@pytest.mark.slow
def test_stdlib_is_the_librarys_files_by_split():
    import pathlib
    import sysconfig

    root = pathlib.Path(sysconfig.get_path("stdlib"))
    files = [path.relative_to(root).as_posix() for path in builtin.stdlib_files(root)]
    assert files == sorted(files)
    assert {"argparse.py", "json/decoder.py"} <= set(files)
    assert not any(part in path.split("/") for path in files for part in ("test", "site-packages", "idlelib"))
    shares = dict.fromkeys(splits.SPLITS, 0)
    for path in builtin.stdlib_files(root):
        shares[builtin.stdlib_split(path, root)] += 1
    assert shares["train"] > 0.85 * len(files)
    assert min(shares.values()) > 0.02 * len(files)

    valid = data.load("stdlib", "valid", length=128)
    own = b"".join((root / p).read_bytes() for p in files if builtin.stdlib_split(root / p, root) == "valid")
    assert len(valid) == len(own) // 128
    assert valid[:]["x0"].astype(np.uint8).tobytes() == own[: len(own) // 128 * 128]
    assert (valid.shape, valid.num_symbols) == ((128,), 256)
    assert valid.to_text(valid[:2]["x0"])[1] == own[128:256].decode(errors="replace")


def test_stdlib_has_its_own_splits_and_no_continuous_form():
    with pytest.raises(ValueError, match="unknown option 'valid_fraction'"):
        data.load("stdlib", "valid", valid_fraction=0.1)
    with pytest.raises(ValueError, match="stdlib is text"):
        data.load("stdlib", "valid", tokens=False)


def test_a_file_keeps_its_split_wherever_the_library_lies(tmp_path):
    from pathlib import Path

    assert builtin.stdlib_split(Path("/a/json/decoder.py"), Path("/a")) == builtin.stdlib_split(
        tmp_path / "json" / "decoder.py", tmp_path
    )


@given(st.integers(1, 300), st.integers(0, 20), st.integers(0, 20), st.integers(1, 20))
def test_fractions_divide_disjointly_and_cover(count, train, valid, test):
    total = train + valid + test
    fractions = (train / total, valid / total, test / total)
    found = []
    for split in splits.SPLITS:
        with contextlib.suppress(ValueError):  # an empty split
            found.append(splits.items(count, split, fractions, "x"))
    np.testing.assert_array_equal(np.sort(np.concatenate(found)), np.arange(count))


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 60))
@settings(max_examples=50)
def test_windows_cover_the_stream(length, stride, extra):
    stream = (np.arange(length + extra) % 251).astype(np.uint8)
    source = WindowSource(stream, length, stride, 251)
    assert (len(source) - 1) * stride + length <= len(stream) < len(source) * stride + length
    windows = source[np.arange(len(source))]["x0"]
    for i, window in enumerate(windows):
        np.testing.assert_array_equal(window, stream[i * stride : i * stride + length])


@pytest.mark.parametrize("count", [2, 17, 256])
def test_levels_run_from_minus_one_to_one(count):
    values = levels(count)
    assert values.dtype == np.float32
    assert (values[0], values[-1]) == (-1, 1)
    np.testing.assert_allclose(np.diff(values), 2 / (count - 1), atol=1e-6)


@pytest.mark.slow
def test_dataset_displays_only_what_it_is():
    digits, text = data.load("digits", "test"), data.load("stdlib", "valid", length=8)
    with pytest.raises(ValueError, match=r"digits: states of shape \(8, 8, 1\) are not text"):
        digits.to_text(digits[:1]["x0"])
    with pytest.raises(ValueError, match=r"stdlib: states of shape \(8,\) are not images"):
        text.to_images(text[:1]["x0"])
    with pytest.raises(ValueError, match=r"expected states \(n, \*\(8, 8, 1\)\), got \(3, 8, 8\)"):
        digits.to_images(np.zeros((3, 8, 8)))
    # A mask is clipped in an image, a block in a text.
    assert digits.to_images(np.full((1, 8, 8, 1), 17)).max() == 255
    assert text.to_text(np.array([[104, 105, 256, 33, 33, 33, 33, 256]])) == ["hi\u2588!!!!\u2588"]


@pytest.mark.parametrize(
    ("name", "split", "options", "message"),
    [
        ("digits", "dev", {}, "unknown split 'dev': expected one of train, valid, test"),
        ("digits", "train", {"lenght": 3}, "digits: unknown option 'lenght'; it takes valid_fraction"),
        ("stdlib", "test", {"length": 10**9}, r"stdlib test: \d+ tokens are fewer than one window of length="),
        ("stdlib", "test", {"length": 0}, "length and stride must be positive"),
    ],
)
def test_errors_of_load(name, split, options, message):
    with pytest.raises(ValueError, match=message):
        data.load(name, split, **options)


def test_nothing_at_the_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nope: no such file or folder, and no built-in .*digits, stdlib"):
        data.load(tmp_path / "nope", "train")
    with pytest.raises(ValueError, match=r"no images and no text in this folder; supported: \.png"):
        data.load(tmp_path, "train")
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.zip: unsupported extension; supported: \.npz"):
        data.load(tmp_path / "a.zip", "train")
