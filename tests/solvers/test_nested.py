"""Anytime sampling: exact laws for any number of outer steps, the plain sampler as a case, and what is shown."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ode_laws import check_rows_are_their_own

import ddjax
from ddjax import grids, random, solvers
from ddjax.fixtures import Categorical
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian, Interpolant, LinearSDE, Masked, Uniform
from ddjax.schedules import EDM, VE, CondOT, Cosine, VPCosine
from ddjax.solvers import DDIM, Ancestral, FirstHitting, Info, Nested

KEY = jax.random.key(0)
MEAN, VARIANCE = 0.7, 0.3


def gaussian_mean(schedule, x, t):
    """E[x_0 | x_t] and the posterior's variance for data N(MEAN, VARIANCE)."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    total = alpha**2 * VARIANCE + sigma**2
    return MEAN + alpha * VARIANCE / total * (x - alpha * MEAN), VARIANCE * sigma**2 / total


def gaussian_denoise(process):
    return lambda xt, t, cond=None: Prediction(
        gaussian_mean(process.schedule, xt, t.reshape(-1, *[1] * (xt.ndim - 1)))[0], "x0"
    )


@dataclasses.dataclass(frozen=True)
class Exact:
    """Draws from p(x_0 | x_t) of the Gaussian data, with a given normal."""

    process: Gaussian
    z: float

    def init(self, xt, cond=None):
        return ()

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        mean, variance = gaussian_mean(self.process.schedule, xt, t)
        return mean + self.z * jnp.sqrt(variance), carry, Info(jnp.ones(xt.shape[0], jnp.int32))


def affine(solver, denoise, t, s):
    """x_s = slope x_t + offset + width z, z the normal of the step's own key: of any step that is so."""
    keys = lambda: jax.random.wrap_key_data(jnp.asarray([[0, 3]] * 2, jnp.uint32))  # anew: none is used twice
    start = jnp.asarray([[0.0], [1.0]])
    xs = solver.step(keys(), solver.init(start), start, jnp.asarray(t), jnp.asarray(s), denoise)[0]
    z = random.normal(keys(), (1,), xs.dtype)[0, 0]
    return float(xs[1, 0] - xs[0, 0]), float(xs[0, 0]), float(z)


def moments(schedule, t):
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return float(alpha * MEAN), float(alpha**2 * VARIANCE + sigma**2)


def bridge_by_conditioning(schedule, s, t):
    """q(x_s | x_t, x_0), by the joint law of (x_s, x_t) given x_0: weights of x_t and x_0, and the variance."""
    a_s, a_t, c_s, c_t = (float(f(v)) for f in (schedule.alpha, schedule.sigma) for v in (s, t))
    covariance = a_t / a_s * c_s**2
    gain = covariance / c_t**2
    return gain, a_s - gain * a_t, c_s**2 - gain * covariance


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [VPCosine(), CondOT()], ids=repr)
def test_a_step_with_an_exact_inner_draw_keeps_the_law(x64, schedule):
    """Mean and variance of the marginal at s from those at t, however long the step."""
    process = Gaussian(schedule)
    denoise = gaussian_denoise(process)
    for t, s in ((0.9, 0.8), (0.95, 0.1)):
        slope, offset, z = affine(Nested(Exact(process, 0.0), 1), denoise, t, s)
        _, other, _ = affine(Nested(Exact(process, 1.0), 1), denoise, t, s)
        width = np.sqrt(bridge_by_conditioning(schedule, s, t)[2])
        (mean, variance), (wanted, wider) = moments(schedule, t), moments(schedule, s)
        assert other - offset > 1e-3
        np.testing.assert_allclose(slope * mean + offset - width * z, wanted, rtol=1e-12)
        np.testing.assert_allclose(slope**2 * variance + (other - offset) ** 2 + width**2, wider, rtol=1e-12)


@pytest.mark.parametrize("grid", [None, (1.0, 0.6, 0.5, 0.0)])
def test_a_step_of_inner_ddim_is_linear_algebra(x64, grid):
    """Three DDIM steps in NumPy on the shares of the inner grid, then the bridge by conditioning."""
    schedule, t, s = VPCosine(), 0.8, 0.3
    process = Gaussian(schedule)
    slope, offset, z = affine(Nested(DDIM(process), 3, grid), gaussian_denoise(process), t, s)
    if grid is None:
        inner = [0.8, 0.8 * 2 / 3, 0.8 / 3, 0.0]
    else:  # t is half-way through the first of three steps: places 1/6, 4/9, 13/18, 1
        inner = [0.8, 0.6 - (4 / 9 - 1 / 3) * 3 * 0.1, (1 - 13 / 18) * 3 * 0.5, 0.0]
    gain, push = 1.0, 0.0  # x_0 = gain x_t + push
    for a, b in itertools.pairwise(inner):
        (at_0, _), (at_1, _) = (gaussian_mean(schedule, v, a) for v in (0.0, 1.0))
        alpha, sigma, to_alpha, to_sigma = (float(f(v)) for v in (a, b) for f in (schedule.alpha, schedule.sigma))
        ratio = to_sigma / sigma
        x0, lift = float(at_1 - at_0), float(at_0)
        one, two = (to_alpha - ratio * alpha) * x0 + ratio, (to_alpha - ratio * alpha) * lift
        gain, push = one * gain, one * push + two
    of_t, of_0, variance = bridge_by_conditioning(schedule, s, t)
    np.testing.assert_allclose(slope, of_t + of_0 * gain, rtol=1e-9)
    np.testing.assert_allclose(offset, of_0 * push + np.sqrt(variance) * z, rtol=1e-9)


@pytest.mark.slow
def test_one_inner_step_is_the_plain_sampler(x64):
    """Bit for bit but for the last: the same keys draw the outer step. The authors' outer DDIM is DDIM."""
    process = Gaussian(CondOT())
    options = {"shape": (3, 2), "times": grids.uniform(4)}
    denoise = gaussian_denoise(process)
    plain = ddjax.sample(KEY, denoise, process, solver=Ancestral(process), **options)
    for inner in (Ancestral(process), solvers.dpm_solver_pp(process)):
        nested = ddjax.sample(KEY, denoise, process, solver=Nested(inner, 1), **options)
        np.testing.assert_allclose(nested.x0, plain.x0, rtol=1e-12)
    assert nested.nfe.tolist() == [4] * 3
    ode = ddjax.sample(KEY, denoise, process, solver=DDIM(process), **options)
    outer = ddjax.sample(KEY, denoise, process, solver=Nested(DDIM(process), 1, outer=DDIM(process)), **options)
    np.testing.assert_allclose(outer.x0, ode.x0, rtol=1e-12)


def law_of(x, law):
    powers = law.symbols ** np.arange(law.sites - 1, -1, -1)
    return np.bincount(np.asarray(x) @ powers, minlength=law.symbols**law.sites)


def chi_squared(seen, p):
    return float(((seen - seen.sum() * p) ** 2 / (seen.sum() * p)).sum())


CASES = {
    "one site": (Categorical(1, 3, seed=1), Ancestral(Uniform(3))),
    "masks of two sites": (Categorical(2, 3, seed=1), FirstHitting(Masked(3, Cosine()))),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_tokens_have_the_exact_law_for_any_number_of_outer_steps(name):
    """Where the inner chain is exact: one ancestral step of one site; first hitting of masks that depend on each other.

    The plain sampler of two sites in two steps is far from the law.
    """
    law, inner = CASES[name]
    p = np.exp(np.asarray(law.log_p, np.float64))
    limit = 5.0 * np.sqrt(2 * len(p)) + len(p)  # 5 standard deviations
    settings = {"shape": (20_000, law.sites), "times": grids.uniform(2)}
    arguments = KEY, law.denoise(inner.process), inner.process
    out = ddjax.sample(*arguments, solver=Nested(inner, 1), **settings)
    assert chi_squared(law_of(out.x0, law), p) < limit
    if law.sites == 2:
        plain = ddjax.sample(*arguments, solver=Ancestral(inner.process), **settings)
        assert chi_squared(law_of(plain.x0, law), p) > 10 * limit


@pytest.mark.slow
def test_a_longer_inner_chain_brings_tokens_nearer_to_the_law():
    """Two outer steps of two sites: the distance falls with the inner steps, at the same outer ones."""
    law, process = Categorical(2, 3, seed=1), Masked(3)
    p = np.exp(np.asarray(law.log_p, np.float64))
    far = []
    for inner in (1, 4, 16):
        solver = Nested(Ancestral(process), inner)
        settings = {"shape": (40_000, 2), "times": grids.uniform(2)}
        out = ddjax.sample(KEY, law.denoise(process), process, solver=solver, **settings)
        far.append(chi_squared(law_of(out.x0, law), p))
    assert far[0] > 3 * far[1] > 9 * far[2]


def test_a_sample_is_shown_at_every_step_and_evaluations_are_split_as_asked():
    """Three outer steps with 3, 1 and 2 inner ones, of a solver with a memory; what is shown last is the sample."""
    process = Gaussian(CondOT())
    inner = solvers.dpm_solver_pp(process)
    settings = {"shape": (2, 3), "solver": Nested(inner, [3, 1, 2]), "times": grids.uniform(3)}
    arguments = KEY, gaussian_denoise(process), process
    parts = list(ddjax.stream(*arguments, **settings))
    whole = ddjax.sample(*arguments, **settings, trajectory=True)
    np.testing.assert_array_equal([part.nfe[0] for part in parts], [3, 4, 6])
    np.testing.assert_array_equal(parts[-1].x0, whole.x0)
    np.testing.assert_array_equal(whole.nfe, 6)
    for i, part in enumerate(parts[:2]):  # each is the inner solver's own sample from the state of that time
        t = float(settings["times"][i])
        alone = {"times": jnp.linspace(t, 0.0, (3, 1)[i] + 1), "init": whole.trajectory[i]}
        drawn = ddjax.sample(*arguments, shape=(2, 3), solver=inner, **alone)
        np.testing.assert_allclose(part.x0, drawn.x0, atol=1e-6)
    assert next(ddjax.stream(*arguments, **settings | {"solver": DDIM(process)})).x0 is None
    with pytest.raises(ValueError, match="what each of 3 steps is: the grid has 2"):
        ddjax.sample(*arguments, **settings | {"times": grids.uniform(2)})


@pytest.mark.slow
def test_samples_do_not_depend_on_the_batch():
    check_rows_are_their_own(lambda process: Nested(DDIM(process, 0.5), (2, 1, 3, 1, 2)))


@pytest.mark.slow
def test_both_ends_other_processes_and_times_of_examples():
    """One step, one example, into sigma = 0 and to a least noise; auxiliary variables; a time for each example."""
    for schedule in (EDM(), VE(), CondOT(), VPCosine(0.0)):
        process = Gaussian(schedule)
        for steps in (1, 2):
            solver, times = Nested(solvers.Heun(process), 2), grids.uniform(steps)
            out = ddjax.sample(KEY, gaussian_denoise(process), process, shape=(1, 2), solver=solver, times=times)
            assert np.isfinite(out.x0).all()
    sde = ddjax.processes.critically_damped(ddjax.schedules.VPLinear())
    assert isinstance(sde, LinearSDE)
    denoise = lambda xt, t, cond=None: Prediction(0.5 * sde.clean(xt), "x0")
    settings = {"shape": (2, *sde.state_shape((3, 1))), "solver": Nested(Ancestral(sde), 2), "times": grids.uniform(2)}
    parts = list(ddjax.stream(KEY, denoise, sde, **settings))
    assert parts[-1].x0.shape == (2, 3, 1)
    assert np.isfinite(parts[-1].x).all()
    process = Gaussian(CondOT())
    solver = Nested(DDIM(process), 3, grids.quadratic(5))
    keys = lambda: random.example_keys(KEY, 2)
    xt, t, s = jnp.asarray([[0.3], [1.2]]), jnp.asarray([0.9, 0.4]), jnp.asarray([0.5, 0.1])
    denoise = gaussian_denoise(process)
    both = solver.step(keys(), solver.init(xt), xt, t, s, denoise)[0]
    for i in range(2):
        alone = solver.step(keys()[i : i + 1], solver.init(xt[:1]), xt[i : i + 1], t[i], s[i], denoise)
        np.testing.assert_allclose(alone[0], both[i : i + 1], rtol=1e-5)


def test_errors():
    process = Gaussian(CondOT())
    for message, make in {
        "x1 of this interpolant comes with the data": lambda: Nested(Ancestral(Interpolant())),
        "which PFGM does not have": lambda: Nested(DDIM(ddjax.processes.PFGM(EDM()))),
        "at least one step, got 0": lambda: Nested(DDIM(process), 0),
        r"at least one step, got \(\)": lambda: Nested(DDIM(process), ()),
        "must run down to 0": lambda: Nested(DDIM(process), 2, (1.0, 0.5)),
        "at its own time": lambda: Nested(solvers.learned.written_out(DDIM(process), np.linspace(1, 0, 3))),
        "for Gaussian states": lambda: Nested(Ancestral(Masked(3)), outer=DDIM(process)),
    }.items():
        with pytest.raises(ValueError, match=message):
            make()
