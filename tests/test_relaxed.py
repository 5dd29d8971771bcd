"""The law of relaxed tokens: order statistics, the argmax, softmaxes with and without the small entries."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats

from ddjax import random
from ddjax.fixtures.categorical import all_states
from ddjax.relaxed import _distinct, _normal, log_mean_exp_below, softmax_tokens, top_normals, top_tokens
from ddjax.types import SoftTokens

BATCH = 20_000


def keys(seed, batch=BATCH):
    return random.example_keys(jax.random.key(seed), batch)


@functools.partial(jax.jit, static_argnames=("num_symbols", "tau", "top"))
def relax(keys, x0, log_snr, *, num_symbols, tau, top=None):
    if top is None:
        return softmax_tokens(keys, x0, log_snr, num_symbols=num_symbols, tau=tau)
    return top_tokens(keys, x0, log_snr, num_symbols=num_symbols, tau=tau, top=top)


def dense(soft, num_symbols):
    """Soft tokens as probabilities over all symbols."""
    if not isinstance(soft, SoftTokens):
        return np.asarray(soft)
    out = np.zeros((*soft.ids.shape[:-1], num_symbols))
    np.put_along_axis(out, np.asarray(soft.ids), np.asarray(soft.weights), -1)
    return out


@pytest.mark.parametrize(("count", "top"), [(50_256, 4), (5, 5)])
def test_order_statistics(count, top):
    """Each against its own law, in float32, and each given the one before: Phi(z_j+1) / Phi(z_j) is a largest of n."""
    z = np.asarray(jax.jit(top_normals, static_argnums=(1, 2, 3))(keys(0), (), count, top)).astype(float)
    assert np.isfinite(z).all()
    assert (np.diff(z) < 0).mean() > 0.9999  # float32 can tie
    for j in range(top):
        law = lambda v, j=j: special.betainc(count - j, j + 1, special.ndtr(v))
        assert stats.kstest(z[:, j], law).pvalue > 1e-3
    uniform = np.exp(np.diff(special.log_ndtr(z)) * (count - 1 - np.arange(top - 1)))
    for column in uniform.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
    assert np.abs(np.corrcoef(np.column_stack([z[:, 0], uniform]).T) - np.eye(top)).max() < 5 / np.sqrt(BATCH)


def test_order_without_replacement_is_uniform():
    """Every ordered triple of four is as likely, and a whole draw is a permutation."""
    draw = jax.jit(_distinct, static_argnums=(1, 2, 3))
    triples = np.asarray(draw(keys(1), (), 4, 3))
    counts = [int((triples == triple).all(-1).sum()) for triple in all_states(3, 4) if len(set(triple)) == 3]
    assert sum(counts) == BATCH
    assert stats.chisquare(counts).pvalue > 1e-3
    np.testing.assert_array_equal(np.sort(draw(keys(2, 50), (2,), 6, 6)), np.broadcast_to(np.arange(6), (50, 2, 6)))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_mean_of_the_rest(x64, dtype):
    edges, scales = (v.ravel().astype(dtype) for v in np.meshgrid([-2.0, 0.5, 3.0, 4.5], [0.05, 1.0, 6.9, 7.1, 90.0]))
    ours = np.asarray(log_mean_exp_below(edges, scales))
    assert ours.dtype == dtype
    for edge, scale, value in zip(edges.astype(float), scales.astype(float), ours, strict=True):
        top = max(min(edge, scale) * scale - min(edge, scale) ** 2 / 2, edge * scale - edge**2 / 2)
        f = lambda z, s=scale, top=top: np.exp(s * z - 0.5 * z * z - top)
        parts = [integrate.quad(f, edge - b, edge - a, epsabs=0)[0] for a, b in ((0, 0.1), (0.1, 1), (1, 5), (5, 20))]
        expected = np.log(sum(parts)) + top - 0.5 * np.log(2 * np.pi) - special.log_ndtr(edge)
        np.testing.assert_allclose(
            value, expected, rtol=3e-6 if dtype == np.float32 else 1e-12, atol=1e-6 * (dtype == np.float32) + 1e-11
        )


@pytest.mark.slow
@pytest.mark.parametrize(("num_symbols", "top"), [(5, None), (5, 1), (5, 3), (5, 5), (2, 1), (50_257, 2)])
def test_argmax_follows_the_law(num_symbols, top):
    """Chi-square of x_t against one integral; it is the largest soft entry, and no soft entry is lost or doubled."""
    x0 = jnp.full((BATCH, 1), num_symbols // 2)
    snr, tau = 3.0 if num_symbols > 5 else 0.5, 0.1
    soft, xt = relax(keys(3), x0, jnp.full(BATCH, snr), num_symbols=num_symbols, tau=tau, top=top)
    r = np.exp(snr / 2)
    f = lambda z: np.exp((num_symbols - 1) * special.log_ndtr(z) - 0.5 * (z - r) ** 2) / np.sqrt(2 * np.pi)
    stays = integrate.quad(f, -8, 15, epsabs=1e-12, limit=200)[0]
    p = np.full(num_symbols, (1 - stays) / (num_symbols - 1))
    p[num_symbols // 2] = stays
    counts = np.bincount(np.asarray(xt)[:, 0], minlength=num_symbols)
    if num_symbols > 5:  # in bins of many symbols
        middle, bins = num_symbols // 2, np.arange(num_symbols) * 8 // num_symbols
        bins[middle] = 8
        p, counts = np.bincount(bins, p), np.bincount(bins, counts)
    assert stats.chisquare(counts, BATCH * p).pvalue > 1e-3
    if num_symbols <= 5:
        full = dense(soft, num_symbols)
        np.testing.assert_array_equal(full.argmax(-1), xt)
        assert full.sum(-1).max() < 1 + 1e-5
    if top is not None:
        assert soft.ids.shape == soft.weights.shape == (BATCH, 1, top)
        assert (np.diff(np.sort(soft.ids)) > 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("top", [4, 3])
def test_softmax_is_exact_when_nothing_is_left_out(top):
    """Weights of the clean symbol, another and the largest have the law of brute force; 3 of 4 leave a known one."""
    x0, snr = jnp.full((BATCH,), 1), jnp.full(BATCH, 0.3)
    exact = dense(relax(keys(4), x0, snr, num_symbols=4, tau=0.5)[0], 4)
    ours = dense(relax(keys(5), x0, snr, num_symbols=4, tau=0.5, top=top)[0], 4)
    exact = np.where(np.argsort(np.argsort(-exact)) < top, exact, 0.0)  # what is not among the largest is not shown
    for statistic in (lambda p: p[:, 1], lambda p: p[:, 3], lambda p: p.max(-1), lambda p: p.sum(-1)):
        # Rounding must not split the mass at 1.
        a, b = (np.round(statistic(p), 5) for p in (exact, ours))
        assert stats.ks_2samp(a, b).pvalue > 1e-3
    assert (ours.sum(-1) > 1 - 1e-5).all() == (top == 4)


@pytest.mark.slow
def test_expected_rest_is_close_to_the_rest():
    """The shown mass, where the entries left out have a good part of it."""
    batch, k = 8000, 60
    x0, snr = jnp.full((batch,), 7), jnp.full(batch, 2.0)
    exact = np.sort(dense(relax(keys(6, batch), x0, snr, num_symbols=k, tau=0.2)[0], k))[:, -5:].sum(-1)
    ours = np.asarray(relax(keys(7, batch), x0, snr, num_symbols=k, tau=0.2, top=5)[0].weights).sum(-1)
    assert 0.4 < exact.mean() < 0.8
    assert abs(exact.mean() - ours.mean()) < 4 * exact.std() * np.sqrt(2 / batch)


def test_large_normals_are_not_on_a_grid():
    """On one of 2**-23 some ten pairs of these would be tied."""
    z = np.asarray(jax.jit(_normal, static_argnums=(1, 2))(keys(8, 4), (500_000,), jnp.float32)).ravel()
    large = z[z > 3.9].astype(float)
    assert len(np.unique(large)) == len(large) > 50
    assert stats.kstest(special.ndtr(-large) / special.ndtr(-3.9), "uniform").pvalue > 1e-3
    assert stats.kstest(z[::50], "norm").pvalue > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("top", [None, 3])
def test_draws_do_not_depend_on_the_batch(top):
    x0 = jnp.asarray(np.random.default_rng(0).integers(0, 6, (8, 2, 3)))
    snr = jnp.linspace(-3.0, 3.0, 8)
    whole = relax(keys(9, 8), x0, snr, num_symbols=6, tau=0.2, top=top)
    part = relax(keys(9, 8)[5:6], x0[5:6], snr[5:6], num_symbols=6, tau=0.2, top=top)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[5:6], b, rtol=2e-6), whole, part)


@pytest.mark.slow
def test_the_ends_are_finite():
    """Only the clean symbol, or only noise."""
    snr = jnp.asarray([-jnp.inf, jnp.inf, 100.0])
    for top in (None, 2):
        soft, xt = relax(keys(10, 3), jnp.asarray([4, 4, 4]), snr, num_symbols=6, tau=0.01, top=top)
        assert np.isfinite(dense(soft, 6)).all()
        np.testing.assert_array_equal(xt[1:], 4)
        np.testing.assert_allclose(dense(soft, 6)[1:, 4], 1.0)
