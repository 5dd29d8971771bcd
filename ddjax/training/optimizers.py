"""A small optimizer factory: AdamW, Adafactor, Lion or Muon, with warm-up, decay to zero, clipping and groups."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from ddjax.placement import layer_axes, path_name
from ddjax.types import Params, PyTree

Decay = Literal["cosine", "linear", "constant"]
Groups = Sequence[tuple[str, float]]

# Muon's matrices: those inside the blocks. Embeddings, the output layer and vectors are AdamW's (Jordan 2024).
# A depthwise convolution is a number for each place and feature, and no matrix.
MUON = re.compile(r"(^|/)(stack/(.*/)?(blocks|middle)|first)/(?!.*depthwise).*(kernel|/mlp/(gate|up|down))$")
# RMS of a Muon update, as AdamW's: one learning rate serves both (Liu et al. 2025, arXiv:2502.16982, section 2.2).
MUON_RMS = 0.2


def learning_rate_schedule(
    learning_rate: float, steps: int, warmup: int = 0, schedule: Decay = "cosine"
) -> optax.Schedule:
    """Rate of update n = 0, 1, ...: linear over `warmup` updates, then decay to 0 at n = `steps`.

    The ramp is `(n + 1) / warmup`, so that the first update is not lost to a rate of zero.
    Raises ValueError for an unknown schedule, or a warm-up outside [0, steps].
    """
    if schedule not in ("cosine", "linear", "constant"):
        raise ValueError(f"unknown schedule {schedule!r}; it is one of cosine, linear, constant")
    if not 0 <= warmup <= steps:
        raise ValueError(f"the warm-up must lie in [0, steps={steps}], got {warmup}")

    def rate(n):
        n = jnp.asarray(n, jnp.result_type(float))
        ramp = jnp.minimum(1.0, (n + 1) / max(warmup, 1))
        done = jnp.clip((n - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        if schedule == "cosine":
            decay = 0.5 * (1 + jnp.cos(jnp.pi * done))
        elif schedule == "linear":
            decay = 1 - done
        else:
            decay = jnp.ones_like(done)
        return learning_rate * ramp * decay

    return rate


def decays(params: Params) -> PyTree:
    """Which parameters weight decay shrinks: those with two axes or more (not biases, scales, scalars).

    The axis of scanned layers does not count, nor do the slopes and offsets of times (`layers.TimeVector`), which are
    vectors: a network decays as it does unrolled.
    """
    return jax.tree_util.tree_map_with_path(lambda path, p: p.ndim - layer_axes(path_name(path)) >= 2, params)


def adamw(learning_rate: float, steps: int, **options: Any) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) on `learning_rate_schedule`: `optimizer("adamw", ...)`, with its options."""
    return optimizer("adamw", learning_rate, steps, **options)


def optimizer(
    name: str,
    learning_rate: float,
    steps: int,
    warmup: int = 0,
    schedule: Decay = "cosine",
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    clip: float | None = None,
    moments: str = "float32",
    groups: Groups = (),
    project: Callable[[Params], Params] | None = None,
) -> optax.GradientTransformation:
    """An optimizer on `learning_rate_schedule`.

    name: "adamw" (Loshchilov & Hutter 2019); "adafactor" (Shazeer & Stern 2018: second moments in rows and columns, no
        first moment, updates clipped to an RMS of 1 and relative to their parameter's; scanned layers are one
        parameter); "lion" (Chen et al. 2023; wants a rate 3 to 10 times lower, and b2 = 0.99); "muon" (Jordan et al.
        2024), for the matrices inside blocks, layer by layer, at the RMS of AdamW's updates, with AdamW
        (and Nesterov's momentum) for the rest.
    weight_decay: decoupled, times the learning rate; on parameters of two axes or more only (`decays`).
    clip: bound on the gradient's global norm, applied before all else; None or 0 for none.
    moments: dtype of the first moment, "float32" or "bfloat16". The second moment stays float32: it moves by
        (1 - b2) of itself a step, and bfloat16 does not resolve less than 1/256.
    groups: (regular expression, factor) pairs: the first expression that is found in a parameter's path multiplies its
        learning rate; 0 freezes it. A list, as configs have it, will do.
    project: what parameters become after each update (`projected`).
    Raises ValueError for an unknown name or dtype; when initialised, for an expression that no path has.
    """
    if moments not in ("float32", "bfloat16"):
        raise ValueError(f"moments must be float32 or bfloat16, got {moments!r}")
    rate = learning_rate_schedule(learning_rate, steps, warmup, schedule)
    dtype = None if moments == "float32" else jnp.bfloat16
    if name == "adamw":
        update = optax.adamw(rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=decays, mu_dtype=dtype)
    elif name == "adafactor":
        update = optax.chain(
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.scale_by_param_block_rms(),
            optax.add_decayed_weights(weight_decay, decays),  # optax.adafactor's own is not times the learning rate
            optax.scale_by_learning_rate(rate),
        )
    elif name == "lion":
        update = optax.lion(rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=decays, mu_dtype=dtype)
    elif name == "muon":
        options = {"weight_decay": weight_decay, "mu_dtype": dtype}
        update = optax.partition(
            {
                "muon": optax.contrib.muon(
                    rate, muon_weight_dimension_numbers=matrices, consistent_rms=MUON_RMS, **options
                ),
                # Not optax's own, which decays vectors, too.
                "adamw": optax.adamw(rate, b1=b1, b2=b2, nesterov=True, mask=decays, **options),
            },
            _of_muon,
        )
    else:
        raise ValueError(f"unknown optimizer {name!r}; it is one of adamw, adafactor, lion, muon")
    parts = [optax.clip_by_global_norm(clip)] if clip else []
    parts += [update, *([scale_groups(groups)] if groups else []), *([projected(project)] if project else [])]
    return optax.chain(*parts) if len(parts) > 1 else update


def projected(project: Callable[[Params], Params]) -> optax.GradientTransformation:
    """The last of a chain: after each update parameters are `project(parameters)`, to rounding.

    (EDM2's forced weight normalisation, `denoisers.edm2.forced`; any constraint that they can be brought back to.)
    """

    def update(updates: PyTree, state: optax.EmptyState, params: Params | None = None) -> Any:
        if params is None:
            raise ValueError("a projection is of parameters: call update(updates, state, params)")
        new = project(optax.apply_updates(params, updates))
        return jax.tree.map(jnp.subtract, new, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def matrices(params: Params) -> PyTree:
    """Which parameters are Muon's, and where their matrices lie: in the last two axes; None for the others."""

    def place(path, p):
        is_matrix = p.ndim >= 2 and p.shape[-2] > 1 and MUON.search(path_name(path))
        return optax.contrib.MuonDimensionNumbers(-2, -1) if is_matrix else None

    return jax.tree_util.tree_map_with_path(place, params)


def _of_muon(params: Params) -> PyTree:
    places = matrices(params)
    return jax.tree.map(lambda p, place: "muon" if place else "adamw", params, places)


def scale_groups(groups: Groups) -> optax.GradientTransformation:
    """Multiply the updates of parameters by the factor of the first (pattern, factor) that their path has."""
    try:
        compiled = [(re.compile(pattern), float(factor)) for pattern, factor in groups]
    except (TypeError, ValueError, re.error) as error:
        raise ValueError(
            f"optimizer groups are pairs of a regular expression and a factor, got {groups!r} ({error})"
        ) from error

    def init(params: Params) -> optax.EmptyState:
        names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        for pattern, _ in compiled:
            if not any(pattern.search(name) for name in names):
                raise ValueError(
                    f"no parameter has {pattern.pattern!r} in its path (optimizer groups); there are {', '.join(names)}"
                )
        return optax.EmptyState()

    def update(updates: PyTree, state: optax.EmptyState, params: Params | None = None) -> Any:
        def scale(path, u):
            name = path_name(path)
            return u * next((factor for pattern, factor in compiled if pattern.search(name)), 1.0)

        return jax.tree_util.tree_map_with_path(scale, updates), state

    return optax.GradientTransformation(init, update)
