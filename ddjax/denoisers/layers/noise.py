"""Time, label and latent as one conditioning vector, as the published U-Nets and MD4 have it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ddjax.denoisers.given import Given
from ddjax.denoisers.layers.basic import Linear
from ddjax.denoisers.layers.embed import check_labels, check_time, check_vector, lookup
from ddjax.denoisers.unet_designs import UNetDesign


class NoiseConditioner(nnx.Module):
    """Time, label and latent to one conditioning vector, in float32: waves of the time, and two layers.

    `time_out(silu(time_in(waves))) + labels[label]` with silu around it; or the label is added to the waves, as
    `labels[label] sqrt(num_classes) + label_bias`; or it stands beside them. The null label adds nothing to either sum,
    and zeros beside the waves. A latent is added to the waves. An untimed network has a learned vector in the place of
    the waves. A vector that is a condition is added, without a bias, to what the two layers give (as unCLIP's embedding
    of an image, Ramesh et al. 2022, section 2.1): zeros add nothing.
    """

    def __init__(
        self,
        width: int,
        design: UNetDesign,
        *,
        num_classes: int,
        latent: int = 0,
        vector: int = 0,
        time: bool,
        time_scale: float,
        rngs: nnx.Rngs,
    ):
        if num_classes < 0:
            raise ValueError(f"num_classes={num_classes}: expected 0 (no labels) or more")
        features, hidden = design.time_multiple * width, 4 * width
        if features % 2 or features < 4:
            raise ValueError(f"width={width}: the waves of the time need an even number of features, 4 or more")
        self.time, self.time_scale, self.num_classes, self.design = time, time_scale, num_classes, design
        normal = jax.nn.initializers.normal()  # of standard deviation 0.01
        self.constant = None if time else nnx.Param(normal(rngs.params(), (features,), jnp.float32))
        self.frequencies = (  # fixed: they get no gradient
            nnx.Param(16.0 * jax.random.normal(rngs.params(), (features // 2,), jnp.float32))
            if time and design.time == "fourier"
            else None
        )
        self.features = features
        beside = features if num_classes and design.labels == "beside" else 0
        self.time_in = Linear(features + beside, hidden, rngs=rngs)
        self.time_out = Linear(hidden, design.cond_multiple * width, rngs=rngs)
        self.latent = Linear(latent, features, bias=False, rngs=rngs) if latent else None
        at_input = design.labels == "input"
        size = design.cond_multiple * width if design.labels == "output" else features
        self.labels = nnx.Param(normal(rngs.params(), (num_classes, size), jnp.float32)) if num_classes else None
        self.label_bias = nnx.Param(jnp.zeros((size,), jnp.float32)) if num_classes and at_input else None
        self.vector = Linear(vector, design.cond_multiple * width, bias=False, rngs=rngs) if vector else None

    def __call__(
        self, batch: int, t: Array | None, cond: Any, sites: int | None = None
    ) -> Float[Array, "batch *sites width"]:
        """The vector of each example. `t` is `()` or `(batch,)`; `cond` int `(batch,)`, None (null), or `Given`'s dict.

        sites: where given, `t` may also be `(batch, sites)`, and there is then a vector for each site.
        """
        given = Given.of(cond)
        given.check_taken(*("z",) * (self.latent is not None), *("vector",) * (self.vector is not None))
        z, labels = self._latent(given.z, batch), check_labels(given.cond, self.num_classes, batch)
        h = self.constant[...][None] if not self.time else self._waves(check_time(t, batch, sites))
        vectors = jnp.zeros(())
        if self.labels is not None:
            known = (labels != self.num_classes)[:, None]
            vectors = jnp.where(known, lookup(self.labels[...], labels), 0)
        if self.label_bias is not None:
            h, vectors = h + vectors * self.num_classes**0.5 + self.label_bias[...], jnp.zeros(())
        h = h if z is None else h + self.latent(z)
        h = jnp.broadcast_to(h, (batch, *h.shape[1:]))
        over_sites = (slice(None), *(None,) * (h.ndim - 2)) if vectors.ndim else ()
        if self.labels is not None and self.design.labels == "beside":
            vectors = jnp.broadcast_to(vectors[over_sites], h.shape)
            h, vectors, over_sites = jnp.concatenate([h, vectors], axis=-1), jnp.zeros(()), ()
        c = self.time_out(jax.nn.silu(self.time_in(h))) + vectors[over_sites]
        if self.vector is not None:
            told = self.vector(check_vector(given.vector, batch, self.vector.kernel.shape[0]))
            c = c + (told[:, None] if c.ndim == 3 else told)
        return jax.nn.silu(c) if self.design.cond_silu else c

    def _waves(self, t: Float[Array, "*batch"]) -> Float[Array, "*batch features"]:
        half = self.features // 2
        if self.frequencies is not None:
            frequencies = 2 * jnp.pi * jax.lax.stop_gradient(self.frequencies[...])
        else:
            steps = np.arange(half) / (half - self.design.endpoint)
            frequencies = jnp.asarray(10000.0**-steps, jnp.float32)
        angles = self.time_scale * t.astype(jnp.float32)[..., None] * frequencies
        pair = (jnp.cos(angles), jnp.sin(angles))
        return jnp.concatenate(pair if self.design.time == "cos_sin" else pair[::-1], axis=-1)

    def _latent(self, z: Array | None, batch: int) -> Array | None:
        if z is not None and z.shape != (batch, self.latent.kernel.shape[0]):
            expected = f'cond={{"z": ({batch}, {self.latent.kernel.shape[0]}) or None, "cond": labels or None}}'
            raise ValueError(f"the network knows a latent: expected {expected}, got a z of shape {z.shape}")
        return z
