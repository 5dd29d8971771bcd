import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax import objectives, processes
from ddjax.objectives.base import TENTHS, Reduction


def by_hand(errors, t, weights):
    """Sums over sites one by one."""
    found = np.zeros((TENTHS, 2))
    for place in np.ndindex(errors.shape):
        tenth = min(int(t[place] * TENTHS), TENTHS - 1)
        if weights[place] > 0:
            found[tenth] += weights[place] * errors[place], weights[place]
    return found / weights.sum()


@pytest.mark.parametrize("own_time", [False, True])
@pytest.mark.parametrize("kind", ["none", "examples", "sites"])
def test_the_parts_are_those_of_the_loss(x64, own_time, kind):
    rng = np.random.default_rng(0)
    errors = rng.exponential(size=(7, 3, 2))
    t = rng.random((7, 3, 2) if own_time else 7)
    t[0] = 1.0
    weights = {
        "none": None,
        "examples": np.array([1.0, 2.0, 0.0, 0.5, 1.0, 3.0, 1.0]),
        "sites": rng.integers(0, 3, (7, 3, 2)).astype(float),
    }[kind]
    full = np.ones((7, 3, 2))
    if weights is not None:
        full = full * (weights if kind == "sites" else weights[:, None, None])
        errors[full == 0] = np.nan  # of what has no weight nothing is used
    reduce = Reduction.of(None if weights is None else jnp.asarray(weights), jnp.zeros((7, 3, 2), jnp.int32))
    found = reduce.by_time(jnp.asarray(errors), jnp.asarray(t))["by_time"]
    expected = by_hand(errors, t if own_time else np.broadcast_to(t[:, None, None], errors.shape), full)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(found.sum(0)[1], 1.0)
    if kind != "examples":  # there nan * 0 is the reduction's own business
        np.testing.assert_allclose(found.sum(0)[0], reduce(jnp.asarray(errors)), rtol=1e-12)


def test_objectives_tell_it():
    process = processes.Masked(3)

    def apply(params, xt, t, cond=None, *, rng=None, train=False):
        return jnp.zeros((*xt.shape, 3))

    x0 = jnp.zeros((16, 4), jnp.int32)
    loss, metrics = objectives.elbo(process, "posterior")(jax.random.key(0), apply, {}, x0)
    np.testing.assert_allclose(metrics["by_time"].sum(0), [loss, 1.0], rtol=1e-5)
    assert (metrics["by_time"][:, 1] > 0).all()  # times are spread over the batch
