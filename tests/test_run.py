import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

import ddjax
from ddjax import likelihood
from ddjax.config import ConfigError, typed
from ddjax.data import from_arrays
from ddjax.experiment import build
from ddjax.run import Run
from ddjax.training import CheckpointError, load_ema
from ddjax.training.loop import evaluate

KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def run():
    return ddjax.load(tiny.trained())


def test_load_gives_config_and_averaged_parameters(run):
    assert run.config == tiny.config()
    assert run.step == 10
    ema, raw = (load_ema(tiny.trained() / "checkpoints", which=w)[0] for w in ("ema", "params"))
    for a, b in zip(jax.tree.leaves(run.params), jax.tree.leaves(ema), strict=True):
        np.testing.assert_array_equal(a, b)
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(ema), jax.tree.leaves(raw), strict=True))
    assert ddjax.load(tiny.trained(), step=9).step == 9
    assert isinstance(run, ddjax.Run)
    assert run.process == ddjax.processes.Masked(17)
    assert run.denoise.params is run.params


def test_a_run_can_be_moved(run, tmp_path, monkeypatch):
    moved = tiny.copy(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    again = ddjax.load("elsewhere")
    np.testing.assert_array_equal(again.sample(KEY, 4, cond=3), run.sample(KEY, 4, cond=3))
    shutil.rmtree(moved / "samples")
    (moved / "metrics.jsonl").unlink()  # neither is needed
    assert ddjax.load(moved).step == 10


def test_tokens_do_not_depend_on_the_batch_size(run):
    labels = np.array([3, 1, 4, 1, 5, 9])
    whole = run.sample(KEY, 6, cond=labels)
    assert whole.shape == (6, 8, 8, 1)
    assert whole.dtype == np.int32
    assert (np.asarray(whole) < 17).all()  # no mask is left
    np.testing.assert_array_equal(run.sample(KEY, 6, cond=labels, batch_size=4), whole)
    np.testing.assert_array_equal(run.sample(KEY, 4, cond=labels[:4]), whole[:4])
    assert np.any(run.sample(jax.random.key(4), 4, cond=labels[:4]) != whole[:4])


@pytest.mark.slow
def test_rows_trajectory_and_solver_options(run):
    labels = np.array([3, 1, 4, 1])
    whole = run.sample(KEY, 4, cond=labels, trajectory=True, batch_size=2)
    assert whole.trajectory.shape == (4, 4, 8, 8, 1)
    np.testing.assert_array_equal(whole.trajectory[-1], whole.x0)
    assert (np.asarray(whole.trajectory[0]) == 17).all()
    np.testing.assert_array_equal(whole.nfe, [3, 3, 3, 3])
    some = run.sample(KEY, 3, cond=labels[[2, 0, 3]], rows=[2, 0, 3], trajectory=True, batch_size=2)
    np.testing.assert_array_equal(some.trajectory, whole.trajectory[:, [2, 0, 3]])
    np.testing.assert_array_equal(run.sample(KEY, 4, cond=labels, solver="ancestral"), whole.x0)
    for rows in ([0, 1], [0.5, 1, 2], [-1, 0, 1]):
        with pytest.raises(ValueError, match="rows are 3 whole numbers, 0 or more"):
            run.sample(KEY, 3, rows=rows)
    with pytest.raises(ConfigError, match="Ancestral has no option 'eta'"):
        run.sample(KEY, 3, solver_options={"eta": 1})
    with pytest.raises(ValueError, match="made already"):
        run.sample(KEY, 3, solver=ddjax.solvers.Ancestral(run.process), solver_options={"eta": 1})


@pytest.mark.slow
def test_values_and_bounds_do_not_depend_on_the_batch_size():
    data = from_arrays(np.array([0, 1, 2], np.int64)[np.arange(96).reshape(6, 4, 4, 1) % 3], tokens=False)
    c = typed(
        {
            "process": {"name": "gaussian", "schedule": "vp_cosine"},
            "denoiser": {"kind": "v", "options": {"width": 8, "depth": 1, "heads": 2}},
            "sample": {"solver": "ddim", "steps": 3},
            "eval": {"num_times": 2},
        }
    )
    experiment = build(c, data)
    params = jax.tree.map(lambda a: a + 0.1, jax.jit(experiment.init)(jax.random.key(0)))
    run = Run(experiment, params, 0)
    whole = run.sample(KEY, 5)
    np.testing.assert_allclose(run.sample(KEY, 5, batch_size=2), whole, rtol=0, atol=2e-6)
    at_once = run.sample(KEY, 5, batch_size=3, parallel=2, tolerance=0.0, trajectory=True)
    np.testing.assert_allclose(at_once.x0, whole, rtol=0, atol=2e-6)
    assert (np.asarray(at_once.nfe) > 3).all()
    x0 = data[:]["x0"][:5]
    bound = run.nelbo(KEY, x0)
    parts = run.nelbo(KEY, x0, batch_size=2)
    assert bound.prior.shape == (5,)
    for name in ("prior", "diffusion", "reconstruction"):
        np.testing.assert_allclose(getattr(parts, name), getattr(bound, name), rtol=1e-5, atol=1e-6)
    # Levels -1, 0, 1: the bound begins where the noise level is an eighth of their spacing.
    low, high = experiment.t_range
    schedule = run.process.schedule
    np.testing.assert_allclose(schedule.sigma(low) / schedule.alpha(low), 1 / 8, rtol=1e-5)
    direct = likelihood.nelbo(
        KEY,
        run.denoise,
        run.process,
        x0,
        num_times=2,
        t_range=(low, high),
        reconstruction=likelihood.binned(data.levels),
    )
    np.testing.assert_allclose(bound.bits_per_dim, direct.bits_per_dim, rtol=1e-6)
    np.testing.assert_allclose(parts.bits_per_dim, direct.bits_per_dim, rtol=1e-5)


def test_guidance_one_is_off_and_another_is_not(run, monkeypatch):
    scales = []
    guide = ddjax.guidance.classifier_free
    spy = lambda denoise, *, null, scale: scales.append((int(null), scale)) or guide(denoise, null=null, scale=scale)
    monkeypatch.setattr("ddjax.experiment.guidance.classifier_free", spy)
    run.sample(KEY, 4, cond=3)
    run.sample(KEY, 4)  # nothing to guide towards
    assert scales == [(10, 1.0)]


def test_wrong_requests_are_named(run):
    with pytest.raises(ValueError, match=r"labels run from 0 to 9 \(10 means none\), got 11"):
        run.sample(KEY, 200, cond=11)
    with pytest.raises(ValueError, match="got -1"):
        run.sample(KEY, 2, cond=np.array([0, -1]))
    with pytest.raises(ValueError, match="at least one sample is needed, got 0"):
        run.sample(KEY, 0, cond=3)
    with pytest.raises(ValueError, match="batch_size of one are needed, got 3 and 0"):
        run.sample(KEY, 3, batch_size=0)
    with pytest.raises(ConfigError, match="'rk5' is unknown"):
        run.sample(KEY, 2, solver="rk5")
    with pytest.raises(ConfigError, match="Heun is for Gaussian states"):
        run.sample(KEY, 2, solver="heun")
    with pytest.raises(ValueError, match="at least one step, got 0"):
        run.sample(KEY, 2, steps=0)
    with pytest.raises(ValueError, match=r"guidance=2.0 leads towards labels, and there are none"):
        run.sample(KEY, 2, guidance=2.0)
    with pytest.raises(ValueError, match="Masked has tokens"):
        run.sample(KEY, 2, parallel=2)
    with pytest.raises(ValueError, match="leave out parallel, or the others"):
        run.sample(KEY, 2, parallel=2, callback=print)
    known = np.zeros((1, 8, 8, 1), np.int32)
    with pytest.raises(ValueError, match="init must be of 2 examples"):
        run.sample(KEY, 2, init=jax.numpy.asarray(known))
    with pytest.raises(ValueError, match="observed must be of 2 examples"):
        run.sample(KEY, 2, observed=ddjax.Observed(known == 0, known))
    with pytest.raises(ValueError, match=r"lengths are those of sequences, and .* has shape \(8, 8, 1\)"):
        run.sample(KEY, 2, stop=1, lengths=3)
    with pytest.raises(ValueError, match=r"s.txt: the file of a sampler.*ends in .json"):
        run.sample(KEY, 2, solver=Path("s.txt"))
    with pytest.raises(ValueError, match=r"expected states of shape \(n, 8, 8, 1\), got \(2, 8, 8\)"):
        run.nelbo(KEY, np.zeros((2, 8, 8), np.int32))
    with pytest.raises(ValueError, match="num_times must be at least 1"):
        run.nelbo(KEY, np.zeros((2, 8, 8, 1), np.int32), num_times=0)


def test_folders_without_a_good_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no run in .*there is no run.json.*ddjax train --workdir"):
        ddjax.load(tmp_path)
    folder = tiny.copy(tmp_path / "run")
    tiny.truncate(folder, 10)
    with pytest.warns(UserWarning, match="checkpoint 10 is damaged"):
        assert ddjax.load(folder).step == 9
    with pytest.raises(CheckpointError, match=r"no checkpoint 4; it has \[5, 9, 10\]"):
        ddjax.load(folder, step=4)
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        ddjax.load(folder)
    for text in ('{"config": ', "[]", json.dumps({"config": {}}), json.dumps({"config": {}, "data": {}})):
        (folder / "run.json").write_text(text)
        with pytest.raises(ConfigError, match=r"run.json is damaged"):
            ddjax.load(folder)


def all_is_gaussian(params, xt, t, cond=None, **_):
    """The network of kind "edm" for data N(0, data_std^2)."""
    return 0.0 * xt


@pytest.mark.slow
@pytest.mark.parametrize("levels", [None, np.linspace(-1, 1, 9, dtype=np.float32)], ids=["values", "levels"])
def test_the_likelihood_of_the_ode_is_that_of_the_gaussian(levels):
    """With the network of white data the flow only rescales: every term is known, and the estimates have no error."""
    rng, width = np.random.default_rng(0), 0.5
    x0 = (
        rng.normal(size=(24, 4, 4, 1)).astype(np.float32)
        if levels is None
        else levels[rng.integers(0, 9, (24, 4, 4, 1))]
    )
    data = dataclasses.replace(from_arrays(x0), levels=levels)
    config = typed({
        "process": {"name": "gaussian", "schedule": "cond_ot", "data_std": width},
        "denoiser": {"kind": "edm", "options": {"width": 8, "depth": 1, "heads": 2}},
        "objective": {"name": "gaussian"},
        "eval": {"steps": 2, "probes": 2, "batch_size": 16},
    })  # fmt: skip
    run = Run(dataclasses.replace(build(config, data), apply=all_is_gaussian), {}, 0)
    found = evaluate(run, config, data, likelihood="ode")
    delta = 0.0 if levels is None else 0.25  # of the bins; their noise has the variance delta^2 / 12
    nats = 0.5 * (x0.astype(float) ** 2 + delta**2 / 12) / width**2 + 0.5 * np.log(2 * np.pi * width**2)
    nats -= np.log(delta) if delta else 0.0
    # The noise within the bins moves a site's share by |x0| delta / (sqrt(12) width^2), and the mean by less.
    error = 4.0 * delta / np.sqrt(12) / width**2 / np.sqrt(x0.size)
    np.testing.assert_allclose(found["bits_per_dim"], nats.mean() / np.log(2), atol=1e-4 + error)
    np.testing.assert_allclose(found["prior"] + found["volume"] + found["data"], found["bits_per_dim"], rtol=1e-5)
    assert found["probe_error"] < 1e-6
    bits = run.ode(KEY, x0).bits_per_dim(None if delta else 1.0)
    np.testing.assert_array_equal(bits, run.ode(KEY, x0, batch_size=24).bits_per_dim(None if delta else 1.0))
    spread = np.asarray(run.ode(jax.random.key(0), x0).bits_per_dim(None if delta else 1.0)).std(ddof=1)
    np.testing.assert_allclose(found["stderr"], spread / np.sqrt(24), rtol=1e-4)


def test_the_ode_needs_even_levels_and_a_density(run):
    with pytest.raises(ValueError, match="corrupts tokens, which have no density"):
        run.ode(KEY, np.zeros((1, 8, 8, 1), np.int32))
    odd = dataclasses.replace(from_arrays(np.zeros((4, 4, 4, 1), np.float32)), levels=np.float32([0.0, 0.1, 1.0]))
    config = typed({
        "process": {"name": "gaussian", "schedule": "vp_cosine"},
        "denoiser": {"kind": "v", "options": {"width": 8, "depth": 1, "heads": 2}},
        "objective": {"name": "gaussian"},
    })  # fmt: skip
    with pytest.raises(ValueError, match="evenly spaced levels"):
        Run(build(config, odd), {}, 0).ode(KEY, odd[:2]["x0"])
