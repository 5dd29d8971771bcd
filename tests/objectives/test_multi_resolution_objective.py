"""The loss at several resolutions: by its definition, and through a network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax import objectives, processes, schedules
from ddjax.denoisers import MultiResolution, functional_init
from ddjax.taps import tap

PROCESS = processes.Gaussian(schedules.VPCosine())


def says(*values):
    """A network of constants: of its lower branches, and of the image."""

    def apply(params, xt, t, cond=None, *, rng=None, train=False):
        for i, value in enumerate(values[:-1]):
            tap(f"output/{i}", jnp.asarray(value))
        return jnp.broadcast_to(jnp.asarray(values[-1]), xt.shape)

    return apply


def test_it_is_the_sum_over_resolutions(x64):
    """In x0 nothing depends on the noise: errors of sums over squares, over their side."""
    rng = np.random.default_rng(0)
    x0, image = rng.normal(size=(3, 4, 8, 2)), rng.normal(size=(4, 8, 2))
    lowest, middle = rng.normal(size=(3, 1, 2, 2)), rng.normal(size=(3, 2, 4, 2))
    objective = objectives.multi_resolution(PROCESS, "x0", coefficients=(0.3, 0.5))
    said = says(lowest, middle, image)
    loss, _ = jax.jit(lambda x0: objective(jax.random.key(0), said, None, x0))(jnp.asarray(x0))

    def squares(ratio):
        out = np.zeros((3, 4 // ratio, 8 // ratio, 2))
        for i, j in np.ndindex(4, 8):
            out[:, i // ratio, j // ratio] += x0[:, i, j] / ratio
        return out

    want = ((x0 - image) ** 2).mean() + 0.3 * ((squares(4) - lowest) ** 2).mean()
    want += 0.5 * ((squares(2) - middle) ** 2).mean()
    np.testing.assert_allclose(loss, want, rtol=1e-12)


def test_a_network_that_says_nothing_below_is_refused():
    objective = objectives.multi_resolution(PROCESS, "noise")
    with pytest.raises(ValueError, match="output/0"):
        jax.eval_shape(lambda x0: objective(jax.random.key(0), says(np.zeros(())), None, x0), jnp.zeros((2, 4, 4, 1)))


@pytest.mark.slow
def test_without_coefficients_it_is_the_plain_loss_and_with_them_it_reaches_the_lower_output():
    options = {"shape": (4, 4, 1), "widths": (8, 4), "depths": (3, 3), "heads": 2, "output_heads": True}
    init, apply = functional_init(lambda rngs: MultiResolution(**options, remat=True, rngs=rngs))
    params, x0 = init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (4, 4, 4, 1))

    def grads(objective):
        value = lambda p: objective(jax.random.key(2), apply, p, x0)[0]
        return jax.jit(jax.value_and_grad(value))(params)

    plain = grads(objectives.gaussian(PROCESS, "noise"))
    none = grads(objectives.multi_resolution(PROCESS, "noise", coefficients=()))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), plain, none)
    some = grads(objectives.multi_resolution(PROCESS, "noise"))[1]
    assert np.abs(plain[1]["branches"]["0"]["out"]["kernel"]).max() == 0
    assert np.abs(some["branches"]["0"]["out"]["kernel"]).max() > 0
