import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ddjax.training.step import Ema, make_train_step, update_ema

from . import toy


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ema", "decay"),
    [
        (Ema(0.9, warmup=False), lambda n: 0.9),
        (Ema(0.3, warmup=True), lambda n: min(0.3, (1 + n) / (10 + n))),  # the warm-up ends after 4 updates
        (Ema(), lambda n: (1 + n) / (10 + n)),
        (lambda n: 1 / (n + 2), lambda n: 1 / (n + 2)),
    ],
    ids=["constant", "warmup", "default", "callable"],
)
def test_ema_against_a_loop(x64, ema, decay):
    step = jax.jit(make_train_step(toy.objective, toy.apply, optax.sgd(0.1), ema=ema))
    state = toy.state(dtype=jnp.float64)
    expected = toy.leaves(state.params)
    for n in range(8):
        state, _ = step(state, toy.batch(dtype=np.float64, seed=n))
        d = decay(n)
        expected = [d * e + (1 - d) * p for e, p in zip(expected, toy.leaves(state.params), strict=True)]
        for e, a in zip(expected, toy.leaves(state.ema), strict=True):
            np.testing.assert_allclose(a, e, rtol=0, atol=1e-14)


def test_no_decay_is_the_parameters_themselves_in_their_own_buffers():
    step = jax.jit(make_train_step(toy.objective, toy.apply, optax.sgd(0.1), ema=Ema(0.0)), donate_argnums=0)
    state = toy.state()
    for n in range(3):  # donated again and again: a shared buffer would crash here
        state, _ = step(state, toy.batch(seed=n))
        toy.assert_same(state.params, state.ema)


def test_ema_leaves_parameters_dtype_and_checks_its_decay():
    half = {"w": jnp.ones(3, jnp.bfloat16)}
    assert update_ema(half, half, 0.9)["w"].dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="decay"):
        Ema(1.5)
