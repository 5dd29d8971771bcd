"""How many floating point operations a program asks for, read off its jaxpr.

XLA's own `cost_analysis` counts the body of a `lax.scan` once, whatever its length: wrong for scanned layers, for
gradient accumulation and for samplers. Walking the jaxpr is exact, needs no compilation, and is the same on every
backend.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.interpreters import partial_eval

# Kernels without a jaxpr to look into.
_OPAQUE = ("dot_product_attention", "ffi_call", "ragged_dot_general")


def count(function: Callable, *args: Any) -> int:
    """Floating point operations of `function(*args)`: matrix products and convolutions, two per multiply-add.

    Everything else (elementwise, reductions, sorting) counts nothing, as is usual for a model FLOPs utilisation.
    Nothing is computed: `args` are pytrees of arrays or `jax.ShapeDtypeStruct`s.

    - A scan counts its body times its length; a `cond` its most expensive branch; a `shard_map` its body once per
      shard. Functions under `jit`, `remat`, custom derivatives, `vmap` and `grad` are looked into. What no output
      depends on counts nothing.
    - With `jax.checkpoint`, the recomputation counts too: for *model* FLOPs, count the program without it.
    - A convolution counts the products of its input with its kernel; those with padding, or with the zeros of a
      dilated input, are no work (as in XLA). So the gradient of a strided convolution costs what it should.

    Limits: the body of a `while_loop` counts once, its number of turns being unknown (`fori_loop` with constant bounds
    is a scan, and exact); a fused kernel called by name (cuDNN attention, `jax.ffi`) counts nothing. Both warn. A
    complex product counts as a real one.
    """
    closed = jax.make_jaxpr(function)(*args)
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return _of_jaxpr(jaxpr)


def _of_jaxpr(jaxpr: Jaxpr | ClosedJaxpr) -> int:
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _dot(equation)
    if name == "conv_general_dilated":
        return _convolution(equation)
    if any(opaque in name for opaque in _OPAQUE):
        return _warn(f"the operations of {name!r} cannot be read off the program and are not counted", 0)
    if name == "cond":
        return max(_of_jaxpr(branch) for branch in params["branches"])
    if name == "custom_linear_solve":
        return _of_jaxpr(params["jaxprs"].solve)  # the other three serve its derivatives

    body = sum(_of_jaxpr(inner) for value in params.values() for inner in _jaxprs(value))
    if name == "scan":
        return params["length"] * body
    if name == "shard_map":
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"]) * body
    if name == "pallas_call":
        grid = params["grid_mapping"].grid
        if all(isinstance(size, int) for size in grid):
            return math.prod(grid) * body
        return _warn("a pallas_call whose grid is not constant is counted as one block", body)
    if name == "while" and body:
        return _warn("a while loop is counted as one turn; use lax.scan, or fori_loop with constant bounds", body)
    return body


def _jaxprs(value: Any) -> Iterator[Jaxpr | ClosedJaxpr]:
    """The programs in a parameter of an equation."""
    if isinstance(value, Jaxpr | ClosedJaxpr):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _jaxprs(item)


def _dot(equation: JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    lhs = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(lhs[axis] for axis in contracted)


def _convolution(equation: JaxprEqn) -> int:
    params = equation.params
    numbers = params["dimension_numbers"]
    lhs, rhs = (v.aval.shape for v in equation.invars)
    out = equation.outvars[0].aval.shape
    batch, features = (out[axis] for axis in numbers.out_spec[:2])
    macs = batch * features * rhs[numbers.rhs_spec[1]]  # the kernel's input features are those of one group
    for i, (low, _) in enumerate(params["padding"]):
        macs *= _pairs(
            lhs[numbers.lhs_spec[i + 2]],
            rhs[numbers.rhs_spec[i + 2]],
            out[numbers.out_spec[i + 2]],
            stride=params["window_strides"][i],
            low=low,
            holes=params["lhs_dilation"][i],
            spread=params["rhs_dilation"][i],
        )
    return 2 * macs


def _pairs(size: int, kernel: int, out: int, *, stride: int, low: int, holes: int, spread: int) -> int:
    """Along one axis: (output, kernel tap) pairs that fall on an entry of the input, not on padding or between two."""
    place = np.arange(out)[:, None] * stride + np.arange(kernel) * spread - low
    return int(((place >= 0) & (place < size * holes) & (place % holes == 0)).sum())


def _warn(message: str, value: int) -> int:
    warnings.warn(f"ddjax.flops.count: {message}", RuntimeWarning, stacklevel=2)
    return value
