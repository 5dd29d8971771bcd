"""The Gaussian denoiser against linear algebra, and what training finds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddjax.denoisers import LowRankGaussian, functional_init
from ddjax.schedules import VPCosine

SCHEDULE = VPCosine()


def test_it_is_the_conditional_mean(x64):
    """Of the joint Gaussian of x_0 and x_t, with all matrices written out."""
    init, apply = functional_init(
        lambda rngs: LowRankGaussian(shape=(2, 3), rank=2, schedule=SCHEDULE, num_classes=2, rngs=rngs)
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape), jax.eval_shape(init, jax.random.key(0)))
    xt, t, labels = rng.normal(size=(4, 2, 3)), np.array([0.0, 0.3, 0.9, 1.0]), np.array([0, 1, 2, 0], np.int32)
    covariance = params["factor"] @ params["factor"].T + np.exp(2 * params["log_rest"]) * np.eye(6)
    for i, out in enumerate(apply(params, xt, t, labels)):
        alpha, sigma = (np.float64(f(t[i])) for f in (SCHEDULE.alpha, SCHEDULE.sigma))
        mean = params["mean"][labels[i]]
        gain = alpha * covariance @ np.linalg.inv(alpha**2 * covariance + sigma**2 * np.eye(6))
        want = mean + gain @ (xt[i].ravel() - alpha * mean)
        np.testing.assert_allclose(out.ravel(), want, atol=1e-9)


@pytest.mark.slow
def test_training_finds_the_law():
    """Denoising loss, a Gaussian law of rank 2 and a rest: its mean and covariance come back."""
    rng = np.random.default_rng(0)
    mean, factor, rest = rng.normal(size=5), rng.normal(size=(5, 2)), 0.3
    init, apply = functional_init(lambda rngs: LowRankGaussian(shape=(5,), rank=2, schedule=SCHEDULE, rngs=rngs))
    params = init(jax.random.key(0))
    steps = 2000
    descent = optax.adam(optax.cosine_decay_schedule(0.03, steps))

    def loss(params, key):
        a, b, c, d = jax.random.split(key, 4)
        x0 = mean + jax.random.normal(a, (256, 2)) @ factor.T + rest * jax.random.normal(b, (256, 5))
        t = jax.random.uniform(c, (256,), minval=0.02, maxval=0.98)
        alpha, sigma = SCHEDULE.alpha(t)[:, None], SCHEDULE.sigma(t)[:, None]
        xt = alpha * x0 + sigma * jax.random.normal(d, x0.shape)
        return ((apply(params, xt, t) - x0) ** 2).mean()

    @jax.jit
    def train(params, keys):
        def step(carry, key):
            params, state = carry
            grads = jax.grad(loss)(params, key)
            updates, state = descent.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, descent.init(params)), keys)[0][0]

    params = train(params, jax.random.split(jax.random.key(1), steps))
    covariance = params["factor"] @ params["factor"].T + jnp.exp(2 * params["log_rest"]) * jnp.eye(5)
    np.testing.assert_allclose(params["mean"][0], mean, atol=0.1)
    want = factor @ factor.T + rest**2 * np.eye(5)
    np.testing.assert_allclose(covariance, want, atol=0.06 * np.abs(want).max())
    np.testing.assert_allclose(jnp.exp(params["log_rest"]), rest, atol=0.03)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="a rank up to 5"):
        functional_init(lambda rngs: LowRankGaussian(shape=(5,), rank=6, schedule=SCHEDULE, rngs=rngs))
