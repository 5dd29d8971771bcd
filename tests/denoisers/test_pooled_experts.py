"""Experts that choose: against plain loops, from the pool and by threshold, and what they learn from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ddjax import auxiliary
from ddjax.denoisers import DiT, functional_init, stack_blocks
from ddjax.denoisers.layers import PooledExperts

WIDTH, HIDDEN, EXPERTS = 8, 6, 4
X = np.random.default_rng(1).normal(size=(3, 10, WIDTH)).astype(np.float32)


def made(**options):
    """A layer with every weight random, and these."""
    make = lambda: PooledExperts(WIDTH, HIDDEN, experts=EXPERTS, **options, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(nnx.eval_shape(make))
    rng = np.random.default_rng(7)
    state = jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), state)
    return nnx.merge(graphdef, state), nnx.to_pure_dict(state)


def silu(x):
    return x / (1 + np.exp(-x))


def expert(p, e, x):
    return (silu(x @ p["gate"][e]) * (x @ p["up"][e])) @ p["down"][e]


def of(p, x):
    """Scores and logits of sites."""
    raw = np.exp(x @ p["router"]["kernel"])
    hidden = silu(x @ p["predictor_in"]["kernel"] + p["predictor_in"]["bias"])
    return raw / raw.sum(-1, keepdims=True), hidden @ p["predictor_out"]["kernel"] + p["predictor_out"]["bias"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"capacity": 1.0}, {"capacity": 2.5, "shared": 1}])
def test_in_training_an_expert_takes_the_best_of_the_batch(options):
    layer, p = made(**options)
    with auxiliary.collect() as collector:
        y = layer(jnp.asarray(X), train=True)
    pool = X.reshape(-1, WIDTH)
    scores, logits = of(p, pool)
    want, took, kept = np.zeros_like(pool), np.zeros((30, EXPERTS)), int(options["capacity"] * 30 / EXPERTS)
    for e in range(EXPERTS):
        for site in sorted(range(30), key=lambda i, e=e: -scores[i, e])[:kept]:
            want[site] += scores[site, e] * expert(p, e, pool[site])
            took[site, e] = 1
    if "shared" in options:
        gate, up, down = (p["shared"][name]["kernel"] for name in ("gate", "up", "down"))
        want += (silu(pool @ gate) * (pool @ up)) @ down
    np.testing.assert_allclose(y, want.reshape(X.shape), atol=2e-5)
    found, q = collector.found(), 1 / (1 + np.exp(-logits))
    entropy = -(took * np.log(q) + (1 - took) * np.log(1 - q))
    np.testing.assert_allclose(found.losses["expert_capacity_loss"], 0.01 * entropy.reshape(3, -1).mean(1), rtol=1e-4)
    level, above = 1 - options["capacity"] / EXPERTS, logits - p["threshold"]
    quantile = np.where(above > 0, level * above, (level - 1) * above)
    np.testing.assert_allclose(found.losses["expert_threshold_loss"], 0.01 * quantile.reshape(3, -1).mean(1), rtol=1e-4)
    missed = took[above <= 0].sum() / took.sum()
    np.testing.assert_allclose(found.reports["expert_missed"].mean(), missed, rtol=1e-5)


@pytest.mark.parametrize("room", [EXPERTS, 0.8])
def test_afterwards_a_site_goes_where_its_logit_exceeds_the_threshold(room, jit):
    layer, p = made(capacity=1.0, room=room)
    y, alone = jit(lambda x: (layer(x), layer(x[1:2])))(X)
    most = min(10, int(np.ceil(room * 10 / EXPERTS)))
    want = np.zeros_like(X)
    for b in range(3):
        scores, logits = of(p, X[b])
        for e in range(EXPERTS):
            wanted = [i for i in range(10) if logits[i, e] > p["threshold"][e]]
            for site in sorted(wanted, key=lambda i, e=e, scores=scores: -scores[i, e])[:most]:
                want[b, site] += scores[site, e] * expert(p, e, X[b, site])
    np.testing.assert_allclose(y, want, atol=2e-5)
    np.testing.assert_allclose(alone[0], want[1], atol=2e-5)  # whatever else is in the batch


@pytest.mark.slow
def test_the_threshold_learns_the_share_and_the_output_does_not_move_the_predictor():
    layer, _ = made(capacity=1.0)
    graphdef, state = nnx.split(layer)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(4, 100, WIDTH)), jnp.float32)

    def losses(state):
        with auxiliary.collect() as collector:
            y = nnx.merge(graphdef, state)(x, train=True)
        return (y**2).mean(), collector.found().losses["expert_threshold_loss"].mean()

    moved = nnx.to_pure_dict(jax.grad(lambda s: losses(s)[0])(state))
    for name in ("predictor_in", "predictor_out", "threshold"):
        assert max(np.abs(g).max() for g in jax.tree.leaves(moved[name])) == 0
    assert all(np.abs(moved[name]).max() > 0 for name in ("gate", "up", "down"))
    step = jax.jit(lambda s: jax.tree.map(lambda a, g: a - 100.0 * g, s, jax.grad(lambda s: losses(s)[1])(s)))
    for _ in range(600):
        state = step(state)
    p = nnx.to_pure_dict(state)
    share = (of(p, np.asarray(x).reshape(-1, WIDTH))[1] > p["threshold"]).mean(0)
    np.testing.assert_allclose(share, 1 / EXPERTS, atol=0.02)


@pytest.mark.slow
def test_in_a_network_all_of_it_learns_scanned_or_not(noise, jit):
    options = {"mlp": "pooled", "experts": {"experts": EXPERTS, "capacity": 1.5}}
    sizes = {"shape": (4, 4, 1), "patch": 2, "width": 8, "depth": 2, "heads": 2}
    x = np.random.default_rng(3).normal(size=(4, 4, 4, 1)).astype(np.float32)
    t, found = np.float32([0.1, 0.4, 0.6, 0.9]), []
    for more in ({}, {"scan": True}, {"remat": True}):
        init, apply = functional_init(lambda rngs, more=more: DiT(**sizes, **options, **more, rngs=rngs))
        if not more:
            params = noise(jax.eval_shape(init, jax.random.key(0)))

        def loss(p, apply=apply):
            with auxiliary.collect() as collector:
                y = apply(p, x, t, train=True)
            return (y**2).mean() + sum(v.mean() for v in collector.found().losses.values())

        value, grads = jit(jax.value_and_grad(loss))(stack_blocks(params) if "scan" in more else params)
        found.append((value, grads if "scan" in more else stack_blocks(grads)))
        plain = jit(apply)(stack_blocks(params) if "scan" in more else params, x, t)
        alone = jit(apply)(stack_blocks(params) if "scan" in more else params, x[1:2], t[1:2])
        np.testing.assert_allclose(alone[0], plain[1], atol=1e-4)
    for path, g in jax.tree_util.tree_leaves_with_path(found[0][1]):
        assert np.abs(g).max() > 1e-6, path
    for other in found[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), other, found[0])


def test_errors():
    for options in ({"capacity": 4.0}, {"capacity": 0.0}, {"room": 0.0}, {"shared": -1}):
        with pytest.raises(ValueError, match="expected 0 < capacity < experts"):
            made(**options)
