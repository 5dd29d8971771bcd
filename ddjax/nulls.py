"""Conditions with "none" in the place of what they say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array


def nullified(cond: Any, null: Any, put: Callable[[Array, Any], Array]) -> Any:
    """The condition, `put(value, null)` at its leaves: what `guidance` and condition dropout do to one.

    null: a tree like the condition; of a condition with an entry "cond", like that entry (which may have one itself),
        and the others stay. Or a dict from the names of entries, "cond" for the labels inside, to their nulls: the
        entries that it does not name stay.
    An entry that is None stays. Raises ValueError for a name that the condition has not.
    """
    if isinstance(null, Mapping):
        found: set[str] = set()
        new = _by_name(cond, null, put, found)
        if missing := sorted(set(null) - found):
            raise ValueError(f"null names {', '.join(missing)}, and the condition has no such entry")
        return new
    if isinstance(cond, dict) and "cond" in cond:
        return {**cond, "cond": nullified(cond["cond"], null, put)}
    return None if cond is None else jax.tree.map(put, cond, null)


def _by_name(cond: Any, null: Mapping[str, Any], put: Callable, found: set[str]) -> Any:
    if not isinstance(cond, dict):
        found |= {"cond"}
        return cond if cond is None or "cond" not in null else jax.tree.map(put, cond, null["cond"])
    new = {}
    for name, value in cond.items():
        found |= {name} - {"cond"}
        if name == "cond":
            new[name] = _by_name(value, null, put, found)
        elif name in null and value is not None:
            new[name] = jax.tree.map(put, value, null[name])
        else:
            new[name] = value
    return new
