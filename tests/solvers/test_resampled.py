"""Functions given some of their values: under a Gaussian process's own denoiser every law is known."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddjax
from ddjax import random
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian, Product, Uniform
from ddjax.sampling import Observed
from ddjax.schedules import VPCosine
from ddjax.solvers import Ancestral, Churned, DenoisingChain, Nested, Parts, Resampled, StepsDown, Switched
from ddjax.solvers.base import told

PROCESS = Gaussian(VPCosine())
POINTS = np.linspace(-1.0, 1.0, 6)
KERNEL = np.exp(-0.5 * ((POINTS[:, None] - POINTS) / 0.5) ** 2) + 1e-2 * np.eye(6)
KNOWN = np.array([True, False, False, True, False, False])
VALUES = np.array([0.9, 0, 0, -1.1, 0, 0])


@functools.cache
def coefficients(t):
    return tuple(float(f(jnp.asarray(t))) for f in (PROCESS.schedule.alpha, PROCESS.schedule.sigma))


def denoise(xt, t, cond=None):
    """E[x0 | xt] of the Gaussian process: linear."""
    alpha, sigma = PROCESS.schedule.alpha(t)[:, None, None], PROCESS.schedule.sigma(t)[:, None, None]
    kernel = jnp.asarray(KERNEL, xt.dtype)
    x0 = alpha * kernel @ jnp.linalg.solve(alpha**2 * kernel + sigma**2 * jnp.eye(6), xt[..., None])
    return Prediction(x0[..., 0], "x0")


def law_of_samples(times, rounds):
    """Mean and covariance of what RePaint draws: every move is affine with Gaussian noise. Written out, in NumPy."""
    mean, cov, eye = np.zeros(6), np.eye(6), np.eye(6)
    free = np.diag((~KNOWN).astype(float))

    def move(law, matrix, offset, noise):
        mean, cov = law
        return matrix @ mean + offset, matrix @ cov @ matrix.T + noise

    def show(law, alpha, sigma):
        return move(law, free, alpha * VALUES * KNOWN, sigma**2 * np.diag(KNOWN.astype(float)))

    law = show((mean, cov), *coefficients(times[0]))
    for t, s in itertools.pairwise(times):
        (a_t, s_t), (a_s, s_s) = coefficients(t), coefficients(s)
        back = a_t * KERNEL @ np.linalg.inv(a_t**2 * KERNEL + s_t**2 * eye)
        # q(x_s | x_t, x_0) of x_s = a_s x_0 + s_s noise, x_t = (a_t / a_s) x_s + sqrt(v) noise, by Bayes' rule.
        ratio = a_t / a_s
        v = s_t**2 - ratio**2 * s_s**2
        var = 0.0 if s_s == 0 else 1 / (1 / s_s**2 + ratio**2 / v)
        on_t, on_0 = (0.0, a_s) if s_s == 0 else (var * ratio / v, var * a_s / s_s**2)
        for k in range(rounds):
            law = move(law, on_t * eye + on_0 * back, 0.0, var * eye)
            law = show(law, a_s, 0.0 if s == times[-1] and k == rounds - 1 else s_s)
            if k < rounds - 1:
                law = move(law, ratio * eye, 0.0, v * eye)
    return law


def exact():
    """The Gaussian process given its values."""
    known, other = np.flatnonzero(KNOWN), np.flatnonzero(~KNOWN)
    gain = KERNEL[np.ix_(other, known)] @ np.linalg.inv(KERNEL[np.ix_(known, known)])
    return gain @ VALUES[known], KERNEL[np.ix_(other, other)] - gain @ KERNEL[np.ix_(known, other)]


def shown(n):
    return Observed(jnp.tile(KNOWN, (n, 1)), jnp.tile(jnp.asarray(VALUES, jnp.float32), (n, 1)))


def draw(solver, times, n):
    return ddjax.sample(
        jax.random.key(0), denoise, PROCESS, shape=(n, 6), solver=solver, times=times, observed=shown(n)
    )


@pytest.mark.parametrize("rounds", [1, 3])
def test_samples_are_of_the_law_in_closed_form(rounds):
    n, times = 20_000, np.linspace(1.0, 0.0, 6)
    drawn = draw(Resampled(Ancestral(PROCESS), rounds), times, n)
    mean, cov = law_of_samples(times, rounds)
    x = np.asarray(drawn.x0, np.float64)
    np.testing.assert_array_equal(drawn.nfe, 5 * rounds)
    np.testing.assert_array_equal(x[:, KNOWN], np.tile(VALUES[KNOWN].astype(np.float32), (n, 1)))
    np.testing.assert_allclose(x.mean(0), mean, atol=4.5 * np.sqrt(cov.diagonal().max() / n))
    scale = np.sqrt(np.outer(cov.diagonal(), cov.diagonal()) + cov**2)
    np.testing.assert_array_less(np.abs(np.cov(x.T) - cov), 4.5 * scale / np.sqrt(n) + 1e-6)


def test_more_rounds_come_nearer_to_the_conditional_law():
    """Of the laws in closed form: means by rounds; spreads by steps, whose errors add up over rounds."""
    mean, cov = exact()

    def errors(steps, rounds):
        found, spread = law_of_samples(np.linspace(1.0, 0.0, steps + 1), rounds)
        off = np.sqrt(spread.diagonal()[~KNOWN]) - np.sqrt(cov.diagonal())
        return np.abs(found[~KNOWN] - mean).max(), np.abs(off).max()

    alone, few, many = (errors(32, rounds) for rounds in (1, 5, 25))
    assert alone[0] > 0.25  # without resampling wrong however many steps
    assert errors(128, 1)[0] > 0.25
    assert few[0] < alone[0] / 2
    assert many[0] < few[0] / 3
    assert errors(128, 25)[1] < many[1] / 2


def test_without_known_sites_and_with_one_round_it_is_the_solver():
    times = np.linspace(1.0, 0.0, 5)
    run = functools.partial(ddjax.sample, jax.random.key(1), denoise, PROCESS, shape=(500, 6), times=times)
    many = np.asarray(run(solver=Resampled(Ancestral(PROCESS), 2)).x0)
    plain = np.asarray(run(solver=Ancestral(PROCESS)).x0)
    assert abs(many.std() - plain.std()) < 0.1
    seen = draw(Resampled(Ancestral(PROCESS), 1), times, 4)
    assert seen.nfe.tolist() == [4] * 4


def resampled(process):
    return Resampled(Ancestral(process), 3)


AROUND = {  # solvers that are the one inside, here
    "switched": lambda s: Switched((s, s), (0.5,)),
    "steps down": lambda s: StepsDown(s, eta=0.0),
    "churned": lambda s: Churned(Switched((s,), ()), gamma=0.0),
}


@pytest.mark.parametrize(
    "name", ["switched", *(pytest.param(n, marks=pytest.mark.slow) for n in AROUND if n != "switched")]
)
def test_it_hears_what_is_known_inside_other_solvers(name):
    """It draws what it draws by itself."""
    times, solver = np.linspace(1.0, 0.0, 4), resampled(PROCESS)
    alone, inside = draw(solver, times, 8), draw(AROUND[name](solver), times, 8)
    np.testing.assert_allclose(inside.x0, alone.x0, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(inside.nfe, alone.nfe)


def test_inner_chains_end_at_the_known_values_and_made_solvers_and_parts_hear():
    n, keys = 4, random.example_keys(jax.random.key(3), jnp.arange(4))
    observed, xt = shown(n), jax.random.normal(jax.random.key(4), (n, 6))
    nested = told(Nested(resampled(Gaussian(VPCosine(s=0.0))), 2), observed)  # without noise at t = 0
    _, carry, info = jax.jit(lambda x: nested.step(keys, nested.init(x), x, 1.0, 0.5, denoise))(xt)
    np.testing.assert_allclose(np.asarray(carry.x0)[:, KNOWN], np.asarray(observed.value)[:, KNOWN], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(info.nfe, 6)
    assert told(DenoisingChain(PROCESS, make=resampled), observed).make(PROCESS).observed is observed
    product = Product({"a": PROCESS, "b": PROCESS})
    both = Observed({"a": observed.mask, "b": ~observed.mask}, {"a": observed.value, "b": observed.value})
    heard = dict(told(Parts(product, {"b": Resampled(Ancestral(PROCESS), 1)}), both).solvers)["b"].observed
    np.testing.assert_array_equal(heard.mask, ~observed.mask)
    one_round = told(Parts(product, {"b": Resampled(Ancestral(PROCESS), 1)}), both)
    state = {"a": xt, "b": xt}

    def predict(x, t, cond=None):
        return Prediction({name: denoise(part, t).value for name, part in x.items()}, "x0")

    xs, _, _ = one_round.step(keys, one_round.init(state), state, 1.0, 0.0, predict)
    near = 4 * float(PROCESS.schedule.sigma(jnp.zeros(())))  # known values are shown with the noise of t = 0
    np.testing.assert_allclose(xs["b"][:, ~KNOWN], np.asarray(observed.value)[:, ~KNOWN], rtol=0, atol=near)
    plain = Switched((Ancestral(PROCESS),), ())
    assert told(plain, observed) is plain


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"the kernel of processes\.Gaussian"):
        Resampled(Ancestral(Uniform(3)))
    with pytest.raises(ValueError, match="rounds=0"):
        Resampled(Ancestral(PROCESS), 0)
