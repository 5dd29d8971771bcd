"""A latent z with `ones` ones among `bits` bits, and small networks from data to it and from it to a schedule.

    q(z) = exp(logits . z) / e_k(exp(logits)),    e_k the elementary symmetric polynomial of degree k = `ones`

(the k-subset law of Niepert et al. 2021, "Implicit MLE", that MuLAN's z ~ q(z | x0) has). Normaliser,
marginals, draws and the divergence from the uniform law are exact, in bits times ones operations.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from ddjax import random
from ddjax.categorical import categorical
from ddjax.types import Keys

Bits = Float[Array, "batch bits"]

_NEVER = -1e30  # in the place of -inf, whose differences have no gradient


@dataclasses.dataclass(frozen=True)
class Subsets:
    """The law above, for a batch of logits; `ones` of 1 makes it categorical."""

    logits: Bits
    ones: int = 1

    def __post_init__(self):
        bits = self.logits.shape[-1]
        if self.logits.ndim != 2 or not 0 < self.ones < bits:
            raise ValueError(
                f"a latent needs logits (batch, bits) and 0 < ones < bits, got {self.logits.shape} and ones={self.ones}"
            )

    def _tables(self) -> tuple[Array, Array]:
        """The log of e_j for j <= ones, of all bits, and of the bits after each, `(bits, batch, ones + 1)`."""
        none = jnp.full((self.logits.shape[0], self.ones + 1), _NEVER, self.logits.dtype).at[:, 0].set(0.0)

        def add(after, logit):
            taken = jnp.concatenate([none[:, 1:2], after[:, :-1] + logit[:, None]], axis=1)
            return jnp.logaddexp(after, taken), after

        return jax.lax.scan(add, none, self.logits.T, reverse=True)

    def log_normaliser(self) -> Float[Array, " batch"]:
        """The log of e_k(exp(logits))."""
        return self._tables()[0][:, -1]

    def marginals(self) -> Bits:
        """The probability of each bit: the gradient of the normaliser."""
        return jax.grad(lambda logits: Subsets(logits, self.ones).log_normaliser().sum())(self.logits)

    def log_prob(self, z: Bits) -> Float[Array, " batch"]:
        """The log of q(z), for z with `ones` ones."""
        return (self.logits * z).sum(-1) - self.log_normaliser()

    def kl_from_uniform(self) -> Float[Array, " batch"]:
        """KL(q || the same chance for every z), nats."""
        mean = (self.logits * self.marginals()).sum(-1)
        return mean - self.log_normaliser() + math.log(math.comb(self.logits.shape[-1], self.ones))

    def sample(self, keys: Keys) -> Bits:
        """Exact draws, one key per example: bit after bit, given how many ones are left. Has no gradient."""
        logits = jax.lax.stop_gradient(self.logits)
        after = Subsets(logits, self.ones)._tables()[1]

        def toss(left, inputs):
            i, logit, table = inputs
            without = jnp.take_along_axis(table, left[:, None], axis=1)
            taken = logit[:, None] + jnp.take_along_axis(table, jnp.maximum(left - 1, 0)[:, None], axis=1)
            odds = jnp.concatenate([without, jnp.where(left[:, None] > 0, taken, _NEVER)], axis=1)
            bit = categorical(random.fold_in(keys, i), odds)
            return left - bit, bit

        left = jnp.full(logits.shape[0], self.ones, jnp.int32)
        _, bits = jax.lax.scan(toss, left, (jnp.arange(logits.shape[1]), logits.T, after))
        return bits.T.astype(logits.dtype)

    def straight_through(self, z: Bits) -> Bits:
        """z, with the gradient of the marginals (Ahmed et al. 2023, "SIMPLE"): biased where z enters nonlinearly."""
        marginals = self.marginals()
        return z + marginals - jax.lax.stop_gradient(marginals)


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Data to the logits of a latent: one layer of tanh over all sites."""

    bits: int
    width: int = 64

    def initial(self, key: Key[Array, ""], shape: Sequence[int]) -> dict[str, Array]:
        """Parameters for examples of this shape; all logits are 0."""
        return {**_hidden(key, math.prod(shape), self.width), "outputs": jnp.zeros((self.width, self.bits))}

    def __call__(self, parameters: dict[str, Array], x0: Float[Array, batch * sites]) -> Bits:
        """Logits."""
        return _features(parameters, x0.reshape(x0.shape[0], -1)) @ parameters["outputs"]


@dataclasses.dataclass(frozen=True)
class Polynomials:
    """A latent to the coefficients of `schedules.PerSite`: one layer of tanh."""

    shape: tuple[int, ...]  # of one example
    width: int = 64

    def initial(self, key: Key[Array, ""], bits: int) -> dict[str, Array]:
        """Parameters: nearly straight lines of log-SNR, with ripples that tell the latents apart."""
        keys, sites = jax.random.split(key), math.prod(self.shape)
        lines = jnp.zeros((3, sites)).at[2].set(1.0)
        ripples = 0.1 / self.width**0.5 * jax.random.normal(keys[1], (self.width, 3 * sites))
        return {**_hidden(keys[0], bits, self.width), "outputs": ripples, "lines": lines.ravel()}

    def __call__(self, parameters: dict[str, Array], z: Bits) -> Float[Array, "3 batch *sites"]:
        """Coefficients (a, b, c)."""
        outputs = _features(parameters, z) @ parameters["outputs"] + parameters["lines"]
        return jnp.moveaxis(outputs.reshape(z.shape[0], 3, *self.shape), 1, 0)


def _hidden(key: Key[Array, ""], inputs: int, width: int) -> dict[str, Array]:
    if width < 1:
        raise ValueError(f"width must be positive, got {width}")
    return {"inputs": jax.random.normal(key, (inputs, width)) / inputs**0.5, "bias": jnp.zeros(width)}


def _features(parameters: dict[str, Array], x: Array) -> Array:
    return jnp.tanh(x @ parameters["inputs"] + parameters["bias"])


__all__ = ["Encoder", "Polynomials", "Subsets"]
