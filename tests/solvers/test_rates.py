"""Solvers by rates and discrete flows: laws of steps and of outputs as matrices, without Monte Carlo.

What must come out is from `by_definition` and `jumps`: the law at every time, and how it changes.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from by_definition import cosine, fixed, hybrid, kernel, linear, thinning
from jumps import LAW, distance, enumerated, forward_table, generator, law_at, transition

import ddjax
from ddjax import grids, random
from ddjax.fixtures import Categorical, exact_reverse
from ddjax.fixtures.categorical import all_states
from ddjax.predictions import Prediction
from ddjax.processes import Hybrid, Kernel, Marginal, Masked, StateMasked, Thinning, Uniform, chain, generators
from ddjax.processes.staggered import glauber
from ddjax.schedules import Cosine, Linear, LogLinear, Polynomial
from ddjax.solvers import Ancestral, Campbell, FlowEuler, RateEuler, TauLeaping, Tweedie
from ddjax.solvers.rates import Jump, Leap
from ddjax.symbol_schedules import SymbolPolynomial

# A lost symbol becomes 0, 1, or a noise symbol that no data have; never 2.
LOPSIDED = [0.5, 0.1, 0.0, 0.4]
MARGINAL = Marginal(3, Cosine(), probabilities=LOPSIDED)
BAND = Kernel(3, generators.birth_death(3), LogLinear(0.05))
MASKS, UNIFORM = fixed(linear, np.eye(4)[-1]), fixed(linear, np.full(3, 1 / 3))
LOPSIDED_BY_DEFINITION = fixed(cosine, LOPSIDED)
BAND_BY_DEFINITION = kernel(lambda t: 1 - 0.95 * t, generators.birth_death(3).values)
# Solver, what is predicted, and the corruption of a site by definition.
CASES = {
    "euler": (RateEuler(Uniform(3)), "cavity", UNIFORM),
    "flow": (FlowEuler(MARGINAL, corrector=2.0), "posterior", LOPSIDED_BY_DEFINITION),
    "campbell": (Campbell(MARGINAL, eta=0.7), "posterior", LOPSIDED_BY_DEFINITION),
    "tau-leaping": (TauLeaping(Uniform(3)), "posterior", UNIFORM),
    "tau-leaping, ordinal": (TauLeaping(BAND, ordinal=True), "cavity", BAND_BY_DEFINITION),
    "tweedie": (Tweedie(Uniform(3)), "ratio", UNIFORM),
    "tweedie, other noise": (Tweedie(MARGINAL), "ratio", LOPSIDED_BY_DEFINITION),
    "tweedie, masks": (Tweedie(Masked(3)), "ratio", MASKS),
    "euler, masks": (RateEuler(Masked(3)), "ratio", MASKS),
    "euler, hybrid": (RateEuler(Hybrid(3)), "cavity", hybrid(3, 0.1)),
    "euler, kernel": (RateEuler(BAND), "posterior", BAND_BY_DEFINITION),
    "tau-leaping, masks": (TauLeaping(Masked(3)), "posterior", MASKS),
    "tau-leaping, counts": (TauLeaping(Thinning(3), ordinal=True), "deaths", thinning(linear, 3)),
    "flow, uniform": (FlowEuler(Uniform(3)), "velocity", UNIFORM),
    "flow, powers": (FlowEuler(Uniform(3), corrector=2.0, powers=(0.25, 0.5)), "cavity", UNIFORM),
    "flow, masks": (FlowEuler(Masked(3), corrector=2.0), "posterior", MASKS),
    "campbell, uniform": (Campbell(Uniform(3), eta=1.0), "cavity", UNIFORM),
    "campbell, masks": (Campbell(Masked(3), eta=1.0), "posterior", MASKS),
}
every = pytest.mark.parametrize("name", CASES)


def predict(process, kind, x, t):
    prediction = LAW.denoise(process, "posterior" if kind == "deaths" else kind)(x, jnp.full(len(x), t))
    return process.convert(prediction, kind, x, t)


@functools.partial(jax.jit, static_argnums=(0, 1))
def rates(solver, kind, t):
    x = jnp.asarray(all_states(2, solver.process.num_states))
    return solver.rates(predict(solver.process, kind, x, t), x, t)


@functools.partial(jax.jit, static_argnums=(0, 1))
def probabilities(solver, kind, s, t):
    """The law of one step from every joint state, `(states^2, 2, states)`, from log_prob alone."""
    x = jnp.asarray(all_states(2, solver.process.num_states))
    law = solver.law(predict(solver.process, kind, x, t), x, s, t)
    each = jax.vmap(lambda y: law.log_prob(jnp.full_like(x, y)), out_axes=-1)
    return jnp.exp(each(jnp.arange(solver.process.num_states)))


def output(solver, kind, start, times):
    """The law of the output, from the law `start` at the first time: one matrix a step."""
    for t, s in itertools.pairwise(times):
        start = start @ transition(np.asarray(probabilities(solver, kind, s, t)))
    return start


@every
def test_rates_carry_the_law_back(x64, name):
    """To first order in h, q_t (1 + h rates) is q_{t-h}: exactly, without steps, whatever the solver."""
    solver, kind, forward = CASES[name]
    for t in (0.15, 0.8):
        q = law_at(forward, t)
        backward = q @ generator(np.asarray(rates(solver, kind, t)))
        np.testing.assert_allclose(backward, -q @ generator(forward_table(forward, t)), atol=1e-10)


@every
def test_the_law_of_the_output_converges_at_first_order(x64, name):
    """Between two times at which no rate is infinite, from the exact law at the first."""
    solver, kind, forward = CASES[name]
    first, last = 0.85, 0.2
    errors = [
        distance(output(solver, kind, law_at(forward, first), np.linspace(first, last, n + 1)), law_at(forward, last))
        for n in (8, 16, 32)
    ]
    assert errors[0] < 0.12
    np.testing.assert_allclose(np.log2(np.divide(errors[:-1], errors[1:])), 1.0, atol=0.12)


@pytest.mark.slow
@every
def test_from_noise_to_data_it_converges(x64, name):
    """Over the whole range, rates without bound at both ends included; in one step it is the product of marginals."""
    solver, kind, forward = CASES[name]
    errors = [
        distance(output(solver, kind, law_at(forward, 1.0), np.linspace(1.0, 0.0, n + 1)), law_at(forward, 0.0))
        for n in (1, 16, 64, 256)
    ]
    assert (np.diff(errors) < 0).all()
    assert errors[-1] < 0.025
    if kind != "ratio":  # all that a ratio knows is lost at t = 1
        clean = law_at(forward, 0.0).reshape((solver.process.num_states,) * 2)
        exact = distance(np.outer(clean.sum(1), clean.sum(0)), clean)
        assert abs(errors[0] - exact) < (0.02 if solver.process is BAND else 1e-10) or kind == "deaths"


@pytest.mark.slow
@every
def test_steps_of_any_length_are_laws(x64, name):
    solver, kind, _ = CASES[name]
    process = solver.process
    for s, t in ((0.0, 1.0), (0.5, 1.0), (0.0, 1e-6), (0.001, 0.999), (1e-9, 1e-3)):
        p = np.asarray(probabilities(solver, kind, s, t))
        assert (p >= 0).all()
        np.testing.assert_allclose(p.sum(-1), 1.0, atol=1e-9)
        if s == 0 and t < 1:  # nothing but symbols
            np.testing.assert_allclose(p[..., : process.num_symbols].sum(-1), 1.0, atol=1e-9)


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("tweedie")])
def test_tweedie_is_exact_site_by_site(x64, name):
    """The step is the true p(x_s^i | x_t), and so is the marginal of each site."""
    solver, kind, forward = CASES[name]
    x = jnp.asarray(all_states(2, solver.process.num_states))
    possible = law_at(forward, 0.8) > 0
    ours = np.asarray(probabilities(solver, kind, 0.3, 0.8))
    exact = np.asarray(jax.jit(exact_reverse, static_argnums=(0, 1, 3, 4))(LAW, solver.process, x, 0.3, 0.8))
    np.testing.assert_allclose(ours[possible], exact[possible], atol=1e-10)
    shape = (solver.process.num_states,) * 2
    pushed = (law_at(forward, 0.8) @ transition(ours)).reshape(shape)
    true = law_at(forward, 0.3).reshape(shape)
    assert distance(pushed, true) > 1e-3  # jointly only to first order
    for axis in (0, 1):
        np.testing.assert_allclose(pushed.sum(axis), true.sum(axis), atol=1e-10)


@pytest.mark.slow
def test_tweedie_of_a_law_is_the_processs_own_step(x64):
    x = jnp.asarray(all_states(2, 3))
    prediction = predict(Uniform(3), "cavity", x, 0.7)
    ours, own = Tweedie(Uniform(3)).law(prediction, x, 0.2, 0.7), Uniform(3).reverse(prediction, x, 0.2, 0.7)
    np.testing.assert_array_equal(ours.log_prob(x), own.log_prob(x))


@pytest.mark.parametrize(
    ("process", "kind", "forward"),
    [
        (Uniform(3), "cavity", UNIFORM),
        (Masked(3), "posterior", MASKS),
        (BAND, "posterior", BAND_BY_DEFINITION),
        (Hybrid(3), "cavity", hybrid(3, 0.1)),
    ],
    ids=lambda v: type(v).__name__ if dataclasses.is_dataclass(v) else "",
)
def test_the_corrector_leaves_the_law_as_it_is(x64, process, kind, forward):
    solver, x = TauLeaping(process, corrector_steps=1), jnp.asarray(all_states(2, process.num_states))
    corrector = jax.jit(lambda t: solver.corrector_rates(predict(process, kind, x, t), x, t))
    for t in (0.1, 0.6):
        moves = generator(np.asarray(corrector(t)))
        assert np.abs(moves).max() > 0.1
        np.testing.assert_allclose(law_at(forward, t) @ moves, 0.0, atol=1e-12)


def r_star(posterior, z, alpha, slope, pi, eta):
    """Campbell et al. 2024 by their definitions: R* and R_DB given each x_0, averaged; d/dt as papers' time runs."""
    total = np.zeros(len(pi))
    for x0, weight in enumerate(posterior):
        q = alpha * np.eye(len(pi))[x0] + (1 - alpha) * pi
        dq = slope * (np.eye(len(pi))[x0] - pi)
        if q[z] == 0:
            continue
        for j in np.flatnonzero(q):
            rate = max(dq[j] - dq[z], 0) / (np.sum(q > 0) * q[z])
            if z == x0:
                rate += eta * np.sum(pi > 0) * pi[j]
            elif j == x0:
                rate += eta * np.sum(pi > 0) * pi[z] * q[j] / q[z]
            total[j] += weight * rate
    total[z] = 0
    return total


@pytest.mark.parametrize("process", [MARGINAL, Uniform(3), Masked(3)], ids=repr)
def test_campbells_rates_are_their_definition(x64, process):
    pi = np.broadcast_to(np.asarray(process.pi), process.num_states)
    x, t = all_states(2, process.num_states), 0.35
    alpha, slope = (float(f(jnp.asarray(t))) for f in (process.schedule.alpha, process.schedule.sigma_prime))
    posterior = jax.jit(lambda x: predict(process, "posterior", x, t).value)(jnp.asarray(x))
    posterior = np.pad(np.exp(np.asarray(posterior)), [(0, 0), (0, 0), (0, process.num_states - 3)])
    expected = [[r_star(posterior[n, i], x[n, i], alpha, slope, pi, 0.7) for i in (0, 1)] for n in range(len(x))]
    ours = np.asarray(rates(Campbell(process, eta=0.7), "posterior", t))
    seen = np.isin(x, np.flatnonzero(pi)) | (posterior.max(-1) == 1)  # other symbols are themselves
    np.testing.assert_allclose(ours[seen], np.asarray(expected)[seen], rtol=1e-9, atol=1e-10)


def test_closed_forms_of_the_papers(x64):
    """Masks: reveal at (1 + eta alpha) / t, mask again at eta. R* is the flow's velocity for masks and uniform noise.

    (Campbell et al. 2024, appendix F; linear schedule, our t is 1 less theirs.)
    """
    t, eta = 0.3, 0.5
    p, masked = np.stack(enumerated(MASKS).at(t)[2], 1), all_states(2, 4) == 3
    ours = np.asarray(rates(Campbell(Masked(3), eta=eta), "posterior", t))
    np.testing.assert_allclose(ours[masked][:, :3], (1 + eta * (1 - t)) / t * p[masked], rtol=1e-9)
    np.testing.assert_allclose(ours[~masked], eta * np.eye(4)[[3] * (~masked).sum()], rtol=1e-9)
    p, others = np.stack(enumerated(UNIFORM).at(t)[2], 1), np.arange(3) != all_states(2, 3)[..., None]
    for solver in (Campbell(Uniform(3)), FlowEuler(Uniform(3))):
        np.testing.assert_allclose(rates(solver, "posterior", t), np.where(others, p / t, 0.0), rtol=1e-9)


LEAPS = np.array([0, 1, 3]), np.array([[0, 0.4, 0.0, 0.2], [0.3, 0, 0.9, 2e-4], [0.6, 0.0, 1.1, 0]])


def leap_laws():
    """The law of each of the leaps, from log_prob."""
    leap, y = Leap(*(jnp.asarray(v)[:, None] for v in LEAPS)), jnp.arange(4)[:, None, None]
    log_p = jax.jit(jax.vmap(lambda y: leap.log_prob(jnp.broadcast_to(y, (3, 1)))))(y)
    return np.exp(np.asarray(log_p))[..., 0].T


def test_a_leap_is_a_clamped_sum_of_poisson_jumps(x64):
    """Against the sum over all numbers of jumps."""
    counts = np.stack(np.meshgrid(*[np.arange(16)] * 4, indexing="ij"), -1).reshape(-1, 4)
    for p, start, expected in zip(leap_laws(), *LEAPS, strict=True):
        law = np.zeros(4)
        ends = np.clip(start + counts @ (np.arange(4) - start), 0, 3)
        np.add.at(law, ends, scipy.stats.poisson.pmf(counts, expected).prod(-1))
        np.testing.assert_allclose(p, law, atol=1e-11)


@pytest.mark.slow
def test_leaps_are_drawn_from_their_law():
    """Chi-squared."""
    n, table = 20_000, leap_laws()
    many = Leap(*(jnp.repeat(jnp.asarray(v)[None], n, 0) for v in LEAPS))
    draws = np.asarray(jax.jit(many.sample)(random.example_keys(jax.random.key(0), n)))
    counts = np.stack([np.bincount(draws[:, row], minlength=4) for row in range(3)])
    assert ((counts - n * table) ** 2 / (n * table)).sum() < 40  # 9 degrees of freedom: p = 1e-5


@pytest.mark.slow
def test_jumps_are_a_coin_and_a_symbol():
    weights = jnp.asarray([3.0, 0.0, 1.0])
    jump = Jump(jnp.ones((40_000, 1), int), jnp.full((40_000, 1), 0.2), jnp.broadcast_to(weights, (40_000, 1, 3)))
    counts = np.bincount(np.asarray(jump.sample(random.example_keys(jax.random.key(1), 40_000)))[:, 0], minlength=3)
    expected = 40_000 * np.array([0.15, 0.8, 0.05])
    assert np.sum((counts - expected) ** 2 / expected) < 24  # 2 degrees of freedom: p = 6e-6


@pytest.mark.slow
def test_precision_at_a_large_vocabulary():
    """1,024 steps over 50,257 Zipf symbols in float32: the share that is revealed and the law of what is.

    Exact: of masks that are left at t = k h a step reveals 1 / k; Euler and the flow 1 - exp(-1 / k).
    """
    symbols, h = 50_257, 1 / 1024
    zipf = 1 / np.arange(1, symbols + 1) ** 1.1
    zipf /= zipf.sum()
    process, xt = Masked(symbols), jnp.full((1, 1), symbols)
    prediction = Prediction(jnp.log(zipf.astype(np.float32))[None, None], "posterior")
    chance = {
        RateEuler(process): lambda k: -np.expm1(-1 / k),
        TauLeaping(process): lambda k: np.exp(-1 / k) / k,
        FlowEuler(process): lambda k: -np.expm1(-1 / k),
        Campbell(process): lambda k: -np.expm1(-1 / k),
        Tweedie(process): lambda k: 1 / k,
    }
    for solver, reveals in chance.items():
        for k in (1023, 500, 2):
            t = jnp.float32(k * h)
            said = process.convert(prediction, "ratio", xt, t) if isinstance(solver, Tweedie) else prediction
            law = solver.law(said, xt, t - jnp.float32(h), t).law
            np.testing.assert_allclose(float(law.p[0, 0]), reveals(k), rtol=2e-4)
            log_p = np.asarray(jax.nn.log_softmax(jnp.log(law.weights[0, 0, :symbols])))
            np.testing.assert_allclose(log_p, np.log(zipf), atol=2e-4)
            assert law.weights[0, 0, symbols] == 0


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def draw(solver, kind, batch, times):
    process = solver.process
    denoise = lambda xt, t, cond: process.convert(LAW.denoise(process)(xt, t), kind, xt, t)
    return ddjax.sample(jax.random.key(3), denoise, process, shape=(batch, 2), solver=solver, times=times)


@pytest.mark.slow
@every
def test_samples_have_the_law(name):
    """Chi-squared of `ddjax.sample` against the matrices, few steps and many samples."""
    solver, kind, _ = CASES[name]
    process, batch, times = solver.process, 20_000, np.array([1.0, 0.6, 0.25, 0.0])
    x = jnp.asarray(all_states(2, process.num_states))
    prior = np.exp(np.asarray(process.prior((len(x), 2)).log_prob(x).sum(-1)))
    law = output(solver, kind, prior, times)
    out = draw(solver, kind, batch, jnp.asarray(times))
    counts = np.bincount(np.asarray(out.x0) @ [process.num_states, 1], minlength=len(x))
    seen = law > 1e-6
    assert counts[~seen].sum() <= 1
    assert scipy.stats.chi2.sf(np.sum((counts - batch * law)[seen] ** 2 / (batch * law[seen])), seen.sum() - 1) > 1e-4
    assert (np.asarray(out.nfe) == 3).all()
    for rows in (1, 2, 7):
        np.testing.assert_array_equal(draw(solver, kind, rows, jnp.asarray(times)).x0, out.x0[:rows])


@pytest.mark.slow
@pytest.mark.parametrize("ordinal", [False, True])
def test_correctors_mend_the_law(x64, ordinal):
    """Moves at fixed t bring the law nearer to q_s: samples with many of them, against the law at the last time."""
    times, batch = jnp.asarray([1.0, 0.7, 0.4, 0.2]), 20_000
    true = law_at(BAND_BY_DEFINITION, 0.2)

    def law_of(**options):
        solver = TauLeaping(BAND, ordinal=ordinal, **options)
        out = draw(solver, "posterior", batch, times)
        return out, np.bincount(np.asarray(out.x0) @ [3, 1], minlength=9) / batch

    plain, before = law_of()
    fixed, after = law_of(corrector_steps=20, corrector_length=0.1)
    assert (np.asarray(plain.nfe) == 3).all()
    assert (np.asarray(fixed.nfe) == 63).all()
    assert distance(after, true) < 0.5 * distance(before, true)
    late = draw(
        TauLeaping(BAND, corrector_steps=2, corrector_below=0.4), "posterior", 5, jnp.asarray([1.0, 0.7, 0.4, 0.0])
    )
    assert (np.asarray(late.nfe) == 5).all()  # one step of three ends within (0, 0.4]
    alone = draw(
        TauLeaping(BAND, corrector_steps=2, corrector_below=0.4), "posterior", 1, jnp.asarray([1.0, 0.7, 0.4, 0.0])
    )
    np.testing.assert_array_equal(alone.x0, late.x0[:1])


@pytest.mark.slow
def test_one_site_and_times_per_example():
    """A batch of two at different times, one of them in its last step."""
    process, law = Uniform(3), Categorical(1, 3)
    x, t, s = jnp.asarray([[0], [2]]), jnp.asarray([0.5, 0.9]), jnp.asarray([0.0, 0.6])
    solver = RateEuler(process)
    xs, carry, info = solver.step(
        random.example_keys(jax.random.key(0), 2), solver.init(x), x, t, s, law.denoise(process)
    )
    assert xs.shape == (2, 1)
    assert carry == ()
    assert (np.asarray(info.nfe) == 1).all()
    whole = solver.law(law.denoise(process)(x, t), x, s, t).log_prob(x)
    for row in (0, 1):
        own = slice(row, row + 1)
        alone = solver.law(law.denoise(process)(x[own], t[own]), x[own], s[own], t[own]).log_prob(x[own])
        np.testing.assert_allclose(whole[own], alone, rtol=1e-5)


@pytest.mark.slow
def test_bad_arguments_say_what_was_wrong():
    for make, match in (
        (lambda: RateEuler(glauber(3, (2,))), "rates of jumps"),
        (lambda: Tweedie(BAND), "use Ancestral"),
        (lambda: TauLeaping(Masked(3), ordinal=True), "no numbers"),
        (lambda: TauLeaping(Uniform(3), corrector_steps=-1), "corrector_steps"),
        (lambda: TauLeaping(Uniform(3), corrector_length=0.0), "corrector_length"),
        (lambda: FlowEuler(BAND), "is for mixtures"),
        (lambda: FlowEuler(Hybrid(3)), "changes shape"),
        (lambda: FlowEuler(Uniform(3), corrector=-1.0), "not be negative"),
        (lambda: Campbell(Uniform(3), eta=-1.0), "eta"),
        (lambda: Campbell(StateMasked(3, SymbolPolynomial((1.0,) * 3))), "is for mixtures"),
    ):
        with pytest.raises(ValueError, match=match):
            make()
    chained = RateEuler(chain.uniform(3, 4))
    with pytest.raises(ValueError, match="no continuous time"):
        chained.law(Prediction(jnp.zeros((1, 1, 3)), "cavity"), jnp.zeros((1, 1), int), 0.5, 0.75)
    assert hash(FlowEuler(Uniform(3), 1.0, [1.0, 2.0])) == hash(FlowEuler(Uniform(3), 1.0, (1.0, 2.0)))
    assert Ancestral(Masked(3, Polynomial(2.0))) != Ancestral(Masked(3, Linear()))
    assert grids.log_linear(1).shape == (2,)
