"""Networks of a config that need more of the process, or of the data, than a shape."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax import names, naming
from ddjax.bench import bench_train
from ddjax.config import ConfigError, default, typed
from ddjax.data import conditioned, from_arrays
from ddjax.experiment import build
from ddjax.training.loop import train

RNG = np.random.default_rng(0)
ROWS = from_arrays(RNG.normal(size=(16, 5)).astype(np.float32), np.arange(16) % 3)
POINTS, VALUES = RNG.uniform(-1, 1, (16, 6, 2)).astype(np.float32), RNG.normal(size=(16, 6)).astype(np.float32)


def config(process="gaussian", schedule="vp_cosine", kind="x0", network="low_rank", **options):
    return typed({
        "process": {"name": process, "schedule": schedule},
        "denoiser": {"name": network, "kind": kind, "options": options},
        "objective": {"name": "gaussian"},
        "sample": {"solver": "ddim", "steps": 2},
    })  # fmt: skip


@pytest.mark.parametrize("schedule", ["edm", pytest.param("vp_cosine", marks=pytest.mark.slow)])
def test_a_low_rank_law_is_told_the_schedule(schedule, x64):
    """The mean of x_0 given x_t, of the class's normal law, by the whole covariance."""
    built = build(config(schedule=schedule, rank=2), ROWS)
    params = jax.tree.map(lambda x: RNG.normal(size=x.shape), jax.eval_shape(built.init, jax.random.key(0)))
    xt, t, labels = RNG.normal(size=(4, 5)), np.array([0.1, 0.4, 0.7, 0.9]), np.array([0, 2, 3, 1])
    found = built.apply(params, jnp.asarray(xt), jnp.asarray(t), jnp.asarray(labels))
    cov = params["factor"] @ params["factor"].T + np.exp(2 * params["log_rest"]) * np.eye(5)
    for i in range(4):
        alpha, sigma = (
            float(f(jnp.asarray(t[i]))) for f in (built.process.schedule.alpha, built.process.schedule.sigma)
        )
        mean = params["mean"][labels[i]]
        gain = alpha * cov @ np.linalg.inv(alpha**2 * cov + sigma**2 * np.eye(5))
        np.testing.assert_allclose(found[i], mean + gain @ (xt[i] - alpha * mean), atol=1e-9)


def test_what_a_low_rank_law_cannot_be_is_refused():
    tokens = from_arrays(RNG.integers(0, 5, (16, 5)), num_symbols=5)
    for c, data, message in (
        (config(kind="noise", rank=2), ROWS, "take 'x0'"),
        (config(schedule="monotone", rank=2), ROWS, "a schedule that is not learned"),
        (config(process="pfgm", rank=2), ROWS, "config.process.name='gaussian'"),
        (config(rank=6), ROWS, "expected a rank up to 5"),
        (config(), ROWS, "needs rank"),
        (config(rank=2), tokens, "config"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(c, data)


def test_values_at_points_and_their_network_go_together():
    plain = from_arrays(VALUES, beside={"places": POINTS, "flat": POINTS[:, :5]})
    told = conditioned(plain, {"points": "places"})
    assert told.conditions == {"points": (6, 2)}
    np.testing.assert_array_equal(told[np.array([3, 1])]["cond"]["points"], POINTS[[3, 1]])
    built = build(config(kind="noise", network="neural_process", width=8, depth=2, heads=2), told)
    assert built.null is None  # no points are none
    for c, data, message in (
        (config(network="neural_process"), plain, 'config.data.conditions={"points"'),
        (config(network="tabular"), told, "points: they are for 'neural_process', not for 'tabular'"),
        (config(rank=2), told, "points: they are for 'neural_process'"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(c, data)
    with pytest.raises(ValueError, match="it is no 'points'"):
        conditioned(plain, {"points": "flat"})


IMAGES, WORDS = RNG.normal(size=(16, 8, 8, 2)).astype(np.float32), RNG.normal(size=(16, 3, 5)).astype(np.float32)
DEEP, U = {"width": 8, "depth": 3, "heads": 2}, {"width": 8, "multipliers": (1, 2), "blocks": 1}
TOLD = {  # every network of images that takes a sequence: its options, and where it has what is told of one
    "dit": ({**DEEP, "patch": 4}, "nothing"),
    "unet": ({**U, "attend_at": (4,), "heads": 2, "design": "adm_edm"}, "nothing"),
    "edm2": ({**U, "attend_at": (4,), "head_width": 4}, "nothing/kernel"),
    "dico": ({"width": 8, "stages": ("c", "a", "c"), "head_width": 4}, "nothing"),
    "uvit": ({**DEEP, "patch": 4}, "condition/nothing"),
    "state_space": ({**DEEP, "patch": 4, "state": 2}, "nothing"),
    "multi_resolution": ({"widths": (8, 4), "depths": (3, 3), "heads": 2}, "nothing"),
    "diffit": ({"width": 8, "multipliers": (1, 2), "blocks": 1, "heads": 2}, "nothing"),
    "diffussm": ({**DEEP, "patch": 4, "state": 2}, "nothing"),
    "inf_dit": ({**DEEP, "patch": 2, "low_patch": 1, "block": 2, "image_channels": 2, "scale": 1}, "nothing"),
}


@pytest.mark.parametrize("network", [pytest.param(n, marks=() if n == "uvit" else pytest.mark.slow) for n in TOLD])
def test_a_sequence_in_the_data_makes_every_network_that_takes_one_of_its_width(network):
    options, where = TOLD[network]
    plain = from_arrays(IMAGES, np.arange(16) % 3, beside={"words": WORDS, "low": IMAGES})
    told = conditioned(plain, {"sequence": "words"} | ({"image": "low"} if network == "inf_dit" else {}))
    built = build(config(kind="noise", network=network, **options), told)
    params = jax.eval_shape(built.init, jax.random.key(0))
    assert functools.reduce(lambda tree, name: tree[name], where.split("/"), params).size == 5
    assert built.null.keys() >= {"valid", "cond"}
    xt, t = jnp.zeros((2, 8, 8, 2)), jnp.full(2, 0.5)
    assert jax.eval_shape(built.apply, params, xt, t, told[np.arange(2)]["cond"]).shape == xt.shape


def test_all_networks_that_take_a_sequence_are_among_these():
    takes = {name for name, kind in names.DENOISERS.items() if naming.taken(kind, {"context_width": 0, "context": 0})}
    assert takes == {*TOLD, "text"}


def test_a_network_that_cannot_attend_to_a_sequence_is_refused():
    rows = from_arrays(ROWS[:]["x0"], beside={"words": WORDS})
    graphs = from_arrays(RNG.integers(0, 2, (16, 6)), num_symbols=2, beside={"words": WORDS})
    tokens = {"process": "uniform", "schedule": "linear", "kind": "posterior"}
    for network, data, more in (("tabular", rows, {"kind": "noise"}), ("graph", graphs, tokens)):
        c = config(network=network, **more)
        with pytest.raises(ConfigError, match="no option 'context_width'"):
            build(c, conditioned(data, {"sequence": "words"}))


@pytest.mark.slow
@pytest.mark.parametrize("network", ["neural_process", "low_rank"])
def test_they_train_sample_and_are_measured_by_config(network, tmp_path):
    np.savez(tmp_path / "functions.npz", x=VALUES, places=POINTS)
    options = {"neural_process": {"width": 8, "depth": 2, "heads": 2}, "low_rank": {"rank": 2}}[network]
    c = default()
    c.data.name, c.data.tokens = str(tmp_path / "functions.npz"), False
    c.process.name, c.process.schedule = "gaussian", "vp_cosine"
    c.denoiser.name, c.denoiser.kind, c.denoiser.options = network, "x0", options
    c.objective.name, c.sample.solver, c.sample.steps = "gaussian", "ddim", 2
    c.train.steps, c.train.batch_size, c.train.eval_every, c.train.sample_every = 3, 8, 0, 0
    if network == "neural_process":
        c.data.options, c.data.conditions = {"beside": ["places"]}, {"points": "places"}
    run = train(typed(c), tmp_path / "run", show=False)
    assert run.step == 3
    cond = {"points": POINTS[:2]} if network == "neural_process" else None
    x0 = run.sample(jax.random.key(0), 2, cond=cond)
    assert x0.shape == (2, 6)
    if cond is not None:
        other = run.sample(jax.random.key(0), 2, cond={"points": -POINTS[:2]})
        assert np.abs(np.asarray(x0 - other)).max() > 1e-5
        with pytest.raises(ValueError, match=r"cond\['points'\] is missing"):
            run.sample(jax.random.key(0), 2, cond={})
    assert bench_train(run.config, steps=1, warmup=1)["flops"] > 0
