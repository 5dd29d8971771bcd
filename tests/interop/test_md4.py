"""MD4's Orbax checkpoints: the same logits from the same arrays, all of them random, and back exactly."""

import json

import jax
import numpy as np
import published_md4 as published
import pytest

from ddjax import interop
from ddjax.cli import main
from ddjax.denoisers import functional_init, stack_blocks, unstack_blocks
from ddjax.interop import orbax
from ddjax.processes import Masked
from ddjax.schedules import Cosine, Linear, Polynomial

SYMBOLS, LENGTH, SIDE, CLASSES = 11, 6, 4, 3
TEXT = {"vocabulary": SYMBOLS, "features": 8, "depth": 2, "heads": 2, "hidden": 24}
IMAGE = {"vocabulary": 5, "features": 32, "depth": 2}
CASES = {
    "text": TEXT,
    "characters": TEXT | {"outside": True},
    "labelled": TEXT | {"classes": CLASSES, "kind": "swiglu"},
    "geglu": TEXT | {"kind": "geglu"},
    "untimed": TEXT,
    "untimed characters": TEXT | {"outside": True},
    "image": IMAGE,
    "labelled image": IMAGE | {"classes": CLASSES},
    "transformer": IMAGE | {"transformer": (12, 2, 3)},
    "labelled transformer": IMAGE | {"classes": CLASSES, "transformer": (8, 3, 2), "multipliers": (1, 2)},
}
GIVEN = {"labelled": {"mlp_type": "swiglu"}, "geglu": {"mlp_type": "geglu"}, "untimed": {"heads": 2}}
GIVEN |= {"transformer": {"heads": 3}, "labelled transformer": {"heads": 2}}
FAST = ("characters", "untimed")
every = pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in CASES])


def made(name):
    """Their module, its inputs and random parameters."""
    options, rng = CASES[name], np.random.default_rng(0)
    module = published.MD4(**options)
    shape = (3, LENGTH) if "hidden" in options else (3, SIDE, SIDE, 3)
    z = rng.integers(options["vocabulary"] + 1, size=shape).astype(np.int32)
    t = None if "untimed" in name else np.float32([0.1, 0.6, 0.9])
    labels = np.int32([0, 2, 1]) if "classes" in options else None
    return module, (z, t, labels), published.random_params(module, z, t, labels)


def given(name):
    sizes = {} if "transformer" in CASES[name] else {"size": SIDE}  # there a table of positions says it
    return GIVEN.get(name, {}) | ({"length": LENGTH} if "hidden" in CASES[name] else sizes)


def saved(params, path, **beside):
    """As their training does: a step of a train state, of which only the parameters are weights."""
    import orbax.checkpoint as ocp

    state = {"step": 3, "rng": np.zeros(2, np.uint32), "params": params, "opt_state": [{"mu": params}], **beside}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(path / "checkpoints" / "300" / "train_state", args=ocp.args.PyTreeSave(state))
    return path


def leaves(tree):
    return {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(tree)}


@every
def test_the_same_logits_and_the_same_arrays_again(name, tmp_path):
    module, (z, t, labels), params = made(name)
    worse = jax.tree.map(lambda w: 0 * w, params)
    path = saved(worse, tmp_path / "theirs", ema_params=params)  # the average is what they sample with
    model = interop.load(path, "md4", **given(name))
    assert (model.family, model.prefix, model.report.whole) == ("md4", "ema_params.", True)
    wanted = np.asarray(jax.jit(module.apply)({"params": params}, z, t, labels))
    out = jax.jit(lambda denoise, *inputs: denoise(*inputs))(
        model.denoise, z, np.full(3, 0.5, np.float32) if t is None else t, labels
    )
    assert (out.kind, out.value.shape) == ("posterior", wanted.shape)
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(out.value, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())

    model.export(tmp_path / "again")
    again = interop.load(tmp_path / "again", "md4", **given(name))
    assert again.settings == model.settings
    stored = orbax.Checkpoint(tmp_path / "again")
    for key, value in leaves(params).items():
        found = stored.get_tensor("ema_params" + key.replace("['", ".").replace("']", ""))
        np.testing.assert_array_equal(found, value, err_msg=key)
    assert len(stored.keys()) == len(leaves(params))
    with pytest.raises(ValueError, match="exists"):
        model.export(tmp_path / "again")
    model.save(tmp_path / "ours.safetensors")
    back = interop.load(tmp_path / "ours.safetensors")
    assert (back.apply, back.process, back.orbax) == (model.apply, model.process, True)
    jax.tree.map(np.testing.assert_array_equal, back.params, model.params)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["image", "labelled transformer"])
def test_the_same_network_scanned(name, tmp_path):
    """Converted weights stand in a scan, and come out of it as they were."""
    _, (z, t, labels), params = made(name)
    model = interop.load(saved(params, tmp_path), "md4", **given(name))
    init, scanned = functional_init(lambda rngs: model.model.make(scan=True, rngs=rngs))
    stacked = stack_blocks(model.params, jax.eval_shape(init, jax.random.key(0)))
    assert len(jax.tree.leaves(stacked)) < len(jax.tree.leaves(model.params))
    out, wanted = (jax.jit(f)(p, z, t, labels) for f, p in ((scanned, stacked), (model.apply, model.params)))
    np.testing.assert_allclose(out, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
    jax.tree.map(np.testing.assert_array_equal, unstack_blocks(stacked), model.params)


@pytest.mark.slow
def test_who_knows_the_heads(tmp_path):
    _, _, params = made("transformer")
    path = saved(params, tmp_path)
    with pytest.raises(ValueError, match="how many heads a network of width 12 has"):
        interop.load(path, "md4")
    (tmp_path / "config.json").write_text(json.dumps({"dit_num_heads": 3, "num_heads": 7}))
    settings = interop.load(path, "md4").settings
    assert (settings["heads"], settings["size"], settings["blocks"], settings["multipliers"]) == (3, SIDE, 2, [1.0])
    assert settings["transformer"] == {"width": 12, "depth": 2}


@pytest.mark.parametrize("name", ["characters", pytest.param("labelled image", marks=pytest.mark.slow)])
def test_what_does_not_fit_is_named(name, tmp_path):
    _, _, params = made(name)
    part = params["classifier"]["Transformer_0" if "hidden" in CASES[name] else "UNet5DWrapper_0"]
    first = part["TransformerBlock_1"]["attention"] if "hidden" in CASES[name] else part["UNet_0"]["ResBlock_1"]
    layer = "wk" if "hidden" in CASES[name] else "Conv_0"
    del params["classifier"]["CondEmbedding_0"]["dense0"]["bias"]
    params["classifier"]["other"] = {"kernel": np.zeros(2, np.float32)}
    first[layer]["kernel"] = first[layer]["kernel"][..., :-1]
    path = saved(params, tmp_path)
    with pytest.raises(ValueError) as error:
        interop.load(path, **given(name))
    text = str(error.value)
    assert "these weights are not this network's: 1 unknown, 1 missing, 1 misshapen" in text
    assert "unknown: classifier.other.kernel" in text
    assert "missing: classifier.CondEmbedding_0.dense0.bias" in text
    assert f"{layer}.kernel has" in text
    assert interop.load(path, partial=True, **given(name)).report.unknown == ("classifier.other.kernel",)


def test_where_a_checkpoint_is(tmp_path):
    _, _, params = made("characters")
    plain = {"classifier": params["classifier"]}
    orbax.save(tmp_path / "7", {k.replace("['", ".").replace("']", "")[1:]: v for k, v in leaves(plain).items()})
    orbax.save(tmp_path / "21" / "default", {"a.b": np.ones(2, np.float32)})
    assert orbax.find(tmp_path) == tmp_path / "21" / "default"
    assert interop.load(tmp_path / "7", length=LENGTH).family == "md4"
    with pytest.raises(ValueError, match="is of no family"):
        interop.load(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is no Orbax checkpoint"):
        interop.load(tmp_path / "empty")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "_METADATA").write_text("nothing")
    with pytest.raises(ValueError, match="is not an Orbax checkpoint"):
        interop.load(tmp_path / "broken")


def test_schedules_and_samples(tmp_path):
    _, _, params = made("characters")
    path = saved(params, tmp_path)
    schedules = {"linear": Linear(), "cosine": Cosine(), "poly3": Polynomial(3.0)}
    for name, schedule in schedules.items():
        model = interop.load(path, length=LENGTH, noise_schedule=name)
        assert model.process == Masked(SYMBOLS, schedule)
        t = model.model.grid(4)
        wanted = np.cos(np.pi / 2 * np.arange(5) / 4) if name == "linear" else 1 - np.arange(5) / 4
        np.testing.assert_allclose(t, wanted, atol=1e-6)
    drawn = model.sample(jax.random.key(0), 2, steps=3)
    assert drawn.x0.shape == (2, LENGTH)
    assert (drawn.x0 < SYMBOLS).all()
    with pytest.raises(ValueError, match="noise_schedule='sigmoid'"):
        interop.load(path, length=LENGTH, noise_schedule="sigmoid")
    with pytest.raises(ValueError, match="mlp_type='relu'"):
        interop.load(path, length=LENGTH, mlp_type="relu")


@pytest.mark.slow
def test_a_config_beside_it_counts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ddjax.cli._prepare_jax", lambda: None)
    _, _, params = made("untimed characters")
    saved(params, tmp_path / "theirs")
    about = {"num_heads": 2, "data_shape": [LENGTH], "noise_schedule": "cosine", "timesteps": 9, "mlp_type": "glu"}
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(about))
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back"
    assert main(["convert", str(tmp_path / "theirs"), "--out", str(ours)]) == 0
    assert "unknown" not in capsys.readouterr().out
    model = interop.load(ours)
    assert (model.model.steps, model.process.schedule, model.model.shape) == (9, Cosine(), (LENGTH,))
    assert main(["convert", str(ours), "--out", str(back)]) == 0
    for key, value in leaves(params).items():
        found = orbax.Checkpoint(back).get_tensor("params" + key.replace("['", ".").replace("']", ""))
        np.testing.assert_array_equal(found, value)
