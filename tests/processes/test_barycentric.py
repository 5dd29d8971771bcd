"""Interpolants between K Gaussian marginals, by linear algebra in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
from gaussian_law import points

from ddjax import random
from ddjax.objectives import multimarginal, path_cost, together
from ddjax.paths import Straight
from ddjax.predictions import Prediction
from ddjax.processes import Barycentric, Interpolant
from ddjax.simplex import Edge, Sines

RNG = np.random.default_rng(0)
FACTORS = 0.3 * RNG.normal(size=(3, 2, 2)) + np.eye(2) * np.asarray([0.8, 1.0, 0.0])[:, None, None]
FACTORS[2] = 1.7 * np.eye(2)
C = FACTORS @ FACTORS.transpose(0, 2, 1)
M = np.asarray([[0.5, 0.1], [-0.3, 0.6], [0.0, 0.0]])
PATH = Sines(3, 0, 1, RNG.normal(size=(3, 2)))
PROCESS = Barycentric(PATH)


def law(alpha):
    """Mean and covariance of x(alpha)."""
    return alpha @ M, np.einsum("k,kij->ij", alpha**2, C)


def fields(x, alpha):
    """g_k(alpha, x), `(batch, 2, 3)`, by conditioning the joint normal; alpha is (batch, 3)."""
    s = jnp.einsum("bk,kij->bij", alpha**2, C)
    away = jnp.linalg.solve(s, (x - alpha @ M)[..., None])[..., 0]
    return jnp.moveaxis(M[None] + alpha[..., None] * jnp.einsum("kij,bj->bki", C, away), 1, -1)


def apply(params, x, alpha, cond, *, rng=None, train=False):
    return fields(x, alpha) + params["offset"] + params["slope"] * x[..., None]


EXACT = {"offset": jnp.zeros(3), "slope": jnp.zeros(3)}


def cubature():
    """(x_0, x_1, x_2), exact for quadratics."""
    z = points(6).reshape(-1, 3, 2)
    return np.moveaxis(M[None] + np.einsum("kij,bkj->bki", FACTORS, z), 1, -1)


@pytest.mark.slow
def test_a_path_stays_on_the_simplex_and_has_its_slope(x64):
    t = jnp.linspace(0.0, 1.0, 9)
    for path in (PATH, Edge(3, 2, 0), Sines.initial(4)):
        alpha, slope, exact = (
            np.asarray(v)
            for v in jax.jit(lambda t, p=path: (p.point(t), p.slope(t), jax.vmap(jax.jacfwd(p.point))(t)))(t)
        )
        assert (alpha >= 0).all()
        np.testing.assert_allclose(alpha.sum(-1), 1.0, rtol=1e-12)
        np.testing.assert_allclose(alpha[[0, -1]], np.eye(path.marginals)[[path.first, path.last]], atol=1e-12)
        np.testing.assert_allclose(slope, exact, rtol=1e-9, atol=1e-12)
    # The formula, written again.
    raw = np.asarray([0.7, 0.3, 0.0]) + (np.sin(np.pi * 0.3 * np.arange(1, 3)) @ np.asarray(PATH.parameters).T) ** 2
    np.testing.assert_allclose(PATH.point(jnp.asarray(0.3)), raw / raw.sum(), rtol=1e-12)
    assert Sines(3, 0, 1, np.asarray(PATH.parameters)) == PATH
    assert hash(PROCESS.with_parameters(np.asarray(PATH.parameters))) == hash(PROCESS)


def test_the_loss_is_least_at_the_conditional_means(x64, monkeypatch):
    """There it is the posterior variance of all ends (Schur complement), and its slopes are 0."""
    alpha, ends = np.asarray([0.2, 0.5, 0.3]), cubature()
    monkeypatch.setattr(jax.random, "dirichlet", lambda key, law, dtype=None: jnp.asarray(alpha))
    x0, cond = jnp.asarray(ends[..., 0]), {"ends": jnp.asarray(ends[..., 1:]), "cond": None}
    params = jax.tree.map(lambda v: jnp.asarray(v, float), EXACT)
    objective = multimarginal(PROCESS)
    loss, slopes = jax.jit(jax.value_and_grad(lambda p: objective(jax.random.key(0), apply, p, x0, cond)[0]))(params)
    s = law(alpha)[1]
    left = sum(np.trace(C[k] - alpha[k] ** 2 * C[k] @ np.linalg.solve(s, C[k])) for k in range(3))
    np.testing.assert_allclose(2 * loss, left, rtol=1e-11)
    for slope in slopes.values():
        np.testing.assert_allclose(slope, 0.0, atol=1e-12)


@pytest.fixture(scope="module")
def transported():
    """An affine flow's images of 0 and the unit vectors, from t = 1 to 0: by RK4, and by n steps of `reverse`."""
    with jax.enable_x64(True):
        start = jnp.asarray([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])

        def velocity(x, t):
            g = Prediction(fields(x, PROCESS.point(t, x)), "ends")
            return PROCESS.convert(g, "velocity", x, t).value

        @jax.jit
        def exact(x):
            n = 400

            def step(x, i):
                t, h = 1.0 - i / n, -1.0 / n
                k1 = velocity(x, t)
                k2 = velocity(x + h / 2 * k1, t + h / 2)
                k3 = velocity(x + h / 2 * k2, t + h / 2)
                return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + velocity(x + h * k3, t + h)), x

            return jax.lax.scan(step, x, jnp.arange(n))

        def euler(x, n):
            def step(x, i):
                t, s = 1.0 - i / n, 1.0 - (i + 1) / n
                g = Prediction(fields(x, PROCESS.point(t, x)), "ends")
                return PROCESS.reverse(g, x, s, t).mean, None

            return jax.lax.scan(step, x, jnp.arange(n))[0]

        end, states = exact(start)
        chains = [np.asarray(jax.jit(euler, static_argnums=1)(start, n)) for n in (100, 200)]
        return np.asarray(end), np.asarray(states), chains


def moments(images):
    """The law's mean and covariance after the flow, from those of marginal 1."""
    matrix = (images[1:] - images[0]).T
    return images[0] + matrix @ M[1], matrix @ C[1] @ matrix.T


def test_the_ode_along_any_path_carries_the_law_from_end_to_end(transported):
    end, states, chains = transported
    mean, covariance = moments(end)
    np.testing.assert_allclose(mean, M[0], atol=1e-8)
    np.testing.assert_allclose(covariance, C[0], atol=1e-8)
    # On the way too, where all three marginals have a part.
    alpha = np.asarray(PATH.point(jnp.asarray(0.4)))
    assert alpha.min() > 0.05
    mean, covariance = moments(states[240])
    np.testing.assert_allclose(mean, law(alpha)[0], atol=1e-6)  # alpha in float32
    np.testing.assert_allclose(covariance, law(alpha)[1], atol=1e-6)
    # Sampling's steps tend to it at first order.
    coarse, fine = (np.abs(moments(chain)[1] - C[0]).max() for chain in chains)
    assert 1.6 < coarse / fine < 2.5


def test_on_an_edge_it_is_the_interpolant(x64):
    process, other = Barycentric(Edge(3, 0, 2)), Interpolant(Straight())
    ends = jnp.asarray(cubature())

    @jax.jit
    def both(ends):
        t, s = jnp.full(len(ends), 0.6), jnp.full(len(ends), 0.35)
        xt = process.mix(ends, t)
        said = Prediction(fields(xt, process.point(t, xt)), "ends")
        x0, velocity = Prediction(said.value[..., 0], "x0"), process.convert(said, "velocity", xt, t)
        theirs = other.reverse(x0, xt, s, t).mean
        return (
            (xt, other.marginal(ends[..., 0], t, ends[..., 2]).mean),
            (velocity.value, other.convert(x0, "velocity", xt, t).value),
            (process.reverse(said, xt, s, t).mean, theirs),
            (process.reverse(velocity, xt, s, t).mean, theirs),
        )

    for ours, theirs in both(ends):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9)


def test_the_score_of_a_gaussian_end(x64):
    alpha = jnp.broadcast_to(jnp.asarray([0.2, 0.5, 0.3]), (4, 3))
    x = jnp.asarray(RNG.normal(size=(4, 2)))
    score = PROCESS.score(Prediction(fields(x, alpha), "ends"), x, alpha, end=2, std=1.7)
    mean, covariance = law(np.asarray(alpha[0]))
    np.testing.assert_allclose(score, -np.linalg.solve(covariance, (np.asarray(x) - mean).T).T, rtol=1e-10)


def energy_at(path, t):
    """E |velocity|^2 in closed form: |m'|^2 + tr(A S A'), A = sum alpha_k' alpha_k C_k / S."""
    alpha, slope = np.asarray(path.point(jnp.asarray(t))), np.asarray(path.slope(jnp.asarray(t)))
    s = law(alpha)[1]
    a = np.einsum("k,kij->ij", slope * alpha, C) @ np.linalg.inv(s)
    return np.sum((slope @ M) ** 2) + np.trace(a @ s @ a.T)


def cost(coefficients, nodes=40):
    """Its integral along the path with these coefficients."""
    path, (u, w) = dataclasses.replace(PATH, coefficients=coefficients), np.polynomial.legendre.leggauss(nodes)
    return sum(0.5 * weight * energy_at(path, 0.5 * (node + 1)) for node, weight in zip(u, w, strict=True))


@pytest.mark.slow
def test_the_paths_cost_is_its_kinetic_energy_and_learning_lowers_it(x64, monkeypatch):
    """Its slopes too. Learning goes towards the least along an edge, (integral of the speed)^2, at constant speed."""
    ends, (u, w) = cubature(), np.polynomial.legendre.leggauss(24)
    monkeypatch.setattr(random, "stratified", lambda key, rows, dtype=None: jnp.repeat(jnp.asarray(0.5 * (u + 1)), 12))
    weights = jnp.asarray(np.repeat(0.5 * w, 12))
    every = jnp.asarray(np.tile(ends, (24, 1, 1)))
    objective, cond = path_cost(PROCESS), {"ends": every[..., 1:], "cond": None}
    network = jax.tree.map(lambda v: jnp.asarray(v, float), EXACT)

    def energy(params):
        return 2 * objective(jax.random.key(0), apply, params, every[..., 0], cond, weights)[0]

    at, direction, nudge = np.asarray(PATH.parameters), RNG.normal(size=(3, 2)), 1e-5
    value, slopes = jax.jit(jax.value_and_grad(energy))({"network": network, "process": jnp.asarray(at)})
    np.testing.assert_allclose(value, cost(at, 24), rtol=1e-9)
    numeric = (cost(at + nudge * direction, 24) - cost(at - nudge * direction, 24)) / (2 * nudge)
    np.testing.assert_allclose(jnp.vdot(slopes["process"], direction), numeric, rtol=1e-6)
    start = Sines.initial(3, 2).parameters
    optimizer = optax.adam(0.05)

    @jax.jit
    def learn(params):
        def step(carry, _):
            params, state = carry
            value, slopes = jax.value_and_grad(energy)(params)
            updates, state = optimizer.update(slopes, state)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (params, optimizer.init(params)), None, 150)

    (learned, _), _ = learn({"network": network, "process": start})
    for name, value in EXACT.items():
        np.testing.assert_array_equal(learned["network"][name], value)  # the network gets no gradient
    u, w = np.polynomial.legendre.leggauss(60)
    speeds = [energy_at(Edge(3), t) ** 0.5 for t in 0.5 * (u + 1)]
    fastest = float(0.5 * w @ speeds) ** 2
    root = scipy.linalg.sqrtm(C[1])
    least = np.sum((M[0] - M[1]) ** 2) + np.trace(C[0] + C[1] - 2 * scipy.linalg.sqrtm(root @ C[0] @ root).real)
    final = cost(np.asarray(learned["process"]))
    edge = cost(np.zeros((3, 1)))
    assert least < fastest < edge - 0.02
    assert fastest - 1e-3 < final < fastest + 0.5 * (edge - fastest)


def test_sampling_with_a_network_of_long_channels_and_what_is_wrong():
    process = Barycentric(Edge(3))
    xt, alpha = jnp.ones((4, 2)), jnp.full((4, 3), 1 / 3)
    told = process.network_inputs(xt, jnp.asarray(0.25), "ends")[1]
    np.testing.assert_allclose(told, np.tile([0.75, 0.25, 0.0], (4, 1)))
    value = process.network_outputs(jnp.arange(24.0).reshape(4, 6), xt, alpha, "ends")
    np.testing.assert_array_equal(value[0, :, 1], [2.0, 3.0])
    said = Prediction(value, "ends")
    with pytest.raises(ValueError, match="time"):
        process.convert(said, "velocity", xt, alpha)
    with pytest.raises(ValueError, match="predict 'ends'"):
        process.convert(Prediction(xt, "velocity"), "ends", xt, 0.5)
    with pytest.raises(ValueError, match="must have shape"):
        process.reverse(Prediction(xt, "ends"), xt, 0.1, 0.2)
    with pytest.raises(ValueError, match="simplex"):
        process.point(jnp.ones((4, 2)), xt)
    with pytest.raises(ValueError, match="vertices"):
        Edge(2, 0, 2)
    with pytest.raises(ValueError, match="parameters"):
        path_cost(process)
    with pytest.raises(ValueError, match="concentration"):
        multimarginal(process, concentration=0.0)
    with pytest.raises(ValueError, match="marginals"):
        multimarginal(process, together())(
            jax.random.key(0), apply, EXACT, xt, {"ends": jnp.ones((4, 2, 1)), "cond": None}
        )
    with pytest.raises(ValueError, match="coefficients"):
        Sines(3, 0, 1, np.zeros(3))
    with pytest.raises(ValueError, match="per example"):
        multimarginal(process)(
            jax.random.key(0), apply, EXACT, xt, {"ends": jnp.ones((4, 2, 2))}, jnp.ones((4,))[:, None]
        )
