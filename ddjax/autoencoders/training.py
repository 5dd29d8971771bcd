"""Training an autoencoder, its file, and data sets of its tokens."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Key

from ddjax import files
from ddjax.autoencoders.autoencoder import Autoencoder
from ddjax.autoencoders.quantisers import LookupFree
from ddjax.types import Params

FORM = "ddjax-autoencoder-1"


def train(
    key: Key[Array, ""],
    autoencoder: Autoencoder,
    dataset: Any,
    *,
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    warmup: int = 50,
    ema: float = 0.99,
    report: Callable[[int, dict[str, float]], None] | None = None,
    every: int = 50,
) -> Params:
    """The moving average of the parameters after so many steps of AdamW, on one device; nothing is kept on the way.

    dataset: continuous images (`ddjax.data.load(..., tokens=False)`). report: called with the number of steps made and
    the metrics, after every `every` steps.
    Without the perceptual and adversarial losses of Weber et al. 2024: the first needs a network of photographs.
    """
    from ddjax.data import batches  # here: Grain is imported where it is used
    from ddjax.training import Ema, adamw, init_state, make_train_step

    optimizer = adamw(learning_rate, steps, warmup=min(warmup, steps), clip=1.0)
    step = jax.jit(make_train_step(autoencoder.objective, None, optimizer, ema=Ema(ema)), donate_argnums=0)
    state = jax.jit(lambda key: init_state(autoencoder.init, optimizer, key))(key)
    items = batches(dataset, batch_size=batch_size, seed=0)
    for i in range(steps):
        state, metrics = step(state, {"x0": next(items)["x0"]})
        if report is not None and (i + 1) % every == 0:
            report(i + 1, {name: float(value) for name, value in metrics.items()})
    return state.ema


def tokenise(autoencoder: Autoencoder, params: Params, dataset: Any, batch_size: int = 256) -> np.ndarray:
    """Tokens of all of a data set's items, in order, int32 `(items, h, w, groups)`."""
    encode = jax.jit(autoencoder.tokens)
    starts = range(0, len(dataset), batch_size)
    return np.concatenate([np.asarray(encode(params, dataset[slice(i, i + batch_size)]["x0"])) for i in starts])


def save(path: str | os.PathLike, autoencoder: Autoencoder, params: Params) -> None:
    """Write parameters as safetensors, with the architecture as JSON in the header."""
    from ddjax.training import export_safetensors

    about = {"format": FORM, "autoencoder": json.dumps(dataclasses.asdict(autoencoder))}
    export_safetensors(path, params, about)


def load(path: str | os.PathLike) -> tuple[Autoencoder, Params]:
    """What `save` wrote. Raises ValueError for other files, FileNotFoundError."""
    params, about = files.read_safetensors(path, FORM, "autoencoder (`ddjax.autoencoders.save` writes one)")
    fields = json.loads(about["autoencoder"])
    quantiser = fields.pop("quantiser")
    return Autoencoder(**fields, quantiser=None if quantiser is None else LookupFree(**quantiser)), params
