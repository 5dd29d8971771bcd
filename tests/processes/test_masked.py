"""What is special about the mask."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax import random
from ddjax.predictions import Prediction
from ddjax.processes import Masked
from ddjax.processes.categorical import cross_entropy
from ddjax.schedules import Cosine, LogLinear

PROCESS = Masked(4, Cosine())


def states(batch, sites=6):
    return jnp.asarray(np.random.default_rng(0).integers(0, 5, (batch, sites)))


@pytest.mark.slow
@pytest.mark.parametrize("s", [0.3, 0.0])
def test_carry_over(s):
    """Revealed sites never change, whatever the network says; masks turn into symbols or stay."""
    xt = states(500)
    t = jnp.full(500, 0.6)
    prediction = Prediction(jax.random.normal(jax.random.key(1), (500, 6, 4)) * 5, "posterior")
    xs = PROCESS.reverse(prediction, xt, jnp.full(500, s), t).sample(random.example_keys(jax.random.key(0), 500))
    shown = np.asarray(xt != PROCESS.mask)
    np.testing.assert_array_equal(np.asarray(xs)[shown], np.asarray(xt)[shown])
    masked = np.asarray(xs)[~shown]
    assert masked.max() <= PROCESS.mask
    if s == 0.0:
        assert masked.max() < PROCESS.mask  # nothing is masked at t = 0
    else:
        sigma_s, sigma_t = np.sin(0.5 * np.pi * 0.3), np.sin(0.5 * np.pi * 0.6)
        stay = sigma_s / sigma_t
        error = np.sqrt(stay * (1 - stay) / len(masked))
        assert abs((masked == PROCESS.mask).mean() - stay) < 4 * error


@pytest.mark.slow
def test_a_revealed_site_has_no_other_posterior():
    xt = states(20)
    t = jnp.full(20, 0.5)
    prediction = Prediction(jax.random.normal(jax.random.key(1), (20, 6, 4)) * 5, "posterior")
    posterior = np.asarray(jax.nn.softmax(PROCESS.convert(prediction, "posterior", xt, t).value))
    shown = np.asarray(xt != PROCESS.mask)
    np.testing.assert_allclose(posterior[shown], np.eye(5)[np.asarray(xt)[shown]][:, :4], atol=1e-7)
    np.testing.assert_allclose(posterior[~shown], np.asarray(jax.nn.softmax(prediction.value))[~shown], rtol=1e-5)


def test_the_loss_at_revealed_sites_is_zero():
    x0 = states(20) % 4
    xt = jnp.where(jnp.arange(6) < 3, x0, PROCESS.mask)
    value = jax.random.normal(jax.random.key(1), (20, 6, 4))
    loss = PROCESS.path_kl(x0, Prediction(value, "posterior"), xt, jnp.full(20, 0.5))
    assert (np.asarray(loss)[:, :3] == 0).all()
    assert (np.asarray(loss)[:, 3:] > 0).all()


def test_path_kl_is_weighted_cross_entropy(x64):
    """-alpha' / (1 - alpha) CE (Shi et al. 2024, eq. 5), the weight by autodiff."""
    x0, xt, t = jnp.asarray([[1]]), jnp.asarray([[4]]), jnp.asarray([0.3])
    value = jnp.asarray([[[0.3, -1.0, 2.0, 0.1]]])
    alpha = PROCESS.schedule.alpha(t[0])
    weight = -jax.grad(PROCESS.schedule.alpha)(t[0]) / (1 - alpha)
    expected = -weight * jax.nn.log_softmax(value)[0, 0, 1]
    np.testing.assert_allclose(PROCESS.path_kl(x0, Prediction(value, "posterior"), xt, t)[0, 0], expected, rtol=1e-12)


def test_cross_entropy_of_large_logits_keeps_its_digits():
    """log(1 + exp(-8)) far from 0, where logits are rounded to 6e-5 in float32; finite where p = 0."""
    logits = 1000.0 + jnp.asarray([[0.0, -8.0], [0.0, -1e30]])
    value, gradient = jax.value_and_grad(lambda z: cross_entropy(z, jnp.asarray([0, 0])).sum())(logits)
    np.testing.assert_allclose(value, np.log1p(np.exp(-8.0)), rtol=1e-3)
    np.testing.assert_allclose(gradient, np.asarray([[-1, 1], [0, 0]]) / (1 + np.exp(8.0)), atol=1e-7)
    assert cross_entropy(logits[1:], jnp.asarray([1])) == np.float32(1e30)


def test_small_steps_keep_small_probabilities():
    """A step of 2**-17 and 256 symbols alike: each is shown with chance 2**-25, of 2**19 masks 4 in all.

    One race between the symbols and staying, with the 23 random bits of JAX's default, shows none of them.
    """
    process, batch, sites, t, dt = Masked(256), 16, 2**11, 0.5, 2.0**-18
    xt = jnp.full((batch, sites), process.mask)
    prediction = Prediction(jnp.zeros((batch, sites, 256)), "posterior")
    reverse = process.reverse(prediction, xt, jnp.full(batch, t - dt), jnp.full(batch, t))

    @jax.jit
    def shown(keys):
        draw = lambda i: (reverse.sample(random.fold_in(keys, i)) != process.mask).sum()
        return jax.lax.map(draw, jnp.arange(16)).sum()

    assert 1 <= shown(random.example_keys(jax.random.key(3), batch)) <= 14


def test_survivors_at_the_end():
    """With alpha(1) = eps the prior shows symbols at that rate."""
    process = Masked(4, LogLinear(0.2))
    x = np.asarray(process.prior((20_000, 1)).sample(random.example_keys(jax.random.key(0), 20_000)))
    assert abs((x != 4).mean() - 0.2) < 4 * np.sqrt(0.16 / 20_000)


def test_observed_sites_show_their_symbol():
    x0 = states(3) % 4
    keys = random.example_keys(jax.random.key(0), 3)
    np.testing.assert_array_equal(PROCESS.observe(keys, x0, jnp.full(3, 0.9)), x0)
