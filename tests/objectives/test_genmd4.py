"""The learned schedule's gradient is that of the exact expected bound: every pair of draws is enumerated."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import ddjax
from ddjax import random
from ddjax.fixtures import Categorical, exact_nelbo
from ddjax.objectives import genmd4
from ddjax.objectives.genmd4 import drawn_twice
from ddjax.predictions import Prediction
from ddjax.processes import Masked, StateMasked, state_masked
from ddjax.schedules import Linear
from ddjax.symbol_schedules import Spindle, SymbolPolynomial
from ddjax.training import Ema, init_state, make_train_step
from ddjax.training.mesh import compile_step, init_sharded, make_mesh, shard_batch

LAW, MASK, EPS = Categorical(2, 3), 3, 0.02
START = StateMasked(3, SymbolPolynomial((1.0, 1.0, 1.0), eps=EPS))
LOW, HIGH = RANGE = (0.05, 0.9)  # at 0.9 the prior term moves with the powers too


def apply(params, xt, t, cond, *, rng=None, train=False):
    """A wrong network: logits from the state alone."""
    return params[xt] + params[xt[:, ::-1]] * 0.3


def parameters(powers=(0.7, 1.3, 2.0), dtype=float):
    network = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), dtype)
    process = StateMasked(3, SymbolPolynomial(powers, eps=EPS))
    return {"network": network, "process": process.parameters}


# Every x0 of the law, and every pair of noisy states that it can become: 9 * 16 rows.
X0, Z1, Z2 = (
    np.asarray(v)
    for v in zip(
        *(
            (x, *([MASK if hit else v for v, hit in zip(x, hits, strict=True)] for hits in (first, second)))
            for x in itertools.product(range(3), repeat=2)
            for first, second in itertools.product(itertools.product((0, 1), repeat=2), repeat=2)
        ),
        strict=True,
    )
)


def sigma(powers, t):
    """Written here again, on purpose."""
    return (1 - EPS) * t**powers


def chances(powers, t, x0, z):
    """q(z | x0) at each site."""
    lost = sigma(powers, t)[x0]
    return jnp.where(z == MASK, lost, 1 - lost)


def exact_bound(params, kind, t, dt, known=None, drawn_by=None):
    """E over x0 and z of dt * (path cost) + both ends, nats per site, by enumeration from the paper's formulas.

    Eq. 12: -sum_v (w_v / t) [(log mu_x + 1) e_x - mu]_v at masked sites. `known` sites stay clean and cost nothing.
    drawn_by: other parameters for the probabilities of z; what plain autodiff through fixed draws would follow.
    """
    powers = jnp.log1p(jnp.exp(params["process"]))
    costs = np.ones(2) if known is None else 1.0 - np.asarray(known)
    x0, z = (jnp.asarray(v[::4]) for v in (X0, Z1))  # each pair of x0 and z1 comes 4 times in a row
    mu = jax.nn.softmax(apply(params["network"], z, t, None))
    if kind == "cavity":
        mu = mu * t**powers
        mu = mu / mu.sum(-1, keepdims=True)
    one_hot = jax.nn.one_hot(x0, 3)
    terms = (jnp.log(mu) + 1) * one_hot - mu
    path = jnp.where(z == MASK, -(powers / t * terms).sum(-1), 0.0)
    q = chances(powers if drawn_by is None else jax.nn.softplus(drawn_by["process"]), t, x0, z)
    if known is not None:
        q = jnp.where(np.asarray(known) > 0, z == x0, q)
    weights = jnp.exp(LAW.log_prob(x0)) * q.prod(-1)
    low, high = sigma(powers, LOW), sigma(powers, HIGH)
    decoder = low[x0] * -jnp.log(low[x0] / low.sum())
    prior = (1 - high[x0]) * jnp.log(3.0) + high[x0] * jnp.log(high[x0] / high.mean())
    total = weights @ ((dt * path + decoder + prior) * costs).sum(-1)
    return total / costs.sum(), weights @ ((dt * path) * costs).sum(-1) / costs.sum()


@pytest.fixture
def enumerated(monkeypatch):
    """The objective at one u, its two draws and their probabilities replaced by every pair at once."""

    def run(params, kind, u, known=None, every=1):
        """(loss, metrics), the sum over all pairs weighed by their (constant) probabilities.

        every: so often do all pairs come, the first time alone with their second draw.
        """
        z1, z2 = (jnp.asarray(v if known is None else np.where(known, X0, v)) for v in (Z1, Z2))
        x0, z1 = (jnp.tile(v, (every, 1)) for v in (jnp.asarray(X0), z1))
        draws = iter((z1, z2))
        monkeypatch.setattr(state_masked.Survived, "sample", lambda self, keys: next(draws))
        monkeypatch.setattr(random, "stratified", lambda key, rows: jnp.full(len(rows.index), u))
        t, _ = START.time_at(u, RANGE)
        powers = jax.lax.stop_gradient(jax.nn.softplus(params["process"]))
        weights = jnp.exp(LAW.log_prob(jnp.asarray(X0)))
        for z in (Z1, Z2):
            weights = weights * chances(powers, t, jnp.asarray(X0), jnp.asarray(z)).prod(-1)
        if known is not None:
            weights = weights[:, None] * (1.0 - np.asarray(known))
        weights = jnp.concatenate([weights] * every)
        return genmd4(START, kind, t_range=RANGE, every=every)(
            jax.random.key(0), apply, params, x0, weights=weights, train=False
        )

    return run


@pytest.mark.parametrize(
    ("kind", "known", "every"),
    [("posterior", None, 1), ("posterior", (0, 1), 2), ("posterior", None, 2), ("cavity", None, 1)],
)
def test_the_gradient_is_unbiased(x64, enumerated, kind, known, every):
    """By autodiff of the enumerated expectation, to rounding; the part through the draws is not small."""
    params, u = parameters(), jnp.asarray(0.4)
    t, dt = START.time_at(u, RANGE)
    ours = jax.jit(jax.value_and_grad(lambda p: enumerated(p, kind, u, known, every)[0]))
    exact = jax.jit(jax.value_and_grad(lambda p: exact_bound(p, kind, t, dt, known)[0]))
    (value, gradient), (expected, expected_gradient) = ours(params), exact(params)
    np.testing.assert_allclose(value, expected, atol=1e-12)
    for name in ("network", "process"):
        assert np.abs(expected_gradient[name]).max() > 0.01
        np.testing.assert_allclose(gradient[name], expected_gradient[name], atol=1e-10)
    if known is None:
        naive = jax.jit(jax.grad(lambda p: exact_bound(p, kind, t, dt, drawn_by=params)[0]))(params)
        assert np.abs(naive["process"] - expected_gradient["process"]).max() > 0.05


@pytest.mark.slow
def test_the_value_is_the_bounds_diffusion_term(x64, enumerated):
    """Integrated over u, it is that of the exact bound with the learned powers; the ends are the whole bound's."""
    params = parameters()
    nodes, weights = np.polynomial.legendre.leggauss(24)

    @jax.jit
    def at(u):
        loss, metrics = enumerated(params, "posterior", u)
        return jnp.stack([loss, metrics["diffusion"]])

    loss, diffusion = 0.5 * weights @ np.asarray(jax.lax.map(at, jnp.asarray(0.5 * nodes + 0.5)))
    process = START.with_parameters(np.asarray(params["process"]))
    denoise = lambda xt, t, cond: Prediction(apply(params["network"], xt, t, cond), "posterior")
    exact = exact_nelbo(LAW, denoise, process, t_range=RANGE, order=24)
    np.testing.assert_allclose(diffusion, float(exact.diffusion[0]) / 2, rtol=1e-8)
    # The decoder in closed form is that of a uniform cavity.
    uniform = lambda xt, t, cond: Prediction(jnp.zeros((*xt.shape, 3)), "cavity")
    ends = exact_nelbo(LAW, uniform, process, t_range=RANGE, order=1)
    np.testing.assert_allclose(loss - diffusion, float((ends.prior + ends.reconstruction)[0]) / 2, rtol=1e-10)
    assert float(exact.total[0] - exact.reconstruction[0] + ends.reconstruction[0]) > LAW.entropy


@pytest.mark.parametrize("every", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_drawn_losses_average_to_the_exact_one(every):
    """The objective as it is called, with its own draws, in float32; and its gradient by the schedule."""
    params, batch, repeats = parameters(dtype=jnp.float32), 512, 60
    objective = genmd4(START, t_range=RANGE, every=every)

    @jax.jit
    def run(i):
        x0 = LAW.sample(random.example_keys(jax.random.fold_in(jax.random.key(1), i), batch))
        key = jax.random.fold_in(jax.random.key(0), i)
        (loss, _), gradient = jax.value_and_grad(lambda p: objective(key, apply, p, x0), has_aux=True)(params)
        return jnp.append(gradient["process"], loss)

    draws = np.asarray(jax.lax.map(run, jnp.arange(repeats)))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda v: jnp.asarray(v, jnp.float64), params)
        nodes, weights = np.polynomial.legendre.leggauss(24)
        times, dts = START.time_at(jnp.asarray(0.5 * nodes + 0.5), RANGE)
        total = lambda p: 0.5 * weights @ jax.vmap(lambda t, dt: exact_bound(p, "posterior", t, dt)[0])(times, dts)
        value, gradient = jax.jit(jax.value_and_grad(total))(wide)
    exact = np.append(gradient["process"], value)
    assert (np.abs(draws.mean(0) - exact) < 4 * draws.std(0) / math.sqrt(repeats)).all()
    assert draws.std(0)[-1] / math.sqrt(repeats) < 0.01 * float(value)


@pytest.mark.parametrize("per_site", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_whichever_rows_are_drawn_twice_they_stand_for_all(x64, monkeypatch, per_site):
    """With any weights: at fixed draws, the mean over which rows come first and over the order of the two draws."""
    rng = np.random.default_rng(0)
    x0, (z1, z2) = jnp.asarray(rng.integers(0, 3, (6, 2))), rng.random((2, 6, 2)) < 0.5
    weights, z1, z2 = jnp.asarray(rng.random((6, 2)[: 1 + per_site])), jnp.where(z1, MASK, x0), jnp.where(z2, MASK, x0)
    monkeypatch.setattr(random, "stratified", lambda key, rows: jnp.full(len(rows.index), 0.4))

    def gradient(every, x0, weights, z1, z2):
        draws = iter((z1, z2[: 6 // every]))
        monkeypatch.setattr(state_masked.Survived, "sample", lambda self, keys: next(draws))
        loss = lambda p: genmd4(START, t_range=RANGE, every=every)(
            jax.random.key(0), apply, p, x0, weights=weights, train=False
        )
        return jax.grad(lambda p: loss(p)[0])(parameters())

    @jax.jit
    def both(*given):
        turned = [[jnp.roll(v, shift, axis=0) for v in given] for shift in (0, 2, 4)]
        turned += [[x0, weights, z2, z1] for x0, weights, z1, z2 in turned]
        stacked = map(jnp.stack, zip(*turned, strict=True))
        return gradient(1, *given), jax.vmap(functools.partial(gradient, 3))(*stacked)

    exact, each = both(x0, weights, z1, z2)
    for name in exact:
        np.testing.assert_allclose(each[name].mean(0), exact[name], atol=1e-12)
    assert np.abs(each["process"][0] - exact["process"]).max() > 0.01


@pytest.mark.slow
def test_microbatches_and_devices_take_the_whole_batchs_step(x64):
    """As `make_train_step` cuts them; the rows drawn twice are the same ones, with the same times and noise."""
    rng = np.random.default_rng(0)
    batch = {"x0": rng.integers(0, 3, (16, 2)), "weights": rng.uniform(0, 2, (16, 2))}
    optimizer, params = optax.sgd(1.0), parameters()
    state = lambda key: init_state(lambda key: params, optimizer, key)
    step = functools.partial(make_train_step, genmd4(START, every=4), apply, optimizer)
    whole, _ = jax.jit(step())(state(jax.random.key(1)), batch)
    mesh = make_mesh({"data": 4}, jax.devices()[:4])
    start, shardings = init_sharded(state, mesh, (), jax.random.key(1))
    split, _ = compile_step(step(accumulate=2), shardings, mesh)(start, shard_batch(batch, mesh))
    for name in params:
        assert np.abs(whole.params[name] - params[name]).max() > 0.01
        np.testing.assert_allclose(split.params[name], whole.params[name], atol=1e-12)


def test_two_draws_of_an_example_cost_their_mean():
    """And one half of the difference, times how many examples one stands for, pushes their log-probabilities apart."""
    losses, others = jnp.asarray([1.0, 5.0, 7.0, 9.0]), jnp.asarray([3.0, 1.0])
    run = lambda p, q: drawn_twice((losses, p), (others, q))
    np.testing.assert_array_equal(run(jnp.ones(4), jnp.zeros(2)), [2.0, 3.0, 7.0, 9.0])
    first, second = jax.grad(lambda *q: run(*q).sum(), argnums=(0, 1))(jnp.ones(4), jnp.zeros(2))
    np.testing.assert_array_equal(first, [-2.0, 4.0, 0.0, 0.0])
    np.testing.assert_array_equal(second, [2.0, -4.0])


def test_rows_drawn_twice_span_the_times():
    """Of 16 rows the first 4 come twice, their times one in each quarter; all times, one in each sixteenth."""
    process = StateMasked(3, SymbolPolynomial((1.0, 1.0, 1.0)))

    @jax.jit
    def seen(labels):
        calls = []

        def spy(params, xt, t, cond, **options):
            calls.append((t, cond))
            return params[xt]

        x0, objective = jnp.zeros((16, 2), int), genmd4(process, t_range=(0.0, 1.0), every=4)
        objective(jax.random.key(7), spy, parameters(), x0, labels)
        return calls

    (t, all_labels), (again, labels) = seen(jnp.arange(16))
    np.testing.assert_array_equal(again, t[:4])
    np.testing.assert_array_equal(labels, all_labels[:4])
    np.testing.assert_array_equal(np.sort(np.floor(again * 4)), np.arange(4))
    np.testing.assert_array_equal(np.sort(np.floor(t * 16)), np.arange(16))


@pytest.mark.slow
def test_microbatches_with_rows_give_the_whole():
    x0, params, key = LAW.sample(random.example_keys(jax.random.key(5), 10)), parameters(), lambda: jax.random.key(7)
    run = jax.jit(
        jax.value_and_grad(
            lambda p, x, index: genmd4(START, every=1)(key(), apply, p, x, rows=ddjax.Rows(index, 10))[0]
        )
    )
    whole, gradient = run(params, x0, jnp.arange(10))
    halves = [run(params, x0[i : i + 5], jnp.arange(i, i + 5)) for i in (0, 5)]
    np.testing.assert_allclose(np.mean([value for value, _ in halves]), whole, rtol=1e-6)
    for name in gradient:
        mean = np.mean([g[name] for _, g in halves], axis=0)
        np.testing.assert_allclose(mean, gradient[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_weights():
    x0, params, key = LAW.sample(random.example_keys(jax.random.key(5), 6)), parameters(), lambda: jax.random.key(7)
    loss = jax.jit(lambda x0, weights: genmd4(START)(key(), apply, params, x0, weights=weights)[0])
    kept, ones = jnp.asarray([1.0, 1, 1, 1, 0, 0]), jnp.ones((6, 2))
    np.testing.assert_allclose(loss(x0, kept), loss(x0.at[4:].set(2 - x0[4:]), kept), rtol=1e-6)
    np.testing.assert_allclose(loss(x0, None), loss(x0, ones), rtol=1e-6)
    np.testing.assert_allclose(loss(x0, kept), loss(x0, kept[:, None] * ones), rtol=1e-6)


@pytest.mark.slow
def test_sites_of_weight_zero_are_shown_clean():
    x0 = LAW.sample(random.example_keys(jax.random.key(5), 16))
    seen = []

    def spy(params, xt, t, cond, **options):
        seen.append(xt)
        return params[xt]

    weights = jnp.ones((16, 2)).at[:, 0].set(0.0)
    genmd4(START, every=1)(jax.random.key(7), spy, parameters(), x0, weights=weights)
    for xt in seen:  # both draws
        np.testing.assert_array_equal(xt[:, 0], x0[:, 0])
        assert (xt[:, 1] == MASK).any()


@pytest.mark.slow
def test_a_training_step_moves_the_powers():
    """In the library's own step; gradients are finite for steep and flat powers."""
    x0, optimizer = LAW.sample(random.example_keys(jax.random.key(5), 8)), optax.sgd(0.1)
    params = parameters(powers=(0.05, 1.0, 25.0))
    state = init_state(lambda key: params, optimizer, jax.random.key(1))
    step = jax.jit(make_train_step(genmd4(START), apply, optimizer, ema=Ema(0.9)))
    after, metrics = step(state, {"x0": x0})
    assert bool(metrics["finite"])
    np.testing.assert_allclose([metrics["least_power"], metrics["greatest_power"]], [0.05, 25.0], rtol=1e-5)
    for name in params:
        assert np.isfinite(np.asarray(after.params[name])).all()
        assert np.abs(after.params[name] - params[name]).max() > 1e-4
    process = START.with_parameters(np.asarray(after.params["process"]))
    assert hash(process) == hash(START.with_parameters(np.asarray(after.params["process"])))
    powers = np.log1p(np.exp(np.asarray(after.params["process"], np.float64)))
    np.testing.assert_allclose(np.asarray(process.schedule.powers), powers, rtol=1e-6)


def test_the_network_gets_train_and_its_own_keys_only_while_training():
    seen = []

    def spy(params, xt, t, cond, **options):
        seen.append(options)
        return params[xt]

    def run(x0, train):
        genmd4(START, every=1)(jax.random.key(0), spy, parameters(), x0, train=train)
        return [jax.random.key_data(options["rng"]) for options in seen if train]

    x0 = jnp.zeros((4, 2), jnp.int32)
    keys = jax.jit(run, static_argnums=1)(x0, True)
    jax.jit(run, static_argnums=1)(x0, False)
    first, second = (np.asarray(k) for k in keys)
    assert first.shape == second.shape == (4, 2)
    assert len(np.unique(np.concatenate([first, second]), axis=0)) == 8
    assert all(options["train"] is True for options in seen[:2])
    assert seen[2:] == [{}, {}]


def test_powers_start_where_the_process_is_and_errors():
    powers = (1e-3, 1.0, 80.0)
    process = StateMasked(3, SymbolPolynomial(powers))
    again = process.with_parameters(np.asarray(process.parameters))
    np.testing.assert_allclose(np.asarray(again.schedule.powers), powers, rtol=1e-5)
    for bad in (Masked(3, Linear()), StateMasked(3, Spindle((0.1, 0.0, -0.1)))):
        with pytest.raises(ValueError, match="SymbolPolynomial"):
            genmd4(bad)
    with pytest.raises(ValueError, match="does not understand"):
        genmd4(START, "velocity")
    with pytest.raises(ValueError, match="at least 1"):
        genmd4(START, every=0)
