"""What U-shaped networks have in common: blocks down in resolution and back up, with skip connections between."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from ddjax import random
from ddjax.denoisers.images import ImageNetwork
from ddjax.denoisers.layers.blocks import REMAT, rematerialised
from ddjax.denoisers.layers.stacking import run_name
from ddjax.denoisers.sides import Side, check_whole
from ddjax.denoisers.states import check_values
from ddjax.placement import constrain
from ddjax.taps import active, refuse, tap

PARTS = ("encoder", "middle", "decoder")


class Stage(NamedTuple):
    """What one block of a U-Net does."""

    features_in: int
    features_out: int
    resample: str | None = None
    attends: bool = False
    encodes: bool = False  # it is on the way down
    joined: bool = False  # a skip connection stands beside its input
    kept: bool = True  # on the way down: what it gives is one
    transforms: bool = False  # it is a transformer of patches


class UShaped(ImageNetwork):
    """A network of images that goes down in resolution and back up, with skip connections between."""

    def lay(
        self,
        encoder: Sequence[Stage],
        middle: Sequence[Stage],
        decoder: Sequence[Stage],
        block: Callable[[Stage], nnx.Module],
        *,
        remat: bool | str,
        scan: bool,
    ) -> None:
        """Make the blocks: on the way down, in the middle, on the way up.

        scan: neighbours that are equal but for their weights are one block whose parameters have a leading axis, run in
            `jax.lax.scan`. Those at which resolution or width change, attention begins or a skip connection has another
            width stand alone. From one seed both have the same weights.

        Raises ValueError for unknown `remat`, and where there is nothing to scan.
        """
        self.remat = {True: "full", False: "none"}.get(remat, remat)
        if self.remat not in REMAT:
            raise ValueError(f"remat={remat!r}: expected True, False or one of {', '.join(map(repr, REMAT))}")
        self.scan, self.stages, spans = scan, (tuple(encoder), tuple(middle), tuple(decoder)), []
        features = encoder[0].features_in
        for part, stages in zip(PARTS, self.stages, strict=True):
            blocks = [block(stage) for stage in stages]
            spans.append(tuple(_runs(blocks, stages, features) if scan else ((i, i + 1) for i in range(len(blocks)))))
            features = stages[-1].features_out if stages else features
            together = {run_name(*span): _as_one(blocks[slice(*span)]) for span in spans[-1]}
            setattr(self, part, nnx.Dict(together) if scan else nnx.List(blocks))
        self.spans = tuple(spans)
        if scan and not any(map(_has_runs, spans)) and not any(stage.transforms for stage in middle):
            raise ValueError(
                "scan=True: no two neighbouring blocks of this network are equal, so that there is nothing to scan; "
                "take more blocks at each resolution, or scan=False"
            )

    def as_side(self, blocks: int | None) -> Side:
        """The way down and the middle, added to the skip connections and what leaves the middle (ControlNet)."""
        check_whole(blocks)
        self.final, (encoder, middle, _) = None, self.stages
        kept = [encoder[0].features_in, *(stage.features_out for stage in encoder if stage.kept)]
        skips = {f"skip/{n}": features for n, features in zip(range(sum(self.joined)), reversed(kept), strict=False)}
        part, stages = ("middle", middle) if middle else ("encoder", encoder)
        self.decoder, self.stages, self.spans = nnx.List([]), (encoder, middle, ()), (*self.spans[:2], ())
        points = skips | {f"{part}/{len(stages) - 1}": stages[-1].features_out}
        points = {name: (name, features) for name, features in points.items()}
        return Side({"embed": (1, encoder[0].features_in)}, points, convolved=True)

    def hinted(self, image: Array, xt: Any, cond: Any, channels: int, scale: int) -> dict[str, Array]:
        """The image, `scale` times as large as the state."""
        check_values(image, (self.check(xt), *(scale * side for side in self.shape[:-1]), channels))
        return {"embed": image}

    @property
    def joined(self) -> tuple[bool, ...]:
        """Which blocks on the way up have a skip connection."""
        return tuple(stage.joined for stage in self.stages[2])

    def walk(
        self,
        h: Array,
        c: Array,
        keys: Key[Array, " batch"] | None,
        *,
        join: Callable[[Array, Array], Array],
        after: Callable[[nnx.Module, Array], Array] = lambda block, h: h,
        **more: Any,
    ) -> Array:
        """Run the blocks, each `(h, c, keys=, name=)`, and what there is more of by name.

        join: of the backbone and a skip connection. after: a block on the way down, what is made of its result.
        Without a way up, the skip connections that one would have joined are told at their taps all the same.
        """
        self._refuse_taps()
        skips, firsts = [h], accumulate(map(len, self.stages), initial=0)
        for part, stages, spans, first in zip(PARTS, self.stages, self.spans, firsts, strict=False):
            for start, stop in spans:
                block = getattr(self, part)[run_name(start, stop) if self.scan else start]
                joined, kept = stages[start].joined, part == "encoder" and stages[start].kept
                if stop > start + 1:
                    taken = [skips.pop() for _ in range(start, stop)] if joined else None
                    numbers = range(first + start, first + stop)
                    h, made = self._scanned(block, h, c, keys, numbers, kept, taken, join, more)
                    skips += [made[i] for i in range(stop - start)] if kept else []  # slices of one array
                    continue
                if joined:
                    n = sum(self.joined[:start])
                    h = join(tap(f"backbone/{n}", h), tap(f"skip/{n}", skips.pop()))
                own_keys = None if keys is None else random.fold_in(keys, first + start)
                h = self._run(block, f"{part}/{start}", h, c, own_keys, more)
                h = after(block, h) if part == "encoder" else h
                skips += [h] if kept else []
        for n, skip in enumerate(() if self.stages[2] else reversed(skips)):
            tap(f"skip/{n}", skip)
        return h

    def _run(self, block: nnx.Module, name: str, h: Array, c: Array, keys: Array | None, more: dict[str, Any]) -> Array:
        # A listener needs the values, which remat's inner trace would not let out; remat changes none. A transformer
        # sees to it itself.
        if self.remat == "none" or active(name) or hasattr(block, "stack"):
            return block(h, c, keys=keys, name=name, **more)
        graphdef, params = nnx.split(block)
        body = lambda params, h, c, keys: nnx.merge(graphdef, params)(h, c, keys=keys, name=name, **more)  # noqa: E731
        return rematerialised(body, self.remat)(params, h, c, keys)

    def _scanned(
        self,
        blocks: nnx.Module,
        h: Array,
        c: Array,
        keys: Key[Array, " batch"] | None,
        numbers: range,
        kept: bool,
        skips: Sequence[Array] | None,
        join: Callable[[Array, Array], Array],
        more: dict[str, Any],
    ) -> tuple[Array, Array | None]:
        """What the last of some equal blocks gives, and, where it is kept, each; skips: a connection for each."""
        graphdef, stacked = nnx.split(blocks)

        def body(h: Array, layer: tuple) -> tuple[Array, Array | None]:
            params, skip, i = layer
            x = h if skip is None else join(h, skip)
            layer_keys = None if keys is None else random.fold_in(keys, i)
            h = nnx.merge(graphdef, params)(x, c, keys=layer_keys, name=None, **more)
            return h, h if kept else None

        # Inside a scan nothing can be merged with the forward pass, so the CSE barrier would only cost.
        body = rematerialised(body, self.remat, prevent_cse=False)
        placed = lambda h: constrain(h, "batch", None, None, None)  # noqa: E731
        skips = None if skips is None else jnp.stack(skips)
        h, made = jax.lax.scan(body, placed(h), (stacked, skips, jnp.arange(numbers.start, numbers.stop)))
        return placed(h), made

    def _refuse_taps(self) -> None:
        """Raise ValueError for a listener to scanned blocks."""
        for part, stages, spans in zip(PARTS, self.stages, self.spans, strict=True):
            if not (self.scan and _has_runs(spans)):
                continue
            joins = any(stop > start + 1 and stages[start].joined for start, stop in spans)
            for prefix in (f"{part}/", *(("backbone/", "skip/") if joins else ())):
                refuse(prefix, "blocks are scanned; build the network with scan=False (see `unstack_blocks`)")


def plan(
    levels: Sequence[tuple[int, bool]],
    first: int,
    blocks: int,
    up_attention: str,
    middle: Sequence[bool] = (True, False),
) -> tuple[list[Stage], list[Stage], list[Stage]]:
    """The blocks on the way down, in the middle and up, for the features of each resolution and whether it attends.

    middle: of each block there, whether it attends.
    """
    encoder, decoder, skips, features = [], [], [first], first
    for i, (width, attends) in enumerate(levels):
        if i:
            encoder.append(Stage(features, features, "down", encodes=True))
            skips.append(features)
        for _ in range(blocks):
            encoder.append(Stage(features, width, attends=attends, encodes=True))
            features = width
            skips.append(features)
    waist = [Stage(features, features, attends=attends) for attends in middle]
    for i, (width, attends) in reversed(list(enumerate(levels))):
        for j in range(blocks + 1):
            own = attends and (up_attention == "all" or j == blocks)
            decoder.append(Stage(features + skips.pop(), width, attends=own, joined=True))
            features = width
        if i:
            decoder.append(Stage(features, features, "up"))
    return encoder, waist, decoder


def check_sides(shape: Sequence[int], levels: int, blocks: int, attend_at: Sequence[int]) -> None:
    """Raise ValueError for an image that cannot be halved so often, or never has the sides at which blocks attend."""
    if levels < 1 or blocks < 1:
        raise ValueError(f"blocks={blocks} at {levels} resolutions: expected one or more of each")
    if any(side % 2 ** (levels - 1) for side in shape[:2]):
        raise ValueError(
            f"{levels} multipliers halve the sides {levels - 1} times, which {tuple(shape[:2])} do not allow"
        )
    sides = [shape[0] >> i for i in range(levels)]
    if missed := [side for side in attend_at if side not in sides]:
        raise ValueError(f"attend_at={tuple(attend_at)}: the image is never {missed[0]} high, but {sides}")


def _runs(blocks: Sequence[nnx.Module], stages: Sequence[Stage], features: int) -> Iterator[tuple[int, int]]:
    """Where neighbours are equal: (first, one behind the last) of each run, longest ones; features: what comes in."""
    kinds: list[Any] = []
    for block, stage in zip(blocks, stages, strict=True):
        graphdef, state = nnx.split(block)
        shapes = tuple(x.shape for x in jax.tree.leaves(nnx.to_pure_dict(state)))
        # In a scan what comes in is what goes out; and no block that resamples is like another.
        goes_round = features == stage.features_out and stage.resample is None
        kinds.append((graphdef, shapes, stage.joined, stage.kept) if goes_round else object())
        features = stage.features_out
    start = 0
    for _, run in groupby(kinds):
        stop = start + len(list(run))
        yield start, stop
        start = stop


def _as_one(blocks: Sequence[nnx.Module]) -> nnx.Module:
    """Equal blocks as one, each parameter with an axis of all; a single one as it is."""
    if len(blocks) == 1:
        return blocks[0]
    graphdef = nnx.split(blocks[0])[0]
    states = [nnx.to_pure_dict(nnx.split(block)[1]) for block in blocks]
    return nnx.merge(graphdef, jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))


def _has_runs(spans: Sequence[tuple[int, int]]) -> bool:
    return any(stop > start + 1 for start, stop in spans)
