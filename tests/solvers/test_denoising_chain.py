"""The chain "corrupt, draw from the denoiser": whole transition matrices on enumerable laws, and normal data."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import ddjax
from ddjax import grids, random
from ddjax.fixtures import Categorical
from ddjax.fixtures.categorical import all_states
from ddjax.processes import Gaussian, Kernel, Masked, Uniform, generators
from ddjax.sampling import Observed
from ddjax.schedules import Cosine, VPCosine
from ddjax.solvers import DenoisingChain, Info

ONE = Categorical(1, 5, seed=2)
TWO = Categorical(2, 3, seed=1)
PROCESSES = {
    "masked": Masked(5, Cosine()),
    "uniform": Uniform(5, Cosine()),
    "kernel": Kernel(5, generators.birth_death(5)),
}


def p_of(law):
    return np.exp(np.asarray(law.log_p))


def of_all(law, x, states):
    """Probabilities of all joint states, of a law of as many rows as x."""
    each = jax.vmap(lambda y: law.log_prob(jnp.broadcast_to(y, x.shape)).sum(-1), out_axes=1)
    return np.exp(np.maximum(np.asarray(each(jnp.asarray(states))), -700.0))


def matrix(law, process, back):
    """The transition matrix of a round over clean states: up by the marginal, down by the reverse steps."""
    clean, noisy = (all_states(law.sites, n) for n in (law.symbols, process.num_states))
    x = jnp.asarray(clean)
    total = of_all(process.marginal(x, jnp.full(len(x), back[0])), x, noisy)
    y = jnp.asarray(noisy)
    denoise = jax.jit(law.denoise(process, "posterior"))
    for t, s in itertools.pairwise(back):
        step = process.reverse(denoise(y, jnp.full(len(y), t)), y, jnp.asarray(s), jnp.asarray(t))
        total = total @ of_all(step, y, noisy)
    kept = (noisy < law.symbols).all(-1)
    np.testing.assert_allclose(total[:, ~kept], 0, atol=1e-12)  # no noise symbol is left
    return total[:, kept]


@pytest.mark.parametrize("name", [n if n == "uniform" else pytest.param(n, marks=pytest.mark.slow) for n in PROCESSES])
def test_the_law_of_one_site_is_stationary_and_approached(x64, name):
    """Stationary and reversible to 1e-12; the total variation falls as the second eigenvalue's powers."""
    p, step = p_of(ONE), matrix(ONE, PROCESSES[name], (0.4, 0.0))
    np.testing.assert_allclose(step.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(p @ step, p, atol=1e-12)
    flow = p[:, None] * step
    np.testing.assert_allclose(flow, flow.T, atol=1e-12)
    values = np.sort(np.abs(np.linalg.eigvals(step)))[::-1]
    assert values[0] == pytest.approx(1)
    assert 0.01 < values[1] < 0.99
    rounds = int(np.log(1e-9) / np.log(values[1]))
    distance = [0.5 * np.abs(np.linalg.matrix_power(step, rounds + i) - p).sum(1).max() for i in (0, 1)]
    assert distance[1] / distance[0] == pytest.approx(values[1], rel=1e-2)


@pytest.mark.slow
def test_two_sites_drawn_apart_are_off_and_more_steps_mend_it(x64):
    """The stationary law of the chain whose way back has n steps: one is biased, the error falls as 1 / n."""
    p, process, errors = p_of(TWO), Masked(3, Cosine()), []
    for steps in (1, 8, 16, 32):
        step = matrix(TWO, process, tuple(np.linspace(0.6, 0.0, steps + 1)))
        stationary = np.linalg.matrix_power(step, 4000)[0]
        errors.append(0.5 * np.abs(stationary - p).sum())
    print(errors)
    assert errors[0] > 0.02
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.25)
    assert errors[2] / errors[3] == pytest.approx(2, rel=0.25)


@pytest.mark.slow
def test_rounds_are_drawn_from_the_matrix():
    """Two rounds from all masks written at once: the share of each state, against the matrix's powers."""
    process, batch = Masked(3, Cosine()), 5000
    solver = DenoisingChain(process, (0.6, 0.25, 0.0), rounds=2)
    with jax.debug_key_reuse(False):
        out = ddjax.sample(
            jax.random.key(0), TWO.denoise(process), process, shape=(batch, 2), solver=solver, times=grids.uniform(1)
        )
    assert (np.asarray(out.nfe) == 1 + 2 * 2).all()
    p = p_of(TWO).reshape(3, 3)
    apart = (p.sum(1)[:, None] * p.sum(0)).ravel()  # what one step from all masks draws
    step = matrix(TWO, process, solver.back)
    counts = np.bincount(np.asarray(out.x0) @ np.asarray([3, 1]), minlength=9)
    for law, same in ((apart @ step @ step, True), (apart, False)):
        law = law.astype(float)
        assert (stats.chisquare(counts, batch * law / law.sum()).pvalue > 1e-3) == same


@pytest.mark.slow
def test_rows_are_their_own_and_known_sites_stay():
    process, solver = Masked(3, Cosine()), DenoisingChain(Masked(3, Cosine()), (0.6, 0.0), rounds=30)

    def draw(batch, observed=None):
        settings = {"shape": (batch, 2), "solver": solver, "times": grids.uniform(3), "observed": observed}
        return np.asarray(ddjax.sample(jax.random.key(0), TWO.denoise(process), process, **settings).x0)

    whole = draw(7)
    for few in (1, 2):
        np.testing.assert_array_equal(draw(few), whole[:few])
    batch = 4000
    known = jnp.broadcast_to(jnp.asarray([True, False]), (batch, 2))
    with jax.debug_key_reuse(False):
        x = draw(batch, Observed(known, jnp.full((batch, 2), 2)))
    assert (x[:, 0] == 2).all()
    row = p_of(TWO).astype(float).reshape(3, 3)[2]
    assert stats.chisquare(np.bincount(x[:, 1], minlength=3), batch * row / row.sum()).pvalue > 1e-3


MEAN, COVARIANCE = np.array([0.5, -0.3]), np.array([[1.2, 0.5], [0.5, 0.6]])


@dataclasses.dataclass(frozen=True)
class Posterior:
    """Draws x_0 given x_t of normal data, whatever the step: an exact way back."""

    process: Gaussian

    def init(self, xt, cond=None):
        return ()

    def step(self, keys, carry, xt, t, s, denoise, cond=None):
        alpha, sigma = self.process.schedule.alpha(t), self.process.schedule.sigma(t)
        c = jnp.asarray(COVARIANCE)
        gain = alpha * c @ jnp.linalg.inv(alpha**2 * c + sigma**2 * jnp.eye(2))
        root = jnp.linalg.cholesky(c - alpha * gain @ c)
        x0 = MEAN + (xt - alpha * MEAN) @ gain.T + random.normal(keys, (2,), xt.dtype) @ root.T
        return x0, carry, Info(jnp.ones(len(xt), jnp.int32))


@pytest.mark.slow
def test_normal_data(x64):
    """With an exact way back: x -> A x + noise, with A known, whose stationary covariance is the data's."""
    process, many = Gaussian(VPCosine(0.0)), 40_000
    solver = DenoisingChain(process, (0.5, 0.0), rounds=1, make=Posterior)
    keys = lambda n: random.example_keys(jax.random.key(0), n)
    go = jax.jit(functools.partial(solver.round, denoise=None))
    one_key = jax.vmap(lambda _: jax.random.key(3))(jnp.arange(3))
    at = np.asarray(go(one_key, jnp.asarray([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))[0])
    a = (at[1:] - at[0]).T
    alpha, sigma = np.cos(np.pi / 4), np.sin(np.pi / 4)
    gain = alpha * COVARIANCE @ np.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * np.eye(2))
    np.testing.assert_allclose(a, alpha * gain, atol=1e-12)
    noise = sigma**2 * gain @ gain.T + COVARIANCE - alpha * gain @ COVARIANCE
    np.testing.assert_allclose(a @ COVARIANCE @ a.T + noise, COVARIANCE, atol=1e-12)  # Lyapunov's equation
    with jax.debug_key_reuse(False):
        drawn = np.asarray(go(keys(many), jnp.zeros((many, 2)))[0])
    np.testing.assert_allclose(np.cov(drawn.T), noise, atol=5 * np.sqrt(2 / many))
    np.testing.assert_allclose(drawn.mean(0), MEAN - a @ MEAN, atol=5 / np.sqrt(many))


def test_bad_arguments():
    for options, match in (({"back": (0.5, 0.1)}, "ends at the data"), ({"rounds": 0}, "rounds must be at least 1")):
        with pytest.raises(ValueError, match=match):
            DenoisingChain(Masked(3), **options)
    with pytest.raises(ValueError, match="decreas"):
        DenoisingChain(Masked(3), (0.2, 0.5, 0.0))
    assert DenoisingChain(Masked(3), [0.5, 0]) == DenoisingChain(Masked(3))
