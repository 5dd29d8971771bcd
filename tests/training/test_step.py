import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddjax.training.optimizers import adamw, decays, learning_rate_schedule
from ddjax.training.state import init_state
from ddjax.training.step import make_train_step, split_batch

from . import toy


def run(accumulate, batch, optimizer=None, steps=1, dtype=jnp.float64, objective=toy.objective):
    optimizer = optimizer or optax.sgd(0.1)
    step = jax.jit(make_train_step(objective, toy.apply, optimizer, accumulate=accumulate))
    state = toy.state(optimizer, dtype)
    for _ in range(steps):
        state, metrics = step(state, batch)
    return state, metrics


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [2, 4, 16])
@pytest.mark.parametrize("weighted", [False, True])
def test_accumulation_is_the_one_big_batch(x64, accumulate, weighted):
    batch = toy.batch(dtype=np.float64, weighted=weighted, cond=True)
    one, ones = run(1, batch, steps=3)
    many, manys = run(accumulate, batch, steps=3)
    toy.assert_same(one, many, atol=1e-12)
    toy.assert_same(ones, manys, atol=1e-12)


def test_sgd_step_is_the_gradient_of_the_mean(x64):
    # By hand, without our step: an accumulated sum (rather than a mean) would move A times as far.
    batch = toy.batch(dtype=np.float64)
    start = toy.state(dtype=jnp.float64)
    key = jax.random.fold_in(start.key, 0)
    loss, grads = jax.value_and_grad(lambda p: toy.objective(key, toy.apply, p, jnp.asarray(batch["x0"]))[0])(
        start.params
    )
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, start.params, grads)
    for accumulate in (1, 4):
        state, metrics = run(accumulate, batch)
        toy.assert_same(state.params, expected, atol=1e-12)
        np.testing.assert_allclose(metrics["loss"], loss, atol=1e-12)
        norm = np.sqrt(sum((g**2).sum() for g in toy.leaves(grads)))
        np.testing.assert_allclose(metrics["grad_norm"], norm, atol=1e-12)


def test_microbatches_draw_their_rows_noise(x64):
    seen = []

    def spy(key, apply, params, x0, rows=None, **options):
        jax.debug.callback(lambda index: seen.append(np.array(index)), rows.index, ordered=True)
        assert rows.total == 16
        return toy.objective(key, apply, params, x0, rows=rows, **options)

    run(4, toy.batch(dtype=np.float64), objective=spy)
    jax.effects_barrier()
    np.testing.assert_array_equal(np.stack(seen), np.arange(16).reshape(4, 4).T)


def test_split_keeps_rows_with_their_device():
    # 8 devices in blocks of 2 rows: microbatch 0 must take the first row of every block.
    np.testing.assert_array_equal(split_batch(jnp.arange(16), 2)[0], np.arange(0, 16, 2))


@pytest.mark.slow
def test_a_microbatch_without_weight_has_no_say(x64):
    batch = toy.batch(8, dtype=np.float64, weighted=True)
    batch["weights"][1::2] = 0.0  # all of microbatch 1 of 2: its own mean is 0 / 0
    one, _ = run(1, batch)
    two, metrics = run(2, batch)
    toy.assert_same(one, two, atol=1e-12)
    assert metrics["finite"]
    batch["weights"][:] = 0.0
    for accumulate in (1, 2):
        assert not run(accumulate, batch)[1]["finite"]


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_bad_loss_is_reported(accumulate):
    batch = toy.batch(8)
    assert run(accumulate, batch, dtype=jnp.float32)[1]["finite"]
    batch["x0"][3, 0] = np.nan
    metrics = run(accumulate, batch, dtype=jnp.float32)[1]
    assert not metrics["finite"]
    assert np.isnan(metrics["loss"])


@pytest.mark.slow
def test_steps_draw_different_noise_and_the_same_seed_the_same():
    batch = toy.batch()
    first, second = (run(1, batch, optax.sgd(0.0), steps, jnp.float32)[1]["noise"] for steps in (1, 2))
    assert first != second
    assert first == run(1, batch, optax.sgd(0.0), 1, jnp.float32)[1]["noise"]


def test_malformed_batches_are_refused():
    with pytest.raises(ValueError, match="does not divide into accumulate=3"):
        run(3, toy.batch(16), dtype=jnp.float32)
    with pytest.raises(ValueError, match="leading axis of 16"):
        run(1, {**toy.batch(16), "weights": np.ones(4, np.float32)}, dtype=jnp.float32)
    with pytest.raises(ValueError, match="must have 'x0'"):
        run(1, {"x": np.ones(4)}, dtype=jnp.float32)
    with pytest.raises(ValueError, match="label"):
        run(1, {**toy.batch(), "label": np.ones(16)}, dtype=jnp.float32)
    with pytest.raises(ValueError, match="at least 1"):
        make_train_step(toy.objective, toy.apply, optax.sgd(0.1), accumulate=0)


def test_bfloat16_parameters_keep_their_dtype():
    state, metrics = run(4, toy.batch(dtype=jnp.bfloat16), dtype=jnp.bfloat16)
    assert {a.dtype for a in jax.tree.leaves((state.params, state.ema))} == {jnp.dtype("bfloat16")}
    assert metrics["loss"].dtype == jnp.float32


def test_donation_deletes_the_old_state_and_spares_the_callers_parameters():
    params = toy.init(jax.random.key(0))
    optimizer = adamw(1e-3, 10)
    state = init_state(lambda key: params, optimizer, jax.random.key(1))
    step = jax.jit(make_train_step(toy.objective, toy.apply, optimizer), donate_argnums=0)
    new, _ = step(state, toy.batch())
    assert all(a.is_deleted() for a in jax.tree.leaves((state.params, state.ema, state.opt_state)))
    assert not any(a.is_deleted() for a in jax.tree.leaves((params, new)))


def test_learning_rate_against_numpy():
    n = np.arange(100)
    done = np.clip((n - 10) / 90, 0, 1)
    shapes = {"cosine": 0.5 * (1 + np.cos(np.pi * done)), "linear": 1 - done, "constant": np.ones(100)}
    for name, shape in shapes.items():
        rate = learning_rate_schedule(0.3, 100, 10, name)
        expected = 0.3 * np.minimum(1, (n + 1) / 10) * shape
        np.testing.assert_allclose(rate(n), expected, rtol=1e-5, atol=1e-7)
    assert learning_rate_schedule(0.3, 100)(100) == 0
    assert learning_rate_schedule(0.3, 100, schedule="constant")(0) == np.float32(0.3)
    with pytest.raises(ValueError, match="unknown schedule"):
        learning_rate_schedule(0.3, 100, schedule="cos")
    with pytest.raises(ValueError, match="warm-up"):
        learning_rate_schedule(0.3, 100, warmup=101)


@pytest.mark.slow
def test_adamw_decays_matrices_only_and_clips():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "scale": jnp.ones(())}
    assert decays(params) == {"kernel": True, "bias": False, "scale": False}
    optimizer = adamw(0.1, 10, schedule="constant", weight_decay=0.5)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.05, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0)
    clipped = adamw(0.1, 10, clip=1.0)
    grads = jax.tree.map(lambda p: 100 * jnp.ones_like(p), params)
    _, state = clipped.update(grads, clipped.init(params), params)
    mu = optax.tree.get(state, "mu")
    np.testing.assert_allclose(optax.tree.norm(mu), 0.1, rtol=1e-5)  # (1 - b1) times a gradient of norm 1
