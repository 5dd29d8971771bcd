"""An interpolant from Gaussian noise as a Gaussian process: schedules and predictions against linear regression."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddjax.paths import Noise, Residual, Straight, Trigonometric
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian, InBasis, Interpolant, Orthogonal
from ddjax.processes.gaussian import gaussian_of
from ddjax.schedules import CondOT, OfPath, OUBridge, PolynomialPath
from ddjax.schedules import Trigonometric as Circle
from ddjax.solvers import DDIM, Brownian, EulerMaruyama, Nested, dpm_solver_pp

PATHS = [
    Straight(), Straight(Noise(0.7)), Trigonometric(Noise(1.3, 1.0, 1.0)), Residual(Noise(0.5, 1.0, 0.0)),
    Straight(Noise(0.6, 0.7, 0.5)),
]  # fmt: skip
every_path = pytest.mark.parametrize("path", PATHS, ids=repr)
some_paths = pytest.mark.parametrize(
    "path", [PATHS[1], *(pytest.param(p, marks=pytest.mark.slow) for p in PATHS if p != PATHS[1])], ids=repr
)
STD, MEAN, WIDTH = 0.8, 0.3, 0.6  # of the source; of the data


def regression(path, t, xt):
    """Posterior means of x0, x1 and z given x_t, all normal, and what follows from their definitions."""
    t = np.asarray(t, float)
    a, b, g = (float(f(jnp.asarray(t))) for f in (path.alpha, path.beta, path.gamma))
    variances, means, weights = np.asarray([WIDTH**2, STD**2, 1.0]), np.asarray([MEAN, 0.0, 0.0]), np.asarray([a, b, g])
    total = weights**2 @ variances
    x0, x1, z = (m + w * v / total * (xt - a * MEAN) for m, w, v in zip(means, weights, variances, strict=True))
    noise = (xt - a * x0) / np.hypot(STD * b, g)
    found = {"x0": x0, "x1": x1, "noise": z, "residual": x1 - x0, "score": (a * x0 - xt) / (g**2 + (STD * b) ** 2)}
    return found, noise


@some_paths
def test_the_schedule_is_the_width_of_the_noise(x64, path):
    schedule, t = OfPath(path, STD), jnp.asarray([1e-9, 0.03, 0.31, 0.5, 0.83, 0.97])
    np.testing.assert_allclose(schedule.sigma(t) ** 2, STD**2 * path.beta(t) ** 2 + path.gamma(t) ** 2, rtol=1e-14)
    for f, slope in ((schedule.alpha, schedule.alpha_prime), (schedule.sigma, schedule.sigma_prime)):
        np.testing.assert_allclose(slope(t), jax.vmap(jax.grad(f))(t), rtol=1e-10, atol=1e-15)
    np.testing.assert_allclose(schedule.time(schedule.log_snr(t)), t, rtol=1e-12)
    back = jax.vmap(jax.grad(schedule.time))(schedule.log_snr(t[1:]))
    np.testing.assert_allclose(back, 1.0 / schedule.log_snr_prime(t[1:]), rtol=1e-9)
    np.testing.assert_array_equal(schedule.time(jnp.asarray([jnp.inf, -jnp.inf])), [0.0, 1.0])
    # The ends as limits, from a little inside.
    ends, inside = jnp.asarray([0.0, 1.0]), jnp.asarray([1e-12, 1.0 - 1e-12])
    here, near = schedule.sigma_prime(ends), schedule.sigma_prime(inside)
    finite = np.isfinite(here)
    np.testing.assert_allclose(here[finite], near[finite], rtol=1e-4, atol=1e-11)
    assert (np.abs(near[~finite]) > 1e3).all()


@pytest.mark.slow
def test_known_schedules(x64):
    t = jnp.linspace(0.0, 1.0, 11)
    for path, other in (
        (Straight(), CondOT()),
        (Straight(Noise(0.7)), OUBridge(0.0, 0.7, 0.7)),
        (Residual(), PolynomialPath()),
        (Trigonometric(), Circle()),
    ):
        ours = OfPath(path)
        for name in ("alpha", "sigma", "alpha_prime", "sigma_prime"):
            found, expected = getattr(ours, name)(t[1:]), getattr(other, name)(t[1:])
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12, err_msg=f"{path} {name}")
        snr = jnp.asarray([40.0, 9.0, 0.3, -5.0])
        np.testing.assert_allclose(ours.time(snr), other.time(snr), rtol=1e-10, atol=1e-15)


@pytest.mark.slow
@every_path
def test_every_statement_is_enough(x64, path):
    """Each as every other, of the interpolant and of its Gaussian process, against linear regression.

    And all kinds of Gaussian processes but "noise", which is z.
    """
    process = Interpolant(path, source_std=STD, data_std=1.7)
    kinds = dict.fromkeys((*process.kinds, "score", "v", "edm"))
    gaussian, xt = process.as_gaussian(), jnp.asarray([[0.7, -1.1]])

    for t in (0.04, 0.5, 0.93):
        values, noise = regression(path, t, np.asarray(xt))
        slopes = [jax.grad(f)(t) for f in (path.alpha, path.beta, path.gamma)]
        values["velocity"] = sum(w * values[n] for w, n in zip(slopes, ("x0", "x1", "noise"), strict=True))
        alpha, sigma = float(path.alpha(t)), np.hypot(STD * float(path.beta(t)), float(path.gamma(t)))
        values["v"] = alpha * noise - sigma * values["x0"]
        values["edm"] = (sigma * values["x0"] / 1.7 - 1.7 * alpha * noise) / np.hypot(sigma, 1.7 * alpha)
        asked = [(process, name, values) for name in kinds if "+" not in name]
        theirs = values | {"noise": noise}
        asked += [(gaussian, name, theirs) for name in ("x0", "noise", "score", "velocity", "v", "edm")]
        for kind in kinds:
            value = [values[name] for name in kind.split("+")]
            said = Prediction(value[0] if len(value) == 1 else jnp.stack(value, -1), kind)
            for of, name, expected in asked:
                found = of.convert(said, name, xt, jnp.asarray(t)).value
                np.testing.assert_allclose(found, expected[name], rtol=1e-9, atol=1e-10, err_msg=f"{kind}: {name}, {t}")
    for kind in ("x0", "velocity", "score", "v", "edm"):  # one statement, and the step of the interpolant's own
        said = Prediction(jnp.asarray(values[kind]), kind)
        for part, name in zip(process.parts(said, xt, jnp.asarray(t)), ("x0", "x1", "noise"), strict=True):
            np.testing.assert_allclose(part, values[name], rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(process.prior((1,), t).std ** 2, (1.7 * alpha) ** 2 + sigma**2, rtol=1e-12)


@some_paths
def test_at_the_ends(x64, path):
    """At t = 1 the state is noise, and a statement of that says nothing of x0; at t = 0 it is data."""
    process = Interpolant(path, source_std=STD)
    gaussian = process.as_gaussian()
    one, zero = jnp.ones(1), jnp.zeros(1)
    xt = jnp.asarray([[0.7, -1.1]])
    _, noise = regression(path, 1.0, np.asarray(xt))
    for kind, value in (("x0", jnp.full_like(xt, MEAN)), ("x1", xt), ("residual", xt - MEAN)):
        if kind == "residual" and path.gamma(one)[0] > 0:
            continue  # x_t is more than x_1 there
        found = {n: gaussian.convert(Prediction(value, kind), n, xt, one).value for n in ("x0", "noise", "velocity")}
        x0 = 0.0 if kind == "x1" else MEAN
        np.testing.assert_allclose(found["x0"], x0, atol=1e-12)
        np.testing.assert_allclose(found["noise"], noise, rtol=1e-12)
        slope = gaussian.schedule.sigma_prime(1.0 - 1e-13)
        expected = path.alpha_prime(one) * x0 + slope * noise
        np.testing.assert_allclose(found["velocity"], expected, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(gaussian.convert(Prediction(found["velocity"], "velocity"), "noise", xt, one).value,
                                   noise, rtol=1e-9)  # fmt: skip
        if kind == "x0" and path.noise is not None and path.alpha_prime(one)[0] != 0:  # of a pair, what tells x0
            z = path.gamma(one) / gaussian.schedule.sigma(one) * noise
            said = Prediction(jnp.stack([z, found["velocity"]], -1), "noise+velocity")
            np.testing.assert_allclose(gaussian.convert(said, "x0", xt, one).value, MEAN, rtol=1e-9)
    for kind in [k for k in process.kinds if "+" not in k]:
        for t in (zero, one):
            for name in ("x0", "noise", "velocity"):
                found = gaussian.convert(Prediction(xt, kind), name, xt, t).value
                assert np.isfinite(found).all() or (name == "velocity" and t[0] == 0), (kind, name, t)
        if kind in ("x1", "noise", "residual"):
            np.testing.assert_allclose(gaussian.convert(Prediction(0 * xt, kind), "noise", xt, zero).value, 0.0)


class Late(Straight):
    """The ends change places late, when the noise in between is gone."""

    def beta(self, t):
        """t^8."""
        return t**8

    def alpha(self, t):
        """1 - t^8."""
        return 1.0 - t**8


def test_errors():
    given = Interpolant(Straight(Noise(0.7)))
    for make in (DDIM, EulerMaruyama, dpm_solver_pp, Brownian, lambda p: Nested(DDIM(p))):
        with pytest.raises(ValueError, match="x1 of this interpolant comes with the data"):
            make(given)
    assert gaussian_of(InBasis(Gaussian(CondOT()), Orthogonal(np.eye(2)))) is None
    gaussian = Gaussian(CondOT())
    assert gaussian_of(gaussian) is gaussian
    with pytest.raises(ValueError, match="alpha / sigma does not fall"):
        DDIM(Interpolant(Late(Noise(2.0, 1.0, 1.0)), source_std=0.5))
    with pytest.raises(ValueError, match="source_std must be positive"):
        OfPath(Straight(), 0.0)
    seen = Interpolant(Straight(Noise(0.7)), source_std=1.0).as_gaussian()
    x, t = jnp.ones((1, 2)), jnp.full(1, 0.5)
    for asked in ("x0", "noise"):
        with pytest.raises(ValueError, match="does not understand a prediction of kind 'posterior'"):
            seen.convert(Prediction(x, "posterior"), asked, x, t)
    bare = Interpolant(source_std=1.0)
    for process, said in ((bare, "noise"), (given, "v"), (Interpolant(), "score")):  # of no z; of no Gaussian process
        with pytest.raises(ValueError, match=f"does not understand a prediction of kind '{said}'"):
            process.convert(Prediction(x, said), "x0", x, t)
    with pytest.raises(ValueError, match="does not understand a prediction of kind 'x1'"):
        seen.convert(Prediction(x, "x0"), "x1", x, t)
    assert DDIM(Interpolant(source_std=2.0)) == DDIM(Interpolant(source_std=2.0)) != DDIM(Interpolant(source_std=1.0))
