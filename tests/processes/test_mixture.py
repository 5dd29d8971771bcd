"""Masked and uniform corruption against brute force: products of small-step kernels, Bayes' rule, limits of KLs."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax import random
from ddjax.fixtures import Categorical, exact_reverse
from ddjax.fixtures.categorical import all_states
from ddjax.predictions import Prediction
from ddjax.processes import Marginal, Masked, Uniform
from ddjax.schedules import CondOT, Cosine, Linear, LogLinear, Polynomial

SCHEDULES = [Linear(), LogLinear(1e-2), Polynomial(2.0), Polynomial(0.5), Cosine()]
# A lost symbol becomes 0, 1, or a noise symbol that no data have; never 2.
MARGINAL = Marginal(3, Polynomial(2.0), probabilities=[0.5, 0.1, 0.0, 0.4])
PROCESSES = [*(kind(3, schedule) for kind in (Masked, Uniform) for schedule in SCHEDULES), MARGINAL]
process_and_schedule = pytest.mark.parametrize("process", PROCESSES, ids=repr)
both = pytest.mark.parametrize("kind", [Masked, Uniform])


def noise_law(process):
    """Where a lost symbol goes; written here again, on purpose."""
    if isinstance(process, Masked):
        return np.eye(process.num_states)[-1]
    if isinstance(process, Marginal):
        return np.asarray([0.5, 0.1, 0.0, 0.4])
    return np.full(process.num_states, 1 / process.num_states)


def kernel(process, s, t, steps=50):
    """Q_{t|s} as the product of small steps, each of which loses a symbol with probability 1 - alpha_b / alpha_a."""
    q, times = np.eye(process.num_states), np.linspace(s, t, steps + 1)
    alpha = np.asarray(process.schedule.alpha(jnp.asarray(times)))
    for a, b in itertools.pairwise(alpha):
        lost = 1 - b / a
        q = q @ ((1 - lost) * np.eye(process.num_states) + lost * noise_law(process)[None])
    return q


def pairs(process):
    """Every clean symbol against every state, as two batches of one site."""
    x0, y = np.meshgrid(range(process.num_symbols), range(process.num_states), indexing="ij")
    return jnp.asarray(x0.reshape(-1, 1)), jnp.asarray(y.reshape(-1, 1))


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
brute_force_reverse = jax.jit(exact_reverse, static_argnums=(0, 1, 3, 4))


def random_logits(shape, seed=0, scale=2.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape))


@process_and_schedule
def test_marginal_is_the_product_of_small_steps(x64, process):
    for t in (0.03, 0.4, 0.99):
        x0 = jnp.arange(process.num_symbols)[:, None]
        expected = kernel(process, 0.0, t)[: process.num_symbols]
        np.testing.assert_allclose(table(process, "marginal", x0, x0, jnp.full(len(x0), t))[:, 0], expected, atol=1e-10)


@process_and_schedule
def test_kernels_compose(x64, process):
    r, s, t = 0.1, 0.35, 0.8
    y = jnp.arange(process.num_states)[:, None]

    def own(a, b):
        a, b = (jnp.full(len(y), v) for v in (a, b))
        stay = np.asarray(process.survival(a, b))[0] * np.eye(process.num_states)
        return stay + np.asarray(process.kernel_noise_of(y, a, b))[:, 0][None]

    np.testing.assert_allclose(own(r, t), kernel(process, r, t), atol=1e-10)
    np.testing.assert_allclose(own(r, s) @ own(s, t), own(r, t), atol=1e-12)
    np.testing.assert_allclose(own(r, t).sum(1), 1.0, atol=1e-12)


@process_and_schedule
def test_bridge_is_bayes_rule(x64, process):
    x0, xt = pairs(process)
    for s, t in ((0.2, 0.6), (0.0, 0.5), (0.97, 0.98)):
        q_s, q_ts = kernel(process, 0.0, s), kernel(process, s, t)
        q_t = q_s @ q_ts
        a, b = np.asarray(x0)[:, 0], np.asarray(xt)[:, 0]
        possible = q_t[a, b] > 0
        joint = q_s[a] * q_ts[:, b].T
        expected = joint[possible] / q_t[a, b][possible][:, None]
        bridge = table(process, "bridge", xt, x0, xt, jnp.full(len(x0), s), jnp.full(len(x0), t))
        np.testing.assert_allclose(bridge[possible, 0], expected, atol=1e-10)


@both
@pytest.mark.parametrize(("sites", "symbols"), [(1, 5), (2, 4), (3, 3)])
@pytest.mark.parametrize("prediction", ["posterior", "cavity", "ratio"])
def test_reverse_is_exact_whatever_is_predicted(x64, kind, sites, symbols, prediction):
    law, process = Categorical(sites, symbols), kind(symbols, Cosine())
    xt = jnp.asarray(all_states(sites, process.num_states))
    s, t = jnp.full(len(xt), 0.37), jnp.full(len(xt), 0.6)
    reverse = table(process, "reverse", xt, predict(law, process, prediction, xt, t), xt, s, t)
    np.testing.assert_allclose(reverse, brute_force_reverse(law, process, xt, 0.37, 0.6), atol=1e-10)


def test_the_exact_reverse_step_of_the_fixture_is_bayes_rule(x64):
    """One site: p(x_s | x_t) from the joint p(x0) q(x_s | x0) Q(x_s -> x_t), with no code in common."""
    law = Categorical(1, 3)
    for process in (Masked(3, Linear()), Uniform(3, Linear())):
        p, q_s, q_ts = np.exp(np.asarray(law.log_p)), kernel(process, 0, 0.3), kernel(process, 0.3, 0.7)
        joint = (p @ q_s[:3])[:, None] * q_ts
        xt = jnp.arange(process.num_states)[:, None]
        ours = brute_force_reverse(law, process, xt, 0.3, 0.7)[:, 0]
        np.testing.assert_allclose(ours, (joint / joint.sum(0)).T, atol=1e-10)


@pytest.mark.parametrize(("true", "label"), [("posterior", "cavity"), ("cavity", "posterior")])
def test_a_mislabelled_prediction_gives_a_wrong_step(x64, true, label):
    law, process = Categorical(2, 4), Uniform(4)
    xt = jnp.asarray(all_states(2, 4))
    s, t = jnp.full(len(xt), 0.4), jnp.full(len(xt), 0.5)
    value = predict(law, process, true, xt, t).value
    expected = brute_force_reverse(law, process, xt, 0.4, 0.5)
    for name, low, high in ((true, 0.0, 1e-10), (label, 0.01, 1.0)):
        reverse = table(process, "reverse", xt, Prediction(value, name), xt, s, t)
        distance = 0.5 * np.abs(reverse - np.asarray(expected)).sum(-1).max()
        assert low <= distance <= high


@pytest.mark.slow
@both
@pytest.mark.parametrize("start", ["posterior", "cavity", "ratio"])
@pytest.mark.parametrize("end", ["posterior", "cavity", "ratio"])
def test_exact_predictions_convert_into_each_other(x64, kind, start, end):
    law, process = Categorical(2, 3), kind(3, Polynomial(2.0))
    xt = jnp.asarray(all_states(2, process.num_states))
    t = jnp.full(len(xt), 0.45)
    converted = process.convert(predict(law, process, start, xt, t), end, xt, t)
    assert converted.kind == end
    # A masked process cannot know a revealed site's cavity, and asks for nothing there.
    used = np.ones(xt.shape, bool) if kind is Uniform else np.asarray(xt == process.num_symbols)
    back = process.convert(converted, start, xt, t)
    for prediction in (converted, back):
        expected = predict(law, process, prediction.kind, xt, t).value
        ours, expected = (np.asarray(jax.nn.softmax(v))[used] for v in (prediction.value, expected))
        np.testing.assert_allclose(ours, expected, atol=1e-10)


def test_the_ratio_is_the_ratio_of_marginals(x64):
    """ratio(y) at site i = p_t(x_t with y at i) / p_t(x_t): a second road to the same number."""
    law, process, t = Categorical(2, 3), Uniform(3), 0.3
    q, states = kernel(process, 0, t), all_states(2, 3)
    p_t = np.einsum("ab,ac,bd->cd", np.exp(np.asarray(law.log_p)).reshape(3, 3), q, q)
    ratio = np.exp(np.asarray(predict(law, process, "ratio", jnp.asarray(states), jnp.full(9, t)).value))
    for n, (a, b) in enumerate(states):
        np.testing.assert_allclose(ratio[n, 0], p_t[:, b] / p_t[a, b], atol=1e-10)
        np.testing.assert_allclose(ratio[n, 1], p_t[a, :] / p_t[a, b], atol=1e-10)


@process_and_schedule
def test_rate_is_the_derivative_of_the_kernel(x64, process):
    y, t, h = jnp.arange(process.num_states)[:, None], 0.4, 1e-6
    rate = np.asarray(process.rate_into(y, jnp.full(len(y), t)))[:, 0]
    step = kernel(process, t, t + h, steps=1)
    for x in range(process.num_states):
        others = np.arange(process.num_states) != x
        np.testing.assert_allclose(rate[others], step[x, others] / h, rtol=1e-4, atol=1e-9)


@process_and_schedule
def test_prior_kl_is_brute_force(x64, process):
    for t in (0.5, 1.0):
        x0 = jnp.arange(process.num_symbols)[:, None]
        alpha = float(process.schedule.alpha(jnp.asarray(t)))
        q = alpha * np.eye(process.num_states)[: process.num_symbols] + (1 - alpha) * noise_law(process)
        prior = q.mean(0)  # of data uniform over the symbols
        ours = np.exp(process.prior((process.num_states, 1), t).log_prob(jnp.arange(process.num_states)[:, None]))
        np.testing.assert_allclose(ours[:, 0], prior, atol=1e-12)
        kl = np.sum(np.where(q > 0, q * np.log(np.where(q > 0, q / np.where(prior > 0, prior, 1), 1)), 0), 1)
        np.testing.assert_allclose(process.prior_kl(x0, jnp.full(len(x0), t))[:, 0], kl, atol=1e-12)
    if isinstance(process.schedule, LogLinear) and process.schedule.eps > 0:
        assert kl.min() > 1e-5  # alpha_1 > 0 is not free


@process_and_schedule
@pytest.mark.parametrize("t", [0.2, 0.9])
def test_path_kl_is_the_limit_of_the_step_kl(x64, process, t):
    """(1 / dt) KL(bridge || reverse) as dt -> 0, extrapolated, for a denoiser that is wrong."""
    x0, xt = pairs(process)
    prediction = Prediction(random_logits((len(x0), 1, process.num_symbols)), "cavity")

    def rate(dt):
        s = jnp.full(len(x0), t - dt)
        p = table(process, "bridge", xt, x0, xt, s, jnp.full(len(x0), t))
        q = table(process, "reverse", xt, prediction, xt, s, jnp.full(len(x0), t))
        ratio = np.where(p > 0, p, 1) / np.where((p > 0) & (q > 0), q, 1)
        return np.sum(p * np.log(ratio), -1) / dt

    limit = 2 * rate(5e-5) - rate(1e-4)
    ours = np.asarray(process.path_kl(x0, prediction, xt, jnp.full(len(x0), t)))
    possible = np.asarray(process.marginal(x0, jnp.full(len(x0), t)).log_prob(xt)) > -1e20
    ours, limit = ours[possible], limit[possible]
    assert np.isfinite(np.asarray(process.path_kl(x0, prediction, xt, jnp.full(len(x0), t)))).all()
    assert ours.max() > 1e-3
    np.testing.assert_allclose(ours, limit, rtol=1e-5, atol=1e-7)


@both
def test_path_kl_vanishes_for_a_clean_prediction(x64, kind):
    """At the true x0 the model's path is the bridge's."""
    process = kind(4)
    x0, xt = pairs(process)
    prediction = Prediction(jnp.where(jax.nn.one_hot(x0, 4) > 0, 0.0, -1e30), "cavity")
    kl = process.path_kl(x0, prediction, xt, jnp.full(len(x0), 0.3))
    possible = (xt == x0) | (xt == process.num_states - 1 if kind is Masked else jnp.ones_like(xt, bool))
    np.testing.assert_allclose(jnp.where(possible, kl, 0.0), 0.0, atol=1e-12)


@both
@pytest.mark.parametrize("t", [1e-3, 0.5, 1 - 2**-12, 1 - 2**-20, 1 - 2**-24])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 15.0])
def test_path_kl_in_float32(kind, t, scale):
    """Near both ends, for many symbols, and for a network that is sure of the wrong one."""
    symbols = 1000
    logits = random_logits((6, 1, symbols), scale=scale).astype(jnp.float32)
    with jax.enable_x64(True):
        process = kind(symbols)
        x0 = np.arange(6)[:, None]
        xt = np.where(np.arange(6)[:, None] % 2, process.num_states - 1, x0 + 1)
        t = np.full(6, t, np.float32)
        exact = path_kl(
            process, x0, Prediction(jnp.asarray(logits, jnp.float64), "cavity"), xt, jnp.asarray(t, jnp.float64)
        )
    single = path_kl(process, x0, Prediction(logits, "cavity"), xt, jnp.asarray(t))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, exact, rtol=1e-3)


def test_path_kl_of_a_large_vocabulary_near_data():
    """Noise of 2e-8 a symbol against a survival of 1: 1 + change / true rounds to 0, whose logarithm was infinite."""
    symbols, t = 50_257, np.full(1, 1e-3, np.float32)
    logits = jnp.zeros((1, 1, symbols)).at[..., 7].set(-25.0).at[..., 3].set(20.0)
    x0, xt = np.full((1, 1), 7), np.full((1, 1), 5)
    with jax.enable_x64(True):
        double = Prediction(jnp.asarray(logits, jnp.float64), "cavity")
        exact = path_kl(Uniform(symbols), x0, double, xt, jnp.asarray(t, jnp.float64))
    single = jax.value_and_grad(lambda z: path_kl(Uniform(symbols), x0, Prediction(z, "cavity"), xt, t).sum())
    value, gradient = single(logits)
    np.testing.assert_allclose(value, exact[0, 0], rtol=1e-3)
    assert np.isfinite(np.asarray(gradient)).all()


@both
def test_path_kl_has_finite_gradients(kind):
    process = kind(50)
    x0, xt = jnp.asarray([[3], [3], [3]]), jnp.asarray([[3], [7], [process.num_states - 1]])
    xt = xt.at[1].set(process.num_states - 1) if kind is Masked else xt
    for logits in (jnp.zeros((3, 1, 50)), jnp.zeros((3, 1, 50)).at[..., 3].set(-100.0)):
        for t in (1e-3, 0.5, 1 - 2**-24):
            loss = lambda z, t: path_kl(process, x0, Prediction(z, "cavity"), xt, t).sum()
            value, gradient = jax.value_and_grad(loss)(logits, jnp.full(3, t))
            assert np.isfinite(value)
            assert np.isfinite(np.asarray(gradient)).all()


@process_and_schedule
def test_times_integrate(x64, process):
    """The mean of f(t) dt/du over u is the integral of f, and no u leads outside the open range."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    t, dt = process.time_at(jnp.asarray(0.5 * nodes + 0.5), (0.1, 0.9))
    np.testing.assert_allclose(0.5 * weights @ (np.exp(t) * dt), np.exp(0.9) - np.exp(0.1), rtol=1e-9)


@pytest.mark.slow
@both
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_the_bound_is_finite_at_the_edge_of_float32(kind, schedule):
    """u may round to 1 (and be 0): there sigma' = 0 or alpha = 0, and 0 / 0 once lost a whole evaluation."""
    process = kind(4, schedule)
    for t_range in (process.t_range, (0.0, 1.0), (0.9, 1.0)):
        t, dt = process.time_at(jnp.asarray([0.0, 1.0]), t_range)
        x0, xt = jnp.zeros((2, 1), int), jnp.full((2, 1), process.num_states - 1)
        kl = dt[:, None] * process.path_kl(x0, Prediction(jnp.ones((2, 1, 4)), "cavity"), xt, t)
        assert np.isfinite(np.asarray(kl)).all(), (t_range, t, dt, kl)


@pytest.mark.slow
@both
def test_draws_follow_the_law(kind):
    """Chi-squared of sample against log_prob for the marginal, the prior and the reverse step."""
    process, batch = kind(4), 20_000
    keys = random.example_keys(jax.random.key(0), batch)
    x0 = jnp.full((batch, 1), 2)
    t = jnp.full(batch, 0.7)
    xt = jnp.full((batch, 1), process.num_states - 1)
    logits = jnp.broadcast_to(jnp.asarray([0.0, 1.0, -1.0, 0.5]), (batch, 1, 4))
    laws = (
        process.marginal(x0, t),
        process.prior((batch, 1), 0.8),
        process.reverse(Prediction(logits, "cavity"), xt, t - 0.3, t),
    )
    for n, law in enumerate(laws):
        counts = np.bincount(np.asarray(law.sample(random.fold_in(keys, n)))[:, 0], minlength=process.num_states)
        first = jax.tree.map(lambda v: v, [jnp.full((batch, 1), y) for y in range(process.num_states)])
        expected = batch * np.exp([float(law.log_prob(y)[0, 0]) for y in first])
        assert (counts[expected < 1e-9] == 0).all()
        seen = expected > 1e-9
        assert np.sum((counts - expected)[seen] ** 2 / expected[seen]) < 30  # p < 1e-5 at 4 degrees of freedom


@both
def test_any_shape_of_state_and_times_per_site(x64, kind):
    """An image is its flattened sites; a time per site is what each site alone would get."""
    process = kind(3)
    x0 = jnp.asarray(np.random.default_rng(0).integers(0, 3, (2, 2, 2, 1)))
    xt = jnp.asarray(np.random.default_rng(1).integers(0, process.num_states, (2, 2, 2, 1)))
    value = random_logits((2, 2, 2, 1, 3))
    s, t = (
        jnp.asarray(np.linspace(0.1, 0.4, 8)).reshape(2, 2, 2, 1),
        jnp.asarray(np.linspace(0.5, 0.9, 8)).reshape(2, 2, 2, 1),
    )

    @jax.jit
    def every(x0, xt, value, s, t):
        prediction = Prediction(value, "posterior")
        return [
            process.marginal(x0, t).log_prob(xt),
            process.bridge(x0, x0, s, t).log_prob(x0),
            process.reverse(prediction, xt, s, t).log_prob(x0),
            process.prior_kl(x0, t),
            process.path_kl(x0, prediction, xt, t),
            process.reconstruction(x0, prediction, xt, t),
        ]

    whole = every(x0, xt, value, s, t)
    alone = every(*(v.reshape(8, 1) for v in (x0, xt)), value.reshape(8, 1, 3), s.reshape(8), t.reshape(8))
    for a, b in zip(whole, alone, strict=True):
        assert a.shape == x0.shape
        np.testing.assert_allclose(a.reshape(8, 1), b, rtol=1e-12)


@both
def test_errors(kind):
    process, xt, t = kind(3), jnp.zeros((2, 4), int), jnp.full(2, 0.5)
    with pytest.raises(ValueError, match="x0"):
        process.convert(Prediction(jnp.zeros((2, 4, 3)), "x0"), "cavity", xt, t)
    with pytest.raises(ValueError, match="noise"):
        process.convert(Prediction(jnp.zeros((2, 4, 3)), "cavity"), "noise", xt, t)
    for shape in ((2, 4, 5), (2, 3, 3), (2, 4)):
        with pytest.raises(ValueError, match="must have shape"):
            process.reverse(Prediction(jnp.zeros(shape), "posterior"), xt, t - 0.1, t)
    if kind is Masked:
        with pytest.raises(ValueError, match="must have shape"):
            process.convert(Prediction(jnp.zeros((2, 4, 3)), "ratio"), "cavity", xt, t)
    with pytest.raises(ValueError, match="num_symbols"):
        kind(0)
    with pytest.raises(ValueError, match="survival schedule"):
        kind(3, CondOT())
    with pytest.raises(ValueError, match="does not broadcast"):
        process.marginal(xt, jnp.zeros((2, 4, 1))).log_prob(xt)


@both
def test_processes_compare_by_value(kind):
    assert kind(3, Polynomial(2.0)) == kind(3, Polynomial(2.0))
    assert hash(kind(3)) == hash(kind(3))
    assert kind(3) != kind(4)
    assert Linear() != LogLinear(0.0)
