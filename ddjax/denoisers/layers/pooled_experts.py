"""Experts that choose sites from the whole batch while training, and by themselves afterwards (DiffMoE)."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ddjax import auxiliary
from ddjax.denoisers.layers.basic import DType, Linear, at_least_float32
from ddjax.denoisers.layers.experts import ExpertMLPs


class PooledExperts(ExpertMLPs):
    """`experts` gated MLPs, each of which takes the sites that want it most (Shi et al. 2025, DiffMoE, section 3).

    A router's softmax over experts, in float32, scores each site for each expert. In training the sites of the whole
    batch, of all its noise levels, are one pool: an expert takes its `floor(capacity * sites / experts)` best, and the
    output is the sum of what experts say, times their scores. So examples depend on their batch while training. The
    pool is that of all devices of a mesh (theirs is one of each device); microbatches are pools of their own.

    A small network learns beside it, from features without a gradient, which experts took a site (binary cross-entropy,
    `weight` times); and for each expert a threshold learns the quantile of its logits that as many sites exceed (by its
    quantile loss). When not training an expert takes the sites whose logit exceeds its threshold, at most `room` times
    an equal share of an example's, best first: an example does not depend on its batch, and hard ones may take more.

    It reports `expert_missed`, the share of training choices that thresholds would not have made, and adds
    `expert_capacity_loss` and `expert_threshold_loss`, means over layers.

    Args:
        width, hidden: of each expert.
        experts, capacity, shared: see above; `shared` MLPs are used by all sites.
        weight: of both losses, theirs 0.01.
        room: see above.

    Raises:
        ValueError: for numbers that cannot be.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        experts: int = 8,
        capacity: float = 1.0,
        shared: int = 0,
        weight: float = 0.01,
        room: float = 2.0,
        dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if not 0 < capacity < experts or shared < 0 or not weight >= 0 or not room > 0:
            raise ValueError(
                f"experts={experts}, capacity={capacity}, shared={shared}, weight={weight}, room={room}: expected "
                "0 < capacity < experts, no negative number, and room above 0"
            )
        self.capacity, self.weight, self.room = capacity, weight, room
        self.router = Linear(width, experts, bias=False, rngs=rngs)
        self.predictor_in = Linear(width, width, rngs=rngs)
        self.predictor_out = Linear(width, experts, rngs=rngs)
        share = capacity / experts
        self.threshold = nnx.Param(jnp.full((experts,), math.log(share / (1 - share)), jnp.float32))
        super().__init__(width, hidden, experts=experts, shared=shared, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "batch sites width"], train: bool = False) -> Float[Array, "batch sites width"]:
        """Apply to each site; `train`: of one pool."""
        batch, sites, width = x.shape
        scores = jax.nn.softmax(self.router(x), axis=-1)
        logits = self.predictor_out(jax.nn.silu(self.predictor_in(jax.lax.stop_gradient(x))))
        if train:
            kept = max(1, int(self.capacity * batch * sites / self.experts))
            weights, chosen = jax.lax.top_k(scores.reshape(-1, self.experts).T, kept)
            self._tell(logits, chosen)
            y = self._run(x.reshape(-1, width), weights, chosen).reshape(x.shape)
        else:
            kept = min(sites, math.ceil(self.room * self.capacity * sites / self.experts))
            wanted = jnp.where(logits > self.threshold[...], scores, 0)
            weights, chosen = jax.lax.top_k(jnp.swapaxes(wanted, 1, 2), kept)
            y = jax.vmap(self._run)(x, weights, chosen)
        return self.with_shared(y, x)

    def _run(self, x: Array, weights: Array, chosen: Array) -> Array:
        """Each expert at the sites that it chose, `(experts, kept)`, times its weights, and the sum."""
        back = self.run(x.astype(self.dtype)[chosen]).astype(at_least_float32(self.dtype)) * weights[..., None]
        return jnp.zeros(x.shape, back.dtype).at[chosen].add(back).astype(self.dtype)

    def _tell(self, logits: Array, chosen: Array) -> None:
        batch, sites, experts = logits.shape
        took = jnp.zeros((batch * sites, experts), logits.dtype).at[chosen, jnp.arange(experts)[:, None]].set(1)
        took = took.reshape(logits.shape)
        entropy = jnp.logaddexp(0, logits) - took * logits
        above = jax.lax.stop_gradient(logits) - self.threshold[...]
        level = 1 - self.capacity / experts
        quantile = jnp.maximum(level * above, (level - 1) * above)
        auxiliary.add_loss("expert_capacity_loss", self.weight * entropy.mean(axis=(1, 2)))
        auxiliary.add_loss("expert_threshold_loss", self.weight * quantile.mean(axis=(1, 2)))
        missed = (took * (above <= 0)).sum(axis=(1, 2)) * batch / took.sum()
        auxiliary.report("expert_missed", missed)
