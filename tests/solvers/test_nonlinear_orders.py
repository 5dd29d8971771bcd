"""Weak and strong orders of the stochastic solvers on a mixture, whose denoiser is not linear, by coupled paths.

Solutions of n and of 2 n steps follow the same path, so the difference of E[f(x)] between them is known to a share of
itself from a quarter of a million paths, where each of the two alone would drown in chance.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_stochastic_solvers import SOLVERS, levels

from ddjax import random
from ddjax.predictions import Prediction
from ddjax.processes import Gaussian
from ddjax.schedules import VPCosine

PROCESS, START, END, COUNTS = Gaussian(VPCosine()), 0.85, 0.3, (8, 16, 32)
SHARE, PLACE, STD = 0.3, 0.8, 0.5  # of the two normals: that at +PLACE has SHARE
FUNCTIONS = (lambda x: x, np.square, lambda x: np.cos(2 * x), lambda x: np.sin(3 * x), lambda x: np.exp(-x))
# All follow the path by its increments alone, one a step, so no strong order is above 1. The window opens and closes
# within a step, elsewhere for each grid: its paths are compared in law alone.
WITHOUT_STRONG = ("sa_window",)


def mixture(x, t, cond=None):
    """E[x0 | x_t], by Bayes' rule."""
    t = t[..., None]
    alpha, sigma = PROCESS.schedule.alpha(t), PROCESS.schedule.sigma(t)
    total = STD**2 * alpha**2 + sigma**2
    side = jnp.tanh(PLACE * alpha * x / total + 0.5 * np.log(SHARE / (1 - SHARE)))
    return Prediction((STD**2 * alpha * x + PLACE * sigma**2 * side) / total, "x0")


def draw(rng, paths, t):
    """The exact law at a time."""
    alpha, sigma = levels(PROCESS, t)
    x0 = np.where(rng.random((paths, 1)) < SHARE, PLACE, -PLACE) + STD * rng.normal(size=(paths, 1))
    return alpha * x0 + sigma * rng.normal(size=(paths, 1))


class Told:
    """Normals of the step that is being made."""

    def init(self, x):
        return ()

    def draw(self, state, keys, x, t, s):
        return self.now, state


def normals(rng, paths):
    """For each count those of its steps; of two halves of a step what they add up to on the clock (alpha / sigma)^2."""
    found = {COUNTS[-1]: rng.normal(size=(COUNTS[-1], paths, 1))}
    for n in COUNTS[-2::-1]:
        clock = np.exp(np.asarray(PROCESS.schedule.log_snr(jnp.linspace(START, END, 2 * n + 1))))
        parts = np.sqrt(np.diff(clock))[:, None, None] * found[2 * n]
        found[n] = (parts[::2] + parts[1::2]) / np.sqrt(np.diff(clock[::2]))[:, None, None]
    return found


def ends(name, paths):
    """Of each count of steps."""
    rng = np.random.default_rng(0)
    source = Told()
    solver, start, z = SOLVERS[name][0](PROCESS, source), jnp.asarray(draw(rng, paths, START)), normals(rng, paths)
    keys = jnp.broadcast_to(random.example_keys(jax.random.key(0), 1), (paths,))  # of no use but to be folded

    @jax.jit
    def step(carry, x, t, s, now):
        source.now = now
        return solver.step(keys, carry, x, t, s, mixture)[:2]

    for n in COUNTS:
        x, carry = start, solver.init(start)
        for i, (t, s) in enumerate(itertools.pairwise(jnp.linspace(START, END, n + 1))):
            x, carry = step(carry, x, t, s, jnp.asarray(z[n][i]))
        yield np.asarray(x[:, 0])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, (_, order, _) in SOLVERS.items() if order])
def test_weak_and_strong_order_on_a_mixture(x64, name):
    order, paths = SOLVERS[name][1], 2**20 if name == "sde_2m_exact" else 2**18  # whose errors are ten times less
    found = np.array(list(ends(name, paths)))
    of_f = np.array([[f(x) for f in FUNCTIONS] for x in found])  # (counts, functions, paths)
    apart = of_f[:-1] - of_f[1:]
    weak = np.sqrt((apart.mean(-1) ** 2).sum(-1))
    chance = np.sqrt(apart.var(-1).sum(-1) / paths) / weak
    strong = np.sqrt(((found[:-1] - found[1:]) ** 2).mean(-1))
    slope, of_paths = (float(np.log2(v[0] / v[1])) for v in (weak, strong))
    print("nonlinear", name, order, slope, chance, of_paths)
    assert np.hypot(*chance) / np.log(2) < 0.4  # of the slope
    assert order - 0.35 < slope < order + 1.0, (slope, chance)  # in some a third order still outweighs the second
    assert name in WITHOUT_STRONG or 0.75 < of_paths < 1.6, of_paths
    # And it is the law that is to be had that they go to.
    exact = draw(np.random.default_rng(1), 16 * paths, END)[:, 0]
    by_chance = np.array([np.std(f(exact)) for f in FUNCTIONS]) * np.sqrt(1 / paths + 1 / (16 * paths))
    off = of_f[-1].mean(-1) - [f(exact).mean() for f in FUNCTIONS]
    still = np.abs(apart[-1].mean(-1)) * 2 ** (1 - order) * 2  # what is left at that order, twice
    assert (np.abs(off) < 4 * by_chance + still).all(), (off, by_chance, still)
