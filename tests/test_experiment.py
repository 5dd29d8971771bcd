import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ddjax import names, objective_names, solvers
from ddjax.config import ConfigError, typed
from ddjax.data import from_arrays
from ddjax.experiment import build, load_data
from ddjax.predictions import TwoHeads, evaluations
from ddjax.run import Run
from ddjax.training import init_state, make_train_step

RNG = np.random.default_rng(0)
IMAGES = from_arrays(RNG.integers(0, 5, (16, 4, 4, 1)), np.arange(16) % 3, num_symbols=5)
FLOATS = from_arrays(RNG.uniform(-1, 1, (16, 4, 4, 1)).astype(np.float32), np.arange(16) % 3)
TEXT = from_arrays(RNG.integers(0, 7, (16, 6)), num_symbols=7)
SIZES = {"width": 8, "depth": 1, "heads": 2}


def config(process="masked", schedule="linear", kind="posterior", **sections):
    base = {
        "process": process if isinstance(process, dict) else {"name": process, "schedule": schedule},
        "denoiser": {"kind": kind, "options": SIZES},
        "optimizer": {"warmup": 0},
    }
    return typed({**base, **sections})


def gaussian(kind="v", schedule="vp_cosine", **sections):
    return config("gaussian", schedule, kind, **{"objective": {"name": "gaussian"}, **sections})


def blocks(process="masked", kind="posterior", **sections):
    denoiser = {"name": "text", "kind": kind, "options": SIZES | {"block": 2}}
    return config(process, **{"denoiser": denoiser, **sections})


EDM = {"weighting": "unit", "density": "log_normal_sigma", "mean": -1.0}
LEARNED = {"name": "gaussian", "schedule": "monotone"}
BRANCHES = {"widths": [8, 4], "depths": [3, 3], "heads": 2, "output_heads": True}
UNCERTAIN = {"width": 8, "multipliers": [1], "blocks": 1, "head_width": 8, "uncertainty": 4}
TRAINABLE = {
    "masked": (config(), IMAGES),
    "any_order": (config(objective={"name": "any_order"}), IMAGES),
    "uniform cavity": (config("uniform", "cosine", "cavity"), IMAGES),
    "hybrid chain": (
        config(
            kind="cavity",
            process={"name": "hybrid", "options": {"uniform_share": 0.3}},
            objective={"options": {"times": [1.0, 0.5, 0.0]}},
        ),
        IMAGES,
    ),
    "chain": (config({"name": "discretized_gaussian", "options": {"steps": 4}}, kind="cavity"), IMAGES),
    "marginal": (config("marginal", kind="cavity"), IMAGES),
    "kernel": (
        config(
            {"name": "kernel", "options": {"generator": "gaussian", "reach": 0.3, "absorb": 0.1}},
            kind="cavity",
        ),
        IMAGES,
    ),
    "spindle": (config({"name": "spindle", "options": {"strength": 0.2}}), IMAGES),
    "genmd4": (config({"name": "symbol_polynomial"}, objective={"name": "genmd4"}), IMAGES),
    "learned_elbo": (
        config(LEARNED | {"schedule_options": {"width": 4}}, kind="noise", objective={"name": "learned_elbo"}),
        FLOATS,
    ),
    "per_site": (gaussian("noise", "per_site", objective={"name": "learned_elbo"}), FLOATS),
    "ddpd": (config("uniform", kind="cavity", objective={"name": "ddpd"}), IMAGES),
    "score entropy": (config("uniform", kind="ratio", objective={"name": "score_entropy"}), IMAGES),
    "clipped": (
        config("hybrid", kind="cavity", objective={"options": {"weighting": "clipped", "w_max": 3.0}}),
        IMAGES,
    ),
    "d3pm": (config("uniform", kind="cavity", objective={"name": "d3pm_hybrid", "options": {"steps": 5}}), IMAGES),
    "text": (config("masked", "log_linear", denoiser={"name": "text", "options": SIZES}), TEXT),
    "glauber": (
        config(
            kind="cavity",
            process={"name": "glauber", "schedule": "log_linear", "options": {"rounds": 2}},
            objective={"name": "glauber"},
        ),
        IMAGES,
    ),
    "duo": (
        config(
            "uniform",
            kind="cavity",
            objective={"name": "duo", "options": {"tau": 0.1, "log_snr": [-2.0, 3.0], "top": 2}},
        ),
        IMAGES,
    ),
    "blocks": (
        blocks(objective={"name": "block_elbo", "options": {"clip": [0.1, 0.9]}}, sample={"steps": 6}),
        TEXT,
    ),
    "grouped": (
        config(
            denoiser={"options": SIZES | {"time": False, "patch": 2}},
            objective={"name": "grouped", "options": {"numbers": [2, 4]}},
            sample={"solver": "grouped", "steps": 3},
        ),
        IMAGES,
    ),
    "edm": (gaussian("edm", "edm", objective={"name": "gaussian", "options": EDM}), FLOATS),
    "velocity": (gaussian("velocity", "cond_ot"), FLOATS),
    "v": (gaussian("v", "vp_cosine", objective={"name": "gaussian", "options": {"error": "noise"}}), FLOATS),
    "x0": (gaussian("x0", "vp_linear", objective={"name": "elbo"}), FLOATS),
    "learned uncertainty": (gaussian("edm", "edm", objective={"name": "learned_uncertainty", "options": EDM}), FLOATS),
    "own uncertainty": (
        gaussian(
            "edm",
            "edm",
            denoiser={"name": "edm2", "kind": "edm", "options": UNCERTAIN},
            objective={"name": "own_uncertainty", "options": EDM},
        ),
        FLOATS,
    ),
    "adaptive": (
        gaussian(objective={"name": "adaptive", "options": {"weighting": "sigmoid", "bias": 1.0, "floor": 0.1}}),
        FLOATS,
    ),
    "contrastive": (gaussian("velocity", "cond_ot", objective={"name": "contrastive_flow_matching"}), FLOATS),
    "multi-resolution": (
        gaussian(
            "velocity",
            "cond_ot",
            denoiser={"name": "multi_resolution", "kind": "velocity", "options": BRANCHES},
            objective={"name": "multi_resolution", "options": {"coefficients": [0.25]}},
        ),
        FLOATS,
    ),
    "learned variance": (
        config("learned_variance", "vp_cosine", "noise", objective={"name": "ddpm_hybrid", "options": {"steps": 8}}),
        FLOATS,
    ),
}


QUICK = ("masked", "text", "edm", "genmd4", "kernel")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in TRAINABLE])
def test_a_step_is_finite_and_moves(name):
    experiment = build(*TRAINABLE[name])
    optimizer, data = experiment.optimizer(), TRAINABLE[name][1]
    step = make_train_step(experiment.objective(), experiment.apply, optimizer, ema=experiment.ema())

    def first_step(key, batch):
        state = init_state(experiment.init, optimizer, key)
        return state, *step(state, batch)

    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # to compile
    arguments = jax.random.key(0), data[:8]
    state, after, metrics = jax.jit(first_step).lower(*arguments).compile(quick)(*arguments)
    assert bool(metrics["finite"])
    assert int(after.step) == 1
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), state.params, after.params)
    assert max(jax.tree.leaves(moved)) > 1e-5
    assert (experiment.null is None) == (data.num_classes == 0)
    assert experiment.sites == np.prod(data.shape)


BY_RATES = ("euler", "tweedie", "tau_leaping", "flow_euler", "campbell")
OTHERS = ("linear", "polynomial", "cosine", "log_linear", "geometric", "shifted", "per_site")
SINGLE_STEP = (
    "euler", "heun_in_noise", "bogacki_shampine", "rk4", "dpm_solver", "dpm_solver_pp_singlestep"
)  # fmt: skip
MULTISTEP = (
    "dpm_solver_pp", "dpm_solver_multistep", "unipc", "deis", "lms", "adams_bashforth", "ipndm", "pndm", "plms",
    "gradient_estimation", "ghvb", "flow_turbo", "momentum",
)  # fmt: skip
STOCHASTIC = {
    "sde_dpm_solver_pp": {}, "sa_solver": {}, "dpm_solver_pp_2s_ancestral": {}, "edm_stochastic": {"steps": 3},
    "edm_restart": {"intervals": [[0.5, 2.0, 2, 1]]}, "euler_maruyama": {}, "predictor_corrector": {"size": 0.1},
    "teleport": {"at": 0.6}, "levenberg_marquardt": {"damping": 0.1}, "preconditioned_langevin": {"size": 0.1},
}  # fmt: skip
CORRECTED = ("remasking", "psi", "gibbs", "denoising_chain", "first_hitting", "nested")
MINIMAL = {  # the least that each name needs beside the defaults
    **{
        ("process", "schedule", n): config(schedule=n)
        for n in ("linear", "polynomial", "cosine", "log_linear", "geometric")
    },
    **{("process", "schedule", n): gaussian(schedule=n) for n in names.SCHEDULES if n not in OTHERS},
    ("process", "schedule", "shifted"): config(
        {"name": "gaussian", "schedule": "shifted", "schedule_options": {"schedule": "cond_ot", "factor": 2.0}},
        kind="v",
        objective={"name": "gaussian"},
    ),
    **{
        ("sample", "solver", n): gaussian(sample={"solver": n})
        for n in ("ancestral", "ddim", "heun", "rk45", "resampled")
    },
    **{("sample", "solver", n): config(sample={"solver": n}) for n in CORRECTED},
    **{
        ("sample", "solver", n): config("thinning", kind="deaths", sample={"solver": n})
        for n in ("binomial_bridge", "poisson_bridge")
    },
    ("sample", "solver", "grouped"): TRAINABLE["grouped"][0],
    ("sample", "solver", "glauber"): config("glauber", kind="cavity", sample={"solver": "glauber"}),
    ("sample", "solver", "self_correction"): config("uniform", kind="cavity", sample={"solver": "self_correction"}),
    **{("sample", "solver", n): config(sample={"solver": n}) for n in BY_RATES},
    **{("sample", "grid", n): gaussian(sample={"grid": n}) for n in ("uniform", "cosine", "log_linear")},
    ("sample", "grid", "loss_aware"): config(
        sample={"grid": "loss_aware", "grid_options": {"times": [0.1, 0.9], "losses": [2.0, 1.0]}}
    ),
    ("process", "schedule", "per_site"): TRAINABLE["per_site"][0],
    ("sample", "grid", "karras"): gaussian("edm", "edm", sample={"grid": "karras"}),
    ("sample", "grid", "uniform_log_snr"): gaussian(
        sample={"grid": "uniform_log_snr", "grid_options": {"start": -5.0, "end": 5.0}}
    ),
    **{
        ("objective", "weighting", n): gaussian(objective={"name": "gaussian", "options": {"weighting": n}})
        for n in (
            "unit",
            "snr",
            "truncated_snr",
            "min_snr",
            "soft_min_snr",
            "p2",
            "edm",
            "likelihood",
            "sigmoid",
            "flow_matching",
        )
    },
    **{
        ("objective", "density", n): gaussian(objective={"name": "gaussian", "options": {"density": n}})
        for n in ("uniform_time", "uniform_log_snr", "log_normal_sigma", "logit_normal", "sech", "laplace")
    },
    **{("sample", "solver", n): gaussian(sample={"solver": n}) for n in SINGLE_STEP + MULTISTEP},
    **{
        ("sample", "solver", n): gaussian(sample={"solver": n, "solver_options": options})
        for n, options in STOCHASTIC.items()
    },
    **{
        ("sample", "grid", n): gaussian("noise", "ve", sample={"grid": n, "grid_options": options})
        for n, options in {
            "exponential": {"sigma_min": 0.02, "sigma_max": 40.0},
            "quadratic": {},
            "of_table": {"spacing": "linspace"},
            "beta": {},
            "through": {"sigmas": [14.0, 1.0, 0.03]},
            "uniform_shifted": {"shift": 2.0},
        }.items()
    },
}


@pytest.mark.parametrize("place", MINIMAL)
def test_every_name_builds(place):
    c = MINIMAL[place]
    experiment = build(c, FLOATS if c.process.name == "gaussian" else IMAGES)
    times = np.asarray(experiment.times(4))
    assert times.shape == (5,)
    assert (np.diff(times) < 0).all()


def test_every_table_is_covered():
    tables = {"schedule": names.SCHEDULES, "solver": names.SOLVERS, "grid": names.GRIDS}
    tables |= {"weighting": objective_names.WEIGHTINGS, "density": objective_names.DENSITIES}
    for name, table in tables.items():
        # In tests/test_names.py, and below.
        of_one_process = {"folded_heun", "given_latent", "fresh_latent", "reuse", "gillespie", "planned_steps"}
        of_one_process |= {"path_planning", "unmask", "redi", "parts"}
        assert {place[2] for place in MINIMAL if place[1] == name} == set(table) - of_one_process


def test_options_arrive():
    field = next(iter(names.SCHEDULES["polynomial"].__dataclass_fields__))
    values = {"process": {"schedule": "polynomial", "schedule_options": {field: 3.0}}}
    experiment = build(typed({**values, "denoiser": {"options": SIZES}}), IMAGES)
    assert getattr(experiment.process.schedule, field) == 3.0
    marginal = {"name": "marginal", "options": {"probabilities": [0.1, 0.2, 0.3, 0.2, 0.2]}}
    process = build(config(process=marginal), IMAGES).process
    np.testing.assert_allclose(process.probabilities.values, marginal["options"]["probabilities"])
    counted = build(config(process={"name": "marginal", "options": {"smoothing": 2.0}}), IMAGES)
    counts = np.bincount(IMAGES[:]["x0"].ravel(), minlength=5)
    np.testing.assert_array_equal(counted.data.counts, counts)
    np.testing.assert_allclose(counted.process.probabilities.values, (counts + 2) / (counts + 2).sum())
    c = gaussian(sample={"solver": "ddim", "solver_options": {"eta": 0.5}})
    experiment = build(c, FLOATS)
    assert experiment.solver() == solvers.DDIM(experiment.process, eta=0.5)
    assert experiment.solver("ddim") == solvers.DDIM(experiment.process)
    assert experiment.process.schedule == names.SCHEDULES["vp_cosine"]()


def test_what_was_learned_about_the_process_is_in_the_process():
    experiment = build(TRAINABLE["genmd4"][0], IMAGES)
    params = experiment.init(jax.random.key(0))
    trained, network = experiment.trained({**params, "process": params["process"] + np.arange(5.0)})
    assert jax.tree.structure(network) == jax.tree.structure(params["network"])
    powers = np.log1p(np.exp(np.log(np.e - 1) + np.arange(5.0)))
    np.testing.assert_allclose(trained.process.schedule.powers, powers, rtol=1e-6)
    np.testing.assert_allclose(experiment.process.schedule.powers, np.ones(5))


def test_what_the_objective_learned_for_itself_is_dropped():
    experiment = build(*TRAINABLE["learned uncertainty"])
    params = experiment.init(jax.random.key(0))
    assert set(params) == {"network", "objective"}
    trained, network = experiment.trained(params)
    assert jax.tree.structure(network) == jax.tree.structure(params["network"])
    assert trained is experiment


@pytest.mark.slow
def test_a_learned_variance_has_its_own_output():
    experiment = build(*TRAINABLE["learned variance"])
    said = experiment.apply(experiment.init(jax.random.key(0)), FLOATS[:2]["x0"], np.full(2, 0.5, np.float32), None)
    assert said.shape == (2, 4, 4, 2)


@pytest.mark.slow
def test_a_learned_schedule_is_in_the_process_and_scores():
    experiment = build(TRAINABLE["learned_elbo"][0], FLOATS)
    params = experiment.init(jax.random.key(0))
    ends = params["process"]["ends"] + np.asarray([-1.0, 2.0])
    trained, _ = experiment.trained({**params, "process": {**params["process"], "ends": ends}})
    np.testing.assert_allclose(trained.process.schedule.log_snr(np.asarray([0.0, 1.0])), ends, rtol=1e-6)
    hash(trained.process)  # so it can be a static argument
    assert 0 <= trained.t_range[0] < trained.t_range[1] == 1


@pytest.mark.slow
def test_a_ratio_network_begins_with_uniform_data():
    """At a mask the ratio of a symbol is alpha / K to sigma: score entropy need not learn how that changes with t."""
    experiment = build(config(kind="ratio", objective={"name": "score_entropy"}), IMAGES)
    params = jax.tree.map(np.zeros_like, experiment.init(jax.random.key(0)))
    t = np.asarray([0.1, 0.9], np.float32)
    ratios = experiment.apply(params, np.full((2, 4, 4, 1), 5), t, None)
    for one, at in zip(np.asarray(ratios), t, strict=True):
        np.testing.assert_allclose(one[0, 0, 0], [*[np.log((1 - at) / 5 / at)] * 5, 0.0], rtol=1e-5)


@pytest.mark.slow
def test_the_planners_head_is_not_the_denoisers():
    experiment = build(TRAINABLE["ddpd"][0], IMAGES)
    params = experiment.init(jax.random.key(0))
    trained, same = experiment.trained(params)
    arguments = same, IMAGES[:2]["x0"], np.full(2, 0.5, np.float32), None
    both, one = experiment.apply(*arguments), trained.apply(*arguments)
    assert both.shape == (2, 4, 4, 1, 6)
    np.testing.assert_array_equal(one, both[..., :5])
    assert hash(trained.apply) == hash(experiment.trained(params)[0].apply)


def test_the_planner_comes_with_the_denoiser():
    """One network for both heads; under guidance the denoiser's is doubled, and the planner asked by itself."""

    def apply(params, xt, t, cond):
        return params["w"] * jnp.cos(xt[..., None] + t[0] + cond[:, None, None, None, None] * jnp.arange(6.0))

    params = {"w": jnp.float32(2.0)}
    trained, _ = dataclasses.replace(build(*TRAINABLE["ddpd"]), apply=apply).trained(params)
    xt, t, cond = IMAGES[:2]["x0"], np.full(2, 0.5, np.float32), np.array([0, 2], np.int32)
    heads = trained.denoiser(params, 1.0, cond)
    assert isinstance(heads, TwoHeads)
    what, where = heads.both(xt, t, cond)
    assert what.value.shape == (2, 4, 4, 1, 5)
    assert where.value.shape == xt.shape
    np.testing.assert_array_equal(what.value, trained.apply(params, xt, t, cond))
    guided = trained.denoiser(params, 2.0, cond)
    np.testing.assert_array_equal(guided.planner(xt, t, cond).value, where.value)
    np.testing.assert_array_equal(guided(xt, t, cond).value, trained.guided(heads, 2.0, cond)(xt, t, cond).value)
    assert evaluations(heads) == 1
    assert evaluations(guided) == 2
    plain = build(*TRAINABLE["masked"])
    assert not hasattr(plain.denoiser(params, 1.0, cond), "planner")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "solver", "options"),
    [
        ("ddpd", "gillespie", {}),
        ("ddpd", "planned_steps", {"fill": 0.5}),
        ("masked", "first_hitting", {}),
        ("masked", "unmask", {"order": "confidence", "score": "margin"}),
        ("masked", "path_planning", {"eta": 1.5}),
        ("masked", "reuse", {"sites": 2, "every": 2, "solver": "unmask", "order": "confidence"}),
        ("grouped", "grouped", {"order": "local", "repulsion": 0}),
        ("grouped", "grouped", {"order": "random", "keep": False}),
        ("uniform cavity", "gillespie", {}),
    ],
)
def test_solvers_that_choose_where_sample_from_a_run(name, solver, options):
    settings = TRAINABLE[name][0]
    sampled = dataclasses.replace(settings.sample, solver=solver, solver_options=options, steps=3)
    experiment = build(dataclasses.replace(settings, sample=sampled), IMAGES)
    run = Run(*experiment.trained(experiment.init(jax.random.key(0))), 0)
    for cond, guidance in ((None, None), (np.array([0, 1, 2]), 2.0)):
        x = np.asarray(run.sample(jax.random.key(1), 3, cond=cond, guidance=guidance))
        assert x.shape == (3, 4, 4, 1)
        assert x.max() < 5
        np.testing.assert_array_equal(run.sample(jax.random.key(1), 3, cond=cond, guidance=guidance, batch_size=2), x)


@pytest.mark.slow
def test_a_run_in_groups_is_scored_by_its_own_bound():
    """In as many steps as it samples with: a network that knows nothing pays log 5 a site, one pass for each draw."""
    experiment = build(*TRAINABLE["grouped"])
    zeros = jax.tree.map(jnp.zeros_like, experiment.init(jax.random.key(0)))
    bound = Run(*experiment.trained(zeros), 0).nelbo(jax.random.key(1), IMAGES[:3]["x0"], cond=np.array([0, 1, 2]))
    np.testing.assert_allclose(bound.total, 16 * np.log(5.0), rtol=1e-5)


def test_orders_by_name():
    experiment = build(*TRAINABLE["masked"])
    made = experiment.solver("unmask", order="confidence", score="entropy", temperature=1.5, count="binomial")
    assert made == solvers.Unmask(experiment.process, solvers.Confidence("entropy", 1.5), "binomial")
    assert experiment.solver("unmask").order == solvers.RandomOrder()
    for options, match in (
        ({"order": "x"}, "is unknown"),
        ({"order": "local", "score": "margin"}, "no option 'score'"),
    ):
        with pytest.raises(ConfigError, match=match):
            experiment.solver("unmask", **options)
    with pytest.raises(ConfigError, match="Unmask writes masks"):
        build(*TRAINABLE["uniform cavity"]).solver("unmask")
    grouped = build(*TRAINABLE["grouped"])
    assert grouped.solver() == solvers.Grouped(grouped.process)
    made = grouped.solver("grouped", order="local", proximity=2.0, keep=False)
    assert made == solvers.Grouped(grouped.process, solvers.Local(2.0), keep=False)
    with pytest.raises(ConfigError, match="Confidence looks at what it says"):
        grouped.solver("grouped", order="confidence")
    cached = dataclasses.replace(grouped.config.sample, cache=True)
    with pytest.raises(ConfigError, match="keeps predictions, and Grouped runs"):
        build(dataclasses.replace(grouped.config, sample=cached), IMAGES)


WRONG = {
    r"config.process.name='maskd' is unknown; it is one of masked, uniform": (config("maskd"), IMAGES),
    r"config.process.options: kernel needs generator": (config("kernel"), IMAGES),
    r"config.process.options.generator: gaussian has no option 'width'; it takes reach, target": (
        config({"name": "kernel", "options": {"generator": "gaussian", "width": 2}}),
        IMAGES,
    ),
    r"config.process.options: 'counts' is not an option: it comes from the data": (
        config({"name": "spindle", "options": {"counts": [1, 2]}}),
        IMAGES,
    ),
    r"config.objective.name='genmd4' .* config.process.name='masked' has nothing to learn": (
        config(objective={"name": "genmd4"}),
        IMAGES,
    ),
    r"config.process.options: 'hybrid': uniform_share lies in": (
        config(process={"name": "hybrid", "options": {"uniform_share": 2.0}}),
        IMAGES,
    ),
    r"config.process.schedule='cosine': the process 'hybrid' has a schedule of its own": (
        config("hybrid", "cosine", "cavity"),
        IMAGES,
    ),
    r"config.process.schedule='x' is unknown; it is one of linear": (config(schedule="x"), IMAGES),
    r"config.denoiser.kind='v': the process 'masked' takes one of posterior": (config(kind="v"), IMAGES),
    r"'masked' corrupts tokens, but the data 'arrays' are continuous values; set config.data.tokens=True": (
        config(),
        FLOATS,
    ),
    r"'gaussian' corrupts continuous values, .* are tokens; set config.data.tokens=False": (gaussian(), IMAGES),
    r"config.denoiser.name='dit' is for images": (config(), TEXT),
    r"config.denoiser.name='text' is for token sequences": (config(denoiser={"name": "text"}), IMAGES),
    r"config.denoiser.name='ditt' is unknown": (config(denoiser={"name": "ditt"}), IMAGES),
    r"config.denoiser.options: DiT has no option 'widht'; did you mean 'width'\?": (
        config(denoiser={"options": {**SIZES, "widht": 3}}),
        IMAGES,
    ),
    r"config.denoiser.options: DiT needs width, depth, heads": (config(denoiser={"options": {}}), IMAGES),
    r"options.dtype='float8' is unknown; it is one of float32, bfloat16": (
        config(denoiser={"options": {**SIZES, "dtype": "float8"}}),
        IMAGES,
    ),
    r"config.objective.name='x' is unknown": (config(objective={"name": "x"}), IMAGES),
    r"config.objective.name: elbo has no option 'trange'; did you mean 't_range'": (
        config(objective={"options": {"trange": 1}}),
        IMAGES,
    ),
    r"has no option 'gama'": (
        gaussian(objective={"name": "gaussian", "options": {"weighting": "min_snr", "gama": 1}}),
        FLOATS,
    ),
    r"any_order is the masked process's bound": (
        config("uniform", kind="cavity", objective={"name": "any_order"}),
        IMAGES,
    ),
    r"config.objective.name: 'glauber': glauber tells noise from signal": (
        config("glauber", kind="cavity", objective={"name": "glauber"}),
        IMAGES,
    ),
    r"config.objective.name='block_elbo' is for networks in blocks": (
        config(objective={"name": "block_elbo"}),
        IMAGES,
    ),
    r"config.sample.steps=4 must be a multiple of the 3 blocks": (blocks(sample={"steps": 4}), TEXT),
    r"config.sample.grid='uniform': needs at least one part and a grid from 1 to 0": (
        blocks(sample={"steps": 6, "grid_options": {"end": 0.1}}),
        TEXT,
    ),
    r"goes with processes in continuous time, not with 'discretized_gaussian'": (
        blocks({"name": "discretized_gaussian", "options": {"steps": 4}}, "cavity", sample={"steps": 6}),
        TEXT,
    ),
    r"DiT has no option 'block'": (config(denoiser={"options": SIZES | {"block": 2}}), IMAGES),
    r"rate of condition dropout": (config(objective={"condition_dropout": 2.0}), IMAGES),
    r"config.sample.solver='rk5' is unknown; it is one of ancestral, ddim, heun": (
        config(sample={"solver": "rk5"}),
        IMAGES,
    ),
    r"config.sample.solver: 'ddim': DDIM is for processes.Gaussian, got Masked": (
        config(sample={"solver": "ddim"}),
        IMAGES,
    ),
    r"config.sample.grid: 'karras': karras is a grid of noise levels": (config(sample={"grid": "karras"}), IMAGES),
    r"config.sample.grid: uniform_log_snr needs start, end": (gaussian(sample={"grid": "uniform_log_snr"}), FLOATS),
    r"config.sample.grid='karras' repeats times under config.process.schedule='vp_cosine'": (
        gaussian(sample={"grid": "karras"}),
        FLOATS,
    ),
    r"schedule='linear'|Gaussian schedule|takes a": (gaussian(schedule="linear"), FLOATS),
    r"survival|Survival|takes a": (config(schedule="vp_linear"), IMAGES),
}


@pytest.mark.slow
@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_built_is_named(message):
    with pytest.raises(ValueError, match=message) as caught:
        build(*WRONG[message])
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_load_data(tmp_path):
    assert load_data(tiny.config(), "test").num_symbols == 17
    assert load_data(tiny.config(data={"tokens": False}), "test").levels is not None
    for options, message in (
        ({"size": 3}, "unknown option 'size'"),
        ({"split": "test"}, "'split' is not an option"),
        ({"valid_fraction": "x"}, r"config.data.options: "),
    ):
        with pytest.raises(ValueError, match=message):
            load_data(tiny.config(data={"options": options}), "train")
