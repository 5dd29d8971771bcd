"""Selective state spaces: a linear recurrence whose coefficients depend on the input, in both directions."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from ddjax.denoisers.layers.basic import DType, Linear, at_least_float32
from ddjax.placement import constrain


def selective_scan(
    x: Float[Array, "batch sites features"],
    step: Float[Array, "batch sites features"],
    decay: Float[Array, "features state"],
    write: Float[Array, "batch sites state"],
    read: Float[Array, "batch sites state"],
) -> Float[Array, "batch sites features"]:
    """`y_n = h_n read_n` with `h_n = exp(step_n decay) h_(n-1) + step_n x_n write_n` and h = 0 before the first site.

    (Gu & Dao 2023, "Mamba", algorithm 2, A, B, C, Delta being decay, write, read, step.) Each feature has a state of
    its own. It runs site by site, in at least float32: of `(batch, features, state)` numbers a site, gradients keep one
    array and compute the rest again, where a parallel scan writes tens of them.
    """
    x, step, decay, write, read = (v.astype(at_least_float32(v.dtype)) for v in (x, step, decay, write, read))

    @jax.checkpoint
    def one(h: Float[Array, "batch state features"], site: tuple[Array, ...]) -> tuple[Array, Array]:
        x, step, write, read = site
        h = jnp.exp(step[:, None] * decay.T) * h + (step * x)[:, None] * write[..., None]
        return h, (h * read[..., None]).sum(axis=1)

    sites = [jnp.moveaxis(v, 1, 0) for v in (x, step, write, read)]
    h = jnp.zeros((len(x), *decay.T.shape), x.dtype)
    return jnp.moveaxis(jax.lax.scan(one, h, tuple(sites))[1], 0, 1)


class Direction(nnx.Module):
    """One direction of `Mamba`: a causal depthwise convolution, silu, and a selective scan of the result.

    state: numbers of each feature's state. rank: of the matrix that gives the step. kernel: length of the convolution.
    """

    def __init__(
        self, features: int, *, state: int, rank: int, kernel: int, dtype: DType = jnp.float32, rngs: nnx.Rngs
    ):
        self.state, self.rank, self.dtype = state, rank, jnp.dtype(dtype)
        bound = kernel**-0.5
        self.conv = nnx.Param(jax.random.uniform(rngs.params(), (kernel, features), jnp.float32, -bound, bound))
        self.conv_bias = nnx.Param(jnp.zeros((features,), jnp.float32))
        self.select = Linear(features, rank + 2 * state, bias=False, dtype=dtype, rngs=rngs)
        self.step = Linear(
            rank, features, kernel_init=_uniform, dtype=dtype, out_dtype=at_least_float32(dtype), rngs=rngs
        )
        # Steps between 1e-3 and 0.1, evenly in their logarithm.
        steps = jnp.exp(jax.random.uniform(rngs.params(), (features,), minval=math.log(1e-3), maxval=math.log(0.1)))
        self.step.bias[...] = jnp.log(jnp.expm1(steps))
        self.log_decay = nnx.Param(jnp.log(jnp.tile(jnp.arange(1.0, state + 1), (features, 1))))
        self.direct = nnx.Param(jnp.ones((features,), jnp.float32))

    def __call__(self, x: Float[Array, "batch sites features"]) -> Float[Array, "batch sites features"]:
        """From the first site to the last; at least float32."""
        weights, sites = self.conv[...].astype(self.dtype), x.shape[1]
        padded = jnp.pad(x, [(0, 0), (len(weights) - 1, 0), (0, 0)])
        x = sum(weights[i] * padded[:, i : i + sites] for i in range(len(weights)))
        x = jax.nn.silu(x + self.conv_bias[...].astype(self.dtype))
        rank, write, read = jnp.split(self.select(x), [self.rank, self.rank + self.state], axis=-1)
        step = jax.nn.softplus(self.step(rank))
        y = selective_scan(x, step, -jnp.exp(self.log_decay[...]), write, read)
        return y + self.direct[...] * x


class Mamba(nnx.Module):
    """The mixer of Gu & Dao 2023, "Mamba", in both directions (Zhu et al. 2024, "Vision Mamba", algorithm 1).

    A site's features are widened `expand` times and run through a `Direction` of each kind, last site first in the
    second; their sum, times the silu of as many other features of the site, is projected back.

    state, kernel: see `Direction`; its rank is width / 16, rounded up. both: whether there is the second direction.
    """

    def __init__(
        self,
        width: int,
        *,
        state: int = 16,
        expand: int = 2,
        kernel: int = 4,
        both: bool = True,
        dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if state < 1 or expand < 1 or kernel < 1:
            raise ValueError(f"state={state}, expand={expand}, kernel={kernel}: expected at least 1 of each")
        inner, self.dtype = expand * width, jnp.dtype(dtype)
        options = {"state": state, "rank": -(-width // 16), "kernel": kernel, "dtype": dtype, "rngs": rngs}
        self.inner = Linear(width, 2 * inner, bias=False, dtype=dtype, rngs=rngs)
        self.onward = Direction(inner, **options)
        self.backward = Direction(inner, **options) if both else None
        self.outer = Linear(inner, width, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "batch sites width"]) -> Float[Array, "batch sites width"]:
        """What sites tell each other."""
        x, gate = jnp.split(constrain(self.inner(x), "batch", None, "hidden"), 2, axis=-1)
        y = self.onward(x)
        if self.backward is not None:
            y = y + self.backward(x[:, ::-1])[:, ::-1]
        return self.outer(y * jax.nn.silu(gate))


def _uniform(key: Key[Array, ""], shape: tuple[int, int], dtype: DType) -> Array:
    bound = shape[0] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)
