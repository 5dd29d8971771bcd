"""Networks: Flax NNX modules for construction and the forward pass, pure functions for everything else.

module = DiT(shape=(8, 8, 1), symbols_in=18, symbols_out=17, width=128, depth=4, heads=4, rngs=nnx.Rngs(0))
apply, params = functional(module)
logits = apply(params, xt, t)            # (batch, 8, 8, 1, 17)
"""

from ddjax.denoisers import layers, outputs, taps
from ddjax.denoisers.conditions import Coherent, OverDraws, Pointed, ShownX1
from ddjax.denoisers.dit import DiT
from ddjax.denoisers.functional import Functional, from_linen, functional, functional_init
from ddjax.denoisers.given import nulls
from ddjax.denoisers.layers.blocks import stack_blocks, unstack_blocks
from ddjax.denoisers.logistic import TruncatedLogistic, truncated_logistic_logits
from ddjax.denoisers.text import TextTransformer
from ddjax.denoisers.times import SharedEarlyTimes

__all__ = [
    "Coherent",
    "DiT",
    "Functional",
    "OverDraws",
    "Pointed",
    "SharedEarlyTimes",
    "ShownX1",
    "TextTransformer",
    "TruncatedLogistic",
    "from_linen",
    "functional",
    "functional_init",
    "layers",
    "nulls",
    "outputs",
    "stack_blocks",
    "taps",
    "truncated_logistic_logits",
    "unstack_blocks",
]
