"""Gaussian laws of data against linear algebra in NumPy and integration in SciPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from gaussian_law import GaussianLaw as Oracle

import ddjax
from ddjax import gaussian_law, grids, solvers
from ddjax.data import from_arrays
from ddjax.gaussian_law import GaussianLaw
from ddjax.processes import PFGM, Gaussian
from ddjax.schedules import EDM, VE, CondOT, PerSite, VPCosine, VPLinear

SCHEDULES = {
    "vp": VPLinear(),
    "ve": VE(sigma_max=20.0),
    "edm": EDM(sigma_max=20.0),
    "cond_ot": CondOT(),
    "cosine": VPCosine(),
}
DIMS = 4


@functools.cache
def two():
    """Two labels' laws of flat states, of rank 2 of 4, and one of both behind them."""
    rng = np.random.default_rng(3)
    u = np.stack([np.linalg.qr(rng.normal(size=(DIMS, DIMS)))[0][:2] for _ in range(3)])
    v, rest = rng.uniform(0.5, 4.0, (3, 2)), rng.uniform(0.05, 0.4, 3)
    return GaussianLaw(rng.normal(size=(3, DIMS)), u, v, rest, (0.3, 0.7, 1.0))


def whole():
    """One law of all directions, and its covariance."""
    oracle = Oracle.random(DIMS, seed=1)
    v, u = np.linalg.eigh(oracle.covariance)
    return GaussianLaw(oracle.mean[None], u.T[None], v[None], [0.0]), oracle


def states(n=3, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, DIMS)))


def at(process, t):
    return tuple(float(f(jnp.asarray(t))) for f in (process.schedule.alpha, process.schedule.sigma))


@pytest.mark.parametrize("name", ["cond_ot", *[pytest.param(n, marks=pytest.mark.slow) for n in SCHEDULES]])
def test_denoiser_and_score_are_linear_algebra(x64, name):
    process, x, times = Gaussian(SCHEDULES[name]), states(), jnp.asarray([0.9, 0.4, 0.05])
    low_rank, (full, oracle) = two(), whole()
    matrices = {2: low_rank.covariance(), 0: low_rank.covariance(0), -1: oracle.covariance}
    for label, c in matrices.items():
        law, mean = (full, oracle.mean) if label < 0 else (low_rank, low_rank.means.values[label])
        cond = None if label < 0 else jnp.full(3, label)
        *got, velocity = jax.jit(
            lambda x, law=law, cond=cond: (
                law.denoise(process)(x, times, cond).value,
                law.score(process, x, times, cond),
                law.denoise(process, "velocity")(x, times, cond).value,
            )
        )(x)
        for i, t in enumerate(times):
            alpha, sigma = at(process, t)
            dev = np.linalg.solve(alpha**2 * c + sigma**2 * np.eye(DIMS), x[i] - alpha * mean)
            np.testing.assert_allclose(got[0][i], mean + alpha * c @ dev, atol=1e-10)
            np.testing.assert_allclose(got[1][i], -dev, atol=1e-9)
            slopes = (float(f(t)) for f in (process.schedule.alpha_prime, process.schedule.sigma_prime))
            change = np.array([mean + alpha * c @ dev, sigma * dev]).T @ np.array([*slopes])
            np.testing.assert_allclose(velocity[i], change, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["cond_ot", *[pytest.param(n, marks=pytest.mark.slow) for n in ("ve", "edm", "vp")]])
def test_the_flow_is_the_odes_solution(x64, name):
    """Against SciPy on the PF-ODE, with the score by linear algebra, from near one end to near the other."""
    process, (law, oracle) = Gaussian(SCHEDULES[name]), whole()
    x, start, end = states(1)[0] * at(process, 0.98)[1], 0.98, 0.02
    coefficients = jax.jit(lambda t: (*process.sde(t), process.schedule.alpha(t), process.schedule.sigma(t)))

    def slope(t, x):
        drift, g2, alpha, sigma = map(float, coefficients(t))
        c = alpha**2 * oracle.covariance + sigma**2 * np.eye(DIMS)
        return drift * x + 0.5 * g2 * np.linalg.solve(c, x - alpha * oracle.mean)

    solved = scipy.integrate.solve_ivp(slope, (start, end), x, method="DOP853", rtol=1e-11, atol=1e-12)
    got = law.flow(process, x[None], jnp.asarray(start), jnp.asarray(end))[0]
    np.testing.assert_allclose(got, solved.y[:, -1], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["cond_ot", *[pytest.param(n, marks=pytest.mark.slow) for n in SCHEDULES]])
def test_both_ends_of_the_flow(x64, name):
    """From pure noise to data and back: standard normals become the law, and no end has a NaN."""
    process, law = Gaussian(SCHEDULES[name]), two()
    x, label = states() * at(process, 1.0)[1], jnp.asarray([0, 1, 2])
    flow = jax.jit(lambda law, x, t, s, label: law.flow(process, x, t, s, label), static_argnums=0)
    x0 = flow(law, x, jnp.ones(3), jnp.zeros(3), label)
    (alpha, sigma), (signal, left) = at(process, 1.0), at(process, 0.0)
    for i in range(3):
        c, m = law.covariance(i), law.means.values[i]
        v, u = np.linalg.eigh(c)
        step = (u * np.sqrt((signal**2 * v + left**2) / (alpha**2 * v + sigma**2))) @ u.T
        np.testing.assert_allclose(x0[i], signal * m + step @ (x[i] - alpha * m), atol=1e-9)
    back = flow(law, x0, jnp.asarray(0.0), jnp.asarray(1.0), label)
    np.testing.assert_allclose(back, x, rtol=1e-9, atol=1e-9)
    for t in (0.0, 1.0):
        for kind in ("x0", "velocity", "v"):
            assert np.isfinite(jax.jit(law.denoise(process, kind))(x, jnp.full(3, t), label).value).all()
    point = dataclasses.replace(law, variances=np.zeros((3, 2)), rest=np.zeros(3))  # has no deviations but noise
    for t in (1.0, 0.0):
        x0 = flow(point, x, jnp.asarray(t), jnp.asarray(0.0), None)
        noise = 0.0 if left == 0 else left / at(process, t)[1] * (x - at(process, t)[0] * law.means.values[2])
        np.testing.assert_allclose(x0, np.broadcast_to(signal * law.means.values[2] + noise, x0.shape), atol=1e-9)


@pytest.mark.slow
def test_without_a_label_it_may_be_the_mixture(x64):
    """The score of the labels' mixture, by differentiation of its density."""
    law, process = two(), Gaussian(CondOT())
    x, t = states(), 0.6
    alpha, sigma = at(process, t)

    def log_p(x):
        densities = [
            jnp.log(w)
            + jax.scipy.stats.multivariate_normal.logpdf(
                x, alpha * law.means.values[k], alpha**2 * law.covariance(k) + sigma**2 * np.eye(DIMS)
            )
            for k, w in enumerate((0.3, 0.7))
        ]
        return jax.nn.logsumexp(jnp.stack(densities))

    denoise = law.denoise(process, "score", mixture=True)
    want = jax.jit(jax.vmap(jax.grad(log_p)))(x)
    denoise, score = jax.jit(denoise), jax.jit(functools.partial(law.score, process))
    np.testing.assert_allclose(denoise(x, jnp.full(3, t)).value, want, atol=1e-10)
    mixed = denoise(x, jnp.full(3, t), jnp.asarray([2, 0, 1])).value
    np.testing.assert_allclose(mixed[0], want[0], atol=1e-10)
    of_labels = score(x, jnp.full(3, t), jnp.asarray([2, 0, 1]))
    np.testing.assert_allclose(mixed[1:], of_labels[1:], atol=1e-10)


def test_fitted_in_one_pass_and_kept(x64, tmp_path):
    rng = np.random.default_rng(0)
    x = 1000.0 + rng.normal(size=(50, 2, 3, 1)) @ np.array([[2.0]])
    labels = np.arange(50) % 3
    law = gaussian_law.fit(x, 4, labels=labels, chunk=7)
    assert (law.laws, law.rank, law.shape) == (4, 4, (2, 3, 1))
    for k in range(4):
        own = x[labels == k] if k < 3 else x
        flat = own.reshape(len(own), -1)
        np.testing.assert_allclose(law.means.values[k], own.mean(0), rtol=1e-12)
        v = np.linalg.eigvalsh(np.cov(flat.T, bias=True))[::-1]
        np.testing.assert_allclose(law.variances.values[k], v[:4], rtol=1e-9)
        np.testing.assert_allclose(law.rest.values[k], v[4:].mean(), rtol=1e-7)
        whole = gaussian_law.fit(own, chunk=50)
        np.testing.assert_allclose(whole.covariance(), np.cov(flat.T, bias=True), atol=1e-9)
        np.testing.assert_allclose(np.trace(law.covariance(k)), v.sum(), rtol=1e-9)
    np.testing.assert_allclose(law.weights.values, [17 / 50, 17 / 50, 16 / 50, 1.0])
    law.save(tmp_path / "law.safetensors")
    assert gaussian_law.load(tmp_path / "law.safetensors") == law
    data = from_arrays(x.astype(np.float32), labels)
    np.testing.assert_array_equal(
        gaussian_law.fit(data, 2, labels=True).means, gaussian_law.fit(x.astype(np.float32), 2, labels=labels).means
    )
    assert gaussian_law.fit(data, 0).rest.values[0] == pytest.approx(np.var(x.reshape(50, -1), axis=0).mean(), rel=1e-4)


@pytest.mark.slow
def test_outlines_first(x64):
    """What settles when, against the ODE's own path."""
    law, process = two(), Gaussian(VPLinear())
    rng = np.random.default_rng(0)
    x0 = jnp.asarray(law.means.values[-1] + rng.normal(size=(1, DIMS)))
    u, v = law.directions.values[-1], law.variances.values[-1]
    flow = jax.jit(lambda x, t, s: law.flow(process, x, t, s))
    derivative, x0_at = (
        jax.jit(jax.jacfwd(lambda x, t: flow(x, t, jnp.zeros(()))[0])),
        jax.jit(functools.partial(law.x0, process)),
    )
    for t in map(jnp.asarray, (0.9, 0.1)):
        xt = flow(x0, jnp.zeros(()), t)
        predicted = x0_at(xt, t)
        share = u @ np.asarray(predicted - law.means.values[-1])[0] / (u @ np.asarray(x0 - law.means.values[-1])[0])
        np.testing.assert_allclose(law.settled(process, t)[-1], share, rtol=1e-9)
        outcome = derivative(xt, t)[:, 0]
        np.testing.assert_allclose(np.diag(u @ outcome @ u.T), law.sensitivity(process, t)[-1], rtol=1e-9)
    times = np.asarray(law.settling_time(process, 0.7))
    for k in range(3):
        for i in range(2):
            np.testing.assert_allclose(law.settled(process, times[k, i])[k, i], 0.7, rtol=1e-9)
    assert (np.diff(times[:, np.argsort(v)][-1]) > 0).all()  # of more variance, sooner after noise
    point = dataclasses.replace(law, variances=np.zeros((3, 2)))
    np.testing.assert_array_equal(point.settling_time(process), 0.0)


def test_early_changes_matter_more():
    """Under constant total variance, a unit change along a direction of variance above 1 fades the later it is made."""
    law, process = two(), Gaussian(VPLinear())
    sensitive = np.stack([law.sensitivity(process, t) for t in np.linspace(0.0, 0.99, 9)])
    above = law.variances.values > 1
    change = np.diff(sensitive, axis=0)
    assert (change[:, above] > 0).all()
    assert (change[:, ~above] < 0).all()
    np.testing.assert_allclose(sensitive[0], 1.0, rtol=1e-5)


@pytest.mark.slow
def test_any_network_of_gaussian_data_agrees(x64):
    """DDIM with the law's own denoiser converges to its flow, at first order."""
    law, process = two(), Gaussian(CondOT())
    x, label = states(2), jnp.asarray([0, 2])
    settings = {"shape": x.shape, "init": x, "cond": label, "solver": solvers.DDIM(process)}
    errors = []
    for n in (40, 80):
        drawn = ddjax.sample(jax.random.key(0), law.denoise(process), process, times=grids.uniform(n), **settings).x0
        errors.append(np.abs(drawn - law.flow(process, x, jnp.asarray(1.0), jnp.asarray(0.0), label)).max())
    assert 1.7 < errors[0] / errors[1] < 2.3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GaussianLaw(np.zeros((1, 3)), np.ones((1, 1, 3)), [[1.0]], [0.0]), "orthonormal"),
        (lambda: GaussianLaw(np.zeros((1, 3)), np.eye(3)[None, :1], [[-1.0]], [0.0]), "negative"),
        (lambda: GaussianLaw(np.zeros((1, 3)), np.eye(3)[None, :1], [[1.0, 2.0]], [0.0]), "variances must have shape"),
        (lambda: GaussianLaw(np.zeros((1, 2)), np.eye(3)[None, :1], [[1.0]], [0.0]), "not those of states"),
        (lambda: two().denoise(PFGM(CondOT(), D=4.0)), "needs a processes.Gaussian"),
        (lambda: two().denoise(Gaussian(PerSite.initial((4,)))), "one schedule for all sites"),
        (lambda: whole()[0].denoise(Gaussian(), mixture=True), "there is one law"),
        (lambda: two().x0(Gaussian(), jnp.zeros((2, 5)), jnp.asarray(0.5)), "states of shape"),
        (lambda: two().x0(Gaussian(), jnp.zeros((2, 4)), jnp.zeros((2, 4))), "one time for all sites"),
        (lambda: two().settling_time(Gaussian(), 1.0), "between 0 and 1"),
        (lambda: gaussian_law.fit(np.zeros((4, 2)), 3), "rank must be"),
        (lambda: gaussian_law.fit(np.zeros((0, 2))), "no items"),
        (lambda: gaussian_law.fit(np.zeros((2, 2)), labels=[0, 2]), "no items of label 1"),
        (lambda: gaussian_law.fit(np.full((2, 2), np.nan)), "finite"),
        (lambda: gaussian_law.fit(np.zeros((2, 2)), labels=[0.0, 1.0]), "whole numbers"),
        (lambda: gaussian_law.fit(from_arrays(np.zeros((2, 2), int), num_symbols=3)), "tokens"),
        (lambda: gaussian_law.fit(from_arrays(np.zeros((2, 2), np.float32)), labels=True), "no labels"),
    ],
)
def test_errors(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="not a safetensors file"):
        gaussian_law.load(tmp_path / "a.safetensors")
    ddjax.training.export_safetensors(tmp_path / "b.safetensors", {"x": np.zeros(1)})
    with pytest.raises(ValueError, match="holds no Gaussian law"):
        gaussian_law.load(tmp_path / "b.safetensors")
    with pytest.raises(FileNotFoundError):
        gaussian_law.load(tmp_path / "c.safetensors")
