"""Parameters and multiply-adds of the named sizes against the published numbers; nothing is computed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax import data, flops
from ddjax.config import ConfigError, typed
from ddjax.denoisers import DiCo, DiT, MultiResolution, StateSpace, TextTransformer, UViT, functional_init, sizes
from ddjax.experiment import build

# Peebles & Xie 2023, table 4: millions of parameters, and 10^9 multiply-adds, which they call flops, at 32 x 32 x 4.
DIT = {
    "S/8": (33, 0.36), "S/4": (33, 1.41), "S/2": (33, 6.06),
    "B/8": (131, 1.42), "B/4": (130, 5.56), "B/2": (130, 23.01),
    "L/8": (459, 5.01), "L/4": (458, 19.70), "L/2": (458, 80.71),
    "XL/8": (676, 7.39), "XL/4": (675, 29.05), "XL/2": (675, 118.64),
}  # fmt: skip
LATENT = {"shape": (32, 32, 4), "num_classes": 1000}


def measured(kind, options):
    """Millions of parameters, 10^9 multiply-adds for one example."""
    init, apply = functional_init(lambda rngs: kind(**options, rngs=rngs))
    params = jax.eval_shape(init, jax.random.key(0))
    number = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params)) / 1e6
    labels = jax.ShapeDtypeStruct((1,), jnp.int32) if options.get("num_classes") else None
    if "length" in options:
        xt = jax.ShapeDtypeStruct((1, options["length"]), jnp.int32)
    else:
        xt = jax.ShapeDtypeStruct((1, *options["shape"]), jnp.float32)
    return number, flops.count(apply, params, xt, jax.ShapeDtypeStruct((1,), jnp.float32), labels) / 2e9


@functools.cache
def dit(name):
    return measured(DiT, {**sizes.DIT[name], **LATENT, "out_channels": 8, "scan": True})


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "S/2")) for n in DIT])
def test_dit(name):
    """To the digits given, but for their biases of q, k and v; and a table of positions that they do not learn."""
    number, products = dit(name)
    millions, billions = DIT[name]
    depth, width, patch = (sizes.DIT[name][key] for key in ("depth", "width", "patch"))
    number += (3 * depth * width - (32 // patch) ** 2 * width) / 1e6
    assert abs(number - millions) < 0.6
    np.testing.assert_allclose(products, billions, rtol=6e-3, atol=0.006)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "millions", "options"),
    [
        # Bao et al. 2023, table 1 and section 5: CIFAR10, CelebA 64, ImageNet 64, ImageNet 256 and 512.
        ("S/2", 44, {"shape": (32, 32, 3)}),
        ("M/4", 131, {"shape": (64, 64, 3), "num_classes": 999}),
        ("L/4", 287, {"shape": (64, 64, 3), "num_classes": 999}),
        ("L/2", 287, {**LATENT, "conv": False}),
        ("H/2", 501, {**LATENT, "conv": False}),
    ],
)
def test_uvit(name, millions, options):
    number, products = measured(UViT, {**sizes.UVIT[name], **options, "scan": True})
    assert abs(number - millions) < 0.6
    if name == "H/2":
        np.testing.assert_allclose(products, 133.25, rtol=6e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "millions", "billions"),
    [("S", 33.1, 4.25), ("B", 130.0, 16.88), ("L", 463.9, 60.24), ("XL", 701.2, 87.30), ("H", 1037.4, 194.15)],
)
def test_dico(name, millions, billions):
    """Ai et al. 2025, tables 1 and 6, to the digits given.

    Theirs also count products with the zeros beside an image, and, as thop does, two operations for a number that is
    normalised and one for a number that is averaged: two norms and a mean a block, and the last norm.
    """
    options = sizes.DICO[name]
    number, products = measured(DiCo, {**options, **LATENT, "out_channels": 8, "scan": True})
    assert abs(number - millions) < 0.06
    # Of 3 x 3 convolutions: (in a group, out, side). 9 side^2 products a pair of features, of which (3 side - 2)^2 are
    # inside.
    w, sides = options["width"], (32, 16, 8, 16, 32)
    stages = list(zip(options["stages"], sides, (w, 2 * w, 4 * w, 2 * w, 2 * w), strict=True))
    convolutions = [(4, w, 32), (2 * w, 8, 32)]  # at the two ends
    convolutions += [(w, w // 2, 32), (2 * w, w, 16), (4 * w, 8 * w, 8), (2 * w, 4 * w, 16)]  # between resolutions
    convolutions += [(1, width, side) for blocks, side, width in stages for _ in range(blocks)]
    padded = sum(a * b * (9 * side**2 - (3 * side - 2) ** 2) for a, b, side in convolutions)
    others = sum((2 + 2 + 1) * blocks * side**2 * width for blocks, side, width in stages) + 2 * 32**2 * 2 * w
    assert abs(products + (padded + others) / 1e9 - billions) < 0.005


@pytest.mark.slow
@pytest.mark.parametrize("classes", [1000, 0])
@pytest.mark.parametrize("name", [f"{size}/{patch}" for size in "SBMLH" for patch in (2, 4)])
def test_state_space(name, classes):
    """feizc/DiS's network (models_dis.py; the mixer is Vim's), layer by layer, to the last parameter.

    Published is DiS-H/2 at 900 million, which is the one without labels.
    """
    options, state, kernel = sizes.STATE_SPACE[name], 16, 4
    w, depth, patch = options["width"], options["depth"], options["patch"]
    inner, rank, places, pixels = 2 * w, -(-w // 16), (32 // patch) ** 2, patch**2
    direction = (kernel + 1) * inner + inner * (rank + 2 * state) + (rank + 1) * inner + inner * state + inner
    block = w + w * 2 * inner + 2 * direction + inner * w
    count = depth * block + (depth // 2) * (2 * w + 1) * w
    count += (4 * pixels + 1) * w + (places + 1 + bool(classes)) * w  # patches, and positions of all tokens
    count += (w + 1) * 4 * w + (4 * w + 1) * w  # the time's two layers
    count += w + (w + 1) * 8 * pixels  # the norm and the last layer
    if classes:
        count += (classes + 1) * w + (w + 1) * 2 * w  # labels, and what they and the time do to the last norm
    shape = {**LATENT, "num_classes": classes, "out_channels": 8}
    number, _ = measured(StateSpace, {**options, **shape, "scan": True})
    assert round(number * 1e6) == count
    if name == "H/2" and not classes:
        assert abs(number - 900) < 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options", "millions", "billions"),
    [
        # Liu et al. 2024, the README of their code: 505 million (160 Gflops) and 1.06 billion (331).
        (MultiResolution, {**sizes.MULTI_RESOLUTION["XL/2R"], "output_heads": True}, 505, 160),
        (MultiResolution, {**sizes.MULTI_RESOLUTION["G/2R"], "output_heads": True}, 1056, 331),
        # Hatamizadeh et al. 2023, table 2.
        (DiT, {**sizes.DIT["DiffiT-XL/2"], "out_channels": 8}, 561, None),
    ],
)
def test_hierarchies(kind, options, millions, billions):
    number, products = measured(kind, {**LATENT, **options, "scan": True})
    assert abs(number - millions) < 0.6
    assert billions is None or abs(products - billions) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mdlm-tiny", "mdlm-small", "mdlm-medium"])
def test_mdlm(name):
    """Their network's parameters, layer by layer; ours has no scales in its norms, and biases where attention ends."""
    symbols, cond, options = 50258, 128, sizes.TEXT[name]
    depth, width = options["depth"], options["width"]
    block = 3 * width**2 + width**2 + 8 * width**2 + 5 * width + 2 * width + 6 * width * (cond + 1)
    last = width + 2 * width * (cond + 1) + symbols * (width + 1)
    theirs = symbols * width + (256 + 1) * cond + (cond + 1) * cond + depth * block + last
    ours = theirs - (2 * depth + 1) * width + depth * width
    number, _ = measured(
        TextTransformer, {**options, "length": 16, "symbols_in": symbols, "symbols_out": symbols, "scan": True}
    )
    # An untimed network keeps one learned vector of conditions: ours is timed here, as theirs is in any case.
    assert round(number * 1e6) == ours


@pytest.mark.slow
@pytest.mark.parametrize(("name", "hidden"), [("md4-small", 2048), ("md4-medium", 2752)])
def test_md4(name, hidden):
    """Its text network, layer by layer (tests/interop/published_md4.py), to the last parameter and product.

    Of OpenWebText: 50257 tokens and a mask, 1024 of them.
    """
    tokens, length, cond, options = 50257, 1024, 64, sizes.TEXT[name]
    depth, width = options["depth"], options["width"]
    block = 4 * width**2 + 3 * width * hidden  # of matrices; no biases
    told = depth * 6 * width + 2 * width  # of adaLN: in each block, and at the end
    count = (tokens + 1) * width + depth * block + (cond + 1) * told + width * tokens
    count += (cond + 1) * 4 * cond + (4 * cond + 1) * cond  # the time's two layers
    products = length * (depth * (block + 2 * length * width) + width * tokens) + cond * told + 2 * 4 * cond**2
    number, billions = measured(
        TextTransformer, {**options, "length": length, "symbols_in": tokens + 1, "symbols_out": tokens, "scan": True}
    )
    assert round(number * 1e6) == count
    assert round(billions * 1e9) == products


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "name"),
    [("uvit", "S/2"), ("dico", "S"), ("state_space", "S/2"), ("dit", "S/2"), ("diffussm", "XL")],
)
def test_a_config_names_a_size(network, name):
    items = data.from_arrays(np.zeros((4, 8, 8, 1), np.float32))
    process = {"name": "gaussian", "schedule": "cond_ot"}
    settings = {
        "process": process,
        "objective": {"name": "gaussian"},
        "denoiser": {"name": network, "kind": "velocity"},
    }

    def params(**options):
        denoiser = {**settings["denoiser"], "options": options}
        return jax.eval_shape(build(typed({**settings, "denoiser": denoiser}), items).init, jax.random.key(0))

    shorter = {"stages": (1, 1, 1, 1, 1)} if network == "dico" else {"depth": 3}
    width = sizes.SIZES[network][name]["width"]
    assert jax.tree.leaves(params(size=name, **shorter)["embed"])[0].shape[-1] == width
    with pytest.raises(ConfigError, match=r"config.denoiser.options.size='huge' is unknown; it is one of"):
        params(size="huge")
