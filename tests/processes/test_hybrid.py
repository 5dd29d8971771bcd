"""Mask and uniform noise together: the published marginal, Bayes' rule, the published loss, and its end as Masked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax import random
from ddjax.fixtures import Categorical, exact_nelbo
from ddjax.fixtures.categorical import all_states
from ddjax.likelihood import nelbo
from ddjax.predictions import Prediction
from ddjax.processes import Hybrid, Masked

P = Hybrid(3, uniform_share=0.2)
N = P.num_states


def published(t, k=3, share=0.2):
    """q_t(y | x) as the paper writes it: ((1 - t) e_x + t e_m + c u) / C."""
    c = 2 * share / (1 - share) * np.sqrt(t * (1 - t))
    return ((1 - t) * np.eye(k, k + 1) + t * np.eye(k + 1)[k] + c * np.append(np.full(k, 1 / k), 0)) / (1 + c)


def transition(s, t):
    """Q_{t|s} for every state, from alpha and noise alone: its rows keep alpha_t / alpha_s of what is there."""
    q_s, q_t = published(s), published(t)
    alpha_s, alpha_t = (q[0, 0] - q[1, 0] for q in (q_s, q_t))
    noise_s, noise_t = q_s[0] - alpha_s * np.eye(N)[0], q_t[0] - alpha_t * np.eye(N)[0]
    return alpha_t / alpha_s * np.eye(N) + (noise_t - alpha_t / alpha_s * noise_s)


def pairs():
    x0, y = np.meshgrid(range(3), range(N), indexing="ij")
    return jnp.asarray(x0.reshape(-1, 1)), jnp.asarray(y.reshape(-1, 1))


def table(distribution, batch):
    """Probabilities of every state at each of `batch` single sites."""
    return np.stack([np.exp(distribution.log_prob(jnp.full((batch, 1), y)))[:, 0] for y in range(N)], -1)


def full(t, batch):
    return jnp.full(batch, t)


@pytest.mark.slow
def test_marginal_and_bridge(x64):
    x0, xt = pairs()
    a, b = np.asarray(x0)[:, 0], np.asarray(xt)[:, 0]
    for s, t in ((0.0, 0.3), (0.2, 0.6), (0.95, 0.999), (0.4, 1.0)):
        q_s, q_t, q_ts = published(s), published(t), transition(s, t)
        assert (q_ts > -1e-15).all()
        np.testing.assert_allclose(q_s @ q_ts, q_t, atol=1e-12)
        ours = table(P.marginal(jnp.arange(3)[:, None], full(t, 3)), 3)
        np.testing.assert_allclose(ours, q_t, atol=1e-12)
        possible = q_t[a, b] > 0
        expected = (q_s[a] * q_ts[:, b].T)[possible] / q_t[a, b][possible][:, None]
        bridge = table(P.bridge(x0, xt, full(s, len(a)), full(t, len(a))), len(a))
        np.testing.assert_allclose(bridge[possible], expected, atol=1e-10)


def test_rate_is_the_derivative_of_the_transition(x64):
    y = jnp.arange(N)[:, None]
    for t in (0.05, 0.5, 0.9):
        h = 1e-6
        rate = np.asarray(P.rate_into(y, full(t, N)))[:, 0]
        difference = (transition(t - h, t + h) - np.eye(N)) / (2 * h)
        for x in range(N):
            others = np.arange(N) != x
            np.testing.assert_allclose(rate[others], difference[x, others], rtol=1e-5)


@pytest.mark.slow
def test_the_schedule_is_its_own_inverse_and_derivative(x64):
    t = jnp.asarray([1e-6, 0.01, 0.3, 0.7, 0.999])
    schedule = P.schedule
    np.testing.assert_allclose(schedule.time_of_sigma(schedule.sigma(t)), t, rtol=1e-10)
    slope = jax.vmap(jax.grad(schedule.sigma))(t)
    np.testing.assert_allclose(schedule.sigma_prime(t), slope, rtol=1e-9)
    np.testing.assert_allclose(schedule.alpha(t) + schedule.sigma(t), 1.0, rtol=1e-14)
    assert float(schedule.time_of_sigma(jnp.asarray(0.0))) == 0.0 == float(schedule.alpha(jnp.asarray(1.0)))


@pytest.mark.slow
def test_path_kl_is_the_published_loss(x64):
    """w (KL(q || p) + r - log r - 1) with q = q_t(. | x), p = q_t(. | x_theta), r = q(z) / p(z), w = rate / q(z)."""
    x0, xt = pairs()
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(len(x0), 1, 3)))
    law, b = np.asarray(jax.nn.softmax(logits))[:, 0], np.asarray(xt)[:, 0]
    for t in (0.1, 0.8):
        c, dc = 0.5 * np.sqrt(t * (1 - t)), 0.25 * (1 - 2 * t) / np.sqrt(t * (1 - t))
        q_t = published(t)
        q, model = q_t[np.asarray(x0)[:, 0]], law @ q_t
        here, there = q[np.arange(len(b)), b], model[np.arange(len(b)), b]
        kl, r = np.sum(q * np.log(q / model), -1), here / there
        into = np.where(b == 3, 1 / (1 - t), (dc + c / (1 - t)) / 3) / (1 + c)
        expected = into / here * (kl + r - np.log(r) - 1)
        ours = P.path_kl(x0, Prediction(logits, "cavity"), xt, full(t, len(b)))[:, 0]
        np.testing.assert_allclose(ours, expected, rtol=1e-10)


@pytest.mark.slow
def test_a_posterior_read_as_a_cavity_is_dearer(x64):
    law = Categorical(2, 3)
    wrong = lambda xt, t, cond: Prediction(law.denoise(P, "posterior")(xt, t).value, "cavity")
    assert float(exact_nelbo(law, wrong, P, order=16).total[0]) > law.entropy + 0.05


def test_without_uniform_noise_it_is_masked(x64):
    law, hybrid, masked = Categorical(2, 3), Hybrid(3, uniform_share=0.0), Masked(3)
    xt = jnp.asarray(all_states(2, 4))
    prediction = law.denoise(masked, "posterior")(xt, full(0.4, 16))
    s, t = full(0.3, 16), full(0.4, 16)
    ours, theirs = (
        np.stack([np.exp(p.reverse(prediction, xt, s, t).log_prob(jnp.full_like(xt, y))) for y in range(4)])
        for p in (hybrid, masked)
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-12)
    at_masks = jnp.full((3, 2), 3)
    x0 = jnp.arange(3)[:, None] + jnp.zeros((1, 2), int)
    guess = Prediction(jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 3))), "cavity")
    kl = [p.path_kl(x0, guess, at_masks, full(0.4, 3)) for p in (hybrid, masked)]
    np.testing.assert_allclose(*kl, rtol=1e-10)


@pytest.mark.slow
def test_draws_follow_the_marginal():
    x0 = jnp.ones((40_000, 1), jnp.int32)
    xt = np.asarray(P.marginal(x0, full(0.5, 40_000)).sample(random.example_keys(jax.random.key(0), 40_000)))
    np.testing.assert_allclose(np.bincount(xt[:, 0], minlength=4) / 40_000, published(0.5)[1], atol=0.01)
    # At the noise end nothing but masks, for one example of one site.
    one = P.marginal(x0[:1], full(1.0, 1)).sample(random.example_keys(jax.random.key(0), 1))
    assert int(one[0, 0]) == P.mask


@pytest.mark.slow
def test_bound_and_gradient_in_float32():
    """Times as drawn, close to both ends, where rates are infinite."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(64, 2, 3)), jnp.float32)
    x0 = jnp.asarray(np.random.default_rng(1).integers(0, 3, (64, 2)))
    u = jnp.concatenate([jnp.asarray([0.0, 1e-8, 1 - 2.0**-24, 1.0]), jnp.linspace(0, 1, 60)]).astype(jnp.float32)

    def loss(logits):
        t, dt = P.time_at(u, (0.0, 1.0))
        xt = P.marginal(x0, t).sample(random.example_keys(jax.random.key(0), 64))
        return jnp.mean(dt[:, None] * P.path_kl(x0, Prediction(logits, "cavity"), xt, t))

    value, gradient = jax.value_and_grad(loss)(logits)
    assert np.isfinite(float(value))
    assert np.isfinite(np.asarray(gradient)).all()
    bound = nelbo(jax.random.key(2), lambda xt, t, cond: Prediction(logits, "cavity"), P, x0)
    assert np.isfinite(np.asarray(bound.total)).all()


def test_a_share_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"uniform_share lies in \[0, 1\), got 1.0"):
        Hybrid(3, uniform_share=1.0)
