"""Discretised truncated logistic outputs for ordinal symbols: two numbers per site for K logits.

p(k) ∝ F((c_k + w/2 - loc) / scale) - F((c_k - w/2 - loc) / scale),  F the logistic function, c_k = 2 k / (K - 1) - 1,
w = 2 / (K - 1): the tails beyond the first and last symbol are cut off (Austin et al. 2021, appendix A.8).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddjax.types import Apply, SoftTokens


def truncated_logistic_logits(
    loc: Float[Array, "*sites"], log_scale: Float[Array, "*sites"], num_symbols: int
) -> Float[Array, "*sites symbols"]:
    """Log-probabilities; the scale is exp(log_scale - 2), so that 0 is a reasonable width.

    F(b) - F(a) = F(b) F(-a) (1 - exp(a - b)), and b - a is the same for all symbols: a sum of two logarithms and no
    difference. log_scale counts up to 30 either way.
    """
    if num_symbols < 2:
        raise ValueError(f"num_symbols must be at least 2, got {num_symbols}")
    sharpness = jnp.exp(2.0 - jnp.clip(log_scale, -30.0, 30.0))[..., None]
    away = jnp.linspace(-1.0, 1.0, num_symbols, dtype=sharpness.dtype) - loc[..., None]
    half = 1.0 / (num_symbols - 1)
    upper, lower = sharpness * (away + half), sharpness * (away - half)
    return jax.nn.log_softmax(jax.nn.log_sigmoid(upper) + jax.nn.log_sigmoid(-lower))


@dataclasses.dataclass(frozen=True)
class TruncatedLogistic:
    """A network with two numbers per site, `(batch, *sites, 2)`, as one with logits over `num_symbols`.

    The first is added to the symbol that the site shows, scaled to [-1, 1], and put through tanh: the centre. The
    second is the log-scale. Symbols beyond the last (a mask) show as the middle.
    """

    network: Apply
    num_symbols: int

    def __call__(self, params, xt, t, cond=None, **options):
        """Logits `(batch, *sites, num_symbols)`."""
        if isinstance(xt, SoftTokens):
            raise ValueError("TruncatedLogistic looks at the symbol that a site shows: give hard tokens, not soft ones")
        outputs = self.network(params, xt, t, cond, **options)
        if outputs.shape != (*xt.shape, 2):
            raise ValueError(f"TruncatedLogistic needs outputs {(*xt.shape, 2)}, got {outputs.shape}")
        outputs = outputs.astype(jnp.promote_types(outputs.dtype, jnp.float32))
        shown = 2.0 * xt.astype(outputs.dtype) / (self.num_symbols - 1) - 1.0
        shown = jnp.where(xt < self.num_symbols, shown, 0.0)
        return truncated_logistic_logits(jnp.tanh(outputs[..., 0] + shown), outputs[..., 1], self.num_symbols)


__all__ = ["TruncatedLogistic", "truncated_logistic_logits"]
