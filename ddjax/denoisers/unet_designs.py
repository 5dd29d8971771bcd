"""What sets the published U-Nets apart, and their sizes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class UNetDesign:
    """Choices of a `UNet` that its weights depend on, apart from sizes.

    Attributes:
        resample: "block": residual blocks change the resolution; "conv": convolutions do (`layers.Resampling`).
        padding: zeros before and after the image of a convolution down.
        weights: of the filter with which residual blocks resample.
        project: shortcuts of those blocks have a convolution though the width stays.
        scale_shift: the condition scales and shifts, or is added (`layers.ResBlock`).
        modulation_bias: the layers that do this have biases.
        told_norms: the condition acts in their place on every norm, of both halves of a block and the last, which have
            no parameters of their own (`layers.GroupNorm`).
        gain: times every sum of a branch and its shortcut.
        groups, least, epsilon: of the norms (`layers.GroupNorm`).
        up_attention: of the blocks on the way up "all" attend where those on the way down do, or the "last" of each
            resolution.
        middle_attention: the first block of the middle attends.
        scaled_input: the first convolution gives width * multipliers[0] features, not width.
        residual_input: the image itself comes in again at each resolution, downsampled and convolved.
        input_waves: sines and cosines of 2^(n + 1) pi x, for these n, stand beside each value x.
        add_input: the state is added to the output.
        time: "cos_sin", "sin_cos" (the order of the waves of the time) or "fourier" (waves of random frequencies).
        endpoint: the lowest frequency is 1e-4 exactly.
        time_multiple: features of the time over width.
        cond_multiple: width of the conditioning vector over width.
        cond_silu: whether it has passed through silu, once for all blocks.
        labels: "output": a label's vector is added behind the two layers of the time; "input": before them; "beside":
            it stands beside the waves of the time, before them.
    """

    resample: str = "block"
    padding: tuple[int, int] = (1, 1)
    weights: tuple[float, ...] = (1, 1)
    project: bool = False
    scale_shift: bool = True
    modulation_bias: bool = True
    told_norms: bool = False
    gain: float = 1.0
    groups: int = 32
    least: int = 1
    epsilon: float = 1e-5
    up_attention: str = "all"
    middle_attention: bool = True
    scaled_input: bool = True
    residual_input: bool = False
    input_waves: tuple[int, ...] = ()
    add_input: bool = False
    time: str = "cos_sin"
    endpoint: bool = False
    time_multiple: int = 1
    cond_multiple: int = 4
    cond_silu: bool = True
    labels: str = "output"

    def __post_init__(self):
        for name, values in _VALUES.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(map(repr, values))}")
        for name in ("padding", "weights", "input_waves"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.weights) % 2 or self.weights != self.weights[::-1]:
            raise ValueError(f"weights={self.weights}: expected an even number of them, the same from either end")


_VALUES = {
    "resample": ("block", "conv"),
    "up_attention": ("all", "last"),
    "time": ("cos_sin", "sin_cos", "fourier"),
    "labels": ("output", "input", "beside"),
}

_ADM = UNetDesign()
_DDPMPP = UNetDesign(
    project=True, scale_shift=False, gain=math.sqrt(0.5), least=4, epsilon=1e-6, up_attention="last",
    scaled_input=False, time="sin_cos", endpoint=True, labels="input",
)  # fmt: skip
_VDM = UNetDesign(
    scale_shift=False, modulation_bias=False, epsilon=1e-6, input_waves=(6, 7), add_input=True, time="sin_cos",
    endpoint=True,
)  # fmt: skip
_MD4 = dataclasses.replace(_VDM, input_waves=(), add_input=False, cond_multiple=1, cond_silu=False, labels="beside")

UNET_DESIGNS = {
    # Ho et al. 2020, appendix B.
    "ddpm": UNetDesign(resample="conv", padding=(0, 1), scale_shift=False, epsilon=1e-6, time="sin_cos", endpoint=True),
    # Nichol & Dhariwal 2021, section 3 (improved-diffusion; ADM with resblock_updown=False).
    "improved": UNetDesign(resample="conv"),
    # Dhariwal & Nichol 2021, section 3.
    "adm": _ADM,
    # The same as Karras et al. 2022 have it (DhariwalUNet): fewer groups where blocks are narrow.
    "adm_edm": dataclasses.replace(_ADM, least=4),
    # Song et al. 2021, appendix H, as Karras et al. 2022 have them (SongUNet; table 7).
    "ddpm++": _DDPMPP,
    "ncsn++": dataclasses.replace(_DDPMPP, weights=(1, 3, 3, 1), residual_input=True, time="fourier", time_multiple=2),
    # Kingma et al. 2021, appendix B: one resolution.
    "vdm": _VDM,
    # Shi et al. 2024, appendix F: VDM's for tokens, the conditioning vector narrow and without silu.
    "md4": _MD4,
    # The same for ImageNet-64 (google-deepmind/md4, networks/uvit.py), with `UNet(transformer=)`.
    "md4_transformer": dataclasses.replace(_MD4, told_norms=True, scaled_input=False),
}

# Arguments of `UNet` for published networks, without the shape, labels and states.
UNET_SIZES: dict[str, dict[str, Any]] = {
    "ddpm-cifar10": {
        "design": "ddpm", "width": 128, "multipliers": (1, 2, 2, 2), "blocks": 2, "attend_at": (16,), "dropout": 0.1,
    },
    "improved-imagenet64": {
        "design": "improved", "width": 128, "multipliers": (1, 2, 3, 4), "blocks": 3, "attend_at": (16, 8), "heads": 4,
    },
    "adm-imagenet64": {
        "design": "adm", "width": 192, "multipliers": (1, 2, 3, 4), "blocks": 3, "attend_at": (32, 16, 8),
        "head_width": 64, "dropout": 0.1,
    },
    "adm-imagenet128": {
        "design": "adm", "width": 256, "multipliers": (1, 1, 2, 3, 4), "blocks": 2, "attend_at": (32, 16, 8),
        "heads": 4,
    },
    "adm-imagenet256": {
        "design": "adm", "width": 256, "multipliers": (1, 1, 2, 2, 4, 4), "blocks": 2, "attend_at": (32, 16, 8),
        "head_width": 64,
    },
    "adm-imagenet512": {
        "design": "adm", "width": 256, "multipliers": (0.5, 1, 1, 2, 2, 4, 4), "blocks": 2, "attend_at": (32, 16, 8),
        "head_width": 64,
    },
    "edm-imagenet64": {
        "design": "adm_edm", "width": 192, "multipliers": (1, 2, 3, 4), "blocks": 3, "attend_at": (32, 16, 8),
        "head_width": 64, "dropout": 0.1,
    },
    "ddpm++-cifar10": {
        "design": "ddpm++", "width": 128, "multipliers": (2, 2, 2), "blocks": 4, "attend_at": (16,), "dropout": 0.13,
    },
    "ncsn++-cifar10": {
        "design": "ncsn++", "width": 128, "multipliers": (2, 2, 2), "blocks": 4, "attend_at": (16,), "dropout": 0.13,
    },
    "ddpm++-ffhq64": {
        "design": "ddpm++", "width": 128, "multipliers": (1, 2, 2, 2), "blocks": 4, "attend_at": (16,), "dropout": 0.05,
    },
    "ncsn++-ffhq64": {
        "design": "ncsn++", "width": 128, "multipliers": (1, 2, 2, 2), "blocks": 4, "attend_at": (16,), "dropout": 0.05,
    },
    "vdm-cifar10": {"design": "vdm", "width": 128, "multipliers": (1,), "blocks": 32, "dropout": 0.1},
    "md4-cifar10": {
        "design": "md4", "width": 128, "multipliers": (1,), "blocks": 32, "dropout": 0.1, "embed_width": 128,
    },
    "md4-imagenet64": {
        "design": "md4_transformer", "width": 256, "multipliers": (1,), "blocks": 8, "dropout": 0.1, "embed_width": 256,
        "transformer": {"width": 768, "depth": 20, "heads": 12},
    },
}  # fmt: skip
