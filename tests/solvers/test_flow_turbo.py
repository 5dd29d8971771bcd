"""FlowTurbo: Heun as a case, the pseudo-corrector as known multistep methods, its order, refiners, and their loss."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ode_laws import KEYS, Pair, check_rows_are_their_own, pair, reference, walk

import ddjax
from ddjax import grids, objectives, solvers
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian, Masked
from ddjax.schedules import EDM, VE, CondOT, VPCosine, VPLinear
from ddjax.solvers import FlowTurbo, Heun, Multistep, refined

UNEVEN = [0.9, 0.75, 0.6, 0.5, 0.35, 0.3, 0.1]
START = np.array([[1.2, -0.4, 0.3], [0.1, 0.8, -1.5]])


def velocity(process, x, t, cond=None):
    """Of the pair."""
    t = jnp.asarray(t)
    return process.convert(Pair(process)(x, jnp.broadcast_to(t, x.shape[:1])), "velocity", x, t).value


def exact_refiner(process):
    """The change from the last velocity to that of the pair: no parameters, and nothing learned."""

    def apply(params, inputs, t, cond=None, **_):
        x, v = jnp.split(inputs, 2, axis=-1)
        return params * (velocity(process, x, t) - v)

    return apply


def crooked(params, inputs, t, cond=None, **_):
    """A refiner that is none, to follow what it is asked."""
    x, v = jnp.split(inputs, 2, axis=-1)
    return 0.3 * x - 0.2 * v + t.reshape(-1, *[1] * (x.ndim - 1))


def denoiser(process, apply=crooked):
    return refined(Pair(process), apply, jnp.ones(()))


@pytest.mark.parametrize("schedule", [CondOT(), pytest.param(VPCosine(), marks=pytest.mark.slow)], ids=repr)
def test_heuns_steps_are_heuns_and_exact_refiners_make_them(x64, schedule):
    """H is `Heun`, into sigma = 0 too; R with a refiner that knows the velocity is H."""
    process = Gaussian(schedule)
    for times in (UNEVEN[:4], [0.5, 0.2, 0.0]):
        whole, info = walk(Heun(process), Pair(process), times, jnp.asarray(START))
        mine, made = walk(FlowTurbo(process, "H"), Pair(process), times, jnp.asarray(START))
        np.testing.assert_allclose(mine[1:], whole[1:], rtol=1e-12)
        np.testing.assert_array_equal(made.nfe, info.nfe)
        blocks = "H" + "R" * (len(times) - 2)
        light, made = walk(
            FlowTurbo(process, blocks), denoiser(process, exact_refiner(process)), times, jnp.asarray(START)
        )
        np.testing.assert_allclose(light[-1], whole[-1], rtol=1e-9)
        np.testing.assert_array_equal(made.nfe, 0)
    assert FlowTurbo(process, "HPRR").refinements == 3


@pytest.mark.parametrize("blocks", ["HPPRRP", pytest.param("PPHRHP", marks=pytest.mark.slow)])
def test_blocks_are_the_published_loop(x64, blocks):
    """In NumPy; the network is asked twice by H and by a P without a velocity at its start, once by other P."""
    process = Gaussian(CondOT())
    f = lambda x, t: (x - pair(np, x, 1 - t, t)) / t  # dx/dt of (1 - t) x_0 + t noise
    refine = lambda v, x, t: v + 0.3 * x - 0.2 * v + t
    x, cache, known, evaluations = START, None, False, 0
    states, counts = walk_counted(FlowTurbo(process, blocks), denoiser(process), UNEVEN, jnp.asarray(START))
    for block, t, s, state, count in zip(blocks, UNEVEN[:-1], UNEVEN[1:], states, counts, strict=True):
        h = s - t
        if block == "R":
            v = refine(cache, x, t)
            w = refine(v, x + h * v, s)
            cache, known, evaluations = v, False, 0
        else:
            evaluations = 1 if block == "P" and known else 2
            v = cache if evaluations == 1 else f(x, t)
            w = f(x + h * v, s)
            cache, known = w, True
        x = x + h * (v + w) / 2
        np.testing.assert_allclose(state, x, rtol=1e-9)
        np.testing.assert_array_equal(count, evaluations)


def walk_counted(solver, denoise, times, x):
    step = jax.jit(lambda carry, x, t, s: solver.step(KEYS, carry, x, t, s, denoise))
    carry, states, counts = solver.init(x), [], []
    for t, s in itertools.pairwise(map(jnp.asarray, times)):
        x, carry, info = step(carry, x, t, s)
        states.append(x)
        counts.append(info.nfe)
    return states, counts


@pytest.mark.slow
def test_the_pseudo_corrector_is_known(x64):
    """Its predicted states are those of Euler with UniPC's corrector on any grid, on equal steps Adams-Bashforth's."""
    process = Gaussian(CondOT())
    for times, same in (
        (UNEVEN, Multistep(process, 1, "velocity", "clock", corrector=True)),
        (np.linspace(0.9, 0.3, 5), solvers.adams_bashforth(process, 2)),
    ):
        wanted, _ = walk(same, Pair(process), times, jnp.asarray(START))
        solver, x = FlowTurbo(process), jnp.asarray(START)
        step = jax.jit(lambda carry, x, t, s, solver=solver: solver.step(KEYS, carry, x, t, s, Pair(process)))
        carry = solver.init(x)._replace(velocity=velocity(process, x, times[0]))
        for (t, s), state in zip(itertools.pairwise(map(jnp.asarray, times)), wanted[1:], strict=True):
            np.testing.assert_allclose(x + (s - t) * carry.velocity, state, rtol=1e-9)
            x, carry, _ = step(carry, x, t, s)


@pytest.mark.slow
@pytest.mark.parametrize("uneven", [0.0, 0.3])
def test_the_pseudo_corrector_is_of_second_order(x64, uneven):
    """On equal steps, and on a grid whose steps are long and short in turn."""
    process = Gaussian(CondOT())
    x, solution = reference(CondOT(), 0.9, 0.3)
    errors = []
    for n in (32, 64, 128):
        places = np.arange(n + 1) + uneven * (np.arange(n + 1) % 2)
        places[-1] = n
        states, _ = walk(FlowTurbo(process), Pair(process), 0.9 - 0.6 * places / n, jnp.asarray(x)[None])
        errors.append(np.abs(np.asarray(states[-1])[0] - solution).max())
    np.testing.assert_allclose(np.log2(np.divide(errors[:-1], errors[1:])), 2.0, atol=0.2)


def test_the_loss_of_a_refiner(x64):
    """0 for the exact one, whatever the data; of none, the mean squared change of an affine velocity in closed form."""
    process, longest = Gaussian(CondOT()), 0.3
    mean, variance = 0.7, 0.3

    def of(t):
        """Velocity gain x + offset of data N(mean, variance): E[noise - x_0 | x_t]."""
        total = (1 - t) ** 2 * variance + t**2
        gain = (t - (1 - t) * variance) / total
        return gain, -mean - gain * (1 - t) * mean, total

    def denoise(xt, t, cond=None):
        gain, offset, _ = of(t[:, None])
        return Prediction(gain * xt + offset, "velocity")

    def apply(params, inputs, t, cond=None, **_):
        x, v = jnp.split(inputs, 2, axis=-1)
        gain, offset, _ = of(t[:, None])
        return params * (gain * x + offset - v)

    objective = jax.jit(objectives.velocity_refiner(process, denoise, longest=longest), static_argnums=1)
    x0 = mean + np.sqrt(variance) * jax.random.normal(jax.random.key(1), (10_000, 1))
    exact, metrics = objective(jax.random.key(0), apply, jnp.ones(()), x0)
    assert float(exact) < 1e-25
    low, high = process.t_range
    nodes, shares = np.polynomial.legendre.leggauss(400)
    t, d = low + (high - low) * (nodes + 1) / 2, longest * (nodes + 1) / 2
    t, d = np.meshgrid(t, d, indexing="ij")
    s = np.maximum(t - d, low)
    (gain, offset, total), (later, shift, _) = of(t), of(s)
    # v(x_s, s) - v_t is affine in x_t ~ N((1 - t) mean, total).
    slope = later * (1 + (s - t) * gain) - gain
    rest = later * (s - t) * offset + shift - offset
    squared = (slope * (1 - t) * mean + rest) ** 2 + slope**2 * total
    wanted = shares @ squared @ shares / 4
    np.testing.assert_allclose(metrics["unrefined"], wanted, rtol=0.04)
    half, _ = objective(jax.random.key(0), apply, jnp.full((), 0.5), x0)
    np.testing.assert_allclose(half, metrics["unrefined"] / 4, rtol=1e-9)  # half the change is left


@pytest.mark.slow
def test_samples_do_not_depend_on_the_batch():
    check_rows_are_their_own(lambda process: FlowTurbo(process, "HPPPP"))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [CondOT(), VPLinear(), VE(), EDM()], ids=repr)
def test_both_ends_in_float32(schedule):
    """From noise to data in one, two and three steps of one example; a second program of the same refiner is not."""
    process = Gaussian(schedule)
    for blocks, nfe in (("P", 1), ("HP", 2), ("HPR", 3)):
        solver, times = FlowTurbo(process, blocks), grids.uniform(len(blocks))
        out = ddjax.sample(jax.random.key(0), denoiser(process), process, shape=(1, 3), solver=solver, times=times)
        assert np.isfinite(out.x0).all()
        to_zero = float(schedule.sigma(jnp.asarray(0.0))) == 0
        np.testing.assert_array_equal(out.nfe, nfe if to_zero or blocks[-1] == "R" else nfe + 1)


def test_errors():
    process = Gaussian(CondOT())
    of = functools.partial(FlowTurbo, process)
    for message, make in {
        "Masked has no ODE": lambda: FlowTurbo(Masked(3)),
        "blocks are letters of H, P, R, one or more, got 'HX'": lambda: of("HX"),
        "one or more, got ''": lambda: of(""),
        "begin with H or P, got 'RH'": lambda: of("RH"),
        "give refined": lambda: of("HR").step(KEYS, of("HR").init(START), jnp.asarray(START), 0.5, 0.4, Pair(process)),
        "has no velocities": lambda: objectives.velocity_refiner(Masked(3), Pair(process)),
        r"in \(0, 1\], got 0": lambda: objectives.velocity_refiner(process, Pair(process), longest=0.0),
    }.items():
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(ValueError, match="what each of 2 steps is: the grid has 3"):
        ddjax.sample(jax.random.key(0), Pair(process), process, shape=(1, 2), solver=of("HP"), times=grids.uniform(3))
