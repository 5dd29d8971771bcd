"""What each policy keeps: the gradient is the same, and the matrix products done again are counted by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ddjax import flops
from ddjax.denoisers import TextTransformer, functional

WIDTH, DEPTH, SITES, BATCH, HIDDEN, COND = 16, 3, 8, 4, 24, 12


def gradient(**options):
    sizes = {"length": SITES, "symbols_in": 6, "symbols_out": 5, "width": WIDTH, "depth": DEPTH, "heads": 2}
    sizes |= {"mlp_width": HIDDEN, "cond_width": COND}
    apply, params = functional(TextTransformer(**sizes, **options, rngs=nnx.Rngs(0)))
    params = jax.tree.map(lambda p: p + 0.1, params)  # past the zeros of a new network
    x = jnp.asarray(np.random.default_rng(0).integers(0, 5, (BATCH, SITES)), jnp.int32)
    return jax.grad(lambda p: (apply(p, x, jnp.full(BATCH, 0.3)) ** 2).sum()), params


ATTENTION = DEPTH * 2 * (2 * BATCH * SITES**2 * WIDTH)  # scores, and the values they weigh
DENSE = DEPTH * 2 * BATCH * (SITES * (4 * WIDTH**2 + 3 * WIDTH * HIDDEN) + 6 * COND * WIDTH)
AGAIN = {"full": ATTENTION + DENSE, "dots_no_batch": ATTENTION, "dots": 0, "everything": 0, "none": 0}


@pytest.mark.parametrize("remat", AGAIN)
@pytest.mark.parametrize("scan", [True, False])
def test_what_is_computed_again(remat, scan):
    plain, params = gradient(scan=scan)
    grad, _ = gradient(remat=remat, scan=scan)
    assert flops.count(grad, params) - flops.count(plain, params) == AGAIN[remat]


@pytest.mark.slow
@pytest.mark.parametrize("remat", [True, "dots", "dots_no_batch", "everything", "offload_dots"])
def test_the_gradient_is_the_same(remat):
    plain, params = gradient(scan=True)
    want, got = jax.jit(plain)(params), jax.jit(gradient(remat=remat, scan=True)[0])(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, want)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="remat='all': expected True, False or one of 'none', 'full'"):
        gradient(remat="all")
