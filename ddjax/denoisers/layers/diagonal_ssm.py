"""Diagonal state spaces (S4D): a linear recurrence with fixed coefficients, as one long convolution."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Complex, Float

from ddjax.denoisers.layers.basic import at_least_float32


def diagonal_kernel(
    step: Float[Array, " features"],
    decay: Complex[Array, "features modes"],
    read: Complex[Array, "features modes"],
    sites: int,
) -> Float[Array, "sites features"]:
    """`2 Re sum_n read_n (exp(step decay_n) - 1) / decay_n exp(step decay_n l)` for l from 0 to sites - 1.

    (Gu et al. 2022, "On the parameterization and initialization of diagonal state space models", equation 4: zero-order
    hold, one of each pair of conjugate modes, B = 1.)
    """
    rate = step[:, None] * decay
    powers = jnp.exp(rate[None] * jnp.arange(sites)[:, None, None])
    return 2 * jnp.einsum("fn,lfn->lf", read * jnp.expm1(rate) / decay, powers).real


class DiagonalSSM(nnx.Module):
    """S4D (Gu et al. 2022): each feature by itself is convolved with a kernel of `state` numbers, all sites long.

    `y = kernel * x + direct x`, from the first site to the last. state: even: half of them are free, the others their
    conjugates. It starts as S4D-Lin, with steps between 1e-3 and 0.1. Fourier transforms in at least float32.
    """

    def __init__(self, features: int, *, state: int = 64, rngs: nnx.Rngs):
        if state < 2 or state % 2:
            raise ValueError(f"state={state}: expected an even number, of conjugate pairs")
        modes = (features, state // 2)
        uniform = jax.random.uniform(rngs.params(), (features,), minval=math.log(1e-3), maxval=math.log(0.1))
        self.log_step = nnx.Param(uniform)
        self.log_decay = nnx.Param(jnp.full(modes, math.log(0.5), jnp.float32))
        self.frequency = nnx.Param(jnp.asarray(np.broadcast_to(np.pi * np.arange(state // 2), modes), jnp.float32))
        self.read = nnx.Param(jax.random.normal(rngs.params(), (*modes, 2), jnp.float32) * 0.5**0.5)
        self.direct = nnx.Param(jax.random.normal(rngs.params(), (features,), jnp.float32))

    def __call__(self, x: Float[Array, "batch sites features"]) -> Float[Array, "batch sites features"]:
        """What the sites before tell each site, and itself; at least float32."""
        x = x.astype(at_least_float32(x.dtype))
        sites = x.shape[1]
        decay = jax.lax.complex(-jnp.exp(self.log_decay[...]), self.frequency[...])
        read = jax.lax.complex(self.read[..., 0], self.read[..., 1])
        kernel = diagonal_kernel(jnp.exp(self.log_step[...]), decay, read, sites)
        # Twice as long, so that the end does not meet the beginning.
        spectrum = jnp.fft.rfft(kernel, n=2 * sites, axis=0) * jnp.fft.rfft(x, n=2 * sites, axis=1)
        return jnp.fft.irfft(spectrum, n=2 * sites, axis=1)[:, :sites] + self.direct[...] * x
