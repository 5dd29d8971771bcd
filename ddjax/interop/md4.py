"""MD4, simplified masked diffusion (Shi et al. 2024): its transformer of texts and its U-Nets of images, in Orbax."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from flax import nnx

from ddjax import denoisers, grids
from ddjax.interop.images import count, known_heads
from ddjax.interop.mapping import SAME, Change, Entry, Fixed, reshaped
from ddjax.interop.published import Family, Model
from ddjax.interop.tensors import Tensors
from ddjax.processes import Masked
from ddjax.schedules import Cosine, Linear, Polynomial, Survival

TEXT, IMAGE, TOLD = "classifier.Transformer_0", "classifier.UNet5DWrapper_0.UNet_0", "classifier.CondEmbedding_0"
DIT = f"{IMAGE}.DiT_0"  # the middle of the network of ImageNet-64
DIT_HEADS = {768: 12}  # of the authors' width; nothing in a checkpoint says how many heads there are
ACTIVATIONS = {"glu": "sigmoid", "swiglu": "silu", "geglu": "gelu"}


def _settings(tensors: Tensors, config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    known = {**config, **given}
    text = any(name.startswith(f"{TEXT}.") for name in tensors)
    told = f"{TOLD}.Dense_0.bias" in tensors
    if not told and not text:
        raise ValueError(f"{TOLD}.Dense_0.bias is missing: ddjax has MD4's U-Net with time, not time_features='none'")
    outside = "classifier.Embed_0.embedding" in tensors
    states, features = tensors.shape_of(f"{'classifier' if outside else TEXT}.Embed_0.embedding")
    schedule, labels = known.get("noise_schedule", "linear"), "cond_embeddings.embedding"
    settings = {
        "vocabulary": states - 1,
        "num_classes": tensors.shape_of(labels)[0] if labels in tensors else 0,
        "noise_schedule": schedule,
        "sampling_grid": known.get("sampling_grid", "cosine" if schedule == "linear" else "uniform"),
        "steps": known.get("steps", known.get("timesteps", 1000 if text else 256)),
    }
    if not text:
        settings |= {
            "channels": tensors.shape_of(f"{IMAGE}.Conv_0.kernel")[2] // features,
            "width": tensors.shape_of(f"{TOLD}.Dense_0.bias")[0],
            "embed_width": features,
        }
        number = count(tensors, f"{IMAGE}.ResBlock_")
        if f"{DIT}.pos_embed" in tensors:
            return settings | _transformer_settings(tensors, config, given, number)
        # So many blocks down, one more up, two in the middle.
        return settings | {"size": known.get("size", known.get("data_shape", (32,))[0]), "blocks": (number - 3) // 2}
    width = tensors.shape_of(f"{TEXT}.TransformerBlock_0.attention.wo.kernel")[1]
    cond = tensors.shape_of(f"{TOLD}.Dense_0.bias")[0] if told else features if outside else None
    heads = known.get("heads", known.get("num_heads", width // cond if cond else None))
    if heads is None:
        raise ValueError("nothing in the checkpoint says how many heads the network has: give heads=...")
    return settings | {
        "length": known.get("length", known.get("data_shape", (1024,))[0]),
        "width": width,
        "depth": count(tensors, f"{TEXT}.TransformerBlock_"),
        "heads": heads,
        "mlp_width": tensors.shape_of(f"{TEXT}.TransformerBlock_0.feed_forward.w1.kernel")[1],
        "mlp_type": known.get("mlp_type", "glu"),
        "embed_width": features if outside else None,
        "cond_width": cond if told else None,
    }


def _transformer_settings(
    tensors: Tensors, config: Mapping[str, Any], given: Mapping[str, Any], number: int
) -> dict[str, Any]:
    """Of a network with `number` residual blocks and a transformer in the middle."""
    seen, made = ([tensors.shape_of(f"{IMAGE}.ResBlock_{i}.Conv_{j}.kernel") for i in range(number)] for j in (0, 1))
    widths = [tensors.shape_of(f"{IMAGE}.Conv_0.kernel")[3], *(shape[3] for shape in made)]
    # Behind the way down a block sees more than the last one gave: a skip connection stands beside it.
    down = next(i for i in range(number) if seen[i][2] != widths[i])
    levels = number - 2 * down  # at each one block more on the way up, and as many that resample
    blocks = (down + 1) // levels - 1
    places, width = tensors.shape_of(f"{DIT}.pos_embed")
    told = {"num_heads": config["dit_num_heads"]} if "dit_num_heads" in config else {}
    return {
        "size": 2**levels * math.isqrt(places),  # patches of two pixels at the last level
        "blocks": blocks,
        "multipliers": [widths[1 + i * (blocks + 1)] / widths[0] for i in range(levels)],
        "transformer": {"width": width, "depth": count(tensors, f"{DIT}.blocks_")},
        "heads": known_heads(told, given, width, DIT_HEADS),
    }


def _dense(ours: str, theirs: str, *, bias: bool = True) -> list[Entry]:
    """A `Dense` or `Conv` of Flax: its kernel is as ours."""
    return [Entry(f"{ours}/{part}", f"{theirs}.{part}") for part in ("kernel", "bias")[: 1 + bias]]


def _norm(ours: str, theirs: str, *, bias: bool = True) -> list[Entry]:
    return [Entry(f"{ours}/{part}", f"{theirs}.{part}") for part in ("scale", "bias")[: 1 + bias]]


def _told(s: Mapping[str, Any]) -> list[Entry]:
    entries = [*_dense("condition/time_in", f"{TOLD}.dense0"), *_dense("condition/time_out", f"{TOLD}.Dense_0")]
    return entries + ([Entry("condition/labels", "cond_embeddings.embedding")] if s["num_classes"] else [])


# -- texts ---------------------------------------------------------------------------------------------------------


def _turned(heads: int) -> Change:
    """Queries, keys and values: their rotary positions pair features 2i and 2i + 1, ours i and i + head / 2."""

    def load(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        rows = q.shape[0]
        q, k = (w.reshape(rows, heads, -1, 2).swapaxes(2, 3).reshape(rows, heads, -1) for w in (q, k))
        return np.stack([q, k, v.reshape(rows, heads, -1)], axis=2).reshape(rows, -1)

    def save(w: np.ndarray) -> tuple[np.ndarray, ...]:
        rows = w.shape[0]
        q, k, v = np.moveaxis(w.reshape(rows, heads, 3, -1), 2, 0)
        q, k = (w.reshape(rows, heads, 2, -1).swapaxes(2, 3) for w in (q, k))
        return tuple(w.reshape(rows, -1) for w in (q, k, v))

    return Change(load, save)


def _text_entries(s: Mapping[str, Any]) -> list[Entry | Fixed]:
    outside, told = s["embed_width"] is not None, s["cond_width"] is not None
    entries: list[Entry | Fixed] = [
        Entry("tokens/table", f"{'classifier' if outside else TEXT}.Embed_0.embedding"),
        *(_dense("embed", f"{TEXT}.Dense_0") if outside else []),
        *(_told(s) if told else _norm("final/norm", f"{TEXT}.RMSNorm_0", bias=False)),
        # Flax numbers layers as they are called: the modulation of the output stands before it.
        *(_dense("final/modulation", f"{TEXT}.Dense_{int(outside)}") if told else []),
        *_dense("final/out", f"{TEXT}.Dense_{outside + told}", bias=False),
    ]
    for i in range(s["depth"]):
        ours, theirs = f"stack/blocks/{i}", f"{TEXT}.TransformerBlock_{i}"
        qkv = tuple(f"{theirs}.attention.w{part}.kernel" for part in "qkv")
        entries += [
            Entry(f"{ours}/attention/qkv/kernel", qkv, _turned(s["heads"])),
            *_dense(f"{ours}/attention/out", f"{theirs}.attention.wo", bias=False),
            *_dense(f"{ours}/mlp/gate", f"{theirs}.feed_forward.w1", bias=False),
            *_dense(f"{ours}/mlp/up", f"{theirs}.feed_forward.w3", bias=False),
            *_dense(f"{ours}/mlp/down", f"{theirs}.feed_forward.w2", bias=False),
        ]
        if told:
            entries += _dense(f"{ours}/modulation", f"{theirs}.Dense_0")
        else:
            entries += _norm(f"{ours}/norm_a", f"{theirs}.RMSNorm_0", bias=False)
            entries += _norm(f"{ours}/norm_m", f"{theirs}.RMSNorm_1", bias=False)
    return entries


def _text(s: Mapping[str, Any]) -> Any:
    if s["mlp_type"] not in ACTIVATIONS:
        raise ValueError(f"mlp_type={s['mlp_type']!r}: expected one of {', '.join(map(repr, ACTIVATIONS))}")
    told = s["cond_width"] is not None
    return partial(
        denoisers.TextTransformer,
        length=s["length"],
        symbols_in=s["vocabulary"] + 1,
        symbols_out=s["vocabulary"],
        width=s["width"],
        depth=s["depth"],
        heads=s["heads"],
        mlp="gated",
        mlp_width=s["mlp_width"],
        activation=ACTIVATIONS[s["mlp_type"]],
        embed_width=s["embed_width"],
        num_classes=s["num_classes"] if told else 0,
        time=told,
        modulated=told,
        norm="plain" if told else "rms",
        epsilon=1e-5,
        out_bias=False,
        head_bias=False,
        cond_width=s["cond_width"],
        conditioner="md4",
    )


# -- images --------------------------------------------------------------------------------------------------------


def _shared(channels: int) -> Change:
    """One table for the tokens of all channels: ours has one for each, which must stay equal to be saved."""

    def save(w: np.ndarray) -> np.ndarray:
        first, *others = np.split(w, channels)
        if not all(np.array_equal(first, other) for other in others):
            raise ValueError("the channels' tables of tokens, one in their network, are no longer equal")
        return first

    return Change(lambda w: np.tile(w, (channels, 1)), save)


_POINT = Change(lambda w: w[None, None], lambda w: w[0, 0])  # a dense layer as a convolution of one pixel


def _attention(ours: str, theirs: str, width: int) -> list[Entry]:
    def joined(axes: tuple[int, ...]) -> Change:
        return Change(
            lambda *parts: np.concatenate([p.reshape(*axes, width) for p in parts], axis=-1),
            lambda w: tuple(p.reshape(*axes, 1, width) for p in np.split(w, 3, axis=-1)),
        )

    at = f"{theirs}.MultiHeadDotProductAttention_0"
    names = [tuple(f"{at}.{name}.{part}" for name in ("query", "key", "value")) for part in ("kernel", "bias")]
    return [
        *_norm(f"{ours}/norm", f"{theirs}.GroupNorm_0"),
        Entry(f"{ours}/qkv/kernel", names[0], joined((width,))),
        Entry(f"{ours}/qkv/bias", names[1], joined(())),
        Entry(f"{ours}/out/kernel", f"{at}.out.kernel", reshaped((1, width, width), (width, width))),
        Entry(f"{ours}/out/bias", f"{at}.out.bias"),
    ]


def _by_heads(heads: int) -> Change:
    """The last axes of queries, keys and values as that of one layer: (head, q/k/v, feature)."""

    def load(*parts: np.ndarray) -> np.ndarray:
        rows = parts[0].shape[:-1]
        return np.stack([w.reshape(*rows, heads, -1) for w in parts], axis=-2).reshape(*rows, -1)

    def save(w: np.ndarray) -> tuple[np.ndarray, ...]:
        rows = w.shape[:-1]
        return tuple(part.reshape(*rows, -1) for part in np.moveaxis(w.reshape(*rows, heads, 3, -1), -2, 0))

    return Change(load, save)


def _transformer_entries(s: Mapping[str, Any]) -> list[Entry]:
    ours, width = "middle/0", s["transformer"]["width"]
    features = round(s["multipliers"][-1] * s["width"])
    patches = reshaped((2, 2, features, width), (4 * features, width))
    entries = [
        Entry(f"{ours}/embed/kernel", f"{DIT}.x_embedder.proj.kernel", patches),
        Entry(f"{ours}/embed/bias", f"{DIT}.x_embedder.proj.bias"),
        Entry(f"{ours}/position", f"{DIT}.pos_embed"),
        *_dense(f"{ours}/modulation", f"{DIT}.final_layer.Dense_0"),
        *_dense(f"{ours}/out", f"{DIT}.final_layer.linear"),
    ]
    for i in range(s["transformer"]["depth"]):
        block, theirs = f"{ours}/stack/blocks/{i}", f"{DIT}.blocks_{i}"
        names = [tuple(f"{theirs}.attn.w{name}.{part}" for name in "qkv") for part in ("kernel", "bias")]
        entries += [
            Entry(f"{block}/attention/qkv/kernel", names[0], _by_heads(s["heads"])),
            Entry(f"{block}/attention/qkv/bias", names[1], _by_heads(s["heads"])),
            *_dense(f"{block}/attention/out", f"{theirs}.attn.wo", bias=False),
            *_dense(f"{block}/mlp/up", f"{theirs}.mlp.fc1"),
            *_dense(f"{block}/mlp/down", f"{theirs}.mlp.fc2"),
            *_dense(f"{block}/modulation", f"{theirs}.Dense_0"),
        ]
    return entries


def _image_entries(s: Mapping[str, Any], net: denoisers.UNet) -> list[Entry | Fixed]:
    told = "transformer" in s  # norms are, and there is a transformer in the middle
    entries: list[Entry | Fixed] = [
        Entry("tokens/table", "classifier.Embed_0.embedding", _shared(s["channels"])),
        *_told(s),
        *_dense("embed", f"{IMAGE}.Conv_0"),
        *(_dense("final/norm/modulation", f"{IMAGE}.CondGroupNorm_0.Dense_0") if told else []),
        *(_transformer_entries(s) if told else _norm("final/norm", f"{IMAGE}.GroupNorm_0")),
        *_dense("final/out", f"{IMAGE}.Conv_1"),
        *([] if told else _attention("middle/0/attention", f"{IMAGE}.SelfAttention_0", s["width"])),
    ]
    parts = [part for part in ("encoder", "middle", "decoder") if not (told and part == "middle")]
    blocks = [(f"{part}/{i}", block) for part in parts for i, block in enumerate(getattr(net, part))]
    for i, (name, block) in enumerate(blocks):
        theirs = f"{IMAGE}.ResBlock_{i}"
        entries += [*_dense(f"{name}/conv_in", f"{theirs}.Conv_0"), *_dense(f"{name}/conv_out", f"{theirs}.Conv_1")]
        if told:
            entries += _dense(f"{name}/norm_in/modulation", f"{theirs}.CondGroupNorm_0.Dense_0")
            entries += _dense(f"{name}/norm_out/modulation", f"{theirs}.CondGroupNorm_1.Dense_0")
        else:
            entries += _norm(f"{name}/norm_in", f"{theirs}.GroupNorm_0")
            entries += _dense(f"{name}/modulation", f"{theirs}.Dense_0", bias=False)
            entries += _norm(f"{name}/norm_out", f"{theirs}.GroupNorm_1")
        if block.shortcut is not None:
            shortcut = f"{theirs}.Dense_{int(not told)}"  # Flax numbers layers as they are called
            entries.append(Entry(f"{name}/shortcut/kernel", f"{shortcut}.kernel", _POINT))
            entries.append(Entry(f"{name}/shortcut/bias", f"{shortcut}.bias", SAME))
    return entries


def _image(s: Mapping[str, Any]) -> Any:
    middle = {"transformer": {**s["transformer"], "heads": s["heads"]}} if "transformer" in s else {}
    return partial(
        denoisers.UNet,
        shape=(s["size"], s["size"], s["channels"]),
        symbols_in=s["vocabulary"] + 1,
        symbols_out=s["vocabulary"],
        design="md4_transformer" if middle else "md4",
        width=s["width"],
        multipliers=s.get("multipliers", (1,)),
        blocks=s["blocks"],
        embed_width=s["embed_width"],
        num_classes=s["num_classes"],
        **middle,
    )


# -- both ----------------------------------------------------------------------------------------------------------


def _schedule(name: str) -> Survival:
    """Of their names: linear, cosine, poly3. Without the 1e-4 that they leave at both ends."""
    if name in ("linear", "cosine"):
        return Linear() if name == "linear" else Cosine()
    try:
        return Polynomial(float(name.removeprefix("poly")))
    except ValueError as error:
        raise ValueError(f"noise_schedule={name!r}: expected 'linear', 'cosine' or 'poly' and a power") from error


def _model(s: Mapping[str, Any]) -> Model:
    text = "length" in s
    make = _text(s) if text else _image(s)
    if s["sampling_grid"] not in ("uniform", "cosine"):
        raise ValueError(f"sampling_grid={s['sampling_grid']!r}: expected 'uniform' or 'cosine'")
    return Model(
        make=make,
        entries=_text_entries(s) if text else _image_entries(s, nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))),
        process=Masked(s["vocabulary"], _schedule(s["noise_schedule"])),
        kind="posterior",
        shape=(s["length"],) if text else (s["size"], s["size"], s["channels"]),
        num_classes=s["num_classes"],
        steps=s["steps"],
        grid=getattr(grids, s["sampling_grid"]),
    )


MD4 = Family(
    "md4",
    "google-deepmind/md4, Shi et al. 2024 (Orbax)",
    marks=(f"{TEXT}.TransformerBlock_0.attention.wq.kernel",),
    others=((f"{IMAGE}.ResBlock_0.Conv_0.kernel",),),
    settings=_settings,
    model=_model,
    orbax=True,
)
