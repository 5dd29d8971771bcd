"""Transforms that a forward process is learned by: (parameters, x0, t) -> (F, k), see `processes.LearnedGaussian`.

    DiffEnc   Residual(network, NoiseShare(schedule))   F = x + sigma^2 y(x, t)     (Nielsen et al. 2024, their code)
    NDM       Residual(network)                          F = x + t y(x, t)           (Bartosh et al. 2023)
    NFDM      Residual(network of two outputs)           and k = t (1 - t) z(x, t)   (Bartosh et al. 2024, Gaussian F)

`network(parameters, x0, t)` is any function that does not mix examples; zeros are the identity.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ddjax.types import PyTree, Time, left_broadcast

X = Float[Array, "batch *sites"]


def identity(parameters: PyTree, x0: X, t: Time) -> tuple[X, None]:
    """F = x0, k = 0: plain Gaussian corruption."""
    return x0, None


def elapsed(t: Time) -> Time:
    """The clock itself: NDM's gate."""
    return t


@dataclasses.dataclass(frozen=True)
class NoiseShare:
    """sigma^2 / (alpha^2 + sigma^2), DiffEnc's gate."""

    schedule: Any

    def __call__(self, t: Time) -> Time:
        """The share of the noise in the variance of standardised data, from log-SNR."""
        return jax.nn.sigmoid(-self.schedule.log_snr(t))


@dataclasses.dataclass(frozen=True)
class Residual:
    """F = x0 + gate(t) y, and where the network gives a pair (y, z), k = t (1 - t) z.

    With a gate that is 0 at t = 0 the transform is the identity there, as a decoder without parameters needs it; k is 0
    at t = 1 as well.
    """

    network: Callable[[PyTree, X, Time], X | tuple[X, X]]
    gate: Callable[[Time], Time] = elapsed

    def __call__(self, parameters: PyTree, x0: X, t: Time) -> tuple[X, X | None]:
        """F and k at x0 and t `(batch,)`."""
        outputs = self.network(parameters, x0, t)
        shift, scale = outputs if isinstance(outputs, tuple) else (outputs, None)
        clean = x0 + left_broadcast(self.gate(t), x0) * shift
        return clean, None if scale is None else left_broadcast(t * (1.0 - t), x0) * scale


@dataclasses.dataclass(frozen=True)
class SiteNetwork:
    """The same small network at each site: (x0, t) -> `outputs` numbers through one layer of tanh.

    width: hidden units. outputs: 1 for a shift, 2 for a shift and a log-scale.
    """

    width: int = 32
    outputs: int = 1

    def __post_init__(self):
        if self.width < 1 or self.outputs not in (1, 2):
            raise ValueError(f"needs width >= 1 and outputs 1 or 2, got {self.width} and {self.outputs}")

    def initial(self, key: Key[Array, ""]) -> dict[str, Array]:
        """Parameters whose outputs are 0 everywhere."""
        keys = jax.random.split(key)
        inputs, bias = (
            jax.random.normal(k, shape) for k, shape in zip(keys, ((2, self.width), (self.width,)), strict=True)
        )
        return {"inputs": inputs, "bias": bias, "outputs": jnp.zeros((self.width, self.outputs))}

    def __call__(self, parameters: dict[str, Array], x0: X, t: Time) -> X | tuple[X, X]:
        """The outputs at each site."""
        features = jnp.stack([x0, jnp.broadcast_to(left_broadcast(t, x0), x0.shape).astype(x0.dtype)], axis=-1)
        hidden = jnp.tanh(features @ parameters["inputs"] + parameters["bias"])
        outputs = hidden @ parameters["outputs"] / self.width**0.5
        return outputs[..., 0] if self.outputs == 1 else (outputs[..., 0], outputs[..., 1])
