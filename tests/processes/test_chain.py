"""D3PM's chains against matrix products, the paper's formulas, and the mixtures they contain."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax import grids, random
from ddjax.fixtures import Categorical, exact_nelbo
from ddjax.frozen import Frozen
from ddjax.likelihood import nelbo
from ddjax.objectives import elbo
from ddjax.predictions import Prediction
from ddjax.processes import Chain, Masked, Uniform, chain
from ddjax.schedules import Cosine

CHAINS = {
    "gaussian": chain.discretized_gaussian(3, 4, (0.2, 2.0)),
    "banded": chain.banded(3, 4, 1, (0.3, 0.9)),
    "absorbing": chain.absorbing(3, 4),
    "any": Chain(3, Frozen(np.random.default_rng(0).dirichlet(np.ones(4), (4, 4)))),
}


def products(process, i, j):
    """Q_{i+1} ... Q_j."""
    return functools.reduce(np.matmul, process.matrices.values[i:j], np.eye(process.num_states))


def entropy_of(p):
    return -np.sum(p * np.log(p))


@pytest.mark.slow
@pytest.mark.parametrize("process", CHAINS.values(), ids=CHAINS.keys())
def test_transitions_bridge_and_reverse_are_products(x64, process):
    n = process.num_states
    x0, xt = (jnp.asarray(v.reshape(-1, 1)) for v in np.meshgrid(range(3), range(n), indexing="ij"))
    a, b = np.asarray(x0)[:, 0], np.asarray(xt)[:, 0]
    cavity = np.random.default_rng(1).dirichlet(np.ones(3))
    prediction = Prediction(jnp.broadcast_to(jnp.log(jnp.asarray(cavity)), (len(a), 1, 3)), "cavity")

    @jax.jit
    def every(s, t):
        s, t = jnp.full(len(a), s), jnp.full(len(a), t)
        bridge, reverse = process.bridge(x0, xt, s, t), process.reverse(prediction, xt, s, t)
        laws = [jax.nn.softmax(v.logits)[:, 0] for v in (bridge, reverse)]
        posterior = jax.nn.softmax(process.convert(prediction, "posterior", xt, t).value)[:, 0]
        return process.transition(s, t)[0], *laws, posterior, process.step_kl(x0, prediction, xt, s, t)[:, 0]

    for i, j in ((2, 3), (0, 1), (0, 4), (1, 4)):
        q_s, q_ts = products(process, 0, i)[:3], products(process, i, j)
        transition, bridge, reverse, posterior, kl = every(i / 4 + 0.05, j / 4 - 0.05)  # rounded to the grid
        np.testing.assert_allclose(transition, q_ts, atol=1e-14)
        possible = (q_s @ q_ts)[a, b] > 0
        p = q_s[a] * q_ts[:, b].T
        q = (cavity @ q_s) * q_ts[:, b].T
        p, q = (v[possible] / v[possible].sum(1, keepdims=True) for v in (p, q))
        np.testing.assert_allclose(bridge[possible], p, atol=1e-12)
        np.testing.assert_allclose(reverse[possible], q, atol=1e-12)
        expected = (cavity * (q_s @ q_ts)[:, b].T)[possible]
        expected /= expected.sum(1, keepdims=True)
        np.testing.assert_allclose(posterior[possible], expected, atol=1e-12)
        expected = np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1) / np.where(q > 0, q, 1)), 0), 1)
        np.testing.assert_allclose(kl[possible], expected, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("process", CHAINS.values(), ids=CHAINS.keys())
def test_one_site_has_its_entropy_exactly_at_every_number_of_steps(x64, process):
    """The exact reverse step is the true one; what is left is the KL of the chain's end from the prior."""
    law = Categorical(1, 3)
    p, end = np.exp(np.asarray(law.log_p)), products(process, 0, 4)[:3]
    at_end, prior = p @ end, end.mean(0)
    seen = at_end > 0
    gap = np.sum(at_end[seen] * np.log(at_end[seen] / prior[seen]))
    bound = exact_nelbo(law, law.denoise(process, "cavity"), process, times=grids.uniform(4))
    np.testing.assert_allclose(float(bound.total[0]), entropy_of(p) + gap, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("process", "mixture"),
    [(chain.absorbing(3, 6, Cosine()), Masked(3, Cosine())), (chain.uniform(3, 6, Cosine()), Uniform(3, Cosine()))],
    ids=["masked", "uniform"],
)
def test_absorbing_and_uniform_chains_are_the_mixtures_on_the_grid(x64, process, mixture):
    """Term by term, and their bounds with an exact and with a wrong denoiser of two sites."""
    law, times = Categorical(2, 3), grids.uniform(6)
    table = jnp.asarray(np.random.default_rng(3).normal(size=(process.num_states, 3)))
    denoisers = [law.denoise(mixture, "posterior"), lambda xt, t, cond: Prediction(table[xt], "cavity")]
    totals = []
    for denoise in denoisers:
        ours, theirs = (exact_nelbo(law, denoise, p, times=times) for p in (process, mixture))
        for name in ("prior", "diffusion", "reconstruction"):
            np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-12, atol=1e-12)
        totals.append(float(ours.total[0]))
    assert law.entropy + 1e-3 < totals[0] < totals[1] - 0.05


def test_gaussian_matrices_are_equation_8():
    for size, steps in ((5, 3), (256, 2)):
        process = chain.discretized_gaussian(size, steps, (1e-2, 4e-2))
        for k, beta in enumerate(np.linspace(1e-2, 4e-2, steps)):
            weight = lambda n, beta=beta, size=size: np.exp(-4 * n**2 / ((size - 1) ** 2 * beta))
            total = sum(weight(n) for n in range(-size + 1, size))
            for x in (0, 2, size - 1):
                row = np.array([weight(x - y) / total if x != y else 0.0 for y in range(size)])
                row[x] = 1 - row.sum()
                np.testing.assert_allclose(process.matrices.values[k, x], row, rtol=1e-12)


def test_gaussian_matrices_do_not_depend_on_how_finely_the_range_is_divided():
    """The authors' code has 255 in its scale: with 64 symbols its jumps are another 4 times shorter."""
    spreads = []
    for size in (64, 256):
        q = products(chain.discretized_gaussian(size, 50, (0.02, 0.02)), 0, 5)[size // 2]
        x = np.arange(size) / (size - 1.0)
        spreads.append(np.sqrt(q @ (x - q @ x) ** 2))
    np.testing.assert_allclose(spreads[0], spreads[1], rtol=0.02)
    np.testing.assert_allclose(spreads[1], np.sqrt(5 * 0.02 / 8), rtol=0.02)  # five jumps of variance beta / 8


@pytest.mark.slow
def test_nothing_is_added_to_probabilities():
    """D3PM's code takes log(q + 1e-6): at 256 symbols the impossible then have 2.6e-4 of the mass, and are drawn."""
    process, batch = chain.banded(64, 3, 1, (0.5, 0.5)), 200
    x0 = jnp.full((batch, 100), 32)
    marginal = process.marginal(x0[:1], jnp.asarray([1 / 3]))
    log_q = jax.vmap(lambda y: marginal.log_prob(jnp.full((1, 100), y))[0, 0])(jnp.arange(64))
    assert (np.asarray(log_q) > -1e20).sum() == 3
    far = chain.discretized_gaussian(64, 2, (1e-3, 1e-3))
    log_q = float(far.marginal(jnp.asarray([[10]]), jnp.asarray([0.5])).log_prob(jnp.asarray([[19]]))[0, 0])
    np.testing.assert_allclose(log_q, np.log(far.matrices.values[0, 10, 19]), rtol=1e-5)
    assert log_q < -70
    drawn = process.marginal(x0, jnp.full(batch, 1 / 3)).sample(random.example_keys(jax.random.key(0), batch))
    assert int(jnp.abs(drawn - 32).max()) == 1
    # The reverse step, with a flat cavity, goes nowhere that a jump cannot have come from.
    step = process.reverse(
        Prediction(jnp.zeros((1, 1, 64)), "cavity"), x0[:1, :1], jnp.asarray([1 / 3]), jnp.asarray([2 / 3])
    )
    assert (np.asarray(jax.nn.softmax(step.logits)) > 0).sum() == 3


@pytest.mark.slow
def test_what_cannot_have_led_here_is_no_candidate(x64):
    """A flat posterior, in a band: the reverse step is the mean of the bridges from the five symbols within reach."""
    process, s, t = chain.banded(9, 3, 1, (0.5, 0.5)), jnp.asarray([1 / 3]), jnp.asarray([2 / 3])
    xt = jnp.asarray([[4]])
    reverse = process.reverse(Prediction(jnp.zeros((1, 1, 9)), "posterior"), xt, s, t)
    bridges = [jax.nn.softmax(process.bridge(jnp.asarray([[k]]), xt, s, t).logits) for k in range(2, 7)]
    np.testing.assert_allclose(jax.nn.softmax(reverse.logits), np.mean(bridges, 0), atol=1e-12)


def test_what_the_network_all_but_excludes_keeps_its_price(x64):
    """-log p(x_0 | x_1), D3PM's last term, with 1e-13 for the truth: a floor of 1e-6 would charge half of it."""
    process, t = CHAINS["any"], jnp.asarray([0.25])
    prediction = Prediction(jnp.log(jnp.asarray([[[1e-13, 0.5, 0.5 - 1e-13]]])), "cavity")
    x0, xt = jnp.asarray([[0]]), jnp.asarray([[1]])
    into = process.matrices.values[0, :3, 1]
    expected = -np.log(1e-13 * into[0] / (0.5 * (into[1] + into[2])))
    np.testing.assert_allclose(process.step_kl(x0, prediction, xt, 0.0 * t, t), expected, rtol=1e-10)
    np.testing.assert_allclose(process.reconstruction(x0, prediction, xt, t), expected, rtol=1e-10)


@pytest.mark.slow
def test_bound_and_objective_take_the_grid_and_are_finite():
    process, batch = CHAINS["banded"], 4000
    law, times = Categorical(2, 3), grids.uniform(4)
    with jax.enable_x64(True):
        exact = exact_nelbo(law, law.denoise(process, "cavity"), process, times=times)
        assert float(exact.total[0]) > law.entropy + 1e-3
    x0 = law.sample(random.example_keys(jax.random.key(1), batch))
    bound = nelbo(jax.random.key(0), law.denoise(process, "cavity"), process, x0, num_times=4, times=times)
    draws = np.asarray(bound.total)
    assert abs(draws.mean() - float(exact.total[0])) < 4 * draws.std() / np.sqrt(batch) + 1e-5
    objective = elbo(process, "cavity", times=times)
    apply = lambda params, xt, t, cond, **_: params[xt]
    loss = jax.jit(jax.value_and_grad(lambda p: objective(jax.random.key(1), apply, p, x0)[0]))
    for params in (jnp.ones((3, 3)), 200.0 * jnp.eye(3)[::-1]):
        value, gradient = loss(params)
        assert np.isfinite(value)
        assert np.isfinite(np.asarray(gradient)).all()


def test_errors():
    rows = np.full((2, 3, 3), 1 / 3)
    for message, make in (
        ("hashable", lambda: Chain(3, rows)),
        ("steps, states, states", lambda: Chain(4, Frozen(rows))),
        ("steps, states, states", lambda: Chain(3, Frozen(rows[0]))),
        ("summing to 1", lambda: Chain(3, Frozen(rows * 1.001))),
        ("not negative", lambda: Chain(3, Frozen(rows + np.array([-1.0, 1.0, 0.0])))),
        ("width", lambda: chain.banded(4, 3, 0, (0.1, 0.1))),
        ("width", lambda: chain.banded(4, 3, 2, (0.1, 1.1))),
        ("at least 2", lambda: chain.uniform(1, 3)),
        ("1 step", lambda: chain.absorbing(3, 0)),
        ("beta", lambda: chain.discretized_gaussian(3, 3, (0.0, 0.1))),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    process, x0 = CHAINS["banded"], jnp.zeros((2, 1), int)
    for use in (
        lambda: process.path_kl(x0, None, x0, jnp.ones(2)),
        lambda: process.time_at(jnp.ones(2), (0.0, 1.0)),
        lambda: nelbo(jax.random.key(0), lambda xt, t, cond: None, process, x0, t_range=(0.1, 1.0)),
    ):
        with pytest.raises(ValueError, match=r"times=grids\.uniform\(4\)"):
            use()
    assert chain.uniform(3, 4) == chain.uniform(3, 4)
    assert hash(chain.uniform(3, 4)) != hash(chain.uniform(3, 5))


@pytest.mark.slow
def test_its_own_grid_is_the_default():
    """Of bound and objective: nothing need be said twice."""
    process, key = chain.discretized_gaussian(3, 4, (0.05, 0.5)), lambda: jax.random.key(0)
    x0 = jnp.asarray([[0, 1], [2, 1]])
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3)), jnp.float32)
    denoise = lambda xt, t, cond: Prediction(logits[xt], "cavity")
    ours, given = (nelbo(key(), denoise, process, x0, **grid) for grid in ({}, {"times": grids.uniform(4)}))
    np.testing.assert_array_equal(ours.total, given.total)
    assert ours.t_range == (0.0, 1.0)
    apply = lambda params, xt, t, cond, **_: params[xt]
    losses = [
        elbo(process, "cavity", **grid)(key(), apply, logits, x0)[0] for grid in ({}, {"times": grids.uniform(4)})
    ]
    assert losses[0] == losses[1] > 0
    with pytest.raises(ValueError, match="no continuous time"):
        nelbo(key(), denoise, process, x0, t_range=(0.1, 1.0))
