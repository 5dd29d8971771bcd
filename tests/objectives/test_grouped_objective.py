"""Groups of sites: the loss and the bound are the code length of the law that writes them, exactly."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax import groups, likelihood, random, taps
from ddjax.fixtures import Categorical
from ddjax.objectives import grouped
from ddjax.predictions import bind
from ddjax.processes import Masked, Uniform
from ddjax.schedules import Cosine
from ddjax.sites import Sites

LAW = Categorical(3, 2, seed=2)
PROCESS = Masked(2)
CLEAN = np.asarray(list(itertools.product(range(2), repeat=3)), np.int32)
SEEN = []  # the groups that the network was told


def law():
    """The law as a table."""
    rng = np.random.default_rng(LAW.seed)
    p = rng.dirichlet(np.full(8, LAW.concentration)) + 1e-4
    return p / p.sum()


def exact(params, xt, t, cond, *, rng=None, train=False):
    """The conditional of each site given the clean sites of groups before its own and what is shown in its own."""
    taps.tap("sites", np.arange(3))
    if not isinstance(cond, dict):
        return jnp.zeros((*xt.shape, 2))
    clean, own = cond["clean"], cond["groups"]
    SEEN.append(own)
    before = own[:, :, None] > own[:, None]
    shown = jnp.where(before, clean[:, None], jnp.where(own[:, :, None] == own[:, None], xt[:, None], 2))
    fits = ((shown[..., None, :] == CLEAN) | (shown[..., None, :] == 2)).all(-1)  # (batch, site, configuration)
    p = jnp.where(fits, jnp.asarray(law()), 0.0)
    return jnp.log(jnp.einsum("bic,cik->bik", p, jnp.asarray(np.eye(2)[CLEAN])) + 1e-30)


def nats(x, own):
    """-log p(x | groups) by sums over the table; group 0 costs nothing."""
    p, total = law(), 0.0
    for i in range(3):
        given = (own < own[i])[None] & (x != CLEAN)
        fits = ~given.any(-1)
        if own[i]:
            total -= np.log(p[fits & (CLEAN[:, i] == x[i])].sum() / p[fits].sum())
    return total


def loss(rows, weights=None, **options):
    SEEN.clear()
    value, _ = grouped(PROCESS, **options)(jax.random.key(3), exact, {}, jnp.asarray(rows), None, weights)
    return value, np.asarray(SEEN[-1])


@pytest.mark.parametrize("numbers", [None, (3,), (1,), (2, 3)])
def test_the_loss_is_the_code_length_given_the_groups(x64, numbers):
    rows = np.tile(CLEAN, (3, 1))
    value, own = loss(rows, numbers=numbers)
    expected = np.mean([nats(x, g) for x, g in zip(rows, own, strict=True)]) / 3
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    if numbers == (3,):  # one at a time: the entropy, whatever the order
        value, _ = loss(CLEAN, jnp.asarray(law()), numbers=numbers)
        np.testing.assert_allclose(value, -(law() * np.log(law())).sum() / 3, rtol=1e-10)


def test_known_sites_are_the_first_group(x64):
    """Weight 0: shown, free, and seen by all others."""
    rows, weights = CLEAN, np.tile([1.0, 0.0, 1.0], (8, 1))
    value, own = loss(rows, jnp.asarray(weights), numbers=(2,))
    np.testing.assert_array_equal(own[:, 1], 0)
    assert set(map(tuple, own[:, ::2])) == {(1, 2), (2, 1)}
    np.testing.assert_allclose(value, sum(nats(x, g) for x, g in zip(rows, own, strict=True)) / 16, rtol=1e-10)


def test_the_bound_is_the_entropy_one_at_a_time_and_the_sum_over_groups_else(x64):
    denoise, p = bind(exact, {}, PROCESS, "posterior"), law()
    found = likelihood.grouped(jax.random.key(3), denoise, PROCESS, jnp.asarray(CLEAN), steps=3, num_draws=2)
    np.testing.assert_allclose(found.total, -np.log(p), rtol=1e-10)
    np.testing.assert_allclose(found.diffusion_error, 0.0, atol=1e-10)
    found = likelihood.grouped(jax.random.key(3), denoise, PROCESS, jnp.asarray(CLEAN), steps=1, num_draws=2)
    np.testing.assert_allclose(found.total, [nats(x, np.ones(3)) for x in CLEAN], rtol=1e-10)
    known = np.tile([False, True, True], (8, 1))
    found = likelihood.grouped(
        jax.random.key(3), denoise, PROCESS, jnp.asarray(CLEAN), steps=2, known=jnp.asarray(known)
    )
    np.testing.assert_allclose(found.total, [nats(x, np.array([1, 0, 0])) for x in CLEAN], rtol=1e-10)
    # Two steps: two sites and then one, with any site last.
    found = likelihood.grouped(jax.random.key(3), denoise, PROCESS, jnp.asarray(CLEAN), steps=2, num_draws=3000)
    expected = [np.mean([nats(x, 1 + (np.arange(3) == last)) for last in range(3)]) for x in CLEAN]
    assert (np.abs(found.total - np.asarray(expected)) < 5 * found.diffusion_error).all()


@pytest.mark.parametrize(("schedule", "sizes"), [(None, [3, 2, 3, 2]), (Cosine(), [1, 2, 3, 4])])
def test_groups_are_as_large_as_the_schedule_says_and_in_any_order(schedule, sizes):
    """Ten sites in four steps; every site is as often in each; all of them in a step each where steps are as many."""
    process = Masked(2) if schedule is None else Masked(2, schedule)
    free = jnp.ones((4000, 10), bool)
    draw = lambda free, steps: np.asarray(
        groups.in_random_groups(
            process, random.example_keys(jax.random.key(3), len(free)), free, jnp.full(len(free), steps)
        )
    )
    own = draw(free, 4)
    left = np.array([10 * float(process.schedule.sigma(jnp.asarray(t))) for t in (0.75, 0.5, 0.25, 0.0)])
    left = np.ceil(left - 0.501)
    np.testing.assert_array_equal(-np.diff([10, *left]), sizes)
    for k, size in enumerate(sizes, 1):
        np.testing.assert_array_equal((own == k).sum(1), size)
    often = np.array([(own == k).mean(0) for k in (1, 2, 3, 4)])
    p = np.array(sizes)[:, None] / 10
    assert (np.abs(often - p) < 5 * np.sqrt(p * (1 - p) / 4000)).all()
    if schedule is None:
        np.testing.assert_array_equal(np.sort(draw(free[:5], 99), axis=1), np.tile(np.arange(1, 11), (5, 1)))
        some = np.arange(10) % 3 > 0
        own = draw(jnp.broadcast_to(some, (5, 10)), 2)
        np.testing.assert_array_equal(own[:, ~some], 0)
        np.testing.assert_array_equal(np.sort(own[:, some], axis=1), np.tile([1] * 3 + [2] * 3, (5, 1)))


def test_numbers_of_steps_are_drawn_evenly():
    from ddjax.objectives.grouped import _steps

    u = (jnp.arange(6) + 0.5) / 6
    np.testing.assert_array_equal(_steps(u, (3, 8), 9), [3, 3, 3, 8, 8, 8])
    np.testing.assert_array_equal(_steps(u, None, 7), np.floor(8 ** np.asarray(u)))


def test_what_cannot_be_grouped_is_refused():
    with pytest.raises(ValueError, match=r"must be processes.Masked, got Uniform"):
        grouped(Uniform(2))
    for numbers in ((), (2, 0)):
        with pytest.raises(ValueError, match="steps must be at least 1"):
            grouped(PROCESS, numbers=numbers)
    denoise = bind(exact, {}, PROCESS, "posterior")
    with pytest.raises(ValueError, match="num_draws must be at least 1"):
        likelihood.grouped(jax.random.key(3), denoise, PROCESS, jnp.asarray(CLEAN), steps=1, num_draws=0)
    with pytest.raises(ValueError, match="known has shape"):
        likelihood.grouped(jax.random.key(3), denoise, PROCESS, jnp.asarray(CLEAN), steps=1, known=jnp.ones(3, bool))
    with pytest.raises(ValueError, match="the taps sites were never reached"):
        Sites.of(lambda xt, t, cond: xt, jnp.asarray(CLEAN), jnp.ones(8))
