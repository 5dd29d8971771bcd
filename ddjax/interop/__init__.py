"""Published weights: PyTorch networks as ours, and back. Safetensors only."""

from ddjax.interop import mapping, tensors

__all__ = ["mapping", "tensors"]
