"""Parameters of blocks that stand one by one as those of blocks that are scanned, and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from ddjax.types import Params

RUN = re.compile(r"(\d+)-(\d+)")  # the name of some scanned blocks among others: the first and the last


def run_name(start: int, stop: int) -> str:
    """The name of blocks start to stop - 1: "3", or "3-5" where they are scanned."""
    return str(start) if stop == start + 1 else f"{start}-{stop - 1}"


def stack_blocks(params: Params, like: Params | None = None) -> Params:
    """Parameters of an unrolled network (`scan=False`) as those of the same network with `scan=True`.

    like: the latter's parameters, or their shapes (`jax.eval_shape(init, key)`): needed for a U-Net, which scans only
        blocks that are equal. Raises ValueError where it is missing, or of another network.
    """
    if like is not None:
        found = _as(params, like, "")
        if differs := _differ(found, params, like):
            raise ValueError(f"like is of another network: {differs}")
        return found
    if "stack" not in params:
        raise ValueError(
            "these parameters have no stack of equal blocks; of a U-Net say which blocks are scanned: "
            "stack_blocks(params, jax.eval_shape(init, key)), with init of the network with scan=True"
        )
    whole = lambda blocks: _stacked([blocks[str(i)] for i in range(len(blocks))])  # noqa: E731
    return {**params, "stack": _each_stack(whole, params["stack"])}


def unstack_blocks(params: Params) -> Params:
    """Parameters of a scanned network (`scan=True`) as those of the same network with `scan=False`."""
    found: Params = {}
    for name, part in params.items():
        if not isinstance(part, Mapping):
            found[name] = part
        elif run := RUN.fullmatch(name):
            found |= _unstacked(part, int(run[1]))
        else:
            found[name] = _each_stack(_unstacked, part) if name == "stack" else unstack_blocks(part)
    return found


def _stacked(blocks: Sequence[Params]) -> Params:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)


def _unstacked(blocks: Params, first: int = 0) -> Params:
    if all(name.isdigit() for name in blocks):  # they are already
        return blocks
    depth = jax.tree.leaves(blocks)[0].shape[0]
    return {str(first + i): jax.tree.map(lambda x, i=i: x[i], blocks) for i in range(depth)}


def _as(params: Params, like: Params, path: str) -> Params:
    """The parameters in the structure of `like`: its scanned blocks are stacked."""
    if not isinstance(like, Mapping):
        return params
    if params and all(name.isdigit() for name in params) and not any(name[:1].isdigit() for name in like):
        return _stacked([params[str(i)] for i in range(len(params))])
    found: Params = {}
    for name, part in like.items():
        run = RUN.fullmatch(name)
        names = [str(i) for i in range(int(run[1]), int(run[2]) + 1)] if run and name not in params else [name]
        if missing := [n for n in names if n not in params]:
            raise ValueError(f"like is of another network: there is no {path}{missing[0]} among these parameters")
        found[name] = (
            _as(params[name], part, f"{path}{name}/") if names == [name] else _stacked([params[n] for n in names])
        )
    return found


def _differ(found: Params, params: Params, like: Params) -> str:
    """What tells the parameters from those asked for; "" for nothing."""
    if jax.tree.structure(found) != jax.tree.structure(like):
        return "its parameters have another structure"
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(like), strict=True):
        if a.shape != b.shape:
            return f"{jax.tree_util.keystr(path, simple=True, separator='/')} is {a.shape} here and {b.shape} there"
    extra = sum(x.size for x in jax.tree.leaves(params)) - sum(x.size for x in jax.tree.leaves(found))
    return f"it has no place for {extra:,} of these numbers" if extra else ""


def _each_stack(change: Callable[[Params], Params], stack: Params) -> Params:
    """A stack's parameters with its blocks changed; of several stacks, those of each."""
    if "blocks" in stack:
        return {**stack, "blocks": change(stack["blocks"])}
    return {name: _each_stack(change, part) if isinstance(part, dict) else part for name, part in stack.items()}
