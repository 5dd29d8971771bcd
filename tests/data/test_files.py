import io
import sys

import numpy as np
import pytest

from ddjax import data

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (40, 5, 6)).astype(np.uint8)
LABELS = np.arange(40) % 4


def all_splits(path, **options):
    return [data.load(path, split, **options) for split in ("train", "valid", "test")]


def rows(parts):
    return sorted(x.tobytes() for part in parts for x in part[:]["x0"])


@pytest.mark.parametrize("name", ["a.npz", "a.npy"])
def test_one_array_is_divided_by_a_permutation(tmp_path, name):
    if name == "a.npz":
        np.savez(tmp_path / name, x=PIXELS, y=LABELS)
        options = {}
    else:
        np.save(tmp_path / name, PIXELS)
        np.save(tmp_path / "labels.npy", LABELS)
        options = {"labels_path": tmp_path / "labels.npy"}
    parts = all_splits(tmp_path / name, fractions=(0.5, 0.25, 0.25), **options)
    assert [len(part) for part in parts] == [20, 10, 10]
    assert rows(parts) == sorted(x.tobytes() for x in PIXELS.astype(np.int32))
    lookup = {x.tobytes(): y for x, y in zip(PIXELS.astype(np.int32), LABELS, strict=True)}
    for part in parts:
        assert (part.shape, part.num_symbols, part.num_classes) == ((5, 6, 1), 256, 4)
        batch = part[:]
        assert batch["x0"].dtype == batch["cond"].dtype == np.int32
        assert [lookup[x.tobytes()] for x in batch["x0"]] == batch["cond"].tolist()
    again = data.load(tmp_path / name, "train", fractions=(0.5, 0.25, 0.25), **options)
    np.testing.assert_array_equal(again[:]["x0"], parts[0][:]["x0"])


def test_npy_is_memory_mapped(tmp_path):
    np.save(tmp_path / "a.npy", PIXELS)
    assert isinstance(data.load(tmp_path / "a.npy", "train").source.x0.base, np.memmap)
    with pytest.raises(IndexError):
        data.load(tmp_path / "a.npy", "test")[np.array([99])]


def test_integers_as_levels(tmp_path):
    np.savez(tmp_path / "a.npz", x=PIXELS)
    tokens, values = (data.load(tmp_path / "a.npz", "train", tokens=kind) for kind in (True, False))
    assert values.num_symbols is None
    x0 = values[:]["x0"]
    assert x0.dtype == np.float32
    np.testing.assert_array_equal(np.searchsorted(values.levels, x0), tokens[:]["x0"])
    np.testing.assert_array_equal(values.to_images(x0)[..., None].squeeze(-1), tokens[:]["x0"])


def test_own_splits_of_an_archive(tmp_path):
    path = tmp_path / "a.npz"
    x, y = RNG.integers(0, 5, (40, 7)), LABELS
    x[-1, 0], y_test = 8, y[30:].copy()  # the test split's largest values are no training value
    y_test[0] = 6
    np.savez(path, x_train=x[:30], y_train=y[:30], x_test=x[30:], y_test=y_test)
    train, test = data.load(path, "train"), data.load(path, "test")
    assert (train.num_symbols, train.num_classes) == (test.num_symbols, test.num_classes) == (9, 7)
    np.testing.assert_array_equal(train[:]["x0"], x[:30])
    np.testing.assert_array_equal(test[:]["cond"], y_test)
    with pytest.raises(ValueError, match="has no 'valid' split, only train and test; valid_fraction=f"):
        data.load(path, "valid")
    with pytest.raises(ValueError, match="has its own splits \\(train, test\\): leave out fractions"):
        data.load(path, "train", fractions=(0.8, 0.1, 0.1))
    parts = [data.load(path, split, valid_fraction=0.25) for split in ("train", "valid")]
    assert rows(parts) == sorted(row.tobytes() for row in x[:30].astype(np.int32))
    np.savez(path, x_train=x[:20], x_valid=x[20:30], x_test=x[30:])
    np.testing.assert_array_equal(data.load(path, "valid")[:]["x0"], x[20:30])
    with pytest.raises(ValueError, match="has a validation split already: leave out valid_fraction"):
        data.load(path, "valid", valid_fraction=0.1)


def test_floats_are_continuous_as_they_are(tmp_path):
    x = RNG.normal(size=(40, 3))
    np.save(tmp_path / "a.npy", x)
    part = data.load(tmp_path / "a.npy", "train")
    assert (part.num_symbols, part.levels, part.shape) == (None, None, (3,))
    assert part[:3]["x0"].dtype == np.float32
    assert set(part[:]["x0"][:, 0]) <= set(x[:, 0].astype(np.float32))
    with pytest.raises(ValueError, match="holds float64, which is continuous: leave out tokens=True"):
        data.load(tmp_path / "a.npy", "train", tokens=True)
    with pytest.raises(ValueError, match="num_symbols=4 given, but the values are float64"):
        data.load(tmp_path / "a.npy", "train", num_symbols=4)


def test_bools_are_two_symbols():
    part = data.from_arrays(np.array([[True, False]]))
    assert part.num_symbols == 2
    np.testing.assert_array_equal(part[:]["x0"], [[1, 0]])


def test_tokens_out_of_range(tmp_path):
    x = np.zeros((40, 3), np.int64)
    x[7, 2] = 9
    np.savez(tmp_path / "a.npz", x=x)
    with pytest.raises(ValueError, match=r"a\.npz: token 9 at index \(7, 2\) is outside \[0, 5\)"):
        data.load(tmp_path / "a.npz", "train", num_symbols=5)
    np.save(tmp_path / "a.npy", x)
    found = 0
    for part in all_splits(tmp_path / "a.npy", num_symbols=5, fractions=(0.5, 0.25, 0.25)):
        try:
            part[:]
        except ValueError as error:
            found += "token 9 at index (7, 2)" in str(error)
    assert found == 1
    assert data.load(tmp_path / "a.npy", "train").num_symbols == 10
    with pytest.raises(ValueError, match=r"token -1 at index \(0, 0\)"):
        data.from_arrays(np.array([[-1]]), num_symbols=3)
    with pytest.raises(ValueError, match=r"token 3 at index \(0, 1\) is outside \[0, 3\)"):
        data.from_arrays(np.array([[2, 3]]), num_symbols=3)


def test_archive_errors(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, pixels=PIXELS, other=LABELS)
    with pytest.raises(ValueError, match=r"a\.npz: none of the keys x0, .* only pixels, other: give x_key"):
        data.load(path, "train")
    with pytest.raises(ValueError, match=r"a\.npz: no key 'x', only pixels, other"):
        data.load(path, "train", x_key="x")
    with pytest.raises(ValueError, match=r"expected 40 integer labels, got uint8 of shape \(40, 5, 6\)"):
        data.load(path, "train", x_key="pixels", y_key="pixels")
    assert data.load(path, "train", x_key="pixels", y_key="other").num_classes == 4
    with pytest.raises(ValueError, match=r"expected an array \(items, \*sites\) with items in it, got shape \(40,\)"):
        data.load(path, "train", x_key="other")
    with pytest.raises(ValueError, match="use fractions, not valid_fraction"):
        data.load(path, "train", x_key="pixels", valid_fraction=0.1)
    with pytest.raises(ValueError, match=r"fractions must be \(train, valid, test\) summing to 1"):
        data.load(path, "train", x_key="pixels", fractions=(0.5, 0.2, 0.2))
    with pytest.raises(ValueError, match=r"split 'valid' of 40 items is empty at fractions=\(0.9, 0.0, 0.1\)"):
        data.load(path, "valid", x_key="pixels", fractions=(0.9, 0.0, 0.1))
    np.savez(path, x=np.array(["a", "b"] * 20)[:, None])
    with pytest.raises(ValueError, match="expected integers or floats, got <U1"):
        data.load(path, "train")


def test_nothing_is_unpickled(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([[{}], [None]], object))
    with pytest.raises(ValueError, match=r"a\.npz: cannot read 'x' \(Object arrays cannot be loaded"):
        data.load(tmp_path / "a.npz", "train")
    np.save(tmp_path / "a.npy", np.array([[{}]], object))
    with pytest.raises(ValueError, match=r"a\.npy: not a readable \.npy file"):
        data.load(tmp_path / "a.npy", "train")


@pytest.mark.parametrize("name", ["a.npz", "a.npy"])
@pytest.mark.parametrize("kept", [0, 3, 60, 400])
def test_truncated_arrays_name_the_file(tmp_path, name, kept):
    buffer = io.BytesIO()
    np.savez(buffer, x=PIXELS) if name == "a.npz" else np.save(buffer, PIXELS)
    (tmp_path / name).write_bytes(buffer.getvalue()[:kept])
    with pytest.raises(ValueError, match=rf"{name}: not a readable \.np. file \(.*\): is it complete\?"):
        data.load(tmp_path / name, "train")


def test_a_flipped_byte_is_noticed(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, x=PIXELS)
    content = bytearray(path.read_bytes())
    content[500] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npz: cannot read 'x' \(Bad CRC-32.*is the file complete"):
        data.load(path, "train")


def save_images(folder, count, size=(6, 5), offset=0):
    pillow = pytest.importorskip("PIL.Image")
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        pixels = np.full((*size, 3), 10 * i + offset, np.uint8)
        pixels[0, 0] = 255, 0, 0
        pillow.fromarray(pixels).save(folder / f"{i:02}.png")


def test_image_folder_with_labels(tmp_path):
    save_images(tmp_path / "dogs", 12)
    save_images(tmp_path / "cats", 8, offset=1)
    (tmp_path / "cats" / ".hidden.png").write_bytes(b"")
    (tmp_path / "README.md").write_text("about")
    parts = all_splits(tmp_path, fractions=(0.5, 0.25, 0.25))
    assert [len(part) for part in parts] == [10, 5, 5]
    assert {(part.shape, part.num_symbols, part.num_classes) for part in parts} == {((6, 5, 3), 256, 2)}
    shades = []
    for part in parts:
        batch = part[:]
        assert batch["x0"].dtype == np.int32
        assert (batch["x0"][:, 0, 0] == [255, 0, 0]).all()
        for image, label in zip(batch["x0"], batch["cond"], strict=True):
            assert image[1, 1, 0] % 10 == (1 if label == 0 else 0)  # cats are 0
            shades.append(image[1, 1, 0])
    assert sorted(shades) == sorted([10 * i for i in range(12)] + [10 * i + 1 for i in range(8)])
    unlabelled = data.load(tmp_path, "train", labels=False, grey=True, tokens=False)
    assert (unlabelled.num_classes, unlabelled.shape, len(unlabelled.levels)) == (0, (6, 5, 1), 256)
    assert list(unlabelled[:2]) == ["x0"]
    assert set(unlabelled[:]["x0"].ravel()) <= set(unlabelled.levels)


def test_image_folder_with_its_own_splits(tmp_path):
    save_images(tmp_path / "train" / "b", 6)
    save_images(tmp_path / "test" / "a", 2)
    train, test = data.load(tmp_path, "train"), data.load(tmp_path, "test")
    assert (train.num_classes, test.num_classes) == (2, 2)
    assert set(train[:]["cond"]) == {1}
    assert set(test[:]["cond"]) == {0}
    with pytest.raises(ValueError, match="has no 'valid' split, only train and test"):
        data.load(tmp_path, "valid")
    carved = [data.load(tmp_path, split, valid_fraction=0.5) for split in ("train", "valid")]
    assert rows(carved) == rows([train])


def test_resizing_crops_the_centre(tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 4:12] = 200  # the centre square
    for i in range(4):
        pillow.fromarray(pixels).save(tmp_path / f"{i}.png")
    part = data.load(tmp_path, "train", size=4, fractions=(1, 0, 0))
    assert part.shape == (4, 4, 3)
    assert part[:]["x0"][:, 1:3, 1:3].min() > 190


def test_image_folder_errors(tmp_path):
    save_images(tmp_path, 4)
    save_images(tmp_path / "z", 1, size=(7, 5))
    whole = {"fractions": (1, 0, 0)}
    with pytest.raises(ValueError, match=r"z/00\.png: is 7x5, the first image is 6x5: give size="):
        data.load(tmp_path, "train", **whole)[:]
    content = (tmp_path / "03.png").read_bytes()
    (tmp_path / "03.png").write_bytes(content[: len(content) // 2])
    part = data.load(tmp_path, "train", size=4, **whole)
    part[:3]
    with pytest.raises(ValueError, match=r"03\.png: not a readable image .*mend or remove it"):
        part[np.array([0, 3])]
    (tmp_path / "00.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"00\.png: not a readable image"):
        data.load(tmp_path, "train", **whole)
    with pytest.raises(ValueError, match="size must be positive, got 0"):
        data.load(tmp_path, "train", size=0)
    with pytest.raises(ValueError, match="use fractions, not valid_fraction"):
        data.load(tmp_path, "train", valid_fraction=0.1)


def test_missing_pillow_says_how_to_install_it(tmp_path, monkeypatch):
    save_images(tmp_path, 2)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"reading images needs pillow: pip install 'ddjax\[plot\]'"):
        data.load(tmp_path, "train", fractions=(1, 0, 0))


def test_jpeg_scans_are_the_jpegs(tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    files = []
    for _ in range(6):
        buffer = io.BytesIO()
        pillow.fromarray(RNG.integers(0, 256, (8, 8, 3)).astype(np.uint8)).save(buffer, "JPEG", quality=75)
        files.append(buffer.getvalue())
    header = files[0][: files[0].index(b"\xff\xda")]
    assert all(file.startswith(header) for file in files)
    scans = [file[len(header) :] for file in files]
    arrays = {"header": np.frombuffer(header, np.uint8)}
    for part, chosen in (("train", scans[:4]), ("test", scans[4:])):
        arrays[f"{part}_scan"] = np.frombuffer(b"".join(chosen), np.uint8)
        arrays[f"{part}_off"] = np.cumsum([0, *map(len, chosen)]).astype(np.uint32)
        arrays[f"y_{part}"] = np.arange(len(chosen), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", **arrays)
    test = data.load(tmp_path / "a.npz", "test")
    expected = np.stack([np.asarray(pillow.open(io.BytesIO(file))) for file in files[4:]])
    batch = test[np.array([1, 0])]
    np.testing.assert_array_equal(batch["x0"], expected[::-1])
    np.testing.assert_array_equal(batch["cond"], [1, 0])
    assert (test.shape, test.num_symbols, test.num_classes) == ((8, 8, 3), 256, 4)
    with pytest.raises(ValueError, match="has no 'valid' split"):
        data.load(tmp_path / "a.npz", "valid")
    arrays["test_scan"] = arrays["test_scan"][:-20]
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=r"a\.npz: image 1: not a readable image"):
        data.load(tmp_path / "a.npz", "test")[:]


def test_shared_mnist(shared_data):
    test = data.load(shared_data / "mnist" / "mnist.npz", "test")
    assert (len(test), test.shape, test.num_symbols, test.num_classes) == (10_000, (28, 28, 1), 256, 10)
    np.testing.assert_array_equal(np.bincount(test[:]["cond"])[:2], [980, 1135])  # as LeCun's page counts


def test_shared_cifar(shared_data):
    pytest.importorskip("PIL")
    test = data.load(shared_data / "cifar10" / "cifar10_jpeg.npz", "test", tokens=False)
    assert (len(test), test.shape, test.num_classes) == (10_000, (32, 32, 3), 10)
    assert (np.bincount(test.source.cond) == 1000).all()
    x0 = test[np.array([9999, 0])]["x0"]
    assert x0.shape == (2, 32, 32, 3)
    assert set(x0.ravel()) <= set(test.levels)


def test_images_of_an_archive_are_resized(tmp_path):
    """A flat image stays flat, a step keeps its place, and the longer side is cropped on both ends."""
    x = np.zeros((3, 8, 12), np.uint8)
    x[0], x[1, :, 6:], x[2, :, :2] = 100, 200, 255
    np.savez(tmp_path / "x.npz", x_train=x, x_test=x[..., None])
    small = data.load(tmp_path / "x.npz", "train", size=4)[np.arange(3)]["x0"][..., 0]
    assert small.shape == (3, 4, 4)
    assert (small[0] == 100).all()
    assert (small[1, :, :2] < 30).all()
    assert (small[1, :, 2:] > 170).all()
    assert (small[2] < 40).all()  # the filter reaches a pixel beyond the cut
    test = data.load(tmp_path / "x.npz", "test", size=4)[np.arange(3)]["x0"]
    np.testing.assert_array_equal(test[..., 0], small)
    with pytest.raises(ValueError, match="size must be positive, got 0"):
        data.load(tmp_path / "x.npz", "train", size=0)
    np.savez(tmp_path / "y.npz", x=np.zeros((3, 8, 8), np.float32))
    with pytest.raises(ValueError, match=r"size is for images .* of uint8, got \(3, 8, 8\) of float32"):
        data.load(tmp_path / "y.npz", "train", size=4)
