"""A mixture whose denoiser is cheap, walks of a solver over it, and fine solutions by another library."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.integrate

import ddjax
from ddjax import grids
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian
from ddjax.schedules import VPCosine

KEYS = None  # nothing is drawn


@dataclasses.dataclass(frozen=True)
class Pair:
    """At each site, +-0.8 with normals of std 0.5 around them: E[x0 | x_t] in closed form."""

    process: Gaussian
    kind: str = "x0"

    def __call__(self, xt, t, cond=None):
        t_ = t.reshape(-1, *[1] * (xt.ndim - 1))
        alpha, sigma = self.process.schedule.alpha(t_), self.process.schedule.sigma(t_)
        return self.process.convert(Prediction(pair(jnp, xt, alpha, sigma), "x0"), self.kind, xt, t)


def pair(np, x, alpha, sigma):
    total = 0.25 * alpha**2 + sigma**2
    return (0.25 * alpha * x + 0.8 * sigma**2 * np.tanh(0.8 * alpha * x / total)) / total


def stated(process, kind):
    """The same law moved by the condition: what a network of this kind says if it is right, written out.

    process: Gaussian, or an interpolant from Gaussian noise.
    """
    path, gaussian = process.schedule, isinstance(process, Gaussian)

    def denoise(xt, t, cond=None):
        t, moved = (0.0 if v is None else jnp.asarray(v).reshape(-1, *[1] * (xt.ndim - 1)) for v in (t, cond))
        alpha = path.alpha(t)
        sigma = path.sigma(t) if gaussian else jnp.hypot(process.source_std * path.beta(t), path.gamma(t))
        x0 = moved + pair(jnp, xt - alpha * moved, alpha, sigma)
        some = jnp.where(sigma == 0, 1.0, sigma)
        e = jnp.where(sigma == 0, 0.0, (xt - alpha * x0) / some)
        found = {"x0": x0, "noise": e, "score": -e / sigma}
        if gaussian:
            d = process.data_std
            total = sigma**2 + (alpha * d) ** 2
            found["v"] = alpha * e - sigma * x0
            found["edm"] = (x0 - alpha * d**2 / total * xt) / (sigma * d / jnp.sqrt(total))
            found["velocity"] = path.alpha_prime(t) * x0 + path.sigma_prime(t) * e
        else:
            found["x1"] = process.source_std**2 * path.beta(t) / some * e
            found["noise"] = path.gamma(t) / some * e
            found["residual"] = found["x1"] - x0
            drift = path.alpha_prime(t) * x0 + path.beta_prime(t) * found["x1"]
            found["velocity"] = drift + jnp.where(found["noise"] == 0, 0.0, path.gamma_prime(t) * found["noise"])
        value = [found[name] for name in kind.split("+")]
        return Prediction(value[0] if len(value) == 1 else jnp.stack(value, -1), kind)

    return denoise


def check_rows_are_their_own(make_solver):
    """Samples bit for bit the same for 1, 2 and 7 examples: the suite runs without fused multiply-adds."""
    process = Gaussian(VPCosine())
    law = lambda xt, t, cond: Prediction(0.5 * xt, "v")  # exact, whatever the batch

    def run(batch):
        settings = {"shape": (batch, 2), "solver": make_solver(process), "times": grids.uniform(5)}
        return np.asarray(ddjax.sample(jax.random.key(0), law, process, **settings).x0)

    whole = run(7)
    for batch in (1, 2):
        np.testing.assert_array_equal(run(batch), whole[:batch])
    assert len(np.unique(whole)) == 14


def walk(solver, denoise, times, x, jit=True):
    """The states at all times; one compilation for any number of them."""
    step = lambda carry, x, t, s: solver.step(KEYS, carry, x, t, s, denoise)
    step, carry, states = jax.jit(step) if jit else step, solver.init(x), [x]
    for t, s in itertools.pairwise(map(jnp.asarray, times)):
        x, carry, info = step(carry, x, t, s)
        states.append(x)
    return states, info


@functools.cache
def reference(schedule, start, end):
    """x / alpha along sigma / alpha, by another library's Runge-Kutta method of order 8."""
    alpha, sigma = (lambda t, f=f: float(f(jnp.asarray(t))) for f in (schedule.alpha, schedule.sigma))
    x = np.linspace(-1.5, 2.0, 6) * sigma(start)

    def slope(ratio, z):  # at alpha = 1: the noise in x / alpha
        return (z - pair(np, z, 1.0, ratio)) / ratio

    span = [sigma(t) / alpha(t) for t in (start, end)]
    solved = scipy.integrate.solve_ivp(slope, span, x / alpha(start), method="DOP853", rtol=1e-12, atol=1e-14)
    return x, alpha(end) * solved.y[:, -1]
