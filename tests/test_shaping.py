"""Temperature, top-k, top-p and repetition against the laws made by hand, and what they cost."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import mixed_law
import numpy as np
import pytest
from enumerated import LAW, exact, softmax

import ddjax
from ddjax import grids, shaping
from ddjax.fixtures.categorical import all_states
from ddjax.predictions import Prediction, evaluations
from ddjax.processes import Gaussian, Masked, Product, Uniform
from ddjax.schedules import Cosine, Polynomial
from ddjax.solvers import Ancestral

MASKED, UNIFORM = Masked(3, Cosine()), Uniform(3, Polynomial(2.0))
T = 0.6


def fixed(logits):
    """A denoiser that says the same cavity for every state."""
    logits = jnp.asarray(logits)
    return lambda xt, t, cond=None: Prediction(jnp.broadcast_to(logits, (*xt.shape, logits.shape[-1])), "cavity")


def law(denoise, xt, t=T):
    """The probabilities that a denoiser states."""
    xt = jnp.asarray(xt)
    prediction = jax.jit(lambda d, xt: d(xt, jnp.full(len(xt), t), None))(denoise, xt)
    return softmax(np.asarray(prediction.value))


def by_sorting(p, mass):
    """The smallest set of likeliest symbols with this mass, by a stable sort; normalised."""
    order = np.argsort(-p, axis=-1, kind="stable")
    out = np.zeros_like(p)
    for row, ranks, kept in zip(p.reshape(-1, p.shape[-1]), order.reshape(-1, p.shape[-1]),
                                out.reshape(-1, p.shape[-1]), strict=True):  # fmt: skip
        count = 1 + np.searchsorted(np.cumsum(row[ranks]), mass)
        kept[ranks[:count]] = row[ranks[:count]]
    return out / out.sum(-1, keepdims=True)


@pytest.mark.parametrize("process", [MASKED, UNIFORM], ids=["masked", "uniform"])
@pytest.mark.parametrize("kind", ["posterior", "cavity", "ratio"])
def test_the_cavity_is_tempered_whatever_is_predicted(x64, process, kind):
    """And the reverse step is the one of that cavity, by Bayes' rule on matrices."""
    xt, tau, s = all_states(2, process.num_states), 0.4, 0.3
    cold = shaping.with_temperature(LAW.denoise(process, kind), process, tau)
    cavity = np.exp(np.asarray(exact(process, "cavity", T)))
    asked = np.ones(xt.shape, bool) if process is UNIFORM else xt == 3  # a shown symbol of `Masked` is what it is
    expected = cavity ** (1 / tau) / (cavity ** (1 / tau)).sum(-1, keepdims=True)
    np.testing.assert_allclose(law(cold, xt)[asked], expected[asked], atol=1e-10)
    shapes = jax.eval_shape(cold, jnp.asarray(xt), jnp.ones(len(xt)))
    assert shapes.kind == ("posterior" if process is MASKED and kind == "posterior" else "cavity")
    if kind != "posterior":
        return
    alpha = {MASKED: lambda t: 1 - np.sin(np.pi * t / 2), UNIFORM: lambda t: 1 - t**2}[process]
    pi = np.eye(4)[3] if process is MASKED else np.full(3, 1 / 3)
    q = lambda a: a * np.eye(len(pi)) + (1 - a) * pi

    @jax.jit
    def step(denoise, x):
        reverse = process.reverse(denoise(x, jnp.full(len(x), T), None), x, s, T)
        return jnp.stack([jnp.exp(reverse.log_prob(jnp.full_like(x, k))) for k in range(len(pi))], -1)

    model = np.asarray(step(cold, jnp.asarray(xt)))
    joint = (expected @ q(alpha(s))[:3]) * q(alpha(T) / alpha(s))[:, xt].transpose(1, 2, 0)
    np.testing.assert_allclose(model[asked], (joint / joint.sum(-1, keepdims=True))[asked], atol=1e-10)


def test_temperature_zero_is_the_likeliest_symbol_ties_shared():
    xt = np.zeros((1, 1), np.int32)
    share = law(shaping.with_temperature(fixed([1.0, 3.0, -1.0, 3.0]), Masked(4), 0.0), xt)
    np.testing.assert_allclose(share[0, 0], [0, 0.5, 0, 0.5])
    hot = law(shaping.with_temperature(fixed([0.0, -1e30, 1.0]), MASKED, 50.0), xt)[0, 0]
    np.testing.assert_allclose(hot, softmax(np.array([0.0, -np.inf, 0.02])), atol=1e-6)
    slope = jax.grad(lambda tau: shaping.Tempered(tau)(jnp.log(jnp.asarray([0.2, 0.5, 0.3])), None).sum())
    assert np.isfinite([slope(0.0), slope(0.7)]).all()


P = np.random.default_rng(0).dirichlet(np.full(9, 0.5), size=(4, 3))
TIED = np.array([1, 4, 2, 4, 4, 1, 2, 4, 2]) / 24


def test_top_k_keeps_k(x64):
    xt = np.zeros((4, 3), np.int32)
    for k in (1, 2, 8):
        kept = law(shaping.with_top_k(lambda xt, t, cond: Prediction(jnp.log(P), "cavity"), Masked(9), k), xt)
        order = np.argsort(-P, -1)
        expected = np.where(np.argsort(order, -1) < k, P, 0)
        np.testing.assert_allclose(kept, expected / expected.sum(-1, keepdims=True), atol=1e-12)
        of_equals = law(shaping.with_top_k(fixed(np.log(TIED)), Masked(9), k), xt[:1, :1])[0, 0]
        assert (of_equals > 0).sum() == k
        first = np.argsort(-TIED, kind="stable")[:k]
        np.testing.assert_allclose(of_equals[first], TIED[first] / TIED[first].sum(), atol=1e-12)


def test_top_p_is_the_smallest_set_that_has_the_mass(x64):
    """One program for all masses; the greatest of equals go in the order of their numbers."""
    xt = jnp.zeros((4, 3), jnp.int32)
    run = jax.jit(lambda p, log_p: shaping.TopP(p)(log_p, xt))
    both = np.concatenate([P, np.broadcast_to(TIED, (1, 3, 9))])
    for mass in (1e-9, 0.1, 0.4, 0.55, 0.69, 0.9, 0.999, 1 - 1e-12, 1.0):
        found = softmax(np.asarray(run(mass, jnp.log(both))))
        np.testing.assert_allclose(found, by_sorting(both, mass - 1e-15), atol=1e-12)
    halves = np.array([[0.125, 0.5, 0.0, 0.25, 0.125]])  # exact in binary: the mass is reached, not passed
    for mass, count in ((0.5, 1), (0.75, 2), (0.875, 3), (1.0, 4)):
        kept = run(jnp.float32(mass), jnp.log2(jnp.asarray(halves, jnp.float32)) * np.log(2).astype(np.float32))
        assert (np.asarray(kept) > -1e20).sum() == count
        assert kept.dtype == jnp.float32


@pytest.mark.slow
def test_top_p_of_many_symbols_in_float32():
    """Zipf's law over 50,257 symbols: the size of the nucleus is right to a few symbols, and no sort was made."""
    log_p = jax.nn.log_softmax(-jnp.log(jnp.arange(1.0, 50258.0)[::-1]))[None, None]
    run = jax.jit(lambda p, log_p: shaping.TopP(p)(log_p, None))
    assert "sort" not in run.lower(jnp.float32(0.9), log_p).as_text()
    exact = np.sort(np.exp(np.asarray(log_p[0, 0], np.float64)))[::-1]
    for mass in (0.1, 0.5, 0.9, 0.99):
        size = int((np.asarray(run(mass, log_p)) > -1e20).sum())
        right = 1 + np.searchsorted(np.cumsum(exact / exact.sum()), mass)
        assert abs(size - right) <= 1 + 1e-4 * right


def test_a_penalty_for_what_other_sites_show(x64):
    p, xt = np.array([0.5, 0.2, 0.2, 0.1]), np.array([[0, 2, 4, 2], [4, 4, 4, 1]])
    found = law(shaping.with_repetition_penalty(fixed(np.log(p)), Masked(4), 3.0), xt)
    found_uniform = law(shaping.with_repetition_penalty(fixed(np.log(p)), Uniform(4), 3.0), xt % 4)
    for shown, result in ((xt, found), (xt % 4, found_uniform)):
        for b in range(2):
            for i in range(4):
                others = {int(k) for j, k in enumerate(shown[b]) if j != i and k < 4}
                expected = np.array([q / 3 if k in others else q for k, q in enumerate(p)])
                np.testing.assert_allclose(result[b, i], expected / expected.sum(), atol=1e-12)


def test_no_symbol_of_a_neighbour(x64):
    p, xt = np.array([0.5, 0.3, 0.2]), np.array([[0, 3, 1, 3, 3, 2]])
    found = law(shaping.without_repeats(fixed(np.log(p)), MASKED), xt)[0]
    for i in range(6):
        near = {int(xt[0, j]) for j in (i - 1, i + 1) if 0 <= j < 6}
        expected = np.array([0 if k in near else q for k, q in enumerate(p)])
        np.testing.assert_allclose(found[i], expected / expected.sum(), atol=1e-12)
    sure = law(shaping.without_repeats(fixed([0.0, -1e30, -1e30]), MASKED), [[0, 3, 3]])[0]
    np.testing.assert_allclose(sure[1], [1, 0, 0])  # nothing else is possible: the law as it was
    with pytest.raises(ValueError, match=r"sequences \(batch, length\)"):
        law(shaping.without_repeats(fixed(np.log(p)), MASKED), np.zeros((1, 2, 2), int))


def test_all_in_order(x64):
    """Repetition before temperature, temperature before top-k, top-k before top-p."""
    p, xt = np.array([0.4, 0.3, 0.2, 0.06, 0.04]), np.array([[0, 5]])
    found = law(shaping.shaped(fixed(np.log(p)), Masked(5), temperature=0.5, top_k=3, top_p=0.9, repetition=4.0), xt)[
        0, 1
    ]
    q = np.where(np.arange(5) == 0, p / 4, p) ** 2  # 0.01, 0.09, 0.04, 0.0036, 0.0016
    q = np.array([0.01, 0.09, 0.04, 0, 0]) / 0.14
    assert q[1] + q[2] > 0.9
    np.testing.assert_allclose(found, np.array([0, q[1], q[2], 0, 0]) / (q[1] + q[2]), atol=1e-12)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Heads:
    """A denoiser and its planner in one network."""

    params: Any = 0.5

    calls = 1

    def both(self, xt, t, cond=None):
        return fixed([0.0, 1.0, 2.0])(xt, t), Prediction(xt + self.params, "planner")

    def __call__(self, xt, t, cond=None):
        return self.both(xt, t, cond)[0]

    def planner(self, xt, t, cond=None):
        return self.both(xt, t, cond)[1]


@dataclasses.dataclass(frozen=True)
class Pair(Heads):
    """In two networks."""

    denoise: Any = None

    def both(self, xt, t, cond=None):
        return self.denoise(xt, t, cond), Prediction(xt + self.params, "planner")


def test_a_planner_stays_as_it_was():
    xt, t = jnp.asarray([[3, 1]]), jnp.full(1, T)
    for heads in (Heads(), Pair(0.5, fixed([0.0, 1.0, 2.0]))):
        cold = shaping.with_temperature(heads, MASKED, 0.5)
        found = softmax(np.asarray(cold(xt, t).value))
        np.testing.assert_allclose(found[0, 0], softmax(np.array([0.0, 2.0, 4.0])), atol=1e-6)
        what, where = cold.both(xt, t)
        np.testing.assert_array_equal(what.value, cold(xt, t).value)
        np.testing.assert_array_equal(where.value, xt + 0.5)
        np.testing.assert_array_equal(cold.planner(xt, t).value, xt + 0.5)
        assert cold.calls == 1
    assert not hasattr(shaping.with_temperature(fixed([0.0, 1.0, 2.0]), MASKED, 0.5), "planner")


def test_off_is_the_denoiser_itself_and_cost_is_kept():
    denoise = LAW.denoise(MASKED)
    assert shaping.shaped(denoise, MASKED) is denoise
    assert shaping.with_temperature(denoise, MASKED, 1) is denoise
    assert shaping.with_top_k(denoise, MASKED, 3) is denoise
    assert shaping.with_top_p(denoise, MASKED, 1.0) is denoise
    assert shaping.with_repetition_penalty(denoise, MASKED, 1.0) is denoise
    guided = ddjax.guidance.classifier_free(denoise, null=0, scale=2.0)
    both = shaping.shaped(guided, MASKED, temperature=0.5, top_k=2, top_p=0.5, repetition=2.0, no_repeats=True)
    assert evaluations(both) == 2
    assert evaluations(shaping.with_top_k(denoise, MASKED, 1)) == 1


def sampler(logits):
    """A function that draws from a network of these logits, and the traces of the network."""
    traces = []

    def apply(params, xt, t, cond):
        traces.append(1)
        return jnp.broadcast_to(params, (*xt.shape, 3))

    bound = ddjax.bind(apply, jnp.asarray(logits), MASKED, "posterior")

    def draw(batch=6000, sites=1, **options):
        denoise, settings = shaping.shaped(bound, MASKED, **options), {"solver": Ancestral(MASKED)}
        settings |= {"shape": (batch, sites), "times": grids.uniform(2)}
        return np.asarray(ddjax.sample(jax.random.key(1), denoise, MASKED, **settings).x0)

    return draw, traces


def test_a_new_value_does_not_compile_again_and_samples_have_the_tempered_law():
    """One site: the sample's law is the tempered one."""
    logits = np.array([1.0, 0.0, -0.5], np.float32)
    draw, traces = sampler(logits)
    for tau in (0.5, 2.0):
        share = np.bincount(draw(temperature=tau, top_p=0.99)[:, 0], minlength=3) / 6000
        expected = by_sorting(softmax(logits / tau)[None], 0.99)[0]
        assert (np.abs(share - expected) < 4.5 * np.sqrt(expected * (1 - expected) / 6000) + 1e-9).all()
    first = len(traces)
    whole = draw(temperature=0.1, top_p=0.5)
    assert len(traces) == first
    assert (whole == 0).all()


@pytest.mark.slow
def test_samples_do_not_depend_on_the_batch():
    draw, _ = sampler(np.array([1.0, 0.0, -0.5], np.float32))
    some = [draw(batch, temperature=2.0, repetition=1.5, top_p=0.9, sites=3) for batch in (7, 2, 1)]
    for part in some[1:]:
        np.testing.assert_array_equal(part, some[0][: len(part)])


def test_masks_that_ignore_the_time_go_on_ignoring_it():
    """So that a solver may keep predictions (`Cached`): the time is no input of the compiled program."""
    bound = ddjax.bind(lambda params, xt, t, cond: params[xt], jnp.ones((4, 3)), MASKED, "posterior")
    blocks = ddjax.processes.in_blocks(MASKED, 4, 2)
    for process in (MASKED, blocks):
        shaped = shaping.shaped(bound, process, temperature=0.5, top_k=2, top_p=0.9, repetition=1.2, no_repeats=True)
        xt = jnp.full((1, 4), 3)
        program = jax.make_jaxpr(lambda t, xt=xt, shaped=shaped: shaped(xt, t).value)(jnp.ones(1))
        assert program.jaxpr.invars[0] not in [v for e in program.jaxpr.eqns for v in e.invars if hasattr(v, "aval")]


def test_parts_of_symbols_are_shaped_and_numbers_stay():
    """The law by enumeration: each symbol's cavity, given the number and the other symbol, to the power 1 / tau."""
    tau, t, process = 0.4, 0.6, mixed_law.PROCESS
    a, b = (v.ravel() for v in np.meshgrid(np.arange(3), np.arange(3)))
    xt = {"x": np.linspace(-1, 1, 9, dtype=np.float32), "a": a.astype(np.int32), "b": b.astype(np.int32)}
    state = jax.tree.map(lambda v: v[:, None], xt)

    @jax.jit
    def run(state):
        shaped = (
            shaping.with_temperature(mixed_law.denoise, process, tau), shaping.with_top_k(mixed_law.denoise, process, 2)
        )  # fmt: skip
        return [denoise(state, jnp.full(9, t)) for denoise in (mixed_law.denoise, *shaped)]

    plain, cold, two = run(state)
    assert cold.kind == "x0+cavity"
    np.testing.assert_array_equal(cold.value["x"], plain.value["x"])
    schedule = process["x"].schedule
    alpha, sigma = (np.full(9, f(jnp.asarray(t))) for f in (schedule.alpha, schedule.sigma))
    q_a, q_b = mixed_law.transition("a", 0, t)[:, a].T, np.where((b == 2)[:, None], 1.0, b[:, None] == np.arange(2))
    cavity_a = mixed_law.posterior(np, xt["x"].astype(np.float64), alpha, sigma, np.ones((9, 3)), q_b)[0]
    cavity_b = mixed_law.posterior(np, xt["x"].astype(np.float64), alpha, sigma, q_a, np.ones((9, 2)))[1]
    for name, cavity, asked in (("a", cavity_a, a >= 0), ("b", cavity_b, b == 2)):
        expected = cavity ** (1 / tau) / (cavity ** (1 / tau)).sum(-1, keepdims=True)
        np.testing.assert_allclose(softmax(np.asarray(cold.value[name]))[asked, 0], expected[asked], atol=1e-5)
    assert shaping.with_top_k(mixed_law.denoise, process, 3) is mixed_law.denoise
    assert ((softmax(np.asarray(two.value["a"])) > 0).sum(-1) == 2).all()
    masks = Product({"x": Gaussian(), "b": Masked(2)})
    said = lambda xt, t, cond=None: Prediction({"x": xt["x"], "b": jnp.zeros((9, 1, 2))}, "noise+posterior")
    assert jax.eval_shape(shaping.with_temperature(said, masks, tau), state, xt["x"]).kind == "noise+posterior"
    with pytest.raises(ValueError, match="top_k shapes laws over symbols, and Product has none"):
        shaping.with_top_k(said, Product({"x": Gaussian()}), 2)


def test_errors():
    denoise = LAW.denoise(MASKED)
    for options, words in (
        ({"temperature": -0.1}, "temperature must be 0 or more, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be 0 or more, got nan"),
        ({"top_k": 0}, "top_k must be a whole number, 1 or more, got 0"),
        ({"top_k": 2.5}, "top_k must be a whole number"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\]"),
        ({"repetition": 0}, "repetition must be positive, got 0"),
    ):
        with pytest.raises(ValueError, match=words):
            shaping.shaped(denoise, MASKED, **options)
    gaussian = Gaussian(ddjax.schedules.VPCosine())
    with pytest.raises(ValueError, match="top_k shapes laws over symbols, and Gaussian has none"):
        shaping.shaped(denoise, gaussian, top_k=2)
    with pytest.raises(ValueError, match="no_repeats shapes laws"):
        shaping.shaped(denoise, gaussian, no_repeats=True)
