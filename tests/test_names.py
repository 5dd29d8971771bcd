"""Continuous processes and their objectives by name: each trains, is scored where it can be, and samples."""

import dataclasses

import jax
import numpy as np
import pytest

from ddjax import (
    companions,
    gaussian_law,
    names,
    objective_names,
    objectives,
    processes,
    retrieval,
    schedules,
    solvers,
    transforms,
)
from ddjax.config import ConfigError, typed
from ddjax.data import by_class, from_arrays, noisy, rescaled
from ddjax.experiment import build
from ddjax.run import Run
from ddjax.training import init_state, make_train_step

LABELS = np.arange(16) % 3
LEVELS = np.linspace(-1.0, 1.0, 5, dtype=np.float32)
RNG = np.random.default_rng(0)
FLOATS = from_arrays(RNG.uniform(-1, 1, (16, 4, 4, 1)).astype(np.float32), LABELS)
PIXELS = dataclasses.replace(from_arrays(LEVELS[RNG.integers(0, 5, (16, 4, 4, 1))], LABELS), levels=LEVELS)
POSITIVE, BOXED = rescaled(FLOATS, 0.5, 1.5), rescaled(PIXELS, 0.0, 1.0)
SHADES = from_arrays(RNG.integers(0, 5, (16, 4, 4, 1)), LABELS, num_symbols=5)
TRUST = RNG.uniform(size=16).astype(np.float32)
TRUSTED = from_arrays(FLOATS[:]["x0"], LABELS, beside={"coherence": TRUST})
PAIRS = from_arrays(FLOATS[:]["x0"], LABELS, beside={"x1": -FLOATS[:]["x0"]})
TWO, THREE = by_class(FLOATS, [0, 2], "x1"), by_class(FLOATS, [2, 0, 1])
TEXT = from_arrays(RNG.integers(0, 7, (16, 6)), num_symbols=7)
SIZES = {"width": 8, "depth": 1, "heads": 2, "patch": 2}
BRIDGE = {"scale": 0.5, "start": 1.0, "end": 1.0}
NARROW = ("edm", {"sigma_max": 5.0})
FROM_DATA = ("interpolant", {"source_std": None})
GROWING = {"scale": 1.0, "start": 1.0, "end": 0.0}


def config(
    process, schedule, kind, objective="gaussian", solver="ancestral", *, data=FLOATS, extra=None, noise=None,
    coherence="", classes=(), **options,
):  # fmt: skip
    """A tiny config. process, schedule, objective: a name, or a name and options. extra: options of the network."""
    process, objective = ((v, {}) if isinstance(v, str) else v for v in (process, objective))
    schedule, of_schedule = schedule if isinstance(schedule, tuple) else (schedule, {})
    schedule = {} if schedule is None else {"schedule": schedule, "schedule_options": of_schedule}
    network = {"options": SIZES | (extra or {}), "kind": kind}
    if data is TEXT:
        network = {"name": "text", "options": {"width": 8, "depth": 1, "heads": 2}, "kind": kind}
    sections = {
        "data": {"noise": noise or {}, "coherence": coherence, "classes": list(classes)},
        "process": {"name": process[0], "options": process[1], **schedule},
        "denoiser": network,
        "objective": {"name": objective[0], "options": objective[1], "condition_dropout": 0.5},
        "optimizer": {"warmup": 0},
        "train": {"batch_size": 8, **options},
        "sample": {"solver": solver, "steps": 3},
        "eval": {"num_times": 2, "batch_size": 8, "steps": 2, "probes": 2},
    }
    return typed(sections), data


NDM, NFDM, DIFFENC = ("learned_gaussian", {"width": 4}), ("learned_gaussian", {"outputs": 2}), {"gate": "noise_share"}
MATRICES = {"noise": [[0.0], [1.0]], "rotation": [[0.0, -1.0], [1.0, 0.0]]}
CONFIGS = {
    "pfgm": config(("pfgm", {"D": 16.0}), "edm", "edm", ("gaussian", {"density": "log_normal_sigma"}), "heun"),
    "pfgm, ddim": config("pfgm", "cond_ot", "velocity", solver="ddim"),
    "blurring": config(("blurring", {"blur": 2.0}), "vp_cosine", "noise", data=PIXELS),
    "shortest path": config("shortest_path", None, "x0", "elbo", "heun"),
    "critically damped": config("critically_damped", "vp_linear", "score", solver="heun", data=PIXELS),
    "damped bound": config(("critically_damped", {"mass": 1.0}), "vp_linear", "x0", "elbo"),
    "linear sde": config(("linear_sde", MATRICES), "vp_linear", "noise", ("learned_elbo", {"t_range": [0.01, 1.0]})),
    "ndm": config(NDM, "vp_cosine", "x0", "learned_process", "heun", data=PIXELS),
    "nfdm": config(NFDM, "vp_linear", "x0", ("learned_process", {"curvature": 0.1})),
    "diffenc": config(("learned_gaussian", DIFFENC), "vp_cosine", "encoded", "learned_process"),
    "iadb": config("interpolant", None, "residual", "interpolant", "heun"),
    "stochastic interpolant": config(
        ("interpolant", {"path": "trigonometric", "noise": BRIDGE}), None, "velocity+noise",
        ("interpolant", {"density": "logit_normal", "mean": 0.5}),
    ),
    "rddm": config(
        ("interpolant", {"path": "residual", "noise": GROWING, "correlation": "accumulating", "source_std": 0.5}),
        None, "residual+noise", "interpolant",
    ),
    "transport": config(
        ("interpolant", {"source_std": 2.0}), None, "velocity", ("interpolant", {"coupling": "transported", "group": 4})
    ),
    "ambient": config("gaussian", "ve", "x0", ("ambient", {"density": "uniform_log_snr"}), noise={"sigma": 0.3}),
    "antithetic": config("gaussian", "cond_ot", "velocity", ("gaussian", {"uniforms": "antithetic"})),
    "fokker-planck": config("gaussian", "vp_cosine", "score", ("fokker_planck", {"weight": 0.1, "weighting": "unit"})),
    "e-tsdm": config("gaussian", "vp_cosine", "noise", extra={"shared_times": {"until": 0.2, "parts": 4}}),
    "geometric": config(("geometric", {"growth": 0.5}), NARROW, "hyvarinen", "elbo", data=POSITIVE),
    "geometric, levels": config(
        "geometric", ("ve", {"sigma_max": 5.0}), "noise", ("gaussian", {"error": "x0"}), data=rescaled(PIXELS, 1.0, 2.0)
    ),
    "reflected": config("reflected", "ve", "noise", "elbo", "folded_heun", data=BOXED),
    "bridges": config("bridge_mixture", ("ou_bridge", {"pull": 0.0}), "x0", "elbo"),
    "mixture": config(
        ("mixture_output", {"components": 3}), "vp_cosine", "x0", ("mixture_steps", {"steps": 4, "end": 0.05}),
        data=PIXELS,
    ),
    "soft mixture": config(
        ("soft_mixture", {"latent": 3, "draws": 2}), "vp_cosine", "x0", ("soft_mixture", {"steps": 4, "end": 0.05}),
        "fresh_latent", data=PIXELS,
    ),
    "mulan": config(
        ("adaptive_gaussian", {"bits": 6, "ones": 2, "width": 8}), None, "noise", ("adaptive_noise", {"draws": 2}),
        "given_latent", data=PIXELS,
    ),
    "logistic": config("uniform", None, "cavity", "elbo", data=SHADES, extra={"truncated_logistic": True}),
    "coherence": config(
        "gaussian", "vp_cosine", "v", "elbo", coherence="corrupted", extra={"coherence_levels": 3}, data=PIXELS
    ),
    "continuous coherence": config("gaussian", "cond_ot", "velocity", solver="heun", coherence="given", data=TRUSTED),
    "multimarginal": config(("barycentric", {"marginals": 3, "last": 2}), None, "ends", "multimarginal", data=THREE),
    "paired": config(FROM_DATA, None, "velocity", ("interpolant", {"coupling": "paired"}), data=PAIRS),
    "paired classes": config(
        FROM_DATA, None, "x0", ("interpolant", {"coupling": "paired", "show": True}), data=TWO, classes=[0, 2]
    ),
    "super-resolution": config(
        FROM_DATA, None, "residual", ("interpolant", {"coupling": "coarse", "factor": 2, "std": 0.3, "show": True})
    ),
    "rddm, degraded": config(
        ("interpolant", {"path": "residual", "noise": GROWING, "correlation": "accumulating", "source_std": None}),
        None, "residual+noise", ("interpolant", {"coupling": "blurred", "width": 0.7}),
    ),
    "in-painting": config(
        FROM_DATA, None, "velocity", ("interpolant", {"coupling": "holes", "patch": 2, "show": True}),
    ),
    "perturbed labels": config("gaussian", "vp_cosine", "v", extra={"label_noise": 1.0}),
    "diffusion forcing": config("masked", None, "posterior", "diffusion_forcing", data=TEXT),
    "marginals": config("masked", "cosine", "posterior", ("marginals", {"weight": 0.5}), data=SHADES),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_it_trains_is_scored_and_samples(name):
    c, data = CONFIGS[name]
    experiment = build(c, data)
    optimizer = experiment.optimizer()
    step = jax.jit(
        make_train_step(experiment.objective(), experiment.apply, optimizer, ema=experiment.ema()),
    )
    state = init_state(experiment.init, optimizer, jax.random.key(0))
    first, batches = state.params, experiment.batches(data)
    for _ in range(2):
        state, metrics = step(state, next(batches))
        assert bool(metrics["finite"])
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), first, state.params)
    assert max(jax.tree.leaves(moved)) > 1e-5
    if experiment.learns_process:
        assert max(jax.tree.leaves(moved["process"])) > 1e-5
    run = Run(*experiment.trained(state.ema), 2)
    x0, cond = data[:3]["x0"], data[:3].get("cond")
    if getattr(run.process, "has_bound", True):
        bits = run.nelbo(jax.random.key(1), x0, cond=cond).bits_per_dim
        assert np.isfinite(bits).all()
        density = data.num_symbols is None and data.levels is None  # its bits may be negative
        assert (np.asarray(bits) > 0).all() or density
    else:
        with pytest.raises(ValueError, match="has no bound"):
            run.nelbo(jax.random.key(1), x0, cond=cond)
    init = run.starts(jax.random.key(3), data[:3]) if companions.starts_from_data(experiment) else None
    drawn = run.sample(jax.random.key(2), 3, cond=cond, init=init, guidance=1.0 if cond is None else 2.0)
    assert drawn.shape == (3, *data.shape)
    assert np.isfinite(drawn).all()
    if hasattr(run.process, "check_data"):
        run.process.check_data(np.asarray(drawn))


def test_names_stand_for_their_objects():
    some = ("pfgm", "blurring", "shortest path", "damped bound", "diffenc", "ndm", "nfdm", "iadb", "rddm")
    built = {name: build(*CONFIGS[name]) for name in some}
    for experiment in built.values():
        hash((experiment.process, experiment.solver()))
    made = {name: experiment.process for name, experiment in built.items()}
    assert made["pfgm"].D == 16
    assert made["blurring"].schedule.blur == 2
    assert made["blurring"].basis == processes.DCT((1, 2))
    rates = made["blurring"].schedule.rates.values[..., 0]
    np.testing.assert_allclose(rates[[0, 1, 3], [0, 2, 0]], [0.0, np.pi**2 * 5 / 16, np.pi**2 * 9 / 16])
    power = made["shortest path"].schedule.power.values[..., 0]
    np.testing.assert_allclose(power[[0, 2], [0, 0]], [1.59 / 0.0086**2, 1.59 / 0.2586**2])  # a wave of four sites
    assert made["damped bound"].scale == (1.0, 1.0)
    assert made["diffenc"].transform.gate == transforms.NoiseShare(made["diffenc"].schedule)
    assert made["ndm"].transform.gate == transforms.elapsed
    assert made["nfdm"].transform.network.outputs == 2
    assert made["iadb"].schedule.noise is None
    assert made["rddm"].correlation == processes.interpolant.accumulating
    assert made["rddm"].schedule.beta(0.5) == 0.75


@pytest.mark.slow
def test_later_names_stand_for_their_objects():
    made = {name: build(*CONFIGS[name]) for name in ("geometric", "bridges", "mulan")}
    process = {name: experiment.process for name, experiment in made.items()}
    assert process["geometric"] == processes.Geometric(processes.Gaussian(schedules.EDM(5.0)), 0.5)
    start = build(*CONFIGS["geometric, levels"]).t_range[0]  # at an eighth of the least distance of logarithms
    np.testing.assert_allclose(0.01 * 500.0**start, np.log(2.0 / 1.75) / 8.0, rtol=1e-4)
    assert process["bridges"].schedule == schedules.OUBridge(0.0)
    assert process["mulan"] == processes.AdaptiveGaussian.initial((4, 4, 1), 6, 2, 8)
    assert made["mulan"].solver("given_latent", solver="ddim").make is solvers.DDIM
    with pytest.raises(ConfigError, match=r"solver_options.solver='x' is unknown"):
        made["mulan"].solver("given_latent", solver="x")


def test_reuse_by_name_holds_another_solver_by_name():
    c, data = CONFIGS["diffusion forcing"]
    elbo = dataclasses.replace(c.objective, name="elbo")
    reuse = {"sites": 3, "every": 4, "solver": "unmask", "order": "confidence"}
    c = dataclasses.replace(
        c, objective=elbo, sample=dataclasses.replace(c.sample, solver="reuse", solver_options=reuse)
    )
    experiment = build(c, data)
    inner = solvers.Unmask(experiment.process, solvers.Confidence())
    assert experiment.solver() == solvers.Reuse(inner, 3, 4)
    with pytest.raises(ConfigError, match="needs sites"):
        experiment.solver("reuse")
    with pytest.raises(ConfigError, match=r"solver_options.solver='x' is unknown"):
        experiment.solver("reuse", sites=3, solver="x")
    network = dataclasses.replace(c.denoiser, options=c.denoiser.options | {"time": False})
    with pytest.raises(ConfigError, match="keeps predictions, and Reuse runs"):
        build(dataclasses.replace(c, denoiser=network, sample=dataclasses.replace(c.sample, cache=True)), data)


def test_shortcuts_by_name_hold_another_solver_by_name(tmp_path):
    experiment = build(*CONFIGS["antithetic"])
    process, fitted = experiment.process, gaussian_law.fit(FLOATS, labels=True)
    heun, ddim = solvers.Heun(process), solvers.DDIM(process, 0.5)
    assert experiment.solver("teleport", at=0.6) == solvers.Switched((solvers.Teleport(process, fitted), heun), (0.6,))
    gaussian_law.fit(FLOATS, 2).save(tmp_path / "law.safetensors")
    made = experiment.solver("teleport", law=str(tmp_path / "law.safetensors"), solver="ddim", eta=0.5)
    assert made == solvers.Switched((solvers.Teleport(process, gaussian_law.fit(FLOATS, 2)), ddim), (0.75,))
    preconditioner = experiment.solver("preconditioned_langevin", damping=0.3).corrector.preconditioner
    assert preconditioner == solvers.ExactHessian(0.3, fitted)
    made = experiment.solver("levenberg_marquardt", solver="ddim", eta=0.5, memory=0.2)
    assert made == solvers.Preconditioned(ddim, solvers.LevenbergMarquardt(memory=0.2))
    base = retrieval.Trajectories(np.zeros((2, 4, 4, 1)), np.ones((2, 4, 4, 1)), (0.8, 0.4))
    base.save(tmp_path / "base.safetensors")
    made = experiment.solver("redi", base=str(tmp_path / "base.safetensors"), solver="heun", neighbours=2)
    assert made == retrieval.redi(heun, base, 2)
    gaussian_law.fit(np.zeros((2, 3))).save(tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match="has 1 laws of states of shape"):
        experiment.solver("teleport", law=str(tmp_path / "other.safetensors"))
    with pytest.raises(ConfigError, match="holds no Gaussian law"):
        experiment.solver("teleport", law=str(tmp_path / "base.safetensors"))
    with pytest.raises(ConfigError, match=r"solver_options.solver='x' is unknown"):
        experiment.solver("teleport", solver="x")


@pytest.mark.slow
def test_a_run_takes_shortcuts(tmp_path):
    """Fewer evaluations by name; what is in a base is found again."""
    experiment = build(*CONFIGS["antithetic"])
    run = Run(experiment, experiment.init(jax.random.key(0)), 0)
    settings = {"steps": 4, "trajectory": True, "solver_options": {"at": 0.5, "solver": "ddim"}}
    drawn = run.sample(jax.random.key(1), 3, cond=np.array([0, 1, 3]), solver="teleport", **settings)
    np.testing.assert_array_equal(drawn.nfe, 2)
    assert np.isfinite(drawn.x0).all()
    base = retrieval.for_run(run, jax.random.key(1), 5, steps=4, early=1, late=3, solver="ddim", batch_size=2)
    np.testing.assert_array_equal(base.labels, np.arange(5) % 3)
    base.save(tmp_path / "base.safetensors")
    options = {"base": str(tmp_path / "base.safetensors"), "solver": "ddim"}
    settings = {"steps": 4, "cond": np.arange(5) % 3, "trajectory": True}
    short = run.sample(jax.random.key(1), 5, solver="redi", solver_options=options, **settings)
    plain = run.sample(jax.random.key(1), 5, solver="ddim", **settings)
    np.testing.assert_allclose(short.x0, plain.x0, atol=1e-6)
    assert (short.nfe < plain.nfe).all()


def test_solvers_around_others_by_name():
    experiment = build(*CONFIGS["perturbed labels"])
    process, make = experiment.process, experiment.solver
    made = make("nested", solver="ddim", eta=0.5, inner_steps=[3, 1, 2], inner_grid="quadratic", outer="dpm_solver_pp")
    assert made.solver == solvers.DDIM(process, 0.5)
    assert (made.steps, made.outer) == ((3, 1, 2), solvers.dpm_solver_pp(process))
    np.testing.assert_allclose(made.grid.values[[0, 128, 256]], [1.0, 0.25, 0.0], atol=1e-6)
    assert make("nested") == solvers.Nested(solvers.Ancestral(process), 4)
    karras = build(*config("gaussian", "edm", "edm")).solver("nested", solver="heun", inner_grid="karras")
    np.testing.assert_allclose(karras.grid.values[[0, -2, -1]], [1.0, 0.002 / 80.0, 0.0], rtol=1e-4)
    assert make("momentum", solver="ddim", form="noise", nesterov=True) == solvers.Momentum(
        solvers.DDIM(process), 0.8, "noise", True
    )
    with pytest.raises(ConfigError, match=r"solver_options.solver='x' is unknown"):
        make("nested", solver="x")
    with pytest.raises(ConfigError, match="momentum is for deterministic steps"):
        make("momentum", solver="ancestral")


@pytest.mark.slow
def test_a_run_shows_whole_samples_at_every_step():
    experiment = build(*CONFIGS["perturbed labels"])
    run, seen = Run(*experiment.trained(experiment.init(jax.random.key(0))), 0), []
    options = {"solver": "nested", "solver_options": {"inner_steps": [2, 1]}, "steps": 2, "cond": [0, 1, 2]}
    drawn = run.sample(jax.random.key(1), 3, callback=seen.append, batch_size=2, **options)
    assert [part.x0.shape for part in seen] == [(2, 4, 4, 1)] * 2 + [(1, 4, 4, 1)] * 2
    assert [int(part.nfe[0]) for part in seen] == [2, 3, 2, 3]
    # The bridge into the schedule's least noise is all that is between them.
    last = np.concatenate([seen[1].x0, seen[3].x0])
    assert 0 < np.abs(last - drawn).max() < 0.1


@pytest.mark.slow
def test_log_p_of_any_subset_is_the_output_that_sampling_cuts_off():
    c, data = CONFIGS["marginals"]
    experiment = build(c, data)
    params = experiment.init(jax.random.key(0))
    params = jax.tree.map(lambda a: a + 0.01, params)  # the last layer begins with zeros
    run, x0 = Run(*experiment.trained(params), 0), data[:5]["x0"]
    shown = np.arange(16).reshape(1, 4, 4, 1) < np.asarray([0, 1, 7, 15, 16]).reshape(5, 1, 1, 1)
    said = run.marginals(x0, shown, batch_size=2)
    t = run.process.schedule.time_of_sigma(1.0 - shown.mean((1, 2, 3), dtype=np.float32))
    head = experiment.apply(params, np.where(shown, x0, 5), t, None)[..., 5]
    np.testing.assert_allclose(said, np.where(shown, head, 0.0).sum((1, 2, 3)), rtol=1e-5, atol=1e-6)
    assert said[0] == 0.0
    assert not hasattr(run.experiment.denoiser(params, 1.0, None), "planner")  # that output is no planner's
    assert (np.abs(said[1:]) > 1e-4).all()
    other = build(*CONFIGS["logistic"])
    with pytest.raises(ValueError, match=r"learned by config\.objective\.name='marginals', not 'elbo'"):
        Run(*other.trained(other.init(jax.random.key(0))), 0).marginals(x0, shown)


@pytest.mark.slow
def test_latents_are_drawn_by_row():
    experiment, rows = build(*CONFIGS["mulan"]), np.arange(5)
    drawn = experiment.to_sample(jax.random.key(0), rows, LABELS[:5])
    np.testing.assert_array_equal(drawn["z"].sum(-1), 2)
    np.testing.assert_array_equal(drawn["cond"], LABELS[:5])
    np.testing.assert_array_equal(experiment.to_sample(jax.random.key(0), rows[3:], None)["z"], drawn["z"][3:])
    run = Run(*experiment.trained(experiment.init(jax.random.key(1))), 0)
    whole, parts = (run.sample(jax.random.key(2), 5, cond=1, guidance=2.0, batch_size=size) for size in (5, 2))
    np.testing.assert_allclose(parts, whole, atol=1e-5)


@pytest.mark.slow
def test_untrained_components_state_different_means_of_the_same_weight():
    experiment = build(*CONFIGS["mixture"])
    denoise = Run(*experiment.trained(experiment.init(jax.random.key(0))), 0).denoise
    said = denoise(np.zeros((1, 4, 4, 1), np.float32), np.ones(1)).value
    np.testing.assert_allclose(said[0, 0, 0, 0], [-0.1, 0.0, 0.1, 0.0, 0.0, 0.0], atol=1e-6)


def test_transport_pairs_a_batch_with_noise_of_the_sources_width():
    experiment = build(*CONFIGS["transport"])
    batch = next(experiment.batches(FLOATS))
    assert set(batch["cond"]) == {"x1", "cond"}
    x1 = batch["cond"]["x1"].reshape(2, 4, -1)
    assert 1.7 < x1.std() < 2.3
    x0 = batch["x0"].reshape(2, 4, -1)
    for a, b in zip(x0, x1, strict=True):
        swapped = b[[1, 0, 2, 3]]
        assert ((a - b) ** 2).sum() < ((a - swapped) ** 2).sum()


def test_noise_is_drawn_once_for_each_item_and_its_level_goes_along():
    data = noisy(FLOATS, sigma=0.5, share=0.5, seed=3)
    assert data.levels is None
    whole, again = data[np.arange(16)], data[np.asarray([5, 2])]
    np.testing.assert_array_equal(again["x0"], whole["x0"][[5, 2]])
    np.testing.assert_array_equal(whole["cond"]["cond"], LABELS)
    sigma, added = whole["cond"]["sigma"], (whole["x0"] - FLOATS[:]["x0"]).reshape(16, -1)
    assert set(sigma) == {np.float32(0.0), np.float32(0.5)}
    assert (added[sigma == 0] == 0).all()
    spread = added[sigma > 0].std()
    assert abs(spread - 0.5) < 4 * 0.5 / np.sqrt(2 * added[sigma > 0].size)
    for wrong in ({"sigma": 0.0}, {"sigma": 1.0, "share": 1.5}):
        with pytest.raises(ValueError, match="needs sigma > 0"):
            noisy(FLOATS, **wrong)
    with pytest.raises(ValueError, match="are tokens"):
        noisy(TEXT, sigma=1.0)


def test_dropout_hides_the_networks_own_condition_alone():
    seen = []
    base = lambda key, apply, params, x0, cond, *rest: seen.append(cond)
    cond = {"x1": np.ones((2, 3), np.float32), "cond": np.asarray([1, 2], np.int32)}
    objectives.with_condition_dropout(base, 1.0, 7)(jax.random.key(0), None, None, np.zeros((2, 3)), cond)
    np.testing.assert_array_equal(seen[0]["x1"], cond["x1"])
    np.testing.assert_array_equal(seen[0]["cond"], [7, 7])
    objectives.with_condition_dropout(base, 1.0, 7)(jax.random.key(0), None, None, np.zeros((2, 3)), {"cond": None})
    assert seen[1] == {"cond": None}


WRONG = {
    r"config.process.name='reflected': Reflected is for values in \[0, 1\], got some from -.*; config.data.interval": (
        ("reflected", "ve", "noise", "elbo")
    ),
    r"config.process.name='geometric': Geometric is for positive values": (
        "geometric",
        ("edm", {"sigma_max": 5.0}),
        "x0",
    ),
    r"config.process.options: 'geometric': logarithms reach .*, beyond float32": ("geometric", "ve", "x0"),
    r"config.process.options: 'reflected': Reflected needs a schedule with alpha = 1": (
        "reflected",
        "cond_ot",
        "noise",
    ),
    r"config.process.options: 'bridge_mixture': BridgeMixture needs schedules.OUBridge": (
        ("bridge_mixture", "vp_linear", "x0")
    ),
    r"objective.name='gaussian' does not go with .*: AdaptiveGaussian says nothing without its latent": (
        ("adaptive_gaussian", None, "noise", "gaussian", "given_latent")
    ),
    r"solver='ancestral' does not go with .*: AdaptiveGaussian says nothing without its latent": (
        ("adaptive_gaussian", None, "noise", "adaptive_noise")
    ),
    r"config.sample.solver: 'folded_heun': FoldedHeun is for processes.Reflected, got Gaussian": (
        ("gaussian", "vp_cosine", "v", "gaussian", "folded_heun")
    ),
    r"config.objective.name: 'mixture_steps': the grid ends at t=0, where": (
        ("mixture_output", "vp_linear", "x0", ("mixture_steps", {"steps": 4}))
    ),
    r"solver='ancestral' does not go with config.process.name='pfgm' .*: PFGM\+\+ is an ODE": ("pfgm", "edm", "edm"),
    r"objective.name='elbo' does not go with config.process.name='pfgm' .*: PFGM\+\+ is an ODE": (
        ("pfgm", "edm", "edm", "elbo", "heun")
    ),
    r"objective.name='diffusion_forcing' does not go with .*: the network 'dit' takes one time for each example": (
        ("gaussian", "vp_cosine", "v", "diffusion_forcing")
    ),
    r"objective.name='gaussian' does not go with config.process.name='interpolant'": ("interpolant", None, "velocity"),
    r"config.objective.name: 'interpolant': the ends of Gaussian are not for choosing": (
        ("gaussian", "cond_ot", "velocity", "interpolant")
    ),
    r"solver='ancestral' does not go with .*kind='velocity': 'velocity' alone does not determine": (
        (("interpolant", {"noise": BRIDGE}), None, "velocity", "interpolant")
    ),
    r"solver='heun' does not go with .*kind='encoded'": (
        (("learned_gaussian", {}), "vp_cosine", "encoded", "learned_process", "heun")
    ),
    r"config.sample.solver: 'ddim': DDIM is for processes.Gaussian, got LinearSDE": (
        ("critically_damped", "vp_linear", "x0", "elbo", "ddim")
    ),
    r"config.process.options: 'critically_damped': the log-SNR of .* is -inf": ("critically_damped", "cond_ot", "x0"),
    r"config.process.schedule='ve': the process 'interpolant' has a schedule of its own": (
        ("interpolant", "ve", "velocity", "interpolant")
    ),
    r"config.process.options.path='bent' is unknown; it is one of straight": (
        (("interpolant", {"path": "bent"}), None, "velocity", "interpolant")
    ),
    r"config.process.options.noise: Noise has no option 'width'": (
        (("interpolant", {"noise": {"width": 1.0}}), None, "velocity", "interpolant")
    ),
    r"config.objective.options.coupling: Transported needs group": (
        ("interpolant", None, "velocity", ("interpolant", {"coupling": "transported"}))
    ),
    r"config.process.options.gate='x' is unknown; it is one of elapsed": (
        (("learned_gaussian", {"gate": "x"}), "vp_cosine", "x0")
    ),
    r"config.process.name='shortest_path' has nothing to learn": ("shortest_path", None, "x0", "learned_process"),
}


@pytest.mark.slow
@pytest.mark.parametrize("message", WRONG)
def test_what_makes_no_sense_is_named(message):
    with pytest.raises(ConfigError, match=message) as caught:
        build(*config(*WRONG[message]))
    assert "\n" not in str(caught.value)


def test_what_else_makes_no_sense():
    with pytest.raises(ConfigError, match="eval_every=5: the process 'pfgm' has no bound"):
        build(*config("pfgm", "edm", "edm", solver="heun", eval_every=5))
    with pytest.raises(ConfigError, match=r"objective.name='gaussian' does not go with .* has entries sigma, cond"):
        build(*config("gaussian", "ve", "x0", noise={"sigma": 0.1}))
    with pytest.raises(ConfigError, match=r"objective.name='ambient' .* needs the examples' noise levels"):
        build(*config("gaussian", "ve", "x0", "ambient"))
    with pytest.raises(ConfigError, match=r"config.data.noise: noisy has no option 'std'"):
        build(*config("gaussian", "ve", "x0", "ambient", noise={"std": 0.1})).batches(FLOATS)
    with pytest.raises(ConfigError, match=r"shared_times is for networks that are told the clock, not for .*'edm'"):
        build(*config("gaussian", "edm", "edm", extra={"shared_times": {}}))
    with pytest.raises(ConfigError, match=r"config.sample.solver: 'heun': Geometric has no ODE for its states"):
        build(*config("geometric", NARROW, "x0", "elbo", "heun", data=POSITIVE))
    for wrong in (
        {"process": "uniform", "schedule": None, "kind": "ratio", "objective": "score_entropy", "data": SHADES},
        {"process": "uniform", "schedule": None, "kind": "cavity", "objective": "ddpd", "data": SHADES},
        {"process": "gaussian", "schedule": "vp_cosine", "kind": "x0"},
    ):
        with pytest.raises(ConfigError, match="truncated_logistic is for a posterior or a cavity of tokens"):
            build(*config(**wrong, extra={"truncated_logistic": True}))
    with pytest.raises(ConfigError, match="has no option 'till'"):
        build(*config("gaussian", "edm", "noise", extra={"shared_times": {"till": 0.1}}))


def test_every_process_and_objective_is_somewhere():
    """Here, in tests/test_experiment.py, or in a file of configs/ (tests/test_configs.py); products in tests/data."""
    import test_experiment as others

    found = [c for c, _ in (*CONFIGS.values(), *others.TRAINABLE.values())]
    assert {c.process.name for c in found} == set(names.PROCESSES) - {"thinning", "product"}
    elsewhere = {"cross_entropy", "generalised_kl", "by_parts", "tabddpm", "digress"}
    assert {c.objective.name for c in found} == set(objective_names.OBJECTIVES) - elsewhere
