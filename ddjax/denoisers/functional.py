"""Networks as pure functions of a plain dict of arrays.

NNX is used for construction and the forward pass only: a module is split once, and what crosses `jax.jit`, an
optimiser or a checkpoint is a nested dict with string keys. Nothing here depends on NNX's object transforms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from ddjax.types import Apply, Params


class Functional(NamedTuple):
    """A network as two pure functions."""

    init: Callable[[Key[Array, ""]], Params]
    apply: Apply  # (params, xt, t, cond=None, *, rng=None, train=False) -> Array


@dataclasses.dataclass(frozen=True, eq=False)
class ModuleApply:
    """`apply(params, xt, t, cond, *, rng=None, train=False)` of an NNX module (see `functional`).

    It is a static argument of compiled programs, so it compares by the module's structure, not by identity:
    two networks with the same configuration share one compiled program. The hash is computed once, since
    walking a deep network's graph on every dispatch would cost more than a small step.
    """

    graphdef: nnx.GraphDef
    paths: tuple[tuple[str | int, ...], ...]
    _hash: int = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.graphdef, self.paths)))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, ModuleApply) or self._hash != other._hash:
            return False
        return self.paths == other.paths and self.graphdef == other.graphdef

    def __call__(
        self,
        params: Params,
        xt: Array,
        t: Array | None,
        cond: Any = None,
        *,
        rng: Key[Array, ""] | Key[Array, " batch"] | None = None,
        train: bool = False,
    ) -> Array:
        """Run the network: rebuild the module inside the caller's trace and call it."""
        with nnx.use_eager_sharding(False):
            module = nnx.merge(self.graphdef, _from_params(params, self.paths))
        return module(xt, t, cond, rng=rng, train=train)


def functional(module: nnx.Module) -> tuple[ModuleApply, Params]:
    """Split an NNX module, once, into a pure `apply` and its parameters.

    The module is called as `module(xt, t, cond, rng=rng, train=train)` and may hold `nnx.Param`s only:
    randomness comes in through `rng` (not `nnx.Dropout`, whose key would live in the state), and there are no
    running statistics.

    Returns:
        apply: `apply(params, xt, t, cond=None, *, rng=None, train=False) -> Array`, pure, hashable, comparing
            by structure: usable as a static argument of `jax.jit` and under `grad` and `vmap`. `rng` is one
            key, or one key per example `(batch,)`.
        params: a nested plain dict of arrays with string keys (entry i of a list is the key `str(i)`).

    Raises:
        ValueError: the module holds state other than `nnx.Param`.
    """
    graphdef, state, rest = nnx.split(module, nnx.Param, ...)
    others = ["/".join(map(str, path)) for path, _ in _leaves(nnx.to_pure_dict(rest))]
    if others:
        raise ValueError(
            f"{type(module).__name__} holds state that is not nnx.Param ({', '.join(others[:4])}); a "
            "denoiser is a pure function of its parameters: take dropout's key from the `rng` argument "
            "(ddjax.denoisers.layers.dropout) and keep no running statistics"
        )
    pure = nnx.to_pure_dict(state)
    paths = tuple(path for path, _ in _leaves(pure))
    return ModuleApply(_without_eager_sharding(graphdef, pure), paths), _to_params(pure)


def functional_init(make: Callable[[nnx.Rngs], nnx.Module]) -> Functional:
    """Pure `init` and `apply` of the module that `make(rngs)` builds, before any parameter exists.

    `init(key) -> params` can run inside `jax.jit(init, out_shardings=...)` or `jax.eval_shape`, so that a
    large network is born sharded. `make` is traced once here, abstractly, for the structure.

        make = lambda rngs: DiT(shape=(8, 8, 1), width=64, depth=4, heads=4, rngs=rngs)
        init, apply = functional_init(make)
    """

    def split(key: Key[Array, ""]) -> tuple[ModuleApply, Params]:
        with nnx.use_eager_sharding(False):
            return functional(make(nnx.Rngs(key)))

    structure: list[ModuleApply] = []

    def abstract(key: Key[Array, ""]) -> Params:
        apply, params = split(key)
        structure.append(apply)
        return params

    jax.eval_shape(abstract, jax.random.key(0))
    return Functional(lambda key: split(key)[1], structure[0])


@dataclasses.dataclass(frozen=True)
class LinenApply:
    """`apply(params, xt, t, cond, *, rng=None, train=False)` of a Linen module (see `from_linen`)."""

    module: Any  # flax.linen.Module

    def __call__(
        self,
        params: Params,
        xt: Array,
        t: Array,
        cond: Any = None,
        *,
        rng: Array | None = None,
        train: bool = False,
    ) -> Array:
        """Run the network; `rng` feeds the `dropout` stream."""
        if rng is None:
            return self.module.apply({"params": params}, xt, t, cond, train=train)
        if rng.ndim == 0:
            return self.module.apply({"params": params}, xt, t, cond, train=train, rngs={"dropout": rng})

        # Linen has one key for the whole batch; one key per example means one example at a time.
        def one(key: Array, *example: Any) -> Array:
            xt, t, cond = jax.tree.map(lambda leaf: leaf[None], example)
            return self.module.apply({"params": params}, xt, t, cond, train=train, rngs={"dropout": key})[0]

        t = jnp.broadcast_to(t, xt.shape[:1]) if jnp.ndim(t) == 0 else t
        return jax.vmap(one)(rng, xt, t, cond)


def from_linen(module: Any, *init_args: Any) -> Functional:
    """Adapt a Linen module whose `__call__` is `(xt, t, cond, train=False)`.

    `init_args` are example inputs `xt, t, cond` (arrays or `jax.ShapeDtypeStruct`s). Returns the same pair as
    `functional_init`. `rng` becomes the `dropout` stream, per example where it has shape `(batch,)`.
    `init` raises ValueError where the module has collections other than `params` (batch statistics).
    """

    def init(key: Key[Array, ""]) -> Params:
        arrays = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), init_args)
        variables = module.init(key, *arrays, train=False)
        if set(variables) - {"params"}:
            raise ValueError(
                f"{type(module).__name__} has the collections {sorted(variables)}; a denoiser is a pure "
                "function of its parameters: remove the layers that keep other state (instead of BatchNorm, "
                "LayerNorm or GroupNorm)"
            )
        return variables.get("params", {})

    return Functional(init, LinenApply(module))


def _without_eager_sharding(graphdef: nnx.GraphDef, state: dict) -> nnx.GraphDef:
    """The same structure, its variables marked as not placed by NNX: sharding is by path rules on the dict.

    The mark depends on the context in which a module was made, and would make equal networks compare unequal.
    """
    with nnx.use_eager_sharding(False):
        copy = nnx.merge(graphdef, state)
    for _, node in nnx.iter_graph(copy):
        if isinstance(node, nnx.Variable):
            node.set_metadata("eager_sharding", False)
    return nnx.split(copy)[0]


def _leaves(tree: Any, path: tuple = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Paths and leaves of nested dicts, keys as they are."""
    if isinstance(tree, dict):
        for name, child in tree.items():
            yield from _leaves(child, (*path, name))
    else:
        yield path, tree


def _to_params(tree: Any) -> Params:
    """Nested dict with string keys: path rules, JSON manifests and Orbax all want strings."""
    return {str(k): _to_params(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _from_params(params: Params, paths: tuple[tuple[str | int, ...], ...]) -> dict:
    """The nested dict that NNX expects, integer keys restored; names what is missing or superfluous."""
    given = dict(_leaves(params))
    wanted = {tuple(map(str, path)): path for path in paths}
    if given.keys() != wanted.keys():
        missing = sorted("/".join(p) for p in wanted.keys() - given.keys())
        extra = sorted("/".join(map(str, p)) for p in given.keys() - wanted.keys())
        raise ValueError(
            f"these parameters are not this network's: missing {missing[:4]} ({len(missing)}), unexpected "
            f"{extra[:4]} ({len(extra)}); build the network as it was when they were made (stack_blocks and "
            "unstack_blocks go between scan=False and scan=True)"
        )
    tree: dict = {}
    for name, path in wanted.items():
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = given[name]
    return tree
