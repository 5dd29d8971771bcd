"""Families of U-Nets: what their tensors say of their sizes, and the processes they were trained under."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from flax import nnx

from ddjax import grids, solvers
from ddjax.denoisers import EDM2, UNet, UNetDesign, UNetEncoder
from ddjax.interop import scheduler, unet
from ddjax.interop.images import STEPS, chain_steps
from ddjax.interop.mapping import Entry, Fixed
from ddjax.interop.published import CLASSES, Family, Model
from ddjax.interop.tensors import Tensors
from ddjax.processes import Gaussian, LearnedVariance
from ddjax.schedules import EDM, Table

NETWORK = ("shape", "out_channels", "design", "width", "multipliers", "blocks", "attend_at", "num_classes",
           "heads", "head_width", "latent", "time_scale", "uncertainty",
           "context_width", "transformer_depth")  # fmt: skip


def _network(s: Mapping[str, Any], network: type) -> Callable[..., nnx.Module]:
    options = {name: s[name] for name in NETWORK if name in s}
    if "design" in options and not isinstance(options["design"], str):
        options["design"] = UNetDesign(**options["design"])
    return partial(network, **options)


def _model(
    s: Mapping[str, Any], entries: Callable[[Any], list[Entry | Fixed]], network: type = UNet, **about: Any
) -> Model:
    make = _network(s, network)
    net = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    return Model(make=make, entries=entries(net), shape=tuple(s["shape"]), num_classes=s["num_classes"], **about)


# -- guided-diffusion, improved-diffusion --------------------------------------------------------------------------


def _adm_settings(tensors: Tensors, config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    known = {**config, **given}
    size = known.get("size", known.get("image_size"))
    if size is None:
        raise ValueError("nothing in the tensors says how large an image is: give size=...")
    width, channels = (tensors.shape_of(n)[1] for n in ("time_embed.0.weight", "input_blocks.0.0.weight"))
    number = 1 + max(int(n.split(".")[1]) for n in tensors if n.startswith("output_blocks."))
    up = [n for n in range(number) if any(f"output_blocks.{n}.{i}.{layer}.weight" in tensors
          for i in (1, 2) for layer in ("conv", "in_layers.2"))]  # fmt: skip
    blocks = up[0] if up else number - 1
    levels = range(0, number, blocks + 1)[::-1]  # the first block up at each resolution
    widths = [tensors.shape_of(f"output_blocks.{n}.0.out_layers.3.weight")[0] for n in levels]
    attend = [size >> i for i, n in enumerate(levels) if f"output_blocks.{n}.1.qkv.weight" in tensors]
    modulation = tensors.shape_of("output_blocks.0.0.emb_layers.1.weight")[0]
    convs = any(re.fullmatch(r"input_blocks\.\d+\.0\.op\.weight", n) for n in tensors)
    settings = {
        "size": size,
        "shape": [size, size, channels],
        "out_channels": tensors.shape_of("out.2.weight")[0],
        "design": {"resample": "conv" if convs else "block", "scale_shift": modulation == 2 * widths[-1]},
        "width": width,
        "multipliers": [w / width for w in widths],
        "blocks": blocks,
        "attend_at": attend,
        "num_classes": tensors.shape_of("label_emb.weight")[0] if "label_emb.weight" in tensors else 0,
        "time_scale": STEPS - 1.0,
        # Of the authors' models: that of ImageNet-64 has its own order and schedule, that of ImageNet-128 four heads.
        "new_order": known.get("new_order", known.get("use_new_attention_order", size == 64 and not convs)),
        "cosine": known.get("cosine", known.get("noise_schedule", "cosine" if size == 64 else "") == "cosine"),
    }
    heads = known.get("heads", known.get("num_heads", 4 if size == 128 or convs else None))
    return settings | ({"heads": heads} if heads else {"head_width": known.get("head_width", 64)})


def _adm_model(s: Mapping[str, Any]) -> Model:
    schedule = Table.ddpm_cosine() if s["cosine"] else Table.ddpm_linear()
    learned = s["out_channels"] == 2 * s["shape"][2]
    return _model(
        s,
        partial(unet.adm, new_order=s["new_order"]),
        process=LearnedVariance(schedule) if learned else Gaussian(schedule),
        kind="noise",
        grid=chain_steps,
    )


ADM = Family(
    "adm",
    "openai/guided-diffusion and improved-diffusion, Dhariwal & Nichol 2021",
    marks=("time_embed.0.weight", "input_blocks.0.0.weight", "input_blocks.1.0.in_layers.0.weight", "out.2.weight",
           "middle_block.1.qkv.weight"),
    settings=_adm_settings,
    model=_adm_model,
)  # fmt: skip


def _classifier_settings(tensors: Tensors, config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    known = {**config, **given}
    size = known.get("size", known.get("image_size"))
    if size is None:
        raise ValueError("nothing in the tensors says how large an image is: give size=...")
    width, channels = (tensors.shape_of(n)[1] for n in ("time_embed.0.weight", "input_blocks.0.0.weight"))
    number = 1 + max(int(n.split(".")[1]) for n in tensors if n.startswith("input_blocks."))
    sides = math.isqrt(tensors.shape_of("out.2.positional_embedding")[1] - 1)
    levels = 1 + (size // sides).bit_length() - 1
    blocks = number // levels - 1  # the first convolution stands where the last resolution has no way down
    firsts = range(1, number, blocks + 1)
    widths = [tensors.shape_of(f"input_blocks.{n}.0.out_layers.3.weight")[0] for n in firsts]
    modulation = tensors.shape_of("input_blocks.1.0.emb_layers.1.weight")[0]
    convs = any(re.fullmatch(r"input_blocks\.\d+\.0\.op\.weight", n) for n in tensors)
    return {
        "size": size,
        "shape": [size, size, channels],
        "classes": tensors.shape_of("out.2.c_proj.weight")[0],
        "design": {"resample": "conv" if convs else "block", "scale_shift": modulation == 2 * widths[0]},
        "width": width,
        "multipliers": [w / width for w in widths],
        "blocks": blocks,
        "attend_at": [size >> i for i, n in enumerate(firsts) if f"input_blocks.{n}.1.qkv.weight" in tensors],
        "head_width": known.get("head_width", 64),
        "time_scale": STEPS - 1.0,
        "new_order": known.get("new_order", known.get("use_new_attention_order", False)),
    }


def _classifier_model(s: Mapping[str, Any]) -> Model:
    names = ("shape", "classes", "width", "multipliers", "blocks", "attend_at", "head_width", "time_scale")
    make = partial(UNetEncoder, design=UNetDesign(**s["design"]), **{name: s[name] for name in names})
    net = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    entries = unet.adm_classifier(net, new_order=s["new_order"])
    process = Gaussian(Table.ddpm_linear())
    return Model(make=make, entries=entries, process=process, kind=CLASSES, shape=tuple(s["shape"]), grid=chain_steps)


ADM_CLASSIFIER = Family(
    "adm_classifier",
    "openai/guided-diffusion's classifiers of noisy images, Dhariwal & Nichol 2021",
    marks=("time_embed.0.weight", "input_blocks.0.0.weight", "out.2.positional_embedding", "middle_block.1.qkv.weight"),
    settings=_classifier_settings,
    model=_classifier_model,
)

# -- NVlabs/edm, edm2 ----------------------------------------------------------------------------------------------


def _edm_settings(
    tensors: Tensors, config: Mapping[str, Any], given: Mapping[str, Any], *, song: bool = False, second: bool = False
) -> dict[str, Any]:
    names = [re.match(r"enc\.(\d+)x\d+_(conv|block\d+)\.", n) for n in tensors]
    sides = sorted({int(m[1]) for m in names if m}, reverse=True)
    size, blocks = sides[0], len({m[2] for m in names if m and int(m[1]) == sides[0]} - {"conv"})
    first = tensors.shape_of(f"enc.{size}x{size}_conv.weight")
    inner, qkv = ("conv_res1", "attn_qkv") if second else ("conv1", "qkv")
    widths = [tensors.shape_of(f"enc.{side}x{side}_block0.{inner}.weight")[0] for side in sides]
    attend = [side for side in sides if f"enc.{side}x{side}_block0.{qkv}.weight" in tensors]
    label, width = "emb_label.weight" if second else "map_label.weight", first[0]
    if not second:
        width = tensors.shape_of("map_layer1.weight")[0] // 4
    out = f"dec.{size}x{size}_aux_conv.weight" if song else "out_conv.weight"
    settings = {
        "shape": [size, size, first[1] - second],
        "out_channels": tensors.shape_of(out)[0],
        "width": width,
        "multipliers": [w / width for w in widths],
        "blocks": blocks,
        "attend_at": attend,
        "num_classes": tensors.shape_of(label)[1] if label in tensors else 0,
        "time_scale": 1.0,
    }
    if not second:
        design = ("ncsn++" if "map_noise.freqs" in tensors else "ddpm++") if song else "adm_edm"
        settings |= {"design": design, "latent": given.get("latent", 0)}
    return settings if song else settings | {"head_width": given.get("head_width", 64)}


def _edm_model(s: Mapping[str, Any], second: bool = False) -> Model:
    schedule = EDM()
    return _model(
        s,
        unet.edm2 if second else unet.edm,
        kind="edm",
        process=Gaussian(schedule, data_std=0.5),
        network=EDM2 if second else UNet,
        steps=32 if second else 18,
        solver=solvers.heun_in_noise,
        grid=lambda steps: grids.karras(schedule, steps, sigma_min=0.002, sigma_max=80.0, rho=7.0),
    )


_EDM2_MARKS = ("emb_noise.weight", "emb_fourier.freqs", "out_conv.weight", "out_gain")
_UNCERTAINTY = "logvar_fourier.freqs"


def _edm2_settings(tensors: Tensors, config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    if _UNCERTAINTY not in tensors:
        return _edm_settings(tensors, config, given, second=True)
    settings = _edm_settings(tensors.under("unet."), config, given, second=True)
    return settings | {"uncertainty": tensors.shape_of(_UNCERTAINTY)[0]}


_EDM_MARKS = ("map_layer0.weight", "map_layer1.weight")
EDM_SONG = Family(
    "edm_song",
    "NVlabs/edm, DDPM++ and NCSN++ (EDMPrecond), Karras et al. 2022",
    marks=_EDM_MARKS,
    without=("out_conv.weight",),
    settings=partial(_edm_settings, song=True),
    model=_edm_model,
)
EDM_ADM = Family(
    "edm_adm",
    "NVlabs/edm, ADM (EDMPrecond), Karras et al. 2022",
    marks=(*_EDM_MARKS, "out_conv.weight"),
    settings=_edm_settings,
    model=_edm_model,
)
EDM2_UNET = Family(
    "edm2",
    "NVlabs/edm2, Karras et al. 2024",
    marks=(*(f"unet.{name}" for name in _EDM2_MARKS), _UNCERTAINTY, "logvar_linear.weight"),  # `Precond`
    others=(_EDM2_MARKS,),
    settings=_edm2_settings,
    model=partial(_edm_model, second=True),
)

# -- diffusers' UNet2DModel and UNet2DConditionModel ---------------------------------------------------------------


def _diffusers_settings(
    tensors: Tensors, config: Mapping[str, Any], given: Mapping[str, Any], conditioned: bool = False
) -> dict[str, Any]:
    if "block_out_channels" not in config:
        raise ValueError("the tensors of such a U-Net do not say all of it: put its config.json beside them")
    options = (unet.conditioned_options if conditioned else unet.diffusers_options)(config)
    if conditioned:
        options["linear_projection"] = bool(config.get("use_linear_projection", False))
    said = scheduler.settings(config, given)
    return {**options, **said} | {
        "time_scale": scheduler.clock(said),
        "shape": list(options["shape"]),
        "multipliers": list(options["multipliers"]),
        "attend_at": list(options["attend_at"]),
        "design": {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(options["design"]).items()},
    }


def _diffusers_model(s: Mapping[str, Any]) -> Model:
    entries = partial(unet.diffusers, linear_projection=s.get("linear_projection", False))
    return _model(s, entries, **scheduler.model(s, s["out_channels"] == 2 * s["shape"][2]))


_DIFFUSERS_MARKS = ("time_embedding.linear_1.weight", "conv_in.weight", "conv_norm_out.weight",
                    "mid_block.resnets.0.conv1.bias", "down_blocks.0.resnets.0.time_emb_proj.weight")  # fmt: skip
_WORDS = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
DIFFUSERS_UNET = Family(
    "diffusers_unet",
    "diffusers' UNet2DModel",
    marks=_DIFFUSERS_MARKS,
    without=(_WORDS,),
    settings=_diffusers_settings,
    model=_diffusers_model,
    claims=lambda config: None if "_class_name" not in config else config["_class_name"] == "UNet2DModel",
)
DIFFUSERS_CONDITIONED_UNET = Family(
    "diffusers_conditioned_unet",
    "diffusers' UNet2DConditionModel (latent diffusion; Stable Diffusion 1 and 2)",
    marks=(*_DIFFUSERS_MARKS, _WORDS),
    settings=partial(_diffusers_settings, conditioned=True),
    model=_diffusers_model,
    claims=lambda config: None if "_class_name" not in config else config["_class_name"] == "UNet2DConditionModel",
)
