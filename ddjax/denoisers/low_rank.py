"""The exact denoiser of a Gaussian law whose mean and low-rank covariance are learned."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from ddjax.denoisers.layers.basic import at_least_float32
from ddjax.denoisers.layers.embed import check_labels, check_time, lookup
from ddjax.denoisers.states import check_state
from ddjax.taps import tap


class LowRankGaussian(nnx.Module):
    """`E[x_0 | x_t]` under x_0 ~ N(m, F F' + s^2 I) and x_t = alpha x_0 + sigma noise, with learned m, F, s.

    By the Woodbury identity: with r = x_t - alpha m, v = alpha^2 s^2 + sigma^2 and k = alpha^2 F'F + v I it is
    `m + alpha (F k^-1 F'r + s^2 (r - alpha^2 F k^-1 F'r) / v)`. Trained, it finds the law's own mean and covariance as
    far as the rank goes (Li et al. 2024, "Understanding generalizability of diffusion models requires rethinking the
    hidden Gaussian structure", and Wang & Vastola 2023: what networks learn first, and do at high noise).

    Args:
        shape: of one example.
        rank: columns of F.
        schedule: has `alpha(t)` and `sigma(t)`: that of the process whose x_0 it predicts.
        num_classes: each label, and the null label `num_classes`, has a mean of its own; the covariance is shared.
        rngs: keys of the initial parameters.

    Raises:
        ValueError: for a rank beyond the dimension.
    """

    takes = "law"

    def __init__(self, *, shape: tuple[int, ...], rank: int, schedule: Any, num_classes: int = 0, rngs: nnx.Rngs):
        self.size = math.prod(shape)
        if not 0 <= rank <= self.size or num_classes < 0:
            raise ValueError(
                f"rank={rank}, num_classes={num_classes}: expected a rank up to {self.size}, and 0 or more"
            )
        self.shape, self.rank, self.schedule, self.num_classes = tuple(shape), rank, schedule, num_classes
        self.mean = nnx.Param(jnp.zeros((num_classes + 1, self.size), jnp.float32))
        scale = self.size**-0.5
        self.factor = nnx.Param(scale * jax.random.normal(rngs.params(), (self.size, rank), jnp.float32))
        self.log_rest = nnx.Param(jnp.zeros((), jnp.float32))  # log s

    def __call__(
        self,
        xt: Float[Array, batch * sites],
        t: Float[Array, " batch"] | Float[Array, ""],
        cond: Int[Array, " batch"] | None = None,
        *,
        rng: Key[Array, ""] | Key[Array, " batch"] | None = None,
        train: bool = False,
    ) -> Float[Array, batch * sites]:
        """The mean of x_0, in at least float32; labels as in `DiT`. Raises ValueError for other shapes."""
        check_state(xt, (tuple(f"axis {i}" for i in range(len(self.shape))), self.shape), None)
        batch, dtype = xt.shape[0], at_least_float32(xt.dtype)
        t = check_time(t, batch, None)
        mean = lookup(self.mean[...], check_labels(cond, self.num_classes, batch)).astype(dtype)
        alpha, sigma = (f(t)[:, None].astype(dtype) for f in (self.schedule.alpha, self.schedule.sigma))
        factor, rest = self.factor[...].astype(dtype), jnp.exp(2 * self.log_rest[...]).astype(dtype)
        left = xt.reshape(batch, -1).astype(dtype) - alpha * mean
        v = alpha**2 * rest + sigma**2
        inner = (alpha**2)[..., None] * (factor.T @ factor) + v[..., None] * jnp.eye(self.rank, dtype=dtype)
        explained = jnp.linalg.solve(inner, (left @ factor)[..., None])[..., 0] @ factor.T
        x0 = mean + alpha * (explained + rest * (left - alpha**2 * explained) / v)
        return tap("x0", x0.reshape(xt.shape))
