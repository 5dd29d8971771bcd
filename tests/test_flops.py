"""Counts against arithmetic done by hand, and against XLA where XLA counts right."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from ddjax import flops


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def xla(function, *args):
    return jax.jit(function).lower(*args).cost_analysis()["flops"]


def test_matmul():
    assert flops.count(jnp.matmul, shape(3, 5), shape(5, 7)) == 2 * 3 * 5 * 7
    assert flops.count(lambda x: jnp.tanh(x + 1).sum(), shape(3, 5)) == 0


def test_batched_einsum():
    """Batch axes count once, and a full contraction has an empty output shape."""
    scores = lambda q, k: jnp.einsum("bqhd,bkhd->bhqk", q, k)
    assert flops.count(scores, shape(2, 3, 5, 7), shape(2, 11, 5, 7)) == 2 * (2 * 3 * 11 * 5 * 7)
    assert flops.count(jnp.vdot, shape(13), shape(13)) == 2 * 13


CONVOLUTIONS = {
    "valid": {"window_strides": (1, 1), "padding": "VALID"},
    "same": {"window_strides": (1, 1), "padding": "SAME"},
    "strided": {"window_strides": (2, 3), "padding": "SAME"},
    "atrous": {"window_strides": (1, 2), "padding": ((2, 1), (0, 3)), "rhs_dilation": (2, 1)},
    "transposed": {"window_strides": (1, 1), "padding": ((1, 2), (2, 2)), "lhs_dilation": (2, 3)},
    "cropped": {"window_strides": (1, 1), "padding": ((-1, 0), (0, -2))},
    "grouped": {"window_strides": (1, 1), "padding": "SAME", "feature_group_count": 2},
}


def convolution(options):
    layout = ("NHWC", "HWIO", "NHWC")
    return lambda x, k: jax.lax.conv_general_dilated(x, k, dimension_numbers=layout, **options)


def test_convolution_by_hand():
    x, k = shape(2, 9, 8, 4), shape(3, 2, 4, 6)
    assert flops.count(convolution(CONVOLUTIONS["valid"]), x, k) == 2 * (2 * 7 * 7 * 6) * (3 * 2 * 4)
    # SAME, 3 taps: the first and last of the 9 rows miss one; 2 taps: the last of the 8 columns does.
    assert flops.count(convolution(CONVOLUTIONS["same"]), x, k) == 2 * (2 * 6 * 4) * (9 * 3 - 2) * (8 * 2 - 1)
    half = shape(3, 2, 2, 6)
    assert flops.count(convolution(CONVOLUTIONS["grouped"]), x, half) == 2 * (2 * 6 * 2) * (9 * 3 - 2) * (8 * 2 - 1)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_against_xla(name):
    options = CONVOLUTIONS[name]
    args = shape(2, 9, 8, 4), shape(3, 2, 4 // options.get("feature_group_count", 1), 6)
    assert flops.count(convolution(options), *args) == xla(convolution(options), *args) > 0


@pytest.mark.parametrize("name", ["valid", "same", "strided", "grouped"])
def test_gradient_of_a_convolution_is_three_convolutions(name):
    """Also with strides, whose gradient is full of zeros, and with groups."""
    options = CONVOLUTIONS[name]
    args = shape(2, 9, 8, 4), shape(3, 2, 4 // options.get("feature_group_count", 1), 6)
    loss = lambda x, k: jnp.sum(convolution(options)(x, k) ** 2)
    assert flops.count(jax.value_and_grad(loss, (0, 1)), *args) == 3 * flops.count(loss, *args)


def chain(ws, x):
    for w in ws:
        x = jnp.tanh(x @ w)
    return (x**2).sum()


def scanned(ws, x):
    return (jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)[0] ** 2).sum()


WEIGHTS, INPUT = shape(4, 6, 6), shape(5, 6)
PRODUCT = 2 * 5 * 6 * 6


def test_scan_counts_its_length():
    assert flops.count(scanned, WEIGHTS, INPUT) == flops.count(chain, WEIGHTS, INPUT) == 4 * PRODUCT


def test_gradient_is_three_times_the_forward_pass():
    for function in (chain, scanned):
        assert flops.count(jax.value_and_grad(function, (0, 1)), WEIGHTS, INPUT) == 12 * PRODUCT
    # With respect to the weights alone, the first product needs no gradient of its input.
    assert flops.count(jax.grad(chain), WEIGHTS, INPUT) == 11 * PRODUCT


def test_remat_counts_what_is_computed_again():
    block = jax.checkpoint(lambda w, x: jnp.tanh(x @ w[0]) @ w[1])
    loss = lambda w, x: (block(w, x) ** 2).sum()
    args = shape(2, 6, 6), INPUT
    assert flops.count(loss, *args) == 2 * PRODUCT
    # Three times two products, and again the first of them: nothing needs the second's value.
    assert flops.count(jax.value_and_grad(loss, (0, 1)), *args) == 7 * PRODUCT


def test_vmap_and_jit():
    single = jax.jit(lambda w, x: w @ x)
    assert flops.count(jax.vmap(single, (None, 0)), shape(3, 5), shape(7, 5)) == 2 * 7 * 3 * 5
    assert flops.count(jax.vmap(single), shape(7, 3, 5), shape(7, 5)) == 2 * 7 * 3 * 5


def test_what_nothing_depends_on_counts_nothing():
    unused = jax.jit(lambda x: (x @ x.T, x.T @ x))
    assert flops.count(lambda x: unused(x)[0], shape(3, 5)) == 2 * 3 * 5 * 3


def test_cond_counts_its_largest_branch():
    branches = [lambda x: x, lambda x: x @ x, lambda x: x @ x @ x]
    assert flops.count(lambda i, x: jax.lax.switch(i, branches, x), 1, shape(6, 6)) == 2 * 2 * 6**3


def test_custom_derivatives():
    linear = jax.custom_jvp(lambda x: x @ x)
    linear.defjvp(lambda primals, tangents: (primals[0] @ primals[0], tangents[0] @ primals[0]))
    assert flops.count(linear, shape(6, 6)) == 2 * 6**3
    twice = jax.custom_vjp(lambda x: x @ x)
    twice.defvjp(lambda x: (x @ x, x), lambda x, g: (x @ x @ g,))
    assert flops.count(twice, shape(6, 6)) == 2 * 6**3
    assert flops.count(jax.grad(lambda x: twice(x).sum()), shape(6, 6)) == 2 * 2 * 6**3


def test_shard_map_counts_all_shards():
    mesh = jax.make_mesh((4, 2), ("data", "other"), axis_types=(AxisType.Auto,) * 2)
    rows = PartitionSpec("data")
    specs = {"in_specs": (rows, PartitionSpec()), "out_specs": rows}
    product = jax.shard_map(lambda x, w: x @ w, mesh=mesh, axis_names={"data"}, **specs)
    assert flops.count(jax.jit(product), shape(8, 5), shape(5, 7)) == 2 * 8 * 5 * 7


def test_loops():
    turns = lambda x: jax.lax.fori_loop(0, 3, lambda _, x: x @ x, x)
    assert flops.count(turns, shape(6, 6)) == 3 * 2 * 6**3
    unknown = lambda x: jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ x, x)
    with pytest.warns(RuntimeWarning, match="one turn"):
        assert flops.count(unknown, shape(6, 6)) == 2 * 6**3


def test_pallas_counts_every_block():
    from jax.experimental import pallas as pl

    def kernel(x, y, out):
        out[...] = x[...] @ y[...]

    product = pl.pallas_call(
        kernel,
        out_shape=shape(16, 24),
        grid=(2, 3),
        in_specs=[pl.BlockSpec((8, 16), lambda i, j: (i, 0)), pl.BlockSpec((16, 8), lambda i, j: (0, j))],
        out_specs=pl.BlockSpec((8, 8), lambda i, j: (i, j)),
        interpret=True,
    )
    assert flops.count(product, shape(16, 16), shape(16, 24)) == 2 * 16 * 16 * 24


def test_opaque_kernels_are_said():
    with pytest.warns(RuntimeWarning, match="ragged_dot_general"):
        flops.count(jax.lax.ragged_dot, shape(6, 4), shape(2, 4, 5), shape(2, dtype=jnp.int32))
