"""Regressor guidance: one step's law against the tilted one, enumerated."""

import jax
import jax.numpy as jnp
import mixed_law as law
import numpy as np
import pytest

import ddjax
from ddjax.guidance import regressed
from ddjax.solvers import Ancestral, FirstOrder

SCALE = 1.7
# Where the tangent is the function: linear in numbers and in one-hot vectors.
SLOPE = {"x": 0.8, "a": np.array([0.0, 1.0, -0.6]), "b": np.array([0.9, -0.4, 0.3])}


def linear(xt, t, cond=None):
    return SLOPE["x"] * xt["x"][:, 0] + sum((xt[name][:, 0] * jnp.asarray(SLOPE[name])).sum(-1) for name in ("a", "b"))


def state(n):
    one = {"x": np.full((n, 1), 0.3), "a": np.full((n, 1), 2, np.int32), "b": np.full((n, 1), 2, np.int32)}
    return jax.tree.map(jnp.asarray, one)


def test_a_step_is_the_reverse_step_times_the_likelihood(x64):
    """Symbols reweighed by exp(slope), numbers moved by the variance times the slope: exact for a linear likelihood."""
    process, (t, s) = law.PROCESS, (0.7, 0.4)
    denoise = regressed(law.denoise, process, linear, scale=SCALE)

    @jax.jit
    def both(xt):
        """Log-probabilities of symbols, and moments of the number: of the plain step and the guided one."""
        at = jnp.full(1, t)
        said = denoise(xt, at)
        guided = FirstOrder(process).law(said, xt, s, t, denoise.slopes(xt, at)).laws
        laws = process.reverse(said, xt, s, t).laws, guided
        tell = lambda law: jnp.stack([law.log_prob(jnp.full((1, 1), k))[0, 0] for k in range(3)])
        log_p = {name: jnp.stack([tell(one[name]) for one in laws]) for name in "ab"}
        return log_p, [(one["x"].mean[0, 0], one["x"].std[0, 0]) for one in laws]

    log_p, ((mean, std), (guided_mean, guided_std)) = jax.tree.map(np.asarray, both(state(1)))
    for name in "ab":
        plain, guided = log_p[name]
        want = np.exp(plain + SCALE * SLOPE[name])
        np.testing.assert_allclose(np.exp(guided), want / want.sum(), atol=1e-12)
    x = np.linspace(mean - 8 * std, mean + 8 * std, 4001)
    density = np.exp(-0.5 * ((x - mean) / std) ** 2 + SCALE * SLOPE["x"] * x)
    density /= density.sum()
    np.testing.assert_allclose(guided_mean, (density * x).sum(), rtol=1e-9)
    np.testing.assert_allclose(guided_std**2, (density * x**2).sum() - (density * x).sum() ** 2, rtol=1e-6)


def test_slopes_are_those_of_a_regressor_by_hand(x64):
    """Minus half the squared error of a nonlinear regressor, each example's own target."""
    process, xt = law.PROCESS, state(2)
    target = jnp.asarray([0.2, 1.5])
    says = lambda xt: jnp.tanh(xt["x"][:, 0]) * xt["a"][:, 0, 2] + xt["b"][:, 0, 1] - 0.5 * xt["b"][:, 0, 2]
    wanted = lambda xt, t, cond: -0.5 * (says(xt) - cond) ** 2
    denoise = regressed(law.denoise, process, wanted, scale=2.0)
    slopes = jax.jit(lambda xt, target: denoise.slopes(xt, jnp.full(2, 0.5), target))(xt, target)
    said = np.tanh(0.3) - 0.5
    off = -2.0 * (said - np.asarray(target))
    np.testing.assert_allclose(slopes["x"][:, 0], off / np.cosh(0.3) ** 2, rtol=1e-12)
    np.testing.assert_allclose(slopes["a"][:, 0], off[:, None] * np.array([0.0, 0.0, np.tanh(0.3)]), atol=1e-12)
    np.testing.assert_allclose(slopes["b"][:, 0], off[:, None] * np.array([0.0, 1.0, -0.5]), atol=1e-12)


def test_samples_have_more_of_the_property_and_none_at_scale_zero():
    process, n = law.PROCESS, 4000
    wanted = lambda xt, t, cond: xt["a"][:, 0, 1] * 1.0
    run = lambda denoise, solver: ddjax.sample(
        jax.random.key(0), denoise, process, shape=law.shape(n), solver=solver, times=ddjax.grids.uniform(8)
    )
    assert regressed(law.denoise, process, wanted, scale=0.0) is law.denoise
    plain = run(law.denoise, Ancestral(process)).x0
    none = run(regressed(law.denoise, process, wanted, scale=jnp.zeros(())), FirstOrder(process)).x0
    some = run(regressed(law.denoise, process, wanted, scale=2.0), FirstOrder(process))
    share = lambda x0: float((x0["a"] == 1).mean())
    assert abs(share(none) - share(plain)) < 4 * np.sqrt(0.25 * 2 / n)
    assert share(some.x0) > share(plain) + 0.2
    np.testing.assert_array_equal(some.nfe, 8)


def test_a_denoiser_without_slopes_is_refused():
    with pytest.raises(ValueError, match=r"give the denoiser of guidance\.regressed"):
        ddjax.sample(
            jax.random.key(0), law.denoise, law.PROCESS, shape=law.shape(2), solver=FirstOrder(law.PROCESS),
            times=ddjax.grids.uniform(2),
        )  # fmt: skip
