"""The training loss is the bound's diffusion term, whatever the batch is split into."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ddjax
from ddjax import random
from ddjax.fixtures import Categorical, exact_nelbo
from ddjax.objectives import any_order, elbo
from ddjax.objectives.base import Reduction, weighted_mean
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian, Masked, Uniform
from ddjax.schedules import CondOT, Cosine, Polynomial
from ddjax.training import init_state, make_train_step

LAW = Categorical(2, 3)


def apply(params, xt, t, cond, *, rng=None, train=False):
    """A wrong network: logits from the state alone."""
    return params[xt] + params[xt[:, ::-1]] * 0.3


def parameters(process, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(process.num_states, 3)), jnp.float32)


def denoiser(process, params):
    return lambda xt, t, cond: Prediction(apply(params, xt, t, cond), "cavity")


def data(batch, seed=0):
    return LAW.sample(random.example_keys(jax.random.key(100 + seed), batch))


def mean_and_error(objective, params, batch=512, repeats=60):
    """The objective averaged over steps, and its standard error."""

    @jax.jit
    def run(i):
        x0 = LAW.sample(random.example_keys(jax.random.fold_in(jax.random.key(1), i), batch))
        return objective(jax.random.fold_in(jax.random.key(0), i), apply, params, x0)[0]

    losses = np.asarray(jax.lax.map(run, jnp.arange(repeats)))
    return losses.mean(), losses.std() / math.sqrt(repeats)


@pytest.mark.slow
@pytest.mark.parametrize("process", [Masked(3), Masked(3, Cosine()), Uniform(3), Uniform(3, Polynomial(2.0))], ids=repr)
def test_expected_loss_is_the_diffusion_term_per_site(process):
    params = parameters(process)
    with jax.enable_x64(True):
        exact = exact_nelbo(LAW, denoiser(process, params), process, t_range=(0.1, 0.8), order=24)
    mean, error = mean_and_error(elbo(process, "cavity", t_range=(0.1, 0.8)), params)
    assert error < 0.02 * mean
    assert abs(mean - float(exact.diffusion[0]) / 2) < 4 * error


@pytest.mark.slow
def test_any_order_is_the_whole_bound():
    """The same expectation as the bound over all of [0, 1], with less variance."""
    process = Masked(3, Cosine())
    params = parameters(process)
    with jax.enable_x64(True):
        exact = exact_nelbo(LAW, denoiser(process, params), process, t_range=(0.0, 1.0), order=24)
    mean, error = mean_and_error(any_order(process), params)
    assert abs(mean - float(exact.diffusion[0]) / 2) < 4 * error
    assert error < mean_and_error(elbo(process, "posterior"), params)[1]
    with pytest.raises(ValueError, match="masked"):
        any_order(Uniform(3))


@pytest.mark.slow
@pytest.mark.parametrize("make", [elbo, any_order])
def test_microbatches_with_rows_give_the_whole(make):
    """The mean of two halves is the loss of the whole, and so are the gradients."""
    process = Masked(3)
    objective, x0, params, key = make(process, "posterior"), data(10), parameters(process), lambda: jax.random.key(7)
    run = jax.value_and_grad(lambda p, x, rows: objective(key(), apply, p, x, rows=rows)[0])
    whole, gradient = run(params, x0, None)
    halves = [run(params, x0[i : i + 5], ddjax.Rows(jnp.arange(i, i + 5), 10)) for i in (0, 5)]
    np.testing.assert_allclose(np.mean([value for value, _ in halves]), whole, rtol=1e-6)
    np.testing.assert_allclose(np.mean([g for _, g in halves], axis=0), gradient, rtol=1e-5, atol=1e-7)
    alone, _ = run(params, x0[:5], None)  # without rows it is another batch
    assert abs(float(alone - halves[0][0])) > 1e-4


def test_errors_are_reduced_by_weights_of_sites_or_of_examples():
    """Nats per site; what a known site costs is not looked at."""
    errors = jnp.asarray([[1.0, 2.0], [4.0, jnp.nan]])
    by_site = Reduction.of(jnp.asarray([[1.0, 3.0], [0.5, 0.0]]), errors)
    np.testing.assert_array_equal(by_site.totals(errors), [7.0, 2.0])
    assert by_site(errors) == 2.0
    by_example = Reduction.of(jnp.asarray([3.0, 1.0]), errors)
    assert by_example(jnp.asarray([[1.0, 3.0], [4.0, 8.0]])) == 3.0
    assert Reduction.of(None, errors)(jnp.asarray([[1.0, 3.0], [4.0, 8.0]])) == 4.0
    with pytest.raises(ValueError, match="or one per site"):
        Reduction.of(jnp.ones((2, 3)), errors)


def test_weights():
    np.testing.assert_allclose(weighted_mean(jnp.asarray([1.0, 2.0, 6.0]), None), 3.0)
    np.testing.assert_allclose(weighted_mean(jnp.asarray([1.0, 2.0, 6.0]), jnp.asarray([1.0, 1.0, 2.0])), 15 / 4)
    assert float(weighted_mean(jnp.ones(2), jnp.zeros(2))) == 0.0
    process = Masked(3)
    objective, x0, params, key = elbo(process, "posterior"), data(6), parameters(process), lambda: jax.random.key(7)
    kept = objective(key(), apply, params, x0, weights=jnp.asarray([1.0, 1, 1, 1, 0, 0]))[0]
    other = x0.at[4:].set(2 - x0[4:])  # examples of weight 0 do not matter
    np.testing.assert_allclose(
        kept, objective(key(), apply, params, other, weights=jnp.asarray([1.0] * 4 + [0.0] * 2))[0]
    )
    ones = objective(key(), apply, params, x0, weights=jnp.ones(6))[0]
    np.testing.assert_allclose(ones, objective(key(), apply, params, x0)[0], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("process", [Masked(3), Uniform(3), Masked(3, Cosine()), Uniform(3, Cosine())], ids=repr)
def test_gradients_are_finite(process):
    objective, x0 = elbo(process, "cavity"), data(256)
    for scale in (1.0, 30.0):
        loss = lambda p: objective(jax.random.key(1), apply, p, x0)[0]
        value, gradient = jax.value_and_grad(loss)(scale * parameters(process))
        assert np.isfinite(value)
        assert np.isfinite(np.asarray(gradient)).all()
        assert np.abs(np.asarray(gradient)).max() > 0


@pytest.mark.slow
def test_the_network_gets_train_and_keys_only_while_training():
    seen = []

    def spy(params, xt, t, cond, **options):
        seen.append(options)
        return params[xt]

    process = Masked(3)
    for train in (True, False):
        elbo(process, "posterior")(jax.random.key(0), spy, parameters(process), data(4), train=train)
    assert seen[0]["train"] is True
    assert seen[0]["rng"].shape == (4,)
    assert seen[1] == {}


def test_metrics_and_errors():
    process = Gaussian(CondOT())
    linear = lambda params, xt, t, cond, **_: params * xt
    loss, metrics = elbo(process, "x0")(jax.random.key(0), linear, jnp.asarray(0.5), jnp.ones((4, 2)))
    assert loss.shape == ()
    np.testing.assert_array_equal(metrics["loss"], loss)
    with pytest.raises(ValueError, match="does not understand"):
        elbo(process, "posterior")(jax.random.key(0), linear, jnp.asarray(0.5), jnp.ones((4, 2)))


@pytest.mark.slow
def test_accumulation_with_weights_per_site(x64):
    """Microbatches count by the weights of their sites."""
    process, x0 = Masked(3), data(8)
    weights = jnp.asarray(np.random.default_rng(0).uniform(0, 2, x0.shape)).at[:4, 0].set(0.0)
    optimizer = optax.sgd(1.0)

    def moved(accumulate):
        network = lambda *arguments, **options: apply(*arguments, **options).astype(float)
        step = make_train_step(elbo(process, "posterior"), network, optimizer, accumulate=accumulate)
        state = init_state(lambda key: {"w": parameters(process).astype(float)}, optimizer, jax.random.key(0))
        return jax.jit(step)(state, {"x0": x0, "weights": weights})[0].params["w"]

    def apply(params, xt, t, cond, *, rng=None, train=False):
        return params["w"][xt]

    np.testing.assert_allclose(moved(2), moved(1), atol=1e-12)
    assert float(jnp.abs(moved(1) - parameters(process)).max()) > 1e-3


@pytest.mark.slow
def test_any_order_tells_the_time_of_its_masks_and_asks_nothing_of_the_others():
    process, x0, seen = Masked(3, Cosine()), data(8), []

    def loss(shift):
        def apply(params, xt, t, cond, *, rng=None, train=False):
            seen.append((xt, t))
            return shift

        return any_order(process)(jax.random.key(0), apply, {}, x0)[0]

    slope = jax.grad(loss)(jnp.zeros((*x0.shape, 3)))
    xt, t = seen[0]
    masks = np.asarray(xt) == process.mask
    np.testing.assert_allclose(process.schedule.sigma(t), masks.mean(axis=1), rtol=1e-5)
    assert set(masks.sum(axis=1)) == {1, 2}
    np.testing.assert_array_equal(np.abs(np.asarray(slope)).sum(-1) > 0, masks)
