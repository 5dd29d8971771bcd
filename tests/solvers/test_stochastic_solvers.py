"""Stochastic solvers: weak and strong orders, exact laws, published recurrences, both ends, batches."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ode_laws import check_rows_are_their_own

import ddjax
from ddjax import grids, random, solvers
from ddjax.predictions import Prediction
from ddjax.processes import PFGM, Gaussian, Masked
from ddjax.schedules import EDM, VE, CondOT, VPCosine, VPLinear
from ddjax.solvers import (
    DDIM,
    Brownian,
    Churned,
    EulerMaruyama,
    Fresh,
    Given,
    Heun,
    Interval,
    Langevin,
    PredictorCorrector,
    Restart,
    StepsDown,
    Window,
    heun_in_noise,
    sa_solver,
    sde_dpm_solver_pp,
)

MEAN, VARIANCE = 0.7, 0.3  # of the data whose law is followed exactly
TWO_S = solvers.dpm_solver_pp_singlestep
# A solver of a process and a source of noise; its weak order, and whether x0 alone makes it exact.
SOLVERS = {
    "sde_1": (lambda p, z: sde_dpm_solver_pp(p, 1, noise=z), 1, True),
    "sde_2m": (lambda p, z: sde_dpm_solver_pp(p, 2, noise=z), 2, True),
    "sa_2": (lambda p, z: sa_solver(p, 2, eta=1.0, noise=z), 2, True),
    "sde_2m_exact": (lambda p, z: sde_dpm_solver_pp(p, 2, slope="exact", noise=z), 2, True),
    "sde_2m_eta": (lambda p, z: sde_dpm_solver_pp(p, 2, eta=0.5, noise=z), 2, True),
    "sde_3m": (lambda p, z: sde_dpm_solver_pp(p, 3, noise=z), 2, True),
    "sa_1": (lambda p, z: sa_solver(p, 1, eta=1.0, noise=z), 2, True),
    "sa_3": (lambda p, z: sa_solver(p, 3, eta=1.0, noise=z), 2, True),
    "sa_window": (lambda p, z: sa_solver(p, 2, noise=z), 2, True),
    "sa_predictor": (lambda p, z: sa_solver(p, 2, eta=2.0, corrector=False, noise=z), 2, True),
    "euler_ancestral": (lambda p, z: DDIM(p, 1.0, z), 1, True),
    "euler_ancestral_eta": (lambda p, z: StepsDown(DDIM(p), 0.5, z), 1, True),
    "2s_ancestral": (lambda p, z: StepsDown(TWO_S(p, 2), 1.0, z), 2, True),
    "heun_ancestral": (lambda p, z: StepsDown(heun_in_noise(p), 0.7, z), 2, True),
    "euler_maruyama": (lambda p, z: EulerMaruyama(p, noise=z), 1, False),
    "euler_maruyama_eta": (lambda p, z: EulerMaruyama(p, 0.5, z), 1, False),
    "churned": (lambda p, z: Churned(heun_in_noise(p), 0.2, high=30.0, noise=z), None, True),
    "restart": (lambda p, z: Restart(DDIM(p), ((0.7, 3.0, 3, 2),), z), None, True),
    "corrected": (lambda p, z: PredictorCorrector(DDIM(p), Langevin(p, 0.1, 2, "level", z)), None, False),
    "corrected_norms": (lambda p, z: PredictorCorrector(DDIM(p), Langevin(p, 0.1, noise=z)), None, False),
}
FEW = ("sde_2m",)
every_solver = pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in SOLVERS]
)
of_order = pytest.mark.parametrize(
    "name",
    [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n, v in SOLVERS.items() if v[1]],
)
exact_in_x0 = pytest.mark.parametrize(
    "name",
    [n if n == "restart" else pytest.param(n, marks=pytest.mark.slow) for n, v in SOLVERS.items() if v[2]],
)


def levels(process, t):
    return (float(f(jnp.asarray(t))) for f in (process.schedule.alpha, process.schedule.sigma))


def normal_data(process, variance=VARIANCE):
    """E[x0 | x_t] of data N(MEAN, variance)."""

    def denoise(x, t, cond=None):
        t = t[:, None]
        alpha, sigma = process.schedule.alpha(t), process.schedule.sigma(t)
        gain = alpha * variance / (alpha**2 * variance + sigma**2)
        return Prediction(MEAN + gain * (x - alpha * MEAN), "x0")

    return denoise


def pair(process):
    """E[x0 | x_t] of +-0.8 with normals of std 0.5 around them."""

    def denoise(x, t, cond=None):
        t = t.reshape(-1, *[1] * (x.ndim - 1))
        alpha, sigma = process.schedule.alpha(t), process.schedule.sigma(t)
        total = 0.25 * alpha**2 + sigma**2
        return Prediction((0.25 * alpha * x + 0.8 * sigma**2 * jnp.tanh(0.8 * alpha * x / total)) / total, "x0")

    return denoise


def walk(step, carry, times, x, keys=None):
    """The last state and the evaluations, by one compiled step for all grids; keys as `sample` makes them."""
    nfe = 0
    for i, (t, s) in enumerate(itertools.pairwise(jnp.asarray(times))):
        own = None if keys is None else random.fold_in(keys, i)
        x, carry, info = step(own, carry, x, t, s)
        nfe = nfe + np.asarray(info.nfe)
    return x, nfe


def compiled(solver, denoise):
    return jax.jit(lambda keys, carry, x, t, s: solver.step(keys, carry, x, t, s, denoise))


@functools.cache
def sources(draws):
    """Row 0 has no noise, row 1 that of the start, row 2 + k the k-th draw: the output is linear in them."""
    z = np.zeros((draws, 2 + draws, 1))
    z[np.arange(draws), 2 + np.arange(draws), 0] = 1.0
    return Given(z)


def law(process, make, grids_of_times, draws, variance=VARIANCE):
    """Mean and variance of what comes out, exactly, of normal data noised to the first time; for each grid."""
    noise = sources(draws)
    solver = make(process, noise)
    step = compiled(solver, normal_data(process, variance))
    for times in grids_of_times:
        alpha, sigma = levels(process, times[0])
        x = np.full((2 + draws, 1), alpha * MEAN)
        x[1] += np.sqrt(alpha**2 * variance + sigma**2)
        keys = random.example_keys(jax.random.key(0), 2 + draws)  # of no use but to be folded
        x, _ = walk(step, solver.init(jnp.asarray(x)), times, jnp.asarray(x), keys)
        yield float(x[0, 0]), float(((x[1:] - x[0]) ** 2).sum())


@pytest.mark.parametrize(
    "schedule", [VPCosine(), *(pytest.param(s, marks=pytest.mark.slow) for s in (CondOT(), EDM(4.0)))], ids=repr
)
@of_order
def test_weak_order_on_normal_data(x64, schedule, name):
    """Mean and variance of the law, without any sampling: their error falls by 2^order when the steps double."""
    make, order, _ = SOLVERS[name]
    process, start, end, most = Gaussian(schedule), 0.85, 0.3, 128
    counts = (most // 4, most // 2, most)
    alpha, sigma = levels(process, end)
    errors = [
        max(abs(mean - alpha * MEAN), abs(variance - alpha**2 * VARIANCE - sigma**2))
        for mean, variance in law(process, make, [np.linspace(start, end, n + 1) for n in counts], most)
    ]
    slopes = np.log2(np.array(errors[:-1]) / errors[1:])
    print("weak", name, schedule, order, slopes, errors)
    # Here the third order still outweighs the second, or one is of the other sign.
    more = np.inf if name in ("sa_2", "sa_3", "sa_window", "sde_3m") else 0.35
    assert order - 0.35 < slopes[1] < order + more, (slopes, errors)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [VPCosine(), EDM(4.0)], ids=repr)
def test_weak_order_of_churn(x64, schedule):
    """S_churn shared among the steps: the forward kernel is exact, so the order is Heun's."""
    process, errors = Gaussian(schedule), []
    alpha, sigma = levels(process, 0.3)
    for n in (16, 32, 64):
        make = lambda p, z, n=n: Churned(heun_in_noise(p), 2.0 / n, noise=z)
        ((mean, variance),) = law(process, make, [np.linspace(0.85, 0.3, n + 1)], n)
        errors.append(max(abs(mean - alpha * MEAN), abs(variance - alpha**2 * VARIANCE - sigma**2)))
    slopes = np.log2(np.array(errors[:-1]) / errors[1:])
    print("churn", schedule, slopes, errors)
    assert 1.7 < slopes[1] < 2.3, (slopes, errors)


@exact_in_x0
def test_points_have_the_right_law_after_any_steps(x64, name):
    """Data at one point: x0 is constant, and the law of the state is exact, whatever eta, churn and restarts."""
    process, times = Gaussian(CondOT()), [0.9, 0.6, 0.5, 0.35, 0.1]
    ((mean, variance),) = law(process, SOLVERS[name][0], [times], 8, variance=0.0)
    alpha, sigma = levels(process, times[-1])
    np.testing.assert_allclose((mean, variance), (alpha * MEAN, sigma**2), rtol=1e-10)


@pytest.mark.parametrize("name", ["sde_2m", *(pytest.param(n, marks=pytest.mark.slow) for n in ("sde_1", "sa_2"))])
def test_one_path_for_all_grids(x64, name):
    """Where x0 is constant, many steps along a Brownian path end where one step does."""
    process = Gaussian(CondOT())
    solver = SOLVERS[name][0](process, Brownian(process))
    denoise = lambda x, t, cond=None: Prediction(jnp.full_like(x, MEAN), "x0")
    step, x, ends = compiled(solver, denoise), jnp.asarray([[0.5, -1.0], [2.0, 0.3]]), []
    keys = random.example_keys(jax.random.key(3), 2)
    for times in ([0.9, 0.2], [0.9, 0.61, 0.6, 0.37, 0.2], np.linspace(0.9, 0.2, 12)):
        ends.append(walk(step, solver.init(x), times, x, keys)[0])
    np.testing.assert_allclose(ends[1], ends[0], rtol=1e-9)
    np.testing.assert_allclose(ends[2], ends[0], rtol=1e-9)
    alpha, sigma = levels(process, 0.2)
    assert np.unique(np.round(np.asarray(ends[0]), 6)).size == 4
    assert np.abs(ends[0] - alpha * MEAN).max() > 0.3 * sigma


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "order"),
    # All of them see the path by its increments alone, one for each step: no more than order 1 is to be had.
    [
        (name, 1.0)
        for name in (
            *("sde_1", "sde_2m", "sde_2m_exact", "sde_3m", "sa_1", "sa_2", "sa_3"),
            *("euler_ancestral", "euler_maruyama"),
        )
    ],
)
def test_strong_order_on_a_mixture(x64, name, order):
    """Root mean square distance to a fine solution along the same path."""
    process = Gaussian(VPCosine())
    keys = random.example_keys(jax.random.key(1), 64)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 8)))

    def solve(name, counts):
        solver = SOLVERS[name][0](process, Brownian(process, depth=24))
        step = compiled(solver, pair(process))
        return [np.asarray(walk(step, solver.init(x), np.linspace(0.85, 0.3, n + 1), x, keys)[0]) for n in counts]

    (fine,) = solve("sde_2m", [1024])
    errors = [np.sqrt(np.mean((end - fine) ** 2)) for end in solve(name, (16, 32, 64))]
    slopes = np.log2(np.array(errors[:-1]) / errors[1:])
    print("strong", name, slopes, errors)
    assert order - 0.25 < slopes[1] < order + 0.6, (slopes, errors)


@pytest.mark.slow
def test_increments_of_a_path_are_standard_and_independent(x64):
    """Over steps of any lengths, to both ends of [0, 1]; eta its clock."""
    for schedule, eta in ((CondOT(), 1.0), (VPLinear(), 0.5), (EDM(), 1.0)):
        source = Brownian(Gaussian(schedule), eta)
        x, state = jnp.zeros((4000, 1)), source.init(jnp.zeros((4000, 1)))
        found = []
        for i, (t, s) in enumerate(itertools.pairwise([1.0, 0.83, 0.5, 0.4999, 0.1, 1e-4])):
            keys = random.fold_in(random.example_keys(jax.random.key(5), 4000), i)
            z, state = source.draw(state, keys, x, jnp.asarray(t), jnp.asarray(s))
            found.append(np.asarray(z[:, 0]))
        np.testing.assert_allclose(np.cov(found), np.eye(5), atol=0.1)
        np.testing.assert_allclose(np.mean(found, axis=1), 0.0, atol=0.07)
        keys = random.example_keys(jax.random.key(6), 4000)
        into_zero = source.draw(state, keys, x, jnp.asarray(0.1), jnp.asarray(0.0))[0]
        assert np.isfinite(into_zero).all()


def test_no_noise_is_the_same_object():
    """Eta = 0 of the multistep solvers."""
    process = Gaussian(CondOT())
    assert sde_dpm_solver_pp(process, 3, eta=0.0) == solvers.dpm_solver_pp(process, 3)
    assert sa_solver(process, 2, eta=0.0) == solvers.unipc(process, 2, variant="bh1")


@pytest.mark.slow
def test_no_noise_is_the_deterministic_solver():
    """Eta or gamma 0, bit for bit."""
    process, times = Gaussian(CondOT()), jnp.linspace(1.0, 0.0, 6)
    inner = TWO_S(process, 2)
    equal = [
        (StepsDown(inner, 0.0), inner),
        (Churned(inner, 0.0), inner),
        (EulerMaruyama(process, 0.0), solvers.euler(process)),
    ]
    for ours, plain in equal:
        ends = [
            ddjax.sample(jax.random.key(0), pair(process), process, shape=(2, 3), solver=v, times=times).x0
            for v in (ours, plain)
        ]
        np.testing.assert_array_equal(*ends)


@pytest.mark.parametrize("size", [0.02, pytest.param(0.01, marks=pytest.mark.slow)])
def test_langevin_is_stationary_for_small_steps(x64, size):
    """A chain on normal data has the variance of its recursion, and in the limit v / (1 - e / (2 v))."""
    process, t, draws = Gaussian(CondOT()), jnp.asarray(0.5), 400
    noise = sources(draws)
    corrector = Langevin(process, size, draws, "level", noise)
    alpha, sigma = levels(process, 0.5)
    right = alpha**2 * VARIANCE + sigma**2
    x = jnp.full((2 + draws, 1), alpha * MEAN).at[1].add(np.sqrt(right))
    keys = random.example_keys(jax.random.key(0), 2 + draws)
    run = jax.jit(lambda x: corrector.correct(keys, corrector.init(x), x, t, normal_data(process))[0])
    x, e, v = run(x), size * sigma**2, right
    found = float(((x[1:] - x[0]) ** 2).sum())
    for _ in range(draws):
        v = (1 - e / right) ** 2 * v + 2 * e
    np.testing.assert_allclose(found, v, rtol=1e-10)
    np.testing.assert_allclose(x[0, 0], alpha * MEAN, rtol=1e-12)
    np.testing.assert_allclose(found - right, e / 2, rtol=0.1)  # v / (1 - e / (2 v)) - v, to first order in e


@pytest.mark.slow
def test_langevin_steps_are_of_each_example(x64):
    """Song et al. 2021, algorithm 5, by hand for each example, with norms of its own; no step at sigma = 0."""
    process, rng = Gaussian(VPCosine(0.0)), np.random.default_rng(0)
    x, z, t = rng.normal(size=(3, 4)), rng.normal(size=(2, 3, 4)), 0.5
    corrector = Langevin(process, 0.2, 2, noise=Given(z))
    run = jax.jit(lambda x, t: corrector.correct(keys, corrector.init(x), x, t, normal_data(process)))
    keys = random.example_keys(jax.random.key(0), 3)
    alpha, sigma = levels(process, t)
    found, _, nfe = run(jnp.asarray(x), jnp.asarray(t))
    np.testing.assert_array_equal(nfe, 2)
    for i in range(3):
        y = x[i]
        for own in z[:, i]:
            score = -(y - alpha * MEAN) / (alpha**2 * VARIANCE + sigma**2)
            e = 2 * (0.2 * np.linalg.norm(own) / np.linalg.norm(score)) ** 2
            y = y + e * score + np.sqrt(2 * e) * own
        np.testing.assert_allclose(found[i], y, rtol=1e-9)
    np.testing.assert_array_equal(run(jnp.asarray(x), jnp.asarray(0.0))[0], x)


@pytest.mark.slow
def test_churn_is_edms_algorithm_2(x64):
    """The published loop, in NumPy, with given normals."""
    process, rng, n = Gaussian(EDM()), np.random.default_rng(0), 6
    sigmas = np.append(np.geomspace(40.0, 0.02, n), 0.0)
    x0, z = sigmas[0] * rng.normal(size=(2, 3)), rng.normal(size=(n, 2, 3))
    low, high, scale = 0.05, 30.0, 1.003
    denoiser = jax.jit(lambda x, sigma: pair(process)(x, jnp.full(2, sigma / 80.0)).value)
    x = x0
    for i, (a, b) in enumerate(itertools.pairwise(sigmas)):
        gamma = min(2.0 / n, np.sqrt(2) - 1) if low <= a <= high else 0.0
        up = a * (1 + gamma)
        x = x + np.sqrt(up**2 - a**2) * scale * z[i]
        d = (x - np.asarray(denoiser(x, up))) / up
        euler = x + (b - up) * d
        x = euler if b == 0 else x + (b - up) * 0.5 * (d + (euler - np.asarray(denoiser(euler, b))) / b)
    made = solvers.edm_stochastic(process, n, churn=2.0, low=low, high=high, scale=scale)
    solver = Churned(made.solver, made.gamma, low, high, scale, Given(z))
    step, keys = compiled(solver, pair(process)), random.example_keys(jax.random.key(0), 2)
    found, nfe = walk(step, solver.init(jnp.asarray(x0)), sigmas / 80.0, jnp.asarray(x0), keys)
    np.testing.assert_allclose(found, x, rtol=1e-9)
    np.testing.assert_array_equal(nfe, 2 * n - 1)


@pytest.mark.slow
@pytest.mark.parametrize("eta", [1.0, 0.4])
def test_2s_ancestral_is_k_diffusions(x64, eta):
    """The published loop, in NumPy."""
    process, rng, n = Gaussian(EDM()), np.random.default_rng(0), 5
    sigmas = np.append(np.geomspace(40.0, 0.02, n), 0.0)
    x0, z = sigmas[0] * rng.normal(size=(2, 3)), rng.normal(size=(n, 2, 3))
    denoiser = lambda x, sigma: np.asarray(pair(process)(jnp.asarray(x), jnp.full(2, sigma / 80.0)).value)
    x = x0
    for i, (a, b) in enumerate(itertools.pairwise(sigmas)):
        up = min(b, eta * np.sqrt(b**2 * (a**2 - b**2) / a**2))
        down = np.sqrt(b**2 - up**2)
        denoised = denoiser(x, a)
        if down == 0:
            x = denoised
        else:
            h = np.log(a / down)
            middle = a * np.exp(-0.5 * h)
            x_2 = middle / a * x - np.expm1(-0.5 * h) * denoised
            x = down / a * x - np.expm1(-h) * denoiser(x_2, middle)
        x = x + up * z[i]
    made = solvers.dpm_solver_pp_2s_ancestral(process, eta)
    solver = StepsDown(made.solver, made.eta, Given(z))
    step, keys = compiled(solver, pair(process)), random.example_keys(jax.random.key(0), 2)
    found, _ = walk(step, solver.init(jnp.asarray(x0)), sigmas / 80.0, jnp.asarray(x0), keys)
    np.testing.assert_allclose(found, x, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("eta", [1.0, Window(0.5, 0.3, 0.7)], ids=["constant", "window"])
def test_sa_solver_is_its_algorithm(x64, eta):
    """Xue et al. 2023, algorithm 1, of one and two predictions, in NumPy: the normals of a step serve its corrector."""
    process, rng, times = Gaussian(VPCosine()), np.random.default_rng(0), np.linspace(0.8, 0.2, 6)
    x0, z = rng.normal(size=(2, 3)), rng.normal(size=(5, 2, 3))
    denoiser = jax.jit(lambda x, t: pair(process)(x, jnp.full(2, t)).value)
    x, d = x0, np.asarray(denoiser(x0, times[0]))
    for i, (t, s) in enumerate(itertools.pairwise(times)):
        (a_t, s_t), (a_s, s_s) = levels(process, t), levels(process, s)
        h, share = np.log(a_s * s_t / (s_s * a_t)), eta(t) if callable(eta) else eta
        grown = (1 + float(share)) * h
        base = s_s / s_t * np.exp(-share * h) * x + s_s * np.sqrt(1 - np.exp(-2 * share * h)) * z[i]
        predicted = base + a_s * (1 - np.exp(-grown)) * d
        if i == 4:
            x = predicted
            break
        new = np.asarray(denoiser(predicted, s))
        x = predicted + 0.5 * a_s * grown * (new - d)
        d = new
    solver = sa_solver(process, 1, eta=eta, noise=Given(z))
    step, keys = compiled(solver, pair(process)), random.example_keys(jax.random.key(0), 2)
    found, _ = walk(step, solver.init(jnp.asarray(x0)), times, jnp.asarray(x0), keys)
    np.testing.assert_allclose(found, x, rtol=1e-9)


@pytest.mark.slow
def test_restart_is_its_algorithm(x64):
    """Xu et al. 2023, algorithm 1, in NumPy around Heun, and its evaluations."""
    process, rng = Gaussian(EDM()), np.random.default_rng(0)
    sigmas, (n, k, low, high) = [20.0, 3.0, 0.5, 0.1, 0.0], (3, 2, 0.6, 4.0)
    x0, z = 20.0 * rng.normal(size=(2, 3)), rng.normal(size=(k, 2, 3))
    denoiser = jax.jit(lambda x, sigma: pair(process)(x, jnp.full(2, sigma / 80.0)).value)

    def heun(x, a, b):
        d = (x - np.asarray(denoiser(x, a))) / a
        euler = x + (b - a) * d
        return euler if b == 0 else x + (b - a) * 0.5 * (d + (euler - np.asarray(denoiser(euler, b))) / b)

    x = x0
    for a, b in itertools.pairwise(sigmas):
        x = heun(x, a, b)
        if b == 0.5:
            inner = (high ** (1 / 7) + np.linspace(0, 1, n + 1) * (b ** (1 / 7) - high ** (1 / 7))) ** 7
            for j in range(k):
                x = x + np.sqrt(high**2 - b**2) * z[j]
                for c, d in itertools.pairwise(inner):
                    x = heun(x, c, d)
    made = solvers.edm_restart(process, [(low, high, n, k)])
    solver = Restart(made.solver, made.intervals, Given(z))
    step, keys = compiled(solver, pair(process)), random.example_keys(jax.random.key(0), 2)
    found, nfe = walk(step, solver.init(jnp.asarray(x0)), np.array(sigmas) / 80.0, jnp.asarray(x0), keys)
    np.testing.assert_allclose(found, x, rtol=1e-9)
    np.testing.assert_array_equal(nfe, 2 * 4 - 1 + 2 * n * k)


@every_solver
def test_no_nan_from_noise_to_data_for_one_example(name):
    """One, two and five steps over the whole of [0, 1] in float32: alpha = 0 at one end, sigma = 0 at the other."""
    for schedule in (CondOT(), VPCosine(), EDM(), VE(), VPLinear()) if name not in FEW else (CondOT(),):
        process = Gaussian(schedule)
        solver = SOLVERS[name][0](process, Fresh())
        step, keys = compiled(solver, pair(process)), random.example_keys(jax.random.key(0), 1)
        x = jnp.asarray([[0.3, -1.1, 2.0]]) * process.prior_std(jnp.asarray(1.0))
        for n in (1, 2, 5):
            state = x
            carry = solver.init(x)
            for i, (t, s) in enumerate(itertools.pairwise(grids.uniform(n))):
                state, carry, _ = step(random.fold_in(keys, i), carry, state, t, s)
                assert np.isfinite(state).all(), (schedule, n, t)
            assert (state.shape, state.dtype) == (x.shape, x.dtype)


@pytest.mark.slow
def test_a_path_has_no_nan_from_noise_to_data():
    for schedule in (CondOT(), VPCosine(), EDM(), VE(), VPLinear()):
        process = Gaussian(schedule)
        settings = {"shape": (1, 3), "solver": sde_dpm_solver_pp(process, noise=Brownian(process))}
        out = ddjax.sample(jax.random.key(0), pair(process), process, times=grids.uniform(5), **settings)
        assert np.isfinite(out.x0).all()


@pytest.mark.slow
@every_solver
def test_samples_do_not_depend_on_the_batch(name):
    def make(process):
        return SOLVERS[name][0](process, Brownian(process, depth=8) if name == "sde_1" else Fresh())

    check_rows_are_their_own(make)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOLVERS)
def test_times_of_each_example(x64, name):
    """Examples at different times in one batch are as each by itself."""
    process, x = Gaussian(CondOT()), jnp.asarray([[0.5, -1.0], [2.0, 0.3]])
    paths = np.array([[0.9, 0.6, 0.5, 0.2], [0.8, 0.7, 0.45, 0.1]])
    keys, make = random.example_keys(jax.random.key(0), 2), SOLVERS[name][0]
    solver = make(process, Fresh())
    step = compiled(solver, pair(process))
    both, _ = walk(step, solver.init(x), paths.T, x, keys)
    for i in (0, 1):
        row = x[i : i + 1]
        alone, _ = walk(step, solver.init(row), paths[i], row, keys[i : i + 1])
        np.testing.assert_allclose(both[i], alone[0], rtol=1e-9)


def test_errors():
    process = Gaussian()
    for make, message in [
        (lambda: sde_dpm_solver_pp(process, eta=-1.0), "must not be negative"),
        (lambda: solvers.Multistep(process, form="noise", eta=1.0), "needs predictions of x0"),
        (lambda: sde_dpm_solver_pp(PFGM(EDM(), D=4.0)), "PFGM has no SDE"),
        (lambda: Brownian(process, 0.0), "eta > 0"),
        (lambda: StepsDown(DDIM(process), 1.5), r"\[0, 1\]"),
        (lambda: StepsDown(Heun(PFGM(EDM(), D=4.0))), "goes forward by the kernel"),
        (lambda: Churned(DDIM(process), -0.1), "gamma >= 0"),
        (lambda: Restart(DDIM(process), ((1.0, 0.5),)), "0 < low < high"),
        (lambda: EulerMaruyama(process, -1.0), "must not be negative"),
        (lambda: EulerMaruyama(Masked(3)), "score of a processes.Gaussian"),
        (lambda: Langevin(process, 0.0), "positive size"),
        (lambda: Langevin(process, rule="batch"), "rule must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
    assert sa_solver(process) == sa_solver(process, eta=Window()) != sa_solver(process, 3)
    assert Interval(0.5, 1.0) == Restart(DDIM(process), [(0.5, 1.0)]).intervals[0]
    hash(Given(np.ones((1, 2, 3))))
