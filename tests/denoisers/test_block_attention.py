"""Transformers in blocks: every block at once, teacher forced, is each block behind a clean past; nothing leaks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax.denoisers import DiT, TextTransformer, functional_init, layers

LENGTH = 6
SMALL = {"length": LENGTH, "symbols_in": 5, "symbols_out": 4, "width": 8, "depth": 2, "heads": 2}
RNG = np.random.default_rng(1)
X0, XT, LATER = (RNG.integers(0, n, (3, LENGTH), np.int32) for n in (4, 5, 5))


def maker(**config):
    return lambda rngs: TextTransformer(**{**SMALL, **config}, rngs=rngs)


def largest(a, b=0.0):
    return np.abs(np.asarray(a) - np.asarray(b)).max()


def one_by_one(block):
    """Every block's own state: clean before it, noisy in it, anything after it; `(blocks, batch, length)`."""
    turn = np.arange(LENGTH) // block
    own = np.arange(-(-LENGTH // block))[:, None, None]
    return turn == own, np.where(turn < own, X0, np.where(turn == own, XT, LATER))


@pytest.mark.parametrize(
    ("config", "tolerance"),
    [
        ({"block": 2, "time": False}, 1e-10),
        ({"block": 4, "num_classes": 3, "scan": True}, 1e-4),  # times and labels are embedded in float32
        ({"block": 1, "remat": True}, 1e-4),
    ],
    ids=lambda c: "-".join(c) if isinstance(c, dict) else "",
)
def test_all_blocks_at_once_are_each_behind_a_clean_past(x64, build, config, tolerance):
    block = config["block"]
    run, params = build(maker(**config, dtype=jnp.float64))
    labels = np.array([0, 3, 1], np.int32) if "num_classes" in config else None
    t = np.array([0.2, 0.5, 0.9]) if block == 4 else RNG.uniform(size=(3, 1 + LENGTH // block)).repeat(block, 1)[:, :6]
    at_once = run(params, XT, t, {"clean": X0, "cond": labels})
    assert at_once.shape == (3, LENGTH, 4)
    assert at_once.dtype == jnp.float64
    here, states = one_by_one(block)
    own_time = np.broadcast_to(t.reshape(3, -1), (3, LENGTH))
    turn, own = np.arange(LENGTH) // block, np.arange(len(states))[:, None, None]
    times = np.where(turn < own, 0.0, np.where(turn == own, own_time, RNG.uniform(size=(3, LENGTH))))
    again = None if labels is None else np.tile(labels, len(states))
    single = run(params, states.reshape(-1, LENGTH), times.reshape(-1, LENGTH), again).reshape(*states.shape, 4)
    assert largest(at_once) > 0.1
    assert largest(np.where(here[..., None], single - at_once, 0.0)) < tolerance


def test_nothing_leaks_and_the_past_is_seen(x64, build):
    run, params = build(maker(block=2, time=False, dtype=jnp.float64))
    out = run(params, XT, None, {"clean": X0})
    for site in range(LENGTH):
        block = site // 2
        clean, noisy = X0.copy(), XT.copy()
        clean[:, site], noisy[:, site] = (clean[:, site] + 1) % 4, (noisy[:, site] + 1) % 5
        moved = np.abs(np.asarray(run(params, XT, None, {"clean": clean}) - out)).max((0, 2))
        np.testing.assert_array_equal(moved[: 2 * (block + 1)], 0)  # not even its own block's clean copy
        assert (moved[2 * (block + 1) :] > 1e-4).all()
        moved = np.abs(np.asarray(run(params, noisy, None, {"clean": X0}) - out)).max((0, 2))
        mine = np.arange(LENGTH) // 2 == block
        assert (moved[mine] > 1e-4).all()
        np.testing.assert_array_equal(moved[~mine], 0)


def test_one_block_is_the_plain_transformer(x64, build):
    plain, params = build(maker(time=False, dtype=jnp.float64))
    whole, _ = build(maker(time=False, dtype=jnp.float64, block=LENGTH))
    expected = plain(params, XT, None)
    np.testing.assert_allclose(whole(params, XT, None), expected, atol=1e-12)
    np.testing.assert_allclose(whole(params, XT, None, {"clean": X0}), expected, atol=1e-12)


@pytest.mark.parametrize("block", [1, 2, 4, 6, 7])
def test_layouts_are_what_they_say(block):
    b = lambda site: site // block
    causal = layers.group_causal(jnp.arange(LENGTH) // block)
    expected = [[b(k) <= b(q) for k in range(LENGTH)] for q in range(LENGTH)]
    np.testing.assert_array_equal(causal.mask, expected)
    np.testing.assert_array_equal(causal.positions, np.arange(LENGTH))
    both, sites = layers.group_teacher_forced(jnp.arange(LENGTH) // block), range(LENGTH)
    rows = [[b(q) == b(k) for k in sites] + [b(k) < b(q) for k in sites] for q in sites]
    rows += [[False] * LENGTH + [b(k) <= b(q) for k in sites] for q in sites]
    np.testing.assert_array_equal(both.mask, rows)
    np.testing.assert_array_equal(both.positions, [*sites, *sites])


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_masked_attention_against_numpy(implementation):
    q, k, v = (np.random.default_rng(i).normal(size=(2, 6, 3, 8)).astype(np.float32) for i in range(3))
    mask = np.array(layers.group_causal(jnp.arange(6) // 4).mask)
    scores = np.einsum("bqhd,bkhd->bhqk", q, k, dtype=np.float64) / np.sqrt(8)
    weights = np.exp(scores) * mask
    expected = np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)
    out = layers.dot_product_attention(*map(jnp.asarray, (q, k, v)), implementation, jnp.asarray(mask))
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.slow
def test_every_parameter_gets_a_gradient_behind_a_clean_past(jit, noise):
    init, apply = functional_init(maker(depth=1, block=2, dropout=0.1, num_classes=2, dtype=jnp.bfloat16))
    params, cond = noise(jax.eval_shape(init, jax.random.key(0))), {"clean": X0}
    loss = lambda p: (apply(p, XT, jnp.full(3, 0.5), cond, rng=jax.random.key(0), train=True) ** 2).sum()
    for path, g in jax.tree_util.tree_leaves_with_path(jit(jax.grad(loss))(params)):
        assert np.isfinite(g).all(), path
        assert largest(g) > 1e-5, path


@pytest.mark.parametrize(
    ("config", "t", "cond", "message"),
    [
        ({}, 0.5, {"clean": X0}, "sees all of xt: build it with block="),
        ({"block": 2}, 0.5, {"clean": X0[:, :3]}, r"shape \(3, 3\), int32; expected the clean tokens of xt, \(3, 6\)"),
        ({"block": 2}, 0.5, {"clean": X0 * 1.0}, "float64; expected the clean tokens"),
        ({"block": 2}, 0.5, {"labels": X0}, "cond was given but the network has no labels"),
        ({}, np.zeros((3, 5)), None, r"a time of its own for each site has shape \(3, 6\)"),
    ],
)
def test_call_errors(config, t, cond, message):
    init, apply = functional_init(maker(**config))
    params = jax.eval_shape(init, jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda p: apply(p, XT, t, cond), params)


def test_other_errors():
    with pytest.raises(ValueError, match="block=0: expected at least one site"):
        functional_init(maker(block=0))
    init, apply = functional_init(lambda rngs: DiT(shape=(4, 4, 1), width=8, depth=1, heads=2, patch=2, rngs=rngs))
    params = jax.eval_shape(init, jax.random.key(0))
    with pytest.raises(ValueError, match="each site is not supported by this network yet"):
        jax.eval_shape(lambda p: apply(p, jnp.zeros((2, 4, 4, 1)), jnp.zeros((2, 4))), params)
