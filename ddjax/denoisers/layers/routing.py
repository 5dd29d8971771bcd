"""Which sites, and which channels, go through some blocks of a stack."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ddjax import random
from ddjax.types import Keys

Route = tuple[int, int, float]  # first block, the one after the last, share of the sites that bypass them


def check_routes(route: Route | Sequence[Route] | None, depth: int) -> tuple[Route, ...]:
    """One route, or several, as tuples; none of None.

    Raises ValueError for blocks that the stack has not, routes that overlap or are out of order, or a share outside
    [0, 1).
    """
    given = () if route is None else tuple(route)
    given = (given,) if given and not isinstance(given[0], Sequence) else given
    done = 0
    for one in given:
        if len(one) != 3 or not done <= one[0] < one[1] <= depth or not 0 <= one[2] < 1:
            raise ValueError(
                f"route={route}: expected (start, stop, share) with 0 <= start < stop <= depth={depth}, and the "
                "share of the sites that bypass these blocks, at least 0 and below 1; or several, one after the other"
            )
        done = one[1]
    return tuple((int(start), int(stop), float(share)) for start, stop, share in given)


def routed(keys: Keys, sites: int, share: float) -> Int[Array, "batch kept"]:
    """The sites of each example that do not bypass, any `sites - floor(share sites)` of them, in their order.

    (Krause et al. 2025, "TREAD: token routing for efficient architecture-agnostic diffusion training", section 3.)
    """
    kept = sites - int(share * sites)
    noise = jax.vmap(lambda key: jax.random.uniform(key, (sites,)))(keys)
    return jnp.sort(jnp.argsort(noise, axis=-1)[:, :kept], axis=-1)


def each_routed(keys: Keys, sites: int, routes: Sequence[Route]) -> list[Int[Array, "batch kept"]]:
    """`routed`, of each route by itself."""
    return [routed(random.fold_in(keys, i) if i else keys, sites, share) for i, (_, _, share) in enumerate(routes)]


def counted(
    y: Float[Array, "batch sites features"], kept: Sequence[Int[Array, "batch kept"]]
) -> tuple[Float[Array, "batch sites features"], Bool[Array, "routes batch sites"]]:
    """Outputs of sites as a loss is to see them that counts the sites which no route led past (TREAD, first version).

    Of each route it takes the mean over the sites that did not bypass, and of these the mean. The values stay as they
    are: it is the gradients that are weighed so, which for a loss that is a mean over sites is the same.
    Also given: where a site did not bypass.
    """
    went = jnp.stack([(sites[:, :, None] == jnp.arange(y.shape[1])).any(axis=1) for sites in kept])
    weights = (went / went.mean(axis=-1, keepdims=True)).mean(axis=0)[..., None].astype(y.dtype)
    still = jax.lax.stop_gradient(y)
    return still + weights * (y - still), went


def reconstruction(
    y: Float[Array, "batch sites features"], x: Float[Array, "batch sites features"],
    went: Bool[Array, "routes batch sites"],
) -> Float[Array, " batch"]:  # fmt: skip
    """How far outputs are from the noisy input where sites bypassed, mean over these and over routes.

    (The auxiliary loss of TREAD's first version, that of Zheng et al. 2024, MaskDiT, whose input is normalised within
    each site.)
    """
    x = x.astype(y.dtype)
    mean, variance = x.mean(axis=-1, keepdims=True), x.var(axis=-1, ddof=1, keepdims=True)
    apart = jnp.square(y - (x - mean) / jnp.sqrt(variance + 1e-6)).mean(axis=-1)
    past = 1.0 - went.astype(y.dtype)
    return ((apart * past).sum(axis=-1) / jnp.maximum(past.sum(axis=-1), 1.0)).mean(axis=0)


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
