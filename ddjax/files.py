"""Small files of what was learned for a model: JSON that says for which process it is, and arrays as safetensors."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from ddjax.frozen import Frozen, FrozenTree


def described(value: Any) -> str:
    """A process in words that tell it from others: its `repr`, with the contents of constant arrays."""
    if dataclasses.is_dataclass(value) and not isinstance(value, FrozenTree):
        fields = (f"{f.name}={described(getattr(value, f.name))}" for f in dataclasses.fields(value))
        return f"{type(value).__name__}({', '.join(fields)})"
    if isinstance(value, FrozenTree):
        return f"{{{', '.join(map(described, value.leaves))}}}"
    if isinstance(value, Frozen):
        return f"array {value.values.shape} {hashlib.sha256(value.values.tobytes()).hexdigest()[:12]}"
    if inspect.isfunction(value) and "<" not in value.__qualname__:  # whose `repr` has an address
        return f"{value.__module__}.{value.__qualname__}"
    return f"({', '.join(map(described, value))})" if isinstance(value, tuple) else repr(value)


def write(path: str | os.PathLike, form: str, process: Any, /, **content: Any) -> None:
    """Write what JSON can hold, with the format's name and the process that it is for."""
    content = {"format": form, "process": described(process), **content}
    Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def form_of(path: str | os.PathLike) -> Any:
    """The format that a file names; None where it is no JSON or names none. FileNotFoundError where there is none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))["format"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        return None


def read(path: str | os.PathLike, form: str, process: Any, what: str) -> dict[str, Any]:
    """What `write` wrote. what: in words, "a sampler".

    Raises ValueError for files of another kind, format or process; FileNotFoundError.
    """
    found = form_of(path)
    if found is None:
        raise ValueError(f"{path} is not {what} that `ddjax search` wrote")
    if found != form:
        raise ValueError(f"{path} has the format {found!r}; {what} has {form!r}: search again")
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    if content.get("process") != described(process):
        raise ValueError(
            f"{path} is {what} of the process {content.get('process')}, not of {described(process)}: search one for "
            "this model"
        )
    return content


def read_arrays(path: str | os.PathLike, form: str, what: str) -> dict[str, np.ndarray]:
    """Arrays of a safetensors file of this format. what: in words, with what writes it.

    Raises ValueError for other files, FileNotFoundError.
    """
    return read_safetensors(path, form, what)[0]


def read_safetensors(path: str | os.PathLike, form: str, what: str) -> tuple[dict[str, Any], dict[str, str]]:
    """As `read_arrays`, where names have a "/" nested dicts, with the strings of the file's header."""
    from safetensors import SafetensorError

    from ddjax.training import load_safetensors  # here: the mathematics needs no training

    try:
        arrays, about = load_safetensors(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({error})") from error
    if about.get("format") != form:
        raise ValueError(f"{path} holds no {what}")
    return arrays, about
