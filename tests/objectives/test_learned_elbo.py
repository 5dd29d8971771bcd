"""Network and schedule trained together: the loss is the bound, its slopes those of the exact bound and variance."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddjax import random
from ddjax.likelihood import binned
from ddjax.objectives import learned_elbo
from ddjax.processes import Gaussian, LinearSDE
from ddjax.schedules import CondOT, Monotone, PerSite, VPLinear

STD, ENDS = 0.7, (5.0, -3.0)
HIDDEN = np.random.default_rng(0).normal(size=(3, 4)) * np.asarray([[3.0], [1.0], [2.0]])
PROCESS = Gaussian(Monotone(ENDS, 0.5, HIDDEN, clock=ENDS), STD)
X, W = np.polynomial.hermite_e.hermegauss(5)  # exact for the squares of quadratic losses
W = W / W.sum()
NODES, WEIGHTS = np.polynomial.legendre.leggauss(40)
T = ((np.arange(8)[:, None] + 0.5 * (NODES + 1)) / 8).ravel()
DT = np.tile(WEIGHTS / 16, 8)


def apply(params, xt, t, cond, *, rng=None, train=False):
    """A linear network told the clock: predicts the noise, not exactly."""
    return xt * (params["a"] + params["b"] * t[:, None])


def parameters(process=PROCESS):
    return {"network": {"a": jnp.asarray(0.1), "b": jnp.asarray(0.2)}, "process": process.parameters}


def schedule(p, t):
    """gamma = -log-SNR and its slope, from the paper's formulas, written here again."""
    a, b, c = jnp.abs(p["hidden"][0]), p["hidden"][1], jnp.abs(p["hidden"][2])
    f = lambda t: jnp.abs(p["slope"]) * t + (2 * (jax.nn.sigmoid(a * (2 * t - 1) + b) - 0.5) * c).mean()
    low, high = -p["ends"]
    gamma = lambda t: low + (high - low) * (f(t) - f(0.0)) / (f(1.0) - f(0.0))
    return gamma(t), jax.grad(gamma)(t)


@jax.jit
def exact(params):
    """Diffusion term, mean square of it, prior and reconstruction by quadrature over t, x0 and noise."""
    network, p = params["network"], params["process"]
    gamma, slope = jax.vmap(functools.partial(schedule, p))(jnp.asarray(T))
    gamma, slope = gamma[:, None, None], slope[:, None, None]
    x0, z = STD * jnp.asarray(X)[:, None], jnp.asarray(X)[None, :]
    alpha, sigma = jax.nn.sigmoid(-gamma) ** 0.5, jax.nn.sigmoid(gamma) ** 0.5
    told = (ENDS[0] + gamma) / (ENDS[0] - ENDS[1])
    guess = (alpha * x0 + sigma * z) * (network["a"] + network["b"] * told)
    cost = 0.5 * slope * (z - guess) ** 2  # Kingma et al. 2021, eq. 17
    mean = lambda values: jnp.einsum("n,i,j,nij->", DT, W, W, values)
    high, low = p["ends"]
    s2 = jnp.exp(-high)
    variance = jax.nn.sigmoid(-low) + jax.nn.sigmoid(low) * STD**2  # of the prior: the data's own at t = 1
    prior = 0.5 * jnp.log(variance / jax.nn.sigmoid(-low))
    return mean(cost), mean(cost**2), prior, 0.5 * jnp.log(2 * jnp.pi * s2) + 0.5


@functools.cache
def draws():
    """Losses, metrics and slopes of many batches."""
    objective = learned_elbo(PROCESS, "noise")

    def one(key, params):
        data_key, key = jax.random.split(key)
        x0 = STD * random.normal(random.example_keys(data_key, 500), (1,), float)
        return jax.value_and_grad(lambda p: objective(key, apply, p, x0), has_aux=True)(params)

    keys = jax.random.split(jax.random.key(0), 100)
    return jax.jit(jax.vmap(one, in_axes=(0, None)))(keys, parameters())


def close(values, expected, name):
    values = np.asarray(values)
    error = values.std(0) / math.sqrt(len(values))
    assert (np.abs(values.mean(0) - expected) < 5 * error + 1e-9).all(), (name, values.mean(0), expected, error)
    assert (error < 0.1 * np.abs(expected).max() + 1e-9).all(), (name, error, expected)  # it could have failed


@pytest.mark.slow
def test_the_loss_is_the_bound(x64):
    (loss, metrics), _ = draws()
    diffusion, _, prior, decoder = exact(parameters())
    for name, value in (("diffusion", diffusion), ("prior", prior), ("reconstruction", decoder)):
        close(metrics[name], value, name)
    close(loss, diffusion + prior + decoder, "loss")
    np.testing.assert_array_equal(metrics["loss"], loss)


@pytest.mark.slow
def test_network_and_ends_follow_the_bound_and_the_shape_its_variance(x64):
    _, slopes = draws()
    params = parameters()
    of_bound = jax.grad(lambda p: sum(exact(p)[i] for i in (0, 2, 3)))(params)
    of_square = jax.grad(lambda p: exact(p)[1])(params)
    for name in ("a", "b"):
        close(slopes["network"][name], of_bound["network"][name], name)
    close(slopes["process"]["ends"], of_bound["process"]["ends"], "ends")
    for name in Monotone.variance_parameters:
        close(slopes["process"][name], of_square["process"][name], name)


def test_training_the_shape_lowers_the_variance_to_its_least(x64):
    """The mean square is least where the slope is 1 / root mean square in log-SNR: (integral of that root)^2."""
    params = parameters()
    objective, optimizer = learned_elbo(PROCESS, "noise"), optax.adam(0.02)

    def step(carry, key):
        p, state = carry
        data_key, key = jax.random.split(key)
        x0 = STD * random.normal(random.example_keys(data_key, 256), (1,), float)
        slope = jax.grad(lambda q: objective(key, apply, q, x0)[0])(p)["process"]
        slope["ends"] = jnp.zeros(2)  # the network and the ends stay as they are
        updates, state = optimizer.update(slope, state)
        return ({**p, "process": optax.apply_updates(p["process"], updates)}, state), None

    keys = jax.random.split(jax.random.key(1), 400)
    run = jax.jit(lambda p, keys: jax.lax.scan(step, (p, optimizer.init(p["process"])), keys)[0][0])
    before, after = exact(params), exact(run(params, keys))
    np.testing.assert_allclose(after[0], before[0], rtol=1e-6)  # the bound has not moved
    # At each log-SNR the root mean square of the noise's squared error / 2: the slope of a straight line divided out.
    straight = {"network": params["network"], "process": params["process"] | {"hidden": jnp.zeros((3, 4))}}
    width = ENDS[0] - ENDS[1]
    told = jnp.asarray(T)[:, None, None]
    gamma = -ENDS[0] + width * told
    x0, z = STD * X[:, None], X[None, :]
    guess = (jax.nn.sigmoid(-gamma) ** 0.5 * x0 + jax.nn.sigmoid(gamma) ** 0.5 * z) * (0.1 + 0.2 * told)
    root = jnp.einsum("i,j,nij->n", W, W, (0.5 * (z - guess) ** 2) ** 2) ** 0.5
    least = float((width * DT @ root) ** 2)
    assert float(exact(straight)[1]) > least
    assert least <= after[1] < least + 0.3 * (float(before[1]) - least)


def test_sites_of_weight_zero_cost_nothing_and_weights_count(x64):
    objective, params = learned_elbo(PROCESS, "noise"), parameters()
    x0 = STD * random.normal(random.example_keys(jax.random.key(3), 6), (2,), float)
    # The network sees each site by itself, so a site given is a site left out.
    weights = jnp.asarray([[1.0, 0.0]] * 6)
    loss = jax.jit(
        lambda x, w: jax.value_and_grad(lambda p: objective(jax.random.key(0), apply, p, x, weights=w)[0])(params)
    )
    given, slopes = loss(x0, weights)
    other, _ = loss(x0.at[:, 1].set(5.0), weights)
    np.testing.assert_allclose(given, other, rtol=1e-12)
    twice, double = loss(x0, 2 * weights)
    np.testing.assert_allclose(given, twice, rtol=1e-12)
    assert all(np.isfinite(v).all() for v in jax.tree.leaves((slopes, double)))
    left_out, _ = loss(x0, jnp.asarray([1.0, 1.0, 1.0, 0.0, 0.0, 0.0]))
    changed, _ = loss(x0.at[3:].set(9.0), jnp.asarray([1.0, 1.0, 1.0, 0.0, 0.0, 0.0]))
    np.testing.assert_allclose(left_out, changed, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [Monotone.initial(4), PerSite.initial((3,))], ids=["monotone", "per_site"])
def test_slopes_are_finite_in_float32_with_a_binned_decoder(schedule):
    process = Gaussian(schedule)
    objective = learned_elbo(process, "noise", reconstruction=binned((-1.0, 0.0, 1.0)))
    x0 = jnp.asarray(np.random.default_rng(0).integers(-1, 2, (4, 3)), jnp.float32)
    run = jax.jit(jax.value_and_grad(lambda p: objective(jax.random.key(0), apply, p, x0), has_aux=True))
    (loss, metrics), slopes = run(parameters(process))
    assert loss.dtype == jnp.float32
    assert 0 <= metrics["reconstruction"] < 1e-3
    for value in jax.tree.leaves(slopes):
        assert np.isfinite(value).all()
        assert np.abs(value).max() > 0


def test_errors():
    with pytest.raises(ValueError, match="parameters"):
        learned_elbo(Gaussian(CondOT()), "noise")
    with pytest.raises(ValueError, match="t_range"):
        learned_elbo(PROCESS, "noise", t_range=(0.5, 0.5))
    with pytest.raises(ValueError, match="posterior"):
        learned_elbo(PROCESS, "posterior")


@pytest.mark.slow
def test_it_must_begin_where_there_is_noise():
    process = LinearSDE([[0.0], [1.0]], [[0.0, -1.0], [1.0, 0.0]], VPLinear())
    with pytest.raises(ValueError, match=r"no noise, and the bound there is infinite: .* t_range=\(0.04"):
        learned_elbo(process, "noise")
    learned_elbo(process, "noise", t_range=process.t_range)
