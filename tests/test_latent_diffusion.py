"""Latent diffusion from a config: an autoencoder's latents with their scale, and conditions beside labels."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ddjax import autoencoders
from ddjax.autoencoders import KLAutoencoder
from ddjax.config import ConfigError
from ddjax.experiment import build, load_data
from ddjax.run import Run, load
from ddjax.training import init_state
from ddjax.training.loop import draw, train

N = 24
RNG = np.random.default_rng(0)
NAMES = {"vector": "clip", "sequence": "words", "image": "low"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("latent")
    arrays = {
        "x": RNG.uniform(-1, 1, size=(N, 8, 8, 1)).astype(np.float32),
        "y": np.arange(N) % 3,
        "clip": RNG.normal(size=(N, 3)).astype(np.float32),
        "words": RNG.normal(size=(N, 5, 6)).astype(np.float32),
        "low": RNG.normal(size=(N, 4, 4, 2)).astype(np.float32),
    }
    np.savez(path / "data.npz", **arrays)
    autoencoder = KLAutoencoder((8, 8, 1), channels=2, width=4, multipliers=(1, 2), blocks=1, groups=2)
    autoencoders.save(path / "kl.safetensors", autoencoder, autoencoder.init(jax.random.key(0)))
    return path


def config(folder, conditions=NAMES, latents=True, workers=0, **scale):
    return tiny.config(
        data={
            "name": str(folder / "data.npz"),
            "tokens": False,
            "options": {"beside": ["clip", "words", "low"], "fractions": [0.5, 0.0, 0.5]},
            "conditions": conditions,
            "latents": {"autoencoder": str(folder / "kl.safetensors"), **scale} if latents else {},
        },
        process={"name": "gaussian", "schedule": "vp_cosine"},
        denoiser={"name": "dit", "kind": "v", "options": {"width": 8, "depth": 1, "heads": 2, "patch": 2}},
        objective={"name": "gaussian", "condition_dropout": 0.5},
        train={"steps": 4, "eval_every": 4, "sample_every": 0, "checkpoint_every": 4, "workers": workers},
        sample={"solver": "ddim", "guidance": 2.0},
    )


@pytest.mark.slow
def test_trained_sampled_and_shown(folder, tmp_path):
    c = config(folder)
    data = load_data(c, "train")
    assert (data.shape, data.conditions["image"]) == ((4, 4, 2), (4, 4, 2))
    assert abs(data[:]["x0"].std(dtype=np.float64) - 1) < 1e-6  # the latents' own scale, of the training split
    assert load_data(c, "test").latents == data.latents
    assert load_data(config(folder, scale=0.18215), "test").latents.scale == 0.18215

    train(c, tmp_path / "run", show=False)
    stored = json.loads((tmp_path / "run" / "run.json").read_text())["data"]["latents"]
    assert stored == {"path": str(folder / "kl.safetensors"), "scale": data.latents.scale}
    run = load(tmp_path / "run")
    held_out = load_data(c, "test")[:2]["cond"]
    samples = run.sample(jax.random.key(1), 2, cond=held_out)
    assert samples.shape == (2, 4, 4, 2)
    pictures = run.data.to_images(samples)
    assert (pictures.shape, pictures.dtype) == ((2, 8, 8, 1), np.uint8)
    for entry in (*NAMES, "cond"):  # each is heard
        other = {**held_out, entry: held_out[entry][::-1].copy()}
        if entry == "cond":
            other = {**held_out, "cond": (held_out["cond"] + 1) % 3}
        assert np.abs(np.asarray(run.sample(jax.random.key(1), 2, cond=other) - samples)).max() > 1e-6, entry
    some = run.sample(jax.random.key(1), 2, cond={"vector": held_out["vector"][0]}, guidance=1.0)
    assert jnp.isfinite(some).all()
    assert jnp.isfinite(run.sample(jax.random.key(1), 2)).all()  # told nothing
    assert np.isfinite(run.nelbo(jax.random.key(0), load_data(c, "test")[:2]["x0"], cond=held_out).total).all()
    path = draw(run, tmp_path, "grid", num=4)
    assert path.suffix == ".png"
    assert path.stat().st_size > 0


@pytest.mark.slow
def test_words_are_heard_by_stages(folder, tmp_path):
    """A text-to-image network of stages, from a config."""
    c = config(folder, {"sequence": "words"}, latents=False)
    options = {"width": 8, "stages": ["f", "fa", "f"], "head_width": 8}
    data = dataclasses.replace(c.data, options={**c.data.options, "beside": ["words"]})
    denoiser = dataclasses.replace(c.denoiser, name="dico", options=options)
    c = dataclasses.replace(c, data=data, denoiser=denoiser)
    train(c, tmp_path / "run", show=False)
    run, held_out = load(tmp_path / "run"), load_data(c, "test")[:2]["cond"]
    samples = run.sample(jax.random.key(1), 2, cond=held_out)
    other = {**held_out, "sequence": held_out["sequence"][::-1].copy()}
    assert np.abs(np.asarray(run.sample(jax.random.key(1), 2, cond=other) - samples)).max() > 1e-6
    assert jnp.isfinite(run.sample(jax.random.key(1), 2)).all()  # told nothing


@pytest.mark.slow
def test_a_u_net_is_told_everything(folder, tmp_path):
    c = config(folder)
    options = {"width": 8, "multipliers": [1, 2], "blocks": 1, "attend_at": [2]}
    c = dataclasses.replace(
        c,
        denoiser=dataclasses.replace(c.denoiser, name="unet", options=options),
        train=dataclasses.replace(c.train, steps=2, eval_every=0, checkpoint_every=2),
    )
    train(c, tmp_path / "run", show=False)
    run, held_out = load(tmp_path / "run"), load_data(c, "test")[:2]["cond"]
    assert run.params["condition"]["vector"]["kernel"].shape == (3, 32)
    assert run.params["middle"]["0"]["cross"]["key_value"]["kernel"].shape == (6, 32)
    assert run.params["embed"]["kernel"].shape == (3, 3, 4, 8)  # two channels of latents, two of the image
    moved = lambda x: np.abs(np.asarray(x)).max()
    assert moved(run.params["middle"]["0"]["cross"]["out"]["kernel"]) > 0  # they started at zero, and learn
    samples = run.sample(jax.random.key(1), 2, cond=held_out)
    for entry in NAMES:
        other = {**held_out, entry: held_out[entry][::-1].copy()}
        assert moved(run.sample(jax.random.key(1), 2, cond=other) - samples) > 0, entry
    assert jnp.isfinite(run.sample(jax.random.key(1), 2)).all()  # told nothing


@pytest.mark.slow
def test_dropout_and_guidance_reach_every_entry(folder):
    """What is dropped is the null of each entry, and guidance leads away from all of them."""
    c = config(folder)
    data = load_data(c, "train")
    seen = []
    experiment = build(c, data)

    def spy(params, xt, t, cond=None, **options):
        seen.append(cond)
        return experiment.apply(params, xt, t, cond, **options)

    objective = experiment.objective()
    state = init_state(experiment.init, experiment.optimizer(), jax.random.key(0))
    items = data[:8]
    objective(jax.random.key(2), spy, state.params, items["x0"], items["cond"])
    gone = np.asarray(seen[0]["cond"]) == 3
    assert 0 < gone.sum() < 8  # half of them, in one draw
    for entry, null in (("vector", 0), ("valid", False), ("image", 0)):
        value = np.asarray(seen[0][entry]).reshape(8, -1)
        np.testing.assert_array_equal((value == null).all(1), gone, err_msg=entry)
        np.testing.assert_array_equal(value[~gone], np.asarray(items["cond"][entry]).reshape(8, -1)[~gone])
    run = Run(experiment, state.params, 0)
    cond = run.labels(items["cond"], 8)
    denoise = run.guided(2.0, cond)
    assert set(denoise.null) == {"vector", "valid", "image", "cond"}


def test_what_does_not_go_together_is_said(folder):
    with pytest.raises(ConfigError, match=r"config\.data\.conditions: 'voice' is no entry"):
        load_data(config(folder, conditions={"voice": "clip"}), "train")
    with pytest.raises(ConfigError, match=r"config\.train\.workers=2"):
        load_data(config(folder, workers=2), "train")
    ranged = config(folder)
    ranged = dataclasses.replace(ranged, data=dataclasses.replace(ranged.data, interval=(0.0, 1.0)))
    with pytest.raises(ConfigError, match=r"config\.data\.interval=.*latents have a scale of their own"):
        load_data(ranged, "train")
    with pytest.raises(ConfigError, match=r"has no 'factor'"):
        load_data(config(folder, factor=2), "train")
    plain = config(folder, latents=False)
    with pytest.raises(ConfigError, match=r"name='dit' takes an image of its state's size.* 2 times smaller"):
        build(plain, load_data(plain, "train"))  # the image is of the latents' size, not the images'
    data = load_data(config(folder, conditions={"vector": "clip"}, latents=False), "train")
    with pytest.raises(ConfigError, match="come with 'low'"):  # in the items, and nobody asks for it
        build(config(folder, conditions={"vector": "clip"}, latents=False), data).batches(data)
