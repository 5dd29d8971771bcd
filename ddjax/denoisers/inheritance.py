"""Parameters of one network as the beginning of another."""

from __future__ import annotations

import re

import jax

from ddjax.types import Params


def inherited(params: Params, teacher: Params, but: str = r"(^|/)attention/") -> Params:
    """`params`, with the teacher's in the place of those of the same path, except where `but` is found in the path.

    A linear DiT begins so with all of a trained DiT but its attention (Wang et al. 2025, "LiT", guideline 4); any two
    networks with parts in common may. Paths are written like `stack/blocks/0/mlp/up/kernel`.

    Raises ValueError for a path beside those that the teacher lacks, or has in another shape.
    """
    pattern, missing = re.compile(but), []
    theirs = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(teacher)}

    def one(path: tuple, own: jax.Array) -> jax.Array:
        name = _name(path)
        if pattern.search(name):
            return own
        if name not in theirs or theirs[name].shape != own.shape:
            missing.append(f"{name} {own.shape}")
            return own
        return theirs[name]

    new = jax.tree_util.tree_map_with_path(one, params)
    if missing:
        raise ValueError(
            f"the teacher has no {', '.join(missing[:4])} ({len(missing)} in all): build both networks alike, or widen "
            f"but={but!r}"
        )
    return new


def _name(path: tuple) -> str:
    return "/".join(str(getattr(part, "key", part)) for part in path)
