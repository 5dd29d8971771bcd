"""Rates of the process reversed in time, against the reversal of the true joint process by brute force."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_definition import fixed, linear
from jumps import LAW, forward_table, generator, law_at, reverse_table
from pairs import CONTINUOUS

from ddjax.fixtures.categorical import all_states
from ddjax.predictions import Prediction
from ddjax.processes import Chain, Hybrid, Kernel, Masked, Uniform, chain, generators
from ddjax.schedules import Cosine

PAIRS = [p for p in CONTINUOUS if p.bound == "NELBO" and not p.name.startswith("Staggered")]
FIRST = list({p.name: p for p in reversed(PAIRS)}.values())[::-1]  # one of each process, then the others


@functools.partial(jax.jit, static_argnums=(0, 1))
def tables(process, kind, t):
    x = jnp.asarray(all_states(2, process.num_states))
    prediction = LAW.denoise(process, "posterior" if kind == "deaths" else kind)(x, jnp.full(len(x), t))
    prediction = process.convert(prediction, kind, x, t)
    forward = process.forward_rates(x, t) if hasattr(process, "forward_rates") else jnp.zeros(())
    return process.reverse_rates(prediction, x, t), forward


@pytest.mark.parametrize("pair", [*FIRST, *(p for p in PAIRS if p not in FIRST)], ids=str)
def test_reverse_rates_are_the_time_reversal(x64, pair):
    process, forward = pair.make(3), pair.forward(3, 0)
    x = all_states(2, process.num_states)
    others = np.arange(process.num_states) != x[..., None]
    for t in (0.2, 0.7):
        ours, noising = (np.asarray(v) for v in tables(process, pair.kind, t))
        possible = law_at(forward, t) > 0
        expected = np.where(others, reverse_table(forward, t), 0.0)
        np.testing.assert_allclose(ours[possible], expected[possible], rtol=1e-8, atol=1e-10)
        assert (ours[~others] == 0).all()
        # Backwards, the law at t changes as it does forwards, but for the sign.
        change = law_at(forward, t) @ generator(forward_table(forward, t))
        np.testing.assert_allclose(law_at(forward, t) @ generator(ours), -change, atol=1e-10)
        if noising.ndim:
            expected = np.where(others, forward_table(forward, t), 0.0)
            np.testing.assert_allclose(np.where(others, noising, 0.0), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_a_mislabelled_prediction_gives_wrong_rates(x64):
    x, t = jnp.asarray(all_states(2, 3)), 0.6
    posterior = LAW.denoise(Uniform(3))(x, jnp.full(9, t)).value
    wrong = np.asarray(Uniform(3).reverse_rates(Prediction(posterior, "cavity"), x, t))
    forward = fixed(linear, np.full(3, 1 / 3))
    change = law_at(forward, t) @ generator(forward_table(forward, t))
    assert np.abs(law_at(forward, t) @ generator(wrong) + change).max() > 0.01


BAND = Kernel(3, generators.birth_death(3), Cosine(), absorb=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("process", [Masked(3), Uniform(3, Cosine()), Hybrid(3), BAND], ids=repr)
def test_both_ends_in_float32(process):
    """Forward rates are infinite at t = 1; the reverse ones that lead somewhere are not, or are so large as to mix."""
    x = jnp.asarray(all_states(2, process.num_states))
    for t in (1.0, 0.9999999, 1e-6):
        rates = np.asarray(tables(process, "cavity", jnp.float32(t))[0])
        assert np.isfinite(rates).all()
        assert (rates >= 0).all()
    if isinstance(process, Masked):  # -alpha' / (1 - alpha) cavity, the same down to the last time
        rates = np.asarray(tables(process, "posterior", jnp.float32(1.0))[0])
        masks = np.asarray((x == 3).all(-1))
        p = np.exp(np.asarray(LAW.log_p)).reshape(3, 3)
        np.testing.assert_allclose(rates[masks][0, :, :3], [p.sum(1), p.sum(0)], rtol=1e-5)


def test_a_chain_has_no_rates():
    process = chain.uniform(3, 4)
    assert isinstance(process, Chain)
    x = jnp.zeros((1, 2), int)
    with pytest.raises(ValueError, match="no continuous time"):
        process.reverse_rates(Prediction(jnp.zeros((1, 2, 3)), "cavity"), x, 0.5)
