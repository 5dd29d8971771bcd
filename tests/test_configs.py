"""Every config in configs/ loads, and means what it says."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax import bind, config, data, experiment, plan, sample
from ddjax.data import arrays, text
from ddjax.data.graphs import from_graphs
from ddjax.loading import load_data
from ddjax.training.loop import draw, judge_labels, train

CONFIGS = sorted((pathlib.Path(__file__).parents[1] / "configs").glob("*.py"))


def small_data(name: str, folder: pathlib.Path) -> data.Dataset:
    """Data shaped like what the config expects, made here."""
    rng = np.random.default_rng(0)
    if name == "text8":
        (folder / "corpus.txt").write_text("the quick brown fox jumps over the lazy dog " * 200)
        return text.text(folder / "corpus.txt", "train", length=256, vocabulary="text8")
    if name in ("shakespeare", "shakespeare_bd3lm"):
        (folder / "corpus.txt").write_text("If music be the food of love, play on.\n" * 400)
        length = config.load(CONFIGS[0].with_name(f"{name}.py")).data.options["length"]
        return text.text(folder / "corpus.txt", "train", length=length, vocabulary="characters")
    if name == "sudoku":
        return arrays.from_arrays(rng.integers(0, 9, (50, 9, 9, 1), dtype=np.uint8), num_symbols=9)
    if name == "cifar10":
        np.save(folder / "images.npy", rng.integers(0, 256, (50, 32, 32, 3), dtype=np.uint8))
        return arrays.npy(folder / "images.npy", "train", tokens=True)
    if name == "digits_maskbit":
        return arrays.from_arrays(rng.integers(0, 16, (50, 4, 4, 2)), np.arange(50) % 10, num_symbols=16)
    if name == "mnist":
        np.savez(folder / "images.npz", x=rng.integers(0, 256, (50, 28, 28), dtype=np.uint8), y=np.arange(50) % 10)
        return arrays.npz(folder / "images.npz", "train", tokens=False)
    if name == "adult":
        data.write_csv(folder / "rows.csv", {"age": range(50), "sex": list("ab") * 25, "job": list("abcde") * 10})
        return data.load(folder / "rows.csv", "train")
    if name == "graphs":
        edges = {"n_nodes": np.array([3, 4] * 10), "edge_off": np.arange(21), "edges": np.tile([[0, 2]], (20, 1))}
        return from_graphs(edges, "train")
    if name == "dit_xl2":
        return plan.described((32, 32, 4), None, 1000)
    if name == "text_7b":
        return plan.described((4096,), 32000, 0)
    return load_data(config.load(CONFIGS[0].with_name(f"{name}.py")), "train")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_builds(path, tmp_path):
    """The process, network, objective, optimizer, solver and grid that it names all exist and fit its data."""
    built = experiment.build(config.load(path), small_data(path.stem, tmp_path))
    params = jax.eval_shape(built.init, jax.random.key(0))
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params)) > 10_000
    assert built.times().shape == (built.config.sample.steps + 1,)
    assert len(path.read_text().splitlines()) <= 40  # readable at a glance


def test_text8_is_the_published_size(tmp_path):
    """MD4's small text8 network has 12 layers of width 768; nearly all its parameters are in its blocks."""
    built = experiment.build(config.load(CONFIGS[0].with_name("text8.py")), small_data("text8", tmp_path))
    params = jax.eval_shape(built.init, jax.random.key(0))
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    attention, gated_mlp, modulation = 4 * 768**2, 3 * 768 * 2048, 6 * 768**2
    assert count == pytest.approx(12 * (attention + gated_mlp + modulation), rel=0.05)


def test_the_large_ones_have_the_published_sizes(tmp_path):
    """DiT-XL/2 has 675M parameters (Peebles & Xie 2023, table 4); the text denoiser about seven billion."""
    for name, size in {"dit_xl2": 675e6, "text_7b": 7e9}.items():
        built = experiment.build(config.load(CONFIGS[0].with_name(f"{name}.py")), small_data(name, tmp_path))
        params = jax.eval_shape(built.init, jax.random.key(0))
        assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == pytest.approx(size, rel=0.03)


def test_blackout_learns_and_samples(tmp_path):
    """Its network gives one number a site, on an axis that the process drops, and the sampler gives counts back."""
    size = [f"--config.denoiser.options.{option}" for option in ("width=8", "depth=1", "heads=2", "patch=4")]
    path = CONFIGS[0].with_name("digits_blackout.py")
    built = experiment.build(config.load(path, size), small_data(path.stem, tmp_path))
    params, labels = built.init(jax.random.key(0)), jnp.asarray([3, 7])
    x0 = jnp.asarray(np.random.default_rng(0).integers(0, 17, (2, 8, 8, 1)), jnp.int32)
    loss = lambda params: built.objective()(jax.random.key(1), built.apply, params, x0, labels)[0]
    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    assert np.isfinite([value, *map(np.linalg.norm, jax.tree.leaves(gradients))]).all()
    assert np.linalg.norm(gradients["final"]["out"]["kernel"]) > 0
    denoise = bind(built.apply, params, built.process, built.kind)
    settings = {"solver": built.solver(), "times": built.times(2), "cond": labels}
    x = np.asarray(sample(jax.random.key(2), denoise, built.process, shape=x0.shape, **settings).x0)
    assert x.shape == x0.shape
    assert ((x >= 0) & (x < 17)).all()


def test_the_image_of_super_resolution_says_its_scale():
    c = config.load(CONFIGS[0].with_name("digits_super_resolution.py"))
    held_out = load_data(c, "test")
    assert held_out[:2]["cond"]["image"].shape == (2, 4, 4, 1)
    assert experiment.build(c, held_out).block is None  # InfDiT's blocks are not a text's
    with pytest.raises(config.ConfigError, match=r"options\.scale=4.* 2 times smaller: leave scale out"):
        experiment.build(config.overridden(c, ["--config.denoiser.options.scale=4"]), held_out)


@pytest.mark.slow
def test_super_resolution_is_told_the_small_image(tmp_path):
    """In training as in sampling, from the config."""
    small = ["denoiser.options.width=8", "denoiser.options.depth=2", "denoiser.options.heads=2", "train.steps=3"]
    small += ["train.batch_size=8", "train.eval_every=0", "train.sample_every=0", "sample.steps=2"]
    path = CONFIGS[0].with_name("digits_super_resolution.py")
    c = config.load(path, [f"--config.{option}" for option in small])
    run = train(c, tmp_path / "run", show=False)
    held_out = load_data(c, "test")[:2]
    x0 = run.sample(jax.random.key(0), 2, cond=held_out["cond"])
    other = run.sample(jax.random.key(0), 2, cond={**held_out["cond"], "image": -held_out["cond"]["image"]})
    assert x0.shape == (2, 8, 8, 1)
    assert np.abs(np.asarray(x0 - other)).max() > 1e-4
    assert draw(run, tmp_path, "grid", num=4).stat().st_size > 0
    assert 0.0 <= judge_labels(run, c, 4, 1.0) <= 1.0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text8", "cifar10", "shakespeare_bd3lm"])
def test_full_size_config_runs_on_the_shared_data(name, shared_data, tmp_path):
    """The published configs run here, cut down in width and steps, on the stand-ins for their data."""
    path = {
        "text8": "novels/novels_valid.txt.xz",
        "cifar10": "cifar10/cifar10_jpeg.npz",
        "shakespeare_bd3lm": "tinyshakespeare/input.txt",
    }[name]
    size = ["width=32", "depth=1", "heads=2"] + (["mlp_width=64"] if name == "text8" else [])
    overrides = [f"--config.denoiser.options.{option}" for option in size]
    overrides += [f"--config.data.name={shared_data / path}", "--config.train.steps=2", "--config.train.batch_size=8"]
    overrides += ["--config.eval.max_examples=4", "--config.eval.num_times=1", "--config.sample.num=2"]
    overrides += [f"--config.sample.steps={16 if name == 'shakespeare_bd3lm' else 2}"]
    run = train(config.load(CONFIGS[0].with_name(f"{name}.py"), overrides), tmp_path / "run", show=False)
    assert run.step == 2
