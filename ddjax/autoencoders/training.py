"""Training an autoencoder, its file, and data sets of its tokens."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Key

from ddjax import files
from ddjax.autoencoders.autoencoder import Autoencoder
from ddjax.autoencoders.kl import KLAutoencoder
from ddjax.autoencoders.losses import KLObjective
from ddjax.autoencoders.quantisers import LookupFree
from ddjax.types import Params

FORM = "ddjax-autoencoder-1"


def train(
    key: Key[Array, ""],
    autoencoder: Autoencoder | KLAutoencoder,
    dataset: Any,
    *,
    steps: int,
    objective: KLObjective | None = None,
    adversarial_from: int = 0,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    warmup: int = 50,
    ema: float = 0.99,
    b1: float = 0.9,
    b2: float = 0.999,
    report: Callable[[int, dict[str, float]], None] | None = None,
    every: int = 50,
) -> Params:
    """The moving average of the parameters after so many steps of AdamW, on one device; nothing is kept on the way.

    dataset: continuous images (`ddjax.data.load(..., tokens=False)`). report: called with the number of steps made and
    the metrics, after every `every` steps.
    objective: of a `KLAutoencoder`, by default without perceptual and adversarial losses; its discriminator joins from
    step `adversarial_from` on. b1, b2: of AdamW (0.5 and 0.9 in CompVis/latent-diffusion).
    An `Autoencoder` is trained without the perceptual and adversarial losses of Weber et al. 2024.
    """
    from ddjax.data import batches  # here: Grain is imported where it is used
    from ddjax.training import Ema, adamw, init_state, make_train_step

    if objective is not None and objective.autoencoder != autoencoder:
        raise ValueError("objective is of another autoencoder than the one to be trained: build it with this one")
    optimizer = adamw(learning_rate, steps, warmup=min(warmup, steps), clip=1.0, b1=b1, b2=b2)
    taking = jax.jit(lambda step, *rest: step(*rest), donate_argnums=1)  # what the step holds goes in, too
    making = lambda loss: partial(taking, make_train_step(loss, None, optimizer, ema=Ema(ema)))  # noqa: E731
    if isinstance(autoencoder, KLAutoencoder):
        objective = KLObjective(autoencoder, adversarial=0.0) if objective is None else objective
        init, later = objective.init, making(objective)
        step = making(dataclasses.replace(objective, adversarial=0.0)) if adversarial_from else later
    else:
        init, step = autoencoder.init, making(autoencoder.objective)
    state = jax.jit(lambda key: init_state(init, optimizer, key))(key)
    items = batches(dataset, batch_size=batch_size, seed=0)
    for i in range(steps):
        step = later if objective is not None and i == adversarial_from else step
        state, metrics = step(state, {"x0": next(items)["x0"]})
        if report is not None and (i + 1) % every == 0:
            report(i + 1, {name: float(value) for name, value in metrics.items()})
    return state.ema if objective is None else state.ema["autoencoder"]


def tokenise(autoencoder: Autoencoder, params: Params, dataset: Any, batch_size: int = 256) -> np.ndarray:
    """Tokens of all of a data set's items, in order, int32 `(items, h, w, groups)`."""
    encode = jax.jit(autoencoder.tokens)
    starts = range(0, len(dataset), batch_size)
    return np.concatenate([np.asarray(encode(params, dataset[slice(i, i + batch_size)]["x0"])) for i in starts])


def save(path: str | os.PathLike, autoencoder: Autoencoder | KLAutoencoder, params: Params) -> None:
    """Write parameters as safetensors, with the architecture as JSON in the header."""
    from ddjax.training import export_safetensors

    kind = "kl" if isinstance(autoencoder, KLAutoencoder) else "plain"
    about = {"format": FORM, "autoencoder": json.dumps(dataclasses.asdict(autoencoder)), "kind": kind}
    export_safetensors(path, params, about)


def load(path: str | os.PathLike) -> tuple[Autoencoder | KLAutoencoder, Params]:
    """What `save` wrote. Raises ValueError for other files, FileNotFoundError."""
    params, about = files.read_safetensors(path, FORM, "autoencoder (`ddjax.autoencoders.save` writes one)")
    fields = json.loads(about["autoencoder"])
    if about.get("kind") == "kl":
        return KLAutoencoder(**fields), params
    quantiser = fields.pop("quantiser")
    return Autoencoder(**fields, quantiser=None if quantiser is None else LookupFree(**quantiser)), params
