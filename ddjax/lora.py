"""Low-rank adapters on any network, by rules on the paths of its parameters (Hu et al. 2022, LoRA)."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from ddjax.pytrees import as_pytree
from ddjax.types import Apply, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Beside:
    """A network some of whose parameters are held (`beside`): an `Apply` that is a pytree, these its leaves.

    So a compiled program takes them as inputs, wherever it takes the network as one: `bind`'s denoisers, and training
    steps under `training.compile_step`. They have no gradient, no moments and no place in a checkpoint.
    """

    apply: Apply
    held: Params
    join: Callable[[Params, Params], Params] = dataclasses.field(metadata={"static": True})

    def __call__(self, params: Params, xt: Array, t: Array | None, cond: Any = None, **options: Any) -> Array:
        """Run the network."""
        return self.apply(self.join(self.held, params), xt, t, cond, **options)


def beside(apply: Apply, held: Params, join: Callable[[Params, Params], Params]) -> Beside:
    """`apply` as a network of its trained parameters alone.

    join: `join(held, trained)` gives the parameters of `apply`; hashable.
    """
    return Beside(as_pytree(apply), held, join)


@dataclasses.dataclass(frozen=True)
class _Merge:
    alpha: float

    def __call__(self, params: Params, adapters: Params) -> Params:
        return merge(params, adapters, self.alpha)


def wrap(
    apply: Apply, params: Params, rules: Sequence[str], *, rank: int, alpha: float | None = None, key: Key[Array, ""]
) -> tuple[Beside, Params]:
    """The network with adapters: `(apply', adapters)`, `apply'(adapters, xt, t, cond, *, rng=None, train=False)`.

    A matrix W becomes `W + (alpha / rank) down @ up`, added up before the network runs: that costs `rank` multiply-adds
    for each entry of W, however large the batch, and works for whatever the network does with W. `down` starts normal,
    of variance 1 / features, and `up` at zero: a new adapter changes nothing. Axes before the last two, of scanned
    stacks or experts or convolutions, have an adapter for each of their entries.

    rules: regular expressions; what has one anywhere in its path ("stack/blocks/0/attention/qkv/kernel") is adapted.
    alpha: default `rank`.
    Returns adapters as a nested dict: at the path of each matrix `{"down": (..., in, rank), "up": (..., rank, out)}`.
    Raises ValueError for a rule that nothing has, a parameter that is no matrix, or a rank beyond its sides.
    """
    leaves = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    chosen = {name: leaf for name, leaf in leaves.items() if any(re.search(rule, name) for rule in rules)}
    unmet = [rule for rule in rules if not any(re.search(rule, name) for name in leaves)]
    if unmet or not rules:
        raise ValueError(f"the rules {unmet} choose no parameter; there are {', '.join([*leaves][:8])}, ...")
    adapters: Params = {}
    for i, (name, leaf) in enumerate(chosen.items()):
        if leaf.ndim < 2 or not 1 <= rank <= min(leaf.shape[-2:]):
            raise ValueError(f"{name} has shape {leaf.shape}: expected a matrix, and 1 <= rank={rank} <= its sides")
        *axes, features_in, features_out = leaf.shape
        down = jax.random.normal(jax.random.fold_in(key, i), (*axes, features_in, rank), leaf.dtype)
        *path, last = name.split("/")
        node = adapters
        for part in path:
            node = node.setdefault(part, {})
        up = jnp.zeros((*axes, rank, features_out), leaf.dtype)
        node[last] = {"down": down / math.sqrt(features_in), "up": up}
    return beside(apply, params, _Merge(float(rank if alpha is None else alpha))), adapters


def merge(params: Params, adapters: Params, alpha: float) -> Params:
    """The parameters with the adapters in them: those of an ordinary network. alpha as in `wrap`."""
    if not isinstance(params, dict):
        down, up = adapters["down"], adapters["up"]
        return params + (alpha / down.shape[-1]) * jnp.matmul(down, up)
    return {name: merge(value, adapters[name], alpha) if name in adapters else value for name, value in params.items()}


def _name(path: Any) -> str:
    return "/".join(str(part.key) for part in path)
