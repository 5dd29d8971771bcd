"""The compiled loop itself: what it passes to a solver, and with what randomness."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddjax
from ddjax import grids, random, solvers
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian, Masked
from ddjax.schedules import CondOT, VPCosine
from ddjax.solvers import DDIM, Ancestral, EulerMaruyama, Heun, Info


@dataclasses.dataclass(frozen=True)
class Recorder:
    """A solver that carries a count and leaves in the state what it was given."""

    def init(self, xt, cond=None):
        return jnp.zeros(xt.shape[0])

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        z = random.normal(keys, (), xt.dtype)
        t, s = jnp.broadcast_to(t, z.shape), jnp.broadcast_to(s, z.shape)
        return jnp.stack([t, s, carry, z], axis=-1), carry + 1, Info(jnp.full(xt.shape[0], 3, jnp.int32))


def test_a_solver_gets_neighbouring_times_its_carry_and_fresh_keys():
    times = jnp.asarray([1.0, 0.6, 0.5, 0.0])
    out = ddjax.sample(
        jax.random.key(0),
        lambda xt, t, cond: Prediction(xt, "x0"),
        Gaussian(CondOT()),
        shape=(2, 4),
        solver=Recorder(),
        times=times,
        trajectory=True,
    )
    path = np.asarray(out.trajectory)
    np.testing.assert_allclose(path[1:, 0, :3], [[1.0, 0.6, 0], [0.6, 0.5, 1], [0.5, 0.0, 2]], rtol=1e-6)
    assert len(np.unique(path[1:, :, 3])) == 6  # every step and row draws for itself
    np.testing.assert_array_equal(out.nfe, 9)


def test_the_start_is_the_prior():
    process = Gaussian(CondOT(), data_std=0.5)
    out = ddjax.sample(
        jax.random.key(0),
        lambda xt, t, cond: Prediction(xt, "x0"),
        process,
        shape=(20_000, 1),
        solver=DDIM(process),
        times=jnp.asarray([0.5, 0.4]),
        trajectory=True,
    )
    std = np.asarray(out.trajectory[0]).std()
    assert abs(std / np.sqrt(0.25 + 0.0625) - 1) < 4 / 200


def test_conditions_reach_the_network_row_by_row():
    process, cond = Masked(5), {"label": jnp.asarray([3, 0, 4]), "unused": jnp.zeros((3, 2))}

    def denoise(xt, t, cond):
        return Prediction(
            jnp.where(jax.nn.one_hot(cond["label"], 5)[:, None] > 0, 0.0, -1e30) + jnp.zeros((3, 2, 5)), "posterior"
        )

    out = ddjax.sample(
        jax.random.key(0), denoise, process, shape=(3, 2), solver=Ancestral(process), times=grids.uniform(3), cond=cond
    )
    np.testing.assert_array_equal(out.x0, [[3, 3], [0, 0], [4, 4]])


def test_runs_inside_another_jit():
    process = Gaussian(CondOT())

    @jax.jit
    def mean(key, times):
        denoise = lambda xt, t, cond: Prediction(0.5 * xt, "x0")
        return ddjax.sample(key, denoise, process, shape=(4, 2), solver=DDIM(process), times=times).x0.mean()

    assert np.isfinite(mean(jax.random.key(0), grids.uniform(3)))


def test_a_state_keeps_its_dtype(x64):
    """A float32 start stays float32 where times are float64."""
    process = Gaussian(CondOT())
    out = ddjax.sample(
        jax.random.key(0),
        lambda xt, t, cond: Prediction(0.5 * xt, "x0"),
        process,
        shape=(2, 3),
        solver=DDIM(process),
        times=grids.uniform(3),
        init=jnp.ones((2, 3), jnp.float32),
    )
    assert out.x0.dtype == jnp.float32


GAUSSIAN, TOKENS = Gaussian(VPCosine()), Masked(5)
BY_HAND = {
    "ddim": DDIM(GAUSSIAN),
    "heun": Heun(GAUSSIAN),
    "unipc": solvers.unipc(GAUSSIAN),
    "deis": solvers.deis(GAUSSIAN),
    "dpm_solver": solvers.dpm_solver(GAUSSIAN),
    "sde_dpm_solver_pp": solvers.sde_dpm_solver_pp(GAUSSIAN),
    "euler_maruyama": EulerMaruyama(GAUSSIAN),
    "masked": Ancestral(TOKENS),
}
FAST = ("unipc", "masked")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in BY_HAND])
def test_the_python_loop_is_the_compiled_one(name):
    """Every state bit for bit, also of solvers that draw normals; and nothing compiled, where values can be seen."""
    solver, seen = BY_HAND[name], []
    process = solver.process

    def denoise(xt, t, cond):
        if not isinstance(xt, jax.core.Tracer):
            seen.append(float(t[0]) + 0.0 * float(xt.sum()))  # a branch on what is there
        value = jnp.tanh(xt) if process is GAUSSIAN else jnp.sin(jnp.arange(5.0) + xt[..., None] + t[:, None, None])
        return Prediction(value, "x0" if process is GAUSSIAN else "posterior")

    settings = {"shape": (2, 3), "solver": solver, "times": grids.uniform(4), "trajectory": True}
    run = lambda **options: ddjax.sample(jax.random.key(0), denoise, process, **settings | options)
    compiled = run()
    jax.tree.map(np.testing.assert_array_equal, run(python_loop=True), compiled)
    short = run(trajectory=False, python_loop=True)
    assert short.trajectory is None
    np.testing.assert_array_equal(short.x0, compiled.x0)
    assert not seen
    for python_loop in {"heun": (True,), "sde_dpm_solver_pp": (False, True)}.get(name, ()):
        with jax.disable_jit():
            plain = run(python_loop=python_loop)
        assert len(seen) == int(plain.nfe[0])
        assert seen == sorted(seen, reverse=True)
        seen.clear()
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), plain, compiled)


@pytest.mark.slow
def test_the_python_loop_is_the_compiled_one_where_xla_fuses_as_it_likes():
    """With XLA's own flags, not the suite's: bit for bit, where operations rounded one by one differ."""
    program = """
import jax, jax.numpy as jnp, numpy as np, ddjax
from ddjax import grids, solvers
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian
from ddjax.schedules import VPCosine
process = Gaussian(VPCosine())
denoise = lambda xt, t, cond: Prediction(jnp.tanh(xt * 1.7 + t[:, None]), "x0")
for make in (solvers.DDIM, solvers.sde_dpm_solver_pp, solvers.EulerMaruyama):
    settings = {"shape": (33, 17), "solver": make(process), "times": grids.uniform(6), "trajectory": True}
    run = lambda **options: ddjax.sample(jax.random.key(0), denoise, process, **settings, **options)
    compiled = run()
    jax.tree.map(np.testing.assert_array_equal, run(python_loop=True), compiled)
with jax.disable_jit():
    plain = run()
differs = (np.asarray(plain.x0) != np.asarray(compiled.x0)).any()
print("bit for bit; op by op", "differs" if differs else "too")
"""
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")}
    ran = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert ran.stdout.startswith("bit for bit"), ran.stderr[-2000:]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_steps():
    """Of the compiled program, but for the grid; with every state shown it does."""
    process = Gaussian(CondOT())

    def bytes_of(steps, trajectory):
        def run(key, times):
            settings = {"shape": (4, 64), "solver": solvers.dpm_solver_pp(process), "times": times}
            return ddjax.sample(key, lambda x, t, c: Prediction(jnp.tanh(x), "x0"), process, **settings,
                                trajectory=trajectory)  # fmt: skip

        memory = jax.jit(run).lower(jax.random.key(0), grids.uniform(steps)).compile().memory_analysis()
        return memory.temp_size_in_bytes, memory.output_size_in_bytes

    assert bytes_of(10, False) == bytes_of(1000, False)
    few, many = bytes_of(10, True), bytes_of(1000, True)
    assert many[1] - few[1] == 990 * 4 * 64 * 4


GRIDS = np.asarray([[1.0, 0.6, 0.3, 0.0], [1.0, 0.0, 0.0, 0.0], [0.8, 0.8, 0.8, 0.8], [0.9, 0.9, 0.2, 0.2]])


@pytest.mark.slow
def test_a_grid_for_each_example(x64):
    """Each is drawn as if it were alone, on its own times only; resting costs nothing and moves nothing."""
    process = Gaussian(VPCosine())
    options = {"solver": solvers.dpm_solver_pp(process), "trajectory": True, "cond": jnp.asarray([1.0, 2.0, 3.0, 4.0])}
    denoise = lambda xt, t, cond: Prediction(jnp.tanh(cond[:, None] * xt), "x0")
    init = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)))
    found = ddjax.sample(jax.random.key(0), denoise, process, shape=(4, 2), times=GRIDS, init=init, **options)
    np.testing.assert_array_equal(found.nfe, [3, 1, 0, 1])
    for row, times in ((0, [1.0, 0.6, 0.3, 0.0]), (1, [1.0, 0.0]), (3, [0.9, 0.2])):
        one = options | {"cond": options["cond"][row : row + 1], "init": init[row : row + 1]}
        alone = ddjax.sample(jax.random.key(0), denoise, process, shape=(1, 2), times=jnp.asarray(times), **one)
        np.testing.assert_allclose(found.x0[row], alone.x0[0], rtol=0, atol=1e-13)
    np.testing.assert_array_equal(found.trajectory[:, 2], np.stack([init[2]] * 4))
    np.testing.assert_array_equal(found.trajectory[:2, 3], np.stack([init[3]] * 2))
    *_, last = ddjax.stream(jax.random.key(0), denoise, process, shape=(4, 2), times=GRIDS, init=init,
                            solver=options["solver"], cond=options["cond"])  # fmt: skip
    np.testing.assert_array_equal(last.x, found.x0)


def test_priors_and_known_sites_of_each_example(x64):
    """A prior at each first time; known sites are the values themselves as soon as an example is done."""
    process, known = Gaussian(CondOT(), data_std=0.5), jnp.full((4, 2), 0.25)
    observed = ddjax.Observed(jnp.asarray([[True, False]] * 4), known)
    denoise = lambda xt, t, cond: Prediction(0.5 * xt, "x0")
    settings = {"shape": (4, 2), "solver": Ancestral(process), "observed": observed, "trajectory": True}
    found = ddjax.sample(jax.random.key(0), denoise, process, times=GRIDS, **settings)
    np.testing.assert_array_equal(found.x0[:, 0], 0.25)
    np.testing.assert_array_equal(found.trajectory[1:, 1, 0], 0.25)
    assert (np.asarray(found.trajectory[:3, 0, 0]) != 0.25).all()
    for row, times in ((0, [1.0, 0.2]), (3, [0.9, 0.2])):
        whole = ddjax.sample(jax.random.key(0), denoise, process, times=jnp.asarray(times), **settings)
        np.testing.assert_allclose(found.trajectory[0, row, 1], whole.trajectory[0, row, 1], rtol=1e-12)


def test_where_all_rest_the_network_is_not_called():
    calls = []

    def denoise(xt, t, cond):
        jax.debug.callback(lambda: calls.append(1))
        return Prediction(0.5 * xt, "x0")

    process, times = Gaussian(CondOT()), jnp.asarray([[1.0, 1.0, 0.5, 0.5], [1.0, 1.0, 1.0, 1.0]])
    out = ddjax.sample(jax.random.key(0), denoise, process, shape=(2, 1), solver=DDIM(process), times=times)
    jax.block_until_ready(out.x0)
    jax.effects_barrier()
    assert len(calls) == 1
    np.testing.assert_array_equal(out.nfe, [1, 0])


def test_grids_of_each_example_are_checked():
    process = Gaussian(CondOT())
    for times, words in (
        (jnp.ones((3, 2)), r"no grids for 2 examples: give \(steps \+ 1,\) or \(2, steps \+ 1\)"),
        (jnp.ones((2, 1)), "no grids"),
        (jnp.asarray([[1.0, 0.5], [0.5, 0.6]]), "must not increase"),
        (jnp.asarray([[1.1, 0.5], [0.5, 0.5]]), "must not increase"),
    ):
        with pytest.raises(ValueError, match=words):
            ddjax.sample(jax.random.key(0), None, process, shape=(2, 1), solver=DDIM(process), times=times)
