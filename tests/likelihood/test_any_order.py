"""The k-of-L estimator: the bound itself, with less noise."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax import random
from ddjax.fixtures import Categorical, exact_nelbo
from ddjax.likelihood import any_order, nelbo
from ddjax.likelihood.bound import mean_and_error
from ddjax.predictions import Prediction
from ddjax.processes import Masked, Uniform
from ddjax.schedules import Cosine
from ddjax.types import Rows

LAW, PROCESS = Categorical(3, 3), Masked(3, Cosine())
TABLE = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4, 3)))


def wrong(xt, t, cond=None):
    """Logits from a site and its neighbour: nobody's denoiser."""
    return Prediction(TABLE[xt, jnp.roll(xt, 1, axis=-1)], "posterior")


def enumerated(x, known=()):
    """The mean over all orders of the autoregressive code length, -sum_i log p(x_i | those before it in the order)."""
    unknown = [i for i in range(len(x)) if i not in known]
    orders = list(itertools.permutations(unknown))
    shown = []
    for order in orders:
        state = np.where(np.isin(np.arange(len(x)), unknown), PROCESS.mask, x)
        for i in order:
            shown.append((state.copy(), i))
            state[i] = x[i]
    states, which = jnp.asarray([s for s, _ in shown]), np.asarray([i for _, i in shown])
    log_p = np.asarray(jax.nn.log_softmax(wrong(states, None).value))[np.arange(len(which)), which, x[which]]
    return -log_p.sum() / len(orders)


@pytest.mark.parametrize("known", [(), (1,)])
def test_the_mean_over_orders(known):
    """Of one example, by all its orders, with and without a known site."""
    x, batch = np.asarray([2, 0, 1]), 4000
    given = None if not known else jnp.broadcast_to(jnp.isin(jnp.arange(3), jnp.asarray(known)), (batch, 3))
    bound = any_order(jax.random.key(0), wrong, PROCESS, jnp.broadcast_to(x, (batch, 3)), num_draws=6, known=given)
    draws = np.asarray(bound.total)
    assert abs(draws.mean() - enumerated(x, known)) < 4 * draws.std() / math.sqrt(batch)
    assert draws.std() / math.sqrt(batch) < 0.02
    # What it says of its own error is right to the gain of stratification.
    assert draws.std() < 1.1 * float(np.sqrt(np.mean(np.asarray(bound.diffusion_error) ** 2)))


def test_it_is_the_bound_with_less_variance():
    x0 = LAW.sample(random.example_keys(jax.random.key(1), 8000))
    with jax.enable_x64(True):
        exact = float(exact_nelbo(LAW, wrong, PROCESS, t_range=(1e-7, 1.0), order=24).total[0])
    by_count = any_order(jax.random.key(0), wrong, PROCESS, x0, num_draws=4)
    by_time = nelbo(jax.random.key(0), wrong, PROCESS, x0, num_times=4)
    total = np.asarray(by_count.total)
    assert abs(total.mean() - exact) < 4 * total.std() / math.sqrt(8000)
    assert float(by_count.diffusion_error.mean()) < 0.7 * float(by_time.diffusion_error.mean())


def test_one_draw_and_one_site():
    one = any_order(jax.random.key(0), wrong, Masked(3), jnp.asarray([[1]]), num_draws=1)
    expected = -jax.nn.log_softmax(wrong(jnp.asarray([[3]]), None).value)[0, 0, 1]
    np.testing.assert_allclose(one.total, [expected], rtol=1e-6)
    assert np.isinf(one.diffusion_error[0])
    assert one.perplexity() == pytest.approx(float(jnp.exp(expected)))
    assert one.perplexity(units=2) == pytest.approx(float(jnp.exp(expected / 2)))
    nothing = any_order(jax.random.key(0), wrong, Masked(3), jnp.asarray([[1]]), known=jnp.asarray([[True]]))
    assert float(nothing.total[0]) == 0.0


@pytest.mark.slow
def test_rows_and_refusals():
    x0 = LAW.sample(random.example_keys(jax.random.key(1), 6))
    whole = any_order(jax.random.key(0), wrong, PROCESS, x0)
    half = any_order(jax.random.key(0), wrong, PROCESS, x0[4:], rows=Rows(jnp.arange(4, 6), 6))
    np.testing.assert_array_equal(whole.total[4:], half.total)
    with pytest.raises(ValueError, match="masked process's bound, got Uniform; use nelbo"):
        any_order(jax.random.key(0), wrong, Uniform(3), x0)
    with pytest.raises(ValueError, match="num_draws must be at least 1, got 0"):
        any_order(jax.random.key(0), wrong, PROCESS, x0, num_draws=0)
    with pytest.raises(ValueError, match=r"known has shape \(3,\); give one entry per site, \(6, 3\)"):
        any_order(jax.random.key(0), wrong, PROCESS, x0, known=jnp.ones(3, bool))


def test_the_error_is_that_of_a_mean():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=(5, 4)).astype(np.float32)
    mean, error = mean_and_error(lambda j: jnp.asarray(values)[j], 5, 4, jnp.float32)
    np.testing.assert_allclose(mean, values.mean(0), rtol=1e-5)
    np.testing.assert_allclose(error, values.std(0, ddof=1) / math.sqrt(5), rtol=1e-5)
