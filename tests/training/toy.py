"""A linear denoiser and a stochastic objective, small enough to check a step by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ddjax import random
from ddjax.training.state import init_state
from ddjax.types import Rows

SITES = 4


def apply(params, xt, t, cond, *, rng=None, train=False):
    out = xt @ params["dense"]["kernel"] + params["dense"]["bias"] + t[:, None] * params["time"]
    return out if cond is None else out + cond["shift"]


def init(key, dtype=jnp.float32):
    k1, k2 = jax.random.split(key)
    kernel = jax.random.normal(k1, (SITES, SITES), dtype)
    return {
        "dense": {"kernel": kernel, "bias": jnp.zeros(SITES, dtype)},
        "time": jax.random.normal(k2, (SITES,), dtype),
    }


def objective(key, apply, params, x0, cond=None, weights=None, rows=None, train=True):
    """Predict x0 from x0 plus noise at a stratified time: noise by global row, loss the weighted mean."""
    rows = Rows.all(x0.shape[0]) if rows is None else rows
    time_key, noise_key = jax.random.split(key)
    t = random.stratified(time_key, rows, x0.dtype)
    noise = random.normal(random.example_keys(noise_key, rows.index), x0.shape[1:], x0.dtype)
    error = apply(params, x0 + t[:, None] * noise, t, cond) - x0
    loss = (error**2).mean(axis=-1)
    weights = jnp.ones_like(loss) if weights is None else weights
    mean = lambda v: (weights * v).sum() / weights.sum()
    return mean(loss), {"time": mean(t), "noise": mean(noise[:, 0])}


def batch(size=16, dtype=np.float32, seed=0, weighted=False, cond=False):
    rng = np.random.default_rng(seed)
    out = {"x0": rng.normal(size=(size, SITES)).astype(dtype)}
    if weighted:
        out["weights"] = rng.uniform(0.1, 3.0, size=size).astype(dtype)
    if cond:
        out["cond"] = {"shift": rng.normal(size=(size, SITES)).astype(dtype)}
    return out


def state(optimizer=None, dtype=jnp.float32, seed=0):
    return init_state(lambda key: init(key, dtype), optimizer or optax.sgd(0.1), jax.random.key(seed))


def leaves(tree):
    """Every leaf as numpy, keys as their words."""
    is_key = lambda a: jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key)
    return [np.asarray(jax.random.key_data(a) if is_key(a) else a) for a in jax.tree.leaves(tree)]


def assert_same(a, b, atol=0.0):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(leaves(a), leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x, y, rtol=0, atol=atol)
