"""What takes a Gaussian process takes an interpolant from Gaussian noise: the same numbers, and a refusal of others."""

import dataclasses
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ode_laws import stated

import ddjax
from ddjax import (
    around,
    boundary,
    codebooks,
    evolution,
    files,
    grids,
    guidance,
    inversion,
    names,
    policies,
    presets,
    retiming,
    retrieval,
    search,
    shifted_times,
    solvers,
    thresholding,
    transport,
)
from ddjax.config import ConfigError
from ddjax.evaluation.projection import projection_error
from ddjax.fixtures import GaussianMixture
from ddjax.gaussian_law import GaussianLaw
from ddjax.likelihood import discretised, mutual_information, nelbo, ode, pointwise_information
from ddjax.paths import Noise, Straight, Trigonometric
from ddjax.processes import Gaussian, Interpolant
from ddjax.processes.gaussian import schedule_of
from ddjax.schedules import CondOT, OUBridge, VPLinear
from ddjax.schedules import Trigonometric as Circle
from ddjax.schedules.base import Gaussian as GaussianSchedule
from ddjax.solvers import learned

KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Wide(GaussianSchedule):
    """alpha = 1 - t, sigma = 2 t: flow matching from normals twice as wide."""

    def alpha(self, t):
        """1 - t."""
        return 1.0 - t

    def sigma(self, t):
        """2 t."""
        return 2.0 * t

    def alpha_prime(self, t):
        """-1."""
        return jnp.full_like(t, -1.0)

    def sigma_prime(self, t):
        """2."""
        return jnp.full_like(t, 2.0)

    def time(self, log_snr):
        """(1 - t) / 2 t = exp(log_snr / 2)."""
        return 1.0 / (1.0 + 2.0 * jnp.exp(0.5 * jnp.asarray(log_snr)))


# An interpolant and what a network states of it; the Gaussian process that it is, its schedule written by itself.
PAIRS = {
    "straight": (Interpolant(Straight(), source_std=1.0), "velocity", Gaussian(CondOT()), "velocity"),
    "circle": (Interpolant(Trigonometric(), source_std=1.0, data_std=0.7), "x1", Gaussian(Circle(), 0.7), "noise"),
    "wide": (Interpolant(Straight(), source_std=2.0), "residual", Gaussian(Wide()), "v"),
    "bridge": (
        Interpolant(Straight(Noise(0.7)), source_std=1.0), "x1+score", Gaussian(OUBridge(0.0, 0.7, 0.7)), "score",
    ),
}  # fmt: skip
TIMES = np.asarray([0.9, 0.6, 0.3, 0.0])
X0 = np.random.default_rng(0).normal(size=(3, 2))
COND = np.asarray([0.5, -0.3, 0.0])
LAW = GaussianLaw(np.asarray([[0.2, -0.4]]), np.eye(2)[None], [[1.3, 0.2]], [0.0])


def drawn(process, denoise, solver, times=TIMES, **options):
    times = jnp.asarray(times, float)
    out = ddjax.sample(KEY, denoise, process, shape=(3, 2), solver=solver, times=times, **options)
    return out.x0, out.nfe


def shifted(p, d):
    return drawn(p, shifted_times.time_shifted(d, p, window=0.3, spread=0.4), solvers.DDIM(p))


def log_prob(x, t, cond):
    return -0.5 * ((x - cond[:, None]) ** 2).sum(1) * (1.0 - t)


def classified(p, d):
    return guidance.by_classifier(d, log_prob, p, scale=1.5, told=True)


def grids_of_noise_levels(p, d):
    steps = {"karras": {}, "exponential": {"sigma_max": 5.0}, "through": {"sigmas": (9.0, 2.0, 0.3, 0.0)}}
    steps["uniform_log_snr"] = {"start": -4.0, "end": 6.0}
    return [names.grid(p, name, "here", steps=4, **options) for name, options in steps.items()]


def laws(p, d):
    xt, t = jnp.asarray(X0), jnp.asarray([0.2, 0.5, 0.9])
    kinds = [LAW.denoise(p, kind)(xt, t).value for kind in ("x0", "velocity")]
    told = LAW.x0(p, xt, t), LAW.score(p, xt, t), LAW.flow(p, xt, t, t / 2), LAW.curved(p, jnp.sqrt, xt, t)
    return kinds, told, LAW.settled(p, 0.4), LAW.settling_time(p), LAW.sensitivity(p, 0.4)


def teleported(p, d):
    return drawn(p, d, solvers.Switched((solvers.Teleport(p, LAW), solvers.DDIM(p)), (0.6,)))


def searched(family):
    def run(p, d):
        options = {"shape": (6, 2), "times": TIMES, "fine": grids.uniform(8, start=0.9)}
        examples = search.fine_examples(KEY, d, p, **options)
        found = search.search(KEY, d, family(p), search.to_fine, examples, iterations=3, batch=4)
        made = found.solver
        own = made.coefficients.tree if isinstance(made, solvers.Learned) else getattr(made, "compensation", None)
        return examples, found.losses, found.times, own

    return run


def general(make):
    return searched(lambda p: search.General(learned.written_out(make(p), TIMES)))


def parallel(p, d):
    settings = {"shape": (3, 2), "times": jnp.asarray(TIMES), "window": 2, "tolerance": 0.5}
    return tuple(ddjax.sample_parallel(KEY, d, p, solver=solvers.DDIM(p, 0.5), **settings)[:3])


def best_noise(p, d):
    options = {"references": X0[:2], "solver": solvers.dpm_solver_pp(p), "times": jnp.asarray(TIMES)}
    return tuple(boundary.best_noise(KEY, d, p, candidates=4, **options))


def fitness(x):
    return -jnp.abs(x - 0.3).sum(1)


def evolved(p, d):
    return tuple(evolution.evolve(jax.random.key(2), fitness, (16, 2), steps=4, process=p))


def recorded(eta, **options):
    def run(p, d):
        made = inversion.record(KEY, d, p, X0, times=jnp.asarray(TIMES), solver=solvers.DDIM(p, eta), **options)
        again = inversion.edit(KEY, d, p, made, **({"lambda_2": 0.5} if eta else {}))
        return made.states, made.noise, again.x0

    return run


def transported(p, d):
    targets = transport.latents(KEY, p, X0, 0.6)
    step = transport.Transported(p, transport.fit(KEY, targets, iterations=20, batch=64), 0.6)
    return targets, drawn(p, d, solvers.Switched((step, solvers.DDIM(p)), (0.6,)))


def retrieved(p, d):
    settings = {"shape": (8, 2), "solver": solvers.DDIM(p), "times": jnp.asarray(TIMES)}
    base = retrieval.build(jax.random.key(1), d, p, **settings, early=1, late=2)
    return base.early.values, base.late.values, drawn(p, d, retrieval.redi(solvers.DDIM(p), base))


def rewarded(p, d):
    arms = [(solvers.DDIM(p), jnp.asarray(TIMES)), (solvers.unipc(p), jnp.asarray(TIMES[[0, 2, 3]]))]
    examples = search.fine_examples(KEY, d, p, shape=(4, 2), times=TIMES, fine=TIMES)
    return policies.rewards(KEY, d, p, arms, policies.near, examples, cost=0.01)


def coded(p, d):
    solver = solvers.DDIM(p, 1.0, noise=solvers.Codebook(seed=0, size=8))
    settings = {"solver": solver, "times": jnp.asarray(TIMES)}
    made = codebooks.encode(d, p, X0, **settings)
    return made.x0, made.codes.indices, codebooks.decode(d, p, made.codes, shape=X0.shape, **settings)


def clipped(p, d):
    return drawn(p, thresholding.dynamic(thresholding.static(d, p, low=-0.9), p, limit=0.6), solvers.dpm_solver_pp(p))


def regressed(p, d):
    return drawn(p, guidance.regressed(d, p, log_prob, scale=1.5), solvers.FirstOrder(p), cond=COND)


def likelihood(p, d):
    found = ode(KEY, d, p, X0, times=np.linspace(1.0, 0.0, 9))
    decoded = ode(KEY, d, p, X0, times=np.linspace(1.0, 0.1, 4), reconstruction=discretised((-1.0, 0.0, 1.0)))
    return found.log_prob, found.prior, found.volume, decoded.log_prob


def informed(p, d):
    options = {"without": None, "num_times": 3, "t_range": (0.1, 0.9)}
    return [f(KEY, d, p, X0, COND, **options).sites for f in (pointwise_information, mutual_information)]


PRESETS = ("ddpm", "unipc", "heun", "euler", "deis", "flow_match_heun", "edm_euler", "pndm")


def preset(name):
    def run(p, d):
        made = presets.diffusers(name)
        return made.times(p, 4), drawn(p, d, made.solver(p, 4), made.times(p, 4))

    return run


VP = Gaussian(VPLinear())


def retimed(p, d):
    """From another schedule, and to it."""
    vp = dataclasses.replace(VP, data_std=p.data_std)
    to = [drawn(p, retiming.retime(stated(vp, kind), vp, p), solvers.DDIM(p)) for kind in ("noise", "v")]
    return to, drawn(vp, retiming.retime(d, p, vp), solvers.DDIM(vp), times=[0.6, 0.3, 0.1])


def projected(p, d):
    xt = jnp.asarray([[0.4, -1.0], [0.1, 2.0]])
    return tuple(projection_error(d, p, jnp.asarray(X0), xt, jnp.asarray([0.3, 0.8])))


def mixture(p, d):
    denoise = GaussianMixture(2, 3).denoise(p, "velocity")
    return denoise(jnp.asarray(X0), jnp.asarray([0.2, 0.5, 0.9])).value


TOOLS = {
    "prior": lambda p, d: (p.prior((2, 2), 0.7).std, drawn(p, d, solvers.DDIM(p))),
    "grids": grids_of_noise_levels,
    "inner grid": lambda p, d: drawn(p, d, around.nested(p, "ddim", 2, inner_grid="karras")),
    "time_shifted": shifted,
    "laws": laws,
    "teleport": teleported,
    "general": general(solvers.dpm_solver_pp),
    "general, noisy": general(lambda p: solvers.DDIM(p, 1.0)),
    "learned grid": searched(lambda p: search.Grid(solvers.Heun(p), TIMES)),
    "compensation": searched(lambda p: search.Compensation(solvers.unipc(p), TIMES)),
    "parallel": parallel,
    "boundary": best_noise,
    "evolution": evolved,
    "inversion": recorded(0.0, iterations=2),
    "noise space": recorded(1.0),
    "transport": transported,
    "retrieval": retrieved,
    "policies": rewarded,
    "flow_turbo": lambda p, d: drawn(p, d, solvers.FlowTurbo(p, "HPP")),
    "codebooks": coded,
    "momentum": lambda p, d: drawn(p, d, solvers.Momentum(solvers.dpm_solver_pp(p), form="x0")),
    "thresholding": clipped,
    "by_classifier": lambda p, d: drawn(p, classified(p, d), solvers.unipc(p), cond=COND),
    "guided_mean": lambda p, d: drawn(p, classified(p, d), guidance.GuidedMean(p), cond=COND),
    "regressed": regressed,
    "likelihood": likelihood,
    "information": informed,
    "retimed": retimed,
    "projection": projected,
    "mixture": mixture,
    **{f"preset {name}": preset(name) for name in PRESETS},
}
FAST = {("projection", "wide")}
LEVELS = ("prior", "grids", "time_shifted", "laws", "parallel", "evolution", "transport", "likelihood", "retimed")
# Each on the straight path, and in turn on another; what asks for noise levels itself on that of another width too.
IN_TURN = itertools.cycle(("wide", "circle", "bridge"))
EVERY = {(name, pair) for name in TOOLS for pair in ("straight", next(IN_TURN))}
EVERY |= {(name, "wide") for name in (*LEVELS, "projection", "mixture")}
# Heun's noise at entry 0 is the rounding of x_t - alpha x_0 over sigma, which is 7e-11 on the bridge.
EVERY = EVERY - {("preset heun", "bridge")} | {("preset heun", "circle")}
EVERY = [case for case in itertools.product(TOOLS, PAIRS) if case in EVERY]


@pytest.fixture(autouse=True)
def nothing_stays():
    """Every case compiles functions of its own, which JAX would keep."""
    yield
    jax.clear_caches()


@pytest.mark.parametrize(
    ("name", "pair"), [case if case in FAST else pytest.param(*case, marks=pytest.mark.slow) for case in EVERY]
)
def test_it_gives_what_it_gives_of_the_gaussian_process(x64, name, pair):
    interpolant, kind, gaussian, other = PAIRS[pair]
    found = TOOLS[name](interpolant, stated(interpolant, kind))
    expected = TOOLS[name](gaussian, stated(gaussian, other))
    found, expected = jax.tree.leaves(found), jax.tree.leaves(expected)
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert np.isfinite(b).all()
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9)


# -- what is none -------------------------------------------------------------------------------------------------

GIVEN, NOISY = Interpolant(), Interpolant(Straight(Noise(0.7)))
SAID = stated(Gaussian(CondOT()), "x0")
NEAR = transport.Brenier(jnp.asarray(X0), jnp.zeros(3))
RUN = SimpleNamespace(experiment=None, process=GIVEN)
REFUSED = {
    "schedule": schedule_of,
    "time_shifted": lambda p: shifted_times.time_shifted(SAID, p),
    "laws": LAW.denoise,
    "settling time": LAW.settling_time,
    "levels of a law": lambda p: LAW.settled(p, 0.5),
    "teleport": lambda p: solvers.Teleport(p, LAW),
    "preconditioned": lambda p: solvers.Preconditioned(solvers.Heun(p), solvers.LevenbergMarquardt(1.0, 0.1)),
    "written out": lambda p: learned.written_out(solvers.Ancestral(p), TIMES),
    "search": lambda p: search.for_run(SimpleNamespace(experiment=None, process=p), KEY, steps=3),
    "boundary": lambda p: boundary.best_noise(KEY, SAID, p, references=X0, solver=solvers.Heun(p), times=TIMES),
    "evolution": lambda p: evolution.Evolution(p, fitness)(X0, jnp.ones(3)),
    "transport": lambda p: transport.Transported(p, NEAR, 0.5),
    "targets": lambda p: transport.latents(KEY, p, X0, 0.5),
    "guided_mean": guidance.GuidedMean,
    "first_order": solvers.FirstOrder,
    "likelihood": lambda p: ode(KEY, SAID, p, X0),
    "information": lambda p: pointwise_information(KEY, SAID, p, X0, COND),
    "retimed from": lambda p: retiming.retime(SAID, p, VP),
    "retimed to": lambda p: retiming.retime(SAID, VP, p),
    "projection": lambda p: projection_error(SAID, p, X0, X0, jnp.full(3, 0.5)),
    "preset": lambda p: presets.diffusers("unipc").solver(p, 4),
    "preset's grid": lambda p: presets.edm().times(p, 4),
    "inner grid": lambda p: around.nested(p, "heun", inner_grid="karras"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_interpolant_from_other_data_is_none(name):
    for process in (GIVEN, NOISY):
        with pytest.raises(ValueError, match="x1 of this interpolant comes with the data"):
            REFUSED[name](process)


def test_grids_of_times_and_windows_of_known_noise_are_for_all(x64):
    assert names.grid(GIVEN, "uniform", "here", steps=2).tolist() == [1.0, 0.5, 0.0]
    with pytest.raises(ConfigError, match=r"here='karras' is a grid of noise levels: .* comes with the data"):
        names.grid(GIVEN, "karras", "here", steps=2)
    with pytest.raises(ConfigError, match="is a grid of noise levels"):
        names.grid(ddjax.processes.Masked(3), "karras", "here", steps=2)
    settings = {"shape": (3, 2), "times": jnp.asarray(TIMES), "window": 2, "init": jnp.asarray(X0)}
    with pytest.raises(ValueError, match=r"Interpolant has no Gaussian schedule.*give scale"):
        ddjax.sample_parallel(KEY, SAID, GIVEN, solver=solvers.Heun(GIVEN), **settings)


def test_what_the_steps_of_an_interpolants_own_are_not():
    own = PAIRS["bridge"][0]
    with pytest.raises(ValueError, match=r"own correlation.*start from DDIM"):
        learned.written_out(solvers.Ancestral(own), TIMES)
    with pytest.raises(ValueError, match="evaluates the network more than once"):
        learned.written_out(solvers.Heun(own), TIMES)
    with pytest.raises(ValueError, match="Interpolant has no bound on the likelihood"):
        nelbo(KEY, SAID, own, X0, num_times=2)
    with pytest.raises(ValueError, match="data_std must be positive"):
        Interpolant(source_std=1.0, data_std=0.0)
    with pytest.raises(ValueError, match=r"retime is for processes\.Gaussian, got Masked"):
        retiming.retime(SAID, ddjax.processes.Masked(3), VP)


def test_a_searched_sampler_is_saved_for_the_interpolant(tmp_path):
    """Under a description that another Python process gives too; another path's is another."""
    own, path = PAIRS["bridge"][0], tmp_path / "s.json"
    made = learned.written_out(solvers.DDIM(own), TIMES)
    learned.save(path, made)
    assert learned.load(path, own) == made
    assert "0x" not in files.described(own)
    assert "ddjax.processes.interpolant.markov" in files.described(own)
    with pytest.raises(ValueError, match="is a sampler of the process FromSource"):
        learned.load(path, PAIRS["straight"][0])


# -- from a config ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_samples_and_searches_as_that_of_the_gaussian_process(monkeypatch):
    """The same network under both names, on grids of noise levels."""
    import test_names

    from ddjax.experiment import build
    from ddjax.run import Run

    monkeypatch.setattr("ddjax.loading.load_data", lambda config, split: test_names.FLOATS)
    grid = {"grid": "karras", "grid_options": {"sigma_max": 9.0, "sigma_min": 0.1}}
    found = []
    for of_process, objective in ((("interpolant", None), "interpolant"), (("gaussian", "cond_ot"), "gaussian")):
        config, data = test_names.config(*of_process, "velocity", objective, "dpm_solver_pp")
        config = dataclasses.replace(config, process=dataclasses.replace(config.process, data_std=0.6))
        experiment = build(dataclasses.replace(config, sample=dataclasses.replace(config.sample, **grid)), data)
        assert experiment.times()[0] < 0.95
        params = jax.tree.map(lambda a: a + 0.02, jax.jit(experiment.init)(KEY))
        run = Run(experiment, params, 0)
        options = {"num": 4, "fine_steps": 8, "iterations": 2, "batch": 4}
        report = search.for_run(run, KEY, steps=3, guidance=2.0, **options)
        samples = [run.sample(KEY, 3, cond=1, guidance=2.0, solver=solver) for solver in (None, report.solver)]
        nested = {"solver": "nested", "solver_options": {"solver": "ddim", "inner_grid": "karras"}}
        samples.append(run.sample(KEY, 3, cond=1, **nested))
        found.append((experiment.times(), samples, report.before, report.after, report.found.losses))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
