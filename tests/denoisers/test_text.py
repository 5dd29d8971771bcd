import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax.denoisers import TextTransformer, functional_init, stack_blocks
from ddjax.types import SoftTokens

SMALL = {"length": 7, "symbols_in": 6, "symbols_out": 5, "width": 16, "depth": 2, "heads": 2}
XT = np.random.default_rng(1).integers(0, 6, (5, 7), np.int32)
T = np.linspace(0, 1, 5, dtype=np.float32)


def maker(**config):
    return lambda rngs: TextTransformer(**{**SMALL, **config}, rngs=rngs)


def largest(a, b=0.0):
    return np.abs(np.asarray(a) - np.asarray(b)).max()


@pytest.fixture(scope="module")
def net(build):
    return build(maker())


def test_zero_at_initialisation(jit):
    init, apply = functional_init(maker())
    out = jit(lambda key: apply(init(key), XT, T))(jax.random.key(0))
    assert out.shape == (5, 7, 5)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [{}, {"mlp": "gelu", "embed_width": 4, "time": False}, {"num_classes": 2, "cond_width": 8}]
)
def test_every_parameter_gets_a_gradient(config, jit, noise):
    init, apply = functional_init(maker(depth=1, **config))
    params = noise(jax.eval_shape(init, jax.random.key(0)))
    target = noise(jax.eval_shape(apply, params, XT, T), scale=1)
    grads = jit(jax.grad(lambda p: ((apply(p, XT, T) - target) ** 2).sum()))(params)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(g).all(), path
        assert largest(g) > 1e-4, path


def test_example_does_not_depend_on_its_batch(net):
    run, params = net
    whole = run(params, XT, T)
    np.testing.assert_allclose(run(params, XT[2:3], T[2:3])[0], whole[2], rtol=1e-4, atol=1e-5)


def test_attention_is_bidirectional_and_knows_positions(net):
    run, params = net
    xt = XT[:1]
    out = run(params, xt, T[2:3])
    for changed, seen in ((0, 6), (6, 0)):
        other = xt.copy()
        other[0, changed] = (other[0, changed] + 1) % 6
        assert largest(run(params, other, T[2:3])[0, seen], out[0, seen]) > 1e-4
    backwards = run(params, xt[:, ::-1], T[2:3])[:, ::-1]
    assert largest(backwards, out) > 1e-3


def test_shorter_texts(net):
    run, params = net
    assert run(params, XT[:, :3], T).shape == (5, 3, 5)
    with pytest.raises(ValueError, match=r"\(5, 8\); the network was built for .batch, length. = .batch, 7."):
        run(params, np.zeros((5, 8), np.int32), T)


def test_scan_and_bfloat16(net, build):
    run, params = net
    exact = run(params, XT, T)
    scanned, _ = build(maker(scan=True, remat=True))
    np.testing.assert_allclose(scanned(stack_blocks(params), XT, T), exact, rtol=1e-4, atol=1e-5)
    out = build(maker(dtype=jnp.bfloat16))[0](params, XT, T)
    assert out.dtype == jnp.float32
    assert 1e-4 < largest(out, exact) / largest(exact) < 0.1


def test_gated_and_gelu_mlps_have_as_many_weights(build):
    sizes = [
        sum(x.size for x in jax.tree.leaves(build(maker(mlp=mlp, width=48))[1]["stack"]["blocks"]["0"]["mlp"]))
        for mlp in ("gated", "gelu")
    ]
    assert abs(sizes[0] / sizes[1] - 1) < 0.02


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"mlp": "relu"}, "mlp='relu': expected one of 'gelu', 'gated'"),
        ({"heads": 5}, "heads=5 does not divide width=16"),
        ({"heads": 16}, "width / heads = 1 must be even"),
    ],
)
def test_configuration_errors(config, message):
    with pytest.raises(ValueError, match=message):
        functional_init(maker(**config))


@pytest.mark.parametrize(
    ("xt", "message"),
    [
        (np.zeros((5,), np.int32), r"1 axes, shape \(5,\); expected 2: \(batch, length\)"),
        (np.zeros((5, 7, 1), np.int32), "3 axes"),
        (np.zeros((5, 7)), "takes integer tokens"),
    ],
)
def test_call_errors(xt, message, net):
    run, params = net
    with pytest.raises(ValueError, match=message):
        run(params, xt, 0.5)


@pytest.mark.slow
def test_soft_tokens_are_expected_embeddings(x64):
    """Certain ones are the tokens themselves; of others the embedding is the mean, and a few stand for all."""
    init, apply = functional_init(maker(embed_width=4, depth=1, dtype=jnp.float64))
    params = jax.tree.map(lambda p: p.astype(float), init(jax.random.key(0)))
    params = jax.tree.map(lambda p: p + 0.1 * np.random.default_rng(p.size).normal(size=p.shape), params)
    run = jax.jit(apply)
    t, hard = T.astype(float), run(params, XT, T.astype(float))
    assert largest(hard) > 0.01
    certain = np.eye(6)[XT]
    np.testing.assert_allclose(run(params, certain, t), hard, atol=1e-12)
    one = SoftTokens(np.stack([XT, (XT + 1) % 6], -1), np.broadcast_to([1.0, 0.0], (5, 7, 2)))
    np.testing.assert_allclose(run(params, one, t), hard, atol=1e-12)
    p = np.random.default_rng(0).dirichlet(np.ones(6), (5, 7))
    order = np.argsort(p)
    few = SoftTokens(order, np.take_along_axis(p, order, -1))
    np.testing.assert_allclose(run(params, few, t), run(params, p, t), atol=1e-12)
    swapped = {**params, "tokens": {"table": np.asarray(params["tokens"]["table"]).mean(0, keepdims=True).repeat(6, 0)}}
    np.testing.assert_allclose(run(params, np.full((5, 7, 6), 1 / 6), t), run(swapped, XT, t), atol=1e-12)


@pytest.mark.parametrize(
    ("soft", "message"),
    [
        (np.ones((5, 7, 5)), "symbols_in=6"),
        (SoftTokens(np.zeros((5, 7, 2), np.int32), np.ones((5, 7, 3))), "one float weight for each id"),
        (SoftTokens(np.zeros((5, 7, 2), np.int32), np.ones((5, 7, 2), np.int32)), "one float weight for each id"),
        (SoftTokens(np.zeros((5, 8, 2), np.int32), np.ones((5, 8, 2))), "built for"),
        (np.ones((5, 8, 6)), "built for"),
    ],
)
def test_soft_tokens_that_do_not_fit(soft, message):
    init, apply = functional_init(maker())
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda key: apply(init(key), soft, T), jax.random.key(0))
