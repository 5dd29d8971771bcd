"""From an encoder's numbers to few values, and to tokens."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Quantised(NamedTuple):
    """What a quantiser makes of an encoder's numbers."""

    value: Float[Array, "batch *sites channels"]  # what the decoder sees; gradients pass as if it were z
    loss: Float[Array, ""]  # what it adds to the reconstruction's
    metrics: dict[str, Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class LookupFree:
    """Lookup-free quantisation: the code is the signs of the encoder's numbers, and a token its bits.

    (Yu et al. 2024, "Language Model Beats Diffusion: Tokenizer is Key to Visual Generation", section 3; the bits, the
    losses and their weights are those of Weber et al. 2024, "MaskBit", and its code, whose error is four times that of
    images in [0, 1]: what it is in [-1, 1].)

    Under q(c | z) = softmax(-|z - c|^2 / temperature) over all 2^bits codes c of 1 and -1, the bits are independent:
    q(c_i = 1 | z) = sigmoid(4 z_i / temperature). The loss is

        commitment * mean (z - sign z)^2 + entropy * (E H(q(. | z)) - H(E q(. | z)))

    with entropies in nats and expectations over all sites of the batch: each code is certain, and all codes are used.

    bits: of a code, the channels of the encoder's output.
    groups: channels of the tokens: each is the integer of bits / groups bits, the lowest first, as
        `denoisers.layers.TokenBits` reads them.
    joint: of how many bits the codes are enumerated together for H(E q), which alone is not a sum over bits; all unless
        given. Of fewer it is the sum over parts of so many bits, an upper bound: for codes of many bits.
    Raises ValueError for sizes that do not divide.
    """

    bits: int
    groups: int = 1
    commitment: float = 0.25
    entropy: float = 0.02
    temperature: float = 0.01
    joint: int | None = None

    def __post_init__(self):
        for name, divisor in (("groups", self.groups), ("joint", self.joint or self.bits)):
            if divisor < 1 or self.bits < 1 or self.bits % divisor:
                raise ValueError(f"{name}={divisor} does not divide bits={self.bits}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")

    @property
    def channels(self) -> int:
        """Numbers that it takes at each site."""
        return self.bits

    @property
    def num_symbols(self) -> int:
        """Values that a token takes."""
        return 2 ** (self.bits // self.groups)

    def __call__(self, z: Float[Array, "batch *sites bits"]) -> Quantised:
        """Signs, with the straight-through gradient; 0 counts as -1."""
        sign = jnp.where(z > 0, 1.0, -1.0).astype(z.dtype)
        value = z + jax.lax.stop_gradient(sign - z)
        each, mean = self.entropies(z)
        commitment = jnp.mean((z - sign) ** 2)
        loss = self.commitment * commitment + self.entropy * (each - mean)
        return Quantised(value, loss, {"commitment": commitment, "code_entropy": each, "used_entropy": mean})

    def entropies(self, z: Float[Array, "batch *sites bits"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """E H(q(. | z)) and H(E q(. | z)), nats."""
        odds = (4.0 / self.temperature) * z.reshape(-1, self.bits)
        log_one, log_zero = jax.nn.log_sigmoid(odds), jax.nn.log_sigmoid(-odds)
        each = -jnp.mean(jnp.sum(jnp.exp(log_one) * log_one + jnp.exp(log_zero) * log_zero, axis=1))
        joint = self.joint or self.bits
        codes = _bits(np.arange(2**joint), joint).T.astype(z.dtype)  # (joint, 2**joint)
        parts = [v.reshape(len(odds), -1, joint) for v in (log_one, log_zero)]
        mean = jnp.mean(jnp.exp(parts[0] @ codes + parts[1] @ (1.0 - codes)), axis=0)  # (parts, 2**joint)
        used = mean > 0  # entr's slope at 0, where a code's probability is rounded to, is infinite
        return each, -jnp.sum(jnp.where(used, mean * jnp.log(jnp.where(used, mean, 1.0)), 0.0))

    def tokens(self, value: Float[Array, "batch *sites bits"]) -> Int[Array, "batch *sites groups"]:
        """The integers of signs (or of any numbers with those signs)."""
        each = self.bits // self.groups
        ones = (value > 0).reshape(*value.shape[:-1], self.groups, each)
        return jnp.sum(ones * (1 << jnp.arange(each)), axis=-1, dtype=jnp.int32)

    def values(self, tokens: Int[Array, "batch *sites groups"]) -> Float[Array, "batch *sites bits"]:
        """The signs of tokens, float32."""
        ones = _bits(tokens, self.bits // self.groups)
        return (2.0 * ones - 1.0).astype(jnp.float32).reshape(*tokens.shape[:-1], self.bits)


def _bits(numbers: Array, count: int) -> Array:
    """0 or 1, the lowest first, on a last axis."""
    return numbers[..., None] >> np.arange(count) & 1
