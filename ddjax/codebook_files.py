"""Codes of `ddjax.codebooks` as bytes, and files of them: a JSON header, then each example's bits.

The bits of an example are one whole number in mixed radix, so that codebooks of any size cost log2 K bits and not the
next whole number of them: the digits of each draw are its first entry, then a level and an entry for every other atom,
the first digit the most significant. It is written in as many bytes as the largest such number needs.

    from ddjax.codebook_files import compress, decompress
    run = ddjax.load("runs/digits_gaussian")
    compress(run, "digits.codes", x0, codebook=ddjax.solvers.Codebook(seed=0, size=256), steps=50)
    x = decompress(run, "digits.codes")
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddjax.codebooks import Codes, decode, encode
from ddjax.solvers import Ancestral, Codebook
from ddjax.types import State

_MAGIC = b"ddjax-codes-1\n"
_LENGTH = struct.Struct("<I")


def size(codebook: Codebook, draws: int) -> int:
    """Bytes of an example with this many draws that choose."""
    return ((_whole(codebook) ** draws - 1).bit_length() + 7) // 8


def pack(codes: Codes, codebook: Codebook) -> list[bytes]:
    """Each example's bytes, `size` of them. Raises ValueError for numbers that are not of the codebook."""
    indices, weights = np.asarray(codes.indices), np.asarray(codes.weights)
    batch, draws, atoms = indices.shape
    if atoms != codebook.atoms or weights.shape != (batch, draws, atoms - 1):
        raise ValueError(
            f"codes of shapes {indices.shape} and {weights.shape} are not of a codebook of {codebook.atoms} atoms"
        )
    for name, values, end in (("indices", indices, codebook.size), ("weights", weights, codebook.levels)):
        if values.size and not 0 <= values.min() <= values.max() < end:
            raise ValueError(f"{name} run from 0 to {end - 1}, got {values.min()} to {values.max()}")
    # In the order of their digits: entry, level, entry, ...
    digits = np.zeros((batch, draws, 2 * atoms - 1), np.int64)
    digits[..., 0::2], digits[..., 1::2] = indices, weights
    radices = _radices(codebook) * draws
    width = size(codebook, draws)
    return [_number(row.ravel().tolist(), radices).to_bytes(width, "big") for row in digits]


def unpack(packed: list[bytes], codebook: Codebook, draws: int, first: int = 1) -> Codes:
    """The codes of `pack`. Raises ValueError for bytes of another length, or that no code has."""
    width, radices = size(codebook, draws), _radices(codebook) * draws
    rows = []
    for i, part in enumerate(packed):
        number = int.from_bytes(part, "big")
        if len(part) != width or number >= _whole(codebook) ** draws:
            raise ValueError(f"example {i}: {len(part)} bytes are not a code of {draws} draws, which has {width} bytes")
        rows.append(_digits(number, radices))
    digits = np.array(rows, np.int32).reshape(len(packed), draws, 2 * codebook.atoms - 1)
    return Codes(digits[..., 0::2], digits[..., 1::2], first)


def _radices(codebook: Codebook) -> list[int]:
    return [codebook.size] + [codebook.levels, codebook.size] * (codebook.atoms - 1)


def _whole(codebook: Codebook) -> int:
    return codebook.size**codebook.atoms * codebook.levels ** (codebook.atoms - 1)


def _number(digits: list[int], radices: list[int]) -> int:
    """By halves: long numbers are multiplied, not one digit at a time."""
    if len(digits) < 16:
        value = 0
        for digit, radix in zip(digits, radices, strict=True):
            value = value * radix + digit
        return value
    half = len(digits) // 2
    return _number(digits[:half], radices[:half]) * math.prod(radices[half:]) + _number(digits[half:], radices[half:])


def _digits(number: int, radices: list[int]) -> list[int]:
    if len(radices) < 16:
        digits = []
        for radix in reversed(radices):
            number, digit = divmod(number, radix)
            digits.append(digit)
        return digits[::-1]
    half = len(radices) // 2
    high, low = divmod(number, math.prod(radices[half:]))
    return _digits(high, radices[:half]) + _digits(low, radices[half:])


class Stored(NamedTuple):
    """What a file says."""

    codes: Codes
    codebook: Codebook
    about: dict[str, Any]  # what `save` was told beside


def save(path: str | Path, codes: Codes, codebook: Codebook, **about: Any) -> None:
    """Write codes, their codebook and whatever else JSON can say of them (shape, steps, solver)."""
    packed = pack(codes, codebook)
    header = {
        "codebook": {k: getattr(codebook, k) for k in ("seed", "size", "atoms", "levels")},
        "examples": len(packed),
        "draws": codes.indices.shape[1],
        "first": codes.first,
        "about": about,
    }
    text = json.dumps(header).encode()
    Path(path).write_bytes(_MAGIC + _LENGTH.pack(len(text)) + text + b"".join(packed))


def load(path: str | Path) -> Stored:
    """Read what `save` wrote. Raises ValueError for a file that is none of these, or is damaged."""
    data, start = Path(path).read_bytes(), len(_MAGIC) + _LENGTH.size
    try:
        if not data.startswith(_MAGIC):
            raise ValueError("it does not begin as one")
        end = start + _LENGTH.unpack(data[len(_MAGIC) : start])[0]
        header = json.loads(data[start:end])
        codebook = Codebook(**header["codebook"])
        number, draws = _count(header, "examples"), _count(header, "draws")
        width, rest = size(codebook, draws), data[end:]
        if len(rest) != number * width:
            raise ValueError(f"{len(rest)} bytes where {number} examples of {width} bytes were expected")
        packed = [rest[i * width : (i + 1) * width] for i in range(number)]
        return Stored(unpack(packed, codebook, draws, _count(header, "first")), codebook, dict(header["about"]))
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise ValueError(f"{path} is no file of codes: {error}") from error


def _count(header: Mapping[str, Any], name: str) -> int:
    value = header[name]
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} is {value!r}")
    return value


# -- of a trained run --------------------------------------------------------------------------------------------


def compress(
    run: Any,
    path: str | Path,
    x0: State,
    *,
    codebook: Codebook,
    steps: int | None = None,
    cond: Any = None,
    batch_size: int = 64,
) -> State:
    """Write examples as codes of a run's network (`ddjax.load`), by ancestral steps; returns what `decompress` will.

    x0: `(n, *shape)`, clean states. steps: of the config's grid, each but the last `codebook.bits` an example.
    cond: labels `(n,)`, which the file keeps as they are. batch_size: examples at a time.
    Raises ValueError for a process without normals, and states longer than the data.
    """
    x0 = jnp.asarray(x0)
    labels = None if cond is None else np.broadcast_to(np.asarray(cond), len(x0)).tolist()
    about = {"shape": list(x0.shape[1:]), "steps": int(len(run.experiment.times(steps)) - 1), "labels": labels}
    parts = [
        encode(target=x0[i : i + batch_size], **_of(run, codebook, about, range(len(x0))[i : i + batch_size]))
        for i in range(0, len(x0), batch_size)
    ]
    codes = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(part.codes for part in parts))
    save(path, codes, codebook, **about, training_step=run.step)
    return jnp.concatenate([part.x0 for part in parts])


def decompress(run: Any, path: str | Path, *, batch_size: int = 64) -> State:
    """The examples of a file that `compress` wrote with the same run, at the same step of its training.

    On another device, or in batches of another size, they may differ in the last bits.
    Raises ValueError for other files and other steps.
    """
    codes, codebook, about = load(path)
    if about.get("training_step") != run.step:
        raise ValueError(f"{path} was written at training step {about.get('training_step')}, and this is {run.step}")
    parts = []
    for i in range(0, len(codes.indices), batch_size):
        some = jax.tree.map(lambda leaf, i=i: jnp.asarray(leaf[i : i + batch_size]), codes)
        shape = (len(some.indices), *about["shape"])
        parts.append(
            decode(codes=some, shape=shape, **_of(run, codebook, about, range(len(codes.indices))[i : i + batch_size]))
        )
    return jnp.concatenate(parts)


def _of(run: Any, codebook: Codebook, about: Mapping[str, Any], rows: range) -> dict[str, Any]:
    """What encoding and decoding share."""
    experiment, process, numbers = run.experiment, run.process, jnp.asarray(list(rows))
    if tuple(experiment.state_shape) != tuple(run.data.shape) or tuple(about["shape"]) != tuple(run.data.shape):
        raise ValueError(
            f"codes are of states like the data, {tuple(run.data.shape)}: got {tuple(about['shape'])}, and states of "
            f"{type(process).__name__} have shape {tuple(experiment.state_shape)}"
        )
    labels = None if about["labels"] is None else jnp.asarray([about["labels"][i] for i in rows], jnp.int32)
    # A latent that sampling draws is then drawn by the codebook's seed too.
    return {
        "denoise": run.denoise,
        "process": process,
        "solver": Ancestral(process, codebook),
        "times": experiment.times(about["steps"]),
        "cond": experiment.to_sample(jax.random.key(codebook.seed), numbers, labels),
    }
