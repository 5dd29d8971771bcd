"""Solvers against what is in print: their recurrences, their stability, and an error of a released one."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from ode_laws import KEYS, Pair, check_rows_are_their_own, pair, reference, walk

from ddjax import solvers
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian
from ddjax.schedules import EDM, CondOT
from ddjax.solvers import Momentum, Multistep

of = functools.partial


def by_hand(times, x, combine):
    """DDIM of x on `Pair`'s noise, each step along a combination of the noises so far, in NumPy (CondOT)."""
    noises = []
    for t, s in itertools.pairwise(times):
        noises.insert(0, (x - (1 - t) * pair(np, x, 1 - t, t)) / t)
        noise = combine(noises, len(noises) - 1)
        x = (1 - s) * (x - t * noise) / (1 - t) + s * noise
    return x


def published_ghvb(beta, weights):
    """The velocities, and the published weights of them, by how many there are."""

    def combine(noises, i):
        v = noises[-1]
        velocities = [v := (1 - beta) * v + beta * noise for noise in noises[::-1]][::-1]
        used = weights[min(i + 1, len(weights)) - 1]
        return sum(w * v for w, v in zip(used, velocities, strict=False))

    return combine


def published_momentum(beta, weights, nesterov=False):
    """Adams and Bashforth's means of the noises, averaged as the authors' PLMS with HB, or NT, does."""

    def combine(noises, i):
        past, v = noises[::-1], None
        for k in range(len(past)):
            used = weights[min(k + 1, len(weights)) - 1]
            mean = sum(w * e for w, e in zip(used, past[k::-1], strict=False))
            v = mean if v is None else (1 - beta) * v + beta * mean
        return (1 - beta) * v + beta * mean if nesterov else v

    return combine


B = 0.7
AB = [[1], [1.5, -0.5], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]
PUBLISHED = {
    "ipndm": (solvers.ipndm, published_ghvb(1.0, AB)),
    "gradient_estimation": (solvers.gradient_estimation, published_ghvb(1.0, [[1], [2.0, -1.0]])),
    "heavy_ball": (of(solvers.ghvb, order=1, momentum=B), published_ghvb(B, [[1]])),
    "ghvb_2": (of(solvers.ghvb, momentum=B), published_ghvb(B, [[1], [(2 + B) / (2 * B), -(2 - B) / (2 * B)]])),
    "ghvb_4": (
        of(solvers.ghvb, order=4, momentum=B),
        published_ghvb(
            B,
            [
                [1], [(2 + B) / (2 * B), -(2 - B) / (2 * B)],
                np.array([18 + 5 * B, -(24 - 8 * B), 6 - B]) / (12 * B),
                np.array([46 + 9 * B, -(78 - 19 * B), 42 - 5 * B, -(10 - B)]) / (24 * B),
            ],
        ),
    ),
    "ddim_hb": (lambda p: Momentum(solvers.DDIM(p), B), published_ghvb(B, [[1]])),
    "plms_2_hb": (lambda p: Momentum(solvers.ipndm(p, 2), B), published_momentum(B, AB[:2])),
    "plms_4_nt": (lambda p: Momentum(solvers.ipndm(p), B, nesterov=True), published_momentum(B, AB, True)),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recurrences(x64, name):
    """With the coefficients in print, also on unequal steps."""
    make, combine = PUBLISHED[name]
    process, times = Gaussian(CondOT()), [0.9, 0.75, 0.6, 0.5, 0.35, 0.3, 0.1]
    x = np.array([[1.2, -0.4, 0.3]])
    states, _ = walk(make(process), Pair(process), times, jnp.asarray(x))
    np.testing.assert_allclose(states[-1], by_hand(times, x, combine), rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("order", [1, 2])
def test_momentum_enlarges_the_stability_region(x64, order):
    """On dx/dt = x, in steps of -h, errors grow by the spectral radius of the published recurrence's matrix.

    Adams and Bashforth's methods of orders 1 and 2 are stable up to h = 2 and 1.
    """
    limits = []
    for beta in (1.0, 0.8, 0.5):
        solver = Multistep(Gaussian(CondOT()), order, "velocity", "steps", momentum=beta)
        denoise = lambda xt, t, cond=None: Prediction(xt, "velocity")
        step = jax.jit(
            lambda carry, x, t, s, solver=solver, denoise=denoise: solver.step(KEYS, carry, x, t, s, denoise)[:2]
        )

        def radius(h, beta=beta):
            newest, before = (1, 0) if order == 1 else ((2 + beta) / (2 * beta), -(2 - beta) / (2 * beta))
            velocity = np.array([beta, 1 - beta])  # of (x, the last velocity)
            change = -h * (newest * velocity + before * np.array([0.0, 1.0]))
            return np.abs(np.linalg.eigvals([np.array([1.0, 0.0]) + change, velocity])).max()

        for h in (0.9, 1.3, 2.2):
            x = jnp.ones((1, 1))
            carry, sizes = solver.init(x), []
            for i in range(200):
                x, carry = step(carry, x, jnp.asarray(-i * h), jnp.asarray(-(i + 1) * h))
                sizes.append(float(jnp.hypot(x, carry.values[0] if carry.values else x)[0, 0]))
            rate = np.exp(np.polyfit(np.arange(100), np.log(sizes[100:]), 1)[0])
            np.testing.assert_allclose(rate, radius(h), rtol=0.02)
        limits.append(min(h for h in np.arange(0.01, 8, 0.01) if radius(h) > 1 + 1e-9))
    np.testing.assert_allclose(limits[0], 2.0 / order, atol=0.011)
    assert limits[0] < limits[1] < limits[2]


@pytest.mark.slow
def test_dpm_solver_pp_is_k_diffusions(x64):
    """sample_dpmpp_2m, its loop in NumPy: into sigma = 0."""
    process = Gaussian(EDM())
    sigmas = np.array([80.0, 30.0, 8.0, 3.0, 0.5, 0.0])
    x, old = np.array([[60.0, -20.0, 5.0]]), None
    states, _ = walk(solvers.dpm_solver_pp(process), Pair(process), sigmas / 80.0, jnp.asarray(x))
    for i, (a, b) in enumerate(itertools.pairwise(sigmas)):
        denoised = d = pair(np, x, 1.0, a)
        h = np.log(a / b) if b else np.inf
        if old is not None and b:
            r = np.log(sigmas[i - 1] / a) / h
            d = (1 + 1 / (2 * r)) * denoised - old / (2 * r)
        x, old = b / a * x - np.expm1(-h) * d, denoised
    np.testing.assert_allclose(states[-1], x, rtol=1e-9)


@pytest.mark.slow
def test_published_third_order_is_of_second(x64):
    """DPM-Solver++ 3M as released: half of the second derivative is left out. Ours is `dpm_solver_pp(order=3)`."""
    x, solution = reference(EDM(4.0), 0.85, 0.35)

    def published(n):
        sigmas, state, known = 4.0 * np.linspace(0.85, 0.35, n + 1), x, []
        for a, b in itertools.pairwise(sigmas):
            h = np.log(a / b)
            known.insert(0, (a, pair(np, state, 1.0, a)))
            (_, y), *past = known
            if len(known) < 3:  # not to be the cause: the solution itself, from one step of which errors are small
                span = scipy.integrate.solve_ivp(
                    lambda sigma, z: (z - pair(np, z, 1.0, sigma)) / sigma, (a, b), state, rtol=1e-12, atol=1e-14
                )
                state = span.y[:, -1]
                continue
            r0, r1 = np.log(past[0][0] / a) / h, np.log(past[1][0] / past[0][0]) / h
            d0, d1 = (y - past[0][1]) / r0, (past[0][1] - past[1][1]) / r1
            second = (d0 - d1) / (r0 + r1)
            first = d0 + r0 * second
            phi_2 = np.expm1(-h) / h + 1
            state = b / a * state - np.expm1(-h) * y + phi_2 * first - (phi_2 / h - 0.5) * second
        return np.abs(state - solution).max()

    slope = np.log2(published(64) / published(128))
    assert 1.8 < slope < 2.2, slope


@pytest.mark.slow
def test_heavy_ball_around_dpm_solver_pp(x64):
    """The authors' 2M with HB in NumPy, with the first step's prediction as its first velocity; into sigma = 0 too."""
    process, beta = Gaussian(EDM()), 0.7
    sigmas = np.array([30.0, 8.0, 3.0, 0.5, 0.0])
    x = np.array([[20.0, -11.0, 5.0]])
    solver = Momentum(solvers.dpm_solver_pp(process), beta, "x0")
    states, info = walk(solver, Pair(process), sigmas / 80.0, jnp.asarray(x))
    v = old = None
    for i, (a, b) in enumerate(itertools.pairwise(sigmas)):
        d = pair(np, x, 1.0, a)
        h = np.log(a / b) if b else np.inf
        mean = d
        if old is not None and b:
            mean = d + 0.5 * h / np.log(sigmas[i - 1] / a) * (d - old)
        v = mean if v is None else (1 - beta) * v + beta * mean
        x, old = b / a * x - np.expm1(-h) * v, d
        np.testing.assert_allclose(states[i + 1], x, rtol=1e-9)
    np.testing.assert_array_equal(info.nfe, 1)


@pytest.mark.slow
def test_momentum_is_off_at_one_and_of_first_order_else(x64):
    process = Gaussian(CondOT())
    x, solution = reference(CondOT(), 0.9, 0.3)
    errors = []
    for n in (1, 40, 80):
        times = np.linspace(0.9, 0.3, n + 1)
        for beta in (1.0, 0.6):
            solver = Momentum(solvers.heun_in_noise(process), beta)
            states, info = walk(solver, Pair(process), times, jnp.asarray(x)[None])
            plain, _ = walk(solver.solver, Pair(process), times, jnp.asarray(x)[None])
            if beta == 1.0 or n == 1:
                np.testing.assert_allclose(states[-1], plain[-1], rtol=1e-10)
            else:
                errors.append(np.abs(np.asarray(states[-1])[0] - solution).max())
            np.testing.assert_array_equal(info.nfe, 2)
    np.testing.assert_allclose(np.log2(errors[0] / errors[1]), 1.0, atol=0.1)
    whole, _ = walk(Momentum(solvers.ipndm(process)), Pair(process), np.linspace(1.0, 0.0, 4), jnp.asarray(x)[None])
    assert np.isfinite(whole[-1]).all()


def unipc_with_momentum(times, x, beta, predictor, rescaled, order=2, nesterov=False):
    """The authors' UniPC with HB (bh2, predictions of x0) in NumPy, for CondOT: all states.

    As diffusers has it: the model sees predicted states, the next step starts from the corrected one.
    """
    levels, models, velocities, state, last = [], [], {}, np.asarray(x), None
    states = [state]

    def moved(start, t, s, levels, models, name, end=None):
        """A step along the mean prediction of UniP ("p") or UniC ("c"), or that one's velocity."""
        h = np.log((1 - s) / s) - levels[0] if s else np.inf
        mean = unified(levels, models, h, min(len(models), order) if s else 1, end)
        unit = s if rescaled else 1.0
        if (predictor or name == "c") and unit:
            y, v = mean / unit, velocities.get(name)
            velocities[name] = v = y if v is None else (1 - beta) * v + beta * y
            mean = unit * ((1 - beta) * v + beta * y if nesterov else v)
        return s / t * start - (1 - s) * np.expm1(-h) * mean

    for t, s in itertools.pairwise(times):
        model = pair(np, state, 1 - t, t)
        if last is not None:
            state = moved(*last, "c", model)
        models, levels = [model, *models], [np.log((1 - t) / t), *levels]
        last = (state, t, s, levels, models)
        state = moved(*last, "p")
        states.append(state)
    return np.stack(states)


def unified(levels, models, h, order, end=None):
    """The mean prediction of UniP, and with the prediction at the step's end that of UniC: B(h) = e^-h - 1."""
    nodes = [(levels[k] - levels[0]) / h for k in range(1, order)]
    falls = [(models[k] - models[0]) / r for k, r in zip(range(1, order), nodes, strict=True)]
    if end is not None:
        nodes, falls = [*nodes, 1.0], [*falls, end - models[0]]
    if len(nodes) < 2:
        rho = [0.5] * len(nodes)
    else:
        phi, factorial, right = np.expm1(-h) / -h - 1, 1.0, []
        for k in range(1, len(nodes) + 1):
            right.append(phi * factorial / np.expm1(-h))
            factorial *= k + 1
            phi = phi / -h - 1 / factorial
        rho = np.linalg.solve([[r**k for r in nodes] for k in range(len(nodes))], right)
    return models[0] + sum((w * fall for w, fall in zip(rho, falls, strict=True)), np.zeros_like(models[0]))


@pytest.mark.slow
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(("predictor", "rescaled"), [(False, True), (True, False), (False, False), (True, True)])
def test_heavy_ball_in_unipcs_corrector(x64, order, predictor, rescaled):
    """The authors' recurrence by hand (what they released first), for any number of steps, into sigma = 0 too."""
    process, x = Gaussian(CondOT()), np.array([[1.2, -0.4, 0.3]])
    nesterov = order == 3
    solver = Momentum(solvers.unipc(process, order), 0.7, "x0", nesterov, predictor, rescaled)
    whole = [0.95, 0.9, 0.7, 0.6, 0.4, 0.15, 0.1]
    for times in ([0.9, 0.2], [0.9, 0.0], [0.9, 0.5, 0.0], whole, [*whole, 0.0]):
        states, info = walk(solver, Pair(process), times, jnp.asarray(x))
        expected = unipc_with_momentum(times, x, 0.7, predictor, rescaled, order, nesterov)
        np.testing.assert_allclose(np.stack(states), expected, rtol=1e-9)
        np.testing.assert_array_equal(info.nfe, 1)
    own = np.array([whole, np.linspace(0.97, 0.12, 7)])  # and times of their own, site by site the same
    states, _ = walk(solver, Pair(process), own.T, jnp.asarray(np.repeat(x, 2, axis=0)))
    for row, times in enumerate(own):
        expected = unipc_with_momentum(times, x, 0.7, predictor, rescaled, order, nesterov)
        np.testing.assert_allclose(np.stack(states)[:, row], expected[:, 0], rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("predictor", "rescaled"), [(False, True), (True, False)])
def test_momentum_in_a_corrector_is_off_at_one_and_of_first_order_else(x64, predictor, rescaled):
    process = Gaussian(CondOT())
    x, solution = reference(CondOT(), 0.9, 0.3)
    plain, errors = solvers.unipc(process), []
    make = lambda beta: Momentum(plain, beta, "x0", predictor=predictor, rescaled=rescaled)
    for n in (100, 200):
        times = np.linspace(0.9, 0.3, n + 1)
        states, _ = walk(make(0.6), Pair(process), times, jnp.asarray(x)[None])
        errors.append(np.abs(np.asarray(states[-1])[0] - solution).max())
    np.testing.assert_allclose(np.log2(errors[0] / errors[1]), 1.0, atol=0.1)
    times = np.linspace(1.0, 0.0, 6)  # from alpha = 0 into sigma = 0
    states, expected = (walk(v, Pair(process), times, jnp.asarray(x)[None])[0] for v in (make(1.0), plain))
    np.testing.assert_allclose(np.stack(states), np.stack(expected), rtol=1e-9)
    assert np.isfinite(np.stack(walk(make(0.6), Pair(process), times, jnp.asarray(x)[None])[0])).all()


@pytest.mark.slow
def test_steps_that_momentum_does_not_remember(x64):
    """One from alpha = 0 is the solver's own and forgotten; one of no length changes nothing."""
    process, x = Gaussian(CondOT()), jnp.asarray([[1.2, -0.4, 0.3]])
    for solver in (Momentum(solvers.unipc(process), 0.6, "x0"), Momentum(solvers.DDIM(process), 0.6)):
        whole, _ = walk(solver, Pair(process), [1.0, 0.8, 0.5, 0.2], x)
        first, _ = walk(solver.solver, Pair(process), [1.0, 0.8], x)
        rest, _ = walk(solver, Pair(process), [0.8, 0.5, 0.2], first[-1])
        np.testing.assert_allclose(np.stack(whole[1:]), np.stack(rest), rtol=1e-12)
    resting, _ = walk(solver, Pair(process), [0.8, 0.5, 0.5, 0.2], first[-1])
    np.testing.assert_allclose(resting[-1], rest[-1], rtol=1e-12)


@pytest.mark.slow
def test_momentum_in_a_corrector_has_a_row_of_its_own():
    check_rows_are_their_own(lambda process: Momentum(solvers.unipc(process), 0.7, "x0"))


def test_what_momentum_is_not_for():
    process = Gaussian(CondOT())
    for message, make in {
        "own form, 'x0'": lambda: Momentum(solvers.unipc(process)),
        "neither a start": lambda: Momentum(solvers.unipc(process, lower_order_start=False), form="x0"),
        "predictor=False": lambda: Momentum(solvers.DDIM(process), predictor=False),
        "deterministic": lambda: Momentum(solvers.DDIM(process, 0.5)),
        "deterministic steps": lambda: Momentum(solvers.sa_solver(process), form="x0"),
        "beta lies in": lambda: Momentum(solvers.DDIM(process), 0.0),
        "pndm has order 4": lambda: solvers.pndm(process, 3),
    }.items():
        with pytest.raises(ValueError, match=message):
            make()
    assert solvers.pndm(process, 2) == Multistep(process, 2, "noise", "steps", start=("heun", 1), to_zero="polynomial")
