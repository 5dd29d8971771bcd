"""Norms whose scale and shift depend on the time, at hardly any parameters (TD-LN)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ddjax.denoisers.layers.basic import at_least_float32, layer_norm


class TimeVector(nnx.Module):
    """A vector of each time, `data + (noise - data) sigmoid(slope (2 t - 1) + offset)`, entry by entry.

    (Liu et al. 2024, "Alleviating distortion in image generation via multi-resolution diffusion models", section 3.2.)
    `data` and `noise` are what it tends to at either end; both start at `value`, `slope` at 1 and `offset` at 0.
    """

    def __init__(self, width: int, value: float):
        self.data, self.noise = (nnx.Param(jnp.full((width,), value, jnp.float32)) for _ in range(2))
        self.slope, self.offset = (nnx.Param(jnp.full((width,), v, jnp.float32)) for v in (1.0, 0.0))

    def __call__(self, t: Float[Array, " batch"]) -> Float[Array, "batch width"]:
        """For each time in [0, 1]."""
        share = jax.nn.sigmoid((2 * t[:, None] - 1) * self.slope[...] + self.offset[...])
        return self.data[...] + (self.noise[...] - self.data[...]) * share


class TimeNorm(nnx.Module):
    """Layer normalisation over the last axis whose scale and shift are a `TimeVector` each (TD-LN).

    In the place of adaLN's layer, cond x 2 width parameters, there are 8 width. `center=False`: a root mean square
    norm, without the mean and without a shift, as in the authors' blocks (qihao067/DiMR, TDRMSNorm).
    """

    def __init__(self, width: int, *, center: bool = True, epsilon: float = 1e-5):
        self.epsilon = epsilon
        self.scale = TimeVector(width, 1.0)
        self.bias = TimeVector(width, 0.0) if center else None

    def __call__(self, x: Float[Array, "batch *sites width"], t: Float[Array, " batch"]) -> Array:
        """Of each site, at its example's time; the result is at least float32."""
        of_all = lambda v: v.reshape(len(v), *(1,) * (x.ndim - 2), -1)  # noqa: E731
        scale = of_all(self.scale(t))
        if self.bias is not None:
            return layer_norm(x, self.epsilon) * scale + of_all(self.bias(t))
        x = x.astype(at_least_float32(x.dtype))
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon) * scale
