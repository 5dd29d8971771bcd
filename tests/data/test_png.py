import numpy as np
import pytest

from ddjax import data


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3), (1, 1), (300, 2, 3)])
def test_pillow_reads_back_the_same_pixels(tmp_path, shape):
    image_module = pytest.importorskip("PIL.Image")
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    (tmp_path / "a.png").write_bytes(b"old")
    data.write_png(tmp_path / "a.png", image)
    with image_module.open(tmp_path / "a.png") as read:
        read.load()
        assert read.mode == ("RGB" if shape[2:] == (3,) else "L")
        np.testing.assert_array_equal(np.asarray(read), image.squeeze(-1) if shape[2:] == (1,) else image)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("bad", [np.zeros((3, 3)), np.zeros((3, 3, 4), np.uint8), np.zeros((0, 3), np.uint8)])
def test_what_is_no_image_is_refused_and_leaves_no_file(tmp_path, bad):
    with pytest.raises(ValueError, match=r"a\.png: expected a uint8 image"):
        data.write_png(tmp_path / "a.png", bad)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    data.write_png(tmp_path / "a.png", np.zeros((2, 2), np.uint8))
    old = (tmp_path / "a.png").read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        data.write_png(tmp_path / "a.png", np.ones((2, 2), np.uint8))
    assert (tmp_path / "a.png").read_bytes() == old
    assert len(list(tmp_path.iterdir())) == 1


def test_grid_lays_images_out_row_by_row():
    images = np.arange(1, 6, dtype=np.uint8)[:, None, None, None] * np.ones((5, 2, 3, 1), np.uint8)
    out = data.grid(images, columns=3, pad=1, scale=2)
    assert out.shape == (1 + 2 * (4 + 1), 1 + 3 * (6 + 1), 1)
    for i in range(5):
        top, left = 1 + (i // 3) * 5, 1 + (i % 3) * 7
        assert (out[top : top + 4, left : left + 6] == i + 1).all()
    assert out.astype(int).sum() == 15 * 24  # and black elsewhere
    assert data.grid(images).shape == (1 + 2 * 3, 1 + 3 * 4, 1)
    assert data.grid(images, columns=5, pad=0).shape == (2, 15, 1)


def test_grid_errors():
    with pytest.raises(ValueError, match="expected uint8 images"):
        data.grid(np.zeros((2, 3, 3), np.uint8))
    with pytest.raises(ValueError, match="columns and scale must be positive"):
        data.grid(np.zeros((2, 3, 3, 1), np.uint8), columns=0)
