"""Pictures without an imaging package: PNG files and grids of images."""

from __future__ import annotations

import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np


def write_png(path: str | Path, image: np.ndarray) -> None:
    """Writes a PNG file, atomically: a reader sees the old file or the whole new one.

    Args:
        path: where; the folder must exist.
        image: uint8 `(height, width)`, `(height, width, 1)` grey or `(height, width, 3)` RGB.

    Raises:
        ValueError: another dtype or shape.
    """
    image, path = np.asarray(image), Path(path)
    if image.ndim == 2:
        image = image[:, :, None]
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3) or 0 in image.shape:
        raise ValueError(f"{path}: expected a uint8 image (height, width[, 1 or 3]), got {image.dtype} {image.shape}")
    height, width, channels = image.shape
    # Each row is led by its filter's number; 0 is none.
    rows = np.concatenate([np.zeros((height, 1), np.uint8), image.reshape(height, -1)], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b"")):
        content += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def grid(images: np.ndarray, columns: int | None = None, pad: int = 1, scale: int = 1) -> np.ndarray:
    """Many images as one, row by row, on black.

    Args:
        images: uint8 `(n, height, width, channels)`.
        columns: images a row; about the square root of n unless given.
        pad: pixels between images and around them, after scaling.
        scale: each pixel becomes a square of this many pixels a side.

    Returns:
        uint8 `(height', width', channels)`.

    Raises:
        ValueError: another dtype or shape, or no images.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"expected uint8 images (n, height, width, channels), got {images.dtype} {images.shape}")
    if scale < 1 or pad < 0 or (columns is not None and columns < 1):
        raise ValueError(f"columns and scale must be positive, pad 0 or more: {columns}, {scale}, {pad}")
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = -(-count // columns)
    canvas = np.zeros((rows, height + pad, columns, width + pad, channels), np.uint8)
    for i, image in enumerate(images):
        canvas[i // columns, :height, i % columns, :width] = image
    flat = canvas.reshape(rows * (height + pad), columns * (width + pad), channels)
    return np.pad(flat, ((pad, 0), (pad, 0), (0, 0)))
