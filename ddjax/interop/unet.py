"""Names of the published U-Nets' weights: guided-diffusion, EDM, EDM2, diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ddjax.denoisers.edm2 import EDM2
from ddjax.denoisers.unet import UNet


def adm(net: UNet, *, new_attention_order: bool = False) -> list:
    """openai/guided-diffusion and improved-diffusion (`UNetModel`).

    new_attention_order: their flag: queries, keys and values of all heads stand together.
    """
    order = "qkv hd" if new_attention_order else "h qkv d"
    names = {
        "norm_in": "in_layers.0", "conv_in": "in_layers.2", "modulation": "emb_layers.1", "norm_out": "out_layers.0",
        "conv_out": "out_layers.3", "shortcut": "skip_connection",
    }  # fmt: skip

    def block(ours: str, module: Any, theirs: str, second: str) -> Iterator:
        if not hasattr(module, "conv_in"):
            yield from _conv(f"{ours}/conv", f"{theirs}.{'op' if module.resample == 'down' else 'conv'}")
            return
        yield from _res_block(ours, module, theirs, names)
        if module.attention is not None:
            yield from _attention(f"{ours}/attention", second, ("norm", "qkv", "proj_out"), order)

    rows = [
        *_linear("condition/time_in", "time_embed.0"),
        *_linear("condition/time_out", "time_embed.2"),
        *_conv("embed", "input_blocks.0.0"),
        *_norm("final/norm", "out.0"),
        *_conv("final/out", "out.2"),
    ]
    if net.num_classes:
        rows.append(("condition/labels", "label_emb.weight", "same"))
    for i, module in enumerate(net.encoder):
        rows += block(f"encoder/{i}", module, f"input_blocks.{i + 1}.0", f"input_blocks.{i + 1}.1")
    for i, module in enumerate(net.middle):
        rows += block(f"middle/{i}", module, f"middle_block.{2 * i}", "middle_block.1")
    n = -1
    for i, module in enumerate(net.decoder):
        n += net.joined[i]
        layer = 0 if net.joined[i] else 1 + (net.decoder[i - 1].attention is not None)
        rows += block(f"decoder/{i}", module, f"output_blocks.{n}.{layer}", f"output_blocks.{n}.1")
    return rows


def edm(net: UNet) -> list:
    """NVlabs/edm: `SongUNet` (designs "ddpm++" and "ncsn++") and `DhariwalUNet` ("adm_edm")."""
    song = net.design.labels == "input"
    names = {
        "norm_in": "norm0", "conv_in": "conv0", "modulation": "affine", "norm_out": "norm1", "conv_out": "conv1",
        "shortcut": "skip",
    }  # fmt: skip

    def block(ours: str, module: Any, theirs: str) -> Iterator:
        yield from _res_block(ours, module, theirs, names)
        if module.attention is not None:
            yield from _attention(f"{ours}/attention", theirs, ("norm2", "qkv", "proj"), "h d qkv")
        if module.resample is not None:
            yield from _filters(theirs, ("conv0", "skip"), module.weights)

    rows = [*_linear("condition/time_in", "map_layer0"), *_linear("condition/time_out", "map_layer1")]
    if net.condition.frequencies is not None:
        rows.append(("condition/frequencies", "map_noise.freqs", "same"))
    if net.condition.latent is not None:
        rows.append(("condition/latent/kernel", "map_augment.weight", "linear"))
    if net.num_classes:
        rows.append(("condition/labels", "map_label.weight", "linear"))
        rows += [("condition/label_bias", "map_label.bias", "same")] if song else []
    rows += _sides(net, block, lambda ours, theirs: _conv(ours, theirs))
    for level, _ in enumerate(net.inputs or ()):
        side = net.shape[0] >> (level + 1)
        rows += _conv(f"inputs/{level}", f"enc.{side}x{side}_aux_residual")
        rows += _filters(f"enc.{side}x{side}_aux_residual", ("",), net.design.weights)
    last = f"dec.{net.shape[0]}x{net.shape[0]}_aux" if song else "out"
    return rows + [*_norm("final/norm", f"{last}_norm"), *_conv("final/out", f"{last}_conv")]


def edm2(net: EDM2) -> list:
    """NVlabs/edm2: `UNet`."""

    def block(ours: str, module: Any, theirs: str) -> Iterator:
        for own, other in (("conv_in", "conv_res0"), ("conv_out", "conv_res1"), ("shortcut", "conv_skip")):
            if getattr(module, own) is not None:
                yield f"{ours}/{own}/kernel", f"{theirs}.{other}.weight", "conv"
        yield f"{ours}/modulation/kernel", f"{theirs}.emb_linear.weight", "linear"
        yield f"{ours}/modulation_gain", f"{theirs}.emb_gain", "same"
        if module.attention is not None:
            yield f"{ours}/attention/qkv/kernel", f"{theirs}.attn_qkv.weight", ("conv", "h d qkv")
            yield f"{ours}/attention/out/kernel", f"{theirs}.attn_proj.weight", "conv"

    rows = [
        ("frequencies", "emb_fourier.freqs", "same"),
        ("phases", "emb_fourier.phases", "same"),
        ("time_in/kernel", "emb_noise.weight", "linear"),
        ("gain", "out_gain", "same"),
        ("final/kernel", "out_conv.weight", "conv"),
    ]
    if net.num_classes:
        rows.append(("labels/kernel", "emb_label.weight", "linear"))
    return rows + list(_sides(net, block, lambda ours, theirs: [(f"{ours}/kernel", f"{theirs}.weight", "conv")]))


def diffusers(net: UNet) -> list:
    """Diffusers' `UNet2DModel`."""
    names = {
        "norm_in": "norm1", "conv_in": "conv1", "modulation": "time_emb_proj", "norm_out": "norm2",
        "conv_out": "conv2", "shortcut": "conv_shortcut",
    }  # fmt: skip

    def block(ours: str, module: Any, theirs: str, i: int, change: str) -> Iterator:
        if not hasattr(module, "conv_in"):
            yield from _conv(f"{ours}/conv", f"{theirs}.{change}.0.conv")
            return
        at = f"{theirs}.{change}.0" if module.resample is not None else f"{theirs}.resnets.{i}"
        yield from _res_block(ours, module, at, names)
        if module.attention is not None:
            at = f"{theirs}.attentions.{i}"
            yield from _norm(f"{ours}/attention/norm", f"{at}.group_norm")
            for part in ("kernel", "bias"):
                three = tuple(f"{at}.to_{letter}.{_THEIRS[part]}" for letter in "qkv")
                yield f"{ours}/attention/qkv/{part}", three, "three"
            yield from _linear(f"{ours}/attention/out", f"{at}.to_out.0")

    rows = [
        *_linear("condition/time_in", "time_embedding.linear_1"),
        *_linear("condition/time_out", "time_embedding.linear_2"),
        *_conv("embed", "conv_in"),
        *_norm("final/norm", "conv_norm_out"),
        *_conv("final/out", "conv_out"),
    ]
    if net.num_classes:
        rows.append(("condition/labels", "class_embedding.weight", "same"))
    for n, module, level, i in _numbered(net.encoder, "down"):
        rows += block(f"encoder/{n}", module, f"down_blocks.{level}", i, "downsamplers")
    for n, module in enumerate(net.middle):
        rows += [row for row in block(f"middle/{n}", module, "mid_block", n, "")]
    for n, module, level, i in _numbered(net.decoder, "up"):
        rows += block(f"decoder/{n}", module, f"up_blocks.{level}", i, "upsamplers")
    return rows


_THEIRS = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def _numbered(blocks: Any, change: str) -> Iterator[tuple[int, Any, int, int]]:
    """Number, block, resolution, number at this resolution; a block that resamples is the last of one."""
    level, i = 0, 0
    for n, module in enumerate(blocks):
        yield n, module, level, i
        level, i = (level + 1, 0) if module.resample == change else (level, i + 1)


def _sides(net: Any, block: Any, conv: Any) -> Iterator:
    """Rows of blocks that are called by the side of the image (NVlabs)."""
    side = net.shape[0]
    yield from conv("embed", f"enc.{side}x{side}_conv")
    for n, module, level, i in _numbered(net.encoder, "down"):
        here = side >> (level + (module.resample is not None))
        yield from block(f"encoder/{n}", module, f"enc.{here}x{here}_{'down' if module.resample else f'block{i}'}")
    least = side >> level
    for n, module in enumerate(net.middle):
        yield from block(f"middle/{n}", module, f"dec.{least}x{least}_in{n}")
    for n, module, level, i in _numbered(net.decoder, "up"):
        here = least << (level + (module.resample is not None))
        yield from block(f"decoder/{n}", module, f"dec.{here}x{here}_{'up' if module.resample else f'block{i}'}")
