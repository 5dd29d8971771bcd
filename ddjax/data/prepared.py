"""Data sets from folders that `ddjax data prepare` wrote: documents of tokens, or items of one shape."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from ddjax.data import splits
from ddjax.data.dataset import Dataset
from ddjax.data.describe import described_vocabulary
from ddjax.data.packing import PackedSource, pack
from ddjax.data.shards import Folder, Manifest, check_shards, is_prepared, read_manifest
from ddjax.data.sources import check_tokens, encode, levels
from ddjax.data.streams import Stream, open_stream, side_file


@dataclasses.dataclass(frozen=True, eq=False)
class StreamWindows:
    """Windows of part of a stream: item i is what lies from `start + i * stride`, `length` tokens."""

    stream: Stream
    start: int
    stop: int
    length: int
    stride: int
    num_symbols: int
    name: str

    def __post_init__(self):
        if self.length < 1 or self.stride < 1:
            raise ValueError(f"length and stride must be positive, got {self.length} and {self.stride}")
        if self.stop - self.start < self.length:
            raise ValueError(
                f"{self.name}: {self.stop - self.start} tokens are fewer than one window of length={self.length}"
            )

    def __len__(self) -> int:
        return (self.stop - self.start - self.length) // self.stride + 1

    def __getitem__(self, index: np.ndarray) -> dict[str, np.ndarray]:
        starts = self.start + np.asarray(index, np.int64) * self.stride
        windows = self.stream.ranges(starts, starts + self.length).reshape(-1, self.length)
        check_tokens(windows, self.num_symbols, self.name, index)
        return {"x0": windows.astype(np.int32)}


@dataclasses.dataclass(frozen=True, eq=False)
class StreamItems:
    """Items of one shape, one after the other in a stream; labels lie in memory."""

    stream: Stream
    rows: np.ndarray  # of this split
    shape: tuple[int, ...]
    cond: np.ndarray | None
    num_symbols: int | None
    scale: np.ndarray | None
    name: str

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: np.ndarray) -> dict[str, np.ndarray]:
        rows, size = self.rows[index], math.prod(self.shape)
        x0 = self.stream.ranges(rows * size, (rows + 1) * size).reshape(-1, *self.shape)
        if self.num_symbols is not None:
            check_tokens(x0, self.num_symbols, self.name, rows)
        batch = {"x0": encode(x0, self.num_symbols, self.scale)}
        return batch if self.cond is None else {**batch, "cond": self.cond[rows].astype(np.int32)}


def prepared(
    url: str,
    split: str,
    *,
    tokens: bool | None = None,
    length: int = 256,
    stride: int | None = None,
    pack: bool = False,
    align: int = 1,
    check: str = "sizes",
    valid_fraction: float | None = None,
    fractions: tuple[float, float, float] | None = None,
) -> Dataset:
    """A folder of shards, or one of such folders named train and test (and valid), local or behind an fsspec URL.

    Divided as other data (`ddjax.data.splits`): folders of their own; else, cut in the order of the documents where
    they are joined, and by a fixed permutation of packed documents or items.

    Args:
        url: the folder, `path`, `gs://bucket/path`, ...
        split: "train", "valid" or "test".
        tokens: items: False gives values in [-1, 1] on their levels. Documents are tokens.
        length: documents: tokens a window.
        stride: documents that are joined: tokens between windows of the training split.
        pack: documents: put whole ones into windows, each a segment (`ddjax.data.packing`), rather than joining them
            all and cutting the stream into windows.
        align: packed documents begin at multiples of it.
        check: "sizes" of all files are compared with the manifest; "sha256" reads them through as well.
        valid_fraction: for folders with train and test only: how much of train to hold out.
        fractions: (train, valid, test), for folders without their own splits.

    Raises:
        ShardError: a shard is missing or damaged, now or when it is read.
        ValueError: options that do not fit what the folder holds.
    """
    root = Folder(str(url))
    own = {} if is_prepared(root) else {name: root / name for name in splits.SPLITS if is_prepared(root / name)}
    if not own:
        folder = root
        if valid_fraction is not None:
            raise ValueError(f"{url} has no splits of its own: use fractions, not valid_fraction")
        fractions = fractions or splits.FRACTIONS
    else:
        if fractions is not None:
            raise ValueError(f"{url} has its own splits ({', '.join(own)}): leave out fractions")
        folder = own[splits.part(split, own, valid_fraction, str(url))]
        fractions = (1 - valid_fraction, valid_fraction, 0.0) if valid_fraction is not None else None
        fractions = None if split == "test" else fractions
    manifest = read_manifest(folder)
    check_shards(folder, manifest, check)
    about, name = manifest.about, f"{url} {split}"
    shared = {
        "name": str(url),
        "split": split,
        "fingerprint": manifest.fingerprint,
        "vocabulary": described_vocabulary(about["vocabulary"]),
    }
    if about["kind"] == "items":
        if stride is not None or pack or align != 1 or length != 256:
            raise ValueError(
                f"{url} holds items of shape {tuple(about['shape'])}: length, stride, pack and align are for text"
            )
        return _items(folder, manifest, fractions, split, tokens, name, shared)
    if tokens is False:
        raise ValueError(f"{url} holds tokens: it has no continuous form, leave out tokens=False")
    lengths = side_file(folder, manifest.shards, ".lengths", "uint32")
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    stream, symbols = open_stream(folder, manifest, offsets), int(about["num_symbols"])
    shared |= {"shape": (length,), "num_symbols": symbols}
    if pack:
        if stride is not None:
            raise ValueError(f"{url}: packed windows do not overlap: leave out stride, or pack")
        rows = np.arange(len(lengths)) if fractions is None else splits.items(len(lengths), split, fractions, str(url))
        return Dataset(source=PackedSource(stream, _pack(offsets, rows, length, align), symbols, name), **shared)
    if align != 1:
        raise ValueError(f"{url}: align={align} is for packed documents: give pack=True")
    first, last = (0, len(lengths)) if fractions is None else splits.bounds(len(lengths), split, fractions, str(url))
    stride = stride if stride is not None and split == "train" else length
    source = StreamWindows(stream, int(offsets[first]), int(offsets[last]), length, stride, symbols, name)
    return Dataset(source=source, **shared)


_pack = pack  # the name is an option, too


def _items(folder: Folder, manifest: Manifest, fractions, split: str, tokens, name: str, shared: dict) -> Dataset:
    about, shape = manifest.about, tuple(manifest.about["shape"])
    symbols, size = about["num_symbols"], math.prod(shape)
    if tokens and symbols is None:
        raise ValueError(f"{folder.url} holds {about['dtype']}, which is continuous: leave out tokens=True")
    cond = side_file(folder, manifest.shards, ".labels", "int32") if about["num_classes"] else None
    count = manifest.items
    stream = open_stream(folder, manifest, np.arange(count + 1, dtype=np.int64) * size)
    rows = np.arange(count) if fractions is None else splits.items(count, split, fractions, folder.url)
    scale = levels(symbols) if tokens is False and symbols is not None else None
    source = StreamItems(stream, rows, shape, cond, symbols, scale, name)
    return Dataset(
        source=source,
        shape=shape,
        num_symbols=symbols if scale is None else None,
        num_classes=about["num_classes"],
        levels=scale,
        **shared,
    )
