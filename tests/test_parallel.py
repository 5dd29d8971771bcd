"""Parallel sampling over time: it is the sequential sampler, what a tolerance costs and saves, devices."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ode_laws import Pair, pair

import ddjax
from ddjax import grids, guidance, solvers
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian, InBasis, Interpolant, Masked, Orthogonal, Product
from ddjax.schedules import EDM, VE, CondOT, VPCosine
from ddjax.solvers import DDIM, Ancestral, EulerMaruyama, Heun
from ddjax.training.mesh import make_mesh

KEY, STEPS = jax.random.key(0), 12


def parallel(process, solver, denoise=None, batch=3, window=5, tolerance=0.0, times=None, **options):
    denoise, times = Pair(process) if denoise is None else denoise, grids.uniform(STEPS) if times is None else times
    settings = {"shape": (batch, 2), "solver": solver, "times": times, "window": window, "tolerance": tolerance}
    return ddjax.sample_parallel(KEY, denoise, process, **settings, **options)


def both(process, solver, denoise=None, batch=3, window=5, tolerance=0.0, times=None, **options):
    """The sequential sample and the parallel one."""
    found = parallel(process, solver, denoise, batch, window, tolerance, times, **options)
    denoise, times = Pair(process) if denoise is None else denoise, grids.uniform(STEPS) if times is None else times
    options.pop("scale", None)
    return ddjax.sample(KEY, denoise, process, shape=(batch, 2), solver=solver, times=times, **options), found


SOLVERS = {
    "ddim": DDIM,
    "ancestral": Ancestral,
    "heun": Heun,
    "ddim-eta": lambda process: DDIM(process, eta=0.5),
    "euler-maruyama": EulerMaruyama,
    "rk4": solvers.rk4,
    "2s-ancestral": solvers.dpm_solver_pp_2s_ancestral,
    "predictor-corrector": solvers.predictor_corrector,
}
FAST = {("ancestral", "VPCosine"), ("heun", "CondOT")}


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        pytest.param(name, s, marks=[] if (name, type(s).__name__) in FAST else [pytest.mark.slow])
        for name in SOLVERS
        for s in (VPCosine(), CondOT(), EDM(), VE())
    ],
    ids=lambda v: v if isinstance(v, str) else type(v).__name__,
)
def test_without_tolerance_it_is_the_sequential_sampler(x64, name, schedule):
    """Every state of the path; each example in its own window, in at most as many rounds as steps."""
    process = Gaussian(schedule)
    plain, found = both(process, SOLVERS[name](process), trajectory=True)
    scale = np.abs(plain.trajectory).max()
    np.testing.assert_allclose(found.trajectory, plain.trajectory, rtol=0, atol=1e-12 * scale)
    np.testing.assert_array_equal(found.x0, found.trajectory[-1])
    assert (np.asarray(found.rounds) <= STEPS).all()
    assert (np.asarray(found.nfe) >= np.asarray(plain.nfe)).all()


@pytest.mark.slow
def test_a_window_of_one_is_the_sequential_sampler_at_its_cost():
    process = Gaussian(CondOT())
    plain, found = both(process, Heun(process), window=1)
    np.testing.assert_array_equal(found.x0, plain.x0)
    np.testing.assert_array_equal(found.nfe, plain.nfe)
    np.testing.assert_array_equal(found.rounds, STEPS)


@pytest.mark.slow
def test_rounds_and_evaluations_by_hand(x64):
    """A field that does not depend on the state: the first iteration of a window is right, the second sees it."""
    process = Gaussian(CondOT())
    field = lambda xt, t, cond=None: Prediction(jnp.sin(3.0 * t)[:, None] * jnp.ones_like(xt), "velocity")
    # Windows of 5 of 12 steps: made and left to 1, where all moved; to 6, right; to 7, new guesses moved; to 12.
    times = grids.uniform(STEPS, end=0.1)  # into sigma = 0 no error is allowed, not the last bit's
    options = {"tolerance": 1e-6, "times": times}
    plain, found = both(process, solvers.euler(process), field, trajectory=True, **options)
    np.testing.assert_allclose(found.trajectory, plain.trajectory, rtol=0, atol=1e-13)
    np.testing.assert_array_equal(found.rounds, 4)
    np.testing.assert_array_equal(found.nfe, 5 + 5 + 5 + 5)
    # A window as long as the grid: one round to make it, one to see that it is right.
    _, whole = both(process, solvers.euler(process), field, window=50, **options)
    np.testing.assert_array_equal(whole.rounds, 2)
    np.testing.assert_array_equal(whole.nfe, STEPS + STEPS - 1)


def picard(step, x, steps, window, allowed):
    """The published loop (Shih et al. 2023, algorithm 1; the authors' indices) in NumPy, for one example."""
    states, begin, rounds = np.stack([x] * (steps + 1)), 0, 0
    while begin < steps:
        end, rounds = min(begin + window, steps), rounds + 1
        drift = np.stack([step(states[i], i) - states[i] for i in range(begin, end)])
        new = states[begin] + np.cumsum(drift, axis=0)
        error = ((new - states[begin + 1 : end + 1]) ** 2).mean(axis=-1)
        bad = np.append(error > allowed[begin + 1 : end + 1], True)
        states[begin + 1 : end + 1] = new
        begin = begin + min(1 + int(np.argmax(bad)), end - begin)
        states[end:] = states[end]
    return states, rounds


@pytest.mark.parametrize("tolerance", [0.3, pytest.param(0.05, marks=pytest.mark.slow)])
def test_it_is_the_published_algorithm(x64, tolerance):
    """With its tolerance, for a random sampler: noise drawn beforehand, errors by the variance of the leaving step."""
    process, steps = Gaussian(VPCosine()), 30
    times = np.asarray(grids.uniform(steps))
    noise = np.random.default_rng(1).normal(size=(steps, 1, 2))
    init = np.random.default_rng(2).normal(size=(1, 2))
    alpha, sigma = (np.asarray(f(jnp.asarray(times))) for f in (process.schedule.alpha, process.schedule.sigma))
    ratio = (alpha[:-1] * sigma[1:] / (sigma[:-1] * alpha[1:])) ** 2
    variance = sigma[1:] ** 2 * (1 - ratio)

    def step(x, i):
        x0 = pair(np, x, alpha[i], sigma[i])
        eps = (x - alpha[i] * x0) / sigma[i]
        return alpha[i + 1] * x0 + np.sqrt(sigma[i + 1] ** 2 - variance[i]) * eps + np.sqrt(variance[i]) * noise[i, 0]

    states, rounds = picard(step, init[0], steps, 8, tolerance**2 * np.append(variance, 0.0))
    found = ddjax.sample_parallel(
        KEY, Pair(process), process, shape=(1, 2), solver=Recorded(process, Frozen(noise)), times=jnp.asarray(times),
        window=8, tolerance=tolerance, init=jnp.asarray(init), trajectory=True,
    )  # fmt: skip
    np.testing.assert_allclose(found.trajectory[:, 0], states, rtol=0, atol=1e-10)
    assert int(found.rounds[0]) == rounds < steps


@dataclasses.dataclass(frozen=True)
class Frozen:
    """An array by identity."""

    values: np.ndarray

    def __hash__(self):
        return id(self)

    def __eq__(self, other):
        return self is other


@dataclasses.dataclass(frozen=True)
class Recorded:
    """DDPM's step with recorded noise, found by the time: without a memory."""

    process: Gaussian
    noise: Frozen

    def init(self, xt, cond=None):
        return ()

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        law = self.process.reverse(denoise(xt, t, cond), xt, s, t)
        values = jnp.asarray(self.noise.values)
        number = jnp.round((1.0 - t) * values.shape[0]).astype(int)
        return law.mean + law.std * values[number, 0], carry, solvers.Info(jnp.ones(xt.shape[0], jnp.int32))


@pytest.mark.slow
def test_errors_fall_with_the_tolerance_and_rounds_grow(x64):
    process = Gaussian(VPCosine())
    errors, rounds, times = [], [], grids.uniform(60)
    for tolerance in (1.0, 0.1, 0.01):
        plain, found = both(process, DDIM(process), batch=8, window=60, tolerance=tolerance, times=times)
        errors.append(np.abs(found.x0 - plain.x0).max())
        rounds.append(float(found.rounds.mean()))
    assert errors[0] > 3 * errors[1] > 9 * errors[2], errors
    assert rounds[0] < rounds[1] < rounds[2] < 30, rounds


@pytest.mark.slow
def test_examples_do_not_depend_on_their_neighbours():
    """Bit for bit with 1, 2 and 7 beside each other: samples, rounds, evaluations; some are done long before others."""
    process = Gaussian(VPCosine())
    stiff = lambda xt, t, cond: Prediction(jnp.tanh(cond[:, None] * xt), "v")
    cond = jnp.asarray([0.01, 30.0, 0.3, 3.0, 10.0, 0.0, 1.0])
    settings = {"solver": Ancestral(process), "times": grids.uniform(STEPS), "window": 6, "tolerance": 0.1}
    run = lambda rows: ddjax.sample_parallel(
        KEY, stiff, process, shape=(len(rows), 2), cond=cond[rows], rows=rows, trajectory=True, **settings
    )
    whole = run(jnp.arange(7))
    assert len(set(map(int, whole.rounds))) > 2
    for rows in ([1], [4, 1]):
        part = run(jnp.asarray(rows))
        for name in ("x0", "rounds", "nfe"):
            np.testing.assert_array_equal(getattr(part, name), np.asarray(getattr(whole, name))[rows])
        np.testing.assert_array_equal(part.trajectory, np.asarray(whole.trajectory)[:, rows])


def test_conditions_guidance_known_sites_and_grids_of_each_example(x64):
    process = Gaussian(CondOT())

    def labelled(xt, t, cond=None):
        return Prediction(jnp.tanh(xt + cond[:, None]), "x0")

    denoise = guidance.classifier_free(labelled, null=0.0, scale=2.0)
    cond, times = jnp.asarray([0.5, -1.0]), jnp.asarray([[1.0, 0.7, 0.4, 0.1, 0.0], [0.9, 0.9, 0.3, 0.0, 0.0]])
    observed = ddjax.Observed(jnp.asarray([[True, False]] * 2), jnp.full((2, 2), 0.25))
    options = {"cond": cond, "observed": observed, "trajectory": True, "init": jnp.ones((2, 2))}
    plain, found = both(process, Ancestral(process), denoise, batch=2, window=3, times=times, **options)
    np.testing.assert_allclose(found.trajectory, plain.trajectory, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(found.x0[:, 0], 0.25)
    np.testing.assert_array_equal(plain.nfe, [8, 4])


@pytest.mark.slow
def test_processes_in_a_basis_and_interpolants(x64):
    turned = InBasis(Gaussian(CondOT()), Orthogonal(np.asarray([[0.6, -0.8], [0.8, 0.6]])))
    joined = Interpolant(source_std=1.0)
    for process, scale in ((turned, None), (joined, jnp.full(STEPS, 0.1))):
        field = lambda xt, t, cond=None: Prediction(jnp.sin(xt), "velocity")
        for tolerance, atol in ((0.0, 1e-12), (0.01, 0.01)):
            plain, found = both(process, Heun(process), field, tolerance=tolerance, scale=scale)
            np.testing.assert_allclose(found.x0, plain.x0, rtol=0, atol=atol)


NUMBERS = Product({"a": Gaussian(VPCosine()), "b": Gaussian(CondOT())})


def joined(xt, t, cond=None):
    """Each part is told the other."""
    a, b = xt["a"], xt["b"]
    return Prediction({"a": jnp.tanh(a + b.sum(-1, keepdims=True)), "b": jnp.tanh(b - a[:, :1])}, "x0")


@pytest.mark.slow
def test_parts_are_made_at_once_each_measured_by_its_own_noise(x64):
    """The sequential sampler's path; with a tolerance the part that needs more rounds decides."""
    shape, solver = {"a": (3, 2), "b": (3, 4)}, solvers.Parts(NUMBERS, {"b": DDIM(NUMBERS["b"])})
    known = jax.tree.map(lambda one: jnp.zeros(one, bool).at[:, 0].set(True), shape, is_leaf=lambda v: type(v) is tuple)
    observed = ddjax.Observed(known, jax.tree.map(lambda mask: jnp.full(mask.shape, 0.25), known))
    settings = {"shape": shape, "solver": solver, "times": grids.uniform(STEPS), "observed": observed}
    plain = ddjax.sample(KEY, joined, NUMBERS, trajectory=True, **settings)
    run = functools.partial(ddjax.sample_parallel, KEY, joined, NUMBERS, window=5, **settings)
    found = run(tolerance=0.0, trajectory=True)
    for name in shape:
        np.testing.assert_allclose(found.trajectory[name], plain.trajectory[name], rtol=0, atol=1e-12)
        np.testing.assert_array_equal(found.x0[name], found.trajectory[name][-1])
    scales = [{"a": jnp.full(STEPS, a), "b": jnp.full(STEPS, b)} for a, b in ((1e9, 1e9), (0, 1e9), (1e9, 0), (0, 0))]
    lax, a, b, strict = (np.asarray(run(tolerance=1.0, scale=scale).rounds) for scale in scales)
    np.testing.assert_array_equal(lax, 3)  # 12 steps by 5
    assert (a > lax).all()
    assert (b > lax).all()
    np.testing.assert_array_equal(strict, found.rounds)


WIDE = np.random.default_rng(0).normal(size=(3, 37)).astype(np.float32) / 6.0


@pytest.mark.parametrize(("batch", "window"), [(1, 16), pytest.param(2, 16, marks=pytest.mark.slow)])
def test_a_window_over_eight_devices(batch, window):
    """The same samples; each device's part of the network is an eighth of the window, in the program itself."""
    process = Gaussian(CondOT())
    sharding = NamedSharding(make_mesh({"window": 8}), PartitionSpec("window"))
    network = lambda xt, t, cond=None: Prediction(jnp.tanh(xt @ WIDE) @ WIDE.T, "velocity")
    settings = {"shape": (batch, 3), "solver": DDIM(process), "times": grids.uniform(16), "tolerance": 0.01}
    run = lambda key, sharding: ddjax.sample_parallel(
        key, network, process, **settings, window=window, sharding=sharding, trajectory=True
    )
    plain, split = run(KEY, None), run(KEY, sharding)
    np.testing.assert_allclose(split.trajectory, plain.trajectory, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(split.nfe, plain.nfe)
    np.testing.assert_array_equal(split.rounds, plain.rounds)

    def widths(sharding):
        """How many states the products with the network's matrix have, on one device."""
        program = jax.jit(lambda key: run(key, sharding)).lower(KEY).compile().as_text()
        return {int(rows) for rows in re.findall(r"f32\[(\d+),37\]", program)} - {3}

    assert widths(None) == {batch * window}
    assert widths(sharding) == {batch * window // 8}
    with pytest.raises(ValueError, match="do not divide over the devices"):
        ddjax.sample_parallel(KEY, network, process, **settings, window=5, sharding=sharding)


def test_errors():
    process = Gaussian(CondOT())
    run = lambda **options: parallel(process, DDIM(process), **options)
    for window in (0, -1):
        with pytest.raises(ValueError, match="window"):
            run(window=window)
    with pytest.raises(ValueError, match="tolerance must not be negative"):
        run(tolerance=-0.1)
    remember = (
        solvers.dpm_solver_pp(process),
        DDIM(process, eta=1.0, noise=solvers.Given(np.zeros((STEPS, 3, 2)))),
        EulerMaruyama(process, noise=solvers.Brownian(process)),
    )
    for solver in remember:
        with pytest.raises(ValueError, match=f"{type(solver).__name__} carries"):
            parallel(process, solver)
    tokens = Masked(3)
    settings = {"shape": (1, 2), "times": grids.uniform(2), "window": 2}
    with pytest.raises(ValueError, match="Masked has tokens"):
        ddjax.sample_parallel(KEY, Pair(process), tokens, solver=Ancestral(tokens), **settings)
    parts = {**settings, "shape": {"a": (1, 2), "b": (1, 4)}}
    with pytest.raises(ValueError, match=r"scale must be of the state's parts \(a, b\)"):
        ddjax.sample_parallel(KEY, joined, NUMBERS, solver=solvers.Parts(NUMBERS), scale=jnp.ones(2), **parts)
    mixed = Product({"a": Gaussian(), "b": Masked(3)})
    with pytest.raises(ValueError, match="part 'b', Masked, has tokens"):
        ddjax.sample_parallel(KEY, joined, mixed, solver=solvers.Parts(mixed), **parts)
    joins = Interpolant()
    with pytest.raises(ValueError, match=r"Interpolant has no Gaussian schedule.*give scale"):
        ddjax.sample_parallel(KEY, Pair(process), joins, solver=Heun(joins), **settings)
    with pytest.raises(ValueError, match="scale has shape"):
        ddjax.sample_parallel(KEY, Pair(process), process, solver=DDIM(process), scale=jnp.ones(3), **settings)
