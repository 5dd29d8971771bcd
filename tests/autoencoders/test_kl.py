"""The autoencoder of latent diffusion, its law and its training (equal to diffusers': tests/interop/test_vae.py)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax import autoencoders, data, random
from ddjax.autoencoders import KLAutoencoder, KLObjective, Posterior

SMALL = KLAutoencoder((8, 8, 1), channels=2, width=4, multipliers=(1, 2), blocks=1, groups=2)


def random_params(autoencoder):
    shapes, rng = jax.eval_shape(autoencoder.init, jax.random.key(0)), np.random.default_rng(0)
    return jax.tree.map(lambda v: (0.3 * rng.normal(size=v.shape)).astype(np.float32), shapes)


def test_the_law_of_latents():
    rng = np.random.default_rng(0)
    mean, log_variance = rng.normal(size=(2, 3, 2, 2, 4))
    law = Posterior(jnp.asarray(mean, jnp.float32), jnp.asarray(log_variance, jnp.float32))
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    z = mean[..., None] + np.exp(0.5 * log_variance)[..., None] * nodes
    log_ratio = -0.5 * (nodes**2 + log_variance[..., None]) + 0.5 * z**2  # log q - log N(0, 1), by quadrature
    wanted = (log_ratio @ weights / np.sqrt(2 * np.pi)).sum((1, 2, 3))
    np.testing.assert_allclose(law.kl(), wanted, rtol=1e-5)
    keys = random.example_keys(jax.random.key(0), jnp.arange(20_000))
    wide = Posterior(*(jnp.broadcast_to(v[:1], (20_000, 2, 2, 4)) for v in law))
    drawn = np.asarray(wide.sample(keys))
    np.testing.assert_allclose(drawn.mean(0), mean[0], atol=5 * np.exp(0.5 * log_variance[0]).max() / 141)
    np.testing.assert_allclose(drawn.std(0), np.exp(0.5 * log_variance[0]), rtol=0.03)


@pytest.mark.slow
def test_shapes_and_gradients():
    assert SMALL.latent_shape == (4, 4, 2)
    attending = dataclasses.replace(SMALL, attend_at=(4,), quant=(True, False))
    for autoencoder in (SMALL, attending):
        params = random_params(autoencoder)
        x = np.random.default_rng(0).normal(size=(3, 8, 8, 1)).astype(np.float32)
        assert autoencoder.decode(params, autoencoder.encode(params, x)).shape == x.shape
        np.testing.assert_allclose(
            autoencoder.encode(params, x)[1:2], autoencoder.encode(params, x[1:2]), rtol=1e-4, atol=1e-5
        )
        objective = KLObjective(autoencoder, kl=0.1, width=4, layers=1)
        whole = objective.init(jax.random.key(1)) | {"autoencoder": params}
        loss = lambda p, o=objective, x=x: o(jax.random.key(2), None, p, x)[0]
        gradients = jax.jit(jax.grad(loss))(whole)
        dead = [jax.tree_util.keystr(k) for k, v in jax.tree_util.tree_leaves_with_path(gradients) if not v.any()]
        # Where no patch is judged for certain, the hinges of real and reconstructed ones cancel in the last bias.
        assert set(dead) <= {"['discriminator']['convs']['2']['bias']"}


def test_what_does_not_fit():
    with pytest.raises(ValueError, match="expected"):
        KLAutoencoder((8, 8))
    with pytest.raises(ValueError, match="halve"):
        KLAutoencoder((6, 8, 1), multipliers=(1, 1, 1))
    with pytest.raises(ValueError, match="images have shape"):
        SMALL.posterior({}, np.zeros((1, 8, 8, 3), np.float32))
    other = KLAutoencoder((8, 8, 1), width=4)
    with pytest.raises(ValueError, match="objective is of another autoencoder"):
        autoencoders.train(jax.random.key(0), other, None, steps=1, objective=KLObjective(SMALL))
    with pytest.raises(ValueError, match="no weights"):
        KLObjective(SMALL)(jax.random.key(0), None, {"autoencoder": {}, "log_variance": 0.0}, None, weights=1)


@pytest.mark.slow
def test_training_with_a_discriminator_that_joins_later():
    digits, seen = data.load("digits", "train", tokens=False), []
    autoencoder = dataclasses.replace(SMALL, width=8, groups=4)
    objective = KLObjective(autoencoder, kl=1e-4, width=8, layers=1)
    params = autoencoders.train(
        jax.random.key(0), autoencoder, digits, steps=60, batch_size=32, learning_rate=3e-3, objective=objective,
        adversarial_from=30, report=lambda step, metrics: seen.append((step, metrics)), every=10, ema=0.9, b1=0.5,
    )  # fmt: skip
    assert ["discriminator" in metrics for _, metrics in seen] == [False] * 3 + [True] * 3
    x = digits[:64]["x0"]
    error = np.abs(np.asarray(autoencoder.decode(params, autoencoder.encode(params, x))) - x).mean()
    assert error < 0.6 * np.abs(x - x.mean(0)).mean()
    assert np.isfinite([v for _, metrics in seen for v in metrics.values()]).all()
    assert seen[-1][1]["discriminator"] < 1.5  # 1 says nothing
    plain = autoencoders.train(jax.random.key(0), autoencoder, digits, steps=2)
    assert plain.keys() == params.keys() == {"encoder", "decoder"}
