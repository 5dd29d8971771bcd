"""Every solver of Gaussian states takes times of each example, and does what it does with one time for all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ode_laws import Pair

import ddjax
from ddjax import names, naming
from ddjax.processes import Gaussian
from ddjax.schedules import CondOT, VPCosine
from ddjax.solvers import Brownian, EulerMaruyama, Given

PROCESSES = [Gaussian(CondOT()), Gaussian(VPCosine())]
OPTIONS = {
    "edm_stochastic": {"steps": 3},
    "edm_restart": {"intervals": ((0.3, 0.8, 2, 1),)},
    "reuse": {"sites": 1},
}
TIMES = np.asarray([[1.0, 0.6, 0.3, 0.0], [1.0, 0.0, 0.0, 0.0], [0.9, 0.5, 0.0, 0.0], [0.8, 0.7, 0.4, 0.2]])
STEPS = (3, 1, 2, 3)
SOLVERS = {}
for _name in names.SOLVERS:
    try:
        naming.make(names.SOLVERS, _name, "solver", PROCESSES[0], **OPTIONS.get(_name, {}))
    except ValueError:
        continue  # of tokens, or of another process
    if _name != "given_latent":  # makes others for a process with a latent
        SOLVERS[_name] = lambda p, n=_name: naming.make(names.SOLVERS, n, "solver", p, **OPTIONS.get(n, {}))
SOLVERS["given_noise"] = lambda p: EulerMaruyama(p, noise=Given(np.random.default_rng(0).normal(size=(3, 4, 2))))
SOLVERS["brownian"] = lambda p: EulerMaruyama(p, noise=Brownian(p))
FAST = ("ancestral", "plms")


def test_all_are_here():
    assert len(SOLVERS) > 28
    assert {"ddim", "heun", "rk45", "unipc", "sa_solver", "edm_restart", "predictor_corrector"} < set(SOLVERS)


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in SOLVERS])
@pytest.mark.parametrize("process", [PROCESSES[0], pytest.param(PROCESSES[1], marks=pytest.mark.slow)], ids=repr)
def test_an_example_at_its_own_times_is_as_if_alone(x64, name, process):
    """1, 2 and 3 steps from t = 1, to sigma = 0 where there is none, beside each other: states and evaluations."""
    if name == "rk45":
        pytest.importorskip("diffrax")
    solver, key = SOLVERS[name](process), jax.random.key(0)
    denoise = lambda xt, t, cond: Pair(process, "v")(xt, t)
    together = ddjax.sample(key, denoise, process, shape=(4, 2), solver=solver, times=TIMES)
    assert np.isfinite(np.asarray(together.x0)).all()
    for row, steps in enumerate(STEPS):
        rows, times = jnp.asarray([row]), TIMES[row, : steps + 1]
        one = solver if name != "given_noise" else EulerMaruyama(
            process, noise=Given(solver.noise.values.values[:, row : row + 1])
        )  # fmt: skip
        alone = ddjax.sample(key, denoise, process, shape=(1, 2), solver=one, times=times, rows=rows)
        np.testing.assert_allclose(together.x0[row], alone.x0[0], rtol=0, atol=1e-12)
        assert int(together.nfe[row]) == int(alone.nfe[0]), (row, together.nfe, alone.nfe)
    for leaf in jax.tree.leaves(jax.eval_shape(solver.init, together.x0)):
        assert leaf.shape[0] == 4  # the contract that resting rests on
