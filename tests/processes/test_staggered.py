"""A clock for each site: nothing lost, autoregression as its end, any process inside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddjax
from ddjax import grids, random
from ddjax.fixtures import Categorical, exact_nelbo
from ddjax.likelihood import nelbo
from ddjax.objectives import elbo
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian, Masked, Staggered, Thinning, Uniform, Windows, in_blocks
from ddjax.schedules import CondOT, Cosine
from ddjax.solvers import Ancestral

OVERLAPPING = Windows(start=[0.0, 0.1], stop=[0.5, 1.0])
IN_TURN = Windows(start=[0.5, 0.0], stop=[1.0, 0.5])
inner = pytest.mark.parametrize("process", [Masked(3), Uniform(3, Cosine())], ids=lambda p: type(p).__name__)


@inner
def test_nelbo_is_the_entropy(x64, process):
    """The edges of the windows are edges of the quadrature's pieces; under uniform noise each start is a logarithm."""
    windows = OVERLAPPING if isinstance(process, Masked) else Windows(start=0.0, stop=[0.5, 1.0])
    law, process = Categorical(2, 3), Staggered(process, windows)
    bound = exact_nelbo(law, law.denoise(process, "cavity"), process, t_range=(0.0, 1.0), order=32)
    np.testing.assert_allclose(float(bound.total[0]), law.entropy, atol=1e-6)


@inner
def test_one_site_after_the_other_is_autoregression(x64, process):
    """Two steps, each of one whole window: exact, where two steps of the plain process are not."""
    law, times = Categorical(2, 3), grids.uniform(2)
    in_turn = Staggered(process, IN_TURN)
    bound = exact_nelbo(law, law.denoise(in_turn, "cavity"), in_turn, times=times)
    np.testing.assert_allclose(float(bound.total[0]), law.entropy, atol=1e-9)
    assert float(exact_nelbo(law, law.denoise(process), process, times=times).total[0]) > law.entropy + 1e-3


def test_two_exact_steps_draw_the_law():
    law, batch = Categorical(2, 3), 20_000
    process = Staggered(Masked(3), IN_TURN)
    with jax.debug_key_reuse(False):
        out = ddjax.sample(
            jax.random.key(0),
            law.denoise(process),
            process,
            shape=(batch, 2),
            solver=Ancestral(process),
            times=grids.uniform(2),
        )
    counts = np.bincount(np.asarray(out.x0) @ np.asarray([3, 1]), minlength=9) / batch
    np.testing.assert_allclose(counts, np.exp(np.asarray(law.log_p)), atol=0.015)


@pytest.mark.slow
@inner
def test_equal_windows_are_the_process(x64, process):
    whole = Staggered(process, Windows(start=0.0, stop=1.0))
    x0, xt = jnp.asarray([[0, 1, 2]]), jnp.asarray([[process.num_states - 1, 1, process.num_states - 1]])
    prediction = Prediction(jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 3))), "cavity")
    s, t = jnp.asarray([0.3]), jnp.asarray([0.6])
    for name, arguments in {
        "path_kl": (x0, prediction, xt, t),
        "step_kl": (x0, prediction, xt, s, t),
        "prior_kl": (x0, t),
        "reconstruction": (x0, prediction, xt, t),
    }.items():
        np.testing.assert_allclose(getattr(whole, name)(*arguments), getattr(process, name)(*arguments), rtol=1e-12)


def test_bound_and_gradient_are_finite_at_every_time():
    process = Staggered(Masked(3), Windows(start=[0.0, 0.5, 0.7], stop=[0.4, 0.9, 1.0]))
    x0 = jnp.asarray(np.random.default_rng(0).integers(0, 3, (64, 3)))
    apply = lambda params, xt, t, cond, **_: params[xt]
    params = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)), jnp.float32)
    loss, gradient = jax.value_and_grad(
        lambda p: elbo(process, "posterior", t_range=(0.0, 1.0))(jax.random.key(0), apply, p, x0)[0]
    )(params)
    assert np.isfinite(float(loss))
    assert np.isfinite(np.asarray(gradient)).all()
    bound = nelbo(jax.random.key(1), lambda xt, t, cond: Prediction(params[xt], "posterior"), process, x0)
    assert np.isfinite(np.asarray(bound.total)).all()
    assert bound.t_range[0] == pytest.approx(0.4 * Masked(3).t_range[0])


def test_gaussian_states():
    """A site is clean before its window and noise after it; samplers pass through."""
    process = Staggered(Gaussian(CondOT()), Windows(start=[0.0, 0.6], stop=[0.4, 1.0]))
    x0 = jnp.ones((2, 2))
    xt = process.marginal(x0, jnp.asarray([0.5, 0.5])).sample(random.example_keys(jax.random.key(0), 2))
    np.testing.assert_array_equal(xt[:, 1], 1.0)
    assert (xt[:, 0] != 1.0).all()
    out = ddjax.sample(
        jax.random.key(0),
        lambda xt, t, cond: Prediction(jnp.ones_like(xt), "x0"),
        process,
        shape=(2, 2),
        solver=Ancestral(process),
        times=grids.uniform(10),
    )
    np.testing.assert_allclose(out.x0, 1.0, atol=1e-5)


@pytest.mark.parametrize(("start", "stop"), [(0.5, 0.5), (-0.1, 1.0), (0.0, 1.1), ([0.0, 0.9], [1.0, 0.8])])
def test_bad_windows_are_refused(start, stop):
    with pytest.raises(ValueError, match="each site needs 0 <= start < stop <= 1"):
        Windows(start=start, stop=stop)


def test_a_networks_output_is_read_at_each_sites_own_time():
    """Thinning's deaths are sigma(t_i) softplus(output): none at a site that is still clean."""
    process = Staggered(Thinning(4), Windows(start=[0.0, 0.6], stop=[0.5, 1.0]))
    denoise = ddjax.bind(lambda params, xt, t, cond: jnp.zeros((*xt.shape, 1)), {}, process, "deaths")
    prediction = denoise(jnp.zeros((1, 2), int), jnp.asarray([0.25]))
    np.testing.assert_allclose(prediction.value, [[0.5 * np.log(2.0), 0.0]], rtol=1e-6)


@pytest.mark.slow
def test_blocks_of_one_site_are_autoregression(x64):
    """One step a block: the chain's bound is the entropy. Each site's own time is told."""
    law, process = Categorical(3, 2), in_blocks(Masked(2), 3, 1)
    bound = exact_nelbo(law, law.denoise(process), process, times=grids.in_turn(grids.uniform(1), 3))
    np.testing.assert_allclose(float(bound.total[0]), law.entropy, atol=1e-9)
    xt = jnp.asarray([[0, 1, 2], [0, 1, 2]])
    _, own = process.network_inputs(xt, jnp.asarray([0.5, 1.0]), "posterior")
    np.testing.assert_allclose(own, [[0.0, 0.5, 1.0], [1.0, 1.0, 1.0]], atol=1e-12)


def test_a_last_block_may_be_shorter():
    process = in_blocks(Masked(2), 5, 2)
    np.testing.assert_allclose(process.clock.start.values, np.array([2, 2, 1, 1, 0]) / 3)
    np.testing.assert_allclose(process.clock.stop.values, np.array([3, 3, 2, 2, 1]) / 3)
    for length, block in ((0, 1), (4, 0)):
        with pytest.raises(ValueError, match="blocks need at least one site"):
            in_blocks(Masked(2), length, block)
