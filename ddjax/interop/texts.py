"""Families of text networks: the DDiT of score entropy, MDLM, UDLM, DUO and RADD, and LLaDA."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from ddjax import denoisers, grids, solvers
from ddjax.interop.adapters import LogScores, ToldNoise, WithMask
from ddjax.interop.images import attention_entries, count
from ddjax.interop.mapping import Entry, Fixed, linear, norm
from ddjax.interop.published import Family, Model
from ddjax.interop.tensors import Tensors
from ddjax.processes import Masked, Uniform
from ddjax.schedules import Geometric, Linear, LogLinear, Survival
from ddjax.types import Apply

# A masked diffusion language model's mask, where nothing says another: LLaDA's.
LLADA_MASK = 126336


# -- DDiT: louaaron/SEDD, kuleshov-group's MDLM and UDLM, s-sahoo/DUO, ML-GSAI/RADD ---------------------------------


def _ddit_settings(
    tensors: Tensors, config: Mapping[str, Any], given: Mapping[str, Any], name: str = "mdlm"
) -> dict[str, Any]:
    # SEDD's and DUO's config.json have a part "model"; MDLM's is flat.
    flat = {**config, **(config.get("model") if isinstance(config.get("model"), Mapping) else {})}
    vocabulary, width = tensors.shape_of("vocab_embed.embedding")
    heads = given.get("heads", flat.get("n_heads"))
    if heads is None and "rotary_emb.inv_freq" in tensors:
        heads = width // (2 * tensors.shape_of("rotary_emb.inv_freq")[0])
    if heads is None:
        raise ValueError("nothing in the file says how many heads the network has: give heads=...")
    settings = {
        "length": flat.get("length", flat.get("model_length", 1024)),
        "vocabulary": vocabulary,
        "width": width,
        "depth": count(tensors, "blocks."),
        "heads": int(heads),
        "mlp_width": tensors.shape_of("blocks.0.mlp.0.weight")[0],
        "inv_freq": "rotary_emb.inv_freq" in tensors,
        "eps": 1e-3,
    }
    if name in ("mdlm", "radd"):
        settings["mask"] = vocabulary - 1
    if name != "radd":
        settings["cond_width"] = tensors.shape_of("sigma_map.mlp.2.weight")[0]
    if name in ("mdlm", "udlm", "duo"):
        table = "cond_map.embedding_table.weight"  # the last row is the null label
        settings["num_classes"] = tensors.shape_of(table)[0] - 1 if table in tensors else 0
        algorithm = config.get("algo") if isinstance(config.get("algo"), Mapping) else {}
        timed = flat.get("time_conditioning", algorithm.get("time_conditioning", name != "mdlm"))
        settings["time_conditioning"] = bool(timed)
    if name == "sedd":
        noise = config.get("noise") if isinstance(config.get("noise"), Mapping) else {}
        settings["graph"] = given.get("graph", config.get("graph", {}).get("type", "absorb"))
        settings["scale_by_sigma"] = bool(flat.get("scale_by_sigma", settings["graph"] == "absorb"))
        settings["noise"] = noise.get("type", "loglinear")
        settings["noise_range"] = [noise.get("sigma_min", 1e-4), noise.get("sigma_max", 20.0)]
    return settings


def _ddit_entries(s: Mapping[str, Any]) -> list[Entry | Fixed]:
    timed, head, labels = "cond_width" in s, s["width"] // s["heads"], s.get("num_classes", 0)
    frequencies = 1e4 ** (-np.arange(0, head, 2, dtype=np.float32) / head)
    entries: list[Entry | Fixed] = [
        Entry("tokens/table", "vocab_embed.embedding"),
        Fixed("rotary_emb.inv_freq", frequencies.astype(np.float32), written=s["inv_freq"]),
        *norm("final/norm", "output_layer.norm_final", bias=not timed),
        *linear("final/out", "output_layer.linear"),
    ]
    if timed:
        entries += [
            *linear("condition/time_in", "sigma_map.mlp.0"),
            *linear("condition/time_out", "sigma_map.mlp.2"),
            *linear("final/modulation", "output_layer.adaLN_modulation"),
            *([Entry("condition/labels", "cond_map.embedding_table.weight")] if labels else []),
        ]
    for i in range(s["depth"]):
        ours, theirs = f"stack/blocks/{i}", f"blocks.{i}"
        entries += [
            *norm(f"{ours}/norm_a", f"{theirs}.norm1", bias=not timed),
            *attention_entries(f"{ours}/attention/qkv", [f"{theirs}.attn_qkv"], s["heads"], s["width"], bias=False),
            *linear(f"{ours}/attention/out", f"{theirs}.attn_out", bias=False),
            *norm(f"{ours}/norm_m", f"{theirs}.norm2", bias=not timed),
            *linear(f"{ours}/mlp/up", f"{theirs}.mlp.0"),
            *linear(f"{ours}/mlp/down", f"{theirs}.mlp.2"),
        ]
        if timed:
            entries += linear(f"{ours}/modulation", f"{theirs}.adaLN_modulation")
    return entries


def _ddit_model(s: Mapping[str, Any], name: str = "mdlm") -> Model:
    timed, schedule, labels = "cond_width" in s, _noise(s), s.get("num_classes", 0)
    vocabulary = s["vocabulary"]
    make = partial(
        denoisers.TextTransformer,
        length=s["length"],
        symbols_in=vocabulary,
        symbols_out=vocabulary,
        width=s["width"],
        depth=s["depth"],
        heads=s["heads"],
        mlp="gelu",
        mlp_width=s["mlp_width"],
        num_classes=labels,
        conditioner="udlm" if labels else "dit",
        time=timed,
        modulated=timed,
        norm="scaled" if timed else "affine",
        epsilon=1e-5,
        out_bias=False,
        cond_width=s.get("cond_width"),
    )
    if name in ("mdlm", "radd"):
        process, kind = _masked(vocabulary, s["mask"], schedule), "posterior"
        told = partial(ToldNoise, schedule=schedule, timed=s["time_conditioning"]) if timed else _itself
        wrap: Callable[[Apply], Apply] = lambda apply: WithMask(told(apply), s["mask"], process.num_symbols)  # noqa: E731
    elif name == "sedd":
        absorbs = s.get("graph", "absorb") == "absorb"  # older files of ours do not say
        process, kind = (Masked(vocabulary - 1, schedule) if absorbs else Uniform(vocabulary, schedule)), "ratio"
        wrap = lambda apply: LogScores(ToldNoise(apply, schedule), schedule, s["scale_by_sigma"])  # noqa: E731
    else:
        process, kind = Uniform(vocabulary, schedule), "cavity"
        wrap = partial(ToldNoise, schedule=schedule, timed=s["time_conditioning"])
    return Model(
        make=make,
        entries=_ddit_entries(s),
        process=process,
        kind=kind,
        shape=(s["length"],),
        wrap=wrap,
        num_classes=labels,
        steps=1000,
        solver=solvers.Tweedie if name == "sedd" else solvers.Ancestral,
        grid=grids.uniform,
    )


def _noise(s: Mapping[str, Any]) -> Survival:
    """The schedule; SEDD's config.json may say another, and its graph."""
    if s.get("graph", "absorb") not in ("absorb", "uniform"):
        raise ValueError(f"graph={s['graph']!r}: SEDD has 'absorb' and 'uniform'")
    if s.get("graph") == "uniform" and s["scale_by_sigma"]:
        raise ValueError("scale_by_sigma is SEDD's for graph='absorb'; of a uniform graph it is off")
    if s.get("noise", "loglinear") not in ("loglinear", "geometric"):
        raise ValueError(f"noise={s['noise']!r}: SEDD has 'loglinear' and 'geometric'")
    return Geometric(*s["noise_range"]) if s.get("noise") == "geometric" else LogLinear(s["eps"])


def _itself(apply: Apply) -> Apply:
    return apply


def _masked(vocabulary: int, mask: int, schedule: Any) -> Masked:
    """Masks as one state more than there are symbols; the last token of a vocabulary that is the mask is no symbol."""
    if not 0 <= mask < vocabulary:
        raise ValueError(f"mask={mask}: expected a token of the vocabulary, 0 to {vocabulary - 1}")
    return Masked(vocabulary - (mask == vocabulary - 1), schedule)


def _ddit(name: str, source: str, claims: Callable[[Mapping[str, Any]], bool | None]) -> Family:
    timed = name != "radd"
    marks = ("vocab_embed.embedding", "blocks.0.attn_qkv.weight", "output_layer.linear.weight")
    return Family(
        name,
        source,
        marks=(*marks, "sigma_map.mlp.0.weight" if timed else "output_layer.norm_final.bias"),
        without=() if timed else ("sigma_map.mlp.0.weight",),
        settings=partial(_ddit_settings, name=name),
        model=partial(_ddit_model, name=name),
        claims=claims,
    )


def _says(name: str) -> Callable[[Mapping[str, Any]], bool | None]:
    """Whether the "model_type" of a config.json, or its algorithm's name, is this one."""

    def claims(config: Mapping[str, Any]) -> bool | None:
        algorithm = config.get("algo", {})
        said = config.get("model_type") or (algorithm.get("name") if isinstance(algorithm, Mapping) else algorithm)
        return None if said is None and "graph" not in config else str(said).lower() == name

    return claims


MDLM = _ddit("mdlm", "kuleshov-group/mdlm, Sahoo et al. 2024", _says("mdlm"))
UDLM = _ddit("udlm", "kuleshov-group/discrete-diffusion-guidance, Schiff et al. 2024", _says("udlm"))
DUO = _ddit("duo", "s-sahoo/duo, Sahoo et al. 2025", _says("duo"))
SEDD = _ddit(
    "sedd",
    "louaaron/Score-Entropy-Discrete-Diffusion, Lou et al. 2024",
    lambda config: True if "graph" in config else _says("sedd")(config),
)
RADD = _ddit("radd", "ML-GSAI/RADD, Ou et al. 2025", lambda config: None)


# -- LLaDA ---------------------------------------------------------------------------------------------------------


def _llada_settings(tensors: Tensors, config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    vocabulary, width = tensors.shape_of("wte.weight")
    heads = given.get("heads", config.get("n_heads"))
    if heads is None:
        raise ValueError("nothing in the tensors says how many heads there are: put config.json beside them, or heads=")
    told = {
        "block_type": ("llama",),
        "layer_norm_type": ("rms",),
        "activation_type": ("silu", "swiglu"),
        "attention_layer_norm": (False,),
        "include_bias": (False,),
        "include_qkv_bias": (False, None),
        "weight_tying": (False,),
        "alibi": (False,),
        "rope": (True,),
        "input_emb_norm": (False,),
        "scale_logits": (False,),
    }
    other = [f"{name}={config[name]!r}" for name, known in told.items() if name in config and config[name] not in known]
    if other:
        raise ValueError(f"config.json says {', '.join(other)}, which ddjax's LLaDA has not")
    return {
        "length": config.get("max_sequence_length", 4096),
        "vocabulary": vocabulary,
        "mask": config.get("mask_token_id", LLADA_MASK),
        "width": width,
        "depth": count(tensors, "blocks."),
        "heads": int(heads),
        "kv_heads": int(config.get("n_kv_heads") or tensors.shape_of("blocks.0.k_proj.weight")[0] * heads // width),
        "mlp_width": tensors.shape_of("blocks.0.ff_proj.weight")[0],
        "rope_theta": float(config.get("rope_theta", 5e5)),
        "epsilon": float(config.get("rms_norm_eps", 1e-5)),
        "dtype": "float32",
    }


def _llada_entries(s: Mapping[str, Any]) -> list[Entry | Fixed]:
    entries: list[Entry | Fixed] = [
        Entry("tokens/table", "wte.weight"),
        *norm("final/norm", "ln_f", bias=False),
        *linear("final/out", "ff_out", bias=False),
    ]
    for i in range(s["depth"]):
        ours, theirs = f"stack/blocks/{i}", f"blocks.{i}"
        qkv = [f"{theirs}.{part}_proj" for part in "qkv"]
        entries += [
            *norm(f"{ours}/norm_a", f"{theirs}.attn_norm", bias=False),
            *attention_entries(
                f"{ours}/attention/qkv", qkv, s["heads"], s["width"], bias=False, kv_heads=s.get("kv_heads", s["heads"])
            ),
            *linear(f"{ours}/attention/out", f"{theirs}.attn_out", bias=False),
            *norm(f"{ours}/norm_m", f"{theirs}.ff_norm", bias=False),
            *linear(f"{ours}/mlp/gate", f"{theirs}.ff_proj", bias=False),
            *linear(f"{ours}/mlp/up", f"{theirs}.up_proj", bias=False),
            *linear(f"{ours}/mlp/down", f"{theirs}.ff_out", bias=False),
        ]
    return entries


def _llada_model(s: Mapping[str, Any]) -> Model:
    process = _masked(s["vocabulary"], s["mask"], Linear())
    return Model(
        make=partial(
            denoisers.TextTransformer,
            length=s["length"],
            symbols_in=s["vocabulary"],
            symbols_out=s["vocabulary"],
            width=s["width"],
            depth=s["depth"],
            heads=s["heads"],
            kv_heads=s.get("kv_heads", s["heads"]),
            mlp="gated",
            mlp_width=s["mlp_width"],
            time=False,
            modulated=False,
            rotary=s["rope_theta"],
            norm="rms",
            epsilon=s["epsilon"],
            out_bias=False,
            head_bias=False,
            dtype=s["dtype"],
        ),
        entries=_llada_entries(s),
        process=process,
        kind="posterior",
        shape=(s["length"],),
        wrap=partial(WithMask, mask=s["mask"], num_symbols=process.num_symbols),
        steps=128,
        solver=partial(solvers.Unmask, order=solvers.Confidence()),
        grid=grids.uniform,
    )


LLADA = Family(
    "llada",
    "ML-GSAI/LLaDA, Nie et al. 2025",
    marks=("wte.weight", "ln_f.weight", "blocks.0.q_proj.weight", "blocks.0.up_proj.weight", "ff_out.weight"),
    settings=_llada_settings,
    model=_llada_model,
    claims=lambda config: None if "model_type" not in config else config["model_type"] == "llada",
)
