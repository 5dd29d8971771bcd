"""Linear layers, MLPs, normalisation and dropout."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from ddjax import random
from ddjax.placement import as_rows

DType = jax.typing.DTypeLike
Initializer = Callable[..., Array]
xavier = jax.nn.initializers.glorot_uniform()
zeros = jax.nn.initializers.zeros


def at_least_float32(dtype: DType) -> jnp.dtype:
    """The dtype of sums, softmax and logits: float32 for half precision, else the dtype itself."""
    return jnp.promote_types(dtype, jnp.float32)


class Linear(nnx.Module):
    """`x @ kernel + bias`: parameters float32, cast to `dtype` where they are used, sums kept in float32.

    `out_dtype` is the result's dtype (default `dtype`): float32 for logits.
    """

    def __init__(
        self,
        features_in: int,
        features_out: int,
        *,
        bias: bool = True,
        kernel_init: Initializer = xavier,
        dtype: DType = jnp.float32,
        out_dtype: DType | None = None,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(kernel_init(rngs.params(), (features_in, features_out), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((features_out,), jnp.float32)) if bias else None
        self.dtype = jnp.dtype(dtype)
        self.out_dtype = jnp.dtype(dtype if out_dtype is None else out_dtype)

    def __call__(self, x: Float[Array, "*batch in"]) -> Float[Array, "*batch out"]:
        """Apply to the last axis."""
        kernel = self.kernel[...].astype(self.dtype)
        rows = as_rows(x.astype(self.dtype))
        y = jnp.matmul(rows, kernel, preferred_element_type=self.out_dtype).reshape(*x.shape[:-1], kernel.shape[-1])
        return y if self.bias is None else y + self.bias[...].astype(self.out_dtype)


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": jax.nn.gelu,  # by a tanh
    "exact gelu": partial(jax.nn.gelu, approximate=False),
    "sigmoid": jax.nn.sigmoid,
}


def activation_of(name: str) -> Callable[[Array], Array]:
    """An activation by its name in `ACTIVATIONS`. Raises ValueError for another."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name!r}: expected one of {', '.join(map(repr, ACTIVATIONS))}")
    return ACTIVATIONS[name]


class MLP(nnx.Module):
    """Two layers with a GELU between, by default approximated by a tanh."""

    def __init__(
        self, width: int, hidden: int, *, approximate: bool = True, dtype: DType = jnp.float32, rngs: nnx.Rngs
    ):
        self.approximate = approximate
        self.up = Linear(width, hidden, dtype=dtype, rngs=rngs)
        self.down = Linear(hidden, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Apply to the last axis."""
        return self.down(jax.nn.gelu(self.up(x), approximate=self.approximate))


class GatedMLP(nnx.Module):
    """`down(activation(gate(x)) * up(x))` (Shazeer 2020, arXiv:2002.05202), by default SwiGLU, without biases.

    activation: of `ACTIVATIONS`; "silu" is SwiGLU, "gelu" GEGLU, "sigmoid" the GLU.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        activation: str = "silu",
        bias: bool = False,
        dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.activation = activation_of(activation)
        self.gate = Linear(width, hidden, bias=bias, dtype=dtype, rngs=rngs)
        self.up = Linear(width, hidden, bias=bias, dtype=dtype, rngs=rngs)
        self.down = Linear(hidden, width, bias=bias, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Apply to the last axis."""
        return self.down(self.activation(self.gate(x)) * self.up(x))


class LayerNorm(nnx.Module):
    """`layer_norm` with a scale and a shift of its own, or one or none of them (adaLN gives others)."""

    def __init__(self, width: int, *, scale: bool = True, bias: bool = True, epsilon: float = 1e-6):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32)) if scale else None
        self.bias = nnx.Param(jnp.zeros((width,), jnp.float32)) if bias else None

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Apply to the last axis; the result is at least float32."""
        x = layer_norm(x, self.epsilon)
        x = x if self.scale is None else x * self.scale[...]
        return x if self.bias is None else x + self.bias[...]


class RMSNorm(nnx.Module):
    """`x / sqrt(mean(x^2) + epsilon)` with a scale (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, *, epsilon: float = 1e-5):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Apply to the last axis; the result is at least float32."""
        x = x.astype(at_least_float32(x.dtype))
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon) * self.scale[...]


NORMS = {
    "plain": partial(LayerNorm, scale=False, bias=False),
    "scaled": partial(LayerNorm, bias=False),
    "affine": LayerNorm,
    "rms": RMSNorm,
}


def layer_norm(x: Float[Array, "*batch width"], epsilon: float = 1e-6) -> Float[Array, "*batch width"]:
    """Layer normalisation over the last axis without scale or shift, computed and returned in at least float32.

    adaLN supplies the scale and the shift, so an affine here would be redundant.
    """
    x = x.astype(at_least_float32(x.dtype))
    x = x - x.mean(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)


def make_norm(name: str, width: int, epsilon: float) -> LayerNorm | RMSNorm:
    """A normalisation by its name in `NORMS`. Raises ValueError for another."""
    if name not in NORMS:
        raise ValueError(f"norm={name!r}: expected one of {', '.join(map(repr, NORMS))}")
    return NORMS[name](width, epsilon=epsilon)


def modulate(
    x: Float[Array, "batch sites width"], shift: Array, scale: Array, norm: Callable[[Array], Array] = layer_norm
) -> Array:
    """`norm(x) (1 + scale) + shift` in at least float32, `shift` and `scale` as `per_site` takes them."""
    x = norm(x)
    shift, scale = (per_site(v, x.shape[1]).astype(x.dtype) for v in (shift, scale))
    return x * (1 + scale) + shift


def per_site(v: Float[Array, "batch *groups width"], sites: int) -> Array:
    """A vector of each example, or of each of its equal runs of consecutive sites, ready to meet the sites."""
    return v[:, None] if v.ndim == 2 else jnp.repeat(v, sites // v.shape[1], axis=1)


def dropout(x: Float[Array, "batch ..."], rate: float, keys: Key[Array, " batch"] | None) -> Array:
    """Zero a fraction `rate` of the entries and scale the others by `1 / (1 - rate)`; keeps the mean.

    keys: one key per example, so that an example's mask does not depend on its batch; None turns dropout off.
    """
    if keys is None or rate == 0:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def dropout_keys(
    rate: float, batch: int, rng: Key[Array, ""] | Key[Array, " batch"] | None, train: bool
) -> Key[Array, " batch"] | None:
    """Keys for `dropout`: None unless training with `rate > 0`; one key is folded with each row's index.

    Raises ValueError where a key is needed and missing, or is not a typed key of shape `()` or `(batch,)`.
    """
    return example_keys(batch, rng, f"dropout={rate}") if train and rate else None


def example_keys(batch: int, rng: Key[Array, ""] | Key[Array, " batch"] | None, what: str) -> Key[Array, " batch"]:
    """One key per example, of one key or of as many; `what` needs them. Raises ValueError as `dropout_keys` does."""
    if rng is None:
        raise ValueError(f"{what} with train=True needs a key: apply(..., rng=jax.random.key(0), train=True)")
    if not jnp.issubdtype(rng.dtype, jax.dtypes.prng_key):
        raise ValueError(f"rng has dtype {rng.dtype}; pass a typed key (jax.random.key, not jax.random.PRNGKey)")
    if rng.shape not in ((), (batch,)):
        raise ValueError(f"rng has shape {rng.shape}; pass one key () or one key per example ({batch},)")
    return random.example_keys(rng, batch) if rng.ndim == 0 else rng


def check_rate(rate: float) -> None:
    """Raise ValueError unless `0 <= rate < 1`."""
    if not 0 <= rate < 1:
        raise ValueError(f"dropout={rate}: expected a rate in [0, 1)")
