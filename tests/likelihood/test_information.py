"""Information from denoising errors: the closed form of a jointly Gaussian condition."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax.fixtures import Categorical
from ddjax.likelihood import information_rate, mutual_information, pointwise_information
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian, Masked
from ddjax.schedules import CondOT, VPLinear
from ddjax.types import Rows

SLOPE = np.asarray([[1.2, -0.4], [0.3, 0.7]])  # x = y SLOPE + noise, y ~ N(0, I)
NOISE = np.asarray([[0.5, 0.2], [0.2, 0.3]])
WHOLE = SLOPE.T @ SLOPE + NOISE
FLOW = Gaussian(CondOT())
KEY = jax.random.key(0)


def denoise(process, kind="x0"):
    """Exact, given y or (None) without it."""

    def exact(xt, t, cond):
        alpha, sigma = (v(t)[:, None] for v in (process.schedule.alpha, process.schedule.sigma))
        mean = jnp.zeros_like(xt) if cond is None else cond @ SLOPE
        values, vectors = np.linalg.eigh(WHOLE if cond is None else NOISE)
        gain = alpha * values / (alpha**2 * values + sigma**2)
        x0 = mean + (gain * ((xt - alpha * mean) @ vectors)) @ vectors.T
        return process.convert(Prediction(x0, "x0"), kind, xt, t)

    return exact


def mutual(log_snr):
    """I(x_t; y) in closed form."""
    half = lambda c: 0.5 * np.linalg.slogdet(np.eye(2) + math.exp(log_snr) * c)[1]
    return half(WHOLE) - half(NOISE)


def log_ratio(x0, y, log_snr):
    """E over x_t given x0 of log p(x_t | y) / p(x_t), for x_t = x0 + noise of variance exp(-log_snr)."""
    total = 0.0
    for sign, covariance, off in ((1, NOISE, x0 - y @ SLOPE), (-1, WHOLE, x0)):
        c = covariance + math.exp(-log_snr) * np.eye(2)
        inverse = np.linalg.inv(c)
        squares = np.einsum("bi,ij,bj->b", off, inverse, off) + math.exp(-log_snr) * np.trace(inverse)
        total -= sign * 0.5 * (squares + np.linalg.slogdet(c)[1])
    return total


def integrated(process, x0, y, t_range, weights, *, orthogonal, kind):
    """The rate, by quadrature over times, at x0, y and noises given: the mean over these with `weights`."""
    nodes, node_weights = np.polynomial.legendre.leggauss(40)
    pieces = np.linspace(0.0, 1.0, 9)
    half = 0.5 * (pieces[1:] - pieces[:-1])[:, None]
    u, du = (half * nodes + pieces[:-1, None] + half).ravel(), (half * node_weights).ravel()
    two = np.asarray(list(itertools.product([-1.0, 1.0], repeat=2)))  # exact for squares of two normals
    x, cond, eps = (np.repeat(v, 4, 0) for v in (x0, y)), None, np.tile(two, (len(x0), 1))
    x, cond = (jnp.asarray(v) for v in x)

    @jax.jit
    def rate(u):
        t, slope = process.time_at(jnp.full(len(x), u), t_range)
        law = process.marginal(x, t)
        xt = law.mean + law.std * eps
        informed, ignorant = (denoise(process, kind)(xt, t, c) for c in (cond, None))
        return slope[:, None] * information_rate(process, x, informed, ignorant, xt, t, orthogonal=orthogonal)

    rates = jax.lax.map(rate, jnp.asarray(u)).sum(-1).reshape(len(u), len(x0), 4).mean(-1)
    return (du @ np.asarray(rates)) @ weights


def signs():
    """Nodes for (y, noise of x), exact for squares."""
    nodes = np.asarray(list(itertools.product([-1.0, 1.0], repeat=4)))
    y = nodes[:, :2]
    return y @ SLOPE + nodes[:, 2:] @ np.linalg.cholesky(NOISE).T, y


@pytest.mark.parametrize(("orthogonal", "kind"), [(False, "x0"), (True, "velocity")])
def test_mutual_information_is_the_closed_form(x64, orthogonal, kind):
    x0, y = signs()
    mean = np.full(len(x0), 1 / len(x0))
    for ends in ((30.0, -30.0), (3.0, -2.0)):
        t_range = tuple(float(FLOW.schedule.time(jnp.asarray(v))) for v in ends)
        found = integrated(FLOW, x0, y, t_range, mean, orthogonal=orthogonal, kind=kind)
        np.testing.assert_allclose(found, mutual(ends[0]) - mutual(ends[1]), atol=1e-8)
        if ends[0] == 30:
            whole = 0.5 * (np.linalg.slogdet(WHOLE)[1] - np.linalg.slogdet(NOISE)[1])
            np.testing.assert_allclose(found, whole, atol=1e-6)


def test_pointwise_information_is_the_log_ratio(x64):
    """Of one pair, which no other pair has to help."""
    x0, y = np.asarray([[0.5, -1.0], [2.0, 0.3]]), np.asarray([[1.0, 0.2], [-1.5, 0.4]])
    for ends in ((32.0, -32.0), (3.0, -2.0)):
        t_range = tuple(float(FLOW.schedule.time(jnp.asarray(v))) for v in ends)
        found = integrated(FLOW, x0, y, t_range, np.eye(2), orthogonal=False, kind="x0")
        np.testing.assert_allclose(found, log_ratio(x0, y, ends[0]) - log_ratio(x0, y, ends[1]), atol=1e-8)
    assert found.min() < 0 < found.max()  # a surprising condition misinforms


@pytest.mark.slow
def test_the_estimators_agree():
    process, batch = Gaussian(VPLinear()), 8000
    rng = np.random.default_rng(0)
    y = rng.normal(size=(batch, 2))
    x = y @ SLOPE + rng.normal(size=(batch, 2)) @ np.linalg.cholesky(NOISE).T
    x0, cond = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
    ends = [float(process.schedule.log_snr(jnp.asarray(t))) for t in process.t_range]
    truth = mutual(ends[0]) - mutual(ends[1])
    errors = []
    for estimate in (pointwise_information, mutual_information):
        found = estimate(KEY, denoise(process), process, x0, cond, num_times=8)
        nats = np.asarray(found.nats)
        assert abs(nats.mean() - truth) < 4 * nats.std() / math.sqrt(batch)
        np.testing.assert_allclose(found.sites.sum(-1), nats, rtol=1e-4, atol=1e-4)
        assert found.sites.shape == x0.shape
        errors.append(nats.std())
    assert (nats >= 0).all()
    assert errors[1] < 0.8 * errors[0]
    # The error it states of one example, and parts of a batch.
    many = pointwise_information(
        KEY, denoise(process), process, jnp.tile(x0[:1], (batch, 1)), jnp.tile(cond[:1], (batch, 1)), num_times=8
    )
    spread, stated = np.std(many.nats), math.sqrt(np.mean(np.asarray(many.error) ** 2))
    assert 0.5 * stated < spread < 1.1 * stated
    part = pointwise_information(
        KEY, denoise(process), process, x0[5:6], cond[5:6], num_times=8, rows=Rows(jnp.arange(5, 6), batch)
    )
    whole = pointwise_information(KEY, denoise(process), process, x0, cond, num_times=8)
    np.testing.assert_allclose(part.nats, whole.nats[5:6], rtol=1e-4)


def test_categorical_log_ratios_and_refusals():
    """Two laws on tokens, told apart by the condition."""
    one, other, process, batch = Categorical(2, 3), Categorical(2, 3, seed=5), Masked(3), 6000
    both = {True: one.denoise(process), False: other.denoise(process)}
    choose = lambda xt, t, cond: both[cond is not None](xt, t, None)
    x0 = jnp.tile(jnp.asarray([[2, 1]]), (batch, 1))
    found = np.asarray(pointwise_information(KEY, choose, process, x0, jnp.zeros(batch), num_times=4).nats)
    index = 2 * 3 + 1
    truth = float(one.log_p[index] - other.log_p[index])
    assert abs(truth) > 0.1
    assert abs(found.mean() - truth) < 4 * found.std() / math.sqrt(batch) + 1e-3
    with pytest.raises(ValueError, match="for Gaussian states, got Masked"):
        mutual_information(KEY, choose, process, x0, jnp.zeros(batch))
    with pytest.raises(ValueError, match="num_times must be at least 1, got 0"):
        pointwise_information(KEY, choose, process, x0, None, num_times=0)
    with pytest.raises(ValueError, match="0 <= low < high <= 1"):
        pointwise_information(KEY, choose, process, x0, None, t_range=(0.5, 0.5))
