"""Block diffusion's loss: the bound, with a time for each block; the range of noise levels that varies least."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax import Rows, random
from ddjax.denoisers import TextTransformer, functional_init
from ddjax.fixtures import Categorical, exact_nelbo
from ddjax.fixtures.categorical import all_states
from ddjax.frozen import Frozen
from ddjax.objectives import base, block_elbo, elbo, search_clip, teacher_forced, with_clean, with_condition_dropout
from ddjax.predictions import Prediction
from ddjax.processes import Chain, Gaussian, Masked
from ddjax.processes.mixture import Corrupted
from ddjax.schedules import CondOT, Cosine, LogLinear

LAW = Categorical(3, 2)
TABLE = np.random.default_rng(0).normal(size=(2, 27, 3, 2))


def apply(params, xt, t, cond, *, rng=None, train=False):
    """A network in blocks of two: the second block is told the first one's clean symbols, not the noisy ones."""
    second = jnp.where(jnp.arange(3) < 2, cond["clean"], xt)
    place = jnp.asarray([9, 3, 1])
    first = jnp.where(jnp.arange(3) < 2, xt, 2)
    return jnp.where((jnp.arange(3) < 2)[:, None], params[0][first @ place], params[1][second @ place])


def expected_loss(objective, process, params, nodes):
    """The expectation over the law and its noise of the loss at the uniforms `nodes`, nats per site."""
    clean, noisy = all_states(3, 2), all_states(3, 3)
    x0, xt = jnp.asarray(np.repeat(clean, len(noisy), 0)), jnp.asarray(np.tile(noisy, (len(clean), 1)))
    seen = {}

    def sample(self, keys):
        seen["q"] = jnp.exp(jnp.maximum(self.log_prob(xt), -1e6).sum(-1))
        return xt

    def at(u):
        losses, _ = objective(jax.random.key(0), apply, params, x0, train=False)
        p = jnp.repeat(jnp.exp(LAW.log_p), len(noisy)) * seen["q"]
        return jnp.where(p > 0, p * losses, 0.0).sum()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Corrupted, "sample", sample)
        patch.setattr(base, "weighted_mean", lambda values, weights: values)

        def one(u):
            patch.setattr(random, "latin", lambda key, rows, num: jnp.full((len(rows.index), num), u))
            return at(u)

        return jax.jit(lambda u: jax.lax.map(one, u))(nodes)


@pytest.mark.slow
@pytest.mark.parametrize("clip", [(0.0, 1.0), (0.3, 0.8)])
def test_the_expected_loss_is_the_bound(x64, clip):
    process = Masked(2, Cosine())
    params = jnp.asarray(TABLE)
    ends = tuple(2 / math.pi * math.asin(v) for v in clip)
    denoise = lambda xt, t, cond: Prediction(apply(params, xt, t, cond), "posterior")
    bound = exact_nelbo(LAW, denoise, process, t_range=ends, order=16, cond=with_clean)
    nodes, weights = np.polynomial.legendre.leggauss(8)  # the integrand is a polynomial in the noise level
    losses = expected_loss(block_elbo(process, "posterior", block=2, clip=clip), process, params, (nodes + 1) / 2)
    np.testing.assert_allclose(losses @ weights / 2, bound.diffusion[0] / 3 / (clip[1] - clip[0]), rtol=1e-7)


def test_the_network_is_told_each_blocks_time_and_the_clean_sequence():
    def told(objective, *arguments):
        """The time and the condition that reach the network."""
        seen = []

        def spy(params, xt, t, cond, **_):
            seen.append((t, cond))
            return jnp.zeros((*xt.shape, 2))

        def run(*arguments):
            objective(jax.random.key(0), spy, {}, *arguments)
            return seen[0]

        return jax.jit(run)(*arguments)

    x0, labels = jnp.asarray(np.random.default_rng(0).integers(0, 2, (4, 5))), jnp.arange(4)
    objective = block_elbo(Masked(2, LogLinear(0.1)), "posterior", block=2, clip=(0.2, 0.6))
    t, cond = told(with_condition_dropout(objective, 1.0, 9), x0, labels)
    np.testing.assert_array_equal(cond["clean"], x0)
    np.testing.assert_array_equal(cond["cond"], 9)  # the label alone is dropped
    t = np.asarray(t)
    assert t.shape == (4, 5)
    np.testing.assert_array_equal(t, t[:, [0, 0, 2, 2, 4]])
    level = np.sort((0.9 * t[:, ::2] - 0.2).ravel() / 0.4)  # twelve blocks, one in each twelfth of the range
    np.testing.assert_array_equal(np.floor(12 * level + 1e-4), np.arange(12))
    t, cond = told(teacher_forced(elbo(Masked(2), "posterior")), x0)
    assert cond.keys() == {"clean"}
    assert t.shape == (4,)


@pytest.mark.slow
@pytest.mark.parametrize(("total", "num"), [(1, 1), (1, 5), (6, 3), (4, 7)])
def test_latin_uniforms(total, num):
    u = np.asarray(random.latin(jax.random.key(1), Rows.all(total), num), np.float64)
    parts = np.floor(u * total * num).astype(int)
    np.testing.assert_array_equal(np.sort(parts.ravel()), np.arange(total * num))
    for row in parts:  # a row is spread evenly over [0, 1)
        np.testing.assert_array_equal(np.sort(row) - row.min(), total * np.arange(num))
    # A column moves on by one of `num` parts from row to row, and by its own place in the part.
    np.testing.assert_array_equal(np.diff(parts, axis=0) % (total * num), (total + 1) % (total * num))
    split = [random.latin(jax.random.key(1), Rows(jnp.arange(i, i + 1), total), num) for i in range(total)]
    np.testing.assert_array_equal(np.concatenate(split), u.astype(np.float32))


@pytest.mark.slow
def test_a_time_for_each_block_varies_less():
    """Two blocks of two sites that are copies: each costs 2 log 3 / t where both are lost, else nothing.

    At times t, t' uniform on [a, 1] a block has E f = (1 + a) log 3 and E f^2 = 4 (log 3)^2, and the two have the
    covariance 4 (log 3)^2 Cov(t, t'): (1 - a)^2 times 1/12 for one time, -1/24 for one half a range further on.
    """

    def copies(params, xt, t, cond, **_):
        other = xt.reshape(-1, 2, 2)[:, :, ::-1].reshape(-1, 4)
        return jnp.where((other < 3)[..., None], 40.0 * jax.nn.one_hot(other, 3), 0.0)

    x0, log3 = jnp.zeros((1, 4), int), math.log(3)
    one = teacher_forced(elbo(Masked(3), "posterior", t_range=(0.2, 1.0)))
    each = block_elbo(Masked(3), "posterior", block=2, clip=(0.2, 1.0))
    upper = block_elbo(Masked(3), "posterior", block=2, clip=(0.5, 1.0))
    with jax.debug_key_reuse(False):
        keys = jax.random.split(jax.random.key(0), 60_000)
        draw = lambda objective: np.asarray(
            jax.jit(jax.vmap(lambda key: objective(key, copies, {}, x0, train=False)[0]))(keys), np.float64
        )
        losses = {"one": draw(one) / 0.8, "each": draw(each), "upper": draw(upper)}  # elbo's is the integral
    for name, (a, covariance) in {"one": (0.2, 1 / 12), "each": (0.2, -1 / 24), "upper": (0.5, -1 / 24)}.items():
        sums = 4 * losses[name] / log3
        assert abs(sums.mean() - 2 * (1 + a)) < 4 * sums.std() / math.sqrt(len(keys)), name
        variance = 2 * (4 - (1 + a) ** 2) + 2 * 4 * (1 - a) ** 2 * covariance
        np.testing.assert_allclose(sums.var(), variance, rtol=0.03, err_msg=name)


@pytest.mark.slow
def test_microbatches_give_the_whole(x64):
    objective = block_elbo(Masked(2), "posterior", block=2)
    x0, params = jnp.asarray(np.random.default_rng(0).integers(0, 2, (6, 3))), jnp.asarray(TABLE)
    loss = jax.jit(lambda x0, rows: objective(jax.random.key(3), apply, params, x0, rows=Rows(rows, 6))[0])
    halves = [float(loss(x0[i : i + 3], jnp.arange(i, i + 3))) for i in (0, 3)]
    np.testing.assert_allclose(np.mean(halves), float(loss(x0, jnp.arange(6))), rtol=1e-12)


@pytest.mark.slow
def test_gradients_are_finite_in_float32():
    """A real network that is told the time of each site, on the whole range."""
    init, network = functional_init(
        lambda rngs: TextTransformer(
            length=1, symbols_in=3, symbols_out=2, width=8, depth=1, heads=2, block=2, rngs=rngs
        )
    )
    params = jax.tree.map(lambda p: p + 0.1, init(jax.random.key(0)))
    x0 = jnp.asarray(np.random.default_rng(0).integers(0, 2, (1, 1)))
    objective = block_elbo(Masked(2), "posterior", block=2, clip=(0.0, 1.0))
    losses = jax.jit(jax.vmap(jax.value_and_grad(lambda p, key: objective(key, network, p, x0)[0]), (None, 0)))
    with jax.debug_key_reuse(False):
        found = losses(params, jax.random.split(jax.random.key(0), 50))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    assert np.abs(found[1]["final"]["out"]["kernel"]).max() > 0


def overconfident(params, xt, t, cond, **_):
    """Knows nothing where something is shown, and is sure of symbol 0 where nothing is."""
    empty = (xt == 2).all(-1)[:, None, None]
    return jnp.where(empty, jnp.asarray([4.0, 0.0]), jnp.zeros((*xt.shape, 2)))


def exact_variance(low, high):
    """Of one example's loss, nats per site: all sixteen texts, all masks, by quadrature over the time."""
    sure = np.log1p(np.exp([-4.0, 4.0]))
    nodes, weights = np.polynomial.legendre.leggauss(40)
    t, weights = low + (high - low) * (nodes + 1) / 2, weights / 2
    moments = np.zeros(2)
    for x, lost in itertools.product(itertools.product(range(2), repeat=4), itertools.product([0, 1], repeat=4)):
        k = sum(lost)
        cost = sum(sure[v] for v in x) if k == 4 else k * math.log(2)
        p = t**k * (1 - t) ** (4 - k) / 16
        moments += [weights @ (p * cost / t / 4), weights @ (p * (cost / t / 4) ** 2)]
    return moments[1] - moments[0] ** 2


@pytest.mark.slow
def test_the_search_finds_the_range_of_least_variance():
    candidates = [(0.05, 1.0), (0.9, 1.0), (0.2, 0.4), (0.05, 0.1)]
    exact = {clip: exact_variance(*clip) for clip in candidates}
    x0 = jnp.asarray(np.tile(all_states(4, 2), (32, 1)))
    found = search_clip(
        jax.random.key(0), overconfident, {}, Masked(2), x0, candidates, kind="posterior", block=4, draws=64
    )
    assert found.best == min(exact, key=exact.get) == (0.2, 0.4)
    for clip in candidates:
        np.testing.assert_allclose(found.variances[clip], exact[clip], rtol=0.1)


def test_bad_arguments_are_refused():
    for clip in [(0.5, 0.5), (-0.1, 1.0), (0.0, 1.1)]:
        with pytest.raises(ValueError, match="clip is a range of noise levels"):
            block_elbo(Masked(2), "posterior", block=2, clip=clip)
    with pytest.raises(ValueError, match="block=0"):
        block_elbo(Masked(2), "posterior", block=0)
    for process in (Gaussian(CondOT()), Chain(2, Frozen(np.eye(2)[None]))):
        with pytest.raises(ValueError, match=r"which .* does not have: give a process with a survival"):
            block_elbo(process, process.kinds[0], block=2)
    arguments = (jax.random.key(0), overconfident, {}, Masked(2), jnp.zeros((1, 3), int))
    for candidates, draws in (([], 8), ([(0.1, 1.0)], 1)):
        with pytest.raises(ValueError, match="needs candidates and two losses"):
            search_clip(*arguments, candidates, kind="posterior", block=3, draws=draws)
