"""The optimum of every coupling is the exact posterior mean; pairs cost the sum of their two."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax import random
from ddjax.fixtures import CoupledMixture, GaussianMixture
from ddjax.objectives import gaussian, independent, interpolant, paired
from ddjax.paths import Noise, Residual, Straight
from ddjax.processes import Gaussian, Interpolant
from ddjax.schedules import CondOT

LAW, ROWS = CoupledMixture(GaussianMixture(4, 2, scale=0.5)), 20_000


def batch():
    x0, x1 = LAW.sample(random.example_keys(jax.random.key(0), ROWS))
    return x0, {"x1": x1, "cond": jnp.arange(ROWS)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("process", "kind", "error"),
    [
        (Interpolant(Straight(Noise(1.0, 1.0, 1.0))), "velocity+noise", None),
        (Interpolant(Residual(Noise(0.5, 1.0, 0.0))), "residual+noise", None),
        (Interpolant(Straight(Noise(0.7))), "noise+x0", "x0+x1"),
        (Interpolant(Straight(Noise(0.7))), "noise", None),
        (Interpolant(Straight()), "velocity", None),
    ],
)
def test_the_exact_network_is_the_optimum(process, kind, error):
    """The gradient there, in an offset of each output and a slope in x_t, is zero within the draws' spread."""
    x0, cond = batch()
    # Away from the ends, where another kind's error would be divided by a small weight.
    density = None if error is None else lambda u: 0.2 + 0.6 * u
    objective = interpolant(process, kind, paired(), error=error, density=density)

    def apply(params, xt, t, cond, *, rng=None, train=False):
        assert cond.shape == (ROWS,)  # the network does not see x1
        exact = LAW.denoise(process, kind)(xt, t).value
        wrong = params["offset"] + params["slope"] * xt.reshape(xt.shape + (1,) * (exact.ndim - 2))
        return exact + wrong

    params = {name: jnp.zeros(2 if "+" in kind else 1) for name in ("offset", "slope")}
    loss, grads = jax.jit(
        jax.value_and_grad(lambda p: objective(jax.random.key(1), apply, p, x0, cond, train=False)[0])
    )(params)
    scale = 4.5 * 2 * np.sqrt(float(loss) / ROWS) * (3.0 if error else 1.0)
    assert float(loss) > 0.01
    assert (np.abs(grads["offset"]) < scale).all(), (grads, scale)
    assert (np.abs(grads["slope"]) < 1.5 * scale).all(), (grads, scale)


@pytest.mark.slow
def test_an_independent_gaussian_end_is_flow_matching():
    """The same expected loss as `gaussian` under CondOT, whatever the network says."""

    def apply(params, xt, t, cond, *, rng=None, train=False):
        return jnp.tanh(xt) + t[:, None]

    x0, _ = batch()
    ours = interpolant(Interpolant(Straight(), source_std=1.0), "velocity", independent())
    theirs = gaussian(Gaussian(CondOT()), "velocity", density=lambda u: u)
    a, b = (float(f(jax.random.key(2), apply, {}, x0, train=False)[0]) for f in (ours, theirs))
    assert abs(a - b) < 0.05


def test_a_coupling_may_be_any_function_and_show_what_it_likes():
    """Colourless noise around the negative of x0, weighed at chosen times; by hand, plain mean squares."""
    process = Interpolant(Straight(Noise(0.5, 1.0, 0.0)))

    def negative(keys, x0, cond):
        return -x0, {"x1": -x0, "label": cond}

    def apply(params, xt, t, cond, *, rng=None, train=False):
        assert set(cond) == {"x1", "label"}
        return params * xt

    x0, _ = batch()
    objective = interpolant(
        process, "x0", negative, weighting=lambda t: 3.0 * jnp.ones_like(t), density=lambda u: 0.2 + 0.0 * u
    )
    square = np.mean(np.asarray(x0) ** 2)
    loss = objective(jax.random.key(1), apply, 0.0, x0, jnp.arange(ROWS), train=False)[0]
    np.testing.assert_allclose(loss, 3.0 * square, rtol=1e-5)
    # x_t = 0.8 x0 - 0.2 x0 + 0.1 z
    loss = objective(jax.random.key(1), apply, 1.0, x0, jnp.arange(ROWS), train=False)[0]
    np.testing.assert_allclose(loss, 3.0 * (0.4**2 * square + 0.1**2), rtol=0.01)


def test_errors():
    process, (x0, cond) = Interpolant(Straight(Noise(0.7))), batch()
    with pytest.raises(ValueError, match="does not understand"):
        interpolant(process, "edm", paired())
    with pytest.raises(ValueError, match="finds x1 in the batch"):
        paired()(None, x0, None)
    with pytest.raises(ValueError, match="must have one"):
        paired()(None, x0, {"x1": x0[:, :1]})
    assert paired(show=True)(None, x0, cond)[1] is cond
