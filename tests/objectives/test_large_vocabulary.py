"""Fifty thousand symbols: no training step holds a matrix of symbols by symbols, nor more than a few rows per site."""

import jax
import numpy as np
import pytest

from ddjax import bench_cases
from ddjax.config import default, typed
from ddjax.data import from_arrays
from ddjax.experiment import build
from ddjax.training.setup import initial_state, train_step

K, BATCH, LENGTH = 50257, 2, 8


def sizes(jaxpr):
    """Of every array in a program and the programs within it."""
    for constant in getattr(jaxpr, "consts", ()):
        yield np.size(constant)
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars if hasattr(variable.aval, "size"))
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from sizes(inner)


def largest(case, symbols):
    config = default()
    config.denoiser.name = "text"
    config.denoiser.options = {"width": 8, "depth": 1, "heads": 2}
    tokens = np.random.default_rng(0).integers(0, symbols, (BATCH, LENGTH), dtype=np.int32)
    experiment = build(case.of(typed(config)), from_arrays(tokens, num_symbols=symbols))
    state = jax.eval_shape(lambda key: initial_state(experiment, key), jax.random.key(0))
    return max(sizes(jax.make_jaxpr(train_step(experiment))(state, {"x0": tokens})))


@pytest.mark.parametrize("name", bench_cases.TOKENS)
def test_memory_grows_with_the_symbols_not_with_their_square(name):
    assert BATCH * LENGTH * K <= largest(bench_cases.TOKENS[name], K) <= 2 * BATCH * LENGTH * (K + 1)


def test_a_matrix_would_be_seen():
    """64^2 entries are more than two rows for each of the 16 sites."""
    assert largest(bench_cases.TOKENS_BY_NAME["kernel elbo"], 64) >= 64**2
