"""Deterministic solvers: order of convergence, exact cases, both ends, batches, gradients."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from ode_laws import KEYS, Pair, check_rows_are_their_own, reference, walk

import ddjax
from ddjax import grids, solvers
from ddjax.predictions import Prediction
from ddjax.processes import PFGM, Gaussian, InBasis, Interpolant, Masked, Orthogonal
from ddjax.schedules import EDM, VE, CondOT, VPCosine
from ddjax.solvers import Multistep, SingleStep, forms

UP = {"lower_order_start": False}  # one step of first order would lower orders above 2 to it
of = functools.partial
SOLVERS = {  # what theory says of the order on grids of equal steps of the clock
    "dpm_solver_pp_1": (of(solvers.dpm_solver_pp, order=1), 1),
    "dpm_solver_pp_2m": (solvers.dpm_solver_pp, 2),
    "unipc_2": (solvers.unipc, 3),
    "rk4": (solvers.rk4, 4),
    "dpm_solver_pp_3m": (of(solvers.dpm_solver_pp, order=3, **UP), 3),
    "dpm_solver_pp_3m_lower_start": (of(solvers.dpm_solver_pp, order=3), 2),
    "dpm_solver_2m": (solvers.dpm_solver_multistep, 2),
    "dpm_solver_3m": (of(solvers.dpm_solver_multistep, order=3, **UP), 3),
    "unip_2_bh1": (of(solvers.unipc, variant="bh1", corrector=False), 2),
    "unip_3_noise": (of(solvers.unipc, order=3, form="noise", corrector=False, **UP), 3),
    "unipc_1": (of(solvers.unipc, order=1), 2),
    "unipc_2_bh1_noise": (of(solvers.unipc, variant="bh1", form="noise"), 3),
    "unipc_3": (of(solvers.unipc, order=3, **UP), 4),
    "deis_tab_2": (of(solvers.deis, order=2), 2),
    "deis_tab_3": (of(solvers.deis, order=3, **UP), 3),
    "deis_tab_4": (of(solvers.deis, order=4, **UP), 4),
    "deis_rhoab_3": (of(solvers.deis, variant="rhoab", **UP), 3),
    "deis_logrhoab_3": (of(solvers.deis, variant="logrhoab", **UP), 3),
    "lms": (solvers.lms, 2),
    "adams_bashforth_4": (of(solvers.adams_bashforth, order=4, **UP), 4),
    "adams_moulton_3": (of(Multistep, order=2, form="velocity", coordinate="clock", corrector=True), 3),
    "ipndm": (solvers.ipndm, 2),
    "pndm": (solvers.pndm, 2),
    "plms": (solvers.plms, 2),
    "gradient_estimation": (solvers.gradient_estimation, 1),
    "heavy_ball": (of(solvers.ghvb, order=1), 1),
    "ghvb_2": (solvers.ghvb, 2),
    "ghvb_4": (of(solvers.ghvb, order=4), 2),
    "euler": (solvers.euler, 1),
    "heun_in_noise": (solvers.heun_in_noise, 2),
    "bogacki_shampine": (solvers.bogacki_shampine, 3),
    "rk4_noise": (of(solvers.rk4, form="noise"), 4),
    "dpm_solver_1": (of(solvers.dpm_solver, order=1), 1),
    "dpm_solver_2": (solvers.dpm_solver, 2),
    "dpm_solver_2_taylor": (of(solvers.dpm_solver, taylor=True), 2),
    "dpm_solver_3": (of(solvers.dpm_solver, order=3), 3),
    "dpm_solver_3_taylor": (of(solvers.dpm_solver, order=3, taylor=True), 3),
    "dpm_solver_pp_2s": (solvers.dpm_solver_pp_singlestep, 2),
    "dpm_solver_pp_3s": (of(solvers.dpm_solver_pp_singlestep, order=3), 3),
}
FEW = ("dpm_solver_pp_2m", "unipc_2", "plms")
every_solver = pytest.mark.parametrize(
    "name", [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in SOLVERS]
)


@pytest.mark.parametrize(
    "schedule", [VPCosine(), *(pytest.param(s, marks=pytest.mark.slow) for s in (EDM(4.0), CondOT()))], ids=repr
)
@every_solver
def test_order_of_convergence_on_a_mixture(x64, schedule, name):
    """The error against a fine solution falls by 2^order when the steps double."""
    make, order = SOLVERS[name]
    process, start, end = Gaussian(schedule), 0.85, 0.35
    if schedule == EDM(4.0):  # equal steps of sigma / alpha are what these suppose: the start alone limits them
        order = {"pndm": 4, "plms": 3.3}.get(name, order)  # PLMS's first two steps, h^3, weigh little yet
    x, solution = reference(schedule, start, end)
    solver = make(process)
    denoise, errors = Pair(process), []
    step = jax.jit(lambda carry, x, t, s: solver.step(KEYS, carry, x, t, s, denoise))
    for n in (32, 64, 128):
        state, carry = jnp.asarray(x)[None], solver.init(jnp.asarray(x)[None])
        for t, s in itertools.pairwise(jnp.linspace(start, end, n + 1)):
            state, carry, _ = step(carry, state, t, s)
        errors.append(np.abs(np.asarray(state[0]) - solution).max())
    slopes = np.log2(np.array(errors[:-1]) / errors[1:])
    assert order - 0.4 < slopes[1] < order + 0.4, (slopes, errors)


@every_solver
def test_point_masses_are_reached_in_any_steps(x64, name):
    """Data at one point: its x0 and noise are constant along the path. (The velocity is too, for straight paths.)"""
    process, point = Gaussian(CondOT()), jnp.asarray([[0.3, -0.7]])
    denoise = lambda xt, t, cond=None: Prediction(point, "x0")
    noise, times = jnp.asarray([[1.0, 2.0]]), [0.9, 0.5, 0.4, 0.2]
    states, _ = walk(SOLVERS[name][0](process), denoise, times, 0.1 * point + 0.9 * noise)
    for t, state in zip(times, states, strict=True):
        np.testing.assert_allclose(state, (1 - t) * point + t * noise, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["euler", "rk4", "adams_bashforth_4", "adams_moulton_3"])
def test_standard_normal_data_stand_still(x64, name):
    """N(0, 1) under a variance-preserving schedule has no velocity."""
    process = Gaussian(VPCosine())
    denoise = lambda xt, t, cond=None: Prediction(process.schedule.alpha(t)[:, None] * xt, "x0")
    x = jnp.asarray([[1.0, -2.0]])
    states, _ = walk(SOLVERS[name][0](process), denoise, [0.9, 0.5, 0.1], x)
    np.testing.assert_allclose(states[-1], x, rtol=1e-12)


def coordinate_of(form, name, schedule, t):
    """By its definition, in NumPy."""
    ratio = float(schedule.sigma(jnp.asarray(t)) / schedule.alpha(jnp.asarray(t)))
    own = {"noise": ratio, "x0": 1 / ratio, "velocity": t}[form]
    return {"time": t, "log_snr": -np.log(ratio), "clock": own}[name]


@pytest.mark.parametrize(
    ("form", "coordinate", "order"),
    [
        ("noise", "log_snr", 3),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("x0", "log_snr", 4), ("x0", "clock", 3), ("x0", "time", 2),
                ("noise", "clock", 5), ("noise", "time", 4), ("velocity", "clock", 3), ("velocity", "time", 4),
            ]
        ),
    ],
)  # fmt: skip
def test_polynomials_are_integrated_exactly(x64, form, coordinate, order):
    """Predictions that are a polynomial of degree order - 1: after the start any step is the integral (quadrature).

    The corrector makes that of degree order exact.
    """
    schedule = CondOT()
    process, times = Gaussian(schedule), np.array([0.9, 0.82, 0.7, 0.66, 0.5, 0.45, 0.2, 0.13])
    scale = {"noise": schedule.alpha, "x0": schedule.sigma, "velocity": jnp.ones_like}[form]

    def exact(t, s, power):
        def integrand(tau):
            c = coordinate_of(form, coordinate, schedule, tau)
            slope = {"noise": 1 / (1 - tau) ** 2, "x0": -1 / tau**2, "velocity": 1.0}[form]  # of the clock, d/dt
            return c**power * slope

        return scipy.integrate.quad(integrand, t, s, epsrel=1e-12)[0]

    for corrector in (False, True):
        power = order - 1 + corrector
        solver = Multistep(process, order, form, coordinate, corrector=corrector)

        def said(tau, power=power):
            own = {"noise": tau / (1 - tau), "x0": (1 - tau) / tau, "velocity": tau}[form]
            return {"time": tau, "log_snr": jnp.log((1 - tau) / tau), "clock": own}[coordinate] ** power

        @jax.jit
        def step(carry, x, t, s, solver=solver, said=said):
            denoise = lambda xt, t, cond=None: Prediction(jnp.full(xt.shape, said(t[0])), form)
            return solver.step(KEYS, carry, x, t, s, denoise)[:2]

        x = expected = jnp.asarray([[0.7, -0.2]])
        carry = solver.init(x)
        for i, (t, s) in enumerate(itertools.pairwise(jnp.asarray(times))):
            start = x
            if corrector and i > 0:  # what the corrector makes of the step before
                start = carry.partial + carry.share * said(t)
                if i >= order:
                    np.testing.assert_allclose(start, expected, rtol=1e-9)
            expected = scale(s) * (start / scale(t) + exact(float(t), float(s), power))
            x, carry = step(carry, x, t, s)
            if not corrector and i >= order - 1:
                np.testing.assert_allclose(x, expected, rtol=1e-9)


def test_moments_of_the_exponential(x64):
    """Against quadrature, for short steps and long ones."""
    z = np.array([-30.0, -5.0, -2.1, -1.9, -1e-3, 0.0, 1e-9, 0.5, 1.99, 2.01, 8.0])
    for j, found in enumerate(forms.exponential_moments(jnp.asarray(z), 5)):
        exact = [scipy.integrate.quad(lambda u, z=z: np.exp(z * (1 - u)) * u**j, 0, 1, epsrel=1e-13)[0] for z in z]  # noqa: B023
        np.testing.assert_allclose(found, exact, rtol=1e-10)


@pytest.mark.slow
@every_solver
def test_no_nan_from_noise_to_data_for_one_example(name):
    """One and two steps over the whole of [0, 1] in float32: alpha = 0 at one end, sigma = 0 at the other."""
    for schedule in (CondOT(), VPCosine(), EDM()) if name not in FEW else (CondOT(),):
        process = Gaussian(schedule)
        solver, x = SOLVERS[name][0](process), jnp.asarray([[0.3, -1.1, 2.0]]) * process.prior_std(jnp.asarray(1.0))
        step = jax.jit(lambda carry, x, t, s: solver.step(KEYS, carry, x, t, s, Pair(process, "velocity")))  # noqa: B023
        for n in (1, 2, 5):
            state, carry = x, solver.init(x)
            for t, s in itertools.pairwise(grids.uniform(n)):
                state, carry, info = step(carry, state, t, s)
                assert np.isfinite(state).all(), (schedule, n, t)
            assert state.shape == x.shape
            if schedule.sigma(jnp.asarray(0.0)) == 0 and name not in ("lms", "ipndm", "pndm", "plms"):
                assert int(info.nfe[0]) == 1  # the last step


@every_solver
def test_samples_do_not_depend_on_the_batch(name):
    check_rows_are_their_own(SOLVERS[name][0])


@pytest.mark.slow
@pytest.mark.parametrize("name", SOLVERS)
def test_times_of_each_example(x64, name):
    """Examples at different times in one batch are as each by itself."""
    process, x = Gaussian(CondOT()), jnp.asarray([[0.5, -1.0], [2.0, 0.3]])
    denoise, paths = Pair(process), np.array([[0.9, 0.6, 0.5, 0.2], [0.8, 0.7, 0.3, 0.1]])
    solver = SOLVERS[name][0](process)
    both, _ = walk(solver, denoise, paths.T, x)
    for i in (0, 1):
        alone, _ = walk(solver, denoise, paths[i], x[i : i + 1])
        np.testing.assert_allclose(both[-1][i], alone[-1][0], rtol=1e-12)


@dataclasses.dataclass(frozen=True)
class Scaled(CondOT):
    """The path of coordinates that are scaled by `by`, one number or one for each."""

    by: tuple[float, ...] = (1.0,)

    @property
    def common(self):
        return CondOT()

    def alpha(self, t):
        return jnp.asarray(self.by, t.dtype) * (1.0 - t)

    def log_snr(self, t):
        return 2.0 * (jnp.log(self.alpha(t)) - jnp.log(t))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpm_solver_pp_3m", "unipc_3", "lms", "pndm", "ghvb_4"])
def test_a_log_snr_at_each_site(x64, name):
    """Sites with schedules of their own are as each by itself."""
    x, times, make = jnp.asarray([[0.5, -1.0]]), [0.9, 0.7, 0.6, 0.3, 0.2, 0.1], SOLVERS[name][0]
    denoise = lambda xt, t, cond=None: Prediction(jnp.tanh(xt), "x0")
    both, _ = walk(make(Gaussian(Scaled((0.5, 3.0)))), denoise, times, x)
    for i, by in enumerate((0.5, 3.0)):
        alone, _ = walk(make(Gaussian(Scaled((by,)))), denoise, times, x[:, i : i + 1])
        np.testing.assert_allclose(both[-1][:, i], alone[-1][:, 0], rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOLVERS)
def test_gradients_through_the_sampler_are_finite(name):
    """In the states, the network and the times, from alpha = 0 to sigma = 0: for samplers that are learned."""
    process = Gaussian(CondOT())
    solver = SOLVERS[name][0](process)

    def loss(inner, weight, x):
        times = jnp.concatenate([jnp.ones(1), inner, jnp.zeros(1)])
        denoise = lambda xt, t, cond=None: Prediction(jnp.tanh(weight * xt), "x0")
        return jnp.square(walk(solver, denoise, [times[i] for i in range(4)], x, jit=False)[0][-1]).sum()

    arguments = jnp.asarray([0.7, 0.3]), jnp.asarray(0.8), jnp.asarray([[0.5, -1.0]])
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arguments)
    assert all(np.isfinite(g).all() for g in gradients)
    assert float(jnp.abs(gradients[1])) > 0


@pytest.mark.slow
def test_orders_at_both_ends(x64):
    """lower_order_final; starts and their evaluations; a history that begins at alpha = 0 is not used."""
    process, times = Gaussian(CondOT()), np.linspace(0.9, 0.2, 5)
    denoise, x = Pair(process), jnp.asarray([[0.5, -1.0]])
    high = solvers.dpm_solver_pp(process, 3)
    low = solvers.dpm_solver_pp(process, 3, lower_order_final=4)
    full, ends = (walk(solver, denoise, times, x)[0] for solver in (high, low))
    np.testing.assert_array_equal(full[2], ends[2])  # orders 1, 2 in both; then 3, 3 and 2, 1
    carry = low.init(x)
    for i in range(3):
        _, carry, _ = low.step(KEYS, carry, ends[i], times[i], times[i + 1], denoise)
    first = Multistep(process, 1).step(KEYS, Multistep(process, 1).init(x), ends[3], times[3], times[4], denoise)[0]
    np.testing.assert_allclose(ends[4], first, rtol=1e-12)
    assert np.abs(ends[4] - full[4]).max() > 1e-6
    out = ddjax.sample(
        jax.random.key(0), denoise, process, shape=(3, 2), solver=solvers.pndm(process), times=jnp.asarray(times)
    )
    np.testing.assert_array_equal(out.nfe, 13)
    one = walk(solvers.plms(process), denoise, times[:2], x)[1]
    np.testing.assert_array_equal(one.nfe, 2)
    times = [1.0, 0.8, 0.6]  # at t = 1 the noise is all there is: the second step has no history
    states, _ = walk(solvers.dpm_solver_pp(process), denoise, times, x)
    again, _ = walk(solvers.dpm_solver_pp(process), denoise, times[1:], states[1])
    np.testing.assert_allclose(states[2], again[1], rtol=1e-12)


@pytest.mark.slow
def test_velocities_of_any_process(x64):
    """Two sources of dx/dt that are no `Gaussian`: Euler's and Adams' rules go the way of Heun's with small steps."""
    turn = Orthogonal(np.asarray([[0.6, -0.8], [0.8, 0.6]]))
    for process in (InBasis(Gaussian(CondOT()), turn), Interpolant(source_std=1.0), PFGM(EDM(), D=4.0)):
        denoise = lambda xt, t, cond=None: Prediction(jnp.tanh(xt), "x0")
        x, ends = jnp.asarray([[0.5, -1.0]]), []
        for solver, n in ((solvers.Heun(process), 200), (solvers.adams_bashforth(process, 3, **UP), 40)):
            ends.append(walk(solver, denoise, np.linspace(0.9, 0.3, n + 1), x)[0][-1])
        np.testing.assert_allclose(*ends, rtol=1e-3)
        assert np.isfinite(walk(solvers.euler(process), denoise, [1.0, 0.5, 0.0], x)[0][-1]).all()
    process, denoise = Gaussian(VPCosine(0.0)), lambda xt, t, cond=None: Prediction(jnp.tanh(xt), "x0")
    makers = solvers.euler, solvers.adams_bashforth, solvers.unipc, solvers.ghvb, solvers.dpm_solver, solvers.deis
    for solver in (make(process) for make in makers):
        before, end = walk(solver, denoise, [0.9, 0.4, 0.0], x)[0][1:]
        np.testing.assert_allclose(end, np.tanh(before), rtol=1e-9)


def test_errors():
    process = Gaussian()
    for options, message in [
        ({"order": 0}, "order must be one of 1"),
        ({"form": "score"}, "form must be one of"),
        ({"coordinate": "sigma"}, "coordinate must be one of"),
        ({"form": "velocity"}, "integrated over time"),
        ({"slope": "half"}, "slope must be"),
        ({"slope": "bh1", "coordinate": "clock"}, "bh1"),
        ({"start": ("rk5", 1)}, "start must be"),
        ({"lower_order_final": 0}, "number of steps"),
        ({"to_zero": "one"}, "to_zero"),
        ({"to_zero": "polynomial"}, "finite at sigma = 0"),
        ({"momentum": 0.0}, "momentum"),
        ({"momentum": 0.5, "corrector": True}, "choose one"),
    ]:
        with pytest.raises(ValueError, match=message):
            Multistep(process, **options)
    with pytest.raises(ValueError, match="method must be one of"):
        SingleStep(process, "rk5")
    with pytest.raises(ValueError, match=r"order must be one of 1 \.\.\. 3"):
        solvers.dpm_solver_pp(process, 4)
    with pytest.raises(ValueError, match="variant"):
        solvers.unipc(process, variant="bh3")
    with pytest.raises(ValueError, match="variant"):
        solvers.deis(process, variant="ab")
    with pytest.raises(ValueError, match="Masked has no ODE"):
        solvers.euler(Masked(3))
    with pytest.raises(ValueError, match=r"InBasis has no ODE of the form 'x0'.*form='velocity'"):
        solvers.dpm_solver_pp(InBasis(Gaussian(VE()), Orthogonal(np.eye(2))))
    assert solvers.unipc(process) == solvers.unipc(process) != solvers.unipc(process, 3)
    hash(solvers.ghvb(process))
