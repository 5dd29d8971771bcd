"""Groups of sites in both networks: all at once, teacher forced, is each behind a clean past; nothing leaks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax.denoisers import DiT, TextTransformer, functional_init

RNG = np.random.default_rng(1)
SHAPES = {"text": (6,), "patches": (4, 6, 2), "pixels": (2, 3, 1)}
GROUPS = np.asarray([[2, 0, 1, 2, 1, 5], [1, 1, 1, 1, 1, 1], [5, 4, 3, 2, 1, 0]], np.int32)


def maker(shape, **config):
    def make(rngs):
        sizes = {"symbols_in": 5, "symbols_out": 4, "width": 8, "depth": 2, "heads": 2, "time": False, **config}
        if len(shape) == 1:
            return TextTransformer(length=shape[0], **sizes, rngs=rngs)
        return DiT(shape=shape, patch=2 if shape == SHAPES["patches"] else 1, **sizes, rngs=rngs)

    return make


@pytest.fixture(params=SHAPES)
def case(request, x64, build):
    shape = SHAPES[request.param]
    run, params = build(maker(shape, dtype=jnp.float64, num_classes=3))
    labels = np.array([0, 3, 1], np.int32)
    call = lambda x, **view: np.asarray(run(params, jnp.asarray(x), None, {**view, "cond": labels}))
    x0, xt, later = (RNG.integers(0, n, (3, *shape), np.int32) for n in (4, 5, 5))
    # Which of the six sites of the network each token is in.
    if shape == SHAPES["patches"]:
        place = np.broadcast_to(np.arange(6).reshape(2, 3).repeat(2, 0).repeat(2, 1)[..., None], shape)
    else:
        place = np.arange(6).reshape(shape)
    return call, (x0, xt, later), place


def test_all_groups_at_once_are_each_behind_a_clean_past(case):
    call, (x0, xt, later), place = case
    at_once = call(xt, clean=x0, groups=GROUPS)
    assert at_once.shape == (*xt.shape, 4)
    turn = GROUPS[:, place]
    for k in range(6):
        state = np.where(turn < k, x0, np.where(turn == k, xt, later))
        here = np.broadcast_to((turn == k)[..., None], at_once.shape)
        single = call(state, groups=GROUPS)
        np.testing.assert_allclose(single[here], at_once[here], atol=1e-10)


def test_nothing_leaks_and_the_past_is_seen(case):
    call, (x0, xt, _), place = case
    out, turn = call(xt, clean=x0, groups=GROUPS), GROUPS[:, place]
    for site in range(6):
        token = tuple(np.argwhere(place == site)[-1])
        group = GROUPS[:, site].reshape(-1, *[1] * place.ndim)
        for clean, other in ((True, 4), (False, 5)):
            x = {"clean": x0.copy(), "noisy": xt.copy()}
            x["clean" if clean else "noisy"][(slice(None), *token)] += 1
            x["clean" if clean else "noisy"] %= other
            moved = np.abs(call(x["noisy"], clean=x["clean"], groups=GROUPS) - out).max(-1)
            sees = turn > group if clean else turn == group
            assert (moved[sees] > 1e-5).all()
            np.testing.assert_array_equal(moved[~sees], 0)


def test_blocks_are_groups(x64, build):
    """Of a network in blocks the groups given are its own, or come in their place."""
    x0, xt = (RNG.integers(0, n, (3, 6), np.int32) for n in (4, 5))
    blocks, params = build(maker((6,), dtype=jnp.float64, block=2))
    plain, _ = build(maker((6,), dtype=jnp.float64))
    groups = np.broadcast_to(np.arange(6, dtype=np.int32) // 2, (3, 6))
    expected = blocks(params, xt, None, {"clean": x0})
    np.testing.assert_array_equal(plain(params, xt, None, {"clean": x0, "groups": groups}), expected)
    own = plain(params, xt, None, {"clean": x0, "groups": GROUPS})
    np.testing.assert_array_equal(blocks(params, xt, None, {"clean": x0, "groups": GROUPS}), own)


@pytest.mark.parametrize(
    ("shape", "config", "view", "message"),
    [
        ("text", {}, {"groups": GROUPS[:, :5]}, r"shape \(3, 5\), int32; expected an int for each .* \(3, 6\)"),
        ("patches", {}, {"groups": GROUPS * 1.0}, "expected an int for each of the network's sites"),
        ("text", {"time": True}, {"groups": GROUPS}, "groups are for networks without time"),
        ("patches", {"time": True}, {"groups": GROUPS}, "groups are for networks without time"),
        ("patches", {"relations": ((0,) * 6,)}, {"groups": GROUPS}, "relations say who sees whom"),
        ("patches", {}, {"clean": np.zeros((3, 4, 6, 2), int)}, "sees all of xt: .* give cond"),
        ("patches", {}, {"clean": np.zeros((3, 4, 6, 1), int), "groups": GROUPS}, "expected the clean tokens of xt"),
    ],
)
def test_call_errors(shape, config, view, message):
    init, apply = functional_init(maker(SHAPES[shape], **config))
    params, x = jax.eval_shape(init, jax.random.key(0)), np.zeros((3, *SHAPES[shape]), np.int32)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda p: apply(p, x, np.zeros(3), view), params)
