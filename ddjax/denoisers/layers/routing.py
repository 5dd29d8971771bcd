"""Which sites, and which channels, go through some blocks of a stack."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ddjax.types import Keys

Route = tuple[int, int, float]  # first block, the one after the last, share of the sites that bypass them


def check_route(route: Route, depth: int) -> Route:
    """As a tuple. Raises ValueError for blocks that the stack has not, or a share outside [0, 1)."""
    if len(route) != 3 or not 0 <= route[0] < route[1] <= depth or not 0 <= route[2] < 1:
        raise ValueError(
            f"route={tuple(route)}: expected (start, stop, share) with 0 <= start < stop <= depth={depth}, and the "
            "share of the sites that bypass these blocks, at least 0 and below 1"
        )
    return int(route[0]), int(route[1]), float(route[2])


def routed(keys: Keys, sites: int, share: float) -> Int[Array, "batch kept"]:
    """The sites of each example that do not bypass, any `sites - floor(share sites)` of them, in their order.

    (Krause et al. 2025, "TREAD: token routing for efficient architecture-agnostic diffusion training", section 3.)
    """
    kept = sites - int(share * sites)
    noise = jax.vmap(lambda key: jax.random.uniform(key, (sites,)))(keys)
    return jnp.sort(jnp.argsort(noise, axis=-1)[:, :kept], axis=-1)


def channel_mask(t: Float[Array, "*batch"], width: int, share: float, power: float = 4.0) -> Float[Array, "*batch w"]:
    """1 at the channels that blocks use at a time, 0 at those that pass them by.

    (Park et al. 2024, "Denoising task routing", section 4.1.) A window of `floor(share width)` channels, at the first
    ones at t = 0, at the last ones at t = 1, and in between it begins at `round(t^power (width - window))`: near times
    share channels, and late ones, which differ more, fewer of them.

    share: theirs is beta, in (0, 1]; power: theirs is alpha.
    """
    window = int(share * width)
    begin = jnp.round(t**power * (width - window))[..., None]
    place = np.arange(width)
    return ((place >= begin) & (place < begin + window)).astype(t.dtype)


def nearest_grid(grid: tuple[int, ...], factor: int) -> np.ndarray:
    """Every `factor`-th place along each axis of a grid, as numbers of places in its order.

    (Smith et al. 2024, "ToDo: token downsampling": nearest-neighbour downsampling of keys and values to sides divided
    by the factor and rounded down.) Raises ValueError for a factor below 1, or beyond a side.
    """
    if factor < 1 or any(factor > side for side in grid):
        raise ValueError(f"downsample={factor}: expected a factor from 1 to the shortest side of the grid {grid}")
    sides = [np.arange(side // factor) * side // (side // factor) for side in grid]
    return np.ravel_multi_index(np.meshgrid(*sides, indexing="ij"), grid).reshape(-1).astype(np.int32)
