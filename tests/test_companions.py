"""What comes with items beside their labels: coherence, other ends, degraded images; and sampling from given ends."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_names import FLOATS, FROM_DATA, GROWING, PAIRS, TEXT, TRUST, TRUSTED, TWO, config

import ddjax
from ddjax import denoisers, guidance, random
from ddjax.config import ConfigError
from ddjax.data import by_class, from_arrays, in_condition, load, mislabelled, rescaled
from ddjax.experiment import build
from ddjax.objectives import AtCoherence
from ddjax.objectives.degradations import Blurred, Coarse, Holes
from ddjax.predictions import Prediction
from ddjax.run import Run

keys_of = lambda seed, n: random.example_keys(jax.random.key(seed), jnp.arange(n))


def test_labels_are_as_wrong_as_the_coherence_says():
    """Kept with probability c + (1 - c) / K, else each other label with (1 - c) / K; the same item in every epoch."""
    n, classes = 12_000, 4
    data = mislabelled(from_arrays(np.zeros((n, 1), np.float32), np.arange(n) % classes), seed=1)
    items = data[:]
    cond, coherence, kept = items["cond"], items["coherence"], items["cond"] == np.arange(n) % classes
    assert abs(coherence.mean() - 0.5) < 4 / np.sqrt(12 * n)
    for low in (0.0, 0.5, 0.9):
        part = (coherence >= low) & (coherence < low + 0.1)
        right = (coherence + (1 - coherence) / classes)[part]
        assert abs(kept[part].mean() - right.mean()) < 4 * np.sqrt(0.25 / part.sum())
    found = np.zeros((classes, classes))
    np.add.at(found, (np.arange(n)[~kept] % classes, cond[~kept]), 1)
    others = found[~np.eye(classes, dtype=bool)] / found.sum()
    assert np.abs(others - 1 / 12).max() < 4.5 * np.sqrt(1 / 12 / found.sum())
    again = data[np.asarray([7, 3])]
    np.testing.assert_array_equal(again["cond"], cond[[7, 3]])
    np.testing.assert_array_equal(again["coherence"], coherence[[7, 3]])
    with pytest.raises(ValueError, match="has no labels to be wrong about"):
        mislabelled(TEXT)


def test_classes_are_drawn_independently_of_each_other():
    x0 = np.arange(40, dtype=np.float32).reshape(40, 1)
    data = from_arrays(x0, np.repeat([0, 1, 2], [4, 16, 20]))
    made = by_class(data, [2, 0, 1], rounds=100)
    assert (len(made), made.num_classes, made.shape) == (2000, 0, (1,))
    items = made[:]
    assert set(items) == {"x0", "ends"}
    first, second, third = items["x0"][:, 0], *items["ends"][:, 0].T
    np.testing.assert_array_equal(np.unique(first, return_counts=True)[1], 100)
    assert set(first) == set(range(20, 40))
    for values, of, size in ((second, range(4), 4), (third, range(4, 20), 16)):
        counts = np.unique(values, return_counts=True)[1]
        assert set(values) == set(of)
        assert np.abs(counts - 2000 / size).max() < 5 * np.sqrt(2000 / size)
    assert max(abs(np.corrcoef(np.stack([first, second, third]))[np.triu_indices(3, 1)])) < 5 / np.sqrt(2000)
    np.testing.assert_array_equal(made[np.asarray([5, 1905])]["ends"], items["ends"][[5, 1905]])
    pair = by_class(data, [1, 2], "x1")[:]["x1"]
    assert (pair >= 20).all()
    for wrong, message in (([0], "two or more"), ([0, 0], "two or more"), ([0, 5], "no items of class 5")):
        with pytest.raises(ValueError, match=message):
            by_class(data, wrong)
    with pytest.raises(ValueError, match="just two for x1"):
        by_class(data, [0, 1, 2], "x1")
    with pytest.raises(ValueError, match="has no labels"):
        by_class(from_arrays(x0), [0, 1])
    with pytest.raises(ValueError, match="are tokens"):
        by_class(TEXT, [0, 1])


def test_an_archives_arrays_stay_with_their_items(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (40, 4, 4)).astype(np.uint8)
    trust = x[:, 0, 0] / 255.0
    np.savez(tmp_path / "one.npz", x=x, x1=255 - x, trust=trust)
    split = {f"{k}_{s}": v for s, n in (("train", 30), ("test", 10)) for k, v in (("x", x[:n]), ("x1", 255 - x[:n]))}
    np.savez(tmp_path / "own.npz", **split)
    for name, beside in (("one.npz", ["x1", "trust"]), ("own.npz", ["x1"])):
        for part in ("train", "test"):
            data = rescaled(load(tmp_path / name, part, tokens=False, beside=beside), 0.0, 1.0)
            items = data[np.arange(len(data))[::-1]]
            assert items["x1"].shape == items["x0"].shape == (len(data), 4, 4, 1)
            np.testing.assert_allclose(items["x0"] + items["x1"], 1.0, atol=1e-6)  # the negative of each
            if "trust" in beside:
                np.testing.assert_allclose(items["trust"], items["x0"][:, 0, 0, 0], atol=1e-6)
    inside = in_condition(in_condition(data, "x1"), "x0")[:2]
    assert set(inside["cond"]["cond"]) == {"x1", "cond"}
    with pytest.raises(ValueError, match=r"no key 'x2', only"):
        load(tmp_path / "one.npz", "train", tokens=False, beside=["x2"])
    with pytest.raises(ValueError, match=r"have x0, x1, and 'ends' is needed.*beside=\['ends'\]"):
        in_condition(data, "ends")
    for wrong in (np.zeros((3, 1), np.float32), np.zeros((2, 1), int), np.array(["a", "b"])):
        with pytest.raises(ValueError, match="x1 must be floats of 2 items"):
            from_arrays(np.zeros((2, 1), np.float32), beside={"x1": wrong})


def test_degradations(x64):
    x = np.random.default_rng(0).normal(size=(3, 4, 6, 2))
    coarse = np.asarray(Coarse(factor=2)(keys_of(0, 3), jnp.asarray(x), None)[0])
    for i, j in np.ndindex(4, 6):
        square = x[:, 2 * (i // 2) : 2 * (i // 2) + 2, 2 * (j // 2) : 2 * (j // 2) + 2]
        np.testing.assert_allclose(coarse[:, i, j], square.mean((1, 2)), atol=1e-12)
    # Cosines between the sites are the heat equation's own functions: they only shrink.
    rows, columns = np.meshgrid(np.arange(4) + 0.5, np.arange(6) + 0.5, indexing="ij")
    down, along = np.pi * 3 / 4, np.pi * 2 / 6
    wave = np.broadcast_to((np.cos(down * rows) * np.cos(along * columns))[None, ..., None], x.shape)
    blurred = Blurred(width=0.8)(keys_of(0, 3), jnp.asarray(1.5 + wave), None)[0]
    np.testing.assert_allclose(blurred, 1.5 + np.exp(-0.32 * (down**2 + along**2)) * wave, atol=1e-12)
    x = jnp.full((1000, 4, 6, 2), 7.0)
    x1, shown = Holes(share=0.3, patch=2, fill=0.5, show=True)(keys_of(1, 1000), x, 3)
    np.testing.assert_array_equal(shown["x1"], x1)
    assert shown["cond"] == 3
    lost = np.asarray(x1 != 7.0).reshape(1000, 2, 2, 3, 2, 2)
    assert (lost == lost[:, :, :1, :, :1, :1]).all()  # whole squares, all channels
    assert abs(lost.mean() - 0.3) < 4 * np.sqrt(0.21 / 6000)
    filled = np.asarray(x1)[np.asarray(x1 != 7.0)]
    assert abs(filled.std() - 0.5) < 4 * 0.5 / np.sqrt(2 * filled.size)
    noise = Coarse(factor=2, std=0.2)(keys_of(2, 1000), x, None)[0] - 7.0
    assert abs(noise.std() - 0.2) < 4 * 0.2 / np.sqrt(2 * noise.size)
    for wrong, message in (
        (Coarse(factor=4), "factor=4 does not divide images of 4 x 6"),
        (Holes(patch=4), "patch=4 does not divide images of 4 x 6"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong(keys_of(3, 1000), x, None)
    with pytest.raises(ValueError, match="is for images"):
        Coarse()(keys_of(4, 1000), x[..., 0], None)
    with pytest.raises(ValueError, match="std must not be negative"):
        Coarse(std=-1.0)


def test_a_network_is_told_the_coherence_and_guidance_goes_between_two():
    told = lambda params, xt, t, cond, **_: cond
    x, labels, given = np.zeros((4, 1)), jnp.asarray([0, 2, 1, 3]), jnp.asarray([0.0, 0.6, 1.0, 0.6])  # 3: none
    cond = {"coherence": given, "cond": labels}
    np.testing.assert_array_equal(denoisers.Coherent(told, 3, 2)(None, x, 0, cond), [0, 5, 3, 6])
    np.testing.assert_array_equal(denoisers.Coherent(told, 3, 2)(None, x, 0, labels), [1, 5, 3, 6])
    np.testing.assert_array_equal(denoisers.Coherent(told, 3, 2)(None, x, 0, None), [6] * 4)
    view = denoisers.Coherent(told, 3, 2)(None, x, 0, {"past": 7, "cond": cond})
    assert view["past"] == 7
    np.testing.assert_array_equal(view["cond"], [0, 5, 3, 6])
    seen = denoisers.Coherent(told, 3)(None, x, 0, cond)
    np.testing.assert_allclose(seen["z"], [[0.0], [0.6], [1.0], [0.0]])
    np.testing.assert_array_equal(seen["cond"], labels)
    nested = AtCoherence(0.5)({"x1": x, "cond": cond})
    np.testing.assert_allclose(nested["cond"]["coherence"], 0.5)
    assert nested["x1"] is x

    def denoise(xt, t, cond):
        return Prediction((cond["cond"] + 10.0 * cond["coherence"])[:, None], "x0")

    guided = guidance.contrasted(denoise, AtCoherence(0.25), scale=3.0)
    assert ddjax.predictions.evaluations(guided) == 2
    value = guided(x, jnp.ones(4), AtCoherence(1.0)(labels)).value
    np.testing.assert_allclose(value[:, 0], labels + 2.5 + 3.0 * 7.5)
    assert guidance.contrasted(denoise, AtCoherence(0.0), scale=1.0) is denoise


def test_a_batch_brings_what_the_config_asks_for():
    experiment = build(*config("gaussian", "cond_ot", "velocity", coherence="given", data=TRUSTED))
    batch = next(experiment.batches(TRUSTED))
    rows = [int(np.flatnonzero(c == TRUST)[0]) for c in batch["cond"]["coherence"]]
    np.testing.assert_array_equal(batch["x0"], FLOATS[np.asarray(rows)]["x0"])
    np.testing.assert_array_equal(batch["cond"]["cond"], FLOATS[np.asarray(rows)]["cond"])
    experiment = build(*config(FROM_DATA, None, "velocity", ("interpolant", {"coupling": "paired"})))
    batch = next(experiment.batches(PAIRS))
    np.testing.assert_array_equal(batch["cond"]["x1"], -batch["x0"])
    for data, message in ((FLOATS, "'x1' is needed"), (TRUSTED, "come with 'coherence', which nothing")):
        with pytest.raises(ConfigError, match=message):
            experiment.batches(data)
    sigma = config(
        "gaussian", "ve", "x0", ("ambient", {"density": "uniform_log_snr"}), noise={"sigma": 0.3}, coherence="corrupted"
    )
    cond = next(build(*sigma).batches(FLOATS))["cond"]
    assert set(cond) == {"sigma", "cond"}
    assert set(cond["cond"]) == {"coherence", "cond"}


def told_alpha(params, xt, point, cond=None, **_):
    """The ends where every class has one value, whatever x: -1, 0.25, 3."""
    ends = jnp.broadcast_to(jnp.asarray([-1.0, 0.25, 3.0]), (*xt.shape, 3))
    return jnp.where(point.sum(-1)[:, None, None, None, None] > 0, ends, jnp.nan)


def test_marginals_are_carried_from_one_corner_to_another():
    values = np.asarray([-1.0, 0.25, 3.0], np.float32)
    labels = np.arange(12) % 3
    base = from_arrays(np.broadcast_to(values[labels][:, None, None, None], (12, 4, 4, 1)), labels)
    data = by_class(base, [0, 1, 2])
    for first, last in ((0, 2), (2, 1)):
        process = ("barycentric", {"marginals": 3, "first": first, "last": last})
        experiment = build(*config(process, None, "ends", "multimarginal", data=data))
        run = Run(dataclasses.replace(experiment, apply=told_alpha), {}, 0)
        init = run.starts(jax.random.key(0), data[:2])
        np.testing.assert_array_equal(init, np.full((2, 4, 4, 1), values[last]))
        np.testing.assert_allclose(run.sample(jax.random.key(1), 2, init=init), values[first], atol=1e-6)
    with pytest.raises(ValueError, match="no law to start from"):
        run.sample(jax.random.key(1), 2)
    with pytest.raises(ValueError, match="starts from its prior"):
        Run(build(*config("gaussian", "vp_cosine", "v")), {}, 0).starts(jax.random.key(0), data[:2])


def knows_x1(params, xt, t, cond=None, **_):
    """Residual and noise of pairs x1 = -x0: x_t = x0 + t (x1 - x0) + t z for the path of RDDM with this noise."""
    x0 = -cond["x1"]
    residual = cond["x1"] - x0
    t = jnp.reshape(t, (-1, 1, 1, 1))
    return jnp.concatenate([residual, (xt - x0 - (2.0 * t - t**2) * residual) / t], -1)


def test_sampling_starts_from_given_ends_with_their_noise():
    """A network that knows x1 leads back to x0 = -x1 exactly; at t = 1 there is noise of the path's width on x1."""
    process = ("interpolant", {"path": "residual", "noise": GROWING, "correlation": "accumulating", "source_std": None})
    options = {"coupling": "paired", "show": True}
    experiment = build(*config(process, None, "residual+noise", ("interpolant", options), data=PAIRS))
    run = Run(dataclasses.replace(experiment, apply=knows_x1), {}, 0)
    items = PAIRS[:6]
    init = run.starts(jax.random.key(0), items)
    np.testing.assert_array_equal(init, items["x1"])
    drawn = run.sample(jax.random.key(1), 6, init=init, batch_size=4)
    np.testing.assert_allclose(drawn, items["x0"], atol=1e-5)
    many = jnp.zeros((500, 4, 4, 1))
    states = ddjax.companions.depart(experiment, jax.random.key(2), many, jnp.arange(500))
    assert abs(states.std() - 1.0) < 4 / np.sqrt(2 * states.size)
    with pytest.raises(ValueError, match="comes with the data: give it"):
        run.sample(jax.random.key(1), 2)


WRONG = {
    r"coupling: 'paired': x1 comes with the data, not from a Gaussian: set config.process.options.source_std=None": (
        {"process": "interpolant", "objective": ("interpolant", {"coupling": "paired"})}
    ),
    r"coupling: 'independent': x1 is noise, and has a width": (
        {"process": FROM_DATA, "objective": ("interpolant", {"coupling": "independent"})}
    ),
    r"objective.name='interpolant' does not go with .*: factor=3 does not divide images of 4 x 4": (
        {"process": FROM_DATA, "objective": ("interpolant", {"coupling": "coarse", "factor": 3})}
    ),
    r"config.data.coherence='some' is unknown; it is one of given, corrupted": (
        {"process": "gaussian", "coherence": "some"}
    ),
    r"config.data.coherence='given' is for labels, and the data 'arrays' have none": (
        {"process": "gaussian", "coherence": "given", "data": TWO}
    ),
    r"coherence_levels goes with config.data.coherence": {"process": "gaussian", "extra": {"coherence_levels": 2}},
    r"objective.name: 'multimarginal': it is for config.process.name='barycentric' .*, not for Barycentric and 'vel": (
        {"process": "barycentric", "objective": "multimarginal"}
    ),
    r"objective.name='multimarginal' does not go with .*: the process has 2 marginals: 2 \+ 1 were given": (
        {"process": "barycentric", "kind": "ends", "objective": "multimarginal", "classes": [0, 1, 2]}
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_makes_no_sense_is_named(message):
    wrong = {"schedule": None, "kind": "velocity", **WRONG[message]}
    if wrong["process"] == "gaussian":
        wrong["schedule"] = "cond_ot"
    with pytest.raises(ConfigError, match=message):
        build(*config(**wrong))


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections",
    [
        {
            "data": {"tokens": False, "coherence": "corrupted"},
            "process": {"name": "gaussian", "schedule": "vp_cosine"},
            "denoiser": {"kind": "v", "options": {"width": 8, "depth": 1, "heads": 2, "patch": 4}},
        },
        {
            "data": {"tokens": False, "classes": [3, 8]},
            "process": {"name": "interpolant", "options": {"source_std": None}},
            "denoiser": {"kind": "velocity", "options": {"width": 8, "depth": 1, "heads": 2, "patch": 4}},
            "objective": {"name": "interpolant", "options": {"coupling": "paired"}},
            "train": {**tiny.BASE["train"], "eval_every": 0},
        },
        {
            "data": {"tokens": False, "classes": [3, 8, 0]},
            "process": {"name": "barycentric", "options": {"marginals": 3, "last": 2}},
            "denoiser": {"kind": "ends", "options": {"width": 8, "depth": 1, "heads": 2, "patch": 4}},
            "objective": {"name": "multimarginal"},
            "train": {**tiny.BASE["train"], "eval_every": 0},
        },
    ],
    ids=["coherence", "paired classes", "multimarginal"],
)
def test_digits_from_a_config_file_to_samples(sections, tmp_path):
    from ddjax.cli import main

    tiny.write(tmp_path / "config.py", **sections)
    assert main(["train", "--config", str(tmp_path / "config.py"), "--workdir", str(tmp_path / "run"), "--quiet"]) == 0
    assert (tmp_path / "run" / "samples" / "step_0000010.png").is_file()
    out = tmp_path / "more.png"
    assert main(["sample", "--workdir", str(tmp_path / "run"), "--num", "5", "--guidance", "2", "--out", str(out)]) == 0
    assert out.is_file()
