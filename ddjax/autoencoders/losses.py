"""What trains the autoencoder of latent diffusion: pixels, LPIPS, the KL term, and a discriminator of patches."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ddjax import random
from ddjax.autoencoders.discriminator import PatchGAN
from ddjax.autoencoders.kl import KLAutoencoder
from ddjax.autoencoders.perceptual import Perceptual
from ddjax.denoisers.functional import Functional, functional_init
from ddjax.types import Params, Rows

STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class KLObjective:
    """The loss of Rombach et al. 2022 (CompVis/latent-diffusion, `LPIPSWithDiscriminator`), of an autoencoder.

    For images x, latents z ~ q(z | x) and reconstructions y, sums over pixels and means over examples:

        |x - y| + perceptual LPIPS(x, y), over exp(s), plus s at each value; + kl KL(q || N(0, 1)) - d mean D(y)

    s is learned; d is `adversarial` times the ratio of the lengths of the gradients of both parts in the decoder's last
    kernel, up to 1e4, so that they pull alike. D is trained at once, by half of the sum of mean relu(1 - D(x)) and mean
    relu(1 + D(y)). One loss holds all of it: no part's gradient reaches the parameters of the other.

    It is a pytree, the weights of the perceptual loss its leaves: inputs of a compiled step (`make_train_step`).

    perceptual_loss: None for none. perceptual, kl, adversarial: weights; adversarial 0 leaves the discriminator alone.
    width, layers: of the discriminator.
    """

    autoencoder: KLAutoencoder = dataclasses.field(metadata=STATIC)
    perceptual_loss: Perceptual | None = None
    perceptual: float = dataclasses.field(default=1.0, metadata=STATIC)
    kl: float = dataclasses.field(default=1e-6, metadata=STATIC)
    adversarial: float = dataclasses.field(default=0.5, metadata=STATIC)
    width: int = dataclasses.field(default=64, metadata=STATIC)
    layers: int = dataclasses.field(default=3, metadata=STATIC)

    def init(self, key: Key[Array, ""]) -> Params:
        """Parameters: "autoencoder", "discriminator", and "log_variance", s."""
        keys = jax.random.split(key)
        return {
            "autoencoder": self.autoencoder.init(keys[0]),
            "discriminator": self._discriminator.init(keys[1]),
            "log_variance": jnp.zeros(()),
        }

    def __call__(
        self,
        key: Key[Array, ""],
        apply: Any,
        params: Params,
        x0: Float[Array, "batch H W C"],
        cond: Any = None,
        weights: Any = None,
        rows: Rows | None = None,
        train: bool = True,
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        """For `training.make_train_step`; `apply` is not used. Raises ValueError for weights."""
        if weights is not None:
            raise ValueError("an autoencoder has no weights for its examples: leave out weights")
        own, s = params["autoencoder"], params["log_variance"]
        keys = random.example_keys(key, jnp.arange(x0.shape[0]) if rows is None else rows.index)
        posterior = self.autoencoder.posterior(own, x0)
        z = posterior.sample(keys)

        def likelihood(y: Array) -> Array:
            error = jnp.sum(jnp.abs(x0 - y), axis=(1, 2, 3))
            if self.perceptual_loss is not None:
                # Added at each value of the image, as theirs is.
                error = error + self.perceptual * self.perceptual_loss(x0, y) * x0[0].size
            return jnp.mean(error / jnp.exp(s) + s * x0[0].size)

        y = self.autoencoder.decode(own, z)
        negative, kl = likelihood(y), jnp.mean(posterior.kl())
        loss, metrics = negative + self.kl * kl, {"reconstruction": jnp.mean(jnp.abs(x0 - y)), "kl": kl}
        if self.adversarial:
            frozen = jax.lax.stop_gradient(params["discriminator"])
            fooled = lambda y: -jnp.mean(self._discriminator.apply(frozen, y, None))  # noqa: E731
            weight = self._weight(own, z, likelihood, fooled)
            real, fake = (
                self._discriminator.apply(params["discriminator"], jax.lax.stop_gradient(v), None) for v in (x0, y)
            )
            hinge = 0.5 * (jnp.mean(jax.nn.relu(1.0 - real)) + jnp.mean(jax.nn.relu(1.0 + fake)))
            loss = loss + weight * fooled(y) + hinge
            metrics |= {"discriminator": hinge, "adversarial_weight": weight}
        return loss, metrics

    @property
    def _discriminator(self) -> Functional:
        return _discriminator(self.autoencoder.shape[2], self.width, self.layers)

    def _weight(self, own: Params, z: Array, likelihood: Any, fooled: Any) -> Float[Array, ""]:
        """How much the discriminator counts beside the likelihood."""
        own, z = jax.lax.stop_gradient((own, z))

        def length(of: Any) -> Array:
            def by_kernel(kernel: Array) -> Array:
                decoder = own["decoder"] | {"out": own["decoder"]["out"] | {"kernel": kernel}}
                return of(self.autoencoder.decode(own | {"decoder": decoder}, z))

            return jnp.linalg.norm(jax.grad(by_kernel)(own["decoder"]["out"]["kernel"]).ravel())

        ratio = length(likelihood) / (length(fooled) + 1e-4)
        return jax.lax.stop_gradient(self.adversarial * jnp.clip(ratio, 0.0, 1e4))


@functools.cache
def _discriminator(channels: int, width: int, layers: int) -> Functional:
    """Traced once for each architecture."""
    return functional_init(lambda rngs: PatchGAN(channels, width=width, layers=layers, rngs=rngs))
