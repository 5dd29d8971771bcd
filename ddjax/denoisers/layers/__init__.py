"""Layers: small NNX modules and pure functions with explicit dtypes, keys and `train` flags."""

from ddjax.denoisers.layers.attention import (
    Attention,
    Layout,
    dot_product_attention,
    group_causal,
    group_teacher_forced,
    rope,
    rope_2d,
)
from ddjax.denoisers.layers.basic import MLP, GatedMLP, LayerNorm, Linear, RMSNorm, dropout, layer_norm, modulate
from ddjax.denoisers.layers.blocks import Block, FinalLayer, Stack
from ddjax.denoisers.layers.convolution import (
    Conv,
    GroupNorm,
    Resampling,
    ResBlock,
    SpatialAttention,
    downsample,
    upsample,
)
from ddjax.denoisers.layers.cross import CrossAttention
from ddjax.denoisers.layers.diagonal_ssm import DiagonalSSM
from ddjax.denoisers.layers.efficient import MBConv, MultiScaleAttention
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
from ddjax.denoisers.layers.generated import GeneratedDepthwise, GeneratedLinear, GeneratedMLP, Generator
from ddjax.denoisers.layers.linear_attention import LinearAttention
from ddjax.denoisers.layers.long_skips import LongSkips
from ddjax.denoisers.layers.patch_transformer import PatchTransformer
from ddjax.denoisers.layers.pooled_experts import PooledExperts
from ddjax.denoisers.layers.selective_scan import Mamba, selective_scan
from ddjax.denoisers.layers.spatial_transformer import SpatialTransformer
from ddjax.denoisers.layers.stacking import stack_blocks, unstack_blocks
from ddjax.denoisers.layers.time_norm import TimeNorm, TimeVector

__all__ = [
    "MLP",
    "Attention",
    "Block",
    "Conditioner",
    "Conv",
    "CrossAttention",
    "DiagonalSSM",
    "Experts",
    "FinalLayer",
    "GatedMLP",
    "GeneratedDepthwise",
    "GeneratedLinear",
    "GeneratedMLP",
    "Generator",
    "GroupNorm",
    "LayerNorm",
    "Layout",
    "Linear",
    "LinearAttention",
    "LongSkips",
    "MBConv",
    "Mamba",
    "MultiScaleAttention",
    "PatchTransformer",
    "PooledExperts",
    "RMSNorm",
    "ResBlock",
    "Resampling",
    "SpatialAttention",
    "SpatialTransformer",
    "Stack",
    "TimeNorm",
    "TimeVector",
    "TokenBits",
    "TokenEmbed",
    "dot_product_attention",
    "downsample",
    "dropout",
    "group_causal",
    "group_teacher_forced",
    "layer_norm",
    "lookup",
    "modulate",
    "rope",
    "rope_2d",
    "selective_scan",
    "sincos",
    "sincos_2d",
    "stack_blocks",
    "time_embedding",
    "unstack_blocks",
    "upsample",
]
