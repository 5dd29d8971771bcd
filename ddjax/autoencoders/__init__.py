"""Autoencoders of images: what diffusion on latents, continuous or of tokens, is trained on and decoded by.

autoencoder = Autoencoder(shape=(28, 28, 1), quantiser=LookupFree(bits=8, groups=2))
params = train(jax.random.key(0), autoencoder, ddjax.data.load(..., tokens=False), steps=500)
tokens = autoencoder.tokens(params, x)                   # (batch, 7, 7, 2), int32 in [0, 16)
images = autoencoder.from_tokens(params, tokens)         # (batch, 28, 28, 1)
"""

from ddjax.autoencoders.autoencoder import Autoencoder
from ddjax.autoencoders.kl import KLAutoencoder, Posterior
from ddjax.autoencoders.losses import KLObjective
from ddjax.autoencoders.perceptual import Perceptual
from ddjax.autoencoders.perceptual import load as load_perceptual
from ddjax.autoencoders.quantisers import LookupFree, Quantised
from ddjax.autoencoders.training import load, save, tokenise, train

__all__ = [
    "Autoencoder",
    "KLAutoencoder",
    "KLObjective",
    "LookupFree",
    "Perceptual",
    "Posterior",
    "Quantised",
    "load",
    "load_perceptual",
    "save",
    "tokenise",
    "train",
]
