"""A mixture of experts against a plain loop, and what it tells the training step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ddjax import auxiliary
from ddjax.denoisers import TextTransformer, functional
from ddjax.denoisers.layers import Experts
from ddjax.objectives import cross_entropy
from ddjax.processes import Masked
from ddjax.schedules import Linear
from ddjax.training import init_state, make_train_step, optimizer

WIDTH, HIDDEN = 8, 6


def made(**options):
    return Experts(WIDTH, HIDDEN, rngs=nnx.Rngs(0), **options)


def silu(x):
    return x / (1 + np.exp(-x))


def by_loop(layer, x, capacity):
    """One example after the other, one choice after the other: outputs, balance, share of choices dropped."""
    p = {name: np.asarray(getattr(layer, name)[...], np.float64) for name in ("gate", "up", "down")}
    router = np.asarray(layer.router.kernel[...], np.float64)
    outputs, balances, dropped = [], [], []
    for example in np.asarray(x, np.float64):
        logits = example @ router
        probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        chosen = np.argsort(-probabilities, axis=-1, kind="stable")[:, : layer.top_k]
        room = min(len(example), int(np.ceil(capacity * len(example) * layer.top_k / layer.experts)))
        taken, y, lost = np.zeros(layer.experts, int), np.zeros_like(example), 0
        for rank in range(layer.top_k):
            for site, x_site in enumerate(example):
                expert = chosen[site, rank]
                if taken[expert] == room:
                    lost += 1
                    continue
                taken[expert] += 1
                weight = probabilities[site, expert]
                weight /= probabilities[site, chosen[site]].sum() if layer.normalised else 1
                y[site] += weight * (silu(x_site @ p["gate"][expert]) * (x_site @ p["up"][expert])) @ p["down"][expert]
        if layer.shared is not None:
            gate, up, down = (np.asarray(getattr(layer.shared, name).kernel[...]) for name in ("gate", "up", "down"))
            y += (silu(example @ gate) * (example @ up)) @ down
        share = np.bincount(chosen.ravel(), minlength=layer.experts) / chosen.size
        outputs.append(y)
        balances.append(layer.experts * (share * probabilities.mean(0)).sum())
        dropped.append(lost / chosen.size)
    return np.array(outputs), np.array(balances), np.array(dropped)


@pytest.mark.parametrize(
    "options",
    [
        {"experts": 4, "top_k": 2, "capacity": 0.7},  # many are dropped, of both ranks
        {"experts": 4, "top_k": 2, "capacity": 1.0, "normalised": False},
        {"experts": 4, "top_k": 1, "capacity": 1.0, "shared": 2},
        {"experts": 3, "top_k": 3, "capacity": 1.0},  # all of everything
    ],
)
def test_it_is_the_loop(options, jit):
    layer = made(**options)
    x = np.random.default_rng(1).normal(size=(3, 10, WIDTH)).astype(np.float32)

    @jit
    def run(x):
        with auxiliary.collect() as collector:
            y = layer(x)
        return y, collector.found(), layer(x[1:2])

    y, found, alone = run(x)
    want, balance, dropped = by_loop(layer, x, options["capacity"])
    np.testing.assert_allclose(y, want, atol=2e-5)
    np.testing.assert_allclose(found.reports["expert_balance"], balance, rtol=1e-5)
    np.testing.assert_allclose(found.losses["expert_balance_loss"], 0.01 * balance, rtol=1e-5)
    np.testing.assert_allclose(found.reports["expert_dropped"], dropped, atol=1e-6)
    if options["capacity"] < 1:
        assert 0.2 < dropped.mean() < 0.8
    np.testing.assert_allclose(alone[0], y[1], atol=1e-6)  # neighbours take no place


def test_over_the_batch_it_is_the_loss_of_one_long_example():
    """DiT-MoE's: shares and probabilities are means over all sites of the batch."""
    layer = made(experts=4, top_k=2, capacity=2.0, normalised=False, balance=0.5, balance_over="batch")
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 10, WIDTH)), jnp.float32)
    with auxiliary.collect() as collector:
        layer(x)
    _, balance, _ = by_loop(layer, x.reshape(1, 30, WIDTH), 2.0)
    _, each, _ = by_loop(layer, x, 2.0)
    np.testing.assert_allclose(collector.found().losses["expert_balance_loss"], np.repeat(0.5 * balance, 3), rtol=1e-5)
    assert abs(each.mean() - balance[0]) > 1e-3
    with pytest.raises(ValueError, match='expected "example" or "batch"'):
        made(balance_over="all")


def test_what_cannot_be_is_refused():
    for options in ({"top_k": 9}, {"top_k": 0}, {"capacity": 0.0}, {"shared": -1}, {"balance": -1.0}):
        with pytest.raises(ValueError, match="1 <= top_k <= experts"):
            made(**options)
    with pytest.raises(ValueError, match='options of mlp="experts" or "pooled", not of mlp=\'gated\''):
        network(mlp="gated", experts={"experts": 4})


def network(**options):
    sizes = {"length": 8, "symbols_in": 6, "symbols_out": 5, "width": 16, "depth": 2, "heads": 2, "mlp_width": 8}
    options = {"mlp": "experts", "experts": {"experts": 4, "top_k": 2}, **options}
    return functional(TextTransformer(**sizes, **options, rngs=nnx.Rngs(0)))


def one_step(options, accumulate=1, weighted=False):
    apply, params = network(**options)
    descent = optimizer("adamw", 1e-2, 10)
    objective = cross_entropy(Masked(5, Linear()), "posterior")
    step = jax.jit(make_train_step(objective, apply, descent, accumulate=accumulate))
    rng = np.random.default_rng(0)
    batch = {"x0": rng.integers(0, 5, (8, 8)).astype(np.int32)}
    if weighted:
        batch["weights"] = rng.uniform(0.5, 2.0, (8, 8)).astype(np.float32)
    return step(init_state(lambda key: params, descent, jax.random.key(1)), batch)


@pytest.mark.slow
def test_its_loss_is_added_and_reported_alike_however_the_step_is_cut():
    options = {"experts": 4, "top_k": 2, "balance": 0.5}
    _, metrics = one_step({"experts": options}, weighted=True)
    _, without = one_step({"experts": {**options, "balance": 0.0}}, weighted=True)
    assert metrics["expert_balance"] > 0.9
    added = metrics["expert_balance_loss"]
    np.testing.assert_allclose(added, 0.5 * metrics["expert_balance"], rtol=1e-6)
    np.testing.assert_allclose(metrics["loss"], without["loss"] + added, rtol=1e-6)
    ways = ({"remat": "full"}, {"scan": True}, {"scan": True, "remat": "dots"})
    for other, accumulate in [({}, 4), *((way, 1) for way in ways)]:
        _, again = one_step({"experts": options, **other}, accumulate, weighted=True)
        assert again.keys() == metrics.keys()
        for name in metrics:
            np.testing.assert_allclose(again[name], metrics[name], rtol=2e-5, err_msg=f"{name} {other} {accumulate}")


@pytest.mark.slow
def test_the_router_learns_from_the_balance_loss():
    """New blocks pass their input on, so at first nothing else reaches the router."""
    apply, params = network(experts={"experts": 4, "top_k": 2, "balance": 1.0})
    x = jnp.asarray(np.random.default_rng(0).integers(0, 5, (4, 8)), jnp.int32)

    def loss(params):
        with auxiliary.collect() as collector:
            apply(params, x, jnp.full(4, 0.5))
        return collector.found().losses["expert_balance_loss"].mean()

    gradient = jax.grad(loss)(params)["stack"]["blocks"]["0"]["mlp"]["router"]["kernel"]
    assert np.abs(gradient).max() > 1e-4


@pytest.mark.slow
def test_told_inside_a_later_transformation_is_an_error():
    layer = made()
    x = jnp.zeros((2, 4, WIDTH))
    with auxiliary.collect(), pytest.raises(ValueError, match="entered after collecting began"):
        jax.vmap(layer)(x[:, None])
    assert jax.vmap(layer)(x[:, None]).shape == (2, 1, 4, WIDTH)  # nobody collects


def test_its_options_compare_by_value():
    first, second = (network()[0] for _ in range(2))
    assert first == second != network(experts={"experts": 4, "top_k": 1})[0]
