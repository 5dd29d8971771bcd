"""Predictions say what they mean, and pass through jit; importing ddjax is cheap."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddjax
from ddjax.predictions import CATEGORICAL_KINDS, GAUSSIAN_KINDS, Prediction, evaluations
from ddjax.processes import Gaussian, Masked, Uniform
from ddjax.pytrees import as_pytree
from ddjax.schedules import EDM


def apply(params, xt, t, cond, *, rng=None, train=False):
    out = params["scale"] * xt + t[:, None]
    return out + 100.0 if train else out


def test_a_prediction_is_a_pytree_with_a_static_kind():
    prediction = Prediction(jnp.ones((2, 3)), "noise")
    doubled = jax.jit(lambda p: jax.tree.map(lambda v: 2 * v, p))(prediction)
    assert doubled.kind == "noise"
    np.testing.assert_array_equal(doubled.value, 2.0)
    assert len(jax.tree.leaves(prediction)) == 1


@pytest.mark.parametrize("process", [Gaussian(), Masked(3), Uniform(3)], ids=repr)
def test_bind_knows_the_kinds_of_its_process(process):
    ours, others = (GAUSSIAN_KINDS, CATEGORICAL_KINDS)[:: 1 if process.state == "gaussian" else -1]
    others = set(others) - set(ours)  # both have a velocity
    for kind in ours:
        assert ddjax.bind(apply, {}, process, kind).kind == kind
    for kind in (*others, "epsilon", ""):
        with pytest.raises(ValueError, match=type(process).__name__):
            ddjax.bind(apply, {}, process, kind)


def test_bind_calls_the_network():
    xt, t = jnp.ones((2, 3)), jnp.asarray([0.25, 0.5])
    denoise = ddjax.bind(apply, {"scale": 2.0}, Gaussian(), "noise")
    prediction = denoise(xt, t)
    np.testing.assert_allclose(prediction.value, 2.0 * xt + t[:, None])
    assert prediction.kind == "noise"
    training = ddjax.bind(apply, {"scale": 2.0}, Gaussian(), "noise", train=True)
    np.testing.assert_allclose(training(xt, t).value, prediction.value + 100.0)
    # EDM's network sees scaled inputs.
    process = Gaussian(EDM(), data_std=0.5)
    edm = ddjax.bind(apply, {"scale": 1.0}, process, "edm")(xt, t).value
    sigma = 80.0 * t[:, None]
    np.testing.assert_allclose(edm, xt / jnp.sqrt(sigma**2 + 0.25) + jnp.log(sigma) / 4, rtol=1e-5)


def test_a_bound_network_compiles_once():
    traces = []

    def counting(params, xt, t, cond):
        traces.append(1)
        return params * xt

    call = jax.jit(lambda denoise, xt, t: denoise(xt, t).value)
    for value in (1.0, 2.0):
        out = call(ddjax.bind(counting, jnp.asarray(value), Gaussian(EDM()), "x0"), jnp.ones((1, 2)), jnp.ones(1))
        np.testing.assert_allclose(out, value)
    assert len(traces) == 1


def test_any_callable_passes_through_jit():
    denoise = lambda xt, t, cond=None: Prediction(xt + 1, "x0")
    out = jax.jit(lambda d, x: d(x, None).value)(as_pytree(denoise), jnp.ones(2))
    np.testing.assert_array_equal(out, 2.0)
    bound = ddjax.bind(apply, {"scale": 1.0}, Gaussian(), "x0")
    assert as_pytree(bound) is bound


def test_evaluations_are_counted_through_wrapping():
    class Twice:
        evaluations = 2

        def __call__(self, xt, t, cond=None):
            return Prediction(xt, "x0")

    assert evaluations(Twice()) == evaluations(as_pytree(Twice())) == 2
    assert evaluations(lambda xt, t, cond: xt) == 1


@pytest.mark.slow
def test_importing_the_core_is_light():
    """All of the mathematics, module by module: none of it needs a network's library."""
    code = """
import importlib, pkgutil, sys, ddjax
rooms = "schedules processes objectives likelihood solvers inversion guidance particles fixtures".split()
for room in rooms:
    for module in pkgutil.iter_modules(getattr(ddjax, room).__path__, f"ddjax.{room}."):
        importlib.import_module(module.name)
for name in "sampling sites taps lora editing groups search relaxed latents animation".split():
    importlib.import_module(f"ddjax.{name}")
heavy = set("tensorflow torch matplotlib pandas sklearn grain orbax flax PIL wandb".split())
print(sorted({m.split(".")[0] for m in sys.modules} & heavy))
print(sorted(m for m in sys.modules if m.startswith("ddjax.denoisers")))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["[]", "[]"], out.stdout
