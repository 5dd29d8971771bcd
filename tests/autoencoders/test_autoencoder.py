"""The autoencoder: its objective from its parts, its gradient, its file, and what it learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddjax
from ddjax import autoencoders, config, data
from ddjax.autoencoders import Autoencoder, LookupFree
from ddjax.experiment import build

SMALL = Autoencoder((8, 8, 1), width=8, quantiser=LookupFree(6, groups=2))
PLAIN = dataclasses.replace(SMALL, quantiser=None, channels=3, halvings=1)
X = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (5, 8, 8, 1)), jnp.float32)


@pytest.fixture(scope="module")
def params():
    return jax.jit(SMALL.init)(jax.random.key(0))


def test_shapes_and_tokens(params):
    assert SMALL.latent_shape == (2, 2, 6)

    @jax.jit
    def run(params, x):
        tokens, latents = SMALL.tokens(params, x), SMALL.encode(params, x)
        return tokens, latents, SMALL.decode(params, latents), SMALL.from_tokens(params, tokens)

    tokens, latents, images, again = run(params, X)
    assert (tokens.shape, tokens.dtype) == ((5, 2, 2, 2), jnp.int32)
    np.testing.assert_array_equal(np.abs(latents), 1.0)
    assert images.shape == X.shape
    np.testing.assert_allclose(again, images, atol=1e-6)


@pytest.mark.slow
def test_continuous_latents():
    params = PLAIN.init(jax.random.key(0))
    latents = PLAIN.encode(params, X)
    assert latents.shape == (5, *PLAIN.latent_shape) == (5, 4, 4, 3)
    alone = PLAIN.encode(params, X[1:2])  # an example does not depend on its neighbours
    np.testing.assert_allclose(alone, latents[1:2], atol=1e-5)
    np.testing.assert_allclose(PLAIN.decode(params, alone), PLAIN.decode(params, latents)[1:2], atol=1e-5)
    loss, metrics = PLAIN.objective(None, None, params, X)
    np.testing.assert_allclose(loss, np.mean((np.asarray(PLAIN.decode(params, latents)) - X) ** 2), rtol=1e-5)
    assert set(metrics) == {"reconstruction"}
    with pytest.raises(ValueError, match="has no tokens without a quantiser"):
        PLAIN.tokens(params, X)


@pytest.mark.slow
def test_the_objective_and_its_gradient(params):
    """The encoder learns by the decoder's gradient at the signs, as if they were its numbers, and by the quantiser."""
    moved = jax.tree.map(lambda p: p + 0.1 * jnp.cos(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), params)
    (loss, metrics), slope = jax.value_and_grad(
        lambda p: SMALL.objective(None, None, p, X), has_aux=True
    )(moved)  # fmt: skip
    plain = dataclasses.replace(SMALL, quantiser=None, channels=6)
    z, back = jax.vjp(lambda p: plain.encode({"encoder": p}, X), moved["encoder"])
    found = SMALL.quantiser(z)
    error = lambda latents: jnp.mean((plain.decode(moved, latents) - X) ** 2)
    np.testing.assert_allclose(metrics["reconstruction"], error(found.value), rtol=1e-5)
    np.testing.assert_allclose(loss, error(found.value) + found.loss, rtol=1e-5)
    at_z = jax.grad(error)(found.value) + jax.grad(lambda z: SMALL.quantiser(z).loss)(z)
    for a, b in zip(jax.tree.leaves(slope["encoder"]), jax.tree.leaves(back(at_z)[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)
        assert 0 < np.abs(a).max() < np.inf


def test_a_file_gives_it_back(params, tmp_path):
    path = tmp_path / "a.safetensors"
    autoencoders.save(path, SMALL, params)
    again, read = autoencoders.load(path)
    assert again == SMALL
    jax.tree.map(np.testing.assert_array_equal, read, jax.tree.map(np.asarray, params))
    ddjax.training.export_safetensors(path, {"a": np.zeros(1)})
    with pytest.raises(ValueError, match="holds no autoencoder"):
        autoencoders.load(path)


def test_what_does_not_fit(params):
    for message, make in {
        "2\\*\\*halvings = 4": lambda: Autoencoder((6, 8, 1), channels=2),
        "either a quantiser or the channels": lambda: Autoencoder((8, 8, 1)),
        "was built for": lambda: SMALL.encode(params, X[:, :4]),
        "leave out weights": lambda: SMALL.objective(None, None, params, X, weights=jnp.ones(5)),
    }.items():
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.slow
def test_it_learns_digits_and_a_network_learns_its_tokens():
    """Unseen digits are reconstructed far better than by their mean; a network by bits takes and draws their tokens."""
    train, test = (data.load("digits", split, tokens=False) for split in ("train", "test"))
    autoencoder = Autoencoder((8, 8, 1), width=16, halvings=1, quantiser=LookupFree(6, groups=2))
    seen = []
    params = autoencoders.train(
        jax.random.key(0), autoencoder, train, steps=200, learning_rate=3e-3, report=lambda n, m: seen.append((n, m))
    )
    assert [n for n, _ in seen] == [50, 100, 150, 200]
    x = test[:]["x0"]
    error = np.mean((np.asarray(autoencoder.from_tokens(params, autoencoder.tokens(params, x))) - x) ** 2)
    assert error < 0.4 * np.mean((train[:]["x0"].mean(axis=0) - x) ** 2)

    tokens = autoencoders.tokenise(autoencoder, params, train, batch_size=1000)
    np.testing.assert_array_equal(tokens[1200:1210], autoencoder.tokens(params, train[1200:1210]["x0"]))
    values = config.default()
    values.objective.name = "any_order"
    values.denoiser.options = {"width": 16, "depth": 1, "heads": 2, "bits": 3, "time": False}
    experiment = build(config.typed(values), data.from_arrays(tokens, train[:]["cond"], num_symbols=8))
    network, items = experiment.init(jax.random.key(1)), jnp.asarray(tokens[:64])
    loss, _ = experiment.objective()(jax.random.key(2), experiment.apply, network, items, jnp.zeros(64, jnp.int32))
    np.testing.assert_allclose(loss, np.log(8.0), rtol=1e-5)  # per site, of a network that starts without an opinion
    drawn = ddjax.sample(
        jax.random.key(3), experiment.denoiser(network, 1.0, None), experiment.process, shape=(2, 4, 4, 2),
        solver=experiment.solver(), times=experiment.times(4),
    )  # fmt: skip
    assert autoencoder.from_tokens(params, drawn.x0).shape == (2, 8, 8, 1)
