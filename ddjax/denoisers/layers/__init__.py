"""Layers: small NNX modules and pure functions with explicit dtypes, keys and `train` flags."""

from ddjax.denoisers.layers.attention import (
    Attention,
    Layout,
    dot_product_attention,
    group_causal,
    group_teacher_forced,
    rope,
)
from ddjax.denoisers.layers.basic import MLP, GatedMLP, Linear, dropout, layer_norm, modulate
from ddjax.denoisers.layers.blocks import Block, FinalLayer, Stack, stack_blocks, unstack_blocks
from ddjax.denoisers.layers.cross import CrossAttention
from ddjax.denoisers.layers.embed import (
    Conditioner,
    TokenBits,
    TokenEmbed,
    lookup,
    sincos,
    sincos_2d,
    time_embedding,
)
from ddjax.denoisers.layers.experts import Experts
from ddjax.denoisers.layers.pooled_experts import PooledExperts

__all__ = [
    "MLP",
    "Attention",
    "Block",
    "Conditioner",
    "CrossAttention",
    "Experts",
    "FinalLayer",
    "GatedMLP",
    "Layout",
    "Linear",
    "PooledExperts",
    "Stack",
    "TokenBits",
    "TokenEmbed",
    "dot_product_attention",
    "dropout",
    "group_causal",
    "group_teacher_forced",
    "layer_norm",
    "lookup",
    "modulate",
    "rope",
    "sincos",
    "sincos_2d",
    "stack_blocks",
    "time_embedding",
    "unstack_blocks",
]
