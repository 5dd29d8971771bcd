"""A graphical model of the data as who attends to whom.

(Weilbach et al. 2023, "Graphically structured diffusion models".)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int


@dataclasses.dataclass(frozen=True)
class GraphicalModel:
    """Arrays of variables, and factors that join some of them.

    The sites of a state are the variables, array by array, each row by row. What a computation goes through on the way
    (the products of a matrix product) may be variables too: the data then hold them, and the graph is sparser.

        model = GraphicalModel.of(
            {"a": (3, 2), "b": (2, 4), "c": (3, 4)},
            [[("c", i, j), *(("a", i, k) for k in range(2)), *(("b", k, j) for k in range(2))]
             for i in range(3) for j in range(4)],
        )
        DiT(shape=(model.count, 1), neighbours=model.neighbours(), kinds=model.kinds, ...)

    Build it with `of`.
    """

    variables: tuple[tuple[str, tuple[int, ...]], ...]
    factors: tuple[tuple[int, ...], ...]  # sites; of a conditional, the child first

    @classmethod
    def of(
        cls, variables: Mapping[str, Sequence[int]], factors: Iterable[Iterable[tuple[str | int, ...]]]
    ) -> GraphicalModel:
        """From the shapes of arrays by name, and factors of (name, index, ...), the child of a conditional first.

        Raises ValueError for a variable that is not there.
        """
        model = cls(tuple((name, tuple(shape)) for name, shape in variables.items()), ())
        return dataclasses.replace(
            model, factors=tuple(tuple(model.site(*variable) for variable in factor) for factor in factors)
        )

    @property
    def count(self) -> int:
        """The number of variables."""
        return sum(math.prod(shape) for _, shape in self.variables)

    @property
    def kinds(self) -> tuple[int, ...]:
        """A number for each array: its variables are exchangeable, and share one embedding."""
        return tuple(i for i, (_, shape) in enumerate(self.variables) for _ in range(math.prod(shape)))

    def site(self, name: str, *index: int) -> int:
        """The number of a variable. Raises ValueError for one that is not there."""
        first = 0
        for own, shape in self.variables:
            if own == name and len(index) == len(shape) and all(0 <= i < n for i, n in zip(index, shape, strict=True)):
                return first + (int(np.ravel_multi_index(index, shape)) if shape else 0)
            first += math.prod(shape)
        raise ValueError(f"no variable {name}{list(index)} among {dict(self.variables)}")

    def neighbours(self, *, blanket: bool = False) -> tuple[tuple[int, ...], ...]:
        """The sites that each attends to, itself among them, in their order.

        A child and its parents attend to each other (theirs: what parents have in common they learn over the child, in
        two layers). blanket: all variables of a factor attend to each other: each to its Markov blanket.
        """
        seen = [{site} for site in range(self.count)]
        for first, *others in self.factors:
            pairs = [(first, other) for other in others]
            if blanket:
                pairs += [(one, other) for one in others for other in others]
            for one, other in pairs:
                seen[one].add(other)
                seen[other].add(one)
        return tuple(tuple(sorted(sites)) for sites in seen)


def unidirectional(grid: Sequence[int], block: int) -> tuple[tuple[int, ...], ...]:
    """Patches in square blocks, each of which sees itself and the blocks before it that touch it.

    (Yang et al. 2024, Inf-DiT, section 3.2: of an image those to the left, above, and above to the left; what lies
    farther is seen through them, layer by layer.) So an image is denoised block by block, behind keys and values of the
    blocks that touch it alone: `cond = {"past": ..., "sites": ...}` (`views.View`). The authors' network, which holds
    no more than a row of these, is `InfDiT`.

    grid: of patches. Raises ValueError for a block that does not divide its sides.
    """
    if block < 1 or any(side % block for side in grid):
        raise ValueError(f"block={block} does not divide the grid {tuple(grid)}")
    places = np.stack(np.unravel_index(np.arange(math.prod(grid)), tuple(grid)), axis=-1) // block
    before = places[:, None] - places[None]
    return tuple(tuple(np.flatnonzero(row).tolist()) for row in ((before >= 0) & (before <= 1)).all(-1))


def check_neighbours(neighbours: Sequence[Sequence[int]], sites: int) -> tuple[tuple[int, ...], ...]:
    """As tuples. Raises ValueError unless each of the sites has some, all of them sites."""
    neighbours = tuple(tuple(int(i) for i in own) for own in neighbours)
    if len(neighbours) != sites or not all(own and 0 <= min(own) <= max(own) < sites for own in neighbours):
        raise ValueError(f"neighbours: expected some for each of {sites} sites, among them, got {len(neighbours)} rows")
    return neighbours


def mask(neighbours: Sequence[Sequence[int]]) -> Bool[np.ndarray, "sites sites"]:
    """True where a site (the first axis) attends."""
    seen = np.zeros((len(neighbours),) * 2, bool)
    for site, own in enumerate(neighbours):
        seen[site, list(own)] = True
    return seen


def padded(neighbours: Sequence[Sequence[int]]) -> tuple[Int[np.ndarray, "sites most"], Bool[np.ndarray, "sites most"]]:
    """The neighbours as one array, filled up to the most that a site has, and which of its entries there are."""
    most = max(map(len, neighbours))
    rows = np.array([[*own, *[own[0]] * (most - len(own))] for own in neighbours], np.int32)
    return rows, np.arange(most) < np.array([len(own) for own in neighbours])[:, None]
