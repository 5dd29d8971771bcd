"""A network that begins with the parameters of another, and learns from it: by config."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
import tiny

import ddjax
from ddjax import auxiliary, plan
from ddjax.config import ConfigError
from ddjax.experiment import build, load_data
from ddjax.run import load
from ddjax.training import loop, setup
from ddjax.training.loop import train

pytestmark = pytest.mark.slow

VALUES = {
    "data": {"tokens": False},
    "process": {"name": "learned_variance", "schedule": "ddpm_linear"},
    "objective": {"name": "ddpm_hybrid", "options": {"steps": 8, "end": 0.02}},
    "sample": {"solver": "ancestral", "steps": 3, "num": 4},
    "train": tiny.BASE["train"] | {"steps": 3, "eval_every": 0, "sample_every": 0},
}
NETWORK = {"kind": "noise", "options": tiny.BASE["denoiser"]["options"]}
LINEAR = {"kind": "noise", "options": NETWORK["options"] | {"heads": 1, "attention": "linear"}}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher") / "run"
    train(tiny.config(**VALUES, denoiser=NETWORK), folder, show=False)
    return folder


def values(teacher, **more):
    path = str(teacher)
    objective = VALUES["objective"] | {"teacher": {"path": path, "prediction": 0.5, "variance": 0.05}}
    train_values = VALUES["train"] | {"inherit": {"path": path}, **more}
    return {**VALUES, "denoiser": LINEAR, "objective": objective, "train": train_values}


def test_it_begins_with_all_of_the_teacher_but_attention(teacher):
    config = tiny.config(**values(teacher))
    experiment = build(config, load_data(config, "train"))
    ready = setup.prepare(experiment)
    theirs, own = load(teacher).params, setup.initial_state(experiment, jax.random.key(0)).params
    for path, leaf in jax.tree_util.tree_leaves_with_path(ready.state.params):
        names = [part.key for part in path]
        source = own if "attention" in names else theirs
        for name in names:
            source = source[name]
        np.testing.assert_array_equal(leaf, source)
    for a, b in zip(jax.tree.leaves(ready.state.params), jax.tree.leaves(ready.state.ema), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.unsafe_buffer_pointer() != b.unsafe_buffer_pointer() if len(a.devices()) == 1 else a is not b


def test_it_learns_from_the_teacher_and_samples_without_it(teacher, tmp_path):
    run = train(tiny.config(**values(teacher)), tmp_path / "run", show=False)
    lines = tiny.metrics(tmp_path / "run")
    assert all(line["distillation"] > 0 for line in lines if "loss" in line)
    # What is reported is the distance of the two networks, at the states of the objective.
    config = tiny.config(**values(teacher))
    experiment = build(config, load_data(config, "train"))
    network, plain = setup.taught(experiment), experiment.apply
    xt = np.random.default_rng(0).normal(size=(4, *experiment.state_shape)).astype(np.float32)
    t = np.full(4, 0.3, np.float32)
    with auxiliary.collect() as collector:
        out = network(run.params, xt, t, None, rng=jax.random.key(0), train=True)
    other = load(teacher)
    apart = np.square(np.asarray(out) - other.experiment.apply(other.params, xt, t, None))
    want = 0.5 * apart[..., :1].reshape(4, -1).mean(1) + 0.05 * apart[..., 1:].reshape(4, -1).mean(1)
    np.testing.assert_allclose(collector.found().losses["distillation"], want, rtol=1e-4)
    np.testing.assert_array_equal(out, plain(run.params, xt, t, None))
    moved = teacher.rename(teacher.with_name("gone"))
    try:
        assert np.isfinite(load(tmp_path / "run").sample(jax.random.key(0), 2)).all()
    finally:
        moved.rename(teacher)


def test_a_teacher_is_read_once(teacher, tmp_path, monkeypatch):
    """Though it is also inherited, and its arithmetic counted."""
    found, read = [], ddjax.run.load_on_host
    monkeypatch.setattr(ddjax.run, "load_on_host", lambda path, **more: found.append(path) or read(path, **more))
    train(tiny.config(**values(teacher)), tmp_path / "run", show=False)
    assert found == [str(teacher)]
    config = tiny.config(**values(teacher))
    experiment = build(config, load_data(config, "train"))
    ready, batch = setup.prepare(experiment), next(experiment.batches(load_data(config, "train")))
    counted = setup.step_flops(experiment, batch, ready.teacher)
    assert counted == setup.step_flops(experiment, batch)
    alone = build(tiny.config(**{**values(teacher), "objective": VALUES["objective"]}), experiment.data)
    assert counted > setup.step_flops(alone, batch)
    assert tiny.metrics(tmp_path / "run")[-1]["distillation"] > 0
    held = plan.plan(config, experiment.data, 1, compiler="none").state["held"]
    assert held == 4 * sum(leaf.size for leaf in jax.tree.leaves(load(teacher).params))


class Killed(BaseException):
    pass


def test_a_run_goes_on_without_what_it_inherited(teacher, tmp_path, monkeypatch):
    """Bit for bit, and without making a state of its own; one that begins says that it needs it."""
    old, seen, place = shutil.copytree(teacher, tmp_path / "old"), [], loop.shard_batch
    more = {"steps": 6, "inherit": {"path": str(old)}}
    config = tiny.config(**{**VALUES, "denoiser": LINEAR, "train": VALUES["train"] | more})
    train(config, tmp_path / "whole", show=False)

    def shard_batch(batch, mesh):
        seen.append(batch)
        if len(seen) == 6:
            raise Killed
        return place(batch, mesh)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "shard_batch", shard_batch)
        with pytest.raises(Killed):
            train(config, tmp_path / "run", show=False)
    shutil.rmtree(old)
    train(config, tmp_path / "run", show=False)
    tiny.assert_same_run(tmp_path / "run", tmp_path / "whole")
    with pytest.raises(ConfigError, match=r"config\.train\.inherit\.path='.*old': there is no such folder or file"):
        train(config, tmp_path / "new", show=False)
    assert not (tmp_path / "new").exists()  # which another config may have


def test_published_weights_teach_too(tmp_path):
    """A file of the authors' layout, under the process that they were trained under."""
    from safetensors.numpy import save_file

    from ddjax import interop
    from ddjax.denoisers import functional_init
    from ddjax.interop import mapping

    settings = {
        "size": 8, "channels": 1, "out_channels": 2, "patch": 4, "width": 8, "depth": 1, "heads": 2, "mlp_width": 32,
        "num_classes": 10, "chain": 1000, "guided_channels": 1,
    }  # fmt: skip
    model = interop.FAMILIES["dit"].model(settings)
    rng = np.random.default_rng(0)
    shapes = mapping.shapes_of(functional_init(lambda rngs: model.make(rngs=rngs))[0])
    leaves = {n: (0.3 * rng.normal(size=s)).astype(np.float32) for n, s in shapes.items()}
    for entry in model.entries:
        if not entry.theirs:
            leaves[entry.ours] = entry.change.load()
    path = tmp_path / "theirs.safetensors"
    save_file(mapping.save(model.entries, mapping.nested(leaves)), path)
    interop.load(path, "dit", heads=2, guided_channels=1).save(tmp_path / "ours.safetensors")
    changed = values(tmp_path / "ours.safetensors")
    experiment = build(tiny.config(**changed), load_data(tiny.config(**changed), "train"))
    ready = setup.prepare(experiment)
    np.testing.assert_array_equal(ready.state.params["embed"]["kernel"], leaves["embed/kernel"])
    xt = rng.normal(size=(2, 8, 8, 1)).astype(np.float32)
    with auxiliary.collect() as collector:
        setup.taught(experiment)(ready.state.params, xt, np.float32([0.2, 0.7]), np.int32([1, 10]), train=True)
    assert (collector.found().losses["distillation"] > 0).all()


def test_what_does_not_fit_is_refused(teacher):
    config = tiny.config(**values(teacher))
    data = load_data(config, "train")

    def changed(section, **more):
        return build(
            dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **more)}), data
        )

    with pytest.raises(ConfigError, match=r"config\.objective\.teacher needs path"):
        setup.taught(changed("objective", teacher={"prediction": 1.0}))
    with pytest.raises(ConfigError, match=r"config\.objective\.teacher\.path='nowhere': there is no such folder"):
        setup.taught(changed("objective", teacher={"path": "nowhere"}))
    with pytest.raises(ConfigError, match=r"no option 'predictions'; did you mean 'prediction'"):
        setup.taught(changed("objective", teacher={"path": str(teacher), "predictions": 1.0}))
    with pytest.raises(ConfigError, match=r"config\.train\.inherit: 'inherit': the teacher has no"):
        setup.prepare(changed("train", inherit={"path": str(teacher), "but": "^$"}))
    other = changed("process", schedule="vp_cosine")
    with pytest.raises(ConfigError, match="they must be the same"):
        setup.taught(other)
