"""Every process, prediction and bound: the entropy with the exact denoiser, the exact KL with a wrong one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_definition import tanh_sinh
from enumerated import LAW
from pairs import CHAINS, CONTINUOUS, LOOSE, by_definition, exact_gap, named, nelbo, process_of
from trained import OBJECTIVES, exact_trained_gap, trained_gap

from ddjax import likelihood, random
from ddjax.fixtures import Categorical
from ddjax.predictions import Prediction


def diverse(pairs):
    """First one kind of prediction for each process, the kinds in turn, then the others."""
    names = list(dict.fromkeys(pair.name for pair in pairs))
    families = [[pair for pair in pairs if pair.name == name] for name in names]
    turned = [family[n % len(family) :] + family[: n % len(family)] for n, family in enumerate(families)]
    return [family[n] for n in range(max(map(len, turned))) for family in turned if n < len(family)]


every_pair = pytest.mark.parametrize("pair", diverse(CONTINUOUS), ids=str)


def check(pair, law):
    """NELBO - H is 0 but for an imperfect prior; with a wrong denoiser, or a high low end, it is the exact KL."""
    prior = by_definition(pair, law, 0.0).start()
    assert (prior > 1e-6) == (("left" in pair.name) and ("Kernel" not in pair.name))
    assert abs(nelbo(pair, law, 0.0, pair.low) - prior) <= 1e-6
    for wrong in (0.0, 1.0):
        gap = exact_gap(pair, law, wrong, pair.wide)
        assert gap > 1e-3 or (wrong == pair.wide == 0.0) or law.sites == 1
        assert abs(nelbo(pair, law, wrong, pair.wide) - gap) <= 1e-6


@every_pair
def test_continuous_time(x64, pair):
    check(pair, LAW)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1, 5), (2, 5), (3, 3)], ids=str)
@every_pair
def test_larger_laws(x64, pair, size):
    check(pair, Categorical(*size, seed=sum(size)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Masked", "StateMasked, powers", "Thinning", "Uniform, t^2"])
def test_three_sites_and_five_symbols(x64, name):
    check(named(name, "posterior", CONTINUOUS), Categorical(3, 5))


@pytest.mark.parametrize("pair", diverse(CHAINS), ids=str)
def test_chains(x64, pair):
    """The KL of trajectories; where one site moves after the other, a step is exact."""
    exact, wrong = (nelbo(pair, LAW, moved, None) for moved in (0.0, 1.0))
    assert (abs(exact) < 1e-9) == pair.tight
    assert exact > (-1e-9 if pair.tight else 1e-2)
    np.testing.assert_allclose(exact, exact_gap(pair, LAW, 0.0, None), atol=1e-9)
    np.testing.assert_allclose(wrong, exact_gap(pair, LAW, 1.0, None), atol=1e-9)
    assert wrong > exact + 0.1


@pytest.mark.parametrize("pair", LOOSE, ids=str)
def test_loose_bounds_are_bounds_and_say_so(x64, pair):
    """Even the exact denoiser pays, and the wrong one more than its KL."""
    process = process_of(pair, LAW)
    assert not process.tight
    assert all(process_of(p, LAW).tight for p in CONTINUOUS if p.bound == "FlowBound")
    assert nelbo(pair, LAW, 0.0, pair.low) > 0.1
    assert nelbo(pair, LAW, 1.0, pair.low) > exact_gap(pair, LAW, 1.0, pair.low) + 0.1


@pytest.mark.slow
@pytest.mark.parametrize("row", OBJECTIVES, ids=str)
def test_objectives_that_are_bounds(x64, row):
    """Their expectation, with both ends added, is the entropy, or what a wrong network costs by definition."""
    exact, wrong = (trained_gap(row, moved) for moved in (0.0, 1.0))
    assert abs(exact) <= 1e-6 or not row.pair.tight
    for moved, gap in ((0.0, exact), (1.0, wrong)):
        assert abs(gap - exact_trained_gap(row, moved)) <= 1e-6
    assert wrong > exact + 0.1


# -- sites that are given --------------------------------------------------------------------------------------


class Drawn:
    """A process whose draws are these states."""

    def __init__(self, process, xt):
        self.process, self.xt = process, xt

    def marginal(self, x0, t):
        return self

    def sample(self, keys):
        return self.xt

    def __getattr__(self, name):
        return getattr(self.process, name)


def conditional(law, process):
    """The exact posterior of the first of two sites, the second being always shown clean."""
    p = jnp.exp(law.log_p).reshape(law.symbols, law.symbols)

    def denoise(xt, t, cond):
        at = lambda k: process.marginal(jnp.full_like(xt, k), t).log_prob(xt)[:, 0]
        first = p.T[xt[:, 1]] * jnp.exp(jax.vmap(at, out_axes=-1)(jnp.arange(law.symbols)))
        second = jnp.ones_like(first)  # nobody asks
        return Prediction(jnp.log(jnp.maximum(jnp.stack([first, second], 1), 1e-300)), "posterior")

    return denoise


def given_second(pair, law, monkeypatch):
    """`likelihood.nelbo` with the second site known, its own draws replaced by enumeration and quadrature."""
    process, ends = process_of(pair, law), (pair.low, 1.0)
    x0 = jnp.repeat(law.configurations, process.num_states, axis=0)
    # The second site's noise is one that must never be seen.
    first = jnp.tile(jnp.arange(process.num_states), len(law.configurations))
    xt = jnp.stack([first, (x0[:, 1] + 1) % law.symbols], axis=1)
    known = jnp.broadcast_to(jnp.asarray([False, True]), x0.shape)
    nodes, weights = np.array(list(tanh_sinh([0.0, 1.0]))).T
    chance = lambda t: jnp.exp(law.log_prob(x0) + process.marginal(x0, jnp.full(len(x0), t)).log_prob(xt)[:, 0])

    def at(u):
        monkeypatch.setattr(random, "uniform", lambda keys, dtype=None: jnp.full(keys.shape[0], u, dtype))
        with jax.disable_jit():  # nothing drawn for this test may stay in a cache
            bound = likelihood.nelbo(
                jax.random.key(0),
                conditional(law, process),
                Drawn(process, xt),
                x0,
                known=known,
                num_times=1,
                t_range=ends,
            )
        low = chance(ends[0])
        diffusion = chance(process.time_at(u, ends)[0]) * bound.diffusion
        return jnp.stack([diffusion.sum(), (low * (bound.prior + bound.reconstruction)).sum()])

    diffusion, rest = np.asarray(jax.jit(lambda u: jax.lax.map(at, u))(nodes)).T
    return weights @ diffusion + rest[0]


KNOWN = ("Masked", "Uniform, t^2", "Hybrid", "StateMasked, powers", "Thinning", "Kernel, ring")


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_known_sites_give_the_conditional_entropy(x64, name, monkeypatch):
    """-log p(x_1 | x_2), with x_2 (a prompt, padding) shown at every time and charged nothing."""
    p = np.exp(np.asarray(LAW.log_p)).reshape(3, 3)
    entropy = -np.sum(p * np.log(p / p.sum(0)))
    pair = named(name, "posterior", CONTINUOUS)
    assert abs(given_second(pair, LAW, monkeypatch) - entropy) <= 1e-6
    assert LAW.entropy - entropy > 0.1


def test_known_is_one_entry_per_site():
    process = process_of(CONTINUOUS[0], LAW)
    with pytest.raises(ValueError, match=r"known has shape \(2,\); give one entry per site"):
        likelihood.nelbo(
            jax.random.key(0), conditional(LAW, process), process, LAW.configurations, known=jnp.ones(2, bool)
        )
