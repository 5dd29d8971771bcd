"""Families of image networks: DiT and its kin, SiT, U-ViT."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from ddjax import denoisers, grids, solvers
from ddjax.denoisers.layers.embed import sincos_2d
from ddjax.interop import scheduler
from ddjax.interop.adapters import OtherTime, TowardsData
from ddjax.interop.mapping import (
    TRANSPOSED,
    Change,
    Entry,
    Fixed,
    by_groups,
    constant,
    convolution,
    copied,
    joined,
    linear,
    norm,
    permuted,
    reshaped,
)
from ddjax.interop.published import Family, Model
from ddjax.interop.tensors import Tensors
from ddjax.processes import Gaussian, LearnedVariance
from ddjax.schedules import CondOT, Table, VPLinear

LATENTS = Table.from_betas(np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)  # Stable Diffusion's
# Of the authors' widths; nothing in a file says how many heads there are.
DIT_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
UVIT_HEADS = {512: 8, 768: 12, 1024: 16, 1152: 16}
STEPS = 1000


def count(names: Any, prefix: str) -> int:
    """How many numbered parts there are behind a prefix: of "blocks.", 12 where there is "blocks.11.attn"."""
    numbers = {name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)}
    return 1 + max((int(n) for n in numbers if n.isdigit()), default=-1)


def known_heads(config: Mapping[str, Any], given: Mapping[str, Any], width: int, table: Mapping[int, int]) -> int:
    """Heads as the caller says, config.json, or the authors' widths. Raises ValueError where nobody knows."""
    heads = given.get("heads", config.get("num_heads", table.get(width)))
    if heads is None:
        raise ValueError(f"nothing in the file says how many heads a network of width {width} has: give heads=...")
    return int(heads)


def patches_in(channels: int, patch: int, width: int) -> Change:
    """The convolution that embeds patches, `(width, channels, patch, patch)`, as a matrix of channels-last patches."""
    flat = (patch * patch * channels, width)
    return permuted(2, 3, 1, 0).then(reshaped((patch, patch, channels, width), flat))


def square(places: int) -> int:
    """The side of a square grid. Raises ValueError where it is none."""
    side = math.isqrt(places)
    if side * side != places:
        raise ValueError(f"{places} positions are no square grid")
    return side


# -- facebookresearch/DiT and willisma/SiT: one network ------------------------------------------------------------


def _dit_settings(
    tensors: Tensors, config: Mapping[str, Any], given: Mapping[str, Any], flow: bool = False
) -> dict[str, Any]:
    width, channels, patch, _ = tensors.shape_of("x_embedder.proj.weight")
    out = tensors.shape_of("final_layer.linear.weight")[0] // patch**2
    settings = {
        "size": patch * square(tensors.shape_of("pos_embed")[1]),
        "channels": channels,
        "out_channels": out,
        "patch": patch,
        "width": width,
        "depth": count(tensors, "blocks."),
        "heads": known_heads(config, given, width, DIT_HEADS),
        "mlp_width": tensors.shape_of("blocks.0.mlp.fc1.weight")[0],
        "num_classes": tensors.shape_of("y_embedder.embedding_table.weight")[0] - 1,
        "guided_channels": min(3, channels),
    }
    return settings if flow else settings | {"chain": STEPS}


def _dit_network(s: Mapping[str, Any], **options: Any) -> Any:
    return partial(
        denoisers.DiT,
        shape=(s["size"], s["size"], s["channels"]),
        out_channels=s["out_channels"],
        patch=s["patch"],
        width=s["width"],
        depth=s["depth"],
        heads=s["heads"],
        mlp_ratio=s["mlp_width"] / s["width"],
        num_classes=s["num_classes"],
        qkv_bias=True,
        **options,
    )


def _dit_entries(s: Mapping[str, Any]) -> list[Entry | Fixed]:
    places = (s["size"] // s["patch"]) ** 2
    entries = [
        Entry("embed/kernel", "x_embedder.proj.weight", patches_in(s["channels"], s["patch"], s["width"])),
        Entry("embed/bias", "x_embedder.proj.bias"),
        Entry("position", "pos_embed", reshaped((1, places, s["width"]), (places, s["width"]))),
        *linear("condition/time_in", "t_embedder.mlp.0"),
        *linear("condition/time_out", "t_embedder.mlp.2"),
        Entry("condition/labels", "y_embedder.embedding_table.weight"),
        *linear("final/modulation", "final_layer.adaLN_modulation.1"),
        *linear("final/out", "final_layer.linear"),
    ]
    for i in range(s["depth"]):
        ours, theirs = f"stack/blocks/{i}", f"blocks.{i}"
        entries += [
            *attention_entries(f"{ours}/attention/qkv", [f"{theirs}.attn.qkv"], s["heads"], s["width"]),
            *linear(f"{ours}/attention/out", f"{theirs}.attn.proj"),
            *linear(f"{ours}/mlp/up", f"{theirs}.mlp.fc1"),
            *linear(f"{ours}/mlp/down", f"{theirs}.mlp.fc2"),
            *linear(f"{ours}/modulation", f"{theirs}.adaLN_modulation.1"),
        ]
    return entries


def attention_entries(
    ours: str, theirs: Sequence[str], heads: int, width: int, bias: bool = True, kv_heads: int | None = None
) -> list[Entry]:
    """Queries, keys and values: one layer of theirs, `[qkv]`, or three, `[q, k, v]`, the last two perhaps narrower."""
    kv_heads = heads if kv_heads is None else kv_heads
    rows, narrow = by_groups(heads, kv_heads), width * kv_heads // heads
    rows = rows if len(theirs) == 1 else joined([width, narrow, narrow]).then(rows)
    names = [tuple(f"{name}.{part}" for name in theirs) for part in ("weight", "bias")]
    entries = [Entry(f"{ours}/kernel", names[0], rows.then(TRANSPOSED))]
    return [*entries, Entry(f"{ours}/bias", names[1], rows)] if bias else entries


def _dit_model(s: Mapping[str, Any]) -> Model:
    schedule = Table.ddpm_linear(s["chain"])
    learned = s["out_channels"] == 2 * s["channels"]
    return Model(
        make=_dit_network(s),
        entries=_dit_entries(s),
        process=LearnedVariance(schedule) if learned else Gaussian(schedule),
        kind="noise",
        shape=(s["size"], s["size"], s["channels"]),
        wrap=partial(OtherTime, factor=(s["chain"] - 1) / 1000.0),
        num_classes=s["num_classes"],
        scale=4.0,
        guided=s["guided_channels"],
        steps=250,
        grid=partial(chain_steps, chain=s["chain"]),
    )


def chain_steps(steps: int, chain: int = STEPS) -> Any:
    """Of a chain numbered 0 to chain - 1, `steps` of them as equally spaced as whole numbers can be (DDPM, respaced).

    What follows the last, number 0, is the data: `Published.sample` takes that step.
    """
    if not 2 <= steps <= chain:
        raise ValueError(f"steps={steps}: expected 2 to {chain}, the steps of the chain")
    return jnp.asarray(np.round(np.linspace(chain - 1, 0, steps)) / (chain - 1), jnp.float32)


DIT = Family(
    "dit",
    "facebookresearch/DiT, Peebles & Xie 2023",
    marks=("x_embedder.proj.weight", "t_embedder.mlp.0.weight", "y_embedder.embedding_table.weight", "pos_embed",
           "blocks.0.attn.qkv.weight", "final_layer.linear.weight"),
    settings=_dit_settings,
    model=_dit_model,
    claims=lambda config: None if "model_type" not in config else config["model_type"] == "dit",
)  # fmt: skip


def _sit_model(s: Mapping[str, Any]) -> Model:
    return Model(
        make=_dit_network(s),
        entries=_dit_entries(s),
        process=Gaussian(CondOT()),
        kind="velocity",
        shape=(s["size"], s["size"], s["channels"]),
        wrap=partial(TowardsData, channels=s["channels"]),
        num_classes=s["num_classes"],
        scale=4.0,
        guided=s["guided_channels"],
        steps=50,
        solver=solvers.Heun,
        grid=grids.uniform,
    )


SIT = Family(
    "sit",
    "willisma/SiT, Ma et al. 2024 (the linear path, velocity)",
    marks=DIT.marks,
    settings=partial(_dit_settings, flow=True),
    model=_sit_model,
    claims=lambda config: None if "model_type" not in config else config["model_type"] == "sit",
)


# -- diffusers' DiTTransformer2DModel ------------------------------------------------------------------------------


def _diffusers_settings(tensors: Tensors, config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    width, channels, patch, _ = tensors.shape_of("pos_embed.proj.weight")
    size = given.get("size", config.get("sample_size"))
    if size is None:
        raise ValueError("nothing in the tensors says how large an image is: put config.json beside them, or size=...")
    first = "transformer_blocks.0"
    return scheduler.settings(config, given) | {
        "size": size,
        "channels": channels,
        "out_channels": tensors.shape_of("proj_out_2.weight")[0] // patch**2,
        "patch": patch,
        "width": width,
        "depth": count(tensors, "transformer_blocks."),
        "heads": known_heads(config | {"num_heads": config.get("num_attention_heads")}, given, width, {}),
        "mlp_width": tensors.shape_of(f"{first}.ff.net.0.proj.weight")[0],
        "num_classes": tensors.shape_of(f"{first}.norm1.emb.class_embedder.embedding_table.weight")[0] - 1,
        "guided_channels": channels,
    }


def _diffusers_entries(s: Mapping[str, Any]) -> list[Entry | Fixed]:
    width, side = s["width"], s["size"] // s["patch"]
    # Their first half of the features is the column's, ours the row's.
    table = sincos_2d(side, side, width).reshape(-1, 2, width // 2)[:, ::-1].reshape(-1, width)
    # Every block has its own copy of what tells it the condition.
    embedders = [f"transformer_blocks.{i}.norm1.emb" for i in range(s["depth"])]

    def copies(ours: str, part: str, change: Change | None = None) -> Entry:
        one = copied(s["depth"]) if change is None else copied(s["depth"]).then(change)
        return Entry(ours, tuple(f"{name}.{part}" for name in embedders), one)

    entries = [
        Entry("embed/kernel", "pos_embed.proj.weight", patches_in(s["channels"], s["patch"], width)),
        Entry("embed/bias", "pos_embed.proj.bias"),
        constant("position", table),
        *linear("final/modulation", "proj_out_1"),
        *linear("final/out", "proj_out_2"),
        copies("condition/labels", "class_embedder.embedding_table.weight"),
    ]
    for ours, theirs in (("in", "1"), ("out", "2")):
        name = f"timestep_embedder.linear_{theirs}"
        entries += [
            copies(f"condition/time_{ours}/kernel", f"{name}.weight", TRANSPOSED),
            copies(f"condition/time_{ours}/bias", f"{name}.bias"),
        ]
    for i in range(s["depth"]):
        ours, theirs = f"stack/blocks/{i}", f"transformer_blocks.{i}"
        qkv = [f"{theirs}.attn1.to_{part}" for part in "qkv"]
        entries += [
            *attention_entries(f"{ours}/attention/qkv", qkv, s["heads"], width),
            *linear(f"{ours}/attention/out", f"{theirs}.attn1.to_out.0"),
            *linear(f"{ours}/mlp/up", f"{theirs}.ff.net.0.proj"),
            *linear(f"{ours}/mlp/down", f"{theirs}.ff.net.2"),
            *linear(f"{ours}/modulation", f"{theirs}.norm1.linear"),
        ]
    return entries


def _diffusers_model(s: Mapping[str, Any]) -> Model:
    return Model(
        make=_dit_network(s, closed_times=True),
        entries=_diffusers_entries(s),
        shape=(s["size"], s["size"], s["channels"]),
        wrap=partial(OtherTime, factor=scheduler.clock(s) / 1000.0),
        num_classes=s["num_classes"],
        scale=4.0,
        guided=s["guided_channels"],
        **scheduler.model(s, s["out_channels"] == 2 * s["channels"]),
    )


DIFFUSERS_DIT = Family(
    "diffusers_dit",
    "diffusers' DiTTransformer2DModel",
    marks=("pos_embed.proj.weight", "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight",
           "transformer_blocks.0.attn1.to_q.bias", "proj_out_1.weight"),
    settings=_diffusers_settings,
    model=_diffusers_model,
)  # fmt: skip


# -- baofff/U-ViT --------------------------------------------------------------------------------------------------


def _uvit_settings(tensors: Tensors, config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    width, channels, patch, _ = tensors.shape_of("patch_embed.proj.weight")
    classes = tensors.shape_of("label_emb.weight")[0] - 1 if "label_emb.weight" in tensors else 0
    extras = 2 if "label_emb.weight" in tensors else 1
    return {
        "size": patch * square(tensors.shape_of("pos_embed")[1] - extras),
        "channels": channels,
        "patch": patch,
        "width": width,
        "depth": 1 + 2 * count(tensors, "in_blocks."),
        "heads": known_heads(config, given, width, UVIT_HEADS),
        "mlp_width": tensors.shape_of("mid_block.mlp.fc1.weight")[0],
        "num_classes": classes,
        "conv": "final_layer.weight" in tensors,
        # Of pixels, on the SDE of Song et al. 2021; of latents, on Stable Diffusion's chain.
        "latents": "final_layer.weight" not in tensors,
    }


def _uvit_entries(s: Mapping[str, Any]) -> list[Entry | Fixed]:
    places = (s["size"] // s["patch"]) ** 2 + 1 + bool(s["num_classes"])
    entries = [
        Entry("embed/kernel", "patch_embed.proj.weight", patches_in(s["channels"], s["patch"], s["width"])),
        Entry("embed/bias", "patch_embed.proj.bias"),
        Entry("position", "pos_embed", reshaped((1, places, s["width"]), (places, s["width"]))),
        *norm("norm", "norm"),
        *linear("out", "decoder_pred"),
    ]
    if s["num_classes"]:
        entries.append(Entry("condition/labels", "label_emb.weight"))
    if s["conv"]:
        entries += convolution("conv", "final_layer")
    half = s["depth"] // 2
    blocks = [(f"stack/down/blocks/{i}", f"in_blocks.{i}") for i in range(half)]
    blocks += [("stack/middle", "mid_block")]
    blocks += [(f"stack/up/blocks/{i}", f"out_blocks.{i}") for i in range(half)]
    for ours, theirs in blocks:
        entries += [
            *norm(f"{ours}/norm_a", f"{theirs}.norm1"),
            *attention_entries(f"{ours}/attention/qkv", [f"{theirs}.attn.qkv"], s["heads"], s["width"], bias=False),
            *linear(f"{ours}/attention/out", f"{theirs}.attn.proj"),
            *norm(f"{ours}/norm_m", f"{theirs}.norm2"),
            *linear(f"{ours}/mlp/up", f"{theirs}.mlp.fc1"),
            *linear(f"{ours}/mlp/down", f"{theirs}.mlp.fc2"),
        ]
        if theirs.startswith("out_blocks"):
            entries += linear(f"{ours}/skip", f"{theirs}.skip_linear")
    return entries


def _uvit_model(s: Mapping[str, Any]) -> Model:
    latents = s["latents"]
    return Model(
        make=partial(
            denoisers.UViT,
            shape=(s["size"], s["size"], s["channels"]),
            patch=s["patch"],
            width=s["width"],
            depth=s["depth"],
            heads=s["heads"],
            mlp_ratio=s["mlp_width"] / s["width"],
            num_classes=s["num_classes"],
            conv=s["conv"],
        ),
        entries=_uvit_entries(s),
        process=Gaussian(LATENTS if latents else VPLinear()),
        kind="noise",
        shape=(s["size"], s["size"], s["channels"]),
        # Their chain is numbered 1 to 1000, their SDE's times are multiplied by 999.
        wrap=partial(OtherTime, factor=0.999, offset=0.001 if latents else 0.0),
        num_classes=s["num_classes"],
        scale=1.4 if s["num_classes"] else 1.0,
        steps=50 if latents else 1000,
        solver=solvers.dpm_solver_pp if latents else solvers.Ancestral,
        grid=grids.uniform,
    )


UVIT = Family(
    "uvit",
    "baofff/U-ViT, Bao et al. 2023",
    marks=("patch_embed.proj.weight", "pos_embed", "in_blocks.0.attn.qkv.weight", "mid_block.attn.qkv.weight",
           "out_blocks.0.skip_linear.weight", "decoder_pred.weight"),
    settings=_uvit_settings,
    model=_uvit_model,
)  # fmt: skip
