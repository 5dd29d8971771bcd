import functools

import jax
import numpy as np
import pytest

from ddjax.denoisers import functional_init

# These programs run once: compiling them is all they cost.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@pytest.fixture(scope="session")
def jit():
    """`jax.jit` for tests, cheap to compile."""
    return functools.partial(jax.jit, compiler_options=FAST)


@pytest.fixture(scope="session")
def noise():
    """Normal noise in the shape of a tree of arrays or shapes: at initialisation zero layers hide most of a network."""

    def noise(tree, seed=7, scale=0.3):
        rng = np.random.default_rng(seed)
        return jax.tree.map(lambda x: (scale * rng.normal(size=x.shape)).astype(x.dtype), tree)

    return noise


@pytest.fixture(scope="session")
def build(jit, noise):
    """`build(make) -> (run, params)`: a compiled network with random weights. Equal networks share programs."""
    compiled = jit(lambda apply, *args, **kwargs: apply(*args, **kwargs), static_argnums=0, static_argnames="train")

    def build(make):
        init, apply = functional_init(make)
        return functools.partial(compiled, apply), noise(jax.eval_shape(init, jax.random.key(0)))

    return build
