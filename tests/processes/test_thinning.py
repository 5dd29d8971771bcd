"""Thinning of counts against brute force: matrix exponentials of the death generator, Bayes' rule, enumeration."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import expm
from scipy.special import gammaln, xlogy

import ddjax
from ddjax import random
from ddjax.fixtures import Categorical, exact_nelbo
from ddjax.fixtures.categorical import all_states
from ddjax.objectives import elbo
from ddjax.predictions import Prediction
from ddjax.processes import Thinning
from ddjax.processes.thinning import log_binomial
from ddjax.schedules import CondOT, Cosine, Linear, LogLinear, Polynomial
from ddjax.solvers import Ancestral


def first_fast(schedules):
    """A parametrisation whose first schedule is in the fast set; the formulas see schedules through alpha alone."""
    slow = (pytest.param(schedule, marks=pytest.mark.slow) for schedule in schedules[1:])
    return pytest.mark.parametrize("schedule", [schedules[0], *slow], ids=repr)


every_schedule = first_fast([Cosine(), Linear(), Polynomial(2.0), LogLinear(1e-2)])
K = 4
LAW = Categorical(2, 3)


def kernel(schedule, s, t, counts=K):
    """Q_{t|s}, rows x_s: the exponential of the death generator over a clock in which each dies at rate 1."""
    generator = np.diag(np.arange(1.0, counts), -1) - np.diag(np.arange(float(counts)))
    alpha_s, alpha_t = (float(schedule.alpha(jnp.asarray(v, float))) for v in (s, t))
    # The generator is triangular; of what SciPy leaves above the diagonal some versions' rounding is not 0.
    return np.tril(expm(math.log(alpha_s / alpha_t) * generator))


def pairs(counts=K):
    """Every clean count with every count that it may have left, as two batches of one site."""
    x0, y = np.meshgrid(range(counts), range(counts), indexing="ij")
    return (jnp.asarray(v[y <= x0].reshape(-1, 1), jnp.int32) for v in (x0, y))


@functools.partial(jax.jit, static_argnums=(0, 1))
def probabilities(process, name, like, *arguments):
    """The probabilities of every state, `(batch, *sites, states)`, from log_prob alone."""
    distribution = getattr(process, name)(*arguments)
    log_p = jax.vmap(lambda y: distribution.log_prob(jnp.full_like(like, y)), out_axes=-1)
    return jnp.exp(log_p(jnp.arange(process.num_states)))


def table(process, name, like, *arguments):
    return np.asarray(probabilities(process, name, like, *arguments))


predict = jax.jit(lambda law, process, kind, xt, t: law.denoise(process, kind)(xt, t), static_argnums=(0, 1, 2))
path_kl = jax.jit(lambda process, *arguments: process.path_kl(*arguments), static_argnums=0)
step_kl = jax.jit(lambda process, *arguments: process.step_kl(*arguments), static_argnums=0)


def random_logits(shape, seed=0, scale=2.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape))


def posterior_of_configurations(law, schedule, xt, t):
    """p(x_0 | x_t) for each noisy state, `(batch, configurations)`, from matrix exponentials."""
    q = kernel(schedule, 0.0, t, law.symbols)
    weights = np.exp(np.asarray(law.log_p)) * q[np.asarray(law.configurations)[None], xt[:, None]].prod(-1)
    return weights / weights.sum(1, keepdims=True)


@every_schedule
def test_marginal_is_the_exponential_of_the_generator(x64, schedule):
    process, x0 = Thinning(K, schedule), jnp.arange(K)[:, None]
    for t in (0.03, 0.4, 0.99):
        q = table(process, "marginal", x0, x0, jnp.full(K, t))[:, 0]
        np.testing.assert_allclose(q, kernel(schedule, 0.0, t), atol=1e-10)
    np.testing.assert_allclose(table(process, "marginal", x0, x0, jnp.zeros(K))[:, 0], np.eye(K), atol=1e-15)
    if float(schedule.alpha(jnp.asarray(1.0))) == 0:
        last = table(process, "marginal", x0, x0, jnp.ones(K))[:, 0]
        np.testing.assert_allclose(last, np.eye(K)[[0] * K], atol=1e-15)


@every_schedule
def test_bridge_is_bayes_rule(x64, schedule):
    process, (x0, xt) = Thinning(K, schedule), pairs()
    for s, t in ((0.2, 0.6), (0.0, 0.5), (0.97, 0.98)):
        q_s, q_ts = kernel(schedule, 0.0, s), kernel(schedule, s, t)
        a, b = np.asarray(x0)[:, 0], np.asarray(xt)[:, 0]
        expected = q_s[a] * q_ts[:, b].T / (q_s @ q_ts)[a, b][:, None]
        bridge = table(process, "bridge", xt, x0, xt, jnp.full(len(x0), s), jnp.full(len(x0), t))
        np.testing.assert_allclose(bridge[:, 0], expected, atol=1e-10)


@pytest.mark.parametrize("kind", ["posterior", "cavity"])
def test_reverse_is_exact_with_a_law(x64, kind):
    """p(x_s^i | x_t) summed over clean configurations, with Bayes' rule on matrix exponentials."""
    schedule = Cosine()
    process, xt = Thinning(3, schedule), all_states(2, 3)
    s, t = 0.37, 0.6
    q_s, q_ts = kernel(schedule, 0.0, s, 3), kernel(schedule, s, t, 3)
    bridge = q_s[:, None, :] * q_ts.T[None] / np.maximum((q_s @ q_ts)[:, :, None], 1e-300)  # x0, xt, xs
    weights = posterior_of_configurations(LAW, schedule, xt, t)
    expected = np.einsum("bc,bciy->biy", weights, bridge[np.asarray(LAW.configurations)[None], xt[:, None]])
    xt, s, t = jnp.asarray(xt), jnp.full(9, s), jnp.full(9, t)
    reverse = table(process, "reverse", xt, predict(LAW, process, kind, xt, t), xt, s, t)
    np.testing.assert_allclose(reverse, expected, atol=1e-10)
    np.testing.assert_allclose(reverse.sum(-1), 1.0, atol=1e-12)


def test_reverse_from_a_number_of_deaths(x64):
    """Its mean is exact at any step, its rate right as the step shrinks, and with whole numbers it is the bridge."""
    process, t = Thinning(6), 0.5
    xt = jnp.asarray([[0], [0], [1], [3], [4], [0]])
    y = jnp.asarray([[0.3], [2.7], [4.0], [1e-3], [9.0], [-1.0]])  # the last two beyond what can be
    within = np.clip(y, 0, 5 - np.asarray(xt))
    for s in (0.0, 0.2, t - 1e-7):
        p = table(process, "reverse", xt, Prediction(y, "deaths"), xt, jnp.full(6, s), jnp.full(6, t))
        np.testing.assert_allclose(p.sum(-1), 1.0, atol=1e-12)
        np.testing.assert_allclose(p @ np.arange(6), np.asarray(xt) + (t - s) / t * within, atol=1e-12)
    births = np.take_along_axis(p[:, 0], np.asarray(xt) + 1, axis=1)  # the rate of a first birth is h y, h = 1 / t
    np.testing.assert_allclose(births / 1e-7, within / t, rtol=1e-5)
    s, t = jnp.full(6, 0.2), jnp.full(6, t)
    whole = jnp.asarray([[3], [0], [4], [2], [1], [5]])
    p = table(process, "reverse", xt, Prediction(whole.astype(float), "deaths"), xt, s, t)
    np.testing.assert_allclose(p, table(process, "bridge", xt, xt + whole, xt, s, t), atol=1e-12)


@pytest.mark.slow
def test_conversions_are_bayes_rule(x64):
    schedule, t = Polynomial(2.0), 0.45
    process, states = Thinning(3, schedule), all_states(2, 3)
    weights = posterior_of_configurations(LAW, schedule, states, t)
    configurations = np.asarray(LAW.configurations)
    posterior = np.stack([weights @ (configurations == k) for k in range(3)], axis=-1)
    deaths = np.einsum("bc,bci->bi", weights, configurations[None] - states[:, None])
    xt, t = jnp.asarray(states), jnp.full(9, t)
    exact = {kind: predict(LAW, process, kind, xt, t) for kind in process.kinds}
    convert = jax.jit(process.convert, static_argnums=1)
    law_of = lambda kind, start: np.exp(convert(exact[start], kind, xt, t).value)
    for start in ("posterior", "cavity"):
        np.testing.assert_allclose(law_of("posterior", start), posterior, atol=1e-10)
        np.testing.assert_allclose(convert(exact[start], "deaths", xt, t).value, deaths, atol=1e-10)
    np.testing.assert_allclose(exact["deaths"].value, deaths, atol=1e-10)
    # A cavity is known up to its mass at counts below the one shown.
    known = np.where(np.arange(3) >= states[..., None], np.exp(exact["cavity"].value), 0.0)
    np.testing.assert_allclose(law_of("cavity", "posterior"), known / known.sum(-1, keepdims=True), atol=1e-10)
    # No posterior lies below, whatever the network said, nor anywhere else where nobody has died.
    anything = Prediction(random_logits((9, 2, 3)), "posterior")
    below = np.arange(3) < states[..., None]
    assert np.exp(convert(anything, "posterior", xt, t).value)[below].max() == 0
    at_0 = convert(Prediction(anything.value, "cavity"), "posterior", xt, jnp.zeros(9)).value
    np.testing.assert_array_equal(jnp.exp(at_0), jax.nn.one_hot(xt, 3))
    for kind in ("posterior", "cavity"):
        with pytest.raises(ValueError, match=f"there is no {kind} in it"):
            convert(exact["deaths"], kind, xt, t)


@pytest.mark.slow
@every_schedule
def test_path_kl_is_the_limit_of_the_step_kl(x64, schedule):
    """(1 / dt) KL(bridge || reverse) as dt -> 0, extrapolated, for a wrong denoiser; and `step_kl` is that KL."""
    process, (x0, xt), t = Thinning(K, schedule), pairs(), 0.6
    prediction, at = Prediction(random_logits((len(x0), 1, K)), "cavity"), jnp.full(len(x0), t)

    def step(s):
        s = jnp.full(len(x0), s)
        p = table(process, "bridge", xt, x0, xt, s, at)
        q = table(process, "reverse", xt, prediction, xt, s, at)
        kl = np.sum(xlogy(p, np.where(p > 0, p / np.where(q > 0, q, 1), 1)), -1)
        np.testing.assert_allclose(step_kl(process, x0, prediction, xt, s, at), kl, atol=1e-12)
        return kl

    limit = 2 * step(t - 5e-5) / 5e-5 - step(t - 1e-4) / 1e-4
    ours = path_kl(process, x0, prediction, xt, at)
    assert ours.max() > 0.1
    np.testing.assert_allclose(ours, limit, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(step(0.0), process.reconstruction(x0, prediction, xt, at), atol=1e-12)
    right = Prediction((x0 - xt).astype(float), "deaths")
    np.testing.assert_allclose(path_kl(process, x0, right, xt, at), 0.0, atol=1e-15)


def test_the_poisson_decoder_is_tight_to_second_order(x64):
    """With deaths the diffusion term is that of the posterior; the decoder's excess is c sigma^2, c in closed form.

    Of one site, where the posterior's decoder is exact. With P(1 dead | k) = a sigma and P(2 dead | k) = b sigma^2,
    the KL from the Poisson law of the same mean is a^2 / 2 (1 - r + r log r) sigma^2, r = 2 b / a^2.
    """
    law, process = Categorical(1, 4, concentration=5.0), Thinning(4)
    low = 1e-5
    number, full = (
        exact_nelbo(law, law.denoise(process, kind), process, t_range=(low, 1.0), order=24)
        for kind in ("deaths", "posterior")
    )
    np.testing.assert_allclose(number.diffusion, full.diffusion, atol=1e-12)
    np.testing.assert_allclose(float(full.total[0]), law.entropy, atol=1e-12)
    p = np.append(np.exp(np.asarray(law.log_p)), [0.0, 0.0])
    k, now, one, two = np.arange(3), p[:3], p[1:4], p[2:5]
    a, b = (k + 1) * one / now, (k + 1) * (k + 2) / 2 * two / now
    r = 2 * b / a**2
    coefficient = np.sum(now * a**2 / 2 * (1 - r + xlogy(r, r)))
    np.testing.assert_allclose((float(number.total[0]) - law.entropy) / low**2, coefficient, rtol=1e-3)


@dataclasses.dataclass(frozen=True)
class CodeWeight(Thinning):
    """Blackout's code weighs by the chance of dying in a step, -alpha' dt, and not by -alpha' dt / (1 - alpha)."""

    def path_kl(self, x0, prediction, xt, t):
        return self.schedule.sigma(t)[:, None] * super().path_kl(x0, prediction, xt, t)


def test_the_weight_of_the_published_code_is_no_bound(x64):
    process = CodeWeight(3)
    bound = exact_nelbo(LAW, LAW.denoise(process, "deaths"), process, t_range=(1e-6, 1.0), order=24)
    assert 0 < float(bound.total[0]) < 0.7 * LAW.entropy


def wrong(symbols):
    """A denoiser that is nobody's, smooth in t."""
    table = jnp.asarray(np.random.default_rng(3).normal(size=(symbols, symbols)))
    return lambda xt, t, cond=None: Prediction(table[xt] * (1 + t)[:, None, None], "posterior")


def test_a_chain_of_one_site_is_exact(x64):
    """Its bound is the entropy and its samples have the law, however coarse the grid."""
    law, process, grid = Categorical(1, 4), Thinning(4), np.array([1.0, 0.7, 0.2, 0.0])
    bound = exact_nelbo(law, law.denoise(process), process, times=grid)
    np.testing.assert_allclose(float(bound.total[0]), law.entropy, atol=1e-10)
    np.testing.assert_allclose(propagate(law, process, "posterior", grid), np.exp(np.asarray(law.log_p)), atol=1e-10)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def transition(law, process, kind, t, s):
    """The matrix of one ancestral step between all states."""
    states = jnp.asarray(all_states(law.sites, law.symbols))
    t, s = jnp.full(len(states), t), jnp.full(len(states), s)
    reverse = process.reverse(law.denoise(process, kind)(states, t), states, s, t)
    return jnp.exp(jax.vmap(lambda y: reverse.log_prob(jnp.broadcast_to(y, states.shape)).sum(-1), out_axes=1)(states))


def propagate(law, process, kind, grid):
    """The law of ancestral samples over all states."""
    p = np.eye(law.symbols**law.sites)[0]  # nobody alive
    for t, s in itertools.pairwise(grid):
        p = p @ np.asarray(transition(law, process, kind, t, s))
    return p


@pytest.mark.parametrize("kind", ["posterior", "deaths"])
def test_ancestral_samples_converge_at_first_order(x64, kind):
    law = Categorical(2, 3, concentration=5.0)  # without the rare states that would hide the order for longer
    p = np.exp(np.asarray(law.log_p))
    distance = [
        0.5 * np.abs(propagate(law, Thinning(3), kind, np.linspace(1, 0, n + 1)) - p).sum() for n in (16, 32, 64)
    ]
    assert distance[-1] < 0.006
    np.testing.assert_allclose(np.log2(np.array(distance[:-1]) / distance[1:]), 1.0, atol=0.03)


@pytest.mark.slow
@first_fast([LogLinear(1e-2), Cosine()])
def test_prior_is_brute_force(x64, schedule):
    process, x0 = Thinning(K, schedule), jnp.arange(K)[:, None]
    for t in (0.5, 1.0):
        ends = schedule == LogLinear(1e-2) or t < 1
        q = kernel(schedule, 0.0, t) if ends else np.eye(K)[[0] * K]
        prior = q.mean(0)
        np.testing.assert_allclose(np.exp(process.prior((K, 1), t).log_prob(x0))[:, 0], prior, atol=1e-12)
        kl = np.sum(xlogy(q, q / np.where(prior > 0, prior, 1)), 1)
        np.testing.assert_allclose(process.prior_kl(x0, jnp.full(K, t))[:, 0], kl, atol=1e-12)
        assert (kl.min() > 1e-5) == ends


@every_schedule
def test_times_integrate(x64, schedule):
    """The mean of f(t) dt/du over u is the integral of f."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    t, dt = Thinning(17, schedule).time_at(jnp.asarray(0.5 * nodes + 0.5), (0.1, 0.9))
    np.testing.assert_allclose(0.5 * weights @ (np.exp(t) * dt), np.exp(0.9) - np.exp(0.1), rtol=1e-9)
    ends, _ = Thinning(17, schedule).time_at(jnp.asarray([0.0, 1.0]), (0.1, 0.9))
    np.testing.assert_allclose(ends, [0.1, 0.9], atol=1e-12)


@every_schedule
def test_the_bound_is_finite_at_the_edge_of_float32(schedule):
    """Where u rounds to 0 or 1, in every kind, for somebody dead and for nobody."""
    process, x0 = Thinning(K, schedule), jnp.asarray([[3], [0]] * 2)
    xt, u = jnp.asarray([[0], [0], [3], [0]]), jnp.asarray([0.0, 0.0, 1.0, 1.0])

    @functools.partial(jax.jit, static_argnums=0)
    def terms(t_range):
        t, dt = process.time_at(u, t_range)
        number = process.network_outputs(jnp.ones((4, 1)), xt, t, "deaths")
        predictions = Prediction(jnp.ones((4, 1, K)), "posterior"), Prediction(number, "deaths")
        return t, dt, [dt[:, None] * process.path_kl(x0, prediction, xt, t) for prediction in predictions]

    for t_range in (process.t_range, (0.0, 1.0), (0.9, 1.0)):
        t, dt, kls = terms(t_range)
        assert np.isfinite(np.asarray(kls)).all(), (t_range, t, dt, kls)


def test_log_binomial_in_float32():
    """Against float64 formulas, for large counts, at both ends of p, where p or q is 1 - 1e-9 and rounds to 1."""
    k, n = np.arange(256)[None], np.arange(256)[:, None]
    run = jax.jit(lambda p, q: log_binomial(k, n, p, q, 256))
    for p, q in ((0.0, 1.0), (1e-9, 1.0), (0.3, 0.7), (1.0, 1e-9), (1.0, 0.0)):
        choose = gammaln(n + 1) - gammaln(k + 1) - gammaln(np.maximum(n - k, 0) + 1)
        exact = np.where(k <= n, choose + xlogy(k, p) + xlogy(n - k, q), -np.inf)
        ours = np.asarray(run(jnp.float32(p), jnp.float32(q)))
        assert ours.dtype == np.float32
        likely = exact > -50
        np.testing.assert_allclose(ours[likely], exact[likely], atol=4e-5)
        assert (ours[exact < -1e9] < -1e9).all()


@pytest.mark.slow
@pytest.mark.parametrize("t", [1e-6, 0.5, 1 - 2**-24])
def test_losses_in_float32_have_the_gradients_of_float64(t):
    """Every term, from both kinds of network, with nobody dead, some, and all; and for a network that is sure."""
    process = Thinning(17)
    x0, xt = (jnp.asarray(v, jnp.int32)[:, None] for v in ([5, 5, 16, 0], [5, 2, 0, 0]))

    def losses(output, kind, t):
        value = process.network_outputs(output, xt, t, kind)
        prediction = Prediction(value, kind)
        costs = process.path_kl(x0, prediction, xt, t) + process.reconstruction(x0, prediction, xt, t)
        if kind == "posterior":
            costs = costs + process.step_kl(x0, prediction, xt, t / 2, t)
        return costs.sum()

    run = jax.jit(jax.value_and_grad(losses), static_argnums=1)
    for kind, shape in (("posterior", (4, 1, 17)), ("deaths", (4, 1))):
        for scale in (1.0, 15.0):  # an unsure and a sure network
            output = np.asarray(random_logits(shape, scale=scale), np.float32)
            value, gradient = run(jnp.asarray(output), kind, jnp.full(4, t, jnp.float32))
            assert value.dtype == gradient.dtype == jnp.float32
            with jax.enable_x64(True):
                exact = run(jnp.asarray(output, jnp.float64), kind, jnp.full(4, np.float64(np.float32(t))))
            np.testing.assert_allclose(value, exact[0], rtol=1e-4)
            largest = np.abs(exact[1]).max()
            np.testing.assert_allclose(gradient / largest, np.asarray(exact[1]) / largest, atol=1e-4)
    # Beyond what float32 holds: a number of deaths that underflows is dear, and finite.
    value, gradient = run(jnp.full((4, 1), -200.0), "deaths", jnp.full(4, t, jnp.float32))
    assert np.isfinite(value)
    assert np.isfinite(np.asarray(gradient)).all()


def test_draws_follow_the_law():
    """Chi-squared of sample against log_prob for the marginal, the prior, the bridge and the reverse steps."""
    process, batch = Thinning(K, LogLinear(0.2)), 20_000
    keys = random.example_keys(jax.random.key(0), batch)
    x0, xt = (jnp.full((batch, 1), v) for v in (3, 1))
    s, t = jnp.full(batch, 0.4), jnp.full(batch, 0.7)
    logits = jnp.broadcast_to(jnp.asarray([0.0, 1.0, -1.0, 0.5]), (batch, 1, K))

    def laws(rows):
        return (
            process.marginal(x0[:rows], t[:rows]),
            process.prior((rows, 1)),
            process.bridge(x0[:rows], xt[:rows], s[:rows], t[:rows]),
            process.reverse(Prediction(logits[:rows], "cavity"), xt[:rows], s[:rows], t[:rows]),
            process.reverse(Prediction(jnp.full((rows, 1), 1.4), "deaths"), xt[:rows], s[:rows], t[:rows]),
        )

    draws = jax.jit(lambda keys: [law.sample(random.fold_in(keys, n)) for n, law in enumerate(laws(batch))])(keys)
    every = jnp.arange(K)[:, None]
    tables = jax.jit(lambda: [law.log_prob(every)[:, 0] for law in laws(K)])()
    for x, log_p in zip(draws, tables, strict=True):
        assert x.dtype == jnp.int32
        counts, expected = np.bincount(np.asarray(x)[:, 0], minlength=K), batch * np.exp(np.asarray(log_p))
        assert (counts[expected < 1e-9] == 0).all()
        seen = expected > 1e-9
        assert np.sum((counts - expected)[seen] ** 2 / expected[seen]) < 30  # p < 1e-5 at 3 degrees of freedom


def test_a_rare_birth_is_not_lost_in_float32():
    """y = 1e-9: 1 - (1 - y) would be 0, and nobody would ever be born."""
    process, xt = Thinning(256), jnp.full((1, 1), 200)
    y, s, t = Prediction(jnp.full((1, 1), 1e-9), "deaths"), jnp.full(1, 0.25), jnp.full(1, 0.5)
    log_p = jax.jit(lambda: process.reverse(y, xt, s, t).log_prob(xt + 1))()
    np.testing.assert_allclose(jnp.exp(log_p), 0.5e-9, rtol=1e-5)


@pytest.mark.slow
def test_sample_has_the_law():
    """Through `ddjax.sample` with a posterior: exact in three steps at one site."""
    law, process, batch = Categorical(1, 4), Thinning(4), 20_000
    draw = lambda shape, **options: ddjax.sample(
        jax.random.key(0),
        law.denoise(process),
        process,
        shape=shape,
        solver=Ancestral(process),
        times=jnp.asarray([1.0, 0.6, 0.3, 0.0]),
        **options,
    )
    x = np.asarray(draw((batch, 1)).x0)
    counts, expected = np.bincount(x[:, 0], minlength=4), batch * np.exp(np.asarray(law.log_p))
    assert np.sum((counts - expected) ** 2 / expected) < 30
    out = draw((1, 1), trajectory=True)  # a batch of one is the first row; counts only grow on the way back
    np.testing.assert_array_equal(out.x0, x[:1])
    assert (np.diff(np.asarray(out.trajectory), axis=0) >= 0).all()


def network(params, xt, t, cond, *, rng=None, train=False):
    """A wrong network that predicts one number a site."""
    return params[xt] + 0.3 * params[xt[:, ::-1]]


@pytest.mark.slow
def test_expected_loss_is_the_diffusion_term_per_site():
    process, params = Thinning(3), jnp.asarray([0.5, -1.0, 0.2])
    with jax.enable_x64(True):
        denoise = ddjax.bind(network, jnp.asarray(np.asarray(params), float), process, "deaths")
        exact = exact_nelbo(LAW, denoise, process, t_range=(0.1, 0.8), order=24)
    objective, repeats = elbo(process, "deaths", t_range=(0.1, 0.8)), 60

    @jax.jit
    def run(i):
        x0 = LAW.sample(random.example_keys(jax.random.fold_in(jax.random.key(1), i), 512))
        return objective(jax.random.fold_in(jax.random.key(0), i), network, params, x0)[0]

    losses = np.asarray(jax.lax.map(run, jnp.arange(repeats)))
    error = losses.std() / math.sqrt(repeats)
    assert error < 0.02 * losses.mean()
    assert abs(losses.mean() - float(exact.diffusion[0]) / 2) < 4 * error


def test_a_networks_output_may_have_a_trailing_axis():
    """Of size 1, as networks for tokens have. A number per count is another kind."""
    process, params = Thinning(3), jnp.asarray([0.5, -1.0, 0.2])
    x0 = jnp.asarray(all_states(2, 3))
    shaped = lambda params, xt, t, cond, **options: network(params, xt, t, cond, **options)[..., None]
    loss = jax.jit(lambda p, apply: elbo(process, "deaths")(jax.random.key(1), apply, p, x0)[0], static_argnums=1)
    value, gradient = jax.value_and_grad(loss)(params, shaped)
    np.testing.assert_array_equal(value, loss(params, network))
    assert np.isfinite(np.asarray(gradient)).all()
    assert np.abs(np.asarray(gradient)).min() > 0
    # sigma_t softplus: the reverse rate is finite as t -> 0.
    output, t = jnp.asarray([[1.0, -2.0]]), jnp.asarray([1e-20])
    y = process.network_outputs(output, x0[:1], t, "deaths")
    np.testing.assert_allclose(y / 1e-20, np.log1p(np.exp(output)), rtol=1e-5)
    logits = jnp.zeros((1, 2, 3))
    assert process.network_outputs(logits, x0[:1], t, "posterior") is logits
    with pytest.raises(ValueError, match=r"one number for each site .* got \(1, 2, 3\)"):
        process.network_outputs(logits, x0[:1], t, "deaths")


def test_any_shape_of_state_and_times_per_site(x64):
    """An image is its flattened sites; a time per site is what each site alone would get."""
    process, shape = Thinning(3), (2, 2, 2, 1)
    x0 = jnp.asarray(np.random.default_rng(0).integers(0, 3, shape))
    xt = jnp.minimum(x0, jnp.asarray(np.random.default_rng(1).integers(0, 3, shape)))
    s, t = (jnp.asarray(np.linspace(*ends, 8)).reshape(shape) for ends in ((0.1, 0.4), (0.5, 0.9)))
    value = random_logits((*shape, 3))

    @jax.jit
    def everything(x0, xt, value, s, t):
        prediction = Prediction(value, "posterior")
        number = process.convert(prediction, "deaths", xt, t)
        return (
            process.marginal(x0, t).log_prob(xt),
            process.bridge(x0, xt, s, t).log_prob(xt),
            process.reverse(prediction, xt, s, t).log_prob(xt),
            process.reverse(number, xt, s, t).log_prob(xt),
            process.prior_kl(x0, t),
            process.path_kl(x0, prediction, xt, t),
            process.step_kl(x0, prediction, xt, s, t),
            process.reconstruction(x0, number, xt, t),
            process.network_outputs(value[..., :1], xt, t, "deaths"),
        )

    flat = everything(*(v.reshape(8, 1, *v.shape[4:]) for v in (x0, xt, value)), s.reshape(8), t.reshape(8))
    for ours, alone in zip(everything(x0, xt, value, s, t), flat, strict=True):
        np.testing.assert_allclose(ours.reshape(8, 1), alone, rtol=1e-12)


def test_errors():
    with pytest.raises(ValueError, match="at least 2"):
        Thinning(1)
    with pytest.raises(ValueError, match="survival schedule"):
        Thinning(3, CondOT())
    process, xt, t = Thinning(3), jnp.zeros((2, 1), int), jnp.full(2, 0.5)
    assert Thinning(3) == Thinning(3, Linear())
    assert hash(Thinning(3)) == hash(Thinning(3))
    assert Thinning(3) != Thinning(4)
    with pytest.raises(ValueError, match="does not understand"):
        process.convert(Prediction(jnp.zeros((2, 1, 3)), "ratio"), "posterior", xt, t)
    with pytest.raises(ValueError, match=r"must have shape \(2, 1, 3\)"):
        process.convert(Prediction(jnp.zeros((2, 1)), "posterior"), "deaths", xt, t)
    with pytest.raises(ValueError, match="no posterior in it"):  # a chain's bound needs a law
        process.step_kl(xt, Prediction(jnp.zeros((2, 1)), "deaths"), xt, t / 2, t)
