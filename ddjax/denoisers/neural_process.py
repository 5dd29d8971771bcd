"""Neural diffusion processes: a network of the values of a function at any points."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from ddjax.denoisers.layers.attention import WEIGHTS, dot_product_attention
from ddjax.denoisers.layers.basic import DType, Linear, at_least_float32, check_rate, dropout, dropout_keys, zeros
from ddjax.denoisers.layers.blocks import Stack
from ddjax.denoisers.layers.embed import TIME_SCALE, check_time
from ddjax.denoisers.layers.long_skips import run_blocks
from ddjax.denoisers.sides import Side, check_blocks, in_place, keep
from ddjax.denoisers.states import check_state, check_values
from ddjax.placement import constrain
from ddjax.taps import Below, tap


class NeuralProcess(nnx.Module):
    """Bi-dimensional attention (Dutordoir et al. 2023, "Neural diffusion processes", arXiv:2206.03992, section 4).

    The state is a value y at each of some points; the points x are the condition, and have no noise. Each (x_d, y), d a
    coordinate, is embedded by itself, and blocks attend along points and along coordinates, the sum of both. The output
    is the mean over coordinates. So it goes with any permutation of the points, and no permutation of the coordinates
    changes it; both may be as many as one likes. The output layer starts at zero.

    Taps: "condition", "embed", "block/i" with "/attention" (the sum of both, behind its gelu), and below
    "block/i/points" and "block/i/coordinates" each attention's "/queries", "/keys", "/values" and "/attention/weights",
    whose first axis is of rows, those of an example one behind the other; "final".

    Args:
        width, depth, heads: of the blocks; heads divides width, and width is even and at least 4.
        time: False ignores t.
        dropout: rate on each block's branch, when train=True.
        dtype: compute dtype; parameters and the output stay float32.
        attention: None, "xla" or "cudnn" (`layers.dot_product_attention`).
        scan, remat: see `layers.Stack`.
        rngs: keys of the initial parameters.

    Raises:
        ValueError: for sizes that do not divide.
    """

    takes = "points"

    def __init__(
        self,
        *,
        width: int = 64,
        depth: int = 5,
        heads: int = 8,
        time: bool = True,
        dropout: float = 0.0,
        dtype: DType = jnp.float32,
        attention: str | None = None,
        scan: bool = False,
        remat: bool | str = False,
        rngs: nnx.Rngs,
    ):
        check_rate(dropout)
        if heads < 1 or width % heads or width % 2 or width < 4:
            raise ValueError(f"width={width}, heads={heads}: expected an even width of at least 4 that heads divides")
        self.width, self.time, self.dropout, self.dtype = width, time, dropout, jnp.dtype(dtype)
        self.embed = Linear(2, width, dtype=dtype, rngs=rngs)
        block = partial(BiDimensionalBlock, width, heads, time=time, dropout=dropout, dtype=dtype, attention=attention)
        self.stack = Stack(lambda rngs: block(rngs=rngs), depth, scan=scan, remat=remat, rngs=rngs)
        self.hidden = Linear(width, width, dtype=dtype, rngs=rngs)
        out = {"bias": False, "kernel_init": zeros, "dtype": dtype, "out_dtype": at_least_float32(dtype)}
        self.out = Linear(width, 1, **out, rngs=rngs)

    def __call__(
        self,
        xt: Float[Array, "batch points"],
        t: Float[Array, " batch"] | Float[Array, ""] | None,
        cond: Mapping[str, Array] | None = None,
        *,
        rng: Key[Array, ""] | Key[Array, " batch"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch points"]:
        """Run the network.

        Args:
            xt: noised values at the points.
            t: time in [0, 1].
            cond: `{"points": (batch, points, coordinates)}`.
            rng: one key, or one per example, for dropout; needed when train=True and dropout > 0.
            train: whether dropout acts.

        Returns:
            float32, `(batch, points)`.

        Raises:
            ValueError: for shapes that do not go together.
        """
        shown = self.body(xt, t, cond, rng=rng, train=train)
        mean = jnp.mean(jnp.stack(list(shown)) if isinstance(shown, list) else shown, axis=(0, 3))
        mean = tap("final", mean * math.sqrt(self.stack.depth))
        return self.out(jax.nn.gelu(self.hidden(mean)))[..., 0]

    def as_side(self, blocks: int | None) -> Side:
        """Its first blocks: what attention makes in each, to go on and to be shown, is added to what the trunk's does.

        The image is further values at the points, `(batch, points, channels)`, the same for all coordinates.
        """
        keep(self.stack, check_blocks(blocks, self.stack.depth))
        self.hidden = self.out = None
        names = [f"block/{i}/attention" for i in range(self.stack.depth)]
        return Side({"embed": (1, self.width)}, in_place(names, 2 * self.width))

    def hinted(self, image: Array, xt: Any, cond: Any, channels: int, scale: int) -> dict[str, Array]:
        """What the image says of each point, for all coordinates."""
        check_values(image, (*xt.shape, channels))
        return {"embed": image[:, :, None]}

    def body(self, xt: Any, t: Any, cond: Any = None, *, rng: Any = None, train: bool = False) -> Any:
        """What each block has shown. Arguments as above."""
        check_state(xt, (("points",), (xt.shape[-1],)), None)
        # Data without labels say "cond": None beside the points.
        given = {name: x for name, x in cond.items() if x is not None} if isinstance(cond, Mapping) else {}
        points = given.get("points") if set(given) == {"points"} else None
        if points is None or points.ndim != 3 or points.shape[:2] != xt.shape:
            found = "nothing" if points is None else f"shape {points.shape}"
            raise ValueError(f'expected cond={{"points": {(*xt.shape, "coordinates")}}}, got {found}')
        keys = dropout_keys(self.dropout, xt.shape[0], rng, train)
        c = None
        if self.time:
            c = tap("condition", _waves(check_time(t, xt.shape[0], None), self.width))
        pairs = jnp.stack(jnp.broadcast_arrays(points, xt[..., None]), axis=-1)
        h = tap("embed", jax.nn.gelu(self.embed(pairs)))
        return run_blocks(self.stack, h, c, keys)[1]


class BiDimensionalBlock(nnx.Module):
    """Attention along points and along coordinates of what the time has been added to; half of it is shown."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        time: bool,
        dropout: float = 0.0,
        dtype: DType = jnp.float32,
        attention: str | None = None,
        rngs: nnx.Rngs,
    ):
        self.heads, self.dropout, self.implementation = heads, dropout, attention
        options = {"dtype": dtype, "rngs": rngs}
        self.time = Linear(width, width, **options) if time else None
        names = ("points", "coordinates")
        self.qkv = nnx.Dict({name: Linear(width, 3 * width, bias=False, **options) for name in names})
        self.project = nnx.Dict({name: Linear(width, 2 * width, bias=False, **options) for name in names})

    def __call__(
        self,
        h: Float[Array, "batch points coordinates width"],
        skip: None,
        c: Float[Array, "batch width"] | None,
        *,
        keys: Key[Array, " batch"] | None = None,
        name: str | None = None,
    ) -> tuple[Array, Array]:
        """The next features, and those for the output. See `layers.LongSkips`."""
        named = Below(name)
        h = constrain(h, "batch", None, None, None)
        y = h if self.time is None else h + self.time(c)[:, None, None]
        along_points = self._attended("points", y.swapaxes(1, 2), name).swapaxes(1, 2)
        y = along_points + self._attended("coordinates", y, name)
        y = named("/attention", dropout(jax.nn.gelu(y), self.dropout, keys))
        own, shown = jnp.split(y, 2, axis=-1)
        return named("", (h + own) / math.sqrt(2.0)), shown

    def _attended(self, which: str, y: Float[Array, "batch rows sites width"], name: str | None) -> Array:
        """Attention among the sites of each row, with taps below "points" or "coordinates" (`layers.Attention`)."""
        *rows, sites, width = y.shape
        named = Below(name and f"{name}/{which}")
        qkv = self.qkv[which](y).reshape(-1, sites, self.heads, 3, width // self.heads)
        q, k, v = (named(f"/{point}", qkv[..., i, :]) for i, point in enumerate(("queries", "keys", "values")))
        y = dot_product_attention(q, k, v, self.implementation, weights=named.asked(WEIGHTS))
        return self.project[which](y.reshape(*rows, sites, width))


def _waves(t: Float[Array, " batch"], features: int) -> Float[Array, "batch features"]:
    """Sines, then cosines, of 1000 t at geometric frequencies from 1 to 1e-4, both ends counted."""
    half = features // 2
    frequencies = jnp.exp(-math.log(1e4) / (half - 1) * jnp.arange(half, dtype=jnp.float32))
    angles = TIME_SCALE * t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
