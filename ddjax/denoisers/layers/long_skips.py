"""A stack of blocks with long connections from those before the middle one to those behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from ddjax import random
from ddjax.denoisers.layers.blocks import Stack, rematerialised
from ddjax.taps import active, refuse
from ddjax.types import Params, PyTree


class LongSkips(nnx.Module):
    """`depth` blocks, an odd number; those behind the middle one are shown, last first, what those before it made.

    A block is called as `block(h, skip, c, keys=keys, name=name)` and returns `(h, shown)`: h any pytree of arrays that
    goes from block to block, c what all are told, skip what the other end of the long connection has shown, None for
    the first half and the middle.

    make: `make(rngs, skips=...)` makes a block, with a place for a long connection or not.
    depth: or how many blocks are before and behind the middle one; where they are fewer behind it, the first ones'
        connections lead nowhere.
    scan, remat: as in `layers.Stack`.
    Raises ValueError for an even depth, or more blocks behind the middle one than before.
    """

    def __init__(
        self,
        make: Callable[..., nnx.Module],
        depth: int | tuple[int, int],
        *,
        scan: bool = False,
        remat: bool | str = False,
        rngs: nnx.Rngs,
    ):
        if isinstance(depth, int):
            if depth < 3 or depth % 2 == 0:
                raise ValueError(
                    f"depth={depth}: expected an odd number of at least 3 blocks, as many on either side of one"
                )
            depth = (depth // 2, depth // 2)
        before, behind = depth
        if not before >= behind >= 1:
            raise ValueError(f"depth={tuple(depth)}: expected as many blocks behind the middle one as before, or fewer")
        self.depth, self.before = before + 1 + behind, before
        self.down = Stack(partial(make, skips=False), before, scan=scan, remat=remat, rngs=rngs)
        self.middle = make(rngs, skips=False)
        self.up = Stack(partial(make, skips=True), behind, scan=scan, remat=remat, rngs=rngs)

    def __call__(self, h: PyTree, c: PyTree = None, keys: Key[Array, " batch"] | None = None) -> PyTree:
        """Run the blocks; `keys`, folded with the block's number, turn dropout on."""
        return self.run(h, c, keys)[0]

    def run(
        self, h: PyTree, c: PyTree = None, keys: Key[Array, " batch"] | None = None, first: int = 0
    ) -> tuple[PyTree, list[Array]]:
        """The same, and what each block has shown; blocks are numbered from `first` on."""
        middle = first + self.before
        h, down = run_blocks(self.down, h, c, keys, first)
        h, shown = _unrolled([self.middle], self.down.remat, h, None, c, keys, range(middle, middle + 1))
        h, up = run_blocks(self.up, h, c, keys, middle + 1, down)
        return h, [*down, *shown, *up]  # of a scan, the slices of one array

    def points(self, features: int, first: int = 0) -> dict[str, tuple[str, int]]:
        """What a side network of the first half and the middle adds to (`sides.Side`): connections, and the middle."""
        middle = first + self.before
        skips = {f"block/{middle - 1 - i}": f"block/{middle + 1 + i}/skip" for i in range(self.up.depth)}
        return {name: (to, features) for name, to in (skips | {f"block/{middle}": f"block/{middle}"}).items()}

    def without_way_back(self) -> None:
        """Leave the blocks behind the middle one out."""
        self.depth, self.up.blocks, self.up.depth = self.before + 1, nnx.List([]), 0


def run_blocks(
    stack: Stack, h: PyTree, c: PyTree, keys: Key[Array, " batch"] | None, first: int = 0, skips: PyTree = None
) -> tuple[PyTree, PyTree]:
    """A stack's blocks, of `LongSkips`' kind, numbered from `first` on: what the last gives, and what each has shown.

    skips: what other blocks have shown: the last goes to the first of these.
    """
    run = _scanned if stack.scan else _unrolled
    return run(stack.blocks, stack.remat, h, skips, c, keys, range(first, first + stack.depth))


def _unrolled(
    blocks: Sequence[nnx.Module],
    remat: str,
    h: PyTree,
    skips: list[Array] | None,
    c: PyTree,
    keys: Array | None,
    numbers: range,
) -> tuple[PyTree, list[Array]]:
    """The blocks one after the other; each takes the last of the skips that are left."""
    # A listener needs the values, which remat's inner trace would not let out; remat changes none.
    remat = "none" if active("block") else remat
    shown, skips = [], None if skips is None else list(skips)
    for i, block in zip(numbers, blocks, strict=True):
        graphdef, params = nnx.split(block)
        run = rematerialised(partial(_block, graphdef, f"block/{i}"), remat)
        h, out = run(params, h, None if skips is None else skips.pop(), c, _layer(keys, i))
        shown.append(out)
    return h, shown


def _scanned(
    blocks: nnx.Module,
    remat: str,
    h: PyTree,
    skips: Array | None,
    c: PyTree,
    keys: Array | None,
    numbers: range,
) -> tuple[PyTree, Array]:
    refuse("block", "the blocks are scanned; build the network with scan=False (see `unstack_blocks`)")
    graphdef, stacked = nnx.split(blocks)

    def body(h: PyTree, layer: tuple) -> tuple[PyTree, Array]:
        params, skip, i = layer
        return _block(graphdef, None, params, h, skip, c, _layer(keys, i))

    body = rematerialised(body, remat, prevent_cse=False)
    skips = None if skips is None else jax.tree.map(lambda x: x[::-1][: len(numbers)], skips)
    return jax.lax.scan(body, h, (stacked, skips, jnp.arange(numbers.start, numbers.stop)))


def _block(
    graphdef: nnx.GraphDef,
    name: str | None,
    params: Params,
    h: PyTree,
    skip: Array | None,
    c: PyTree,
    keys: Array | None,
) -> tuple[PyTree, Array]:
    return nnx.merge(graphdef, params)(h, skip, c, keys=keys, name=name)


def _layer(keys: Array | None, i: int | Array) -> Array | None:
    return None if keys is None else random.fold_in(keys, i)
