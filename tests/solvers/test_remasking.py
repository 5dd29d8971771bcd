"""Psi-posteriors and remasking: published formulas, exact marginals of a step, and the output's law, by enumeration."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ddjax
from ddjax import grids, random
from ddjax.fixtures import Categorical
from ddjax.fixtures.categorical import all_states
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian, Hybrid, Kernel, Masked, Uniform, generators
from ddjax.schedules import Cosine, VPCosine
from ddjax.solvers import Ancestral, Psi, Remasking

LAW = Categorical(2, 3, seed=1)
MASKED = Masked(3, Cosine())
STATES = {3: all_states(2, 3), 4: all_states(2, 4)}


def states(process):
    return jnp.asarray(STATES[process.num_states])


@functools.partial(jax.jit, static_argnums=0)
def matrix(solver, s, t, *carry):
    """The transition matrix of a step between all joint states, with the exact denoiser: rows x_t, columns x_s."""
    x = states(solver.process)
    at = solver.clock(t) if hasattr(solver, "clock") else t
    prediction = LAW.denoise(solver.process)(x, at)
    law = solver.law(prediction, x, s, t, *carry)
    each = jax.vmap(lambda y: law.log_prob(jnp.broadcast_to(y, x.shape)).sum(-1), out_axes=1)
    return jnp.exp(each(x))


def transition(solver, s, t, *rest):
    return np.asarray(matrix(solver, jnp.asarray(s, float), jnp.asarray(t, float), *rest))


@functools.partial(jax.jit, static_argnums=0)
def of_one_site(process, t):
    """q_t(y | k), (clean, noisy)."""
    q = process.marginal(jnp.arange(3)[:, None], t)
    one = lambda y: jnp.exp(q.log_prob(jnp.full((3, 1), y)))[:, 0]
    return jax.vmap(one, out_axes=-1)(jnp.arange(process.num_states))


def marginal(process, t):
    """q_t over the joint states: the law pushed through each site's matrix."""
    clean, noisy = STATES[3], states(process)
    one = lambda y: jnp.exp(process.marginal(jnp.arange(3)[:, None], jnp.full(3, t)).log_prob(jnp.full((3, 1), y)))[
        :, 0
    ]
    q = np.stack([np.asarray(one(y)) for y in range(process.num_states)], -1)  # (clean, noisy), one site
    joint = q[clean[:, None, 0], noisy[None, :, 0]] * q[clean[:, None, 1], noisy[None, :, 1]]
    return np.exp(np.asarray(LAW.log_p)) @ joint


def sites_of(process, p):
    p = np.asarray(p).reshape(process.num_states, process.num_states)
    return np.stack([p.sum(1), p.sum(0)])


def output_law(solver, times):
    """The law of what `sample` would return, and the true one."""
    p = marginal(solver.process, 1.0)
    for t, s in itertools.pairwise(times):
        p = p @ transition(solver, s, t)
    return p, marginal(solver.process, 0.0)


def distance(solver, times):
    return 0.5 * np.abs(np.subtract(*output_law(solver, times))).sum()


KEPT = {
    "psi, masked": Psi(MASKED, 0.3),
    "cap": Remasking(MASKED, 0.4),
    "psi, uniform": Psi(Uniform(3, Cosine()), 0.3),
    "psi, hybrid": Psi(Hybrid(3, uniform_share=0.3), 0.0),
    "psi, kernel": Psi(Kernel(3, generators.birth_death(3)), 0.5),
    "rescale": Remasking(MASKED, 1.0, "rescale"),
    "loop": Remasking(MASKED, 0.4, between=(0.3, 0.7), hold=0.35),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KEPT)
def test_each_site_keeps_its_law(x64, name):
    """From q_t to q_s at every site, exactly, in one step of any length; both sites together, not."""
    solver = KEPT[name]
    clock = getattr(solver, "clock", lambda t: jnp.asarray(t, float))
    for s, t in ((0.4, 0.6), (0.2, 0.9), (0.0, 0.5), (0.5, 1.0), (0.0, 1.0)):
        before, after = (marginal(solver.process, float(clock(v))) for v in (t, s))
        moved = before @ transition(solver, s, t)
        np.testing.assert_allclose(moved.sum(), 1.0, atol=1e-10)
        np.testing.assert_allclose(sites_of(solver.process, moved), sites_of(solver.process, after), atol=1e-10)
    assert np.abs(moved - after).max() > 1e-2  # in one step from noise the sites are independent


def test_remasking_is_the_published_posterior_and_psi_with_its_kappa(x64):
    """Wang et al. 2025, eq. 6 and 7, written again: with any prediction, at every pair of states of a site."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 1, 3)))
    xt, p = jnp.arange(4)[:, None], np.asarray(jax.nn.softmax(logits))[3, 0]
    said = Prediction(logits, "posterior")

    @functools.partial(jax.jit, static_argnums=0)
    def table(solver, s, t):
        law = solver.law(said, xt, s, t)
        return jnp.exp(jax.vmap(lambda y: law.log_prob(jnp.full((4, 1), y))[:, 0], out_axes=-1)(jnp.arange(4)))

    @jax.jit
    def psi(kappa, s, t):
        law = Psi(MASKED, lambda s, t: kappa).law(said, xt, s, t)
        return jnp.exp(jax.vmap(lambda y: law.log_prob(jnp.full((4, 1), y))[:, 0], out_axes=-1)(jnp.arange(4)))

    for s, t in ((0.2, 0.3), (0.5, 0.9), (0.0, 0.4), (0.3, 1.0)):
        a_s, a_t = (1 - np.sin(np.pi * v / 2) for v in (s, t))
        most = min(1.0, (1 - a_s) / a_t) if t < 1 else 1.0
        for solver, sigma in (
            (Remasking(MASKED, 0.1), min(0.1, most)),
            (Remasking(MASKED, 1.0), most),
            (Remasking(MASKED, 0.3, "rescale"), 0.3 * most),
            (Remasking(MASKED, 0.3, between=(0.6, 0.8)), 0.0),
        ):
            expected = np.zeros((4, 4))
            expected[:3, :3] = (1 - sigma) * np.eye(3)
            expected[:3, 3] = sigma
            expected[3, :3] = (a_s - (1 - sigma) * a_t) / (1 - a_t) * p
            expected[3, 3] = (1 - a_s - sigma * a_t) / (1 - a_t)
            time = (jnp.asarray(s, float), jnp.asarray(t, float))
            ours = np.asarray(table(solver, *time))
            np.testing.assert_allclose(ours, expected, atol=1e-12)
            if s > 0 and sigma <= 1 - a_s:
                rows = slice(0 if t < 1 else 3, 4)  # a symbol at t = 1 is impossible
                np.testing.assert_allclose(psi(1 - sigma / (1 - a_s), *time)[rows], expected[rows], atol=1e-12)
    assert (ours[:3, 3] == 0).all()


def test_psi_is_its_definition_and_ancestral_at_one(x64):
    """By hand from the exact tables of one step: kappa of the reverse, the rest forward from the posterior."""
    process, (s, t) = Uniform(3, Cosine()), (0.3, 0.7)
    x = states(process)

    @jax.jit
    def exact(x):
        said = LAW.denoise(process)(x, jnp.full(9, t))
        law = process.reverse(said, x, jnp.asarray(s), jnp.asarray(t))
        reverse = jax.vmap(lambda y: law.log_prob(jnp.full_like(x, y)), out_axes=-1)(jnp.arange(3))
        return jnp.exp(said.value), jnp.exp(reverse)

    posterior, reverse = (np.asarray(v) for v in exact(x))
    alpha = 1 - np.sin(np.pi * s / 2)
    forward = posterior @ (alpha * np.eye(3) + (1 - alpha) / 3)
    for kappa, weight in ((0.3, 0.3), (lambda s, t: s / t, 3 / 7)):
        site = weight * reverse + (1 - weight) * forward
        joint = (site[:, 0, :, None] * site[:, 1, None, :]).reshape(9, 9)
        np.testing.assert_allclose(transition(Psi(process, kappa), s, t), joint, atol=1e-12)
    outside = transition(Psi(process, 0.3, between=(0.0, 0.5)), s, t)
    np.testing.assert_allclose(outside, (reverse[:, 0, :, None] * reverse[:, 1, None, :]).reshape(9, 9), atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("make", [lambda c: Remasking(Masked(3), c), lambda c: Psi(Masked(3), 1.0 - c)])
def test_the_law_converges_at_first_order_at_a_given_rate(x64, make):
    """sigma and 1 - kappa in proportion to the steps' length; a fixed sigma moves more and more sites together."""
    error = [distance(make(4.0 / n), np.linspace(1.0, 0.0, n + 1)) for n in (16, 32, 64)]
    assert error[-1] < 0.01
    np.testing.assert_allclose(np.log2(np.divide(error[:-1], error[1:])), 1.0, atol=0.2)


def test_the_loop_is_a_corrector(x64):
    """From sites that are right one by one and wrong together to within sigma of the law at the held time."""
    left = {}
    for eta in (0.04, 0.02):
        solver = Remasking(Masked(3), eta, between=(0.1, 0.9), hold=0.3)
        law, one = marginal(solver.process, 0.3), transition(solver, 0.5, 0.6)
        sites = sites_of(solver.process, law)
        start = np.outer(*sites).ravel()
        left[eta] = 0.5 * np.abs(start @ np.linalg.matrix_power(one, 2000) - law).sum()
        assert left[eta] < 0.2 * 0.5 * np.abs(start - law).sum()
    np.testing.assert_allclose(np.log2(left[0.04] / left[0.02]), 1.0, atol=0.15)


def test_confidence_shares_sigma_out_over_shown_sites(x64):
    solver = Remasking(MASKED, 0.5, confidence=True)
    xt = jnp.asarray([[0, 3, 1, 2], [3, 3, 3, 3]])
    written = jnp.asarray([[0.9, 0.7, 0.2, 1.0], [1.0, 1.0, 1.0, 1.0]])
    s, t = jnp.asarray(0.3), jnp.asarray(0.5)
    a_s, a_t = (1 - np.sin(np.pi * v / 2) for v in (0.3, 0.5))
    odds = np.exp(-np.asarray([0.9, 0.2, 1.0]))
    law = solver.law(Prediction(jnp.zeros((2, 4, 3)), "posterior"), xt, s, t, written)
    masks = np.exp(np.asarray(law.log_prob(jnp.full_like(xt, 3))))
    np.testing.assert_allclose(masks[0, [0, 2, 3]], 0.5 * odds / odds.sum(), atol=1e-12)
    np.testing.assert_allclose(masks[1], (1 - a_s) / (1 - a_t), atol=1e-12)  # the ancestral step
    np.testing.assert_allclose(masks[0, 1], (1 - a_s) / (1 - a_t), atol=1e-12)


@pytest.mark.slow
def test_confidence_moves_the_law_of_a_site(x64):
    """Its sigma looks at the state: a site is up to 0.16 off after this step, where a fixed sigma is exact."""
    solver = Remasking(MASKED, 0.9, "rescale", confidence=True)
    written = jnp.broadcast_to(jnp.asarray([0.9, 0.2]), (16, 2))
    moved = marginal(MASKED, 0.6) @ transition(solver, 0.4, 0.6, written)
    off = np.abs(sites_of(MASKED, moved) - sites_of(MASKED, marginal(MASKED, 0.4))).sum(1) / 2
    np.testing.assert_allclose(moved.sum(), 1.0, atol=1e-10)
    assert (off > 0.01).all()
    assert (off < 0.2).all()


def test_confidence_is_carried_from_when_a_symbol_was_written():
    solver = Remasking(Masked(3), 0.5, confidence=True)
    p = jnp.asarray([0.7, 0.2, 0.1])
    denoise = lambda xt, t, cond=None: Prediction(jnp.broadcast_to(jnp.log(p), (*xt.shape, 3)), "posterior")
    xt = jnp.asarray([[3, 3, 0, 3, 3, 1, 3, 3]] * 3)
    step = jax.jit(lambda keys, carry, x, t, s: solver.step(keys, carry, x, t, s, denoise))
    with jax.debug_key_reuse(False):
        keys = random.example_keys(jax.random.key(0), 3)
        np.testing.assert_array_equal(solver.init(xt), 1.0)
        xs, carry, info = step(keys, jnp.full(xt.shape, 0.25), xt, jnp.asarray(0.9), jnp.asarray(0.3))
        xs, xt, carry = np.asarray(xs), np.asarray(xt), np.asarray(carry)
        new = (xt == 3) & (xs != 3)
        assert new.any()
        np.testing.assert_allclose(carry[new], np.asarray(p)[xs[new]], rtol=1e-5)
        np.testing.assert_array_equal(carry[~new], 0.25)
        assert (np.asarray(info.nfe) == 1).all()
        last, _, _ = step(keys, jnp.asarray(carry), jnp.asarray(xs), jnp.asarray(0.3), jnp.asarray(0.0))
    assert (np.asarray(last) < 3).all()
    np.testing.assert_array_equal(np.asarray(last)[xs < 3], xs[xs < 3])


def draw(solver, batch, steps=6, **options):
    settings = {"shape": (batch, 2), "solver": solver, "times": grids.uniform(steps), **options}
    return ddjax.sample(jax.random.key(5), LAW.denoise(solver.process), solver.process, **settings)


SOLVERS = [Remasking(MASKED, 0.9, "rescale"), Psi(Uniform(3, Cosine()), 0.3), Remasking(MASKED, 0.5, confidence=True)]


@pytest.mark.slow
@pytest.mark.parametrize("solver", SOLVERS, ids=lambda v: type(v).__name__)
def test_samples_do_not_depend_on_the_batch(solver):
    whole = np.asarray(draw(solver, 7).x0)
    for batch in (1, 2):
        np.testing.assert_array_equal(draw(solver, batch).x0, whole[:batch])
    assert (whole < 3).all()


@pytest.mark.slow
@pytest.mark.parametrize("solver", [*SOLVERS[:2], KEPT["loop"]], ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_samples_have_the_propagated_law(solver, steps):
    """Chi-squared of `ddjax.sample` against the matrices."""
    batch = 20_000
    law = output_law(solver, np.asarray(grids.uniform(steps)))[0].reshape((solver.process.num_states,) * 2)
    x = np.asarray(draw(solver, batch, steps).x0)
    counts = np.zeros_like(law)
    np.add.at(counts, tuple(x.T), 1)
    seen = law > 1e-7
    assert counts[~seen].sum() == 0
    assert np.sum((counts - batch * law)[seen] ** 2 / (batch * law[seen])) < 40  # 8 degrees of freedom, p < 1e-5


@pytest.mark.slow
def test_float32_is_finite_and_known_sites_stay():
    known = ddjax.Observed(jnp.asarray([[True, False]] * 4), jnp.ones((4, 2), jnp.int32))
    for solver in SOLVERS:
        out = draw(solver, 4, 9, observed=known)
        assert (np.asarray(out.x0)[:, 0] == 1).all()
        assert (np.asarray(out.x0) < 3).all()
        assert (np.asarray(out.nfe) == 9).all()


def test_bad_arguments():
    for make, match in (
        (lambda: Psi(Gaussian(VPCosine())), "Psi is for categorical states, got Gaussian"),
        (lambda: Psi(MASKED, 1.5), r"kappa lies in \[0, 1\]"),
        (lambda: Psi(MASKED, 0.5, between=(0.5, 0.5)), "between must be two times"),
        (lambda: Remasking(Uniform(3)), "Remasking is for processes.Masked, got Uniform: use Psi"),
        (lambda: Remasking(MASKED, 1.5), "eta lies in"),
        (lambda: Remasking(MASKED, rule="conf"), "rule is 'cap' or 'rescale'"),
        (lambda: Remasking(MASKED, between=(0.2, 1.2)), "between must be two times"),
        (lambda: Remasking(MASKED, hold=0.3), "hold needs a time"),
    ):
        with pytest.raises(ValueError, match=match):
            make()
    assert hash(Remasking(MASKED, between=[0.1, 0.2])) == hash(Remasking(MASKED, between=(0.1, 0.2)))
    assert Psi(MASKED, 0.3) != Psi(MASKED, 0.4) != Ancestral(MASKED)
