"""Weights of the published U-Nets: the same outputs from the same tensors, all of them random, and back exactly."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch", reason="install ddjax[parity] to compare with published networks")

import published_unets as published  # noqa: E402

from ddjax import interop, objectives, taps  # noqa: E402
from ddjax.denoisers import EDM2, UNet, functional, functional_init  # noqa: E402
from ddjax.denoisers.layers import GroupNorm, SpatialTransformer  # noqa: E402
from ddjax.interop import mapping, unet  # noqa: E402

pytestmark = pytest.mark.slow

SIDE, CHANNELS, BATCH, CLASSES = 16, 3, 3, 5
EDM = {"channels": CHANNELS, "side": SIDE, "blocks": 1, "classes": CLASSES}
SIZES = {"width": 32, "multipliers": (1, 2, 2), "blocks": 1}
LABELLED = {"shape": (SIDE, SIDE, CHANNELS), "num_classes": CLASSES, "time_scale": 999.0}


def adm(ours, theirs, new_order=False):
    """Of ADM's module: ours for theirs."""
    module = published.ADM(channels=CHANNELS, classes=CLASSES, **SIZES, **theirs)
    return {**LABELLED, **SIZES, **ours}, module, lambda net: unet.adm(net, new_order=new_order)


def edm(kind, design, **sizes):
    theirs = {k: v for k, v in sizes.items() if k != "latent"}
    module = kind(
        **EDM, out=4, **theirs, augment=sizes.get("latent", 0), **({"ncsn": True} if design == "ncsn++" else {})
    )
    heads = {} if "head_width" not in sizes else {"head_width": sizes["head_width"]}
    ours = {"blocks": 1, "attend_at": sizes["attend_at"], **heads, "latent": sizes.get("latent", 0)}
    ours |= {"width": sizes["width"], "multipliers": sizes["multipliers"], "design": design, "out_channels": 4}
    return {**LABELLED, "time_scale": 1.0, **ours}, module, unet.edm


def cases():
    narrow = {"width": 32, "multipliers": (2, 2, 1), "attend_at": (8,), "latent": 9}
    yield (
        "adm",
        *adm(
            {"design": "adm", "attend_at": (8, 4), "head_width": 16, "out_channels": 6},
            {"attend_at": (2, 4), "head_width": 16, "out": 6},
        ),
    )
    yield (
        "adm-new-order",
        *adm(
            {"design": "adm", "attend_at": (8,), "head_width": 16},
            {"attend_at": (2,), "head_width": 16, "out": 3, "new_order": True},
            new_order=True,
        ),
    )
    yield (
        "improved",
        *adm(
            {"design": "improved", "attend_at": (8,), "heads": 4},
            {"attend_at": (2,), "heads": 4, "out": 3, "updown": False},
        ),
    )
    yield "ddpm++", *edm(published.SongUNet, "ddpm++", **narrow)
    yield "ncsn++", *edm(published.SongUNet, "ncsn++", **narrow)
    yield (
        "dhariwal",
        *edm(published.DhariwalUNet, "adm_edm", width=16, multipliers=(1, 2, 3), attend_at=(8, 4), head_width=16),
    )
    module = published.EDM2UNet(**EDM, width=16, multipliers=(1, 2, 3), attend_at=(8, 4), head_width=16)
    ours = {"width": 16, "multipliers": (1, 2, 3), "blocks": 1, "attend_at": (8, 4), "head_width": 16}
    yield "edm2", {**LABELLED, "time_scale": 1.0, **ours, "kind": EDM2}, module, unet.edm2


CASES = {name: case for name, *case in cases()}
every = pytest.mark.parametrize("name", CASES)


def randomised(module, scale=0.2):
    """Every parameter and buffer normal, but for filters."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in module.state_dict().items():
        if "resample_filter" not in name:
            with torch.no_grad():
                tensor.copy_(scale * torch.randn(tensor.shape, generator=generator))
    return module.eval(), {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def loaded(options, entries, tensors):
    options = dict(options)
    kind = options.pop("kind", UNet)
    make = lambda rngs: kind(**options, rngs=rngs)
    net = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    init, apply = functional_init(make)
    rows = entries(net)
    params, report = mapping.load(rows, tensors, mapping.shapes_of(init))
    assert report.whole
    return rows, params, apply


def inputs(scale):
    rng = np.random.default_rng(0)
    xt = rng.normal(size=(BATCH, SIDE, SIDE, CHANNELS)).astype(np.float32)
    t = np.float32([0.1, 0.6, 0.9]) if scale > 1 else np.float32([-1.2, 0.2, 0.9])
    return xt, t, np.int32([0, 3, 4])


def close(ours, theirs):
    theirs = theirs.detach().numpy().transpose(0, 2, 3, 1)
    assert np.abs(theirs).max() > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


@every
def test_the_same_outputs_and_the_same_tensors_again(name):
    options, module, entries = CASES[name]
    module, tensors = randomised(module)
    rows, params, apply = loaded(options, entries, tensors)
    xt, t, labels = inputs(options["time_scale"])
    given = torch.from_numpy(xt.transpose(0, 3, 1, 2)), torch.from_numpy(options["time_scale"] * t)
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(labels).long(), CLASSES).float()
    more = (torch.from_numpy(labels).long() if "map" not in "".join(tensors) and name != "edm2" else one_hot,)
    cond, call = labels, jax.jit(apply)
    if options.get("latent"):
        z = np.random.default_rng(5).normal(size=(BATCH, options["latent"])).astype(np.float32)
        more, cond = (*more, torch.from_numpy(z)), {"z": z, "cond": labels}
    close(call(params, xt, t, cond), module(*given, *more))
    if "map" in "".join(tensors) or name == "edm2":  # no label and no latent
        close(call(params, xt, t, None), module(*given, 0 * one_hot))
    again = mapping.save(rows, params)
    assert again.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(again[key], tensor, err_msg=key)


@every
def test_tensors_that_are_not_the_networks_are_refused_by_name(name):
    options, module, entries = CASES[name]
    _, tensors = randomised(module)
    convolutions = [key for key in sorted(tensors) if tensors[key].ndim == 4 and "filter" not in key]
    first, last = min(tensors), convolutions[-1]
    wrong = {**tensors, "extra.weight": tensors[first], last: tensors[last][:, :, :0]}
    del wrong[first]
    message = "(?s)" + "".join(
        f"(?=.*{re.escape(line)})" for line in ("unknown: extra.weight", f"missing: {first}", f"mis-shaped: {last}")
    )
    with pytest.raises(ValueError, match=message):
        loaded(options, entries, wrong)


FILES = {  # family, what its file does not say
    "adm": ("adm", {"size": SIDE, "head_width": 16}),
    "adm-new-order": ("adm", {"size": SIDE, "head_width": 16, "new_order": True}),
    "improved": ("adm", {"size": SIDE, "heads": 4}),
    "ddpm++": ("edm_song", {"latent": 9}),
    "ncsn++": ("edm_song", {"latent": 9}),
    "dhariwal": ("edm_adm", {"head_width": 16}),
    "edm2": ("edm2", {"head_width": 16}),
}


@every
def test_a_file_says_its_sizes(name, tmp_path):
    options, module, entries = CASES[name]
    _, tensors = randomised(module)
    save_file({f"model.{key}": tensor for key, tensor in tensors.items()}, tmp_path / "m.safetensors")
    family, given = FILES[name]
    model = interop.load(tmp_path / "m.safetensors", **given)
    assert (model.family, model.prefix, model.report.whole) == (family, "model.", True)
    _, params, apply = loaded(options, entries, tensors)
    assert model.apply == apply  # the same network, choices and all
    jax.tree.map(np.testing.assert_array_equal, model.params, params)


def precond():
    net = published.EDM2UNet(**EDM, width=16, multipliers=(1, 2, 3), attend_at=(8, 4), head_width=16)
    return randomised(published.EDM2Precond(net, 12))


@pytest.mark.parametrize("prefix", ["", "ema."])
def test_the_uncertainty_of_edm2_stays(tmp_path, prefix):
    module, tensors = precond()
    save_file({f"{prefix}{key}": tensor for key, tensor in tensors.items()}, tmp_path / "m.safetensors")
    model = interop.load(tmp_path / "m.safetensors", head_width=16)
    assert (model.family, model.prefix, model.settings["uncertainty"], model.report.whole) == ("edm2", prefix, 12, True)
    model.export(tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == {f"{prefix}{key}" for key in tensors}
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(again[f"{prefix}{key}"], tensor, err_msg=key)
    # Its U-Net alone is a network without one, and the same.
    save_file({k.removeprefix("unet."): v for k, v in tensors.items() if "unet" in k}, tmp_path / "net.safetensors")
    net = interop.load(tmp_path / "net.safetensors", head_width=16)
    assert "uncertainty" not in net.params
    xt, t, labels = inputs(1.0)
    with taps.record("uncertainty") as seen:
        out = model.apply(model.params, xt, t, labels)
    np.testing.assert_array_equal(out, net.apply(net.params, xt, t, labels))
    sigma = torch.from_numpy(np.exp(4 * t))[:, None, None, None]
    _, u = module(torch.from_numpy(xt.transpose(0, 3, 1, 2)), sigma, torch.zeros(BATCH, CLASSES))
    np.testing.assert_allclose(seen["uncertainty"], u.detach().numpy()[:, 0, 0, 0], rtol=0, atol=2e-5)
    assert np.ptp(seen["uncertainty"]) > 0.05
    missing = {k: v for k, v in tensors.items() if k != "logvar_fourier.phases"}
    save_file(missing, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"missing: logvar_fourier\.phases"):
        interop.load(tmp_path / "m.safetensors", head_width=16)


def test_the_loss_of_edm2_and_its_gradients(tmp_path):
    """NVlabs/edm2's `EDM2Loss` at the states and times that the objective drew."""
    module, tensors = precond()
    save_file(tensors, tmp_path / "m.safetensors")
    model = interop.load(tmp_path / "m.safetensors", head_width=16)
    x0, _, labels = inputs(1.0)
    shown = []

    def watched(params, xt, t, cond=None, **options):
        jax.debug.callback(lambda *arrays: shown.append(arrays), xt, t)
        return model.apply(params, xt, t, cond, **options)

    objective = objectives.own_uncertainty(
        model.process, "edm", density=objectives.log_normal_sigma(model.process, -0.4, 1.0)
    )
    call = jax.jit(jax.value_and_grad(lambda p: objective(jax.random.key(0), watched, p, x0, labels)[0]))
    loss, gradients = call(model.params)
    jax.effects_barrier()
    inside, steps = (torch.from_numpy(np.array(a)) for a in shown[0])
    sigma = torch.exp(4 * steps)[:, None, None, None]
    noisy = inside.permute(0, 3, 1, 2) * (sigma**2 + 0.25).sqrt()
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(labels).long(), CLASSES).float()
    denoised, u = module(noisy, sigma, one_hot)
    weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
    clean = torch.from_numpy(x0.transpose(0, 3, 1, 2))
    wanted = (weight / u.exp() * (denoised - clean) ** 2 + u).mean()
    wanted.backward()
    np.testing.assert_allclose(loss, wanted.item(), rtol=2e-5)
    found = mapping.save(model.model.entries, gradients)
    for name, parameter in module.named_parameters():
        largest = float(parameter.grad.abs().max())
        assert largest > 0, name
        np.testing.assert_allclose(found[name], parameter.grad.numpy(), rtol=0, atol=1e-3 * largest, err_msg=name)
    assert all((found[f"logvar_fourier.{name}"] == 0).all() for name in ("freqs", "phases"))


def test_edms_denoiser_is_the_preconditioned_network(tmp_path):
    module = published.SongUNet(**EDM, out=3, width=32, multipliers=(2, 2, 1), attend_at=(8,))
    module, tensors = randomised(module)
    save_file(tensors, tmp_path / "m.safetensors")
    model = interop.load(tmp_path / "m.safetensors")
    xt, _, labels = inputs(1.0)
    t = np.float32([0.2, 0.5, 0.7])
    sigma = np.asarray(model.process.schedule.sigma(t), np.float64)[:, None, None, None]
    assert (np.asarray(model.process.schedule.alpha(t)) == 1).all()
    xt = (xt * np.hypot(sigma, 0.5)).astype(np.float32)
    # Karras et al. 2022, table 1.
    skip, out = 0.25 / (sigma**2 + 0.25), 0.5 * sigma / np.hypot(sigma, 0.5)
    inside = torch.from_numpy((xt / np.hypot(sigma, 0.5)).astype(np.float32).transpose(0, 3, 1, 2))
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(labels).long(), CLASSES).float()
    f = module(inside, torch.from_numpy((np.log(sigma[:, 0, 0, 0]) / 4).astype(np.float32)), one_hot)
    expected = skip * xt + out * f.detach().numpy().transpose(0, 2, 3, 1)
    found = model.process.convert(model.denoise(xt, t, labels), "x0", xt, t).value
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_augmentation_labels_may_be_left_out():
    options, module, entries = CASES["ddpm++"]
    module, tensors = randomised(module)
    rows, params, apply = loaded({**options, "latent": 0}, entries, tensors)
    xt, t, labels = inputs(1.0)
    given = torch.from_numpy(xt.transpose(0, 3, 1, 2)), torch.from_numpy(t)
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(labels).long(), CLASSES).float()
    close(jax.jit(apply)(params, xt, t, labels), module(*given, one_hot))
    assert "map_augment.weight" not in mapping.save(rows, params)


DIFFUSERS = {
    "ddpm": {  # google/ddpm-cifar10-32
        "block_out_channels": (32, 64, 64), "layers_per_block": 2, "downsample_padding": 0, "freq_shift": 1,
        "flip_sin_to_cos": False, "norm_eps": 1e-6, "attention_head_dim": None,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
    "default": {
        "block_out_channels": (32, 96), "layers_per_block": 1, "num_class_embeds": CLASSES,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
    "adm": {  # openai/diffusers-cd_imagenet64_l2
        "block_out_channels": (32, 64, 64), "layers_per_block": 1, "num_class_embeds": CLASSES,
        "resnet_time_scale_shift": "scale_shift", "downsample_type": "resnet", "upsample_type": "resnet",
        "attention_head_dim": 16, "attn_norm_num_groups": 32, "out_channels": 6,
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    },
    "no-attention": {
        "block_out_channels": (32, 32), "layers_per_block": 1, "add_attention": False, "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", DIFFUSERS)
def test_diffusers(name):
    diffusers = pytest.importorskip("diffusers", reason="install ddjax[parity] to compare with diffusers")
    config = {"sample_size": SIDE, **DIFFUSERS[name]}
    module, tensors = randomised(diffusers.UNet2DModel(**config), 0.15)
    options = unet.diffusers_options(dict(module.config))
    rows, params, apply = loaded(options, unet.diffusers, tensors)
    xt, t, labels = inputs(999)
    labels = labels if "num_class_embeds" in config else None
    theirs = module(
        torch.from_numpy(xt.transpose(0, 3, 1, 2)), torch.from_numpy(999 * t),
        class_labels=None if labels is None else torch.from_numpy(labels),
    ).sample  # fmt: skip
    close(jax.jit(apply)(params, xt, t, labels), theirs)
    again = mapping.save(rows, params)
    assert again.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(again[key], tensor, err_msg=key)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier'"),
        ({"down_block_types": ("SkipDownBlock2D", "DownBlock2D")}, "not residual blocks"),
        ({"up_block_types": ("UpBlock2D", "AttnUpBlock2D")}, "in a mirror"),
        ({"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups=None"),
        ({"down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D")}, "in a mirror"),
        ({"sample_size": None}, "sample_size is not given"),
    ],
)
def test_configs_of_diffusers_that_are_no_such_network_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        unet.diffusers_options({"sample_size": SIDE, **DIFFUSERS["default"], **wrong})


CONDITIONED = {
    "ldm": {  # CompVis/ldm-text2im-large-256 and Stable Diffusion 1: as many heads everywhere
        "block_out_channels": (32, 64, 64), "layers_per_block": 2, "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    },
    "sd2": {  # Stable Diffusion 2: heads of one width, linear layers around the transformers; and the rest that may be
        "block_out_channels": (32, 64), "layers_per_block": 1, "attention_head_dim": [2, 4],
        "num_class_embeds": CLASSES,
        "use_linear_projection": True, "transformer_layers_per_block": 2, "downsample_padding": 0, "out_channels": 6,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "flip_sin_to_cos": False, "freq_shift": 1,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "resnet_time_scale_shift": "scale_shift",
    },
    "small": {
        "block_out_channels": (32,), "layers_per_block": 1, "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",), "attention_head_dim": 2, "sample_size": [8, 16],
    },
}  # fmt: skip
WORDS = np.random.default_rng(3).normal(size=(BATCH, 5, 12)).astype(np.float32)
THERE = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 1, 0, 1]], bool)


def conditioned(name, folder):
    """A U-Net with text of diffusers, all random, and its folder."""
    diffusers = pytest.importorskip("diffusers", reason="install ddjax[parity] to compare with diffusers")
    config = {"sample_size": SIDE, "in_channels": CHANNELS, "out_channels": CHANNELS, "cross_attention_dim": 12}
    module, tensors = randomised(diffusers.UNet2DConditionModel(**config | CONDITIONED[name]), 0.15)
    module.save_pretrained(folder)
    return module, tensors


@pytest.mark.parametrize("name", ["ldm", "sd2"])
def test_diffusers_with_text(name, tmp_path):
    """The whole network, with and without a mask of the words; its tensors again; guided; and refused by name."""
    module, tensors = conditioned(name, tmp_path)
    model = interop.load(tmp_path)
    assert (model.family, model.kind, model.report.whole) == ("diffusers_conditioned_unet", "noise", True)
    xt, t, labels = inputs(999)
    labels = labels if "num_class_embeds" in CONDITIONED[name] else None
    call = jax.jit(model.apply)
    for valid in (None, THERE):
        with torch.no_grad():
            theirs = module(
                torch.from_numpy(xt.transpose(0, 3, 1, 2)), torch.from_numpy(999 * t), torch.from_numpy(WORDS),
                class_labels=None if labels is None else torch.from_numpy(labels),
                encoder_attention_mask=None if valid is None else torch.from_numpy(valid),
            ).sample  # fmt: skip
        close(call(model.params, xt, t, {"sequence": WORDS, "valid": valid, "cond": labels}), theirs)
    model.export(tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(again[key], tensor, err_msg=key)
    model.save(tmp_path / "ours.safetensors")
    ours = interop.load(tmp_path / "ours.safetensors")
    jax.tree.map(np.testing.assert_array_equal, ours.params, model.params)
    assert ours.apply == model.apply
    learned = {**model.params, "nothing": model.params["nothing"] + 1}
    with pytest.raises(ValueError, match="nothing: a table that cannot be learned in their network"):
        mapping.save(model.model.entries, learned)
    where = next(key for key in tensors if "attn2.to_v" in key)
    wrong = {**tensors, "add_embedding.linear_1.weight": WORDS, where: tensors[where][:, :-1]}
    wrong.pop("mid_block.attentions.0.proj_in.weight")
    save_file({k: np.ascontiguousarray(v) for k, v in wrong.items()}, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "again.safetensors").unlink()
    (tmp_path / "ours.safetensors").unlink()
    lines = (
        "unknown: add_embedding.linear_1.weight",
        "missing: mid_block.attentions.0.proj_in.weight",
        f"mis-shaped: {where}",
    )
    with pytest.raises(ValueError, match="(?s)" + "".join(f"(?=.*{re.escape(line)})" for line in lines)):
        interop.load(tmp_path)


def test_text_guides_away_from_the_empty_prompt(tmp_path):
    """Without + scale (with - without), by hand; and in the sampler."""
    conditioned("small", tmp_path)
    model = interop.load(tmp_path)
    xt, t, _ = inputs(999)
    xt = xt[:, :8]
    cond, empty = {"sequence": WORDS}, {"sequence": WORDS[1] + 1}
    found = model.guided(3.0, empty)(xt, t, cond).value
    one = lambda words: model.apply(model.params, xt, t, {"sequence": words})
    without = one(np.tile(empty["sequence"], (BATCH, 1, 1)))
    np.testing.assert_allclose(found, without + 3 * (one(WORDS) - without), rtol=0, atol=1e-4 * np.abs(found).max())
    key, options = jax.random.key(0), {"steps": 2, "solver": None}
    drawn = model.sample(key, BATCH, cond, guidance=3.0, null=empty, **options).x0
    assert drawn.shape == xt.shape
    assert np.abs(drawn - model.sample(key, BATCH, cond, **options).x0).max() > 1e-3
    with pytest.raises(ValueError, match="say away from what, null="):
        model.sample(key, BATCH, cond, guidance=3.0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"addition_embed_type": "text_time"}, "addition_embed_type='text_time'"),  # SDXL
        ({"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim_type='text_proj'"),
        ({"mid_block_type": "UNetMidBlock2D"}, "mid_block_type='UNetMidBlock2D'"),
        ({"transformer_layers_per_block": (1, 2)}, "one number, at all resolutions"),
        ({"cross_attention_dim": None}, "cross_attention_dim=None"),
        ({"attention_head_dim": (2, 8)}, "as many, or as wide"),
        ({"down_block_types": ("DownBlock2D", "SimpleCrossAttnDownBlock2D")}, "not residual blocks"),
        ({"sample_size": None}, "sample_size is not given"),
    ],
)
def test_configs_of_diffusers_with_text_that_are_no_such_network_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        unet.conditioned_options({"sample_size": SIDE, **CONDITIONED["sd2"], **wrong})


def test_a_spatial_transformer_is_diffusers_transformer_2d_model():
    """Alone, all weights random: what it adds to its input."""
    pytest.importorskip("diffusers", reason="install ddjax[parity] to compare with diffusers")
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    for linear in (False, True):
        module, tensors = randomised(
            Transformer2DModel(
                4, 8, in_channels=32, num_layers=2, norm_num_groups=8, cross_attention_dim=12,
                use_linear_projection=linear,
            )
        )  # fmt: skip
        make = lambda: SpatialTransformer(
            32, 4, depth=2, context_width=12, norm=functools.partial(GroupNorm, groups=8), rngs=nnx.Rngs(0)
        )
        layer = nnx.eval_shape(make)
        graphdef, state = nnx.split(layer)
        shapes = {path: leaf.shape for path, leaf in mapping.flat(nnx.to_pure_dict(state)).items()}
        rows = [strip(entry) for entry in unet._transformer("a", layer, "b", linear)]
        params, report = mapping.load(rows, tensors, shapes)
        assert report.whole
        x = np.random.default_rng(1).normal(size=(BATCH, 4, 6, 32)).astype(np.float32)
        with torch.no_grad():
            given = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
            mask = torch.from_numpy(np.where(THERE, 0.0, -1e9).astype(np.float32)[:, None])
            theirs = module(given, torch.from_numpy(WORDS), encoder_attention_mask=mask).sample - given
        close(nnx.merge(graphdef, params)(x, context=(WORDS, THERE)), theirs)


def strip(entry):
    """Without the names of the layer itself."""
    cut = lambda names: tuple(n[2:] for n in names) if isinstance(names, tuple) else names[2:]
    return dataclasses.replace(entry, ours=cut(entry.ours), theirs=cut(entry.theirs))


def test_sizes_are_those_of_the_published_modules():
    # At full width, without numbers: EDM's of CIFAR-10 (Karras et al. 2022) and ADM of ImageNet-64.
    from ddjax.denoisers import UNET_SIZES

    with torch.device("meta"):
        wide = {"channels": 3, "out": 3, "width": 128, "multipliers": (2, 2, 2), "blocks": 4, "attend_at": (16,)}
        modules = {
            "ddpm++-cifar10": (published.SongUNet(side=32, **wide), 32, {"latent": 0}),
            "ncsn++-cifar10": (published.SongUNet(side=32, ncsn=True, **wide), 32, {}),
            "adm-imagenet64": (
                published.ADM(
                    channels=3, out=6, width=192, multipliers=(1, 2, 3, 4), blocks=3, attend_at=(2, 4, 8),
                    head_width=64, classes=1000,
                ), 64, {"num_classes": 1000, "out_channels": 6},
            ),
        }  # fmt: skip
    for name, (module, side, more) in modules.items():
        net = nnx.eval_shape(lambda: UNet(shape=(side, side, 3), **UNET_SIZES[name], **more, rngs=nnx.Rngs(0)))  # noqa: B023
        ours = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(functional(net)[1]))
        buffers = sum(b.numel() for key, b in module.named_buffers() if "freqs" in key)
        assert ours == sum(p.numel() for p in module.parameters()) + buffers, name


@pytest.mark.parametrize("new_order", [False, True])
def test_the_classifier_of_noisy_images(tmp_path, new_order):
    sizes = {"channels": CHANNELS, "width": 32, "multipliers": (1, 2, 2), "blocks": 2, "attend_at": (2, 4)}
    module = published.ADMClassifier(side=SIDE, classes=CLASSES, head_width=16, new_order=new_order, **sizes)
    module, tensors = randomised(module)
    save_file(tensors, tmp_path / "m.safetensors")
    given = {"size": SIDE, "head_width": 16, "new_order": new_order}
    model = interop.load(tmp_path / "m.safetensors", **given)
    assert (model.family, model.settings["attend_at"], model.report.whole) == ("adm_classifier", [8, 4], True)
    xt, t, _ = inputs(999.0)
    wanted = module(torch.from_numpy(xt.transpose(0, 3, 1, 2)), torch.from_numpy(999.0 * t)).detach().numpy()
    found = jax.jit(model.apply)(model.params, xt, t)
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
    structure = jax.tree.structure(model.log_prob)
    assert structure == jax.tree.structure(model.log_prob)  # one compiled sampler for all calls
    again = mapping.save(model.model.entries, model.params)
    assert again.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(again[key], tensor, err_msg=key)
    del tensors["out.2.c_proj.bias"]
    save_file({**tensors, "out.3.weight": tensors["out.0.bias"]}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match=r"(?s)unknown: out\.3\.weight.*missing: out\.2\.c_proj\.bias"):
        interop.load(tmp_path / "m.safetensors", **given)
