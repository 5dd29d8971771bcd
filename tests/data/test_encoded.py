"""Latents in the place of images: scale times draws from q(z | x), and images again."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from ddjax import autoencoders
from ddjax.autoencoders import Autoencoder, KLAutoencoder, LookupFree
from ddjax.data import Latents, encoded, from_arrays, scale_of
from ddjax.data.describe import describe, from_description

SHAPE, N = (8, 8, 1), 70
X = np.random.default_rng(0).uniform(-1, 1, size=(N, *SHAPE)).astype(np.float32)


def random_params(autoencoder, seed=0):
    shapes, rng = jax.eval_shape(autoencoder.init, jax.random.key(0)), np.random.default_rng(seed)
    return jax.tree.map(lambda v: (0.3 * rng.normal(size=v.shape)).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    autoencoder = KLAutoencoder(SHAPE, channels=3, width=4, multipliers=(1, 2), blocks=1, groups=2)
    params = random_params(autoencoder)
    path = tmp_path_factory.mktemp("latents") / "kl.safetensors"
    autoencoders.save(path, autoencoder, params)
    return path, autoencoder, params


@pytest.mark.slow
def test_draws_scaled_and_images_again(made):
    path, autoencoder, params = made
    data = from_arrays(X, np.arange(N) % 4)
    latents = Latents(str(path), 0.25)
    found = encoded(data, latents, rounds=3, seed=5)
    assert (found.shape, len(found), found.num_classes, found.levels, found.is_image) == ((4, 4, 3), 210, 4, None, True)
    rows = np.array([69, 3, 139])  # the first and the last are the same image
    items = found[rows]
    np.testing.assert_array_equal(items["cond"], data[rows % N]["cond"])
    posterior = autoencoder.posterior(params, X[rows % N])
    mean, std = (np.asarray(v) for v in (posterior.mean, np.exp(0.5 * np.asarray(posterior.log_variance))))
    noise = (items["x0"] / 0.25 - mean) / std
    np.testing.assert_allclose(mean[0], mean[2], rtol=1e-5)
    assert abs(np.corrcoef(noise[0].ravel(), noise[2].ravel())[0, 1]) < 0.6
    # By the row, whatever else is read (but for the last bit, which goes by the number of images).
    np.testing.assert_allclose(found[rows[1:]]["x0"], items["x0"][1:], rtol=1e-5, atol=1e-6)
    every = found[:]
    own = autoencoder.posterior(params, X)
    normals = (every["x0"].reshape(3, N, 4, 4, 3) / 0.25 - own.mean) / np.exp(0.5 * np.asarray(own.log_variance))
    assert abs(normals.mean()) < 5 / np.sqrt(normals.size)
    assert abs(normals.std() - 1) < 5 / np.sqrt(2 * normals.size)

    images = np.asarray(autoencoder.decode(params, mean))
    shades = np.rint(np.clip((images.astype(np.float64) + 1) * 127.5, 0, 255))
    assert np.abs(found.to_images(0.25 * mean).astype(int) - shades).max() <= 1
    with pytest.raises(ValueError, match="expected states"):
        found.to_images(images)
    back = from_description(json.loads(json.dumps(describe(found))))
    assert (back.latents, back.shape, back.is_image) == (latents, (4, 4, 3), True)
    np.testing.assert_array_equal(back.to_images(0.25 * mean), found.to_images(0.25 * mean))


def test_the_scale_makes_the_deviation_one(made):
    path, *_ = made
    data = from_arrays(X)
    scale = scale_of(data, path)
    first = encoded(data, Latents(str(path), scale))[:]["x0"]
    assert abs(first.std(dtype=np.float64) - 1) < 1e-6
    assert abs(first.mean()) > 1e-3  # not centred: theirs is not


@pytest.mark.slow
def test_other_autoencoders(tmp_path):
    plain = Autoencoder(SHAPE, width=4, halvings=1, channels=2)
    params = random_params(plain)
    autoencoders.save(tmp_path / "plain.safetensors", plain, params)
    found = encoded(from_arrays(X), Latents(str(tmp_path / "plain.safetensors"), 2.0))
    np.testing.assert_allclose(found[:3]["x0"], 2 * np.asarray(plain.encode(params, X[:3])), rtol=1e-5, atol=1e-5)
    bits = dataclasses.replace(plain, channels=None, quantiser=LookupFree(2))
    autoencoders.save(tmp_path / "bits.safetensors", bits, random_params(bits))
    found = encoded(from_arrays(X), Latents(str(tmp_path / "bits.safetensors"), 1.0))
    assert set(np.unique(found[:3]["x0"])) <= {-1.0, 1.0}


def test_what_does_not_fit(made):
    path, *_ = made
    latents = Latents(str(path), 1.0)
    with pytest.raises(ValueError, match="are tokens"):
        encoded(from_arrays((X * 0).astype(np.uint8)), latents)
    with pytest.raises(ValueError, match=r"have shape \(4, 4, 1\)"):
        encoded(from_arrays(X[:, :4, :4]), latents)
    with pytest.raises(ValueError, match="rounds"):
        encoded(from_arrays(X), latents, rounds=0)
    with pytest.raises(FileNotFoundError):
        encoded(from_arrays(X), Latents("nowhere.safetensors", 1.0))
