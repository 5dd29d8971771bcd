"""The diagnostic of the projection error against the definition, by brute force in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax.evaluation import projection_error
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian
from ddjax.schedules import VPCosine

PROCESS = Gaussian(VPCosine())
DATA = np.random.default_rng(0).normal(size=(7, 2, 3))


def exact(xt, t, cond=None):
    """E[x_0 | x_t] of the seven points with equal weights, as noise."""
    alpha, sigma = (f(t[:, None, None]) for f in (PROCESS.schedule.alpha, PROCESS.schedule.sigma))
    squared = ((xt[:, None] - alpha[:, None] * DATA) ** 2).sum((2, 3))
    weights = jax.nn.softmax(-squared / (2.0 * sigma[:, 0] ** 2), axis=-1)
    x0 = jnp.einsum("bn,nij->bij", weights, DATA)
    return Prediction((xt - alpha * x0) / sigma, "noise")


def test_it_is_the_distance_to_the_nearest_point_in_units_of_the_datas(x64):
    rng = np.random.default_rng(1)
    t = np.array([0.05, 0.3, 0.6, 0.9])
    alpha, sigma = (
        np.asarray(f(jnp.asarray(t)))[:, None, None] for f in (PROCESS.schedule.alpha, PROCESS.schedule.sigma)
    )
    x0 = DATA[[0, 3, 3, 6]]
    xt = alpha * x0 + sigma * rng.normal(size=x0.shape)
    found = projection_error(exact, PROCESS, DATA, jnp.asarray(xt), jnp.asarray(t))
    z = xt / alpha
    for i in range(4):
        distances = np.sqrt(((z[i] - DATA) ** 2).sum((1, 2)))
        nearest = DATA[distances.argmin()]
        weights = np.exp(-((xt[i] - alpha[i] * DATA) ** 2).sum((1, 2)) / (2 * sigma[i] ** 2).item())
        mean = np.einsum("n,nij->ij", weights / weights.sum(), DATA)
        np.testing.assert_allclose(found.distance[i], distances.min(), rtol=1e-9)
        np.testing.assert_allclose(
            found.relative[i], np.linalg.norm(mean - nearest) / distances.min(), rtol=1e-6, atol=1e-9
        )
        level = np.sqrt(6) * (sigma[i] / alpha[i]).item() / distances.min()
        np.testing.assert_allclose(found.level[i], level, rtol=1e-9)
    assert found.relative[0] < 1e-6 < 1e-2 < found.relative[3]
    one = projection_error(
        lambda xt, t, cond=None: Prediction(jnp.broadcast_to(DATA[0], xt.shape), "x0"), PROCESS, DATA[:1],
        jnp.asarray(xt[:1]), jnp.asarray(t[:1]),
    )  # fmt: skip
    assert one.relative.tolist() == [0.0]  # of one point the denoiser is the projection
    with pytest.raises(ValueError, match="states have shape"):
        projection_error(exact, PROCESS, DATA[:, 0], jnp.asarray(xt), jnp.asarray(t))
