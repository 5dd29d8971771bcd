"""Data sets of pictures: folders of image files, archives of JPEG scans. Pillow decodes them, on demand."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np

from ddjax.data import splits
from ddjax.data.dataset import Dataset, Source, require
from ddjax.data.sources import SubsetSource, encode, levels

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclasses.dataclass(frozen=True, eq=False)
class FileSource:
    """Image files, decoded whenever they are asked for.

    Attributes:
        paths: the files.
        cond: labels `(n,)`, or None.
        shape: (height, width, channels) of every image.
        fit: whether to resize (shorter side) and crop (centre) to that; otherwise another size is an error.
        scale: None for tokens, else the levels of the 256 shades.
    """

    paths: tuple[Path, ...]
    cond: np.ndarray | None
    shape: tuple[int, int, int]
    fit: bool
    scale: np.ndarray | None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: np.ndarray) -> dict[str, np.ndarray]:
        x0 = np.stack([self._image(self.paths[i]) for i in np.asarray(index).tolist()])
        batch = {"x0": encode(x0, 256, self.scale)}
        if self.cond is not None:
            batch["cond"] = self.cond[index]
        return batch

    def _image(self, path: Path) -> np.ndarray:
        height, width, channels = self.shape
        image = _open(path, channels)
        if image.size != (width, height):
            if not self.fit:
                raise ValueError(
                    f"{path}: is {image.size[1]}x{image.size[0]}, the first image is {height}x{width}: "
                    "give size= to resize and crop them all"
                )
            image = _crop(image, height)
        return np.asarray(image, np.uint8).reshape(self.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class ScanSource:
    """JPEG images that share one header, joined end to end; image i is `header + scans[off[i] : off[i+1]]`.

    Attributes:
        header: the bytes that all images begin with.
        scans: the rest of them, joined.
        offsets: `(n + 1,)`, where each begins.
        cond: labels `(n,)`, or None.
        shape: (height, width, channels).
        scale: None for tokens, else the levels of the 256 shades.
        name: for messages.
    """

    header: bytes
    scans: bytes
    offsets: np.ndarray
    cond: np.ndarray | None
    shape: tuple[int, int, int]
    scale: np.ndarray | None
    name: str

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: np.ndarray) -> dict[str, np.ndarray]:
        x0 = np.stack([self.image(i) for i in np.asarray(index).tolist()])
        batch = {"x0": encode(x0, 256, self.scale)}
        if self.cond is not None:
            batch["cond"] = self.cond[index]
        return batch

    def image(self, i: int) -> np.ndarray:
        """Image i, uint8 `(height, width, channels)`."""
        scan = self.scans[self.offsets[i] : self.offsets[i + 1]]
        image = np.asarray(_open(io.BytesIO(self.header + scan), self.shape[2], f"{self.name}: image {i}"))
        return image.reshape(*image.shape[:2], self.shape[2])


def folder(
    path: Path,
    split: str,
    *,
    tokens: bool | None = None,
    size: int | None = None,
    grey: bool = False,
    labels: bool = True,
    valid_fraction: float | None = None,
    fractions: tuple[float, float, float] | None = None,
) -> Dataset:
    """A folder of image files, however deep.

    Sub-folders `train` and `test` (and `valid`) are its own splits (see `splits` for "valid"); otherwise the
    files, sorted by relative path, are divided by a fixed permutation. Where every image lies in a
    sub-folder (of its split), the first-level sub-folders, sorted, are the labels. Names that begin with
    a dot are passed over.

    Args:
        path: the folder.
        split: "train", "valid" or "test".
        tokens: False gives values in [-1, 1] on 256 levels, else tokens 0 to 255.
        size: resize the shorter side to this and crop the centre square; None takes the images as they are,
            all of one size.
        grey: one channel rather than three.
        labels: whether sub-folders are labels.
        valid_fraction: for folders with train and test only: how much of train to hold out.
        fractions: (train, valid, test), for folders without their own splits.

    Raises:
        ValueError: no images, or one that cannot be read or has another size; names it.
    """
    _check_size(size)
    own = [name for name in splits.SPLITS if (path / name).is_dir()]
    own = own if "train" in own else []
    if own and fractions is not None:
        raise ValueError(f"{path} has its own splits ({', '.join(own)}): leave out fractions")
    if not own and valid_fraction is not None:
        raise ValueError(f"{path} has no splits of its own: use fractions, not valid_fraction")
    root = path / splits.part(split, own, valid_fraction, str(path)) if own else path
    paths = find(root, EXTENSIONS)
    if not paths:
        raise ValueError(f"{root}: no images in this folder; supported: {', '.join(EXTENSIONS)}")
    cond, classes = None, 0
    if labels and all(file.parent != root for file in paths):
        named = [file.relative_to(root).parts[0] for file in paths]
        # Of all the splits, so that a label means the same in each.
        roots = [path / name for name in own] or [path]
        names = sorted({file.relative_to(top).parts[0] for top in roots for file in find(top, EXTENSIONS)})
        cond, classes = np.array([names.index(name) for name in named], np.int32), len(names)
    if own:
        rows = splits.carve(len(paths), split, valid_fraction, str(path), cond)
    else:
        rows = splits.items(len(paths), split, fractions or splits.FRACTIONS, str(path))
    channels = 1 if grey else 3
    width, height = (size, size) if size is not None else _open(paths[0], channels).size
    scale = levels(256) if tokens is False else None
    source = FileSource(tuple(paths), cond, (height, width, channels), size is not None, scale)
    return _images(source, rows, str(path), split, source.shape, classes, scale)


def jpeg_scans(
    arrays: dict[str, np.ndarray],
    split: str,
    *,
    tokens: bool | None = None,
    valid_fraction: float | None = None,
    name: str = "scans",
) -> Dataset:
    """Images as JPEG scans behind one shared header, decoded whenever they are asked for.

    Args:
        arrays: `header` (uint8), and for each own split `train_scan` (uint8), `train_off` (offsets
            `(n + 1,)`) and perhaps `y_train` (labels).
        split: "train", "valid" or "test".
        tokens: False gives values in [-1, 1] on 256 levels, else tokens 0 to 255.
        valid_fraction: how much of train to hold out where there is no valid.
        name: for messages.
    """
    own = [part for part in splits.SPLITS if f"{part}_scan" in arrays and f"{part}_off" in arrays]
    part = splits.part(split, own, valid_fraction, name)
    labels = {key: value.astype(np.int32) for key, value in arrays.items() if key in [f"y_{p}" for p in own]}
    cond = labels.get(f"y_{part}")
    classes = 0 if cond is None else max(int(y.max()) for y in labels.values()) + 1
    scale = levels(256) if tokens is False else None
    header, scans = arrays["header"].tobytes(), arrays[f"{part}_scan"].tobytes()
    offsets = arrays[f"{part}_off"].astype(np.int64)
    first = _open(io.BytesIO(header + scans[offsets[0] : offsets[1]]), None, f"{name}: image 0")
    shape = (first.size[1], first.size[0], len(first.getbands()))
    source = ScanSource(header, scans, offsets, cond, shape, scale, name)
    rows = splits.carve(len(source), split, valid_fraction, name, cond)
    return _images(source, rows, name, split, shape, classes, scale)


def resized(x0: np.ndarray, size: int) -> np.ndarray:
    """Images `(n, height, width[, channels])` of uint8, their shorter side resized and the centre square cropped."""
    _check_size(size)
    pillow = require("PIL.Image", "plot", "resizing images")
    plain = x0[..., 0] if x0.shape[3:] == (1,) else x0
    square = [np.asarray(_crop(pillow.fromarray(image), size)) for image in plain]
    return np.stack(square).reshape(len(x0), size, size, *x0.shape[3:])


def find(root: Path, extensions: tuple[str, ...]) -> list[Path]:
    """The files under `root` with these extensions, by relative path; none with a leading dot."""
    found = [
        path
        for path in root.rglob("*")
        if path.name.lower().endswith(extensions)
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
        and path.is_file()
    ]
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _images(source: Source, rows, name: str, split: str, shape, classes: int, scale) -> Dataset:
    return Dataset(
        name=name,
        split=split,
        source=source if rows is None else SubsetSource(source, rows),
        shape=shape,
        num_symbols=256 if scale is None else None,
        num_classes=classes,
        levels=scale,
    )


def _open(file, channels: int | None, name: str | None = None):
    """A decoded Pillow image, upright, with this many channels (None: as it is)."""
    pillow = require("PIL.Image", "plot", "reading images")
    ops = require("PIL.ImageOps", "plot", "reading images")
    try:
        with pillow.open(file) as image:
            image = ops.exif_transpose(image)
            return image.convert({None: image.mode, 1: "L", 3: "RGB"}[channels])
    except (OSError, SyntaxError, ValueError, pillow.DecompressionBombError) as error:
        raise ValueError(f"{name or file}: not a readable image ({error}): mend or remove it") from error


def _check_size(size: int | None) -> None:
    if size is not None and size < 1:
        raise ValueError(f"size must be positive, got {size}")


def _crop(image, size: int):
    """The centre square, its side `size`, resized with Pillow's antialiasing bicubic filter."""
    from PIL import Image, ImageOps

    return ImageOps.fit(image, (size, size), method=Image.Resampling.BICUBIC)
