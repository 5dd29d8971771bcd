"""A network that is told one time for each part of the early ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax.denoisers import SharedEarlyTimes


def clock(params, xt, t, cond=None, **options):
    """What it is told."""
    return params * t


def test_early_times_are_shared():
    told = SharedEarlyTimes(clock, until=0.1, parts=5)
    t = jnp.asarray([0.0, 0.0199, 0.03, 0.0999, 0.1, 0.5, 1.0])
    np.testing.assert_allclose(told(1.0, None, t), [0.0, 0.0, 0.02, 0.08, 0.1, 0.5, 1.0], atol=1e-7)
    np.testing.assert_allclose(told(2.0, None, jnp.asarray(0.05)), 0.08, rtol=1e-6)  # one time for the batch
    # No slope in time where times are shared, the network's own elsewhere.
    slope = jax.vmap(jax.grad(lambda t: told(3.0, None, t)))(jnp.asarray([0.01, 0.05, 0.4]))
    np.testing.assert_array_equal(slope, [0.0, 0.0, 3.0])
    assert hash(told) == hash(SharedEarlyTimes(clock))
    assert told == SharedEarlyTimes(clock)


def test_errors():
    for options in ({"until": 0.0}, {"until": 1.5}, {"parts": 0}):
        with pytest.raises(ValueError, match="at least one part"):
            SharedEarlyTimes(clock, **options)
