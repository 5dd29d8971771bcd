"""The bound of a chain on a grid, and bounds on part of the sites."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax import grids, random
from ddjax.fixtures import Categorical, exact_nelbo
from ddjax.likelihood import nelbo
from ddjax.objectives import any_order, elbo
from ddjax.predictions import Prediction
from ddjax.processes import Hybrid, Marginal, Masked, Uniform
from ddjax.schedules import Cosine
from ddjax.types import Rows

PROCESSES = [Masked(3, Cosine()), Uniform(3), Hybrid(3), Marginal(3, probabilities=[0.6, 0.3, 0.1])]
every_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)


def wrong(process):
    """A denoiser that is nobody's, smooth in t."""
    table = jnp.asarray(np.random.default_rng(3).normal(size=(process.num_states, process.num_symbols)))
    return lambda xt, t, cond: Prediction(table[xt] * (1 + t)[:, None, None], "cavity")


@pytest.mark.slow
@every_process
def test_one_site_costs_its_entropy_on_any_grid(x64, process):
    """With one site the reverse step is exact however long it is."""
    law = Categorical(1, 3)
    for times in (grids.uniform(1), grids.uniform(2), jnp.asarray([1.0, 0.9, 0.3, 0.0])):
        bound = exact_nelbo(law, law.denoise(process, "cavity"), process, times=times)
        np.testing.assert_allclose(float(bound.total[0]), law.entropy, atol=1e-9)


@pytest.mark.slow
@every_process
def test_a_chain_tends_to_the_entropy_at_first_order(x64, process):
    """Sites move independently within a step: what that costs falls as 1 / steps."""
    law = Categorical(2, 3)
    denoise = law.denoise(process, "posterior")
    # Short steps at both ends, where the hybrid process changes like a square root of the clock.
    chains = [grids.cosine(n) ** 2 for n in (32, 64)]
    gaps = [float(exact_nelbo(law, denoise, process, times=times).total[0]) - law.entropy for times in chains]
    assert gaps[0] > gaps[1] > 1e-6
    assert gaps[0] / gaps[1] == pytest.approx(2.0, abs=0.15)


def test_one_step_costs_the_total_correlation(x64):
    """All sites at once from pure noise: the sum of the marginal entropies."""
    law, process = Categorical(2, 3), Masked(3)
    p = np.exp(np.asarray(law.log_p)).reshape(3, 3)
    entropies = sum(-np.sum(m * np.log(m)) for m in (p.sum(0), p.sum(1)))
    bound = exact_nelbo(law, law.denoise(process), process, times=grids.uniform(1))
    np.testing.assert_allclose(float(bound.total[0]), entropies, atol=1e-9)


@every_process
def test_step_kl_is_brute_force(x64, process):
    x0, xt = (jnp.asarray(v.reshape(-1, 1)) for v in np.meshgrid(range(3), range(process.num_states), indexing="ij"))
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(len(x0), 1, 3)))
    s, t, prediction = jnp.full(len(x0), 0.35), jnp.full(len(x0), 0.6), Prediction(logits, "cavity")
    table = lambda law: np.stack(
        [np.asarray(law.log_prob(jnp.full_like(xt, y)))[:, 0] for y in range(process.num_states)], -1
    )
    possible = np.asarray(process.marginal(x0, t).log_prob(xt))[:, 0] > -1e20
    p, q = (table(law)[possible] for law in (process.bridge(x0, xt, s, t), process.reverse(prediction, xt, s, t)))
    expected = np.sum(np.where(p > -1e20, np.exp(p) * (p - q), 0.0), -1)
    ours = np.asarray(process.step_kl(x0, prediction, xt, s, t))[possible, 0]
    assert ours.max() > 1e-2
    np.testing.assert_allclose(ours, expected, atol=1e-10)


@pytest.mark.slow
@every_process
def test_monte_carlo_and_the_objective_agree_with_the_exact_chain(process):
    law, times, batch = Categorical(2, 3), grids.uniform(5), 20_000
    denoise = wrong(process)
    exact = exact_nelbo(law, denoise, process, times=times)
    x0 = law.sample(random.example_keys(jax.random.key(1), batch))
    draws = np.asarray(nelbo(jax.random.key(0), denoise, process, x0, times=times, num_times=2).total)
    assert abs(draws.mean() - float(exact.total[0])) < 4 * draws.std() / math.sqrt(batch)
    apply = lambda params, xt, t, cond, **_: denoise(xt, t, cond).value
    loss = float(elbo(process, "cavity", times=times)(jax.random.key(2), apply, {}, x0)[0])
    assert loss == pytest.approx(float(exact.diffusion[0]) / 2, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("make", [elbo, any_order])
def test_sites_of_weight_zero_are_shown_clean_and_cost_nothing(make):
    process, x0 = Masked(3), Categorical(4, 3).sample(random.example_keys(jax.random.key(0), 64))
    weights = jnp.broadcast_to(jnp.asarray([1.0, 1.0, 0.0, 1.0]), x0.shape)
    seen = []

    def apply(params, xt, t, cond, **_):
        seen.append(xt)
        return params[xt]

    params = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    objective = make(process, "posterior")
    loss, _ = objective(jax.random.key(3), apply, params, x0, weights=weights)
    np.testing.assert_array_equal(seen[0][:, 2], x0[:, 2])
    assert (seen[0][:, 0] == process.mask).any()
    elsewhere = x0.at[:, 2].set((x0[:, 2] + 1) % 3)  # what the padding holds does not matter
    again, _ = objective(jax.random.key(3), apply, params, elsewhere, weights=weights)
    assert float(loss) == float(again) > 0
    # Doubling every weight changes nothing; weights of whole examples are the same as one per site.
    assert float(objective(jax.random.key(3), apply, params, x0, weights=2 * weights)[0]) == pytest.approx(float(loss))
    whole = jnp.asarray(np.random.default_rng(1).uniform(0.5, 2.0, 64), jnp.float32)
    sites = jnp.broadcast_to(whole[:, None], x0.shape)
    one, other = (objective(jax.random.key(3), apply, params, x0, weights=w)[0] for w in (whole, sites))
    np.testing.assert_allclose(one, other, rtol=1e-5)
    with pytest.raises(ValueError, match=r"give one per example, \(64,\), or one per site, \(64, 4\)"):
        objective(jax.random.key(3), apply, params, x0, weights=weights[:, :2])


def test_grids_are_checked():
    law, process = Categorical(1, 3), Masked(3)
    x0 = jnp.zeros((2, 1), jnp.int32)
    for bad in ([0.0, 1.0], [1.0], [1.0, 1.0, 0.0], [1.2, 0.0], [[1.0, 0.0]]):
        with pytest.raises(ValueError, match="times must"):
            nelbo(jax.random.key(0), law.denoise(process), process, x0, times=jnp.asarray(bad))
        with pytest.raises(ValueError, match="times must"):
            elbo(process, "posterior", times=bad)
    with pytest.raises(ValueError, match="not both"):
        nelbo(jax.random.key(0), law.denoise(process), process, x0, times=grids.uniform(2), t_range=(0.1, 1.0))
    with pytest.raises(ValueError, match="not both"):
        elbo(process, "posterior", times=grids.uniform(2), t_range=(0.1, 1.0))
    rows = Rows(jnp.arange(2), 2)
    assert nelbo(jax.random.key(0), law.denoise(process), process, x0, times=[1.0, 0.5, 0.0], rows=rows).t_range == (
        0,
        1,
    )


def test_a_short_step_is_precise_in_float32():
    """One of 10,000: nearly all that it costs is a coin that nearly always says "has not moved"."""
    process, rng = Uniform(3), np.random.default_rng(0)
    x0, xt = (rng.integers(0, 3, (200, 1)) for _ in range(2))
    logits = rng.normal(size=(200, 1, 3)).astype(np.float32)
    t = rng.uniform(0.2, 0.9, 200).astype(np.float32)

    @jax.jit
    def cost(x0, xt, logits, t):
        return process.step_kl(x0, Prediction(logits, "cavity"), xt, t - 2.0**-13, t)

    single = np.asarray(cost(x0, xt, logits, t), np.float64)
    with jax.enable_x64(True):
        double = np.asarray(cost(x0, xt, logits.astype(np.float64), t.astype(np.float64)))
    np.testing.assert_allclose(single, double, rtol=2e-4)
