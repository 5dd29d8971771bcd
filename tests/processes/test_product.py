"""Numbers and symbols side by side: the bound is the entropy, a chain's law is the enumerated one."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import mixed_law as law
import numpy as np
import pytest

import ddjax
from ddjax.likelihood import nelbo
from ddjax.predictions import Prediction, bind
from ddjax.processes import Gaussian, Masked, Product, Uniform
from ddjax.sampling import Observed, stream
from ddjax.solvers import DDIM, Ancestral, Churned, Heun, Parts, dpm_solver_pp

PROCESS = law.PROCESS


def normals(order):
    z, w = np.polynomial.hermite_e.hermegauss(order)
    return z, w / w.sum()


def every(order):
    """All clean states (symbols enumerated, the number by quadrature) with all noises, and their probabilities."""
    z, w = normals(order)
    a, b, i, j, at, bt = (v.ravel() for v in np.meshgrid(*map(np.arange, (3, 2, order, order, 3, 3)), indexing="ij"))
    x0 = {"x": law.MEAN[a, b] + law.STD * z[i], "a": a.astype(np.int32), "b": b.astype(np.int32)}
    seen = {"a": at.astype(np.int32), "b": bt.astype(np.int32)}
    return jax.tree.map(lambda v: jnp.asarray(v)[:, None], (x0, seen)), z[j], law.P[a, b] * w[i] * w[j]


@pytest.mark.slow
def test_the_bound_of_the_exact_denoiser_is_the_entropy(x64):
    """Every expectation by quadrature, in float64: what is left is the ends' distance from noise and from data."""
    (x0, seen), noise, weights = every(14)
    low, high = PROCESS.t_range
    assert low > 0.0
    assert high < 1.0

    def states(t):
        t = jnp.full(len(noise), t)
        joint = PROCESS.marginal(x0, t)
        xt = {"x": joint.laws["x"].mean + joint.laws["x"].std * noise[:, None], **seen}
        # The number is drawn by quadrature: its density is in the weights. That of the symbols is the process's.
        q = jnp.exp(sum(joint.laws[name].log_prob(xt[name])[:, 0] for name in ("a", "b")))
        return xt, t, weights * q

    @jax.jit
    def diffusion(u):
        t, slope = PROCESS.time_at(u, (low, high))
        xt, t, w = states(t)
        kl = PROCESS.path_kl(x0, law.denoise(xt, t), xt, t)
        return slope * (w * sum(v[:, 0] for v in kl.values())).sum()

    u, w = np.polynomial.legendre.leggauss(32)
    parts = [sum(w / 2 * np.array([diffusion((v + 1) / 2) for v in u]))]
    xt, t, w = states(low)
    ends = PROCESS.reconstruction(x0, law.denoise(xt, t), xt, t), PROCESS.prior_kl(x0, jnp.full(len(noise), high))
    parts += [(w * sum(v[:, 0] for v in ends[0].values())).sum()]
    parts += [(weights / 9 * sum(v[:, 0] for v in ends[1].values())).sum()]  # the prior's is of no noised state
    np.testing.assert_allclose(sum(map(float, parts)), law.entropy(), atol=6e-5)


@pytest.mark.slow
def test_nelbo_adds_up_its_parts(x64):
    """The evaluator, on a chain and in continuous time, by Monte Carlo; known parts cost nothing."""
    n = 4000
    x0 = law.draw(0, n)
    bound = nelbo(jax.random.key(0), law.denoise, PROCESS, x0, num_times=16)
    assert bound.dims == 3
    error = 4 * float(np.std(bound.total)) / math.sqrt(n)
    assert abs(float(bound.total.mean()) - law.entropy()) < error < 0.25
    known = jax.tree.map(lambda v: jnp.ones(v.shape, bool), x0)
    log_w = (
        np.log(law.P[:, np.asarray(x0["b"])[:, 0]].T)
        - 0.5 * ((np.asarray(x0["x"]) - law.MEAN[:, np.asarray(x0["b"])[:, 0]].T) / law.STD) ** 2
    )
    exact = -(log_w - np.log(np.exp(log_w).sum(1, keepdims=True)))[np.arange(n), np.asarray(x0["a"])[:, 0]]
    # Shown clean at every time, b is no mask and x has no noise; the denoiser is told so.
    told = lambda xt, t, cond: law_of_a(xt, t)
    free = nelbo(
        jax.random.key(1), told, PROCESS, x0, num_times=16, known={**known, "a": ~known["a"]}, t_range=(1e-3, 0.999)
    )
    assert abs(float(free.total.mean()) - exact.mean()) < 4 * float(np.std(free.total - exact)) / math.sqrt(n) + 1e-3


def law_of_a(xt, t):
    """p(a | x, b, a_t), x and b clean."""
    keep = PROCESS["a"].schedule.alpha(t)[:, None]
    b = xt["b"][:, 0]
    log_p = jnp.log(jnp.asarray(law.P))[:, b].T - 0.5 * ((xt["x"] - jnp.asarray(law.MEAN)[:, b].T) / law.STD) ** 2
    log_p = log_p + jnp.log(keep * (xt["a"] == jnp.arange(3)) + (1 - keep) / 3)
    none = jnp.zeros((len(t), 1, 2))
    return Prediction({"x": xt["x"], "a": log_p[:, None], "b": none}, law.KIND)


def chain_of_symbols(times):
    """The law of (a, b) after ancestral steps along times, by enumeration and quadrature over the number."""
    z, w = normals(60)
    schedule = PROCESS["x"].schedule
    alpha, sigma = (np.asarray(f(jnp.asarray(times)), np.float64) for f in (schedule.alpha, schedule.sigma))
    x, a, b, p = np.repeat(z, 3), np.tile(np.arange(3), 60), np.full(180, 2), np.repeat(w, 3) / 3
    for k, (t, s) in enumerate(itertools.pairwise(times)):
        q_a, q_b = (clean(name, t)[:, seen].T for name, seen in (("a", a), ("b", b)))
        full = lambda v, x=x: np.full(len(x), v)
        p_a, p_b, x0 = law.posterior(np, x, full(alpha[k]), full(sigma[k]), q_a, q_b)
        joint = p[:, None, None] * step(p_a, "a", a, s, t)[:, :, None] * step(p_b, "b", b, s, t)[:, None]
        if k == len(times) - 2:
            return joint.sum(0)[:, :2]
        ratio = alpha[k] / sigma[k] / (alpha[k + 1] / sigma[k + 1])
        mean = sigma[k + 1] * ratio / sigma[k] * x + alpha[k + 1] * (1 - ratio**2) * x0
        zs, ws = normals(20)
        x = mean[:, None] + sigma[k + 1] * math.sqrt(1 - ratio**2) * zs
        i, x, a, b = (v.ravel() for v in np.broadcast_arrays(*index(len(mean), 20), x[:, :, None, None], *alphabets()))
        p = joint[i, a, b] * np.tile(np.repeat(ws, 9), len(mean))
    return None


def index(states, noises):
    return (np.arange(states).reshape(states, 1, 1, 1) * np.ones((1, noises, 3, 3), int),)


def alphabets():
    return np.arange(3)[:, None], np.arange(3)


def clean(name, t):
    """q(x_t | x_0), a row for each clean symbol."""
    return law.transition(name, 0.0, t)[: 3 if name == "a" else 2]


def step(p, name, seen, s, t):
    """The law of a symbol at s, a row for each state: the bridge q(x_s | x_t, x_0), averaged over the predicted x_0."""
    joint = clean(name, s)[None] * law.transition(name, s, t)[:, seen].T[:, None]
    total = joint.sum(2, keepdims=True)
    return (p[:, :, None] * np.where(total > 0, joint / np.maximum(total, 1e-300), 0.0)).sum(1)


@pytest.mark.parametrize("times", [(1.0, 0.0), (1.0, 0.55, 0.0)], ids=["one", "two"])
@pytest.mark.parametrize("make", [Ancestral, Parts], ids=lambda make: make.__name__)
def test_a_few_ancestral_steps_draw_the_enumerated_law(make, times):
    n = 20_000
    drawn = ddjax.sample(
        jax.random.key(len(times)), law.denoise, PROCESS, shape=law.shape(n), solver=make(PROCESS), times=times
    )
    assert {name: v.shape for name, v in drawn.x0.items()} == law.shape(n)
    np.testing.assert_array_equal(drawn.nfe, len(times) - 1)
    a, b = (np.asarray(drawn.x0[name])[:, 0] for name in ("a", "b"))
    found = np.bincount(2 * a + b, minlength=6).reshape(3, 2) / n
    want = chain_of_symbols(times)
    np.testing.assert_allclose(want.sum(), 1.0, atol=1e-6)
    np.testing.assert_allclose(found, want, atol=4 * np.sqrt(want.max() / n))
    if len(times) == 2:  # from noise that says nothing, each part by itself
        np.testing.assert_allclose(want, law.P.sum(1)[:, None] * law.P.sum(0), atol=1e-3)


@pytest.mark.slow
def test_many_steps_draw_the_joint_law():
    n, steps = 5_000, 96
    solver = Parts(PROCESS, {"x": dpm_solver_pp(PROCESS["x"])})
    for chosen in (Ancestral(PROCESS), solver):
        x0 = ddjax.sample(
            jax.random.key(0), law.denoise, PROCESS, shape=law.shape(n), solver=chosen, times=ddjax.grids.uniform(steps)
        ).x0
        x, a, b = (np.asarray(x0[name])[:, 0] for name in ("x", "a", "b"))
        found = np.bincount(2 * a + b, minlength=6).reshape(3, 2) / n
        np.testing.assert_allclose(found, law.P, atol=0.03)
        for i in range(3):
            for j in range(2):
                own = x[(a == i) & (b == j)]
                assert abs(own.mean() - law.MEAN[i, j]) < 0.03 + 4 * law.STD / len(own) ** 0.5
                assert abs(own.std() - law.STD) < 0.03 + 3 * law.STD / len(own) ** 0.5


@pytest.mark.slow
def test_a_sample_is_the_same_in_any_batch_and_by_any_loop():
    run = functools.partial(
        ddjax.sample, jax.random.key(3), law.denoise, PROCESS, solver=Parts(PROCESS), times=ddjax.grids.uniform(3)
    )
    whole = run(shape=law.shape(4), trajectory=True)
    some = run(shape=law.shape(2), rows=np.array([2, 3]))
    for name in PROCESS.processes:
        assert whole.trajectory[name].shape == (4, 4, 1)
        np.testing.assert_array_equal(whole.trajectory[name][-1], whole.x0[name])
        np.testing.assert_allclose(some.x0[name], whole.x0[name][2:], atol=1e-6)
    parts = list(
        stream(
            jax.random.key(3), law.denoise, PROCESS, shape=law.shape(4), solver=Parts(PROCESS),
            times=ddjax.grids.uniform(3),
        )
    )  # fmt: skip
    slow = run(shape=law.shape(4), python_loop=True)
    own = run(shape=law.shape(4), times=np.tile(np.linspace(1.0, 0.0, 4, dtype=np.float32), (4, 1)))
    for name in PROCESS.processes:
        np.testing.assert_array_equal(parts[-1].x[name], whole.x0[name])
        np.testing.assert_array_equal(slow.x0[name], whole.x0[name])
        np.testing.assert_allclose(own.x0[name], whole.x0[name], atol=1e-5)


@pytest.mark.slow
def test_known_parts_are_shown():
    n = 2000
    x0 = law.draw(1, n)
    mask = {name: jnp.full((n, 1), name == "b") for name in PROCESS.processes}
    observed = Observed(mask, jax.tree.map(lambda v: jnp.zeros_like(v), x0))
    drawn = ddjax.sample(
        jax.random.key(0), law.denoise, PROCESS, shape=law.shape(n), solver=Ancestral(PROCESS),
        times=ddjax.grids.uniform(24), observed=observed,
    ).x0  # fmt: skip
    assert (np.asarray(drawn["b"]) == 0).all()
    found = np.bincount(np.asarray(drawn["a"])[:, 0], minlength=3) / n
    np.testing.assert_allclose(found, law.P[:, 0] / law.P[:, 0].sum(), atol=0.1)
    assert abs(found[0] - law.P[0].sum()) > 0.2  # far from a's own law


def test_solvers_that_ask_again_are_refused():
    run = functools.partial(
        ddjax.sample, jax.random.key(0), law.denoise, PROCESS, shape=law.shape(2), times=ddjax.grids.uniform(4)
    )
    for solver in (Heun(PROCESS["x"]), Churned(DDIM(PROCESS["x"]), 0.5)):
        with pytest.raises(ValueError, match="part 'x' asks the network again"):
            run(solver=Parts(PROCESS, {"x": solver}))
    with pytest.raises(ValueError, match="'y' is none of the parts x, a, b"):
        Parts(PROCESS, {"y": Ancestral(PROCESS["x"])})


def test_predictions_are_converted_part_by_part():
    xt, t = law.draw(2, 5), jnp.full(5, 0.4)

    @jax.jit
    def there_and_back(xt):
        said = law.denoise(xt, t)
        other = PROCESS.convert(said, "noise+cavity", xt, t)
        return said, other, PROCESS.convert(other, law.KIND, xt, t)

    said, other, back = there_and_back(xt)
    alpha, sigma = (float(f(jnp.float32(0.4))) for f in (PROCESS["x"].schedule.alpha, PROCESS["x"].schedule.sigma))
    np.testing.assert_allclose(other.value["x"], (xt["x"] - alpha * said.value["x"]) / sigma, rtol=1e-5)
    np.testing.assert_allclose(back.value["x"], said.value["x"], atol=1e-4)
    for name in ("a", "b"):
        np.testing.assert_allclose(np.exp(back.value[name]), np.exp(said.value[name]), atol=1e-5)
    assert PROCESS.kind_of("noise+posterior", "b") == "posterior"
    with pytest.raises(ValueError, match="does not understand a prediction of kind 'noise'"):
        bind(lambda *_: None, {}, PROCESS, "noise")
    with pytest.raises(ValueError, match="must return a dict of x, a, b"):
        bind(lambda params, xt, t, cond: {"x": xt["x"]}, {}, PROCESS, law.KIND)(xt, t)


def test_it_is_hashable_and_refuses_what_is_no_part():
    assert hash(PROCESS) == hash(Product(dict(PROCESS.parts)))
    assert Product(dict(PROCESS.parts)) == PROCESS
    assert Product({"a": Uniform(3), "b": Masked(2)}).kinds == Uniform(3).kinds
    with pytest.raises(ValueError, match="needs parts"):
        Product({})
    with pytest.raises(ValueError, match="is a Product itself"):
        Product({"p": PROCESS})
    with pytest.raises(ValueError, match="clock='y' is none of the parts"):
        Product({"x": Gaussian()}, clock="y")
    with pytest.raises(ValueError, match="Chain has times of its own"):
        Product({"a": ddjax.processes.chain.discretized_gaussian(8)})
