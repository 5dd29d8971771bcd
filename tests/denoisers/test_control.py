"""A side network that is shown an image: at first nothing, then the published sum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax.denoisers import DiT, functional_init, taps
from ddjax.denoisers.control import attach

RNG = np.random.default_rng(1)
SMALL = {"shape": (4, 4, 1), "patch": 2, "width": 8, "depth": 3, "heads": 2, "num_classes": 3}
X, IMAGE = (RNG.normal(size=(3, 4, 4, n)).astype(np.float32) for n in (1, 2))
T, LABELS = np.float32([0.1, 0.5, 0.9]), np.int32([2, 0, 3])
COND = {"image": IMAGE, "cond": LABELS}


def make(rngs, **options):
    return DiT(**SMALL, **options, rngs=rngs)


@pytest.fixture(scope="module")
def trunk(noise):
    init, apply = functional_init(make)
    return apply, noise(jax.eval_shape(init, jax.random.key(0)))


@pytest.mark.slow
def test_a_new_one_is_the_trunk_bit_for_bit(trunk):
    plain, params = trunk
    apply, side = attach(make, params, blocks=2, channels=2, key=jax.random.key(1))
    expected = plain(params, X, T, LABELS)
    np.testing.assert_array_equal(apply(side, X, T, COND), expected)
    np.testing.assert_array_equal(apply(side, X, T, LABELS), expected)
    assert "final" not in side["side"]
    assert set(side["side"]["stack"]["blocks"]) == {"0", "1"}
    blocks = params["stack"]["blocks"]
    for i in "01":
        jax.tree.map(np.testing.assert_array_equal, side["side"]["stack"]["blocks"][i], blocks[i])


@pytest.mark.slow
def test_what_it_adds_is_made_of_its_own_blocks(trunk, noise):
    """Every layer by hand: the copy fed with the image's patches, its blocks' outputs added to the trunk's."""
    plain, params = trunk
    apply, side = attach(make, params, blocks=2, channels=2, key=jax.random.key(1))
    side = noise(side, seed=3)
    patches = IMAGE.reshape(3, 2, 2, 2, 2, 2).swapaxes(2, 3).reshape(3, 4, 8)
    hint = patches @ side["hint"]["kernel"] + side["hint"]["bias"]
    # The copy as a whole network, whose last block is not heard.
    copy = {**side["side"], "final": params["final"]}
    copy["stack"] = {"blocks": {**copy["stack"]["blocks"], "2": params["stack"]["blocks"]["2"]}}
    with taps.override({"embed": lambda h: h + hint}), taps.record("block/0", "block/1") as seen:
        plain(copy, X, T, LABELS)
    out = [seen[f"block/{i}"] @ side["out"][str(i)]["kernel"] + side["out"][str(i)]["bias"] for i in range(2)]
    with taps.override({f"block/{i}": lambda h, i=i: h + out[i] for i in range(2)}):
        expected = plain(params, X, T, LABELS)
    with taps.record("block/1", "block/0/attention/weights") as heard:
        np.testing.assert_allclose(apply(side, X, T, COND), expected, atol=1e-5)
    assert np.abs(expected - plain(params, X, T, LABELS)).max() > 1e-2
    with taps.record("block/0/attention/weights") as own:
        plain(params, X, T, LABELS)
    name = "block/0/attention/weights"
    np.testing.assert_array_equal(heard[name], own[name])
    # Outside, the trunk's taps are meant, and not the copy's of the same names.
    with taps.override({f"block/{i}": lambda h, i=i: h + (i == 0) + out[i] for i in range(2)}):
        expected = plain(params, X, T, LABELS)
    with taps.override({"block/0": lambda h: h + 1}):
        np.testing.assert_allclose(apply(side, X, T, COND), expected, atol=1e-5)


@pytest.mark.slow
def test_all_of_the_side_network_learns_and_rows_do_not_mix(trunk, noise, jit):
    _, params = trunk
    apply, side = attach(make, params, blocks=2, channels=2, key=jax.random.key(1))
    side = noise(side, seed=3)
    grads = jit(jax.grad(lambda p: (apply(p, X, T, COND) ** 2).sum()))(side)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert np.abs(g).max() > 1e-5, path
    whole = apply(side, X, T, COND)
    one = apply(side, X[1:2], T[1:2], jax.tree.map(lambda c: c[1:2], COND))
    np.testing.assert_allclose(one[0], whole[1], atol=1e-5)
    small = functools.partial(make, dtype=jnp.bfloat16)
    apply, side = attach(small, params, blocks=1, channels=2, key=jax.random.key(1))
    assert apply(side, X, T, COND).dtype == jnp.float32


@pytest.mark.slow
def test_errors(trunk):
    _, params = trunk
    for options, blocks, message in (
        ({"scan": True}, 1, "scan=False"),
        ({"image_channels": 1}, 1, "must not be shown an image itself"),
        ({}, 4, "blocks=4: expected from 1 to the trunk's 3"),
    ):
        with pytest.raises(ValueError, match=message):
            attach(functools.partial(make, **options), params, blocks=blocks, channels=2, key=jax.random.key(1))
    apply, side = attach(make, params, blocks=1, channels=2, key=jax.random.key(1))
    with pytest.raises(ValueError, match="says nothing of groups or of a past"):
        apply(side, X, T, {"groups": np.zeros((3, 4), int), "cond": COND})
    with pytest.raises(ValueError, match=r'cond\["image"\] has shape'):
        apply(side, X, T, {"image": X})
