"""Networks: Flax NNX modules for construction and the forward pass, pure functions for everything else.

module = DiT(shape=(8, 8, 1), symbols_in=18, symbols_out=17, width=128, depth=4, heads=4, rngs=nnx.Rngs(0))
apply, params = functional(module)
logits = apply(params, xt, t)            # (batch, 8, 8, 1, 17)
"""

from ddjax import taps
from ddjax.denoisers import control, edm2, graphs, layers, outputs, sizes
from ddjax.denoisers.conditions import Coherent, OverDraws, Pointed, ShownX1
from ddjax.denoisers.dico import DiCo
from ddjax.denoisers.diffit import DiffiT
from ddjax.denoisers.diffussm import DiffuSSM
from ddjax.denoisers.dit import DiT
from ddjax.denoisers.edm2 import EDM2, EDM2_SIZES
from ddjax.denoisers.freeu import FreeU, freeu
from ddjax.denoisers.functional import Functional, from_linen, functional, functional_init
from ddjax.denoisers.given import nulls
from ddjax.denoisers.graph import GraphTransformer
from ddjax.denoisers.graph_features import graph_features
from ddjax.denoisers.inf_dit import InfDiT
from ddjax.denoisers.inheritance import inherited
from ddjax.denoisers.layers.stacking import stack_blocks, unstack_blocks
from ddjax.denoisers.logistic import TruncatedLogistic, truncated_logistic_logits
from ddjax.denoisers.low_rank import LowRankGaussian
from ddjax.denoisers.multi_resolution import MultiResolution
from ddjax.denoisers.neural_process import NeuralProcess
from ddjax.denoisers.state_space import StateSpace
from ddjax.denoisers.tabular import MixedTable, TabularMLP
from ddjax.denoisers.taught import taught
from ddjax.denoisers.text import TextTransformer
from ddjax.denoisers.times import SharedEarlyTimes
from ddjax.denoisers.unet import UNet
from ddjax.denoisers.unet_designs import UNET_DESIGNS, UNET_SIZES, UNetDesign
from ddjax.denoisers.unet_encoder import UNetEncoder
from ddjax.denoisers.uvit import UViT

__all__ = [
    "EDM2",
    "EDM2_SIZES",
    "UNET_DESIGNS",
    "UNET_SIZES",
    "Coherent",
    "DiCo",
    "DiT",
    "DiffiT",
    "DiffuSSM",
    "FreeU",
    "Functional",
    "GraphTransformer",
    "InfDiT",
    "LowRankGaussian",
    "MixedTable",
    "MultiResolution",
    "NeuralProcess",
    "OverDraws",
    "Pointed",
    "SharedEarlyTimes",
    "ShownX1",
    "StateSpace",
    "TabularMLP",
    "TextTransformer",
    "TruncatedLogistic",
    "UNet",
    "UNetDesign",
    "UNetEncoder",
    "UViT",
    "control",
    "edm2",
    "freeu",
    "from_linen",
    "functional",
    "functional_init",
    "graph_features",
    "graphs",
    "inherited",
    "layers",
    "nulls",
    "outputs",
    "sizes",
    "stack_blocks",
    "taps",
    "taught",
    "truncated_logistic_logits",
    "unstack_blocks",
]
