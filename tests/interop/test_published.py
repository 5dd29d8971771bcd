"""Published models without torch: found, refused, sampled by one call, converted and back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from ddjax import grids, interop, predictions, sample, solvers
from ddjax.cli import main
from ddjax.denoisers import functional_init
from ddjax.interop import adapters, images, mapping, published, scheduler, unet_families
from ddjax.schedules import LogLinear
from ddjax.types import SoftTokens

LABELS = jnp.array([1, 3])
DIT = {
    "size": 4, "channels": 2, "out_channels": 4, "patch": 2, "width": 8, "depth": 1, "heads": 2, "mlp_width": 16,
    "num_classes": 3, "guided_channels": 1, "chain": 1000,
}  # fmt: skip
TEXT = {
    "length": 6, "vocabulary": 7, "width": 8, "depth": 1, "heads": 2, "mlp_width": 32, "inv_freq": True, "eps": 1e-3,
    "cond_width": 4,
}  # fmt: skip
U_NET = {
    "shape": [8, 8, 3], "out_channels": 3, "width": 16, "multipliers": [1.0, 2.0], "blocks": 1, "attend_at": [4],
    "num_classes": 3, "time_scale": 1.0,
}  # fmt: skip
UNET2D = {  # config.json of a model of diffusers
    "_class_name": "UNet2DModel", "sample_size": 8, "block_out_channels": [8, 16], "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4, "num_class_embeds": 3,
}  # fmt: skip
WORDS = {  # of a UNet2DConditionModel
    **UNET2D, "_class_name": "UNet2DConditionModel", "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "cross_attention_dim": 6, "attention_head_dim": 2,
    "use_linear_projection": True,
}  # fmt: skip
CONFIGS = {"diffusers_unet": UNET2D, "diffusers_conditioned_unet": WORDS}
SETTINGS = {
    "dit": DIT,
    "sit": {n: v for n, v in DIT.items() if n != "chain"},
    "diffusers_dit": {n: v for n, v in DIT.items() if n != "chain"} | {"guided_channels": 2} | scheduler.CHAIN,
    "uvit": {
        "size": 4, "channels": 2, "patch": 2, "width": 8, "depth": 3, "heads": 2, "mlp_width": 16, "num_classes": 3,
        "conv": False, "latents": True,
    },
    "adm": U_NET | {
        "size": 8, "out_channels": 6, "time_scale": 999.0, "new_order": False, "cosine": False, "head_width": 16,
        "design": {"resample": "block", "scale_shift": True}, "width": 32,
    },
    "edm_song": U_NET | {"design": "ncsn++", "latent": 0},
    "edm_adm": U_NET | {"design": "adm_edm", "latent": 0, "head_width": 16},
    "edm2": U_NET | {"head_width": 16},
    "diffusers_unet": unet_families.DIFFUSERS_UNET.settings({}, UNET2D, {}),
    "diffusers_conditioned_unet": unet_families.DIFFUSERS_CONDITIONED_UNET.settings({}, WORDS, {}),
    "mdlm": TEXT | {"mask": 6, "time_conditioning": False, "num_classes": 0},
    "sedd": TEXT | {"graph": "absorb", "scale_by_sigma": True, "noise": "loglinear", "noise_range": [1e-4, 20.0]},
    "udlm": TEXT | {"time_conditioning": True, "num_classes": 0},
    "duo": TEXT | {"time_conditioning": True, "num_classes": 0},
    "radd": {n: v for n, v in TEXT.items() if n != "cond_width"} | {"mask": 6},
    "llada": {
        "length": 6, "vocabulary": 7, "mask": 4, "width": 8, "depth": 1, "heads": 2, "kv_heads": 1, "mlp_width": 12,
        "rope_theta": 5e5, "epsilon": 1e-5, "dtype": "float32",
    },
    "md4": {
        "length": 6, "vocabulary": 6, "num_classes": 0, "noise_schedule": "linear", "sampling_grid": "cosine",
        "steps": 1000, "width": 8, "depth": 1, "heads": 2, "mlp_width": 32, "mlp_type": "glu", "embed_width": None,
        "cond_width": 4,
    },
    "adm_classifier": {
        "size": 8, "shape": [8, 8, 3], "classes": 3, "design": {"resample": "block", "scale_shift": True}, "width": 32,
        "multipliers": [1.0, 2.0], "blocks": 1, "attend_at": [4], "head_width": 16, "time_scale": 999.0,
        "new_order": False,
    },
    "diffusers_vae": {
        "size": 8, "shape": [8, 8, 3], "channels": 2, "width": 32, "multipliers": [1, 2], "blocks": 1, "groups": 32,
        "middle_attention": True, "quant": [True, True], "scale": 0.18215,
    },
}  # fmt: skip
GIVEN = {  # what nothing in the file says
    "dit": {"heads": 2, "guided_channels": 1},
    "sit": {"heads": 2, "guided_channels": 1},
    "diffusers_dit": {"heads": 2, "size": 4},
    "uvit": {"heads": 2},
    "adm": {"size": 8, "head_width": 16},
    "edm_song": {},
    "edm_adm": {"head_width": 16},
    "edm2": {"head_width": 16},
    "diffusers_unet": {},
    "diffusers_conditioned_unet": {},
    "adm_classifier": {"size": 8, "head_width": 16},
    "diffusers_vae": {"size": 8},
    "llada": {"heads": 2, "mask": 4, "length": 6},
}


def written(name, path, prefix=""):
    """A file of a family with random weights, as its authors' would be; all but tables that their network computes."""
    model = interop.FAMILIES[name].model(SETTINGS[name])
    rng = np.random.default_rng(0)
    shapes = mapping.shapes_of(functional_init(lambda rngs: model.make(rngs=rngs))[0])
    leaves = {n: (0.3 * rng.normal(size=s)).astype(np.float32) for n, s in shapes.items()}
    for entry in model.entries:
        if not entry.theirs:
            leaves[entry.ours] = entry.change.load()
    tensors = mapping.save(model.entries, mapping.nested(leaves))
    save_file({prefix + n: v for n, v in tensors.items()}, path)
    if name in CONFIGS:
        path.with_name("config.json").write_text(json.dumps(CONFIGS[name]))
    return path


def loaded(name, path, **more):
    return interop.load(written(name, path), name, **GIVEN.get(name, {"length": 6}), **more)


def test_the_settings_of_the_tests_are_all_families():
    assert SETTINGS.keys() == interop.FAMILIES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_one_call_samples(tmp_path, name):
    model = loaded(name, tmp_path / "m.safetensors")
    assert model.settings == SETTINGS[name]
    if model.kind in (published.CLASSES, published.AUTOENCODER):
        return  # `sample` refuses: tests/interop/test_sampling_parity.py, test_vae.py
    labelled = model.model.num_classes > 0
    cond = LABELS if labelled else None
    drawn = model.sample(jax.random.key(1), 2, cond, steps=4)
    assert drawn.x0.shape == (2, *model.model.shape)
    again = model.sample(jax.random.key(1), 2, cond, steps=4)
    np.testing.assert_array_equal(drawn.x0, again.x0)
    if model.process.state == "gaussian":
        assert jnp.isfinite(drawn.x0).all()
    else:
        assert ((drawn.x0 >= 0) & (drawn.x0 < model.process.num_symbols)).all()
        if "mask" in model.settings:
            assert (drawn.x0 != model.settings["mask"]).all()
        assert model.sample(jax.random.key(1), 2, steps=2, length=3).x0.shape == (2, 3)
    if labelled:
        off, on = (model.sample(jax.random.key(1), 2, cond, steps=4, guidance=scale) for scale in (1.0, 2.0))
        assert not np.allclose(off.x0, on.x0)
        assert (off.nfe < on.nfe).all()
    else:
        with pytest.raises(ValueError, match=r"give cond|has none here"):
            model.sample(jax.random.key(1), 2, guidance=2.0)


def test_a_chain_of_steps_ends_at_the_mean():
    """Of noise that the network always says to be c: DDPM's last step is (x - sqrt(beta_1) c) / sqrt(1 - beta_1)."""
    made = interop.FAMILIES["dit"].model(DIT)
    init, apply = functional_init(lambda rngs: made.make(rngs=rngs))
    params = init(jax.random.key(0))  # whose output layer is zero
    c = np.random.default_rng(0).normal(size=params["final"]["out"]["bias"].shape).astype(np.float32)
    params["final"]["out"]["bias"] = jnp.asarray(c)
    model = interop.Published("dit", DIT, made, init, made.wrap(apply), params, interop.Report())
    key, times = jax.random.key(2), images.chain_steps(5)
    state = sample(
        key, model.denoise, model.process, shape=(2, 4, 4, 2), solver=solvers.Ancestral(model.process), times=times
    )
    noise = np.tile(c.reshape(2, 2, 4)[..., :2], (2, 2, 1))
    wanted = (state.x0 - np.sqrt(1e-4) * noise) / np.sqrt(1 - 1e-4)
    drawn = model.sample(key, 2, steps=5)
    np.testing.assert_allclose(drawn.x0, wanted, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(drawn.nfe, state.nfe + 1)


def test_respaced_steps():
    np.testing.assert_allclose(np.asarray(images.chain_steps(3)) * 999, [999, 500, 0], atol=1e-3)
    np.testing.assert_allclose(np.asarray(images.chain_steps(4)) * 999, [999, 666, 333, 0], atol=1e-3)
    np.testing.assert_allclose(np.asarray(images.chain_steps(1000)) * 999, np.arange(1000)[::-1], atol=1e-3)
    with pytest.raises(ValueError, match="expected 2 to 1000"):
        images.chain_steps(1)


def test_guidance_of_some_channels():
    def denoise(xt, t, cond):
        return predictions.Prediction(xt * (1.0 + cond[:, None, None, None]), "noise")

    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 3)))
    out = adapters.guided_channels(denoise, null=3, scale=2.5, channels=2)(x, jnp.zeros(2), LABELS).value
    with_, without = (x * (1.0 + v) for v in (LABELS[:, None, None, None], 3))
    np.testing.assert_allclose(out[..., :2], (without + 2.5 * (with_ - without))[..., :2], rtol=1e-6)
    np.testing.assert_allclose(out[..., 2:], with_[..., 2:], rtol=1e-6)
    assert adapters.guided_channels(denoise, null=3, scale=1.0, channels=2) is denoise


def test_soft_tokens_reach_a_mask_among_the_tokens():
    seen = []
    wrapped = adapters.WithMask(lambda params, xt, t, cond: seen.append(xt) or jnp.zeros((1, 2, 5)), 1, 5)
    wrapped(None, SoftTokens(jnp.array([[[5, 2], [0, 4]]]), jnp.ones((1, 2, 2))), 0.5)
    np.testing.assert_array_equal(seen[0].ids, [[[1, 2], [0, 4]]])


def test_total_noise_keeps_its_digits():
    t = jnp.array([1e-6, 0.3, 0.9])
    exact = -np.log1p(-(1 - 1e-3) * np.asarray(t, np.float64))
    np.testing.assert_allclose(adapters.total_noise(LogLinear(), t), exact, rtol=1e-6)


def test_files_say_what_they_are_or_are_refused(tmp_path):
    dit = written("dit", tmp_path / "dit.safetensors")
    with pytest.raises(ValueError, match="could be dit or sit: say which with family="):
        interop.load(dit)
    with pytest.raises(ValueError, match="give heads="):
        interop.load(dit, "dit")
    with pytest.raises(ValueError, match=r"is no uvit .*patch_embed"):
        interop.load(dit, "uvit")
    with pytest.raises(ValueError, match=r"no settings \['depht'\]"):
        interop.load(dit, "dit", heads=2, depht=3)
    with pytest.raises(ValueError, match="family='gpt': expected one of 'dit'"):
        interop.load(dit, "gpt")
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is of no family"):
        interop.load(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError):
        interop.load(tmp_path / "none.safetensors")
    assert interop.load(written("uvit", tmp_path / "u.safetensors"), heads=2).family == "uvit"
    assert interop.load(written("radd", tmp_path / "r.safetensors")).family == "radd"


def test_averages_are_taken_and_strangers_named(tmp_path):
    with safe_open(written("dit", tmp_path / "dit.safetensors"), framework="numpy") as file:
        tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    both = {f"model.{n}": 0 * v for n, v in tensors.items()} | {f"ema.{n}": v for n, v in tensors.items()}
    save_file(both, tmp_path / "both.safetensors")
    model = interop.load(tmp_path / "both.safetensors", "dit", heads=2)
    assert (model.prefix, len(model.report.aside), model.report.whole) == ("ema.", len(tensors), True)
    assert "set aside" in str(model.report)
    np.testing.assert_array_equal(model.params["condition"]["labels"], tensors["y_embedder.embedding_table.weight"])

    del tensors["blocks.0.mlp.fc1.bias"]
    tensors |= {"step": np.zeros(1, np.float32), "blocks.0.attn.proj.bias": np.zeros(3, np.float32)}
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError) as error:
        interop.load(tmp_path / "bad.safetensors", "dit", heads=2)
    assert str(error.value).splitlines() == [
        "these weights are not this network's: 1 unknown, 1 missing, 1 misshapen",
        "unknown: step",
        "missing: blocks.0.mlp.fc1.bias",
        "mis-shaped: blocks.0.attn.proj.bias has (3,), expected (8,)",
    ]
    report = interop.load(tmp_path / "bad.safetensors", "dit", heads=2, partial=True).report
    assert report.missing == ("blocks.0.mlp.fc1.bias",)


def test_a_table_that_they_compute_must_stay(tmp_path):
    model = loaded("diffusers_dit", tmp_path / "m.safetensors")
    model.params["position"] += 0.1
    with pytest.raises(ValueError, match="position: a table that cannot be learned"):
        model.export(tmp_path / "x.safetensors")


def run(capsys, *arguments):
    code = main(["convert", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_convert_and_back(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("ddjax.cli._prepare_jax", lambda: None)
    source = written("radd", tmp_path / "theirs.safetensors", "module.")
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.safetensors"
    code, out, err = run(capsys, source, "--out", ours, "--set", "length=6", "--names")
    assert (code, err) == (0, ""), err
    assert "module" not in out
    assert "blocks.0.attn_out.weight" in out
    assert "stack/blocks/0/attention/out/kernel" in out
    assert "15 tensors matched 15 parameters\n1 fixed tensors are as they must be" in out
    assert interop.load(ours).settings == SETTINGS["radd"]

    code, out, err = run(capsys, ours, "--out", back)
    assert (code, err, out) == (0, "", f"radd (ML-GSAI/RADD, Ou et al. 2025), theirs -> {back}\n")
    with safe_open(source, framework="numpy") as a, safe_open(back, framework="numpy") as b:
        assert set(a.keys()) == set(b.keys())
        for name in a.keys():  # noqa: SIM118
            np.testing.assert_array_equal(a.get_tensor(name), b.get_tensor(name), err_msg=name)

    half = tmp_path / "half.safetensors"
    assert run(capsys, ours, "--out", half, "--dtype", "bfloat16")[0] == 0
    with safe_open(half, framework="numpy") as file:
        assert file.get_tensor("module.vocab_embed.embedding").dtype == jnp.bfloat16
    assert interop.load(half, length=6).settings == SETTINGS["radd"]  # the rounded table of frequencies is known


def test_convert_says_what_is_wrong(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("ddjax.cli._prepare_jax", lambda: None)
    source, out_path = written("radd", tmp_path / "theirs.safetensors"), tmp_path / "x.safetensors"
    with safe_open(source, framework="numpy") as file:
        tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    del tensors["blocks.0.mlp.0.bias"]
    save_file(tensors, tmp_path / "less.safetensors")
    code, out, err = run(capsys, tmp_path / "less.safetensors", "--out", out_path)
    assert (code, out) == (1, "missing: blocks.0.mlp.0.bias\n")
    assert err == "ddjax convert: these weights are not this network's: 1 missing\n"
    assert not out_path.exists()
    (tmp_path / "m.pt").write_bytes(b"\x80\x04.")
    code, out, err = run(capsys, tmp_path / "m.pt", "--out", out_path)
    assert (code, out.count("\n")) == (1, 2)
    assert "save_file" in out
    assert err.count("\n") == 1
    assert "is a pickle" in err
    assert "must end in .safetensors" in run(capsys, source, "--out", tmp_path / "x.bin")[2]
    run(capsys, source, "--out", out_path)
    assert "says itself what it is" in run(capsys, out_path, "--out", tmp_path / "y.safetensors", "--family", "radd")[2]


def test_convert_names_every_family(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("ddjax.cli._prepare_jax", lambda: None)
    monkeypatch.setitem(interop.FAMILIES, "another", interop.FAMILIES["dit"])
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    listed = capsys.readouterr().out.split("Families: ")[1]
    assert listed.replace("\n", " ").strip() == ", ".join(interop.FAMILIES) + "."
    source = written("radd", tmp_path / "theirs.safetensors")
    code, _, err = run(capsys, source, "--out", tmp_path / "x.safetensors", "--family", "resnet")
    assert (code, err.split("expected one of ")[1].strip()) == (1, ", ".join(map(repr, interop.FAMILIES)))


def test_ours_must_hold_what_its_header_says(tmp_path):
    model = loaded("radd", tmp_path / "m.safetensors")
    del model.params["final"]["out"]["bias"]
    model.save(tmp_path / "ours.safetensors")
    with pytest.raises(ValueError, match=r"does not hold the parameters.*final/out/bias"):
        interop.load(tmp_path / "ours.safetensors")


def test_the_pickle_lines_work(tmp_path):
    """What the refusal says to run makes a file that loads."""
    torch = pytest.importorskip("torch", reason="install ddjax[parity] to run torch's side")
    with safe_open(written("radd", tmp_path / "r.safetensors"), framework="pt") as file:
        state = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
    torch.save({"ema": state, "step": 3}, tmp_path / "m.pt")
    with pytest.raises(ValueError) as error:
        interop.load(tmp_path / "m.pt")
    exec("\n".join(line.strip() for line in str(error.value).splitlines()[1:]), {})
    assert interop.load(tmp_path / "m.safetensors", length=6).settings == SETTINGS["radd"]


def test_grids_are_of_the_processes():
    for name, settings in SETTINGS.items():
        model = interop.FAMILIES[name].model(settings)
        times = model.grid(model.steps)
        grids.check_grid(times)
        assert (float(times[0]), float(times[-1])) == (1.0, 0.0)
