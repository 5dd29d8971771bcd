import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ddjax.denoisers import DiT, TextTransformer, from_linen, functional, functional_init
from ddjax.random import example_keys

CONFIG = {"length": 6, "symbols_in": 4, "symbols_out": 3, "width": 8, "depth": 2, "heads": 2}
XT = jax.random.randint(jax.random.key(0), (5, 6), 0, 4)
T = jnp.linspace(0.1, 0.9, 5)


def make(rngs, **config):
    return TextTransformer(**{**CONFIG, **config}, rngs=rngs)


@pytest.fixture(scope="module")
def net(randomise):
    apply, params = functional(make(nnx.Rngs(0)))
    return apply, randomise(params)


@pytest.fixture(scope="module")
def dropping(randomise):
    apply, params = functional(make(nnx.Rngs(0), dropout=0.3))
    return apply, randomise(params)


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
        assert isinstance(tree, jax.Array)
        return tree.shape

    shapes = json.loads(json.dumps(check(net[1])))
    assert shapes["stack"]["blocks"]["1"]["attention"]["qkv"]["kernel"] == [8, 24]


def test_more_than_ten_blocks_keep_their_order():
    apply, params = functional(make(nnx.Rngs(0), depth=11, width=2, heads=1))
    blocks = params["stack"]["blocks"]
    assert sorted(blocks) == sorted(str(i) for i in range(11))
    # Shuffling the dict's order changes nothing, exchanging two blocks does.
    key = jax.random.key(2)
    params = jax.tree.map(lambda x: 0.5 * jax.random.normal(key, x.shape), params)
    blocks = {k: jax.tree.map(lambda x, k=k: x * (1 + int(k)) / 5, v) for k, v in params["stack"]["blocks"].items()}
    with_blocks = lambda b: {**params, "stack": {"blocks": b}}  # noqa: E731
    out = apply(with_blocks(blocks), XT, T)
    np.testing.assert_array_equal(apply(with_blocks(dict(reversed(blocks.items()))), XT, T), out)
    swapped = {**blocks, "10": blocks["2"], "2": blocks["10"]}
    assert jnp.abs(apply(with_blocks(swapped), XT, T) - out).max() > 1e-3


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
    base = functional(make(nnx.Rngs(0)))[0]
    assert base == functional(make(nnx.Rngs(1)))[0]
    assert base == functional_init(make).apply
    for change in ({"dropout": 0.1}, {"depth": 3}, {"dtype": jnp.bfloat16}, {"attention": "xla"}, {"remat": True}):
        assert base != functional_init(lambda rngs, c=change: make(rngs, **c)).apply, change


def test_jit_grad_and_vmap(net):
    apply, params = net
    out = apply(params, XT, T)
    np.testing.assert_allclose(jax.jit(apply)(params, XT, T), out, rtol=1e-4, atol=1e-5)
    one = jax.vmap(lambda x, t: apply(params, x[None], t[None])[0])(XT, T)
    np.testing.assert_allclose(one, out, rtol=1e-4, atol=1e-5)
    two = jax.vmap(apply, (0, None, None))(jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params), XT, T)
    np.testing.assert_allclose(two[0], out, rtol=1e-4, atol=1e-5)
    # The gradient against a finite difference along a random direction.
    loss = jax.jit(lambda p: (apply(p, XT, T) ** 2).mean())
    grads = jax.grad(loss)(params)
    key = jax.random.key(3)
    way = jax.tree.map(lambda p: jax.random.normal(key, p.shape), params)
    up, down = (loss(jax.tree.map(lambda p, d, s=s: p + s * d, params, way)) for s in (1e-3, -1e-3))
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), grads, way)))
    np.testing.assert_allclose((up - down) / 2e-3, slope, rtol=2e-2)


def test_apply_is_pure(net):
    apply, params = net
    before = jax.tree.map(np.array, params)
    np.testing.assert_array_equal(apply(params, XT, T), apply(params, XT, T))
    jax.tree.map(np.testing.assert_array_equal, params, before)


@pytest.mark.parametrize("scan", [False, True])
def test_init_in_jit_and_eval_shape(scan):
    init, apply = functional_init(lambda rngs: make(rngs, scan=scan))
    abstract = jax.eval_shape(init, jax.random.key(0))
    params = jax.jit(init)(jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(lambda x: (x.shape, x.dtype), params)
    assert apply(params, XT, T).shape == (5, 6, 3)
    eager = functional(make(nnx.Rngs(jax.random.key(0)), scan=scan))[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, eager)
    other = init(jax.random.key(1))
    assert jnp.abs(other["tokens"]["table"] - params["tokens"]["table"]).max() > 0.1


def test_blocks_start_different():
    for scan in (False, True):
        blocks = functional(make(nnx.Rngs(0), scan=scan))[1]["stack"]["blocks"]
        kernels = blocks["mlp"]["up"]["kernel"] if scan else [blocks[k]["mlp"]["up"]["kernel"] for k in "01"]
        assert jnp.abs(kernels[0] - kernels[1]).max() > 0.1


def test_wrong_parameters_are_named(net):
    apply, params = net
    with pytest.raises(ValueError, match=r"missing \['final/modulation/bias'.*unexpected \['head'\] \(1\)"):
        apply({**{k: v for k, v in params.items() if k != "final"}, "head": jnp.zeros(3)}, XT, T)


def test_state_other_than_parameters_is_refused():
    class Dropping(nnx.Module):
        def __init__(self, rngs):
            self.dropout = nnx.Dropout(0.1, rngs=rngs)

    with pytest.raises(ValueError, match=r"Dropping holds state that is not nnx.Param \(dropout/"):
        functional(Dropping(nnx.Rngs(0)))


def test_dropout_acts_only_in_training_and_by_key(dropping):
    apply, params = dropping
    still = apply(params, XT, T)
    np.testing.assert_array_equal(apply(params, XT, T, rng=jax.random.key(0)), still)
    a, b, c = (apply(params, XT, T, rng=jax.random.key(k), train=True) for k in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert jnp.abs(a - c).max() > 1e-2
    assert jnp.abs(a - still).max() > 1e-2


@pytest.mark.parametrize("scan", [False, True])
def test_dropout_does_not_depend_on_the_batch_split(scan, randomise):
    apply, params = functional(make(nnx.Rngs(0), dropout=0.3, scan=scan))
    params = randomise(params)
    keys = example_keys(jax.random.key(4), 5)
    run = jax.jit(lambda x, t, k: apply(params, x, t, rng=k, train=True))
    whole = run(XT, T, keys)
    parts = jnp.concatenate([run(XT[:2], T[:2], keys[:2]), run(XT[2:], T[2:], keys[2:])])
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-5)
    # One key is folded with the row's index, as everywhere in ddjax.
    np.testing.assert_allclose(run(XT, T, jax.random.key(4)), whole, rtol=1e-4, atol=1e-5)
    same = run(jnp.stack([XT[0]] * 5), jnp.full(5, 0.5), keys)
    assert jnp.abs(same[0] - same[1]).max() > 1e-2


def test_layers_draw_different_masks(dropping):
    # Two branches of one layer and two layers: four masks, read off where a constant branch was zeroed.
    from ddjax.denoisers.layers import Block, Stack

    masks = []

    def block(rngs):
        b = Block(8, 2, mlp="gelu", mlp_width=8, cond_width=4, dropout=0.5, rngs=rngs)
        for linear in (b.attention.out, b.mlp.down):
            linear.kernel[...] = jnp.zeros_like(linear.kernel[...])
            linear.bias[...] = jnp.ones_like(linear.bias[...])
        # Gates 1 and 10 (attention, MLP), nothing else.
        b.modulation.bias[...] = jnp.repeat(jnp.array([0.0, 0, 1, 0, 0, 10]), 8)
        return b

    stack = Stack(block, 2, rngs=nnx.Rngs(0))
    h = stack(jnp.zeros((3, 16, 8)), jnp.zeros((3, 4)), example_keys(jax.random.key(0), 3))
    tens, units = jnp.round(h / 20), jnp.round((h % 20) / 2)
    masks = {(int(a), int(b)) for a, b in zip(tens.ravel(), units.ravel(), strict=True)}
    # Each branch's two layers kept or not, independently: every combination occurs.
    assert masks == {(a, b) for a in range(3) for b in range(3)}
    both = np.asarray(tens != 1)  # equal masks in both layers would never give exactly one
    assert 0.35 < both.mean() < 0.65


@pytest.mark.parametrize(
    ("rng", "message"),
    [
        (None, "dropout=0.3 with train=True needs a key"),
        (jax.random.PRNGKey(0), "pass a typed key"),
        (jax.random.split(jax.random.key(0), 4), r"rng has shape \(4,\); pass one key \(\) or one .* \(5,\)"),
    ],
)
def test_dropout_errors(rng, message, dropping):
    apply, params = dropping
    with pytest.raises(ValueError, match=message):
        apply(params, XT, T, rng=rng, train=True)


def test_no_key_is_needed_without_dropout(net):
    apply, params = net
    np.testing.assert_array_equal(apply(params, XT, T, train=True), apply(params, XT, T))


class Linen(nn.Module):
    @nn.compact
    def __call__(self, xt, t, cond, train=False):
        h = nn.Dense(16)(jnp.concatenate([xt, t[:, None]], -1))
        return nn.Dense(2)(nn.Dropout(0.5, deterministic=not train)(jnp.tanh(h)))


class Normed(nn.Module):
    @nn.compact
    def __call__(self, xt, t, cond, train=False):
        return nn.BatchNorm(use_running_average=not train)(xt)


def test_from_linen_trains():
    xt, t = jax.random.normal(jax.random.key(0), (6, 2)), jnp.linspace(0, 1, 6)
    init, apply = from_linen(Linen(), jax.ShapeDtypeStruct((6, 2), jnp.float32), t, None)
    params = jax.jit(init)(jax.random.key(1))
    assert set(params) == {"Dense_0", "Dense_1"}
    assert hash(apply) == hash(from_linen(Linen(), xt, t, None).apply)
    keys = example_keys(jax.random.key(2), 6)

    @jax.jit
    def step(params):
        loss, grads = jax.value_and_grad(lambda p: ((apply(p, xt, t, rng=keys, train=True) - xt) ** 2).mean())(params)
        return loss, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    first, params = step(params)
    assert step(params)[0] < first


def test_from_linen_dropout():
    xt, t = jax.random.normal(jax.random.key(0), (6, 2)), jnp.linspace(0, 1, 6)
    init, apply = from_linen(Linen(), xt, t, None)
    params = init(jax.random.key(1))
    keys = example_keys(jax.random.key(2), 6)
    whole = apply(params, xt, t, rng=keys, train=True)
    np.testing.assert_allclose(apply(params, xt[:2], t[:2], rng=keys[:2], train=True), whole[:2], atol=1e-6)
    still = apply(params, xt, t)
    np.testing.assert_allclose(apply(params, xt, t, rng=keys), still, atol=1e-6)
    assert jnp.abs(whole - still).max() > 1e-2
    assert jnp.abs(apply(params, xt, t, rng=jax.random.key(0), train=True) - still).max() > 1e-2


def test_from_linen_refuses_other_collections():
    init, _ = from_linen(Normed(), jnp.ones((2, 2)), jnp.ones(2), None)
    with pytest.raises(ValueError, match="Normed has the collections .'batch_stats', 'params'."):
        init(jax.random.key(0))


def test_denoisers_import_no_mathematics():
    import subprocess
    import sys

    code = (
        "import sys, ddjax.denoisers as d\n"
        "bad = [m for m in sys.modules if m.startswith(('ddjax.processes', 'ddjax.objectives', 'ddjax.solvers'))]\n"
        "assert not bad, bad\n"
    )
    # ddjax/__init__.py may import everything for the user's convenience: look at what these files import.
    import ast
    import pathlib

    import ddjax.denoisers

    del code, subprocess, sys
    for file in pathlib.Path(ddjax.denoisers.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert not name.startswith(("ddjax.processes", "ddjax.objectives", "ddjax.solvers")), (file, name)


def test_a_dit_goes_through_functional_too():
    init, apply = functional_init(lambda rngs: DiT(shape=(2, 2, 1), width=4, depth=1, heads=1, rngs=rngs))
    assert apply(init(jax.random.key(0)), jnp.ones((3, 2, 2, 1)), T[:3]).shape == (3, 2, 2, 1)
