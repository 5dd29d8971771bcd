"""A denoiser of one schedule under another: the exact denoiser of a mixture is that of the other schedule."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddjax
from ddjax import random
from ddjax.fixtures import GaussianMixture
from ddjax.likelihood import nelbo
from ddjax.predictions import GAUSSIAN_KINDS, Prediction, bind, evaluations
from ddjax.processes import Gaussian
from ddjax.retiming import retime
from ddjax.schedules import EDM, VE, CondOT, LogSNRLinear, Monotone, PerSite, SubVP, VPCosine, VPLinear
from ddjax.solvers import DDIM

LAW = GaussianMixture(dims=2, components=3)
PAIRS = [(VPLinear(), EDM()), (VE(1e-3, 80.0), CondOT()), (CondOT(), VPCosine()), (Monotone.initial(4), SubVP())]
pairs = pytest.mark.parametrize(("old", "new"), PAIRS, ids=repr)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def both(old, new, kind, xt, t):
    """Each kind of what the retimed and the native denoiser say."""
    retimed = retime(LAW.denoise(old, kind), old, new)(xt, t)
    native = LAW.denoise(new, "x0")(xt, t)
    return [{k: new.convert(p, k, xt, t).value for k in GAUSSIAN_KINDS} for p in (retimed, native)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", GAUSSIAN_KINDS)
@pairs
def test_it_is_the_denoiser_of_the_other_schedule(x64, old, new, kind):
    old, new = Gaussian(old, 0.8), Gaussian(new, 0.8)
    log_snr = jnp.linspace(7.0, -4.0, 6)  # which all of them have
    t = new.schedule.time(log_snr)
    x0 = LAW.sample(random.example_keys(jax.random.key(0), 6))
    xt = new.marginal(x0, t).sample(random.example_keys(jax.random.key(1), 6))
    retimed, native = both(old, new, kind, xt, t)
    for name in GAUSSIAN_KINDS:
        np.testing.assert_allclose(retimed[name], native[name], rtol=1e-10, atol=1e-10, err_msg=name)


@pytest.mark.slow
def test_a_sampler_makes_the_same_steps(x64):
    """DDIM sees sigma / alpha alone: on grids of the same noise levels its x / alpha are the same."""
    old, new = Gaussian(VPLinear()), Gaussian(EDM())
    log_snr = jnp.linspace(-8.0, 9.0, 9)
    shape = {"shape": (4, 2)}
    z = random.normal(random.example_keys(jax.random.key(2), 4), (2,), float)
    ends = []
    for process, denoise in ((old, LAW.denoise(old)), (new, retime(LAW.denoise(old, "v"), old, new))):
        times = process.schedule.time(log_snr)
        init = process.prior((2,)).std * 0 + process.schedule.sigma(times[0]) * z
        out = ddjax.sample(jax.random.key(0), denoise, process, solver=DDIM(process), times=times, init=init, **shape)
        ends.append(out.x0 / process.schedule.alpha(times[-1]))
    np.testing.assert_allclose(ends[0], ends[1], rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_the_bound_is_that_of_the_other_schedule(x64):
    old, new = Gaussian(VPCosine()), Gaussian(LogSNRLinear(9.0, -6.0, "ve"))
    x0 = LAW.sample(random.example_keys(jax.random.key(0), 50))
    native, retimed = (
        nelbo(jax.random.key(1), d, new, x0, num_times=4, t_range=(0.05, 0.95))
        for d in (LAW.denoise(new), retime(LAW.denoise(old, "noise"), old, new))
    )
    np.testing.assert_allclose(retimed.total, native.total, rtol=1e-9)


@pytest.mark.parametrize("kind", ["x0", "velocity", "edm"])
def test_noise_levels_that_the_old_schedule_lacks_are_finite_in_float32(kind):
    """At t = 0 there is nothing to remove; at the noisy end the network sees the width it knows."""
    old, new = Gaussian(VPCosine()), Gaussian(EDM(500.0))
    seen = []

    def apply(params, x, t, cond):
        seen.append((x, t))
        return jnp.tanh(x)

    denoise = retime(bind(apply, {}, old, kind), old, new)
    xt = jnp.asarray([[0.3, -0.4], [300.0, -600.0]])
    out = denoise(xt, jnp.asarray([0.0, 1.0]))
    x0 = new.convert(out, "x0", xt, jnp.asarray([0.0, 1.0])).value
    assert np.isfinite(np.asarray(x0)).all()
    assert np.abs(np.asarray(seen[0][0])).max() < 3
    if kind != "x0":
        np.testing.assert_allclose(x0[0], xt[0], rtol=1e-6)


def test_network_evaluations_and_errors():
    process = Gaussian(VPLinear())
    denoise = LAW.denoise(process)
    assert evaluations(retime(denoise, process, Gaussian(EDM()))) == 1
    with pytest.raises(ValueError, match="data_std"):
        retime(denoise, process, Gaussian(EDM(), 0.5))
    with pytest.raises(ValueError, match="all sites"):
        retime(denoise, process, Gaussian(PerSite.initial((2,))))


def test_it_is_a_pytree():
    old, new = Gaussian(VPLinear()), Gaussian(EDM())
    denoise = retime(bind(lambda p, x, t, c: p["a"] * x, {"a": jnp.ones(())}, old, "noise"), old, new)
    doubled = jax.tree.map(lambda a: 2 * a, denoise)
    x, t = jnp.ones((1, 2)), jnp.full((1,), 0.1)
    call = jax.jit(lambda d, x, t: d(x, t))
    once, twice = call(denoise, x, t), call(doubled, x, t)
    assert isinstance(once, Prediction)
    np.testing.assert_allclose(twice.value, 2 * once.value, rtol=1e-6)
