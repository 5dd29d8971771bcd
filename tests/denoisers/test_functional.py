import ast
import json
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import ddjax.denoisers
from ddjax.denoisers import TextTransformer, from_linen, functional, functional_init, layers
from ddjax.random import example_keys

CONFIG = {"length": 6, "symbols_in": 4, "symbols_out": 3, "width": 8, "depth": 2, "heads": 2}
XT = np.random.default_rng(0).integers(0, 4, (5, 6), np.int32)
T = np.linspace(0.1, 0.9, 5, dtype=np.float32)


def maker(**config):
    return lambda rngs: TextTransformer(**{**CONFIG, **config}, rngs=rngs)


def largest(a, b=0.0):
    return np.abs(np.asarray(a) - np.asarray(b)).max()


@pytest.fixture(scope="module")
def net(build):
    return build(maker())


@pytest.fixture(scope="module")
def dropping(build):
    return build(maker(dropout=0.3))


class Counting(nnx.Module):
    """Counts how often it is traced."""

    traces = 0

    def __init__(self, width, rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (3, width)))

    def __call__(self, xt, t, cond=None, *, rng=None, train=False):
        Counting.traces += 1
        return xt @ self.kernel[...]


def test_parameters_are_a_plain_dict_with_string_keys(net):
    def check(tree):
        if isinstance(tree, dict):
            assert type(tree) is dict
            assert all(type(k) is str for k in tree)
            return {k: check(v) for k, v in tree.items()}
        return tree.shape

    shapes = json.loads(json.dumps(check(net[1])))
    assert shapes["stack"]["blocks"]["1"]["attention"]["qkv"]["kernel"] == [8, 24]


@pytest.mark.slow
def test_more_than_ten_blocks_keep_their_order(build):
    run, params = build(maker(depth=11, width=4, heads=1, mlp_width=4))
    blocks = params["stack"]["blocks"]
    assert sorted(blocks) == sorted(str(i) for i in range(11))

    def with_blocks(blocks):
        return run({**params, "stack": {"blocks": blocks}}, XT, T)

    # Shuffling the dict's order changes nothing, exchanging two blocks does.
    np.testing.assert_array_equal(with_blocks(dict(reversed(blocks.items()))), with_blocks(blocks))
    assert largest(with_blocks({**blocks, "10": blocks["2"], "2": blocks["10"]}), with_blocks(blocks)) > 1e-2


def test_no_retrace():
    Counting.traces = 0
    run = jax.jit(lambda apply, p, x: apply(p, x, 0.5), static_argnums=0)
    x = jnp.ones((2, 3))
    apply, params = functional(Counting(4, nnx.Rngs(0)))
    for i in range(3):
        run(apply, jax.tree.map(lambda p, i=i: p + i, params), x)
    again, params = functional(Counting(4, nnx.Rngs(1)))  # same structure, other weights
    run(again, params, x)
    assert Counting.traces == 1
    assert again == apply
    assert hash(again) == hash(apply)
    run(*functional(Counting(5, nnx.Rngs(0))), x)
    assert Counting.traces == 2


def test_apply_compares_by_configuration():
    base = functional(maker()(nnx.Rngs(0)))[0]
    assert base == functional(maker()(nnx.Rngs(1)))[0]
    assert base == functional_init(maker()).apply
    changes = ({"dropout": 0.1}, {"depth": 3}, {"dtype": jnp.bfloat16}, {"attention": "xla"}, {"remat": True})
    for change in changes:
        assert base != functional_init(maker(**change)).apply, change


@pytest.mark.slow
def test_jit_grad_and_vmap(jit, noise):
    init, apply = functional_init(maker(depth=1))
    params = noise(jax.eval_shape(init, jax.random.key(0)))
    out = jit(apply)(params, XT, T)
    examples = jit(jax.vmap(lambda x, t: apply(params, x[None], t[None])[0]))
    np.testing.assert_allclose(examples(XT, T), out, rtol=1e-4, atol=1e-5)
    members = jit(jax.vmap(apply, (0, None, None)))
    two = members(jax.tree.map(lambda p: np.stack([p, 2 * p]), params), XT, T)
    np.testing.assert_allclose(two[0], out, rtol=1e-4, atol=1e-5)
    assert largest(two[1], out) > 0.1

    # The gradient against a finite difference along a random direction.
    def loss(p):
        return (apply(p, XT, T) ** 2).mean()

    way, step = noise(params, seed=3, scale=1), np.float32(1e-3)
    up, down = (jit(loss)(jax.tree.map(lambda p, d, s=s: p + s * d, params, way)) for s in (step, -step))
    slopes = jax.tree.map(lambda g, d: float((np.asarray(g) * d).sum()), jit(jax.grad(loss))(params), way)
    np.testing.assert_allclose((up - down) / 2e-3, sum(jax.tree.leaves(slopes)), rtol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_init_in_jit_and_eval_shape(scan, jit):
    init, apply = functional_init(maker(scan=scan))
    abstract = jax.eval_shape(init, jax.random.key(0))
    compiled = jit(init)
    params = compiled(jax.random.key(0))
    described = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (abstract, params)]
    assert described[0] == described[1]
    assert jax.eval_shape(apply, params, XT, T).shape == (5, 6, 3)
    eager = functional(maker(scan=scan)(nnx.Rngs(jax.random.key(0))))[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, eager)
    assert largest(compiled(jax.random.key(1))["tokens"]["table"], params["tokens"]["table"]) > 0.1
    blocks = params["stack"]["blocks"]
    kernels = [blocks["mlp"]["up"]["kernel"][i] if scan else blocks[str(i)]["mlp"]["up"]["kernel"] for i in (0, 1)]
    assert largest(*kernels) > 0.1


def test_wrong_parameters_are_named(net):
    run, params = net
    wrong = {**{k: v for k, v in params.items() if k != "final"}, "head": np.zeros(3)}
    with pytest.raises(ValueError, match=r"missing \['final/modulation/bias'.*unexpected \['head'\] \(1\)"):
        run(wrong, XT, T)


def test_state_other_than_parameters_is_refused():
    class Dropping(nnx.Module):
        def __init__(self, rngs):
            self.dropout = nnx.Dropout(0.1, rngs=rngs)

    with pytest.raises(ValueError, match=r"Dropping holds state that is not nnx.Param \(dropout/"):
        functional(Dropping(nnx.Rngs(0)))


def test_sharding_annotations_need_no_mesh():
    # NNX would place such a parameter when it is made, and raise without a mesh.
    class Annotated(nnx.Module):
        def __init__(self, rngs):
            self.kernel = nnx.Param(jnp.ones((2, 2)), out_sharding=("a", "b"))

        def __call__(self, xt, t, cond=None, *, rng=None, train=False):
            return xt @ self.kernel[...]

    init, apply = functional_init(Annotated)
    np.testing.assert_array_equal(apply(init(jax.random.key(0)), jnp.ones((1, 2)), 0.5), 2)


def test_dropout_acts_only_in_training_and_by_key(dropping):
    run, params = dropping
    still = run(params, XT, T)
    np.testing.assert_allclose(run(params, XT, T, rng=jax.random.key(0)), still, rtol=1e-5, atol=1e-6)
    a, b, c = (run(params, XT, T, rng=jax.random.key(k), train=True) for k in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert largest(a, c) > 1e-2
    assert largest(a, still) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_dropout_does_not_depend_on_the_batch_split(scan, build):
    run, params = build(maker(dropout=0.3, scan=scan))
    keys = lambda: example_keys(jax.random.key(4), 5)
    whole = run(params, XT, T, rng=keys(), train=True)
    part = run(params, XT[2:], T[2:], rng=keys()[2:], train=True)
    np.testing.assert_allclose(part, whole[2:], rtol=1e-4, atol=1e-5)
    # One key is folded with the row's index, as everywhere in ddjax.
    folded = run(params, XT, T, rng=jax.random.key(4), train=True)
    np.testing.assert_allclose(folded, whole, rtol=1e-4, atol=1e-5)
    same = run(params, np.stack([XT[0]] * 5), np.full(5, 0.5, np.float32), rng=keys(), train=True)
    assert largest(same[0], same[1]) > 1e-2


@pytest.mark.slow
def test_layers_draw_different_masks():
    # Branches that are constant 1, with gates 1 (attention) and 10 (MLP): the output says which were dropped.
    def block(rngs):
        block = layers.Block(8, 2, mlp="gelu", mlp_width=8, cond_width=4, dropout=0.5, rngs=rngs)
        for linear in (block.attention.out, block.mlp.down):
            linear.kernel[...] = jnp.zeros_like(linear.kernel[...])
            linear.bias[...] = jnp.ones_like(linear.bias[...])
        block.modulation.bias[...] = jnp.repeat(jnp.array([0.0, 0, 1, 0, 0, 10]), 8)
        return block

    stack = layers.Stack(block, 2, rngs=nnx.Rngs(0))
    h = np.asarray(stack(jnp.zeros((3, 16, 8)), jnp.zeros((3, 4)), example_keys(jax.random.key(0), 3)))
    mlp, attention = np.round(h / 20), np.round((h % 20) / 2)
    # Kept in none, one or both of the two layers, independently: 9 combinations, one of the layers half the time.
    assert {(int(a), int(b)) for a, b in zip(mlp.ravel(), attention.ravel(), strict=True)} == {
        (a, b) for a in range(3) for b in range(3)
    }
    for kept in (mlp, attention):
        assert 0.35 < (kept == 1).mean() < 0.65


def test_dropout_errors(dropping):
    run, params = dropping
    for rng, message in (
        (None, "dropout=0.3 with train=True needs a key"),
        (jax.random.PRNGKey(0), "pass a typed key"),
        (jax.random.split(jax.random.key(0), 4), r"rng has shape \(4,\); pass one key \(\) or one .* \(5,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            run(params, XT, T, rng=rng, train=True)


def test_no_key_is_needed_without_dropout(net):
    run, params = net
    np.testing.assert_array_equal(run(params, XT, T, train=True), run(params, XT, T))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, xt, t, cond, train=False):
        h = nn.Dense(16)(jnp.concatenate([xt, t[:, None]], -1))
        return nn.Dense(2)(nn.Dropout(0.5, deterministic=not train)(jnp.tanh(h)))


class Normed(nn.Module):
    @nn.compact
    def __call__(self, xt, t, cond, train=False):
        return nn.BatchNorm(use_running_average=not train)(xt)


def test_from_linen_trains(jit):
    xt, t = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32), np.linspace(0, 1, 6, dtype=np.float32)
    init, apply = from_linen(Linen(), jax.ShapeDtypeStruct((6, 2), jnp.float32), t, None)
    params = jit(init)(jax.random.key(1))
    assert set(params) == {"Dense_0", "Dense_1"}
    assert hash(apply) == hash(from_linen(Linen(), xt, t, None).apply)

    @jit
    def step(params):
        def loss(p):
            keys = example_keys(jax.random.key(2), 6)
            return ((apply(p, xt, t, rng=keys, train=True) - xt) ** 2).mean()

        value, grads = jax.value_and_grad(loss)(params)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    first, params = step(params)
    assert step(params)[0] < first


def test_from_linen_dropout(jit):
    xt, t = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32), np.linspace(0, 1, 6, dtype=np.float32)
    init, apply = from_linen(Linen(), xt, t, None)
    params = jit(init)(jax.random.key(1))
    run = jit(apply, static_argnames="train")
    keys = lambda: example_keys(jax.random.key(2), 6)
    whole = run(params, xt, t, rng=keys(), train=True)
    np.testing.assert_allclose(run(params, xt[2:], t[2:], rng=keys()[2:], train=True), whole[2:], atol=1e-6)
    repeated = run(params, np.stack([xt[0]] * 6), np.full(6, 0.5, np.float32), rng=keys(), train=True)
    assert largest(repeated[0], repeated[1]) > 1e-2
    still = run(params, xt, t)
    np.testing.assert_allclose(run(params, xt, t, rng=keys()), still, atol=1e-6)
    assert largest(whole, still) > 1e-2
    assert largest(run(params, xt, t, rng=jax.random.key(0), train=True), still) > 1e-2
    at_half = run(params, xt, np.full(6, 0.5, np.float32), rng=keys())
    np.testing.assert_allclose(run(params, xt, np.float32(0.5), rng=keys()), at_half, atol=1e-6)


def test_from_linen_refuses_other_collections():
    init, _ = from_linen(Normed(), jnp.ones((2, 2)), jnp.ones(2), None)
    with pytest.raises(ValueError, match=r"Normed has the collections .'batch_stats', 'params'."):
        init(jax.random.key(0))


def test_denoisers_import_no_mathematics():
    forbidden = ("ddjax.processes", "ddjax.objectives", "ddjax.solvers")
    for file in pathlib.Path(ddjax.denoisers.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith(forbidden) for name in names), (file, names)
