"""Windows one after the other: on a Markov chain the law of long sequences is the chain's, exactly."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from test_sampling_less import a_run

import ddjax
from ddjax import grids
from ddjax.fixtures import Categorical
from ddjax.fixtures.categorical import all_states
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian, InBasis, Masked, Product
from ddjax.processes.in_basis import DCT
from ddjax.sampling import Observed
from ddjax.schedules import VPCosine
from ddjax.solvers import Ancestral, LeftToRight, Parts, Unmask

STEP = np.array([[0.7, 0.3], [0.1, 0.9]])
FIRST = np.array([0.25, 0.75])  # stationary, so that every window has one law
PROCESS = Masked(2)
ONE_BY_ONE = Unmask(PROCESS, LeftToRight())


def chain(length):
    """Probabilities of all sequences, in lexicographic order."""
    x = all_states(length, 2)
    return FIRST[x[:, 0]] * np.prod([STEP[x[:, i], x[:, i + 1]] for i in range(length - 1)], axis=0)


@dataclasses.dataclass(frozen=True)
class Chain(Categorical):
    """The chain's law of a window."""

    @property
    def log_p(self):
        return jnp.log(jnp.asarray(chain(self.sites), dtype=float))


WINDOW = Chain(3, 2).denoise(PROCESS)


def draw(batch=4000, length=6, stride=2, window=3, solver=ONE_BY_ONE, **options):
    settings = {"shape": (batch, length), "window": window, "stride": stride, "solver": solver}
    with jax.debug_key_reuse(False):
        return ddjax.sample_long(jax.random.key(2), WINDOW, PROCESS, times=grids.uniform(3), **settings, **options)


def pvalue(x, p):
    counts = np.bincount(x @ (2 ** np.arange(x.shape[1])[::-1]), minlength=len(p))
    return stats.chisquare(counts, len(x) * p).pvalue


def test_the_law_is_the_chains_and_windows_apart_have_another():
    """Length 6 by windows of 3, against all 64 sequences: strides of 1 and 2, the last window cut short, and 3."""
    np.testing.assert_allclose(FIRST @ STEP, FIRST)
    for stride, length in ((1, 6), (2, 6)):
        out = draw(length=length, stride=stride)
        windows = 1 + -(-(length - 3) // stride)
        assert (np.asarray(out.nfe) == 3 * windows).all()
        assert out.x0.dtype == jnp.int32
        assert pvalue(np.asarray(out.x0), chain(length)) > 1e-3
    apart = np.asarray(draw(stride=3).x0)
    assert pvalue(apart, chain(6)) < 1e-10
    assert pvalue(apart, np.outer(chain(3), chain(3)).ravel()) > 1e-3


@pytest.mark.slow
def test_one_window_is_a_sample():
    settings = {"shape": (7, 3), "solver": ONE_BY_ONE, "times": grids.uniform(3)}
    plain = ddjax.sample(jax.random.key(2), WINDOW, PROCESS, **settings)
    np.testing.assert_array_equal(draw(7, 3).x0, plain.x0)
    np.testing.assert_array_equal(draw(7).x0[:, :3], plain.x0)  # and is how a longer one begins


BESIDE = Product({"number": Gaussian(VPCosine(s=0.0)), "symbol": PROCESS})


def beside(xt, t, cond=None):
    """Symbols of the chain; each number is 1 + 2 times the symbol beside it, given the symbol, else their mean."""
    what = WINDOW(xt["symbol"], t, None)
    p = jnp.exp(jax.nn.log_softmax(what.value))[..., 1]
    return Prediction({"number": (1.0 + 2.0 * p).astype(xt["number"].dtype), "symbol": what.value}, f"x0+{what.kind}")


@pytest.mark.slow
def test_sequences_side_by_side():
    """Symbols have the chain's law; numbers that of the symbols beside them. A known symbol in a later window stays."""
    n, times = 4000, jnp.asarray([1.0, 2 / 3, 1 / 3, 1e-6, 0.0])
    both = dict.fromkeys(("number", "symbol"), (n, 5))
    solver = Parts(BESIDE, {"symbol": ONE_BY_ONE, "number": Ancestral(BESIDE["number"])})
    settings = {"window": 3, "stride": 2, "solver": solver, "times": times}

    def run(shape=both, **more):
        with jax.debug_key_reuse(False):
            return ddjax.sample_long(jax.random.key(5), beside, BESIDE, shape=shape, **settings, **more)

    x = jax.tree.map(np.asarray, run().x0)
    assert pvalue(x["symbol"], chain(5)) > 1e-3
    # All symbols are written before the last step, which ends in the number that the network then says.
    np.testing.assert_allclose(x["number"], 1.0 + 2.0 * x["symbol"], atol=1e-5)
    mask = {"number": jnp.zeros((n, 5), bool), "symbol": jnp.zeros((n, 5), bool).at[:, 4].set(True)}
    known = Observed(mask, {"number": jnp.zeros((n, 5)), "symbol": jnp.zeros((n, 5), jnp.int32)})
    assert (run(observed=known).x0["symbol"][:, 4] == 0).all()


@pytest.mark.slow
def test_rows_are_their_own():
    whole = np.asarray(draw(7).x0)
    for few in (1, 2):
        np.testing.assert_array_equal(draw(few).x0, whole[:few])
    np.testing.assert_array_equal(draw(2, rows=jnp.asarray([5, 1])).x0, whole[[5, 1]])
    assert len(np.unique(whole, axis=0)) > 3


@pytest.mark.slow
def test_known_sites_stay_and_a_stop_token_ends_a_sequence():
    """Known sites, also in a later window: the law is the conditional. Behind the first 0 all is 0."""
    batch = 4000
    mask = jnp.broadcast_to(jnp.asarray([True, False, False, False, False, False]), (batch, 6))
    x = np.asarray(draw(observed=Observed(mask, jnp.zeros((batch, 6), jnp.int32))).x0)
    assert (x[:, 0] == 0).all()
    p = chain(6) * (all_states(6, 2)[:, 0] == 0)
    counts = np.bincount(x @ (2 ** np.arange(6)[::-1]), minlength=64)[:32]
    assert stats.chisquare(counts, batch * p[:32] / p.sum()).pvalue > 1e-3
    out = draw(500, 12, stop=0)
    x = np.asarray(out.x0)
    ends = np.argmax(x == 0, axis=1)
    some = (x == 0).any(1)
    assert 0.5 < some.mean() < 1
    assert all((row[end:] == 0).all() for row, end in zip(x[some], ends[some], strict=True))
    assert np.asarray(out.nfe).max() <= 3 * 6
    always = draw(
        5, 12, stop=0, observed=Observed(jnp.ones((5, 12), bool).at[:, 1:].set(False), jnp.zeros((5, 12), jnp.int32))
    )
    assert (np.asarray(always.x0) == 0).all()
    assert (np.asarray(always.nfe) <= 3).all()  # one window


@pytest.mark.slow
def test_a_run_writes_long_texts():
    """The prompt begins them, one window is a sample, chunks change nothing; and what does not fit."""
    run = a_run()
    (window,) = run.data.shape
    key = jax.random.key(0)
    x = np.asarray(run.sample(key, 5, length=14, prompt="ab", stride=2))
    assert x.shape == (5, 14)
    assert (x[:, :2] == [0, 1]).all()
    assert ((x >= 0) & (x < 3)).all()
    assert len(run.data.to_text(x[:1])[0]) == 14
    np.testing.assert_array_equal(run.sample(key, 5, length=14, prompt="ab", stride=2, batch_size=2), x)
    np.testing.assert_array_equal(run.sample(key, 3, length=window), run.sample(key, 3))
    ended = np.asarray(run.sample(key, 5, length=14, stop="."))
    for row in ended:
        assert (row[np.argmax(row == 2) :] == 2).all() or (row != 2).all()
    for options, match in (
        ({"length": 14, "trajectory": True}, "trajectory is for one window"),
        ({"length": 14, "infill": "a___"}, "infill is for one window"),
        ({"stride": 2}, "give the length"),
        ({"length": 3}, "a window of 6 does not fit"),
    ):
        with pytest.raises(ValueError, match=match):
            run.sample(key, 2, **options)


def test_bad_arguments():
    for options, match in (
        ({"window": 9}, "a window of 9 does not fit"),
        ({"stride": 4}, "stride must be 1 to 3"),
        ({"stride": 0}, "stride must be 1 to 3"),
        ({"observed": Observed(jnp.zeros((7, 2), bool), jnp.zeros((7, 2)))}, "observed has shapes"),
    ):
        with pytest.raises(ValueError, match=match):
            draw(7, **options)
    with pytest.raises(ValueError, match="sequences"):
        ddjax.sample_long(None, WINDOW, PROCESS, shape=(1, 4, 4), window=2, stride=1, solver=None, times=None)
    turned = InBasis(Gaussian(), DCT((1,)))
    with pytest.raises(ValueError, match="mixes sites"):
        ddjax.sample_long(None, WINDOW, turned, shape=(1, 4), window=2, stride=1, solver=None, times=None)


def test_bad_arguments_of_several_parts():
    both, solver = {"number": (2, 5), "symbol": (2, 5)}, Parts(BESIDE)
    known = Observed(jnp.zeros((2, 5), bool), jnp.zeros((2, 5), jnp.int32))
    for options, match in (
        ({"shape": both | {"symbol": (2, 4)}}, "all parts of one length"),
        ({"observed": known}, "observed has shapes"),
        ({"stop": 0}, "stop tokens are for masked processes, not for Product"),
    ):
        settings = {"shape": both, "window": 3, "stride": 2, "solver": solver, "times": grids.uniform(2)}
        with pytest.raises(ValueError, match=match):
            ddjax.sample_long(None, beside, BESIDE, **settings | options)
