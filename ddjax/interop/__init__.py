"""Published weights: networks of others as ours, and back. Safetensors, and Orbax where the authors have it.

model = ddjax.interop.load("DiT-XL-2-256.safetensors", "dit")
print(model.report)                                        # which tensor became which parameter, by name
latents = model.sample(jax.random.key(0), 4, cond=jnp.array([207, 360, 387, 974]))
model.save("dit.safetensors")                              # ours; `model.export` writes theirs again
"""

from __future__ import annotations

import os
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Key

from ddjax.interop import images, mapping, md4, orbax, published, scheduler, tensors, texts, unet, unet_families, vae
from ddjax.interop.mapping import Report
from ddjax.interop.published import Family, Model, Published

FAMILIES = {
    family.name: family
    for family in (
        *(images.DIT, images.SIT, images.DIFFUSERS_DIT, images.UVIT),
        *(unet_families.ADM, unet_families.EDM_SONG, unet_families.EDM_ADM, unet_families.EDM2_UNET),
        *(unet_families.ADM_CLASSIFIER, unet_families.DIFFUSERS_UNET, unet_families.DIFFUSERS_CONDITIONED_UNET),
        vae.DIFFUSERS_VAE,
        *(texts.MDLM, texts.SEDD, texts.UDLM, texts.DUO, texts.RADD, texts.LLADA),
        md4.MD4,
    )
}


def load(
    path: str | os.PathLike,
    family: str | None = None,
    *,
    partial: bool = False,
    dtype: Any = jnp.float32,
    key: Key[Array, ""] | None = None,
    **settings: Any,
) -> Published:
    """A published model: its network with its weights, its process and how it is sampled.

    Args:
        path: a .safetensors file, with config.json beside it where its authors have one; a Hugging Face folder, also of
            several files; a pipeline of diffusers, whose scheduler says how it is sampled (`interop.scheduler`); a
            folder with an Orbax checkpoint; or what `Published.save` wrote.
        family: one of `FAMILIES`; None finds it by the tensors and config.json.
        partial: go on where tensors are unknown, missing or mis-shaped: parameters without a tensor stay as `key` draws
            them. The report names them.
        dtype: of the parameters.
        settings: what the file does not say, or says otherwise: `heads=16`, `mask=50257`, `length=128`,
            `prediction_type="v_prediction"`.

    Raises:
        ValueError: for a pickle, a file of no family or of several, settings that are missing, and unless `partial` for
            tensors that do not fit, each by its name.
    """
    return published.load(path, family, families=FAMILIES, partial=partial, dtype=dtype, key=key, **settings)


__all__ = [
    "FAMILIES",
    "Family",
    "Model",
    "Published",
    "Report",
    "images",
    "load",
    "mapping",
    "md4",
    "orbax",
    "published",
    "scheduler",
    "tensors",
    "texts",
    "unet",
    "unet_families",
    "vae",
]
