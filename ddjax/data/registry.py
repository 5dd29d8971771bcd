"""`load`: a data set from its name, or from a file or folder by its extension."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

from ddjax.data import arrays, builtin, columns, images, prepared, splits, tables, text
from ddjax.data.dataset import Dataset
from ddjax.data.shards import Folder, is_begun

BUILTIN: dict[str, Callable[..., Dataset]] = {"digits": builtin.digits, "stdlib": builtin.stdlib}
FILES: dict[str, Callable[..., Dataset]] = {
    ".npz": arrays.npz,
    ".npy": arrays.npy,
    ".bin": text.token_stream,
    ".csv": columns.csv_table,
    **dict.fromkeys(tables.EXTENSIONS, tables.table),
    **dict.fromkeys(text.EXTENSIONS, text.text),
}


def load(name_or_path: str | Path, split: str, *, tokens: bool | None = None, **options) -> Dataset:
    """One split of a data set.

    What each kind takes as options, and how it is divided, is on its own function:

    - "digits" (`builtin.digits`) and "stdlib" (`builtin.stdlib`) need no files;
    - `.npz` (`arrays.npz`), `.npy` (`arrays.npy`): arrays of images, tokens or continuous values;
    - a folder with any image in it (`images.folder`);
    - text files and folders of them (`text.text`), `.bin` streams of tokens (`text.token_stream`);
    - `.csv` (`columns.csv_table`): rows of numbers and symbols, states of several parts;
    - `.parquet`, `.arrow`, `.feather`, folders and patterns of `.parquet` (`tables.table`);
    - folders that `ddjax data prepare` wrote (`prepared.prepared`).

    The last two may be fsspec URLs, such as `gs://bucket/folder`.

    Args:
        name_or_path: a built-in name, or the path of a file or folder.
        split: "train", "valid" or "test"; they are disjoint and always the same (see `splits`).
        tokens: True for int32 tokens, False for float32 values in [-1, 1]; None for what the data are:
            tokens, unless they are floats.
        **options: the kind's own, such as `length`, `size`, `num_symbols`, `valid_fraction`, `fractions`.

    Raises:
        FileNotFoundError: there is nothing at that path.
        ValueError: an unsupported extension, a split that is not there, options or content that do not fit.
        ImportError: an optional package is missing; the message says how to install it.
    """
    splits.check_split(split)
    loader, first = _loader(name_or_path)
    taken = [
        name
        for name, parameter in inspect.signature(loader).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name != "tokens"
    ]
    for option in options:
        if option not in taken:
            raise ValueError(f"{name_or_path}: unknown option {option!r}; it takes {', '.join(taken)}")
    for name, parameter in inspect.signature(loader).parameters.items():
        needed = parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty
        if needed and name not in options:
            raise ValueError(f"{name_or_path}: the option {name} must be given")
    return loader(*first, split, tokens=tokens, **options)


def _loader(name_or_path: str | Path) -> tuple[Callable[..., Dataset], tuple[Path | str, ...]]:
    """Who reads this, and with what before the split."""
    if name_or_path in BUILTIN:
        return BUILTIN[name_or_path], ()
    if "://" in str(name_or_path) or any(sign in Path(name_or_path).name for sign in "*?["):
        remote = str(name_or_path)
        return (tables.table if remote.lower().endswith(tables.PARQUET) else _folder(remote)), (remote,)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if _prepared(path):
            return prepared.prepared, (str(path),)
        if images.find(path, images.EXTENSIONS):
            return images.folder, (path,)
        if images.find(path, text.EXTENSIONS):
            return text.text, (path,)
        if images.find(path, tables.PARQUET):
            return tables.table, (path,)
        raise ValueError(
            f"{path}: no images and no text in this folder; supported: "
            f"{', '.join((*images.EXTENSIONS, *text.EXTENSIONS, *tables.PARQUET))}, "
            f"and what `ddjax data prepare` has made and finished"
        )
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder, and no built-in data set ({', '.join(BUILTIN)})")
    # The longest that fits: .txt.xz before .xz.
    for extension in sorted(FILES, key=len, reverse=True):
        if path.name.lower().endswith(extension):
            return FILES[extension], (path,)
    raise ValueError(f"{path}: unsupported extension; supported: {', '.join(FILES)}, or a folder of images")


def _prepared(place: Path | str) -> bool:
    return any(map(is_begun, (Folder(str(place)), *(Folder(f"{place}/{name}") for name in splits.SPLITS))))


def _folder(url: str) -> Callable[..., Dataset]:
    """Who reads a remote folder."""
    return prepared.prepared if _prepared(url) else tables.table
