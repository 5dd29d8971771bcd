"""What a network is as a side network beside one of its kind (`control`): what of it stays, and how the two meet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from flax import nnx

from ddjax.denoisers.layers.blocks import Stack

Points = dict[str, tuple[str, int]]  # a tap of the side: the trunk's to which its value is added, and its features


class Side(NamedTuple):
    """How a side network and its trunk meet: what a network's `as_side(blocks)` gives, having left its end out.

    With it go `body(xt, t, cond, rng=, train=)`, the network but for its output layers, and `hinted(image, xt, cond,
    channels, scale)`, the values of an image at the sites of each tap in `hints`, what is to be multiplied last.
    """

    hints: dict[str, tuple[int, int]]  # a tap: values of the image, of one channel, at each of its sites; its features
    points: Points
    convolved: bool = False  # the image goes through convolutions (`control.Stem`), for it is seen as an image


def in_place(taps: Sequence[str], features: int) -> Points:
    """Values that are added to those at the trunk's taps of the same names."""
    return {tap: (tap, features) for tap in taps}


def check_blocks(blocks: int | None, depth: int) -> int:
    """The number of the first blocks that a side network has. Raises ValueError for more than there are, or none."""
    if blocks is None or not 1 <= blocks <= depth:
        raise ValueError(f"blocks={blocks}: expected from 1 to the trunk's {depth}")
    return blocks


def check_whole(blocks: int | None) -> None:
    """Raise ValueError where blocks are counted of a network of which all before the way back are copied."""
    if blocks is not None:
        raise ValueError(f"blocks={blocks}: of a U-shaped network all on the way down are copied: leave it out")


def keep(stack: Stack, blocks: int) -> None:
    """Leave all blocks of a stack but the first out."""
    stack.blocks, stack.depth = nnx.List(list(stack.blocks)[:blocks]), blocks
    stack.routes = tuple((start, min(stop, blocks), share) for start, stop, share in stack.routes if start < blocks)
