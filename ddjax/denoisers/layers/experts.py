"""A mixture of experts in the place of a block's MLP."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ddjax import auxiliary
from ddjax.denoisers.layers.basic import DType, GatedMLP, Initializer, Linear, at_least_float32, xavier
from ddjax.placement import constrain


class ExpertMLPs(nnx.Module):
    """`experts` gated MLPs, and `shared` more that are used by all sites: what layers of experts have in common."""

    def __init__(
        self, width: int, hidden: int, *, experts: int, shared: int, dtype: DType = jnp.float32, rngs: nnx.Rngs
    ):
        self.experts, self.dtype = experts, jnp.dtype(dtype)
        self.gate = nnx.Param(each(xavier, rngs, experts, width, hidden))
        self.up = nnx.Param(each(xavier, rngs, experts, width, hidden))
        self.down = nnx.Param(each(xavier, rngs, experts, hidden, width))
        self.shared = GatedMLP(width, shared * hidden, dtype=dtype, rngs=rngs) if shared else None

    def run(self, sent: Float[Array, "experts *any width"]) -> Float[Array, "experts *any width"]:
        """Each expert on what it is sent."""
        gate, up, down = (w[...].astype(self.dtype) for w in (self.gate, self.up, self.down))
        opened = jnp.einsum("e...d,edh->e...h", sent, gate), jnp.einsum("e...d,edh->e...h", sent, up)
        return jnp.einsum("e...h,ehd->e...d", jax.nn.silu(opened[0]) * opened[1], down)

    def with_shared(self, y: Array, x: Array) -> Array:
        """What the chosen experts said, and the shared ones."""
        return y if self.shared is None else y + self.shared(x)


class Experts(ExpertMLPs):
    """`experts` gated MLPs, of which each site uses `top_k`, weighed by the router, and `shared` that all use.

    (Shazeer et al. 2017; capacity and balance: Lepikhin et al. 2021, GShard, and Fedus et al. 2022, Switch, equations
    3 to 6; shared experts: Dai et al. 2024, DeepSeekMoE.) The router's softmax, in float32, gives each site a
    probability of each expert; the largest `top_k`, over their sum, weigh the outputs (without `normalised`
    as they are: Fei et al. 2024, DiT-MoE).

    An expert takes at most `ceil(capacity * sites * top_k / experts)` sites of an example: first choices come first,
    and among equal choices earlier sites; what is left over goes past it. Everything is counted within an example,
    which so never depends on its batch, on microbatches, or on the devices.

    In training it adds the loss `balance * experts * sum_e f_e p_e` of each example, f_e the share of choices that
    fall on e before capacity and p_e the mean probability: `balance` where all are used alike. It reports that sum as
    `expert_balance`, and `expert_dropped`, the share of choices beyond capacity. All three are means over layers
    (DiT-MoE adds the losses of layers up).

    Args:
        width, hidden: of each expert.
        experts, top_k, shared: see above.
        capacity: over an equal share; `experts / top_k` or more drops nothing.
        balance: weight of that loss.
        balance_over: "example", or "batch" (DiT-MoE's): f and p are then means over the batch, of all devices (theirs
            has one of each device) but of one microbatch: experts may specialise in examples.
        normalised: whether a site's weights sum to 1.

    Raises:
        ValueError: for numbers that cannot be.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        experts: int = 8,
        top_k: int = 2,
        shared: int = 0,
        capacity: float = 1.25,
        balance: float = 0.01,
        balance_over: str = "example",
        normalised: bool = True,
        dtype: DType = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if not 1 <= top_k <= experts or shared < 0 or not capacity > 0 or not balance >= 0:
            raise ValueError(
                f"experts={experts}, top_k={top_k}, shared={shared}, capacity={capacity}, balance={balance}: expected "
                "1 <= top_k <= experts, no negative number, and a capacity above 0"
            )
        if balance_over not in ("example", "batch"):
            raise ValueError(f'balance_over={balance_over!r}: expected "example" or "batch"')
        self.top_k, self.capacity, self.normalised = top_k, capacity, normalised
        self.balance, self.balance_over = balance, balance_over
        self.router = Linear(width, experts, bias=False, rngs=rngs)
        super().__init__(width, hidden, experts=experts, shared=shared, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "batch sites width"]) -> Float[Array, "batch sites width"]:
        """Apply to each site."""
        probabilities = jax.nn.softmax(self.router(x), axis=-1)
        weights, chosen = jax.lax.top_k(probabilities, self.top_k)
        weights = weights / weights.sum(axis=-1, keepdims=True) if self.normalised else weights
        room = min(x.shape[1], math.ceil(self.capacity * x.shape[1] * self.top_k / self.experts))
        combine = routes(weights, chosen, self.experts, room).astype(at_least_float32(self.dtype))
        self._tell(probabilities, chosen, combine)

        x = x.astype(self.dtype)
        sent = jnp.einsum("bsec,bsd->ebcd", (combine > 0).astype(self.dtype), x)
        # Two constraints: first each device sorts its own rows, then rows and experts change places (all-to-all).
        sent = constrain(sent, None, "batch", None, None)
        sent = constrain(sent, "experts", "rows of experts", None, None)
        back = constrain(self.run(sent), "experts", "rows of experts", None, None)
        back = constrain(back, None, "batch", None, None)
        return self.with_shared(jnp.einsum("bsec,ebcd->bsd", combine.astype(self.dtype), back), x)

    def _tell(self, probabilities: Array, chosen: Array, combine: Array) -> None:
        choices = chosen.shape[1] * self.top_k
        share = jax.nn.one_hot(chosen, self.experts, dtype=probabilities.dtype).sum(axis=(1, 2)) / choices
        probable = probabilities.mean(axis=1)
        if self.balance_over == "batch":
            share, probable = (jnp.broadcast_to(v.mean(axis=0), v.shape) for v in (share, probable))
        balance = self.experts * (share * probable).sum(axis=-1)
        auxiliary.add_loss("expert_balance_loss", self.balance * balance)
        auxiliary.report("expert_balance", balance)
        auxiliary.report("expert_dropped", 1 - (combine > 0).sum(axis=(1, 2, 3)) / choices)


def routes(
    weights: Float[Array, "batch sites k"], chosen: Int[Array, "batch sites k"], experts: int, room: int
) -> Float[Array, "batch sites experts room"]:
    """The weight with which a site has each place of each expert: that of its choice, or 0.

    Places are given to all first choices in the order of the sites, then to all second ones, and so on.
    """
    batch, sites, k = chosen.shape
    ranked = jnp.swapaxes(chosen, 1, 2).reshape(batch, k * sites)  # first choices first
    wanted = jax.nn.one_hot(ranked, experts, dtype=jnp.int32)
    before = ((jnp.cumsum(wanted, axis=1) - 1) * wanted).sum(axis=-1).reshape(batch, k, sites)
    wanted = wanted.reshape(batch, k, sites, experts).astype(weights.dtype)
    place = jax.nn.one_hot(before, room, dtype=weights.dtype)  # zeros where as many as there is room for came before
    return jnp.einsum("bsk,bkse,bksc->bsec", weights, wanted, place)


def each(init: Initializer, rngs: nnx.Rngs, experts: int, features_in: int, features_out: int) -> Array:
    """The initial matrices of all experts, each drawn by itself."""
    keys = jax.random.split(rngs.params(), experts)
    return jax.vmap(lambda key: init(key, (features_in, features_out), jnp.float32))(keys)
