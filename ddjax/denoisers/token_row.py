"""Networks of images for which the label, the time and the patches are tokens in one row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ddjax.denoisers.given import Given
from ddjax.denoisers.images import ImageNetwork
from ddjax.denoisers.layers.basic import Linear
from ddjax.denoisers.layers.generated import GeneratedLinear
from ddjax.denoisers.layers.long_skips import LongSkips
from ddjax.denoisers.layers.told import ConditionTokens
from ddjax.denoisers.sides import Side, check_whole
from ddjax.taps import tap


class TokenRow(ImageNetwork):
    """An image network whose tokens have learned positions and pass blocks with long connections."""

    def lay(
        self,
        width: int,
        depth: int | tuple[int, int],
        block: Callable[..., nnx.Module],
        *,
        num_classes: int,
        time: bool,
        time_mlp: bool,
        vector: int = 0,
        context: tuple[int, int] | None = None,
        generated: bool = False,
        kernels: int = 0,
        scan: bool,
        remat: bool | str,
        rngs: nnx.Rngs,
    ) -> None:
        """Make the embeddings and the blocks, each `block(skips=, rngs=)`. Raises ValueError as its parts do.

        vector, context: of `ConditionTokens`. generated: whether what the network is told makes weights
        (`layers.generated`). kernels: of `layers.Generator`.
        """
        self.generated, self.width = generated, width
        self.embed = (
            GeneratedLinear(self.features_in, width, width, kernels=kernels, dtype=self.dtype, rngs=rngs)
            if generated
            else Linear(self.features_in, width, dtype=self.dtype, rngs=rngs)
        )
        self.condition = ConditionTokens(
            width, num_classes=num_classes, time=time, vector=vector, mlp=time_mlp, context=context, rngs=rngs
        )
        places = self.condition.count + int(np.prod(self.grid))
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (places, width), jnp.float32))
        self.stack = LongSkips(
            lambda rngs, skips: block(skips=skips, rngs=rngs), depth, scan=scan, remat=remat, rngs=rngs
        )

    def as_side(self, blocks: int | None) -> Side:
        """The first half and the middle, added to the long connections and what leaves the middle, as of a U-Net."""
        check_whole(blocks)
        points = self.stack.points(self.width)
        self.stack.without_way_back()
        return Side({"embed": (self.patch ** len(self.grid), self.width)}, points)

    def row(
        self, xt: Any, t: Array | None, cond: Any, batch: int
    ) -> tuple[Float[Array, "batch told width"], Float[Array, "batch tokens width"]]:
        """The tokens of the label and the time, and all of them with their positions."""
        x, given = self.seen(xt, Given.of(cond))
        told = tap("condition", self.condition(batch, t, given))
        tap("sites", self.places())
        h = self.embed(x, self.condition.vector(told)) if self.generated else self.embed(x)
        h = jnp.concatenate([told.astype(h.dtype), h], axis=1) + self.position[...].astype(h.dtype)
        return told, tap("embed", h)
