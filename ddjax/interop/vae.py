"""Autoencoders of latent diffusion: diffusers' `AutoencoderKL`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

from flax import nnx

from ddjax.autoencoders.kl import KLAutoencoder, KLNetwork
from ddjax.interop.mapping import TRANSPOSED, Entry, Fixed, by_heads, convolution, joined, linear, norm
from ddjax.interop.published import AUTOENCODER, Family, Model
from ddjax.interop.tensors import Tensors
from ddjax.processes import Gaussian
from ddjax.schedules import CondOT

_KNOWN = {
    "act_fn": ("silu", "swish"),
    "shift_factor": (None, 0.0),
    "latents_mean": (None,),
    "latents_std": (None,),
}
_BLOCKS = ("DownEncoderBlock2D", "UpDecoderBlock2D")


def _settings(tensors: Tensors, config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    other = [
        f"{name}={config[name]!r}" for name, known in _KNOWN.items() if name in config and config[name] not in known
    ]
    kinds = {*config.get("down_block_types", ()), *config.get("up_block_types", ())}
    if other or kinds - set(_BLOCKS):
        raise ValueError(f"config.json says {', '.join([*other, *sorted(kinds - set(_BLOCKS))])}: no KLAutoencoder")
    size = given.get("size", config.get("sample_size"))
    if size is None:
        raise ValueError("nothing in the tensors says how large an image is: put config.json beside them, or size=...")
    levels = 1 + max(int(n.split(".")[2]) for n in tensors if n.startswith("encoder.down_blocks."))
    width, channels = tensors.shape_of("encoder.conv_in.weight")[:2]
    each = [tensors.shape_of(f"encoder.down_blocks.{i}.resnets.0.conv1.weight")[0] for i in range(levels)]
    if any(w % width for w in each):
        raise ValueError(f"resolutions have {each} features: expected multiples of the first, {width}")
    return {
        "size": size,
        "shape": [size, size, channels],
        "channels": tensors.shape_of("decoder.conv_in.weight")[1],
        "width": width,
        "multipliers": [w // width for w in each],
        "blocks": 1 + max(int(n.split(".")[4]) for n in tensors if n.startswith("encoder.down_blocks.0.resnets.")),
        "groups": config.get("norm_num_groups", 32),
        "middle_attention": "encoder.mid_block.attentions.0.to_q.weight" in tensors,
        "quant": ["quant_conv.weight" in tensors, "post_quant_conv.weight" in tensors],
        "scale": given.get("scale", config.get("scaling_factor", 0.18215)),
    }


def _entries(net: KLNetwork, a: KLAutoencoder) -> list[Entry | Fixed]:
    def residual(ours: str, module: Any, theirs: str) -> list[Entry]:
        entries = [*norm(f"{ours}/norm_in", f"{theirs}.norm1"), *convolution(f"{ours}/conv_in", f"{theirs}.conv1")]
        entries += [*norm(f"{ours}/norm_out", f"{theirs}.norm2"), *convolution(f"{ours}/conv_out", f"{theirs}.conv2")]
        return entries + ([] if module.shortcut is None else convolution(f"{ours}/shortcut", f"{theirs}.conv_shortcut"))

    def middle(half: str) -> list[Entry]:
        module = getattr(net, half).middle[0]
        entries = [e for i in (0, 1) for e in residual(f"{half}/middle/{i}", module, f"{half}.mid_block.resnets.{i}")]
        if module.attention is not None:
            ours, theirs = f"{half}/middle/0/attention", f"{half}.mid_block.attentions.0"
            width = a.multipliers[-1] * a.width
            order = joined((width,) * 3).then(by_heads(1))
            weights, biases = (tuple(f"{theirs}.to_{x}.{part}" for x in "qkv") for part in ("weight", "bias"))
            entries += norm(f"{ours}/norm", f"{theirs}.group_norm")
            entries.append(Entry(f"{ours}/qkv/kernel", weights, order.then(TRANSPOSED)))
            entries.append(Entry(f"{ours}/qkv/bias", biases, order))
            entries += linear(f"{ours}/out", f"{theirs}.to_out.0")
        return entries

    entries: list[Entry | Fixed] = []
    for half, change, at in (("encoder", "down", a.blocks), ("decoder", "up", a.blocks + 1)):
        entries += [*convolution(f"{half}/start", f"{half}.conv_in"), *convolution(f"{half}/out", f"{half}.conv_out")]
        entries += [*norm(f"{half}/norm", f"{half}.conv_norm_out"), *middle(half)]
        level = i = 0
        for n, module in enumerate(getattr(net, half).blocks):
            ours = f"{half}/blocks/{n}"
            theirs = f"{half}.{change}_blocks"
            if hasattr(module, "conv_in"):
                level, i = (level + 1, 0) if i == at else (level, i)
                entries += residual(ours, module, f"{theirs}.{level}.resnets.{i}")
                i += 1
            else:
                entries += convolution(f"{ours}/conv", f"{theirs}.{level}.{change}samplers.0.conv")
    for half, name, there in zip(("encoder", "decoder"), ("quant_conv", "post_quant_conv"), a.quant, strict=True):
        entries += convolution(f"{half}/quant", name) if there else []
    return entries


def _model(s: Mapping[str, Any]) -> Model:
    autoencoder = KLAutoencoder(**{f.name: s[f.name] for f in dataclasses.fields(KLAutoencoder) if f.name in s})
    make = partial(KLNetwork, autoencoder)
    net = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    return Model(
        make=make,
        entries=_entries(net, autoencoder),
        process=Gaussian(CondOT()),
        kind=AUTOENCODER,
        shape=autoencoder.shape,
        autoencoder=autoencoder,
    )


DIFFUSERS_VAE = Family(
    "diffusers_vae",
    "diffusers' AutoencoderKL, Rombach et al. 2022",
    marks=("encoder.conv_in.weight", "encoder.mid_block.resnets.0.conv1.weight", "decoder.conv_in.weight",
           "decoder.up_blocks.0.resnets.0.conv1.weight"),
    settings=_settings,
    model=_model,
    claims=lambda config: None if "_class_name" not in config else config["_class_name"] == "AutoencoderKL",
)  # fmt: skip
