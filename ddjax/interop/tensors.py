"""Files of published weights: safetensors, one or a folder of several, or an Orbax checkpoint; never a pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddjax.interop import orbax

PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")
DTYPES = ("F32", "F16", "BF16", "F64")
SINGLE = ("model.safetensors", "diffusion_pytorch_model.safetensors")
INDEX = tuple(f"{name}.index.json" for name in SINGLE)
PARTS = ("unet", "transformer")  # of a pipeline of diffusers, the one that denoises

UNPICKLE = """\
{path} is a pickle, which can run code when it is read: ddjax reads safetensors only. Where torch is, two lines make it:
  import torch, safetensors.torch as st; s = torch.load("{path}", map_location="cpu", weights_only=True)
  s = s.get("ema", s.get("state_dict", s.get("model", s))); st.save_file({{k: s[k].clone() for k in s}}, "{out}")"""


class Tensors(Mapping[str, np.ndarray]):
    """Tensors by name, each read when it is asked for.

    files: safetensors files by the names of what they hold; `names` says how each name is called there.
    Raises ValueError for tensors of other dtypes than float64, float32, float16 and bfloat16, when they are read.
    """

    def __init__(self, files: Mapping[str, Any], names: Mapping[str, str] | None = None):
        self.files = files
        self.names = {name: name for name in files} if names is None else dict(names)

    def __getitem__(self, name: str) -> np.ndarray:
        own = self.names[name]
        dtype = self.files[own].get_slice(own).get_dtype()
        if dtype not in DTYPES:
            raise ValueError(f"the tensor {own} has dtype {dtype}; expected one of {', '.join(DTYPES)}")
        return np.asarray(self.files[own].get_tensor(own))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Its shape; the tensor is not read."""
        own = self.names[name]
        return tuple(self.files[own].get_slice(own).get_shape())

    def under(self, prefix: str) -> Tensors:
        """Those whose name begins so, called by the rest."""
        cut = len(prefix)
        return Tensors(self.files, {n[cut:]: own for n, own in self.names.items() if n.startswith(prefix)})


def open_tensors(path: str | os.PathLike) -> tuple[Tensors, dict[str, Any], dict[str, str]]:
    """The tensors of a published model, its config.json ({} where there is none), and what one file's header says.

    path: a .safetensors file, or a Hugging Face folder: one file of `SINGLE`, or several and an index of `INDEX`. A
        config.json beside a file counts too. Or a pipeline of diffusers, a folder with a model_index.json, of which the
        U-Net or transformer is read. Or a folder with an Orbax checkpoint: itself, a step of it, or all steps, of which
        the newest is taken.
    A scheduler_config.json beside the weights, or in the pipeline's scheduler/, is config["scheduler"].
    Raises ValueError for a pickle (with the two lines that turn one into safetensors), and for what is no such file;
        FileNotFoundError.
    """
    path = Path(path)
    if path.suffix.lower() in PICKLES:
        raise ValueError(UNPICKLE.format(path=path, out=path.with_suffix(".safetensors")))
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    if path.is_dir():
        path = _part(path)
        return _folder(path), _config(path), {}
    file = _open(path)
    return Tensors(dict.fromkeys(file.keys(), file)), _config(path.parent), file.metadata() or {}


def prefix_of(names: Sequence[str], marks: Sequence[str]) -> tuple[str | None, list[str]]:
    """What stands before the names of a network's tensors in a file, and the names of other copies of its weights.

    marks: tensors that the network must have. None where no prefix has them all ("", "module.", "ema.", "backbone.").
    Where several have, it is that of an average ("ema" in it), else the shortest; the others are copies.
    """
    known, first = set(names), marks[0]
    ends = [name[: -len(first)] for name in names if name.endswith(first)]
    found = [p for p in ends if (not p or p.endswith(".")) and all(p + mark in known for mark in marks)]
    if not found:
        return None, []
    best = min(found, key=lambda p: ("ema" not in p.lower(), len(p)))
    others = [p for p in found if p != best and p]
    return best, [n for n in names if not (best and n.startswith(best)) and any(n.startswith(p) for p in others)]


def _part(path: Path) -> Path:
    """Of a pipeline, the folder of what denoises; old ones have all in one. Any other folder is itself."""
    index = _json(path / "model_index.json")
    there = [name for name in PARTS if name in index]
    if index and len(there) != 1:
        names = sorted(name for name, value in index.items() if isinstance(value, list))
        raise ValueError(f"{path} is a pipeline of {', '.join(names)}: expected one of {' or '.join(PARTS)}")
    return path / there[0] if there and (path / there[0]).is_dir() else path


def _config(path: Path) -> dict[str, Any]:
    """config.json, and as "scheduler" what says how the network was trained."""
    places = (path, path / "scheduler", path.resolve().parent / "scheduler")
    found = (_json(place / "scheduler_config.json") for place in places)
    scheduler = next((one for one in found if one), None)
    return _json(path / "config.json") | ({} if scheduler is None else {"scheduler": scheduler})


def _folder(path: Path) -> Tensors:
    for index in (path / name for name in INDEX if (path / name).exists()):
        files: dict[str, Any] = {}
        where = _json(index).get("weight_map", {})
        for name, shard in where.items():
            if shard not in files:
                if Path(shard).name != shard or not (path / shard).exists():
                    raise ValueError(f"{index} names the file {shard}, which is not in {path}")
                files[shard] = _open(path / shard)
            if name not in files[shard].keys():  # noqa: SIM118
                raise ValueError(f"{index} says that {shard} holds {name}, which it does not")
        return Tensors({name: files[shard] for name, shard in where.items()})
    for name in SINGLE:
        if (path / name).exists():
            file = _open(path / name)
            return Tensors(dict.fromkeys(file.keys(), file))
    if (found := orbax.find(path)) is not None:
        checkpoint = orbax.Checkpoint(found)
        return Tensors(dict.fromkeys(checkpoint.keys(), checkpoint))
    pickles = sorted(p for p in path.iterdir() if p.suffix.lower() in PICKLES)
    if pickles:
        raise ValueError(UNPICKLE.format(path=pickles[0], out=path / SINGLE[0]))
    raise ValueError(f"{path} has neither {' nor '.join((*SINGLE, *INDEX))}, and is no Orbax checkpoint")


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({error})") from error


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
