"""Sequences and volumes in the place of images: patches, positions, whole networks."""

import itertools

import numpy as np
import pytest
from flax import nnx

from ddjax.denoisers import DiT
from ddjax.denoisers.images import ImageNetwork
from ddjax.denoisers.layers import sincos

SHAPES = {"sequence": ((6, 2), 3), "image": ((4, 6, 2), 2), "volume": ((2, 4, 6, 2), 2)}


def slow_patches(x, p):
    """Patch by patch."""
    *sides, _ = x.shape[1:]
    corners = itertools.product(*(range(0, side, p) for side in sides))
    return np.stack([x[(slice(None), *(slice(i, i + p) for i in corner))] for corner in corners], axis=1)


@pytest.mark.parametrize("name", SHAPES)
def test_patches_and_back(name):
    shape, p = SHAPES[name]
    net = ImageNetwork(shape=shape, patch=p, symbols_in=None, symbols_out=None, width=8, rngs=nnx.Rngs(0))
    x = np.random.default_rng(4).normal(size=(2, *shape)).astype(np.float32)
    patches = np.asarray(net.patches(x))
    np.testing.assert_array_equal(patches, slow_patches(x, p))
    np.testing.assert_array_equal(net.images(patches.reshape(2, patches.shape[1], -1)), x)
    numbers = np.broadcast_to(net.places(), (1, *shape))
    for i, patch in enumerate(slow_patches(numbers, p)[0]):
        np.testing.assert_array_equal(patch, i)


def test_positions_say_where_along_each_axis():
    table = sincos((3, 4, 5), 20)
    assert table.shape == (60, 20)
    assert len(np.unique(table.round(5), axis=0)) == 60
    for number, place in enumerate(np.ndindex(3, 4, 5)):
        first = 0
        for n, size in zip(place, (6, 7, 7), strict=True):  # 20 features in three
            half = (size + 1) // 2
            angles = n / 10000 ** (np.arange(half) / half)
            expected = np.concatenate([np.sin(angles), np.cos(angles)])[:size]
            np.testing.assert_allclose(table[number, first : first + size], expected, atol=1e-5)
            first += size


@pytest.mark.parametrize("discrete", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_a_site_is_in_its_own_patch_and_all_see_it(name, discrete, build):
    shape, p = SHAPES[name]
    tokens, rng = {"symbols_in": 6, "symbols_out": 5} if discrete else {}, np.random.default_rng(4)
    run, params = build(lambda rngs: DiT(shape=shape, patch=p, width=16, depth=1, heads=2, **tokens, rngs=rngs))
    xt = rng.integers(0, 6, (2, *shape), np.int32) if discrete else rng.normal(size=(2, *shape)).astype(np.float32)
    t, site = np.float32([0.2, 0.8]), (1, *(side // 2 for side in shape[:-1]), 1)
    changed = xt.copy()
    changed[site] = (changed[site] + 1) % 6
    out = run(params, xt, t)
    assert out.shape == (2, *shape, *((5,) if discrete else ()))
    moved = np.abs(np.asarray(run(params, changed, t) - out)).reshape(2, *shape, -1).max(-1)
    np.testing.assert_array_equal(moved[0], 0)
    assert (moved[1] > 0).mean() > 0.5  # beyond its patch, which is at most a third
    params["stack"]["blocks"]["0"]["attention"]["out"]["kernel"][...] = 0
    moved = np.abs(np.asarray(run(params, changed, t) - run(params, xt, t))).reshape(2, *shape, -1).max(-1)
    here = np.zeros((2, *shape), bool)
    here[(1, *(slice(i // p * p, i // p * p + p) for i in site[1:-1]))] = True
    np.testing.assert_array_equal(moved > 0, here)


def test_errors():
    for shape in ((4,), (2, 2, 2, 2, 1)):
        with pytest.raises(ValueError, match=r"expected \(height, width, channels\) of one example"):
            DiT(shape=shape, width=8, depth=1, heads=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"patch=2 does not divide the image's length \(5,\)"):
        DiT(shape=(5, 1), patch=2, width=8, depth=1, heads=2, rngs=nnx.Rngs(0))
