"""Masked (absorbing) corruption: a lost symbol becomes the mask.

    q(x_t | x) = alpha_t e_x + (1 - alpha_t) e_mask

(Austin et al. 2021; Shi et al. 2024, MD4; Sahoo et al. 2024, MDLM.) A revealed site is clean: its posterior is the
symbol shown, the reverse step keeps it ("carry-over"), and the network is only asked about masked sites, where
posterior and cavity are the same thing. All of this is by construction; the mask can never be predicted.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ddjax import random
from ddjax.categorical import bernoulli, categorical_where, log_or_floor
from ddjax.predictions import Prediction
from ddjax.processes.categorical import check_prediction, cross_entropy
from ddjax.processes.mixture import Mixture, PerSite, PerState, Tokens, gather
from ddjax.types import Keys, Time, left_broadcast


@dataclasses.dataclass(frozen=True)
class Reveal:
    """The reverse step: each masked site is revealed with probability `p`, and then shows a symbol from `logits`.

    Two draws, a coin and then a symbol. One joint draw over {stay masked, symbols} has the same law but
    loses the small probabilities of single symbols in float32 when steps are many.
    """

    mask: int
    xt: Tokens
    p: PerSite
    logits: PerState

    def sample(self, keys: Keys) -> Tokens:
        """One draw, one key per example."""
        coin_keys, symbol_keys = random.split(keys)
        reveal = bernoulli(coin_keys, self.p) & (self.xt == self.mask)
        return jnp.where(reveal, categorical_where(symbol_keys, self.logits, reveal), self.xt)

    def log_prob(self, x: Tokens) -> PerSite:
        """Log-probability of each site, nats (-1e30 for an impossible one)."""
        symbol = gather(jax.nn.log_softmax(self.logits), jnp.minimum(x, self.mask - 1))
        at_mask = jnp.where(x == self.mask, log_or_floor(1.0 - self.p), log_or_floor(self.p) + symbol)
        return jnp.where(self.xt == self.mask, at_mask, jnp.where(x == self.xt, 0.0, -1e30))


def left_over(expected: Array) -> Array:
    """An expected number of masks as a whole number; halves go down, and so does what rounding made of them."""
    return jnp.ceil(expected - 0.501).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Masked(Mixture):
    """q(x_t | x) = alpha_t e_x + (1 - alpha_t) e_mask, the mask being state `num_symbols`."""

    @property
    def num_states(self):
        """The symbols and the mask."""
        return self.num_symbols + 1

    @property
    def mask(self) -> int:
        """The mask's state, `num_symbols`."""
        return self.num_symbols

    @property
    def pi(self):
        """All mass on the mask."""
        return (jnp.arange(self.num_states) == self.mask).astype(float)

    def sample_noise(self, keys, t, shape):
        """Masks."""
        return jnp.full((keys.shape[0], *shape), self.mask, jnp.int32)

    def reverse(self, prediction: Prediction, xt: Tokens, s: Time, t: Time) -> Reveal:
        """Reveal each mask with probability (alpha_s - alpha_t) / (1 - alpha_t)."""
        if prediction.kind != "posterior":  # at masks, the only sites that are drawn, it is the cavity
            prediction = self.convert(prediction, "cavity", xt, t)
        check_prediction(prediction, prediction.kind, xt, self)
        return Reveal(self.mask, xt, self._revealed(xt, s, t), prediction.value)

    def _revealed(self, xt: Tokens, s: Time, t: Time) -> PerSite:
        s, t = (left_broadcast(jnp.asarray(v), xt) for v in (s, t))
        sigma_t = self.schedule.sigma(t)
        lost = sigma_t > 0  # at t = 0 there are no masks
        p = jnp.where(lost, (sigma_t - self.schedule.sigma(s)) / jnp.where(lost, sigma_t, 1.0), 0.0)
        return jnp.broadcast_to(p, xt.shape)

    def path_kl(self, x0: Tokens, prediction: Prediction, xt: Tokens, t: Time) -> PerSite:
        """-alpha' / (1 - alpha) times the cross-entropy at masked sites (Shi et al. 2024, eq. 5), nats per site."""
        at = left_broadcast(jnp.asarray(t), xt)
        weight = self.schedule.sigma_prime(at) / self.schedule.sigma(at)
        return jnp.where(xt == self.mask, weight * self.masked_nats(x0, prediction, xt, t), 0.0)

    def step_kl(self, x0: Tokens, prediction: Prediction, xt: Tokens, s: Time, t: Time) -> PerSite:
        """(alpha_s - alpha_t) / (1 - alpha_t) times the cross-entropy at masks (Shi et al. 2024, eq. 6)."""
        p = self._revealed(xt, s, t)
        return jnp.where(xt == self.mask, p * self.masked_nats(x0, prediction, xt, t), 0.0)

    def masked_nats(self, x0: Tokens, prediction: Prediction, xt: Tokens, t: Time) -> PerSite:
        """-log p(x_0^i | x_t), nats per site, right at masked sites, where posterior and cavity are one."""
        if prediction.kind != "posterior":
            prediction = self.convert(prediction, "cavity", xt, t)
        check_prediction(prediction, "posterior", xt, self)
        return cross_entropy(prediction.value, x0)

    def observe(self, keys: Keys, x0: Tokens, t: Time) -> Tokens:
        """An observed site shows its symbol at all times: the reverse process conditioned on it, exactly."""
        return x0

    def _to_posterior(self, prediction: Prediction, xt: Tokens, t: Time) -> PerState:
        shown = self._log_likelihood(xt, t)  # the same for every symbol at a mask
        return jax.nn.log_softmax(super()._to_posterior(prediction, xt, t) + shown)

    def convert(self, prediction: Prediction, kind: str, xt: Tokens, t: Time) -> Prediction:
        """As `Mixture.convert`; a posterior is the shown symbol wherever one is shown, whatever the network said."""
        converted = super().convert(prediction, kind, xt, t)
        return converted if kind != "posterior" else Prediction(self._to_posterior(converted, xt, t), kind)
