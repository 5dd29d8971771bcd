"""Names of the published U-Nets' weights: guided-diffusion, EDM, EDM2, diffusers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ddjax.denoisers.edm2 import EDM2
from ddjax.denoisers.layers.spatial_transformer import SpatialTransformer
from ddjax.denoisers.unet import UNet
from ddjax.denoisers.unet_designs import UNetDesign
from ddjax.denoisers.unet_encoder import UNetEncoder
from ddjax.interop.mapping import (
    CONVOLUTION,
    SAME,
    TRANSPOSED,
    Change,
    Entry,
    Fixed,
    by_heads,
    constant,
    convolution,
    joined,
    linear,
    norm,
    split,
)

Entries = list[Entry | Fixed]


def adm(net: UNet, *, new_order: bool = False) -> Entries:
    """openai/guided-diffusion and improved-diffusion (`UNetModel`; designs "adm" and "improved").

    new_order: their `use_new_attention_order`: queries, keys and values of all heads stand together.
    """
    entries = [*_adm_way_down(net, new_order), *norm("final/norm", "out.0"), *convolution("final/out", "out.2")]
    if net.num_classes:
        entries.append(Entry("condition/labels", "label_emb.weight"))
    n = -1
    for i, module in enumerate(net.decoder):
        n += net.joined[i]  # a block that resamples is the last layer of the one before it
        layer = 0 if net.joined[i] else 1 + (net.decoder[i - 1].attention is not None)
        entries += _adm_block(f"decoder/{i}", module, f"output_blocks.{n}", layer, new_order)
    return entries


def _adm_way_down(net: UNet | UNetEncoder, new_order: bool) -> Entries:
    entries = [
        *linear("condition/time_in", "time_embed.0"),
        *linear("condition/time_out", "time_embed.2"),
        *convolution("embed", "input_blocks.0.0"),
    ]
    for i, module in enumerate(net.encoder):
        entries += _adm_block(f"encoder/{i}", module, f"input_blocks.{i + 1}", 0, new_order)
    for i, module in enumerate(net.middle):
        entries += _adm_block(f"middle/{i}", module, "middle_block", 2 * i, new_order)
    return entries


def _adm_block(ours: str, module: Any, theirs: str, layer: int, new_order: bool) -> Entries:
    """A block, or a convolution that resamples, which is a layer of theirs; its attention is the second layer."""
    names = {
        "norm_in": "in_layers.0", "conv_in": "in_layers.2", "modulation": "emb_layers.1", "norm_out": "out_layers.0",
        "conv_out": "out_layers.3", "shortcut": "skip_connection",
    }  # fmt: skip

    at = f"{theirs}.{layer}"
    if not hasattr(module, "conv_in"):
        return convolution(f"{ours}/conv", f"{at}.{'op' if module.resample == 'down' else 'conv'}")
    entries = _res_block(ours, module, at, names)
    if module.attention is not None:
        order = by_heads(module.attention.heads) if new_order else SAME
        entries += _attention(f"{ours}/attention", f"{theirs}.1", ("norm", "qkv", "proj_out"), order, axes=1)
    return entries


def adm_classifier(net: UNetEncoder, *, new_order: bool = False) -> Entries:
    """openai/guided-diffusion's `EncoderUNetModel` with attention pooling; `new_order` as in `adm`."""
    pool, point = "out.2", Change(lambda w: w[:, :, 0].T, lambda w: w.T[:, :, None])
    order = by_heads(net.pool.heads)  # pooling has the new order in any case
    return [
        *_adm_way_down(net, new_order),
        *norm("norm", "out.0"),
        Entry("pool/position", f"{pool}.positional_embedding", TRANSPOSED),
        Entry("pool/qkv/kernel", f"{pool}.qkv_proj.weight", order.then(point)),
        Entry("pool/qkv/bias", f"{pool}.qkv_proj.bias", order),
        Entry("pool/out/kernel", f"{pool}.c_proj.weight", point),
        Entry("pool/out/bias", f"{pool}.c_proj.bias"),
    ]


def edm(net: UNet) -> Entries:
    """NVlabs/edm: `SongUNet` (designs "ddpm++" and "ncsn++") and `DhariwalUNet` ("adm_edm").

    A network without a latent leaves the layer of augmentation labels out: they are zero where nothing is augmented.
    """
    song, side = net.design.labels == "input", net.shape[0]
    names = {
        "norm_in": "norm0", "conv_in": "conv0", "modulation": "affine", "norm_out": "norm1", "conv_out": "conv1",
        "shortcut": "skip",
    }  # fmt: skip

    def block(ours: str, module: Any, theirs: str) -> Entries:
        entries = _res_block(ours, module, theirs, names)
        if module.attention is not None:
            order = _parts_last(module.attention.heads)
            entries += _attention(f"{ours}/attention", theirs, ("norm2", "qkv", "proj"), order, axes=2)
        if module.resample is not None:
            entries += [_filter(f"{theirs}.{layer}", net.design) for layer in ("conv0", "skip")]
        return entries

    entries = [*linear("condition/time_in", "map_layer0"), *linear("condition/time_out", "map_layer1")]
    if net.condition.frequencies is not None:
        entries.append(Entry("condition/frequencies", "map_noise.freqs"))
    if net.condition.latent is not None:
        entries += linear("condition/latent", "map_augment", bias=False)
    else:
        entries.append(Fixed("map_augment.weight"))
    if net.num_classes:
        entries.append(Entry("condition/labels", "map_label.weight", TRANSPOSED))
        entries += [Entry("condition/label_bias", "map_label.bias")] if song else []
    entries += convolution("embed", f"enc.{side}x{side}_conv") + _by_side(net, block)
    for level in range(len(net.inputs or ())):
        here = side >> (level + 1)
        entries += convolution(f"inputs/{level}", f"enc.{here}x{here}_aux_residual")
        entries.append(_filter(f"enc.{here}x{here}_aux_residual", net.design))
    last = f"dec.{side}x{side}_aux" if song else "out"
    return [*entries, *norm("final/norm", f"{last}_norm"), *convolution("final/out", f"{last}_conv")]


def edm2(net: EDM2) -> Entries:
    """NVlabs/edm2: `UNet`, and `Precond` of a network with an uncertainty."""

    def conv(ours: str, theirs: str, change: Change = SAME) -> Entry:
        return Entry(f"{ours}/kernel", f"{theirs}.weight", change.then(CONVOLUTION))

    def block(ours: str, module: Any, theirs: str) -> Entries:
        entries = [
            *linear(f"{ours}/modulation", f"{theirs}.emb_linear", bias=False),
            Entry(f"{ours}/modulation_gain", f"{theirs}.emb_gain"),
        ]
        for own, other in (("conv_in", "conv_res0"), ("conv_out", "conv_res1"), ("shortcut", "conv_skip")):
            entries += [] if getattr(module, own) is None else [conv(f"{ours}/{own}", f"{theirs}.{other}")]
        if module.attention is not None:
            order = _parts_last(module.attention.heads)
            entries.append(conv(f"{ours}/attention/qkv", f"{theirs}.attn_qkv", order))
            entries.append(conv(f"{ours}/attention/out", f"{theirs}.attn_proj"))
        return entries

    side = net.shape[0]
    entries = [
        Entry("frequencies", "emb_fourier.freqs"),
        Entry("phases", "emb_fourier.phases"),
        *linear("time_in", "emb_noise", bias=False),
        conv("embed", f"enc.{side}x{side}_conv"),
        conv("final", "out_conv"),
        Entry("gain", "out_gain"),
    ]
    entries += linear("labels", "emb_label", bias=False) if net.num_classes else []
    entries += _by_side(net, block)
    if net.uncertainty is None:
        return entries
    # Of their `Precond`, in which the network is a part.
    return [
        *(dataclasses.replace(entry, theirs=f"unet.{entry.theirs}") for entry in entries),
        Entry("uncertainty/frequencies", "logvar_fourier.freqs"),
        Entry("uncertainty/phases", "logvar_fourier.phases"),
        *linear("uncertainty/linear", "logvar_linear", bias=False),
    ]


def diffusers(net: UNet, *, linear_projection: bool = False) -> Entries:
    """Diffusers' `UNet2DModel` and `UNet2DConditionModel`: a network of `diffusers_options` or `conditioned_options`.

    linear_projection: whether the layers around transformers are linear ones of theirs, not convolutions of a pixel.
    The entry that ours attends to where there is no sequence is none of theirs: zeros, which stay.
    """
    names = {
        "norm_in": "norm1", "conv_in": "conv1", "modulation": "time_emb_proj", "norm_out": "norm2",
        "conv_out": "conv2", "shortcut": "conv_shortcut",
    }  # fmt: skip

    def block(ours: str, module: Any, theirs: str, i: int, change: str) -> Entries:
        if not hasattr(module, "conv_in"):
            return convolution(f"{ours}/conv", f"{theirs}.{change}.0.conv")
        at = f"{theirs}.{change}.0" if module.resample is not None else f"{theirs}.resnets.{i}"
        entries = _res_block(ours, module, at, names)
        if isinstance(module.attention, SpatialTransformer):
            own = f"{ours}/attention"
            entries += _transformer(own, module.attention, f"{theirs}.attentions.{i}", linear_projection)
        elif module.attention is not None:
            at, heads, width = f"{theirs}.attentions.{i}", module.attention.heads, module.conv_out.kernel.shape[-1]
            order = joined((width,) * 3).then(by_heads(heads))
            weights, biases = (tuple(f"{at}.to_{letter}.{part}" for letter in "qkv") for part in ("weight", "bias"))
            entries += norm(f"{ours}/attention/norm", f"{at}.group_norm")
            entries.append(Entry(f"{ours}/attention/qkv/kernel", weights, order.then(TRANSPOSED)))
            entries.append(Entry(f"{ours}/attention/qkv/bias", biases, order))
            entries += linear(f"{ours}/attention/out", f"{at}.to_out.0")
        return entries

    entries = [
        *linear("condition/time_in", "time_embedding.linear_1"),
        *linear("condition/time_out", "time_embedding.linear_2"),
        *convolution("embed", "conv_in"),
        *norm("final/norm", "conv_norm_out"),
        *convolution("final/out", "conv_out"),
    ]
    if net.num_classes:
        entries.append(Entry("condition/labels", "class_embedding.weight"))
    if net.nothing is not None:
        entries.append(constant("nothing", np.zeros(net.nothing.shape, np.float32)))
    for n, module, level, i in _numbered(net.encoder, "down"):
        entries += block(f"encoder/{n}", module, f"down_blocks.{level}", i, "downsamplers")
    for n, module in enumerate(net.middle):
        entries += block(f"middle/{n}", module, "mid_block", n, "")
    for n, module, level, i in _numbered(net.decoder, "up"):
        entries += block(f"decoder/{n}", module, f"up_blocks.{level}", i, "upsamplers")
    return entries


def _transformer(ours: str, module: SpatialTransformer, theirs: str, linear_projection: bool) -> Entries:
    width, heads = module.embed.kernel.shape[0], module.heads
    around = linear if linear_projection else partial(_pixelwise, axes=2)
    entries = [*norm(f"{ours}/norm", f"{theirs}.norm"), *around(f"{ours}/embed", f"{theirs}.proj_in")]
    entries += around(f"{ours}/out", f"{theirs}.proj_out")
    for i in range(len(module.blocks)):
        own, other = f"{ours}/blocks/{i}", f"{theirs}.transformer_blocks.{i}"
        for layer, at, letters in (("attention/qkv", "attn1", "qkv"), ("cross/key_value", "attn2", "kv")):
            parts = len(letters)
            order = joined((width,) * parts).then(by_heads(heads, parts)).then(TRANSPOSED)
            entries.append(Entry(f"{own}/{layer}/kernel", tuple(f"{other}.{at}.to_{x}.weight" for x in letters), order))
        entries += [
            *norm(f"{own}/norm_a", f"{other}.norm1"),
            *linear(f"{own}/attention/out", f"{other}.attn1.to_out.0"),
            *norm(f"{own}/cross/norm", f"{other}.norm2"),
            *linear(f"{own}/cross/query", f"{other}.attn2.to_q", bias=False),
            *linear(f"{own}/cross/out", f"{other}.attn2.to_out.0"),
            *norm(f"{own}/norm_m", f"{other}.norm3"),
            *linear(f"{own}/mlp/down", f"{other}.ff.net.2"),
        ]
        for part, name, change in (("kernel", "weight", TRANSPOSED), ("bias", "bias", SAME)):
            both = change.then(split((4 * width,) * 2, axis=-1))
            entries.append(
                Entry(tuple(f"{own}/mlp/{x}/{part}" for x in ("up", "gate")), f"{other}.ff.net.0.proj.{name}", both)
            )
    return entries


# What a UNet2DModel must have in its config.json to be one of ours, where it is not the default.
_DEFAULTS = {
    "center_input_sample": (False,), "time_embedding_type": ("positional",), "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,), "act_fn": ("silu", "swish"), "class_embed_type": (None,),
    "time_embedding_dim": (None,), "resnet_time_scale_shift": ("default", "scale_shift"), "freq_shift": (0, 1),
}  # fmt: skip
_BLOCKS = {
    "DownBlock2D": (False, "conv"), "AttnDownBlock2D": (True, None), "ResnetDownsampleBlock2D": (False, "resnet"),
    "UpBlock2D": (False, "conv"), "AttnUpBlock2D": (True, None), "ResnetUpsampleBlock2D": (False, "resnet"),
}  # fmt: skip


def diffusers_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `UNet` for the config.json of a `UNet2DModel`, whose times are steps: time_scale is 999.

    Raises ValueError for what is not a `UNet`: other blocks than residual ones with or without attention, blocks up
    that are not those down in a mirror, Fourier features of the time, another middle.
    """
    given = {
        "down_block_types": ("DownBlock2D", *("AttnDownBlock2D",) * 3), "attention_head_dim": 8, "dropout": 0.0,
        "up_block_types": (*("AttnUpBlock2D",) * 3, "UpBlock2D"), "block_out_channels": (224, 448, 672, 896),
        "layers_per_block": 2, "norm_num_groups": 32, "norm_eps": 1e-5, "downsample_padding": 1, "freq_shift": 0,
        "downsample_type": "conv", "upsample_type": "conv", "resnet_time_scale_shift": "default", "in_channels": 3,
        "out_channels": 3, "flip_sin_to_cos": True, "add_attention": True, **config,
    }  # fmt: skip
    for key, values in _DEFAULTS.items():
        if key in given and given[key] not in values:
            raise ValueError(f"a UNet2DModel with {key}={given[key]!r} is no UNet of ours: expected {values}")
    kinds = _mirrored(given, _BLOCKS)
    resamplers = {kind or given[f"{way}sample_type"] for way in ("down", "up") for _, kind in kinds[:-1]}
    if len(resamplers) > 1 or not resamplers <= {"conv", "resnet"}:
        raise ValueError(f"resolutions change by {sorted(resamplers)}: expected all by 'conv', or all by 'resnet'")
    scale_shift = given["resnet_time_scale_shift"] == "scale_shift"
    groups = given["norm_num_groups"]
    if given.get("attn_norm_num_groups") != groups and (scale_shift or given.get("attn_norm_num_groups") is not None):
        raise ValueError(f"attn_norm_num_groups={given.get('attn_norm_num_groups')}: expected {groups}, as elsewhere")
    heads = {"heads": 1} if given["attention_head_dim"] is None else {"head_width": given["attention_head_dim"]}
    resample = "block" if resamplers == {"resnet"} else "conv"
    return heads | _sizes(given, kinds, resample=resample, middle_attention=given["add_attention"])


def _mirrored(given: Mapping[str, Any], known: Mapping[str, tuple]) -> list[tuple]:
    """What the blocks of each resolution are. Raises ValueError for those that are not known, and for other ways up."""
    down, up = tuple(given["down_block_types"]), tuple(given["up_block_types"][::-1])
    kinds = [[known.get(name) for name in names] for names in (down, up)]
    if None in kinds[0] or kinds[0] != kinds[1]:
        raise ValueError(f"blocks {down} down and {up[::-1]} up are not residual blocks, the same in a mirror")
    return kinds[0]


def _sizes(given: Mapping[str, Any], kinds: Sequence[tuple], **design: Any) -> dict[str, Any]:
    """Arguments of `UNet` but for the heads; kinds: of each resolution, whether its blocks attend, first."""
    side, widths = given.get("sample_size"), given["block_out_channels"]
    if not side:
        raise ValueError("sample_size is not given: it says of which images the network is")
    shape = (side, side) if isinstance(side, int) else tuple(side)
    return {
        "shape": (*shape, given["in_channels"]),
        "out_channels": given["out_channels"],
        "design": UNetDesign(
            padding=(1, 1) if given["downsample_padding"] else (0, 1),
            scale_shift=given["resnet_time_scale_shift"] == "scale_shift",
            groups=given["norm_num_groups"],
            epsilon=given["norm_eps"],
            time="cos_sin" if given["flip_sin_to_cos"] else "sin_cos",
            endpoint=given["freq_shift"] == 1,
            **design,
        ),
        "width": widths[0],
        "multipliers": tuple(width / widths[0] for width in widths),
        "blocks": given["layers_per_block"],
        "attend_at": tuple(shape[0] >> i for i, (attends, *_) in enumerate(kinds) if attends),
        "num_classes": given.get("num_class_embeds") or 0,
        "dropout": given["dropout"],
        "time_scale": 999.0,
    }


# The same of a UNet2DConditionModel. What else its config.json may say changes no number (memory, precision).
_CONDITION_DEFAULTS = {
    "center_input_sample": (False,), "time_embedding_type": ("positional",), "act_fn": ("silu", "swish"),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",), "mid_block_scale_factor": (1,), "only_cross_attention": (False,),
    "encoder_hid_dim": (None,), "encoder_hid_dim_type": (None,), "num_attention_heads": (None,),
    "dual_cross_attention": (False,), "class_embed_type": (None,), "addition_embed_type": (None,),
    "resnet_skip_time_act": (False,), "resnet_out_scale_factor": (1,), "time_embedding_dim": (None,),
    "time_embedding_act_fn": (None,), "timestep_post_act": (None,), "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,), "conv_out_kernel": (3,), "attention_type": ("default",),
    "class_embeddings_concat": (False,), "mid_block_only_cross_attention": (None, False),
    "cross_attention_norm": (None,), "reverse_transformer_layers_per_block": (None,),
    "resnet_time_scale_shift": ("default", "scale_shift"), "freq_shift": (0, 1),
}  # fmt: skip
_CONDITION_BLOCKS = {
    "DownBlock2D": (False,), "CrossAttnDownBlock2D": (True,), "UpBlock2D": (False,), "CrossAttnUpBlock2D": (True,),
}  # fmt: skip


def conditioned_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `UNet` for the config.json of a `UNet2DConditionModel` (Stable Diffusion 1 and 2), as above.

    Raises ValueError for what is not a `UNet`: the same, numbers that differ from resolution to resolution and are one
    here (blocks, depths of transformers; heads, unless all have one width), and what is added to the time (SDXL).
    """
    given = {
        "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"), "attention_head_dim": 8, "dropout": 0.0,
        "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3), "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2, "norm_num_groups": 32, "norm_eps": 1e-5, "downsample_padding": 1, "freq_shift": 0,
        "cross_attention_dim": 1280, "transformer_layers_per_block": 1, "resnet_time_scale_shift": "default",
        "in_channels": 4, "out_channels": 4, "flip_sin_to_cos": True, **config,
    }  # fmt: skip
    for key, values in _CONDITION_DEFAULTS.items():
        if key in given and given[key] not in values:
            raise ValueError(f"a UNet2DConditionModel with {key}={given[key]!r} is no UNet of ours: expected {values}")
    for key in ("layers_per_block", "cross_attention_dim", "transformer_layers_per_block"):
        each = given[key] if isinstance(given[key], Sequence) else [given[key]]
        if len(set(map(str, each))) > 1 or not isinstance(each[0], int):
            raise ValueError(f"{key}={given[key]!r}: expected one number, at all resolutions")
        given[key] = each[0]
    widths, heads = given["block_out_channels"], given["attention_head_dim"]  # their name for the number of heads
    heads = list(heads) if isinstance(heads, Sequence) else [heads] * len(widths)
    head_widths = {width / number for width, number in zip(widths, heads, strict=True)}
    if len(set(heads)) > 1 and len(head_widths) > 1:
        raise ValueError(f"attention_head_dim={heads} heads of {list(widths)} features: expected as many, or as wide")
    return {
        **({"heads": heads[0]} if len(set(heads)) == 1 else {"head_width": int(head_widths.pop())}),
        **_sizes(given, _mirrored(given, _CONDITION_BLOCKS), resample="conv"),
        "context_width": given["cross_attention_dim"],
        "transformer_depth": given["transformer_layers_per_block"],
    }


def _res_block(ours: str, module: Any, theirs: str, names: Mapping[str, str]) -> Entries:
    entries: Entries = []
    for name, other in names.items():
        if (layer := getattr(module, name)) is not None:
            kind = norm if "norm" in name else linear if name == "modulation" else convolution
            entries += kind(f"{ours}/{name}", f"{theirs}.{other}", bias=layer.bias is not None)
    return entries


def _attention(ours: str, theirs: str, names: tuple[str, str, str], order: Change, axes: int) -> Entries:
    """Their layers are convolutions of one pixel, in so many axes."""
    before, qkv, out = (f"{theirs}.{name}" for name in names)
    return [
        *norm(f"{ours}/norm", before),
        *_pixelwise(f"{ours}/qkv", qkv, axes=axes, order=order),
        *_pixelwise(f"{ours}/out", out, axes=axes),
    ]


def _pixelwise(ours: str, theirs: str, *, axes: int, order: Change = SAME) -> Entries:
    """A linear layer that is a convolution of one pixel, in so many axes, of theirs."""
    point = Change(
        lambda w: w.reshape(w.shape[:2]).T,
        lambda w: w.T.reshape(*w.shape[::-1], *(1,) * axes),
    )
    return [
        Entry(f"{ours}/kernel", f"{theirs}.weight", order.then(point)),
        Entry(f"{ours}/bias", f"{theirs}.bias", order),
    ]


def _parts_last(heads: int) -> Change:
    """Rows (head, feature, q/k/v) in our order, (head, q/k/v, feature)."""

    def order(w: np.ndarray, *sizes: int) -> np.ndarray:
        w = w.reshape(heads, *sizes, *w.shape[1:]).swapaxes(1, 2)
        return w.reshape(-1, *w.shape[3:])

    return Change(lambda w: order(w, -1, 3), lambda w: order(w, 3, -1))


def _filter(theirs: str, design: UNetDesign) -> Fixed:
    weights = np.asarray(design.weights, np.float32)
    return Fixed(f"{theirs}.resample_filter", (np.outer(weights, weights) / weights.sum() ** 2)[None, None], True)


def _numbered(blocks: Any, change: str) -> Iterator[tuple[int, Any, int, int]]:
    """Number, block, resolution, number at this resolution; a block that resamples is the last of one."""
    level, i = 0, 0
    for n, module in enumerate(blocks):
        yield n, module, level, i
        level, i = (level + 1, 0) if module.resample == change else (level, i + 1)


def _by_side(net: Any, block: Callable[[str, Any, str], Entries]) -> Entries:
    """Of blocks that are called by the side of the image that they give (NVlabs)."""
    entries: Entries = []
    for n, module, level, i in _numbered(net.encoder, "down"):
        here = net.shape[0] >> (level + (module.resample is not None))
        entries += block(f"encoder/{n}", module, f"enc.{here}x{here}_{'down' if module.resample else f'block{i}'}")
    for n, module in enumerate(net.middle):
        entries += block(f"middle/{n}", module, f"dec.{here}x{here}_in{n}")
    least = here
    for n, module, level, i in _numbered(net.decoder, "up"):
        here = least << (level + (module.resample is not None))
        entries += block(f"decoder/{n}", module, f"dec.{here}x{here}_{'up' if module.resample else f'block{i}'}")
    return entries
