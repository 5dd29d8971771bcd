"""Block diffusion's bound is the one bound there is, with the clean sequence in the condition."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax import random
from ddjax.fixtures import Categorical, exact_nelbo
from ddjax.likelihood import nelbo
from ddjax.objectives import with_clean
from ddjax.predictions import Prediction
from ddjax.processes import Masked, in_blocks

LAW, PROCESS, MASK = Categorical(3, 3), Masked(3), 3
STATES = list(itertools.product(range(4), repeat=3))
RANGE = (1e-6, 1.0)


def exact_table():
    """log p(x_i | what a state shows) for every state with masks, by summing the law; `(states, sites, symbols)`."""
    p = np.exp(np.asarray(LAW.log_p, np.float64)).reshape(3, 3, 3)
    table = np.zeros((len(STATES), 3, 3))
    for row, state in zip(table, STATES, strict=True):
        shown = p[np.ix_(*[range(3) if s == MASK else [s] for s in state])]
        for i in range(3):
            law = shown.sum(tuple({0, 1, 2} - {i}))
            row[i] = np.log(law / law.sum()) if state[i] == MASK else np.where(np.arange(3) == state[i], 0.0, -40.0)
    return table


def wrong_table():
    return exact_table() + np.random.default_rng(5).normal(size=(len(STATES), 3, 3))


def look_up(table, xt):
    return jnp.asarray(table)[xt @ jnp.asarray([16, 4, 1])]


def alone(table):
    """A network on xt alone."""
    return lambda xt, t, cond=None: Prediction(look_up(table, xt), "posterior")


def teacher_forced(table, block):
    """The same network, shown for each block the clean past, the block, and masks after it."""
    turn = jnp.arange(3) // block

    def denoise(xt, t, cond):
        value = jnp.zeros((*xt.shape, 3))
        for own in range(-(-3 // block)):
            state = jnp.where(turn < own, cond["clean"], jnp.where(turn == own, xt, MASK))
            value = jnp.where((turn == own)[:, None], look_up(table, state), value)
        return Prediction(value, "posterior")

    return denoise


def gap(table, block):
    """The chain of KLs that a wrong network pays, from the rule that k of n masks weigh (k - 1)! (n - k)! / n!."""
    p, exact = np.exp(np.asarray(LAW.log_p, np.float64)), exact_table()
    model = table - np.log(np.exp(table).sum(-1, keepdims=True))
    total = 0.0
    for probability, x in zip(p, itertools.product(range(3), repeat=3), strict=True):
        for start in range(0, 3, block):
            own = range(start, min(start + block, 3))
            for k in range(1, len(own) + 1):
                weight = math.factorial(k - 1) * math.factorial(len(own) - k) / math.factorial(len(own))
                for lost in itertools.combinations(own, k):
                    state = STATES.index(
                        tuple(MASK if i in lost or i not in range(own.stop) else x[i] for i in range(3))
                    )
                    kl = [np.exp(exact[state, i]) @ (exact[state, i] - model[state, i]) for i in lost]
                    total += probability * weight * sum(kl)
    return total


@pytest.mark.parametrize("block", [1, 2, 3])
def test_the_bound_is_the_entropy_and_a_wrong_network_pays_its_kls(x64, block):
    bound = jax.jit(
        lambda table: exact_nelbo(
            LAW, teacher_forced(table, block), PROCESS, t_range=RANGE, order=16, cond=with_clean
        ).total[0]
    )
    np.testing.assert_allclose(bound(exact_table()), LAW.entropy, atol=1e-6)
    expected = gap(wrong_table(), block)
    assert expected > 0.5
    np.testing.assert_allclose(bound(wrong_table()) - LAW.entropy, expected, atol=2e-6)


@pytest.mark.slow
def test_it_is_the_bound_of_the_process_in_blocks(x64):
    """One time for all blocks and a clean past, or one block at a time and masks after it."""
    table = wrong_table()
    at_once = exact_nelbo(LAW, teacher_forced(table, 2), PROCESS, t_range=(0.0, 1.0), order=16, cond=with_clean)
    in_turn = exact_nelbo(LAW, alone(table), in_blocks(PROCESS, 3, 2), t_range=(0.0, 1.0), order=16)
    np.testing.assert_allclose(float(at_once.total[0]), float(in_turn.total[0]), atol=1e-9)
    whole = exact_nelbo(LAW, alone(table), PROCESS, t_range=(0.0, 1.0), order=16)
    assert abs(float(whole.total[0] - in_turn.total[0])) > 1e-2


@pytest.mark.slow
def test_monte_carlo_agrees():
    denoise, batch = teacher_forced(wrong_table().astype(np.float32), 2), 8_000
    x0 = LAW.sample(random.example_keys(jax.random.key(1), batch))
    draws = np.asarray(nelbo(jax.random.key(0), denoise, PROCESS, x0, {"clean": x0}, num_times=4).total)
    exact = float(exact_nelbo(LAW, denoise, PROCESS, order=16, cond=with_clean).total[0])
    assert abs(draws.mean() - exact) < 4 * draws.std() / math.sqrt(batch)
