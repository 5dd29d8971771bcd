"""What may be called bits: variational bounds with all their terms."""

from ddjax.likelihood.bound import Reconstruction, binned, nelbo

__all__ = ["Reconstruction", "binned", "nelbo"]
