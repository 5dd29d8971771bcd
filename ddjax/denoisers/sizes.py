"""Named sizes: options of networks, by the names under which they were published.

DiT(**sizes.DIT["XL/2"], shape=(32, 32, 4), num_classes=1000, out_channels=8, rngs=nnx.Rngs(0))

In a config they are `denoiser.options.size`; options beside it come before its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Options = Mapping[str, Any]


def _transformers(sizes: Mapping[str, tuple[int, int, int]], patches: tuple[int, ...]) -> dict[str, Options]:
    """`name/patch`: of (depth, width, heads), for images in patches of these sides."""
    return {
        f"{name}/{patch}": {"patch": patch, "depth": depth, "width": width, "heads": heads}
        for name, (depth, width, heads) in sizes.items()
        for patch in patches
    }


# Peebles & Xie 2023, table 1.
DIT = _transformers({"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}, (2, 4, 8))

# NVlabs/DiffiT, diffit.py: their network of latents.
DIT["DiffiT-XL/2"] = {
    "patch": 2, "depth": 28, "width": 1152, "heads": 16, "conditioning": "attention", "relative": True,
    "qkv_bias": True,
}  # fmt: skip

# Bao et al. 2023, table 1, with the patch of each data set (their tables 5 and 6). "S-deep" is for CelebA.
_UVIT = {"S": (13, 512, 8), "S-deep": (17, 512, 8), "M": (17, 768, 12), "L": (21, 1024, 16), "H": (29, 1152, 16)}
UVIT = _transformers(_UVIT, (2, 4))

# feizc/DiS, models_dis.py; depth there counts all blocks but the middle one.
_DIS = {"S": (25, 368), "B": (25, 768), "M": (49, 768), "L": (49, 1024), "H": (49, 1536)}
STATE_SPACE = {
    f"{name}/{patch}": {"patch": patch, "depth": depth, "width": width}
    for name, (depth, width) in _DIS.items()
    for patch in (2, 4)
}

# shallowdream204/DiCo, dico_models.py.
DICO = {
    "S": {"width": 128, "stages": (5, 4, 4, 4, 4), "mlp_ratio": 2},
    "B": {"width": 256, "stages": (5, 4, 4, 4, 4), "mlp_ratio": 2},
    "L": {"width": 352, "stages": (9, 8, 9, 8, 9), "mlp_ratio": 2},
    "XL": {"width": 416, "stages": (9, 9, 10, 9, 9), "mlp_ratio": 2},
    "H": {"width": 416, "stages": (14, 12, 10, 12, 14), "mlp_ratio": 4},
}

# qihao067/DiMR, configs/ (20 blocks of convolutions are 10 on either side of one).
MULTI_RESOLUTION = {
    "XL/2R": {"widths": (960, 480), "depths": (39, 21), "patches": (2, 1), "heads": 16},
    "G/2R": {"widths": (1152, 576), "depths": (57, 29), "patches": (2, 1), "heads": 16},
}

# Yan et al. 2024, section 4.
DIFFUSSM = {"XL": {"width": 1152, "depth": 29, "ratio": 2}}

# Sahoo et al. 2024 (kuleshov-group/mdlm, configs/model): 4 width in the MLP, a narrow vector of conditions. Shi et al.
# 2024 (md4/configs/md4/openwebtext.py): gated, 64 features a head and of the condition.
_MDLM = {"mlp": "gelu", "cond_width": 128}
_MD4 = {
    "mlp": "gated", "activation": "sigmoid", "conditioner": "md4", "cond_width": 64, "epsilon": 1e-5, "out_bias": False,
    "head_bias": False,
}  # fmt: skip
TEXT = {
    "mdlm-tiny": {"depth": 8, "width": 512, "heads": 8, **_MDLM},
    "mdlm-small": {"depth": 12, "width": 768, "heads": 12, **_MDLM},
    "mdlm-medium": {"depth": 24, "width": 1024, "heads": 16, **_MDLM},
    "md4-small": {"depth": 12, "width": 768, "heads": 12, **_MD4},
    "md4-medium": {"depth": 24, "width": 1024, "heads": 16, "mlp_width": 2752, **_MD4},
}

# By the names of networks in configs.
SIZES = {
    "dit": DIT,
    "uvit": UVIT,
    "state_space": STATE_SPACE,
    "dico": DICO,
    "multi_resolution": MULTI_RESOLUTION,
    "diffussm": DIFFUSSM,
    "text": TEXT,
}
