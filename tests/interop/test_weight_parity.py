"""Published networks in torch, all weights random, against ours with the same weights (ddjax[parity])."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="install ddjax[parity] to compare with torch")

import published_transformers as theirs  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from ddjax import interop  # noqa: E402

pytestmark = pytest.mark.slow

B, SIZE, CHANNELS, WIDTH, HEADS, CLASSES = 3, 8, 3, 24, 3, 5
LENGTH, VOCABULARY, COND, MASK = 9, 11, 10, 4
rng = np.random.default_rng(0)


def randomised(module, seed=0):
    """All parameters, those that start at zero or one too, as large as makes every layer matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            scale = 0.5 if p.ndim < 2 else 1.5 * p[0].numel() ** -0.5
            p.copy_(scale * torch.randn(p.shape, generator=generator))
    return module.eval()


def saved(module, folder, config=None, prefix=""):
    save_file(
        {prefix + k: v.clone().contiguous() for k, v in module.state_dict().items()}, folder / "model.safetensors"
    )
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def equal(ours, wanted):
    """To 2e-5 of the output's scale."""
    wanted = wanted.detach().numpy()
    assert np.abs(wanted).std() > 0.05
    np.testing.assert_allclose(np.asarray(ours), wanted, atol=2e-5 * np.abs(wanted).max(), rtol=0)


def round_trips(model, module, folder, prefix=""):
    """Theirs again, and ours again, to the bit; a second loading gives the same output."""
    model.export(folder / "again.safetensors")
    names = {prefix + name: value for name, value in module.state_dict().items()}
    with safe_open(folder / "again.safetensors", framework="numpy") as again:
        assert set(again.keys()) == set(names)
        for name, value in names.items():
            np.testing.assert_array_equal(again.get_tensor(name), value.numpy(), err_msg=name)
    model.save(folder / "ours.safetensors")
    back = interop.load(folder / "ours.safetensors")
    assert back.apply == model.apply
    assert (back.process, back.kind, back.settings) == (model.process, model.kind, model.settings)
    for a, b in zip(jax.tree.leaves(back.params), jax.tree.leaves(model.params), strict=True):
        np.testing.assert_array_equal(a, b)


def images():
    x = rng.normal(size=(B, SIZE, SIZE, CHANNELS)).astype(np.float32)
    return x, torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


def channels_last(y):
    return y.permute(0, 2, 3, 1)


LABELS = np.array([0, 3, CLASSES], np.int32)  # the last is the null label
STEPS = np.array([0, 371, 999])


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_dit(tmp_path, learn_sigma):
    module = randomised(theirs.DiT(SIZE, 2, CHANNELS, WIDTH, 2, HEADS, CLASSES, learn_sigma, ratio=3))
    model = interop.load(saved(module, tmp_path, prefix="module."), "dit", heads=HEADS)
    assert model.report.whole
    x, x_theirs = images()
    out = model.denoise(jnp.asarray(x), jnp.asarray(STEPS / 999), jnp.asarray(LABELS))
    assert out.kind == "noise"
    equal(out.value, channels_last(module(x_theirs, torch.from_numpy(STEPS), torch.from_numpy(LABELS))))
    round_trips(model, module, tmp_path, "module.")


def test_sit_gives_our_velocity(tmp_path):
    module = randomised(theirs.DiT(SIZE, 2, CHANNELS, WIDTH, 2, HEADS, CLASSES, True))
    model = interop.load(saved(module, tmp_path), "sit", heads=HEADS)
    x, x_theirs = images()
    t = np.array([0.0, 0.3, 1.0], np.float32)  # theirs, 0 at noise
    out = model.denoise(jnp.asarray(x), jnp.asarray(1 - t), jnp.asarray(LABELS))
    velocity = module(x_theirs, torch.from_numpy(t), torch.from_numpy(LABELS))[:, :CHANNELS]
    equal(out.value, -channels_last(velocity))
    # x0 by our process is x + (1 - t) velocity, by theirs.
    x0 = model.process.convert(out, "x0", jnp.asarray(x), jnp.asarray(1 - t)).value
    equal(x0, channels_last(x_theirs + (1 - torch.from_numpy(t))[:, None, None, None] * velocity))
    round_trips(model, module, tmp_path)


@pytest.mark.parametrize("norm_eps", [1e-6, 1e-5])
def test_diffusers_dit(tmp_path, norm_eps):
    diffusers = pytest.importorskip("diffusers", reason="install ddjax[parity] to compare with diffusers")
    options = {
        "num_attention_heads": HEADS, "attention_head_dim": 8, "in_channels": CHANNELS, "out_channels": 2 * CHANNELS,
        "num_layers": 2, "sample_size": SIZE, "patch_size": 2, "num_embeds_ada_norm": CLASSES, "norm_eps": norm_eps,
    }  # fmt: skip
    module = randomised(diffusers.DiTTransformer2DModel(**options))
    first = module.transformer_blocks[0].norm1.emb.state_dict()
    for block in module.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    module.save_pretrained(tmp_path)
    model = interop.load(tmp_path)
    assert (model.family, model.settings["heads"]) == ("diffusers_dit", HEADS)
    x, x_theirs = images()
    out = model.denoise(jnp.asarray(x), jnp.asarray(STEPS / 999), jnp.asarray(LABELS))
    with torch.no_grad():
        wanted = module(x_theirs, torch.from_numpy(STEPS), torch.from_numpy(LABELS).long()).sample
    equal(out.value, channels_last(wanted))
    round_trips(model, module, tmp_path)

    with torch.no_grad():  # copies that are none
        module.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.bias[0] += 1
    module.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"linear_1\.bias.*not equal"):
        interop.load(tmp_path)


def test_diffusers_unet(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="install ddjax[parity] to compare with diffusers")
    module = diffusers.UNet2DModel(
        sample_size=SIZE, in_channels=CHANNELS, out_channels=CHANNELS, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 16), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8,
    )  # fmt: skip
    randomised(module).save_pretrained(tmp_path)
    model = interop.load(tmp_path)
    assert (model.family, model.kind) == ("diffusers_unet", "noise")
    x, x_theirs = images()
    with torch.no_grad():
        wanted = module(x_theirs, torch.from_numpy(STEPS)).sample
    equal(model.denoise(jnp.asarray(x), jnp.asarray(STEPS / 999)).value, channels_last(wanted))
    round_trips(model, module, tmp_path)


def tokens(symbols):
    x = rng.integers(symbols, size=(B, LENGTH)).astype(np.int32)
    return x, torch.from_numpy(x).long()


T = np.array([0.02, 0.4, 0.97])
SIGMA = torch.from_numpy(-np.log1p(-(1 - 1e-3) * T)).float()  # log-linear noise, by its published formula


def ddit(cond=COND):
    return randomised(theirs.DDiT(VOCABULARY, WIDTH, 2, HEADS, cond))


@pytest.mark.parametrize("timed", [False, True])
def test_mdlm(tmp_path, timed):
    module = ddit()
    config = {"model_type": "mdlm", "n_heads": HEADS, "model_length": LENGTH, "time_conditioning": timed}
    model = interop.load(saved(module, tmp_path, config, "backbone."))
    x, x_theirs = tokens(VOCABULARY)
    out = model.denoise(jnp.asarray(x), jnp.asarray(T))
    assert (out.kind, model.process.num_symbols, model.process.mask) == ("posterior", VOCABULARY - 1, VOCABULARY - 1)
    wanted = module(x_theirs, SIGMA if timed else torch.zeros(B))
    equal(out.value, wanted[..., :-1])
    round_trips(model, module, tmp_path, "backbone.")


def test_a_mask_among_the_tokens(tmp_path):
    module = ddit()
    model = interop.load(saved(module, tmp_path), "mdlm", mask=MASK, length=LENGTH)
    assert model.process.mask == VOCABULARY
    x, _ = tokens(VOCABULARY + 1)
    x[x == MASK] = VOCABULARY
    x[0, 0] = VOCABULARY
    wanted = module(torch.from_numpy(np.where(x == VOCABULARY, MASK, x)).long(), torch.zeros(B))
    out = model.denoise(jnp.asarray(x), jnp.asarray(T)).value
    others = np.arange(VOCABULARY) != MASK
    equal(out[..., others], wanted[..., others])
    assert (out[..., MASK] < -1e29).all()
    soft = jax.nn.one_hot(x, VOCABULARY + 1)
    equal(model.denoise(soft, jnp.asarray(T)).value[..., others], wanted[..., others])


def test_sedd(tmp_path):
    module = ddit()
    config = {"graph": {"type": "absorb"}, "model": {"length": LENGTH, "n_heads": HEADS, "scale_by_sigma": True}}
    model = interop.load(saved(module, tmp_path, config))
    assert (model.family, model.kind) == ("sedd", "ratio")
    x, x_theirs = tokens(VOCABULARY)
    wanted = theirs.sedd_scores(module(x_theirs, SIGMA), x_theirs, SIGMA)
    equal(model.denoise(jnp.asarray(x), jnp.asarray(T)).value, wanted)
    round_trips(model, module, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "graph": {"type": "tridiagonal"}}))
    with pytest.raises(ValueError, match="graph='tridiagonal'"):
        interop.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "graph": {"type": "uniform"}}))
    with pytest.raises(ValueError, match="it is off"):
        interop.load(tmp_path)


@pytest.mark.parametrize("noise", ["loglinear", "geometric"])
def test_sedd_with_a_uniform_graph(tmp_path, noise):
    module = ddit()
    config = {"graph": {"type": "uniform"}, "model": {"length": LENGTH, "n_heads": HEADS, "scale_by_sigma": False}}
    config["noise"] = {"type": noise, "sigma_min": 1e-3, "sigma_max": 15.0}
    model = interop.load(saved(module, tmp_path, config))
    x, x_theirs = tokens(VOCABULARY)
    sigma = SIGMA if noise == "loglinear" else torch.from_numpy(1e-3 ** (1 - T) * 15.0**T).float()
    wanted = module(x_theirs, sigma).scatter(-1, x_theirs[..., None], 0.0)
    out = model.denoise(jnp.asarray(x), jnp.asarray(T))
    assert (out.kind, model.process.num_symbols) == ("ratio", VOCABULARY)
    equal(out.value, wanted)
    np.testing.assert_allclose(model.process.schedule.alpha(jnp.asarray(T)), torch.exp(-sigma), rtol=1e-5)
    round_trips(model, module, tmp_path)


@pytest.mark.parametrize("family", ["udlm", "duo"])
def test_uniform_noise(tmp_path, family):
    module = ddit()
    model = interop.load(saved(module, tmp_path), family, length=LENGTH)
    x, x_theirs = tokens(VOCABULARY)
    out = model.denoise(jnp.asarray(x), jnp.asarray(T))
    assert (out.kind, model.process.num_symbols) == ("cavity", VOCABULARY)
    equal(out.value, module(x_theirs, SIGMA))
    round_trips(model, module, tmp_path)


@pytest.mark.parametrize("family", ["udlm", "mdlm"])
def test_labels_of_texts(tmp_path, family):
    module = randomised(theirs.DDiT(VOCABULARY, WIDTH, 2, HEADS, COND, CLASSES))
    model = interop.load(saved(module, tmp_path, {"time_conditioning": True}), family, length=LENGTH)
    assert model.model.num_classes == CLASSES
    x, x_theirs = tokens(VOCABULARY)
    out = model.denoise(jnp.asarray(x), jnp.asarray(T), jnp.asarray(LABELS)).value
    wanted = module(x_theirs, SIGMA, torch.from_numpy(LABELS).long())
    equal(out, wanted if family == "udlm" else wanted[..., :-1])
    none = module(x_theirs, SIGMA, torch.full((B,), CLASSES))
    guided = jax.nn.softmax(model.guided(2.0)(jnp.asarray(x), jnp.asarray(T), jnp.asarray(LABELS)).value)
    parts = [torch.log_softmax(v if family == "udlm" else v[..., :-1], -1) for v in (wanted, none)]
    equal(guided, torch.softmax(2 * parts[0] - parts[1], -1))
    equal(model.denoise(jnp.asarray(x), jnp.asarray(T)).value, none if family == "udlm" else none[..., :-1])
    round_trips(model, module, tmp_path)


def test_radd(tmp_path):
    module = ddit(cond=0)
    model = interop.load(saved(module, tmp_path), length=LENGTH)
    assert model.family == "radd"
    x, x_theirs = tokens(VOCABULARY)
    equal(model.denoise(jnp.asarray(x), jnp.asarray(T)).value, module(x_theirs)[..., :-1])
    round_trips(model, module, tmp_path)


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_llada_from_shards(tmp_path, groups):
    module = randomised(theirs.LLaDA(VOCABULARY, WIDTH, 2, 4, 40, 5e5, groups))
    config = {
        "model_type": "llada", "n_heads": 4, "n_kv_heads": groups, "max_sequence_length": LENGTH, "rope_theta": 5e5,
        "mask_token_id": MASK, "rms_norm_eps": 1e-5, "activation_type": "silu", "block_type": "llama",
    }  # fmt: skip
    state = {k: v.clone().contiguous() for k, v in module.state_dict().items()}
    names, shards = sorted(state), ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for i, shard in enumerate(shards):
        save_file({n: state[n] for n in names[i::2]}, tmp_path / shard)
    where = {n: shards[i] for i in range(2) for n in names[i::2]}
    (tmp_path / interop.tensors.INDEX[0]).write_text(json.dumps({"weight_map": where}))
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = interop.load(tmp_path)
    x, x_theirs = tokens(VOCABULARY)
    wanted = module(x_theirs)
    ours = np.where(x == MASK, VOCABULARY, x)
    others = np.arange(VOCABULARY) != MASK
    equal(model.denoise(jnp.asarray(ours), jnp.asarray(T)).value[..., others], wanted[..., others])
    round_trips(model, module, tmp_path)

    (tmp_path / "config.json").write_text(json.dumps(config | {"n_kv_heads": 3 - groups % 2}))
    with pytest.raises(ValueError, match=r"mis-shaped|does not divide"):
        interop.load(tmp_path)


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("classes", [0, CLASSES + 1])
def test_uvit(tmp_path, conv, classes):
    module = randomised(theirs.UViT(SIZE, 2, CHANNELS, WIDTH, 5, HEADS, classes, conv))
    model = interop.load(saved(module, tmp_path), heads=HEADS)
    assert model.family == "uvit"
    x, x_theirs = images()
    t = np.array([0.0, 0.3, 1.0])
    told = 999 * t + (0 if conv else 1)
    cond = jnp.asarray(LABELS) if classes else None
    out = model.denoise(jnp.asarray(x), jnp.asarray(t), cond)
    wanted = module(x_theirs, torch.from_numpy(told), torch.from_numpy(LABELS) if classes else None)
    equal(out.value, channels_last(wanted))
    round_trips(model, module, tmp_path)
