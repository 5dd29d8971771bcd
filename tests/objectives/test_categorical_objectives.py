"""The published objectives of mixture processes, by enumeration in float64: their values, optima and identities."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from enumerated import (
    BOTH,
    GRID,
    LAW,
    RANGE,
    Drifting,
    both,
    by_hand,
    convert,
    exact,
    network,
    pairs,
    softmax,
    table,
    value_and_slope,
)

import ddjax
from ddjax import objectives, random
from ddjax.fixtures.categorical import all_states
from ddjax.objectives.categorical import p_corrupted
from ddjax.predictions import Prediction
from ddjax.processes import Masked, Uniform
from ddjax.schedules import Cosine


def slope(objective, process, params, u=0.6):
    """The largest entry of the expected gradient."""
    gradient = np.asarray(value_and_slope(objective, process, params, u)[1])
    assert np.isfinite(gradient).all()
    return np.abs(gradient).max()


# -- optima ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@both
def test_the_exact_network_is_the_optimum(x64, process):
    """At one time, by enumeration: zero expected gradient, whichever of the kinds the network predicts."""
    on_clock, in_range = 0.6, process.time_at(jnp.asarray(0.6), RANGE)[0]
    ranged = functools.partial(objectives.generalised_kl, t_range=RANGE)
    for make, kind, t in (
        (objectives.cross_entropy, "cavity", on_clock),
        (functools.partial(objectives.cross_entropy, at="corrupted"), "posterior", on_clock),
        (ranged, "cavity", in_range),
        (functools.partial(objectives.score_entropy, t_range=RANGE), "ratio", in_range),
        (functools.partial(objectives.elbo, t_range=RANGE, weighting=objectives.dynamic()), "cavity", in_range),
    ):
        assert slope(make(process, kind), process, exact(process, kind, t)) < 1e-12, (make, kind)
    heads = exact(process, "heads", on_clock)
    assert slope(objectives.ddpd(process), process, heads) < 1e-12
    assert slope(objectives.ddpd(process), process, heads + table(process, extra=1)) > 1e-2
    cut = objectives.elbo(process, "cavity", t_range=RANGE, weighting=objectives.clipped(0.5))
    moved = slope(cut, process, exact(process, "cavity", in_range))
    assert moved < 1e-12 if isinstance(process, Masked) else moved > 1e-4


@pytest.mark.slow
def test_a_mislabelled_network_is_not_the_optimum(x64):
    """Read as a posterior the cavity is wrong; and D3PM's two terms have two optima, as its docstring says."""
    masked, process = BOTH
    hybrid = functools.partial(objectives.d3pm_hybrid, times=GRID)
    u = 0.3  # the step that begins at t = GRID[1]
    cavity, posterior = (exact(process, kind, jnp.asarray(GRID[1])) for kind in ("cavity", "posterior"))
    assert slope(hybrid(process, "cavity", ce_weight=0.0), process, cavity, u) < 1e-12
    assert slope(hybrid(process, "cavity", ce_weight=1.0), process, cavity, u) > 1e-2
    assert slope(hybrid(process, "cavity", ce_weight=1.0), process, posterior, u) > 1e-2
    assert slope(hybrid(process, "posterior", ce_weight=1.0), process, posterior, u) < 1e-12  # converted for the KL
    value = exact(masked, "posterior", jnp.asarray(GRID[1]))
    kept = value_and_slope(hybrid(masked, ce_weight=1.0), masked, value, u)[1]
    at_masks = np.asarray(all_states(2, 4) == masked.mask)
    assert np.abs(np.asarray(kept)[at_masks]).max() < 1e-12
    assert slope(objectives.cross_entropy(process, "posterior"), process, exact(process, "cavity", 0.6)) > 1e-2


# -- values ----------------------------------------------------------------------------------------------------


def check(objective, process, params, u, t, site):
    """The objective's losses against `site(x0, z, row of params)`, summed over sites, wherever the pair is possible."""
    losses, p, x0, xt = (np.asarray(v) for v in pairs(objective, process, params, u))
    q = by_hand(process, t)[2]
    np.testing.assert_allclose(p, np.repeat(np.exp(LAW.log_p), process.num_states**2) * q[x0, xt].prod(1), atol=1e-12)
    rows = np.asarray(params)[xt[:, 0] * process.num_states + xt[:, 1]]
    ours, theirs = losses[p > 0], []
    for a, z, row in zip(x0[p > 0], xt[p > 0], rows[p > 0], strict=True):
        theirs.append(sum(site(a[i], z[i], row[i]) for i in range(2)))
    np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)
    assert np.ptp(ours) > 1e-2


@both
def test_cross_entropies_by_hand(x64, process):
    """Corruption by Bayes' rule on the coin; the posterior at a shown symbol of a masked text is that symbol."""
    t = 0.6
    noise, q = by_hand(process, t)[1:3]
    coin = lambda x, z: noise[z] / q[x, z]

    def posterior(row, z):
        law = softmax(row) * (q[:, z] > 0) if isinstance(process, Masked) else softmax(row)
        return law / law.sum()

    def what(x, z, row):
        return -coin(x, z) * np.log(softmax(row)[x]) if coin(x, z) > 0 else 0.0

    def where(x, z, logit):
        p = 1 / (1 + np.exp(-logit))
        return -coin(x, z) * np.log(p) - (1 - coin(x, z)) * np.log(1 - p)

    logits, heads = table(process), table(process, extra=1)
    every = lambda x, z, row: -np.log(posterior(row, z)[x])
    check(objectives.cross_entropy(process, "posterior"), process, logits, t, t, every)
    check(objectives.cross_entropy(process, "cavity", at="corrupted"), process, logits, t, t, what)
    check(objectives.planner(process), process, heads[..., 3], t, t, where)
    both_heads = lambda x, z, row: what(x, z, row[:3]) + where(x, z, row[3])
    check(objectives.ddpd(process), process, heads, t, t, both_heads)
    if isinstance(process, Masked):  # a shown symbol costs nothing, though the network may call it impossible
        shown = np.arange(3) == all_states(2, 4)[..., None]
        objective = objectives.cross_entropy(process, "cavity", at="corrupted")
        kept = value_and_slope(objective, process, logits, t)
        impossible = value_and_slope(objective, process, jnp.where(shown, -jnp.inf, logits), t)
        for ours, theirs in zip(impossible, kept, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@pytest.mark.slow
@both
def test_d3pm_hybrid_is_the_chain_plus_cross_entropy(x64, process):
    logits, u = table(process), 0.3
    chain = pairs(objectives.elbo(process, "cavity", times=GRID), process, logits, u)[0]
    losses, p, x0, xt = pairs(objectives.d3pm_hybrid(process, "cavity", times=GRID, ce_weight=0.2), process, logits, u)
    log_p = np.log(softmax(np.asarray(network(process)(logits, xt, None, None))))
    ce = -np.take_along_axis(log_p, np.asarray(x0)[..., None], -1)[..., 0].sum(1)
    np.testing.assert_allclose(np.asarray(losses - chain)[p > 0], 0.2 * ce[p > 0], rtol=1e-10)


@both
def test_score_entropy_by_hand(x64, process):
    """Unnormalised ratios against the paper's sum over a rate matrix, and its closed forms for mask and uniform."""
    u, states = 0.4, process.num_states
    t = process.time_at(jnp.asarray(u), RANGE)[0]
    alpha, _, q, rate, dt, _ = by_hand(process, t)
    log_s = jnp.asarray(np.random.default_rng(3).normal(size=(states**2, 2, states)))

    def paper(x, z, row):
        total = 0.0
        for y in set(range(states)) - {z}:
            r = q[x, y] / q[x, z]
            total += rate[z] * (np.exp(row[y]) - r * row[y] + (r * (np.log(r) - 1) if r > 0 else 0.0))
        return dt * total

    def closed(x, z, row):
        """With sigma = -log alpha (SEDD's), sigma' = -alpha' / alpha; uniform rates are 1 / K."""
        if isinstance(process, Masked):
            r = 1 / np.expm1(-np.log(alpha))
            return dt * rate[3] * (np.exp(row[:3]).sum() - r * row[x] + r * (np.log(r) - 1)) if z == 3 else 0.0
        rho = 1 - 3 / (1 / alpha - 1 + 3)  # q(other) / q(own symbol)
        ratio = {y: (1 / rho if x == y else rho if x == z else 1.0) for y in range(3) if y != z}
        return dt * rate[0] * sum(np.exp(row[y]) - r * row[y] + r * (np.log(r) - 1) for y, r in ratio.items())

    objective = objectives.score_entropy(process, t_range=RANGE)
    check(objective, process, log_s, u, t, paper)
    check(objective, process, log_s, u, t, closed)
    # Where no jump leads the network may say anything, even what exp cannot.
    xt = all_states(2, states)[..., None]
    unused = (np.arange(states) == xt) | (isinstance(process, Masked) & (xt < 3))
    kept = value_and_slope(objective, process, log_s, u)
    for ours, theirs in zip(value_and_slope(objective, process, jnp.where(unused, 1e4, log_s), u), kept, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@both
def test_score_entropy_of_ratios_is_the_bound(x64, process):
    u, t = 0.4, process.time_at(jnp.asarray(0.4), RANGE)[0]
    xt = jnp.asarray(all_states(2, process.num_states))
    ratio = convert(process, Prediction(table(process), "cavity"), "ratio", xt, t)
    bound, p, _, _ = pairs(objectives.elbo(process, "cavity", t_range=RANGE), process, table(process), u)
    for kind, params in (("ratio", ratio), ("cavity", table(process))):
        losses = pairs(objectives.score_entropy(process, kind, t_range=RANGE), process, params, u)[0]
        np.testing.assert_allclose(np.asarray(losses)[p > 0], np.asarray(bound)[p > 0], rtol=1e-10, atol=1e-10)


@both
def test_gidd_is_the_bound_and_its_weights(x64, process):
    """w [KL of marginals + r - log r - 1], von Rütte et al.'s own form, is `elbo`; then w is clipped, or replaced."""
    u, t = 0.4, process.time_at(jnp.asarray(0.4), RANGE)[0]
    _, noise, q, rate, dt, _ = by_hand(process, t)

    def loss(weigh):
        def site(x, z, row):
            model = softmax(row) @ q
            kl = sum(q[x, y] * np.log(q[x, y] / model[y]) for y in range(len(noise)) if q[x, y] > 0)
            r = q[x, z] / model[z]
            return dt * weigh(x, z, rate[z] / q[x, z]) * (kl + r - np.log(r) - 1)

        return site

    def dynamic(x, z, w):
        return 0.7 * (2.0 if z == 3 else noise[z] / q[x, z] if x == z else 1.0)

    for weighting, weigh in (
        (None, lambda x, z, w: w),
        (objectives.clipped(0.8), lambda x, z, w: min(w, 0.8)),
        (objectives.dynamic(0.7), dynamic),
    ):
        objective = objectives.elbo(process, "cavity", t_range=RANGE, weighting=weighting)
        check(objective, process, table(process), u, t, loss(weigh))


# -- the flow's bound ------------------------------------------------------------------------------------------


@both
def test_generalised_kl_is_the_kl_of_the_two_flows(x64, process):
    """sum over y != z of u_model - u_true + u_true log(u_true / u_model), both flows' rates from their definition."""
    u, t = 0.4, process.time_at(jnp.asarray(0.4), RANGE)[0]
    *_, dt, flow = by_hand(process, t)

    def site(x, z, row):
        if isinstance(process, Masked) and z < 3:
            return 0.0  # a shown symbol does not move
        true, model = flow * np.eye(process.num_states)[x], flow * np.append(softmax(row), 0.0)[: process.num_states]
        others = [y for y in range(process.num_states) if y != z]
        return dt * sum(model[y] - true[y] + (true[y] * np.log(true[y] / model[y]) if true[y] else 0) for y in others)

    check(objectives.generalised_kl(process, t_range=RANGE), process, table(process), u, t, site)


def test_a_flow_bound_is_a_process():
    """`nelbo` takes it, it compares by value, and it can be copied."""
    flow = objectives.FlowBound(Masked(3))
    assert flow == pickle.loads(pickle.dumps(flow))
    assert hash(flow) == hash(objectives.FlowBound(Masked(3)))
    assert (flow.num_symbols, flow.state) == (3, "categorical")
    denoise, x0 = LAW.denoise(Masked(3), "posterior"), jnp.zeros((4, 2), int)
    bound = jax.eval_shape(lambda key: ddjax.likelihood.nelbo(key, denoise, flow, x0).total, jax.random.key(0))
    assert bound.shape == (4,)
    for name in ("reverse", "step_kl", "nothing"):
        assert not hasattr(flow, name)


# -- in float32, and in parts ----------------------------------------------------------------------------------

EVERY = {
    "ce": lambda p: objectives.cross_entropy(p),
    "ce_corrupted": lambda p: objectives.cross_entropy(p, at="corrupted"),
    "planner": objectives.planner,
    "ddpd": objectives.ddpd,
    "d3pm_hybrid": lambda p: objectives.d3pm_hybrid(p, times=GRID),
    "score_entropy": objectives.score_entropy,
    "generalised_kl": objectives.generalised_kl,
    "clipped": lambda p: objectives.elbo(p, "cavity", weighting=objectives.clipped()),
    "dynamic": lambda p: objectives.elbo(p, "cavity", weighting=objectives.dynamic()),
}
fast = ("ddpd", "score_entropy", "generalised_kl")  # the others are made of these and of `elbo`


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=() if name in fast and (i + j) % 2 else pytest.mark.slow)
        for i, name in enumerate(EVERY)
        for j, kind in enumerate((Masked, Uniform))
    ],
)
def test_gradients_are_finite_and_add_up_over_microbatches(name, kind, monkeypatch):
    """Also for networks that are sure of the wrong thing, and at both ends of the uniforms."""
    process = kind(3, Cosine())
    objective = EVERY[name](process)
    width = {"planner": (), "ddpd": (4,), "score_entropy": (process.num_states,)}.get(name, (3,))
    params = jnp.asarray(np.random.default_rng(0).normal(size=(process.num_states**2, 2, *width)), jnp.float32)
    x0 = LAW.sample(random.example_keys(jax.random.key(1), 10))
    drawn = random.stratified

    @jax.jit
    @jax.value_and_grad
    def run(params, x, index, u):
        monkeypatch.setattr(random, "stratified", lambda *at: jnp.where(u < 0, drawn(*at), u))
        return objective(jax.random.key(7), network(process), params, x, rows=ddjax.Rows(index, 10))[0]

    whole, gradient = run(params, x0, jnp.arange(10), -1.0)
    # A microbatch, its rows twice over so as to compile once: the same mean.
    twice = [np.tile(np.arange(i, i + 5), 2) for i in (0, 5)]
    halves = [run(params, x0[index], jnp.asarray(index), -1.0) for index in twice]
    np.testing.assert_allclose(np.mean([value for value, _ in halves]), whole, rtol=1e-5)
    np.testing.assert_allclose(np.mean([g for _, g in halves], axis=0), gradient, rtol=1e-4, atol=1e-6)
    assert np.abs(np.asarray(gradient)).max() > 0
    big = 60.0 if name == "score_entropy" else 1e4  # exp(ratio) is in the loss
    for extreme in (0.0 * params, big * jnp.sign(params), -big * jnp.sign(params)):
        for u in (-1.0, 0.0, 1.0 - 2**-24):
            value, slope = run(extreme, x0, jnp.arange(10), u)
            assert np.isfinite(value), (u, value)
            assert np.isfinite(np.asarray(slope)).all(), u


def test_a_given_site_at_the_end_of_time_is_not_corrupted():
    """A prompt is shown where nothing survives: 0 / 0 there would be NaN in the gradient, whatever its weight."""
    x, t = jnp.asarray([[1, 2]]), jnp.ones(1)
    np.testing.assert_array_equal(p_corrupted(Masked(3), x, x.at[0, 1].set(3), t), [[0.0, 1.0]])


def test_errors():
    process, key, x0 = Masked(3), lambda: jax.random.key(0), jnp.zeros((2, 2), int)
    with pytest.raises(ValueError, match="'all' or 'corrupted'"):
        objectives.cross_entropy(process, at="some")
    for make in (objectives.clipped, objectives.dynamic):
        with pytest.raises(ValueError, match="w_max"):
            make(0.0)
    with pytest.raises(ValueError, match="continuous time only"):
        objectives.elbo(process, "cavity", times=GRID, weighting=objectives.clipped())
    trace = lambda objective, p, params: jax.eval_shape(lambda: objective(key(), network(p), params, x0))
    with pytest.raises(ValueError, match="planner's head"):
        trace(objectives.ddpd(process), process, table(process))
    with pytest.raises(ValueError, match="shaped like the state"):
        trace(objectives.planner(process), process, table(process))
    with pytest.raises(ValueError, match="logits of x_0"):
        objectives.d3pm_hybrid(process, "ratio", times=GRID)
    with pytest.raises(ValueError, match="must decrease"):
        objectives.d3pm_hybrid(process, times=GRID[::-1])
    with pytest.raises(ValueError, match="changes shape"):
        trace(objectives.generalised_kl(Drifting(3)), Uniform(3), table(Uniform(3)))
