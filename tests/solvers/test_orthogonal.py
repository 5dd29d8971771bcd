"""Solver x process x parameterisation x grid x guidance: whatever states the same denoiser ends in the same sample."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ode_laws import stated

import ddjax
from ddjax import guidance, names, naming, solvers
from ddjax.paths import Noise, Residual, Straight, Trigonometric
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian, Interpolant
from ddjax.sampling import Loop
from ddjax.schedules import EDM, VE, CondOT, OUBridge, PolynomialPath, VPLinear
from ddjax.schedules import Trigonometric as Circle

KINDS = ("x0", "noise", "score", "velocity", "v", "edm")
STATEMENTS = ("x0", "x1", "residual", "velocity")
NOISY = (*STATEMENTS, "noise", "score", "velocity+noise", "x1+score", "noise+x0")
# What is sampled, the parameterisations, and the process of the same marginals, its schedule written by itself.
ROWS = {
    "vp": (Gaussian(VPLinear()), KINDS, None),
    "ve": (Gaussian(VE()), KINDS, None),
    "edm": (Gaussian(EDM()), KINDS, None),
    "flow": (Gaussian(CondOT()), KINDS, None),
    "straight": (Interpolant(Straight(), source_std=1.0), STATEMENTS, Gaussian(CondOT())),
    "bridge": (Interpolant(Straight(Noise(0.7)), source_std=1.0), NOISY, Gaussian(OUBridge(0.0, 0.7, 0.7))),
}
MORE = {
    "residual": (Interpolant(Residual(), source_std=1.0), STATEMENTS, Gaussian(PolynomialPath())),
    "circle": (Interpolant(Trigonometric(), source_std=1.0), STATEMENTS, Gaussian(Circle())),
}
OPTIONS = {
    "edm_stochastic": {"steps": 3},
    "edm_restart": {"intervals": ((0.3, 0.8, 2, 1),)},
    "nested": {"solver": "ddim", "inner_steps": 2},
    "resampled": {"solver": "ddim", "rounds": 2},
    "predictor_corrector": {"steps": 2},
}
SOLVERS = {}
for _name in names.SOLVERS:
    _make = lambda p, n=_name: naming.make(names.SOLVERS, n, "solver", p, **OPTIONS.get(n, {}))
    try:
        _make(ROWS["flow"][0])
    except ValueError:
        continue  # of tokens, or of another process
    if _name != "given_latent":  # makes others for a process with a latent
        SOLVERS[_name] = _make
SOLVERS |= {
    "ddim_eta": lambda p: solvers.DDIM(p, 0.7),
    "dpm_solver_3": lambda p: solvers.dpm_solver(p, 3),
    "dpm_solver_taylor": lambda p: solvers.dpm_solver(p, 2, taylor=True),
    "unipc_noise": lambda p: solvers.unipc(p, 3, form="noise", lower_order_start=False),
    "deis_rhoab": lambda p: solvers.deis(p, 2, variant="rhoab"),
    "momentum_noise": lambda p: solvers.Momentum(solvers.DDIM(p), form="noise", nesterov=True),
    "compensated": lambda p: solvers.Multistep(p, 2, compensation=(1.0, 0.9, 1.1, 1.0, 1.0)),
    "sde_3m": lambda p: solvers.sde_dpm_solver_pp(p, 3, eta=0.5),
    "brownian": lambda p: solvers.sde_dpm_solver_pp(p, noise=solvers.Brownian(p, depth=4)),
    "churned_heun": lambda p: solvers.Churned(solvers.Heun(p), 0.3),
    "langevin_level": lambda p: solvers.PredictorCorrector(
        solvers.Heun(p), solvers.Langevin(p, 0.1, rule="level")
    ),
    "nested_outer": lambda p: solvers.Nested(solvers.Heun(p), 2, outer=solvers.DDIM(p)),
}  # fmt: skip
# Of an interpolant: steps with the correlation that it says.
OWN_STEP = ("ancestral", "denoising_chain")
# They ask at the end of their steps; where there is no noise x_0 and the score say nothing of it.
ASK_AT_THE_END = ("rk45", "pndm")
START = np.asarray([[0.9, -1.3], [0.2, 0.4]])


def drawn(process, kind, name, times, init, dtype=float):
    """What `ddjax.sample` gives; but for `rk45`, the loop as it is: for so few numbers to compile it costs more."""
    denoise, solver, key = stated(process, kind), SOLVERS[name](process), jax.random.key(0)
    times, init = jnp.asarray(times, dtype), jnp.asarray(init, dtype)
    if name == "rk45":
        made = ddjax.sample(key, denoise, process, shape=init.shape, solver=solver, times=times, init=init)
        return np.asarray(made.x0)
    loop = Loop.of(key, denoise, times, None, init, None, np.arange(len(init)), process, init.shape, solver)
    state = loop.begin()
    for i in range(len(times) - 1):
        state = loop.step(state, i)
    return np.asarray(state[0])


FAST = [("ddim", "bridge")]
# Every solver on one Gaussian process, in turn, and on the interpolant that has all parts; some on all.
IN_TURN = itertools.cycle(("vp", "ve", "edm", "flow"))
PAIRS = {(name, row) for name in SOLVERS for row in (next(IN_TURN), "bridge")}
PAIRS |= {*itertools.product(("ddim", "unipc", "sde_dpm_solver_pp", "heun_in_noise"), ROWS)}
PAIRS |= {*itertools.product(("ddim", "unipc"), MORE)}
PRODUCT = [
    pytest.param(*case, marks=() if case in FAST else pytest.mark.slow)
    for case in itertools.product(SOLVERS, ROWS | MORE)
    if case in PAIRS
]


@pytest.fixture(autouse=True)
def nothing_stays():
    """Every case compiles functions of its own, which JAX would keep: gigabytes of them."""
    yield
    jax.clear_caches()


def test_all_are_here():
    assert len(SOLVERS) > 40
    assert {"ddim", "heun", "rk45", "unipc", "sa_solver", "edm_restart", "predictor_corrector", "nested"} < set(SOLVERS)


@pytest.mark.parametrize(("name", "row"), PRODUCT)
def test_all_kinds_end_in_the_same_sample(x64, name, row):
    """And an interpolant's where the Gaussian process of its marginals ends."""
    if name == "rk45":
        pytest.importorskip("diffrax")
    process, kinds, same = (ROWS | MORE)[row]
    times = (0.9, 0.5, 0.2, 0.02 if name in ASK_AT_THE_END else 0.0)
    init = START * float(process.prior((1,)).std[0])
    same = process if same is None or name in OWN_STEP else same
    expected = drawn(same, "x0", name, times, init)
    assert np.isfinite(expected).all()
    for kind in kinds[same is process :]:
        found = drawn(process, kind, name, times, init)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9, err_msg=kind)


@pytest.mark.parametrize(("name", "row"), PRODUCT)
def test_few_steps_alone_from_noise_to_data_in_float32(name, row):
    """1, 2 and 5 steps of one example, from t = 1 to t = 0."""
    if name == "rk45":
        pytest.importorskip("diffrax")
    process, kinds, _ = (ROWS | MORE)[row]
    init = START[:1] * float(process.prior((1,)).std[0])
    for steps in (1, 2, 5):
        times = np.linspace(1.0, 0.02 if name in ASK_AT_THE_END else 0.0, steps + 1)
        for kind in kinds if steps == 1 else ("velocity",):
            assert np.isfinite(drawn(process, kind, name, times, init, jnp.float32)).all(), (steps, kind)


# -- grids and guidance ------------------------------------------------------------------------------------------

GRIDS = {
    "uniform": {},
    "karras": {"sigma_min": 0.05, "sigma_max": 3.0},
    "exponential": {"sigma_min": 0.05, "sigma_max": 3.0},
    "uniform_log_snr": {"start": -2.0, "end": 5.0},
    "through": {"sigmas": (3.0, 1.0, 0.3, 0.0)},
}
SCALE, TOWARDS = 1.7, np.asarray([0.6, -0.4])


def log_prob(x, t, cond):
    """Of a classifier that knows less the more noise there is."""
    return -0.5 * (1.0 - t) * ((x - cond[:, None]) ** 2).sum(1)


RULES = {
    "classifier_free": lambda p, d: guidance.classifier_free(d, null=0.0, scale=SCALE),
    "by_weaker": lambda p, d: guidance.by_weaker(d, lambda x, t, cond: d(x, t, 0 * cond), scale=SCALE),
    "by_classifier": lambda p, d: guidance.by_classifier(d, log_prob, p, scale=SCALE),
}


def guided_x0(gaussian, rule):
    """The guided prediction of x0, written out: along the difference of two, or by a score's gradient."""
    said, schedule = stated(gaussian, "x0"), gaussian.schedule

    def denoise(xt, t, cond):
        plain = said(xt, t, None).value
        if rule != "by_classifier":
            return Prediction(plain + SCALE * (said(xt, t, cond).value - plain), "x0")
        t = t[:, None]
        gain = schedule.sigma(t) ** 2 / schedule.alpha(t)
        return Prediction(plain + SCALE * gain * (1.0 - t) * (cond[:, None] - xt), "x0")

    return denoise


def guided(process, denoise, solver, times, init):
    made = ddjax.sample(
        jax.random.key(0), denoise, process, shape=init.shape, solver=solver, times=times, init=init,
        cond=jnp.asarray(TOWARDS),
    )  # fmt: skip
    return np.asarray(made.x0)


FAST_GUIDED = [("karras", "by_classifier", "straight")]
GUIDED = [*itertools.product(("karras",), RULES, ROWS | MORE)]
GUIDED += [(grid, "classifier_free", row) for grid in GRIDS for row in ROWS if grid != "karras"]


@pytest.mark.parametrize(
    ("grid", "rule", "row"),
    [pytest.param(*case, marks=() if case in FAST_GUIDED else pytest.mark.slow) for case in GUIDED],
)
def test_guided_samples_are_the_same_of_all_kinds(x64, grid, rule, row):
    """On a grid of any name, and those of the guided x0 that the rule's definition gives."""
    process, kinds, same = (ROWS | MORE)[row]
    options = GRIDS[grid] | ({"start": 0.9} if grid == "uniform" else {})
    times = names.grid(process, grid, "here", steps=3, **options)
    same = process if same is None else same
    np.testing.assert_allclose(times, names.grid(same, grid, "here", steps=3, **options), rtol=1e-9, atol=1e-12)
    init = jnp.asarray(START * np.asarray(process.prior((1,), times[0]).std[0]))
    expected = guided(same, guided_x0(same, rule), solvers.unipc(same), times, init)
    said = stated(same, "x0")
    plain = guided(same, lambda x, t, cond: said(x, t), solvers.unipc(same), times, init)
    assert np.isfinite(expected).all()
    assert np.abs(expected - plain).max() > 0.05
    for kind in kinds:
        found = guided(process, RULES[rule](process, stated(process, kind)), solvers.unipc(process), times, init)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9, err_msg=kind)
