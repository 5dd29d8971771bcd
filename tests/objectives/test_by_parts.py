"""Losses of parts against formulas written out, at the states that the objective itself drew."""

import jax
import jax.numpy as jnp
import mixed_law as law
import numpy as np
import pytest

from ddjax import grids, objectives
from ddjax.likelihood import nelbo
from ddjax.predictions import bind
from ddjax.processes import Gaussian, Marginal, Product, Uniform
from ddjax.schedules import Cosine, VPCosine

PROCESS, N = law.PROCESS, 6


def capturing(objective):
    """A function of x0 and weights: the loss, and what the network was shown and said."""
    rng = np.random.default_rng(3)
    said = {name: rng.normal(size=(N, 1, k)) for name, k in (("a", 3), ("b", 2))}
    said["x"] = rng.normal(size=(N, 1))

    @jax.jit
    def run(x0, weights):
        seen = []

        def apply(params, xt, t, cond=None, **_):
            seen.append((xt, t))
            return jax.tree.map(jnp.asarray, said)

        loss, _ = objective(jax.random.key(0), apply, {}, x0, weights=weights)
        return loss, *seen[0]

    def captured(x0, weights=None):
        loss, xt, t = jax.tree.map(np.asarray, run(x0, weights))
        return float(loss), xt, t.astype(np.float64), said

    return captured


def schedule(name, t):
    s = PROCESS[name].schedule
    return np.asarray(s.alpha(jnp.asarray(t))), np.asarray(s.sigma(jnp.asarray(t)))


def step_nats(name, clean, seen, logits, s, t):
    """KL of the true from the model's step of one symbol, by transition matrices."""
    p = np.exp(logits - logits.max())
    p /= p.sum()
    if name == "b" and seen < 2:
        p = np.eye(2)[seen]  # what is no mask is known
    symbols = 3 if name == "a" else 2
    q_s, q_ts = law.transition(name, 0.0, s)[:symbols], law.transition(name, s, t)[:, seen]
    joint = q_s * q_ts
    bridge = joint / np.maximum(joint.sum(1, keepdims=True), 1e-300)
    true, model = bridge[clean], p @ bridge
    return sum(q * np.log(q / r) for q, r in zip(true, model, strict=True) if q > 1e-12)


def test_tabddpm_is_the_published_loss(x64):
    """Squared errors of the noise, mean over numbers, and nats of a random step times their number, over columns."""
    x0, steps = law.draw(0, N), 10
    times = np.asarray(grids.uniform(steps))
    loss, xt, t, said = capturing(objectives.tabddpm(PROCESS, "noise+posterior", times=times))(x0)
    alpha, sigma = schedule("x", t)
    noise = (xt["x"][:, 0] - alpha * np.asarray(x0["x"])[:, 0]) / sigma
    squared = (noise - said["x"][:, 0]) ** 2
    nats = np.zeros(N)
    for i in range(N):
        (k,) = np.flatnonzero(np.isclose(times, t[i], atol=1e-6))
        for name in ("a", "b"):
            clean, seen = int(x0[name][i, 0]), int(xt[name][i, 0])
            nats[i] += step_nats(name, clean, seen, said[name][i, 0], times[k + 1], times[k])
    want = squared.mean() + steps * nats.mean() / 2
    np.testing.assert_allclose(loss, want, rtol=1e-6)


def test_digress_is_the_published_loss(x64):
    """Means over nodes and over edges, those of absent ones left out, edges times their weight."""
    process = Product({"nodes": Marginal(3, probabilities=np.array([0.5, 0.2, 0.3])), "edges": Uniform(2)})
    rng = np.random.default_rng(0)
    x0 = {
        "nodes": jnp.asarray(rng.integers(0, 3, (N, 4)), jnp.int32),
        "edges": jnp.asarray(rng.integers(0, 2, (N, 6)), jnp.int32),
    }
    weights = {name: jnp.asarray(rng.uniform(size=v.shape) < 0.7, float) for name, v in x0.items()}
    said = {"nodes": rng.normal(size=(N, 4, 3)), "edges": rng.normal(size=(N, 6, 2))}

    @jax.jit
    def run(x0, weights):
        shown = {}

        def apply(params, xt, t, cond=None, **_):
            shown.update(xt)
            return jax.tree.map(jnp.asarray, said)

        return objectives.digress(process, edges=3.0)(jax.random.key(0), apply, {}, x0, weights=weights)[0], shown

    loss, shown = run(x0, weights)
    want = 0.0
    for name, share in (("nodes", 1.0), ("edges", 3.0)):
        log_p = said[name] - np.log(np.exp(said[name]).sum(-1, keepdims=True))
        nats = -np.take_along_axis(log_p, np.asarray(x0[name])[..., None], -1)[..., 0]
        w = np.asarray(weights[name])
        want += share * (w * nats).sum() / w.sum()
        np.testing.assert_array_equal(np.asarray(shown[name])[w == 0], np.asarray(x0[name])[w == 0])
    np.testing.assert_allclose(loss, want, rtol=1e-10)


def test_the_bound_is_the_sum_of_the_parts(x64):
    """`elbo` trains what `nelbo` measures, nats per site; with the bound as every part's loss `by_parts` is it, too."""
    n = 20_000
    x0 = law.draw(1, n)
    apply = lambda params, xt, t, cond=None, **_: law.denoise(xt, t).value
    denoise = bind(apply, {}, PROCESS, law.KIND)
    bound = nelbo(jax.random.key(2), denoise, PROCESS, x0, num_times=4)
    error = 4 * float(np.std(bound.diffusion)) / np.sqrt(n) / 3 * 2
    loss, metrics = jax.jit(lambda: objectives.elbo(PROCESS, law.KIND)(jax.random.key(0), apply, {}, x0, train=False))()
    assert abs(float(loss) - float(bound.diffusion.mean()) / 3) < error
    np.testing.assert_allclose(metrics["by_time"][:, 0].sum(), loss, rtol=1e-6)
    losses = dict.fromkeys(PROCESS.processes, "bound")
    parts = objectives.by_parts(PROCESS, law.KIND, losses)
    again, metrics = jax.jit(lambda: parts(jax.random.key(0), apply, {}, x0, train=False))()
    assert abs(float(again) / 3 - float(loss)) < 4 * error  # means of one site each, added up; times drawn otherwise
    np.testing.assert_allclose(metrics["by_time"][:, 0].sum(), again, rtol=1e-6)


def test_examples_of_no_weight_cost_nothing():
    x0, captured = law.draw(0, N), capturing(objectives.tabddpm(PROCESS, "noise+posterior"))
    w = jnp.asarray([1.0, 0, 1, 0, 1, 1])
    loss, *_ = captured(x0, w)
    other = jax.tree.map(lambda v: v.at[1].set(v[0]).at[3].set(v[0]), x0)
    np.testing.assert_allclose(captured(other, w)[0], loss, rtol=1e-6)
    assert abs(captured(other)[0] - captured(x0)[0]) > 1e-4


@pytest.mark.parametrize(
    ("losses", "weights", "message"),
    [
        ({"x": "noise"}, None, "losses are of the parts x, a, b, got x"),
        ({"x": "noise", "a": "bound", "b": "noise"}, None, "the loss of part 'b' is one of bound, cross_entropy"),
        (dict.fromkeys("xab", "bound"), {"x": 1.0}, "weights are of the parts"),
    ],
)
def test_what_cannot_be_is_refused(losses, weights, message):
    with pytest.raises(ValueError, match=message):
        objectives.by_parts(
            Product({"x": Gaussian(VPCosine()), "a": Uniform(3, Cosine()), "b": Uniform(2)}),
            "noise+posterior",
            losses,
            weights,
        )


@pytest.mark.parametrize("make", [objectives.tabddpm, objectives.digress, lambda p, k: objectives.by_parts(p, k, {})])
def test_one_process_is_no_product(make):
    with pytest.raises(ValueError, match="of a `Product`; Uniform is one process"):
        make(Uniform(3), "posterior")
